"""Inputs for tests of kernels: random codes in any form, pages, queries at ragged positions; and the table of cases.

Bounds are relative errors of outputs: 3e-3 for products of bfloat16 (rounding of queries and probabilities), 1e-5 for float32.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from memjax.pallas_kernels.codes import BITS, Codes, absmax_encode, dense, pack, sparse
from memjax.pallas_kernels.decode import Centre
from memjax.pallas_kernels.slots import Span

TABLE, TABLE8 = (tuple(int(x) for x in np.round(127 * np.tanh(np.linspace(-2, 2, n)))) for n in (16, 8))


def random_codes(
    rng,
    fmt: str,
    shape,
    *,
    grid="uniform",
    groups: int = 1,
    tile: int = 0,
    zero: bool = False,
    gain: int = 0,
    bare: bool = False,
    dtype="bfloat16",
) -> Codes:
    """Codes [..., H, S]: of a Gaussian in the plain forms, else random codes, scales per group of channels or slot tile.

    ``gain``: 1 for one gain per slot, more for one per channel and so many slots. ``bare``: without scales.
    """
    x = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    if fmt == "dense":
        return dense(x, dtype)
    if bare:
        return dataclasses.replace(absmax_encode(x, fmt), scale=None)
    if fmt in ("e4m3", "e5m2") or (grid == "uniform" and groups == 1 and not tile and not zero and not gain):
        return absmax_encode(x, fmt)
    *lead, dim, slots = shape
    half = 2 ** (BITS[fmt] - 1)
    codes = rng.integers(-half + (fmt == "int8"), half, shape).astype(np.int8)
    sizes = (*lead, dim, slots // tile) if tile else (*lead, slots) if groups == 1 else (*lead, groups, slots)
    unit = 1.0 if grid == "cubic" else 1.5 / half if isinstance(grid, str) else 1 / 80
    scale = jnp.asarray(rng.uniform(0.5, 1.0, sizes) * unit, jnp.bfloat16)
    offset = jnp.asarray(rng.uniform(-0.2, 0.2, sizes), jnp.bfloat16) if zero else None
    sizes = (*lead, slots) if gain == 1 else (*lead, dim, slots // max(gain, 1))
    gains = jnp.asarray(rng.uniform(0.5, 1.0, sizes), jnp.bfloat16) if gain else None
    return Codes(pack(jnp.asarray(codes), fmt), scale, fmt, offset, grid, gains)


def random_sparse(rng, shape, count: int, rest: int, like: Codes) -> Codes:
    """``count`` numbers per slot at places of their own among the channels of ``shape``, and ``rest`` dense channels."""
    *lead, dim, slots = shape
    places = np.argsort(rng.random(shape), axis=-2)[..., :count, :]
    values, more = (rng.standard_normal((*lead, n, slots)) for n in (count, rest))
    dtype = like.data.dtype if like.fmt == "dense" else jnp.bfloat16
    return sparse(*(jnp.asarray(x) for x in (values, places)), dim, jnp.asarray(more) if rest else None, dtype)


@dataclass(frozen=True)
class Case:
    """A call of ``decode``; ``keys``, ``values`` are further arguments of ``random_codes``."""

    fmt: str = "int4"
    value_fmt: str | None = None  # None: the keys'
    batch: int = 2
    heads: int = 2
    rows: int = 4
    dim: int = 64
    slots: int = 300
    lengths: tuple[int, ...] = (300, 151)
    page: int = 0
    parts: int = 1  # pages of a block of the pool
    scattered: bool = False  # positions in any order with holes, else consecutive
    shared: bool = False  # by all heads: those positions
    bias: bool = False
    centre: int = 0
    latent: int = 0  # channels of an extra part; the keys are the values then
    entries: int = 0  # per slot of a second stream, of sparse keys beside the others and of sparse values
    rest: int = 4  # dense channels of that stream
    keys: dict = field(default_factory=dict)
    values: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    bound: float = 3e-3  # relative error of the output: bfloat16 products, whatever the codes


def build(case: Case, seed: int = 0) -> tuple[tuple, dict]:
    """(q, k, v) and the keyword arguments of ``decode`` for a case."""
    rng = np.random.default_rng(seed)
    pages = -(-case.slots // case.page) if case.page else 0
    pool = -(-(case.batch * pages + 3) // case.parts)
    slots = pages * case.page if case.page else case.slots
    lead = (pool, case.heads) if case.page else (case.batch, case.heads)
    shape = (*lead, case.dim, case.page * case.parts or slots)
    k = random_codes(rng, case.fmt, shape, **case.keys)
    v = None if case.latent else random_codes(rng, case.value_fmt or case.fmt, shape, **case.values)
    if case.entries:
        v = random_sparse(rng, shape, case.entries, case.rest, k)
    q_shape = (case.batch, case.heads, case.rows)
    dtype = k.data.dtype if k.fmt == "dense" else jnp.bfloat16
    q = jnp.asarray(rng.standard_normal((*q_shape, case.dim)), dtype)
    length = jnp.asarray(case.lengths[: case.batch], jnp.int32)
    kw = {"scale": case.dim**-0.5} | case.options
    if case.scattered:
        order = np.stack([[rng.permutation(slots) for _ in range(case.heads)] for _ in range(case.batch)])
        order = np.where(rng.random(order.shape) < 0.3, -1, order)
        kw["k_pos"] = jnp.asarray(order[:, :1] if case.shared else order, jnp.int32)
        kw["q_pos"] = jnp.asarray(rng.integers(slots // 2, slots, (case.batch, case.rows)), jnp.int32)
    else:
        start = jnp.arange(case.batch, dtype=jnp.int32) * 3
        kw["k_pos"] = Span(start, length)
        kw["q_pos"] = (start + length - 1)[:, None] - jnp.arange(case.rows, dtype=jnp.int32) % 2
    if case.page:
        table = rng.permutation(pool * case.parts)[: case.batch * pages].reshape(case.batch, pages)
        used = np.asarray(-(-length // case.page))[:, None] if not case.scattered else pages
        if case.parts > 1:
            kw["page"] = case.page
        kw["table"] = jnp.asarray(np.where(np.arange(pages) < used, table, 10**6), jnp.int32)
    if case.bias:
        kw["bias"] = jnp.asarray(rng.standard_normal((case.batch, case.heads, slots)), jnp.float32)
    if case.centre:
        kw["centre"] = random_centre(rng, q_shape, case.centre)
    if case.latent:
        kw["q_extra"] = jnp.asarray(rng.standard_normal((*q_shape, case.latent)), jnp.bfloat16)
        kw["k_extra"] = random_codes(rng, "dense", (*lead, case.latent, shape[-1]))
    if case.entries:
        kw["q_extra"] = jnp.asarray(rng.standard_normal((*q_shape, case.dim + case.rest)), dtype)
        kw["k_extra"] = random_sparse(rng, shape, case.entries, case.rest, k)
    return (q, k, v), kw


def random_centre(rng, shape: tuple[int, ...], pairs: int) -> Centre:
    """A centring term for query rows of ``shape``."""
    weights = jnp.asarray(rng.standard_normal((*shape, 2 * pairs)), jnp.float32)
    return Centre(weights, np.float32(1e4 ** (-np.arange(pairs) / pairs)))


def relative(x, expected) -> float:
    """Relative error of finite entries; entries that are not finite must be equal."""
    x, expected = np.asarray(x, np.float64), np.asarray(expected, np.float64)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(x[~finite], expected[~finite])
    size = np.linalg.norm(expected[finite])
    return float(np.linalg.norm(x[finite] - expected[finite]) / (size or 1.0))


def with_nan_scales(codes: Codes, free: jax.Array) -> Codes:
    """The same codes, with a NaN for the scale of every free slot [B, K, S]."""
    return dataclasses.replace(codes, scale=jnp.where(free, jnp.nan, codes.scale.astype(jnp.float32)).astype(jnp.bfloat16))


F32 = {"dtype": "float32"}
ZERO = {"zero": True}
KVARN = {"keys": ZERO | {"tile": 128, "gain": 1}, "values": ZERO | {"gain": 128}}
CASES = {
    **{fmt: Case(fmt) for fmt in ("dense", "int8", "int4", "int3", "int2", "e4m3", "e5m2")},
    "float32": Case("dense", keys=F32, values=F32, bound=1e-5),
    "K4V2, 96 channels": Case("int4", "int2", dim=96, heads=1, rows=1),
    "K8V4, 80 channels": Case("int8", "int4", dim=80, rows=8),
    "dense keys, int2 values, 128 channels": Case("dense", "int2", dim=128, rows=5),
    "256 channels": Case("int4", dim=256, rows=2),
    "int8 without scales": Case("int8", keys={"bare": True}, values={"bare": True}, options={"scale": 2e-4}),
    "int4 without scales": Case("int4", keys={"bare": True}, values={"bare": True}, options={"scale": 2e-3}),
    "cubic": Case(keys={"grid": "cubic"}, values={"grid": "cubic"}, bound=6e-3),
    "cubic int2": Case("int2", keys={"grid": "cubic"}, values={"grid": "cubic"}, bound=6e-3),
    "cubic int3": Case("int3", keys={"grid": "cubic"}, values={"grid": "cubic"}, bound=6e-3),
    "table": Case(keys={"grid": TABLE}, values={"grid": TABLE}),
    "int3 table": Case("int3", keys={"grid": TABLE8}, values={"grid": TABLE8}),
    "K3V2, 96 channels": Case("int3", "int2", dim=96, heads=1, rows=1),
    "K4V3, 128 channels, groups": Case("int4", "int3", dim=128, values=ZERO | {"groups": 4}),
    "zero points": Case(keys=ZERO, values=ZERO),
    "groups of channels": Case(keys=ZERO | {"groups": 2}, values=ZERO | {"groups": 4}),
    "KIVI": Case("int2", slots=384, keys=ZERO | {"tile": 32}, values=ZERO | {"groups": 2}),
    "KVarN": Case("int2", slots=384, lengths=(384, 129), **KVARN),
    "KVarN in 3 bits": Case("int3", slots=384, lengths=(384, 200), **KVARN),
    "KVarN, 5 heads of 40 rows": Case("int2", heads=5, batch=1, rows=40, slots=1536, lengths=(1400,), **KVARN),
    "gains per slot": Case(keys=ZERO | {"gain": 1}, values={"groups": 2, "gain": 1}),
    "gains per channel and 32 slots": Case(slots=320, keys=ZERO | {"gain": 32}, values={"gain": 32}),
    "gains per channel and 256 slots": Case(slots=768, lengths=(700, 257), keys={"gain": 256}, values=ZERO | {"gain": 256}),
    "positions and gains per channel": Case("int3", slots=256, scattered=True, **KVARN),
    "pages of KVarN": Case("int2", page=128, slots=600, **KVARN),
    "scales per channel, a short last run": Case(slots=320, keys=ZERO | {"tile": 32}),
    "scales per channel and 128 slots": Case(slots=384, keys=ZERO | {"tile": 128}),
    "scales per channel and 256 slots": Case(slots=512, keys={"tile": 256}, lengths=(512, 257)),
    "positions": Case(scattered=True),
    "window and softcap": Case(options={"window": 50, "softcap": 2.0}),
    "recent and sinks": Case(scattered=True, options={"recent": 50, "sinks": 3}),
    "bias": Case(bias=True, options={"softcap": 5.0}),
    "centre": Case(centre=8, slots=1300, lengths=(1300, 700), options={"window": 600}),
    "centre and positions": Case(centre=13, scattered=True),
    "centre and positions of all heads": Case("int8", centre=8, scattered=True, shared=True),
    "latent": Case("int8", heads=1, rows=20, dim=128, latent=32),
    "sparse": Case(entries=2),
    "sparse, 80 channels, float32": Case("dense", dim=80, entries=3, rest=1, keys=F32, bound=1e-5),
    "sparse, without dense rows, 256 channels": Case(dim=256, rows=2, entries=5, rest=0),
    "pages of sparse": Case("int8", page=128, slots=600, entries=1, scattered=True),
    "pages of 32 of sparse": Case(page=32, parts=4, slots=400, lengths=(385, 1), entries=1, rest=2),
    "lengths 0 and 1": Case(lengths=(0, 1)),
    "several tiles": Case("dense", slots=9000, lengths=(9000, 4097), heads=1),
    "pages of 128, one token past": Case(page=128, slots=600, lengths=(600, 129)),
    "pages of 256": Case("int8", "int4", page=256, slots=700, lengths=(512, 1)),
    "pages with positions": Case(page=128, slots=600, scattered=True),
    "pages of KIVI": Case("int2", page=128, slots=600, keys=ZERO | {"tile": 32}, values=ZERO | {"groups": 2}),
    "pages of 16": Case(page=16, parts=8, slots=600, lengths=(600, 17), options={"window": 300}),
    "pages of 64, several heads": Case("int8", "int2", page=64, parts=4, heads=16, rows=1, slots=200, lengths=(200, 64)),
    "pages of 16 with positions": Case("dense", page=16, parts=8, slots=72, scattered=True, bias=True),
    "pages of 32 with centre": Case("int3", page=32, parts=4, slots=400, lengths=(385, 1), centre=8),
    "pages of 32 of KIVI": Case("int2", page=32, parts=4, slots=416, keys=ZERO | {"tile": 32}, values=ZERO | {"groups": 2}),
    "pages of 256 in blocks of 512": Case("int8", "int4", page=256, parts=2, slots=700, lengths=(512, 1)),
    "latent in pages of 64": Case("int8", heads=1, rows=20, dim=128, latent=32, page=64, parts=2),
    "pages with centre": Case(page=128, slots=600, centre=8),
    "pages with centre and positions": Case(page=128, slots=300, centre=8, scattered=True, shared=True),
    "sixteen heads": Case(heads=16, rows=1, batch=1, slots=130, lengths=(130,)),
}
# Interpreting many pages takes a TPU kernel long; the fast run has pages of each size, of codes in tiles and with positions.
LONG = ("pages of 64, several heads", "pages of 32 of KIVI", "pages of 32 of sparse", "pages of 32 with centre")
LONG = (*LONG, "pages of sparse", "pages of KVarN", "pages with positions", "pages with centre", "latent in pages of 64")
LONG = (*LONG, "pages with centre and positions", "pages of 256 in blocks of 512", "KVarN, 5 heads of 40 rows")


def check(found, expected, bound):
    """Outputs within the bound; log-sum-exps and masses, which do not depend on values, within theirs."""
    for x, reference, limit in zip(found, expected, (bound, bound / 2, bound), strict=False):
        assert relative(x, reference) < limit


def chunk(
    fmt="dense", groups=3, tokens=37, slots=300, page=0, parts=1, dtype="bfloat16", scattered=False, centre=0, **options
):
    """A chunk of new tokens: row 0 behind 200 tokens of history, row 1 at the beginning and two tokens short."""
    case = Case(fmt, slots=slots, page=page, parts=parts, scattered=scattered, lengths=(200 + tokens, tokens - 2))
    (_, k, v), kw = build(case)
    if dtype == "float32":
        k, v = (dense(x.decode(jnp.float32)) for x in (k, v))
    rng = np.random.default_rng(1)
    q = jnp.asarray(rng.standard_normal((2, 2, groups * tokens, case.dim)), dtype)
    kw = {name: kw[name] for name in ("k_pos", "table", "page") if name in kw}
    if not scattered:
        kw["k_pos"] = Span(jnp.zeros(2, jnp.int32), kw["k_pos"].count)
    if centre:
        kw["centre"] = random_centre(rng, q.shape[:3], centre)
    return (q, k, v), kw | {"q_start": jnp.array([200, 0], jnp.int32), "groups": groups, "scale": 0.125} | options


PREFILL = {
    "dense": {},
    "int4 history": {"fmt": "int4"},
    "float32": {"dtype": "float32"},
    "one group, 8 tokens": {"groups": 1, "tokens": 8},
    "window and softcap": {"window": 20, "softcap": 3.0},
    "recent and sinks": {"recent": 20, "sinks": 3},
    "several blocks": {"tokens": 300, "slots": 1500, "groups": 2},
    "pages": {"fmt": "int8", "page": 128, "slots": 512},
    "pages of 32": {"fmt": "int4", "page": 32, "parts": 4, "tokens": 100, "slots": 400},
    "positions": {"fmt": "int4", "scattered": True},
    "centre": {"fmt": "int4", "centre": 8, "tokens": 20},
    "centre and positions": {"fmt": "int4", "centre": 8, "tokens": 20, "scattered": True},
}
