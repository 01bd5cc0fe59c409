"""Flash attention on a GPU over slots of packed codes: the one kernel behind decode, prefill and multi-head latent decode.

A program takes a block of query rows of one kv head and a part of the sequence; channels are worked on in pieces of a power of
two, each a row range of one bit plane, so that unpacking is a shift and a mask and nothing is ever interleaved. Parts of the
sequence are merged by their log-sum-exp (Flash-Decoding).

It is written for Pallas' Triton backend, which JAX has deprecated in favour of Mosaic GPU: the latter's low-bit operands
cannot be interpreted, so the numbers of such a kernel could not be checked without a GPU, these can. Experimental: checked in
interpret mode and compiled ahead of time, never run on a GPU.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array

from memjax.pallas_kernels.choose import Target
from memjax.pallas_kernels.codes import BITS, CUBIC, Codes, planes
from memjax.pallas_kernels.decode.reference import Centre
from memjax.pallas_kernels.slots import Positions, Span, seen

MASKED = -1e30  # a score that is as good as -inf and has no NaN among its differences
LOG2E = math.log2(math.e)
LARGEST_PIECE, SMALLEST_PIECE = 128, 16


def why_not(on: Target, arrays: dict) -> str | None:
    """The reason why this kernel cannot serve a case on a GPU; None if it can."""
    k, v = arrays["k"], arrays["v"]
    old = any(name in on.kind for name in ("A100", "A10", "A30", "A40", "RTX 30", "T4", "V100"))
    for name, codes in (("keys", k), ("values", v), ("extra keys", arrays.get("k_extra"))):
        if codes is None:
            continue
        if codes.fmt in ("e4m3", "e5m2") and old:
            return f"{name} are {codes.fmt}, which needs a GPU of compute capability 8.9 or more, not {on.kind}"
        for factor in (codes.scale, codes.zero):
            if factor is None or factor.ndim < codes.data.ndim:
                continue
            rows, slots = factor.shape[-2:]
            if slots != codes.slots and (rows != codes.dim or name == "values"):
                return f"{name} have scales [{rows}, {slots}] for [{codes.dim}, {codes.slots}] values: tiles over both axes"
            if slots == codes.slots and codes.dim // rows < SMALLEST_PIECE:
                return f"{name} have groups of {codes.dim // rows} channels; the kernel's smallest is {SMALLEST_PIECE}"
    if arrays.get("table") is not None and (k.slots < 16 or k.slots & (k.slots - 1)):
        return f"pages of {k.slots} slots; the kernel needs a power of two of at least 16"
    if arrays.get("centre_weights") is not None and not isinstance(arrays["k_pos"], Span):
        return "a centring term needs consecutive positions (a Span)"
    return None


@dataclass(frozen=True)
class Plan:
    """Static sizes of one call: rows of a program, slots of a tile, parts of the sequence, warps and pipeline stages."""

    rows: int
    tile: int
    splits: int
    warps: int = 4
    stages: int = 2


class Piece(NamedTuple):
    """A power of two of channels: ``size`` stored rows from ``row`` on, in bit plane ``plane``; ``valid`` of them exist."""

    row: int
    size: int
    valid: int
    plane: int
    channel: int  # of the first row
    group: int


@dataclass(frozen=True)
class Form:
    """Static facts of codes."""

    fmt: str
    grid: str | tuple
    stored: int
    dim: int
    dtype: jnp.dtype  # of the products' operands
    groups: int  # of channels with a scale per slot each; 0: no scales
    tile: int  # slots per scale of each channel; 0: scales are per slot
    zero: bool

    @property
    def line(self) -> tuple[float, float]:
        """(alpha, beta): level = alpha code + beta."""
        return (2.0, 1.0) if self.fmt in ("int4", "int2") and self.grid == "uniform" else (1.0, 0.0)

    @property
    def pieces(self) -> list[Piece]:
        largest = LARGEST_PIECE
        if self.groups > 1:
            largest = min(largest, (self.dim // self.groups) & -(self.dim // self.groups))
        found = []
        for plane in range(planes(self.fmt)):
            row = 0
            while row < self.stored:
                left = self.stored - row
                size = min(largest, max(SMALLEST_PIECE, 1 << (left.bit_length() - 1)))
                channel = plane * self.stored + row
                group = channel * max(self.groups, 1) // self.dim
                found.append(Piece(row, size, min(size, left), plane, channel, group))
                row += size
        return found

    @property
    def padded(self) -> int:
        """Channels with those that complete a piece to a power of two."""
        return sum(piece.size for piece in self.pieces)

    def unpad(self, out: Array) -> Array:
        """Outputs [..., padded] without the channels that do not exist."""
        if self.padded == self.dim:
            return out
        ends = list(itertools.accumulate(piece.size for piece in self.pieces))
        starts = [end - piece.size for end, piece in zip(ends, self.pieces, strict=True)]
        parts = [out[..., at : at + piece.valid] for at, piece in zip(starts, self.pieces, strict=True)]
        return jnp.concatenate(parts, axis=-1)


def form_of(codes: Codes) -> Form:
    """What the kernel needs to know of codes while it is traced."""
    dense = codes.fmt == "dense"
    groups = tile = 0
    if codes.scale is not None:
        groups = 1
        if codes.scale.ndim == codes.data.ndim and codes.scale.shape[-1] == codes.slots:
            groups = codes.scale.shape[-2]
        elif codes.scale.ndim == codes.data.ndim:
            tile = codes.slots // codes.scale.shape[-1]
    dtype = jnp.dtype(codes.data.dtype if dense else jnp.bfloat16)
    stored = codes.data.shape[-2]
    return Form(codes.fmt, codes.grid, stored, codes.dim, dtype, groups, tile, codes.zero is not None)


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
    slots = k.slots * (1 if table is None else table.shape[1])
    inputs = {"q": q.astype(forms["k"].dtype), "q_pos": q_pos.astype(jnp.int32)}
    if q_extra is not None:
        inputs["q_extra"] = q_extra.astype(forms["e"].dtype)
    for key, each in codes.items():
        inputs[key] = each.data
        for kind, factor in (("scale", each.scale), ("zero", each.zero)):
            if factor is not None:
                inputs[f"{key}_{kind}"] = factor if factor.ndim == each.data.ndim else factor[..., None, :]
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
        inputs["pages"] = jnp.clip(table.astype(jnp.int32), 0, k.data.shape[0] - 1)
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
        page=k.slots if table is not None else 0,
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


def _levels(stored: Array, form: Form, plane: int, table_ref) -> Array:
    """A piece's stored bytes [size, T] as operands."""
    if form.fmt not in ("int4", "int2"):
        return stored.astype(form.dtype)
    bits = BITS[form.fmt]
    # Two's complement to an offset code; 128 + code is an exact bfloat16 made of its bits alone.
    code = ((stored >> (bits * plane)) & (2**bits - 1)) ^ (1 << (bits - 1))
    if not isinstance(form.grid, str):
        return plt.load(table_ref.at[code.astype(jnp.int32)])
    number = lax.bitcast_convert_type(code.astype(jnp.uint16) | jnp.uint16(0x4300), jnp.bfloat16)
    middle = 128 + (1 << (bits - 1))
    if form.grid == "uniform":
        return number - jnp.bfloat16(middle)
    x = number - jnp.bfloat16(middle) + jnp.bfloat16(0.5)
    a, b = (jnp.bfloat16(c) for c in CUBIC[form.fmt])
    return x * (a + b * (x * x))


def _dot(a: Array, b: Array) -> Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


class _Where(NamedTuple):
    """Where a tile lies: leading index of its page or row, kv head, slots [T] there and which exist (None: all)."""

    lead: Array
    head: Array
    slot: Array
    exists: Array | None


def _load(ref, mask: Array | None, other=0.0) -> Array:
    """What lies at ``ref``, with ``other`` where the mask, if any, is false."""
    return plt.load(ref) if mask is None else plt.load(ref, mask=mask, other=other)


def _factor(refs: dict, name: str, at: _Where, group: int) -> Array:
    """Scales or zero points [T] of a group; those of slots that do not exist are 0."""
    ref = refs[name].at[at.lead, at.head, jnp.int32(group), at.slot]
    return _load(ref, at.exists).astype(jnp.float32)


def _piece(refs: dict, key: str, form: Form, piece: Piece, at: _Where) -> Array:
    """Operands [size, T]: levels, or with scales of slot tiles the decoded numbers."""
    row = piece.row + jnp.arange(piece.size)
    mask = None if at.exists is None else jnp.broadcast_to(at.exists[None, :], (piece.size, at.slot.shape[0]))
    if piece.valid < piece.size:
        rows = jnp.broadcast_to((row < form.stored)[:, None], (piece.size, at.slot.shape[0]))
        mask = rows if mask is None else rows & mask
    ref = refs[key].at[at.lead, at.head, row[:, None], at.slot[None, :]]
    zero = jnp.zeros((), refs[key].dtype)
    levels = _levels(_load(ref, mask, zero), form, piece.plane, refs.get(f"{key}_table"))
    if not form.tile:
        return levels
    alpha, beta = form.line
    channel = piece.plane * form.stored + row
    where = (at.lead, at.head, channel[:, None], at.slot[None, :] // form.tile)
    x = alpha * levels.astype(jnp.float32) + beta
    x = x * _load(refs[f"{key}_scale"].at[where], mask).astype(jnp.float32)
    if form.zero:
        x = x + _load(refs[f"{key}_zero"].at[where], mask).astype(jnp.float32)
    return x.astype(form.dtype)


def _load_query(ref, b, h, rows: Array, form: Form) -> list[tuple[Array, Array]]:
    """Pieces [M, size] of the query rows and their sums [M]."""
    found = []
    for piece in form.pieces:
        lane = jnp.arange(piece.size)
        whole = piece.valid == piece.size
        mask = None if whole else jnp.broadcast_to((lane < piece.valid)[None, :], (rows.shape[0], piece.size))
        at = ref.at[b, h, rows[:, None], (piece.channel + jnp.where(lane < piece.valid, lane, 0))[None, :]]
        x = _load(at, mask, jnp.zeros((), ref.dtype))
        found.append((x, jnp.sum(x.astype(jnp.float32), axis=1)))
    return found


def _scores(refs: dict, key: str, form: Form, query: list, at: _Where) -> Array:
    """[M, T] for one stream of keys, scales included."""
    alpha, beta = (1.0, 0.0) if form.tile else form.line
    shape = (query[0][0].shape[0], at.slot.shape[0])
    total = jnp.zeros(shape, jnp.float32)
    for group in range(max(form.groups, 1)):
        found, sums = jnp.zeros(shape, jnp.float32), jnp.zeros(shape[:1], jnp.float32)
        for piece, (rows, each) in zip(form.pieces, query, strict=True):
            if piece.group == group:
                found += _dot(rows, _piece(refs, key, form, piece, at))
                sums += each
        found = alpha * found + beta * sums[:, None] if beta else found
        if form.groups and not form.tile:
            found = found * _factor(refs, f"{key}_scale", at, group)[None, :]
            if form.zero:
                found += sums[:, None] * _factor(refs, f"{key}_zero", at, group)[None, :]
        total += found
    return total


def _add_values(refs: dict, key: str, form: Form, probs: Array, mask: Array, at: _Where, acc: list[Array]) -> list[Array]:
    """The accumulators [M, size] of all pieces with a tile's weighted values added."""
    alpha, beta = form.line
    weights, offsets = {}, {}
    for group in range(max(form.groups, 1)):
        weight = probs
        if form.groups:  # scales of free slots may be NaN: their weight is zero, not 0 * NaN
            weight = jnp.where(mask, probs * _factor(refs, f"{key}_scale", at, group)[None, :], 0.0)
        offset = beta * jnp.sum(weight, axis=1) if beta else None
        if form.zero:
            zeros = jnp.where(mask, probs * _factor(refs, f"{key}_zero", at, group)[None, :], 0.0)
            offset = jnp.sum(zeros, axis=1) + (0.0 if offset is None else offset)
        weights[group], offsets[group] = weight.astype(form.dtype), offset
    found = []
    for piece, before in zip(form.pieces, acc, strict=True):
        after = _dot(weights[piece.group], _piece(refs, key, form, piece, at).T)
        after = after if alpha == 1.0 else alpha * after
        offset = offsets[piece.group]
        found.append(before + (after if offset is None else after + offset[:, None]))
    return found


def _centre_scores(refs: dict, b, h, rows: Array, slot: Array) -> Array:
    """The centring term of a tile, [M, T]: pair by pair, since pairs are few and tiles are small."""
    position = (slot + refs["start"][b]).astype(jnp.float32)
    pairs = refs["frequency"].shape[0]

    def add(j, total):
        angle = refs["frequency"][j] * position
        a, c = (plt.load(refs["centre"].at[b, h, rows, j + side * pairs]) for side in (0, 1))
        return total + a[:, None] * jnp.cos(angle)[None, :] + c[:, None] * jnp.sin(angle)[None, :]

    return lax.fori_loop(0, pairs, add, jnp.zeros((rows.shape[0], slot.shape[0]), jnp.float32))


def _body(*refs, plan: Plan, names, forms, value_key, slots, page, per_split, mask, scale, softcap, mass):
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
        return _load(ref.at[b, h if ref.shape[1] > 1 else jnp.int32(0), slot], exists, other)

    def step(i, carry):
        peak, total, acc = carry
        slot = i * plan.tile + jnp.arange(plan.tile)
        exists = slot < slots if slots % plan.tile else None
        safe = slot if exists is None else jnp.where(exists, slot, 0)
        at = _Where(b, h, safe, exists)
        if page:
            at = _Where(inputs["pages"][b, i * plan.tile // page], h, slot % page, exists)
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
            found += _centre_scores(inputs, b, h, rows, slot)
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
