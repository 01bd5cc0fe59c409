"""PyramidKV: more tokens in the first layers, fewer in the last (arXiv 2406.02069).

    budget[l] = protected + first - (first - last) l / (layers - 1),   last = C / beta,   first = 2 C - C / beta

with C the mean number of candidates per layer, the budget less the protected tokens, which every layer keeps. Which of them
stay is SnapKV's choice. The paper's clamp for prompts shorter than a layer's budget is the cache's capacity: what a layer
cannot fill is not given to others.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Self

from memjax.cache.spec import check_integers
from memjax.evict.snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV with more tokens in the first layers and fewer in the last; ``budget`` is the mean over layers.

    Args:
      beta: how many times fewer candidates than the mean the last layer keeps.

    >>> [PyramidKV(1000, beta=10).for_layer(i, 3, 0).budget for i in range(3)]
    [1900, 1000, 100]
    """

    name: ClassVar[str] = "pyramidkv"
    beta: int = 20

    def __post_init__(self):
        super().__post_init__()
        check_integers(self.name, 1, beta=self.beta)
        if self.fraction:
            raise ValueError(f"{self.name} shares out a budget in tokens or bytes, got fraction={self.fraction}")

    def for_layer(self, index: int, layers: int, protected: int) -> Self:
        if layers == 1 or self.bytes:
            return self
        mean = self.budget - protected
        last = mean / self.beta
        first = 2 * mean - last
        share = first - (first - last) * index / (layers - 1)
        return dataclasses.replace(self, budget=protected + round(share))
