"""Decode: the blockwise XLA program, the reference, and the merge of parts. The kernels have files of their own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import numpy_softmax, quick_jit, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import KVARN, TABLE, Case, build, relative

from memjax.attention.rope import Rope, apply_rope
from memjax.pallas_kernels.codes import Codes, absmax_encode, dense
from memjax.pallas_kernels.decode import Centre, decode, decode_reference, decode_xla, merge, probability_mass
from memjax.pallas_kernels.slots import FREE, Span, positions, visible

BATCH, HEADS, ROWS, SLOTS, DIM, EXTRA = 2, 2, 5, 40, 16, 4
STATIC = ("scale", "page", "softcap", "window", "recent", "sinks", "mass", "logits")
xla = quick_jit(decode_xla, static_argnames=("block", *STATIC))
reference = quick_jit(decode_reference, static_argnames=[name for name in STATIC if name != "mass"])


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
        "k": encode(draw(BATCH, HEADS, DIM, SLOTS)),
        "v": None if latent else encode(draw(BATCH, HEADS, DIM, SLOTS)),
        "q_pos": q_pos,
        "k_pos": k_pos,
    }
    if latent:
        made |= {"q_extra": draw(BATCH, HEADS, ROWS, EXTRA), "k_extra": dense(draw(BATCH, HEADS, EXTRA, SLOTS))}
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
    out, lse, mass = call(xla, made, scale=0.25, mass=True, **options)
    options = {name: value for name, value in options.items() if name != "block"}
    expected, expected_lse, expected_mass = call(reference, made, scale=0.25, **options)
    np.testing.assert_allclose(out, expected, atol=2e-6, rtol=1e-5)
    np.testing.assert_allclose(lse, expected_lse, atol=2e-6, rtol=1e-5)
    np.testing.assert_allclose(mass, expected_mass, atol=2e-6, rtol=1e-5)
    np.testing.assert_array_equal(out[1, :, 3], 0.0)
    assert (np.asarray(lse)[1, :, 3] == -np.inf).all()


def test_the_reference_is_softmax_attention():
    made = inputs("dense")
    q, k, v = (np.float64(x) for x in (made["q"], made["k"].data, made["v"].data))
    seen, seeing = np.float64(made["k_pos"])[:, :, None, :], made["q_pos"][:, None, :, None]
    mask = (seen >= 0) & (seen <= seeing) & ((seeing - seen < 6) | (seen < 3)) & (seeing - seen < 20)
    scores = 2.0 * np.tanh(q @ k * 0.25 / 2.0)
    some = mask.any(-1)
    weights = numpy_softmax(scores, mask | ~some[..., None]) * some[..., None]
    out, lse, mass = call(reference, made, scale=0.25, softcap=2.0, recent=6, sinks=3, window=20)
    np.testing.assert_allclose(out, weights @ v.swapaxes(-1, -2), atol=2e-6)
    np.testing.assert_allclose(mass, weights.sum(2), atol=2e-6)
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
    out, lse, _ = call(xla, made, scale=0.25, block=16)
    expected, expected_lse, _ = call(xla, inputs("int8"), scale=0.25, block=16)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(lse, expected_lse)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_reaches_those_who_see_it(bad):
    made = inputs("dense")
    k = np.asarray(made["k"].data).copy()
    slot = int(np.argmax(made["k_pos"][0, 0] == 0))
    k[0, 0, :, slot] = bad
    out, lse, _ = call(xla, made | {"k": dense(k)}, scale=0.25, block=64)
    expected, *_ = call(xla, made, scale=0.25, block=64)
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
    k, v = (encode(rng.standard_normal((1, 1, DIM, 400)).astype(np.float32) * s) for s in (1.0, 0.02))
    places = {"q_pos": np.full((1, 4), 400), "k_pos": np.arange(400)[None, None], "scale": 0.25}
    q = rng.standard_normal((1, 1, 4, DIM)).astype(np.float16)
    out, *_ = xla(q, k, v, **places)
    expected, *_ = reference(q, k, v, **places)
    assert relative_error(out, expected) < 2e-3


XLA_CASES = {
    "pages": Case("int4", page=32),
    "pages with positions": Case("int8", page=32, scattered=True),
    "pages of 16 in blocks of 128": Case("int4", page=16, parts=8),
    "pages of 32 of KIVI in blocks": Case("int2", page=32, parts=4, keys={"tile": 32, "zero": True}, scattered=True),
    "zero points": Case("int4", keys={"zero": True}, values={"zero": True}),
    "groups of channels": Case("int4", keys={"groups": 2, "zero": True}, values={"groups": 4, "zero": True}),
    "KIVI": Case("int2", slots=320, keys={"tile": 32, "zero": True}, values={"groups": 2, "zero": True}),
    "pages of KIVI": Case("int2", slots=320, page=64, keys={"tile": 32, "zero": True}, values={"groups": 2, "zero": True}),
    "int3": Case("int3", slots=320, values={"groups": 2, "zero": True}),
    "KVarN": Case("int2", slots=384, **KVARN),
    "KVarN with positions": Case("int3", slots=384, scattered=True, **KVARN),
    "pages of KVarN": Case("int3", slots=384, page=128, **KVARN),
    "gains per slot": Case("int4", keys={"zero": True, "gain": 1}, values={"groups": 2, "zero": True, "gain": 1}),
    "scales and gains per channel": Case("int4", slots=320, keys={"tile": 32, "gain": 64}, values={"tile": 64, "gain": 32}),
    "cubic": Case("int4", keys={"grid": "cubic"}, values={"grid": "cubic"}),
    "table": Case("int4", keys={"grid": TABLE}, values={"grid": TABLE}),
    "bias": Case("int8", bias=True, options={"softcap": 3.0}),
    "centre": Case("int8", centre=8, scattered=True),
    "latent": Case("int8", heads=1, rows=16, latent=16),
}


@pytest.mark.parametrize("block", [64, 2048])
@pytest.mark.parametrize("case", XLA_CASES)
def test_the_plain_path_serves_every_form(case, block):
    (q, k, v), kw = build(XLA_CASES[case])
    static = {name: kw.pop(name) for name in STATIC if name in kw}
    found = decode_xla(q, k, v, block=block, mass=True, **kw, **static)
    for x, expected in zip(found, decode_reference(q, k, v, **kw, **static), strict=True):
        assert relative(x, expected) < 6e-3


@pytest.mark.parametrize("implementation", ["reference", "xla", "tpu", "gpu"])
def test_logits_give_the_mass_of_several_parts(implementation):
    """Slots in two parts, merged: the logits of a part and the log-sum-exp of both give the part's share of all."""
    (q, k, v), kw = build(Case("int8", slots=300, lengths=(300, 40), options={"window": 250}))
    kernel = functools.partial(decode, q, k, v, implementation=implementation, interpret=implementation in ("tpu", "gpu"))
    whole = decode_reference(q, k, v, **kw)
    at, first = positions(kw.pop("k_pos"), 300), jnp.arange(300) < 128
    halves = [jnp.where(first, at, FREE), jnp.where(first, FREE, at)]
    parts = [kernel(k_pos=half, logits=True, **kw) for half in halves]
    _, lse = merge([part[:2] for part in parts])
    found = sum(probability_mass(logits, lse) for *_, logits in parts)
    assert relative(lse, whole[1]) < 3e-3
    assert relative(found, whole[2]) < 6e-3
    with pytest.raises(ValueError, match="mass or logits, not both"):
        kernel(k_pos=halves[0], mass=True, logits=True, **kw)


def test_pages_that_share_blocks_are_pages():
    (q, k, v), kw = build(Case("int8", page=16, parts=4, slots=100, lengths=(100, 30)))
    page = kw.pop("page")

    def alone(codes):
        def split(leaf):
            return jnp.concatenate(jnp.split(leaf[:, None], 4, axis=-1), axis=1).reshape(-1, *leaf.shape[1:-1], page)

        return jax.tree.map(split, codes)

    for x, expected in zip(reference(q, k, v, page=page, **kw), reference(q, alone(k), alone(v), **kw), strict=True):
        np.testing.assert_array_equal(x, expected)


def test_a_page_must_fit():
    (q, k, v), kw = build(Case("int4", page=32, parts=4, slots=100, keys={"tile": 32, "zero": True}))
    with pytest.raises(ValueError, match=r"divides the pool's blocks of 128 slots, got 48"):
        decode(q, k, v, **kw | {"page": 48})
    with pytest.raises(ValueError, match=r"got 16 and of the 32 slots that share a scale"):
        decode(q, k, v, **kw | {"page": 16})
    with pytest.raises(ValueError, match=r"page=32 without a page table"):
        decode(q, k, v, **kw | {"table": None})


def test_the_centring_term_is_what_a_roped_constant_adds():
    """q . R_t mu, for queries and keys roped by the library."""
    rope, rng = Rope(16, theta=100.0), np.random.default_rng(3)
    q, mu = rng.standard_normal((1, 1, 3, 16)).astype(np.float32), rng.standard_normal(16).astype(np.float32)
    y, v = (rng.standard_normal((1, 1, 16, 30)).astype(np.float32) for _ in range(2))
    at = np.arange(30)[None]
    turned = apply_rope(jnp.broadcast_to(mu, (1, 30, 1, 16)), jnp.asarray(at), rope, 30)
    constant = jnp.moveaxis(turned, 1, -1)[:, 0][:, None]  # [1, 1, H, S]
    a, b = np.split(q, 2, axis=-1)
    m, n = np.split(mu, 2)
    centre = Centre(jnp.concatenate([a * m + b * n, b * m - a * n], axis=-1), rope.inv_freq(30))
    kw = {"q_pos": jnp.full((1, 3), 30), "k_pos": jnp.asarray(at)[:, None], "scale": 0.25}
    plain = decode_reference(q, dense(y + constant), dense(v), **kw)
    for x, expected in zip(decode_reference(q, dense(y), dense(v), centre=centre, **kw), plain, strict=True):
        np.testing.assert_allclose(x, expected, atol=1e-5)


def test_learned_sinks_take_their_share():
    (q, k, v), kw = build(Case("dense", keys={"dtype": "float32"}, values={"dtype": "float32"}, options={"scale": 0.3}))
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4)), jnp.float32)
    out, lse = decode(q, k, v, sink_logits=logits, implementation="reference", **kw)
    plain, plain_lse = decode(q, k, v, implementation="reference", **kw)
    share = np.exp(np.float64(plain_lse)) / (np.exp(np.float64(plain_lse)) + np.exp(np.float64(logits)))
    np.testing.assert_allclose(out, np.asarray(plain) * share[..., None], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.exp(lse), np.exp(plain_lse) + np.exp(logits), rtol=1e-5)
    with pytest.raises(ValueError, match="mass with sink_logits"):
        decode(q, k, v, sink_logits=logits, mass=True, **kw)


WRONG = {
    "queries of 32 channels for keys of 64": lambda q, k, v, kw: ((q[..., :32], k, v), kw),
    r"v codes \[2, 2, C, 300\]": lambda q, k, v, kw: ((q, k, jax.tree.map(lambda x: x[..., :99], v)), kw),
    r"q_pos \[2, 4\]": lambda q, k, v, kw: ((q, k, v), kw | {"q_pos": kw["q_pos"][:, :1]}),
    r"Span of arrays \[2\]": lambda q, k, v, kw: ((q, k, v), kw | {"k_pos": Span(jnp.zeros(3, int), jnp.zeros(3, int))}),
    r"k_pos \[2, 1 or 2, 300\]": lambda q, k, v, kw: ((q, k, v), kw | {"k_pos": jnp.zeros((2, 3, 300), int)}),
    "integer positions": lambda q, k, v, kw: ((q, k, v), kw | {"k_pos": jnp.zeros((2, 1, 300))}),
    r"bias \[2, 1 or 2, 300\]": lambda q, k, v, kw: ((q, k, v), kw | {"bias": jnp.zeros((2, 2, 3))}),
    "q_extra and k_extra together": lambda q, k, v, kw: ((q, k, v), kw | {"q_extra": q}),
    "implementation 'cuda' is not one of": lambda q, k, v, kw: ((q, k, v), kw | {"implementation": "cuda"}),
    "'tpu' runs on a TPU, this program is for cpu": lambda q, k, v, kw: ((q, k, v), kw | {"implementation": "tpu"}),
    "no Pallas kernel for cpu": lambda q, k, v, kw: ((q, k, v), kw | {"implementation": "pallas"}),
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_input_is_named(message):
    (q, k, v), kw = build(Case())
    args, kw = WRONG[message](q, k, v, kw)
    with pytest.raises(ValueError, match=message):
        decode(*args, **kw)


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
