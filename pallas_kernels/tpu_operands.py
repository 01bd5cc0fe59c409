"""What a TPU attention kernel is given: how a call is cut into a grid, and every input as a block with an index map.

The grid is (batch, head blocks, row blocks, splits, steps); a step reads ``Plan.per_step`` slots. Index maps and the kernel's
body share the scalars ``first, last [B * row blocks], start, count [B]`` and, with a page table, the page of every step.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array

from memjax.pallas_kernels import tpu_tile as tile
from memjax.pallas_kernels.choose import Target, tpu_generation
from memjax.pallas_kernels.codes import Codes, interleave
from memjax.pallas_kernels.slots import Positions, Span

LANES = tile.LANES
INTEGER_MATRIX_UNIT = ("v5e", "v5p", "v6e")  # int8 codes go in as they are; on v4 and 7x they do not
MOST_LIMB_ROWS = 32  # beyond, two limbs a row keep the matrix unit longer than converting the codes does


def why_not(on: Target, arrays: dict) -> str | None:
    """The reason why this kernel cannot serve a case on a TPU; None if it can."""
    k, v = arrays["k"], arrays["v"]
    generation = tpu_generation(on.kind)
    for name, codes in (("keys", k), ("values", v), ("extra keys", arrays.get("k_extra"))):
        if codes is None:
            continue
        if codes.fmt == "dense" and codes.data.dtype not in (jnp.bfloat16, jnp.float32):
            return f"{name} are {codes.data.dtype}; TPU kernels read bfloat16 or float32"
        if generation == "v4" and codes.fmt in ("int2", "e4m3", "e5m2"):
            return f"{name} are {codes.fmt}, a type that TPU v4 lacks"
        if generation == "v4" and not isinstance(codes.grid, str):
            return "TPU v4 has no gather of 8-bit lanes for tables"
        if not isinstance(codes.grid, str) and (max(codes.grid) > 127 or min(codes.grid) < -127):
            return f"a table must hold integers in -127 .. 127, got {codes.grid}"
        refusal = _scale_refusal(codes, name, values=name == "values")
        if refusal:
            return refusal
    if arrays.get("table") is not None and k.slots % LANES:
        return f"pages of {k.slots} slots; a TPU's rows have {LANES} lanes, and pages that do not fill them would be copied"
    if arrays.get("centre_weights") is not None and not isinstance(arrays["k_pos"], Span):
        return "a centring term needs consecutive positions (a Span)"
    return None


def _scale_refusal(codes: Codes, name: str, values: bool) -> str | None:
    for factor in (codes.scale, codes.zero):
        if factor is None or factor.ndim < codes.data.ndim:
            continue
        rows, slots = factor.shape[-2:]
        if slots != codes.slots and (rows != codes.dim or values):
            return f"{name} have scales [{rows}, {slots}] for [{codes.dim}, {codes.slots}] values: tiles over both axes"
    if codes.zero is not None and (codes.scale is None or codes.zero.shape != codes.scale.shape):
        return f"{name} have zero points of another shape than their scales"
    return None


@dataclass(frozen=True)
class Plan:
    """Static sizes of one call.

    Attributes:
      heads: kv heads of a step.
      rows: query rows of a kv head in a step, a multiple of 8.
      row_blocks: how often ``rows`` are taken.
      tile: slots of a block of codes.
      pages: blocks of a step, 1 without a table.
      steps, splits: steps per split of the sequence, and splits.
      slots: slots of a row of the batch.
      paged: blocks are found through a table.
      scores: numbers, rows of all heads times slots, that are worked on together.
    """

    heads: int
    rows: int
    row_blocks: int
    tile: int
    pages: int
    steps: int
    splits: int
    slots: int
    paged: bool
    scores: int = 2**17

    @property
    def per_step(self) -> int:
        """Slots of a step."""
        return self.tile * self.pages

    @property
    def chunk(self) -> int:
        """Slots whose scores are worked on together."""
        lanes = self.scores // (self.heads * self.rows) // LANES * LANES
        return min(self.per_step, max(LANES, lanes))

    def step(self, b, i, s, j, scalars):
        """The step that grid point (b, i, s, j) reads: held at the nearest one that is needed, which costs no copy."""
        first, last = scalars[0][b * self.row_blocks + i], scalars[1][b * self.row_blocks + i]
        return jnp.clip(s * self.steps + j, first, jnp.maximum(last - 1, first))


def cut_slots(k: Codes, table: Array | None, most: int) -> tuple[int, int, int]:
    """(slots of a row, slots of a block, blocks of a step) for steps of at most about ``most`` slots."""
    if table is not None:
        pages = min(max(1, most // k.slots), table.shape[1])
        return k.slots * table.shape[1], k.slots, pages
    size = min(max(most // LANES * LANES, LANES), k.slots)
    if k.slots > size:  # a last tile that is nearly empty costs as much as a full one
        size = -(-k.slots // -(-k.slots // size) // LANES) * LANES
    return k.slots, size, 1


def levels_of(codes: Codes, generation: str, rows: int) -> tile.Levels:
    """How a tile is multiplied: in bfloat16, but for float32 caches and for what a generation does better in int8."""
    if codes.fmt == "dense" and codes.data.dtype == jnp.float32:
        return tile.Levels(codes.fmt, codes.grid, jnp.dtype(jnp.float32))
    integers = codes.fmt in ("int8", "int4", "int2") and codes.grid != "cubic"
    tiled = not codes.per_slot and codes.scale.shape[-1] != codes.slots
    limbs = generation in INTEGER_MATRIX_UNIT and rows <= MOST_LIMB_ROWS and integers and not tiled
    return tile.Levels(codes.fmt, codes.grid, jnp.dtype(jnp.int8 if limbs else jnp.bfloat16))


class Operands:
    """Inputs of a call under the names that the kernel body uses, each with its block."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.arrays: list[Array] = []
        self.specs: list[pl.BlockSpec] = []
        self.names: list[str] = []

    def add(self, name: str, array: Array, block: tuple, index) -> None:
        self.arrays.append(array)
        self.specs.append(pl.BlockSpec(block, index))
        self.names.append(name)

    def add_query(self, name: str, q: Array, codes: Codes, levels: tile.Levels) -> None:
        """Rows [B, K, row blocks, rows, H] in the keys' order of channels, a masked copy per group that has its own scale."""
        rows, groups = interleave(q, codes.fmt), _groups(codes)
        if groups > 1:
            member = interleave(np.arange(codes.dim) // (codes.dim // groups), codes.fmt) == np.arange(groups)[:, None]
            rows = jnp.where(member[:, None], rows[..., None, :, :], 0)
            rows = rows.reshape(*q.shape[:3], groups * self.plan.rows, codes.dim)
        if levels.limbs:
            wide = rows.astype(jnp.float32)
            unit = jnp.maximum(jnp.max(jnp.abs(wide), axis=-1, keepdims=True), 1e-30) / tile.LIMB_RANGE
            side = jnp.concatenate([unit, jnp.sum(wide, axis=-1, keepdims=True)], axis=-1)
            rows = tile.split_limbs(wide, unit)
        else:
            rows = rows.astype(levels.dtype)
            side = jnp.broadcast_to(jnp.sum(rows, axis=-1, keepdims=True, dtype=jnp.float32), (*rows.shape[:-1], 2))
        self.add_rows(f"{name}_query", rows)
        self.add_rows(f"{name}_side", side)

    def add_rows(self, name: str, array: Array) -> None:
        """What each row of each head has, [B, K, row blocks, any, any]."""
        block = (1, self.plan.heads, 1, *array.shape[3:])
        self.add(name, array, block, lambda b, h, i, s, j, *_: (b, h, i, 0, 0))

    def add_per_slot(self, name: str, array: Array) -> None:
        """What each slot has, [B, 1|K, S], of all heads or of each."""
        plan, own = self.plan, array.shape[1] > 1
        block = (1, plan.heads if own else 1, 1, plan.per_step)
        self.add(name, array[:, :, None], block, lambda b, h, i, s, j, *r: (b, h if own else 0, 0, plan.step(b, i, s, j, r)))

    def add_codes(self, name: str, codes: Codes) -> None:
        """Blocks of codes, scales and zero points; with a table one of each per page of a step."""
        heads, size = self.plan.heads, self.plan.tile
        for p in range(self.plan.pages):
            self.add(f"{name}{p}", codes.data, (1, heads, codes.data.shape[-2], size), self._find(p, 1))
            for kind, factor in (("scale", codes.scale), ("zero", codes.zero)):
                if factor is None:
                    continue
                if factor.ndim < codes.data.ndim and heads % 8 and heads < factor.shape[1]:
                    factor = factor[:, :, None]  # blocks of a few heads: heads must not be next to the slots then
                if factor.ndim < codes.data.ndim:
                    self.add(f"{name}{p}_{kind}", factor, (1, heads, size), self._find(p, 0))
                elif factor.shape[-1] == codes.slots:
                    self.add(f"{name}{p}_{kind}", factor, (1, heads, factor.shape[-2], size), self._find(p, 1))
                else:
                    turned = interleave(jnp.swapaxes(factor, -1, -2), codes.fmt).astype(jnp.float32)
                    each = size * factor.shape[-1] // codes.slots
                    self.add(f"{name}{p}_tiled_{kind}", turned, (1, heads, each, codes.dim), self._find(p, 1, swap=True))

    def _find(self, p: int, trailing: int, swap: bool = False):
        """Index map of page ``p`` of a step for a block with ``trailing`` axes before its slots (behind them: swap)."""
        plan = self.plan

        def index(b, h, i, s, j, *r):
            if not plan.paged:
                lead, at = b, plan.step(b, i, s, j, r)
            else:
                lead, at = r[4][(((b * plan.row_blocks + i) * plan.splits + s) * plan.steps + j) * plan.pages + p], 0
            zeros = (0,) * trailing
            return (lead, h, at, *zeros) if swap else (lead, h, *zeros, at)

        return index

    def add_centre(self, weights: Array, inv_freq: np.ndarray, span: Span) -> None:
        """Both sides of the centring term; ``weights`` [B, K, row blocks, rows, 2 J].

        cos and sin of inv_freq (start + i) follow from those of a tile's start, with which the kernel turns the weights,
        and of i, a constant table of features.
        """
        plan, frequency = self.plan, jnp.asarray(inv_freq, jnp.float32)
        tiles = -(-plan.slots // plan.per_step) * plan.pages
        start = span.start[:, None] + plan.tile * jnp.arange(tiles, dtype=jnp.int32)
        angle = start.astype(jnp.float32)[..., None] * frequency
        turns = jnp.stack([jnp.tile(jnp.cos(angle), 2), jnp.tile(jnp.sin(angle), 2)], axis=2)
        a, b = jnp.split(weights, 2, axis=-1)
        self.add_rows("centre", weights)
        self.add_rows("centre_crossed", jnp.concatenate([b, -a], axis=-1))
        block = (1, plan.pages, *turns.shape[2:])
        self.add("turns", turns, block, lambda b, h, i, s, j, *r: (b, plan.step(b, i, s, j, r), 0, 0))
        angles = frequency[:, None] * jnp.arange(plan.tile, dtype=jnp.float32)
        features = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)])
        self.add("features", features, features.shape, lambda b, h, i, s, j, *_: (0, 0))


def _groups(codes: Codes) -> int:
    """Groups of channels with a scale per slot each; 1 for one scale per slot, for none and for scales of slot tiles."""
    if codes.per_slot or codes.scale.shape[-1] != codes.slots:
        return 1
    return codes.scale.shape[-2]


def scalars(
    plan: Plan, q_first: Array, q_last: Array, k_pos: Positions, table: Array | None, pool: int, window, recent, sinks: int
) -> list[Array]:
    """The scalar operands; ``q_first``, ``q_last`` [B, row blocks] are the range of positions of each block's queries."""
    batch, blocks = q_first.shape[0], -(-plan.slots // plan.per_step)
    if isinstance(k_pos, Span):
        start, count = (x.astype(jnp.int32) for x in k_pos)
        end = jnp.clip(q_last - start[:, None] + 1, 0, count[:, None])
        begin = jnp.zeros_like(end)
        distances = [x for x in (window, recent if sinks == 0 else None) if x is not None]
        if distances:
            begin = jnp.clip(q_first - min(distances) + 1 - start[:, None], 0, end)
        last = jnp.minimum(-(-end // plan.per_step), blocks)
        first = jnp.minimum(begin // plan.per_step, jnp.maximum(last - 1, 0))
    else:
        start = count = jnp.zeros((batch,), jnp.int32)
        first, last = jnp.zeros_like(q_first), jnp.full_like(q_first, blocks)
    found = [first.reshape(-1), last.reshape(-1), start, count]
    if table is not None:
        filled = count if isinstance(k_pos, Span) else jnp.full_like(count, plan.slots)
        found.append(_pages_by_step(plan, table, first, last, filled, pool))
    return [x.astype(jnp.int32) for x in found]


def _pages_by_step(plan: Plan, table: Array, first: Array, last: Array, filled: Array, pool: int) -> Array:
    """Page numbers in the order of the grid, int32 [B * row blocks * steps * pages]: a copy costs one look-up.

    Entries of the table behind the last token, which may hold anything, are not used.
    """
    step = jnp.arange(plan.splits * plan.steps)
    step = jnp.clip(step, first[..., None], jnp.maximum(last - 1, first)[..., None])
    page = (step[..., None] * plan.pages + jnp.arange(plan.pages)).reshape(table.shape[0], -1)
    page = jnp.minimum(page, jnp.clip((filled - 1) // plan.tile, 0, table.shape[1] - 1)[:, None])
    return jnp.clip(jnp.take_along_axis(table.astype(jnp.int32), page, axis=1), 0, pool - 1).reshape(-1)
