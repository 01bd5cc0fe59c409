"""Policies that name their kernels: the same attention, through the kernels where they are asked for."""

import dataclasses
import importlib

import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import slow_but

import memjax as mj
from memjax.cache.transforms import evict
from memjax.pallas_kernels.decode import decode
from memjax.pallas_kernels.prefill import prefill

attending = importlib.import_module("memjax.attention.attend")
SPEC = mj.CacheSpec(2, 2, 32, 96, "float32", rope=mj.Rope(32, theta=100.0))
LATENT = mj.CacheSpec(2, 1, 48, 96, "float32", rope=mj.Rope(16, theta=100.0, start=32), latent_dim=32)
CASES = {
    "rotated int4": ("int4(rotate=true)+protect(2,8)", SPEC),
    "evicting": ("streaming(4,40)+int8+protect(4,8)", SPEC),
    "evicting, with a centre": ("streaming(4,40)+turboquant(4,4)+protect(4,8)", SPEC),
    "on the host": ("int8+protect(2,8)+host(8,16)", SPEC),
    "refining": ("progressive(refine=1.0)+protect(2,8)", SPEC),
    "choosing pages": ("quest(26)+int8+protect(2,8)", dataclasses.replace(SPEC, capacity=140)),
    "sharing slots": ("adakv(26,window=4)+int8+protect(2,8)", SPEC),
    "latent": ("int8+protect(2,8)", LATENT),
    "corrected": ("gear(int4(rotate=true),4)+protect(2,8)", SPEC),
    "corrected, with outliers": ("gear(int4(rotate=true),4,sparse=0.1)+protect(2,8)", SPEC),
}
FAST = ("rotated int4", "evicting, with a centre")


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels are interpreted; what ran is recorded."""
    ran = []

    def patched(name, function):
        def call(*args, implementation, **kw):
            ran.append((name, implementation))
            if implementation != "pallas":
                return function(*args, implementation=implementation, **kw)
            return function(*args, implementation="tpu", interpret=True, **kw)

        return call

    monkeypatch.setattr(attending, "decode", patched("decode", decode))
    monkeypatch.setattr(attending, "prefill", patched("prefill", prefill))
    return ran


def outputs(policy, spec):
    """A ragged chunk of 40 tokens, and one token more."""
    draw = np.random.default_rng(0).standard_normal
    cache, found = policy.init(spec), []
    for tokens, lengths in ((40, [40, 25]), (1, None)):
        q, k, v = (jnp.asarray(draw((2, tokens, n, spec.head_dim)), jnp.float32) for n in (4, spec.kv_heads, spec.kv_heads))
        lengths = None if lengths is None else jnp.array(lengths)
        cache = policy.update(cache, k, None if spec.latent_dim else v, lengths)
        out, cache = policy.attend(cache, q)
        real = jnp.arange(tokens) < (tokens if lengths is None else lengths[:, None])
        found.append(jnp.where(real[..., None, None], out, 0))
    return found


@pytest.mark.parametrize("case", slow_but(FAST, CASES))
def test_kernels_read_what_xla_reads(case, interpreted):
    text, spec = CASES[case]
    expected = outputs(mj.policy(text + "+kernels(xla)"), spec)
    assert {implementation for _, implementation in interpreted} == {"xla"}
    interpreted.clear()
    found = outputs(mj.policy(text + "+kernels(pallas)"), spec)
    assert {("prefill", "pallas"), ("decode", "pallas")} <= set(interpreted)
    for x, reference in zip(found, expected, strict=True):
        assert np.linalg.norm(x - reference) / np.linalg.norm(reference) < 5e-3


@pytest.mark.slow
@pytest.mark.parametrize("text", ["kvzip(26)+int8+protect(2,8)", "kvzip(26)+int8+massfold+protect(2,8)"])
def test_kernels_read_slots_that_heads_share_after_an_eviction(text, interpreted):
    """With biases if tokens were folded, by a chunk and by a token."""
    draw = np.random.default_rng(0).standard_normal
    scores, counts = draw((2, 2, 86)).astype(np.float32), np.array([[3, 14], [9, 0]])
    tokens = [[jnp.asarray(draw((2, n, m, 32)), jnp.float32) for m in (4, 2, 2)] for n in (40, 12, 1)]
    found = []
    for kernels in ("xla", "pallas"):
        policy = mj.policy(f"{text}+kernels({kernels})")
        cache = policy.update(policy.init(SPEC), *tokens[0][1:])
        cache = evict(policy.attend(cache, tokens[0][0])[1], scores, counts, 16)
        interpreted.clear()
        for q, k, v in tokens[1:]:
            out, cache = policy.attend(policy.update(cache, k, v), q)
            found.append(out)
        assert ("decode", kernels) in interpreted
    for x, reference in zip(found[2:], found, strict=False):
        assert np.linalg.norm(x - reference) / np.linalg.norm(reference) < 5e-3


def test_what_cannot_be_served_says_so():
    policy = mj.policy("int8+protect(0,0)+kernels(pallas)")
    q = jnp.zeros((2, 1, 4, 32))
    cache = policy.update(policy.init(SPEC), q[:, :, :2], q[:, :, :2])
    with pytest.raises(ValueError, match="there is no Pallas kernel for cpu"):
        policy.attend(cache, q)


def test_kernels_are_an_axis_of_their_own():
    assert str(mj.chain(mj.int4(), mj.kernels("pallas"))) == "int4+kernels(pallas)"
    assert mj.policy("kernels(xla)+int8") == mj.chain(mj.int8(), mj.kernels("xla"))
    with pytest.raises(ValueError, match="kernels must be one of pallas, xla, got 'cuda'"):
        mj.kernels("cuda")
    with pytest.raises(ValueError, match="both decide kernels"):
        mj.chain(mj.kernels("pallas"), mj.kernels("xla"))
    assert mj.predict_nbytes(mj.policy("int8+kernels(xla)"), SPEC) == mj.predict_nbytes(mj.int8(), SPEC)
