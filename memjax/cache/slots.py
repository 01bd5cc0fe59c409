"""Reading and writing slots: leaves [B, K, ..., S], the slots on the last axis whatever lies before it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def take[Tree](tree: Tree, slots: Int[Array, "B n"] | Int[Array, "B K n"]) -> Tree:
    """The chosen slots of every row (of every kv head), leaves [B, K, ..., n]."""

    def pick(leaf: Array) -> Array:
        heads = slots.shape[1] if slots.ndim == 3 else 1
        index = slots.reshape(slots.shape[0], heads, *(1,) * (leaf.ndim - 3), slots.shape[-1])
        return jnp.take_along_axis(leaf, index, axis=-1)

    return jax.tree.map(pick, tree)


def take_pages[Tree](tree: Tree, pages: Int[Array, "B n"], page: int) -> Tree:
    """The slots of the chosen pages of every row, leaves [B, K, ..., n * page]; tiles of slots must not cross pages."""

    def pick(leaf: Array, run: int) -> Array:
        paged = leaf.reshape(*leaf.shape[:-1], -1, page // run)
        index = pages.reshape(pages.shape[0], *(1,) * (leaf.ndim - 2), pages.shape[1], 1)
        return jnp.take_along_axis(paged, index, axis=-2).reshape(*leaf.shape[:-1], -1)

    return _by_run(pick, tree)


def beside[Tree](first: Tree, second: Tree) -> Tree:
    """The slots of both, leaves [..., S + T]."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=-1), first, second)


def pad[Tree](tree: Tree, room: int, fill: int = 0) -> Tree:
    """Every leaf with ``room`` more slots that hold ``fill``."""

    def widen(leaf: Array) -> Array:
        widths = [(0, 0)] * (leaf.ndim - 1) + [(0, room)]
        return jnp.pad(leaf, widths, constant_values=leaf.dtype.type(fill))

    return jax.tree.map(widen, tree)


def write_ring[Tree](target: Tree, block: Tree, first: Int[Array, "B"], count: Int[Array, "B"]) -> Tree:
    """``write``, but slot numbers count modulo the slots, and of tokens that would share a slot the newest stays."""
    slots, tokens = _slots(target), _slots(block)
    if tokens > slots:
        skipped = jnp.clip(count - slots, 0, tokens - slots)
        cut = jax.vmap(_cut, in_axes=(0, 0, None))
        block = _by_run(lambda leaf, run: cut(leaf, _runs(skipped, run), slots // run), block)
        first, count = first + skipped, count - skipped
    first %= slots
    target = write(target, block, first, count)
    return target if tokens == 1 else write(target, block, first - slots, count)  # what goes over the end


def write[Tree](target: Tree, block: Tree, first: Int[Array, "B"], count: Int[Array, "B"]) -> Tree:
    """Token t < count[b] of each row of ``block``, leaves [B, K, ..., T], goes to slot first[b] + t of ``target``.

    Leaves may have one entry per run of slots (scales of tiles); then ``first`` and ``count`` are multiples of the run. Slots
    that do not exist take nothing. In place where ``target`` is donated.
    """
    put = _write_one if _slots(block) == 1 else _write_run
    return _by_run(lambda leaf, run, new: put(leaf, new, _runs(first, run), _runs(count, run)), target, block)


def write_at[Tree](target: Tree, token: Tree, slot: Int[Array, "B K"]) -> Tree:
    """One token, leaves [B, K, ..., 1], to a slot of its own for every row and head; slots that do not exist take nothing."""
    rows, heads = (jnp.arange(size) for size in slot.shape)

    def put(leaf: Array, new: Array) -> Array:
        inner = (slice(None),) * (leaf.ndim - 3)
        return leaf.at[(rows[:, None], heads, *inner, slot)].set(new[..., 0], mode="drop")

    return jax.tree.map(put, target, token)


def order_in_ring(entered: Int[Array, "B 1"], slot: Int[Array, "... n"], slots: int) -> Int[Array, "B n"]:
    """Which token, by its number of entry, sits in a slot of a ring that so many have entered; negative: none."""
    last = entered - 1
    return last - (last - slot) % slots


def top_slots(rank: Float[Array, "B K S"], count: int) -> Int[Array, "B K n"]:
    """Indices of the ``count`` highest ranks, ascending; of equal ones the first."""
    return jnp.sort(jax.lax.top_k(rank, count)[1], axis=-1)


def _slots(tree) -> int:
    return max(leaf.shape[-1] for leaf in jax.tree.leaves(tree))


def _by_run[Tree](function, tree: Tree, *others: Tree) -> Tree:
    """``function(leaf, slots per entry, *others)`` of every leaf."""
    slots = _slots(tree)
    return jax.tree.map(lambda leaf, *rest: function(leaf, slots // leaf.shape[-1], *rest), tree, *others)


def _runs(slots: Array, run: int) -> Array:
    return slots if run == 1 else slots // run


def _write_one(leaf: Array, new: Array, first: Array, count: Array) -> Array:
    """A scatter, of which a TPU makes the update of a slice if there is one row."""
    slot = jnp.where((count > 0) & (first >= 0), first, leaf.shape[-1])
    inner = (slice(None),) * (leaf.ndim - 2)
    return leaf.at[(jnp.arange(leaf.shape[0]), *inner, slot)].set(new[..., 0], mode="drop")


@jax.vmap
def _write_run(leaf: Array, new: Array, first: Array, count: Array) -> Array:
    """Rewrites a run of slots: a scatter would go token by token and channel by channel."""
    slots, tokens = leaf.shape[-1], new.shape[-1]
    width = min(slots, tokens)
    start = jnp.clip(first, 0, slots - width)
    token = start - first + jnp.arange(width, dtype=jnp.int32)
    padded = jnp.pad(new, [(0, 0)] * (new.ndim - 1) + [(width, width)])
    fresh, kept = _cut(padded, token[0] + width, width), _cut(leaf, start, width)
    merged = jnp.where((token >= 0) & (token < count), fresh, kept)
    return jax.lax.dynamic_update_slice_in_dim(leaf, merged, start, axis=leaf.ndim - 1)


def _cut[Tree](tree: Tree, at: Array, size: int) -> Tree:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, at, size, axis=leaf.ndim - 1), tree)
