"""The GPU kernels in interpret mode against the float32 oracles: every form of codes, mask, shape and page."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import CASES, KVARN, PREFILL, ZERO, Case, build, check, chunk, random_codes, with_nan_scales

from memjax.pallas_kernels.choose import Target
from memjax.pallas_kernels.decode import decode, decode_reference
from memjax.pallas_kernels.decode.gpu import decode_gpu, why_not
from memjax.pallas_kernels.mla_decode import mla_decode, mla_decode_reference
from memjax.pallas_kernels.prefill import prefill, prefill_reference
from memjax.pallas_kernels.slots import Span

DECODED = 5e-3  # values are rounded to bfloat16 after they are decoded, probabilities too
OWN = {
    "pages of 16, each a block": Case(page=16),
    "pages of 64, one token past": Case("int8", page=64, lengths=(300, 65)),
    "int3, 80 channels": Case("int3", dim=80),
    "values with scales per channel and 32 slots": Case("int2", slots=320, values=ZERO | {"tile": 32}, bound=DECODED),
    "latent with scales per channel and 32 slots": Case("int3", slots=320, heads=1, keys={"tile": 32}, latent=32),
    "scales and gains per channel": Case(slots=320, keys={"tile": 32, "gain": 32}, values={"groups": 8, "gain": 32}),
}
CUBIC_BOUND = 9e-3  # the polynomial is evaluated in bfloat16


# Tracing unrolled kernels takes seconds a case; the fast run has one of each kind.
FAST = ("dense", "int4", "K4V2, 96 channels", "cubic", "table", "groups of channels", "KIVI", "positions", "centre", "latent")
FAST = (*FAST, "centre and positions", "pages of 16", "sparse", "int3", "KVarN in 3 bits", "K3V2, 96 channels")
NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize("name", [*NAMES, *OWN])
def test_decode_gives_what_the_reference_says(name):
    case = (CASES | OWN)[name]
    (q, k, v), kw = build(case)
    found = decode(q, k, v, mass=True, implementation="gpu", interpret=True, **kw)
    check(found, decode_reference(q, k, v, **kw), CUBIC_BOUND if "cubic" in name else case.bound)


@pytest.mark.parametrize("splits", [1, 5])
def test_parts_of_the_sequence_merge(splits):
    (q, k, v), kw = build(Case("int8", slots=700, lengths=(700, 3), heads=1, rows=33, options={"window": 400}))
    check(decode_gpu(q, k, v, mass=True, interpret=True, splits=splits, **kw), decode_reference(q, k, v, **kw), 3e-3)


def test_all_evicted_gives_nothing():
    (q, k, v), kw = build(Case(scattered=True))
    kw["k_pos"] = jnp.full_like(kw["k_pos"], -1)
    out, lse, mass = decode(q, k, v, mass=True, implementation="gpu", interpret=True, **kw)
    assert (np.asarray(out) == 0).all()
    assert (np.asarray(lse) == -np.inf).all()
    assert (np.asarray(mass) == 0).all()


def test_what_lies_in_free_slots_does_not_matter():
    (q, k, v), kw = build(Case(scattered=True))
    free = kw["k_pos"] < 0
    dirty = decode_gpu(q, with_nan_scales(k, free), with_nan_scales(v, free), interpret=True, **kw)
    np.testing.assert_allclose(dirty[0], decode_gpu(q, k, v, interpret=True, **kw)[0], rtol=1e-6, atol=1e-6)


def test_what_gains_of_unseen_tiles_are_does_not_matter():
    case = Case("int2", slots=384, lengths=(120, 250), **KVARN)
    (q, k, v), kw = build(case)
    unseen = jnp.asarray(np.arange(3) * 128 >= np.asarray(case.lengths)[:, None])[:, None, None]
    dirty = dataclasses.replace(v, gain=jnp.where(unseen, jnp.nan, v.gain))
    found = decode(q, k, dirty, implementation="gpu", interpret=True, **kw)
    np.testing.assert_array_equal(found[0], decode(q, k, v, implementation="gpu", interpret=True, **kw)[0])


@pytest.mark.slow
@given(
    fmt=st.sampled_from(["dense", "int8", "int4", "int3", "int2"]),
    rows=st.integers(1, 17),
    dim=st.sampled_from([64, 80, 96, 128]),
    length=st.integers(0, 260),
    window=st.sampled_from([None, 1, 40]),
    page=st.sampled_from([0, 32]),
    seed=st.integers(0, 99),
)
@settings(max_examples=6, deadline=None)
def test_any_shape(fmt, rows, dim, length, window, page, seed):
    case = Case(fmt, rows=rows, dim=dim, heads=1, slots=260, lengths=(length, 260), page=page, options={"window": window})
    (q, k, v), kw = build(case, seed)
    found = decode(q, k, v, mass=True, implementation="gpu", interpret=True, **kw)
    check(found, decode_reference(q, k, v, **kw), 5e-3)


@pytest.mark.parametrize("case", ["int4 history", "float32", "recent and sinks", "pages", "positions", "centre and positions"])
def test_prefill_gives_what_the_reference_says(case):
    args, kw = chunk(**PREFILL[case])
    found = prefill(*args, implementation="gpu", interpret=True, **kw)
    check(found, prefill_reference(*args, **kw), 1e-5 if case == "float32" else 3e-3)


@pytest.mark.parametrize("fmt", ["dense", "int4"])
def test_mla_decode_gives_what_the_reference_says(fmt):
    rng = np.random.default_rng(0)
    latent, rope = random_codes(rng, fmt, (2, 1, 512, 200)), random_codes(rng, "dense", (2, 1, 64, 200))
    q, q_rope = (jnp.asarray(rng.standard_normal((2, 20, n)), jnp.bfloat16) for n in (512, 64))
    kw = {"q_pos": jnp.full((2, 20), 190), "k_pos": Span(jnp.zeros(2, jnp.int32), jnp.array([200, 131])), "scale": 0.04}
    found = mla_decode(q, q_rope, latent, rope, implementation="gpu", interpret=True, **kw)
    check(found, mla_decode_reference(q, q_rope, latent, rope, **kw), 3e-3)


REFUSED = {
    "needs a GPU of compute capability 8.9": ("NVIDIA A100-SXM4-80GB", Case("e4m3")),
    "pages of 48 slots; the kernel needs a power of two": ("NVIDIA H200", Case(page=48)),
    "groups of 8 channels; the kernel's smallest is 16": ("NVIDIA H200", Case(keys={"groups": 8})),
    "gains of different groups of channels": ("NVIDIA H200", Case()),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_say_why(reason):
    kind, case = REFUSED[reason]
    (q, k, v), kw = build(case)
    if "different groups" in reason:
        k = dataclasses.replace(k, scale=jnp.ones((2, 2, 2, 300)), gain=jnp.ones((2, 2, 4, 300)))
    arrays = {"q": q, "k": k, "v": v, **kw, "centre_weights": kw["centre"].weights if case.centre else None}
    assert reason in why_not(Target("gpu", kind), arrays)
