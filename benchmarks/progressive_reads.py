"""What progressive reads cost in quality and how much they refine: token by token after a prompt, on a real model.

    python benchmarks/progressive_reads.py --prompt 1024 --new 128 --setting accumulated

The prompt is read in chunks, which every policy reads with all of its bits; then the text goes on token by token, as it stands
(teacher forcing), each step through the compressed cache. KL divergence per token from an uncompressed cache, in nats. In the
*static* setting new tokens are compressed before they are read and only four sinks stay dense; *accumulated* is how a cache is
used, with the default windows.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import memjax as mj
from memjax.cache.layer import commit
from memjax.data import CODE, NOVEL
from memjax.evaluate.compare import refined_fraction

RESULTS = Path(__file__).parent / "results"
CHUNK = 256
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


@functools.partial(jax.jit, static_argnames="static")
def one_layer(layer, cache, prompt, rest, static: bool):
    """A layer's outputs for the prompt [chunks, 1, C, D], in chunks, and for the tokens after it [T, 1, 1, D], one by one.

    A token meets in a layer only what the layer before made of it and of tokens before it: so layer by layer comes out what
    comes out token by token, and one layer is all that has to be compiled.
    """

    def read(cache, x):
        x, cache = layer(x, cache, None, static)
        return commit(cache), x

    cache, prompt = jax.lax.scan(read, cache, prompt)
    cache, rest = jax.lax.scan(read, cache, rest)
    return prompt, rest, cache


def log_probabilities(model, policy, ids: np.ndarray, new: int, static: bool):
    """Of what follows each of the last ``new`` tokens, [new, V]; and the caches."""
    x = model.decoder.embedding(jnp.asarray(ids))
    prompt, rest = x[:-new].reshape(-1, 1, CHUNK, x.shape[-1]), x[-new:, None, None]
    caches = list(model.init_cache(policy, 1, len(ids), "float32"))
    for i, layer in enumerate(model.decoder.layers):
        prompt, rest, caches[i] = one_layer(layer, caches[i], prompt, rest, static)
    logits = model.decoder.logits(model.decoder.norm(rest[:, 0, 0]))
    return jax.nn.log_softmax(logits), tuple(caches)


def measure(model, policies, ids: np.ndarray, new: int, static: bool) -> list[dict]:
    """A row per policy."""
    reference, _ = log_probabilities(model, mj.dense(), ids, new, static)
    rows = []
    for text in policies:
        begin = time.perf_counter()
        found, cache = log_probabilities(model, mj.policy(text + ("+protect(4,0)" if static else "")), ids, new, static)
        kld = np.asarray(jnp.sum(jnp.exp(reference) * (reference - found), axis=-1))
        rows.append(
            {
                "policy": text,
                "setting": "static" if static else "accumulated",
                "prompt": len(ids) - new,
                "new": new,
                "kld_mean": float(kld.mean(dtype=np.float64)),
                "kld_p95": float(np.percentile(kld, 95)),
                "top1": float(np.mean(np.asarray(jnp.argmax(found, -1) == jnp.argmax(reference, -1)))),
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
    parser.add_argument("--text", choices=(NOVEL.name, CODE.name), default=NOVEL.name)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--setting", choices=("static", "accumulated", "both"), default="both")
    parser.add_argument("--out", type=Path, default=RESULTS / "progressive_reads.json")
    arguments = parser.parse_args()
    model = mj.load(arguments.model)
    text = {each.name: each for each in (NOVEL, CODE)}[arguments.text]
    ids = np.asarray(model.tokenizer.encode(text.read())[: arguments.prompt + arguments.new], np.int32)
    settings = ("static", "accumulated") if arguments.setting == "both" else (arguments.setting,)
    rows = [row for one in settings for row in measure(model, arguments.policies, ids, arguments.new, one == "static")]
    result = {"model": model.name, "text": text.file, "device": jax.devices()[0].device_kind, "rows": rows}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(table(rows) + "\n")


if __name__ == "__main__":
    main()
