"""Choosing the next token: pure, jittable, every row with its own key.

Logits pass, in this order, as in Hugging Face transformers: repetition penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

FAILED = -1  # the token of a row whose logits are NaN


@dataclass(frozen=True)
class Sampler:
    """How tokens are chosen; a static jit argument.

    Args:
      temperature: divides the logits; 0: the most likely token, the others unused but for the penalty.
      top_k: keep the k most likely tokens; 0: all.
      top_p: keep the smallest set of most likely tokens whose probabilities sum to at least p (nucleus sampling,
        arXiv 1904.09751); 1: all.
      min_p: drop tokens less likely than min_p times the most likely one (arXiv 2407.01082); 0: none.
      repetition_penalty: logits of tokens seen before are divided by it if positive, multiplied if negative (CTRL,
        arXiv 1909.05858); 1: none.

    Raises:
      ValueError: a number outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        checks = {
            "temperature": (self.temperature >= 0, "at least 0 (0: greedy)"),
            "top_k": (self.top_k >= 0, "at least 0 (0: all tokens)"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1] (1: all tokens)"),
            "min_p": (0 <= self.min_p < 1, "in [0, 1) (0: all tokens)"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0 (1: no penalty)"),
        }
        for name, (fine, wanted) in checks.items():
            if not fine:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)}")


def process_logits(
    logits: Float[Array, "B V"], sampler: Sampler, seen: Bool[Array, "B V"] | None = None
) -> Float[Array, "B V"]:
    """The logits that ``sample`` draws from; excluded tokens are -inf. ``seen`` is needed for a repetition penalty only."""
    if sampler.repetition_penalty != 1.0:
        if seen is None:
            raise ValueError("a repetition penalty needs the tokens seen so far: pass seen")
        penalty = sampler.repetition_penalty
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampler.temperature == 0.0:
        return logits
    logits = logits / sampler.temperature
    if 0 < sampler.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, sampler.top_k)[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampler.top_p < 1.0:
        order = jnp.argsort(-logits, axis=-1)
        probs = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs
        rank = jnp.argsort(order, axis=-1)
        logits = jnp.where(jnp.take_along_axis(before >= sampler.top_p, rank, axis=-1), -jnp.inf, logits)
    if sampler.min_p > 0.0:
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        best = jnp.max(log_probs, axis=-1, keepdims=True)
        logits = jnp.where(log_probs < best + jnp.log(sampler.min_p), -jnp.inf, logits)
    return logits


def sample(
    logits: Float[Array, "B V"],
    keys: Key[Array, "B"],
    sampler: Sampler,
    seen: Bool[Array, "B V"] | None = None,
) -> Int[Array, "B"]:
    """One token per row; row b uses ``keys[b]`` alone, so a batch gives what each row gives by itself.

    Ties go to the lowest id. A row with NaN among its logits gives ``FAILED``, never a plausible token.
    """
    processed = process_logits(logits, sampler, seen)
    if sampler.temperature == 0.0:
        token = jnp.argmax(processed, axis=-1)
    else:
        token = jax.vmap(jax.random.categorical)(keys, processed)
    return jnp.where(jnp.any(jnp.isnan(logits), axis=-1), FAILED, token.astype(jnp.int32))


def mark_seen(seen: Bool[Array, "B V"], tokens: Int[Array, "B T"], valid: Bool[Array, "B T"]) -> Bool[Array, "B V"]:
    """``seen`` with the valid tokens added."""
    rows = jnp.arange(seen.shape[0])[:, None]
    return seen.at[rows, jnp.where(valid, tokens, seen.shape[1])].set(True, mode="drop")
