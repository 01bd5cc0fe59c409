"""KIVI (arXiv 2402.02750): asymmetric uniform codes, keys per channel over groups of tokens, values per token over channels.

    zero = (max + min) / 2,   scale = (max - min) / 2 / (2^bits - 1),   x ~ scale * (2 code + 1) + zero        per group

The same grid as the paper's min + (max - min) / (2^bits - 1) * k. A group of keys is ``group`` neighbouring tokens in one
channel, so that a channel with an offset of its own, as keys have after RoPE, costs its group nothing; a group of values is
``group`` neighbouring channels of one token.

Layout for vectors [..., H, S]: codes as in ``pallas_kernels.codes``; keys' scale and zero [..., H, S / group], values'
[..., H / group, S], bfloat16. Realised bits per value: bits + 32 / group at every head dimension, 3 at 2 bits in groups of 32.

Deviations: scale and zero are bfloat16 and not float16, whose range an outlier can leave. The zero point is rounded first and
the scale then covers the group from there: on a large offset rounding widens the grid a little instead of shifting every
value. 3 bits (and 8, where 255 levels are used) besides the paper's 2 and 4. Which tokens stay dense is the cache's matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from memjax.pallas_kernels.codes import SCALE_DTYPE, Codes, pack, packed_dim
from memjax.quantize.codec import Codec, KeyValueCodec

BITS = (2, 3, 4, 8)


def asymmetric(
    x: Float[Array, "... H S"], bits: int, channels: int, slots: int
) -> tuple[Num[Array, "... C S"], Float[Array, "... H/a S/b"], Float[Array, "... H/a S/b"]]:
    """Packed codes, scale and zero point of tiles of ``channels`` by ``slots`` values, both of which divide their axes.

    A tile with one value only is exact up to its zero point's second rounding; one with a NaN or an infinity becomes NaN.
    """
    *lead, dim, total = x.shape
    tiles = x.astype(jnp.float32).reshape(*lead, dim // channels, channels, total // slots, slots)
    low, high = (reduce(tiles, axis=(-3, -1), keepdims=True) for reduce in (jnp.min, jnp.max))
    zero = _stored(high / 2 + low / 2)
    reach = jnp.maximum(high - zero, zero - low)
    largest = 127 if bits == 8 else 2**bits - 1
    scale = _stored(reach / largest)
    scale, zero = (jnp.where(jnp.isfinite(reach), factor, jnp.nan) for factor in (scale, zero))
    level = jnp.where(scale > 0, (tiles - zero) / jnp.where(scale > 0, scale, 1.0), 0.0)
    level = jnp.clip(jnp.nan_to_num(level), -largest, largest)
    codes = jnp.round(level) if bits == 8 else jnp.clip(jnp.floor(level / 2), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    packed = pack(codes.reshape(x.shape), f"int{bits}")
    scale, zero = (factor[..., 0, :, 0].astype(SCALE_DTYPE) for factor in (scale, zero))
    return packed, scale, zero


def medians(x: Float[Array, "... H S"], channels: int, slots: int) -> Float[Array, "... H S"]:
    """The median, float32, of the tile of ``channels`` by ``slots`` values that a value is in; both divide their axes."""
    *lead, dim, total = x.shape
    tiles = x.astype(jnp.float32).reshape(*lead, dim // channels, channels, total // slots, slots)
    return jnp.broadcast_to(jnp.median(tiles, axis=(-3, -1), keepdims=True), tiles.shape).reshape(x.shape)


def _stored(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return x.astype(SCALE_DTYPE).astype(jnp.float32)


@dataclass(frozen=True)
class KiviKeys(Codec):
    """Keys: groups of ``group`` tokens in one channel. ``encode`` takes a multiple of ``tile`` slots.

    Raises:
      ValueError: bits without a format, a group below 1.

    >>> KiviKeys(bits=2, group=32).bits_per_value(64)
    3.0
    """

    name: ClassVar[str] = "kivi"
    rotate: ClassVar[bool] = False
    bits: int = 2
    group: int = 32

    def __post_init__(self):
        check_bits("KIVI", self.bits)
        if self.group < 1:
            raise ValueError(f"a KIVI group holds at least 1 value, got {self.group}; the paper takes 32")

    @property
    def fmt(self) -> str:
        return f"int{self.bits}"

    @property
    def tile(self) -> int:
        """Tokens that are encoded together."""
        return self.group

    def encode(self, x: Float[Array, "... H S"], dtype: DTypeLike) -> Codes:
        del dtype
        check_slots("KIVI", x.shape[-1], self.tile)
        data, scale, zero = asymmetric(x, self.bits, channels=1, slots=self.group)
        return Codes(data, scale, self.fmt, zero)

    def middle(self, x: Float[Array, "... H S"]) -> Float[Array, "... H S"]:
        return medians(x, channels=1, slots=self.group)

    def bits_per_value(self, dim: int, dtype: DTypeLike = jnp.bfloat16) -> float:
        del dtype
        packed_dim(self.fmt, dim)
        return self.bits + 32 / self.group


@dataclass(frozen=True)
class KiviValues(Codec):
    """Values: groups of ``group`` channels of one token; ``group`` = head dimension is plain asymmetric token-wise rounding.

    Raises:
      ValueError: bits without a format, a group below 1; ``validate``: a group that does not divide the head dimension.

    >>> KiviValues(bits=4, group=32).bits_per_value(64)
    5.0
    """

    name: ClassVar[str] = "kivi"
    rotate: ClassVar[bool] = False
    tile: ClassVar[int] = 1
    bits: int = 2
    group: int = 32

    __post_init__ = KiviKeys.__post_init__

    @property
    def fmt(self) -> str:
        return f"int{self.bits}"

    def validate(self, dim: int) -> None:
        packed_dim(self.fmt, dim)
        if dim % self.group:
            raise ValueError(
                f"KIVI groups of {self.group} channels do not divide head_dim {dim}; use a group that does"
            )

    def encode(self, x: Float[Array, "... H S"], dtype: DTypeLike) -> Codes:
        del dtype
        self.validate(x.shape[-2])
        data, scale, zero = asymmetric(x, self.bits, channels=self.group, slots=1)
        return Codes(data, scale, self.fmt, zero)

    def middle(self, x: Float[Array, "... H S"]) -> Float[Array, "... H S"]:
        return medians(x, channels=self.group, slots=1)

    def bits_per_value(self, dim: int, dtype: DTypeLike = jnp.bfloat16) -> float:
        del dtype
        self.validate(dim)
        return self.bits + 32 / self.group


@dataclass(frozen=True)
class Kivi(KeyValueCodec):
    """Both streams with the same bits and group, as in the paper.

    >>> Kivi(bits=4).keys.tile
    32
    """

    name: ClassVar[str] = "kivi"
    bits: int = 2
    group: int = 32

    def __post_init__(self):
        _ = self.keys, self.values  # refuses what they refuse

    @property
    def claimed_bits(self) -> float:
        return self.bits + 32 / self.group

    @property
    def keys(self) -> KiviKeys:
        return KiviKeys(self.bits, self.group)

    @property
    def values(self) -> KiviValues:
        return KiviValues(self.bits, self.group)


def check_bits(method: str, bits: int) -> None:
    """Raises ValueError if no uniform format has ``bits``."""
    if bits not in BITS:
        raise ValueError(
            f"{method} codes have {', '.join(map(str, BITS))} bits, got {bits}; no packed format holds others"
        )


def check_slots(method: str, slots: int, tile: int) -> None:
    """Raises ValueError if ``slots`` tokens are not whole tiles."""
    if slots % tile:
        raise ValueError(
            f"{method} encodes whole tiles of {tile} tokens, got {slots}; keep the rest dense until one is full"
        )
