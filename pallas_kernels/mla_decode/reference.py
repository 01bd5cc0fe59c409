"""What absorbed multi-head latent attention means: plain float32, every score materialised."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax.pallas_kernels.codes import Codes
from memjax.pallas_kernels.slots import Positions, positions, visible


def mla_decode_reference(
    q_latent: Float[Array, "B M C"],
    q_rope: Float[Array, "B M E"],
    latent: Codes,
    rope: Codes,
    *,
    q_pos: Int[Array, "B M"],
    k_pos: Positions,
    scale: float,
) -> tuple[Float[Array, "B M C"], Float[Array, "B M"]]:
    """One stream [latent | rope part] [B, 1, C + E, S] is keys; its first C channels are values."""
    precision = jax.lax.Precision.HIGHEST
    stream = jnp.concatenate([latent.decode(), rope.decode()], axis=-2)[:, 0]
    q = jnp.concatenate([q_latent, q_rope], axis=-1).astype(jnp.float32)
    scores = jnp.einsum("bmc,bcs->bms", q, stream, precision=precision) * scale
    mask = visible(q_pos, positions(k_pos, latent.slots))[:, 0]
    scores = jnp.where(mask, scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    probs = jnp.where(mask, jnp.exp(scores - jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None]), 0.0)
    values = jnp.where(mask.any(1)[:, None], stream[:, : q_latent.shape[-1]], 0.0)
    return jnp.einsum("bms,bcs->bmc", probs, values, precision=precision), lse
