"""Knorm: small keys stay, for they get much attention (L2 norm of the keys, arXiv 2406.11430).

    score[j] = -|k_j|

Needs no queries and no attention, so it works with every kernel. A token is scored once, by its exact key, when it leaves the
protected tail.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from memjax.evict.evictor import Budgeted


@dataclass(frozen=True)
class Knorm(Budgeted):
    """Keeps the smallest keys.

    >>> Knorm(256).first_score(jnp.ones((1, 1, 4, 2)), None)
    Array([[[-2., -2.]]], dtype=float32)
    """

    name: ClassVar[str] = "knorm"

    def first_score(self, k: Float[Array, "B K H T"], v: Float[Array, "B K H T"] | None) -> Float[Array, "B K T"]:
        del v
        return -jnp.linalg.norm(k.astype(jnp.float32), axis=-2)
