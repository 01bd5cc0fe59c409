"""KVzip's pass over a prompt that a model has read: repeated, it shows which tokens matter (``memjax.evict.kvzip``).

    cache = model.init_cache(mj.policy("protect(4,64)"), batch=1, capacity=4096)
    cache = ...                                            # the prompt, by ``mj.prefill``
    cache = compress(model, cache, [ids], budget=512, room=128)
    ...                                                    # any question, as often as one likes
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from memjax.attention.recall import recall, recall_scores
from memjax.cache.layer import LayerCache, commit, update
from memjax.cache.policy import AnyLayerCache, ModelCache, lengths
from memjax.cache.pools import HeadPools
from memjax.cache.transforms import evict
from memjax.evict.kvzip import CHUNK, FIRST_TOKENS, INSTRUCTION, PRECEDING
from memjax.models.decoder import Decoder
from memjax.models.load import LanguageModel

Scores = tuple[Float[Array, "B K S"] | None, ...]


def compress(
    model: LanguageModel,
    cache: ModelCache,
    prompts: Sequence[Sequence[int]],
    budget: int,
    room: int = 0,
    *,
    chunk: int = CHUNK,
    instruction: Sequence[int] | None = None,
) -> ModelCache:
    """The cache with ``budget`` tokens per kv head, protected ones among them, and room for ``room`` more.

    Layers that forget by a sliding window of their own stay as they are.

    Raises:
      ValueError: as ``scores``; a budget that leaves nothing to choose besides the protected tokens.
    """
    found = scores(model, cache, prompts, chunk=chunk, instruction=instruction)

    def one(layer: AnyLayerCache, score: Array | None) -> AnyLayerCache:
        if score is None:
            return layer
        protected = layer.layout.sinks + layer.layout.kept
        if budget <= protected:
            raise ValueError(f"kvzip's budget of {budget} tokens leaves none to choose besides the {protected} protected ones")
        return evict(layer, score, min(budget - protected, layer.history.slots), room)

    return tuple(one(*each) for each in zip(cache, found, strict=True))


def scores(
    model: LanguageModel,
    cache: ModelCache,
    prompts: Sequence[Sequence[int]],
    *,
    chunk: int = CHUNK,
    instruction: Sequence[int] | None = None,
) -> Scores:
    """One score per history slot and kv head of each layer, in [0, 1]; None for layers from which nothing can be taken.

    Args:
      cache: holds the prompts and nothing else, whole; in codes or not.
      prompts: the ids of each row.
      chunk: tokens repeated at a time.
      instruction: ids; None: "Repeat the previous context exactly." by the model's tokenizer.

    Raises:
      ValueError: prompts that are not what the cache holds, a cache that has lost tokens already or that has no history, a
        model without a tokenizer, or no chunk.
    """
    if any(isinstance(layer, HeadPools) for layer in cache):
        raise ValueError("kvzip scores all heads of a layer, but duo keeps its heads apart; read the prompt without it")
    cache = tuple(commit(layer) if isinstance(layer, LayerCache) else layer for layer in cache)
    held = np.asarray(lengths(cache)).tolist()
    if held != [len(prompt) for prompt in prompts] or min(held) == 0:
        raise ValueError(f"kvzip repeats what a cache holds, {held} tokens, got {[len(prompt) for prompt in prompts]}")
    if chunk < 1:
        raise ValueError(f"kvzip needs chunk >= 1, got {chunk}")
    if instruction is None:
        if model.tokenizer is None:
            raise ValueError(f"model {model.name} has no tokenizer: give the ids of an instruction")
        instruction = model.tokenizer.encode(INSTRUCTION, add_bos=False)
    if not any(map(_scored, cache)):
        raise ValueError("kvzip found no layer with a whole history on the device; read the prompt with protect(4,64) or int8")
    chunk, found = min(chunk, max(held)), None
    for begin in range(0, max(held), chunk):
        tokens, counts = _repetition(prompts, list(instruction), begin, chunk)
        first = np.minimum(begin, held).astype(np.int32)
        last = np.minimum(begin + chunk, held).astype(np.int32)
        new = _pass(model.decoder, cache, tokens, counts, first, last)
        found = new if found is None else jax.tree.map(jnp.maximum, found, new)
    return found


def _scored(layer: AnyLayerCache) -> bool:
    """Whether single tokens can be taken out of this layer's history, which holds all tokens but the protected ones."""
    if not isinstance(layer, LayerCache) or layer.history is None or layer.host is not None or layer.layout.tile > 1:
        return False
    return not layer.layout.ring and layer.history.pos is None


def _repetition(prompts, instruction: list[int], begin: int, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """What the model is made to say about one chunk of each row, padded on the right, and how long it is."""
    tokens = np.zeros((len(prompts), len(instruction) + PRECEDING + chunk), np.int32)
    counts = np.zeros((len(prompts),), np.int32)
    for row, prompt in enumerate(prompts):
        if begin < len(prompt):
            said = [*instruction, *prompt[max(begin - PRECEDING, 0) : begin + chunk]]
            tokens[row, : len(said)], counts[row] = said, len(said)
    return tokens, counts


@jax.jit
def _pass(decoder: Decoder, cache: ModelCache, tokens: Array, counts: Array, begin: Array, end: Array) -> Scores:
    """Scores of the tokens at ``begin <= p < end``, and of the first tokens, by one forward pass that leaves no trace."""
    x, found = decoder.embedding(tokens), []
    for layer, held in zip(decoder.layers, cache, strict=True):
        q, k, v = layer.attention.project(layer.attention_norm(x))
        staged = update(held, k, v, counts, queries=q)
        found.append(_first_tokens(held, recall_scores(staged, q, begin, end)) if _scored(held) else None)
        out = recall(staged, q)
        x = x + layer.attention.out(out.reshape(*x.shape[:2], -1))
        x = x + layer.mlp(layer.mlp_norm(x))
    return tuple(found)


def _first_tokens(cache: LayerCache, score: Float[Array, "B K S"]) -> Float[Array, "B K S"]:
    """First tokens that the cache does not protect get score 1."""
    first = cache.layout.sinks + jnp.arange(score.shape[-1]) < FIRST_TOKENS
    return jnp.where(first, 1.0, score)
