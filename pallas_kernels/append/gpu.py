"""Append on a GPU: every new token's bytes are stored where they belong, in place (Pallas, Triton backend).

Experimental: checked in interpret mode and compiled, never run on a GPU.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array

from memjax.pallas_kernels.choose import Target

CHANNELS = 128  # stored by a program


def why_not(on: Target, leaves: list[Array]) -> str | None:
    """The reason why this kernel cannot serve leaves [B, K, ..., S] on a GPU; None if it can."""
    del on
    odd = [leaf.ndim for leaf in leaves if leaf.ndim not in (3, 4)]
    return f"leaves of {odd[0]} axes, not [B, K, S] or [B, K, C, S]" if odd else None


def append_gpu[Tree](target: Tree, new: Tree, start: Array, count: Array, *, interpret: object = False) -> Tree:
    """Same meaning and arguments as ``append_reference``; in place if the caller's ``jit`` donates ``target``."""
    write = functools.partial(_write, start=start.astype(jnp.int32), count=count.astype(jnp.int32), interpret=interpret)
    return jax.tree.map(write, target, new)


def _write(leaf: Array, block: Array, *, start: Array, count: Array, interpret: object) -> Array:
    shape = leaf.shape
    if leaf.ndim == 3:
        leaf, block = leaf[:, :, None], block[:, :, None]
    batch, heads, channels, _ = leaf.shape
    tokens = block.shape[-1]
    chunk = min(CHANNELS, pl.next_power_of_2(channels))
    out = pl.pallas_call(
        functools.partial(_body, chunk=chunk),
        out_shape=jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        grid=(batch * heads, pl.cdiv(channels, chunk), tokens),
        input_output_aliases={3: 0},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="memjax_append",
    )(start, count, block.astype(leaf.dtype), leaf)
    return out.reshape(shape)


def _body(start_ref, count_ref, new_ref, _, out_ref, *, chunk: int):
    heads, channels, slots = out_ref.shape[1:]
    b, h = pl.program_id(0) // heads, pl.program_id(0) % heads
    token = pl.program_id(2)
    rows = pl.program_id(1) * chunk + jnp.arange(chunk)
    slot = start_ref[b] + token
    exists = (token < count_ref[b]) & (slot >= 0) & (slot < slots)
    mask = (rows < channels) & exists
    value = plt.load(new_ref.at[b, h, rows, token], mask=mask)
    plt.store(out_ref.at[b, h, rows, jnp.where(exists, slot, 0)], value, mask=mask)
