"""The one form in which kernels read vectors: packed codes with one scale per vector.

    x[..., h] ~ scale[...] * level(data[..., h])

=======  ============================  ==================  =====================================
format   storage                       levels              bytes per vector of H values
=======  ============================  ==================  =====================================
dense    any float dtype, no scale     the value           H * itemsize
int8     int8                          -127 .. 127         H + 2
int4     uint8, two codes per byte     -15, -13 .. 13, 15  H / 2 + 2
e4m3     float8_e4m3fn                 the float8 value    H + 2
e5m2     float8_e5m2                   the float8 value    H + 2
=======  ============================  ==================  =====================================

Scales are bfloat16. ``int4`` is bit-planar: byte j holds channel j in its low nibble and channel j + H/2 in its high one,
so unpacking is two masks and a concatenation of whole vectors. Its sixteen levels are the odd integers, symmetric about
zero, which an int8 matrix unit can multiply as they are.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

SCALE_DTYPE = jnp.bfloat16
_STORAGE = {"int8": jnp.int8, "int4": jnp.uint8, "e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}
FORMATS = ("dense", *_STORAGE)
_LARGEST_LEVEL = {"int8": 127.0, "int4": 15.0, "e4m3": 448.0, "e5m2": 57344.0}


@functools.partial(jax.tree_util.register_dataclass, data_fields=["data", "scale"], meta_fields=["fmt"])
@dataclass(frozen=True)
class Codes:
    """Vectors of ``dim`` values along the last axis; ``scale`` has the leading axes of ``data`` (None when dense)."""

    data: Array
    scale: Array | None
    fmt: str

    @property
    def dim(self) -> int:
        """Values per vector."""
        return self.data.shape[-1] * (2 if self.fmt == "int4" else 1)

    def levels(self, dtype: DTypeLike) -> Float[Array, "... H"]:
        """The unscaled levels of every vector in ``dtype`` (bfloat16 and wider hold the integer ones exactly)."""
        if self.fmt == "int4":
            planes = jnp.concatenate([self.data & 15, self.data >> 4], axis=-1)
            return 2 * planes.astype(dtype) - 15
        return self.data.astype(dtype)

    def decode(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "... H"]:
        """The vectors themselves."""
        levels = self.levels(jnp.float32)
        if self.scale is not None:
            levels = levels * self.scale.astype(jnp.float32)[..., None]
        return levels.astype(dtype)


def dense(x: Float[Array, "... H"], dtype: DTypeLike | None = None) -> Codes:
    """``x`` as it is (or cast to ``dtype``), in the form that kernels read."""
    return Codes(x if dtype is None else x.astype(dtype), None, "dense")


def zeros(fmt: str, shape: tuple[int, ...], dtype: DTypeLike) -> Codes:
    """Zero bytes for vectors of shape ``shape``; ``dtype`` is the storage type of format ``dense``."""
    if fmt == "dense":
        return Codes(jnp.zeros(shape, dtype), None, fmt)
    stored = (*shape[:-1], packed_dim(fmt, shape[-1]))
    return Codes(jnp.zeros(stored, _STORAGE[fmt]), jnp.zeros(shape[:-1], SCALE_DTYPE), fmt)


def packed_dim(fmt: str, dim: int) -> int:
    """Stored elements per vector of ``dim`` values.

    Raises:
      ValueError: the format cannot hold vectors of this length.
    """
    if fmt == "int4" and dim % 2:
        raise ValueError(f"int4 packs two values per byte and needs an even head dimension, got {dim}")
    return dim // 2 if fmt == "int4" else dim


def nbytes_per_vector(fmt: str, dim: int, dtype: DTypeLike) -> int:
    """Bytes one vector of ``dim`` values occupies, its scale included."""
    if fmt == "dense":
        return dim * jnp.dtype(dtype).itemsize
    return packed_dim(fmt, dim) * jnp.dtype(_STORAGE[fmt]).itemsize + jnp.dtype(SCALE_DTYPE).itemsize


def absmax_encode(x: Float[Array, "... H"], fmt: str) -> Codes:
    """Rounds each vector onto the grid of ``fmt`` that its largest magnitude spans.

    The scale is rounded to its storage type, upwards, before the codes are taken, so that its own rounding costs nothing
    and no value leaves the grid. A zero vector gets scale zero and decodes to zeros; a NaN or an infinity makes the whole
    vector NaN rather than a plausible number.
    """
    x = x.astype(jnp.float32)
    largest = _LARGEST_LEVEL[fmt]
    peak = jnp.max(jnp.abs(x), axis=-1)
    scale = _round_up(peak / largest)
    wide = scale.astype(jnp.float32)[..., None]
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
    if fmt == "int4":
        codes = jnp.clip(jnp.round((ratio + 15) / 2), 0, 15).astype(jnp.uint8)
        low, high = jnp.split(codes, 2, axis=-1)
        return low | (high << 4)
    return ratio.astype(_STORAGE[fmt])
