"""What it costs to encode a new token, beside the attention that the token is for, on whatever device JAX finds.

    python benchmarks/encode_cost.py [--contexts 1024 4096] [--rounds 7]

One layer in the shape of Llama-3-8B's (8 kv heads of 128 channels, 32 query heads), a batch of one, a cache that is full but
for a few tokens, so that every step encodes the token that leaves the recent window. Timed apart and in turn: ``update`` and
``commit`` with one token (rotary embedding, staging, encoding, writing), the same for a dense cache, and ``attend``. The
difference of the first two is the cost of the codec. Codecs in tiles encode 32 or 128 tokens at once, when a tile is full:
their cost is that of the whole tile, divided by its tokens. Each is one compiled program that runs ``STEPS`` steps in turn.
Queries, keys and values are bfloat16; on a CPU, which only emulates that, float32.

Writes results/encode_cost.json and .md beside this file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import memjax as mj

RESULTS = Path(__file__).parent / "results"
PLAIN = "centre=none,balance=off"  # without the front end
POLICIES = (
    f"int8({PLAIN})",
    f"int4({PLAIN})",
    f"int4(rotate=true,{PLAIN})",
    "int4",
    f"turboquant(4,4,scale=norm,{PLAIN})",
    "turboquant(4,4)",
    "turboquant(2,2)",
    "nf4",
    "kivi(4)",
    "kvarn(4,2)",
)
STEPS = 128  # a whole number of every codec's tiles
HEADS, GROUPS, DIM = 8, 4, 128
DTYPE = "float32" if jax.default_backend() == "cpu" else "bfloat16"


def programs(policy: str, context: int) -> dict:
    """Compiled ``encode`` and ``attend`` over ``STEPS`` tokens, with their arguments, from a cache that holds ``context``."""
    spec = mj.CacheSpec(1, HEADS, DIM, context + 2 * STEPS, DTYPE, rope=mj.Rope(DIM))
    rng = np.random.default_rng(0)

    def random(tokens: int, heads: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal((1, tokens, heads, DIM)), DTYPE)

    def fill(k, v, q):
        return mj.commit(mj.update(mj.policy(policy).init(spec), k, v, queries=q))

    cache = jax.jit(fill)(random(context, HEADS), random(context, HEADS), random(context, GROUPS * HEADS))
    k, v, q = (jnp.moveaxis(random(STEPS, n), 1, 0)[:, :, None] for n in (HEADS, HEADS, GROUPS * HEADS))

    def encode(cache, k, v, q):
        def step(cache, new):
            return mj.commit(mj.update(cache, new[0], new[1], queries=new[2])), None

        return jax.lax.scan(step, cache, (k, v, q))[0]

    def attend(cache, k, v, q):
        cache = mj.update(cache, k[0], v[0], queries=q[0])

        def step(total, q):
            held, total = jax.lax.optimization_barrier((cache, total))  # else all steps share what one has decoded
            out, _ = mj.attend(held, q)
            return total + jnp.sum(out, dtype=jnp.float32), None

        return jax.lax.scan(step, jnp.float32(0), q)[0]

    arguments = (cache, k, v, q)
    found = {"encode": jax.jit(encode).lower(*arguments).compile(), "attend": jax.jit(attend).lower(*arguments).compile()}
    return {name: (program, arguments) for name, program in found.items()}


def microseconds(program, arguments) -> float:
    """Of one step."""
    begin = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    return (time.perf_counter() - begin) / STEPS * 1e6


def measure(context: int, rounds: int) -> list[dict]:
    """A row per policy; medians over rounds in which all of them run in turn."""
    todo = {(policy, what): each for policy in ("dense", *POLICIES) for what, each in programs(policy, context).items()}
    for each in todo.values():
        microseconds(*each)
    times = {key: [] for key in todo}
    for _ in range(rounds):
        for key, each in todo.items():
            times[key].append(microseconds(*each))
    rows = []
    for policy in POLICIES:
        codec = [a - b for a, b in zip(times[policy, "encode"], times["dense", "encode"], strict=True)]
        shares = [a / b for a, b in zip(codec, times[policy, "attend"], strict=True)]
        row = {"policy": policy, "context": context, "share": statistics.median(shares), "most": max(shares)}
        row |= {"encode_us": statistics.median(codec), "attend_us": statistics.median(times[policy, "attend"])}
        rows.append(row)
        print(f"{context:6} {policy:52} {row['share']:.3f} of the attention ({row['encode_us']:.0f} us)", flush=True)
    return rows


def table(rows: list[dict]) -> list[str]:
    contexts = list(dict.fromkeys(row["context"] for row in rows))
    lines = ["| codec | " + " | ".join(f"{context:,} tokens" for context in contexts) + " |", "|---|" + "--:|" * len(contexts)]
    for policy in POLICIES:
        cells = [f"{row['share']:.3f} ({row['most']:.3f})" for row in rows if row["policy"] == policy]
        lines.append(f"| `{policy}` | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    rows = [row for context in options.contexts for row in measure(context, options.rounds)]
    device = jax.devices()[0]
    named = {"device": device.device_kind, "platform": device.platform, "machine": platform.machine()}
    named |= {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "encode_cost.json").write_text(json.dumps({"setup": named, "rows": rows}, indent=1) + "\n")
    lines = [
        "# Encoding a token, as a share of the attention that it is for",
        "",
        f"{', '.join(f'{key} {value}' for key, value in named.items())}; one layer, 8 kv heads of 128 channels, 32 query "
        f"heads, batch of one, {DTYPE}. Median (largest) of {options.rounds} rounds in which all codecs ran in turn; how, "
        "says `benchmarks/encode_cost.py`, which wrote this. On a shared machine: shares mean something, times do not.",
        "",
        *table(rows),
        "",
    ]
    (RESULTS / "encode_cost.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
