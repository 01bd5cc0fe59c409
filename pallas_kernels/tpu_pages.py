"""Pages of a step, copied by the kernel itself: one copy per page and array, one wait per array, and no branch between.

Block specifications would do, with one input per page of a step; but what their pipeline issues per copy, about 35 cycles on
a v6e, is more than a page of 256 int4 slots needs of the memory. Here the copies of the following step start in the same
stretch of code that works on this one, so that the compiler fills the gaps of the one with the other.

Steps that are needed form a *chain* in the order of the grid: each starts the copies of the next one, whatever row of the
batch that belongs to. On a chip whose two cores divide the grid a chain ends with the innermost axis.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from memjax.pallas_kernels import tpu_tile as tile

BUFFERS, LANES = 2, tile.LANES


class Leaf(NamedTuple):
    """An array of a pool of blocks, [blocks, head blocks, heads, .., parts * page] or [.., heads, parts, runs, H].

    ``lanes``: which of the two, whether its last axis is slots. ``tail``: what a page has of each head, [.., page] or
    [runs, H]. Pages of a step come to lie side by side along their slots, or else along an axis of their own.
    """

    name: str
    heads: int
    tail: tuple[int, ...]
    dtype: jnp.dtype
    lanes: bool

    @property
    def narrow(self) -> bool:
        """Whether a page does not fill a row of lanes: it comes with its whole row, of which its lanes are taken."""
        return self.lanes and self.tail[-1] < LANES

    def incoming(self, pages: int) -> pltpu.VMEM:
        """Room for the copies of two steps."""
        if self.narrow:
            return pltpu.VMEM((BUFFERS, pages, self.heads, *self.tail[:-1], LANES), self.dtype)
        return pltpu.VMEM((BUFFERS, self.heads, *self._joined(pages)), self.dtype)

    def whole(self, pages: int) -> pltpu.VMEM:
        """Room for a step's narrow pages, joined."""
        return pltpu.VMEM((1, self.heads, *self._joined(pages)), self.dtype)

    def _joined(self, pages: int) -> tuple[int, ...]:
        return (*self.tail[:-1], pages * self.tail[-1]) if self.lanes else (pages, *self.tail)

    def source(self, pool, block: Array, head_block: Array, part: Array):
        """What is copied of a page."""
        page = self.tail[-1]
        heads = pool.at[block, head_block]
        if not self.lanes:
            return heads.at[:, part]
        size = max(page, LANES)
        return heads if pool.shape[-1] == size else _slots(heads, pl.multiple_of(part * page // size * size, LANES), size)

    def destination(self, room, buffer: Array, p: int):
        """Where page ``p`` of a step goes."""
        if self.narrow:
            return room.at[buffer, p]
        if not self.lanes:
            return room.at[buffer, :, p]
        return _slots(room.at[buffer], p * self.tail[-1], self.tail[-1])

    def join(self, incoming, whole, buffer: Array, places: list[Array]) -> None:
        """Moves narrow pages side by side; ``places``: the lane of each page's first slot."""
        page, lane = self.tail[-1], lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
        for h in range(self.heads) if len(self.tail) > 1 else [slice(None)]:
            for at in range(0, len(places) * page, LANES):
                row = None
                for to in range(0, LANES, page):
                    p = (at + to) // page
                    turned = pltpu.roll(tile.to_words(incoming[buffer, p, h]), (to - places[p]) % LANES, 1)
                    row = turned if row is None else jnp.where(lane >= to, turned, row)
                whole[0, h, ..., at : at + LANES] = tile.from_words(row, self.dtype, incoming.shape[-2])


def _slots(ref, start: Array, size: int):
    """A range of the last axis."""
    return ref.at[(*(slice(None),) * (len(ref.shape) - 1), pl.ds(start, size))]


def rooms(leaves: list[Leaf], pages: int) -> list:
    """What a chain needs of on-chip memory: semaphores, which buffer is read next, room for copies and for joined pages."""
    found = [pltpu.SemaphoreType.DMA((BUFFERS,)), pltpu.SMEM((1,), jnp.int32)]
    found += [leaf.incoming(pages) for leaf in leaves]
    return found + [leaf.whole(pages) for leaf in leaves if leaf.narrow]


def following(first: Array, last: Array, steps: int, splits: int) -> tuple[Array, Array]:
    """Where chains go on, for steps ``first .. last`` [B, row blocks] of each block of rows.

    A loop is what one (row of the batch, block of rows, split) reads; steps are numbered by the grid without its axis of
    heads. Returns, as int32, the first step of the next loop that reads anything, in the same row of the batch or else that
    row's first [B * row blocks * splits]; and, all heads done, that of the next row [1 + B], with the first of all before it.
    """
    batch, blocks = first.shape
    never = jnp.int32(2**30)
    begin = jnp.arange(splits, dtype=jnp.int32) * steps
    entry = jnp.maximum(first[..., None], begin)
    empty = entry >= jnp.minimum(last[..., None], begin + steps)
    loop = jnp.arange(batch * blocks * splits, dtype=jnp.int32).reshape(batch, blocks, splits)
    entry = jnp.where(empty, never, loop * steps + entry - begin).reshape(batch, -1)
    own = jnp.min(entry, axis=1)
    later = _next(entry)
    later = jnp.where(later == never, own[:, None], later)
    rows = jnp.concatenate([jnp.min(own, keepdims=True), jnp.where(_next(own) == never, own, _next(own))])
    return tuple(jnp.where(x == never, 0, x).reshape(-1) for x in (later, rows))


def _next(entry: Array) -> Array:
    """The smallest of the entries behind each, along the last axis."""
    behind = jnp.concatenate([entry[..., 1:], jnp.full_like(entry[..., :1], 2**30)], axis=-1)
    return lax.cummin(behind, axis=behind.ndim - 1, reverse=True)


class Chain:
    """The copies of a call, in the kernel's body.

    Args:
      plan: the call's sizes (a ``tpu_operands.Plan``).
      leaves, pools: arrays to copy from, pools by the leaf's name.
      room: what ``rooms`` asked for.
      first, last: the steps that each block of rows reads.
      paging: page numbers of every step, and the two arrays of ``following``.
    """

    def __init__(self, plan, leaves: list[Leaf], pools: dict, room, first, last, paging):
        self.plan, self.leaves = plan, leaves
        self.pools = [pools[leaf.name] for leaf in leaves]
        self.arrived, self.busy, *rest = room
        self.incoming, narrow = rest[: len(leaves)], iter(rest[len(leaves) :])
        self.whole = [next(narrow) if leaf.narrow else None for leaf in leaves]
        self.numbers, self.later, self.rows = paging
        b, self.head_block, i, s, self.j = (pl.program_id(axis) for axis in range(5))
        block = b * plan.row_blocks + i
        self.row, self.loop = b, block * plan.splits + s
        self.entry = jnp.maximum(first[block] - s * plan.steps, 0)  # steps of this loop that are needed
        self.stop = jnp.minimum(last[block] - s * plan.steps, plan.steps)

    def begin(self) -> None:
        """At the beginning of a chain: starts its first copies."""

        @pl.when(self._at(pl.program_id(axis) == 0 for axis in range(5)))
        def chain_begins():
            self.busy[0] = 0
            if self.plan.chained:
                self._start(self.rows[0], 0, 0)
            else:

                @pl.when(self.entry < self.stop)
                def first_step():
                    self._start(self.loop * self.plan.steps + self.entry, self.head_block, 0)

    def advance(self) -> dict:
        """At a needed step: starts the next one's copies, waits for its own and gives them as blocks [1, heads, ..]."""
        plan, now, buffer = self.plan, self.loop * self.plan.steps + self.j, self.busy[0]
        inside = self.j + 1 < self.stop
        if plan.chained:
            # Without a next step at all the last one is copied again, which costs less than a branch in every step.
            step = jnp.where(inside, now + 1, self.later[self.loop])
            head_block = self.head_block + jnp.where(step <= now, 1, 0)
            done = head_block == pl.num_programs(1)
            step = jnp.where(done, self.rows[1 + self.row], step)
            self._start(step, jnp.where(done, 0, head_block), 1 - buffer)
        else:
            pl.when(inside)(lambda: self._start(now + 1, self.head_block, 1 - buffer))
        self._wait(buffer)
        self.busy[0] = 1 - buffer
        return {leaf.name: self._block(leaf, *room, now, buffer) for leaf, *room in self._leaves()}

    def end(self) -> None:
        """At the end of a chain: takes in the copy that nobody needs."""
        if self.plan.chained:
            last = self._at(pl.program_id(axis) == pl.num_programs(axis) - 1 for axis in range(5))
            pl.when(last)(lambda: self._wait(self.busy[0]))

    def _at(self, axes) -> Array:
        """Whether the grid is where a chain begins or ends, of which ``axes`` says so for each axis."""
        return functools.reduce(jnp.logical_and, list(axes) if self.plan.chained else list(axes)[-1:])

    def _leaves(self):
        return zip(self.leaves, self.incoming, self.whole, strict=True)

    def _page(self, step: Array, p: int) -> tuple[Array, Array]:
        """Block and part of page ``p`` of a step."""
        number, parts = self.numbers[step * self.plan.pages + p], self.plan.parts
        return (number, jnp.int32(0)) if parts == 1 else (lax.div(number, parts), lax.rem(number, parts))

    def _start(self, step: Array, head_block: Array, buffer: Array) -> None:
        for p in range(self.plan.pages):
            block, part = self._page(step, p)
            for leaf, pool, room in zip(self.leaves, self.pools, self.incoming, strict=True):
                copied = leaf.source(pool, block, head_block, part), leaf.destination(room, buffer, p)
                pltpu.make_async_copy(*copied, self.arrived.at[buffer]).start()

    def _wait(self, buffer: Array) -> None:
        for room in self.incoming:
            everything = room.at[buffer]
            pltpu.make_async_copy(everything, everything, self.arrived.at[buffer]).wait()

    def _block(self, leaf: Leaf, incoming, whole, step: Array, buffer: Array):
        """A leaf's slots of a step, [1, heads, ..]."""
        if not leaf.narrow:
            return incoming.at[pl.ds(buffer, 1)]
        places = [self._page(step, p)[1] * self.plan.page % LANES for p in range(self.plan.pages)]
        leaf.join(incoming, whole, buffer, places)
        return whole
