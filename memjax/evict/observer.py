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
