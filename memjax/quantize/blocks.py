"""Floating-point-like 4-bit tables: NF4 (QLoRA) and E2M1 in blocks (NVFP4), as integers that kernels look up.

    NF4     x ~ max|x| / 109 * table[code],   table = round(109 * quantiles of a Gaussian scaled to end at -1 and 1)
    NVFP4   x ~ s * table[code],              table = 0, 1, 2, 3, 4, 6, 8, 12 and their negatives: twice E2M1;
                                              s = max|x| / 12 of 16 neighbouring channels, to three mantissa bits

**NF4** (arXiv 2305.14314): sixteen levels, one of them zero, eight above it and seven below. One scale per token and kv head,
or one per ``group`` of channels. Realised bits per value: 4 + 16 / H, 4.25 at head_dim 64 and 4.125 at 128; in groups of g,
4 + 16 / g. Deviations: the table in integers (of all ends up to 127, 109 changes the squared error of Gaussian values least,
by under 0.1 % for vectors of 40 to 400 values); the paper quantizes the scales of weights once more, a cache's are bfloat16.

**NVFP4** (NVIDIA Blackwell; 15 distinct levels, one of the 16 codes is a second zero). Realised bits per value: 5.0 at every
head dimension, where hardware has 4.5: its block scales are e4m3 under a float32 scale per tensor, the kernels' are bfloat16.
They are rounded to e4m3's three mantissa bits, so that accuracy is the format's, but keep the range of bfloat16, so that no
scale per tensor is needed and none has to be known before the tokens are.

Scale layout for vectors [..., H, S]: [..., S] or per group [..., H / group, S], bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from memjax.pallas_kernels.codes import SCALE_DTYPE, Codes, pack, packed_dim
from memjax.quantize.codebook import midpoints
from memjax.quantize.codec import Codec
from memjax.quantize.front import FrontEnd
from memjax.quantize.hadamard import rotate

NF4_TABLE = (-109, -76, -57, -43, -31, -20, -10, 0, 9, 18, 27, 37, 48, 61, 79, 109)
E2M1_TABLE = (-12, -8, -6, -4, -3, -2, -1, 0, 0, 1, 2, 3, 4, 6, 8, 12)
NVFP4_BLOCK = 16
_SCALE_MANTISSA = 3


@dataclass(frozen=True)
class _Blocks(Codec):
    """Codes of a table, scaled by the largest magnitude of each group of channels; what is not finite makes its group NaN."""

    table: ClassVar[tuple[int, ...]]
    front: ClassVar[FrontEnd] = FrontEnd()

    @property
    def fmt(self) -> str:
        return "int4"

    @property
    def _group(self) -> int:
        """Channels per scale, 0 for all."""
        raise NotImplementedError

    def validate(self, dim: int) -> None:
        super().validate(dim)
        if self._group and dim % self._group:
            raise ValueError(
                f"{self.name} groups of {self._group} channels do not divide head_dim {dim}; use a group that does"
            )

    def encode(self, x: Float[Array, "... H S"], dtype: DTypeLike) -> Codes:
        del dtype
        self.validate(x.shape[-2])
        x = x.astype(jnp.float32)
        x = rotate(x, axis=-2) if self.rotate else x
        *lead, dim, slots = x.shape
        groups = x.reshape(*lead, -1, self._group or dim, slots)
        peak = jnp.max(jnp.abs(groups), axis=-2, keepdims=True)
        scale = self._store(peak / self.table[-1])
        wide = scale.astype(jnp.float32)
        ratio = jnp.where(wide > 0, groups / jnp.where(wide > 0, wide, 1.0), 0.0)
        codes = sum((ratio > np.float32(edge)).astype(jnp.int8) for edge in midpoints(np.asarray(self.table)))
        scale = jnp.where(jnp.isfinite(peak), scale, jnp.asarray(jnp.nan, SCALE_DTYPE))[..., 0, :]
        data = pack(codes.reshape(x.shape) - jnp.int8(len(self.table) // 2), self.fmt)
        return Codes(data, scale if self._group else scale[..., 0, :], self.fmt, grid=self.table)

    def _store(self, scale: Float[Array, "..."]) -> Float[Array, "..."]:
        return scale.astype(SCALE_DTYPE)

    def bits_per_value(self, dim: int, dtype: DTypeLike = jnp.bfloat16) -> float:
        del dtype
        self.validate(dim)
        return 8 * packed_dim(self.fmt, dim) / dim + 16 / (self._group or dim)


@dataclass(frozen=True)
class NF4(_Blocks):
    """QLoRA's NormalFloat, one scale per ``group`` channels (0: the whole vector).

    Raises:
      ValueError: a negative group; ``validate``: a group that does not divide the head dimension.

    >>> NF4().bits_per_value(128), NF4(group=32).bits_per_value(128)
    (4.125, 4.5)
    """

    name: ClassVar[str] = "nf4"
    table: ClassVar[tuple[int, ...]] = NF4_TABLE
    group: int = 0

    def __post_init__(self):
        if self.group < 0:
            raise ValueError(f"an NF4 group holds 1 channel or more, or 0 for the whole vector, got {self.group}")

    @property
    def _group(self) -> int:
        return self.group


@dataclass(frozen=True)
class NVFP4(_Blocks):
    """E2M1 in blocks of 16 channels.

    >>> NVFP4().bits_per_value(64)
    5.0
    """

    name: ClassVar[str] = "nvfp4"
    table: ClassVar[tuple[int, ...]] = E2M1_TABLE

    @property
    def claimed_bits(self) -> float:
        return 4.5

    @property
    def _group(self) -> int:
        return NVFP4_BLOCK

    def _store(self, scale: Float[Array, "..."]) -> Float[Array, "..."]:
        return jax.lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=_SCALE_MANTISSA).astype(SCALE_DTYPE)
