"""The suite ``evict`` as a table, as Markdown and as a plot: the kept part of the tokens against what is lost."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from memjax.evaluate.compare import Row
from memjax.evaluate.generated import UNCOMPRESSED
from memjax.evaluate.report import COLOURS, SMALLEST_KLD

_MARKERS = "osD^vPX<>*"
_BESIDE_LINES = 8  # methods; a longer legend would hide them
_TASKS = tuple(itertools.product(("passkey", "multikey"), ("hidden", "shown")))
_NAMES = {"passkey": "pass key", "multikey": "multi-key"}


def eviction_table(result: Mapping) -> Table:
    """A table for the terminal."""
    shown = Table(title=_title(result), title_justify="left", caption=_caption(result), caption_justify="left")
    tasks = _tasks(result)
    for i, header in enumerate(_headers(tasks)):
        shown.add_column(header, justify="left" if i == 0 else "right", no_wrap=i == 0)
    before = UNCOMPRESSED
    for row in result["rows"]:
        if row["name"] != before:
            shown.add_section()
        shown.add_row(*_cells(row, tasks))
        before = row["name"]
    return shown


def eviction_markdown(result: Mapping) -> str:
    """The same table in Markdown, with its title and notes."""
    tasks = _tasks(result)
    headers = _headers(tasks)
    lines = [_title(result) + ".", "", f"| {' | '.join(headers)} |", "|---|" + "--:|" * (len(headers) - 1)]
    lines += [f"| {' | '.join(_cells(row, tasks))} |" for row in result["rows"]]
    return "\n".join([*lines, "", _caption(result), ""])


def keys_summary(result: Mapping, fraction: float) -> str:
    """Keys at one kept part as a Markdown table; the uncompressed model first."""
    tasks = _tasks(result)
    header = [f"{_NAMES[kind]}, {question}" for kind, question in tasks]
    lines = [f"| evictor, {fraction:g} kept | {' | '.join(header)} |", "|---" + "|--:" * len(tasks) + "|"]
    for row in result["rows"]:
        if row["name"] == UNCOMPRESSED or row["fraction"] == fraction:
            lines.append(f"| `{row['name']}` | {' | '.join(_found(row, *task) for task in tasks)} |")
    return "\n".join(lines)


def _tasks(result: Mapping) -> list[tuple[str, str]]:
    """The columns of the tasks that were run."""
    return [task for task in _TASKS if "_".join(task) in result["rows"][0]]


def _headers(tasks: list[tuple[str, str]]) -> list[str]:
    fixed = ["method", "kept", "budget", "x smaller", "KLD mean", "95 % interval", "KLD p95", "top-1", "ppl", "read tok/s"]
    return fixed + [f"{_NAMES[kind]}, {question}" for kind, question in tasks]


def _cells(row: Row, tasks: list[tuple[str, str]]) -> list[str]:
    return [
        str(row["name"]),
        f"{row['fraction']:g}",
        f"{row['budget']:,}",
        f"{row['compression']:.2f}",
        f"{row['kld_mean']:.2g}",
        f"{row['kld_low']:.2g} .. {row['kld_high']:.2g}",
        f"{row['kld_p95']:.2g}",
        f"{row['top1']:.3f}",
        f"{row['ppl']:.2f}",
        f"{row['prefill_tokens_per_s']:.0f}",
        *(_found(row, kind, question) for kind, question in tasks),
    ]


def _found(row: Row, kind: str, question: str) -> str:
    """Keys found of those asked for, and how surprising their tokens are."""
    own = [each for each in row["answers"] if (each["task"], each["shown"]) == (kind, question == "shown")]
    return f"{sum(each['found'] for each in own)}/{len(own)} ({_surprise(row, kind, question)[0]:.2f})"


def _title(result: Mapping) -> str:
    return f"{result['model']}, {result['tokens']} tokens of the {result['text']} read in chunks of {result['chunk']}"


def _caption(result: Mapping) -> str:
    words = [
        f"KLD: nats per token of a continuation of {result['continuation']} tokens to the uncompressed model; x smaller: "
        f"against a 16-bit cache of the same capacity, dense parts {result['cache_dtype']}."
    ]
    if _tasks(result):
        words.append(
            "Keys found of those asked for, in brackets the mean surprise of their tokens in nats: hidden, the question comes "
            "when the text has been compressed; shown, it also stands at the end of every chunk."
        )
    return " ".join(words)


def eviction_plot(result: Mapping, path: str | Path) -> None:
    """Kept fraction against KL divergence, a line per method; where keys were asked for, a panel per task and setting."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = _tasks(result)
    figure = Figure(figsize=(14 if tasks else 8.6, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 4)
    axes = figure.add_subplot(grid[:, :2] if tasks else grid[:, :])
    rows = [row for row in result["rows"] if row["name"] != UNCOMPRESSED]
    _lines(axes, [(row, max(row["kld_mean"], SMALLEST_KLD), True) for row in rows])
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_title("KL divergence to the uncompressed model, nats per token of a continuation", loc="left", fontsize=10)
    if len({row["name"] for row in rows}) <= _BESIDE_LINES:
        axes.legend(fontsize=9)
    else:
        figure.legend(*axes.get_legend_handles_labels(), fontsize=9, loc="outside right center")
    for i, (kind, question) in enumerate(tasks):
        panel = figure.add_subplot(grid[i // 2, 2 + i % 2])
        own = [(row, *_surprise(row, kind, question)) for row in rows]
        _lines(panel, own)
        panel.axhline(_surprise(result["rows"][0], kind, question)[0], color="0.4", lw=1, ls=":")
        panel.set_title(f"{_NAMES[kind]}, question {question}: nats per token", loc="left", fontsize=10)
        panel.set_ylim(bottom=-0.02 * panel.get_ylim()[1])
    words = " (right: the surprise of the key; filled: every key found; dotted: uncompressed)" if tasks else ""
    figure.supxlabel("part of the text's tokens that is kept" + words, fontsize=10)
    figure.suptitle(f"{_title(result)}, {result['device']}", fontsize=11)
    figure.savefig(path, dpi=140)


def _surprise(row: Row, kind: str, question: str) -> tuple[float, bool]:
    """Nats per token of the keys, and whether all were found."""
    own = [each for each in row["answers"] if (each["task"], each["shown"]) == (kind, question == "shown")]
    return sum(each["nll"] for each in own) / len(own), all(each["found"] for each in own)


def _lines(axes, points: list[tuple[Row, float, bool]]) -> None:
    """A line per method over the kept fraction, the whole on the left; hollow where the last of a point is False."""
    names = list(dict.fromkeys(row["name"] for row, _, _ in points))
    for i, name in enumerate(names):
        own = sorted((row["fraction"], y, full) for row, y, full in points if row["name"] == name)
        look = {"color": COLOURS[i % len(COLOURS)], "zorder": 3}
        xs, ys = [x for x, _, _ in own], [y for _, y, _ in own]
        face = None if all(full for _, _, full in own) else "white"
        axes.plot(xs, ys, lw=1.4, marker=_MARKERS[i % len(_MARKERS)], ms=6, mfc=face, mew=1.4, label=name, **look)
        filled = [(x, y) for x, y, full in own if full]
        axes.plot(*zip(*filled, strict=True) if filled else ((), ()), ls="", marker=_MARKERS[i % len(_MARKERS)], ms=6, **look)
    ticks = sorted({row["fraction"] for row, _, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    if len(ticks) > 1:
        axes.invert_xaxis()
    axes.grid(which="major", alpha=0.3)
