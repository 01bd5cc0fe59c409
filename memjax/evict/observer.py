"""Whose attention counts: scores of cached tokens from what chosen queries see in them.

    score <- decay * score + sum over queries of weight * mean over the group's query heads of what is seen

What is seen is the probability, of the whole row, over everything that the query sees, unless an observer looks at something
else. Scores are one per kv head, so that the group of query heads that shares a cache decides together. A token's score begins
with zero when it is staged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax.pallas_kernels.merge import probability_mass


class Look(NamedTuple):
    """What the observer's queries, M rows per kv head, see in some slots of a cache.

    Attributes:
      logits: masked: -1e30 or less where a row sees nothing.
      lse: log-sum-exp of each row over all slots, not only these.
      weights: how much each row counts.
      out: the rows' outputs.
      values: gives the values in the slots, float32, as attention reads them.
    """

    logits: Float[Array, "B K M S"]
    lse: Float[Array, "B K M"]
    weights: Float[Array, "B M"]
    out: Float[Array, "B K M Hv"]
    values: Callable[[], Float[Array, "B K Hv S"]]


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

    def score(self, look: Look) -> Float[Array, "B K S"]:
        """What the queries add to the scores of slots: their probabilities."""
        return probability_mass(look.logits, look.lse, look.weights)


@dataclass(frozen=True)
class EveryQuery(Observer):
    """Sums over all queries that have seen a token, as H2O's and ZipCache's scores begin."""

    history: bool = True
    queries: int = 0

    def weights(self, index: Int[Array, "B M"], count: Int[Array, "B"]) -> tuple[Float[Array, "B"], Float[Array, "B M"]]:
        """Nothing decays, every real query counts once."""
        real = (index >= 0) & (index < count[:, None])
        return jnp.ones(count.shape, jnp.float32), real.astype(jnp.float32)


@dataclass(frozen=True)
class LastQueries(Observer):
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
