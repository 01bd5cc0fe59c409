"""Expected Attention: moments of ragged chunks, expected logits against half a million drawn ones, what it needs."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import DIM, GROUPS, HEADS, ROPE, SPEC, numpy_rope, quick_jit

import memjax as mj
from memjax.evict.expected_attention import Moments, add_queries, expected_logits, mean_rotation, no_moments

FULL = dataclasses.replace(SPEC, q_heads=HEADS * GROUPS)


def test_moments_of_chunks_are_those_of_all_queries():
    """Beside a mean that is a thousand times the spread."""
    q = np.random.default_rng(0).standard_normal((2, 30, HEADS * GROUPS, DIM)) + 1000.0
    real = np.random.default_rng(1).random((2, 30)) < 0.6
    real[0, 10:20] = False
    moments, add = no_moments(FULL), quick_jit(add_queries)
    for start in (0, 10, 20):
        piece = slice(start, start + 10)
        moments = add(moments, jnp.asarray(q[:, piece], jnp.float32), jnp.asarray(real[:, piece]))
    for row in range(2):
        chosen = q[row, real[row]].astype(np.float32).astype(np.float64)
        assert float(moments.count[row]) == len(chosen)
        np.testing.assert_allclose(moments.mean[row], chosen.mean(0), rtol=1e-6)
        for head in range(HEADS * GROUPS):
            expected = np.cov(chosen[:, head].T, bias=True) * len(chosen)
            np.testing.assert_allclose(moments.spread[row, head], expected, atol=0.02)


@pytest.mark.parametrize("rope", [ROPE, dataclasses.replace(ROPE, interleaved=True), None], ids=["halves", "pairs", "none"])
def test_expected_logits_are_those_of_many_gaussian_queries(rope):
    spec = dataclasses.replace(SPEC, batch=1, kv_heads=1, q_heads=2, rope=rope)
    random = np.random.default_rng(3)
    root, mean = random.standard_normal((2, DIM, DIM)) / 4, random.standard_normal((2, DIM))
    keys = random.standard_normal((DIM, 6))
    rotation = np.asarray(mean_rotation(spec, jnp.array([7]), 5), np.float64)[0]
    if rope == ROPE:
        plain = np.mean([numpy_rope(np.eye(DIM), np.full(DIM, p), ROPE.theta).T for p in range(7, 12)], axis=0)
        np.testing.assert_allclose(rotation, plain, atol=1e-5)
    drawn = mean[:, None] + random.standard_normal((2, 500_000, DIM)) @ root.swapaxes(-1, -2)
    logits = (drawn @ rotation.T @ keys) / np.sqrt(DIM)
    covariance = root @ root.swapaxes(-1, -2)
    moments = Moments(*(jnp.asarray(x, jnp.float32)[None] for x in (100.0, mean, 100 * covariance)))
    keys, rotation = jnp.asarray(keys, jnp.float32)[None, None], jnp.asarray(rotation, jnp.float32)[None]
    found = expected_logits(moments, keys, rotation, 0.25)
    np.testing.assert_allclose(np.exp(found[0, 0]), np.exp(logits).mean(1), rtol=0.02)


def test_moments_are_counted_among_the_bytes():
    policy = mj.policy("expected_attention(20)+protect(2,6)")
    cache, heads = policy.init(FULL), HEADS * GROUPS
    moments = 4 * FULL.batch * (1 + heads * DIM + heads * DIM * DIM)
    assert mj.nbytes(cache).counters == moments + 8 * FULL.batch
    assert mj.nbytes(cache) == mj.predict_nbytes(policy, FULL)
    assert mj.policy("expected_attention(99)").init(FULL).moments is None


LATENT = mj.CacheSpec(1, 1, 24, 64, "float32", rope=mj.Rope(8, start=16), latent_dim=16, q_heads=4)
BAD = {
    "heads not said": (SPEC, r"CacheSpec\(q_heads=...\)"),
    "rotated already": (dataclasses.replace(FULL, rope="applied"), "before the rotary embedding"),
    "latent": (LATENT, "needs whole keys"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_it_cannot_serve_is_refused(case):
    spec, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        mj.policy("expected_attention(20)+protect(2,6)").init(spec)


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match="multiple of kv_heads=2, got 3"):
        dataclasses.replace(SPEC, q_heads=3)
    with pytest.raises(ValueError, match="epsilon of at least 0"):
        mj.policy("expected_attention(20,epsilon=-1)")
    cache = mj.policy("expected_attention(20)+protect(2,6)").init(FULL)
    with pytest.raises(ValueError, match="2 query heads for a cache that was made for q_heads=4"):
        mj.attend(cache, jnp.zeros((2, 1, HEADS, DIM)))
