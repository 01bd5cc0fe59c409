"""What progressive reads cost in quality and how much they refine: token by token after a prompt, on a real model.

    python benchmarks/progressive_reads.py --prompt 1024 --new 128 --setting accumulated

The prompt is read in chunks, which every policy reads with all of its bits; then the text goes on token by token, as it stands
(teacher forcing), each step through the compressed cache. KL divergence per token from an uncompressed cache, in nats. In the
*static* setting new tokens are compressed before they are read and only four sinks stay dense; *accumulated* is how a cache is
used, with the default windows.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.resources
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import memjax as mj
from memjax.cache.layer import LayerCache
from memjax.evaluate.compare import refined_fraction
from memjax.quantize import Progressive

RESULTS = Path(__file__).parent / "results"
CHUNK = 256
QUICK = {"xla_backend_optimization_level": "0"}  # programs of 30 layers that run a hundred times take long to compile
BASELINES = ("turboquant(3,3)", "turboquant(2,2)")
PROGRESSIVE = (
    "progressive(refine=1.0,share=0.0)",
    "progressive(refine=0.0)",
    "progressive(refine=0.1)",
    "progressive(refine=0.25)",
    "progressive(refine=0.5)",
    "progressive(refine=0.1,page=32)",
    "progressive(refine=0.25,page=32)",
    "progressive(refine=0.5,page=32)",
    "progressive(refine=1.0,page=32)",
)


def read_prompt(model, policy, ids: np.ndarray, capacity: int, static: bool):
    """The cache after the prompt."""
    step = jax.jit(lambda d, c, t: d(t, c, compress_first=static)[1], donate_argnums=1, compiler_options=QUICK)
    cache = model.init_cache(policy, 1, capacity, "float32")
    for start in range(0, len(ids), CHUNK):
        cache = step(model.decoder, cache, jnp.asarray(ids[None, start : start + CHUNK]))
    return cache


def decode_steps(model, cache, ids: np.ndarray, static: bool, reference: np.ndarray | None):
    """One token at a time: log probabilities [T, V] if there is no reference, else KL divergences [T]; and the cache."""

    def step(decoder, cache, token, wanted):
        hidden, cache = decoder(token[None, None], cache, compress_first=static)
        found = jax.nn.log_softmax(decoder.logits(hidden)[0, 0])
        return found if wanted is None else jnp.sum(jnp.exp(wanted) * (wanted - found)), cache

    compiled, found = jax.jit(step, donate_argnums=1, compiler_options=QUICK), []
    for i, token in enumerate(ids):
        each, cache = compiled(
            model.decoder, cache, jnp.asarray(token), None if reference is None else jnp.asarray(reference[i])
        )
        found.append(np.asarray(each))
    return np.stack(found), cache


def with_policy(cache, policy):
    """A prompt's cache as another progressive policy would have left it: chunks are read fine by all of them."""
    return tuple(dataclasses.replace(one, policy=policy) if isinstance(one, LayerCache) else one for one in cache)


def measure(model, policies, ids: np.ndarray, new: int, static: bool) -> list[dict]:
    """A row per policy."""
    prompt, rest, tail = ids[:-new], ids[-new:], "+protect(4,0)" if static else ""
    reference, _ = decode_steps(model, read_prompt(model, mj.dense(), prompt, len(ids), static), rest, static, None)
    rows, shared = [], {}
    for text in policies:
        policy, begin = mj.policy(text + tail), time.perf_counter()
        kind = Progressive if isinstance(policy.codec, Progressive) else policy
        if kind not in shared:
            shared[kind] = read_prompt(model, policy, prompt, len(ids), static)
        cache = with_policy(jax.tree.map(jnp.copy, shared[kind]), policy)
        kld, cache = decode_steps(model, cache, rest, static, reference)
        rows.append(
            {
                "policy": text,
                "setting": "static" if static else "accumulated",
                "prompt": len(prompt),
                "new": new,
                "kld_mean": float(kld.mean(dtype=np.float64)),
                "kld_p95": float(np.percentile(kld, 95)),
                "refined": refined_fraction(cache),
                "bits_per_value": mj.nbytes(cache).bits_per_value,
                "seconds": time.perf_counter() - begin,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = ["| setting | policy | refined | KL mean | KL p95 |", "|---|---|---|---|---|"]
    for row in rows:
        refined = "" if row["refined"] is None else f"{row['refined']:.1%}"
        lines.append(f"| {row['setting']} | `{row['policy']}` | {refined} | {row['kld_mean']:.4f} | {row['kld_p95']:.4f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("policies", nargs="*", default=BASELINES + PROGRESSIVE)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", default="moby_dick_excerpt.txt", help="a file of memjax.data")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--setting", choices=("static", "accumulated", "both"), default="both")
    parser.add_argument("--out", type=Path, default=RESULTS / "progressive_reads.json")
    arguments = parser.parse_args()
    model = mj.load(arguments.model)
    text = (importlib.resources.files("memjax.data") / arguments.text).read_text(encoding="utf-8")
    ids = np.asarray(model.tokenizer.encode(text)[: arguments.prompt + arguments.new], np.int32)
    settings = ("static", "accumulated") if arguments.setting == "both" else (arguments.setting,)
    rows = [row for one in settings for row in measure(model, arguments.policies, ids, arguments.new, one == "static")]
    result = {"model": model.name, "text": arguments.text, "device": jax.devices()[0].device_kind, "rows": rows}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(table(rows) + "\n")


if __name__ == "__main__":
    main()
