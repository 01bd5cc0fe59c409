"""H2O: heavy hitters, the tokens that attention has looked at most (arXiv 2306.14048).

    score[j] = sum over all queries so far of softmax(q . k)[j]

The paper keeps heavy hitters and recent tokens half and half: ``h2o(512)+protect(0,256)``; here the windows are those of the
cache, four sinks and 64 recent tokens unless said otherwise. Early tokens have been seen by more queries; with
``normalised=true`` the score is divided by their number (kvpress' ObservedAttention).

Deviation: scores are the mean over the query heads that share a kv head; the paper's models have one query head per kv head. A
chunk of a prompt is scored with all its queries, 64 at a time, whose logits over the cache exist at that moment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from memjax.evict.evictor import Budgeted, Candidates
from memjax.evict.observer import EveryQuery


@dataclass(frozen=True)
class H2O(Budgeted):
    """Accumulated attention.

    >>> H2O(256).tokens(4096), H2O(fraction=0.25).tokens(4096)
    (256, 1024)
    """

    name: ClassVar[str] = "h2o"
    normalised: bool = False

    @property
    def observer(self) -> EveryQuery:
        return EveryQuery()

    def rank(self, tokens: Candidates) -> Float[Array, "B K S"]:
        if not self.normalised:
            return tokens.score
        seen = jnp.maximum(tokens.end[:, None, None] - tokens.pos, 1)
        return tokens.score / seen.astype(jnp.float32)

    def mass(self, tokens: Candidates) -> Float[Array, "B K S"]:
        return self.rank(tokens)
