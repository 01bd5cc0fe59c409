"""Pages in host memory, and all that is ever done to them: one is read, or one is rewritten.

A leaf [B, K, S, ...] of slots is kept as [P, B, K, *tile]: P pages of ``page`` slots, a page in one piece and its numbers in
the order of its slots. XLA moves parts of an array between a TPU and its host in whole tiles, and only if the array is laid
out alike in both memories; else it copies all of it to the device and back. Hence the shape: eight rows by 128 numbers are
whole tiles, laid out alike everywhere, whatever the head dimension, while a slot is a part of a tile and 8-bit arrays
[..., S, H] are not laid out alike. Hence also the pinned layout of a page: left free, it spreads to the pool in a loop.
A scatter into host memory does not compile at all.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Int

from memjax._compat import to_device, to_host

LANES, SUBLANES = 128, 8
ROW_BYTES = 512  # of a tile's row of 32-bit words: the least that a TPU moves


def store[Tree](segment: Tree, page: int) -> Tree:
    """The pool that holds the slots of ``segment``, leaves [B, K, S, ...] with S a multiple of ``page``.

    Raises:
      ValueError: this process's default backend cannot move such pages.
    """

    def fold(leaf: Array) -> Array:
        batch, heads, slots = leaf.shape[:3]
        paged = leaf.reshape(batch, heads, slots // page, page, *leaf.shape[3:])
        return jnp.moveaxis(paged, 2, 0).reshape(-1, batch, heads, *_tile(page * math.prod(leaf.shape[3:])))

    pool = jax.tree.map(fold, segment)
    check_page(pool, page, jax.default_backend())
    return to_host(pool)


def check_page[Tree](pool: Tree, page: int, platform: str) -> None:
    """Refuses pages of a size that ``platform`` cannot move.

    Raises:
      ValueError: on a TPU, a leaf (the scales, as a rule) with another number of bytes per page than a multiple of 512.
    """
    if platform != "tpu":
        return
    sizes = [math.prod(leaf.shape[3:]) * leaf.dtype.itemsize for leaf in jax.tree.leaves(pool)]
    needed = max(ROW_BYTES // math.gcd(size // page, ROW_BYTES) for size in sizes)
    if page % needed:
        raise ValueError(
            f"a TPU moves multiples of {ROW_BYTES} bytes between its memories, so the pages of this cache's host tier must "
            f"be a multiple of {needed} tokens, got page={page}"
        )


def load[Tree](pool: Tree, like: Tree, page: int) -> Tree:
    """Inverts ``store``: the slots on the device, all of them. ``like`` has the leaves [B, K, any, ...] to be given."""

    def unfold(leaf: Array, ref: Array) -> Array:
        batch, heads, _, *rest = ref.shape
        paged = to_device(leaf).reshape(-1, batch, heads, page, *rest)
        return jnp.moveaxis(paged, 0, 2).reshape(batch, heads, -1, *rest)

    return jax.tree.map(unfold, pool, like)


def load_page[Tree](pool: Tree, like: Tree, page: int, index: int | Array) -> Tree:
    """The ``page`` slots of one page on the device, leaves [B, K, page, ...]."""

    def cut(leaf: Array, ref: Array) -> Array:
        tiles = _in_order(to_device(jax.lax.dynamic_index_in_dim(leaf, index, axis=0)))
        return tiles.reshape(*ref.shape[:2], page, *ref.shape[3:])

    return jax.tree.map(cut, pool, like)


def write[Tree](pool: Tree, block: Tree, source: Int[Array, "B S"], page: int) -> Tree:
    """Puts tokens of ``block`` into slots; only pages that get one, in any row, are touched.

    Args:
      block: leaves [B, K, T, ...] on the device.
      source: for every slot of the pool the number of the token that it gets, -1: it stays as it is.
    """
    touched = jnp.any(source.reshape(source.shape[0], -1, page) >= 0, axis=(0, 2))
    order = jnp.argsort(~touched, stable=True)

    def rewrite(i: Array, pool: Tree) -> Tree:
        index = order[i]
        token = jax.lax.dynamic_slice_in_dim(source, index * page, page, axis=1)[:, None]
        old = load_page(pool, block, page, index)

        def replace(leaf: Array, kept: Array, new: Array) -> Array:
            at = token.reshape(*token.shape, *(1,) * (new.ndim - 3))
            merged = jnp.where(at >= 0, jnp.take_along_axis(new, jnp.maximum(at, 0), axis=2), kept)
            tiles = to_host(_in_order(merged.reshape(1, *leaf.shape[1:])))
            return jax.lax.dynamic_update_slice_in_dim(leaf, tiles, index, axis=0)

        return jax.tree.map(replace, pool, old, block)

    return jax.lax.fori_loop(0, jnp.sum(touched, dtype=jnp.int32), rewrite, pool)


def _in_order(tiles: Array) -> Array:
    """The same, laid out as the pool is outside of any program."""
    return with_layout_constraint(tiles, Layout(tuple(range(tiles.ndim))))


def _tile(numbers: int) -> tuple[int, ...]:
    if numbers % (SUBLANES * LANES) == 0:
        return numbers // (SUBLANES * LANES), SUBLANES, LANES
    return (numbers // LANES, LANES) if numbers % LANES == 0 else (numbers,)
