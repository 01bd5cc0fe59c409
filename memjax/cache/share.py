"""One pool of slots for all kv heads of a layer, each slot owned by a head: heads may keep different numbers of tokens.

The heads of a segment [B, K, .., T] are laid side by side, token by token, [B, 1, .., T K], with ``owner`` int8 [B, 1, T K].
``memjax.evict.adakv`` lets the tokens of all heads compete for the slots as they come. After ``memjax.cache.transforms.evict``
with a number for each head, as for ``kvzip``, new tokens are written behind those that stay. Attention over such a pool is
``shared_queries``' matter.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax.cache.admit import ordered
from memjax.cache.slots import beside, take, top_slots, write
from memjax.cache.spec import CacheSpec
from memjax.evict import AdaKV
from memjax.evict.evictor import Candidates
from memjax.pallas_kernels.codes import Codes, dense
from memjax.pallas_kernels.slots import FREE

if TYPE_CHECKING:
    from memjax.cache.layer import LayerCache
    from memjax.cache.segment import Segment
    from memjax.quantize.codec import KeyValueCodec

APART = 2.0**14  # by which logits of other heads' slots are lower: float32 and bfloat16 hold it, exp of it is 0


def admit_shared(
    history: Segment, new: Segment, evictor: AdaKV, end: Int[Array, "B"], alive: Int[Array, "B"]
) -> Segment:
    """The pool after coded tokens of all heads, leaves [B, K, ..., T], have competed with what it holds for its slots.

    Args: as ``memjax.cache.admit.admit``.
    """
    heads, tokens = new.pos.shape[1:]
    new = side_by_side(new)
    both = beside(history, new)
    far = (2**31 - 1) // heads  # so that neighbours of a head's token are its own
    pos = jnp.where(both.pos >= 0, both.pos + far * both.owner.astype(jnp.int32), FREE)
    rank = ordered(evictor.rank(Candidates(both.score, pos, end, None)), both.pos, both.pos >= alive[:, None, None])
    rank = with_floor(rank, both.pos, both.owner.astype(jnp.int32), evictor.floor(history.slots // heads), heads)
    if tokens > 1:
        return take(both, top_slots(rank, history.slots))
    return _replace(history, new, jax.lax.top_k(-rank, new.slots)[1])


def side_by_side(segment: Segment) -> Segment:
    """The heads of a segment as one, with owners."""
    heads, tokens = segment.pos.shape[1:]

    def join(leaf: Array) -> Array:
        leaf = jnp.moveaxis(leaf, 1, -1)
        return leaf.reshape(leaf.shape[0], 1, *leaf.shape[1:-2], -1)

    owner = jnp.tile(jnp.arange(heads, dtype=jnp.int8), tokens)
    joined = jax.tree.map(join, dataclasses.replace(segment, owner=None))
    return dataclasses.replace(joined, owner=jnp.broadcast_to(owner, joined.pos.shape))


def pooled(segment: Segment, slots: int) -> Segment:
    """The tokens of a segment, whose heads have different numbers of them, in the first of ``slots`` slots for all heads."""
    joined = side_by_side(segment)
    return take(joined, jnp.argsort(joined.pos < 0, axis=-1)[..., :slots])


def append(history: Segment, new: Segment, written: Int[Array, "B"], count: Int[Array, "B"]) -> Segment:
    """A pool with new tokens of all heads, leaves [B, K, .., T], ``count`` of each row, behind ``written`` slots per head."""
    heads = new.pos.shape[1]
    return write(history, side_by_side(new), written * heads, count * heads)


def slots_per_head(cache: LayerCache) -> int:
    """Slots of the history on the device for each kv head, on average where heads share them."""
    slots = sum(part.slots for part in (cache.history, cache.rest) if part is not None)
    return slots // cache.spec.kv_heads if cache.shared else slots


def check_shared(spec: CacheSpec, codec: KeyValueCodec, remedy: str) -> None:
    """Raises ValueError if the heads of a layer, more than one, cannot share slots."""
    if spec.kv_heads == 1:
        return
    if codec.two_streams or codec.page > 1:
        raise ValueError(f"heads that share their slots cannot be joined with {codec.name}; {remedy}")
    if spec.softcap is not None or spec.kv_heads > 127:
        raise ValueError(
            f"heads that share their slots are told apart in the logits, without a softcap (this layer's is {spec.softcap}) "
            f"and up to 127 of them (it has {spec.kv_heads}); {remedy}"
        )


def with_floor(
    rank: Float[Array, "B 1 S"], pos: Int[Array, "B 1 S"], owner: Int[Array, "B 1 S"], floor: int, heads: int
) -> Int[Array, "B 1 S"]:
    """Ranks as different whole numbers, of equal ones the oldest first, and each head's ``floor`` best above all others."""
    slots = rank.shape[-1]
    by_rank = jnp.argsort(jnp.lexsort((-pos, rank), axis=-1), axis=-1).astype(jnp.int32)
    order = jnp.lexsort((-by_rank, owner), axis=-1)  # head by head, the best first
    mine = jax.nn.one_hot(owner, heads, dtype=jnp.int32, axis=-2)
    first = jnp.cumsum(jnp.sum(mine, axis=-1), axis=-1) - jnp.sum(mine, axis=-1)
    place = jnp.argsort(order, axis=-1).astype(jnp.int32) - jnp.take_along_axis(first, owner, axis=-1)
    safe = (place < floor) & (rank > -jnp.inf)
    return jnp.where(safe, by_rank + slots, by_rank)


def _replace(history: Segment, new: Segment, out: Int[Array, "B 1 n"]) -> Segment:
    """The pool with new tokens in the place of slots: those numbered ``out``, of pool and new tokens side by side, lose."""
    slots, count = history.slots, new.slots
    lost = jnp.sort(jnp.minimum(out, slots), axis=-1)  # new tokens among the losers come last, as a slot that does not exist
    number = slots + jnp.arange(count, dtype=jnp.int32)
    stays = ~jnp.any(out[..., None] == number, axis=-2)
    won = jnp.argsort(~stays, axis=-1)
    put = jax.vmap(jax.vmap(lambda leaf, at, each: leaf.at[..., at].set(each, mode="drop")))
    return jax.tree.map(lambda leaf, each: put(leaf, lost, each), history, take(new, won))


def shared_queries(
    q: Float[Array, "B K M H"], owner: Int[Array, "B 1 S"], scale: float
) -> tuple[Float[Array, "B 1 KM H+K"], Codes, float]:
    """The rows of all heads with a channel per head, what slots hold in these, and by how much others' logits are lower."""
    batch, heads, rows, _ = q.shape
    others = (jnp.arange(heads)[:, None] != jnp.arange(heads)).astype(q.dtype)
    most = min(APART / scale, 0.9 * float(jnp.finfo(q.dtype).max))
    apart = jnp.broadcast_to((-most * others)[:, None].astype(q.dtype), (batch, heads, rows, heads))
    wide = jnp.concatenate([q, apart], axis=-1).reshape(batch, 1, heads * rows, -1)
    return wide, dense(jax.nn.one_hot(owner, heads, dtype=q.dtype, axis=-2)), most * scale


def heads_apart(out: Array, lse: Array, heads: int, lower: float) -> tuple[Array, Array]:
    """Output and log-sum-exp per head; nothing for rows that only slots of other heads, so much ``lower``, were there for."""
    batch = out.shape[0]
    out, lse = out.reshape(batch, heads, -1, out.shape[-1]), lse.reshape(batch, heads, -1)
    some = lse > -lower / 2
    return jnp.where(some[..., None], out, 0.0), jnp.where(some, lse, -jnp.inf)
