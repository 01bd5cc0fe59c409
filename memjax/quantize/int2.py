"""int2: token-wise symmetric 2-bit codes, plain or after a signed-Hadamard rotation.

    scale = max|x| / 3,   level = the nearest of -3, -1, 1, 3 to x / scale        per token and kv head

H/4 + 2 bytes per vector: 2.25 bits per value at head_dim 64, 2.125 at 128. A baseline: the largest value of a vector sets
the grid of all, which at two bits leaves most values far from a level. On Gaussian vectors of 128 values the relative
squared error is 0.31 where TurboQuant's 2 bits, of the same size, leave 0.12.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from memjax.quantize.codec import Codec
from memjax.quantize.front import FrontEnd


@dataclass(frozen=True)
class Int2(Codec):
    """Token-wise int2; ``rotate`` spreads outlier channels first.

    >>> Int2(rotate=True).bits_per_value(128)
    2.125
    """

    name: ClassVar[str] = "int2"
    front: ClassVar[FrontEnd] = FrontEnd()
