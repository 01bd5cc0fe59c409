"""What a TPU attention kernel is given: how a call is cut into a grid, and every input as a block with an index map.

The grid is (batch, head blocks, row blocks, splits, steps); a step reads ``Plan.tile`` slots. Index maps and the kernel's
body share the scalars ``first, last [B * row blocks], start, count [B]`` and, with a page table, the pages of every step and
where the chain of copies goes on (see ``tpu_pages``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array

from memjax.pallas_kernels import tpu_tile as tile
from memjax.pallas_kernels.choose import Target, target, tpu_generation
from memjax.pallas_kernels.codes import PACKED, Codes, interleave
from memjax.pallas_kernels.slots import Positions, Span
from memjax.pallas_kernels.tpu_pages import Leaf, following

LANES = tile.LANES
MEGACORE = ("v4", "v5p")  # two cores run one program
INTEGER_MATRIX_UNIT = ("v5e", "v5p", "v6e")  # int8 codes go in as they are; on v4 and 7x they do not
MOST_LIMB_ROWS = 32  # beyond, two limbs a row keep the matrix unit longer than converting the codes does


def why_not(on: Target, arguments: dict) -> str | None:
    """The reason why this kernel cannot serve a case on a TPU; None if it can."""
    k, v = arguments["k"], arguments["v"]
    generation = tpu_generation(on.kind)
    for name, codes in (("keys", k), ("values", v), ("extra keys", arguments.get("k_extra"))):
        if codes is None:
            continue
        if codes.fmt in ("dense", "sparse") and codes.data.dtype not in (jnp.bfloat16, jnp.float32):
            return f"{name} are {codes.data.dtype}; TPU kernels read bfloat16 or float32"
        if codes.dim == 1:
            return f"{name} have 1 channel; the kernel's tiles have at least 2 rows"
        if generation == "v4" and codes.fmt in ("int2", "e4m3", "e5m2"):
            return f"{name} are {codes.fmt}, a type that TPU v4 lacks"
        if codes.fmt == "int3" and codes.dim % 32:
            return f"{name} are int3 of {codes.dim} channels; the kernel unpacks words of 4 bytes: a multiple of 32"
        if generation == "v4" and not isinstance(codes.grid, str):
            return "TPU v4 has no gather of 8-bit lanes for tables"
        if not isinstance(codes.grid, str) and (max(codes.grid) > 127 or min(codes.grid) < -127):
            return f"a table must hold integers in -127 .. 127, got {codes.grid}"
        refusal = _factor_refusal(codes, name, values=name == "values" or (name == "keys" and v is None))
        if refusal:
            return refusal
    return None if arguments.get("table") is None else _page_refusal(k.slots, arguments.get("page") or k.slots)


def _page_refusal(block: int, page: int) -> str | None:
    if block % LANES:
        return (
            f"a pool of blocks of {block} slots; a TPU's rows have {LANES} lanes, and blocks that do not fill them would be "
            f"copied: store pages of {block} slots several to a block of {LANES} and say page={block}"
        )
    if page % LANES and LANES % page:
        return f"pages of {page} slots; they must divide a row of {LANES} lanes or fill several"
    return None


def _factor_refusal(codes: Codes, name: str, values: bool) -> str | None:
    scale, zero, gain = codes.scale, codes.zero, codes.gain
    for kind, factor in (("scales", scale), ("zero points", zero), ("gains", gain)):
        if _runs(codes, factor) and (factor.shape[-2] != codes.dim or (values and kind != "gains")):
            rows, slots = factor.shape[-2:]
            return f"{name} have {kind} [{rows}, {slots}] for [{codes.dim}, {codes.slots}] values: tiles over both axes"
    if zero is not None and (scale is None or zero.shape != scale.shape):
        return f"{name} have zero points of another shape than their scales"
    if gain is None:
        return None
    if _runs(codes, gain) and scale is None:
        return f"{name} have gains per channel but no scales"
    if run_of(codes) == 1:
        counts = {_rows(codes, factor) for factor in (scale, gain) if factor is not None} - {1}
        return f"{name} have scales and gains of different groups of channels" if len(counts) > 1 else None
    if _runs(codes, scale) and _runs(codes, gain):
        return f"{name} have scales and gains per channel and tile of slots: multiply them"
    if not values and max(_rows(codes, factor) for factor in (scale, gain)) > 1:
        return f"{name} have factors per group of channels beside factors per channel and tile of slots"
    return None


def _runs(codes: Codes, factor: Array | None) -> bool:
    """Whether a factor is given per tile of several slots."""
    return codes.tiled(factor) and factor.shape[-1] != codes.slots


def run_of(codes: Codes | None) -> int:
    """How many slots share the factors of a tile; 1 where every slot has its own."""
    if codes is None:
        return 1
    return max([codes.slots // x.shape[-1] for x in (codes.scale, codes.zero, codes.gain) if _runs(codes, x)], default=1)


def _rows(codes: Codes, factor: Array) -> int:
    """Groups of channels of a factor per slot; 1 for one of tiles of slots."""
    return factor.shape[-2] if codes.tiled(factor) and not _runs(codes, factor) else 1


@dataclass(frozen=True)
class Plan:
    """Static sizes of one call.

    Attributes:
      heads: kv heads of a step.
      rows: query rows of a kv head in a step, a multiple of 8.
      row_blocks: how often ``rows`` are taken.
      tile: slots of a step.
      steps, splits: steps per split of the sequence, and splits.
      slots: slots of a row of the batch.
      pages: of a step, 0 without a table.
      parts: pages of a block of the pool.
      chained: copies of pages go on from one axis of the grid to the next, because one core runs all of it.
      scores: numbers, rows of all heads times slots, that are worked on together.
      unit: slots are cut in multiples of this.
    """

    heads: int
    rows: int
    row_blocks: int
    tile: int
    steps: int
    splits: int
    slots: int
    pages: int = 0
    parts: int = 1
    chained: bool = True
    scores: int = 2**17
    unit: int = LANES

    @property
    def page(self) -> int:
        """Slots of a page, 0 without a table."""
        return self.tile // self.pages if self.pages else 0

    @property
    def chunk(self) -> int:
        """Slots whose scores are worked on together."""
        lanes = self.scores // (self.heads * self.rows) // self.unit * self.unit
        return min(self.tile, max(self.unit, lanes))

    def step(self, b, i, s, j, scalars):
        """The step that grid point (b, i, s, j) reads: held at the nearest one that is needed, which costs no copy."""
        first, last = scalars[0][b * self.row_blocks + i], scalars[1][b * self.row_blocks + i]
        return jnp.clip(s * self.steps + j, first, jnp.maximum(last - 1, first))


def megacore() -> bool:
    """Whether two cores divide the grid's parallel axes."""
    return tpu_generation(target().kind) in MEGACORE


def unit_of(k: Codes, v: Codes | None) -> int:
    """Multiples in which slots can be cut: whole rows of lanes and whole tiles of factors."""
    return math.lcm(LANES, run_of(k), run_of(v))


def cut_slots(k: Codes, table: Array | None, page: int | None, most: int, unit: int) -> dict[str, int]:
    """Sizes of a plan, but for ``splits``, with steps of at most about ``most`` slots."""
    if table is not None:
        page, number = page or k.slots, table.shape[1]
        if page < LANES:  # each is copied with its whole row
            pages = min(max(most // LANES * page // LANES, 1), -(-number * page // LANES)) * (LANES // page)
        else:
            pages = min(max(1, most // page), number)
        sizes = {"tile": page * pages, "steps": -(-number // pages), "slots": page * number, "unit": unit}
        return sizes | {"pages": pages, "parts": k.slots // page}
    size = min(max(most // unit * unit, unit), k.slots)
    if k.slots > size:  # a last tile that is nearly empty costs as much as a full one
        size = -(-k.slots // -(-k.slots // size) // unit) * unit
    return {"tile": size, "steps": -(-k.slots // size), "slots": k.slots, "unit": unit}


def levels_of(codes: Codes, generation: str, rows: int) -> tile.Levels:
    """How a tile is multiplied: in bfloat16, but for float32 caches and for what a generation does better in int8."""
    if codes.fmt in ("dense", "sparse") and codes.data.dtype == jnp.float32:
        return tile.Levels(codes.fmt, codes.grid, jnp.dtype(jnp.float32), entries=codes.entries)
    integers = codes.fmt in ("int8", *PACKED) and codes.grid != "cubic"
    limbs = generation in INTEGER_MATRIX_UNIT and rows <= MOST_LIMB_ROWS and integers and run_of(codes) == 1
    return tile.Levels(codes.fmt, codes.grid, jnp.dtype(jnp.int8 if limbs else jnp.bfloat16), entries=codes.entries)


class Operands:
    """Inputs of a call under the names that the kernel body uses, each with its block."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.arrays: list[Array] = []
        self.specs: list[pl.BlockSpec] = []
        self.names: list[str] = []
        self.leaves: list[Leaf] = []

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
        if array.shape[2] < plan.tile:  # small pages that do not fill a row of lanes
            array = jnp.pad(array, ((0, 0), (0, 0), (0, plan.tile - array.shape[2])))
        block = (1, plan.heads if own else 1, 1, plan.tile)
        self.add(name, array[:, :, None], block, lambda b, h, i, s, j, *r: (b, h if own else 0, 0, plan.step(b, i, s, j, r)))

    def add_codes(self, name: str, codes: Codes) -> None:
        """Codes and their factors, [B, K, ..] in blocks of a step's slots or pools of pages."""
        heads = self.plan.heads
        self._add_slots(name, codes.data)
        for kind, factor in (("scale", codes.scale), ("zero", codes.zero), ("gain", codes.gain)):
            if factor is None:
                continue
            if factor.ndim < codes.data.ndim and heads % 8 and heads < factor.shape[1]:
                factor = factor[:, :, None]  # blocks of a few heads: heads must not be next to the slots then
            if factor.ndim < codes.data.ndim or factor.shape[-1] == codes.slots:
                self._add_slots(f"{name}_{kind}", factor)
            else:
                size = self.plan.page or self.plan.tile
                self._add_runs(f"{name}_tiled_{kind}", _factor_blocks(codes, factor, size))

    def _add_slots(self, name: str, array: Array) -> None:
        """[B or blocks, K, .., S]."""
        plan, zeros = self.plan, (0,) * (array.ndim - 3)
        if plan.pages:
            return self._add_pool(name, array, lanes=True)
        block = (1, plan.heads, *array.shape[2:-1], plan.tile)
        return self.add(name, array, block, lambda b, h, i, s, j, *r: (b, h, *zeros, plan.step(b, i, s, j, r)))

    def _add_runs(self, name: str, array: Array) -> None:
        """[B or blocks, K, steps or pages, runs, H]."""
        plan = self.plan
        if plan.pages:
            return self._add_pool(name, array, lanes=False)
        block = (1, plan.heads, 1, *array.shape[3:])
        return self.add(name, array, block, lambda b, h, i, s, j, *r: (b, h, plan.step(b, i, s, j, r), 0, 0))

    def _add_pool(self, name: str, pool: Array, lanes: bool) -> None:
        heads = self.plan.heads
        pool = pool.reshape(pool.shape[0], -1, heads, *pool.shape[2:])
        self.arrays.append(pool)
        self.specs.append(pl.BlockSpec(memory_space=pl.ANY))
        self.names.append(name)
        tail = (*pool.shape[3:-1], self.plan.page) if lanes else pool.shape[4:]
        self.leaves.append(Leaf(name, heads, tail, pool.dtype, lanes))

    def add_centre(self, weights: Array, inv_freq: np.ndarray, span: Span) -> None:
        """Both sides of the centring term; ``weights`` [B, K, row blocks, rows, 2 J].

        cos and sin of inv_freq (start + i) follow from those of a tile's start, with which the kernel turns the weights,
        and of i, a constant table of features.
        """
        plan, frequency = self.plan, jnp.asarray(inv_freq, jnp.float32)
        tiles = -(-plan.slots // plan.tile)
        start = span.start[:, None] + plan.tile * jnp.arange(tiles, dtype=jnp.int32)
        angle = start.astype(jnp.float32)[..., None] * frequency
        turns = jnp.stack([jnp.tile(jnp.cos(angle), 2), jnp.tile(jnp.sin(angle), 2)], axis=2)
        a, b = jnp.split(weights, 2, axis=-1)
        self.add_rows("centre", weights)
        self.add_rows("centre_crossed", jnp.concatenate([b, -a], axis=-1))
        block = (1, 1, *turns.shape[2:])
        self.add("turns", turns, block, lambda b, h, i, s, j, *r: (b, plan.step(b, i, s, j, r), 0, 0))
        angles = frequency[:, None] * jnp.arange(plan.tile, dtype=jnp.float32)
        high, low = tile.halves(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)]))
        features = jnp.concatenate([high, low, high])
        self.add("features", features, features.shape, lambda b, h, i, s, j, *_: (0, 0))

    def add_scattered_centre(self, weights: Array, inv_freq: np.ndarray) -> None:
        """The centring term where positions are an array: the kernel computes the features from the positions that it reads.

        Angles are integers, a whole turn 2^32: they wrap by themselves, and no position is too large for them. cos and sin
        are one function a quarter of a turn apart.
        """
        pairs, size = len(inv_freq), -(-len(inv_freq) // 8) * 8  # the stacked halves of features fill tiles of 16 sublanes
        weights = weights.reshape(*weights.shape[:-1], 2, pairs)
        weights = jnp.pad(weights, ((0, 0),) * (weights.ndim - 1) + ((0, size - pairs),))
        self.add_rows("centre", weights.reshape(*weights.shape[:-2], 2 * size))
        turns = np.zeros((2, size, 2), np.int64)
        turns[:, :pairs, 0] = np.round(np.float64(inv_freq) / (2 * np.pi) * tile.WHOLE_TURN)
        turns[1, :, 1] = -tile.WHOLE_TURN // 4
        turns = turns.reshape(-1, 2).astype(np.uint32).view(np.int32)
        self.add("turns", jnp.asarray(turns), turns.shape, lambda b, h, i, s, j, *_: (0, 0))


def _factor_blocks(codes: Codes, factor: Array, size: int) -> Array:
    """A factor per channel and run of slots, [.., H, S / run], as float32 [.., blocks of ``size`` slots, runs, H].

    A block of its own for each step, because the runs of a step need not fill the 8 sublanes.
    """
    turned = interleave(jnp.swapaxes(factor, -1, -2), codes.fmt).astype(jnp.float32)
    *lead, runs, dim = turned.shape
    each = size * runs // codes.slots
    turned = tile.pad_rows(turned, -(-runs // each) * each)
    return turned.reshape(*lead, -1, each, dim)


def _groups(codes: Codes) -> int:
    """Groups of channels with factors per slot of their own."""
    return max([_rows(codes, factor) for factor in (codes.scale, codes.gain) if factor is not None], default=1)


def scalars(
    plan: Plan, q_first: Array, q_last: Array, k_pos: Positions, table: Array | None, pool: int, window, recent, sinks: int
) -> list[Array]:
    """The scalar operands; ``q_first``, ``q_last`` [B, row blocks] are the range of positions of each block's queries."""
    batch, blocks = q_first.shape[0], -(-plan.slots // plan.tile)
    if isinstance(k_pos, Span):
        start, count = (x.astype(jnp.int32) for x in k_pos)
        end = jnp.clip(q_last - start[:, None] + 1, 0, count[:, None])
        begin = jnp.zeros_like(end)
        distances = [x for x in (window, recent if sinks == 0 else None) if x is not None]
        if distances:
            begin = jnp.clip(q_first - min(distances) + 1 - start[:, None], 0, end)
        last = jnp.minimum(-(-end // plan.tile), blocks)
        first = jnp.minimum(begin // plan.tile, jnp.maximum(last - 1, 0))
    else:
        start = count = jnp.zeros((batch,), jnp.int32)
        first, last = jnp.zeros_like(q_first), jnp.full_like(q_first, blocks)
    found = [first.reshape(-1), last.reshape(-1), start, count]
    if table is not None:
        filled = count if isinstance(k_pos, Span) else jnp.full_like(count, plan.slots)
        found += [_pages_by_step(plan, table, filled, pool), *following(first, last, plan.steps, plan.splits)]
    return [x.astype(jnp.int32) for x in found]


def _pages_by_step(plan: Plan, table: Array, filled: Array, pool: int) -> Array:
    """Page numbers of the steps of every row and block of rows, int32 [B * row blocks * splits * steps * pages].

    Entries of the table behind the last token, which may hold anything, are not used.
    """
    page = jnp.arange(plan.splits * plan.steps * plan.pages)
    page = jnp.minimum(page, jnp.clip((filled[:, None] - 1) // plan.page, 0, table.shape[1] - 1))
    found = jnp.clip(jnp.take_along_axis(table.astype(jnp.int32), page, axis=1), 0, pool * plan.parts - 1)
    return jnp.repeat(found[:, None], plan.row_blocks, axis=1).reshape(-1)
