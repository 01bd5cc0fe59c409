"""Append on a TPU: the tiles of 128 slots that new tokens fall into are read, merged and written back, in place.

A slot is a lane, and memory moves in whole tiles, so a single token costs a tile's traffic: 128 slots. Tokens that enter
in blocks share it.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from memjax.pallas_kernels import tpu_tile as tile
from memjax.pallas_kernels.choose import Target

LANES = tile.LANES


def why_not(on: Target, leaves: list[Array]) -> str | None:
    """The reason why this kernel cannot serve leaves [B, K, ..., S] on a TPU; None if it can."""
    del on
    for leaf in leaves:
        if leaf.dtype.itemsize not in tile.WORDS:
            return f"elements of {leaf.dtype.itemsize} bytes"
        if leaf.ndim not in (3, 4):
            return f"leaves of {leaf.ndim} axes, not [B, K, S] or [B, K, C, S]"
    return None


def append_tpu[Tree](target: Tree, new: Tree, start: Array, count: Array, *, interpret: object = False) -> Tree:
    """Same meaning and arguments as ``append_reference``; in place if the caller's ``jit`` donates ``target``."""
    write = functools.partial(_write, start=start.astype(jnp.int32), count=count.astype(jnp.int32), interpret=interpret)
    return jax.tree.map(write, target, new)


def _write(leaf: Array, block: Array, *, start: Array, count: Array, interpret: object) -> Array:
    batch, heads, *channels, slots = leaf.shape
    tokens = block.shape[-1]
    tiles = -(-tokens // LANES) + 1
    last = -(-slots // LANES) - 1
    # A tile of empty lanes on either side: every merged tile takes its lanes from two neighbouring ones.
    widths = [(0, 0)] * (block.ndim - 1) + [(LANES, tiles * LANES - tokens)]
    padded = jnp.pad(block.astype(leaf.dtype), widths)
    count = jnp.clip(jnp.minimum(count, slots - start), 0, tokens)
    zeros = (0,) * len(channels)
    step_heads = 8 if heads % 8 == 0 else heads
    shape = (1, step_heads, *channels, LANES)

    def place(b, h, i, start, count):
        touched = jnp.maximum(start[b] + count[b] - 1, start[b]) // LANES
        return (b, h, *zeros, jnp.clip(jnp.minimum(start[b] // LANES + i, touched), 0, last))

    def fresh(which: int):
        return lambda b, h, i, *_: (b, h, *zeros, i + which)

    return pl.pallas_call(
        functools.partial(_body, channels=len(channels)),
        out_shape=jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads // step_heads, tiles),
            in_specs=[pl.BlockSpec(shape, fresh(0)), pl.BlockSpec(shape, fresh(1)), pl.BlockSpec(shape, place)],
            out_specs=pl.BlockSpec(shape, place),
        ),
        input_output_aliases={4: 0},
        compiler_params=tile.compiler_params(("parallel", "parallel", "arbitrary"), interpret),
        interpret=interpret,
        name="memjax_append",
    )(start, count, padded, padded, leaf)


def _body(start_ref, count_ref, before_ref, new_ref, old_ref, out_ref, *, channels: int):
    b, i = pl.program_id(0), pl.program_id(2)
    start, count = start_ref[b], count_ref[b]
    offset = lax.rem(start, LANES)
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    token = i * LANES + lane - offset
    mine = (token >= 0) & (token < count)

    # The first tile is always written, so that a row without new tokens gets back what it had.
    @pl.when((i == 0) | ((start + count - 1) // LANES >= start // LANES + i))
    def merge():
        heads = range(old_ref.shape[1]) if channels else [slice(None)]
        for h in heads:
            old = old_ref[0, h]
            moved = _shift(before_ref[0, h], new_ref[0, h], offset)
            out_ref[0, h] = jnp.where(mine, moved, old)


def _shift(before: Array, new: Array, offset: Array) -> Array:
    """Lanes ``128 - offset ..`` of two neighbouring tiles [R, 128]."""
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    turned = [pltpu.roll(tile.to_words(x), offset, 1) for x in (before, new)]
    return tile.from_words(jnp.where(lane < offset, turned[0], turned[1]), new.dtype, new.shape[0])
