"""``evict`` with a number of tokens for each head: heads that share slots read what heads with slots of their own would."""

import dataclasses

import numpy as np
import pytest
from cache_helpers import BATCH, HEADS, ROPE, qkv, quick_jit

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


@pytest.mark.parametrize("text", TEXTS)
def test_heads_that_share_slots_read_what_they_would_alone(text):
    """While new tokens come one by one and in a chunk, to rows of different lengths."""
    cache = read(text)
    ours, theirs = evict(cache, SCORES, COUNTS, ROOM), apart(cache, COUNTS)
    assert ours.shared
    assert ours.history.slots == HEADS * (14 + ROOM)
    assert ours.written.tolist() == [14, 6]
    at = 0
    for i, count in enumerate((1, 1, 4)):
        tokens = qkv(i + 1, tokens=count)
        lengths = np.array([count, (count + 1) // 2], np.int32)
        (mine, ours), (wanted, theirs) = step(ours, *tokens, lengths), step(theirs, *tokens, lengths)
        for row, n in enumerate(lengths):
            np.testing.assert_allclose(mine[row, :n], wanted[row, :n], atol=2e-5)
        at += count
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
    empty = evict(cache, SCORES, np.array([[0, 0], [0, 1]]))
    assert empty.written.tolist() == [0, 1]
    assert np.isfinite(step(evict(cache, SCORES, np.array([[0, 0], [0, 1]]), 1), *qkv(1, tokens=1))[0]).all()


def test_the_ledger_counts_every_slot_and_its_owner():
    cache = read("int8+protect(2,3)")
    pair = [mj.nbytes(evict(cache, SCORES, each, ROOM)) for each in (np.array([[9, 11], [12, 8]]), 10)]
    assert pair[0].history - pair[1].history == BATCH * HEADS * (10 + ROOM)
    assert pair[0].history_values == pair[1].history_values


def test_a_row_that_is_given_more_than_its_room_is_lost():
    cache = evict(read("protect(2,3)"), SCORES, COUNTS, 2)
    out, cache = step(cache, *qkv(1, tokens=3))
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1]).all()  # it had kept fewer


BAD = [
    ("protect(2,3)", COUNTS[:1], r"those of batch and kv heads, \[2, 2\], got \[1, 2\]"),
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
