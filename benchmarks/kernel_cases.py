"""The calls that the TPU kernels are compiled for: shapes of models, codings and features, and JAX's own kernels beside them.

``Case`` is plain data (it travels to another process as JSON); ``build`` makes the function and its abstract arguments.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

# kv heads, query heads per kv head, head dimension; and what else is particular
MODELS: dict[str, dict] = {
    "smollm2-135m": {"kv_heads": 3, "groups": 3, "head_dim": 64},
    "llama-3-8b": {"kv_heads": 8, "groups": 4, "head_dim": 128},
    "llama-3-70b/8": {"kv_heads": 1, "groups": 8, "head_dim": 128},  # one of 8 devices
    "qwen3-8b": {"kv_heads": 8, "groups": 4, "head_dim": 128},
    "gemma-3-4b": {"kv_heads": 4, "groups": 2, "head_dim": 256, "window": 1024},
    "deepseek-v3": {"kv_heads": 1, "groups": 128, "head_dim": 512, "rope_dim": 64},
    "dim 64": {"kv_heads": 8, "groups": 4, "head_dim": 64},
    "dim 80": {"kv_heads": 8, "groups": 4, "head_dim": 80},
    "dim 96": {"kv_heads": 8, "groups": 4, "head_dim": 96},
    "dim 256": {"kv_heads": 8, "groups": 4, "head_dim": 256},
}
TABLE, TABLE8 = tuple(range(-120, 120, 15)), tuple(range(-120, 120, 30))  # any 16, any 8 levels
ROPE_PAIRS = 64
LANES = 128
V4_LACKS = ("int2", "e4m3", "int4 table", "int3 table")


@dataclass(frozen=True)
class Coding:
    """``Codes`` without its arrays: scales per slot, or per ``tile`` of (channels, slots); ``zero``: with zero points.

    ``scaled`` false: one number for the whole cache, which belongs into the queries and the output. ``gain``: with gains,
    "slot" or per tile of (channels, slots). ``entries``: of the format sparse, beside ``rest`` dense channels.
    """

    fmt: str
    grid: str | tuple[int, ...] = "uniform"
    tile: tuple[int, int] | None = None
    zero: bool = False
    scaled: bool = True
    gain: str | tuple[int, int] | None = None
    entries: int = 0
    rest: int = 4


CODINGS = {
    "bf16": Coding("dense"),
    "e4m3": Coding("e4m3"),
    "int8": Coding("int8"),
    "int8, one scale": Coding("int8", scaled=False),
    "int4": Coding("int4"),
    "int3": Coding("int3"),
    "int2": Coding("int2"),
    "int4 cubic": Coding("int4", "cubic"),
    "int3 cubic": Coding("int3", "cubic"),
    "int2 cubic": Coding("int2", "cubic"),
    "int4 table": Coding("int4", TABLE),
    "int3 table": Coding("int3", TABLE8),
    "int2 by 32 slots": Coding("int2", tile=(1, 32), zero=True),  # KIVI's keys
    "int2 by 128 slots": Coding("int2", tile=(1, 128), zero=True),
    "int2 by 32 channels": Coding("int2", tile=(32, 1), zero=True),  # KIVI's values
    "int2 by 128 slots, gain by slot": Coding("int2", tile=(1, 128), zero=True, gain="slot"),  # KVarN's keys
    "int2, gain by 128 slots": Coding("int2", zero=True, gain=(1, 128)),  # KVarN's values
    "int4 by 128 slots, gain by slot": Coding("int4", tile=(1, 128), zero=True, gain="slot"),
    "int4, gain by 128 slots": Coding("int4", zero=True, gain=(1, 128)),
    "sparse": Coding("sparse", entries=2),  # 8 rows: of others XLA makes a copy
}


@dataclass(frozen=True)
class Case:
    """One call. ``keys`` and ``values`` name codings; ``values`` None: the keys are the values too.

    Attributes:
      op: decode, prefill, mla_decode, append; or JAX's paged_attention, ragged_paged_attention.
      tokens: new tokens per row of the batch.
      page: slots of a page, None: contiguous. Small ones share blocks of 128.
      array: positions are an array, not a span.
      slots_per_step: overrides the step that the kernel would choose (JAX's kernels: slots of a block).
    """

    op: str = "decode"
    model: str = "llama-3-8b"
    keys: str = "int8"
    values: str | None = "int8"
    batch: int = 32
    slots: int = 32_768
    tokens: int = 1
    page: int | None = None
    array: bool = False
    bias: bool = False
    mass: bool = False
    centre: bool = False
    softcap: float | None = None
    slots_per_step: int | None = None

    @property
    def name(self) -> str:
        coding = self.keys if self.values in (None, self.keys) else f"{self.keys} / {self.values}"
        parts = [self.op, self.model, coding, f"page {self.page}" if self.page else "contiguous"]
        parts += [flag for flag in ("array", "bias", "mass", "centre") if getattr(self, flag)]
        usual = Case()
        for field in ("batch", "slots", "tokens", "softcap", "slots_per_step"):
            if getattr(self, field) != getattr(usual, field):
                parts.append(f"{field} {getattr(self, field)}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Program:
    """What is compiled.

    Attributes:
      function, arguments, donate: ``jax.jit(function, donate_argnums=donate).lower(*arguments)``.
      kernel: how the name of the kernel in it begins.
      cache: of the arguments, what the call reads or writes in place and must not copy.
      read: bytes that the kernel reads of it; None: all, once.
      vectors: pairs of a slot and a kv head that the kernel works on, over all rows of the batch and blocks of query rows.
      vectors_per_step: of them in a step of the kernel's innermost loop; None: all of them over the kernel's grid.
      prologues: branches of that loop that start the copies of a first step.
    """

    function: Callable
    arguments: tuple[Any, ...]
    donate: tuple[int, ...]
    kernel: str
    cache: Any
    vectors: int
    read: int | None = None
    vectors_per_step: int | None = None
    prologues: int = 0


def build(**fields) -> Program:
    """The program of ``Case(**fields)``."""
    case = Case(**fields)
    makers = {
        "decode": _decode,
        "prefill": _prefill,
        "mla_decode": _mla_decode,
        "append": _append,
        "paged_attention": _paged_attention,
        "ragged_paged_attention": _ragged_paged_attention,
    }
    return makers[case.op](case)


def codes(coding: Coding, lead: tuple[int, ...], dim: int, slots: int):
    """Abstract codes [*lead, C, slots]."""
    import jax
    import jax.numpy as jnp

    from memjax.pallas_kernels.codes import SCALE_DTYPE, Codes, sparse, zeros

    if coding.entries:
        entry, rest = (jax.ShapeDtypeStruct((*lead, n, slots), jnp.bfloat16) for n in (coding.entries, coding.rest))
        return jax.eval_shape(lambda x, y: sparse(x, x, dim, y, jnp.bfloat16), entry, rest)
    plain = jax.eval_shape(lambda: zeros(coding.fmt, (*lead, dim, slots), jnp.bfloat16))

    def factor(tile):
        channels, run = tile
        return jax.ShapeDtypeStruct((*lead, dim // channels, slots // run), SCALE_DTYPE)

    scale = None if not coding.scaled else plain.scale if coding.tile is None else factor(coding.tile)
    gain = plain.scale if coding.gain == "slot" else None if coding.gain is None else factor(coding.gain)
    return Codes(plain.data, scale, coding.fmt, scale if coding.zero else None, coding.grid, gain)


def _shape(case: Case) -> tuple[dict, tuple[int, int], int]:
    """The model, the leading axes of its codes and their slots."""
    model = MODELS[case.model]
    if case.page is None:
        return model, (case.batch, model["kv_heads"]), case.slots
    block = max(case.page, LANES)
    return model, (case.batch * case.slots // block, model["kv_heads"]), block


def _cache(case: Case) -> dict:
    """Keyword arguments that decode, prefill and mla_decode share: positions and page table."""
    import jax
    import jax.numpy as jnp

    from memjax.pallas_kernels.slots import Span

    row = jax.ShapeDtypeStruct((case.batch,), jnp.int32)
    found: dict = {"k_pos": Span(row, row)}
    if case.array:
        found["k_pos"] = jax.ShapeDtypeStruct((case.batch, 1, case.slots), jnp.int32)
    if case.page is not None:
        found["table"] = jax.ShapeDtypeStruct((case.batch, case.slots // case.page), jnp.int32)
    return found


def _paging(case: Case) -> dict:
    """Static arguments that follow from the pages' size."""
    return {"page": case.page} if case.page is not None and case.page < LANES else {}


@contextlib.contextmanager
def _steps(case: Case) -> Iterator[None]:
    """Step sizes are the kernels' own business; to take a slope between two of them they are set while a call is traced."""
    from memjax.pallas_kernels.decode import tpu

    before = tpu.STEP_BYTES, tpu.LONGEST_STEP, tpu.SHORTEST_STEP
    if case.slots_per_step is not None:
        tpu.STEP_BYTES, tpu.LONGEST_STEP, tpu.SHORTEST_STEP = 2**40, case.slots_per_step, case.slots_per_step
    try:
        yield
    finally:
        tpu.STEP_BYTES, tpu.LONGEST_STEP, tpu.SHORTEST_STEP = before


def _copied(case: Case, cache, vectors: int) -> tuple[int | None, None, int]:
    """Bytes that are read (of small pages whole rows of lanes), vectors per step, and branches that start first copies."""
    import jax

    if case.page is None:
        return None, None, 0
    stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    return stored * max(LANES // case.page, 1), None, 1


def _add_second_stream(arrays: dict) -> None:
    """Where values are sparse, keys have such a stream too, beside their own."""
    import jax
    import jax.numpy as jnp

    values = arrays["v"]
    if values is not None and values.fmt == "sparse":
        arrays["k_extra"] = values
        arrays["q_extra"] = jax.ShapeDtypeStruct((*arrays["q"].shape[:3], values.dim), jnp.bfloat16)


def _add_centre(case: Case, arrays: dict) -> None:
    """The weights of a centring term for the rows of ``arrays["q"]``, if the case has one."""
    import jax
    import jax.numpy as jnp

    if case.centre:
        arrays["weights"] = jax.ShapeDtypeStruct((*arrays["q"].shape[:3], 2 * ROPE_PAIRS), jnp.float32)


def _with_centre(arrays: dict) -> dict:
    """``arrays`` with the term in place of its weights."""
    import numpy as np

    from memjax.pallas_kernels.decode import Centre

    rest = dict(arrays)
    weights = rest.pop("weights", None)
    return rest if weights is None else rest | {"centre": Centre(weights, 5e5 ** -(np.arange(ROPE_PAIRS) / ROPE_PAIRS))}


def _decode(case: Case) -> Program:
    import jax
    import jax.numpy as jnp

    from memjax.pallas_kernels.decode import decode

    model, lead, slots = _shape(case)
    heads, dim, rows = model["kv_heads"], model["head_dim"], model["groups"] * case.tokens
    keys = codes(CODINGS[case.keys], lead, dim, slots)
    values = None if case.values is None else codes(CODINGS[case.values], lead, dim, slots)
    arrays = {
        "q": jax.ShapeDtypeStruct((case.batch, heads, rows, dim), jnp.bfloat16),
        "k": keys,
        "v": values,
        "q_pos": jax.ShapeDtypeStruct((case.batch, rows), jnp.int32),
        **_cache(case),
    }
    if case.bias:
        arrays["bias"] = jax.ShapeDtypeStruct((case.batch, heads, case.slots), jnp.float32)
    _add_second_stream(arrays)
    _add_centre(case, arrays)

    def function(arrays):
        rest = _with_centre(arrays)
        q, k, v = rest.pop("q"), rest.pop("k"), rest.pop("v")
        options = {"softcap": case.softcap, "window": model.get("window"), "mass": case.mass} | _paging(case)
        with _steps(case):
            return decode(q, k, v, scale=dim**-0.5, implementation="pallas", **options, **rest)

    vectors = case.batch * heads * case.slots
    return Program(function, (arrays,), (), "memjax_decode", (keys, values), vectors, *_copied(case, (keys, values), vectors))


def _mla_decode(case: Case) -> Program:
    import jax
    import jax.numpy as jnp

    from memjax.pallas_kernels.mla_decode import mla_decode

    model, lead, slots = _shape(case)
    rows, dim, rope_dim = model["groups"] * case.tokens, model["head_dim"], model["rope_dim"]
    latent, rope = codes(CODINGS[case.keys], lead, dim, slots), codes(CODINGS["bf16"], lead, rope_dim, slots)
    arrays = {
        "q_latent": jax.ShapeDtypeStruct((case.batch, rows, dim), jnp.bfloat16),
        "q_rope": jax.ShapeDtypeStruct((case.batch, rows, rope_dim), jnp.bfloat16),
        "latent": latent,
        "rope": rope,
        "q_pos": jax.ShapeDtypeStruct((case.batch, rows), jnp.int32),
        **_cache(case),
    }

    def function(arrays):
        with _steps(case):
            return mla_decode(**arrays, scale=192**-0.5, mass=case.mass, implementation="pallas", **_paging(case))

    vectors = case.batch * case.slots
    return Program(function, (arrays,), (), "memjax_decode", (latent, rope), vectors, *_copied(case, (latent, rope), vectors))


def _prefill(case: Case) -> Program:
    import jax
    import jax.numpy as jnp

    from memjax.pallas_kernels.prefill import prefill

    model, lead, slots = _shape(case)
    heads, dim, groups = model["kv_heads"], model["head_dim"], model["groups"]
    keys, values = (codes(CODINGS[name], lead, dim, slots) for name in (case.keys, case.values))
    arrays = {
        "q": jax.ShapeDtypeStruct((case.batch, heads, groups * case.tokens, dim), jnp.bfloat16),
        "k": keys,
        "v": values,
        "q_start": jax.ShapeDtypeStruct((case.batch,), jnp.int32),
        **_cache(case),
    }
    _add_second_stream(arrays)
    _add_centre(case, arrays)

    def function(arrays):
        window = model.get("window")
        options = {"window": window, "implementation": "pallas"} | _paging(case)
        return prefill(**_with_centre(arrays), groups=groups, scale=dim**-0.5, **options)

    vectors = case.batch * heads * case.slots
    return Program(function, (arrays,), (), "memjax_prefill", (keys, values), vectors)


def _append(case: Case) -> Program:
    import jax
    import jax.numpy as jnp

    from memjax.pallas_kernels.append import append

    model, lead, slots = _shape(case)
    target, new = (
        tuple(codes(CODINGS[name], lead, model["head_dim"], size) for name in (case.keys, case.values))
        for size in (slots, case.tokens)
    )
    start = jax.ShapeDtypeStruct((case.batch,), jnp.int32)

    def function(target, new, start):
        return append(target, new, start, implementation="pallas")

    return Program(function, (target, new, start), (0,), "memjax_append", target, 0)


def _paged_attention(case: Case) -> Program:
    """JAX's decode kernel: bfloat16 pages, or int8 ones with a scale per token (which it broadcasts over the channels)."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention, quantization_utils

    model = MODELS[case.model]
    heads, dim = model["kv_heads"], model["head_dim"]
    pages, blocks = (heads, case.batch * case.slots // case.page, case.page), case.slots_per_step // case.page
    stored = jax.ShapeDtypeStruct((*pages, dim), {"bf16": jnp.bfloat16, "int8": jnp.int8}[case.keys])
    if case.keys == "int8":
        stored = quantization_utils.QuantizedTensor(stored, jax.ShapeDtypeStruct((*pages, 1), jnp.bfloat16))
    q = jax.ShapeDtypeStruct((case.batch, heads * model["groups"], dim), jnp.bfloat16)
    lengths = jax.ShapeDtypeStruct((case.batch,), jnp.int32)
    table = jax.ShapeDtypeStruct((case.batch, case.slots // case.page), jnp.int32)

    def function(q, k, v, lengths, table):
        return paged_attention(q, k, v, lengths, table, pages_per_compute_block=blocks)

    arguments = (q, stored, stored, lengths, table)
    vectors = case.batch * heads * case.slots
    each = 2 * dim * (2 if case.keys == "bf16" else 1 + 2)  # scales are read once per channel
    cache, per_step = (stored, stored), case.slots_per_step
    return Program(function, arguments, (), "paged", cache, vectors, each * vectors, per_step, prologues=1)


def _ragged_paged_attention(case: Case) -> Program:
    """JAX's kernel for mixed prefill and decode, with ``tokens`` queries per block; coded pages have one scale in all."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    model = MODELS[case.model]
    heads, dim = model["kv_heads"], model["head_dim"]
    dtype = {"bf16": jnp.bfloat16, "int8": jnp.int8, "int4": jnp.int4, "e4m3": jnp.float8_e4m3fn}[case.keys]
    stored = jax.ShapeDtypeStruct((case.batch * case.slots // case.page, case.page, 2 * heads, dim), dtype)
    arguments = (
        jax.ShapeDtypeStruct((case.batch, heads * model["groups"], dim), jnp.bfloat16),
        stored,
        jax.ShapeDtypeStruct((case.batch,), jnp.int32),
        jax.ShapeDtypeStruct((case.batch, case.slots // case.page), jnp.int32),
        jax.ShapeDtypeStruct((case.batch + 1,), jnp.int32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    options: dict = {} if case.keys == "bf16" else {"k_scale": 0.01, "v_scale": 0.01}

    def function(*arguments):
        return ragged_paged_attention(
            *arguments,
            sm_scale=dim**-0.5,
            num_kv_pages_per_block=case.slots_per_step // case.page,
            num_queries_per_block=case.tokens,
            vmem_limit_bytes=96 * 2**20,
            **options,
        )

    vectors = case.batch * heads * case.slots
    per_step = heads * case.slots_per_step
    return Program(function, arguments, (), "ragged_paged", stored, vectors, vectors_per_step=per_step)


def decode_cases() -> list[Case]:
    """Every model, coding and feature of the decode kernel at least once."""
    found = [Case(model=model) for model in MODELS if model != "deepseek-v3"]
    found += [Case(keys=name, values=name) for name in CODINGS if " by " not in name and name not in ("int8", "sparse")]
    found += [Case(keys="int4", values="int2"), Case(keys="int8", values="int4"), Case(keys="int8", values="int2")]
    found += [Case(keys=f"int2 by {run} slots", values="int2 by 32 channels") for run in (32, 128)]
    found += [
        Case(keys=f"{name} by 128 slots, gain by slot", values=f"{name}, gain by 128 slots", page=page)
        for name in ("int4", "int2")
        for page in (None, 256)
    ]
    found += [Case(keys="int3", values="int2"), Case(keys="int3", values="int3", page=256)]
    found += [Case(model="dim 64", keys="int3", values="int3")]
    found += [Case(keys="int4", values="int4", page=page) for page in (16, 64, 128, 256, 512)]
    found += [Case(page=page) for page in (32, 256)] + [Case(keys="bf16", values="bf16", page=256)]
    models = ("smollm2-135m", "gemma-3-4b", "dim 64", "dim 80")
    found += [Case(model=model, keys="int4", values="int4") for model in models]
    found += [Case(keys="int4", values="int4", **{flag: True}) for flag in ("array", "bias", "mass", "centre")]
    found += [Case(keys="int4", values="int4", array=True, centre=True, page=page) for page in (None, 256)]
    found += [Case(model=model, keys="int4", values="sparse") for model in ("llama-3-8b", "dim 64")]
    found += [Case(keys="int4", values="int4", tokens=4), Case(softcap=50.0), Case(batch=1)]
    return found


def other_cases() -> list[Case]:
    """The other operations."""
    latent = {"op": "mla_decode", "model": "deepseek-v3", "values": None}
    found = [Case(keys=keys, **latent) for keys in ("bf16", "e4m3", "int8", "int4", "int3")]
    found += [Case(keys="int8", page=page, **latent) for page in (64, 256)]
    chunk = {"op": "prefill", "batch": 2, "tokens": 1024}
    found += [Case(keys=keys, values=keys, **chunk) for keys in ("bf16", "int8", "int4", "int3")]
    found += [Case(keys="int2 by 128 slots, gain by slot", values="int2, gain by 128 slots", **chunk)]
    found += [Case(keys="int4", values="sparse", **chunk | {"tokens": 256})]
    found += [Case(keys="int4", values="int4", page=page, **chunk) for page in (64, 256)]
    found += [Case(keys="int4", values="int4", centre=True, array=array, **chunk) for array in (False, True)]
    found += [Case(model=model, keys="bf16", values="bf16", **chunk) for model in ("smollm2-135m", "gemma-3-4b")]
    for keys in ("bf16", "int8", "int4", "int3"):
        found += [Case(op="append", keys=keys, values=keys, tokens=tokens) for tokens in (1, 256)]
    return found


def served(tpu: str, case: Case) -> bool:
    """Whether the generation has the types that a case needs."""
    return tpu != "v4" or not any(str(name).startswith(V4_LACKS) for name in (case.keys, case.values))


def refused_cases(tpu: str) -> list[tuple[Case, str]]:
    """What the kernels refuse, and words of the reason that they must give."""
    if tpu != "v4":
        return [(Case(page=192), "blocks of 192 slots")]
    return [(Case(keys=name, values=name), "TPU v4") for name in ("int2", "e4m3", "int4 table", "int3 table")]


def as_request(case: Case) -> dict:
    """The fields of a case, for ``build``."""
    return dataclasses.asdict(case)
