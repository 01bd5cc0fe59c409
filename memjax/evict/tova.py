"""TOVA: token omission via attention, arXiv 2401.06104.

    score[j] = mean over all heads of the layer of softmax(q_last . k)[j]

Only the newest query counts, and all heads of a layer keep the same tokens. The paper has no sinks and no recent window, which
survive on merit; that is ``tova(256)+protect(0,0)``, while the cache's windows protect four and 64 tokens unless said
otherwise. In a chunk of a prompt the last query of the chunk decides, where the paper goes token by token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from memjax.evict.evictor import Budgeted, Candidates
from memjax.evict.observer import LastQueries


@dataclass(frozen=True)
class Tova(Budgeted):
    """The newest query's attention, the same for all heads.

    >>> Tova(256).observer
    LastQueries(queries=1, history=True)
    """

    name: ClassVar[str] = "tova"
    joint: ClassVar[bool] = True

    @property
    def observer(self) -> LastQueries:
        return LastQueries(1)

    def rank(self, tokens: Candidates) -> Float[Array, "B K S"]:
        mean = jnp.mean(tokens.score, axis=1, keepdims=True)
        return jnp.broadcast_to(mean, tokens.score.shape)
