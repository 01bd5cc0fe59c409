"""KVCompose: layers share one budget, heads choose for themselves (arXiv 2509.05165).

    s[k, j] = mean over the query heads of group k of (max over the queries i of the second reading of softmax(q_i . k)[j])
    s[k, j] <- s[k, j] + mean over the heads of the layer of s[:, j]
    c[l, n] = mean over heads of the n-th largest score of layer l          the n-th composite token

The best composite tokens of all layers together stay: each layer keeps as many tokens per head as it has among them, each
head its own best ones, so that a layer's arrays stay rectangular. The first layer's composite scores are the largest of all
layers', so that it keeps most. Queries are those of the context read once more behind itself.

Deviations: a context of more than 2,048 tokens is read again in chunks, each behind the whole context but not behind the
chunks before it. In a batch the composite scores are the mean over its rows, which keep equally many. Protected tokens, the
cache's sinks and tail, stay in every layer and count into the budget; a layer keeps at least one other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from memjax.evict.rereading import Rereading, composite_counts


@dataclass(frozen=True)
class KVCompose(Rereading):
    """Budgets per layer by composite scores; ``budget`` is the mean over layers."""

    name: ClassVar[str] = "kvcompose"

    def scores(self, attention: Float[Array, "B K G S"], pos: Int[Array, "S"]) -> Float[Array, "B K S"]:
        del pos
        own = jnp.mean(attention, axis=2)
        return own + jnp.mean(own, axis=1, keepdims=True)

    def counts(
        self, scores: Sequence[Float[np.ndarray, "B K S"]], written: Int[np.ndarray, "L B"], budget: Int[np.ndarray, "L"]
    ) -> list[int]:
        composite = np.zeros((len(scores), written.max()))
        for row, score, count in zip(composite, scores, written.max(axis=1), strict=True):
            row[:count] = -np.sort(-score, axis=-1).mean((0, 1))[:count]
        composite[0] = composite.max(axis=0)
        return composite_counts(composite, int(budget.sum()))
