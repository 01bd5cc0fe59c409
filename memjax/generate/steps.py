"""The two steps of generation, pure and jittable: for a loop of one's own, or for ``memjax.generate.loop``."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax.cache.policy import ModelCache
from memjax.models.decoder import Decoder


def prefill(
    decoder: Decoder,
    cache: ModelCache,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"] | None = None,
) -> tuple[Float[Array, "B V"], ModelCache]:
    """Takes in a prompt, or the next chunk of one.

    Args:
      tokens: ids; rows shorter than T are padded on the right with anything.
      lengths: how many tokens of each row are real; None: all.

    Returns:
      Logits after each row's last real token (of a row without any: meaningless), and the cache.
    """
    hidden, cache = decoder(tokens, cache, lengths)
    if lengths is None:
        last = hidden[:, -1]
    else:
        index = jnp.maximum(lengths - 1, 0)[:, None, None]
        last = jnp.take_along_axis(hidden, index, axis=1)[:, 0]
    return decoder.logits(last), cache


def decode_step(
    decoder: Decoder,
    cache: ModelCache,
    token: Int[Array, "B"],
    active: Int[Array, "B"] | None = None,
) -> tuple[Float[Array, "B V"], ModelCache]:
    """Takes in one token per row.

    Args:
      active: 1 where the token is real, 0 where the row has ended and its cache must stay; None: all are.

    Returns:
      Logits of the next token, and the cache.
    """
    return prefill(decoder, cache, token[:, None], active)
