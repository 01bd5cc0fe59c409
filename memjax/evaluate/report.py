"""Rows of measurements as a table, as JSON and as a plot: bytes and quality always side by side."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from memjax.evaluate.compare import Row

SMALLEST_KLD = 1e-7  # what float32 can tell from zero; lower values are drawn here
COLOURS = ("#1f5fa8", "#c8682b", "#2c8a4a", "#b0303a", "#7a4fa3", "#7d5a45", "#c2519b", "#5c5c5c", "#7f7f12", "#138a99")
COLOURS += ("#000000", "#e08f00", "#86b300", "#6f8fd6")
_BIT_TICKS = (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 10, 12, 16, 24, 32)
Box = tuple[float, float, float, float]  # left, bottom, right, top in pixels
_BESIDE = [(9, 0, "left"), (-9, 0, "right"), (0, 13, "center"), (0, -13, "center")]
_BESIDE += [(9, dy, "left") for dy in (12, -12, 24, -24)] + [(-9, dy, "right") for dy in (12, -12, 24, -24)]
_FURTHER = [(dx, dy) for dx in (14, 34, 54) for dy in (0, 15, -15, 30, -30, 45, -45, 60, -60)]
_FURTHER += [(dx, dy) for dx in (90, 130) for dy in (0, 15, -15, 30, -30, 45, -45, 60, -60, 75, -75)]
# Where a label may stand, in points from its point, in order of preference.
_PLACES = [*_BESIDE, *((s * dx, dy, "left" if s > 0 else "right") for dx, dy in _FURTHER for s in (1, -1))]


def table(rows: Sequence[Row]) -> Table:
    """A table for the terminal."""
    shown = Table(title=_title(rows), title_justify="left", caption=_caption(rows), caption_justify="left")
    retrieval = any("passkey_found" in row for row in rows)
    headers = ["policy", "device KiB", "host KiB", "bits/value", "x smaller", "KLD mean", "KLD p95", "top-1", "ppl"]
    headers += ["read tok/s", "decode tok/s"] + (["pass key"] if retrieval else [])
    for i, header in enumerate(headers):
        shown.add_column(header, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for row in rows:
        cells = [
            str(row["policy"]),
            f"{row['bytes_device'] / 1024:,.0f}",
            f"{row['bytes_host'] / 1024:,.0f}" + ("*" if row["simulated"] else ""),
            show(row["bits_per_value"], ".2f"),
            f"{row['compression']:.2f}",
            f"{row['kld_mean']:.2g}",
            f"{row['kld_p95']:.2g}",
            f"{row['top1']:.3f}",
            f"{row['ppl']:.2f}",
            show(row["prefill_tokens_per_s"], ".0f"),
            show(row["decode_tokens_per_s"], ".1f"),
        ]
        if retrieval:
            cells.append(f"{'yes' if row['passkey_found'] else 'no'} ({row['passkey_answer']})")
        shown.add_row(*cells)
    return shown


def _title(rows: Sequence[Row]) -> str:
    row = rows[0]
    return f"{row['model']}, {row['tokens']} tokens read in chunks of {row['chunk']}, {row['setting']} setting"


def _caption(rows: Sequence[Row]) -> str:
    parts = [
        f"Cache of {rows[0]['capacity']} tokens, dense parts {rows[0]['cache_dtype']}. bits/value: coded history with "
        "scales; device KiB has the dense windows too. KLD: nats per token to the uncompressed run."
    ]
    if any(row["simulated"] for row in rows):
        parts.append("* simulated: this device has one memory, host bytes are kept apart in it but do not leave it.")
    return " ".join(parts)


def show(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def save_json(rows: Sequence[Row] | Row, path: str | Path) -> None:
    """Writes the rows of a comparison, a JSON list with one object per policy, or the object that an evaluation returns."""
    path, text = Path(path), json.dumps(rows, indent=1, allow_nan=False) + "\n"
    if path.exists() and not path.is_file():  # a pipe or a terminal
        path.write_text(text, encoding="utf-8")
        return
    part = path.with_name(path.name + ".part")  # an interruption leaves what was there
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def plot(rows: Sequence[Row], path: str | Path) -> None:
    """Bytes against KL divergence, both logarithmic, one labelled point per policy; down and left is better."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    sizes = [(row["bytes_device"] + row["bytes_host"] + row["bytes_disk"]) / 2**20 for row in rows]
    losses = [max(row["kld_mean"], SMALLEST_KLD) for row in rows]
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("cache, MiB on all tiers")
    axes.set_ylabel("mean KL divergence to the uncompressed model, nats per token")
    axes.set_title(_title(rows), loc="left", fontsize=11)
    axes.grid(which="major", alpha=0.3)
    axes.set_xlim(min(sizes) / 1.35, max(sizes) * 1.7)
    axes.set_ylim(min(losses) / 2.5, max(losses) * 2.5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    lost = [row.get("passkey_found") is False for row in rows]
    colours = ["white" if each else "#1f5fa8" for each in lost]
    axes.scatter(sizes, losses, s=55, c=colours, edgecolors="#1f5fa8", linewidths=1.6, zorder=3)
    if any(lost):
        axes.text(0.01, 0.015, "hollow: could not tell the pass key", transform=axes.transAxes, fontsize=9)
    figure.canvas.draw()
    _label(axes, [str(row["policy"]) for row in rows], sizes, losses)
    figure.savefig(path, dpi=140)


def _label(
    axes,
    names: Sequence[str],
    xs: Sequence[float],
    ys: Sequence[float],
    obstacles: Sequence[Box] = (),
    colours: Mapping[str, str] | None = None,
) -> list[Box]:
    """Each label in the first place around its point that is free and inside the axes; distant ones with a line to it.

    Args:
      obstacles: boxes in pixels to keep free besides the points.
      colours: of the labels, by name; None: all black.

    Returns:
      The boxes of the labels, in pixels.
    """
    frame = axes.get_window_extent()
    points = axes.transData.transform(list(zip(xs, ys, strict=True)))
    taken = [*obstacles, *((x - 5, y - 5, x + 5, y + 5) for x, y in points)]
    for name, x, y in sorted(zip(names, xs, ys, strict=True), key=lambda item: item[1]):
        for place in _PLACES:
            text, box = _annotate(axes, name, (x, y), place, (colours or {}).get(name, "black"))
            inside = frame.x0 < box[0] and box[2] < frame.x1 and frame.y0 < box[1] and box[3] < frame.y1
            if inside and not any(_overlap(box, other) for other in taken):
                break
            text.remove()
        else:  # nothing is free: crowded, but there
            _, box = _annotate(axes, name, (x, y), _PLACES[0], (colours or {}).get(name, "black"))
        taken.append(box)
    return taken[-len(points) :]


def _annotate(axes, name: str, at: tuple[float, float], place: tuple[float, float, str], colour: str):
    """The label, and the box of its letters without the line."""
    from matplotlib.text import Text

    dx, dy, side = place
    line = {"arrowstyle": "-", "lw": 0.7, "color": colour, "shrinkA": 0, "shrinkB": 4} if abs(dx) + abs(dy) > 24 else None
    offset = {"textcoords": "offset points", "ha": side, "va": "center", "arrowprops": line}
    in_lines = re.sub(r"(.{20,}?,)(?=.)", r"\1\n", name)
    text = axes.annotate(in_lines, at, (dx, dy), fontsize=9, color=colour, zorder=4, **offset)
    renderer = axes.figure.canvas.get_renderer()
    text.update_positions(renderer)
    box = Text.get_window_extent(text, renderer)
    return text, (box.x0, box.y0, box.x1, box.y1)


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points no other one beats: none is at most as large in both coordinates and smaller in one.

    Returns:
      Their indices, by the first coordinate; equal points are all in it.

    >>> pareto_front([(8, 1.0), (4, 3.0), (4, 2.0), (2, 9.0), (5, 2.5)])
    [3, 2, 0]
    """

    def beaten(x: float, y: float) -> bool:
        return any(u <= x and v <= y and (u, v) != (x, y) for u, v in points)

    return sorted((i for i, (x, y) in enumerate(points) if not beaten(x, y)), key=lambda i: points[i])


def pareto_plot(result: Mapping, path: str | Path) -> None:
    """Bits per value against KL divergence of an evaluation: a panel per setting and text, with intervals and the front."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = result["rows"]
    settings, texts = (list(dict.fromkeys(row[key] for row in rows)) for key in ("setting", "text"))
    names = list(dict.fromkeys(row["name"] for row in rows))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    size = (6.8 * len(texts), 5.0 * len(settings) + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(settings), len(texts), sharex=True, sharey="row", squeeze=False)
    panels = [(grid[i][j], setting, text) for i, setting in enumerate(settings) for j, text in enumerate(texts)]
    shown = [[row for row in rows if (row["setting"], row["text"]) == panel[1:]] for panel in panels]
    _limits(grid, shown, len(texts))
    for (axes, setting, text), own in zip(panels, shown, strict=True):
        axes.set_title(f"{text}, {setting} setting", loc="left", fontsize=11)
        _panel(axes, own, colours)
    level = f"{result['bootstrap']['level']:.0%} intervals of the mean (block bootstrap)"
    figure.suptitle(f"{result['model']}, {result['tokens']} tokens per text, {result['device']}; {level}", fontsize=11)
    figure.supxlabel(
        "bits per value of the coded history, scales included (equal bits side by side; filled: on the Pareto front)",
        fontsize=10,
    )
    figure.supylabel("mean KL divergence to the uncompressed model, nats per token", fontsize=10)
    figure.canvas.draw()
    figure.set_layout_engine("none")
    for (axes, _, _), own in zip(panels, shown, strict=True):
        _label(axes, [row["name"] for row in own], *_coordinates(own), _obstacles(axes, own), colours)
    figure.savefig(path, dpi=140)


def _panel(axes, rows: Sequence[Row], colours: Mapping[str, str]) -> None:
    (xs, ys), front = _coordinates(rows), _front(rows)
    axes.grid(which="major", alpha=0.3)
    axes.step([xs[i] for i in front], [ys[i] for i in front], where="post", color="0.6", lw=1.2, zorder=2)
    for i, (row, x, y) in enumerate(zip(rows, xs, ys, strict=True)):
        low, high = _span(row)
        look = {"color": colours[row["name"]], "mfc": None if i in front else "white", "mew": 1.5}
        axes.errorbar([x], [y], yerr=[[y - low], [high - y]], fmt="o", ms=6, capsize=3, lw=1.3, zorder=3, **look)
    ticks = [bits for bits in _BIT_TICKS if axes.get_xlim()[0] <= bits <= axes.get_xlim()[1]]  # others would widen the axis
    axes.set_xticks(ticks, [f"{bits:g}" for bits in ticks])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axes.yaxis.set_tick_params(which="minor", labelsize=8)


def _limits(grid, shown: Sequence[Sequence[Row]], columns: int) -> None:
    """Room for labels around the points; the scale is that of a row of panels, bits are those of all."""
    for axes in grid.flat:
        axes.set(xscale="log", yscale="log")
    bits = [x for rows in shown for x in _coordinates(rows)[0]]
    margin = max((max(bits) / min(bits)) ** 0.18, 1.15)
    grid[0][0].set_xlim(min(bits) / margin, max(bits) * margin**1.3)
    for i, line in enumerate(grid):
        spans = [_span(row) for rows in shown[i * columns : (i + 1) * columns] for row in rows]
        line[0].set_ylim(min(low for low, _ in spans) / 2.2, max(high for _, high in spans) * 2.2)


def _bits(row: Row) -> float:
    """Bits per value of the coded history; of everything, where nothing is coded."""
    return row["bits_total"] if row["bits_per_value"] is None else row["bits_per_value"]


def _front(rows: Sequence[Row]) -> list[int]:
    return pareto_front([(_bits(row), row["kld_mean"]) for row in rows])


def _coordinates(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    """Where points are drawn: equal bits side by side, the better ones on the left."""
    bits = [_bits(row) for row in rows]
    xs, step = list(bits), 0.014 * max(math.log(max(bits) / min(bits)), 0.7)
    for x in set(bits):
        same = sorted((i for i, other in enumerate(bits) if other == x), key=lambda i: rows[i]["kld_mean"])
        for place, i in enumerate(same):
            xs[i] = x * math.exp(step * (place - (len(same) - 1) / 2))
    return xs, [max(row["kld_mean"], SMALLEST_KLD) for row in rows]


def _span(row: Row) -> tuple[float, float]:
    """The interval as drawn; it holds the mean as drawn."""
    mean = max(row["kld_mean"], SMALLEST_KLD)
    return min(max(row["kld_low"], SMALLEST_KLD), mean), max(row["kld_high"], mean)


def _obstacles(axes, rows: Sequence[Row]) -> list[Box]:
    """Boxes, in pixels, of the error bars and of the front's steps."""
    (xs, ys), front = _coordinates(rows), _front(rows)
    lines = [((x, low), (x, high), 4) for x, (low, high) in zip(xs, map(_span, rows), strict=True)]
    for i, j in itertools.pairwise(front):
        lines += [((xs[i], ys[i]), (xs[j], ys[i]), 1), ((xs[j], ys[j]), (xs[j], ys[i]), 1)]
    boxes = []
    for start, end, width in lines:
        (left, bottom), (right, top) = axes.transData.transform([start, end])
        boxes.append((left - width, bottom - width, right + width, top + width))
    return boxes


def evaluation_tables(result: Mapping) -> list[Table]:
    """The tables of an evaluation for the terminal: quality, and where they were asked for pass keys and samples."""
    tables = [_quality(result)]
    if result["retrieval"]:
        tables.append(_retrieval(result["retrieval"]))
    if result["samples"]:
        tables.append(_samples(result["samples"]))
    return tables


def _quality(result: Mapping) -> Table:
    title = f"{result['model']}, {result['tokens']} tokens per text in chunks of {result['chunk']}"
    shown = Table(title=title, title_justify="left", caption=_verdicts(result), caption_justify="left")
    shown.add_column("text")
    shown.add_column("setting")
    shown.add_column("policy", no_wrap=True)
    for header in ("bits/value", "x smaller", "KLD mean", "95 % interval", "KLD p95", "top-1", "ppl"):
        shown.add_column(header, justify="right", no_wrap=True)
    before = None
    for row in result["rows"]:
        place = (row["text"], row["setting"])
        if before not in (None, place):
            shown.add_section()
        shown.add_row(
            *(("", "") if place == before else place),
            row["policy"] + ("*" if row["simulated"] else ""),
            show(row["bits_per_value"], ".2f"),
            f"{row['compression']:.2f}",
            f"{row['kld_mean']:.2g}",
            f"{row['kld_low']:.2g} .. {row['kld_high']:.2g}",
            f"{row['kld_p95']:.2g}",
            f"{row['top1']:.3f}",
            f"{row['ppl']:.2f}",
        )
        before = place
    return shown


def _verdicts(result: Mapping) -> str:
    """What the comparisons say, below the table."""
    block, level = result["bootstrap"]["block"], f"{result['bootstrap']['level']:.0%}"
    lines = [
        "bits/value: coded history with scales; x smaller: everything, dense windows included, against 16 bits. KLD: nats per "
        f"token to the uncompressed run; intervals from blocks of {block} tokens."
    ]
    for ranking in result["ranking"]:
        if ranking["spearman"] is not None:
            text, rho = ranking["text"], ranking["spearman"]
            lines.append(f"{text}: rank correlation of the policies between the two settings {rho:.2f} (Spearman).")
    together = [pair for pair in result["pairs"] if not pair["apart"]]
    for pair in together:
        place = f"{pair['text']}, {pair['setting']}"
        lines.append(f"{place}: {pair['better']} and {pair['worse']} cannot be told apart ({level}, paired by token).")
    if any(row["simulated"] for row in result["rows"]):
        lines.append("* simulated: this device has one memory, host bytes are kept apart in it but do not leave it.")
    return "\n".join(lines)


def _retrieval(rows: Sequence[Row]) -> Table:
    title = f"Pass keys in {rows[0]['tokens']} tokens, compressed before the question is known"
    shown = Table(title=title, title_justify="left")
    shown.add_column("policy", no_wrap=True)
    for depth in rows[0]["depths"]:
        shown.add_column(f"depth {depth:g}")
    shown.add_column("found", justify="right")
    for row in rows:
        pairs = zip(row["found"], row["answers"], strict=True)
        shown.add_row(
            row["name"], *("yes" if found else f"no ({answer})" for found, answer in pairs), f"{row['fraction']:.2f}"
        )
    return shown


def _samples(rows: Sequence[Row]) -> Table:
    title = f"First of {rows[0]['new_tokens']} greedy tokens that is not the uncompressed cache's (the texts are in the JSON)"
    shown = Table(title=title, title_justify="left")
    shown.add_column("policy", no_wrap=True)
    texts = list(dict.fromkeys(row["text"] for row in rows))
    for text in texts:
        shown.add_column(text, justify="right")
    for name in dict.fromkeys(row["name"] for row in rows):
        own = {row["text"]: row["first_difference"] for row in rows if row["name"] == name}
        shown.add_row(name, *("none" if own[text] is None else str(own[text]) for text in texts))
    return shown
