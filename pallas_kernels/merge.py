"""Attention over a union of sets of slots from the attention over each: exact, by log-sum-exp."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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


def merge_stacked(out: Float[Array, "... splits M H"], lse: Float[Array, "... splits M"]) -> Part:
    """``merge`` for equal sets side by side on an axis, as split kernels leave them."""
    peak = jnp.max(lse, axis=-2, keepdims=True)
    safe = jnp.where(jnp.isfinite(peak), peak, 0.0)
    weight = jnp.exp(lse - safe)
    total = jnp.sum(weight, axis=-2)
    out = jnp.sum(out * weight[..., None], axis=-3) / jnp.where(total > 0, total, 1.0)[..., None]
    return out, safe[..., 0, :] + jnp.log(total)


def probability_mass(
    logits: Float[Array, "B K M S"], lse: Float[Array, "B K M"], weights: Float[Array, "B M"] | None = None
) -> Float[Array, "B K S"]:
    """How much probability the rows of a kv head give to each slot, from masked logits (-inf or very negative).

    ``lse`` may be that of more slots than these; ``weights``: how much each row counts, None: 1.
    """
    probabilities = jnp.exp(logits - jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None])
    if weights is None:
        return jnp.sum(probabilities, axis=2)
    return jnp.einsum("bkms,bm->bks", probabilities, weights, precision=jax.lax.Precision.HIGHEST)


def add_sink(part: Part, logits: Float[Array, "K M"]) -> Part:
    """Adds a learned sink per query row: a logit in the softmax's denominator that carries no value (gpt-oss)."""
    out, lse = part
    total = jnp.logaddexp(lse, logits)
    return out * jnp.exp(lse - total)[..., None], total
