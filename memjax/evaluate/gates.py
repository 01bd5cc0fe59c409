"""Measures a model's gates file: how much of what each kv head says comes from tokens that a streaming head would not keep.

    gate[l, h] ~ sqrt( mean over queries i of |W_h (o_i,h - o'_i,h)|^2 / |x_i|^2 )           the largest gate of the model is 1

o is the output of the head's queries over all tokens, o' over sinks and a window, W_h their part of the output projection,
x the hidden state behind the layer's attention. So heads of all layers are measured by what changes in the stream that they
write to.

The queries are those of tokens that recite what was hidden: eight numbers, each with a city's name, stand in a text, and
behind it the model is told them again, city by city. That is DuoAttention's argument (arXiv 2410.10819): next tokens of
natural text seldom need what is far away, so it hides which heads could retrieve it.

This is an estimate by one forward pass, not the paper's gates: those are trained, by backpropagation through the mixture of
both outputs, for 2,000 steps with a penalty, and can see that heads make up for each other. kvpress has another
training-free estimate, from mean queries and keys, which needs no hidden numbers; the two have not been compared.

On smollm2-135m, with other numbers hidden in another part of the novel, 1,400 tokens, the KL divergence of the recited
digits to the model with all heads whole is .0018 with half of the heads by the gates that memjax brings along, 1.8 with a
random half; .0051 and 2.0 with a quarter; 2.0 with all heads streaming. An earlier arrangement of the numbers gave, for
half of the heads, .0037 this way, .0058 by changes relative to the head's own output, .025 by the attention mass that is
lost, .032 by changes at all tokens of the text. (One text, float32, heads masked, no codec; the divergence on the text
itself was .01 with half of the heads, .036 at random.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from memjax.attention.rope import apply_rope
from memjax.cache.spec import CacheSpec
from memjax.evaluate.layerwise import next_hidden
from memjax.evaluate.passkey import Multikey
from memjax.evict import Duo
from memjax.evict.gates import Gates
from memjax.models.config import check_attention
from memjax.models.decoder import Layer
from memjax.models.load import LanguageModel
from memjax.models.tokenizer import Tokenizer

CITIES = ("London", "Paris", "Tokyo", "Rome", "Cairo", "Lima", "Oslo", "Delhi")


def hide_and_recite(tokenizer: Tokenizer, tokens: Sequence[int], window: int, seed: int = 0) -> tuple[list[int], int]:
    """``tokens`` with numbers hidden in all but the last ``window`` of them, the recital behind, and how many tokens that has.

    Raises:
      ValueError: a text too short to hide anything that a window would not see.
    """
    draw = np.random.default_rng(seed)
    pairs = [(city, str(draw.integers(10_000, 100_000))) for city in CITIES]
    (city, key), *others = pairs
    hidden = Multikey(key, 0.05, city, tuple(others)).hide(tokenizer, tokens[: max(len(tokens) - window, 0)])
    recital: list[int] = []
    for at in draw.permutation(len(pairs)):
        one = Multikey(pairs[at][1], city=pairs[at][0])
        recital += one.question_tokens(tokenizer) + one.answer_tokens(tokenizer)
    return [*hidden, *tokens[len(tokens) - window :], *recital], len(recital)


def measure_gates(
    model: LanguageModel,
    text: Sequence[int],
    recited: int,
    sinks: int = Duo.sinks,
    window: int = Duo.window,
    progress: Callable[[str], None] | None = None,
) -> Gates:
    """The gates of a model; ``save_gates`` writes them.

    Args:
      text: token ids, the last ``recited`` of which say again what is hidden among the others.
      sinks, window: tokens that a streaming head would see.
      progress: called with each layer that is done.

    Raises:
      ValueError: a text that sinks and window see the whole of, or of which nothing or everything is recited.
      FloatingPointError: activations that are not finite.
    """
    check_attention(model.config, "measuring gates")
    tokens = np.asarray(text, np.int32)[None]
    length = tokens.shape[1]
    if not 0 < recited < length or length - recited <= sinks + window:
        raise ValueError(
            f"gates need a text of more than the {sinks + window} tokens of sinks and window before what is recited, got "
            f"{length} tokens of which {recited} are recited"
        )
    x, rows = model.decoder.embed(tokens), []
    specs = model.decoder.cache_specs(1, length, "float32")
    for i, (layer, spec) in enumerate(zip(model.decoder.layers, specs, strict=True)):
        found = _changes(layer, x, spec=spec, recited=recited, sinks=sinks, window=window)
        rows.append(np.asarray(found, np.float64))
        if not np.isfinite(rows[-1]).all():
            raise FloatingPointError(f"layer {i} gave NaN: look for NaN in the model's activations")
        x = next_hidden(layer, x)
        if progress is not None:
            progress(f"layer {i + 1} of {len(specs)}")
    largest = max(row.max() for row in rows)
    if not largest > 0:
        raise ValueError("no head looks at anything but sinks and window: give a longer text")
    how = (
        f"estimated, not trained: relative change of the hidden state with {sinks} sinks and {window} recent tokens, at "
        f"{recited} recited tokens of {length}"
    )
    return Gates(model.fingerprint, how, tuple(tuple((row / largest).tolist()) for row in rows))


@functools.partial(jax.jit, static_argnames=("spec", "recited", "sinks", "window"))
def _changes(
    layer: Layer, x: Float[Array, "1 T D"], *, spec: CacheSpec, recited: int, sinks: int, window: int
) -> Float[Array, "K"]:
    q, k, v = layer.mixer.project(layer.mixer_norm(x))
    position, heads = jnp.arange(x.shape[1], dtype=jnp.int32), spec.kv_heads
    if spec.rope is not None:
        q, k = (apply_rope(each, position[None], spec.rope, spec.capacity) for each in (q, k))
    q = q[0, -recited:].reshape(recited, heads, -1, spec.head_dim)
    q, k, v, x = (each.astype(jnp.float32) for each in (q, k[0], v[0], x[0, -recited:]))
    projection = layer.mixer.out.kernel[...].astype(jnp.float32).reshape(heads, -1, spec.head_dim, x.shape[-1])
    distance = position[-recited:, None] - position
    seen = (distance >= 0) & (distance < (spec.window or x.shape[0] + spec.capacity))
    logits = jnp.einsum("rkgh,skh->kgrs", q, k) * spec.attention_scale

    def outputs(mask: Array) -> Float[Array, "K R D"]:
        weights = jax.nn.softmax(jnp.where(mask, logits, -jnp.inf), axis=-1)
        return jnp.einsum("kgrs,skh,kghd->krd", weights, v, projection)

    whole = outputs(seen)
    change = whole - outputs(seen & ((position < sinks) | (distance < window)))
    behind = jnp.sum(jnp.square(x + jnp.sum(whole, axis=0)), axis=-1)
    return jnp.sqrt(jnp.mean(jnp.sum(jnp.square(change), axis=-1) / behind, axis=-1))
