"""Progressive codes: 3 bits of which 2 are a code of their own, to read 2 bits of everything and 3 where it matters.

Embedded Lloyd-Max codes of rotated vectors (as in ``turboquant``): the first two bits say which cell of ``lloyd_max(2)`` a
coordinate lies in, the third which half of it, each cell's halves having the two best levels.

    mean squared error at unit variance:   .1175 of the two bits (the flat 2-bit code's own), .0348 of all three (flat: .0345)

One scale serves both reads and keeps the length of the vector that all bits stand for. Two bits then shorten it, by 4.6 %;
levels longer by that much are no better in front of a model (KL divergence of SmolLM2, nothing refined: .217 against .214).

How they are read is ``memjax.attention.progressive``'s matter. Layout: ``int3`` codes, two-bit rows first, with one bfloat16
scale per vector: 3 + 16 / H bits per value, 3.25 at head_dim 64 and 3.125 at 128. The page size only rounds the history up.

Deviations: this combination has no paper of its own. That only pages with large scores need all their bits is the idea of
Quest (arXiv 2406.10774) and FIER (arXiv 2508.08256), which leave the other pages out altogether.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from memjax.pallas_kernels.codes import Codes, Grid
from memjax.quantize.codebook import distortion, lloyd_max, nested_edges, nested_tables
from memjax.quantize.codec import KeyValueCodec
from memjax.quantize.front import FrontEnd
from memjax.quantize.turboquant import Lloyd


@dataclass(frozen=True)
class Nested(Lloyd):
    """One stream: 2 + 1 bits per value and one scale per vector.

    >>> Nested().bits_per_value(64)
    3.25
    """

    name: ClassVar[str] = "nested"
    bits: int = 3
    scale: str = "search"

    def code_grid(self, dim: int) -> Grid:
        return nested_tables(dim)[1]

    def encode(self, x: Float[Array, "... H S"], dtype: DTypeLike) -> Codes:
        codes = super().encode(x, dtype)
        return dataclasses.replace(codes, coarse_grid=nested_tables(codes.dim)[0])

    def coarse_error(self, dim: int) -> float:
        """Standard deviation of a coordinate's error in the first two bits, in units of a vector's scale."""
        return distortion(lloyd_max(2, dim), dim) ** 0.5 / nested_tables(dim)[2]

    def _levels(self, dim: int) -> tuple[np.ndarray, float]:
        _, table, unit = nested_tables(dim)
        return np.asarray(table, np.float64), unit

    def _edges(self, dim: int) -> np.ndarray:
        return nested_edges(dim) / nested_tables(dim)[2]


@dataclass(frozen=True)
class Progressive(KeyValueCodec):
    """Keys and values, and how much of them a decode step reads in full.

    Args:
      refine: at most this fraction of the pages of a kv head is read with all three bits; 0: none ever.
      page: slots that are judged and read together.
      share: pages that may hold more than this share of a query's attention are worth refining; 0: all of them.
      margin: how far a score may be off, in standard deviations of what the third bit of the keys changes.

    Raises:
      ValueError: a number out of range.

    >>> Progressive().page, Progressive(refine=0.5).keys.fmt
    (128, 'int3')
    """

    name: ClassVar[str] = "progressive"
    front: ClassVar[FrontEnd] = FrontEnd()
    refine: float = 0.25
    page: int = 128
    share: float = 0.01
    margin: float = 3.0

    def __post_init__(self):
        for name, low, high in (("refine", 0, 1), ("share", 0, 1), ("margin", 0, math.inf)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise ValueError(f"progressive needs {name} between {low} and {high}, got {value!r}")
        if isinstance(self.page, bool) or not isinstance(self.page, int) or self.page < 8:
            raise ValueError(f"progressive needs pages of at least 8 slots, got {self.page!r}; 128 fill a TPU's row of lanes")

    @property
    def keys(self) -> Nested:
        return Nested()

    @property
    def values(self) -> Nested:
        return Nested()
