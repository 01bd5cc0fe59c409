"""KVzip: tokens stay that the model looks at when it writes its own context down again (arXiv 2505.23416).

    score[j] = max over the query heads of a group, over the queries i of the repetition of softmax(q_i . k)[j]

The text is repeated in chunks of up to 2,048 tokens, each after an instruction and, from the second chunk on, the eight tokens
before it, as if the model had written that: queries come from a forward pass over the whole uncompressed cache. The softmax of
the scores runs over the first four tokens, the chunk and the repetition up to the query; the first four tokens get score 1. No
question is asked, so one compressed cache serves all that come; it costs two to three times the prefill.

Deviation: every kv head of every layer keeps equally many tokens. The paper takes the best over all layers and heads, which
leaves numbers that differ from head to head; those save memory only where every head has pages of its own. Protected tokens,
the cache's sinks and tail, stay and count into the budget. Later chunks follow the same instruction as the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from memjax.evict.rereading import Rereading

FIRST_TOKENS = 4


@dataclass(frozen=True)
class KVzip(Rereading):
    """Keeps what the repetition of the prompt looks at most."""

    name: ClassVar[str] = "kvzip"
    instruction: ClassVar[str] = "Repeat the previous context exactly."
    preceding: ClassVar[int] = 8

    def sees(
        self, pos: Int[Array, "B 1|K S"], begin: Int[Array, "B"], end: Int[Array, "B"], again: Int[Array, "B"]
    ) -> Bool[Array, "B 1|K S"]:
        return (pos < FIRST_TOKENS) | ((pos >= begin) & (pos < end)) | (pos >= again)

    def scores(self, attention: Float[Array, "B K G S"], pos: Int[Array, "S"]) -> Float[Array, "B K S"]:
        return jnp.where(pos < FIRST_TOKENS, 1.0, jnp.max(attention, axis=2))
