"""ZipCache (arXiv 2405.14256): tokens that attention looks at in more bits than the others, two codecs in one history.

    saliency   p_i = sum_k A[k, i] / number of queries k that see i           the normalised attention score
    keys       x ~ scale (2 code + 1) + zero                                  per channel and group of tokens
    values     x ~ c (scale (2 code + 1) + zero),  c_j = sqrt(max_t |x_tj|)   channel-separable, token-wise

Tokens enter the history in tiles of ``tile``; of each tile and kv head the ``share`` of tokens with the largest saliency goes,
in text order, to a part of ``salient_bits``, the others to a part of ``rest_bits``; each slot knows its position. Both parts
have fixed numbers of slots, so nothing in the shapes depends on the data, and both are plain codes for the kernels.

Layout for vectors [..., H, S] of a part with T tokens per tile: codes as in ``pallas_kernels.codes``; keys' scale and zero
[..., H, S / group], values' scale and zero [..., S] and gain c [..., H, S / T], bfloat16; positions int32 [..., S]. Realised
bits per value, without positions: keys bits + 32 / group, values bits + 32 / H + 16 / T.

Deviations. The paper ranks a whole prompt at once and then every 100 generated tokens; here each tile is ranked when it leaves
the dense tail, by the attention of *all* queries that have seen its tokens by then, so the choice depends on how a prompt is
cut into chunks. That is the paper's measure itself: its probe tokens approximate it for kernels that hide probabilities, and
while decoding it takes one query. The paper's channel-wise keys have one scale per channel of the prompt and its values one
per token over all heads; here it is one per group of tokens, and per kv head, since heads live apart. Positions cost 32 bits
per token and head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from memjax.evict.observer import EveryQuery
from memjax.pallas_kernels.codes import SCALE_DTYPE, Codes, packed_dim
from memjax.quantize.codec import Codec, KeyValueCodec
from memjax.quantize.kivi import KiviKeys, asymmetric, check_bits, check_slots


@dataclass(frozen=True)
class ChannelSeparable(Codec):
    """Values: normalised per channel and tile, then rounded per token. ``encode`` takes a multiple of ``tile`` slots.

    >>> ChannelSeparable(bits=4, tile=96).bits_per_value(64)
    4.666666666666667
    """

    name: ClassVar[str] = "zipcache"
    rotate: ClassVar[bool] = False
    bits: int = 4
    tile: int = 96

    @property
    def fmt(self) -> str:
        return f"int{self.bits}"

    def encode(self, x: Float[Array, "... H S"], dtype: DTypeLike) -> Codes:
        del dtype
        check_slots("ZipCache", x.shape[-1], self.tile)
        tiles = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, self.tile)
        peak = jnp.max(jnp.where(jnp.isfinite(tiles), jnp.abs(tiles), 0.0), axis=-1, keepdims=True)
        gain = jnp.where(peak > 0, jnp.sqrt(peak), 1.0).astype(SCALE_DTYPE)
        normal = (tiles / gain.astype(jnp.float32)).reshape(x.shape)
        data, scale, zero = asymmetric(normal, self.bits, channels=x.shape[-2], slots=1)
        return Codes(data, scale[..., 0, :], self.fmt, zero[..., 0, :], gain=gain[..., 0])

    def bits_per_value(self, dim: int, dtype: DTypeLike = jnp.bfloat16) -> float:
        del dtype
        packed_dim(self.fmt, dim)
        return self.bits + 32 / dim + 16 / self.tile


@dataclass(frozen=True)
class _Part(KeyValueCodec):
    """The tokens of one precision, ``tokens`` of every tile."""

    name: ClassVar[str] = "zipcache"
    bits: int
    tokens: int
    group: int

    @property
    def keys(self) -> KiviKeys:
        return KiviKeys(self.bits, self.group)

    @property
    def values(self) -> ChannelSeparable:
        return ChannelSeparable(self.bits, self.tokens)


@dataclass(frozen=True)
class ZipCache(KeyValueCodec):
    """The paper's mixture, 60 % of the tokens in 4 bits and the others in 2.

    Raises:
      ValueError: bits without a format, a share that leaves a part empty or not of whole groups.

    >>> codec = ZipCache()
    >>> codec.salient, codec.rest.values.bits
    (96, 2)
    """

    name: ClassVar[str] = "zipcache"
    salient_bits: int = 4
    rest_bits: int = 2
    tile: int = 160
    group: int = 32
    share: float = 0.6

    def __post_init__(self):
        check_bits("ZipCache", self.salient_bits)
        check_bits("ZipCache", self.rest_bits)
        if self.group < 1:
            raise ValueError(f"a ZipCache group holds at least 1 token, got {self.group}")
        if not 0 < self.salient < self.tile or self.salient % self.group or self.tile % self.group:
            raise ValueError(
                f"a share {self.share} of a ZipCache tile of {self.tile} tokens is {self.salient}: both parts must be whole "
                f"groups of {self.group} tokens; take for instance tile=160, group=32, share=0.6"
            )

    @property
    def claimed_bits(self) -> float:
        return self.share * self.salient_bits + (1 - self.share) * self.rest_bits

    @property
    def salient(self) -> int:
        return round(self.share * self.tile)

    @property
    def keys(self) -> KiviKeys:
        return self._salient.keys

    @property
    def values(self) -> ChannelSeparable:
        return self._salient.values

    @property
    def rest(self) -> KeyValueCodec:
        return _Part(self.rest_bits, self.tile - self.salient, self.group)

    @property
    def observer(self) -> EveryQuery:
        return EveryQuery(history=False)

    @property
    def _salient(self) -> _Part:
        return _Part(self.salient_bits, self.salient, self.group)
