"""int8: token-wise symmetric 8-bit codes, the baseline that every smaller cache is measured against.

    scale = max|x| / 127,   code = round(x / scale)        per token and kv head

H + 2 bytes per vector: 8.25 bits per value at head_dim 64, 8.125 at 128.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from memjax.quantize.codec import Codec
from memjax.quantize.front import FrontEnd


@dataclass(frozen=True)
class Int8(Codec):
    """Token-wise int8, optionally after a signed-Hadamard rotation.

    >>> Int8().bits_per_value(64)
    8.25
    """

    name: ClassVar[str] = "int8"
    front: ClassVar[FrontEnd] = FrontEnd()
