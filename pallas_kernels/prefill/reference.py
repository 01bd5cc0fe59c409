"""What attention of a chunk of new tokens means: plain float32, every score materialised."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax.pallas_kernels.codes import Codes
from memjax.pallas_kernels.decode.reference import decode_reference
from memjax.pallas_kernels.slots import Positions


def row_positions(q_start: Int[Array, "B"], rows: int, groups: int) -> Int[Array, "B M"]:
    """Positions of query rows ordered by group: row g T + t stands at ``q_start + t``."""
    tokens = rows // groups
    return q_start[:, None] + jnp.tile(jnp.arange(tokens, dtype=jnp.int32), groups)


def prefill_reference(
    q: Float[Array, "B K M H"],
    k: Codes,
    v: Codes | None,
    *,
    q_start: Int[Array, "B"],
    k_pos: Positions,
    groups: int,
    scale: float,
    **options,
) -> tuple[Float[Array, "B K M Hv"], Float[Array, "B K M"]]:
    """``decode_reference`` with the rows of ``prefill``: a query sees what is not in its future."""
    q_pos = row_positions(q_start, q.shape[2], groups)
    return decode_reference(q, k, v, q_pos=q_pos, k_pos=k_pos, scale=scale, **options)[:2]
