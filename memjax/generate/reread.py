"""The second reading of a prompt, by which ``kvzip`` and ``kvcompose`` choose what stays (``memjax.evict.rereading``).

    cache = model.init_cache(mj.policy("kvzip(512)+int8"), batch=1, capacity=4096)
    cache = ...                                            # the prompt, by ``mj.prefill``: all of it is kept
    cache = mj.compress(model, cache, [ids], room=128)
    ...                                                    # any question, as often as one likes
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from memjax.attention.recall import recall, recalled
from memjax.cache.layer import LayerCache, commit, layer_caches, update
from memjax.cache.ledger import nbytes
from memjax.cache.policy import AnyLayerCache, ModelCache, lengths
from memjax.cache.pools import HeadPools
from memjax.cache.share import check_shared
from memjax.cache.transforms import evict
from memjax.evict import Rereading
from memjax.models.config import check_attention
from memjax.models.decoder import Decoder
from memjax.models.load import LanguageModel

CHUNK = 2048
Scores = tuple[Float[Array, "B K S"] | None, ...]


def rereading(cache: ModelCache) -> Rereading | None:
    """The evictor of a cache's policies that waits for a second reading; None: there is none.

    Raises:
      ValueError: layers that name different ones.
    """
    evictors = dict.fromkeys(layer.policy.evictor for layer in layer_caches(cache))
    found = [evictor for evictor in evictors if isinstance(evictor, Rereading)]
    if len(found) > 1:
        raise ValueError(f"all layers of a cache are compressed by one second reading, got {found[0]} and {found[1]}")
    return found[0] if found else None


def compress(
    model: LanguageModel,
    cache: ModelCache,
    prompts: Sequence[Sequence[int]],
    method: Rereading | None = None,
    room: int = 0,
    *,
    chunk: int = CHUNK,
    instruction: Sequence[int] | None = None,
) -> ModelCache:
    """The cache with as many tokens as the method's budget says, protected ones among them, and room for ``room`` more.

    Layers that forget by a sliding window of their own stay as they are. Not for ``jit``: the second reading is, but how many
    slots a layer keeps is not known before it.

    Args:
      cache: holds the prompts and nothing else, whole; in codes or not.
      prompts: the ids of each row.
      method: ``KVzip(...)`` or ``KVCompose(...)``; None: what the cache's policy says.
      chunk: tokens read again at a time.
      instruction: ids to be said before each chunk; None: the method's own, by the model's tokenizer.

    Raises:
      ValueError: as ``scores``; no method; a budget that leaves nothing to choose besides the protected tokens; heads that
        cannot share slots as the method wants.
    """
    method = rereading(cache) if method is None else method
    if method is None:
        raise ValueError("compress needs a method, KVzip(512) for instance, or a cache whose policy names one: kvzip(512)")
    chosen, longest = _chosen(method, cache), max(map(len, prompts))
    budget = longest if method.bytes else method.tokens(longest)
    whole = nbytes(cache).device <= method.bytes if method.bytes else budget >= longest
    if whole:
        return cache
    layers = [cache[i] for i in chosen]
    protected = np.asarray([layer.layout.sinks + layer.layout.kept for layer in layers])
    _check_choice(method, budget, protected)
    for layer in layers if method.shares_slots else ():
        check_shared(layer.spec, layer.policy.codec, method.instead)
    found = scores(model, cache, prompts, method, chunk=chunk, instruction=instruction)
    written = np.maximum(np.asarray([len(prompt) for prompt in prompts]) - protected[:, None], 0)
    judged = [np.asarray(found[i]) for i in chosen]
    counts = lambda budget: method.counts(judged, written, budget - protected)  # noqa: E731
    if method.bytes:
        others = nbytes(cache).device - sum(nbytes(layer).history for layer in layers)
        fits = lambda budget: others + _history_bytes(layers, counts(budget), room) <= method.bytes  # noqa: E731
        low = int(protected.max())  # the largest budget that fits lies between this and the longest prompt
        budget = low + bisect.bisect_left(range(low + 1, longest + 1), True, key=lambda n: not fits(n))
        _check_choice(method, budget, protected)
    smaller = dict(zip(chosen, counts(budget), strict=True))
    return tuple(evict(layer, found[i], smaller[i], room) if i in smaller else layer for i, layer in enumerate(cache))


def _check_choice(method: Rereading, budget: int, protected: np.ndarray) -> None:
    if budget <= protected.max():
        raise ValueError(
            f"{method.name}'s budget of {budget} tokens leaves none to choose besides the {protected.max()} protected ones"
        )


def _history_bytes(layers: list[LayerCache], counts: list[int] | list[np.ndarray], room: int) -> float:
    """What the histories will take with so many tokens."""
    total = 0.0
    for layer, count in zip(layers, counts, strict=True):
        heads, shared = layer.spec.kv_heads, np.ndim(count) > 0
        slots = -(-int(np.sum(count, axis=1).max()) // heads) if shared else count
        # Positions come to what a slot holds, biases where tokens are folded, and owners where heads share slots.
        more = 4 * (1 if layer.policy.fold is None else 2) + (shared and heads > 1)
        total += (slots + room) * (nbytes(layer).history / layer.history.slots + more * layer.spec.batch * heads)
    return total


def _chosen(method: Rereading, cache: ModelCache) -> list[int]:
    """Layers out of which tokens can be taken."""
    found = [i for i, layer in enumerate(cache) if _scored(layer)]
    if not found:
        raise ValueError(
            f"{method.name} found no layer with a whole history on the device; read the prompt with {method.name}(512), "
            "protect(4,64) or int8"
        )
    return found


def scores(
    model: LanguageModel,
    cache: ModelCache,
    prompts: Sequence[Sequence[int]],
    method: Rereading,
    *,
    chunk: int = CHUNK,
    instruction: Sequence[int] | None = None,
) -> Scores:
    """One score per history slot and kv head of each layer; None for layers from which nothing can be taken.

    For the arguments see ``compress``.

    Raises:
      ValueError: prompts that are not what the cache holds, a cache that has lost tokens already or that has no history, a
        model without a tokenizer, or no chunk.
    """
    check_attention(model.config, method.name)
    if any(isinstance(layer, HeadPools) for layer in cache):
        raise ValueError(
            f"{method.name} scores all heads together, but duo keeps them in pools, as by_head does; read the prompt without"
        )
    cache = tuple(commit(layer) if isinstance(layer, LayerCache) else layer for layer in cache)
    held = np.asarray(lengths(cache)).tolist()
    if held != [len(prompt) for prompt in prompts] or min(held) == 0:
        raise ValueError(
            f"{method.name} repeats what a cache holds, {held} tokens, got {[len(prompt) for prompt in prompts]}"
        )
    if chunk < 1:
        raise ValueError(f"{method.name} needs chunk >= 1, got {chunk}")
    if instruction is None and method.instruction:
        if model.tokenizer is None:
            raise ValueError(f"model {model.name} has no tokenizer: give the ids of an instruction")
        instruction = model.tokenizer.encode(method.instruction, add_bos=False)
    _chosen(method, cache)
    chunk, found = min(chunk, max(held)), None
    for begin in range(0, max(held), chunk):
        tokens, counts = _said_again(prompts, list(instruction or ()), method.preceding, begin, chunk)
        first = np.minimum(begin, held).astype(np.int32)
        last = np.minimum(begin + chunk, held).astype(np.int32)
        new = _pass(model.decoder, cache, tokens, counts, first, last, method)
        found = new if found is None else jax.tree.map(jnp.maximum, found, new)

    def reduced(layer: AnyLayerCache, given: Array | None) -> Array | None:
        return None if given is None else method.scores(given, layer.layout.sinks + jnp.arange(given.shape[-1]))

    return tuple(reduced(*each) for each in zip(cache, found, strict=True))


def _scored(layer: AnyLayerCache) -> bool:
    """Whether single tokens can be taken out of this layer's history, which holds all tokens but the protected ones."""
    if not isinstance(layer, LayerCache) or layer.history is None or layer.host is not None or layer.layout.tile > 1:
        return False
    return not layer.layout.ring and layer.history.pos is None


def _said_again(
    prompts, instruction: list[int], preceding: int, begin: int, chunk: int
) -> tuple[np.ndarray, np.ndarray]:
    """What the model is made to say about one chunk of each row, padded on the right, and how long it is."""
    tokens = np.zeros((len(prompts), len(instruction) + preceding + chunk), np.int32)
    counts = np.zeros((len(prompts),), np.int32)
    for row, prompt in enumerate(prompts):
        if begin < len(prompt):
            said = [*instruction, *prompt[max(begin - preceding, 0) : begin + chunk]]
            tokens[row, : len(said)], counts[row] = said, len(said)
    return tokens, counts


@functools.partial(jax.jit, static_argnames="method")
def _pass(
    decoder: Decoder, cache: ModelCache, tokens: Array, counts: Array, begin: Array, end: Array, method: Rereading
) -> tuple[Float[Array, "B K G S"] | None, ...]:
    """The most attention that each query head gives, by one forward pass that leaves no trace."""
    x, found = decoder.embed(tokens), []
    for layer, held in zip(decoder.layers, cache, strict=True):
        q, k, v = layer.mixer.project(layer.mixer_norm(x))
        staged = update(held, k, v, counts, queries=q)
        found.append(recalled(staged, q, begin, end, method) if _scored(held) else None)
        out = recall(staged, q)
        x = layer.with_mlp(layer.with_mixed(x, layer.mixer.out(out.reshape(*x.shape[:2], -1))))
    return tuple(found)
