"""Ada-KV: heads that share one budget, against a plain float64 implementation, and attention that keeps them apart."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import BATCH, CAPACITY, DIM, GROUPS, HEADS, SPEC, TOKENS, TRACES, qkv, quick_jit, run, slow_but, step
from test_evict import BUDGET, KEPT, RECENT, SINKS, WINDOWS, neighbours, reference_heads, window_of

import memjax as mj
from memjax.cache.share import heads_apart, shared_queries, with_floor
from memjax.evict import AdaKV
from memjax.pallas_kernels.codes import dense
from memjax.pallas_kernels.decode import decode

ALPHA = 0.25
FLOOR = int(ALPHA * KEPT)
CUTS = {"sevens": [7] * 7, "ones": [28] + [1] * (TOKENS - 28)}
ADAKV = f"adakv({BUDGET},window=4,alpha={ALPHA})"


@functools.cache
def text():
    """Tokens of two heads: one looks at few others, one at many."""
    q, k, v = qkv(3)
    k[:, :, 0] *= 2
    k[:, :, 1] /= 2
    return q, k, v


@functools.cache
def result(policy: str, cut: str):
    return run(mj.policy(policy + WINDOWS).init(SPEC), text(), CUTS[cut])


def held_positions(cache, row: int, head: int) -> list[int]:
    """Every position that a head holds, sinks and tail included."""
    place, length = cache.layout, int(cache.length[row])
    pos, owner = np.asarray(cache.history.pos[row, 0]), np.asarray(cache.history.owner[row, 0])
    mine = pos[(owner == head) & (pos >= 0)].tolist()
    assert len(set(mine)) == len(mine)
    return sorted([*range(place.sinks), *mine, *range(length - place.tail, length)])


def evict_together(heads, start: int, end: int) -> None:
    """Each head's best ``FLOOR`` candidates stay, and of all heads' others the best, ``KEPT`` per head on average."""
    ranked = []
    for h, head in enumerate(heads):
        present = [*head.held, *range(start, end)]
        candidates = np.array([p for p in present if SINKS <= p < end - RECENT], int)
        head.held = [p for p in present if p < SINKS or p >= end - RECENT]
        best = sorted(zip(-neighbours(2)(head, candidates), candidates, strict=True))
        ranked += [(place >= FLOOR, rank, h, p) for place, (rank, p) in enumerate(best)]
    for _, _, h, p in sorted(ranked)[: HEADS * KEPT]:
        heads[h].held = sorted([*heads[h].held, int(p)])


def reference(sizes) -> tuple[np.ndarray, list]:
    rows, outs, start = reference_heads(text()), [], 0
    for size in sizes:
        end = start + size
        outs.append(np.stack([np.stack([head.attend(start, end) for head in heads]) for heads in rows]))
        for heads in rows:
            for head in heads:
                window_of(4)(head, start, end)
            evict_together(heads, start, end)
        start = end
    out = np.concatenate(outs, axis=3).transpose(0, 3, 1, 2, 4)
    return out.reshape(BATCH, TOKENS, HEADS * GROUPS, DIM), [[head.held for head in heads] for heads in rows]


@pytest.mark.parametrize("cut", ["sevens", "ones"])
def test_the_same_tokens_stay_as_in_the_paper(cut):
    out, cache = result(ADAKV, cut)
    expected, held = reference(CUTS[cut])
    counts = np.zeros((BATCH, HEADS), int)
    for b, h in np.ndindex(BATCH, HEADS):
        assert held_positions(cache, b, h) == held[b][h]
        counts[b, h] = len(held[b][h]) - SINKS - RECENT
    np.testing.assert_allclose(out, expected, atol=2e-5)
    np.testing.assert_array_equal(counts.sum(1), HEADS * KEPT)
    assert counts.min() >= FLOOR
    assert abs(counts - KEPT).max() > 1
    assert TRACES[cache.policy, SPEC, CUTS[cut][-1]] == 1


def test_the_bytes_are_snapkvs_and_one_per_slot():
    _, cache = result(ADAKV, "sevens")
    snap = mj.predict_nbytes(mj.policy(f"snapkv({BUDGET},window=4)" + WINDOWS), SPEC)
    assert mj.nbytes(cache) == mj.predict_nbytes(cache.policy, SPEC)
    assert mj.nbytes(cache).device == snap.device + BATCH * HEADS * KEPT
    assert mj.nbytes(cache).history_values == snap.history_values
    assert cache.history.slots == HEADS * KEPT
    assert not cache.policy.simulated()


@pytest.mark.parametrize("codec", slow_but(["+turboquant(4,4)"], ["", "+turboquant(4,4)"]))
def test_alpha_one_is_snapkv(codec):
    """Token for token, and what attention gives, through codes whose centre differs from head to head, too."""
    for cut in ("sevens", "ones"):
        out, cache = result(f"adakv({BUDGET},window=4,alpha=1){codec}", cut)
        expected, other = result(f"snapkv({BUDGET},window=4){codec}", cut)
        for b, h in np.ndindex(BATCH, HEADS):
            mine = held_positions(cache, b, h)
            assert mine[SINKS:-RECENT] == sorted(np.asarray(other.history.pos[b, h]).tolist())
        np.testing.assert_allclose(out, expected, atol=1e-4 if codec else 2e-5)


def test_a_budget_of_all_is_no_eviction():
    out, cache = result(f"adakv({CAPACITY})", "sevens")
    expected, other = result("dense", "sevens")
    np.testing.assert_array_equal(out, expected)
    assert mj.nbytes(cache) == mj.nbytes(other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_slots_of_other_heads_have_no_weight_at_all(dtype):
    """Not even with the largest keys and values: attention is bit for bit that over a head's own slots, in any dtype."""
    rng, heads, slots = np.random.default_rng(0), 3, 30
    q, k, v = (rng.standard_normal(shape) for shape in ((1, heads, 4, DIM), (1, 1, DIM, slots), (1, 1, DIM, slots)))
    owner = rng.integers(0, heads - 1, slots)  # the last head has none
    q[:, 0] *= 8
    k[..., owner == 1] *= 8
    v[..., owner == 1] *= 1e4
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
    pos = jnp.arange(slots, dtype=jnp.int32)
    scale = 0.25

    def attend(q, k_pos, **extra):
        at = jnp.full((1, q.shape[2]), slots)
        return decode(q, dense(k), dense(v), q_pos=at, k_pos=k_pos, scale=scale, implementation="xla", **extra)

    wide, extra, lower = shared_queries(q, jnp.asarray(owner, jnp.int8)[None, None], scale)
    assert extra.dim == heads
    found = attend(wide[..., :DIM], pos[None, None], q_extra=wide[..., DIM:], k_extra=extra)
    out, lse = heads_apart(*found, heads, lower)
    for h in range(heads):
        own = attend(q[:, h : h + 1], jnp.where(owner == h, pos, -1)[None, None])
        np.testing.assert_array_equal(out[:, h], own[0][:, 0])
        np.testing.assert_array_equal(lse[:, h], own[1][:, 0])
    assert np.isneginf(np.asarray(lse[:, -1])).all()


def test_the_floor_comes_first():
    """Ranks are whole numbers; a head's best ones beat everybody, and free slots nobody."""
    rank = jnp.array([[[9.0, 8.0, 7.0, 1.0, 2.0, 3.0, -jnp.inf, -jnp.inf]]])
    owner = jnp.array([[[0, 0, 0, 1, 1, 1, 0, 2]]])
    pos = jnp.arange(8, dtype=jnp.int32)[None, None]
    for floor, best in ((0, [0, 1, 2, 5]), (1, [0, 5, 1, 2]), (2, [0, 1, 5, 4])):
        found = np.asarray(with_floor(rank, pos, owner, floor, 3))[0, 0]
        assert np.argsort(-found)[:4].tolist() == best
        assert set(np.argsort(-found)[-2:].tolist()) == {6, 7}
        assert len(set(found.tolist())) == 8
    equal = with_floor(jnp.zeros_like(rank), pos, owner, 0, 3)
    assert np.argsort(-np.asarray(equal)[0, 0]).tolist() == list(range(8))


def test_rows_of_different_lengths_are_what_they_are_alone():
    policy, begin, outs = mj.policy(ADAKV + "+int8" + WINDOWS), np.zeros(2, int), [[], []]
    cache, lengths = policy.init(SPEC), [[7, 7, 7, 7, 7], [7, 4, 0, 7, 1]]
    for now in zip(*lengths, strict=True):
        piece = [np.stack([x[b, begin[b] : begin[b] + 7] for b in range(BATCH)]) for x in text()]
        out, cache = step(cache, *piece, jnp.asarray(now, jnp.int32))
        for b in range(BATCH):
            outs[b].append(np.asarray(out)[b, : now[b]])
        begin += now
    sizes = [n for n in lengths[1] if n]
    alone = policy.init(dataclasses.replace(SPEC, batch=1))
    expected, _ = run(alone, [x[1:, : sum(sizes)] for x in text()], sizes)
    np.testing.assert_allclose(np.concatenate(outs[1]), expected[0], atol=2e-5)


def test_steps_in_a_loop_that_is_traced_once():
    _, cache = result(ADAKV, "sevens")
    one = tuple(jnp.asarray(x[:, :1]) for x in text())
    expected = cache
    for _ in range(2):
        _, expected = step(expected, *one)
    found = quick_jit(lambda c: jax.lax.scan(lambda c, _: (step.__wrapped__(c, *one)[1], None), c, length=2)[0])(cache)
    np.testing.assert_array_equal(found.history.pos, expected.history.pos)
    np.testing.assert_array_equal(found.history.owner, expected.history.owner)


def test_tokens_that_the_models_window_has_left_go_first():
    spec = dataclasses.replace(SPEC, window=30)
    _, cache = run(mj.policy(ADAKV + WINDOWS).init(spec), text(), CUTS["sevens"])
    assert (np.asarray(cache.history.pos) > TOKENS - 30 - 7).all()


def test_one_head_has_nothing_to_share():
    cache = mj.policy(ADAKV + WINDOWS).init(dataclasses.replace(SPEC, kv_heads=1))
    assert cache.history.owner is None
    assert cache.history.slots == KEPT


BAD = {
    "adakv": (SPEC, "needs a budget in tokens, a fraction"),
    f"adakv({BUDGET},alpha=1.5)": (SPEC, "adakv needs alpha between 0 and 1, got 1.5"),
    "adakv(64)+kivi(2)": (SPEC, "cannot take single ones"),
    "adakv(40)" + WINDOWS: (dataclasses.replace(SPEC, softcap=30.0), "softcap"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_go_is_refused(case):
    spec, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        mj.policy(case).init(spec)


def test_string_forms_are_read_back():
    for form in ("adakv(256)", "adakv(fraction=0.25,alpha=0.5)+int4"):
        policy = mj.policy(form)
        assert mj.policy(str(policy)) == policy
    assert mj.adakv(256, alpha=0.5).evictor == AdaKV(256, alpha=0.5)


def test_a_shared_history_is_replicated_over_heads():
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4])
    placed = mj.shardings(mj.policy(ADAKV + WINDOWS), SPEC, mesh)
    assert tuple(placed.history.k.data.spec) == ("data",)
    assert tuple(placed.tail.k.data.spec) == ("data", "model")
