"""The command ``memjax train``: one twin, or all five and their table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from memjax.train.data import Corpus
    from memjax.train.loop import Curve, Plan

_NAME = "twins"


def train(
    out: Annotated[Path, typer.Option(help="Folder for the states, the model, the losses and the plot.")],
    mixer: Annotated[str, typer.Option(help="mha, gqa, mqa, mla or hybrid (Mamba-2 and attention).")] = "gqa",
    size: Annotated[str, typer.Option(help="smoke, for minutes on a CPU, or real, for a GPU.")] = "smoke",
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; default: the size's.")] = None,
    twins: Annotated[bool, typer.Option(help="Train all five mixers, one after the other, and compare them.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on with what is in the folder.")] = False,
    text_file: Annotated[list[Path] | None, typer.Option(help="More text than the packaged 90 KB. May be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first weights and of the order of the text.")] = 0,
    rate: Annotated[float | None, typer.Option(help="The highest learning rate; default: the size's.")] = None,
    every: Annotated[int | None, typer.Option(help="Validate and save after so many steps; default: a tenth of all.")] = None,
) -> None:
    """Train a small decoder on bytes of text; with --twins, five of equal parameters, to see what a small cache costs."""
    from memjax.train.data import make_corpus, packaged_texts, read_texts
    from memjax.train.loop import Plan
    from memjax.train.twins import MIXERS, sized, twin_config

    shapes = sized(size)
    steps = shapes.steps if steps is None else steps
    plan = Plan(
        steps=steps,
        batch=shapes.batch,
        context=shapes.context,
        rate=shapes.rate if rate is None else rate,
        seed=seed,
        every=max(1, steps // 10) if every is None else every,
    )
    twin_config(mixer, size)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; --out takes the name of a folder")
    texts = list(text_file or ())
    corpus = make_corpus([*packaged_texts(), *read_texts(texts)])
    command = f"memjax train {'--twins' if twins else f'--mixer {mixer}'} --size {size} --steps {plan.steps}"
    command += "".join(f" --text-file {each.name}" for each in texts) + f" --seed {seed} --out FOLDER"
    curves = {}
    for each in MIXERS if twins else (mixer,):
        curves[each] = _train_one(each, size, plan, corpus, out / each if twins else out, resume)
    if twins:
        _report(command, size, plan, corpus, curves, out)


def _train_one(mixer: str, size: str, plan: Plan, corpus: Corpus, folder: Path, resume: bool) -> Curve:
    from memjax.cli import _bars
    from memjax.train.checkpoints import RunFolder
    from memjax.train.data import unigram_entropy
    from memjax.train.loop import train as run
    from memjax.train.report import cache_bytes, curve_json, curve_plot, machine
    from memjax.train.twins import parameters, twin_config

    config = twin_config(mixer, size)
    kept = RunFolder(folder, config, plan, corpus, resume=resume)
    with _bars() as progress:
        task = progress.add_task(f"{mixer}: compiling", total=plan.steps)

        def show(done: int, loss: float) -> None:
            progress.update(task, completed=done, description=f"{mixer}: {loss:.3f} nats per byte")

        state, curve = run(config, plan, corpus, folder=kept, progress=show)
    kept.finish(state)
    described = {"mixer": mixer, "size": size, "parameters": parameters(config), "plan": dataclasses.asdict(plan)}
    _write_json(folder / "loss.json", described | machine() | curve_json(curve))
    title = f"{mixer}, size {size}: {parameters(config):,} parameters"
    curve_plot(title, curve, unigram_entropy(corpus.validation), folder / "loss.png")
    per_token, state_bytes, _ = cache_bytes(config, "bfloat16")
    Console().print(
        f"{mixer}: {curve.validation[-1][1]:.4f} nats per byte after {plan.steps} steps ({curve.seconds:.0f} s); cache of "
        f"{per_token:,} bytes per token (bfloat16) and {state_bytes:,} of state; model in {kept.model}",
        highlight=False,
        soft_wrap=True,
    )
    return curve


def _report(command: str, size: str, plan: Plan, corpus: Corpus, curves: dict[str, Curve], out: Path) -> None:
    from memjax.cli import _console
    from memjax.train.data import unigram_entropy
    from memjax.train.report import curve_json, machine, result_row, twins_markdown, twins_plot, twins_table
    from memjax.train.twins import sized, twin_config

    sizes = {"train_bytes": len(corpus.train), "validation_bytes": len(corpus.validation)}
    result = {"command": command, "size": size} | machine()
    result |= {"shapes": dataclasses.asdict(sized(size)), "plan": dataclasses.asdict(plan)}
    result["text"] = sizes | {"unigram_entropy": unigram_entropy(corpus.validation), "sha256": corpus.digest}
    result["rows"] = [result_row(mixer, twin_config(mixer, size), curve) for mixer, curve in curves.items()]
    result["curves"] = {mixer: curve_json(curve) for mixer, curve in curves.items()}
    _console().print(twins_table(result))
    _write_json(out / f"{_NAME}.json", result)
    (out / f"{_NAME}.md").write_text(twins_markdown(result), encoding="utf-8")
    twins_plot(result, out / f"{_NAME}.png")
    Console().print(f"Wrote {_NAME}.json, .md and .png in {out}.", highlight=False, soft_wrap=True)


def _write_json(path: Path, record: dict) -> None:
    path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
