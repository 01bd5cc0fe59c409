"""Whose attention counts: scores of cached tokens from the probabilities that chosen queries give them.

    score <- decay * score + sum over queries of weight * mean over the group's query heads of probability

The probabilities are those of the whole row, over everything that the query sees; scores are one per kv head, so that the
group of query heads that shares a cache decides together. A token's score begins with zero when it is staged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Observer(Protocol):
    """What ``attend`` needs to know to keep scores.

    Attributes:
      queries: how many of a step's last queries count; 0: all of them.
      history: whether tokens of the history are scored too, or only those not yet there.
    """

    queries: int
    history: bool

    def weights(self, index: Int[Array, "B M"], count: Int[Array, "B"]) -> tuple[Float[Array, "B"], Float[Array, "B M"]]:
        """How the old score decays in each row, and how much each query counts.

        Args:
          index: which of the step's tokens a query belongs to; negative: none.
          count: the step's real tokens.
        """
        ...


@dataclass(frozen=True)
class EveryQuery:
    """Sums over all queries that have seen a token, as H2O's and ZipCache's scores begin."""

    history: bool = True
    queries: int = 0

    def weights(self, index: Int[Array, "B M"], count: Int[Array, "B"]) -> tuple[Float[Array, "B"], Float[Array, "B M"]]:
        """Nothing decays, every real query counts once."""
        real = (index >= 0) & (index < count[:, None])
        return jnp.ones(count.shape, jnp.float32), real.astype(jnp.float32)


@dataclass(frozen=True)
class LastQueries:
    """Means over the last ``queries`` queries: exact for a chunk that has so many, exponential over shorter ones."""

    queries: int
    history: bool = True

    def weights(self, index: Int[Array, "B M"], count: Int[Array, "B"]) -> tuple[Float[Array, "B"], Float[Array, "B M"]]:
        """In a chunk of ``queries`` or more tokens nothing older counts."""
        real, whole = (index >= 0) & (index < count[:, None]), (count >= self.queries)[:, None]
        behind = (count[:, None] - 1 - index).astype(jnp.float32)  # queries between this one and the end
        keep = jnp.float32(1.0 - 1.0 / self.queries)
        falling = keep ** jnp.maximum(behind, 0.0)
        weights = jnp.where(real & (behind < self.queries), jnp.where(whole, 1.0, falling), 0.0) / self.queries
        decay = jnp.where(whole[:, 0], 0.0, keep ** count.astype(jnp.float32))
        return decay, weights
