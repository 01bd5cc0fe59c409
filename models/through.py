"""The way of new tokens through a layer's cache, the same for all kinds of attention."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from memjax.attention.attend import attend
from memjax.cache.layer import LayerCache, commit, update
from memjax.cache.pools import HeadPools

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
