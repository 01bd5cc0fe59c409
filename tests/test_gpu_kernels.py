"""The GPU kernels in interpret mode against the float32 oracles: every form of codes, mask, shape and page."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import CASES, PREFILL, Case, build, check, chunk, random_codes, with_nan_scales

from memjax.pallas_kernels.choose import Target
from memjax.pallas_kernels.decode import decode, decode_reference
from memjax.pallas_kernels.decode.gpu import decode_gpu, why_not
from memjax.pallas_kernels.mla_decode import mla_decode, mla_decode_reference
from memjax.pallas_kernels.prefill import prefill, prefill_reference
from memjax.pallas_kernels.slots import Span

SMALL_PAGES = {"pages of 16": Case(page=16), "pages of 64, one token past": Case("int8", page=64, lengths=(300, 65))}
CUBIC_BOUND = 9e-3  # the polynomial is evaluated in bfloat16


# Tracing unrolled kernels takes seconds a case; the fast run has one of each kind.
FAST = ("dense", "int4", "K4V2, 96 channels", "cubic", "table", "groups of channels", "KIVI", "positions", "centre", "latent")
NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize("name", [*NAMES, *SMALL_PAGES])
def test_decode_gives_what_the_reference_says(name):
    case = (CASES | SMALL_PAGES)[name]
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


@pytest.mark.slow
@given(
    fmt=st.sampled_from(["dense", "int8", "int4", "int2"]),
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


@pytest.mark.parametrize("case", ["int4 history", "float32", "recent and sinks", "pages", "positions"])
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
    "a centring term needs consecutive positions": ("NVIDIA H200", Case(centre=4, scattered=True)),
    "groups of 8 channels; the kernel's smallest is 16": ("NVIDIA H200", Case(keys={"groups": 8})),
    "tiles over both axes": ("NVIDIA H200", Case("int2", slots=320, values={"tile": 32})),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_say_why(reason):
    kind, case = REFUSED[reason]
    (q, k, v), kw = build(case)
    arrays = {"q": q, "k": k, "v": v, **kw, "centre_weights": kw["centre"].weights if case.centre else None}
    assert reason in why_not(Target("gpu", kind), arrays)
