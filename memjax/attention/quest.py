"""Reads of the pages whose keys may be near a query, and of no others (``memjax.evict.quest`` has the method).

Each kv head chooses for itself: the heads are folded into the batch of ``decode``, and the page table of a row names the
pages of its head, so kernels read them where they lie. Bytes of a step per kv head, with n pages of P slots chosen out of S
slots: n P slots of codes, and 2 H S / P numbers of the cache's dtype for the bounds.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from memjax.attention.select import attend_chosen, best_pages
from memjax.cache.bounds import KeyBounds
from memjax.pallas_kernels.decode import Centre
from memjax.pallas_kernels.merge import Part
from memjax.pallas_kernels.slots import Positions, positions, visible


def quest_attention(
    attend: Callable[..., Part],
    q: Float[Array, "B K M H"],
    segment,
    k_pos: Positions,
    score: Float[Array, "B K pages"],
    count: int,
    page: int,
    *,
    q_pos: Int[Array, "B T"],
    centre: Centre | None,
) -> Part:
    """Attention over the ``count`` pages with the highest score; pages of score -inf are not read.

    Args:
      attend, segment, k_pos, q_pos, centre: as for ``memjax.attention.select.attend_pages``.
    """
    chosen = best_pages(score, count)
    return attend_chosen(attend, q, segment, k_pos, chosen, page, q_pos=q_pos, centre=centre)


def page_scores(
    bounds: KeyBounds, q: Float[Array, "B K M H"], real: Bool[Array, "B M"], seen: Bool[Array, "B 1 pages"]
) -> Float[Array, "B K pages"]:
    """The largest bound over the real query rows; -inf for pages that are not seen.

    Args:
      q: as the keys of ``bounds``: rotated, in the model's basis.
    """
    bound = jnp.where(real[:, None, :, None], page_bounds(bounds, q), -jnp.inf)
    return jnp.where(seen, jnp.max(bound, axis=2), -jnp.inf)


def page_bounds(bounds: KeyBounds, q: Float[Array, "B K M H"]) -> Float[Array, "B K M pages"]:
    """What no product of a query with a key of the page exceeds: positive channels meet ``high``, negative ones ``low``."""
    q = q.astype(jnp.float32)
    high, low = (x.astype(jnp.float32) for x in (bounds.high, bounds.low))

    def dot(rows: Array, edge: Array) -> Array:
        return jnp.einsum("bkmh,bkhp->bkmp", rows, edge, precision=jax.lax.Precision.HIGHEST)

    return dot(jnp.maximum(q, 0), high) + dot(jnp.minimum(q, 0), low)


def pages_seen(
    k_pos: Positions, slots: int, page: int, q_pos: Int[Array, "B T"], real: Bool[Array, "B T"], window: int | None
) -> Bool[Array, "B 1 pages"]:
    """Pages with a token that some real query sees."""
    seen = visible(q_pos, positions(k_pos, slots), window=window) & real[:, None, :, None]
    seen = jnp.any(seen, axis=2)
    return jnp.any(seen.reshape(*seen.shape[:-1], -1, page), axis=-1)
