"""Flash prefill on a TPU: blocks of query rows of all heads that share a kv head, against tiles of slots.

A tile of codes is unpacked once for the rows of a whole group of query heads; tiles in the future of a block of rows, or
behind its window, are neither copied nor worked on (FlashAttention-2, arXiv 2307.08691).
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from memjax.pallas_kernels.codes import Codes
from memjax.pallas_kernels.decode.reference import Centre
from memjax.pallas_kernels.slots import Positions
from memjax.pallas_kernels.tpu_attention import attention_tpu
from memjax.pallas_kernels.tpu_operands import Plan, cut_slots, megacore, unit_of, why_not

__all__ = ["prefill_tpu", "why_not"]

ROWS = 512  # query rows of a block, all groups together
SLOTS = 1024  # of a step
SCORES = 2**19  # numbers worked on together: a step's, so that maxima and sums over lanes are taken once


def prefill_tpu(
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
    rows: int = ROWS,
    slots: int = SLOTS,
    **options,
) -> tuple[Array, Array]:
    """Same meaning and arguments as ``prefill_reference``; ``rows`` and ``slots`` of a step."""
    batch, kv_heads, all_rows, _ = q.shape
    tokens = all_rows // groups
    # Rows of one token block: a multiple of 8 sublanes, no longer than the tokens there are.
    block = min(max(8, rows // groups // 8 * 8), -(-tokens // 8) * 8)
    blocks = -(-tokens // block)
    sizes = cut_slots(k, table, page, slots, unit_of(k, v))
    plan = Plan(1, groups * block, blocks, splits=1, chained=not megacore(), scores=SCORES, **sizes)

    def cut(x: Array | None) -> Array | None:
        if x is None:
            return None
        x = x.reshape(batch, kv_heads, groups, tokens, -1)
        x = jnp.pad(x, ((0, 0),) * 3 + ((0, blocks * block - tokens), (0, 0)))
        x = x.reshape(batch, kv_heads, groups, blocks, block, -1)
        return jnp.moveaxis(x, 3, 2).reshape(batch, kv_heads, blocks, groups * block, -1)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x.reshape(batch, kv_heads, blocks, groups, block, -1), 2, 3)
        return x.reshape(batch, kv_heads, groups, blocks * block, -1)[:, :, :, :tokens].reshape(*q.shape[:3], -1)

    token = jnp.arange(blocks * block, dtype=jnp.int32).reshape(blocks, block)
    q_pos = jnp.where(token < tokens, q_start[:, None, None] + token, -1)
    out, lse, _ = attention_tpu(
        plan,
        cut(q),
        k,
        v,
        q_pos=jnp.tile(q_pos, (1, 1, groups)),
        k_pos=k_pos,
        q_extra=cut(q_extra),
        centre=None if centre is None else Centre(cut(centre.weights), centre.inv_freq),
        table=table,
        name="memjax_prefill",
        **options,
    )
    return join(out[:, :, :, 0]), join(lse[:, :, :, 0, :, None])[..., 0]
