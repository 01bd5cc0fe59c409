"""Attention over one segment of a cache in plain XLA, reading the codes block by block.

The scores of at most ``block`` slots exist at a time: a longer segment is scanned and its blocks are merged by their
log-sum-exp (FlashAttention, arXiv 2205.14135). Scales multiply scores and probabilities, never the decoded vectors.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax.pallas_kernels.codes import Codes
from memjax.pallas_kernels.flash.reference import visible

BLOCK = 2048  # slots whose scores exist at once

Part = tuple[Array, Array]


def merge(parts: list[Part]) -> Part:
    """The attention over the union of disjoint sets of slots, from each set's output and log-sum-exp. Exact.

    Args:
      parts: pairs of outputs [..., Hv] and log-sum-exps [...]; an empty set has output 0 and log-sum-exp -inf.
    """
    if len(parts) == 1:
        return parts[0]
    peak = functools.reduce(jnp.maximum, [lse for _, lse in parts])
    safe = jnp.where(jnp.isfinite(peak), peak, 0.0)
    weights = [jnp.exp(lse - safe) for _, lse in parts]
    total = sum(weights[1:], weights[0])
    divisor = jnp.where(total > 0, total, 1.0)[..., None]
    weighted = [out * weight[..., None] for (out, _), weight in zip(parts, weights, strict=True)]
    return sum(weighted[1:], weighted[0]) / divisor, safe + jnp.log(total)


def attention_xla(
    q: Float[Array, "B K M H"],
    k: Codes,
    v: Codes | None,
    *,
    q_pos: Int[Array, "B M"],
    k_pos: Int[Array, "B K S"],
    q_extra: Float[Array, "B K M E"] | None = None,
    k_extra: Codes | None = None,
    block: int = BLOCK,
    **options,
) -> Part:
    """Same meaning and arguments as ``attention_reference``, in memory bounded by ``block`` slots."""
    slots = k.data.shape[2]

    def part(start: int | Array, size: int) -> Part:
        def cut(x):
            return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, size, axis=2), x)

        return _one_block(q, cut(k), cut(v), q_pos, cut(k_pos), q_extra, cut(k_extra), **options)

    if slots <= block:
        return _one_block(q, k, v, q_pos, k_pos, q_extra, k_extra, **options)
    whole = slots // block

    def scanned(carry: Part, i: Array):
        return merge([carry, part(i * block, block)]), None

    carry, _ = jax.lax.scan(scanned, part(0, block), jnp.arange(1, whole))
    return merge([carry, part(whole * block, slots - whole * block)]) if slots % block else carry


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Batched over (B, K), accumulated in float32; full precision when the operands are float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _scores(q: Array, k: Codes) -> Array:
    scores = _dot(q, k.levels(q.dtype), (3, 3))
    return scores if k.scale is None else scores * k.scale.astype(jnp.float32)[:, :, None, :]


def _one_block(q, k, v, q_pos, k_pos, q_extra, k_extra, *, scale, softcap=None, window=None, recent=None, sinks=0):
    scores = _scores(q, k)
    if k_extra is not None:
        scores += _scores(q_extra, k_extra)
    scores *= scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    mask = visible(q_pos, k_pos, window=window, recent=recent, sinks=sinks)
    scores = jnp.where(mask, scores, -jnp.inf)
    peak = jnp.max(scores, axis=-1)
    peak = jnp.where(jnp.isfinite(peak) | jnp.isnan(peak), peak, 0.0)
    probs = jnp.exp(scores - peak[..., None])
    total = jnp.sum(probs, axis=-1)
    values = k if v is None else v
    weights = probs if values.scale is None else probs * values.scale.astype(jnp.float32)[:, :, None, :]
    # Empty slots may hold anything, a NaN scale included: their weight is zero, not 0 * NaN.
    weights = jnp.where(mask, weights, 0.0)
    # A probability times a scale is too small for float16.
    dtype = jnp.float32 if q.dtype == jnp.float16 and values.scale is not None else q.dtype
    out = _dot(weights.astype(dtype), values.levels(dtype), (3, 2))
    return out / jnp.where(total > 0, total, 1.0)[..., None], peak + jnp.log(total)
