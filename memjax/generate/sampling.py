"""Choosing the next token: pure, jittable, every row with its own key.

Logits pass these stages, in the order of Hugging Face transformers; each sees what the one before left over:

1. repetition penalty (CTRL, arXiv 1909.05858): logits of tokens seen before are divided by it if positive, multiplied
   by it if negative;
2. temperature: logits / temperature;
3. top-k: the k most likely tokens stay;
4. top-p (nucleus sampling, arXiv 1904.09751): the smallest set of most likely tokens stays whose probabilities sum to
   at least p, the token that crosses p included;
5. min-p (arXiv 2407.01082): tokens at least min_p times as likely as the most likely one stay.

Temperature 0 is greedy: the penalty applies, stages 2 to 5 do not. Everywhere the lower id goes first among equal
logits, so top-k keeps exactly k tokens (transformers keeps every token that equals the k-th) and top_k=1 is greedy.
Stages that are switched off cost nothing; at most one sort or top-k is run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

FAILED = -1  # the token of a row that gives no distribution

# Beyond these a float32 logit over- or underflows, and 0 / 0 or inf - inf follow.
SMALLEST, LARGEST = 1e-6, 1e6


@dataclass(frozen=True)
class Sampler:
    """How tokens are chosen; hashable, a static jit argument. The module's docstring defines the stages.

    Args:
      temperature: 0: the most likely token; else from 1e-6 to 1e6.
      top_k: 0 or at least V: all tokens.
      top_p: in (0, 1]; 1: all tokens.
      min_p: in [0, 1]; 0: all tokens.
      repetition_penalty: from 1e-6 to 1e6; 1: none.

    Raises:
      ValueError: a value of the wrong type or outside its range.

    >>> Sampler(temperature=0.7, top_p=0.9)
    Sampler(temperature=0.7, top_k=0, top_p=0.9, min_p=0.0, repetition_penalty=1.0)
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        for name, kind in (
            ("temperature", float),
            ("top_k", int),
            ("top_p", float),
            ("min_p", float),
            ("repetition_penalty", float),
        ):
            # Plain numbers only: a NumPy scalar would take part in dtype promotion.
            object.__setattr__(self, name, _number(name, getattr(self, name), kind))
        scale = f"from {SMALLEST:g} to {LARGEST:g}"
        for name, fine, wanted in (
            ("temperature", self.temperature == 0 or SMALLEST <= self.temperature <= LARGEST, f"0 (greedy) or {scale}"),
            ("top_k", self.top_k >= 0, "at least 0; use 0 for all tokens"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1; use 1 for all tokens"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1; use 0 for all tokens"),
            ("repetition_penalty", SMALLEST <= self.repetition_penalty <= LARGEST, f"{scale}; use 1 for no penalty"),
        ):
            if not fine:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}")


def process_logits(
    logits: Float[Array, "B V"], sampler: Sampler, seen: Bool[Array, "B V"] | None = None
) -> Float[Array, "B V"]:
    """The logits that ``sample`` chooses from.

    Args:
      logits: any float dtype; computed in float32.
      seen: True where a token stands in the row already; needed for a repetition penalty, else ignored.

    Returns:
      float32 [B, V]; tokens that may not be chosen are -inf. Rows with NaN or +inf have no meaning.

    Raises:
      ValueError: logits or seen of the wrong shape or dtype, or a penalty without seen.
    """
    _check_logits(logits)
    logits = logits.astype(jnp.float32)
    if sampler.repetition_penalty != 1:
        logits = _penalize(logits, sampler.repetition_penalty, seen)
    if sampler.temperature == 0:
        return logits
    logits = logits / sampler.temperature
    if 0 < sampler.top_k < logits.shape[-1] or sampler.top_p < 1:
        logits = _truncate(logits, sampler)
    if sampler.min_p > 0:
        least = jnp.max(logits, axis=-1, keepdims=True) + math.log(sampler.min_p)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def sample(
    logits: Float[Array, "B V"],
    keys: Key[Array, "B"] | None,
    sampler: Sampler,
    seen: Bool[Array, "B V"] | None = None,
) -> Int[Array, "B"]:
    """One token per row; row b draws from ``keys[b]`` alone, so a batch gives exactly what each row gives by itself.

    Args:
      logits: any float dtype; computed in float32.
      keys: one PRNG key per row; greedy uses none and takes None.
      seen: as for ``process_logits``.

    Returns:
      int32 [B]. ``FAILED`` (-1), never a plausible token, for a row that gives no distribution: one with a NaN or
      +inf among its logits, or with nothing but -inf.

    Raises:
      ValueError: as ``process_logits``; keys that are missing or not one per row.
    """
    processed = process_logits(logits, sampler, seen)
    token = jnp.argmax(processed, axis=-1) if sampler.temperature == 0 else _draw(keys, processed)
    # Both, since not every backend's maximum is sure to propagate NaN.
    failed = jnp.any(jnp.isnan(logits), axis=-1) | ~jnp.isfinite(jnp.max(logits, axis=-1))
    return jnp.where(failed, FAILED, token.astype(jnp.int32))


def mark_seen(seen: Bool[Array, "B V"], tokens: Int[Array, "B T"], valid: Bool[Array, "B T"]) -> Bool[Array, "B V"]:
    """``seen`` with the valid tokens added; ids outside 0..V-1, such as ``FAILED``, are ignored."""
    rows, vocab = jnp.arange(seen.shape[0])[:, None], seen.shape[1]
    tokens = tokens.astype(jnp.int32)
    # A negative index would count from the end.
    return seen.at[rows, jnp.where(valid & (tokens >= 0), tokens, vocab)].set(True, mode="drop")


def _number(name: str, value, kind: type) -> float | int:
    try:
        if isinstance(value, bool | str):
            raise TypeError
        number = kind(value)
        if number != value and not math.isnan(number):
            raise TypeError
    except (TypeError, ValueError, OverflowError):
        noun = "an integer" if kind is int else "a number"
        raise ValueError(f"{name} must be {noun}, got {value!r}; pass a plain Python {kind.__name__}") from None
    return number


def _check_logits(logits: Array) -> None:
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be [batch, vocabulary], got shape {logits.shape}; give one row as logits[None]")
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"logits must be floating point, got {logits.dtype}; convert them first")


def _penalize(logits: Array, penalty: float, seen: Array | None) -> Array:
    if seen is None:
        raise ValueError(f"repetition_penalty {penalty} needs the tokens seen so far: pass seen, bool [B, V]")
    if seen.shape != logits.shape or seen.dtype != jnp.bool_:
        raise ValueError(f"seen must be bool {logits.shape} like the logits, got {seen.dtype} {seen.shape}")
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def _truncate(logits: Array, sampler: Sampler) -> Array:
    """Top-k and top-p at once: both keep the first ``count`` tokens in the order of logit, then id."""
    vocab = logits.shape[1]
    logits = jnp.where(logits == 0, 0.0, logits)  # -0.0 sorts below 0.0 but ties with it
    limit = sampler.top_k if 0 < sampler.top_k < vocab else vocab
    values, ids = jax.lax.top_k(logits, limit) if limit < vocab else _sort(logits)
    count = jnp.full((logits.shape[0], 1), limit)
    if sampler.top_p < 1:
        probs = jax.nn.softmax(values, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs
        count = jnp.maximum(jnp.sum(before < sampler.top_p, axis=-1, keepdims=True), 1)
    value = jnp.take_along_axis(values, count - 1, axis=-1)
    last = jnp.take_along_axis(ids, count - 1, axis=-1)
    inside = (logits > value) | ((logits == value) & (jnp.arange(vocab, dtype=jnp.int32) <= last))
    return jnp.where(inside, logits, -jnp.inf)


def _sort(logits: Array) -> tuple[Array, Array]:
    """Logits and their ids, largest first, equal ones by id."""
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    # As integers, which XLA sorts three times as fast on a CPU as floats.
    order, ids = jax.lax.sort((_ordinal(-logits), ids), num_keys=1, is_stable=True)
    return -jax.lax.bitcast_convert_type(_flip(order), jnp.float32), ids


def _ordinal(x: Array) -> Array:
    """int32 in the order of the float32 numbers."""
    return _flip(jax.lax.bitcast_convert_type(x, jnp.int32))


def _flip(bits: Array) -> Array:
    """Reverses the order of the negative numbers, whose bits ascend with their magnitude; its own inverse."""
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _draw(keys: Array | None, logits: Array) -> Array:
    rows = logits.shape[0]
    if keys is None:
        raise ValueError(f"a temperature above 0 needs one PRNG key per row ({rows}): pass keys, or use temperature 0")
    typed = jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)
    if keys.shape[:1] != (rows,) or keys.ndim != (1 if typed else 2):
        raise ValueError(f"keys must be one PRNG key per row ({rows}), got shape {keys.shape}; use jax.random.split")
    if jax.random.key_impl(keys) == "threefry2x32":
        return jax.vmap(jax.random.categorical)(keys, logits)
    # Other generators, rbg among them, draw differently under vmap than alone.
    return jax.lax.map(lambda row: jax.random.categorical(*row), (keys, logits))
