"""SmolLM2-135M with latent attention: KL divergence against the bytes of a cached token, before and after a short healing.

    python benchmarks/convert_mla.py [--points 192,192 128,64 ...] [--heal 128,64] [--steps 30] [--tokens 512]
    python benchmarks/convert_mla.py --only-heal     # keeps the points that the result file has

Statistics come from the beginnings of the packaged novel and code file; divergence to the original is measured on the novel's
last tokens, which neither statistics nor healing see, teacher-forced and uncached. Some points are also converted as published
(``plain``). One point is then healed by distillation, on the rest of the texts, and the models continue the same words
greedily. "As published" is this library's own reading of the paper, not its authors' code. The constants of the library's
method (how far queries look back, what first tokens and keys count) were chosen by hand from a dozen conversions, judged
partly on the last 384 tokens of the novel, which lie in the measured text, and partly on others.

Writes results/convert_mla.json, .md and .png beside this file, and the healed model into --save, if given.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import platform
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import memjax as mj
from memjax.convert.heal import Healing, divergences, heal
from memjax.convert.model import FIRST, bytes_per_token, convert, input_moments
from memjax.data import CODE, NOVEL

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
CALIBRATION = (4096, 2048)  # tokens of the novel and of the code
POINTS = [(192, 192), (320, 64), (256, 64), (192, 64), (128, 64), (128, 32), (64, 32)]
PROMPT = "The old keeper of the lighthouse climbed the stairs, and"


def read_texts(tokenizer) -> tuple[list[int], list[int]]:
    return tuple(tokenizer.encode(text.read()) for text in (NOVEL, CODE))


def measured(model, original, ids) -> dict[str, float]:
    found = divergences(model.decoder, original.decoder, ids)
    found = np.maximum(found, 0.0)  # float32 rounds what is zero to either side of it
    return {"kl": float(found.mean()), "kl_median": float(np.median(found)), "kl_p95": float(np.quantile(found, 0.95))}


def written(model) -> str:
    return mj.generate(model, PROMPT, policy="dense", max_new_tokens=24)[0].text


def point(original, moments, rank: int, rope_dim: int, plain: bool, held_out) -> tuple[dict, mj.LanguageModel]:
    start = time.perf_counter()
    made = convert(original, rank, rope_dim, moments=moments[plain], plain=plain)
    seconds = time.perf_counter() - start
    row = {"rank": rank, "rope_dim": rope_dim, "plain": plain, "bytes_per_token": bytes_per_token(made)}
    row |= measured(made, original, held_out) | {"seconds": round(seconds, 1)}
    print(json.dumps(row), flush=True)
    return row, made


def healed(converted, original, texts, held_out, arguments) -> tuple[dict, mj.LanguageModel]:
    """The healed model, with what it and the models around it measure and write."""
    options = {"learning_rate": arguments.rate, "trained": arguments.trained}
    healing, start = Healing(arguments.steps, arguments.batch, arguments.length, **options), time.perf_counter()
    show = lambda step, loss: print(f"step {step} of {healing.steps}: {loss:.4f}", flush=True)  # noqa: E731
    result = heal(converted, original, texts, healing, progress=show)
    row = {"healing": dataclasses.asdict(healing), "tokens": result.tokens, "losses": result.losses}
    row |= {"seconds": round(time.perf_counter() - start, 1), "before": measured(converted, original, held_out)}
    row |= {"after": measured(result.model, original, held_out), "texts": {"prompt": PROMPT, "original": written(original)}}
    row["texts"] |= {"converted": written(converted), "healed": written(result.model)}
    return row, result.model


def facts() -> dict:
    versions = {name: importlib.metadata.version(name) for name in ("memjax", "jax", "jaxlib", "flax", "optax", "numpy")}
    device = f"{jax.devices()[0].device_kind} ({platform.processor() or platform.machine()})"
    command = "python benchmarks/convert_mla.py " + " ".join(a for a in sys.argv[1:] if "/" not in a and a != "--save")
    return {"device": device, "versions": versions, "command": command.strip(), "date": time.strftime("%Y-%m-%d")}


def markdown(report: dict) -> str:
    before = report["original_bytes_per_token"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        "# SmolLM2-135M with latent attention",
        "",
        f"KL divergence to the original in nats per token, on {report['tokens']} held-out tokens of a novel, float32. The",
        f"original caches {before:,} bytes per token in bfloat16. `{report['command']}`",
        *([report["note"]] if "note" in report else []),
        f"Device: {report['device']}; {versions}; {report['date']}.",
        "",
        "| rank | rotary | bytes/token | of original | method | KL mean | KL median | KL p95 |",
        "|---:|---:|---:|---:|---|---:|---:|---:|",
    ]
    for row in report["points"]:
        share, method = row["bytes_per_token"] / before, "as published" if row["plain"] else "memjax"
        lines.append(
            f"| {row['rank']} | {row['rope_dim']} | {row['bytes_per_token']:,} | {share:.0%} | {method} | {row['kl']:.4f} | "
            f"{row['kl_median']:.4f} | {row['kl_p95']:.4f} |"
        )
    return "\n".join([*lines, "", *(_healing_lines(report) if "healed" in report else ())])


def _healing_lines(report: dict) -> list[str]:
    heal_row = report["healed"]
    healing, texts = heal_row["healing"], heal_row["texts"]
    return [
        f"Healing of rank {heal_row['rank']}, {heal_row['rope_dim']} rotary channels: {healing['steps']} steps of "
        f"{healing['batch']} x {healing['length']} tokens ({heal_row['tokens']:,} in all, {heal_row['seconds']} s), "
        f"{healing['trained']} parameters, AdamW at {healing['learning_rate']:g}: KL mean {heal_row['before']['kl']:.4f} -> "
        f"{heal_row['after']['kl']:.4f}, median {heal_row['before']['kl_median']:.4f} -> "
        f"{heal_row['after']['kl_median']:.4f}.",
        "",
        f"24 greedy tokens after “{texts['prompt']}”:",
        "",
        *(f"- {name}: {json.dumps(texts[name], ensure_ascii=False)}" for name in ("original", "converted", "healed")),
        "",
    ]


def write(report: dict, file: Path) -> None:
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    plot(report, file.with_suffix(".png"))


def plot(report: dict, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    for plain, label, mark in ((False, "memjax", "o"), (True, "as published", "s")):
        rows = [row for row in report["points"] if row["plain"] == plain and row["kl"] > 1e-5]
        axes.scatter([row["bytes_per_token"] for row in rows], [row["kl"] for row in rows], marker=mark, label=label)
        for row in rows:
            spot = (row["bytes_per_token"], row["kl"])
            axes.annotate(f" {row['rank']}+{row['rope_dim']}", spot, fontsize=7, va="bottom")
    if done := report.get("healed"):
        spot = ([done["bytes_per_token"]], [done["after"]["kl"]])
        axes.scatter(*spot, marker="*", s=90, label=f"healed, {done['tokens']:,} tokens")
    axes.axvline(report["original_bytes_per_token"], color="grey", linestyle=":", label="original")
    axes.set(yscale="log", xlabel="cache bytes per token, bfloat16", ylabel="mean KL divergence, nats")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    pair = lambda text: tuple(int(part) for part in text.split(","))  # noqa: E731
    parser.add_argument("--points", type=pair, nargs="+", default=POINTS)
    parser.add_argument("--published", type=pair, nargs="*", default=[(256, 64), (128, 64)])
    parser.add_argument("--heal", type=pair, default=(128, 64))
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--only-heal", action="store_true")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rate", type=float, default=5e-5)
    parser.add_argument("--trained", default="attention")
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    original = mj.load("smollm2-135m", jnp.float32)
    novel, code = read_texts(original.tokenizer)
    novel, held_out = novel[: -arguments.tokens], novel[-arguments.tokens :]
    calibration = [text[:count] for text, count in zip((novel, code), CALIBRATION, strict=True)]
    file = RESULTS / "convert_mla.json"
    own = input_moments(original, calibration, first=FIRST)
    if arguments.only_heal:
        report = json.loads(file.read_text(encoding="utf-8")) | {"heal": facts()}
    else:
        moments = {False: own, True: input_moments(original, calibration, first=0.0)}
        rows = [point(original, moments, *each, True, held_out)[0] for each in arguments.published]
        rows += [point(original, moments, *each, False, held_out)[0] for each in arguments.points]
        report = facts() | {"tokens": arguments.tokens, "calibration_tokens": CALIBRATION, "points": rows}
        report["original_bytes_per_token"] = bytes_per_token(original)
        write(report, file)
    row, converted = point(original, {False: own}, *arguments.heal, False, held_out)
    done, model = healed(converted, original, [novel, code], held_out, arguments)
    report["healed"] = done | {key: row[key] for key in ("rank", "rope_dim", "bytes_per_token")}
    write(report, file)
    if arguments.save is not None:
        mj.save_model(arguments.save, model.decoder, model.tokenizer)
    print(markdown(report))


if __name__ == "__main__":
    main()
