"""Measures a model's sensitivity file: what coding one layer's keys, or its values, does to the next-token distributions.

The hidden states of the uncompressed run are kept at every layer. Layer i then reads its own through a cache with one stream
coded, in the static setting (every token but the sinks is coded before it is read), once for each stream and number of bits;
the results go through the layers behind it as one batch. So a program is compiled per codec, not per run, and half of the work
is shared. Heads do not see each other before the output projection: to code one head alone is to take what its queries read
from the coded run, and what the others read from the uncompressed one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from memjax.cache.policy import CachePolicy, Windows
from memjax.cache.spec import CacheSpec
from memjax.evaluate.calibrate import SINKS
from memjax.evaluate.compare import kl_divergence
from memjax.evaluate.layerwise import next_hidden
from memjax.models.config import check_attention
from memjax.models.decoder import Decoder, Layer
from memjax.models.load import LanguageModel
from memjax.models.through import through_cache
from memjax.quantize import Dense
from memjax.quantize.auto import Pair, stream_codec
from memjax.quantize.sensitivity import OPTIONS, Sensitivity


def measure_sensitivity(
    model: LanguageModel,
    texts: Sequence[Sequence[int]],
    bits: Sequence[int] = OPTIONS,
    progress: Callable[[str], None] | None = None,
    by_head: bool = False,
) -> Sensitivity:
    """The table of a model; ``save_sensitivity`` writes it.

    Args:
      texts: token ids of one or more texts; a mix of kinds serves unknown prompts better than one kind.
      bits: the numbers of bits to try, ascending.
      progress: called with each layer of each text that is done.
      by_head: code one kv head at a time instead of all of a layer's, which takes so many times as long.

    Raises:
      ValueError: no text of more than a few tokens, or one longer than a layer's sliding window: in the static setting its
        first tokens would be gone before they are read.
      FloatingPointError: activations that are not finite.
    """
    lengths = [len(text) for text in texts]
    check_attention(model.config, "sensitivity")
    if not texts or min(lengths) < 2 * SINKS:
        raise ValueError(f"sensitivity needs texts of at least {2 * SINKS} tokens, got {lengths}")
    window = min((spec.window for spec in model.decoder.cache_specs(1, 1) if spec.window), default=max(lengths))
    if max(lengths) > window:
        raise ValueError(f"sensitivity needs texts within the model's sliding window of {window} tokens, got {lengths}")
    found = [_divergences(model.decoder, text, tuple(bits), by_head, progress) for text in texts]
    mean = np.maximum(np.concatenate(found, axis=-1).mean(axis=-1), 0.0)  # rounding can leave the least of them below zero
    return Sensitivity(model.fingerprint, sum(lengths), tuple(bits), *np.moveaxis(mean, 1, 0))


def _divergences(
    decoder: Decoder,
    text: Sequence[int],
    bits: tuple[int, ...],
    by_head: bool,
    progress: Callable[[str], None] | None,
) -> Float[np.ndarray, "L 2 K O T"]:
    """KL divergence of every token where one layer's keys (0) or values (1) are coded, of one kv head or (K = 1) of all."""
    specs = decoder.cache_specs(1, len(text), "float32")
    states = [decoder.embed(np.asarray(text, np.int32)[None])]
    for layer in decoder.layers:
        states.append(next_hidden(layer, states[-1]))
    wanted = _logits(decoder, states[-1][0])
    found = []
    for i, (layer, spec) in enumerate(zip(decoder.layers, specs, strict=True)):
        dense = _read(layer, states[i], CachePolicy(), spec)
        coded = [_read(layer, states[i], policy, spec) for policy in _policies(bits)]
        x = jnp.concatenate([_with_heads(layer, states[i], dense, each, spec.kv_heads if by_head else 1) for each in coded])
        for later in decoder.layers[i + 1 :]:
            x = next_hidden(later, x)
        rows = np.asarray(_divergence(decoder, wanted, x), np.float64)
        if not np.isfinite(rows).all():
            raise FloatingPointError(f"coding layer {i} gave NaN: look for NaN in the model's activations")
        found.append(rows.reshape(2, len(bits), -1, rows.shape[-1]).swapaxes(1, 2))
        if progress is not None:
            progress(f"layer {i + 1} of {len(specs)}")
    return np.stack(found)


def _policies(bits: tuple[int, ...]) -> list[CachePolicy]:
    coded = [stream_codec(b) for b in bits]
    pairs = [Pair(codec, Dense()) for codec in coded] + [Pair(Dense(), codec) for codec in coded]
    return [CachePolicy(codec=pair, windows=Windows(SINKS, 0)) for pair in pairs]


@functools.partial(jax.jit, static_argnames=("policy", "spec"))
def _read(layer: Layer, x: Float[Array, "1 T D"], policy: CachePolicy, spec: CacheSpec) -> Float[Array, "1 T N H"]:
    """What the layer's queries read from a cache."""
    mixer = layer.mixer
    q, k, v = mixer.project(layer.mixer_norm(x))
    projection = mixer.out.kernel[...].reshape(q.shape[2], q.shape[3], -1)
    return through_cache(policy.init(spec), q, k, v, None, True, projection)[0]


@functools.partial(jax.jit, static_argnames="parts")
def _with_heads(layer: Layer, x: Array, dense: Array, coded: Array, parts: int) -> Float[Array, "P T D"]:
    """What the layer makes of ``x`` where one of ``parts`` equal runs of query heads has read codes."""
    run = jnp.arange(dense.shape[2]) // (dense.shape[2] // parts)
    chosen = run == jnp.arange(parts)[:, None]
    read = jnp.where(chosen[:, None, :, None], coded, dense)
    mixed = layer.mixer.out(read.reshape(*read.shape[:2], -1))
    return layer.with_mlp(layer.with_mixed(x, mixed))


@jax.jit
def _logits(decoder: Decoder, x: Float[Array, "T D"]) -> Float[Array, "T V"]:
    return decoder.logits(decoder.norm(x))


@jax.jit
def _divergence(decoder: Decoder, wanted: Float[Array, "T V"], x: Float[Array, "R T D"]) -> Float[Array, "R T"]:
    """One row at a time, for logits are large."""
    return jax.lax.map(lambda row: kl_divergence(wanted, _logits(decoder, row)), x)
