"""Bounds of the keys of each page of a history, kept as tokens come: what ``memjax.evict.quest`` judges pages by.

A step looks again at the pages that its tokens came to, decodes their keys and takes minimum and maximum. For one token that
is one page. It needs no history of what was there before, so it holds where a ring overwrites tokens, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from memjax.cache.encode import decode_keys
from memjax.cache.layout import Layout
from memjax.cache.segment import Segment
from memjax.cache.slots import order_in_ring, take_pages
from memjax.cache.spec import CacheSpec

if TYPE_CHECKING:
    from memjax.cache.layer import LayerCache


class KeyBounds(NamedTuple):
    """Least and largest value of each channel over the keys of each page, [B, K, H, pages]; 0 where a page is empty."""

    low: Array
    high: Array


def empty_bounds(place: Layout, spec: CacheSpec) -> KeyBounds | None:
    """Of a history without tokens; None if its pages are not judged."""
    if not place.chosen:
        return None
    shape = (spec.batch, spec.kv_heads, spec.head_dim, place.slots // place.page)
    return KeyBounds(jnp.zeros(shape, spec.dtype), jnp.zeros(shape, spec.dtype))


def bounds_after(cache: LayerCache, history: Segment, tokens: int, written: Int[Array, "B"]) -> KeyBounds | None:
    """The bounds when at most ``tokens`` tokens have come to ``history``, ``written`` in all since it was empty."""
    if cache.bounds is None:
        return None
    page = cache.layout.page
    pages = history.slots // page
    touched = min((tokens + page - 2) // page + 1, pages)
    at = (cache.written[:, None] // page + jnp.arange(touched, dtype=jnp.int32)) % pages
    put = jax.vmap(lambda leaf, at, new: leaf.at[..., at].set(new))
    return jax.tree.map(lambda leaf, new: put(leaf, at, new), cache.bounds, bounds_of(cache, history, at, written))


def bounds_of(cache: LayerCache, history: Segment, at: Int[Array, "B n"], written: Int[Array, "B"]) -> KeyBounds:
    """Bounds of the pages ``at`` of a history that ``written`` tokens have come to."""
    spec, page = cache.spec, cache.layout.page
    codes, extra = take_pages((history.k, history.extra), at, page)
    slot = (at[..., None] * page + jnp.arange(page, dtype=jnp.int32)).reshape(at.shape[0], -1)
    order = order_in_ring(written[:, None], slot, history.slots)[:, None]
    position = jnp.maximum(order, 0) + cache.layout.sinks
    keys = decode_keys(codes, position, cache.policy.codec, cache.basis, spec)
    if extra is not None:
        keys = jnp.concatenate([keys, extra.decode()], axis=-2)
    return measure_bounds(keys, order >= 0, page, spec.dtype)


def measure_bounds(
    keys: Float[Array, "B K H S"], filled: Bool[Array, "B 1|K S"], page: int, dtype: DTypeLike
) -> KeyBounds:
    """Bounds of every page, rounded outwards where ``dtype`` does not hold them."""
    filled = filled[:, :, None]

    def least(x: Array) -> Array:
        paged = jnp.where(filled, x, jnp.inf).reshape(*x.shape[:-1], -1, page)
        return _round_down(jnp.min(paged, axis=-1), dtype)

    some = jnp.any(filled.reshape(*filled.shape[:-1], -1, page), axis=-1)
    low, high = least(keys), -least(-keys)
    return KeyBounds(jnp.where(some, low, 0), jnp.where(some, high, 0))


def _round_down(x: Float[Array, "..."], dtype: DTypeLike) -> Array:
    """The largest number of ``dtype`` that is not above ``x``."""
    near = x.astype(dtype)
    return jnp.where(near.astype(x.dtype) > x, jnp.nextafter(near, jnp.asarray(-jnp.inf, dtype)), near)
