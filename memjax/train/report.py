"""What training gave: losses beside the bytes of the caches, as a table, as Markdown and as plots."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.table import Table

from memjax.cache.ledger import predict_nbytes
from memjax.cache.parse import policy
from memjax.evaluate.report import COLOURS, _label
from memjax.models.config import ModelConfig
from memjax.models.decoder import cache_specs
from memjax.train.loop import Curve
from memjax.train.twins import parameters

SEQUENCE = 4096  # tokens whose whole cache is reported, so that states and bytes per token can be added up
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "memjax")
_HEADERS = (
    "mixer",
    "parameters",
    "MLP width",
    "validation loss, nats/byte",
    "bits per byte",
    "cache bytes per token, float32",
    "bfloat16",
    "state bytes",
    f"KiB at {SEQUENCE:,} tokens, bfloat16",
)
Row = dict[str, Any]


def cache_bytes(config: ModelConfig, dtype: str) -> tuple[int, int, int]:
    """What one sequence takes, by the ledger of the uncompressed cache.

    Args:
      dtype: of keys, values and latents; recurrent states are float32.

    Returns:
      Bytes that a token adds, bytes of recurrent states, and all bytes at ``SEQUENCE`` tokens, counters included.
    """
    whole, half = (predict_nbytes(policy("dense"), cache_specs(config, 1, n, dtype)) for n in (SEQUENCE, SEQUENCE // 2))
    return (whole.device - half.device) // (SEQUENCE // 2), whole.state, whole.total


def result_row(mixer: str, config: ModelConfig, curve: Curve) -> Row:
    """A twin's line of the table, as JSON."""
    loss = curve.validation[-1][1]
    sizes = {dtype: cache_bytes(config, dtype) for dtype in ("float32", "bfloat16")}
    return {
        "mixer": mixer,
        "parameters": parameters(config),
        "mlp_width": config.blocks[0].mlp.width,
        "validation_loss": loss,
        "bits_per_byte": loss / math.log(2),
        "bytes_per_token_float32": sizes["float32"][0],
        "bytes_per_token_bfloat16": sizes["bfloat16"][0],
        "state_bytes": sizes["bfloat16"][1],
        "sequence_tokens": SEQUENCE,
        "sequence_bytes_bfloat16": sizes["bfloat16"][2],
    }


def curve_json(curve: Curve) -> Row:
    """Losses, rounded to what they mean."""
    return {
        "train": [round(loss, 4) for loss in curve.train],
        "validation": [[step, round(loss, 5)] for step, loss in curve.validation],
    }


def machine() -> Row:
    """Device and versions."""
    device = jax.devices()[0]
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"device": device.device_kind, "platform": device.platform, "machine": platform.machine(), "versions": versions}


def _cells(row: Row) -> list[str]:
    return [
        row["mixer"],
        f"{row['parameters']:,}",
        f"{row['mlp_width']:,}",
        f"{row['validation_loss']:.4f}",
        f"{row['bits_per_byte']:.3f}",
        f"{row['bytes_per_token_float32']:,}",
        f"{row['bytes_per_token_bfloat16']:,}",
        f"{row['state_bytes']:,}",
        f"{row['sequence_bytes_bfloat16'] / 1024:,.0f}",
    ]


def twins_table(result: Mapping[str, Any]) -> Table:
    """A table for the terminal."""
    shown = Table(title=_title(result), title_justify="left", caption=_caption(result), caption_justify="left")
    for i, header in enumerate(_HEADERS):
        shown.add_column(header, justify="left" if i == 0 else "right")
    for row in result["rows"]:
        shown.add_row(*_cells(row))
    return shown


def twins_markdown(result: Mapping[str, Any]) -> str:
    """The same table in Markdown, with how it came about."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    size = ", ".join(f"{name} {value}" for name, value in result["shapes"].items())
    lines = [
        f"# {_title(result)}",
        "",
        f"`{result['command']}` on {result['device']} ({result['machine']}), {versions}. {_caption(result)}",
        "",
        f"Shapes: {size}. Plan: {', '.join(f'{name} {value}' for name, value in result['plan'].items())}.",
        "",
        f"| {' | '.join(_HEADERS)} |",
        "|---|" + "--:|" * (len(_HEADERS) - 1),
        *(f"| {' | '.join(_cells(row))} |" for row in result["rows"]),
    ]
    return "\n".join(lines) + "\n"


def _title(result: Mapping[str, Any]) -> str:
    return f"Twins of size {result['size']}: one decoder, five mixers, equal parameters, equal tokens"


def _caption(result: Mapping[str, Any]) -> str:
    plan, text = result["plan"], result["text"]
    passes = plan["steps"] * plan["batch"] * plan["context"] / text["train_bytes"]
    return (
        f"Each was trained on {plan['steps'] * plan['batch'] * plan['context']:,} bytes ({passes:.1f} passes over "
        f"{text['train_bytes']:,}) in the same order and validated on the same {text['validation_bytes']:,} held-out bytes, "
        f"whose single bytes have an entropy of {text['unigram_entropy']:.3f} nats. One seed ({plan['seed']}): how much the "
        "losses differ from seed to seed is not in this table. One learning rate for all, tuned for none. "
        "Bytes are those of one sequence, by the cache's ledger."
    )


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def curve_plot(title: str, curve: Curve, entropy: float, path: str | Path) -> None:
    """Losses of one run by step."""
    figure = _figure(7.5, 4.8)
    axes = figure.add_subplot()
    steps = np.arange(len(curve.train))
    axes.plot(steps, curve.train, color=COLOURS[0], alpha=0.35, lw=1, label="batch")
    axes.plot(*zip(*curve.validation, strict=True), "o-", color=COLOURS[1], ms=4, label="validation")
    axes.axhline(entropy, color="0.5", lw=1, ls="--", label="entropy of single bytes")
    _dress(axes, title)
    figure.savefig(path, dpi=140)


def _dress(axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("steps")
    axes.set_ylabel("loss, nats per byte")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)


def twins_plot(result: Mapping[str, Any], path: str | Path) -> None:
    """Left: validation losses by step. Right: the last of them against the bytes that a token adds to the cache."""
    figure, rows = _figure(12.5, 5.2), result["rows"]
    left, right = figure.subplots(1, 2)
    colours = {row["mixer"]: COLOURS[i] for i, row in enumerate(rows)}
    for row in rows:
        validation = result["curves"][row["mixer"]]["validation"]
        left.plot(*zip(*validation, strict=True), "o-", color=colours[row["mixer"]], ms=4, lw=1.3, label=row["mixer"])
    _dress(left, f"{result['plan']['context']} bytes of context, {rows[0]['parameters'] / 1e6:.2f} million parameters")
    _tradeoff(right, rows, colours)
    figure.suptitle(f"Twins of size {result['size']}, {result['device']}, one seed", fontsize=11)
    figure.canvas.draw()
    figure.set_layout_engine("none")
    names = {row["mixer"]: row["mixer"] + _state(row) for row in rows}
    xs, ys = [row["bytes_per_token_bfloat16"] for row in rows], [row["validation_loss"] for row in rows]
    _label(right, list(names.values()), xs, ys, colours={names[mixer]: colour for mixer, colour in colours.items()})
    figure.savefig(path, dpi=140)


def _tradeoff(axes, rows: Sequence[Row], colours: Mapping[str, str]) -> None:
    xs, ys = [row["bytes_per_token_bfloat16"] for row in rows], [row["validation_loss"] for row in rows]
    margin = 0.25 * max(max(ys) - min(ys), 0.01)
    axes.set(xscale="log", xlim=(min(xs) / 1.6, max(xs) * 1.8), ylim=(min(ys) - margin, max(ys) + margin))
    axes.scatter(xs, ys, s=55, c=[colours[row["mixer"]] for row in rows], zorder=3)
    ticks = [2**n for n in range(4, 24) if axes.get_xlim()[0] <= 2**n <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{x:,}" for x in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("cache bytes per token, bfloat16")
    axes.set_ylabel("validation loss, nats per byte")
    axes.set_title("down and left is better", loc="left", fontsize=11)
    axes.grid(alpha=0.3)


def _state(row: Row) -> str:
    return f" (and a state of {row['state_bytes'] / 1024:,.0f} KiB)" if row["state_bytes"] else ""
