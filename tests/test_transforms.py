"""Whole-cache transforms: quantize, evict and offload give what a cache made that way gives, under jit, in any order."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import (
    BATCH,
    HEADS,
    ROPE,
    SPEC,
    Row,
    as_output,
    by_kv_head,
    dense_oracle,
    numpy_rope,
    numpy_softmax,
    oracle,
    plain,
    qkv,
    quick_jit,
    run,
    step,
)

import memjax as mj
from memjax.cache import RecurrentSpec, evict, offload, quantize
from memjax.quantize import Fp8, Int4, Int8
from memjax.quantize.front import OFF

SINKS, TAIL, SEEN, MORE = 4, 8, 42, 7
TEXT = qkv(0, tokens=SEEN + MORE)
WINDOWS = mj.protect(SINKS, TAIL)
HISTORY = SEEN - SINKS - TAIL


@functools.cache
def filled(text=str(WINDOWS)):
    """A cache that has taken in ``SEEN`` tokens."""
    return run(plain(text).init(SPEC), tuple(x[:, :SEEN] for x in TEXT), [7] * 6)[1]


def next_outputs(cache):
    """Outputs of the tokens that follow, as one more chunk."""
    return step(cache, *(x[:, SEEN:] for x in TEXT))


CODECS = [Int8(), Int4(rotate=True), Fp8(format="e5m2")]


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.fmt)
def test_quantize(codec):
    before = filled()
    coded = dataclasses.replace(mj.dense(), codec=codec, front=OFF)
    after = quick_jit(lambda cache: quantize(cache, coded))(before)
    assert after.policy == mj.chain(WINDOWS, coded)
    assert mj.nbytes(after) == mj.predict_nbytes(after.policy, SPEC)
    assert mj.nbytes(after).bits_per_value == 8 * mj.nbytes(after).history / mj.nbytes(after).history_values
    assert mj.nbytes(after).bits_per_value <= 9
    made = filled(str(after.policy))
    for a, b in zip(jax.tree.leaves(after.history), jax.tree.leaves(made.history), strict=True):
        np.testing.assert_array_equal(*(np.asarray(x)[..., :HISTORY] for x in (a, b)))
    for name in ("sinks", "tail", "length", "written"):
        np.testing.assert_array_equal(*(jax.tree.leaves(getattr(x, name))[0] for x in (after, before)))
    out, after = next_outputs(after)
    expected = oracle(Row("", codec, SINKS, TAIL), TEXT, [SEEN, MORE])
    np.testing.assert_allclose(out, expected[:, SEEN:], atol=1e-5)
    assert after.length.tolist() == [SEEN + MORE] * BATCH


def test_offload():
    before = filled()
    after = quick_jit(lambda cache: offload(cache, mj.host(8, 4)))(before)
    made = filled(f"host(8,4)+{WINDOWS}")
    assert mj.nbytes(after) == mj.nbytes(made) == mj.predict_nbytes(after.policy, SPEC)
    assert mj.nbytes(after).device < mj.nbytes(before).device / 2
    assert mj.nbytes(after).host >= mj.nbytes(before).history
    out, _ = next_outputs(after)
    np.testing.assert_allclose(out, dense_oracle(TEXT)[:, SEEN:], atol=1e-5)


def test_offload_of_a_ring():
    """A window of 20 tokens that has turned over twice."""
    spec = dataclasses.replace(SPEC, window=20)
    cache = run(mj.protect(0, 5).init(spec), tuple(x[:, :SEEN] for x in TEXT), [7] * 6)[1]
    cache = quick_jit(lambda cache: offload(cache, mj.host(4, 3)))(cache)
    assert cache.layout.ring
    out, _ = next_outputs(cache)
    np.testing.assert_allclose(out, dense_oracle(TEXT, window=20)[:, SEEN:], atol=1e-5)


def test_offload_and_quantize_commute():
    def both(cache):
        int8 = plain("int8")
        return quantize(offload(cache, mj.host(8, 4)), int8), offload(quantize(cache, int8), mj.host(8, 4))

    one, other = quick_jit(both)(filled())
    assert jax.tree.structure(one) == jax.tree.structure(other)
    outs = [next_outputs(cache)[0] for cache in (one, other)]
    np.testing.assert_array_equal(*outs)
    expected = oracle(Row("", Int8(), SINKS, TAIL), TEXT, [SEEN, MORE])
    np.testing.assert_allclose(outs[0], expected[:, SEEN:], atol=1e-5)


def test_a_history_that_fits_stays_on_the_device():
    after = offload(filled(), mj.host(100, 4))
    assert after.host is None
    assert mj.nbytes(after) == mj.nbytes(filled())


# ---- evict -----------------------------------------------------------------------------------------------------------

BUDGET, ROOM = 10, 9
evicted = quick_jit(evict, static_argnums=(2, 3))


def random_scores(seed=5, heads=HEADS) -> np.ndarray:
    slots = filled().history.slots
    return np.random.default_rng(seed).standard_normal((BATCH, heads, slots)).astype(np.float32)


def best_positions(scores: np.ndarray, count: int, tokens: int) -> list:
    """Positions in the text of the ``count`` best of the first ``tokens`` slots, in order."""
    best = [[np.sort(np.argsort(-head[:tokens], kind="stable")[:count]) for head in row] for row in scores]
    return np.asarray(best) + SINKS


def attention_over(kept: np.ndarray) -> np.ndarray:
    """Outputs of the tokens that follow if of the history only ``kept`` [B, K, n] are there."""
    q, k, v = by_kv_head(TEXT)
    t = np.arange(SEEN + MORE)
    q, k = (numpy_rope(x, t, ROPE.theta) for x in (q, k))
    there = (t < SINKS) | (t >= SEEN - TAIL) | (t == kept[..., None]).any(-2)
    mask = there[:, :, None, None, :] & (t <= t[SEEN:, None])
    scores = q[..., SEEN:, :] @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    return as_output(numpy_softmax(scores, mask) @ v)


@pytest.mark.parametrize("heads", [1, HEADS])
def test_evict_keeps_the_best(heads):
    scores = random_scores(heads=heads)
    after = evicted(filled(), scores, BUDGET, ROOM)
    kept = best_positions(np.broadcast_to(scores, (BATCH, HEADS, scores.shape[-1])), BUDGET, HISTORY)
    pos = np.asarray(after.history.pos)
    np.testing.assert_array_equal(pos[..., :BUDGET], kept)
    assert (pos[..., BUDGET:] == -1).all()
    assert mj.nbytes(after).history == BATCH * HEADS * (BUDGET + ROOM) * (2 * 16 * 4 + 4)
    keys = np.take_along_axis(np.asarray(filled().history.k.data), (kept - SINKS)[:, :, None], axis=-1)
    np.testing.assert_array_equal(np.asarray(after.history.k.data)[..., :BUDGET], keys)
    out, after = next_outputs(after)
    np.testing.assert_allclose(out, attention_over(kept), atol=1e-5)
    assert after.written.tolist() == [BUDGET + MORE] * BATCH
    new = np.asarray(after.history.pos)[..., BUDGET : BUDGET + MORE]
    np.testing.assert_array_equal(new, np.broadcast_to(SEEN - TAIL + np.arange(MORE), new.shape))


def test_keeping_everything_changes_nothing():
    slots = filled().history.slots
    out, _ = next_outputs(evicted(filled(), random_scores(), slots, 0))
    np.testing.assert_allclose(out, dense_oracle(TEXT)[:, SEEN:], atol=1e-5)


def test_evict_and_quantize_commute():
    scores = random_scores()

    def both(cache):
        return (
            quantize(evict(cache, scores, BUDGET, ROOM), plain("int4")),
            evict(quantize(cache, plain("int4")), scores, BUDGET, ROOM),
        )

    one, other = quick_jit(both)(filled())
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(*(np.asarray(x)[..., :BUDGET] if x.ndim > 2 else x for x in (a, b)))
    np.testing.assert_array_equal(next_outputs(one)[0], next_outputs(other)[0])


def test_rows_with_fewer_tokens_keep_all_they_have():
    """Even tokens scored -inf stay before a free slot does, and no row sees what another has."""
    lengths = [SINKS + TAIL + 3, 7]
    cache = WINDOWS.init(SPEC)
    for start in (0, 7, 14):
        chunk = (x[:, start : start + 7] for x in TEXT)
        _, cache = step(cache, *chunk, jnp.clip(jnp.array(lengths) - start, 0, 7))
    scores = np.full((BATCH, HEADS, cache.history.slots), -np.inf, np.float32)
    scores[:, :, 3:] = 1.0
    after = evicted(cache, scores, BUDGET, ROOM)
    assert after.written.tolist() == [3, 0]
    np.testing.assert_array_equal(after.history.pos[0, :, :3], [[4, 5, 6]] * HEADS)
    assert (np.asarray(after.history.pos[0, :, 3:]) == -1).all()
    assert (np.asarray(after.history.pos[1]) == -1).all()


def test_evict_twice():
    once = evicted(filled(), random_scores(), BUDGET, ROOM)
    scores = np.zeros((BATCH, 1, BUDGET + ROOM), np.float32)
    scores[..., :BUDGET] = np.arange(BUDGET)
    scores[..., BUDGET:] = 99  # free slots
    twice = evicted(once, scores, 4, 1)
    expected = np.asarray(once.history.pos)[..., BUDGET - 4 : BUDGET]
    np.testing.assert_array_equal(np.asarray(twice.history.pos)[..., :4], expected)
    assert twice.history.slots == 5


def test_more_than_the_room_is_nan():
    cache = evicted(filled(), random_scores(), BUDGET, MORE - 1)
    assert np.isnan(next_outputs(cache)[0]).all()
    cache = evicted(filled(), random_scores(), BUDGET, MORE)
    assert np.isfinite(next_outputs(cache)[0]).all()


def test_an_overflow_survives_eviction():
    full = filled()
    slots = full.history.slots
    lost = dataclasses.replace(full, written=jnp.array([slots + 1, slots]), length=jnp.array([60, 59]))
    out, _ = next_outputs(evicted(lost, random_scores(), BUDGET, ROOM))
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1]).all()


# ---- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "transform",
    [lambda c: quantize(c, mj.int8()), lambda c: offload(c, mj.host(8, 4)), lambda c: evict(c, random_scores(), 10)],
    ids=["quantize", "offload", "evict"],
)
def test_staged_tokens_are_committed_first(transform):
    _, k, v = (x[:, SEEN:] for x in TEXT)
    after = jax.eval_shape(lambda cache: transform(mj.update(cache, k, v)), filled())
    assert after.staged is None
    assert after.staged_count is None


def test_a_models_caches_go_through():
    specs = [SPEC, RecurrentSpec(BATCH, 8, 4, 2, 4, 4), SPEC]
    caches = WINDOWS.init(specs)
    scores = [random_scores(1), random_scores(2)]

    @jax.eval_shape
    def after():
        small = offload(quantize(caches, mj.int8()), mj.host(8, 4))
        return small, evict(caches, scores, 10)

    small, few = after
    assert [type(layer) for layer in small] == [type(layer) for layer in caches]
    assert [str(small[i].policy) for i in (0, 2)] == [f"int8+host(8,4)+{WINDOWS}"] * 2
    assert [few[i].history.slots for i in (0, 2)] == [10, 10]
    assert mj.nbytes(small).state == mj.nbytes(caches).state > 0
    with pytest.raises(ValueError, match="one array of scores per attention layer, 2, got 1"):
        evict(caches, scores[:1], 10)


WRONG = {
    "quantize twice": (lambda c: quantize(quantize(c, Int8()), Int4()), "starts from a dense history, .* int8 already"),
    "quantize with an evictor": (lambda c: quantize(c, mj.streaming(4, 16)), r"codec such as mj\.int4\(\) and nothing"),
    "quantize with a string": (lambda c: quantize(c, "int4"), "takes a codec such as .* got int4"),
    "offload twice": (lambda c: offload(offload(c, mj.host(8, 4)), mj.host(8, 4)), "offload needs a history without"),
    "offload with a codec": (lambda c: offload(c, mj.int4()), r"tier such as mj\.host\(256\) and nothing else"),
    "offload after evict": (lambda c: offload(evict(c, random_scores(), 10), mj.host(8, 4)), "without holes"),
    "evict from a tier": (lambda c: evict(offload(c, mj.host(8, 4)), random_scores(), 10), "whole history"),
    "budget of nothing": (lambda c: evict(c, random_scores(), 0), "1 <= budget <= 44 .* got 0 and 0"),
    "budget beyond": (lambda c: evict(c, random_scores(), 45), "got 45 and 0"),
    "negative room": (lambda c: evict(c, random_scores(), 10, -1), "got 10 and -1"),
    "scores of another shape": (lambda c: evict(c, random_scores()[:, :, 1:], 10), r"scores .* 44\], got \[2, 2, 43\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_refused(case):
    call, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call, filled())


@pytest.mark.parametrize("text", ["streaming(4,16)+protect(4,8)", "streaming(4,8)+protect(4,8)"])
def test_a_ring_and_an_empty_history_have_nothing_to_choose_from(text):
    with pytest.raises(ValueError, match="keeps none; evict first"):
        evict(mj.policy(text).init(SPEC), random_scores(), 4)


def test_a_rotation_that_does_not_fit_is_refused():
    spec = dataclasses.replace(SPEC, head_dim=12, rope=None)
    with pytest.raises(ValueError, match="use rotate=false"):
        quantize(WINDOWS.init(spec), mj.int4(rotate=True))
