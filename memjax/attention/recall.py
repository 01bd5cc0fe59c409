"""Attention of tokens that are only tried out: nothing is committed, and what they look at in the history is scored."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax.attention.attend import Reader, history_positions, looked_at, sink_positions, tail_positions
from memjax.cache.layer import LayerCache, staged_positions
from memjax.evict.rereading import Rereading, attention
from memjax.pallas_kernels.merge import merge
from memjax.pallas_kernels.slots import FREE, Span, positions


def recall(cache: LayerCache, q: Float[Array, "B T N H"]) -> Float[Array, "B T N Hv"]:
    """What staged tokens read, as ``attend`` gives it, but they need no slots: they will be forgotten."""
    batch, tokens, heads, _ = q.shape
    reader = Reader(cache, q, staged_positions(cache, tokens), True)
    parts = reader.recent_parts()
    if cache.history is not None:
        parts += reader.history_parts(parts)
    return merge(parts)[0].reshape(batch, heads, tokens, -1).swapaxes(1, 2).astype(q.dtype)


def recalled(
    cache: LayerCache, q: Float[Array, "B T N H"], begin: Int[Array, "B"], end: Int[Array, "B"], method: Rereading
) -> Float[Array, "B K G S"]:
    """The most attention that a staged token's queries, one head each, give to a slot of the history.

    The staged tokens reread positions ``begin <= p < end``; ``method`` says what the softmax runs over.
    """
    batch, tokens, heads, _ = q.shape
    at = staged_positions(cache, tokens)
    at = jnp.where(at - cache.length[:, None] < cache.staged_count[:, None], at, FREE)
    block = min(looked_at(cache, heads), tokens)
    padding = -tokens % block
    q, at = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0))), jnp.pad(at, ((0, 0), (0, padding)), constant_values=FREE)
    k_pos, others = positions(history_positions(cache), cache.history.slots), _recent_positions(cache)
    shape = (batch, cache.spec.kv_heads, heads // cache.spec.kv_heads)

    def most(best: Array, i: Array) -> tuple[Array, None]:
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, i * block, block, axis=1)  # noqa: E731
        reader = Reader(cache, cut(q), cut(at), False)
        reader.observe("xla")
        recent, history = reader.logits["recent"], reader.logits["history"]
        given = attention(method, history, k_pos, (recent, others), begin, end, cache.length)
        return jnp.maximum(best, jnp.max(given.reshape(*shape, block, -1), axis=3)), None

    nothing = jnp.zeros((*shape, cache.history.slots), jnp.float32)
    return jax.lax.scan(most, nothing, jnp.arange((tokens + padding) // block))[0]


def _recent_positions(cache: LayerCache) -> Int[Array, "B 1 R"]:
    """Of the slots whose logits come together: sinks, tail and staged tokens."""
    found = [positions(sink_positions(cache), cache.sinks.slots)] if cache.sinks is not None else []
    found += [tail_positions(cache)] if cache.tail is not None else []
    found.append(positions(Span(cache.length, cache.staged_count), cache.staged.slots))
    return jnp.concatenate(found, axis=-1)
