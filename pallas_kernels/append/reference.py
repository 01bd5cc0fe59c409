"""What writing new tokens into slots means."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def append_reference[Tree](target: Tree, new: Tree, start: Int[Array, "B"], count: Int[Array, "B"]) -> Tree:
    """Token t < count[b] of row b goes to slot ``start[b] + t``; slots that do not exist take nothing."""

    def write(leaf: Array, block: Array) -> Array:
        slots, tokens = leaf.shape[-1], block.shape[-1]
        index = jnp.arange(slots) - start[:, None]  # the token that each slot would get
        fresh = (index >= 0) & (index < jnp.minimum(count, tokens)[:, None])
        lead = (leaf.shape[0], *(1,) * (leaf.ndim - 2), slots)
        found = jnp.take_along_axis(block, jnp.clip(index, 0, tokens - 1).reshape(lead), axis=-1)
        return jnp.where(fresh.reshape(lead), found.astype(leaf.dtype), leaf)

    return jax.tree.map(write, target, new)


def append_xla[Tree](target: Tree, new: Tree, start: Int[Array, "B"], count: Int[Array, "B"]) -> Tree:
    """The same as a scatter, which XLA does in place in a donated cache."""

    def write(leaf: Array, block: Array) -> Array:
        token = jnp.arange(block.shape[-1], dtype=jnp.int32)
        slot = start[:, None] + token
        slot = jnp.where((token < count[:, None]) & (slot >= 0), slot, leaf.shape[-1])
        rows = jnp.arange(leaf.shape[0])[:, None]
        middle = (slice(None),) * (leaf.ndim - 2)
        return leaf.at[rows, *middle, slot].set(jnp.moveaxis(block, -1, 1).astype(leaf.dtype), mode="drop")

    return jax.tree.map(write, target, new)
