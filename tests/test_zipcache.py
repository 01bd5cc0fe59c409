"""ZipCache: which tokens are salient, what both parts make of them, and what they cost."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import (
    BATCH,
    DIM,
    GROUPS,
    HEADS,
    ROPE,
    SPEC,
    TOKENS,
    as_output,
    by_kv_head,
    dense_oracle,
    lossy,
    numpy_rope,
    numpy_softmax,
    qkv,
    relative_error,
    run,
    slow_but,
)

import memjax as mj
from memjax.evaluate.markdown import realised_bits
from memjax.quantize import ZipCache
from memjax.quantize.kivi import KiviKeys
from memjax.quantize.zipcache import ChannelSeparable

SINKS, RECENT, TILE, GROUP = 2, 4, 10, 2
TEXT = f"zipcache(4,2,{TILE},{GROUP})+protect({SINKS},{RECENT})"
CODEC = mj.policy(TEXT).codec
TOKENS_OF_ALL = qkv(1)


def oracle(sizes) -> tuple[np.ndarray, np.ndarray]:
    """Outputs [B, T, N, H], and which tokens are kept in the salient part, [B, K, T] (0 and 1; -1: not coded)."""
    q, k, v = by_kv_head(TOKENS_OF_ALL)
    at = np.arange(TOKENS)
    q, k = numpy_rope(q, at, ROPE.theta), numpy_rope(k, at, ROPE.theta)
    read_k, read_v = k.copy(), v.copy()
    score, seen = np.zeros((BATCH, HEADS, TOKENS)), np.zeros(TOKENS)
    part, outs, start, coded = np.full((BATCH, HEADS, TOKENS), -1), [], 0, SINKS
    for size in sizes:
        end, chunk = start + size, slice(start, start + size)
        exact = (at >= start) & (at < end)
        keys, values = np.where(exact[:, None], k, read_k), np.where(exact[:, None], v, read_v)
        weights = numpy_softmax(q[..., chunk, :] @ keys.swapaxes(-1, -2) / np.sqrt(DIM), at <= at[chunk, None])
        outs.append(weights @ values)
        score += weights.mean(2).sum(2)
        seen += (at <= at[chunk, None]).sum(0)
        while coded + TILE <= end - RECENT:
            tile = np.arange(coded, coded + TILE)
            for b in range(BATCH):
                for h in range(HEADS):
                    order = tile[np.argsort(-(score[b, h, tile] / seen[tile]), kind="stable")]
                    for number, (chosen, codec) in enumerate(
                        ((np.sort(order[CODEC.salient :]), CODEC.rest), (np.sort(order[: CODEC.salient]), CODEC))
                    ):
                        part[b, h, chosen] = number
                        read_k[b, h, 0, chosen] = lossy(codec.keys, k[b, h, 0, chosen])
                        read_v[b, h, 0, chosen] = lossy(codec.values, v[b, h, 0, chosen])
            coded += TILE
        start = end
    return as_output(np.concatenate(outs, axis=-2)), part


@pytest.mark.parametrize("sizes", slow_but([[7] * 7], [[TOKENS], [7] * 7, [1] * TOKENS]), ids=["whole", "sevens", "ones"])
def test_the_most_attended_tokens_get_more_bits(sizes):
    out, cache = run(mj.policy(TEXT).init(SPEC), TOKENS_OF_ALL, sizes)
    expected, part = oracle(sizes)
    for held, number in ((cache.history.pos, 1), (cache.rest.pos, 0)):
        for b in range(BATCH):
            for h in range(HEADS):
                assert [int(p) for p in held[b, h] if p >= 0] == np.flatnonzero(part[b, h] == number).tolist()
    np.testing.assert_allclose(out, expected, atol=2e-5)
    assert mj.nbytes(cache) == mj.predict_nbytes(cache.policy, SPEC)


def test_parts_are_read_by_kernels():
    """Both parts are plain codes with positions."""
    q, k, v = (x[:1, :, :h] for x, h in zip(TOKENS_OF_ALL, (GROUPS, 1, 1), strict=True))
    spec = dataclasses.replace(SPEC, batch=1, kv_heads=1)
    _, cache = run(mj.policy(TEXT).init(spec), (q, k, v), [TOKENS])
    last = jnp.asarray(q[:, -1:])
    out, _ = mj.attend(cache, last)
    policy = dataclasses.replace(cache.policy, kernels="xla")
    same, _ = mj.attend(dataclasses.replace(cache, policy=policy), last)
    np.testing.assert_allclose(out, same, atol=1e-5)


def test_channels_of_very_different_size_cost_values_little():
    """Token-wise rounding loses the small channels of an outlier's token; divided by the roots of their peaks, fewer."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 32, 96)) * np.where(np.arange(32) < 2, 30.0, 1.0)[:, None]
    x = np.asarray(x, np.float32).swapaxes(-1, -2)  # [1, T, H]
    separable = relative_error(lossy(ChannelSeparable(4, 96), x)[..., 2:], x[..., 2:])
    plain = relative_error(lossy(ChannelSeparable(4, 1), x)[..., 2:], x[..., 2:])
    scaled = x / np.sqrt(np.abs(x).max(axis=-2, keepdims=True))
    step = np.ptp(scaled, axis=-1, keepdims=True) / 15
    expected = np.sqrt(np.abs(x).max(axis=-2, keepdims=True)) * step
    error = np.abs(lossy(ChannelSeparable(4, 96), x) - x)
    assert (error <= 0.52 * expected + 0.01 * np.abs(x)).all()
    assert separable < 0.5
    assert plain > 0


def test_bits_are_counted_on_the_buffers():
    """At head_dim 64: keys bits + 1, values bits + 1/2 + 16 / T, positions 1/4 a value."""
    spec = mj.CacheSpec(1, 1, 64, 484, "bfloat16")
    policy = mj.policy("zipcache(4,2)+protect(4,0)")
    cache = policy.init(spec)
    assert (cache.history.slots, cache.rest.slots) == (288, 192)
    expected = 0.6 * (5 + 4.5 + 16 / 96) / 2 + 0.4 * (3 + 2.5 + 16 / 64) / 2 + 0.25
    assert mj.nbytes(cache).bits_per_value == pytest.approx(expected)
    assert realised_bits(policy.codec, 64) == pytest.approx(expected)
    assert policy.codec.claimed_bits == pytest.approx(3.2)


def test_more_salient_tokens_read_better():
    found = []
    for share in ("0.2", "0.8"):
        policy = mj.policy(f"zipcache(4,2,{TILE},{GROUP},share={share})+protect({SINKS},{RECENT})")
        out, _ = run(policy.init(SPEC), TOKENS_OF_ALL, [7] * 7)
        found.append(relative_error(out, dense_oracle(TOKENS_OF_ALL)))
    assert found[1] < found[0]


BAD = {
    "zipcache(5,2)": "ZipCache codes have 2, 3, 4, 8 bits, got 5",
    "zipcache(4,2,share=1.0)": "a share 1 of a ZipCache tile of 160 tokens is 160: both parts must be whole groups",
    "zipcache(4,2,100)": "a share 0.6 of a ZipCache tile of 100 tokens is 60",
    "zipcache(4,2,160,0)": "a ZipCache group holds at least 1 token",
    "zipcache+host(8,4)": "codes tiles of tokens, which the host tier cannot move yet",
}


@pytest.mark.parametrize("text", BAD)
def test_what_does_not_go_is_refused(text):
    with pytest.raises(ValueError, match=BAD[text]):
        mj.policy(text).init(SPEC)


def test_codecs_of_the_parts():
    codec = ZipCache()
    assert codec.keys == KiviKeys(4, 32)
    assert codec.rest.keys == KiviKeys(2, 32)
    assert (codec.values.tile, codec.rest.values.tile) == (96, 64)
