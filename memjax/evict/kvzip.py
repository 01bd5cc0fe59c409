"""KVzip: tokens stay that the model looks at when it writes its own context down again (arXiv 2505.23416).

    score[j] = max over the query heads of a group, over the queries i of the repetition of softmax(q_i . k)[j]

The text is repeated in chunks of up to 2,048 tokens, each after an instruction and, from the second chunk on, the eight tokens
before it, as if the model had written that: queries come from a forward pass over the whole uncompressed cache. The softmax of
the scores runs over the first four tokens, the chunk and the repetition up to the query; the first four tokens get score 1. No
question is asked, so one compressed cache serves all that come; it costs two to three times the prefill.

This is no policy: what to keep is known only after a second look at a text that has been kept whole. ``memjax.generate.kvzip``
has the pass with a model, ``mj.cache.evict`` compresses:

    cache = ...                                         # a prompt read with the policy "protect(4,64)", or with "int8"
    cache = compress(model, cache, prompts, budget=1024, room=256)

Deviation: every kv head of every layer keeps equally many tokens. The paper takes the best over all layers and heads, which
leaves numbers that differ from head to head; those save memory only where every head has pages of its own. Protected tokens,
the cache's sinks and tail, stay and count into the budget. Later chunks follow the same instruction as the first.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

INSTRUCTION = "Repeat the previous context exactly."
CHUNK, PRECEDING, FIRST_TOKENS = 2048, 8, 4
USAGE = (
    "kvzip is no policy: it needs a second pass over a text that was kept whole. Read the prompt with a policy such as "
    "protect(4,64) or int8, then call memjax.generate.kvzip.compress(model, cache, prompts, budget)"
)


def attention_in_chunk(
    logits: Float[Array, "B K M S"],
    pos: Int[Array, "B 1|K S"],
    others: tuple[Float[Array, "B K M R"], Int[Array, "B 1|K R"]],
    begin: Int[Array, "B"],
    end: Int[Array, "B"],
    repetition: Int[Array, "B"],
) -> Float[Array, "B K S"]:
    """The most attention that a row gives to each slot, if it sees nothing but first tokens, the chunk and the repetition.

    Args:
      logits, pos: of the slots that are scored, masked, and their positions.
      others: of slots that are not scored.
      begin, end: positions of the chunk.
      repetition: the position from which on tokens are those of the repetition.
    """

    def seen(logits: Array, pos: Array) -> Array:
        begin_, end_, repetition_ = (x[:, None, None] for x in (begin, end, repetition))
        chosen = (pos < FIRST_TOKENS) | ((pos >= begin_) & (pos < end_)) | (pos >= repetition_)
        return jnp.where(chosen[:, :, None], logits, -jnp.inf)

    mine, theirs = seen(logits, pos), seen(*others)
    lse = jnp.logaddexp(jax.nn.logsumexp(mine, axis=-1), jax.nn.logsumexp(theirs, axis=-1))
    attention = jnp.exp(mine - jnp.where(lse > -1e29, lse, jnp.inf)[..., None])  # a row of nothing: masked, all of it
    in_chunk = (pos >= begin[:, None, None]) & (pos < end[:, None, None])
    return jnp.where(in_chunk, jnp.max(attention, axis=2), 0.0)
