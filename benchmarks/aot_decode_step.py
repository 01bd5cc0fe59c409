"""Does a job fit? The decode step of a Llama-3-8B-shaped model with an int4 cache, compiled for TPUs without one.

    pip install 'jax[tpu]'
    python benchmarks/aot_decode_step.py [--layers 32] [--tpu v5e v6e]

Weights bfloat16, one sequence of 32,768 tokens, policy ``int4(rotate=true)+kernels(pallas)``, cache donated; a v5e, whose
16 GB the weights alone would fill, runs as four chips that share heads and weights (mesh axis ``model``). The compiler's
memory analysis must agree with the ledger: arguments within 3 % of weights plus ``predict_nbytes``, the cache updated in
place, and no array of floats as large as one layer's decompressed cache. Writes results/aot_decode_step.{json,md}.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
TOPOLOGIES = {"v5e": ("v5e:2x2", 4), "v6e": ("v6e:1x1", 1)}
POLICY = "int4(rotate=true)+kernels(pallas)"
CAPACITY = 32_768
TOLERANCE = 0.03
TIMEOUT = 1200  # seconds for one compilation


def llama3(layers: int):
    """The configuration of Llama-3-8B with so many layers."""
    from memjax.attention.rope import Rope
    from memjax.models.config import llama_config

    return llama_config(
        family="llama",
        vocab=128_256,
        width=4096,
        layers=layers,
        q_heads=32,
        kv_heads=8,
        head_dim=128,
        mlp_width=14_336,
        norm_eps=1e-5,
        max_position=8192,
        ropes=(Rope(128, 500_000.0),) * layers,
        windows=(None,) * layers,
        tied=False,
    )


def compile_step(generation: str, layers: int) -> dict:
    """Compiles the step and compares the compiler's bytes with the ledger's."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    import memjax as mj
    from memjax.models.decoder import Decoder, cache_specs

    name, chips = TOPOLOGIES[generation]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    mesh = Mesh(np.array(devices[:chips]).reshape(1, chips), ("data", "model"))
    config, policy = llama3(layers), mj.policy(POLICY)
    decoder = nnx.eval_shape(lambda: Decoder(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))

    def place_weight(leaf):
        """Matrices are split by their output channels: correct, and even; no advice for speed."""
        axes = (None, "model") if leaf.ndim == 2 else ()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    decoder = jax.tree.map(place_weight, decoder)
    specs = cache_specs(config, 1, CAPACITY)
    abstract, placed = mj.abstract(policy, specs), mj.shardings(policy, specs, mesh)
    cache = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, placed)
    token = jax.ShapeDtypeStruct((1,), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        compiled = jax.jit(mj.decode_step, donate_argnums=1).lower(decoder, cache, token).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    weights = sum(leaf.size * leaf.dtype.itemsize // (chips if leaf.ndim == 2 else 1) for leaf in jax.tree.leaves(decoder))
    return {
        "tpu": generation,
        "chips": chips,
        "layers": layers,
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "weights": weights,
        "ledger": mj.predict_nbytes(policy, specs).device // chips,
        "decompressed_layer": 2 * CAPACITY * 8 * 128 * 2 // chips,
        "arguments": memory.argument_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "largest_array": largest_array(text),
    }


def largest_array(text: str) -> int:
    """Bytes of the largest array of floats that an instruction of the compiled program's body makes."""
    body, sizes = text[text.index("ENTRY") :], {"bf16": 2, "f32": 4}
    found = [0]
    for line in body.splitlines():
        if " = " in line and " parameter(" not in line:
            made = re.split(r"\s[a-z-]+\(", line.split(" = ", 1)[1], maxsplit=1)[0]
            for kind, dims in re.findall(r"\b(bf16|f32)\[([0-9,]+)\]", made):
                found.append(sizes[kind] * math.prod(map(int, dims.split(","))))
    return max(found)


def problems(row: dict) -> list[str]:
    """What the compiler's numbers say against the ledger's."""
    if "error" in row:
        return [row["error"]]
    expected = row["weights"] + row["ledger"]
    checks = {
        f"arguments {row['arguments']:,} are not within 3 % of {expected:,}": abs(row["arguments"] / expected - 1) < TOLERANCE,
        f"only {row['aliased']:,} bytes of the cache are updated in place": row["aliased"] >= row["ledger"] * (1 - TOLERANCE),
        f"an array of {row['largest_array']:,} bytes, a layer's decompressed cache being {row['decompressed_layer']:,}": (
            row["largest_array"] < row["decompressed_layer"]
        ),
        f"{row['kernels']} kernels in {row['layers']} layers": row["kernels"] >= row["layers"],
    }
    return [text for text, fine in checks.items() if not fine]


def in_child(generation: str, layers: int, python: str = sys.executable) -> dict:
    """``compile_step`` in a process of its own: some failures of the compiler abort it."""
    from memjax.plan.compiled import COMPILER_ENVIRONMENT

    environment = os.environ | {"XLA_FLAGS": ""} | COMPILER_ENVIRONMENT
    command = [python, __file__, "--child", generation, "--layers", str(layers)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "Error" in line or "INTERNAL" in line or "Check failed" in line]
        return {"tpu": generation, "layers": layers, "error": (lines or [f"exit status {done.returncode}"])[-1][:400]}
    return json.loads(done.stdout.splitlines()[-1])


def report(rows: list[dict]) -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("memjax", "jax", "libtpu"))
    lines = [
        "# The decode step of a Llama-3-8B-shaped model, compiled for TPUs",
        "",
        f"{versions}, on a machine without a TPU: the compiler's memory analysis per chip, nothing run. Policy `{POLICY}`, "
        f"one sequence, capacity {CAPACITY:,}. Bytes. Written by `benchmarks/aot_decode_step.py`.",
        "",
        "| TPU | chips | layers | weights | cache (ledger) | arguments | of weights + ledger | in place | temporaries, "
        "all | largest array | a layer decompressed | kernels |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['tpu']} | {row['error']} |")
            continue
        share = row["arguments"] / (row["weights"] + row["ledger"])
        names = ("weights", "ledger", "arguments")
        cells = [f"{row[name]:,}" for name in names] + [f"{share:.4f}"]
        cells += [f"{row[name]:,}" for name in ("aliased", "temporaries", "largest_array", "decompressed_layer", "kernels")]
        lines.append(f"| {row['tpu']} | {row['chips']} | {row['layers']} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tpu", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    parser.add_argument("--child", choices=TOPOLOGIES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(compile_step(arguments.child, arguments.layers)))
        return 0
    rows = [in_child(generation, arguments.layers) for generation in arguments.tpu]
    print(report(rows))
    for row in rows:
        for problem in problems(row):
            print(f"{row['tpu']}: {problem}", file=sys.stderr)
    if arguments.layers == 32:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "aot_decode_step.json").write_text(json.dumps(rows, indent=1) + "\n")
        (RESULTS / "aot_decode_step.md").write_text(report(rows))
    return int(any(problems(row) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
