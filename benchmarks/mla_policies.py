"""Codecs and evictors on SmolLM2-135M with latent attention, beside the same policies on the original model.

    python benchmarks/mla_policies.py [--points 128,64 192,192] [--tokens 1024] [--chunk 128] [--policies ...]
    python benchmarks/mla_policies.py --points 128,64 --heal-steps 30
    python benchmarks/mla_policies.py --model FOLDER       # one that memjax convert-mla has saved

Every policy reads the last tokens of the packaged novel, which the conversion does not see, in chunks, and is compressed while
it reads. Two KL divergences per policy: to the model that it serves with an uncompressed float32 cache (what the policy loses)
and to the original model (what the user loses, conversion and policy together). Bytes are those of the whole cache of the
text, windows and statistics included, over its tokens. Some policies then continue a piece of the text greedily.

Writes results/mla_policies.json and .md beside this file after every model, so that a run that is stopped leaves what it has.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import memjax as mj
from memjax.cache.ledger import predict_nbytes
from memjax.convert.heal import Healing, heal
from memjax.convert.model import FIRST, bytes_per_token, convert, input_moments
from memjax.data import CODE, NOVEL
from memjax.evaluate.bootstrap import mean_interval, paired_difference
from memjax.evaluate.compare import REFERENCE, Job, Reader, Reading, Setup
from memjax.evaluate.layerwise import answer
from memjax.evaluate.suite import circumstances

RESULTS = Path(__file__).parent / "results"
CALIBRATION = (4096, 2048)  # tokens of the novel and of the code
POLICIES = (
    "dense",
    "int8",
    "turboquant(4,4)",
    "turboquant(4,4,balance=off)",
    "turboquant(4,4,centre=none,balance=off)",
    "turboquant(3,3)",
    "turboquant(2,2)",
    "kivi(4)",
    "streaming(4,{window})",
    "snapkv({budget})",
    "h2o({budget})+protect(4,{half})",
    "snapkv({budget})+turboquant(4,4)",
)
SAMPLED = ("dense", "turboquant(4,4)", "snapkv({budget})")


def filled(text: str, tokens: int) -> str:
    """A policy with budgets of a quarter of the text; the window of ``streaming`` is what its four sinks leave."""
    budget = tokens // 4
    return text.format(budget=budget, window=budget - 4, half=budget // 2)


def measured(model, original, ids, policies, setup: Setup) -> list[dict]:
    """A row per policy: bytes, and divergences to the model itself and to the original, uncompressed."""
    own, other = Reader(model, len(ids), setup), Reader(original, len(ids), setup)
    reference, truth = own.start(REFERENCE, None), other.start(REFERENCE, None)
    runs = [own.start(Job(mj.policy(policy)), setup.cache_dtype) for policy in policies]
    against = [Reading(run.job, (), None) for run in runs]  # the same logits, held against the original's
    tokens = jnp.asarray(ids, jnp.int32)
    for start in range(0, len(ids), setup.chunk):
        piece, following = tokens[start : start + setup.chunk], tokens[start + 1 : start + 1 + setup.chunk]
        wanted = own.logits(own.read(reference, piece), len(piece))
        true = wanted if model is original else other.logits(other.read(truth, piece), len(piece))
        for run, second in zip(runs, against, strict=True):
            found = own.logits(own.read(run, piece), len(piece))
            run.measure(wanted, found, following)
            second.measure(true, found, following)
        print(f"{model.name}: {start + len(piece)} of {len(ids)} tokens", flush=True)
    return [_row(own, run, second, against[0], len(ids)) for run, second in zip(runs, against, strict=True)]


def _row(reader: Reader, run: Reading, second: Reading, first: Reading, tokens: int) -> dict:
    found, held = reader.row(run), mj.nbytes(run.cache)
    if held != predict_nbytes(run.job.policy, reader.model.decoder.cache_specs(1, tokens, reader.setup.cache_dtype)):
        raise AssertionError(f"{run.job.policy}: the buffers hold {held}, which is not what was predicted")
    row = {"policy": str(run.job.policy), "bytes_per_token": held.total / tokens, "bits_per_value": found["bits_per_value"]}
    for name, reading in (("policy", run), ("original", second)):
        interval = mean_interval(np.maximum(reading.kld_per_token(), 0.0))  # float32 rounds zero to either side
        row |= {f"kl_{name}": interval.mean, f"kl_{name}_low": interval.low, f"kl_{name}_high": interval.high}
        row[f"top1_{name}"] = float(np.concatenate(reading.agree).mean())
    change = paired_difference(second.kld_per_token(), first.kld_per_token())
    return row | {"ppl": found["ppl"], "change": change.mean, "change_low": change.low, "change_high": change.high}


def written(model, prompt, policies, new: int, setup: Setup) -> list[dict]:
    """Greedy continuations of one prompt, read in chunks through the policy's cache."""
    rows, ids = [], np.asarray([prompt], np.int32)
    for policy in policies:
        cache = model.init_cache(mj.policy(policy), 1, len(prompt) + new, setup.cache_dtype)
        said = answer(model, cache, ids, setup.chunk, new)[0].tolist()
        rows.append({"model": model.name, "policy": policy, "text": model.tokenizer.decode(said)})
    return rows


def models(arguments, original, texts):
    """The original, then every model with latent attention that was asked for, each made when its turn comes."""
    yield original
    if arguments.model is not None:
        yield mj.load(str(arguments.model), jnp.float32)
        return
    moments = input_moments(original, [t[:count] for t, count in zip(texts, CALIBRATION, strict=True)], first=FIRST)
    for rank, rope_dim in arguments.points:
        yield (made := convert(original, rank, rope_dim, moments=moments))
        if arguments.heal_steps and bytes_per_token(made) < bytes_per_token(original):  # else nothing was lost
            healed = heal(made, original, texts, Healing(arguments.heal_steps, 2, 128))
            yield dataclasses.replace(healed.model, name=f"{made.name}-healed-on-{healed.tokens}-tokens")


HEADER = ("policy", "bytes/token", "x smaller", "bits/value", "KL by the policy", "in all", "change", "top-1", "in all")


def markdown(report: dict) -> str:
    """The result file for readers."""
    before, versions = report["original_bytes_per_token"], ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    lines = [
        "# Policies on SmolLM2-135M with latent attention",
        "",
        f"{report['tokens']:,} held-out tokens of a novel in chunks of {report['chunk']}, compressed while they are read;",
        f"what is not quantized is {report['cache_dtype']}, weights are float32. *x smaller* is against the original's dense",
        f"16-bit cache, {before:,} bytes per token; bytes are the whole cache over its tokens, windows and statistics",
        "included, *bits/value* those of the history with the rotary part of latents, which stays 16-bit. *By the policy*: KL",
        "divergence to the same model with a dense float32 cache; *in all*: to the original model; nats per token, with the",
        "95 % interval of a block bootstrap; *change*: that in all against the table's first row, token by token. *Top-1*",
        "agreement likewise.",
        "",
        f"`{report['command']}`",
        "",
        f"Device: {report['device']}; {versions}; {report['date']}. Nothing is random but the bootstrap (seed 0).",
    ]
    for model in report["models"]:
        lines += ["", f"## {model['name']}", "", f"{model['dense_bytes_per_token']:,} bytes per token dense.", ""]
        lines += [f"| {' | '.join(HEADER)} |", "|---|--:|--:|--:|--:|--:|--:|--:|--:|"]
        lines += [_line(row, before) for row in model["rows"]]
    lines += ["", f"## {report['new']} greedy tokens after {report['prompt']} tokens of the same text", ""]
    for each in report["texts"]:
        lines.append(f"- {each['model']}, `{each['policy']}`: {json.dumps(each['text'], ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


def _line(row: dict, before: int) -> str:
    def with_interval(name: str) -> str:
        return f"{row[name]:.2g} ({row[name + '_low']:.2g} .. {row[name + '_high']:.2g})"

    bits = "-" if row["bits_per_value"] is None else f"{row['bits_per_value']:.2f}"
    cells = [f"`{row['policy']}`", f"{row['bytes_per_token']:,.0f}", f"{before / row['bytes_per_token']:.2f}", bits]
    cells += [with_interval("kl_policy"), f"{row['kl_original']:.3g}", with_interval("change")]
    return "| " + " | ".join([*cells, f"{row['top1_policy']:.3f}", f"{row['top1_original']:.3f}"]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    pair = lambda text: tuple(int(part) for part in text.split(","))  # noqa: E731
    parser.add_argument("--points", type=pair, nargs="*", default=[(128, 64), (192, 192)], help="rank,rotary channels")
    parser.add_argument("--model", type=Path, help="a converted model instead of points")
    parser.add_argument("--heal-steps", type=int, default=0, help="also measure the points that lose something healed")
    parser.add_argument("--policies", nargs="+", default=POLICIES, help="{budget}, {window} and {half} come from the tokens")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=512, help="tokens that samples continue")
    parser.add_argument("--new", type=int, default=60, help="tokens of a sample; 0: none")
    parser.add_argument("--out", type=Path, default=RESULTS / "mla_policies.json")
    arguments = parser.parse_args()
    begin, original = time.perf_counter(), mj.load("smollm2-135m", jnp.float32)
    novel, code = (original.tokenizer.encode(text.read()) for text in (NOVEL, CODE))
    held_out, setup = novel[-arguments.tokens :], Setup(arguments.chunk, decode_tokens=0)
    policies = [filled(text, arguments.tokens) for text in arguments.policies]
    shown = [filled(text, arguments.prompt) for text in SAMPLED]
    report = circumstances(original, setup.cache_dtype, arguments.tokens)
    report |= {name: getattr(arguments, name) for name in ("tokens", "chunk", "prompt", "new")}
    report |= {"command": " ".join(["python benchmarks/mla_policies.py", *sys.argv[1:]]), "date": time.strftime("%Y-%m-%d")}
    report |= {"original_bytes_per_token": bytes_per_token(original), "models": [], "texts": []}
    for model in models(arguments, original, [novel[: -arguments.tokens], code]):
        rows = measured(model, original, held_out, policies, setup)
        report["models"].append({"name": model.name, "dense_bytes_per_token": bytes_per_token(model), "rows": rows})
        if arguments.new:
            wanted = shown[:1] if model is original else shown
            report["texts"] += written(model, held_out[: arguments.prompt], wanted, arguments.new, setup)
        report["seconds"] = round(time.perf_counter() - begin)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        arguments.out.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    print(markdown(report))


if __name__ == "__main__":
    main()
