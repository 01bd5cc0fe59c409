"""Which token a slot holds, and which queries see it."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

FREE = -1  # position of a slot that holds no token


class Span(NamedTuple):
    """Slots that hold consecutive tokens: slot s of row b the one at position ``start[b] + s``, for s < ``count[b]``.

    Kernels that are given a span instead of an array of positions read no positions and skip what lies behind ``count``.
    """

    start: Int[Array, "B"]
    count: Int[Array, "B"]


Positions = Span | Int[Array, "B 1|K S"]


def positions(k_pos: Positions, slots: int) -> Int[Array, "B 1|K S"]:
    """The positions as an array; free slots are ``FREE``."""
    if not isinstance(k_pos, Span):
        return k_pos
    slot = jnp.arange(slots, dtype=jnp.int32)
    return jnp.where(slot < k_pos.count[:, None], k_pos.start[:, None] + slot, FREE)[:, None]


def visible(
    q_pos: Int[Array, "B M"],
    k_pos: Int[Array, "B K S"],
    *,
    window: int | None = None,
    recent: int | None = None,
    sinks: int = 0,
) -> Bool[Array, "B K M S"]:
    """Which slots a query sees: filled (position >= 0), not in its future, and inside the windows.

    ``window`` is the model's sliding window (distance < window for every key). ``recent`` is an evictor's: keys at a
    distance >= recent are gone, but for the first ``sinks`` positions.
    """
    return seen(q_pos[:, None, :, None], k_pos[:, :, None, :], window=window, recent=recent, sinks=sinks)


def seen(q: Array, k: Array, *, window: int | None, recent: int | None, sinks: int) -> Array:
    """``visible`` for positions that broadcast against each other, as kernels hold them."""
    mask = (k >= 0) & (k <= q)
    if window is not None:
        mask &= q - k < window
    if recent is not None:
        mask &= (q - k < recent) | (k < sinks)
    return mask
