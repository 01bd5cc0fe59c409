"""The one form in which kernels read vectors: packed codes, channel by channel, with scales.

    x[..., h, s] ~ gain * (scale * level(code[..., h, s]) + zero)

=======  ============================  =====  ======================  ===========================
format   storage, [..., C, S]          C      codes                   levels of the uniform grid
=======  ============================  =====  ======================  ===========================
dense    any float dtype, no scale     H                              the value
int8     int8                          H      -127 .. 127             the code
int4     uint8, two codes per byte     H / 2  -8 .. 7                 2 code + 1: -15, -13 .. 15
int3     uint8, int2 and a bit plane   3H/8   -4 .. 3                 2 code + 1: -7, -5 .. 7
int2     uint8, four codes per byte    H / 4  -2 .. 1                 2 code + 1: -3, -1, 1, 3
e4m3     float8_e4m3fn                 H      the float8 value        the value
e5m2     float8_e5m2                   H      the float8 value        the value
sparse   any float dtype, no scale     2n+r   the value, its place    the value
=======  ============================  =====  ======================  ===========================

**Slots lie along the last axis, channels before it.** On a TPU the last axis fills the 128 lanes: slots always do, while
64, 80 or 96 channels would be padded to 128 in memory; scales, positions and masks, one per slot, lie along the same lanes;
a token owns whole bytes, so that writing one never touches the bits of another. A GPU reads runs of slots as well. Where C is
no multiple of 8 (int3 of 96 channels, int2 of 80) XLA copies the codes before a TPU kernel reads them.

**Packing** is bit-planar over the channels: byte r of a slot holds channels r, r + C, r + 2C .. from its low bits up, each
in two's complement. Planes come apart with two shifts; where hardware unpacks neighbours instead (a TPU: rows r n .. r n +
n - 1), the order of channels changes and the *query* is put into that order (``interleave``), once per step.

**int3** is two such arrays of rows, code = 2 c + b: H / 4 rows hold c, the sign and the next bit, packed as int2 is; below
them H / 8 rows hold b, eight to a byte. The sign is in the first part so that codes are nested: the first rows with twice the
scale *are* an int2 code of the same vectors (``Codes.coarse``; 2 (2 c + 1) is the middle of the two levels that c has), which
every kernel reads already; one bit of sign alone would make too coarse a first pass. And moved within their bytes the parts
fill nibbles 2 (2 c + b) in the channel order of int4: a TPU unpacks them as such, with no sign to extend.

A grid that is not uniform is nested if its maker says which four levels its cells have in common (``coarse_grid``).

**sparse** is few numbers of many channels: rows of n values, of the n places where they stand among ``width`` channels that
are zero elsewhere, and of r further channels, dense. They unpack as the width + r channels of a dense vector, by comparisons.
Places are numbers of the same dtype (bfloat16 holds integers up to 256), one array to copy and to page.

**Scales** (zero points and gains alike): one per slot, [..., S]; or one per tile of channels and slots, [..., H / a, S / b],
of which KIVI's key scales (a = 1, b = 32) and groups along the head (b = 1) are cases. Gains are for codecs that scale along
both axes of a tile, such as KVarN. Scales are bfloat16 unless a codec needs more.

**Grids**: ``uniform`` as above; ``cubic``, x (a + b x^2) with x = code + 1/2, which follows the Lloyd-Max levels of a
Gaussian (mean squared error + 0.0 % at 2 bits, + 0.2 % at 3, + 2.0 % at 4) and costs two multiplications where a table costs
a look-up; or a table of 2^bits integers in -127 .. 127, in the order of the codes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

SCALE_DTYPE = jnp.bfloat16
PACKED = ("int4", "int3", "int2")  # several codes per byte, grids to choose from
_STORAGE = dict.fromkeys(PACKED, jnp.uint8) | {"int8": jnp.int8, "e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}
FORMATS = ("dense", *_STORAGE)
BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2, "e4m3": 8, "e5m2": 8}
_LARGEST_LEVEL = {"int8": 127.0, "int4": 15.0, "int3": 7.0, "int2": 3.0, "e4m3": 448.0, "e5m2": 57344.0}
CUBIC = {"int4": (0.240507, 0.002098), "int3": (0.471455, 0.011585), "int2": (0.892887, 0.050693)}

WIDEST_SPARSE = 256  # channels, whose numbers every storage type holds exactly

Grid = str | tuple[int, ...]


class Entries(NamedTuple):
    """What data of the format sparse hold: ``count`` values of ``width`` channels, and their places; below them dense rows."""

    count: int
    width: int

    def channels(self, rows: int) -> int:
        """Channels of data of so many rows."""
        return self.width + rows - 2 * self.count

    def spread(self, data: Float[Array, "... C S"]) -> Float[Array, "... H S"]:
        """The vectors. A place that does not exist leaves nothing, of two entries at one place the later one stays."""
        channel = jax.lax.broadcasted_iota(jnp.int32, (self.width, 1), 0)
        found = jnp.zeros((), data.dtype)
        for j in range(self.count):
            place = data[..., self.count + j : self.count + j + 1, :].astype(jnp.int32)
            found = jnp.where(channel == place, data[..., j : j + 1, :], found)
        rest = data[..., 2 * self.count :, :]
        return found if rest.shape[-2] == 0 else jnp.concatenate([found, rest], axis=-2)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["data", "scale", "zero", "gain"],
    meta_fields=["fmt", "grid", "coarse_grid", "entries"],
)
@dataclass(frozen=True)
class Codes:
    """Vectors of ``dim`` channels in slots: ``data`` [..., C, S], see the module's text for the other fields."""

    data: Array
    scale: Array | None
    fmt: str
    zero: Array | None = None
    grid: Grid = "uniform"
    gain: Array | None = None
    coarse_grid: Grid | None = None
    entries: Entries | None = None

    @property
    def dim(self) -> int:
        """Channels per vector, H."""
        rows = self.data.shape[-2]
        if self.entries is not None:
            return self.entries.channels(rows)
        return 8 * rows // BITS[self.fmt] if self.fmt in PACKED else rows

    @property
    def slots(self) -> int:
        """Vectors along the last axis, S."""
        return self.data.shape[-1]

    @property
    def per_slot(self) -> bool:
        """Whether all factors are one per slot, so that they can multiply scores and probabilities."""
        return not any(self.tiled(x) for x in (self.scale, self.zero, self.gain))

    def tiled(self, factor: Array | None) -> bool:
        """Whether a factor is given per tile of channels and slots rather than per slot, if at all."""
        return factor is not None and factor.ndim == self.data.ndim

    def coarse(self) -> Codes:
        """int3 codes without their last bit: the first two thirds of the bytes, as int2 codes.

        Of a uniform grid, or of one with a ``coarse_grid``: four levels in the units of ``grid``.
        """
        if self.fmt != "int3" or (self.grid != "uniform" and self.coarse_grid is None):
            wanted = "only uniform int3 codes have a coarse part"
            raise ValueError(f"{wanted}, not {self.fmt} with grid {self.grid}; int3 codes of other grids need a coarse_grid")
        grid, unit = ("uniform", 2) if self.coarse_grid is None else (self.coarse_grid, 1)
        return Codes(split_int3(self.data)[0], unit * self.scale, "int2", self.zero, grid, self.gain)

    def levels(self, dtype: DTypeLike) -> Float[Array, "... H S"]:
        """The unscaled levels in ``dtype`` (bfloat16 and wider hold the integer ones exactly)."""
        if self.entries is not None:
            return self.entries.spread(self.data).astype(dtype)
        if self.fmt not in PACKED:
            return self.data.astype(dtype)
        codes = unpack(self.data, self.fmt)
        if self.grid == "uniform":
            return 2 * codes.astype(dtype) + 1
        if self.grid == "cubic":
            return cubic(codes.astype(jnp.float32) + 0.5, self.fmt).astype(dtype)
        table = jnp.asarray(self.grid, jnp.int8)
        return table[codes.astype(jnp.int32) + len(self.grid) // 2].astype(dtype)

    def decode(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "... H S"]:
        """The vectors themselves."""
        x = self.levels(jnp.float32)
        if self.scale is not None:
            x = x * self.spread(self.scale)
        if self.zero is not None:
            x = x + self.spread(self.zero)
        if self.gain is not None:
            x = x * self.spread(self.gain)
        return x.astype(dtype)

    def spread(self, factor: Array) -> Float[Array, "... H|1 S"]:
        """A scale, zero point or gain in float32, broadcast against the vectors."""
        factor = factor.astype(jnp.float32)
        if factor.ndim < self.data.ndim:
            return factor[..., None, :]
        for axis, size in ((-2, self.dim), (-1, self.slots)):
            factor = jnp.repeat(factor, size // factor.shape[axis], axis=axis)
        return factor


def planes(fmt: str) -> int:
    """Codes per byte; for int3 in the rows that come first."""
    return {"int4": 2, "int3": 4, "int2": 4}.get(fmt, 1)


def neighbours(fmt: str) -> int:
    """Codes that a TPU unpacks from one byte into neighbouring rows."""
    return 2 if fmt == "int3" else planes(fmt)


def cubic(x: Array, fmt: str) -> Array:
    """The levels of the cubic grid; ``x`` is the code plus a half."""
    a, b = CUBIC[fmt]
    return x * (a + b * x * x)


def pack(codes: Int[Array, "... H S"], fmt: str) -> Array:
    """Signed codes as stored bytes [..., C, S]."""
    if fmt not in PACKED:
        return codes.astype(_STORAGE[fmt])
    codes = codes.astype(jnp.int8)
    if fmt == "int3":
        return jnp.concatenate([_pack_fields(codes >> 1, 2), _pack_fields(codes, 1)], axis=-2)
    return _pack_fields(codes, BITS[fmt])


def _pack_fields(codes: Array, bits: int) -> Array:
    parts = jnp.split(codes.astype(jnp.uint8) & (2**bits - 1), 8 // bits, axis=-2)
    return functools.reduce(jnp.bitwise_or, [part << (bits * j) for j, part in enumerate(parts)])


def unpack(data: Array, fmt: str) -> Int[Array, "... H S"]:
    """Inverts ``pack``: int8 codes."""
    if fmt not in PACKED:
        return data
    if fmt == "int3":
        high, low = split_int3(data)
        return 2 * unpack(high, "int2") - _unpack_fields(low, 1)
    return _unpack_fields(data, BITS[fmt])


def _unpack_fields(data: Array, bits: int) -> Array:
    """Fields of bytes from the low bits up as int8, in two's complement (a single bit: 0 or -1)."""
    bytes_ = jax.lax.bitcast_convert_type(data, jnp.int8)
    return jnp.concatenate([(bytes_ << (8 - bits * (j + 1))) >> (8 - bits) for j in range(8 // bits)], axis=-2)


def split_int3(data: Array) -> tuple[Array, Array]:
    """The rows of two-bit fields [..., H / 4, S] and of single bits [..., H / 8, S]."""
    rows = data.shape[-2] // 3
    return data[..., : 2 * rows, :], data[..., 2 * rows :, :]


def interleave(x: Array, fmt: str) -> Array:
    """Rows' channels (last axis) in the order in which n neighbours are unpacked from a byte: 0, H / n, 2 H / n, .., 1, .."""
    count = neighbours(fmt)
    return x if count == 1 else jnp.swapaxes(x.reshape(*x.shape[:-1], count, -1), -1, -2).reshape(x.shape)


def deinterleave(x: Array, fmt: str) -> Array:
    """Inverts ``interleave``."""
    count = neighbours(fmt)
    return x if count == 1 else jnp.swapaxes(x.reshape(*x.shape[:-1], -1, count), -1, -2).reshape(x.shape)


def dense(x: Float[Array, "... H S"], dtype: DTypeLike | None = None) -> Codes:
    """``x`` as it is (or cast to ``dtype``), in the form that kernels read."""
    return Codes(x if dtype is None else x.astype(dtype), None, "dense")


def sparse(
    values: Float[Array, "... n S"],
    places: Int[Array, "... n S"],
    width: int,
    rest: Float[Array, "... r S"] | None,
    dtype: DTypeLike,
) -> Codes:
    """Few values of ``width`` channels at their places and dense further channels, [..., width + r, S], stored in ``dtype``.

    Raises:
      ValueError: more than 256 channels, whose numbers bfloat16 does not hold.
    """
    if width > WIDEST_SPARSE:
        raise ValueError(f"places among more than {WIDEST_SPARSE} channels have no exact bfloat16, got {width}")
    parts = [values, places, *([] if rest is None else [rest])]
    data = jnp.concatenate([x.astype(dtype) for x in parts], axis=-2)
    return Codes(data, None, "sparse", entries=Entries(values.shape[-2], width))


def zeros(fmt: str, shape: tuple[int, ...], dtype: DTypeLike) -> Codes:
    """Zero bytes for vectors of shape ``shape`` = [..., H, S]; ``dtype`` is the storage type of format ``dense``."""
    if fmt == "dense":
        return Codes(jnp.zeros(shape, dtype), None, fmt)
    *lead, dim, slots = shape
    return Codes(
        jnp.zeros((*lead, packed_dim(fmt, dim), slots), _STORAGE[fmt]), jnp.zeros((*lead, slots), SCALE_DTYPE), fmt
    )


def packed_dim(fmt: str, dim: int) -> int:
    """Stored elements per vector of ``dim`` channels.

    Raises:
      ValueError: the format cannot hold vectors of this length.
    """
    if fmt == "int3":
        if dim % 8:
            raise ValueError(f"int3 packs 8 values into 3 bytes and needs a multiple of 8 channels, got {dim}")
        return 3 * dim // 8
    count = planes(fmt)
    if dim % count:
        raise ValueError(f"{fmt} packs {count} values per byte and needs a multiple of {count} channels, got {dim}")
    return dim // count


def nbytes_per_vector(fmt: str, dim: int, dtype: DTypeLike) -> int:
    """Bytes one vector of ``dim`` channels occupies, its scale included."""
    if fmt == "dense":
        return dim * jnp.dtype(dtype).itemsize
    return packed_dim(fmt, dim) * jnp.dtype(_STORAGE[fmt]).itemsize + jnp.dtype(SCALE_DTYPE).itemsize


def absmax_encode(x: Float[Array, "... H S"], fmt: str) -> Codes:
    """Rounds the vector of each slot onto the uniform grid of ``fmt`` that its largest magnitude spans.

    The scale is rounded to its storage type, upwards, before the codes are taken, so that its own rounding costs nothing
    and no value leaves the grid. A zero vector gets scale zero and decodes to zeros; a NaN or an infinity makes the whole
    vector NaN rather than a plausible number.
    """
    x = x.astype(jnp.float32)
    peak = jnp.max(jnp.abs(x), axis=-2)
    scale = _round_up(peak / _LARGEST_LEVEL[fmt])
    wide = scale.astype(jnp.float32)[..., None, :]
    ratio = jnp.where(wide > 0, x / jnp.where(wide > 0, wide, 1.0), 0.0)
    scale = jnp.where(jnp.isfinite(peak), scale, jnp.asarray(jnp.nan, SCALE_DTYPE))
    return Codes(_to_grid(jnp.nan_to_num(ratio), fmt), scale, fmt)


def _round_up(x: Array) -> Array:
    """float32 x >= 0 to the next bfloat16 not below it; subnormal results become the smallest normal (zero if flushed)."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    raised = (bits + jnp.uint32(0xFFFF)) >> 16
    rounded = jax.lax.bitcast_convert_type(raised.astype(jnp.uint16), SCALE_DTYPE)
    tiny = jnp.finfo(SCALE_DTYPE).tiny
    return jnp.where(x > 0, jnp.maximum(rounded, tiny), jnp.zeros_like(rounded))


def _to_grid(ratio: Array, fmt: str) -> Array:
    largest = _LARGEST_LEVEL[fmt]
    ratio = jnp.clip(ratio, -largest, largest)
    if fmt == "int8":
        return jnp.round(ratio).astype(jnp.int8)
    if fmt in PACKED:
        half = 2 ** (BITS[fmt] - 1)
        return pack(jnp.clip(jnp.round((ratio - 1) / 2), -half, half - 1), fmt)
    return ratio.astype(_STORAGE[fmt])
