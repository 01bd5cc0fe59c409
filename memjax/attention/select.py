"""Pages of a history: which of them matter to a query, and attention over the chosen ones alone.

A *page* is a run of ``page`` neighbouring slots. A history [B, K, .., S] is a pool of pages as it lies in memory, with page t
of row b under the number b S / page + t, so the page table of the kernels picks any of them and nothing is moved. The number
of pages that are read is static; which ones they are, and how many of them are empty, is data.

Every page is attended to on its own (a row of the batch of ``decode``), which leaves its output and its log-sum-exp: what
it holds of the softmax mass, and a part that ``merge`` takes or leaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from memjax.pallas_kernels.decode import Centre
from memjax.pallas_kernels.merge import Part
from memjax.pallas_kernels.slots import FREE, Positions, Span
from memjax.pallas_kernels.slots import positions as as_array

MOST_SLOTS = 2048  # that XLA decodes at once, per row of the batch; kernels take all


class Chosen(NamedTuple):
    """Pages [.., n] in order of their score, and which of them were wanted at all: the others only fill the static number."""

    pages: Int[Array, "... n"]
    wanted: Bool[Array, "... n"]

    def mask(self, pages: int) -> Bool[Array, "... pages"]:
        """Which of all pages are among the wanted ones."""
        hit = self.pages[..., None] == jnp.arange(pages, dtype=jnp.int32)
        return jnp.any(hit & self.wanted[..., None], axis=-2)


class Pages(NamedTuple):
    """Attention over each page: outputs [B, K, n, M, Hv] and log-sum-exps [B, K, n, M], float32."""

    out: Array
    lse: Array


def page_count(slots: int, page: int, fraction: float) -> int:
    """How many pages ``fraction`` of them is, rounded up.

    Raises:
      ValueError: slots that are not whole pages.

    >>> page_count(1024, 128, 0.3), page_count(1024, 128, 0.0)
    (3, 0)
    """
    if slots % page:
        raise ValueError(f"a history of {slots} slots is not whole pages of {page}; make it a multiple, or take smaller pages")
    return math.ceil(slots // page * fraction - 1e-9)


def best_pages(score: Float[Array, "... pages"], count: int, least: float = -math.inf) -> Chosen:
    """The ``count`` pages with the highest score, of those with a score above ``least``.

    >>> best_pages(jnp.array([0.1, 3.0, 2.0, -1.0]), 3, least=0.5)
    Chosen(pages=Array([1, 2, 0], dtype=int32), wanted=Array([ True,  True, False], dtype=bool))
    """
    found, pages = jax.lax.top_k(score, count)
    return Chosen(pages.astype(jnp.int32), found > least)


def attend_pages(
    attend: Callable[..., tuple[Array, Array]],
    q: Float[Array, "B K M H"],
    segment,
    k_pos: Positions,
    table: Int[Array, "B 1|K n"],
    page: int,
    *,
    q_pos: Int[Array, "B M"],
    centre: Centre | None = None,
    wanted: Bool[Array, "B 1|K n"] | None = None,
    blocks: bool = True,
) -> Pages:
    """Attention of every query row over each page of ``table``, page by page.

    Args:
      attend: ``attend(q, segment, k_pos, q_pos=, centre=, table=, page=)`` to (out, lse), by ``decode``.
      segment: a pytree of leaves [B, K, .., S] or, per tile of slots, [B, K, .., S / run]: keys, values and what is theirs.
      table: pages of each row, the same for all of its kv heads, or each head's own.
      wanted: pages that are not are empty.
      blocks: take at most ``MOST_SLOTS`` slots of a row at once, for an ``attend`` that decodes all of what it is given.

    Returns:
      Parts for ``merge_stacked``. An empty page, or one that a row does not see, has output 0 and log-sum-exp -inf.
    """
    if wanted is None:
        wanted = jnp.ones(table.shape, bool)

    def some(chosen: tuple[Array, Array]) -> Pages:
        return _attend_some(attend, q, segment, k_pos, *chosen, page, q_pos, centre)

    count = table.shape[-1]
    most = max(1, MOST_SLOTS // page) if blocks else count
    if count <= most:
        return some((table, wanted))
    whole, rest = divmod(count, most)

    def split(x: Array) -> Array:
        return jnp.moveaxis(x[..., : whole * most].reshape(*x.shape[:-1], whole, most), -2, 0)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(*x.shape[:2], -1, *x.shape[4:])

    parts = [Pages(*map(join, jax.lax.map(some, (split(table), split(wanted)))))]
    if rest:
        parts.append(some((table[..., whole * most :], wanted[..., whole * most :])))
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=2), *parts)


def _attend_some(attend, q, segment, k_pos, table, wanted, page: int, q_pos, centre) -> Pages:
    """Folds the heads into the batch if each has a table of its own, then makes a row of every page."""
    batch, heads = q.shape[:2]
    folds, count = table.shape[1:]
    pages = max(leaf.shape[-1] for leaf in jax.tree.leaves(segment)) // page

    def fold(x: Array) -> Array:
        return x.reshape(batch * folds, heads // folds, *x.shape[2:])

    def repeat(x: Array) -> Array:
        return jnp.repeat(fold(x), count, axis=0)

    number = pages * jnp.arange(batch * folds, dtype=jnp.int32)[:, None] + table.reshape(-1, count)
    out, lse = attend(
        repeat(q),
        jax.tree.map(fold, segment),
        _positions_of_pages(k_pos, table, wanted, page),
        q_pos=jnp.repeat(q_pos, folds * count, axis=0),
        centre=None if centre is None else Centre(repeat(centre.weights), centre.inv_freq),
        table=number.reshape(-1, 1),
        page=page,
    )

    def unfold(x: Array) -> Array:
        x = x.reshape(batch, folds, count, heads // folds, *x.shape[2:])
        return x.swapaxes(2, 3).reshape(batch, heads, count, *x.shape[4:])

    return Pages(unfold(out), unfold(lse))


def attend_chosen(
    attend: Callable[..., Part],
    q: Float[Array, "B K M H"],
    segment,
    k_pos: Positions,
    chosen: Chosen,
    page: int,
    *,
    q_pos: Int[Array, "B T"],
    centre: Centre | None = None,
) -> Part:
    """Attention over the wanted pages of ``chosen`` [B, K, n], which every kv head has chosen for itself, all in one.

    Args:
      attend, segment, k_pos: as for ``attend_pages``.
    """
    batch, heads = q.shape[:2]
    slots = max(leaf.shape[-1] for leaf in jax.tree.leaves(segment))

    def fold(x: Array) -> Array:
        return x.reshape(batch * heads, 1, *x.shape[2:])

    table = chosen.pages
    paged = as_array(k_pos, slots).reshape(batch, -1, slots // page, page)
    at = jnp.take_along_axis(jnp.broadcast_to(paged, (batch, heads, *paged.shape[2:])), table[..., None], axis=2)
    at = jnp.where(chosen.wanted[..., None], at, FREE)
    number = slots // page * jnp.arange(batch * heads, dtype=jnp.int32)[:, None] + table.reshape(batch * heads, -1)
    out, lse = attend(
        fold(q),
        jax.tree.map(fold, segment),
        at.reshape(batch * heads, 1, -1),
        q_pos=jnp.repeat(q_pos, heads, axis=0),
        centre=None if centre is None else Centre(fold(centre.weights), centre.inv_freq),
        table=number,
        page=page,
    )
    return out.reshape(*q.shape[:3], -1), lse.reshape(q.shape[:3])


def _positions_of_pages(k_pos: Positions, table: Array, wanted: Array, page: int) -> Positions:
    """Positions of the slots of each page: a span of a span, or rows of an array; an unwanted page holds no token."""
    batch, folds, count = table.shape
    if isinstance(k_pos, Span):
        start, filled = (x[:, None, None] for x in k_pos)
        span = Span(start + page * table, jnp.where(wanted, jnp.clip(filled - page * table, 0, page), 0))
        return Span(*(x.reshape(-1) for x in span))
    heads = k_pos.shape[1]
    if folds > 1:
        k_pos, heads = jnp.broadcast_to(k_pos, (batch, folds, k_pos.shape[-1])), 1
    paged = k_pos.reshape(batch * folds, heads, -1, page)
    index = table.reshape(batch * folds, 1, count, 1)
    found = jnp.where(wanted.reshape(index.shape), jnp.take_along_axis(paged, index, axis=2), -1)
    return found.swapaxes(1, 2).reshape(-1, heads, page)
