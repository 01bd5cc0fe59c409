"""Slots of a cache: what is written goes where it is told and nowhere else, whatever the leaves hold."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.cache.slots import pad, take, write, write_ring

BATCH, HEADS = 3, 2


def leaves(slots: int, seed: int) -> dict:
    draw = np.random.default_rng(seed).integers
    lead = (BATCH, HEADS)
    return {
        "codes": jnp.asarray(draw(0, 256, (*lead, 5, slots)), jnp.uint8),
        "scale": jnp.asarray(draw(-99, 99, (*lead, slots)), jnp.bfloat16),
        "pos": jnp.asarray(draw(0, 999, (*lead, slots)), jnp.int32),
    }


def written(target: dict, block: dict, first, count, ring: bool) -> dict:
    """Token by token."""
    after = {name: np.array(leaf) for name, leaf in target.items()}
    for name, leaf in after.items():
        slots = leaf.shape[-1]
        for row in range(BATCH):
            for token in range(count[row]):
                slot = (first[row] + token) % slots if ring else first[row] + token
                if 0 <= slot < slots:
                    leaf[row, ..., slot] = np.asarray(block[name])[row, ..., token]
    return after


@pytest.mark.parametrize("count", ["none", "some", "all"])
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize(("slots", "tokens"), [(9, 1), (1, 1), (9, 4), (9, 9), (4, 11), (1, 3)])
def test_tokens_go_to_their_slots(slots, tokens, ring, count):
    """In the middle, over the end, behind it; in a ring after many turns, and more tokens than slots."""
    target, block = leaves(slots, 0), leaves(tokens, 1)
    count = {"none": [0, 0, 0], "some": [tokens // 2, tokens, 0], "all": [tokens] * 3}[count]
    step = jax.jit(write_ring if ring else write)
    firsts = [[0, 2, slots - 1], [slots - 2, slots, slots + 5], [7 * slots + 3, 100, 12]]
    for first in firsts if ring else [*firsts, [-1, -tokens, 1 - slots]]:
        found = step(target, block, jnp.array(first), jnp.array(count))
        chex.assert_trees_all_equal(found, written(target, block, first, count, ring))


@pytest.mark.parametrize("heads", [None, 1, HEADS])
def test_slots_are_taken_by_row_and_head(heads):
    target = leaves(7, 0)
    shape = (BATCH, 4) if heads is None else (BATCH, heads, 4)
    index = np.random.default_rng(2).integers(0, 7, shape)
    found = take(target, jnp.asarray(index))
    index = np.broadcast_to(index.reshape(BATCH, -1, 4), (BATCH, HEADS, 4))
    for row, head in np.ndindex(BATCH, HEADS):
        for name, leaf in target.items():
            np.testing.assert_array_equal(found[name][row, head], leaf[row, head][..., index[row, head]])


def test_room_is_filled():
    target = leaves(7, 0)
    wide = pad(target, 2, 3)
    chex.assert_trees_all_equal(take(wide, jnp.arange(7)[None].repeat(BATCH, 0)), target)
    assert {float(leaf[..., 7:].astype(jnp.float32).min()) for leaf in wide.values()} == {3.0}
    assert {leaf.shape[-1] for leaf in wide.values()} == {9}
