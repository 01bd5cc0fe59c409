"""Prefill on a GPU: memjax's kernel beside cuDNN, in one run.

    python benchmarks/gpu_prefill.py    # on a GPU; writes results/gpu_prefill.{json,md}

Causal attention of a chunk against itself, dense, and against a history in codes. Speeds are floating-point operations of
the visible half per second, and ratios to cuDNN (``jax.nn.dot_product_attention``) on the same shape. Results are checked
against the XLA path in float32 on some heads first.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from gpu_timing import Variant, copies, environment, in_turn

from memjax.pallas_kernels.codes import absmax_encode, dense
from memjax.pallas_kernels.prefill import prefill
from memjax.pallas_kernels.slots import Span

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Shape:
    """Sequences, new tokens, query heads, kv heads, head dimension."""

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    dim: int

    @property
    def flops(self) -> float:
        """Multiplications and additions of the half that causality leaves."""
        return 2 * self.batch * self.heads * self.tokens**2 * self.dim


SHAPES = [Shape(1, 4096, 32, 8, 128), Shape(4, 4096, 32, 32, 128), Shape(1, 16384, 32, 8, 128), Shape(4, 4096, 16, 8, 64)]
SHAPES += [Shape(1, 8192, 8, 4, 256)]


def ours(shape: Shape, fmt: str) -> Variant:
    """Our kernel on a chunk against itself, with keys and values as ``fmt``."""
    groups = shape.heads // shape.kv_heads
    zero = jnp.zeros(shape.batch, jnp.int32)
    kw = {"q_start": zero, "k_pos": Span(zero, zero + shape.tokens), "groups": groups, "scale": shape.dim**-0.5}
    q = jax.random.normal(jax.random.key(0), (shape.batch, shape.kv_heads, groups * shape.tokens, shape.dim), jnp.bfloat16)

    def one(seed: int):
        size = (shape.batch, shape.kv_heads, shape.dim, shape.tokens)
        x = jax.random.normal(jax.random.key(seed), size, jnp.bfloat16)
        return dense(x) if fmt == "dense" else jax.jit(lambda x: absmax_encode(x, fmt))(x)

    def call(q, codes, implementation="gpu"):
        return prefill(q, *codes, implementation=implementation, **kw)[0]

    nbytes = q.nbytes
    sets = [(one(2 * i), one(2 * i + 1)) for i in range(copies(nbytes))]
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 and fmt == "dense" else x, sets[0])
    expected = np.asarray(jax.jit(lambda q, c: call(q, c, "xla"))(q.astype(jnp.float32), wide)[:1, :1])
    found = np.asarray(jax.jit(call)(q, sets[0])[:1, :1], np.float32)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    if not error < 1e-2:
        raise SystemExit(f"prefill {fmt} {shape}: relative error {error:.2e} against the XLA path")
    return Variant(f"memjax gpu {fmt}", call, q, sets, nbytes)


def cudnn(shape: Shape) -> Variant:
    """cuDNN's flash attention, bfloat16."""
    q = jax.random.normal(jax.random.key(0), (shape.batch, shape.tokens, shape.heads, shape.dim), jnp.bfloat16)
    size = (shape.batch, shape.tokens, shape.kv_heads, shape.dim)
    keys = jax.random.split(jax.random.key(1), 2 * copies(q.nbytes))
    pairs = zip(keys[::2], keys[1::2], strict=True)
    sets = [tuple(jax.random.normal(k, size, jnp.bfloat16) for k in pair) for pair in pairs]

    def call(q, kv):
        return jax.nn.dot_product_attention(q, *kv, is_causal=True, implementation="cudnn")

    return Variant("cuDNN bf16", call, q, sets, q.nbytes)


def report(found: list[dict], where: dict) -> str:
    lines = [
        "# Prefill on a GPU",
        "",
        f"{', '.join(f'{k} {v}' for k, v in where.items())}. Causal, bfloat16 queries; operations of the visible half. "
        "Written by `benchmarks/gpu_prefill.py`: medians of rounds with all variants in turn.",
        "",
        "| B | tokens | heads / kv heads | H | kernel | TFLOP/s | over cuDNN |",
        "|--:|--:|---|--:|---|--:|--:|",
    ]
    for shape in found:
        base = shape["rows"]["cuDNN bf16"]["median"]
        for name, row in shape["rows"].items():
            lines.append(
                f"| {shape['batch']} | {shape['tokens']:,} | {shape['heads']} / {shape['kv_heads']} | {shape['dim']} | "
                f"{name} | {shape['flops'] / row['median'] / 1e12:.0f} | {base / row['median']:.2f}x |"
            )
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape only")
    arguments = parser.parse_args()
    if jax.devices()[0].platform != "gpu":
        parser.error(f"this measures on a GPU and found {jax.devices()[0].device_kind}")
    found = []
    for shape in SHAPES[:1] if arguments.quick else SHAPES:
        print(shape, flush=True)
        times = in_turn([cudnn(shape), *(ours(shape, fmt) for fmt in ("dense", "int8", "int4"))])
        found.append(asdict(shape) | {"flops": shape.flops, "rows": times})
    text = report(found, environment())
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "gpu_prefill.json").write_text(json.dumps({**environment(), "shapes": found}, indent=1) + "\n")
    (RESULTS / "gpu_prefill.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
