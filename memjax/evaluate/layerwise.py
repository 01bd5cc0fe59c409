"""A model read layer by layer: a program per kind of layer instead of one for the whole model.

Layers that look alike, with caches that look alike, share one compiled program, so an evaluation of many policies that each
read a few chunks does not spend its time compiling. A loop that runs for long is better off with one program.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from memjax.cache.layer import LayerCache, commit
from memjax.cache.policy import ModelCache
from memjax.models.decoder import Decoder, Layer
from memjax.models.load import LanguageModel


def read_layers(
    decoder: Decoder,
    cache: ModelCache,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"] | None = None,
    compress_first: bool = False,
) -> tuple[Float[Array, "B T D"], ModelCache]:
    """What ``decoder(tokens, cache, lengths, compress_first=...)`` returns; the caches are donated."""
    x, caches = _embed(decoder, tokens), []
    for layer, one in zip(decoder.layers, cache, strict=True):
        x, one = _next(layer, x, one, lengths, compress_first)
        caches.append(one)
    return _norm(decoder.norm, x), tuple(caches)


def answer(
    model: LanguageModel, cache: ModelCache, prompts: Int[np.ndarray, "B T"], chunk: int, new: int
) -> Int[np.ndarray, "B n"]:
    """What greedy decoding says after prompts of one length, read in chunks.

    Raises:
      FloatingPointError: a logit is NaN.
    """
    decoder, logits = model.decoder, None
    for start in range(0, prompts.shape[1], chunk):
        piece = prompts[:, start : start + chunk]
        count, width = piece.shape[1], min(chunk, prompts.shape[1])
        tokens = jnp.asarray(np.pad(piece, ((0, 0), (0, width - count))), jnp.int32)
        hidden, cache = read_layers(decoder, cache, tokens, jnp.full((len(prompts),), count, jnp.int32))
        logits = _logits(decoder, hidden[:, count - 1])
    said = []
    for i in range(new):
        if not np.isfinite(np.asarray(logits)).all():
            raise FloatingPointError(f"{cache[0].policy} gave NaN at token {prompts.shape[1] + i}; try another policy")
        said.append(jnp.argmax(logits, axis=-1).astype(jnp.int32))
        if i + 1 < new:
            hidden, cache = read_layers(decoder, cache, said[-1][:, None])
            logits = _logits(decoder, hidden[:, 0])
    return np.stack([np.asarray(token) for token in said], axis=1)


@jax.jit
def _logits(decoder: Decoder, hidden: Array) -> Array:
    return decoder.logits(hidden)


@jax.jit
def next_hidden(layer: Layer, x: Float[Array, "R T D"]) -> Float[Array, "R T D"]:
    """What a layer makes of texts of their own, without a cache."""
    return layer(x, None, None, False)[0]


@jax.jit
def _embed(decoder: Decoder, tokens: Array) -> Array:
    return decoder.embed(tokens)


@jax.jit
def _norm(norm, x: Array) -> Array:
    return norm(x)


@functools.partial(jax.jit, donate_argnums=2, static_argnums=4)
def _next(layer: Layer, x: Array, cache: LayerCache, lengths: Array | None, compress_first: bool) -> tuple[Array, LayerCache]:
    x, cache = layer(x, cache, lengths, compress_first)
    return x, commit(cache)
