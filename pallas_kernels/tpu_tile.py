"""What a TPU kernel does with one tile of codes: scores, online softmax, weighted values. Plain arrays in, plain arrays out.

Shapes: M query rows (a multiple of 8), H channels, T slots on the lanes, n groups of channels with a scale each. Levels are
alpha * code + beta, so the matrix unit sees bare codes and the rest is a row or a column:

    scores = sum_g scale_g[t] (alpha q_g . c[t] + beta sum(q_g)) + zero_g[t] sum(q_g)

with q_g the query on the channels of group g and zero elsewhere. Groups are stacked as rows of one product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from memjax.pallas_kernels.codes import CUBIC, PACKED, Entries, Grid, neighbours

MASKED = -1e30  # a score that is as good as -inf and has no NaN among its differences
LANES = 128
VMEM_LIMIT = 56 * 2**20  # bytes of on-chip memory; a 7x has 64 MiB
WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
_FIELDS = {"int4": (jnp.int4, jnp.uint4), "int3": (jnp.int4, jnp.uint4), "int2": (jnp.int2, jnp.uint2)}

Stored = Array | tuple[Array, Array, Array]  # bytes [C, T] of a tile, or int3's thirds of them as words [C / 12, T]


class Levels(NamedTuple):
    """Static facts of a tile of codes.

    ``dtype`` is that of the matrix unit's operands. With int8, for generations that convert integers to bfloat16 slowly,
    the other operand is split into two limbs, x = unit (256 high + low), so that nothing of its 16 bits is lost. ``words``:
    blocks of bytes can be read as words of 32 bits, which the interpreter that looks for races cannot.
    """

    fmt: str
    grid: Grid
    dtype: jnp.dtype
    words: bool = True
    entries: Entries | None = None

    @property
    def limbs(self) -> bool:
        return self.dtype == jnp.int8

    @property
    def line(self) -> tuple[float, float]:
        """(alpha, beta) of the level as a function of what ``load`` gives, which for int3 is twice the code."""
        if self.fmt not in PACKED or self.grid != "uniform":
            return 1.0, 0.0
        return (1.0, 1.0) if self.fmt == "int3" else (2.0, 1.0)

    def read(self, ref, head: int, lanes: slice) -> Stored:
        """What ``load`` takes, from a block [1, heads, C, T].

        int3's thirds, which need not fill tiles of bytes, are read as words: bytes would be laid out anew, number by number.
        """
        if self.fmt != "int3":
            return ref[0, head, :, lanes]
        rows = ref.shape[2] // 12
        thirds = [slice(i * rows, (i + 1) * rows) for i in range(3)]
        if not self.words:
            found = pltpu.bitcast(ref[0, head, :, lanes], jnp.int32)
            return tuple(found[third] for third in thirds)
        return tuple(ref.bitcast(jnp.int32)[0, head, third, lanes] for third in thirds)

    def load(self, stored: Stored) -> Array:
        """A tile as operands [H, T], rows in the order of ``codes.interleave``."""
        if self.entries is not None:
            return self.entries.spread(stored.astype(jnp.float32)).astype(self.dtype)
        if self.fmt not in PACKED:
            return stored.astype(self.dtype)
        signed, unsigned = _FIELDS[self.fmt]
        step = 2 if self.fmt == "int3" else 1
        if self.fmt == "int3":
            stored = _nibbles(stored)
        if not isinstance(self.grid, str):
            table = tuple(level for level in self.grid for _ in range(step))
            return _look_up(pltpu.bitcast(stored, unsigned).astype(jnp.int8), table).astype(self.dtype)
        codes = pltpu.bitcast(stored, signed)
        if self.grid == "uniform":
            return codes.astype(self.dtype)
        a, b = CUBIC[self.fmt]
        a, b = jnp.asarray(a / step, self.dtype), jnp.asarray(b / step**3, self.dtype)
        x = codes.astype(self.dtype) + jnp.asarray(0.5 * step, self.dtype)
        return x * (a + b * (x * x))


def _nibbles(thirds: tuple[Array, Array, Array]) -> Array:
    """int3's rows in thirds, words [H / 32, T], as words [H / 8, T] of nibbles that hold twice the code, in int4's order.

    Channels r and r + H / 2 are neighbours: fields 0 and 2 of a byte of the first two thirds, below fields 1 and 3 of all of
    them; the bits of each eighth of the channels and of the one H / 2 behind it lie 4 apart in the last third.
    """
    field, bit = (jnp.int32(int(x) - 2**32 * (x >= 2**31)) for x in (0xCCCCCCCC, 0x22222222))
    *high, low = thirds
    first = [x << 2 & field for x in high]
    second = [x & field for x in high]
    bits = [x & bit for x in (low << 1, low, low >> 1, low >> 2)]
    return jnp.concatenate([x | y for x, y in zip(first + second, bits, strict=True)], axis=0)


def to_words(x: Array) -> Array:
    """[R, T] in elements of 32 bits, the only ones that lanes move in: four bytes in each where whole tiles allow it."""
    pack = 4 // x.dtype.itemsize
    if x.shape[0] % (8 * pack) == 0:
        return pltpu.bitcast(x, jnp.int32)
    return lax.bitcast_convert_type(x, WORDS[x.dtype.itemsize]).astype(jnp.int32)


def from_words(words: Array, dtype: jnp.dtype, rows: int) -> Array:
    """Inverts ``to_words``: [R, T]."""
    if rows != words.shape[0] or dtype.itemsize == 4:
        return pltpu.bitcast(words, dtype)
    return lax.bitcast_convert_type(words.astype(WORDS[dtype.itemsize]), dtype)


def split_limbs(x: Array, unit: Array) -> Array:
    """x / unit, |x| <= 32512 unit, as int8 high limbs and, below them, low limbs [2 M, .]."""
    whole = jnp.round(x / unit).astype(jnp.int32)
    high = (whole + 128) >> 8
    return jnp.concatenate([high, whole - (high << 8)], axis=-2).astype(jnp.int8)


LIMB_RANGE = 32512.0  # 127 * 256


def _join_limbs(product: Array) -> Array:
    """float32 [M, .] of an int32 product of limbs [2 M, .], in units."""
    rows = product.shape[0] // 2
    return 256.0 * product[:rows].astype(jnp.float32) + product[rows:].astype(jnp.float32)


def _look_up(index: Array, table: tuple[int, ...]) -> Array:
    """The table's entry for codes given as unsigned numbers, int8, by the lanes' gather: 128 lanes hold the table."""
    half = len(table) // 2
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    entries = jnp.zeros_like(lane)
    for i in range(len(table)):
        entries = jnp.where(lane == i, table[(i + half) % len(table)], entries)
    entries = jnp.broadcast_to(entries, (index.shape[0], LANES)).astype(jnp.int8)
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(),
        collapsed_slice_dims=(1,),
        start_index_map=(1,),
        operand_batching_dims=(0,),
        start_indices_batching_dims=(0,),
    )

    def gather(part: Array) -> Array:
        rows = entries[:, : part.shape[1]]
        return lax.gather(rows, part[..., None], numbers, (1, 1), mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS)

    parts = [gather(index[:, at : at + LANES]) for at in range(0, index.shape[1], LANES)]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Product with sums in float32 (int32 for int8); operands of float32 are multiplied in full precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    sums = jnp.int32 if a.dtype == jnp.int8 else jnp.float32
    return lax.dot_general(
        a, b, (((contract[0],), (contract[1],)), ((), ())), precision=precision, preferred_element_type=sums
    )


def halves(x: Array) -> tuple[Array, Array]:
    """float32 as the sum of two bfloat16: of the four terms of a product the three largest give 16 bits."""
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


WHOLE_TURN = 2**32  # of angles in integers, which wrap where angles do
_SINE = (3.14158202092578, -5.1671427468910185, 2.5418985490520125, -0.5546349134004449)


def turned_features(position: Array, turns: Array) -> Array:
    """cos(2 pi (turns[f, 0] t + turns[f, 1]) / 2^32), float32 [F, T], for positions t [1, T].

    cos(pi x) = sin(pi (1/2 - |x|)) for -1 <= x < 1, by an odd polynomial that is 6e-7 off.
    """
    angle = turns[:, :1] * position + turns[:, 1:]
    x = 0.5 - jnp.abs(angle.astype(jnp.float32) * jnp.float32(2 / WHOLE_TURN))
    square = x * x
    found = jnp.float32(_SINE[-1])
    for coefficient in reversed(_SINE[:-1]):
        found = found * square + jnp.float32(coefficient)
    return x * found


class Query(NamedTuple):
    """Query rows, groups stacked: [n M, H], or as limbs int8 [2 n M, H]; ``unit`` and ``total`` (the sum) [n M, 1]."""

    rows: Array
    unit: Array
    total: Array


def slot_scores(q: Query, codes: Stored, levels: Levels, scale: Array | None, zero: Array | None) -> Array:
    """Scores [M, T] for scales and zero points [n, T], or None."""
    alpha, beta = levels.line
    product = dot(q.rows, levels.load(codes), (1, 0))
    if levels.limbs:
        product = _join_limbs(product) * (alpha * q.unit)
    elif alpha != 1.0:
        product = alpha * product
    if beta:
        product += beta * q.total
    if scale is None:
        return product
    groups = scale.shape[0]
    rows = product.shape[0] // groups
    scores = None
    for g in range(groups):
        part = slice(g * rows, (g + 1) * rows)
        found = product[part] * scale[g : g + 1].astype(jnp.float32)
        if zero is not None:
            found += q.total[part] * zero[g : g + 1].astype(jnp.float32)
        scores = found if scores is None else scores + found
    return scores


def with_gain(scale: Array | None, zero: Array | None, gain: Array | None) -> tuple[Array | None, Array | None]:
    """gain (scale level + zero) as a scale and a zero point, for factors [n, T]."""
    if gain is None:
        return scale, zero
    gain = gain.astype(jnp.float32)
    scale, zero = (None if x is None else x.astype(jnp.float32) * gain for x in (scale, zero))
    return gain if scale is None else scale, zero


def tiled_scores(
    q: Query,
    codes: Stored,
    levels: Levels,
    scale: Array,
    zero: Array | None,
    slot_scale: Array | None = None,
    slot_zero: Array | None = None,
) -> Array:
    """Scores [M, T] where every T / r slots have scales [r, H] of their own per channel (KIVI's keys): they go into q.

        scores = slot_scale[t] sum_h q (scale level + zero) + slot_zero[t] sum_h q scale

    of which KVarN's keys (slot_scale: the gain) and slots with a gain per channel (scale: the gain) are cases. Lanes come in
    chunks of 128 or of a scale's slots, whichever is more; the scales of a chunk are stacked as rows.
    """
    alpha, beta = levels.line
    operands, rows = levels.load(codes), q.rows.shape[0]
    size = operands.shape[1]
    each = size // scale.shape[0]  # slots per scale
    chunk = max(each, min(LANES, size))
    wide = q.rows.astype(jnp.float32)
    done = []
    for at in range(0, size, chunk):
        width = min(chunk, size - at)
        first, per = at // each, width // each
        stacked = _scaled(wide, scale[first : first + per])
        part = alpha * dot(stacked.astype(levels.dtype), operands[:, at : at + width], (1, 0))
        total = jnp.sum(stacked, axis=1, keepdims=True)
        if beta:
            part += beta * total
        if zero is not None:
            part += jnp.sum(_scaled(wide, zero[first : first + per]), axis=1, keepdims=True)
        if slot_scale is not None:
            part *= slot_scale[:, at : at + width].astype(jnp.float32)
        if slot_zero is not None:
            part += total * slot_zero[:, at : at + width].astype(jnp.float32)
        owner = lax.broadcasted_iota(jnp.int32, (rows, width), 1) // each
        chosen = part[:rows]
        for i in range(1, per):
            chosen = jnp.where(owner == i, part[i * rows : (i + 1) * rows], chosen)
        done.append(chosen)
    return done[0] if len(done) == 1 else jnp.concatenate(done, axis=1)


def _scaled(rows: Array, factors: Array) -> Array:
    """Rows [M, H] times each of the factors [r, H], stacked: [r M, H]."""
    return jnp.concatenate([rows * factors[i : i + 1].astype(jnp.float32) for i in range(factors.shape[0])], axis=0)


class State(NamedTuple):
    """The online softmax of M rows: peak and total [M, 128], the same on every lane, and the sum of values [M, H]."""

    peak: Array
    total: Array
    acc: Array


def fresh(rows: int, dim: int) -> State:
    """Nothing seen yet."""
    lanes = (rows, LANES)
    return State(jnp.full(lanes, MASKED, jnp.float32), jnp.zeros(lanes, jnp.float32), jnp.zeros((rows, dim), jnp.float32))


def advance(state: State, scores: Array, values: Callable[[Array], Array]) -> State:
    """Takes a tile's masked scores [M, T] into the softmax; ``values`` maps probabilities [M, T] to sums [M, H]."""
    peak = jnp.maximum(state.peak, jnp.max(scores, axis=1, keepdims=True))
    # A row that has seen nothing yet has its peak at MASKED: half of it makes the exponentials of masked scores zero.
    probs = jnp.exp(scores - jnp.maximum(peak, MASKED / 2)[:, :1])
    decay = jnp.exp(state.peak - peak)
    total = decay * state.total + jnp.sum(probs, axis=1, keepdims=True)
    return State(peak, total, decay[:, :1] * state.acc + values(probs))


def read_values(codes: Stored, levels: Levels, valid: Array | None) -> Array:
    """Operands [H, T]. ``valid`` [1, T]: lanes that may be read, None: all."""
    operands = levels.load(codes)
    return operands if valid is None else jnp.where(valid, operands, jnp.zeros((), levels.dtype))


def weighted_values(
    probs: Array, seen: Array, operands: Array, levels: Levels, scale: Array | None, zero: Array | None
) -> Array:
    """Probabilities [M, T] times values, [M, H]; scales and zero points [n, T]."""
    alpha, beta = levels.line
    groups, rows = 1 if scale is None else scale.shape[0], probs.shape[0]
    weights = [probs]
    if scale is not None:  # those of free slots may be NaN: their weight is zero, not 0 * NaN
        weights = [jnp.where(seen, probs * scale[g : g + 1].astype(jnp.float32), 0.0) for g in range(groups)]
    stacked = weights[0] if groups == 1 else jnp.concatenate(weights, axis=0)
    if levels.limbs:
        # Probabilities are at most 1: relative to the largest weight anywhere, so is what rounding to a unit loses.
        unit = jnp.maximum(jnp.max(stacked, axis=1, keepdims=True), jnp.float32(1e-30)) / LIMB_RANGE
        product = _join_limbs(dot(split_limbs(stacked, unit), operands, (1, 1))) * (alpha * unit)
    else:
        product = dot(stacked.astype(levels.dtype), operands, (1, 1))
        product = product if alpha == 1.0 else alpha * product
    if beta:
        product += beta * jnp.sum(stacked, axis=1, keepdims=True)
    if zero is not None:
        offsets = [jnp.where(seen, probs * zero[g : g + 1].astype(jnp.float32), 0.0) for g in range(groups)]
        product += jnp.sum(jnp.concatenate(offsets, axis=0), axis=1, keepdims=True)
    if groups == 1:
        return product
    group = _group_of_row(product.shape[1], levels.fmt, groups)
    parts = [jnp.where(group == g, product[g * rows : (g + 1) * rows], 0.0) for g in range(groups)]
    return functools.reduce(jnp.add, parts)


def tiled_values(
    probs: Array, seen: Array, operands: Array, levels: Levels, scale: Array | None, zero: Array | None, gain: Array
) -> Array:
    """``weighted_values`` where every T / r slots have gains [r, H] of their own per channel (KVarN's values)."""
    size = operands.shape[1]
    each = size // gain.shape[0]
    chunk = max(each, min(LANES, size))
    found = []
    for at in range(0, size, chunk):
        lanes = slice(at, min(at + chunk, size))
        width = lanes.stop - at
        factors = [None if x is None else x[:, lanes] for x in (scale, zero)]
        owner = lax.broadcasted_iota(jnp.int32, (1, width), 1) // each
        for i in range(width // each):
            mine = seen[:, lanes] if width == each else seen[:, lanes] & (owner == i)
            weights = jnp.where(mine, probs[:, lanes], 0.0)
            part, first = weighted_values(weights, mine, operands[:, lanes], levels, *factors), at // each + i
            # Gains of tiles that nobody sees may be NaN.
            found.append(jnp.where(part == 0.0, 0.0, part * gain[first : first + 1]))
    return functools.reduce(jnp.add, found)


def _group_of_row(dim: int, fmt: str, groups: int) -> Array:
    """Which group of channels each of an output's H lanes belongs to, int32 [1, H]; their order is ``interleave``'s."""
    lane = lax.broadcasted_iota(jnp.int32, (1, dim), 1)
    count = neighbours(fmt)
    channel = lane // count + (lane % count) * (dim // count)
    return channel // (dim // groups)


def finish(state: State) -> tuple[Array, Array]:
    """Output [M, H] and log-sum-exp [M, 128]; zeros and -inf where nothing was seen."""
    nothing = state.total == 0.0
    total = jnp.where(nothing, 1.0, state.total)
    lse = jnp.where(nothing, -jnp.inf, state.peak + jnp.log(total))
    return state.acc / total[:, :1], lse


def cap(scores: Array, softcap: float | None) -> Array:
    """softcap tanh(x / softcap)."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def pad_rows(x: Array, rows: int, value: float = 0) -> Array:
    """Pads axis -2 to ``rows``."""
    widths = [(0, 0)] * x.ndim
    widths[-2] = (0, rows - x.shape[-2])
    return jnp.pad(x, widths, constant_values=x.dtype.type(value)) if rows > x.shape[-2] else x


def compiler_params(semantics: tuple[str, ...], interpret: object) -> pltpu.CompilerParams:
    """Parallel and sequential axes; the checks of every copy are off in compiled kernels, for their scalar work."""
    checked = bool(interpret)
    return pltpu.CompilerParams(
        dimension_semantics=semantics,
        vmem_limit_bytes=VMEM_LIMIT,
        disable_bounds_checks=not checked,
        disable_semaphore_checks=not checked,
    )
