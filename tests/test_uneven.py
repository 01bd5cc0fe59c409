"""``evict`` with a number of tokens for each head: heads that share slots read what heads with slots of their own would."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import BATCH, HEADS, ROPE, qkv, quick_jit, slow_but

import memjax as mj
from memjax.cache.transforms import evict, quantize
from memjax.pallas_kernels.slots import FREE

DIM, TOKENS, CAPACITY, ROOM = 16, 40, 64, 9
SPEC = mj.CacheSpec(BATCH, HEADS, DIM, CAPACITY, "float32", rope=ROPE)
COUNTS = np.array([[7, 20], [11, 0]])
SCORES = np.random.default_rng(5).standard_normal((BATCH, HEADS, CAPACITY - 5)).astype(np.float32)
TEXTS = ["protect(2,3)", "int8+protect(2,3)", "turboquant(4,4)+protect(2,3)", "nvfp4+protect(2,3)"]


@quick_jit
def step(cache, q, k, v, lengths=None):
    return mj.attend(mj.update(cache, k, v, lengths, queries=q), q)


def read(text: str, spec=SPEC, lengths=(TOKENS, TOKENS - 8)):
    return step(mj.policy(text).init(spec), *qkv(0, tokens=TOKENS), np.array(lengths, np.int32))[1]


def apart(cache, counts):
    """The same tokens in slots of each head's own: those of the head that keeps most, holes in the others'."""
    most = int(counts.max())
    cache = evict(cache, SCORES, most, ROOM)
    pos = np.array(cache.history.pos)
    held = np.array([[[SCORES[b, h, p - 2] if p >= 0 else -np.inf for p in row[:most]] for h, row in enumerate(rows)]
                     for b, rows in enumerate(pos)])  # fmt: skip
    place = (-held).argsort(-1).argsort(-1)
    pos[..., :most] = np.where(place < counts[..., None], pos[..., :most], FREE)
    return dataclasses.replace(cache, history=dataclasses.replace(cache.history, pos=pos))


@pytest.mark.parametrize("text", slow_but(TEXTS[:2], TEXTS))
def test_heads_that_share_slots_read_what_they_would_alone(text):
    """While new tokens come one by one and in a chunk, to rows of different lengths."""
    cache = read(text)
    ours, theirs = evict(cache, SCORES, COUNTS, ROOM), apart(cache, COUNTS)
    assert ours.shared
    assert ours.history.slots == HEADS * (14 + ROOM)
    assert ours.written.tolist() == [14, 6]
    for i, count in enumerate((1, 1, 4)):
        tokens = qkv(i + 1, tokens=count)
        lengths = np.array([count, (count + 1) // 2], np.int32)
        (mine, ours), (wanted, theirs) = step(ours, *tokens, lengths), step(theirs, *tokens, lengths)
        for row, n in enumerate(lengths):
            np.testing.assert_allclose(mine[row, :n], wanted[row, :n], atol=2e-5)
    for row in range(BATCH):
        for head in range(HEADS):
            held = np.asarray(ours.history.pos)[row, 0][np.asarray(ours.history.owner)[row, 0] == head]
            other = np.asarray(theirs.history.pos)[row, head]
            assert sorted(held[held >= 0]) == sorted(other[other >= 0])


@pytest.mark.parametrize("codec", ["", "+int8"])
def test_folding_is_each_heads_own(codec):
    """Each head has the values and biases that it has where all heads keep as many as it."""
    cache = read(f"kvzip(20){codec}+massfold+protect(2,3)")
    shared = evict(cache, SCORES, COUNTS).history
    for row, head in np.argwhere(COUNTS > 0):
        alone, mine = evict(cache, SCORES, int(COUNTS[row, head])).history, np.asarray(shared.owner)[row, 0] == head
        mine &= np.asarray(shared.pos)[row, 0] >= 0
        assert mine.sum() == COUNTS[row, head]
        np.testing.assert_array_equal(shared.pos[row, 0][mine], alone.pos[row, head])
        np.testing.assert_allclose(shared.bias[row, 0][mine], alone.bias[row, head], atol=1e-6)
        values = [np.asarray(x.v.data, np.float32) for x in (shared, alone)]
        np.testing.assert_allclose(values[0][row, 0][:, mine], values[1][row, head], atol=1 if codec else 1e-6)  # a code
    assert np.asarray(shared.bias).max() > 0.1


def test_numbers_may_be_equal_and_heads_empty():
    cache = read("protect(2,3)")
    same, alone = evict(cache, SCORES, np.full((BATCH, HEADS), 9), 2), evict(cache, SCORES, 9, 2)
    assert (same.shared, alone.shared) == (True, False)
    tokens = qkv(1, tokens=2)
    np.testing.assert_allclose(step(same, *tokens)[0], step(alone, *tokens)[0], atol=2e-5)
    empty = evict(cache, SCORES, np.array([[3, 0], [0, 1]]), 1)
    assert empty.written.tolist() == [2, 1]
    assert np.isfinite(step(empty, *qkv(1, tokens=1))[0]).all()


def test_the_ledger_counts_every_slot_and_its_owner():
    cache = read("int8+protect(2,3)")
    pair = [mj.nbytes(evict(cache, SCORES, each, ROOM)) for each in (np.array([[9, 11], [12, 8]]), 10)]
    assert pair[0].history - pair[1].history == BATCH * HEADS * (10 + ROOM)
    assert pair[0].history_values == pair[1].history_values


def test_one_head_shares_with_nobody():
    """Rows may keep different numbers; nothing about slots has to be told apart, whatever the codec or the model."""
    spec = dataclasses.replace(SPEC, kv_heads=1, softcap=20.0)
    cache = mj.policy("gear(int4,0,sparse=0.2)+protect(2,3)").init(spec)
    q, k, v = qkv(0, tokens=TOKENS, heads=1)
    small = evict(step(cache, q, k, v)[1], SCORES[:, :1], np.array([[9], [4]]), 2)
    assert not small.shared
    assert small.written.tolist() == [9, 4]
    assert (np.asarray(small.history.pos) >= 0).sum(-1).tolist() == [[9], [4]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_head_without_slots_reads_nothing(dtype):
    """Not even where nothing else is there to read, in the dtype that holds the least."""
    spec = dataclasses.replace(SPEC, head_dim=64, rope=None, dtype=dtype)
    tokens = [jnp.asarray(x, dtype) for x in qkv(0, tokens=TOKENS, dim=64)]
    scores = np.random.default_rng(1).standard_normal((BATCH, HEADS, CAPACITY))
    cache = evict(step(mj.policy("protect(0,0)").init(spec), *tokens)[1], scores, COUNTS)
    at = np.full((BATCH, 1), CAPACITY - 1, np.int32)
    out = quick_jit(lambda cache, q: mj.attend(cache, q, at)[0])(cache, tokens[0][:, -1:])
    assert np.abs(np.asarray(out, np.float32)[1, 0, 2:]).max() == 0.0  # the second head, of two query heads
    assert np.abs(np.asarray(out, np.float32)[1, 0, :2]).min(axis=-1).max() > 0.0


def test_a_row_that_is_given_more_than_its_room_is_lost():
    cache = evict(read("protect(2,3)"), SCORES, COUNTS, 2)
    out, cache = step(cache, *qkv(1, tokens=3))
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1]).all()  # it had kept fewer


BAD = [
    ("protect(2,3)", COUNTS[:1], r"of batch and kv heads, \[2, 2\], got int64 \[1, 2\]"),
    ("protect(2,3)", COUNTS / 2, "got float64"),
    ("protect(2,3)", np.array([[0, 0], [3, 4]]), "at least of one head of each row, and room >= 0, got 0 to 4"),
    ("progressive(page=8)+protect(2,3)", COUNTS, "cannot be joined with progressive; give evict one budget"),
    ("protect(2,3)", COUNTS - 1, "got -1 to 19"),
    ("protect(2,3)", COUNTS * 3, "got 0 to 60"),
    ("gear(int4,0,sparse=0.2)+protect(2,3)", COUNTS, "cannot be joined with gear; give evict one budget"),
]


@pytest.mark.parametrize(("text", "counts", "message"), BAD)
def test_what_does_not_go_is_refused(text, counts, message):
    with pytest.raises(ValueError, match=message):
        evict(mj.policy(text).init(SPEC), SCORES, counts)


def test_what_shared_slots_do_not_take_is_refused():
    soft = dataclasses.replace(SPEC, softcap=20.0)
    with pytest.raises(ValueError, match="without a softcap"):
        evict(mj.policy("protect(2,3)").init(soft), SCORES, COUNTS)
    shared = evict(mj.policy("protect(2,3)").init(SPEC), SCORES, COUNTS)
    with pytest.raises(ValueError, match="evict once"):
        evict(shared, SCORES[..., :14], 3)
    with pytest.raises(ValueError, match="make the cache with the codec"):
        quantize(shared, mj.int8())
    with pytest.raises(ValueError, match="across='heads'"):
        mj.policy("kvzip(9,across=heads)")
    for spec, codec, message in ((soft, "", "softcap"), (SPEC, "+gear(int4,0,sparse=0.2)", "gear")):
        with pytest.raises(ValueError, match=rf"{message}.*say across=head"):
            mj.policy(f"kvzip(20){codec}+protect(2,3)").init(spec)
        mj.policy(f"kvzip(20,across=head){codec}+protect(2,3)").init(spec)
