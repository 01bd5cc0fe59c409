"""Flash attention on a GPU over slots of packed codes: the one kernel behind decode, prefill and multi-head latent decode.

A program takes a block of query rows of one kv head and a part of the sequence (``gpu_tile`` says how it reads codes); parts
are merged by their log-sum-exp (Flash-Decoding).

It is written for Pallas' Triton backend, which JAX has deprecated in favour of Mosaic GPU: the latter's low-bit operands
cannot be interpreted, so the numbers of such a kernel could not be checked without a GPU, these can. Experimental: checked in
interpret mode and compiled ahead of time, never run on a GPU.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array

from memjax.pallas_kernels.choose import Target
from memjax.pallas_kernels.codes import Codes
from memjax.pallas_kernels.decode.reference import Centre, pages_per_block
from memjax.pallas_kernels.gpu_tile import KINDS, SMALLEST_PIECE, Form, Where, form_of, load, load_piece, slot_factors
from memjax.pallas_kernels.slots import Positions, Span, seen

MASKED = -1e30  # a score that is as good as -inf and has no NaN among its differences
LOG2E = math.log2(math.e)


def why_not(on: Target, arguments: dict) -> str | None:
    """The reason why this kernel cannot serve a case on a GPU; None if it can."""
    k, v = arguments["k"], arguments["v"]
    old = any(name in on.kind for name in ("A100", "A10", "A30", "A40", "RTX 30", "T4", "V100"))
    for name, codes in (("keys", k), ("values", v), ("extra keys", arguments.get("k_extra"))):
        if codes is None:
            continue
        if codes.fmt in ("e4m3", "e5m2") and old:
            return f"{name} are {codes.fmt}, which needs a GPU of compute capability 8.9 or more, not {on.kind}"
        form = form_of(codes)
        counts = {factor.rows for factor in form.factors} - {1}
        if not form.decoded and len(counts) > 1:
            return f"{name} have scales, zero points and gains of different groups of channels"
        if form.groups > 1 and codes.dim // form.groups < SMALLEST_PIECE:
            return f"{name} have groups of {codes.dim // form.groups} channels; the kernel's smallest is {SMALLEST_PIECE}"
    size = arguments.get("page") or k.slots
    if arguments.get("table") is not None and (size < 16 or size & (size - 1)):
        return f"pages of {size} slots; the kernel needs a power of two of at least 16"
    return None


@dataclass(frozen=True)
class Plan:
    """Static sizes of one call: rows of a program, slots of a tile, parts of the sequence, warps and pipeline stages."""

    rows: int
    tile: int
    splits: int
    warps: int = 4
    stages: int = 2


def attention_gpu(
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
    page: int | None = None,
    softcap: float | None = None,
    window: int | None = None,
    recent: int | None = None,
    sinks: int = 0,
    mass: bool = False,
    interpret: object = False,
    name: str,
) -> tuple[Array, Array, Array | None]:
    """Attention of rows [B, K, M, .], M a multiple of ``plan.rows``, over slots; arguments as in ``decode``.

    Returns:
      Per part of the sequence outputs [B, K, splits, M, Hv] and log-sum-exps [B, K, splits, M]; with ``mass`` the scores
      [B, K, M, S], -1e30 where masked.
    """
    batch, kv_heads, rows, _ = q.shape
    codes = {"k": k} | ({} if v is None else {"v": v}) | ({} if k_extra is None else {"e": k_extra})
    forms = {key: form_of(each) for key, each in codes.items()}
    value_form = forms["v" if v is not None else "k"]
    parts = pages_per_block(k, page)
    slots = k.slots if table is None else k.slots // parts * table.shape[1]
    inputs = {"q": q.astype(forms["k"].dtype), "q_pos": q_pos.astype(jnp.int32)}
    if q_extra is not None:
        inputs["q_extra"] = q_extra.astype(forms["e"].dtype)
    for key, each in codes.items():
        inputs[key] = each.data
        for kind, factor in zip(KINDS, (each.scale, each.zero, each.gain), strict=True):
            if factor is not None:
                inputs[f"{key}_{kind}"] = factor if each.tiled(factor) else factor[..., None, :]
        if not isinstance(each.grid, str):
            inputs[f"{key}_table"] = jnp.asarray(each.grid, forms[key].dtype)
    if isinstance(k_pos, Span):
        inputs |= {"start": k_pos.start.astype(jnp.int32), "count": k_pos.count.astype(jnp.int32)}
    else:
        inputs["pos"] = k_pos.astype(jnp.int32)
    if bias is not None:
        inputs["bias"] = bias.astype(jnp.float32)
    if centre is not None:
        inputs |= {"centre": centre.weights.astype(jnp.float32), "frequency": jnp.asarray(centre.inv_freq, jnp.float32)}
    if table is not None:
        inputs["pages"] = jnp.clip(table.astype(jnp.int32), 0, k.data.shape[0] * parts - 1)
    tiles = -(-slots // plan.tile)
    blocks = rows // plan.rows
    inputs["limits"] = _limits(plan, q_pos.reshape(batch, blocks, -1), k_pos, tiles, window, recent, sinks)

    out_shape = [
        jax.ShapeDtypeStruct((batch, kv_heads, plan.splits, rows, value_form.padded), jnp.float32),
        jax.ShapeDtypeStruct((batch, kv_heads, plan.splits, rows), jnp.float32),
    ]
    aliases, blank = {}, []
    if mass:
        out_shape.append(jax.ShapeDtypeStruct((batch, kv_heads, rows, slots), jnp.float32))
        blank, aliases = [jnp.full(out_shape[-1].shape, MASKED, jnp.float32)], {len(inputs): 2}
    body = functools.partial(
        _body,
        plan=plan,
        names=list(inputs),
        forms=forms,
        value_key="v" if v is not None else "k",
        slots=slots,
        page=k.slots // parts if table is not None else 0,
        parts=parts,
        per_split=-(-tiles // plan.splits),
        mask={"window": window, "recent": recent, "sinks": sinks},
        scale=scale,
        softcap=softcap,
        mass=mass,
    )
    out, lse, *scores = pl.pallas_call(
        body,
        out_shape=out_shape,
        grid=(batch * kv_heads, blocks, plan.splits),
        input_output_aliases=aliases,
        compiler_params=plt.CompilerParams(num_warps=plan.warps, num_stages=plan.stages),
        interpret=interpret,
        name=name,
    )(*inputs.values(), *blank)
    return value_form.unpad(out), lse, scores[0] if mass else None


def _limits(plan: Plan, q_pos: Array, k_pos: Positions, tiles: int, window, recent, sinks: int) -> Array:
    """Tiles [first, last) that hold slots which a block of rows may see, int32 [B, blocks, 2]."""
    first, last = jnp.zeros(q_pos.shape[:2], jnp.int32), jnp.full(q_pos.shape[:2], tiles, jnp.int32)
    if isinstance(k_pos, Span):
        start, count = (x.astype(jnp.int32)[:, None] for x in k_pos)
        end = jnp.clip(jnp.max(q_pos, axis=-1) - start + 1, 0, count)
        last = jnp.minimum(-(-end // plan.tile), tiles)
        distances = [x for x in (window, recent if sinks == 0 else None) if x is not None]
        if distances:
            oldest = jnp.min(jnp.where(q_pos < 0, 2**30, q_pos), axis=-1)
            first = jnp.clip(oldest - min(distances) + 1 - start, 0, end) // plan.tile
    return jnp.stack([first, last], axis=-1).astype(jnp.int32)


def _dot(a: Array, b: Array) -> Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _load_query(ref, b, h, rows: Array, form: Form) -> list[tuple[Array, Array]]:
    """Pieces [M, size] of the query rows and their sums [M]."""
    found = []
    for piece in form.pieces:
        lane = jnp.arange(piece.size)
        whole = piece.valid == piece.size
        mask = None if whole else jnp.broadcast_to((lane < piece.valid)[None, :], (rows.shape[0], piece.size))
        at = ref.at[b, h, rows[:, None], (piece.channel + jnp.where(lane < piece.valid, lane, 0))[None, :]]
        x = load(at, mask, jnp.zeros((), ref.dtype))
        found.append((x, jnp.sum(x.astype(jnp.float32), axis=1)))
    return found


def _scores(refs: dict, key: str, form: Form, query: list, at: Where) -> Array:
    """[M, T] for one stream of keys, scales included."""
    alpha, beta = (1.0, 0.0) if form.decoded else form.line
    shape = (query[0][0].shape[0], at.slot.shape[0])
    total = jnp.zeros(shape, jnp.float32)
    for group in range(form.groups):
        found, sums = jnp.zeros(shape, jnp.float32), jnp.zeros(shape[:1], jnp.float32)
        for piece, (rows, each) in zip(form.pieces, query, strict=True):
            if piece.group == group:
                found += _dot(rows, load_piece(refs, key, form, piece, at))
                sums += each
        found = alpha * found + beta * sums[:, None] if beta else found
        factor, zero = slot_factors(refs, key, form, at, group)
        found = found if factor is None else found * factor[None, :]
        total += found if zero is None else found + sums[:, None] * zero[None, :]
    return total


def _add_values(refs: dict, key: str, form: Form, probs: Array, mask: Array, at: Where, acc: list[Array]) -> list[Array]:
    """The accumulators [M, size] of all pieces with a tile's weighted values added."""
    alpha, beta = (1.0, 0.0) if form.decoded else form.line
    weights, offsets = {}, {}
    for group in range(form.groups):
        weight, offset = probs, None
        factor, zero = slot_factors(refs, key, form, at, group)
        if factor is not None:  # those of free slots may be NaN: their weight is zero, not 0 * NaN
            weight = jnp.where(mask, probs * factor[None, :], 0.0)
        if beta:
            offset = beta * jnp.sum(weight, axis=1)
        if zero is not None:
            zeros = jnp.sum(jnp.where(mask, probs * zero[None, :], 0.0), axis=1)
            offset = zeros if offset is None else zeros + offset
        weights[group], offsets[group] = weight.astype(form.dtype), offset
    wanted = jnp.max(mask.astype(jnp.int32), axis=0) > 0 if form.decoded else None
    found = []
    for piece, before in zip(form.pieces, acc, strict=True):
        after = _dot(weights[piece.group], load_piece(refs, key, form, piece, at, wanted).T)
        after = after if alpha == 1.0 else alpha * after
        offset = offsets[piece.group]
        found.append(before + (after if offset is None else after + offset[:, None]))
    return found


def _centre_scores(refs: dict, b, h, rows: Array, position: Array) -> Array:
    """The centring term of a tile, [M, T]: pair by pair, since pairs are few and tiles are small."""
    position = position.astype(jnp.float32)
    pairs = refs["frequency"].shape[0]

    def add(j, total):
        angle = refs["frequency"][j] * position
        a, c = (plt.load(refs["centre"].at[b, h, rows, j + side * pairs]) for side in (0, 1))
        return total + a[:, None] * jnp.cos(angle)[None, :] + c[:, None] * jnp.sin(angle)[None, :]

    return lax.fori_loop(0, pairs, add, jnp.zeros((rows.shape[0], position.shape[0]), jnp.float32))


def _body(*refs, plan: Plan, names, forms, value_key, slots, page, parts, per_split, mask, scale, softcap, mass):
    inputs = dict(zip(names, refs, strict=False))
    out_ref, lse_ref, *scores_ref = refs[len(names) + mass :]
    heads = out_ref.shape[1]
    b, h, split = pl.program_id(0) // heads, pl.program_id(0) % heads, pl.program_id(2)
    rows = pl.program_id(1) * plan.rows + jnp.arange(plan.rows)
    q_pos = plt.load(inputs["q_pos"].at[b, rows])
    query = _load_query(inputs["q"], b, h, rows, forms["k"])
    extra = _load_query(inputs["q_extra"], b, h, rows, forms["e"]) if "e" in forms else None
    value_form = forms[value_key]

    def per_slot(name: str, slot: Array, exists: Array | None, other):
        ref = inputs[name]
        return load(ref.at[b, h if ref.shape[1] > 1 else jnp.int32(0), slot], exists, other)

    def step(i, carry):
        peak, total, acc = carry
        slot = i * plan.tile + jnp.arange(plan.tile)
        exists = slot < slots if slots % plan.tile else None
        safe = slot if exists is None else jnp.where(exists, slot, 0)
        at = Where(b, h, safe, exists)
        if page:
            number = inputs["pages"][b, i * plan.tile // page]
            at = Where(number // parts, h, number % parts * page + slot % page, exists)
        if "pos" in inputs:
            position = per_slot("pos", safe, exists, -1)
        else:
            filled = slot < jnp.minimum(inputs["count"][b], slots)
            position = jnp.where(filled, slot + inputs["start"][b], -1)
        visible = seen(q_pos[:, None], position[None, :], **mask)
        found = _scores(inputs, "k", forms["k"], query, at)
        if extra is not None:
            found += _scores(inputs, "e", forms["e"], extra, at)
        if "centre" in inputs:
            found += _centre_scores(inputs, b, h, rows, position)
        found = found * scale
        if softcap is not None:
            found = softcap * jnp.tanh(found / softcap)
        if "bias" in inputs:
            found += per_slot("bias", safe, exists, 0.0)[None, :]
        found = jnp.where(visible, found, MASKED)
        if mass:
            where = scores_ref[0].at[b, h, rows[:, None], safe[None, :]]
            plt.store(where, found, mask=None if exists is None else jnp.broadcast_to(exists[None, :], found.shape))
        newest = jnp.maximum(peak, jnp.max(found, axis=1))
        # A row that has seen nothing yet has its peak at MASKED: half of it makes the masked exponentials zero.
        probs = jnp.exp2((found - jnp.maximum(newest, MASKED / 2)[:, None]) * LOG2E)
        decay = jnp.exp2((peak - newest) * LOG2E)
        acc = [decay[:, None] * each for each in acc]
        acc = _add_values(inputs, value_key, value_form, probs, visible, at, acc)
        return newest, decay * total + jnp.sum(probs, axis=1), tuple(acc)

    block = pl.program_id(1)
    first = jnp.maximum(inputs["limits"][b, block, 0], split * per_split)
    last = jnp.minimum(inputs["limits"][b, block, 1], (split + 1) * per_split)
    fresh = jnp.full((plan.rows,), MASKED, jnp.float32), jnp.zeros((plan.rows,), jnp.float32)
    empty = tuple(jnp.zeros((plan.rows, piece.size), jnp.float32) for piece in value_form.pieces)
    peak, total, acc = lax.fori_loop(first, jnp.maximum(last, first), step, (*fresh, empty))
    nothing = total == 0.0
    divisor = jnp.where(nothing, 1.0, total)
    plt.store(lse_ref.at[b, h, split, rows], jnp.where(nothing, -jnp.inf, peak + jnp.log(divisor)))
    offset = 0
    for piece, each in zip(value_form.pieces, acc, strict=True):
        channel = offset + jnp.arange(piece.size)
        plt.store(out_ref.at[b, h, split, rows[:, None], channel[None, :]], each / divisor[:, None])
        offset += piece.size
