"""Measures a model's sensitivity file: what coding one layer's keys, or its values, does to the next-token distributions.

The hidden states of the uncompressed run are kept at every layer. Layer i then reads its own through a cache with one stream
coded, in the static setting (every token but the sinks is coded before it is read), once for each stream and number of bits;
the results go through the layers behind it as one batch. So a program is compiled per codec, not per run, and half of the work
is shared.
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
from memjax.evaluate.layerwise import next_hidden
from memjax.models.config import check_attention
from memjax.models.decoder import Decoder, Layer
from memjax.models.load import LanguageModel
from memjax.quantize import Dense
from memjax.quantize.auto import Pair, stream_codec
from memjax.quantize.sensitivity import OPTIONS, Sensitivity


def measure_sensitivity(
    model: LanguageModel,
    texts: Sequence[Sequence[int]],
    bits: Sequence[int] = OPTIONS,
    progress: Callable[[str], None] | None = None,
) -> Sensitivity:
    """The table of a model; ``save_sensitivity`` writes it.

    Args:
      texts: token ids of one or more texts; a mix of kinds serves unknown prompts better than one kind.
      bits: the numbers of bits to try, ascending.
      progress: called with each layer of each text that is done.

    Raises:
      ValueError: no text of more than a few tokens, or one longer than a layer's sliding window: in the static setting its
        first tokens would be gone before they are read.
      FloatingPointError: activations that are not finite.
    """
    texts = [np.asarray(text, np.int32)[None] for text in texts]
    lengths = [text.shape[1] for text in texts]
    check_attention(model.config, "sensitivity")
    if not texts or min(lengths) < 2 * SINKS:
        raise ValueError(f"sensitivity needs texts of at least {2 * SINKS} tokens, got {lengths}")
    window = min((spec.window for spec in model.decoder.cache_specs(1, 1) if spec.window), default=max(lengths))
    if max(lengths) > window:
        raise ValueError(f"sensitivity needs texts within the model's sliding window of {window} tokens, got {lengths}")
    total = sum(_sums(model, text, tuple(bits), progress) for text in texts)
    keys, values = np.split(total / sum(lengths), 2, axis=1)
    return Sensitivity(model.fingerprint, sum(lengths), tuple(bits), keys, values)


def _sums(
    model: LanguageModel, text: np.ndarray, bits: tuple[int, ...], progress: Callable[[str], None] | None
) -> Float[np.ndarray, "L O"]:
    """Sums of the divergences over a text's tokens, per layer; options are keys' bits, then values'."""
    decoder, length = model.decoder, text.shape[1]
    specs = decoder.cache_specs(1, length, "float32")
    states = [decoder.embed(text)]
    for layer in decoder.layers:
        states.append(next_hidden(layer, states[-1]))
    wanted = _log_probabilities(decoder, states[-1])
    rows = []
    for i, spec in enumerate(specs):
        x = jnp.concatenate([_coded(decoder.layers[i], states[i], policy, spec) for policy in _policies(bits)])
        for layer in decoder.layers[i + 1 :]:
            x = next_hidden(layer, x)
        rows.append(np.asarray(_divergence(decoder, wanted, x), np.float64))
        if not np.isfinite(rows[-1]).all():
            raise FloatingPointError(f"coding layer {i} gave NaN: look for NaN in the model's activations")
        if progress is not None:
            progress(f"layer {i + 1} of {len(specs)}")
    return np.maximum(rows, 0.0)  # rounding can leave the least of them below zero


def _policies(bits: tuple[int, ...]) -> list[CachePolicy]:
    coded = [stream_codec(b) for b in bits]
    pairs = [Pair(codec, Dense()) for codec in coded] + [Pair(Dense(), codec) for codec in coded]
    return [CachePolicy(codec=pair, windows=Windows(SINKS, 0)) for pair in pairs]


@functools.partial(jax.jit, static_argnames=("policy", "spec"))
def _coded(layer: Layer, x: Float[Array, "1 T D"], policy: CachePolicy, spec: CacheSpec) -> Float[Array, "1 T D"]:
    return layer(x, policy.init(spec), None, True)[0]


@jax.jit
def _log_probabilities(decoder: Decoder, x: Float[Array, "1 T D"]) -> Float[Array, "T V"]:
    return jax.nn.log_softmax(decoder.logits(decoder.norm(x[0])))


@jax.jit
def _divergence(decoder: Decoder, wanted: Float[Array, "T V"], x: Float[Array, "R T D"]) -> Float[Array, "R"]:
    """Summed over the tokens; one row at a time, for logits are large."""

    def one(row: Array) -> Array:
        return jnp.sum(jnp.exp(wanted) * (wanted - _log_probabilities(decoder, row[None])))

    return jax.lax.map(one, x)
