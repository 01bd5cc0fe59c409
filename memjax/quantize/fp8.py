"""fp8: 8-bit floats with one scale per token and kv head.

    scale = max|x| / max(format),   code = float8(x / scale)

``e4m3`` (3 mantissa bits, largest value 448) or ``e5m2`` (2 mantissa bits, 57344), as in arXiv 2209.05433. Serving systems
often fix the scale at 1 per tensor; a scale per vector costs 2 bytes and cannot saturate. 8.25 bits per value at
head_dim 64, like int8, and on most caches less exact than it: fp8 is for hardware whose matrix units want it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from memjax.quantize.codec import Codec
from memjax.quantize.front import FrontEnd


@dataclass(frozen=True)
class Fp8(Codec):
    """Token-wise float8 in ``format`` e4m3 or e5m2.

    Raises:
      ValueError: another format.

    >>> Fp8().bits_per_value(64)
    8.25
    """

    name: ClassVar[str] = "fp8"
    front: ClassVar[FrontEnd] = FrontEnd()
    format: str = "e4m3"

    def __post_init__(self):
        if self.format not in ("e4m3", "e5m2"):
            raise ValueError(f"fp8 format {self.format!r} is not one of e4m3, e5m2")

    @property
    def fmt(self) -> str:
        return self.format
