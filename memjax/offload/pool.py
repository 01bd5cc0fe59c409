"""Pages in host memory, and all that is ever done to them: one is read, or one is rewritten.

A leaf [B, K, ..., S] of slots is kept as [P, B, K, *tile]: P pages of ``page`` slots, a page in one piece. XLA moves parts of
an array between a TPU and its host in whole tiles, and only if the array is laid out alike in both memories; else it copies
all of it to the device and back. Hence pages lead, and hence the shape of a tile. Rows of 128 slots fill the lanes, and in
groups of eight rows they are laid out alike everywhere, which 8-bit rows in one group are not: channels [C, page] become
[C / 8, 8, page], as they lie, and only what does not come in eights (scales, few channels, short pages) is folded into rows
of 128. Hence also the pinned layout of a page: left free, it spreads to the pool in a loop. A scatter into host memory does
not compile at all.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Int

from memjax._compat import to_device, to_host
from memjax.cache.slots import take

LANES, SUBLANES = 128, 8
ROW_BYTES = 512  # of a tile's row of 32-bit words: the least that a TPU moves


def store[Tree](segment: Tree, page: int) -> Tree:
    """The pool that holds the slots of ``segment``, leaves [B, K, ..., S] with S a multiple of ``page``.

    Raises:
      ValueError: this process's default backend cannot move such pages.
    """

    def fold(leaf: Array) -> Array:
        paged = jnp.moveaxis(leaf.reshape(*leaf.shape[:-1], -1, page), -2, 0)
        return paged.reshape(*paged.shape[:3], *_tile(math.prod(paged.shape[3:-1]), page))

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


def load[Tree](pool: Tree, like: Tree) -> Tree:
    """Inverts ``store``: the slots on the device, all of them. ``like`` has the leaves [B, K, ..., any] to be given."""

    def unfold(leaf: Array, ref: Array) -> Array:
        paged = jnp.moveaxis(_unfold(to_device(leaf), ref), 0, -2)
        return paged.reshape(*paged.shape[:-2], -1)

    return jax.tree.map(unfold, pool, like)


def load_page[Tree](pool: Tree, like: Tree, index: int | Array) -> Tree:
    """The slots of one page on the device, leaves [B, K, ..., page]; ``like`` as for ``load``."""

    def cut(leaf: Array, ref: Array) -> Array:
        return _unfold(_in_order(to_device(jax.lax.dynamic_index_in_dim(leaf, index, axis=0))), ref)[0]

    return jax.tree.map(cut, pool, like)


def write[Tree](pool: Tree, block: Tree, source: Int[Array, "B S"], page: int) -> Tree:
    """Puts tokens of ``block`` into slots; only pages that get one, in any row, are touched.

    Args:
      block: leaves [B, K, ..., T] on the device.
      source: for every slot of the pool the number of the token that it gets, -1: it stays as it is.
    """
    touched = jnp.any(source.reshape(source.shape[0], -1, page) >= 0, axis=(0, 2))
    order = jnp.argsort(~touched, stable=True)

    def rewrite(i: Array, pool: Tree) -> Tree:
        index = order[i]
        token = jax.lax.dynamic_slice_in_dim(source, index * page, page, axis=1)
        old, new = load_page(pool, block, index), take(block, jnp.maximum(token, 0))

        def replace(leaf: Array, kept: Array, new: Array) -> Array:
            fresh = (token >= 0).reshape(token.shape[0], *(1,) * (new.ndim - 2), page)
            tiles = _in_order(jnp.where(fresh, new, kept).reshape(1, *leaf.shape[1:]))
            return jax.lax.dynamic_update_slice_in_dim(leaf, to_host(tiles), index, axis=0)

        return jax.tree.map(replace, pool, old, new)

    return jax.lax.fori_loop(0, jnp.sum(touched, dtype=jnp.int32), rewrite, pool)


def _tile(channels: int, page: int) -> tuple[int, ...]:
    """How [channels, page] numbers are kept."""
    if channels % SUBLANES == 0 and page % LANES == 0:
        rows, lanes = channels, page
    elif channels * page % LANES == 0:
        rows, lanes = channels * page // LANES, LANES
    else:
        return (channels * page,)
    return (rows // SUBLANES, SUBLANES, lanes) if rows % SUBLANES == 0 else (rows, lanes)


def _unfold(pages: Array, like: Array) -> Array:
    return pages.reshape(*pages.shape[:3], *like.shape[2:-1], -1)


def _in_order(tiles: Array) -> Array:
    """The same, laid out as the pool is outside of any program."""
    return with_layout_constraint(tiles, Layout(tuple(range(tiles.ndim))))
