"""KVarN (Huawei, arXiv 2606.03458): Hadamard rotation, variances balanced over both axes of a tile, then asymmetric rounding.

    T [H, 128 tokens] = rotated vectors / their root mean square
    repeat:  L_c += log std over tokens   of T / e^(L_c + L_t)        per channel c, clipped to -0.3 .. 10
             L_t += log std over channels of T / e^(L_c + L_t)        per token t,   clipped likewise
    keep the (L_c, L_t) of the smallest imbalance, log(max var / min var) over channels plus the same over tokens
    keys:    x ~ e^L_t (scale_c * level + zero_c),   scale and zero per channel and tile, they absorb e^L_c
    values:  x ~ e^L_c (scale_t * level + zero_t),   scale and zero per token, they absorb e^L_t

A token of unusual size thus no longer spends the grid of every channel (nor a channel that of every token), at the price of
one gain. Layout for vectors [..., H, S]: keys' scale and zero [..., H, S / tile], gain [..., S]; values' scale and zero
[..., S], gain [..., H, S / tile]; bfloat16, rounded before the codes are taken.

Realised bits per value: keys bits + 32 / tile + 16 / H, values bits + 32 / H + 16 / tile. In tiles of 128: bits + 0.375 for
both at head_dim 128 (the paper's 2.25 is 2.375 here: it keeps scale and gain in 8-bit floats, and the kernels' scales are
bfloat16), bits + 0.5 for keys and bits + 0.625 for values at 64.

Deviations: bfloat16 scales, gains and zeros; tiles are divided by their root mean square first, so that the clips do not
depend on the units of the model (with the paper's, keys a tenth of the size are hardly balanced at all); a signed Hadamard
matrix, applied to values as well instead of being absorbed into W_V and W_O; imbalance is measured in logarithms. The clip at
-0.3 is the paper's: a token below 0.74 of the root mean square is not raised to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from memjax.pallas_kernels.codes import SCALE_DTYPE, Codes
from memjax.quantize.codec import Codec, KeyValueCodec
from memjax.quantize.hadamard import rotate
from memjax.quantize.kivi import asymmetric, check_bits, check_slots, medians

_CLIP = (-0.3, 10.0)
_SMALLEST_VARIANCE = 1e-12


def balance(
    tiles: Float[Array, "... H n T"], iterations: int
) -> tuple[Float[Array, "... H n 1"], Float[Array, "... 1 n T"]]:
    """Factors per channel and per token that bring the variances along both axes of each tile [H, T] together.

    >>> size = jnp.where(jnp.arange(32) % 8 == 0, 16.0, 1.0)  # one token in eight
    >>> x = size * jax.random.normal(jax.random.key(0), (64, 1, 32))
    >>> _, token = balance(x, iterations=8)
    >>> [round(float(jnp.ptp(jnp.log(jnp.std(y, axis=0)))), 1) for y in (x, x / token)]
    [3.1, 1.9]
    """
    unit = tiles / _root_mean_square(tiles)

    def scaled(channel: Array, token: Array) -> Array:
        return unit * jnp.exp(-channel - token)

    def imbalance(channel: Array, token: Array) -> Array:
        x = scaled(channel, token)
        over_tokens, over_channels = jnp.log(_variance(x, -1)), jnp.log(_variance(x, -3))
        return jnp.ptp(over_tokens, -3, keepdims=True) + jnp.ptp(over_channels, -1, keepdims=True)

    def step(carry, _):
        channel, token, best = carry
        channel = jnp.clip(channel + 0.5 * jnp.log(_variance(scaled(channel, token), -1)), *_CLIP)
        token = jnp.clip(token + 0.5 * jnp.log(_variance(scaled(channel, token), -3)), *_CLIP)
        found = imbalance(channel, token), channel, token
        best = jax.tree.map(lambda new, old: jnp.where(found[0] < best[0], new, old), found, best)
        return (channel, token, best), None

    channel, token = jnp.zeros_like(unit[..., :1]), jnp.zeros_like(unit[..., :1, :, :])
    start = channel, token, (imbalance(channel, token), channel, token)
    (_, _, (_, channel, token)), _ = jax.lax.scan(step, start, length=iterations)
    return jnp.exp(channel), jnp.exp(token)


def _variance(x: Array, axis: int) -> Array:
    return jnp.maximum(jnp.var(x, axis=axis, keepdims=True), _SMALLEST_VARIANCE)


def _root_mean_square(tiles: Array) -> Array:
    """Of each tile; 1 where it is zero."""
    peak = jnp.max(jnp.abs(tiles), axis=(-3, -1), keepdims=True)
    peak = jnp.where(peak > 0, peak, 1.0)
    mean = jnp.mean(jnp.square(tiles / peak), axis=(-3, -1), keepdims=True)
    return jnp.where(mean > 0, peak * jnp.sqrt(mean), 1.0)


@dataclass(frozen=True)
class _Tiles(Codec):
    """What both streams share. A NaN or an infinity makes its token NaN in values and its whole tile in keys."""

    name: ClassVar[str] = "kvarn"
    rotate: ClassVar[bool] = True
    bits: int = 4
    tile: int = 128
    iterations: int = 8

    def __post_init__(self):
        check_bits("KVarN", self.bits)
        if self.tile < 2:
            raise ValueError(f"a KVarN tile holds at least 2 tokens, got {self.tile}; the paper takes 128")
        if self.iterations < 0:
            raise ValueError(f"KVarN balances in 0 or more iterations, got {self.iterations}; the paper takes 8 to 16")

    @property
    def fmt(self) -> str:
        return f"int{self.bits}"

    def _tiles(self, x: Float[Array, "... H S"]) -> tuple[Array, Array, Array]:
        """Rotated tiles [..., H, n, T] and their factors per channel and token, as they are stored."""
        check_slots("KVarN", x.shape[-1], self.tile)
        x = rotate(x.astype(jnp.float32), axis=-2)
        tiles = x.reshape(*x.shape[:-1], -1, self.tile)
        factors = balance(jnp.where(jnp.isfinite(tiles), tiles, 0.0), self.iterations)
        channel, token = (factor.astype(SCALE_DTYPE) for factor in factors)
        return tiles, channel, token


@dataclass(frozen=True)
class KVarNKeys(_Tiles):
    """Keys: rounded per channel and tile, one gain per token. ``encode`` takes a multiple of ``tile`` slots.

    Raises:
      ValueError: bits without a format, a tile below 2, negative iterations.

    >>> KVarNKeys(bits=2).bits_per_value(128), KVarNKeys(bits=4).bits_per_value(64)
    (2.375, 4.5)
    """

    def encode(self, x: Float[Array, "... H S"], dtype: DTypeLike) -> Codes:
        del dtype
        tiles, _, token = self._tiles(x)
        balanced = (tiles / token.astype(jnp.float32)).reshape(x.shape)
        data, scale, zero = asymmetric(balanced, self.bits, channels=1, slots=self.tile)
        gain = token.reshape(*x.shape[:-2], x.shape[-1])
        return Codes(data, scale, self.fmt, zero, gain=gain)

    def middle(self, x: Float[Array, "... H S"]) -> Float[Array, "... H S"]:
        return medians(x, channels=1, slots=self.tile)

    def bits_per_value(self, dim: int, dtype: DTypeLike = jnp.bfloat16) -> float:
        self.validate(dim)
        return self.bits + 32 / self.tile + 16 / dim


@dataclass(frozen=True)
class KVarNValues(_Tiles):
    """Values: rounded per token, one gain per channel and tile. ``encode`` takes a multiple of ``tile`` slots.

    Raises:
      ValueError: bits without a format, a tile below 2, negative iterations.

    >>> KVarNValues(bits=2).bits_per_value(128), KVarNValues(bits=2).bits_per_value(64)
    (2.375, 2.625)
    """

    bits: int = 2

    def encode(self, x: Float[Array, "... H S"], dtype: DTypeLike) -> Codes:
        del dtype
        tiles, channel, _ = self._tiles(x)
        balanced = (tiles / channel.astype(jnp.float32)).reshape(x.shape)
        data, scale, zero = asymmetric(balanced, self.bits, channels=x.shape[-2], slots=1)
        return Codes(data, scale[..., 0, :], self.fmt, zero[..., 0, :], gain=channel[..., 0])

    def bits_per_value(self, dim: int, dtype: DTypeLike = jnp.bfloat16) -> float:
        self.validate(dim)
        return self.bits + 32 / dim + 16 / self.tile


@dataclass(frozen=True)
class KVarN(KeyValueCodec):
    """The shipped preset, 4-bit keys and 2-bit values in tiles of 128 tokens.

    >>> KVarN().keys, KVarN().values.bits
    (KVarNKeys(bits=4, tile=128, iterations=8), 2)
    """

    name: ClassVar[str] = "kvarn"
    key_bits: int = 4
    value_bits: int = 2
    tile: int = 128
    iterations: int = 8

    def __post_init__(self):
        _ = self.keys, self.values  # refuses what they refuse

    @property
    def claimed_bits(self) -> float:
        """Two scale vectors in float8, a zero point in float16."""
        return (self.key_bits + self.value_bits) / 2 + 32 / 128

    @property
    def keys(self) -> KVarNKeys:
        return KVarNKeys(self.key_bits, self.tile, self.iterations)

    @property
    def values(self) -> KVarNValues:
        return KVarNValues(self.value_bits, self.tile, self.iterations)
