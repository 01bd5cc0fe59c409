"""MassFold: a token that goes leaves its value and its share of attention to the kept token with the most similar key.

    j    = the kept token with the largest cos(k_i, k_j)                                for every token i that goes
    v_j <- (m_j v_j + sum of m_i v_i) / (m_j + sum of m_i)
    b_j <- b_j + log(1 + sum of m_i / m_j)                                              added to the logits of slot j
    score_j <- score_j + sum of score_i

No paper; the rule is that of the MassFold wrapper for kvpress. m is the attention that a slot gets, ``Budgeted.mass``: the
observer's score, which counts the bias that the slot has already, so that folding in several steps is folding at once; for the
same reason the score of the merged slot is the sum. Of two tokens with equal keys and equal m exactly the attention to both
remains. Evictors whose score is no attention count tokens, m = exp(b), which is exact for equal keys, and leave scores alone.

Prompts that are compressed after a second reading (``kvzip``, ``kvcompose``) are folded once, each token counting as one.

Where an evictor ranks by something else than its score, a token that goes may have got more attention than the one that takes
it in; it then counts as much and no more: a large bias would make a slot that mattered to no query loud for every later one.

State: one float32 bias per slot of the history. Every eviction reads all keys of the history out of their codes, as KeyDiff
does. Lossy codecs: values of the two are decoded, merged and encoded again, in the basis of the codes (its centre and balance
are affine, so the mean passes through); slots into which nothing is folded keep their codes bit for bit. Sinks and the recent
tokens have no bias and take nothing in. A token that the model's own window no longer sees is not folded; one that was folded
in time stays as long as the slot that has it.

Chunks of a prompt read a history with a bias by ``decode``, since the ``prefill`` kernel takes none.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from memjax.cache.slots import beside, pad, take, write_at
from memjax.pallas_kernels.slots import FREE

if TYPE_CHECKING:
    from memjax.cache.segment import Segment
    from memjax.quantize.codec import Codec

_LEAST = 1e-30  # attention so small that ratios of it mean nothing
_AT_ONCE = 512  # tokens that are folded together, whose likeness to each other is a square


@dataclass(frozen=True)
class MassFold:
    """Tokens that go are folded into those that stay.

    >>> from memjax.cache.parse import policy
    >>> policy("h2o(256)+massfold").fold
    MassFold()
    """

    name: ClassVar[str] = "massfold"


class Fates(NamedTuple):
    """Of all candidates, those of the history first, the ones that stay, in the order of their slots, and the ones that go."""

    stay: Int[Array, "B K S"]
    go: Int[Array, "B K T"]


def fold(
    kept: Segment,
    everyone: Segment,
    fates: Fates,
    keys: Float[Array, "B K H C"],
    mass: Float[Array, "B K C"] | None,
    real: Bool[Array, "B K C"],
    values: Codec,
) -> Segment:
    """The kept tokens with the values and the attention of those that go.

    Args:
      kept: the candidates that stay, in their slots.
      everyone: all candidates.
      mass: attention that they get; None: as many tokens as they stand for.
      real: whether a candidate is a token that anybody still sees.
      values: the codec of the values.
    """
    unit = keys / jnp.maximum(jnp.linalg.norm(keys, axis=-2, keepdims=True), _LEAST)
    likeness = _einsum("bkhi,bkhj->bkij", take(unit, fates.go), take(unit, fates.stay))
    takers = take(real, fates.stay)
    near = jnp.argmax(jnp.where(takers[:, :, None], likeness, -jnp.inf), axis=-1).astype(jnp.int32)
    weight = jnp.exp(everyone.bias) if mass is None else jnp.maximum(mass, _LEAST)
    mine, theirs = take(take(weight, fates.stay), near), take(weight, fates.go)
    folds = take(real, fates.go) & jnp.any(takers, axis=-1, keepdims=True)
    theirs = jnp.where(folds, theirs if mass is None else jnp.minimum(theirs, mine), 0.0)

    taker, goes = take(kept, near), take(everyone, fates.go)
    # Several may go to one slot: for each of them the same merged token is computed.
    together = near[..., :, None] == near[..., None, :]
    shared = jnp.where(together, theirs[..., None, :], 0.0)
    total = mine + jnp.sum(shared, axis=-1)
    given = _einsum("bkij,bkhj->bkhi", shared, values.decode(goes.v))
    mean = (mine[:, :, None] * values.decode(taker.v) + given) / total[:, :, None]
    score = taker.score
    if mass is not None:
        score += _einsum("bkij,bkj->bki", jnp.where(folds[..., None, :], together, False).astype(jnp.float32), goes.score)
    merged = dataclasses.replace(
        taker, v=values.encode(mean, taker.v.data.dtype), bias=taker.bias + jnp.log(total / mine), score=score
    )
    return _put(kept, merged, jnp.where(folds, near, kept.slots))


def fold_all(
    everyone: Segment, fates: Fates, stays: Bool[Array, "B K C"], keys: Float[Array, "B K H C"], values: Codec
) -> Segment:
    """The candidates that stay, with all that go folded into them, however many: a block after the other.

    Args:
      everyone, keys, values: as for ``fold``.
      fates: where heads keep different numbers, as many as the one that keeps most and the one that lets most go.
      stays: which of them do stay; the others leave free slots.
    """
    kept, slots = take(only(everyone, stays), fates.stay), fates.stay.shape[-1]
    blocks = -(-fates.go.shape[-1] // _AT_ONCE)
    room = blocks * _AT_ONCE - fates.go.shape[-1]
    going = pad((take(everyone, fates.go), take(keys, fates.go)), room)
    there = pad(take(only(everyone, ~stays).pos, fates.go) >= 0, room)
    order = jnp.broadcast_to(jnp.arange(slots + _AT_ONCE, dtype=jnp.int32), (*there.shape[:2], slots + _AT_ONCE))
    own, among = take(keys, fates.stay), Fates(order[..., :slots], order[..., slots:])

    def step(kept: Segment, block: tuple) -> tuple[Segment, None]:
        (tokens, theirs), real = block
        real = jnp.concatenate([kept.pos >= 0, real], axis=-1)
        return fold(kept, beside(kept, tokens), among, beside(own, theirs), None, real, values), None

    split = lambda x: jnp.moveaxis(x.reshape(*x.shape[:-1], blocks, _AT_ONCE), -2, 0)  # noqa: E731
    return jax.lax.scan(step, kept, jax.tree.map(split, (going, there)))[0]


def only(segment: Segment, real: Bool[Array, "B K S"]) -> Segment:
    """With free slots where something is that does not count."""
    return dataclasses.replace(segment, pos=jnp.where(real, segment.pos, FREE))


_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def _put(kept: Segment, merged: Segment, slot: Int[Array, "B K T"]) -> Segment:
    """Tokens at slots of their own; those of one slot are alike, and slots that do not exist take nothing."""
    if merged.slots == 1:
        return write_at(kept, merged, slot[..., 0])
    batch, heads, count = slot.shape
    rows, columns = jnp.arange(batch)[:, None, None], jnp.arange(heads)[:, None]
    source = jnp.broadcast_to(jnp.arange(kept.slots, dtype=jnp.int32), (batch, heads, kept.slots))
    source = source.at[rows, columns, slot].set(kept.slots + jnp.arange(count, dtype=jnp.int32), mode="drop")
    return take(beside(kept, merged), source)
