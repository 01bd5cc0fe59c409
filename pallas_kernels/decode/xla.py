"""Attention over slots in plain XLA, reading the codes block by block.

The scores of at most ``block`` slots exist at a time, of fewer where there are many rows: longer caches are scanned and the
blocks are merged by their log-sum-exp (FlashAttention, arXiv 2205.14135). Scales per slot multiply scores and probabilities,
never decoded vectors.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax.pallas_kernels.codes import Codes
from memjax.pallas_kernels.decode.reference import Centre, centre_scores, gather_pages, pages_per_block
from memjax.pallas_kernels.merge import merge, probability_mass
from memjax.pallas_kernels.slots import Positions, positions, visible

BLOCK = 2048  # slots whose scores exist at once, at most
SCORES = 1 << 22  # scores that exist at once, if that leaves LEAST slots
LEAST = 128


def decode_xla(
    q: Float[Array, "B K M H"],
    k: Codes,
    v: Codes | None,
    *,
    q_pos: Int[Array, "B M"],
    k_pos: Positions,
    scale: float,
    q_extra: Float[Array, "B K M E"] | None = None,
    k_extra: Codes | None = None,
    bias: Float[Array, "B 1|K S"] | None = None,
    centre: Centre | None = None,
    table: Int[Array, "B n"] | None = None,
    page: int | None = None,
    block: int | None = None,
    mass: bool = False,
    logits: bool = False,
    **options,
) -> tuple[Float[Array, "B K M Hv"], Float[Array, "B K M"], Float[Array, "B K S"] | Float[Array, "B K M S"] | None]:
    """Same meaning and arguments as ``decode_reference``, in memory bounded by ``block`` slots; None: as many as fit.

    The third result is None, with ``mass`` the probability mass, with ``logits`` the masked logits.
    """
    keep = mass or logits

    def result(out: Array, lse: Array, scores: Array | None):
        return out, lse, probability_mass(scores, lse) if mass else scores

    parts = pages_per_block(k, page)
    slots = k.slots if table is None else k.slots // parts * table.shape[1]
    # A block holds whole pages, whole tiles of scales.
    runs = [slots // leaf.shape[-1] for leaf in jax.tree.leaves((k, v, k_extra))]
    run = k.slots // parts if table is not None else math.lcm(*runs)
    block = _even_block(math.prod(q.shape[:3]), slots) if block is None else block
    block = max(run, block // run * run)
    k_pos = positions(k_pos, slots)

    def part(start: int | Array, size: int):
        def cut(leaf: Array, whole: int = slots) -> Array:
            each = whole // leaf.shape[-1]  # slots per entry, more than one for scales of tiles
            return jax.lax.dynamic_slice_in_dim(leaf, start // each, size // each, axis=-1)

        codes = (k, v, k_extra)
        codes = jax.tree.map(cut, codes) if table is None else gather_pages(codes, cut(table, slots), parts)
        at = cut(k_pos)
        extra = None if bias is None else cut(bias)
        return _one_block(q, *codes, q_pos, at, q_extra, extra, centre, scale=scale, **options)

    if slots <= block:
        out, lse, scores = part(0, slots)
        return result(out, lse, scores if keep else None)
    whole, rest = divmod(slots, block)

    @jax.checkpoint  # a derivative recomputes the scores of a block rather than keep those of all
    def scanned(carry, i: Array):
        out, lse, scores = part(i * block, block)
        return merge([carry, (out, lse)]), scores if keep else None

    rows, width = q.shape[:3], (k if v is None else v).dim
    nothing = jnp.zeros((*rows, width), jnp.float32), jnp.full(rows, -jnp.inf, jnp.float32)
    carry, blocks = jax.lax.scan(scanned, nothing, jnp.arange(whole))
    pieces = [jnp.moveaxis(blocks, 0, -2).reshape(*rows, -1)] if keep else []
    if rest:
        carry, q = jax.lax.optimization_barrier((carry, q))  # else its scores would exist beside those of a whole block
        out, lse, last = part(whole * block, rest)
        carry = merge([carry, (out, lse)])
        pieces.append(last)
    return result(*carry, jnp.concatenate(pieces, axis=-1) if keep else None)


def _even_block(rows: int, slots: int) -> int:
    """Slots per block, so that the last one is not much shorter than the others."""
    most = max(min(BLOCK, SCORES // rows), LEAST)
    even = -(-slots // -(-slots // most))
    return -(-even // LEAST) * LEAST


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Batched over (B, K), accumulated in float32; full precision when the operands are float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _scores(q: Array, k: Codes) -> Array:
    if k.gain is not None and not k.tiled(k.gain):
        return _scores(q, dataclasses.replace(k, gain=None)) * _rows(k.gain)
    if not k.per_slot:
        return _dot(q, k.decode(q.dtype), (3, 2))
    scores = _dot(q, k.levels(q.dtype), (3, 2))
    if k.scale is not None:
        scores = scores * _rows(k.scale)
    if k.zero is not None:
        scores += jnp.sum(q.astype(jnp.float32), axis=-1, keepdims=True) * _rows(k.zero)
    return scores


def _rows(factor: Array) -> Array:
    """A factor per slot, [B, K, S], against scores."""
    return factor.astype(jnp.float32)[:, :, None, :]


def _weighted(probs: Array, values: Codes, mask: Array, dtype) -> Array:
    """Probabilities times values. Free slots may hold anything, a NaN scale included: their weight is 0, not 0 * NaN."""
    if values.gain is not None and not values.tiled(values.gain):
        weights = jnp.where(mask, probs * _rows(values.gain), 0.0)
        return _weighted(weights, dataclasses.replace(values, gain=None), mask, dtype)
    if not values.per_slot:
        decoded = jnp.where(jnp.any(mask, axis=2)[:, :, None], values.decode(), 0.0)
        return _dot(probs.astype(dtype), decoded.astype(dtype), (3, 3))
    weights = probs
    if values.scale is not None:
        weights = jnp.where(mask, probs * _rows(values.scale), 0.0)
    out = _dot(weights.astype(dtype), values.levels(dtype), (3, 3))
    if values.zero is not None:
        out += jnp.sum(jnp.where(mask, probs * _rows(values.zero), 0.0), axis=-1, keepdims=True)
    return out


def _one_block(
    q, k, v, k_extra, q_pos, k_pos, q_extra, bias, centre, *, scale, softcap=None, window=None, recent=None, sinks=0
):
    scores = _scores(q, k)
    if k_extra is not None:
        scores += _scores(q_extra, k_extra)
    if centre is not None:
        scores += centre_scores(centre, k_pos)
    scores *= scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores += bias.astype(jnp.float32)[:, :, None]
    mask = visible(q_pos, k_pos, window=window, recent=recent, sinks=sinks)
    scores = jnp.where(mask, scores, -jnp.inf)
    peak = jnp.max(scores, axis=-1)
    peak = jnp.where(jnp.isfinite(peak) | jnp.isnan(peak), peak, 0.0)
    probs = jnp.exp(scores - peak[..., None])
    total = jnp.sum(probs, axis=-1)
    values = k if v is None else v
    # A probability times a scale is too small for float16.
    dtype = jnp.float32 if q.dtype == jnp.float16 and (values.scale is not None or values.gain is not None) else q.dtype
    out = _weighted(probs, values, mask, dtype)
    return out / jnp.where(total > 0, total, 1.0)[..., None], peak + jnp.log(total), scores
