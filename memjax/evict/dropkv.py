"""DropKV: how much outputs would change without a token (a method of kvpress, without a paper).

    o_i without j = o_i + p_ij / (1 - p_ij) (o_i - v_j)                                                        exactly
    score[j] = pool over neighbours of sum over the last ``window`` queries i of r_ij^2 |v_j - o_i|^2,   r = p / (1 - p + 1e-6)

with p the probability that query i gives to token j and o_i its output; the mean over the query heads of a group, average
pooling as in SnapKV, over 7 tokens. Scores are in units of outputs, so they compare across heads.

The square is expanded, |v_j|^2 - 2 v_j . o_i + |o_i|^2, so that one number per query and slot exists and no vector does. Where
p comes near 1 the output is nearly the value and the terms cancel, just where r is large; but a query gives more than 1/2 to
one token at most, so for that one the difference itself is taken.

Deviations: those of SnapKV, whose protection, chunks and exponential mean while decoding these are. Values and outputs are
those that attention reads, out of their codes; under a codec every observed step decodes the values of the history.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from memjax.evict.evictor import Candidates
from memjax.evict.observer import LastQueries, Look
from memjax.evict.snapkv import SnapKV

_LEAST = 1e-6  # of the probability that other tokens get


@dataclass(frozen=True)
class LeaveOneOut(LastQueries):
    """Looks at how outputs change when a token goes."""

    def score(self, look: Look) -> Float[Array, "B K S"]:
        probability = jnp.exp(look.logits - jnp.where(jnp.isfinite(look.lse), look.lse, 0.0)[..., None])
        ratio = probability / (1.0 - probability + _LEAST)
        change = jnp.square(ratio) * _squared_distance(look.values(), look.out, probability)
        return jnp.einsum("bkms,bm->bks", change, look.weights, precision=jax.lax.Precision.HIGHEST)


def _squared_distance(
    v: Float[Array, "B K Hv S"], out: Float[Array, "B K M Hv"], probability: Float[Array, "B K M S"]
) -> Float[Array, "B K M S"]:
    """|v - out|^2, exact to rounding for the token that gets most of a row."""
    product = jnp.einsum("bkmh,bkhs->bkms", out, v, precision=jax.lax.Precision.HIGHEST)
    square = jnp.sum(jnp.square(v), axis=2)[:, :, None] - 2.0 * product + jnp.sum(jnp.square(out), axis=-1)[..., None]
    most = jnp.argmax(probability, axis=-1)
    difference = jnp.take_along_axis(v, most[:, :, None], axis=-1).swapaxes(-1, -2) - out
    return jnp.where(probability > 0.5, jnp.sum(jnp.square(difference), axis=-1)[..., None], jnp.maximum(square, 0.0))


@dataclass(frozen=True)
class DropKV(SnapKV):
    """Tokens stay whose absence would change the last outputs most.

    >>> DropKV(256).observer
    LeaveOneOut(queries=32, history=True)
    """

    name: ClassVar[str] = "dropkv"
    kernel: int = 7

    @property
    def observer(self) -> LeaveOneOut:
        return LeaveOneOut(self.window)

    def mass(self, tokens: Candidates) -> None:
        del tokens  # the score is no attention
