"""Flash prefill on a GPU: blocks of query rows of one head against tiles of slots (FlashAttention-2, arXiv 2307.08691)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from memjax.pallas_kernels.codes import Codes
from memjax.pallas_kernels.decode.reference import Centre
from memjax.pallas_kernels.gpu_attention import Plan, attention_gpu, why_not
from memjax.pallas_kernels.slots import Positions

__all__ = ["prefill_gpu", "why_not"]

ROWS, TILE = 64, 64


def prefill_gpu(
    q: Array,
    k: Codes,
    v: Codes | None,
    *,
    q_start: Array,
    k_pos: Positions,
    groups: int,
    q_extra: Array | None = None,
    centre: Centre | None = None,
    table: Array | None = None,
    page: int | None = None,
    **options,
) -> tuple[Array, Array]:
    """Same meaning and arguments as ``prefill_reference``."""
    batch, kv_heads, all_rows, _ = q.shape
    tokens = all_rows // groups
    padded = -(-tokens // ROWS) * ROWS
    # Wide heads and unpacked codes need registers: smaller tiles leave enough of them, on an A100 too.
    tile = TILE if k.dim <= 128 and k.fmt == "dense" else TILE // 2
    plan = Plan(ROWS, tile if table is None else min(tile, page or k.slots), 1, warps=8)

    def pad(x: Array | None) -> Array | None:
        if x is None:
            return None
        x = x.reshape(batch, kv_heads, groups, tokens, -1)
        return jnp.pad(x, ((0, 0),) * 3 + ((0, padded - tokens), (0, 0))).reshape(batch, kv_heads, groups * padded, -1)

    def cut(x: Array) -> Array:
        return x.reshape(batch, kv_heads, groups, padded, -1)[:, :, :, :tokens].reshape(batch, kv_heads, all_rows, -1)

    token = jnp.arange(padded, dtype=jnp.int32)
    q_pos = jnp.tile(jnp.where(token < tokens, q_start[:, None] + token, -1), (1, groups))
    out, lse, _ = attention_gpu(
        plan,
        pad(q),
        k,
        v,
        q_pos=q_pos,
        k_pos=k_pos,
        q_extra=pad(q_extra),
        centre=None if centre is None else Centre(pad(centre.weights), centre.inv_freq),
        table=table,
        page=page,
        name="memjax_prefill",
        **options,
    )
    return cut(out[:, :, 0]), cut(lse[:, :, 0, :, None])[..., 0]
