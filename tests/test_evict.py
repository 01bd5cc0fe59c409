"""Evictors with a budget, against plain float64 implementations from the papers: who stays, and what attention gives."""

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import (
    BATCH,
    CAPACITY,
    DIM,
    GROUPS,
    HEADS,
    ROPE,
    SPEC,
    TOKENS,
    TRACES,
    by_kv_head,
    dense_oracle,
    numpy_rope,
    plain,
    qkv,
    relative_error,
    run,
    slow_but,
)

import memjax as mj
from memjax.cache.admit import admit
from memjax.cache.segment import Segment
from memjax.evict import H2O, KeyDiff, PyramidKV, SnapKV
from memjax.evict.evictor import Candidates
from memjax.evict.snapkv import pooled
from memjax.pallas_kernels.codes import dense

SPEC = dataclasses.replace(SPEC, q_heads=HEADS * GROUPS)
SINKS, RECENT, BUDGET = 2, 6, 20
KEPT = BUDGET - SINKS - RECENT
WINDOWS = f"+protect({SINKS},{RECENT})"
TEXT = qkv(3)
CUTS = {"whole": [TOKENS], "sevens": [7] * 7, "ones": [1] * TOKENS}


@dataclass
class Reference:
    """One row and kv head of a cache, token by token, as a dictionary of scores by position."""

    q: np.ndarray  # [G, T, H], rotated
    k: np.ndarray  # [T, H], rotated
    v: np.ndarray
    peers: list  # the other heads of the layer, this one among them

    def __post_init__(self):
        self.held, self.score = [], np.zeros(len(self.k))
        self.seen_by = np.zeros(len(self.k), int)

    def attend(self, start: int, end: int) -> np.ndarray:
        """Outputs [G, n, H] of a chunk, and its probabilities [G, n, T], kept for the scores."""
        visible = np.zeros((end - start, len(self.k)), bool)
        visible[:, self.held] = True
        visible[:, start:end] = np.tril(np.ones((end - start, end - start), bool))
        logits = np.where(visible, self.q[:, start:end] @ self.k.T / np.sqrt(self.k.shape[-1]), -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        self.weights = weights / weights.sum(-1, keepdims=True)
        self.seen_by += visible.sum(0)
        return self.weights @ self.v

    def evict(self, start: int, end: int, method) -> None:
        """The chunk joins; of what is not protected the best ``KEPT`` stay, judged by ``method(self, candidates, ...)``."""
        present = [*self.held, *range(start, end)]
        candidates = np.array([p for p in present if SINKS <= p < end - RECENT], int)
        protected = [p for p in present if p < SINKS or p >= end - RECENT]
        if len(candidates) > KEPT:
            ranks = method(self, candidates)
            candidates = candidates[np.argsort(-ranks, kind="stable")[:KEPT]]
        self.held = sorted([*candidates.tolist(), *protected])


def reference_heads(tokens) -> list[list[Reference]]:
    q, k, v = by_kv_head(tokens)
    at = np.arange(q.shape[-2])
    q, k = numpy_rope(q, at, ROPE.theta), numpy_rope(k, at, ROPE.theta)
    rows = []
    for b in range(q.shape[0]):
        heads = [Reference(q[b, h], k[b, h, 0], v[b, h, 0], []) for h in range(q.shape[1])]
        for head in heads:
            head.peers = heads
        rows.append(heads)
    return rows


def accumulate(head: Reference, start: int, end: int) -> None:
    head.score += head.weights.mean(0).sum(0)


def last_query(head: Reference, start: int, end: int) -> None:
    head.score = head.weights.mean(0)[-1]


def window_of(size: int):
    """The mean over the last queries of a chunk; over shorter chunks exponential."""

    def observe(head: Reference, start: int, end: int) -> None:
        head.score = blend(head.score, head.weights.mean(0), size)

    return observe


def changes_of(size: int):
    """How much the last outputs of a chunk change without each token."""

    def observe(head: Reference, start: int, end: int) -> None:
        rows = np.zeros(head.weights.shape[1:])
        for weights in head.weights:
            change = (weights / (1 - weights + 1e-6))[..., None] * (head.v - (weights @ head.v)[:, None])
            rows += np.square(change).sum(-1) / len(head.weights)
        head.score = blend(head.score, rows, size)

    return observe


def blend(score: np.ndarray, rows: np.ndarray, size: int) -> np.ndarray:
    if len(rows) >= size:
        return rows[-size:].mean(0)
    for row in rows:
        score = score * (1 - 1 / size) + row / size
    return score


def neighbours(reach: int):
    """Average pooling over positions at most so far away, of tokens that are candidates."""

    def rank(head: Reference, candidates: np.ndarray) -> np.ndarray:
        near = np.abs(candidates[:, None] - candidates) <= reach
        return near @ head.score[candidates] / (2 * reach + 1)

    return rank


def away_from_the_mean(head: Reference, candidates: np.ndarray) -> np.ndarray:
    unit = head.k[candidates] / np.linalg.norm(head.k[candidates], axis=-1, keepdims=True)
    anchor = unit.mean(0)
    return -(unit @ anchor) / np.linalg.norm(anchor)


def remember_end(head: Reference, start: int, end: int) -> None:
    head.end = end


def expected(horizon: int, epsilon: float):
    """Gaussian queries like those so far but the first four, under the mean rotation of the positions to come."""

    def rank(head: Reference, candidates: np.ndarray) -> np.ndarray:
        at, k = np.arange(4, head.end), head.k[candidates]
        future = np.arange(head.end, head.end + horizon)
        turn = np.mean([numpy_rope(np.eye(DIM), np.full(DIM, p), ROPE.theta).T for p in future], axis=0)
        attention = np.zeros(len(candidates))
        for q in numpy_rope(head.q[:, at], -at, ROPE.theta):
            mean, covariance = turn @ q.mean(0), turn @ np.cov(q.T, bias=True) @ turn.T
            z = k @ mean / np.sqrt(DIM) + np.einsum("sh,hg,sg->s", k, covariance, k) / (2 * DIM)
            attention += np.exp(z) / np.exp(z).sum() / len(head.q)
        return (attention + epsilon) * np.linalg.norm(head.v[candidates], axis=-1)

    return rank


# policy, how probabilities become scores, how candidates are ranked
METHODS = {
    f"h2o({BUDGET})": (accumulate, lambda head, c: head.score[c]),
    f"h2o({BUDGET},normalised=true)": (accumulate, lambda head, c: head.score[c] / head.seen_by[c]),
    f"tova({BUDGET})": (last_query, lambda head, c: np.mean([peer.score[c] for peer in head.peers], 0)),
    f"snapkv({BUDGET},window=4)": (window_of(4), neighbours(2)),
    f"dropkv({BUDGET},window=4)": (changes_of(4), neighbours(3)),
    f"expected_attention({BUDGET},horizon=8,epsilon=0.01)": (remember_end, expected(8, 0.01)),
    f"knorm({BUDGET})": (None, lambda head, c: -np.linalg.norm(head.k[c], axis=-1)),
    f"keydiff({BUDGET})": (None, away_from_the_mean),
}


def reference(text: str, sizes) -> tuple[np.ndarray, list]:
    """Outputs [B, T, N, H] and the positions that are held in the end."""
    observe, rank = METHODS[text]
    rows, outs, start = reference_heads(TEXT), [], 0
    for size in sizes:
        end = start + size
        outs.append(np.stack([np.stack([head.attend(start, end) for head in heads]) for heads in rows]))
        for heads in rows:
            for head in heads:
                if observe is not None:
                    observe(head, start, end)
            for head in heads:
                head.evict(start, end, rank)
        start = end
    out = np.concatenate(outs, axis=3)  # [B, K, G, T, H]
    out = out.transpose(0, 3, 1, 2, 4).reshape(BATCH, TOKENS, HEADS * GROUPS, DIM)
    return out, [[head.held for head in heads] for heads in rows]


def held_positions(cache, row: int, head: int) -> list[int]:
    """Every position in a cache, sinks and tail included."""
    place, length = cache.layout, int(cache.length[row])
    history = [int(p) for p in cache.history.pos[row, head] if p >= 0]
    assert len(set(history)) == len(history)
    return sorted([*range(place.sinks), *history, *range(length - place.tail, length)])


@functools.cache
def result(text: str, cut: str):
    return run(mj.policy(text + WINDOWS).init(SPEC), TEXT, CUTS[cut])


@pytest.mark.parametrize("cut", slow_but(["sevens"], CUTS))
@pytest.mark.parametrize("text", METHODS)
def test_the_same_tokens_stay_as_in_the_paper(text, cut):
    if cut == "whole" and not text.startswith(("snapkv", "dropkv", "h2o(20)")):
        return
    out, cache = result(text, cut)
    expected, held = reference(text, CUTS[cut])
    for row in range(BATCH):
        for head in range(HEADS):
            assert held_positions(cache, row, head) == held[row][head]
    np.testing.assert_allclose(out, expected, atol=2e-5)
    assert cache.history.slots == KEPT
    assert mj.nbytes(cache) == mj.predict_nbytes(cache.policy, SPEC)
    assert TRACES[cache.policy, SPEC, CUTS[cut][0]] == 1


def test_a_budget_of_all_is_no_eviction():
    for text in (f"h2o({CAPACITY})", f"snapkv({CAPACITY + 5})", "keydiff(fraction=1)"):
        out, cache = run(mj.policy(text + WINDOWS).init(SPEC), TEXT, CUTS["sevens"])
        expected, other = run(mj.policy("dense" + WINDOWS).init(SPEC), TEXT, CUTS["sevens"])
        np.testing.assert_array_equal(out, expected)
        assert cache.history.pos is None
        assert mj.nbytes(cache) == mj.nbytes(other)


def test_a_budget_longer_than_the_text_changes_nothing():
    out, cache = run(mj.policy(f"tova({TOKENS})" + WINDOWS).init(SPEC), TEXT, CUTS["sevens"])
    np.testing.assert_allclose(out, dense_oracle(TEXT), atol=1e-5)
    assert (np.asarray(cache.history.pos) >= 0).all()


def test_scores_of_h2o_are_column_sums():
    """Without eviction every query's probability is somewhere: sinks, which are not scored, make up for the rest."""
    spec = dataclasses.replace(SPEC, capacity=CAPACITY)
    out, cache = run(mj.policy(f"h2o({TOKENS})+protect(0,6)").init(spec), TEXT, CUTS["sevens"])
    total = np.asarray(cache.history.score.sum(-1) + cache.tail.score.sum(-1))
    np.testing.assert_allclose(total, TOKENS, rtol=1e-5)
    assert np.isfinite(out).all()


def test_rows_of_different_lengths_are_what_they_are_alone():
    policy = mj.policy(f"h2o({BUDGET})+int8{WINDOWS}")
    lengths = [[7, 7, 7, 7, 7], [7, 4, 0, 7, 1]]
    cache, outs = policy.init(SPEC), [[], []]
    step = jax.jit(lambda cache, q, k, v, n: mj.attend(mj.update(cache, k, v, n), q))
    begin = [0, 0]
    for now in zip(*lengths, strict=True):
        piece = [np.stack([x[b, begin[b] : begin[b] + 7] for b in range(BATCH)]) for x in TEXT]
        out, cache = step(cache, *piece, jnp.asarray(now, jnp.int32))
        for b in range(BATCH):
            outs[b].append(np.asarray(out)[b, : now[b]])
            begin[b] += now[b]
    for b in range(BATCH):
        sizes = [n for n in lengths[b] if n]
        single = dataclasses.replace(SPEC, batch=1)
        alone, _ = run(policy.init(single), [x[b : b + 1, : sum(sizes)] for x in TEXT], sizes)
        np.testing.assert_allclose(np.concatenate(outs[b]), alone[0], atol=2e-5)


@pytest.mark.parametrize("codec", ["int8", "turboquant(4,4,centre=fixed,balance=off)"])
def test_coded_tokens_are_evicted_too(codec):
    exact, _ = result(f"h2o({BUDGET})", "sevens")
    out, cache = run(mj.policy(f"h2o({BUDGET})+{codec}{WINDOWS}").init(SPEC), TEXT, CUTS["sevens"])
    assert relative_error(out, exact) < (0.03 if codec == "int8" else 0.3)
    assert cache.history.slots == KEPT
    assert mj.nbytes(cache) == mj.predict_nbytes(cache.policy, SPEC)


def test_keys_come_out_of_their_codes_with_the_centre():
    """KeyDiff compares whole keys: those that the front end has taken apart are put together again."""
    policy = mj.policy(f"keydiff({BUDGET})+int8(centre=rope,balance=off){WINDOWS}")
    q, k, v = TEXT
    shifted = (q, k + 3.0, v)
    _, plainly = run(mj.policy(f"keydiff({BUDGET})" + WINDOWS).init(SPEC), shifted, CUTS["sevens"])
    _, coded = run(policy.init(SPEC), shifted, CUTS["sevens"])
    for b in range(BATCH):
        for h in range(HEADS):  # a rounding may decide between two of them
            assert len(set(held_positions(plainly, b, h)) - set(held_positions(coded, b, h))) <= 1


def test_nothing_ties_with_a_free_slot():
    """Scores of minus infinity or NaN still beat a slot without a token (kvpress' issue 227)."""
    history = _segment([[3, -1, 5]], [[-np.inf, 7.0, np.nan]])
    new = _segment([[8, 9]], [[-np.inf, -np.inf]])
    kept = admit(history, new, H2O(8), jnp.array([10]), None, jnp.array([0]))
    assert sorted(np.asarray(kept.pos)[0, 0].tolist()) == [3, 5, 8]
    out_of_sight = admit(history, new, H2O(8), jnp.array([10]), None, jnp.array([5]))
    assert sorted(np.asarray(out_of_sight.pos)[0, 0].tolist()) == [5, 8, 9]
    one = admit(history, _segment([[8]], [[-np.inf]]), H2O(8), jnp.array([9]), None, jnp.array([0]))
    assert np.asarray(one.pos)[0, 0].tolist() == [3, 8, 5]
    full = _segment([[3, 4, 5]], [[0.3, 0.1, 0.2]])
    worst = admit(full, _segment([[8]], [[0.05]]), H2O(8), jnp.array([9]), None, jnp.array([0]))
    assert np.asarray(worst.pos)[0, 0].tolist() == [3, 4, 5]


def _segment(pos, score) -> Segment:
    pos, score = jnp.asarray([pos], jnp.int32), jnp.asarray([score], jnp.float32)
    vectors = dense(jnp.broadcast_to(pos[:, :, None].astype(jnp.float32), (1, 1, 2, pos.shape[-1])))
    return Segment(vectors, vectors, None, pos, score)


def test_pooling_goes_by_distance_in_the_text():
    tokens = Candidates(jnp.array([[[1.0, 2.0, 4.0, 8.0]]]), jnp.array([[[9, 3, 4, -1]]]), jnp.array([10]), None)
    np.testing.assert_allclose(pooled(tokens, 3, "avg")[0, 0, :3], [1 / 3, 2.0, 2.0])
    np.testing.assert_allclose(pooled(tokens, 3, "max")[0, 0, :3], [1.0, 4.0, 4.0])


def test_a_needle_that_the_window_looks_at_stays_with_its_neighbours():
    q, k, v = (x.copy() for x in TEXT)
    k[:, 20] = 0.0
    k[:, 20, :, -1] = 40.0  # the slowest pair: hardly turned by the position
    q[:, -4:] = 0.0
    q[:, -4:, :, -1] = 5.0
    _, cache = run(mj.policy(f"snapkv({BUDGET},window=4){WINDOWS}").init(SPEC), (q, k, v), [TOKENS])
    for row in range(BATCH):
        for head in range(HEADS):
            assert {18, 19, 20, 21, 22} <= set(held_positions(cache, row, head))


def test_the_pyramids_budgets_add_up():
    evictor = PyramidKV(200, beta=20)
    budgets = [evictor.for_layer(i, 10, 40).budget for i in range(10)]
    assert abs(sum(budgets) - 2000) <= 10
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[-1] == 40 + 160 / 20
    specs = [SPEC] * 3
    caches = mj.policy(f"pyramidkv({BUDGET},beta=2)" + WINDOWS).init(specs)
    assert [cache.history.slots for cache in caches] == [18, 12, 6]
    assert mj.nbytes(caches) == mj.predict_nbytes(caches[0].policy, specs[:1]) + mj.nbytes(caches[1:])


IN_BYTES = ["snapkv(%s)", "pyramidkv(%s,beta=4)+int4", "adakv(%s)+turboquant(3,2)", "knorm(%s)+auto(bits=9)"]


@pytest.mark.parametrize("text", IN_BYTES)
def test_a_budget_in_bytes_is_the_largest_that_fits(text, sensitivity_file):
    """One more token would take more bytes than the limit; the layers share them by the evictor's rule."""
    text, specs = text.replace("9)", f"9,file={sensitivity_file})") + WINDOWS, [SPEC] * 2
    taken = {n: mj.predict_nbytes(mj.policy(text % n), specs).device for n in (30, 31)}
    limit = sum(taken.values()) // 2
    assert taken[30] <= limit < taken[31]
    policy = mj.policy(text % f"bytes={limit}")
    assert mj.policy(str(policy)) == policy
    caches = policy.init(specs)
    assert mj.nbytes(caches) == mj.predict_nbytes(policy, specs)
    assert jax.tree.structure(caches) == jax.tree.structure(mj.policy(text % 30).init(specs))


def test_a_limit_in_bytes_is_one_for_the_whole_cache():
    both = mj.per_layer(mj.policy("h2o(bytes=60000)" + WINDOWS), {0: mj.policy("dense")})
    caches = both.init([SPEC] * 3)
    assert caches[0].policy == mj.policy("dense")
    assert caches[1].policy == caches[2].policy
    assert 58_000 < mj.nbytes(caches).device <= 60_000
    everything = mj.policy("h2o(bytes=9MB)" + WINDOWS).init([SPEC])[0]
    assert everything.layout.judge is None
    with pytest.raises(ValueError, match=r"is less than the smallest cache of these layers, \d+ bytes"):
        mj.policy("h2o(bytes=1000)" + WINDOWS).init([SPEC])
    with pytest.raises(ValueError, match="one budget in bytes decides about a whole cache"):
        mj.per_layer(mj.policy("h2o(bytes=60000)"), {0: mj.policy("h2o(bytes=9000)")}).init([SPEC] * 2)


@pytest.mark.parametrize(("sinks", "kept"), [(4, 36), (0, 36)])
def test_a_head_that_parks_its_attention_on_the_first_token_needs_it(sinks, kept):
    """One key takes e^b of the softmax mass and gives nothing; a window that has left it gives all it has for the rest.

    What small trained models show only faintly (benchmarks/results/streaming_ppl.md), exactly: without sinks outputs are
    1 + e^b / 35 times too large from the first eviction on, with them they stay what they were.
    """
    b, tokens = 5.0, 96
    spec = mj.CacheSpec(1, 1, 16, tokens, "float32", rope=None, scale=1.0)
    q, k, v = (np.zeros((1, tokens, 1, 16), np.float32) for _ in range(3))
    q[..., 0], k[:, 0, :, 0], v[:, 1:, :, 1] = 1.0, b, 1.0
    policy = mj.policy(f"streaming({sinks},{kept - sinks})")
    out = run(policy.init(spec), (q, k, v), [8] * (tokens // 8))[0][0, :, 0, 1]
    whole = np.arange(tokens) / (np.arange(tokens) + np.exp(b))  # t other tokens, each of weight 1
    np.testing.assert_allclose(out[:kept], whole[:kept], rtol=1e-5)
    np.testing.assert_allclose(out[kept:], 35 / (35 + np.exp(b)) if sinks else 1.0, rtol=1e-5)


def test_duplicates_go_first():
    """KeyDiff: of many equal keys and one that differs, that one stays."""
    keys = np.ones((1, 1, 4, 12), np.float32)
    keys[..., 5] = [1.0, -1.0, 0.0, 0.0]
    pos = jnp.arange(12, dtype=jnp.int32)[None, None]
    rank = KeyDiff(8).rank(Candidates(jnp.zeros((1, 1, 12)), pos, jnp.array([12]), lambda: jnp.asarray(keys)))
    assert int(jnp.argmax(rank)) == 5


BAD = {
    "budget of protection": (f"h2o({SINKS + RECENT})" + WINDOWS, "leaves none to choose besides the 8 that are protected"),
    "no budget": ("h2o", "needs a budget in tokens, a fraction"),
    "both": ("h2o(8,fraction=0.5)", "one of them, got budget=8, fraction=0.5, bytes=0"),
    "fraction above one": ("tova(fraction=1.5)", r"fraction in \(0, 1\]"),
    "negative budget": ("knorm(-4)", "budget"),
    "even kernel": ("snapkv(64,kernel=4)", "odd number of neighbours"),
    "other pool": ("snapkv(64,pool=median)", "not one of avg, max"),
    "tiles": ("h2o(64)+kivi(2)", "cannot take single ones"),
    "two precisions": ("snapkv(64)+zipcache", "cannot take single ones"),
    "host tier": ("h2o(64)+host(8,4)", "host tier cannot move"),
    "two evictors": ("h2o(64)+streaming(4,60)", "both decide eviction"),
    "bytes and tokens": ("h2o(8,bytes=1MiB)", "one of them, got budget=8, fraction=0.0, bytes=1048576"),
    "bytes of one layer": ("h2o(bytes=1MiB)", "needs the specs of all layers"),
    "no bytes": ("h2o(bytes=many)", "bytes must be a number such as 67108864 or 64MiB"),
    "a fraction of a pyramid": ("pyramidkv(64,beta=0)", "beta"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_go_is_refused(case):
    text, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        mj.policy(text).init(SPEC)


def test_string_forms_are_read_back():
    for text in ("h2o(256)", "snapkv(fraction=0.25,kernel=7)", "tova(64)+int8", "pyramidkv(128,32,5,beta=10)"):
        policy = mj.policy(text)
        assert mj.policy(str(policy)) == policy
    assert str(mj.policy("h2o(fraction=0.5)")) == "h2o(fraction=0.5)"
    assert str(mj.policy("h2o(256)")) == "h2o(256)"
    assert SnapKV(64).observer.queries == 32


def test_the_plain_table_is_without_front_end():
    assert plain("h2o(20)+turboquant(4,4)").resolved_front().off
