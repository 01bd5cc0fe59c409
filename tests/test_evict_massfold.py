"""MassFold: what is merged is exactly the attention to both, bytes, codes, and what does not go."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import BATCH, DIM, HEADS, SPEC, TOKENS, dense_oracle, qkv, quick_jit, relative_error, run
from test_evict import BUDGET, CUTS, KEPT, TEXT, WINDOWS

import memjax as mj
from memjax.cache.admit import admit
from memjax.cache.segment import Segment
from memjax.cache.transforms import evict
from memjax.evict import H2O, massfold
from memjax.pallas_kernels.codes import dense
from memjax.pallas_kernels.decode import decode
from memjax.quantize import Dense

NOPE = dataclasses.replace(SPEC, rope=None)


def alphabet_text():
    """Tokens with one of eight keys, all of the same length, every one of them among the first that leave the tail."""
    q, k, v = qkv(5)
    letters = np.where(np.random.default_rng(6).random((8, DIM)) < 0.5, -1.0, 1.0).astype(np.float32)
    text = np.concatenate([np.arange(16) % 8, np.random.default_rng(7).integers(0, 8, TOKENS - 16)])
    k[:] = letters[text][None, :, None]
    return q, k, v


@pytest.mark.parametrize("cut", ["sevens", "ones"])
def test_folding_tokens_with_equal_keys_loses_nothing(cut):
    """All keys are equally long, so ``knorm`` keeps those that came first: twins of all that go."""
    out, cache = run(mj.policy(f"knorm({BUDGET})+massfold{WINDOWS}").init(NOPE), alphabet_text(), CUTS[cut])
    np.testing.assert_allclose(out, dense_oracle(alphabet_text(), theta=None), atol=2e-5)
    assert cache.history.slots == KEPT
    stands_for = np.exp(np.asarray(cache.history.bias)).sum(-1)
    np.testing.assert_allclose(stands_for, TOKENS - BUDGET + KEPT, rtol=1e-5)
    plain, _ = run(mj.policy(f"knorm({BUDGET}){WINDOWS}").init(NOPE), alphabet_text(), CUTS[cut])
    assert relative_error(plain, out) > 0.1


@pytest.mark.parametrize(("codec", "bound"), [("", 1e-5), ("+int8(centre=none,balance=off)", 0.03)])
def test_what_a_second_reading_takes_away_is_folded_too(codec, bound, monkeypatch):
    """In several blocks; the first tokens stay, which are twins of all that go. More tokens may come behind."""
    monkeypatch.setattr(massfold, "_AT_ONCE", 5)
    tokens = alphabet_text()
    begin, rest = ([x[:, cut] for x in tokens] for cut in (slice(40), slice(40, None)))
    small, without = (
        _compressed(run(mj.policy(f"{text}{codec}{WINDOWS}").init(NOPE), begin, [40])[1])
        for text in ("kvzip(20)+massfold", "kvzip(20)")
    )
    stands_for = np.exp(np.asarray(small.history.bias[..., :16])).sum(-1)
    np.testing.assert_allclose(stands_for, 40 - small.layout.sinks - small.layout.tail, rtol=1e-5)
    out, grown = run(small, rest, [6, 1, 2])
    assert relative_error(out, dense_oracle(tokens, theta=None)[:, 40:]) < bound
    assert not np.asarray(grown.history.bias[..., 16:]).any()
    assert relative_error(run(without, rest, [6, 1, 2])[0], out) > 0.1


def _compressed(cache):
    """The first 16 tokens of the history, with room for as many as come."""
    assert cache.history.bias is None
    age = -np.arange(cache.history.slots) * np.ones((BATCH, HEADS, 1))
    return evict(cache, age, budget=16, room=TOKENS - 40)


def segment(k, v, score, first: int) -> Segment:
    """Tokens [S, H] of one row and head."""
    place = jnp.arange(first, first + len(k), dtype=jnp.int32)[None, None]
    vectors = (dense(jnp.asarray(x, jnp.float32).T[None, None]) for x in (k, v))
    score = jnp.asarray(score, jnp.float32)[None, None]
    return Segment(*vectors, None, place, score, jnp.zeros_like(score))


def folded(k, v, score, kept: int, pieces: list[int]) -> Segment:
    """A history of ``kept`` slots after the other tokens have come in pieces."""
    history = segment(k[:kept], v[:kept], score[:kept], 0)
    start = kept
    for size in pieces:
        new = segment(*(x[start : start + size] for x in (k, v, score)), start)
        start += size
        history = admitted(history, new)
    return history


@quick_jit
def admitted(history: Segment, new: Segment) -> Segment:
    def keys():
        return jnp.concatenate([history.k.data, new.k.data], axis=-1)

    return admit(history, new, H2O(8), jnp.array([99]), keys, jnp.array([0]), Dense())


def test_two_equal_keys_of_equal_scores_are_one_with_the_mean_value_and_log_two():
    draw = np.random.default_rng(0).standard_normal
    k, v, q = draw((4, DIM)), draw((4, DIM)), draw((3, DIM))
    k[3] = k[1]
    history = folded(k, v, [3.0, 1.0, 2.0, 1.0], 3, [1])
    assert np.asarray(history.pos)[0, 0].tolist() == [0, 1, 2]
    np.testing.assert_allclose(history.bias[0, 0], [0.0, np.log(2), 0.0], rtol=1e-6)
    np.testing.assert_allclose(history.v.data[0, 0, :, 1], (v[1] + v[3]) / 2, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(history.v.data[0, 0, :, 0], v[0].astype(np.float32))
    assert np.asarray(history.score)[0, 0].tolist() == [3.0, 2.0, 2.0]
    queries = {"q_pos": jnp.full((1, 3), 50, jnp.int32), "scale": 0.3, "implementation": "reference"}
    whole = segment(k, v, np.zeros(4), 0)
    q = jnp.asarray(q, jnp.float32)[None, None]
    expected = decode(q, whole.k, whole.v, k_pos=whole.pos, **queries)
    found = decode(q, history.k, history.v, k_pos=history.pos, bias=history.bias, **queries)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_folding_at_once_and_in_turns_is_the_same():
    """Against the formula, with weights that are ratios of scores."""
    draw = np.random.default_rng(1).standard_normal
    k, v, score = draw((9, DIM)), draw((9, DIM)), np.array([9.0, 8, 7, 6, 3.0, 0.5, 2.0, 0.25, 1.0])
    unit = k / np.linalg.norm(k, axis=-1, keepdims=True)
    near = np.argmax(unit[4:] @ unit[:4].T, axis=-1)
    at_once = folded(k, v, score, 4, [5])
    for j in range(4):
        mine = np.concatenate([[j], 4 + np.flatnonzero(near == j)])
        weight = score[mine] / score[mine].sum()
        np.testing.assert_allclose(at_once.v.data[0, 0, :, j], weight @ v[mine], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(at_once.bias[0, 0, j], np.log(score[mine].sum() / score[j]), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(at_once.score[0, 0, j], score[mine].sum(), rtol=1e-6)
    assert len(set(near)) < 5
    in_turns = folded(k, v, score, 4, [2, 1, 2])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), in_turns, at_once)


def test_free_slots_take_nothing_and_give_nothing():
    history = segment(np.zeros((3, DIM)), np.zeros((3, DIM)), [0.0, 0.0, 0.0], 0)
    history = dataclasses.replace(history, pos=jnp.array([[[-1, 1, -1]]]))
    new = segment(np.ones((2, DIM)), np.ones((2, DIM)), [1.0, 1.0], 5)
    new = dataclasses.replace(new, pos=jnp.array([[[5, -1]]]))
    kept = admitted(history, new)
    assert sorted(np.asarray(kept.pos)[0, 0].tolist()) == [-1, 1, 5]
    assert not np.asarray(kept.bias).any()


INT8 = "+int8(centre=none,balance=off)"


@pytest.mark.parametrize("text", [f"h2o({BUDGET})+massfold", f"snapkv({BUDGET},window=4)+massfold{INT8}"])
def test_bytes_rows_and_codes(text):
    """Ragged rows are what they are alone, bytes are predicted, and codes are merged about as exact vectors are."""
    policy = mj.policy(text + WINDOWS)
    whole, cache = run(policy.init(SPEC), TEXT, CUTS["sevens"])
    assert mj.nbytes(cache) == mj.predict_nbytes(policy, SPEC)
    assert (np.asarray(cache.history.bias) > 0).any()
    without = mj.policy(text.replace("+massfold", "") + WINDOWS)
    assert mj.nbytes(cache).device - mj.predict_nbytes(without, SPEC).device == 4 * BATCH * HEADS * KEPT
    exact, _ = run(mj.policy(text.replace(INT8, "") + WINDOWS).init(SPEC), TEXT, CUTS["sevens"])
    assert relative_error(whole, exact) < (0.05 if "int8" in text else 1e-6)
    single = dataclasses.replace(SPEC, batch=1)
    alone, _ = run(policy.init(single), [x[1:] for x in TEXT], CUTS["sevens"])
    np.testing.assert_allclose(whole[1:], alone, atol=2e-5)


def test_a_budget_of_all_folds_nothing():
    _, cache = run(mj.policy(f"h2o({TOKENS + 9})+massfold{WINDOWS}").init(SPEC), TEXT, CUTS["sevens"])
    assert cache.history.bias is None


ALONE = ["massfold", "streaming(4,16)+massfold", "duo()+massfold", "quest(64)+massfold", "massfold+int8"]


@pytest.mark.parametrize("text", [*ALONE, "h2o(20)+massfold+massfold"])
def test_what_does_not_go_is_refused(text):
    with pytest.raises(ValueError, match=r"massfold folds tokens that a budget lets go|both decide folding"):
        mj.policy(text)


def test_order_does_not_matter():
    assert str(mj.policy("int8+massfold+h2o(20)")) == "h2o(20)+massfold+int8"
    latent = mj.CacheSpec(1, 1, 24, 64, "float32", latent_dim=16)
    with pytest.raises(ValueError, match="one vector for both"):
        mj.policy("knorm(20)+massfold+protect(2,6)").init(latent)
