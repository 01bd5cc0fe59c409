"""Attention over one segment: the blockwise program, its reference, and the merge of segments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import numpy_softmax, quick_jit, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from memjax.pallas_kernels.codes import Codes, absmax_encode, dense
from memjax.pallas_kernels.flash import attention_reference, attention_xla, merge, visible

BATCH, HEADS, ROWS, SLOTS, DIM, EXTRA = 2, 2, 5, 40, 16, 4
STATIC = ("scale", "softcap", "window", "recent", "sinks")
xla = quick_jit(attention_xla, static_argnames=("block", *STATIC))
reference = quick_jit(attention_reference, static_argnames=STATIC)


@functools.cache
def inputs(fmt: str, latent: bool = False):
    """Queries at ragged positions over slots in shuffled order, some of them free; row 3 of batch 1 sees nothing."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    encode = jax.jit(lambda x: dense(x) if fmt == "dense" else absmax_encode(x, fmt))
    k_pos = np.stack([[rng.permutation(SLOTS) for _ in range(HEADS)] for _ in range(BATCH)])
    k_pos = np.where(rng.random(k_pos.shape) < 0.2, -1, k_pos).astype(np.int32)
    q_pos = rng.integers(5, SLOTS, (BATCH, ROWS)).astype(np.int32)
    q_pos[1, 3] = -1
    made = {
        "q": draw(BATCH, HEADS, ROWS, DIM),
        "k": encode(draw(BATCH, HEADS, SLOTS, DIM)),
        "v": None if latent else encode(draw(BATCH, HEADS, SLOTS, DIM)),
        "q_pos": q_pos,
        "k_pos": k_pos,
    }
    if latent:
        made |= {"q_extra": draw(BATCH, HEADS, ROWS, EXTRA), "k_extra": dense(draw(BATCH, HEADS, SLOTS, EXTRA))}
    return made


def call(function, made, **options):
    made = dict(made)
    return function(made.pop("q"), made.pop("k"), made.pop("v"), **made, **options)


CASES = {
    "one block": ("dense", {"block": 64}),
    "blocks that divide": ("int8", {"block": 10}),
    "blocks that do not": ("int4", {"block": 16}),
    "window": ("int8", {"block": 16, "window": 7}),
    "softcap": ("dense", {"block": 16, "softcap": 0.5}),
    "recent and sinks": ("e4m3", {"block": 64, "recent": 6, "sinks": 3}),
    "everything": ("e5m2", {"block": 7, "recent": 9, "sinks": 2, "window": 20, "softcap": 2.0}),
}


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_blocks_give_what_the_reference_says(case, latent):
    fmt, options = CASES[case]
    if latent and case not in ("blocks that do not", "everything"):
        return
    made = inputs(fmt, latent)
    out, lse = call(xla, made, scale=0.25, **options)
    options = {name: value for name, value in options.items() if name != "block"}
    expected, expected_lse = call(reference, made, scale=0.25, **options)
    np.testing.assert_allclose(out, expected, atol=2e-6, rtol=1e-5)
    np.testing.assert_allclose(lse, expected_lse, atol=2e-6, rtol=1e-5)
    np.testing.assert_array_equal(out[1, :, 3], 0.0)
    assert (np.asarray(lse)[1, :, 3] == -np.inf).all()


def test_the_reference_is_softmax_attention():
    made = inputs("dense")
    q, k, v = (np.float64(x) for x in (made["q"], made["k"].data, made["v"].data))
    seen, seeing = np.float64(made["k_pos"])[:, :, None, :], made["q_pos"][:, None, :, None]
    mask = (seen >= 0) & (seen <= seeing) & ((seeing - seen < 6) | (seen < 3)) & (seeing - seen < 20)
    scores = 2.0 * np.tanh(q @ k.swapaxes(-1, -2) * 0.25 / 2.0)
    some = mask.any(-1)
    weights = numpy_softmax(scores, mask | ~some[..., None]) * some[..., None]
    out, lse = call(reference, made, scale=0.25, softcap=2.0, recent=6, sinks=3, window=20)
    np.testing.assert_allclose(out, weights @ v, atol=2e-6)
    with np.errstate(divide="ignore"):
        expected = np.log(np.sum(np.exp(scores) * mask, axis=-1))
    np.testing.assert_allclose(lse, expected, atol=2e-6)


def test_who_sees_whom():
    k_pos = np.array([[[-1, 0, 1, 2, 3, 4, 5, 6]]])
    mask = visible(jnp.array([[5, 0]]), jnp.asarray(k_pos), window=5, recent=2, sinks=2)
    assert mask[0, 0].astype(int).tolist() == [[0, 0, 1, 0, 0, 1, 1, 0], [0, 1, 0, 0, 0, 0, 0, 0]]


def test_what_lies_in_free_slots_does_not_matter():
    made = inputs("int8")
    free = made["k_pos"] < 0
    for name in ("k", "v"):
        scale = jnp.where(free, jnp.nan, made[name].scale).astype(jnp.bfloat16)
        made = made | {name: Codes(made[name].data, scale, "int8")}
    out, lse = call(xla, made, scale=0.25, block=16)
    expected, expected_lse = call(xla, inputs("int8"), scale=0.25, block=16)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(lse, expected_lse)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_reaches_those_who_see_it(bad):
    made = inputs("dense")
    k = np.asarray(made["k"].data).copy()
    slot = int(np.argmax(made["k_pos"][0, 0] == 0))
    k[0, 0, slot] = bad
    out, lse = call(xla, made | {"k": dense(k)}, scale=0.25, block=64)
    expected, _ = call(xla, made, scale=0.25, block=64)
    assert made["k_pos"][0, 0, slot] == 0
    assert not np.isfinite(out[0, 0]).all(-1).any()
    assert not np.isfinite(lse[0, 0]).any()
    np.testing.assert_array_equal(out[0, 1], expected[0, 1])
    np.testing.assert_array_equal(out[1], expected[1])


@pytest.mark.parametrize("fmt", ["int8", "e5m2"])
def test_small_values_survive_float16_queries(fmt):
    """A probability of 1/400 times a scale of 1e-6 is nothing in float16."""
    rng = np.random.default_rng(1)
    encode = jax.jit(lambda x: absmax_encode(x, fmt))
    k, v = (encode(rng.standard_normal((1, 1, 400, DIM)).astype(np.float32) * s) for s in (1.0, 0.02))
    places = {"q_pos": np.full((1, 4), 400), "k_pos": np.arange(400)[None, None], "scale": 0.25}
    q = rng.standard_normal((1, 1, 4, DIM)).astype(np.float16)
    out, _ = xla(q, k, v, **places)
    expected, _ = reference(q, k, v, **places)
    assert relative_error(out, expected) < 2e-3


def part_of(scores: np.ndarray, values: np.ndarray):
    """Output and log-sum-exp of attention over some slots, float32 rounded from float64."""
    if scores.shape[-1] == 0:
        return np.zeros((*scores.shape[:-1], values.shape[-1]), np.float32), np.full(
            scores.shape[:-1], -np.inf, np.float32
        )
    peak = scores.max(-1, keepdims=True)
    weights = np.exp(scores - peak)
    total = weights.sum(-1, keepdims=True)
    return np.float32(weights / total @ values), np.float32((peak + np.log(total))[..., 0])


merged = quick_jit(merge)


@given(
    seed=st.integers(0, 2**16),
    cuts=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    spread=st.sampled_from([0.1, 10.0, 300.0]),
    offset=st.sampled_from([-500.0, 0.0, 500.0]),
)
@settings(max_examples=60, deadline=None)
def test_merging_is_exact_and_associative(seed, cuts, spread, offset):
    """Any split into three, empty parts too, whatever the size of the scores."""
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((3, 12)) * spread + offset
    values = rng.standard_normal((12, 4))
    low, high = sorted(cuts)
    a, b, c = (part_of(scores[:, s], values[s]) for s in (slice(0, low), slice(low, high), slice(high, 12)))
    whole, lse = part_of(scores, values)
    for out, total in (merged([a, b, c]), merged([merged([a, b]), c]), merged([a, merged([c, b])])):
        np.testing.assert_allclose(out, whole, atol=1e-3 if spread > 100 else 2e-4)
        np.testing.assert_allclose(total, lse, rtol=1e-6, atol=1e-5)


def test_merging_nothing_with_nothing_is_nothing():
    nothing = part_of(np.zeros((3, 0)), np.zeros((0, 4)))
    out, lse = merged([nothing, nothing, nothing])
    np.testing.assert_array_equal(out, 0.0)
    assert (np.asarray(lse) == -np.inf).all()


def test_a_nan_part_stays_nan():
    part = part_of(np.zeros((3, 2)), np.ones((2, 4)))
    out, lse = merged([(part[0] * np.float32(np.nan), part[1] * np.float32(np.nan)), part, part])
    assert np.isnan(out).all()
    assert np.isnan(lse).all()
