"""Eviction by score: who of the history and of the tokens that leave the tail stays, in a fixed number of slots."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from memjax.cache.slots import beside, take, top_slots, write_at
from memjax.evict import Budgeted
from memjax.evict.evictor import Candidates
from memjax.evict.massfold import Fates, fold
from memjax.pallas_kernels.slots import FREE

if TYPE_CHECKING:
    from memjax.cache.segment import Segment
    from memjax.quantize.codec import Codec


def admit(
    history: Segment,
    new: Segment,
    evictor: Budgeted,
    end: Int[Array, "B"],
    keys,
    alive: Int[Array, "B"],
    values: Codec | None = None,
    expected=None,
) -> Segment:
    """The history after coded tokens, leaves [B, K, ..., T], have competed with it for its slots.

    Args:
      new: with positions (negative: no token) and scores.
      end: tokens of the text so far.
      keys: gives the keys of the history and of the new tokens, [B, K, H, S + T].
      alive: the first position that the model's own window still sees; tokens before it go first.
      values: the codec of the values, with which tokens that go are folded into others; None: they are not.
      expected: gives the expected logits of all of them, see ``Candidates``.
    """
    everyone = beside(history, new)
    pos, living = everyone.pos, everyone.pos >= alive[:, None, None]
    tokens = Candidates(everyone.score, pos, end, keys, expected)
    rank = ordered(evictor.rank(tokens), pos, living)
    if new.slots == 1:
        lowest = rank == jnp.min(rank, axis=-1, keepdims=True)
        goes = jnp.argmax(jnp.where(lowest, pos, FREE - 1), axis=-1)  # of equal ones the newest
        kept = write_at(history, new, goes)
    else:
        kept = take(everyone, top_slots(rank, history.slots))
    if values is None:
        return kept
    fates = _one_fate(goes, history.slots) if new.slots == 1 else _fates(rank, history.slots)
    return fold(kept, everyone, fates, keys(), evictor.mass(tokens), (pos >= 0) & living, values)


def _one_fate(goes: Int[Array, "B K"], slots: int) -> Fates:
    """One token that comes, number ``slots``, in the place of another, or that goes itself."""
    slot = jnp.arange(slots, dtype=jnp.int32)
    goes = goes[..., None].astype(jnp.int32)
    return Fates(jnp.where(slot == goes, slots, slot), goes)


def _fates(rank: Float[Array, "B K S"], slots: int) -> Fates:
    order = jax.lax.top_k(rank, rank.shape[-1])[1]
    return Fates(jnp.sort(order[..., :slots], axis=-1), order[..., slots:])


def ordered(
    rank: Float[Array, "B K S"], pos: Int[Array, "B K S"], alive: Bool[Array, "B K S"]
) -> Float[Array, "B K S"]:
    """Ranks among which no token, whatever its score, ties with a free slot, nor one that lives with one that does not."""
    lowest = jnp.finfo(jnp.float32).min
    rank = jnp.where(alive, jnp.maximum(jnp.nan_to_num(rank, nan=lowest), lowest / 2), lowest)
    return jnp.where(pos >= 0, rank, -jnp.inf)
