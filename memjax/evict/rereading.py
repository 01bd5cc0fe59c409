"""Evictors that look at a prompt twice: it is kept whole while it is read, read again, and compressed once.

    score[j] = over the query heads of a group (max over the queries of the second reading of softmax(q . k)[j])

Such a policy makes a cache that holds every token; ``memjax.generate.reread.compress`` then takes away what the second
reading did not need, outside ``jit``, for how many tokens each layer keeps may depend on the text. ``mj.generate`` does it by
itself between prompt and answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from memjax.cache.spec import CacheSpec
from memjax.evict.evictor import Limited


@dataclass(frozen=True)
class Rereading(Limited):
    """``budget`` tokens per kv head stay, on average over layers and heads; ``fraction`` is one of the longest prompt."""

    name: ClassVar[str] = "rereading"
    joint: ClassVar[bool] = True
    instruction: ClassVar[str] = ""  # said before each chunk of the second reading
    preceding: ClassVar[int] = 0  # tokens before a chunk that are read again with it

    def validate(self, spec: CacheSpec) -> None:
        """Raises ValueError for a latent stream."""
        if spec.latent_dim is not None:
            raise ValueError(
                f"{self.name} reads a prompt again through keys and values, and a latent stream is neither; use snapkv"
            )

    def check_recurrent(self) -> None:
        """Raises ValueError: the second reading goes through keys and values in all layers."""
        raise ValueError(
            f"{self.name} reads a prompt again through keys and values, and a recurrent layer has none; use snapkv"
        )

    def sees(
        self, pos: Int[Array, "B 1|K S"], begin: Int[Array, "B"], end: Int[Array, "B"], again: Int[Array, "B"]
    ) -> Bool[Array, "B 1|K S"]:
        """Positions that the softmax runs over, for queries that reread ``begin <= p < end`` from position ``again`` on."""
        del begin, end, again
        return jnp.ones(pos.shape, bool)

    def scores(self, attention: Float[Array, "B K G S"], pos: Int[Array, "S"]) -> Float[Array, "B K S"]:
        """What is compared, from the most attention that each query head has given to the tokens at ``pos``."""
        raise NotImplementedError

    def counts(
        self, scores: Sequence[Float[np.ndarray, "B K S"]], written: Int[np.ndarray, "L B"], budget: Int[np.ndarray, "L"]
    ) -> list[int] | list[Int[np.ndarray, "B K"]]:
        """How many tokens each layer keeps per head, or each of its heads in each row, as ``evict`` takes it.

        Args:
          scores, written, budget: of the layers that share a budget; how many tokens of each row have a score there, and how
            many of them stay per head where layers and heads are treated alike.
        """
        del scores, written
        return budget.tolist()


def attention(
    method: Rereading,
    logits: Float[Array, "B K M S"],
    pos: Int[Array, "B 1|K S"],
    others: tuple[Float[Array, "B K M R"], Int[Array, "B 1|K R"]],
    begin: Int[Array, "B"],
    end: Int[Array, "B"],
    again: Int[Array, "B"],
) -> Float[Array, "B K M S"]:
    """Attention of the rows to each slot.

    Args:
      logits, pos: of the slots that are scored, masked, and their positions.
      others: of slots that are not scored.
      begin, end, again: see ``Rereading.sees``.
    """

    def seen(logits: Array, pos: Array) -> Array:
        chosen = method.sees(pos, *(x[:, None, None] for x in (begin, end, again)))
        return jnp.where(chosen[:, :, None], logits, -jnp.inf)

    mine, theirs = seen(logits, pos), seen(*others)
    lse = jnp.logaddexp(jax.nn.logsumexp(mine, axis=-1), jax.nn.logsumexp(theirs, axis=-1))
    return jnp.exp(mine - jnp.where(lse > -1e29, lse, jnp.inf)[..., None])  # a row of nothing: masked, all of it


def composite_counts(composite: Float[np.ndarray, "L S"], total: int) -> list[int]:
    """How many of the ``total`` best entries each row has, each row being sorted; none goes empty.

    >>> composite_counts(np.array([[9.0, 4.0, 1.0], [5.0, 2.0, 0.0]]), 4)
    [2, 2]
    """
    return np.maximum(best_counts(composite, total), 1).tolist()


def best_counts(rows: Sequence[Float[np.ndarray, "..."]], total: int) -> Int[np.ndarray, "R"]:
    """How many of the ``total`` best entries of all rows, which may differ in shape, each has; of equal ones the first count.

    >>> best_counts([np.array([9.0, 4.0, 1.0]), np.array([5.0, 2.0])], 3)
    array([2, 1])
    """
    best = np.argsort(-np.concatenate([row.ravel() for row in rows]), kind="stable")[:total]
    return np.bincount(np.repeat(np.arange(len(rows)), [row.size for row in rows])[best], minlength=len(rows))
