"""Decode on a GPU: memjax's kernels on every format beside the best bfloat16 kernels that JAX has, in one run.

    pip install 'memjax[cuda13]'
    python benchmarks/gpu_decode.py               # on a GPU: measures, writes results/gpu_decode.{json,md}
    python benchmarks/gpu_decode.py --predict     # anywhere: what the bytes allow, writes results/gpu_decode_bound.md

A variant's speed is given as bytes per second of its *compressed* cache, as a fraction of a measured copy, and as a ratio
to the fastest bfloat16 kernel of the same shape. Every result is checked against the float32 reference before it is timed.
Peers: cuDNN through ``jax.nn.dot_product_attention``, JAX's Pallas decode attention, tokamax where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from gpu_timing import Variant, copies, copy_bandwidth, environment, in_turn

from memjax.pallas_kernels.codes import Codes, absmax_encode, dense, nbytes_per_vector
from memjax.pallas_kernels.decode import decode, decode_reference
from memjax.pallas_kernels.mla_decode import mla_decode
from memjax.pallas_kernels.slots import Span

RESULTS = Path(__file__).parent / "results"
FORMATS = {"bf16": "dense", "fp8": "e4m3", "int8": "int8", "int4": "int4", "int2": "int2"}
HEADS, DIM = 8, 128
LATENT, ROPE, MLA_ROWS = 512, 64, 128
BATCHES, CONTEXTS, GROUPS = (1, 8, 64), (1024, 4096, 32768, 131072), (1, 4, 8)
LARGEST = 24 * 2**30  # bytes of a bfloat16 cache
H200 = {"copy": 4.3e12, "bf16_kernel": 0.85}  # measured copy of an H200, bytes/s; share of it that good bf16 kernels reach


@dataclass(frozen=True)
class Shape:
    """Sequences, tokens each, and query heads per kv head."""

    batch: int
    context: int
    groups: int


def shapes() -> list[Shape]:
    """All combinations whose bfloat16 cache fits, with the groups varied at one context only."""
    found = []
    for batch, context, groups in itertools.product(BATCHES, CONTEXTS, GROUPS):
        fits = batch * context * HEADS * DIM * 4 <= LARGEST
        if fits and (groups == 4 or context == 32768):
            found.append(Shape(batch, context, groups))
    return found


def cache_bytes(shape: Shape, fmt: str) -> int:
    """Bytes of keys, values and scales that one call reads."""
    return 2 * shape.batch * shape.context * HEADS * nbytes_per_vector(fmt, DIM, "bfloat16")


def make(shape: Shape, fmt: str, seed: int) -> tuple[Codes, Codes]:
    """Random keys and values: zeros would run faster than any real cache."""

    def one(key) -> Codes:
        x = jax.random.normal(key, (shape.batch, HEADS, DIM, shape.context), jnp.bfloat16)
        return dense(x) if fmt == "dense" else absmax_encode(x, fmt)

    return tuple(jax.jit(one)(key) for key in jax.random.split(jax.random.key(seed)))


def places(shape: Shape) -> dict:
    rows = shape.groups
    return {
        "q_pos": jnp.full((shape.batch, rows), shape.context - 1, jnp.int32),
        "k_pos": Span(jnp.zeros(shape.batch, jnp.int32), jnp.full(shape.batch, shape.context, jnp.int32)),
        "scale": DIM**-0.5,
    }


def ours(shape: Shape, fmt: str, q: jax.Array, implementation: str) -> Variant:
    """A kernel of memjax, checked on the first rows and heads before it is timed."""
    kw = places(shape)
    nbytes = cache_bytes(shape, fmt)
    sets = [make(shape, fmt, seed) for seed in range(copies(nbytes))]

    def call(q, codes):
        return decode(q, *codes, implementation=implementation, **kw)[0]

    first = jax.tree.map(lambda x: x[:1, :1], (q, *sets[0]))
    narrow = {"q_pos": kw["q_pos"][:1], "k_pos": Span(*(x[:1] for x in kw["k_pos"])), "scale": kw["scale"]}
    expected = np.asarray(decode_reference(*first, **narrow)[0])
    found = np.asarray(jax.jit(call)(q, sets[0])[:1, :1], np.float32)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    if not error < 1e-2:
        raise SystemExit(f"{implementation} {fmt} {shape}: relative error {error:.2e} against the reference")
    return Variant(f"memjax {implementation} {name_of(fmt)}", call, q, sets, nbytes)


def name_of(fmt: str) -> str:
    return next(name for name, known in FORMATS.items() if known == fmt)


def peers(shape: Shape, q: jax.Array) -> list[Variant]:
    """The bfloat16 kernels of others, on caches laid out as they like them."""
    nbytes = cache_bytes(shape, "dense")
    keys = jax.random.split(jax.random.key(9), 2 * copies(nbytes))
    size = (shape.batch, shape.context, HEADS, DIM)
    pairs = zip(keys[::2], keys[1::2], strict=True)
    sets = [tuple(jax.random.normal(k, size, jnp.bfloat16) for k in pair) for pair in pairs]
    lengths = jnp.full(shape.batch, shape.context, jnp.int32)

    def as_heads(q):
        return q.reshape(shape.batch, 1, HEADS * shape.groups, DIM)

    def cudnn(q, kv):
        return jax.nn.dot_product_attention(as_heads(q), *kv, key_value_seq_lengths=lengths, implementation="cudnn")

    def pallas(q, kv):
        from jax.experimental.pallas.ops.gpu import decode_attention

        return decode_attention.gqa(as_heads(q)[:, 0], *kv)

    def tokamax(q, kv):
        import tokamax as peer

        return peer.dot_product_attention(as_heads(q), *kv)

    candidates = {"cuDNN": cudnn, "JAX Pallas": pallas}
    if importlib.util.find_spec("tokamax"):
        candidates["tokamax"] = tokamax
    found = []
    for name, call in candidates.items():
        try:
            found.append(Variant(f"{name} bf16", call, q, sets, nbytes))
        except Exception as error:  # a peer that cannot serve a shape is reported, not fatal
            print(f"  {name} cannot serve {shape}: {str(error).splitlines()[0][:150]}", flush=True)
    return found


def measure(shape: Shape, formats: list[str], implementations: list[str]) -> dict:
    """All variants of one shape in turn."""
    q = jax.random.normal(jax.random.key(0), (shape.batch, HEADS, shape.groups, DIM), jnp.bfloat16)
    variants = peers(shape, q)
    variants += [ours(shape, FORMATS[name], q, each) for name in formats for each in implementations]
    times = in_turn(variants)
    rows = {v.name: times[v.name] | {"nbytes": v.nbytes} for v in variants}
    best = min(row["median"] for name, row in rows.items() if name.endswith("bf16"))
    for row in rows.values():
        row["over_best_bf16"] = best / row["median"]
    return asdict(shape) | {"rows": rows}


def measure_mla(batch: int, context: int) -> dict:
    """Absorbed multi-head latent attention at DeepSeek-V3's shape."""
    lengths = Span(jnp.zeros(batch, jnp.int32), jnp.full(batch, context, jnp.int32))
    size = (batch, MLA_ROWS)
    q, q_rope = (jax.random.normal(jax.random.key(n), (*size, n), jnp.bfloat16) for n in (LATENT, ROPE))
    variants = []
    for name in ("bf16", "fp8", "int8", "int4"):
        fmt = FORMATS[name]
        nbytes = batch * context * (nbytes_per_vector(fmt, LATENT, "bfloat16") + 2 * ROPE)

        def one(seed: int, fmt=fmt):
            x = jax.random.normal(jax.random.key(seed), (batch, 1, LATENT, context), jnp.bfloat16)
            rope = dense(jax.random.normal(jax.random.key(seed + 99), (batch, 1, ROPE, context), jnp.bfloat16))
            return (dense(x) if fmt == "dense" else jax.jit(lambda x: absmax_encode(x, fmt))(x)), rope

        def call(q, codes):
            kw = {"q_pos": jnp.full((batch, MLA_ROWS), context - 1), "k_pos": lengths, "scale": (LATENT + ROPE) ** -0.5}
            return mla_decode(q, q_rope, *codes, implementation="gpu", **kw)[0]

        variants.append(Variant(f"memjax gpu MLA {name}", call, q, [one(s) for s in range(copies(nbytes))], nbytes))
    times = in_turn(variants)
    rows = {v.name: times[v.name] | {"nbytes": v.nbytes} for v in variants}
    first = rows["memjax gpu MLA bf16"]["median"]
    for row in rows.values():
        row["over_best_bf16"] = first / row["median"]
    return {"batch": batch, "context": context, "groups": MLA_ROWS, "rows": rows}


def report(found: list[dict], copy: float, where: dict) -> str:
    lines = [
        "# Decode on a GPU",
        "",
        f"{', '.join(f'{k} {v}' for k, v in where.items())}. Measured copy: {copy / 1e12:.2f} TB/s. {HEADS} kv heads, head "
        f"dimension {DIM}; MLA: {MLA_ROWS} query heads, latent {LATENT} + {ROPE}. Written by `benchmarks/gpu_decode.py`: "
        "medians of rounds with all variants in turn; inputs rotate through more than the L2 cache.",
        "",
        "| B | context | G | kernel | microseconds | of copy bandwidth (compressed bytes) | over the best bf16 kernel |",
        "|--:|--:|--:|---|--:|--:|--:|",
    ]
    for shape in found:
        for name, row in shape["rows"].items():
            share = row["nbytes"] / row["median"] / copy
            lines.append(
                f"| {shape['batch']} | {shape['context']:,} | {shape['groups']} | {name} | {row['median'] * 1e6:.1f} | "
                f"{share:.0%} | {row['over_best_bf16']:.2f}x |"
            )
    return "\n".join([*lines, ""])


def predict() -> str:
    """What the bytes allow at an H200's measured copy bandwidth: a bound, not a measurement."""
    shape = Shape(8, 32768, 4)
    best = cache_bytes(shape, "dense") / (H200["copy"] * H200["bf16_kernel"])
    lines = [
        "# Decode on a GPU: what the bytes allow",
        "",
        f"Arithmetic, not a measurement: no GPU was at hand. B = {shape.batch}, {shape.context:,} tokens, {HEADS} kv heads, "
        f"head dimension {DIM}; a copy bandwidth of {H200['copy'] / 1e12} TB/s (an H200's, measured elsewhere), and a bf16 "
        f"kernel that reaches {H200['bf16_kernel']:.0%} of it. Written by `benchmarks/gpu_decode.py --predict`.",
        "",
        "| format | bytes of the cache | least microseconds | most over that bf16 kernel |",
        "|---|--:|--:|--:|",
    ]
    for name, fmt in FORMATS.items():
        nbytes = cache_bytes(shape, fmt)
        seconds = nbytes / H200["copy"]
        lines.append(f"| {name} | {nbytes:,} | {seconds * 1e6:.0f} | {best / seconds:.2f}x |")
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--predict", action="store_true", help="write what the bytes allow; needs no GPU")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--implementations", nargs="+", default=["gpu"], help="gpu, xla")
    parser.add_argument("--quick", action="store_true", help="one shape only")
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    if arguments.predict:
        (RESULTS / "gpu_decode_bound.md").write_text(predict())
        print(predict())
        return 0
    if jax.devices()[0].platform != "gpu":
        parser.error(f"this measures on a GPU and found {jax.devices()[0].device_kind}; --predict needs none")
    copy, found = copy_bandwidth(), []
    for shape in [Shape(8, 32768, 4)] if arguments.quick else shapes():
        print(shape, flush=True)
        found.append(measure(shape, arguments.formats, arguments.implementations))
    latent = [(32, 8192)] if arguments.quick else [(1, 32768), (32, 8192), (64, 32768)]
    found += [measure_mla(*each) for each in latent]
    text = report(found, copy, environment())
    (RESULTS / "gpu_decode.json").write_text(json.dumps({"copy": copy, **environment(), "shapes": found}, indent=1) + "\n")
    (RESULTS / "gpu_decode.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
