"""Perplexity of a text far longer than the cache: StreamingLLM with its sinks, without them, and an uncompressed cache.

    python benchmarks/streaming_ppl.py --tokens 32768

The texts that memjax brings along are read one behind the other (the novel, 16.7k tokens, then the code file, 7.8k, then both
again), in chunks, and perplexity is that of every bin of 1,024 tokens. The uncompressed cache reads what fits the positions
that the model was trained for. Writes results/streaming_ppl.{json,md,png}.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import memjax as mj
from memjax.data import CODE, NOVEL
from memjax.evaluate.layerwise import read_layers

RESULTS = Path(__file__).parent / "results"
TEXTS = (NOVEL, CODE)
POLICIES = ("streaming(4,1020)", "streaming(0,1024)")
BIN = 1024


def read_tokens(model, count: int) -> tuple[np.ndarray, list[dict]]:
    """Token ids, and where each text begins."""
    texts = {text.file: model.tokenizer.encode(text.read()) for text in TEXTS}
    ids, begins = [], []
    while len(ids) < count:
        name = TEXTS[len(begins) % len(TEXTS)].file
        begins.append({"text": name, "at": len(ids)})
        ids += texts[name]
    return np.asarray(ids[:count], np.int32), begins


@jax.jit
def _losses(decoder, hidden, following):
    log_p = jax.nn.log_softmax(decoder.logits(hidden)[0])
    return -jnp.take_along_axis(log_p, following[:, None], axis=-1)[:, 0]


def measure(model, text: str, ids: np.ndarray, chunk: int) -> dict:
    """Perplexity per bin of one policy, and how long it took."""
    cache = model.init_cache(mj.policy(text), 1, len(ids), None)
    held, losses, begin = mj.nbytes(cache).device, [], time.perf_counter()
    for start in range(0, len(ids) - chunk, chunk):  # the last token is only predicted
        piece = jnp.asarray(ids[start : start + chunk + 1])
        hidden, cache = read_layers(model.decoder, cache, piece[None, :-1])
        losses.append(np.asarray(_losses(model.decoder, hidden, piece[1:]), np.float64))
    seconds, nll = time.perf_counter() - begin, np.concatenate(losses)
    bins = [nll[i : i + BIN] for i in range(0, len(nll), BIN)]
    row = {"policy": text, "tokens": len(nll), "bytes": held, "seconds": seconds}
    row |= {"ppl": [float(np.exp(each.mean())) for each in bins], "counts": [len(each) for each in bins]}
    print(json.dumps(row), flush=True)
    return row


def table(result: dict) -> str:
    """Markdown: a column per policy, a line per bin."""
    rows = result["rows"]
    texts = ", ".join(f"{each['text']} from token {each['at']:,}" for each in result["texts"])
    lines = [
        "# Perplexity of a text longer than the cache",
        "",
        f"{result['model']} (trained for {result['max_position']:,} positions), {result['device']}, chunks of "
        f"{result['chunk']}; {texts}. Perplexity of each {BIN:,} tokens. Written by `benchmarks/streaming_ppl.py`.",
        "",
        "| tokens from | " + " | ".join(f"`{row['policy']}`" for row in rows) + " |",
        "|--:|" + "--:|" * len(rows),
    ]
    for i in range(max(len(row["ppl"]) for row in rows)):
        cells = [f"{row['ppl'][i]:,.1f}" if i < len(row["ppl"]) else "" for row in rows]
        lines.append(f"| {i * BIN:,} | {' | '.join(cells)} |")
    lines.append("| cache, MiB | " + " | ".join(f"{row['bytes'] / 2**20:.1f}" for row in rows) + " |")
    return "\n".join([*lines, ""])


def plot(result: dict, path: Path) -> None:
    """Perplexity over the text, logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for row, colour, marker in zip(result["rows"], ("#1f5fa8", "#b0303a", "#5c5c5c"), "osD", strict=False):
        ends = np.cumsum(row["counts"])
        axes.plot(ends, row["ppl"], color=colour, marker=marker, ms=5, lw=1.5, label=row["policy"])
    for each in result["texts"][1:]:
        axes.axvline(each["at"], color="0.6", lw=1, ls=":")
        axes.text(each["at"], 0.97, f" {each['text']}", transform=axes.get_xaxis_transform(), fontsize=8, va="top")
    axes.axvline(BIN, color="0.6", lw=1)
    axes.text(BIN, 0.97, " the cache is full", transform=axes.get_xaxis_transform(), fontsize=8, va="top")
    axes.set(yscale="log", xlabel="tokens read", ylabel=f"perplexity of the last {BIN:,} tokens", xlim=(0, None))
    axes.set_title(f"{result['model']}, {result['device']}", loc="left", fontsize=11)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("policies", nargs="*", default=list(POLICIES))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=32 * 1024)
    parser.add_argument("--dense-tokens", type=int, default=8192, help="read by the uncompressed cache; 0: none")
    parser.add_argument("--chunk", type=int, default=256, help="a divisor of 1,024")
    parser.add_argument("--out", type=Path, default=RESULTS / "streaming_ppl.json")
    arguments = parser.parse_args()
    if BIN % arguments.chunk:
        raise ValueError(f"bins of {BIN} tokens are no multiple of --chunk {arguments.chunk}; take a divisor")
    model = mj.load(arguments.model)
    ids, texts = read_tokens(model, arguments.tokens + 1)
    dense = min(arguments.dense_tokens, arguments.tokens, model.config.max_position)
    jobs = [(policy, arguments.tokens) for policy in arguments.policies] + ([("dense", dense)] if dense else [])
    result = {"model": model.name, "max_position": model.config.max_position, "device": jax.devices()[0].device_kind}
    result |= {"chunk": arguments.chunk, "texts": [each for each in texts if each["at"] < arguments.tokens], "rows": []}
    for policy, tokens in jobs:
        result["rows"].append(measure(model, policy, ids[: tokens + 1], arguments.chunk))
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(table(result))
    plot(result, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
