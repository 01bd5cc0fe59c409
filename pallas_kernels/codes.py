"""The one form in which kernels read vectors: packed codes, channel by channel, with scales.

    x[..., h, s] ~ scale * level(code[..., h, s]) + zero

=======  ============================  =====  ======================  ===========================
format   storage, [..., C, S]          C      codes                   levels of the uniform grid
=======  ============================  =====  ======================  ===========================
dense    any float dtype, no scale     H                              the value
int8     int8                          H      -127 .. 127             the code
int4     uint8, two codes per byte     H / 2  -8 .. 7                 2 code + 1: -15, -13 .. 15
int2     uint8, four codes per byte    H / 4  -2 .. 1                 2 code + 1: -3, -1, 1, 3
e4m3     float8_e4m3fn                 H      the float8 value        the value
e5m2     float8_e5m2                   H      the float8 value        the value
=======  ============================  =====  ======================  ===========================

**Slots lie along the last axis, channels before it.** On a TPU the last axis fills the 128 lanes: slots always do, while
64, 80 or 96 channels would be padded to 128 in memory; scales, positions and masks, one per slot, lie along the same lanes;
a token owns whole bytes, so that writing one never touches the bits of another. A GPU reads runs of slots as well.

**Packing** is bit-planar over the channels: byte r of a slot holds channels r, r + C, r + 2C .. from its low bits up, each
in two's complement. Planes come apart with two shifts; where hardware unpacks neighbours instead (a TPU: rows r n .. r n +
n - 1), the order of channels changes and the *query* is put into that order (``interleave``), once per step.

**Scales** (and zero points alike): one per slot, [..., S]; or one per tile of channels and slots, [..., H / a, S / b], of
which KIVI's key scales (a = 1, b = 32) and groups along the head (b = 1) are cases. Scales are bfloat16 unless a codec
needs more.

**Grids**: ``uniform`` as above; ``cubic``, x (a + b x^2) with x = code + 1/2, which follows the Lloyd-Max levels of a
Gaussian (mean squared error + 0.0 % at 2 bits, + 2.0 % at 4) and costs two multiplications where a table costs a look-up;
or a table of 2^bits integers in -127 .. 127, in the order of the codes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

SCALE_DTYPE = jnp.bfloat16
_STORAGE = {"int8": jnp.int8, "int4": jnp.uint8, "int2": jnp.uint8, "e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}
FORMATS = ("dense", *_STORAGE)
BITS = {"int8": 8, "int4": 4, "int2": 2, "e4m3": 8, "e5m2": 8}
_LARGEST_LEVEL = {"int8": 127.0, "int4": 15.0, "int2": 3.0, "e4m3": 448.0, "e5m2": 57344.0}
CUBIC = {"int4": (0.240507, 0.002098), "int2": (0.892887, 0.050693)}

Grid = str | tuple[int, ...]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["data", "scale", "zero"], meta_fields=["fmt", "grid"]
)
@dataclass(frozen=True)
class Codes:
    """Vectors of ``dim`` channels in slots: ``data`` [..., C, S], see the module's text for the other fields."""

    data: Array
    scale: Array | None
    fmt: str
    zero: Array | None = None
    grid: Grid = "uniform"

    @property
    def dim(self) -> int:
        """Channels per vector, H."""
        return self.data.shape[-2] * planes(self.fmt)

    @property
    def slots(self) -> int:
        """Vectors along the last axis, S."""
        return self.data.shape[-1]

    @property
    def per_slot(self) -> bool:
        """Whether scale and zero point, if any, are one per slot, so that they can multiply scores and probabilities."""
        return all(x is None or x.ndim == self.data.ndim - 1 for x in (self.scale, self.zero))

    def levels(self, dtype: DTypeLike) -> Float[Array, "... H S"]:
        """The unscaled levels in ``dtype`` (bfloat16 and wider hold the integer ones exactly)."""
        if self.fmt not in ("int4", "int2"):
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
        return x.astype(dtype)

    def spread(self, factor: Array) -> Float[Array, "... H|1 S"]:
        """A scale or zero point in float32, broadcast against the vectors."""
        factor = factor.astype(jnp.float32)
        if factor.ndim < self.data.ndim:
            return factor[..., None, :]
        for axis, size in ((-2, self.dim), (-1, self.slots)):
            factor = jnp.repeat(factor, size // factor.shape[axis], axis=axis)
        return factor


def planes(fmt: str) -> int:
    """Codes per byte."""
    return 8 // BITS[fmt] if fmt in ("int4", "int2") else 1


def cubic(x: Array, fmt: str) -> Array:
    """The levels of the cubic grid; ``x`` is the code plus a half."""
    a, b = CUBIC[fmt]
    return x * (a + b * x * x)


def pack(codes: Int[Array, "... H S"], fmt: str) -> Array:
    """Signed codes as stored bytes [..., C, S]."""
    count, bits = planes(fmt), BITS[fmt]
    if count == 1:
        return codes.astype(_STORAGE[fmt])
    parts = jnp.split(codes.astype(jnp.int8).astype(jnp.uint8) & (2**bits - 1), count, axis=-2)
    return functools.reduce(jnp.bitwise_or, [part << (bits * j) for j, part in enumerate(parts)])


def unpack(data: Array, fmt: str) -> Int[Array, "... H S"]:
    """Inverts ``pack``: int8 codes."""
    bits = BITS[fmt]
    if planes(fmt) == 1:
        return data
    bytes_ = jax.lax.bitcast_convert_type(data, jnp.int8)
    return jnp.concatenate([(bytes_ << (8 - bits * (j + 1))) >> (8 - bits) for j in range(planes(fmt))], axis=-2)


def interleave(x: Array, fmt: str) -> Array:
    """Rows' channels (last axis) in the order in which neighbours are unpacked from one byte: 0, C, 2C, .., 1, 1 + C, .."""
    count = planes(fmt)
    return x if count == 1 else jnp.swapaxes(x.reshape(*x.shape[:-1], count, -1), -1, -2).reshape(x.shape)


def deinterleave(x: Array, fmt: str) -> Array:
    """Inverts ``interleave``."""
    count = planes(fmt)
    return x if count == 1 else jnp.swapaxes(x.reshape(*x.shape[:-1], -1, count), -1, -2).reshape(x.shape)


def dense(x: Float[Array, "... H S"], dtype: DTypeLike | None = None) -> Codes:
    """``x`` as it is (or cast to ``dtype``), in the form that kernels read."""
    return Codes(x if dtype is None else x.astype(dtype), None, "dense")


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
    if fmt in ("int4", "int2"):
        half = 2 ** (BITS[fmt] - 1)
        return pack(jnp.clip(jnp.round((ratio - 1) / 2), -half, half - 1), fmt)
    return ratio.astype(_STORAGE[fmt])
