"""What attention over one segment of a cache means: plain float32, every score materialised."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from memjax.pallas_kernels.codes import Codes


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
    q = q_pos[:, None, :, None]
    k = k_pos[:, :, None, :]
    mask = (k >= 0) & (k <= q)
    if window is not None:
        mask &= q - k < window
    if recent is not None:
        mask &= (q - k < recent) | (k < sinks)
    return mask


def attention_reference(
    q: Float[Array, "B K M H"],
    k: Codes,
    v: Codes | None,
    *,
    q_pos: Int[Array, "B M"],
    k_pos: Int[Array, "B K S"],
    scale: float,
    q_extra: Float[Array, "B K M E"] | None = None,
    k_extra: Codes | None = None,
    softcap: float | None = None,
    window: int | None = None,
    recent: int | None = None,
    sinks: int = 0,
) -> tuple[Float[Array, "B K M Hv"], Float[Array, "B K M"]]:
    """Softmax attention of M query rows per kv head over S slots, and its log-sum-exp.

    ``v`` None: values are the keys (the latent stream of multi-head latent attention). ``q_extra``, ``k_extra``: a second
    part of query and key whose dot product is added to the score. A row that sees nothing gives zeros and -inf.
    """
    f32 = jnp.float32
    hi = jax.lax.Precision.HIGHEST
    keys = k.decode(f32)
    values = keys if v is None else v.decode(f32)
    scores = jnp.einsum("bkmh,bksh->bkms", q.astype(f32), keys, precision=hi)
    if k_extra is not None:
        scores += jnp.einsum("bkme,bkse->bkms", q_extra.astype(f32), k_extra.decode(f32), precision=hi)
    scores *= scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    mask = visible(q_pos, k_pos, window=window, recent=recent, sinks=sinks)
    scores = jnp.where(mask, scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    probs = jnp.where(mask, jnp.exp(scores - jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None]), 0.0)
    return jnp.einsum("bkms,bksh->bkmh", probs, values, precision=hi), lse
