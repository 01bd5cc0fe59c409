"""Root-mean-square norms (arXiv 1910.07467)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def rms(x: Float[Array, "... D"], eps: float) -> Float[Array, "... D"]:
    """``x`` over its root mean square, float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """Normalised in float32, cast back, then scaled, the order of the Llama checkpoints.

    With ``unit_offset`` it multiplies by 1 + weight and casts afterwards, the order of Gemma's.
    """

    def __init__(self, dim: int, eps: float, dtype: DTypeLike, *, unit_offset: bool = False):
        self.scale = nnx.Param((jnp.zeros if unit_offset else jnp.ones)((dim,), dtype))
        self.eps, self.unit_offset = eps, unit_offset

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        normed = rms(x, self.eps)
        if self.unit_offset:
            return (normed * (1.0 + self.scale[...].astype(jnp.float32))).astype(x.dtype)
        return self.scale[...] * normed.astype(x.dtype)
