"""Flash decode on a TPU: the codes of up to eight kv heads stream through on-chip memory in tiles of up to 4 MiB."""

from __future__ import annotations

from jaxtyping import Array

from memjax.pallas_kernels import tpu_tile as tile
from memjax.pallas_kernels.choose import target, tpu_generation
from memjax.pallas_kernels.codes import Codes
from memjax.pallas_kernels.decode.reference import Centre
from memjax.pallas_kernels.merge import merge_stacked, probability_mass
from memjax.pallas_kernels.tpu_attention import attention_tpu
from memjax.pallas_kernels.tpu_operands import Plan, cut_slots, megacore, unit_of, why_not

__all__ = ["decode_tpu", "why_not"]

STEP_BYTES = 4 * 2**20  # codes copied per step, keys and values together, at most; half of it in the 16 MiB of a v4
LONGEST_STEP, SHORTEST_STEP = 4096, 1024  # slots
STEPS = 8  # a row's last step is half empty on average: this many, unless they become too short to be worth their fixed cost
HEADS_PER_STEP = 8


def decode_tpu(
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
    plan = _plan(q, k, v, table, page, splits)

    def blocks(x: Array | None) -> Array | None:
        return None if x is None else tile.pad_rows(x, plan.rows)[:, :, None]

    if centre is not None:
        centre = Centre(blocks(centre.weights), centre.inv_freq)
    at = tile.pad_rows(q_pos[..., None], plan.rows, -1)[:, None, :, 0]
    out, lse, scores = attention_tpu(
        plan,
        blocks(q),
        k,
        v,
        q_pos=at,
        q_extra=blocks(q_extra),
        centre=centre,
        table=table,
        mass=mass or logits,
        name=name,
        **options,
    )
    rows = q.shape[2]
    out, lse = merge_stacked(out[:, :, 0, :, :rows], lse[:, :, 0, :, :rows])
    if scores is None:
        return out, lse, None
    scores = scores[:, :, :rows]
    return out, lse, probability_mass(scores, lse) if mass else scores


def _plan(q: Array, k: Codes, v: Codes | None, table: Array | None, page: int | None, splits: int | None) -> Plan:
    """All rows in one block; a second core takes another row of the batch, or half of the sequence if there is none."""
    batch, kv_heads, rows, _ = q.shape
    heads = HEADS_PER_STEP if kv_heads % HEADS_PER_STEP == 0 else kv_heads
    stored = sum(c.data.shape[-2] * c.data.dtype.itemsize for c in (k, v) if c is not None)
    slots = k.slots if table is None else (page or k.slots) * table.shape[1]
    room = STEP_BYTES // 2 if tpu_generation(target().kind) == "v4" else STEP_BYTES
    most = min(room // (heads * stored), LONGEST_STEP, max(slots // STEPS, SHORTEST_STEP))
    sizes = cut_slots(k, table, page, most, unit_of(k, v))
    if splits is None:
        splits = 2 if megacore() and batch * kv_heads // heads == 1 else 1
    splits = min(splits, sizes["steps"])
    sizes["steps"] = -(-sizes["steps"] // splits)
    return Plan(heads, -(-rows // 8) * 8, 1, splits=splits, chained=not megacore(), **sizes)
