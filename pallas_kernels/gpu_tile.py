"""What a GPU kernel knows of codes while it is traced, and how it reads a tile of them.

Channels are worked on in pieces of a power of two, each a row range of one bit plane, so that unpacking is a shift and a mask
and nothing is ever interleaved. Factors per slot multiply scores and probabilities; a tile whose factors differ over slots and
channels is decoded.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt
from jaxtyping import Array

from memjax.pallas_kernels.codes import BITS, CUBIC, PACKED, Codes, Entries, planes

LARGEST_PIECE, SMALLEST_PIECE = 128, 16
KINDS = ("scale", "zero", "gain")


class Piece(NamedTuple):
    """A power of two of channels: ``size`` stored rows from ``row`` on, in bit plane ``plane``; ``valid`` of them exist."""

    row: int
    size: int
    valid: int
    plane: int
    channel: int  # of the first row
    group: int


class Factor(NamedTuple):
    """Scales, zero points or gains: for each of ``rows`` groups of channels and ``run`` slots one."""

    kind: str
    rows: int
    run: int


@dataclass(frozen=True)
class Form:
    """Static facts of codes; ``dtype`` is that of the products' operands."""

    fmt: str
    grid: str | tuple
    dim: int
    dtype: jnp.dtype
    factors: tuple[Factor, ...]
    entries: Entries | None = None

    @property
    def decoded(self) -> bool:
        """Whether tiles are decoded before they are multiplied, because of factors that differ over slots and channels."""
        return any(factor.run > 1 for factor in self.factors)

    @property
    def groups(self) -> int:
        """Groups of channels with factors per slot of their own, which multiply scores and probabilities."""
        return 1 if self.decoded else max((factor.rows for factor in self.factors), default=1)

    def folded(self, factor: Factor) -> bool:
        """Whether a factor multiplies scores and probabilities rather than decoded numbers."""
        return not self.decoded or (factor.kind == "gain" and factor.rows == factor.run == 1)

    @property
    def line(self) -> tuple[float, float]:
        """(alpha, beta): level = alpha code + beta."""
        return (2.0, 1.0) if self.fmt in PACKED and self.grid == "uniform" else (1.0, 0.0)

    @property
    def plane(self) -> int:
        """Channels of a bit plane: stored rows, but for the last bits of int3."""
        return self.dim // planes(self.fmt)

    @property
    def pieces(self) -> list[Piece]:
        largest = LARGEST_PIECE
        if self.groups > 1:
            largest = min(largest, (self.dim // self.groups) & -(self.dim // self.groups))
        found = []
        for plane in range(planes(self.fmt)):
            row = 0
            while row < self.plane:
                left = self.plane - row
                size = min(largest, max(SMALLEST_PIECE, 1 << (left.bit_length() - 1)))
                channel = plane * self.plane + row
                found.append(Piece(row, size, min(size, left), plane, channel, channel * self.groups // self.dim))
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
    factors = []
    for kind, factor in zip(KINDS, (codes.scale, codes.zero, codes.gain), strict=True):
        if factor is not None:
            rows = factor.shape[-2] if codes.tiled(factor) else 1
            factors.append(Factor(kind, rows, codes.slots // factor.shape[-1]))
    dtype = jnp.dtype(codes.data.dtype if codes.fmt in ("dense", "sparse") else jnp.bfloat16)
    return Form(codes.fmt, codes.grid, codes.dim, dtype, tuple(factors), codes.entries)


class Where(NamedTuple):
    """Where a tile lies: leading index of its page or row, kv head, slots [T] there and which exist (None: all)."""

    lead: Array
    head: Array
    slot: Array
    exists: Array | None


def load(ref, mask: Array | None, other=0.0) -> Array:
    """What lies at ``ref``, with ``other`` where the mask, if any, is false."""
    return plt.load(ref) if mask is None else plt.load(ref, mask=mask, other=other)


def _levels(code: Array, form: Form, table_ref) -> Array:
    """Operands of stored numbers or, where several are packed into a byte, of offset codes (0 .. 2^bits - 1, uint8)."""
    if form.fmt not in PACKED:
        return code.astype(form.dtype)
    if not isinstance(form.grid, str):
        return plt.load(table_ref.at[code.astype(jnp.int32)])
    # 128 + code is an exact bfloat16 made of its bits alone.
    number = lax.bitcast_convert_type(code.astype(jnp.uint16) | jnp.uint16(0x4300), jnp.bfloat16)
    middle = 128 + (1 << (BITS[form.fmt] - 1))
    if form.grid == "uniform":
        return number - jnp.bfloat16(middle)
    x = number - jnp.bfloat16(middle) + jnp.bfloat16(0.5)
    a, b = (jnp.bfloat16(c) for c in CUBIC[form.fmt])
    return x * (a + b * (x * x))


def _slot_factor(refs: dict, key: str, form: Form, kind: str, at: Where, group: int) -> Array | None:
    """Factors [T] of a group that multiply scores or probabilities; those of slots that do not exist are 0."""
    for factor in form.factors:
        if factor.kind == kind and form.folded(factor):
            row = jnp.int32(group if factor.rows > 1 else 0)
            return load(refs[f"{key}_{kind}"].at[at.lead, at.head, row, at.slot], at.exists).astype(jnp.float32)
    return None


def slot_factors(refs: dict, key: str, form: Form, at: Where, group: int) -> tuple[Array | None, Array | None]:
    """Scales and zero points [T] of a group, gains multiplied in; None: 1 and 0."""
    scale, zero, gain = (_slot_factor(refs, key, form, kind, at, group) for kind in KINDS)
    if gain is None:
        return scale, zero
    return gain if scale is None else gain * scale, None if zero is None else gain * zero


def _stored(refs: dict, key: str, form: Form, piece: Piece, at: Where, mask: Array | None) -> Array:
    """A piece's numbers [size, T], or offset codes where several are packed into a byte."""

    def read(row: Array) -> Array:
        return load(refs[key].at[at.lead, at.head, row[:, None], at.slot[None, :]], mask, jnp.zeros((), refs[key].dtype))

    stored = read(piece.row + jnp.arange(piece.size))
    if form.fmt not in PACKED:
        return stored
    bits = 2 if form.fmt == "int3" else BITS[form.fmt]
    # Two's complement to an offset code.
    code = ((stored >> (bits * piece.plane)) & (2**bits - 1)) ^ (1 << (bits - 1))
    if form.fmt != "int3":
        return code
    channel, eighth = piece.channel + jnp.arange(piece.size), form.dim // 8
    low = read(form.plane + channel % eighth) >> (channel // eighth & 7).astype(jnp.uint8)[:, None]
    return (code << 1) | (low & 1)


def _load_sparse(refs: dict, key: str, entries: Entries, piece: Piece, at: Where, mask: Array | None) -> Array:
    """A piece's numbers [size, T] of the format sparse."""
    channel, dtype = (piece.channel + jnp.arange(piece.size))[:, None], refs[key].dtype
    x = jnp.zeros((piece.size, at.slot.shape[0]), dtype)
    if piece.channel + piece.valid > entries.width:
        dense = jnp.broadcast_to(channel >= entries.width, x.shape)
        row = 2 * entries.count + jnp.maximum(channel - entries.width, 0)
        x = load(refs[key].at[at.lead, at.head, row, at.slot[None, :]], dense if mask is None else dense & mask, x)
    if piece.channel >= entries.width:
        return x
    for j in range(entries.count):
        value, place = (
            load(refs[key].at[at.lead, at.head, jnp.int32(row), at.slot], at.exists, jnp.zeros((), dtype))
            for row in (j, entries.count + j)
        )
        x = jnp.where(channel == place.astype(jnp.int32)[None, :], value[None, :], x)
    return x


def load_piece(refs: dict, key: str, form: Form, piece: Piece, at: Where, wanted: Array | None = None) -> Array:
    """Operands [size, T]: codes in the sense of ``Form.line`` or, where ``Form.decoded``, the numbers of ``wanted`` slots."""
    row = piece.row + jnp.arange(piece.size)
    shape = (piece.size, at.slot.shape[0])
    mask = None if at.exists is None else jnp.broadcast_to(at.exists[None, :], shape)
    if piece.valid < piece.size:
        rows = jnp.broadcast_to((row < form.plane)[:, None], shape)
        mask = rows if mask is None else rows & mask
    if form.entries is not None:
        return _load_sparse(refs, key, form.entries, piece, at, mask)
    x = _levels(_stored(refs, key, form, piece, at, mask), form, refs.get(f"{key}_table"))
    if not form.decoded:
        return x
    alpha, beta = form.line
    x = alpha * x.astype(jnp.float32) + beta
    channel = piece.plane * form.plane + row
    for factor in form.factors:
        if form.folded(factor):
            continue
        where = (at.lead, at.head, (channel * factor.rows // form.dim)[:, None], (at.slot // factor.run)[None, :])
        each = load(refs[f"{key}_{factor.kind}"].at[where], mask).astype(jnp.float32)
        x = x + each if factor.kind == "zero" else x * each
    if wanted is not None:
        x = jnp.where(wanted[None, :], x, 0.0)
    return x.astype(form.dtype)
