"""Generation: chunked prefill, then one jitted loop that runs in blocks so that text can be shown as it comes.

Both jitted functions compile once per (model, policy, batch, capacity, sampler) and donate the cache: it is updated in place.
Where the prompt decides how many slots a layer has (``kvzip``, ``kvcompose``), the decode step is compiled for every prompt.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from memjax.cache.ledger import Bytes, nbytes
from memjax.cache.parse import policy as parse_policy
from memjax.cache.policy import ModelCache, Policy
from memjax.generate.reread import compress, rereading
from memjax.generate.sampling import FAILED, Sampler, mark_seen, sample
from memjax.generate.steps import decode_step, prefill
from memjax.generate.stopping import StopStrings
from memjax.models.decoder import Decoder
from memjax.models.load import LanguageModel

NO_TOKEN = -2  # in a block of tokens: this row had ended

Prompt = str | Sequence[int]


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


def stream(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    *,
    policy: Policy | str = "dense",
    max_new_tokens: int = 128,
    sampler: Sampler | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    capacity: int | None = None,
    cache_dtype: str | None = None,
    chunk: int = 256,
    block: int = 8,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Iterator[list[str]]:
    """Generates for a batch of prompts and yields, after every block of tokens, each row's new text.

    Args:
      prompts: texts, or lists of token ids. They may differ in length; each gives what it would give alone (but with
        ``kvzip`` and ``kvcompose``, whose layers have one number of slots for all).
      policy: how the cache is made small, a policy or its string form.
      max_new_tokens: at most so many tokens per row.
      sampler: None: greedy.
      seed: row b draws from ``jax.random.fold_in(jax.random.key(seed), b)``.
      stop: strings that end a row; end-of-text ids always do.
      capacity: tokens the cache is made for; None: the longest prompt + max_new_tokens.
      cache_dtype: dtype of what is not quantized; None: the dtype of the weights.
      chunk: prompts are taken in so many tokens at a time; memory of the prefill grows with it.
      block: tokens per run of the jitted loop; text appears in such steps.
      on_progress: called with ("prefill" or "decode", tokens done, tokens in all).

    Returns:
      An iterator; its ``StopIteration.value`` is the list of ``Generation``.

    Raises:
      ValueError: no prompts, an empty prompt, ids outside the vocabulary, prompts that do not fit the capacity, a bad
        policy, sampler or stop string; all before anything is computed. FloatingPointError: the model gave NaN.
    """
    sampler = sampler or Sampler()
    policy = parse_policy(policy) if isinstance(policy, str) else policy
    ids = _encode(model, prompts)
    capacity = _check_lengths(ids, max_new_tokens, capacity, chunk, block)
    stop_ids = frozenset(model.eos_ids)
    rows = [_Row(model, tuple(stop), stop_ids) for _ in ids]
    cache = model.init_cache(policy, len(ids), capacity, cache_dtype)
    logits, cache = _prefill_all(model, cache, ids, chunk, on_progress)
    if rereading(cache) is not None:
        cache = compress(model, cache, ids, room=capacity - max(map(len, ids)))
    ledger = nbytes(cache)
    state = _initial_state(model, cache, logits, ids, max_new_tokens, sampler, seed)
    done = 0
    while done < max_new_tokens and any(row.reason is None for row in rows):
        state, out = decode_block(model.decoder, state, sampler=sampler, block=block)
        sampled = np.asarray(out)
        if failed := [b for b, row in enumerate(rows) if row.reason is None and FAILED in sampled[b]]:
            raise FloatingPointError(f"the model gave NaN for prompt {failed[0]}; try another policy or cache dtype")
        yield [row.feed(new.tolist()) if row.reason is None else "" for row, new in zip(rows, sampled, strict=True)]
        done += block
        if any(row.reason is not None for row in rows):
            ended = jnp.asarray([row.reason is not None for row in rows])
            state = dataclasses.replace(state, remaining=jnp.where(ended, 0, state.remaining))
        if on_progress is not None:
            on_progress("decode", min(done, max_new_tokens), max_new_tokens)
    yield [row.flush() for row in rows]
    return [
        Generation("".join(row.pieces), tuple(row.tokens), row.reason, len(prompt), ledger)
        for row, prompt in zip(rows, ids, strict=True)
    ]


def generate(model: LanguageModel, prompts: Prompt | Sequence[Prompt], **options) -> list[Generation]:
    """Generates for one prompt or a batch of them; ``options`` as for ``stream``."""
    single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int | np.integer))
    running = stream(model, [prompts] if single else list(prompts), **options)
    while True:
        try:
            next(running)
        except StopIteration as finished:
            return finished.value


def _encode(model: LanguageModel, prompts: Sequence[Prompt]) -> list[list[int]]:
    if len(prompts) == 0:
        raise ValueError("give at least one prompt")
    ids = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if model.tokenizer is None:
                raise ValueError(f"model {model.name} has no tokenizer: give token ids")
            prompt = model.tokenizer.encode(prompt)
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} is empty: give at least one token")
        if not all(0 <= token < model.config.vocab for token in prompt):
            raise ValueError(f"prompt {i} has ids outside the vocabulary 0..{model.config.vocab - 1}")
        ids.append([int(token) for token in prompt])
    return ids


def _check_lengths(ids: list[list[int]], new: int, capacity: int | None, chunk: int, block: int) -> int:
    for name, value in (("max_new_tokens", new), ("chunk", chunk), ("block", block)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    needed = max(map(len, ids)) + new
    if capacity is None:
        return needed
    if needed > capacity:
        raise ValueError(
            f"a prompt of {needed - new} tokens and {new} new ones need a capacity of {needed}, got {capacity}; "
            "shorten the prompt, ask for fewer tokens or raise the capacity"
        )
    return capacity


def _prefill_all(model: LanguageModel, cache: ModelCache, ids: list[list[int]], chunk: int, on_progress):
    longest = max(map(len, ids))
    chunk = min(chunk, 1 << (longest - 1).bit_length())
    lengths = np.asarray([len(prompt) for prompt in ids])
    tokens = np.zeros((len(ids), -(-longest // chunk) * chunk), np.int32)
    for row, prompt in zip(tokens, ids, strict=True):
        row[: len(prompt)] = prompt
    logits = jnp.zeros((len(ids), model.config.vocab), jnp.float32)
    for start in range(0, tokens.shape[1], chunk):
        counts = np.clip(lengths - start, 0, chunk).astype(np.int32)
        logits, cache = prefill_chunk(model.decoder, cache, logits, tokens[:, start : start + chunk], counts)
        if on_progress is not None:
            logits.block_until_ready()
            on_progress("prefill", min(start + chunk, longest), longest)
    return logits, cache


def _initial_state(model, cache, logits, ids, new: int, sampler: Sampler, seed: int) -> LoopState:
    batch = len(ids)
    keys = jax.vmap(lambda b: jax.random.fold_in(jax.random.key(seed), b))(jnp.arange(batch))
    seen = None
    if sampler.repetition_penalty != 1.0:
        marks = np.zeros((batch, model.config.vocab), bool)
        for row, prompt in zip(marks, ids, strict=True):
            row[prompt] = True
        seen = jnp.asarray(marks)
    remaining = jnp.full((batch,), new, jnp.int32)
    return LoopState(cache, logits, keys, seen, remaining, jnp.asarray(sorted(model.eos_ids), jnp.int32))
