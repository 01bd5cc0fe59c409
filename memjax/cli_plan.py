"""``memjax plan``: does a decode step fit a TPU slice?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from memjax.plan.planner import Plan

_GIB = 2**30


def plan(
    model: Annotated[str, typer.Argument(help="A name such as llama-3-70b, a config.json, or a checkpoint folder.")],
    tpu: Annotated[str, typer.Option(help="A slice: generation and axes, such as v5e:4x4 or v4:2x2x1.")] = "v5e:4x4",
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    context: Annotated[int, typer.Option(help="Tokens of each sequence that the cache is made for.")] = 32_768,
    policy: Annotated[str, typer.Option("--policy", "--kv", help="How the cache is made small.")] = "dense",
    mesh: Annotated[str | None, typer.Option(help="Devices along data x model, such as 4x4. Default: what fits best.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights and of what the cache does not quantize.")] = "bfloat16",
    layers: Annotated[int | None, typer.Option(help="Compile so many layers, and half as many, and extrapolate.")] = None,
    compile_step: Annotated[bool, typer.Option("--compile/--no-compile", help="Ask the TPU's compiler, too.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the plan here, in bytes.")] = None,
) -> None:
    """Weights, cache and temporaries of a decode step per TPU device. Exit status: 0 it fits, 1 it does not, 2 no answer.

    Nothing is downloaded or allocated. With libtpu (pip install libtpu) the step is compiled for the slice, without one.
    """
    from memjax.plan.models import model_config
    from memjax.plan.planner import plan as run

    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise FileNotFoundError(f"no folder {json_file.absolute().parent} to write {json_file.name} into")
    config, notes = model_config(model), Console(stderr=True)
    options = {"model": model, "mesh": None if mesh is None else _mesh(mesh), "dtype": dtype, "layers": layers}
    with notes.status("predicting") as status:
        options |= {"compile_step": compile_step, "say": lambda text: status.update(f"{text} (minutes)")}
        found = run(config, policy, batch, context, tpu, **options)
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    console.print(heading(found), highlight=False, markup=False)
    console.print(table(found))
    for line in remarks(found, config.max_position):
        console.print(line, highlight=False, markup=False)
    if json_file is not None:
        json_file.write_text(json.dumps(found.to_json(), indent=1) + "\n", encoding="utf-8")
    raise typer.Exit(2 if found.failed else int(not found.fits))


def _mesh(text: str) -> tuple[int, int]:
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdecimal() for side in sides):
        raise ValueError(f"--mesh is two numbers, data x model, such as 4x4; got {text!r}")
    return int(sides[0]), int(sides[1])


def heading(plan: Plan) -> str:
    """What is planned, in a line."""
    return (
        f"{plan.model}, {plan.policy}, {plan.batch} x {plan.context:,} tokens, "
        f"{plan.tpu.name} as data {plan.mesh[0]} x model {plan.mesh[1]}"
    )


def table(plan: Plan) -> Table:
    """A plan's sizes in GiB per device, predicted and compiled."""
    predicted, compiled = plan.predicted, plan.compiled
    shown = Table()
    last = f"compiled, {plan.compiled_layers} of {plan.layers} layers" if plan.compiled_layers else "compiled"
    for name, side in (("GiB per device", "left"), ("predicted", "right"), (last, "right")):
        shown.add_column(name, justify=side)
    counted = (lambda name: _gib(getattr(compiled, name))) if compiled else (lambda _: "")
    shown.add_row("weights", _gib(predicted.weights), "")
    shown.add_row("cache", _gib(predicted.cache), "")
    shown.add_row("weights + cache", _gib(predicted.arguments), counted("arguments"))
    shown.add_row("temporaries", f"~{_gib(predicted.temporaries)}", counted("temporaries"))
    if compiled:
        shown.add_row("results, program", "", _gib(compiled.outputs + compiled.code))
    shown.add_section()
    shown.add_row("total", _gib(predicted.total), counted("total"))
    shown.add_row("HBM", _gib(plan.tpu.hbm), _gib(plan.tpu.hbm))
    verdict = "refused" if plan.refused else _yes(plan, compiled.total) if compiled else ""
    shown.add_row("fits", _yes(plan, predicted.total), verdict)
    if predicted.host:
        shown.add_row("host memory", _gib(predicted.host), counted("host"))
    return shown


def _gib(size: int) -> str:
    return f"{size / _GIB:.3f}"


def _yes(plan: Plan, total: int) -> str:
    return "yes" if total <= plan.tpu.hbm else "NO"


def remarks(plan: Plan, max_position: int) -> list[str]:
    """What stands below the table."""
    lines, hardware = [], plan.tpu
    lines.append(f"Cache: {plan.dense_per_token:,} bytes per token uncompressed, {plan.cache_per_token:,.0f} as planned.")
    if plan.largest_context:
        lines.append(f"Largest context at batch {plan.batch} by prediction: {plan.largest_context:,} tokens.")
    else:
        lines.append(f"By prediction no context fits at batch {plan.batch}.")
    if hardware.devices != hardware.chips:
        lines.append(f"{hardware.chips} chips; a device is one of a chip's {hardware.devices // hardware.chips} cores.")
    if plan.context > max_position:
        lines.append(f"The model was made for {max_position:,} tokens.")
    if plan.compiled_layers:
        half = plan.compiled_layers // 2
        lines.append(f"Extrapolated to {plan.layers} layers from {half} and {plan.compiled_layers} compiled ones.")
    if plan.compiled:
        lines.append(f"Compiled in {plan.compiled.seconds:.0f} s, {plan.compiled.kernels} Pallas kernels.")
    if plan.note:
        lines.append(plan.note)
    return lines
