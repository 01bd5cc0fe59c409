"""SnapKV: what the last queries of a prompt look at, pooled over neighbours (arXiv 2404.14469).

    score[j] = pool over |i - j| <= kernel / 2 of (mean over the last ``window`` queries of softmax(q . k)[i])

Reduced over the query heads that share a kv head *before* anything is chosen, so that the savings of grouped queries stay (the
original repeats keys first). Average pooling as in the paper, ``pool=max`` as in Ada-KV's code; it runs over the tokens that
are still held, by their distance in the text.

Deviations. The paper compresses once, when the prompt has been read, and lets the cache grow afterwards. Here every chunk is
followed by an eviction, with its last queries (give the whole prompt as one chunk for the paper's choice), and while decoding
scores are an exponential mean over the queries, of the same window, so that the budget holds for ever. Which tokens are
protected is the cache's windows' matter; the paper protects its observation window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from memjax.cache.spec import check_integers
from memjax.evict.evictor import Budgeted, Candidates
from memjax.evict.observer import LastQueries

POOLS = ("avg", "max")


@dataclass(frozen=True)
class SnapKV(Budgeted):
    """Attention of the last ``window`` queries, pooled.

    Raises:
      ValueError: as ``Budgeted``; an empty window, an even or empty kernel, another pooling.

    >>> SnapKV(256).observer.queries
    32
    """

    name: ClassVar[str] = "snapkv"
    window: int = 32
    kernel: int = 5
    pool: str = "avg"

    def __post_init__(self):
        super().__post_init__()
        check_integers(self.name, 1, window=self.window, kernel=self.kernel)
        if self.kernel % 2 == 0:
            raise ValueError(f"{self.name} pools over an odd number of neighbours, got kernel={self.kernel}")
        if self.pool not in POOLS:
            raise ValueError(f"{self.name} pool {self.pool!r} is not one of {', '.join(POOLS)}")

    @property
    def observer(self) -> LastQueries:
        return LastQueries(self.window)

    def rank(self, tokens: Candidates) -> Float[Array, "B K S"]:
        return pooled(tokens, self.kernel, self.pool)


def pooled(tokens: Candidates, kernel: int, pool: str) -> Float[Array, "B K S"]:
    """Scores pooled over the held tokens at a distance of at most ``kernel // 2`` in the text."""
    order = jnp.argsort(tokens.pos, axis=-1)
    pos, score = (jnp.take_along_axis(x, order, axis=-1) for x in (tokens.pos, tokens.score))
    found, reach = score, kernel // 2
    for step in range(1, reach + 1):
        for shift in (step, -step):
            near = jnp.abs(jnp.roll(pos, shift, axis=-1) - pos) <= reach
            near &= jnp.roll(pos, shift, axis=-1) >= 0
            neighbour = jnp.where(near, jnp.roll(score, shift, axis=-1), 0.0)
            found = jnp.maximum(found, neighbour) if pool == "max" else found + neighbour
    found = found if pool == "max" else found / kernel
    return jnp.take_along_axis(found, jnp.argsort(order, axis=-1), axis=-1)
