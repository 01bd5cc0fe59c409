"""Where the TPU compiler puts the host tier: bytes per memory, read from programs compiled for TPUs on a machine without one.

    pip install 'jax[tpu]'
    python benchmarks/tpu_host_tier.py [--generations v5e v6e] [--jobs 1]

Compiles ``policy.attend(policy.update(cache, k, v), q)`` ahead of time with libtpu, the cache donated, and asks the compiler's
memory analysis and the scheduled program:

- are the pool's bytes arguments in host memory and none of them in the device's (equal to the ledger's prediction)?
- is the pool updated in place (all its bytes aliased, no temporaries on the host, no program run by the host)?
- does the device hold a few pages of it at a time, not a copy (size of the temporaries)?

Each program is compiled in a child process, because libtpu aborts on some. Exits with 1 if a host tier fails one of the
checks. Nothing is run or timed. Writes results/tpu_host_tier.json and .md beside this file.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
TIMEOUT = 1800  # seconds for one compilation
GENERATIONS = {"v4": "v4:2x2x1", "v5e": "v5e:1x1", "v5p": "v5p:2x2x1", "v6e": "v6e:1x1", "7x": "tpu7x:2x2x1"}
HOSTED = ("host(256,256)", "int8+host(256,256)", "streaming(4,8188)+int8+host(256,256)")
CAPACITY, KV_HEADS, GROUPS, HEAD_DIM = 32_768, 8, 4, 128
PADDING = 2**16  # allowed for small arrays that fill whole tiles
LARGEST_SHARE = 0.5  # of the pool, for temporaries on the device


@dataclass(frozen=True)
class Case:
    """A program: ``steps`` of them in a ``lax.scan`` when there are more than one."""

    name: str
    batch: int = 1
    ragged: bool = False
    tokens: int = 1
    layers: int = 1
    steps: int = 1


DECODE = Case("decode, 1 row")
CASES = (
    DECODE,
    Case("decode, 1 ragged row", ragged=True),
    Case("decode, 2 ragged rows", batch=2, ragged=True),
    Case("decode, 4 layers", layers=4),
    Case("8 decode steps in a loop, 2 ragged rows", batch=2, ragged=True, steps=8),
)
CHUNK = Case("chunk of 256 tokens, 2 ragged rows", batch=2, ragged=True, tokens=256)


def programs() -> list[tuple[str, Case]]:
    """Policies and cases: two policies without a tier for comparison, then the tiers."""
    found = [(policy, DECODE) for policy in ("dense", "int8")]
    found += [(policy, case) for policy in HOSTED for case in CASES]
    return [*found, ("int8+host(256,256)", CHUNK)]


def lower(generation: str, policy_text: str, case: Case):
    """The lowered program, the cache's ledger and shapes, and the bytes of the other arguments."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    import memjax as mj
    from memjax.cache.policy import abstract
    from memjax.cache.sharding import shardings

    topology = topologies.get_topology_desc(platform="tpu", topology_name=GENERATIONS[generation])
    mesh = Mesh(np.array(topology.devices[:1]).reshape(1, 1), ("data", "model"))
    device = NamedSharding(mesh, PartitionSpec())
    policy, rope = mj.policy(policy_text), mj.Rope(HEAD_DIM, 5e5)
    specs = [mj.CacheSpec(case.batch, KV_HEADS, HEAD_DIM, CAPACITY, "bfloat16", rope=rope)] * case.layers

    def placed(leaf, sharding=device):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    cache = jax.tree.map(placed, abstract(policy, specs), shardings(policy, specs, mesh))
    lead = (case.steps, case.batch, case.tokens)
    q = placed(jax.ShapeDtypeStruct((*lead, KV_HEADS * GROUPS, HEAD_DIM), jnp.bfloat16))
    k = v = placed(jax.ShapeDtypeStruct((*lead, KV_HEADS, HEAD_DIM), jnp.bfloat16))
    lengths = placed(jax.ShapeDtypeStruct((case.batch,), jnp.int32)) if case.ragged else None

    def step(cache, q, k, v, lengths):
        after = []
        for layer in cache:  # each layer's queries depend on the layer below
            q, layer = policy.attend(policy.update(layer, k, v, lengths), q)
            after.append(layer)
        return q, tuple(after)

    def run(cache, q, k, v, lengths):
        if case.steps == 1:
            return step(cache, q[0], k[0], v[0], lengths)

        def body(cache, new):
            out, cache = step(cache, *new, lengths)
            return cache, out

        return jax.lax.scan(body, cache, (q, k, v))

    others = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((q, k, v, lengths)))
    lowered = jax.jit(run, donate_argnums=0).lower(cache, q, k, v, lengths)
    return lowered, mj.predict_nbytes(policy, specs), cache, others


def measure(generation: str, policy_text: str, case: Case) -> dict:
    """Compiles one program and reads its memory analysis and its text."""
    import jax

    lowered, ledger, cache, others = lower(generation, policy_text, case)
    compiled = lowered.compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    pools = {leaf.shape for layer in cache for leaf in jax.tree.leaves(layer.host)}
    pages = [leaf.size * leaf.dtype.itemsize // leaf.shape[0] for leaf in jax.tree.leaves(cache[0].host)]
    return {
        "ledger_device": ledger.device,
        "ledger_host": ledger.host,
        "page": sum(pages),
        "other_arguments": others,
        "device_arguments": memory.argument_size_in_bytes,
        "device_temporaries": memory.temp_size_in_bytes,
        "host_arguments": memory.host_argument_size_in_bytes,
        "host_aliased": memory.host_alias_size_in_bytes,
        "host_temporaries": memory.host_temp_size_in_bytes,
        "reads_from_host": text.count(" dynamic-slice-start("),
        "writes_to_host": text.count(" dynamic-update-slice-start("),
        "copies_of_a_pool": sum(_copies(text, shape) for shape in pools),
        "run_by_host": text.count('"HostExecute"'),
    }


def _copies(text: str, shape: tuple[int, ...]) -> int:
    """Whole-array copies of arrays of this shape, to another memory or layout."""
    dims = ",".join(map(str, shape))
    return len(re.findall(rf"= \(?[a-z0-9]+\[{re.escape(dims)}\][^=]* copy(?:-start)?\(", text))


def problems(row: dict) -> list[str]:
    """What a row with a host tier has wrong."""
    if "error" in row:
        return [row["error"]]
    most_device = row["ledger_device"] + row["other_arguments"] + PADDING
    checks = {
        "pool not in host memory": row["host_arguments"] == row["ledger_host"],
        "pool among the device's arguments": row["device_arguments"] < most_device,
        "pool not updated in place": row["host_aliased"] == row["ledger_host"],
        "temporaries on the host": row["host_temporaries"] == 0,
        "copies of the pool": row["copies_of_a_pool"] == 0,
        "work for the host's processor": row["run_by_host"] == 0,
        "pool in the device's temporaries": row["device_temporaries"] < LARGEST_SHARE * row["ledger_host"],
    }
    return [name for name, fine in checks.items() if not fine]


def in_child(generation: str, policy_text: str, case: Case) -> dict:
    """``measure`` in a process of its own."""
    from memjax.plan.compiled import COMPILER_ENVIRONMENT

    environment = os.environ | COMPILER_ENVIRONMENT
    request = json.dumps([generation, policy_text, dataclasses.asdict(case)])
    command = [sys.executable, __file__, "--child", request]
    row = {"tpu": generation, "policy": policy_text, "program": case.name}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return row | {"error": f"not compiled within {TIMEOUT} seconds"}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if re.search(r"Error|Check failed|INTERNAL|UNIMPLEMENTED", line)]
        return row | {"error": (lines or [f"exit status {done.returncode}"])[0][:300]}
    return row | json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict]) -> list[str]:
    lines = [
        "| TPU | policy | program | device arguments | ledger device + q, k, v | host arguments | ledger host | device "
        "temporaries | of them in pages | host temporaries | verdict |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        start = f"| {row['tpu']} | `{row['policy']}` | {row['program']} |"
        if "error" in row:
            lines.append(f"{start} - | - | - | - | - | - | - | {row['error']} |")
            continue
        numbers = [
            row["device_arguments"],
            row["ledger_device"] + row["other_arguments"],
            row["host_arguments"],
            row["ledger_host"],
            row["device_temporaries"],
        ]
        pages = f"{row['device_temporaries'] / row['page']:.1f}" if row["page"] else "-"
        verdict = "no host tier" if not row["ledger_host"] else "; ".join(problems(row)) or "streams"
        cells = [f"{number:,}" for number in numbers] + [pages, f"{row['host_temporaries']:,}", verdict]
        lines.append(f"{start} {' | '.join(cells)} |")
    return lines


def report(rows: list[dict], versions: dict[str, str]) -> str:
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    return "\n".join(
        [
            "# Where the TPU compiler puts the host tier",
            "",
            f"Compiled ahead of time, on a machine without a TPU, for one device of each generation ({named}); nothing here "
            "was run or timed. Written by `benchmarks/tpu_host_tier.py`.",
            "",
            f"One attention layer unless the program says otherwise: {KV_HEADS} KV heads, {KV_HEADS * GROUPS} query heads, "
            f"head dimension {HEAD_DIM}, capacity {CAPACITY:,} tokens, bfloat16; the cache is donated. All sizes in bytes. "
            "Device arguments exceed the ledger by padding of small arrays to whole tiles. A page is 256 tokens of all rows "
            "and heads, keys and values. `streams`: the pool's bytes lie in host memory and equal the ledger, all are updated "
            "in place, the program copies no pool and asks nothing of the host's processor; its temporaries on the device are "
            f"smaller than {LARGEST_SHARE:.0%} of the pool (their size in pages is in the table).",
            "",
            *table(rows),
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generations", nargs="+", choices=GENERATIONS, default=["v5e", "v6e"])
    parser.add_argument("--jobs", type=int, default=1, help="compilations at a time")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        generation, policy_text, case = json.loads(arguments.child)
        print(json.dumps(measure(generation, policy_text, Case(**case))))
        return 0
    if importlib.util.find_spec("libtpu") is None:
        parser.error("this needs the TPU compiler: pip install 'jax[tpu]'")
    versions = {name: importlib.metadata.version(name) for name in ("memjax", "jax", "jaxlib", "libtpu")}
    todo = [(generation, *program) for generation in arguments.generations for program in programs()]
    rows = []
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        for row in pool.map(lambda each: in_child(*each), todo):
            rows.append(row)
            print(table([row])[-1], flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "tpu_host_tier.json").write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")
    (RESULTS / "tpu_host_tier.md").write_text(report(rows, versions), encoding="utf-8")
    return int(any(problems(row) for row in rows if "error" in row or row["ledger_host"]))


if __name__ == "__main__":
    sys.exit(main())
