"""What decoding costs on a TPU, counted without one: bundles of the steady loop against the time that its bytes need.

    python benchmarks/tpu_static.py            # needs libtpu (pip install 'jax[tpu]'), no TPU; writes results/tpu_static.*
    python benchmarks/tpu_static.py --check    # compares with the committed results; exits with 1 if a loop grew by 10 %

Each kernel is compiled for real generations; the compiler prints the schedule that it made (see tpu_schedule.py). A step of
decode takes at least the larger of its bundles, one per cycle, and the cycles that its bytes need at the full bandwidth of
the main memory. The same is counted for JAX's own paged attention kernels at the same shapes. Nothing is run or timed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from aot_tpu import NoCompilerError, Request, compile_all, versions
from kernel_cases import Case, as_request, served

RESULTS = Path(__file__).parent / "results"
UNIT = 1024  # slots of a kv head
GROWTH = 1.10  # of bundles, that --check lets pass


@dataclass(frozen=True)
class Chip:
    """Bandwidth of the chip's memory in bytes/s, clock in Hz, and cores among which a program or two divide them."""

    bandwidth: float
    clock: float
    cores: int

    @property
    def bytes_per_cycle(self) -> float:
        """Of one core's cycle."""
        return self.bandwidth / self.cores / self.clock


# Bandwidths are published. Clocks are not: they follow from the published bfloat16 peak and the matrix units (v4, v5e, v5p:
# four of 128 x 128; v6e, 7x: two of 256 x 256, two products per cycle). v6e's was checked against a matrix product's schedule.
CHIPS = {
    "v5e": Chip(0.819e12, 1.5e9, 1),
    "v6e": Chip(1.64e12, 1.74e9, 1),
    "7x": Chip(7.37e12, 2.2e9, 2),
    "v5p": Chip(2.765e12, 1.75e9, 2),
    "v4": Chip(1.2e12, 1.05e9, 2),
}
GOALS = ("v5e", "v6e")
PEERS_FOR = ("v5e", "v6e", "7x")


def variants() -> dict[str, Case]:
    """memjax's rows, by label."""
    plain = ("bf16", "e4m3", "int8", "int8, one scale", "int4", "int3", "int2")
    found = {name: Case(keys=name, values=name) for name in plain}
    found["int8 / int4"] = Case(keys="int8", values="int4")
    found["int4 / int2"] = Case(keys="int4", values="int2")
    found |= {name: Case(keys=name, values=name) for name in ("int4 cubic", "int4 table")}
    found["int4, centred"] = Case(keys="int4", values="int4", centre=True)
    for run in (32, 128):
        found[f"KIVI 2 bit, {run}"] = Case(keys=f"int2 by {run} slots", values="int2 by 32 channels")
    for bits in (2, 4):
        found[f"KVarN {bits} bit"] = Case(
            keys=f"int{bits} by 128 slots, gain by slot", values=f"int{bits}, gain by 128 slots"
        )
    for page in (16, 32, 64, 128, 256, 512):
        found |= {f"{name}, page {page}": Case(keys=name, values=name, page=page) for name in ("bf16", "int8", "int4")}
    found["int8, one scale, page 512"] = Case(keys="int8, one scale", values="int8, one scale", page=512)
    for dim in (64, 256):
        found |= {
            f"{name}, dim {dim}": Case(model=f"dim {dim}", keys=name, values=name) for name in ("bf16", "int8", "int4")
        }
    latent = {"op": "mla_decode", "model": "deepseek-v3", "values": None}
    return found | {f"MLA {name}": Case(keys=name, **latent) for name in ("bf16", "int8", "int4")}


def peers() -> dict[str, list[Case]]:
    """JAX's kernels, by label, each with the block sizes of which the best counts."""
    found: dict[str, list[Case]] = {}
    page = 512  # their better one
    for name in ("bf16", "int8"):
        both = {"keys": name, "values": name, "page": page}
        found[f"paged_attention {name}, page {page}"] = [
            Case(op="paged_attention", slots_per_step=block, **both) for block in (4096, 8192)
        ]
    for name in ("bf16", "int8", "int4", "e4m3"):
        both = {"keys": name, "values": name, "page": page}
        found[f"ragged_paged_attention {name}, page {page}"] = [
            Case(op="ragged_paged_attention", slots_per_step=1024, tokens=1, **both)
        ]
    return found


def count(row: dict, tpu: str) -> dict:
    """Per 1,024 slots of a kv head: bundles, cycles that the bytes need, and what limits the loop."""
    if "steady" not in row:
        return {"error": row.get("refused") or row.get("error") or "no loop"}
    steady = row["steady"]
    vectors = row["vectors_per_step"] or row["vectors"] / math.prod(row["grid"])
    per_vector = (row["read"] or row["stored"]) / row["vectors"]
    bundles, work = (UNIT * steady[name] / vectors for name in ("bundles", "work"))
    cycles = UNIT * per_vector / CHIPS[tpu].bytes_per_cycle
    limit = "memory" if bundles <= cycles else "copies and control" if work <= cycles else "compute"
    return {
        "bundles": round(bundles, 1),
        "work": round(work, 1),
        "cycles": round(cycles, 1),
        "limit": limit,
        "bytes": per_vector,
        "slots_per_step": round(vectors),
        "copies_per_step": steady["copies"],
        "spills": steady["slots"]["VSTORE:SPILL"],
        "temporaries": row["temporaries"],
    }


def measure(chips: list[str], python: str, rivals: bool = True) -> list[dict]:
    """A row per generation and variant, and with ``rivals`` per generation and kernel of JAX (its best block sizes)."""
    todo = [(tpu, "memjax", label, case) for tpu in chips for label, case in variants().items() if served(tpu, case)]
    todo += [
        (tpu, "JAX", label, case)
        for tpu in chips
        if tpu in PEERS_FOR and rivals
        for label, cases in peers().items()
        for case in cases
    ]
    requests = [Request(tpu, as_request(case), schedule=True) for tpu, *_, case in todo]
    best: dict[tuple[str, str, str], dict] = {}
    for (tpu, whose, label, case), answer in zip(todo, compile_all(requests, python), strict=True):
        row = {"tpu": tpu, "whose": whose, "label": label, "block": case.slots_per_step, **count(answer, tpu)}
        print(f"{tpu:4} {whose:6} {label:40} {row.get('error') or describe(row)}", flush=True)
        key = (tpu, whose, label)
        if key not in best or needed(row) < needed(best[key]):
            best[key] = row
    return list(best.values())


def describe(row: dict) -> str:
    return f"{row['bundles']:6.0f} bundles ({row['work']:.0f} work), memory {row['cycles']:.0f} cycles: {row['limit']}"


def needed(row: dict) -> float:
    """Cycles per 1,024 slots of a kv head, at the least."""
    return max(row["bundles"], row["cycles"]) if "bundles" in row else math.inf


def slope(python: str, tpu: str = "v6e") -> dict:
    """Bundles per 1,024 slots from the difference of two step sizes: no parsing of loops, and none of their fixed cost."""
    steps = (1024, 2048)
    requests = [Request(tpu, as_request(Case(slots_per_step=step)), schedule=True) for step in steps]
    small, large = compile_all(requests, python)
    heads = 8
    difference = (large["bundles"] - small["bundles"]) / (steps[1] - steps[0]) / heads * UNIT
    loops = (large["steady"]["bundles"] - small["steady"]["bundles"]) / (steps[1] - steps[0]) / heads * UNIT
    return {"tpu": tpu, "label": "int8", "whole kernel": round(difference, 1), "loop": round(loops, 1)}


def comparisons(rows: list[dict]) -> list[dict]:
    """memjax's cycles as a share of those of JAX's better kernel, at equal formats and pages (contiguous: the better page).

    ``bytes`` is the same of what is read: a scale per token, which not all of JAX's kernels know, is 1.6 % of an int8 cache.
    """
    found = []
    for row in rows:
        name, _, page = row["label"].partition(", page ")
        fmt, _, _ = name.partition(", one scale")
        if row["whose"] != "memjax" or row["tpu"] not in PEERS_FOR or fmt not in ("bf16", "int8", "int4", "e4m3"):
            continue
        rivals = [
            each
            for each in rows
            if each["whose"] == "JAX" and each["tpu"] == row["tpu"] and each["label"].split()[1].rstrip(",") == fmt
            if not page or each["label"].endswith(f", page {page}")
        ]
        rival = min(rivals, key=needed, default=None)
        if rival is not None and needed(rival) < math.inf:
            shares = {"ratio": round(needed(row) / needed(rival), 3), "bytes": round(row["bytes"] / rival["bytes"], 3)}
            found.append({"tpu": row["tpu"], "label": row["label"], "rival": rival["label"], **shares})
    return found


def goals(rows: list[dict], ratios: list[dict]) -> list[tuple[str, list[str]]]:
    """What was aimed at, each with the rows that miss it."""
    ours = {(row["tpu"], row["label"]): row for row in rows if row["whose"] == "memjax"}

    def missed(labels: list[str], fine) -> list[str]:
        wanted = [(tpu, label) for tpu in GOALS for label in labels if (tpu, label) in ours]
        return [
            f"{tpu} {label}: {ours[tpu, label].get('error') or describe(ours[tpu, label])}"
            for tpu, label in wanted
            if not fine(ours[tpu, label])
        ]

    paged = [f"{name}, page {page}" for name in ("int8", "int4") for page in (256, 512)]
    behind = [
        f"{each['tpu']} {each['label']}: {each['ratio']} of {each['rival']}"
        for each in ratios
        if each["ratio"] > max(each["bytes"], 1)
    ]
    return [
        (
            "int8 and int4 at head dimension 128 wait for the memory, on v5e and v6e",
            missed(["int8", "int4"], lambda row: row.get("limit") == "memory"),
        ),
        ("no kernel is behind JAX's at equal bits (behind by more than the bytes that it reads more)", behind),
        (
            "copies and control are not the limit at pages of 256 and 512, on v5e and v6e",
            missed(paged, lambda row: row.get("limit") in ("memory", "compute")),
        ),
    ]


def table(rows: list[dict]) -> list[str]:
    """Rows of labels, three columns per generation."""
    chips = [tpu for tpu in CHIPS if any(row["tpu"] == tpu for row in rows)]
    lines = ["| | " + " | ".join(f"{tpu}: bundles | memory | limit" for tpu in chips) + " |"]
    lines.append("|---|" + "--:|--:|---|" * len(chips))
    for whose, label in dict.fromkeys((row["whose"], row["label"]) for row in rows):
        cells = []
        for tpu in chips:
            row = next((r for r in rows if (r["tpu"], r["whose"], r["label"]) == (tpu, whose, label)), {"error": ""})
            if "error" in row:
                cells += ["-", "-", "fails" if row["error"] else "-"]
            else:
                cells += [f"{row['bundles']:.0f}", f"{row['cycles']:.0f}", row["limit"]]
        lines.append(f"| {'JAX ' if whose == 'JAX' else ''}{label} | {' | '.join(cells)} |")
    return lines


def report(found: dict) -> str:
    rows, ratios = found["rows"], found["ratios"]
    named = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    clocks = "; ".join(
        f"{tpu} {c.bandwidth / 1e12:g} TB/s over {c.cores}, {c.clock / 1e9:g} GHz: {c.bytes_per_cycle:.0f} bytes per cycle"
        for tpu, c in CHIPS.items()
    )
    lines = [
        "# What a decode step costs on a TPU, counted",
        "",
        f"Compiled ahead of time, on a machine without a TPU ({named}); **nothing was run or timed**. Written by "
        "`benchmarks/tpu_static.py`.",
        "",
        f"Per {UNIT:,} slots of a kv head, keys and values together: *bundles* that a steady step of the kernel's loop issues "
        "(one per cycle at best: waiting for memory or results is not in them), and *memory*, the cycles that the bytes of "
        "codes and scales need at full bandwidth. Their larger is a lower bound of the time; *limit* names it: the memory, "
        "the work on the codes (compute), or, where the work alone would fit, copies and control. Pages of less than 128 "
        "slots share rows of lanes and are read with the whole row. Shape unless the row says otherwise: 32 sequences of "
        "32,768 tokens, 8 kv heads, 4 query heads each, head dimension 128, contiguous. `a / b`: keys / values. MLA: 128 "
        "query heads, latent 512 and 64 rotary channels in bfloat16.",
        "",
        f"Bandwidth (published) and clock (derived from published peaks) per core: {clocks}.",
        "",
        "JAX's kernels are those of `jax.experimental.pallas.ops.tpu`, as shipped: pages of 512, which suit them better than "
        "256, blocks of 1,024 slots (ragged) and the better of 4,096 and 8,192 (paged), the best of those tried. Its int8 "
        "`paged_attention` reads a scale per channel, which it makes from one per token before each call "
        "(temporaries of several GB here, not counted); `ragged_paged_attention` has one scale for the whole cache. memjax's "
        "have one per token.",
        "",
        *table(rows),
        "",
        "memjax as a share of JAX's better kernel of the same format (contiguous rows: against its better page size):",
        "",
        "| " + " | ".join(["", *PEERS_FOR]) + " |",
        "|---|" + "--:|" * len(PEERS_FOR),
    ]
    for label in dict.fromkeys(each["label"] for each in ratios):
        cells = []
        for tpu in PEERS_FOR:
            value = next((e for e in ratios if (e["tpu"], e["label"]) == (tpu, label)), None)
            cells.append("-" if value is None else f"{value['ratio']:.2f} ({value['rival'].split()[0]})")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    check = found["slope"]
    lines += [
        "",
        f"Check of the parser: between steps of 1,024 and 2,048 slots the loop grows by {check['loop']} bundles per "
        f"{UNIT:,} slots and head ({check['label']}, {check['tpu']}), the whole kernel, counted without looking for a loop, "
        f"by {check['whole kernel']}. What a row has above that is the fixed cost of a step.",
        "",
        *(f"- {goal}: {'yes' if not misses else 'no: ' + '; '.join(misses)}" for goal, misses in goals(rows, ratios)),
        "",
    ]
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    """Stacked bars of bundles, a mark where the memory stands, a panel per generation."""
    labels = ["bf16", "e4m3", "int8", "int4", "int2", "int4 cubic", "int4 table", "int8, page 256", "int4, page 256"]
    rivals = [
        f"{kernel} {name}, page 512"
        for name in ("bf16", "int8")
        for kernel in ("paged_attention", "ragged_paged_attention")
    ]
    wanted = [("memjax", label) for label in labels] + [("JAX", label) for label in rivals]
    shown = [tpu for tpu in PEERS_FOR if any(row["tpu"] == tpu for row in rows)]
    figure, axes = plt.subplots(1, len(shown), figsize=(4.6 * len(shown), 5.2), sharey=True, squeeze=False)
    for axis, tpu in zip(axes[0], shown, strict=True):
        found = {(row["whose"], row["label"]): row for row in rows if row["tpu"] == tpu and "bundles" in row}
        for at, key in enumerate(wanted):
            row = found.get(key)
            if row is None:
                continue
            color = "tab:blue" if key[0] == "memjax" else "tab:gray"
            axis.barh(at, row["work"], color=color)
            axis.barh(at, row["bundles"] - row["work"], left=row["work"], color=color, alpha=0.4)
            axis.plot([row["cycles"]] * 2, [at - 0.4, at + 0.4], color="tab:red", linewidth=2.5)
        axis.set_title(f"TPU {tpu}")
        axis.set_xlabel(f"cycles per {UNIT:,} slots of a kv head")
        names = [
            label if whose == "memjax" else "JAX " + label.replace("paged_attention", "paged")
            for whose, label in wanted
        ]
        axis.set_yticks(range(len(wanted)), names)
        axis.grid(axis="x", alpha=0.3)
    axes[0][0].invert_yaxis()
    handles = [
        plt.Rectangle((0, 0), 1, 1, color="black", alpha=0.8, label="bundles: work on codes"),
        plt.Rectangle((0, 0), 1, 1, color="black", alpha=0.3, label="bundles: copies and control"),
        plt.Line2D([], [], color="tab:red", linewidth=2.5, label="cycles that the bytes need"),
    ]
    figure.legend(handles=handles, loc="lower center", ncols=3, frameon=False)
    figure.suptitle("Decode, head dimension 128, counted from compiled schedules (nothing was run)")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def compare(rows: list[dict], committed: list[dict]) -> list[str]:
    """Rows that fail or grew."""
    before = {(row["tpu"], row["label"]): row.get("bundles", math.inf) for row in committed if row["whose"] == "memjax"}
    found = []
    for row in rows:
        allowed = before.get((row["tpu"], row["label"]), math.inf) * GROWTH
        if "error" in row or row["bundles"] > allowed:
            found.append(f"{row['tpu']} {row['label']}: {row.get('error') or row['bundles']}, allowed {allowed:.0f}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tpu", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--check", action="store_true", help="compare with the committed results and write nothing")
    arguments = parser.parse_args()
    python = os.environ.get("MEMJAX_AOT_PYTHON", sys.executable)
    if arguments.check:
        committed = json.loads((RESULTS / "tpu_static.json").read_text())
        grown = compare(measure(list(GOALS), python, rivals=False), committed["rows"])
        print("\n".join(grown) or "no loop grew")
        return int(bool(grown))
    rows = measure(arguments.tpu, python)
    ratios = comparisons(rows)
    found = {"versions": versions(python), "slope": slope(python), "ratios": ratios, "rows": rows}
    (RESULTS / "tpu_static.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "tpu_static.md").write_text(report(found), encoding="utf-8")
    plot(rows, RESULTS / "tpu_static.png")
    for goal, misses in goals(rows, ratios):
        print(f"{'missed' if misses else 'met   '}: {goal}", *misses, sep="\n    ")
    return int(any("error" in row for row in rows if row["whose"] == "memjax"))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except NoCompilerError as error:
        sys.exit(str(error))
