"""Flash attention on a TPU over slots of packed codes: the one kernel behind decode, prefill and multi-head latent decode.

A step takes a tile of slots; the copy of the next one hides behind the work on it. Steps outside of what a block of rows may
see, which follows from a span's length, causality and the windows, are neither copied nor worked on. With a page table the
kernel copies a step's pages itself (see ``tpu_pages``).

Products have float32 sums; operands are bfloat16, float32 where the codes are, or int8 limbs (see ``tpu_tile.Levels``).
Experimental: compiled for every generation and checked in interpret mode, never run on a TPU.
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
from memjax.pallas_kernels.choose import target, tpu_generation
from memjax.pallas_kernels.codes import Codes, deinterleave
from memjax.pallas_kernels.decode.reference import Centre
from memjax.pallas_kernels.slots import Positions, Span, seen
from memjax.pallas_kernels.tpu_operands import Operands, Plan, levels_of, scalars
from memjax.pallas_kernels.tpu_pages import Chain, Leaf, rooms

KINDS = ("scale", "zero", "gain")


def attention_tpu(
    plan: Plan,
    q: Array,
    k: Codes,
    v: Codes | None,
    *,
    q_pos: Array,
    k_pos: Positions,
    scale: float,
    q_extra: Array | None = None,
    k_extra: Codes | None = None,
    bias: Array | None = None,
    centre: Centre | None = None,
    table: Array | None = None,
    softcap: float | None = None,
    window: int | None = None,
    recent: int | None = None,
    sinks: int = 0,
    mass: bool = False,
    interpret: object = False,
    generation: str | None = None,
    name: str,
) -> tuple[Array, Array, Array | None]:
    """Attention of rows [B, K, row blocks, rows, .] over slots.

    Args:
      q, q_extra, centre: with their rows in blocks as ``plan`` has them.
      q_pos: int32 [B, row blocks, rows]; negative for rows of padding.
      generation: of the TPU to generate for, None: the target's.
      mass: also return the masked scores.
      The others as in ``decode``.

    Returns:
      Per split of the sequence outputs [B, K, row blocks, splits, rows, Hv] and log-sum-exps [B, K, row blocks, splits, rows],
      and with ``mass`` scores [B, K, rows, S], -1e30 where masked.
    """
    batch, kv_heads = q.shape[:2]
    generation = generation or tpu_generation(target().kind)
    values = k if v is None else v
    codes = {"k": k} | ({} if v is None else {"v": v}) | ({} if k_extra is None else {"e": k_extra})
    words = not isinstance(interpret, pltpu.InterpretParams)
    levels = {key: levels_of(each, generation, plan.rows)._replace(words=words) for key, each in codes.items()}
    operands = Operands(plan)
    operands.add_query("k", q, k, levels["k"])
    if q_extra is not None:
        operands.add_query("e", q_extra, k_extra, levels["e"])
    at = q_pos.astype(jnp.int32)[:, None, :, :, None]
    operands.add("q_pos", at, (1, 1, 1, plan.rows, 1), lambda b, h, i, s, j, *_: (b, 0, i, 0, 0))
    for key, each in codes.items():
        operands.add_codes(key, each)
    if not isinstance(k_pos, Span):
        operands.add_per_slot("pos", k_pos.astype(jnp.int32))
    if bias is not None:
        operands.add_per_slot("bias", bias)
    if centre is not None and isinstance(k_pos, Span):
        operands.add_centre(centre.weights, centre.inv_freq, k_pos)
    elif centre is not None:
        operands.add_scattered_centre(centre.weights, centre.inv_freq)
    oldest = jnp.min(jnp.where(q_pos < 0, 2**30, q_pos), axis=-1)
    pool = k.data.shape[0]
    prefetched = scalars(plan, oldest, jnp.max(q_pos, axis=-1), k_pos, table, pool, window, recent, sinks)

    lead, here = (batch, kv_heads, plan.row_blocks, plan.splits), (1, plan.heads, 1, 1)
    tails = [(plan.rows, values.dim), (plan.rows, tile.LANES)]
    out_shape = [jax.ShapeDtypeStruct((*lead, *tail), jnp.float32) for tail in tails]
    out_specs = [pl.BlockSpec((*here, *tail), lambda b, h, i, s, j, *_: (b, h, i, s, 0, 0)) for tail in tails]
    if mass:
        written = plan.splits * plan.steps * plan.tile  # the last split may have steps behind the last slot
        out_shape.append(jax.ShapeDtypeStruct((batch, kv_heads, plan.rows, written), jnp.float32))
        block = (1, plan.heads, plan.rows, plan.tile)
        out_specs.append(pl.BlockSpec(block, lambda b, h, i, s, j, *_: (b, h, 0, s * plan.steps + j)))
    body = functools.partial(
        _body,
        plan=plan,
        names=operands.names,
        leaves=operands.leaves,
        outputs=len(out_shape),
        levels=levels,
        has_values=v is not None,
        spanned=isinstance(k_pos, Span),
        scale=scale,
        softcap=softcap,
        window=window,
        recent=recent,
        sinks=sinks,
    )
    stacked = plan.heads * plan.rows
    scratch = [pltpu.VMEM((stacked, width), jnp.float32) for width in (tile.LANES, tile.LANES, values.dim)]
    if plan.pages:
        scratch += rooms(operands.leaves, plan.pages)
    order = ("arbitrary" if plan.pages and plan.chained else "parallel",) * 4
    out, lse, *scores = pl.pallas_call(
        body,
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(batch, kv_heads // plan.heads, plan.row_blocks, plan.splits, plan.steps),
            in_specs=operands.specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        compiler_params=tile.compiler_params((*order, "arbitrary"), interpret),
        cost_estimate=_cost(plan, q, codes),
        interpret=interpret,
        name=name,
    )(*prefetched, *operands.arrays)
    return deinterleave(out, values.fmt), lse[..., 0], scores[0][..., : plan.slots] if mass else None


def _cost(plan: Plan, q: Array, codes: dict[str, Codes]) -> pl.CostEstimate:
    """What the compiler's scheduler is told about the call: all slots of all rows, codes read once."""
    batch, kv_heads, _, rows, dim = q.shape
    rows *= plan.row_blocks
    share = batch / codes["k"].data.shape[0] * plan.slots / codes["k"].slots  # pages that rows share count for each
    leaves = jax.tree.leaves(codes)
    return pl.CostEstimate(
        flops=4 * batch * kv_heads * rows * plan.slots * dim,
        transcendentals=batch * kv_heads * rows * plan.slots,
        bytes_accessed=int(share * sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)) + 2 * q.size * q.dtype.itemsize,
    )


def _body(
    *refs,
    plan: Plan,
    names: list[str],
    leaves: list[Leaf],
    outputs: int,
    levels: dict,
    has_values: bool,
    spanned: bool,
    scale,
    softcap,
    window,
    recent,
    sinks,
):
    first, last, start, filled, *paging = refs[: 7 if plan.pages else 4]
    refs = refs[4 + len(paging) :]
    inputs, refs = dict(zip(names, refs, strict=False)), refs[len(names) :]
    out_ref, lse_ref, *scores_ref = refs[:outputs]
    state_refs, room = refs[outputs : outputs + 3], refs[outputs + 3 :]
    b, i, s, j = (pl.program_id(axis) for axis in (0, 2, 3, 4))
    step, block = s * plan.steps + j, b * plan.row_blocks + i
    value_name = "v" if has_values else "k"
    # What a last tile that is only partly there holds beyond its end may be NaN in floating point.
    ragged = not plan.pages and plan.slots % plan.tile != 0 and levels[value_name].fmt in ("dense", "sparse", "e4m3", "e5m2")

    @pl.when(j == 0)
    def begin():
        for ref, value in zip(state_refs, tile.fresh(*state_refs[2].shape), strict=True):
            ref[...] = value

    def visible(h: int, lanes: slice):
        """Which of a step's slots a row sees, [M, size], and which of them are there at all."""
        size = lanes.stop - lanes.start
        slot = step * plan.tile + lanes.start + lax.broadcasted_iota(jnp.int32, (1, size), 1)
        inside = slot < (jnp.minimum(filled[b], plan.slots) if spanned else plan.slots)
        position = slot + start[b] if spanned else _row_of(inputs["pos"], h, lanes)
        return seen(inputs["q_pos"][0, 0, 0], position, window=window, recent=recent, sinks=sinks) & inside, inside

    def features_of(h: int, lanes: slice) -> Array | None:
        """The slots' side of the centring term, [high; low; high] of cos and sin."""
        if "centre" not in inputs:
            return None
        if spanned:
            return inputs["features"][:, lanes]
        high, low = tile.halves(tile.turned_features(_row_of(inputs["pos"], h, lanes), inputs["turns"][...]))
        return jnp.concatenate([high, low, high], axis=0)

    def scores_of(h: int, lanes: slice, mask: Array, features: Array | None):
        found = _key_scores(inputs, "k", levels["k"], h, lanes)
        if "e" in levels:
            found += _key_scores(inputs, "e", levels["e"], h, lanes)
        if features is not None:
            weights = inputs["centre"][0, h, 0]
            if spanned:
                turn = inputs["turns"][0, 0]
                weights = weights * turn[:1] + inputs["centre_crossed"][0, h, 0] * turn[1:]
            high, low = tile.halves(weights)
            found += tile.dot(jnp.concatenate([high, high, low], axis=1), features, (1, 0))
        found = tile.cap(found * scale, softcap)
        if "bias" in inputs:
            found += _row_of(inputs["bias"], h, lanes).astype(jnp.float32)
        found = jnp.where(mask, found, tile.MASKED)
        if scores_ref:
            scores_ref[0][0, h, :, lanes] = found
        return found

    def values_of(h: int, lanes: slice, probs: Array, mask: Array, inside: Array) -> Array:
        of = levels[value_name]
        found = tile.read_values(of.read(inputs[value_name], h, lanes), of, inside if ragged else None)
        factors = tile.with_gain(*(_factor(inputs, f"{value_name}_{kind}", h, lanes) for kind in KINDS))
        gain = _run_factor(inputs, value_name, "gain", h, lanes)
        if gain is None:
            return tile.weighted_values(probs, mask, found, of, *factors)
        return tile.tiled_values(probs, mask, found, of, *factors, gain)

    def advance(state: tile.State, lanes: slice) -> tile.State:
        """Some slots of all heads: rows of heads lie side by side, so that one softmax serves all."""
        own = not spanned and inputs["pos"].shape[1] > 1
        each = [(*visible(h, lanes), features_of(h, lanes)) for h in range(plan.heads if own else 1)]
        each *= 1 if own else plan.heads
        masks = [(mask, inside) for mask, inside, _ in each]
        scores = [scores_of(h, lanes, mask, features) for h, (mask, _, features) in enumerate(each)]

        def values(probs: Array) -> Array:
            rows = [probs[h * plan.rows : (h + 1) * plan.rows] for h in range(plan.heads)]
            return _stack([values_of(h, lanes, rows[h], *mask) for h, mask in enumerate(masks)])

        return tile.advance(state, _stack(scores), values)

    needed = (step >= first[block]) & (step < last[block])
    if plan.pages:
        chain = Chain(plan, leaves, inputs, room, first, last, paging)
        chain.begin()

    @pl.when(needed)
    def work():
        if plan.pages:
            inputs.update(chain.advance())
        state = tile.State(*(ref[...] for ref in state_refs))
        for at in range(0, plan.tile, plan.chunk):
            state = advance(state, slice(at, min(at + plan.chunk, plan.tile)))
        for ref, value in zip(state_refs, state, strict=True):
            ref[...] = value

    if plan.pages:
        chain.end()

    if scores_ref:

        @pl.when(jnp.logical_not(needed))
        def nothing():
            scores_ref[0][...] = jnp.full(scores_ref[0].shape, tile.MASKED, jnp.float32)

    @pl.when(j == plan.steps - 1)
    def end():
        out, lse = tile.finish(tile.State(*(ref[...] for ref in state_refs)))
        for h in range(plan.heads):
            rows = slice(h * plan.rows, (h + 1) * plan.rows)
            out_ref[0, h, 0, 0], lse_ref[0, h, 0, 0] = out[rows], lse[rows]


def _stack(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)


def _row_of(ref, h: int, lanes: slice) -> Array:
    """[1, size] of what is given per slot, for one head or for all."""
    return ref[0, h if ref.shape[1] > 1 else 0, :, lanes]


def _factor(inputs: dict, name: str, h: int, lanes: slice) -> Array | None:
    """Scales or zero points [n, T] of a tile."""
    if name not in inputs:
        return None
    ref = inputs[name]
    return ref[0, h : h + 1, lanes] if len(ref.shape) == 3 else ref[0, h, :, lanes]


def _run_factor(inputs: dict, name: str, kind: str, h: int, lanes: slice) -> Array | None:
    """Factors per channel [r, H] of the runs of slots in ``lanes``; they lie in blocks [1, heads, pages, runs, H]."""
    ref = inputs.get(f"{name}_tiled_{kind}")
    if ref is None:
        return None
    runs = ref.shape[3]
    each = inputs[name].shape[-1] // (ref.shape[2] * runs)
    begin, end = lanes.start // each, lanes.stop // each
    return _stack([ref[0, h, p, max(begin - p * runs, 0) : end - p * runs] for p in range(begin // runs, -(-end // runs))])


def _key_scores(inputs: dict, name: str, levels: tile.Levels, h: int, lanes: slice) -> Array:
    side = inputs[f"{name}_side"][0, h, 0]
    q, codes = tile.Query(inputs[f"{name}_query"][0, h, 0], side[:, :1], side[:, 1:]), levels.read(inputs[name], h, lanes)
    by_slot = tile.with_gain(*(_factor(inputs, f"{name}_{kind}", h, lanes) for kind in KINDS))
    scale, zero, gain = (_run_factor(inputs, name, kind, h, lanes) for kind in KINDS)
    if scale is None and gain is None:
        return tile.slot_scores(q, codes, levels, *by_slot)
    return tile.tiled_scores(q, codes, levels, gain if scale is None else scale, zero, *by_slot)
