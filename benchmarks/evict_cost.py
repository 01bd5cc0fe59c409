"""What evictors cost and save: bytes of a prefill step as the compiler counts them, and times, against an uncompressed cache.

    python benchmarks/evict_cost.py

One attention layer of Llama-3-8B's shape (32 query heads, 8 kv heads, head_dim 128, bfloat16), one sequence, chunks of 256.
Memory: the step that reads a chunk of a prompt (rotation, attention, scores, eviction), compiled for several lengths of text
and budgets, the cache donated; arguments are the cache and the chunk, temporaries what else it needs. Times: of that step,
eviction included, and of a decode step, with 1k, 8k and 32k tokens behind it; runs of all policies take turns and the fastest
of each counts. On a CPU it is the process's CPU time, all threads together, which does not count other programs. Texts are
random, and written to the cache without being attended to: which tokens stay makes no difference to the time. Left out:
``pyramidkv``, which in one layer is ``snapkv``, and those that keep more than a budget by design, ``kvzip`` and ``kvcompose``
until the prompt has been read, ``duo`` in its retrieval heads. Writes results/evict_cost.{json,md}.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import memjax as mj
from memjax.cache.layer import commit

RESULTS = Path(__file__).parent / "results"
HEADS, KV_HEADS, DIM = 32, 8, 128
BUDGET, CHUNK = 1024, 256  # tokens
POLICIES = ("dense", "streaming(4,{window})", "h2o({budget})", "tova({budget})", "snapkv({budget})", "adakv({budget})")
POLICIES += ("dropkv({budget})", "expected_attention({budget})", "knorm({budget})", "keydiff({budget})")
POLICIES += ("snapkv({budget})+massfold", "quest({budget})")
CASES = ((8192, 1024), (32_768, 1024), (32_768, 4096))  # of the memory: capacity and budget
READ = (1024, 8192, 32_768)


def policy(text: str, budget: int = BUDGET):
    """A policy of the table, with its budget."""
    return mj.policy(text.format(budget=budget, window=budget - 4))


def layer(capacity: int) -> mj.CacheSpec:
    """One layer of Llama-3-8B."""
    return mj.CacheSpec(1, KV_HEADS, DIM, capacity, "bfloat16", rope=mj.Rope(DIM, 500_000.0), q_heads=HEADS)


def step(cache, q, k, v):
    """A chunk of a prompt, or one token."""
    return mj.attend(mj.update(cache, k, v), q)


def shapes(tokens: int) -> list[jax.ShapeDtypeStruct]:
    """Queries, keys and values of so many tokens."""
    return [jax.ShapeDtypeStruct((1, tokens, heads, DIM), jnp.bfloat16) for heads in (HEADS, KV_HEADS, KV_HEADS)]


@functools.cache
def compiled(text: str, capacity: int, tokens: int, budget: int = BUDGET):
    """The step for one policy, capacity and number of new tokens."""
    cache = mj.abstract(policy(text, budget), layer(capacity))
    return jax.jit(step, donate_argnums=0).lower(cache, *shapes(tokens)).compile()


def memory(text: str, capacity: int, budget: int) -> dict:
    """Bytes of the prefill step, by the compiler's memory analysis, and of the cache, by the ledger."""
    found = compiled(text, capacity, CHUNK, budget).memory_analysis()
    ledger = mj.predict_nbytes(policy(text, budget), layer(capacity)).device
    row = {"policy": text, "capacity": capacity, "budget": budget, "ledger": ledger}
    row["arguments"] = found.argument_size_in_bytes
    return row | {"temporaries": found.temp_size_in_bytes, "aliased": found.alias_size_in_bytes}


def tokens(seed: int, count: int) -> list[jax.Array]:
    """Random queries, keys and values."""
    keys = jax.random.split(jax.random.key(seed), 3)
    return [jax.random.normal(key, each.shape, each.dtype) for key, each in zip(keys, shapes(count), strict=True)]


def filled(text: str, capacity: int, read: int):
    """A cache that has taken in ``read`` tokens."""
    cache = policy(text).init(layer(capacity))
    write = jax.jit(lambda cache, k, v: commit(mj.update(cache, k, v)), donate_argnums=0)
    for i in range(read // CHUNK):
        cache = write(cache, *tokens(i, CHUNK)[1:])
    return jax.block_until_ready(cache)


def clock() -> float:
    """Seconds: of the CPU where there is nothing else, else of the wall."""
    return time.process_time() if jax.default_backend() == "cpu" else time.perf_counter()


def times(texts: list[str], read: int, repeats: int) -> list[dict]:
    """Milliseconds of a prefill step and of a decode step with ``read`` tokens behind them."""
    capacity = read + CHUNK
    caches = {text: filled(text, capacity, read) for text in texts}
    best: dict[tuple[str, int], float] = {}
    for new in (CHUNK, 1):
        arrays = tokens(7, new)
        for text in texts:
            compiled(text, capacity, new)
        for _ in range(repeats):
            for text in texts:
                cache = jax.block_until_ready(jax.tree.map(jnp.copy, caches[text]))
                begin = clock()
                jax.block_until_ready(compiled(text, capacity, new)(cache, *arrays))
                spent = clock() - begin
                best[text, new] = min(best.get((text, new), np.inf), spent)
    return [
        {"policy": text, "read": read, "prefill_ms": 1e3 * best[text, CHUNK], "decode_ms": 1e3 * best[text, 1]}
        for text in texts
    ]


def name(text: str) -> str:
    """A policy as it is shown, its budget left out."""
    return re.sub(r"\(.*?\)", "", text)


def report(result: dict) -> str:
    """Markdown."""
    cases = list(dict.fromkeys((row["capacity"], row["budget"]) for row in result["memory"]))
    lines = [
        "# What evictors cost and save",
        "",
        f"One attention layer of Llama-3-8B's shape, bfloat16, chunks of {CHUNK}, one sequence; {result['device']}, jax "
        f"{result['jax']}. Written by `benchmarks/evict_cost.py`.",
        "",
        "## Bytes of the step that reads a chunk",
        "",
        "MiB. Cache: the ledger's. Temporaries: what the compiler for this device needs besides the cache, queries, keys and "
        "values. Peak: all of these.",
        "",
        "| policy |" + "".join(f" {_case(*case)}: cache | temporaries | peak |" for case in cases),
        "|---|" + "--:|--:|--:|" * len(cases),
    ]
    for text in dict.fromkeys(row["policy"] for row in result["memory"]):
        own = [row for row in result["memory"] if row["policy"] == text]
        sizes = [(row["ledger"], row["temporaries"], row["arguments"] + row["temporaries"]) for row in own]
        cells = [f"{size / 2**20:,.1f}" for row in sizes for size in row]
        lines.append(f"| {name(text)} | {' | '.join(cells)} |")
    titles = {"prefill_ms": f"Reading a chunk of {CHUNK} tokens, eviction included", "decode_ms": "A decode step"}
    for key, title in titles.items() if result["times"] else ():
        lines += ["", f"## {title}", "", *_times(result["times"], key)]
    return "\n".join([*lines, ""])


def _case(capacity: int, budget: int) -> str:
    return f"{capacity // 1024}k text, budget {budget // 1024}k"


def _times(rows: list[dict], key: str) -> list[str]:
    reads = list(dict.fromkeys(row["read"] for row in rows))
    cpu = " of CPU time" if jax.default_backend() == "cpu" else ""
    lines = [f"Milliseconds{cpu}, budget {BUDGET // 1024}k; in brackets divided by the uncompressed cache's.", ""]
    lines.append("| policy |" + "".join(f" {read // 1024}k read |" for read in reads))
    lines.append("|---|" + "--:|" * len(reads))
    dense = {row["read"]: row[key] for row in rows if row["policy"] == "dense"}
    for text in dict.fromkeys(row["policy"] for row in rows):
        own = {row["read"]: row[key] for row in rows if row["policy"] == text}
        cells = [f"{own[read]:.2f} ({own[read] / dense[read]:.2f})" for read in reads]
        lines.append(f"| {name(text)} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=12, help="0: memory only")
    parser.add_argument("--read", type=int, nargs="+", default=list(READ))
    parser.add_argument("--out", type=Path, default=RESULTS / "evict_cost.json")
    arguments = parser.parse_args()
    result = {"device": f"{jax.devices()[0].device_kind} ({platform.machine()})", "jax": jax.__version__, "times": []}
    result["memory"] = [memory(text, *case) for text in POLICIES for case in CASES]
    for row in result["memory"]:
        print(json.dumps(row), flush=True)
    for read in arguments.read if arguments.repeats else ():
        result["times"] += times(list(POLICIES), read, arguments.repeats)
        print(json.dumps(result["times"][-len(POLICIES) :]), flush=True)
        compiled.cache_clear()
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(report(result))


if __name__ == "__main__":
    main()
