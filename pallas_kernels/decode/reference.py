"""What attention over slots of a cache means: plain float32, every score materialised."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from memjax.pallas_kernels.codes import Codes
from memjax.pallas_kernels.slots import Positions, positions, visible


def pages_per_block(k: Codes, page: int | None) -> int:
    """Pages in a block of a pool of codes; None: a block is a page."""
    return 1 if page is None else k.slots // page


class Centre(NamedTuple):
    """The exact part of a score that the constant part of the keys leaves: q . R_t mu for a slot at position t.

        sum_j weights[j] cos(inv_freq[j] t) + weights[j + J] sin(inv_freq[j] t),   j < J

    With q roped and pairs (j, j + J): weights[j] = q_j mu_j + q_{j+J} mu_{j+J}, weights[j + J] = q_{j+J} mu_j - q_j mu_{j+J}.
    ``weights`` is [B, K, M, 2 J] float32, ``inv_freq`` a constant [J].
    """

    weights: Array
    inv_freq: np.ndarray


def centre_scores(centre: Centre, k_pos: Int[Array, "B 1|K S"]) -> Float[Array, "B K M S"]:
    """The term of every slot."""
    angle = k_pos.astype(jnp.float32)[:, :, None, :] * jnp.asarray(centre.inv_freq, jnp.float32)[:, None]
    features = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-2)
    shared = features.shape[1] == 1  # by the heads: broadcast, XLA would compute them for each
    features, heads = (features[:, 0], "") if shared else (features, "k")
    return jnp.einsum(f"bkmf,b{heads}fs->bkms", centre.weights, features, precision=jax.lax.Precision.HIGHEST)


def gather_pages[Tree](pool: Tree, table: Int[Array, "B n"], parts: int = 1) -> Tree:
    """Slots of each row in order, leaves [B, K, ..., n * page], of a pool [blocks, K, ..., parts * page].

    Page n is part n % parts of block n // parts. Numbers that do not exist give some page.
    """

    def gather(leaf: Array) -> Array:
        size = leaf.shape[-1] // parts

        def page(number):
            begin = (number // parts, *(0,) * (leaf.ndim - 2), number % parts * size)
            return jax.lax.dynamic_slice(leaf, begin, (1, *leaf.shape[1:-1], size))[0]

        found = jnp.moveaxis(jax.vmap(jax.vmap(page))(table), 1, -2)  # [B, K, ..., n, page]
        return found.reshape(*found.shape[:-2], -1)

    return jax.tree.map(gather, pool)


def decode_reference(
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
    softcap: float | None = None,
    window: int | None = None,
    recent: int | None = None,
    sinks: int = 0,
    logits: bool = False,
) -> tuple[Float[Array, "B K M Hv"], Float[Array, "B K M"], Float[Array, "B K S"] | Float[Array, "B K M S"]]:
    """Softmax attention of M query rows per kv head over S slots; see ``memjax.pallas_kernels.decode.decode``.

    Returns:
      Output, log-sum-exp, and the probability that the rows of a kv head give to each slot, summed over the rows. A row
      that sees nothing gives zeros and -inf. With ``logits`` instead of the probabilities the masked logits.
    """
    f32 = jnp.float32
    hi = jax.lax.Precision.HIGHEST
    if table is not None:
        k, v, k_extra = gather_pages((k, v, k_extra), table, pages_per_block(k, page))
    keys = k.decode(f32)
    values = keys if v is None else v.decode(f32)
    k_pos = positions(k_pos, k.slots)
    scores = jnp.einsum("bkmh,bkhs->bkms", q.astype(f32), keys, precision=hi)
    if k_extra is not None:
        scores += jnp.einsum("bkme,bkes->bkms", q_extra.astype(f32), k_extra.decode(f32), precision=hi)
    if centre is not None:
        scores += centre_scores(centre, k_pos)
    scores *= scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores += bias.astype(f32)[:, :, None]
    mask = visible(q_pos, k_pos, window=window, recent=recent, sinks=sinks)
    scores = jnp.where(mask, scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    probs = jnp.where(mask, jnp.exp(scores - jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None]), 0.0)
    values = jnp.where(jnp.any(mask, axis=2)[:, :, None], values, 0.0)  # unseen slots may hold anything
    out = jnp.einsum("bkms,bkhs->bkmh", probs, values, precision=hi)
    return out, lse, scores if logits else jnp.sum(probs, axis=2)
