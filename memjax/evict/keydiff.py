"""KeyDiff: keys unlike the others stay (arXiv 2504.15364).

    score[j] = -cos(k_j, mean of k / |k|)

Needs no queries and no attention, so it works with every kernel. Keys are the rotated ones, per kv head, and the mean is that
of the candidates at hand: all their keys are read again, out of their codes, at every eviction, about as many bytes as
attention reads of them. The paper's block-wise prefill is chunks of the block's size, after each of which the cache is back
at its budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from memjax.evict.evictor import Budgeted, Candidates


@dataclass(frozen=True)
class KeyDiff(Budgeted):
    """Keeps the keys that point away from the mean direction.

    >>> KeyDiff(256).observer is None
    True
    """

    name: ClassVar[str] = "keydiff"
    scored: ClassVar[bool] = False

    def rank(self, tokens: Candidates) -> Float[Array, "B K S"]:
        k, held = tokens.keys(), (tokens.pos >= 0)[:, :, None]
        norm = jnp.linalg.norm(k, axis=-2, keepdims=True)
        unit = jnp.where(held & (norm > 0), k / jnp.where(norm > 0, norm, 1.0), 0.0)
        anchor = jnp.sum(unit, axis=-1, keepdims=True)
        length = jnp.linalg.norm(anchor, axis=-2)
        return -jnp.sum(unit * anchor, axis=-2) / jnp.where(length > 0, length, 1.0)
