"""Flash decode on a GPU: a program per kv head and part of the sequence, all rows of the head together."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from memjax.pallas_kernels.codes import Codes
from memjax.pallas_kernels.decode.reference import Centre
from memjax.pallas_kernels.gpu_attention import Plan, attention_gpu, why_not
from memjax.pallas_kernels.gpu_tile import form_of
from memjax.pallas_kernels.merge import merge_stacked, probability_mass

__all__ = ["decode_gpu", "why_not"]

PROCESSORS = 132  # of an H100 or H200; a static guess is enough to choose the number of parts
SHORTEST_PART = 512  # slots
TILE = 64


def decode_gpu(
    q: Array,
    k: Codes,
    v: Codes | None,
    *,
    q_pos: Array,
    q_extra: Array | None = None,
    centre: Centre | None = None,
    table: Array | None = None,
    page: int | None = None,
    splits: int | None = None,
    mass: bool = False,
    logits: bool = False,
    name: str = "memjax_decode",
    **options,
) -> tuple[Array, Array, Array | None]:
    """Same meaning and arguments as ``decode_xla``. ``splits``: parts of the sequence that run in parallel."""
    rows = q.shape[2]
    plan = _plan(q, k, v, table, page, splits, centre is not None)

    def pad(x: Array | None) -> Array | None:
        extra = -rows % plan.rows
        return None if x is None else jnp.pad(x, ((0, 0), (0, 0), (0, extra), (0, 0)))

    if centre is not None:
        centre = Centre(pad(centre.weights), centre.inv_freq)
    at = jnp.pad(q_pos, ((0, 0), (0, -rows % plan.rows)), constant_values=-1)
    out, lse, scores = attention_gpu(
        plan,
        pad(q),
        k,
        v,
        q_pos=at,
        q_extra=pad(q_extra),
        centre=centre,
        table=table,
        page=page,
        mass=mass or logits,
        name=name,
        **options,
    )
    out, lse = merge_stacked(out[..., :rows, :], lse[..., :rows])
    if scores is None:
        return out, lse, None
    scores = scores[:, :, :rows]
    return out, lse, probability_mass(scores, lse) if mass else scores


def _plan(
    q: Array, k: Codes, v: Codes | None, table: Array | None, page: int | None, splits: int | None, centred: bool
) -> Plan:
    """Enough parts to keep the processors busy twice over, none of them short; more warps for what takes registers."""
    batch, kv_heads, rows, _ = q.shape
    both = [codes for codes in (k, v) if codes is not None]
    widest = max(codes.dim for codes in both)
    forms = [form_of(codes) for codes in both]
    masked = any(form.padded != form.dim for form in forms)
    tile = TILE // 2 if masked else TILE
    slots = k.slots
    if table is not None:
        size = page or k.slots
        tile, slots = min(tile, size), size * table.shape[1]
    block = 16 if widest > 256 or rows <= 16 else 32
    programs = batch * kv_heads * -(-rows // block)
    if splits is None:
        splits = max(1, min(-(-2 * PROCESSORS // programs), slots // SHORTEST_PART))
    busy = any(form.decoded or form.entries or not isinstance(form.grid, str) for form in forms)
    warps = 8 if widest > 128 or centred or busy else 4
    return Plan(block, tile, min(splits, -(-slots // tile)), warps)
