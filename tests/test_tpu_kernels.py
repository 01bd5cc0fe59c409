"""The TPU kernels in interpret mode against the float32 oracles: every form of codes, mask, shape and page."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import slow_but
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from kernel_helpers import CASES, KVARN, LONG, PREFILL, TABLE, Case, build, check, chunk, random_codes, with_nan_scales

from memjax.pallas_kernels import tpu_operands
from memjax.pallas_kernels.append import append
from memjax.pallas_kernels.choose import Target, tpu_generation
from memjax.pallas_kernels.codes import dense
from memjax.pallas_kernels.decode import decode, decode_reference
from memjax.pallas_kernels.decode.tpu import decode_tpu, why_not
from memjax.pallas_kernels.mla_decode import mla_decode, mla_decode_reference
from memjax.pallas_kernels.prefill import prefill, prefill_reference
from memjax.pallas_kernels.prefill.tpu import prefill_tpu
from memjax.pallas_kernels.slots import Span
from memjax.pallas_kernels.tpu_tile import turned_features


@pytest.mark.parametrize("case", slow_but(CASES.keys() - LONG, CASES))
def test_decode_gives_what_the_reference_says(case):
    case = CASES[case]
    (q, k, v), kw = build(case)
    found = decode(q, k, v, mass=True, implementation="tpu", interpret=True, **kw)
    check(found, decode_reference(q, k, v, **kw), case.bound)


LIMBED = ("int8", "int4", "int3", "int2", "K4V2, 96 channels", "table", "int3 table", "zero points", "groups of channels")
LIMBED = (*LIMBED, "gains per slot", "pages of 256", "pages of 16", "int8 without scales", "int4 without scales")


@pytest.mark.parametrize("case", LIMBED)
def test_limbs_lose_nothing(case):
    """As on a v6e: int8 codes times two 8-bit limbs of queries and probabilities."""
    (q, k, v), kw = build(CASES[case])
    found = decode_tpu(q, k, v, mass=True, interpret=True, generation="v6e", **kw)
    check(found, decode_reference(q, k, v, **kw), 2e-4)


@pytest.mark.parametrize(("splits", "page"), [(2, 0), (3, 0), (2, 512)])
def test_splits_of_the_sequence_merge(splits, page):
    (q, k, v), kw = build(Case("dense", slots=9000, lengths=(8000, 3), heads=1, page=page, options={"window": 7000}))
    found = decode_tpu(q, k, v, mass=True, interpret=True, splits=splits, **kw)
    check(found, decode_reference(q, k, v, **kw), 3e-3)


def test_features_are_cosines_and_sines_at_every_position():
    frequency = np.float32([1.0, 0.3, 1e-3, 2e-6])
    operands = tpu_operands.Operands(tpu_operands.Plan(1, 8, 1, 128, 1, 1, 128))
    operands.add_scattered_centre(jnp.zeros((1, 1, 1, 8, 8)), frequency)
    turns = operands.arrays[operands.names.index("turns")]
    position = np.r_[-1:200, 2**17 - 20 : 2**17].astype(np.int32)[None]
    found = np.asarray(turned_features(jnp.asarray(position), turns)).reshape(2, 8, -1)[:, :4]
    angle = np.float64(frequency)[:, None] * position
    np.testing.assert_allclose(found, [np.cos(angle), np.sin(angle)], rtol=0, atol=1e-4)  # of 2^17 roundings of a frequency
    np.testing.assert_allclose(found[..., :200], np.float32([np.cos(angle), np.sin(angle)])[..., :200], rtol=0, atol=2e-6)


@pytest.mark.parametrize("generation", ["v6e", "7x"])
def test_a_large_centre_at_scattered_positions_costs_no_precision(generation):
    """Scores of hundreds, which the keys' own part corrects by little: an error of 1e-3 in them is one of the output."""
    (q, k, v), kw = build(Case(heads=1, centre=32, scattered=True, options={"scale": 0.125}))
    kw["centre"] = kw["centre"]._replace(weights=50 * kw["centre"].weights)
    found = decode_tpu(q, k, v, interpret=True, generation=generation, **kw)
    expected = decode_reference(q, k, v, **kw)
    assert np.abs(np.asarray(expected[1])).max() > 100
    np.testing.assert_allclose(found[1], expected[1], atol=5e-3)
    check(found[:2], expected[:2], 5e-3)


def test_all_evicted_gives_nothing():
    (q, k, v), kw = build(Case(scattered=True))
    kw["k_pos"] = jnp.full_like(kw["k_pos"], -1)
    out, lse, mass = decode(q, k, v, mass=True, implementation="tpu", interpret=True, **kw)
    assert (np.asarray(out) == 0).all()
    assert (np.asarray(lse) == -np.inf).all()
    assert (np.asarray(mass) == 0).all()


@pytest.mark.parametrize("generation", ["v6e", "7x"])
def test_what_lies_in_free_slots_does_not_matter(generation):
    (q, k, v), kw = build(Case(scattered=True))
    free = kw["k_pos"] < 0
    dirty = decode_tpu(q, with_nan_scales(k, free), with_nan_scales(v, free), interpret=True, generation=generation, **kw)
    clean = decode_tpu(q, k, v, interpret=True, generation=generation, **kw)
    np.testing.assert_allclose(dirty[0], clean[0], rtol=1e-6, atol=1e-6)


def test_what_gains_of_unseen_tiles_are_does_not_matter():
    case = Case("int2", slots=384, lengths=(120, 250), **KVARN)
    (q, k, v), kw = build(case)
    unseen = jnp.asarray(np.arange(3) * 128 >= np.asarray(case.lengths)[:, None])[:, None, None]
    dirty = dataclasses.replace(v, gain=jnp.where(unseen, jnp.nan, v.gain))
    found = decode(q, k, dirty, implementation="tpu", interpret=True, **kw)
    np.testing.assert_array_equal(found[0], decode(q, k, v, implementation="tpu", interpret=True, **kw)[0])
    kw |= {"k_pos": Span(kw["k_pos"].start, jnp.full(2, 384)), "q_pos": kw["q_pos"] * 0 + 400}
    assert np.isnan(decode(q, k, dirty, implementation="tpu", interpret=True, **kw)[0]).all()


def test_a_nan_that_is_seen_is_not_hidden():
    (q, k, v), kw = build(Case("dense"))
    data = k.data.at[0, 0, 0, 5].set(jnp.nan)
    out, lse = decode(q, dense(data), v, implementation="tpu", interpret=True, **kw)
    assert np.isnan(out[0, 0]).all()
    assert np.isnan(lse[0, 0]).all()
    assert np.isfinite(out[1]).all()


@pytest.mark.parametrize("generation", ["TPU v5p", "TPU v6 lite"])
@pytest.mark.parametrize("lengths", slow_but([(2500, 0, 1)], [(0, 0, 0), (0, 2500, 0), (2500, 0, 1), (3000, 3000, 3000)]))
def test_chains_of_copies_pass_over_rows_without_tokens(lengths, generation, monkeypatch):
    """Several steps of pages, several blocks of heads, two parts of the sequence; on two cores chains are short."""
    monkeypatch.setattr(tpu_operands, "target", lambda: Target("tpu", generation))
    case = Case("int8", batch=3, heads=16, rows=1, page=256, slots=3000, lengths=lengths)
    (q, k, v), kw = build(case)
    found = decode_tpu(q, k, v, interpret=True, splits=2, **kw)
    check(found, decode_reference(q, k, v, **kw)[:2], 3e-3)


@given(
    fmt=st.sampled_from(["dense", "int8", "int4", "int3", "int2"]),
    rows=st.integers(1, 9),
    dim=st.sampled_from([64, 80, 96, 128]),
    length=st.integers(0, 260),
    window=st.sampled_from([None, 1, 40]),
    page=st.sampled_from([0, 128]),
    seed=st.integers(0, 99),
)
@settings(max_examples=6, deadline=None)
def test_any_shape(fmt, rows, dim, length, window, page, seed):
    dim = 96 if fmt == "int3" and dim == 80 else dim
    case = Case(fmt, rows=rows, dim=dim, heads=1, slots=260, lengths=(length, 260), page=page, options={"window": window})
    (q, k, v), kw = build(case, seed)
    found = decode(q, k, v, mass=True, implementation="tpu", interpret=True, **kw)
    check(found, decode_reference(q, k, v, **kw), 5e-3)


RACES = pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager", on_race="raise")


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "case",
    [
        Case(heads=1, slots=300),
        Case(heads=1, page=128, slots=300, lengths=(300, 100)),
        Case("int3", heads=1, slots=384, lengths=(384, 100), **KVARN),
        Case("int8", heads=16, rows=1, page=64, parts=2, slots=300, lengths=(300, 0)),
    ],
)
def test_decode_has_no_races(case):
    (q, k, v), kw = build(case)
    found = decode(q, k, v, implementation="tpu", interpret=RACES, **kw)
    check(found, decode_reference(q, k, v, **kw)[:2], 3e-3)


# ---- prefill -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", PREFILL)
def test_prefill_gives_what_the_reference_says(case):
    args, kw = chunk(**PREFILL[case])
    found = prefill(*args, implementation="tpu", interpret=True, **kw)
    check(found, prefill_reference(*args, **kw), 1e-5 if case == "float32" else 3e-3)


@pytest.mark.parametrize("size", [(64, 128), (1024, 2048)])
def test_prefill_does_not_depend_on_how_it_is_cut(size):
    args, kw = chunk(tokens=100, slots=700)
    found = prefill_tpu(*args, interpret=True, rows=size[0], slots=size[1], **kw)
    check(found, prefill_reference(*args, **kw), 3e-3)


@pytest.mark.timeout(120)
def test_prefill_has_no_races():
    args, kw = chunk(tokens=24, slots=300, groups=1)
    found = prefill_tpu(*args, interpret=RACES, rows=16, slots=128, **kw)
    check(found, prefill_reference(*args, **kw), 3e-3)


def test_prefill_has_the_derivative_of_the_reference():
    (q, k, v), kw = chunk(tokens=20, groups=2, slots=40, dtype="float32")
    kw |= {"q_start": jnp.zeros(2, jnp.int32)}

    def loss(q, k, v, implementation):
        interpret = implementation == "tpu"
        out, lse = prefill(q, dense(k), dense(v), implementation=implementation, interpret=interpret, **kw)
        return jnp.sum(jnp.square(out)) + jnp.sum(jnp.sin(lse[0]))

    found, expected = (jax.grad(loss, (0, 1, 2))(q, k.data, v.data, name) for name in ("tpu", "reference"))
    for x, reference in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, reference, atol=2e-5)


def test_decode_refuses_derivatives():
    (q, k, v), kw = build(Case("dense"))

    def loss(q):
        return decode(q, k, v, implementation="tpu", interpret=True, **kw)[0].sum()

    with pytest.raises(NotImplementedError, match="decode kernel has no derivative: use implementation='xla'"):
        jax.grad(loss)(q)


# ---- multi-head latent attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["dense", "e4m3", "int8", "int4"])
@pytest.mark.parametrize("implementation", ["tpu", "xla"])
def test_mla_decode_gives_what_the_reference_says(fmt, implementation):
    rng = np.random.default_rng(0)
    latent, rope = random_codes(rng, fmt, (2, 1, 128, 300)), random_codes(rng, "dense", (2, 1, 32, 300))
    q, q_rope = (jnp.asarray(rng.standard_normal((2, 20, n)), jnp.bfloat16) for n in (128, 32))
    kw = {"q_pos": jnp.full((2, 20), 290), "k_pos": Span(jnp.zeros(2, jnp.int32), jnp.array([300, 131])), "scale": 0.08}
    found = mla_decode(q, q_rope, latent, rope, implementation=implementation, interpret=implementation == "tpu", **kw)
    check(found, mla_decode_reference(q, q_rope, latent, rope, **kw), 3e-3)


def test_mla_decode_keeps_the_rotary_part_dense():
    rng = np.random.default_rng(0)
    codes = random_codes(rng, "int8", (1, 1, 32, 64))
    with pytest.raises(ValueError, match="rotary part dense, got format int8"):
        mla_decode(jnp.zeros((1, 4, 32)), jnp.zeros((1, 4, 32)), codes, codes, q_pos=None, k_pos=None, scale=1.0)


# ---- append --------------------------------------------------------------------------------------------------------

APPEND = {
    "one token": ("int4", 64, 300, [5, 299], None),
    "one token past a tile": ("int8", 80, 300, [128, 127], None),
    "a chunk, ragged": ("int8", 80, 300, [100, 0], [200, 3]),
    "whole pages": ("dense", 64, 512, [128, 384], [128, 128]),
    "behind the end": ("dense", 64, 512, [510, 0], [7, 0]),
    "all slots": ("int2", 64, 130, [0, 1], [130, 129]),
    "one token of int3": ("int3", 64, 300, [127, 128], None),
    "a chunk of int3, ragged": ("int3", 80, 300, [100, 0], [200, 3]),
    "float8": ("e4m3", 96, 256, [126, 250], [5, 5]),
}


@pytest.mark.parametrize("implementation", ["xla", "tpu", "gpu"])
@pytest.mark.parametrize("case", APPEND)
def test_append_writes_what_the_reference_writes(case, implementation):
    fmt, dim, slots, start, count = APPEND[case]
    rng = np.random.default_rng(0)
    tokens = 1 if count is None else max(count)
    target, new = (random_codes(rng, fmt, (2, 3, dim, n)) for n in (slots, tokens))
    call = functools.partial(append, target, new, jnp.array(start), None if count is None else jnp.array(count))
    found, expected = call(implementation=implementation, interpret=implementation != "xla"), call(implementation="reference")
    for x, reference, before in zip(*map(jax.tree.leaves, (found, expected, target)), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(reference).tobytes()
        assert np.asarray(x).tobytes() != np.asarray(before).tobytes()


@pytest.mark.timeout(120)
def test_append_has_no_races():
    rng = np.random.default_rng(0)
    target, new = (random_codes(rng, "int8", (2, 1, 32, n)) for n in (384, 150))
    call = functools.partial(append, target, new, jnp.array([100, 7]), jnp.array([150, 2]))
    found, expected = call(implementation="tpu", interpret=RACES), call(implementation="reference")
    for x, reference in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(reference).tobytes()


def test_append_refuses_what_does_not_match():
    target = random_codes(np.random.default_rng(0), "int8", (2, 1, 32, 64))
    with pytest.raises(ValueError, match="structure"):
        append(target, dense(target.data), jnp.zeros(2, int))
    with pytest.raises(ValueError, match=r"\[T\] and start \[2\]"):
        append(target, target, jnp.zeros(3, int))
    with pytest.raises(ValueError, match="float32 for a target of int8: encode them first"):
        append(target.data, target.data.astype(jnp.float32), jnp.zeros(2, int))


# ---- what is refused, and why --------------------------------------------------------------------------------------

REFUSED = {
    "int2, a type that TPU v4 lacks": ("TPU v4", Case("int2")),
    "store pages of 16 slots several to a block of 128 and say page=16": ("TPU v6 lite", Case(page=16)),
    "TPU kernels read bfloat16 or float32": ("TPU v6 lite", Case("dense", keys={"dtype": "float16"})),
    r"table must hold integers in -127 .. 127": ("TPU v6 lite", Case(keys={"grid": (*TABLE[:-1], 128)})),
    "tiles over both axes": ("TPU v6 lite", Case("int2", slots=320, values={"tile": 32})),
    "keys have scales [64, 10] for [64, 320] values": ("TPU v6 lite", Case(slots=320, keys={"tile": 32}, latent=32)),
    "int3 of 80 channels": ("TPU v6 lite", Case("int3", dim=80)),
    "extra keys have 1 channel": ("TPU v6 lite", Case("int8", latent=1)),
    "scales and gains per channel": ("TPU v6 lite", Case(slots=320, keys={"tile": 32, "gain": 32})),
    "factors per group of channels beside": ("TPU v6 lite", Case(slots=320, keys={"groups": 2, "gain": 32})),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_say_why(reason):
    kind, case = REFUSED[reason]
    (q, k, v), kw = build(case)
    arrays = {"q": q, "k": k, "v": v, **kw, "centre_weights": kw["centre"].weights if case.centre else None}
    assert reason.replace("\\", "") in why_not(Target("tpu", kind), arrays)
    if kind != "TPU v4":
        words = re.escape(reason) if "[" in reason else reason
        with pytest.raises(ValueError, match=f"decode: implementation 'tpu' cannot serve this case.*{words}"):
            decode(q, k, v, implementation="tpu", interpret=True, **kw)


def test_generations_have_their_names():
    kinds = ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"]
    assert [tpu_generation(kind) for kind in kinds] == ["v4", "v5e", "v5p", "v6e", "7x"]
    assert tpu_generation("TPU v9") == "TPU v9"
