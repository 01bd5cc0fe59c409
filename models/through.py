"""The way of new tokens through a layer's cache, the same for all kinds of attention."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax.attention.attend import attend
from memjax.cache.layer import LayerCache, commit, update
from memjax.cache.pools import HeadPools
from memjax.pallas_kernels.codes import dense
from memjax.pallas_kernels.decode import decode
from memjax.pallas_kernels.merge import Part
from memjax.pallas_kernels.slots import Span

STAGED_IN_ALL_LAYERS = 16  # new tokens up to which layers wait for each other, to encode theirs together


def through_cache(
    cache: LayerCache | HeadPools,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"] | None,
    lengths: Int[Array, "B"] | None,
    compress_first: bool,
    output_projection: Float[Array, "N H D"] | None = None,
) -> tuple[Float[Array, "B T N Hv"], LayerCache | HeadPools]:
    """Takes new tokens in and reads the cache with their queries.

    Args:
      q, k, v, lengths, output_projection: as for ``update``.
      compress_first: commit the tokens before they are read; those whose attention gives scores are then read twice.

    Returns:
      What the queries read, and the cache. Up to ``STAGED_IN_ALL_LAYERS`` tokens stay staged in it, for ``commit_all``.
    """
    cache = update(cache, k, v, lengths, queries=q, output_projection=output_projection)
    if compress_first:
        cache = commit(attend(cache, q)[1] if cache.observed else cache)
    out, cache = attend(cache, q)
    return out, cache if q.shape[1] <= STAGED_IN_ALL_LAYERS else commit(cache)


def read_new(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    positions: Int[Array, "B T"],
    lengths: Int[Array, "B"] | None = None,
    **options,
) -> Part:
    """What new tokens read from each other, causally, in memory bounded by blocks of keys.

    Args:
      q, k: rotated already.
      positions: where the tokens stand in the text, one behind the other.
      lengths: how many of each row are real; None: all.
      options: scale, window, softcap, recent and sinks, as for ``decode``.

    Returns:
      Outputs [B, T, N, Hv], float32, and the log-sum-exp of the scores [B, T, N].
    """
    batch, tokens, heads, dim = q.shape
    groups = heads // k.shape[2]
    out, lse = decode(
        q.swapaxes(1, 2).reshape(batch, -1, groups * tokens, dim),
        dense(jnp.moveaxis(k, 1, -1)),
        dense(jnp.moveaxis(v, 1, -1)),
        q_pos=jnp.tile(positions, (1, groups)),
        k_pos=Span(positions[:, 0], jnp.full((batch,), tokens, jnp.int32) if lengths is None else lengths),
        implementation="xla",
        **options,
    )
    return out.reshape(batch, heads, tokens, -1).swapaxes(1, 2), lse.reshape(batch, heads, tokens).swapaxes(1, 2)


def first_positions(x: Float[Array, "B T ..."]) -> Int[Array, "B T"]:
    """Positions of tokens that begin a text."""
    return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
