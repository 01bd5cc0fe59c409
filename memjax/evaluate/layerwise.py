"""A model read layer by layer: a program per kind of layer instead of one for the whole model.

Layers that look alike, with caches that look alike, share one compiled program, so an evaluation of many policies that each
read a few chunks does not spend its time compiling. A loop that runs for long is better off with one program.
"""

from __future__ import annotations

import functools

import jax
from jaxtyping import Array, Float, Int

from memjax.cache.layer import LayerCache, commit
from memjax.cache.policy import ModelCache
from memjax.models.decoder import Decoder, Layer


def read_layers(
    decoder: Decoder, cache: ModelCache, tokens: Int[Array, "B T"], lengths: Int[Array, "B"] | None = None
) -> tuple[Float[Array, "B T D"], ModelCache]:
    """What ``decoder(tokens, cache, lengths)`` returns; the caches are donated."""
    x, caches = _embed(decoder.embedding, tokens), []
    for layer, one in zip(decoder.layers, cache, strict=True):
        x, one = _next(layer, x, one, lengths)
        caches.append(one)
    return _norm(decoder.norm, x), tuple(caches)


@jax.jit
def _embed(embedding, tokens: Array) -> Array:
    return embedding(tokens)


@jax.jit
def _norm(norm, x: Array) -> Array:
    return norm(x)


@functools.partial(jax.jit, donate_argnums=2)
def _next(layer: Layer, x: Array, cache: LayerCache, lengths: Array | None) -> tuple[Array, LayerCache]:
    x, cache = layer(x, cache, lengths, False)
    return x, commit(cache)
