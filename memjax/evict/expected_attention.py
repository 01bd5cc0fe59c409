"""Expected Attention: the attention that queries still to come will give, if they are like those so far (arXiv 2510.00636).

    q ~ N(mu, Sigma)  before the rotary embedding, R = its mean matrix over the next ``horizon`` positions
    z_j     = scale k_j . R mu + scale^2 / 2  k_j^T R Sigma R^T k_j                             log E exp(scale q . k_j)
    score_j = (mean over the group of softmax(z)_j + epsilon) |v_j|

mu and Sigma are the mean and the covariance of each query head, over all queries so far but those of the first four tokens,
which look at nothing like the others. So no query has to be seen twice, no attention is asked for its probabilities, and every
kernel serves.

State: float32 mean [B, N, H] and sum of squares about it [B, N, H, H]: 2 MiB per row and layer for 32 heads of 128 channels,
whatever the length; updated by a chunk's own moments (Chan, Golub, LeVeque), which does not lose the covariance beside a large
mean. |v_j| is kept per slot, from exact values.

Deviations. The paper compresses once, when the prompt has been read, with the queries of the prompt. Here every eviction
judges all candidates with all queries so far, those of decode steps too, for positions that begin at the end of the text. Keys
are read out of their codes for that, and the quadratic form costs N S H^2 multiplications, in decode steps as well: it suits
long chunks better than many single tokens. The softmax runs over the candidates; sinks and the recent tokens, which stay
anyhow, are not among them. A softcap is not in z. What ``massfold`` merges counts as its key does, without the bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from memjax.attention.rope import Rope, apply_rope
from memjax.cache.spec import CacheSpec, check_integers
from memjax.evict.evictor import Budgeted, Candidates

SKIPPED = 4  # first tokens of a text, whose queries do not count
_HIGHEST = jax.lax.Precision.HIGHEST


class Moments(NamedTuple):
    """Of queries before the rotary embedding: how many, their mean, and the sum of their outer products about it."""

    count: Float[Array, "B"]
    mean: Float[Array, "B N H"]
    spread: Float[Array, "B N H H"]


def no_moments(spec: CacheSpec) -> Moments:
    """Nothing observed yet."""
    mean = jnp.zeros((spec.batch, spec.q_heads, spec.head_dim), jnp.float32)
    return Moments(jnp.zeros((spec.batch,), jnp.float32), mean, jnp.zeros((*mean.shape, spec.head_dim), jnp.float32))


def add_queries(moments: Moments, q: Float[Array, "B T N H"], real: Bool[Array, "B T"]) -> Moments:
    """With more queries, of which some may not count."""
    weight = real.astype(jnp.float32)[:, :, None, None]
    q, added = q.astype(jnp.float32), jnp.sum(weight, axis=(1, 2, 3))
    mean = jnp.sum(jnp.where(weight > 0, q, 0.0), axis=1) / jnp.maximum(added, 1.0)[:, None, None]
    about = jnp.where(weight > 0, q - mean[:, None], 0.0)
    spread = jnp.einsum("btnh,btng->bnhg", about, about, precision=_HIGHEST)
    count = moments.count + added
    share = (added / jnp.maximum(count, 1.0))[:, None, None]
    step = mean - moments.mean
    between = (moments.count[:, None, None] * share)[..., None] * step[..., :, None] * step[..., None, :]
    return Moments(count, moments.mean + share * step, moments.spread + spread + between)


def mean_rotation(spec: CacheSpec, first: Int[Array, "B"], horizon: int) -> Float[Array, "B H H"]:
    """The rotary embedding's matrix, mean over ``horizon`` positions from ``first`` on; it acts on columns."""
    eye = jnp.eye(spec.head_dim, dtype=jnp.float32)
    if not isinstance(spec.rope, Rope):
        return jnp.broadcast_to(eye, (first.shape[0], *eye.shape))
    a, b = spec.rope.pairs
    probe = jnp.zeros((first.shape[0], horizon, 1, spec.head_dim), jnp.float32).at[..., a].set(1.0)
    positions = first[:, None] + jnp.arange(horizon, dtype=jnp.int32)
    turned = jnp.mean(apply_rope(probe, positions, spec.rope, spec.capacity), axis=(1, 2))
    cos, sin = turned[:, a], turned[:, b]
    turn = jnp.broadcast_to(eye, (first.shape[0], *eye.shape))
    return turn.at[:, a, a].set(cos).at[:, b, b].set(cos).at[:, a, b].set(-sin).at[:, b, a].set(sin)


def expected_logits(
    moments: Moments, keys: Float[Array, "B K H S"], rotation: Float[Array, "B H H"], scale: float
) -> Float[Array, "B K G S"]:
    """log E exp(scale q . k) over the queries that ``moments`` describe, rotated, for each query head of a kv head."""
    batch, heads = keys.shape[:2]
    covariance = moments.spread / jnp.maximum(moments.count, 1.0)[:, None, None, None]
    mean = jnp.einsum("bij,bnj->bni", rotation, moments.mean, precision=_HIGHEST)
    covariance = jnp.einsum("bij,bnjk,blk->bnil", rotation, covariance, rotation, precision=_HIGHEST)
    by_group = lambda x: jnp.moveaxis(x.reshape(batch, heads, -1, *x.shape[2:]), 2, 0)  # noqa: E731

    def of_head(gaussian: tuple[Array, Array]) -> Float[Array, "B K S"]:
        mean, covariance = gaussian
        linear = jnp.einsum("bkh,bkhs->bks", mean, keys, precision=_HIGHEST)
        turned = jnp.einsum("bkhg,bkgs->bkhs", covariance, keys, precision=_HIGHEST)
        return scale * linear + 0.5 * scale**2 * jnp.sum(keys * turned, axis=2)

    # One head of the group at a time: a covariance times all keys is as large as the keys.
    return jnp.moveaxis(jax.lax.map(of_head, (by_group(mean), by_group(covariance))), 0, 2)


@dataclass(frozen=True)
class ExpectedAttention(Budgeted):
    """Expected attention of future queries, times the size of the value.

    Args:
      horizon: positions over which future queries are spread.
      epsilon: added to the attention, so that a large value counts even where little attention is expected.

    Raises:
      ValueError: as ``Budgeted``; no horizon, or a negative epsilon.

    >>> ExpectedAttention(256).horizon
    512
    """

    name: ClassVar[str] = "expected_attention"
    studies_queries: ClassVar[bool] = True

    horizon: int = 512
    epsilon: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_integers(self.name, 1, horizon=self.horizon)
        if not self.epsilon >= 0.0:
            raise ValueError(f"{self.name} adds an epsilon of at least 0 to the attention, got {self.epsilon}")

    def validate(self, spec: CacheSpec) -> None:
        if spec.q_heads is None:
            raise ValueError(f"{self.name} keeps moments of every query head: make the spec with CacheSpec(q_heads=...)")
        if spec.rope == "applied":
            raise ValueError(
                f"{self.name} needs queries before the rotary embedding: CacheSpec(rope=Rope(...)) and queries and keys that "
                "are not rotated yet"
            )
        if spec.latent_dim is not None:
            raise ValueError(f"{self.name} needs whole keys, but the rotary part of a latent stream is kept apart; use h2o")

    def first_score(self, k: Float[Array, "B K H T"], v: Float[Array, "B K H T"] | None) -> Float[Array, "B K T"]:
        del k
        return jnp.linalg.norm(v.astype(jnp.float32), axis=-2)

    def rank(self, tokens: Candidates) -> Float[Array, "B K S"]:
        logits = jnp.where((tokens.pos >= 0)[:, :, None], tokens.expected(self.horizon), -jnp.inf)
        attention = jnp.mean(jax.nn.softmax(logits, axis=-1), axis=2)
        return (attention + self.epsilon) * tokens.score
