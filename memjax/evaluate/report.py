"""Rows of measurements as a table, as JSON and as a plot: bytes and quality always side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from memjax.evaluate.compare import Row

_SMALLEST_KLD = 1e-7  # what float32 can tell from zero; lower values are drawn here


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
            _show(row["bits_per_value"], ".2f"),
            f"{row['compression']:.2f}",
            f"{row['kld_mean']:.2g}",
            f"{row['kld_p95']:.2g}",
            f"{row['top1']:.3f}",
            f"{row['ppl']:.2f}",
            f"{row['prefill_tokens_per_s']:.0f}",
            _show(row["decode_tokens_per_s"], ".1f"),
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


def _show(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def save_json(rows: Sequence[Row], path: str | Path) -> None:
    """Writes the rows, a JSON list with one object per policy."""
    Path(path).write_text(json.dumps(list(rows), indent=1) + "\n", encoding="utf-8")


def plot(rows: Sequence[Row], path: str | Path) -> None:
    """Bytes against KL divergence, both logarithmic, one labelled point per policy; down and left is better."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    sizes = [(row["bytes_device"] + row["bytes_host"] + row["bytes_disk"]) / 2**20 for row in rows]
    losses = [max(row["kld_mean"], _SMALLEST_KLD) for row in rows]
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


def _label(axes, names: Sequence[str], xs: Sequence[float], ys: Sequence[float]) -> None:
    """Each label in the first place around its point that is free and inside the axes."""
    renderer, frame = axes.figure.canvas.get_renderer(), axes.get_window_extent()
    points = axes.transData.transform(list(zip(xs, ys, strict=True)))
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    places = [(9, 0, "left"), (-9, 0, "right"), (0, 13, "center"), (0, -13, "center")]
    places += [(9, dy, "left") for dy in (12, -12, 24, -24)] + [(-9, dy, "right") for dy in (12, -12, 24, -24)]
    for name, x, y in sorted(zip(names, xs, ys, strict=True), key=lambda item: item[1]):
        for dx, dy, side in places:
            text = axes.annotate(
                name, (x, y), (dx, dy), textcoords="offset points", ha=side, va="center", fontsize=9
            )
            box = text.get_window_extent(renderer)
            corner = (box.x0, box.y0, box.x1, box.y1)
            inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
            if inside and not any(_overlap(corner, other) for other in taken):
                break
            text.remove()
        else:
            text = axes.annotate(name, (x, y), (9, 0), textcoords="offset points", va="center", fontsize=9)
            box = text.get_window_extent(renderer)
            corner = (box.x0, box.y0, box.x1, box.y1)
        taken.append(corner)


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def markdown(rows: Sequence[Row]) -> str:
    """The main columns as a Markdown table."""
    header = "| policy | cache bytes | bits/value | x smaller | KL divergence | top-1 | perplexity | pass key |"
    lines = [header, "|---|--:|--:|--:|--:|--:|--:|---|"]
    for row in rows:
        total = row["bytes_device"] + row["bytes_host"] + row["bytes_disk"]
        found = {True: "found", False: "lost", None: "-"}[row.get("passkey_found")]
        lines.append(
            f"| `{row['policy']}` | {total:,} | {_show(row['bits_per_value'], '.2f')} | {row['compression']:.2f} | "
            f"{row['kld_mean']:.2g} | {row['top1']:.3f} | {row['ppl']:.2f} | {found} |"
        )
    return "\n".join(lines)
