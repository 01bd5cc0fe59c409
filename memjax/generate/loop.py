"""Generation: chunked prefill, then one jitted loop that runs in blocks so that text can be shown as it comes.

Both jitted functions compile once per (model, policy, batch, capacity, sampler) and donate the cache: it is updated in place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from memjax.cache.ledger import Bytes, nbytes
from memjax.cache.parse import policy as parse_policy
from memjax.cache.policy import CachePolicy, ModelCache, Policy
from memjax.generate.sampling import Sampler, mark_seen, sample
from memjax.generate.steps import decode_step, prefill
from memjax.generate.stopping import StopStrings
from memjax.models.decoder import Decoder
from memjax.models.load import LanguageModel

NO_TOKEN = -1  # in a block of tokens: this row had ended


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["cache", "logits", "keys", "seen", "remaining", "stop_ids"],
    meta_fields=[],
)
@dataclass(frozen=True)
class LoopState:
    """What the loop carries.

    Attributes:
      cache: holds every token up to the last one sampled.
      logits: of the next token, float32 [B, V].
      keys: one PRNG key per row, [B].
      seen: bool [B, V] for the repetition penalty, else None.
      remaining: int32 [B], tokens still to sample; 0: the row has ended.
      stop_ids: int32 [n], ids that end a row (kept out of its text).
    """

    cache: ModelCache
    logits: Array
    keys: Array
    seen: Array | None
    remaining: Array
    stop_ids: Array


@functools.partial(jax.jit, donate_argnames=("cache", "logits"))
def prefill_chunk(decoder: Decoder, cache: ModelCache, logits: Array, tokens: Array, counts: Array):
    """One chunk of a ragged batch of prompts; rows without tokens in it keep their logits."""
    new, cache = prefill(decoder, cache, tokens, counts)
    return jnp.where(counts[:, None] > 0, new, logits), cache


@functools.partial(jax.jit, static_argnames=("sampler", "block"), donate_argnames=("state",))
def decode_block(decoder: Decoder, state: LoopState, *, sampler: Sampler, block: int):
    """Samples up to ``block`` tokens per row.

    Returns:
      The state, and the sampled ids [B, block] with ``NO_TOKEN`` where a row had ended.
    """
    batch = state.logits.shape[0]

    def unfinished(carry):
        i, state, _ = carry
        return (i < block) & jnp.any(state.remaining > 0)

    def step(carry):
        i, state, out = carry
        active = state.remaining > 0
        split = jax.vmap(jax.random.split)(state.keys)
        token = sample(state.logits, split[:, 0], sampler, state.seen)
        out = out.at[:, i].set(jnp.where(active, token, NO_TOKEN))
        stopped = jnp.any(token[:, None] == state.stop_ids, axis=1) | (token < 0)
        logits, cache = decode_step(decoder, state.cache, jnp.maximum(token, 0), active.astype(jnp.int32))
        seen = None if state.seen is None else mark_seen(state.seen, token[:, None], active[:, None])
        remaining = jnp.where(stopped, 0, jnp.maximum(state.remaining - 1, 0))
        return i + 1, LoopState(cache, logits, split[:, 1], seen, remaining, state.stop_ids), out

    out = jnp.full((batch, block), NO_TOKEN, jnp.int32)
    _, state, out = jax.lax.while_loop(unfinished, step, (jnp.int32(0), state, out))
    return state, out


@dataclass(frozen=True)
class Generation:
    """One prompt's continuation.

    Attributes:
      text: what was generated, up to a stop string or id.
      tokens: the sampled ids; a stop id is not among them.
      finish_reason: "stop" or "length".
      prompt_tokens: length of the prompt.
      cache: ledger of the whole batch's cache.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    cache: Bytes


class _Row:
    """Text side of one row: incremental decoding and stop strings."""

    def __init__(self, model: LanguageModel, stop: tuple[str, ...], stop_ids: frozenset[int]):
        self.decoder = model.tokenizer.stream() if model.tokenizer is not None else None
        self.matcher = StopStrings(stop).matcher() if stop else None
        self.stop_ids, self.tokens, self.pieces, self.reason = stop_ids, [], [], None

    def feed(self, ids: Sequence[int]) -> str:
        """Takes sampled ids; returns the text that may be shown."""
        shown = ""
        for token in ids:
            if self.reason is not None or token == NO_TOKEN:
                break
            if token in self.stop_ids:
                self.reason = "stop"
                break
            self.tokens.append(token)
            shown += self._show(self.decoder.feed(token)) if self.decoder is not None else ""
        self.pieces.append(shown)
        return shown

    def _show(self, piece: str) -> str:
        if self.matcher is None:
            return piece
        piece, stopped = self.matcher.feed(piece)
        if stopped:
            self.reason = "stop"
        return piece

    def flush(self) -> str:
        """What was held back and will now never become a stop string or a longer character."""
        rest = ""
        if self.decoder is not None and (self.reason is None or self.matcher is None):
            rest = self._show(self.decoder.flush())
        if self.matcher is not None and self.reason is None:
            rest += self.matcher.flush()
        self.reason = self.reason or "length"
        self.pieces.append(rest)
        return rest
