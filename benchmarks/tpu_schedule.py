"""The schedule that the TPU compiler gave a kernel: how many instruction bundles a step of its steady loop takes.

A TPU core issues one bundle (one very long instruction word) per cycle, unless it waits; waiting for memory or for a result
is not in a schedule, so bundles are a lower bound on cycles. libtpu prints, per kernel, every bundle (``final_bundles``) and
how many slots of each unit it fills (``final_hlo-static-per-bundle-utilization``).

What runs in the steady state is the loop that holds the matrix products, but for the branches in it that are taken in a
first or last step only: those that neither multiply matrices nor start a copy from HBM.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

LLO_FLAGS = "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*final.*"
UTILIZATION, BUNDLES = "-final_hlo-static-per-bundle-utilization.txt", "-final_bundles.txt"
GRANULE = {"v4": 512}  # bytes in which sizes of copies are given
USUAL_GRANULE = 32
_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(LH|LB|LE|PB|PF|CT)?\s*:\s*((?:>\s*)*)\{(.*)$")
_BRANCH = re.compile(r"sbr\.rel \((!?)%[^)]*\) target = \$region(\d+)")
_COPY = re.compile(r"= dma\.(?:hbm_to_vmem|general)\b.*?/\*size_in_granules=\*/(%?\w+)")
_DELAY_SLOTS = 4  # bundles behind a branch that run in any case


@dataclass(frozen=True)
class Bundle:
    """One line of the schedule: ``depth`` loops around it, the slots it fills, and its text."""

    address: int
    starts_loop: bool
    depth: int
    slots: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Steady:
    """A step of the steady loop.

    Attributes:
      bundles: of the whole step.
      work: of them, in the branch (or, without one, the stretch) that multiplies matrices.
      copies, copied: copies from HBM that the step starts, and their bytes; 0 bytes where a size is not a constant.
      slots: filled slots per unit.
    """

    bundles: int
    work: int
    copies: int
    copied: int
    slots: dict[str, int]


def read(folder: Path, kernel: str, generation: str, prologues: int = 0) -> dict:
    """Counts for the kernel whose name in the program begins with ``kernel``: in total and per step of its steady loop.

    ``prologues``: how many of the loop's branches that start copies, the first of them, are a first step's only.

    Raises:
      ValueError: no such kernel was compiled, or its schedule looks different from what this module knows.
    """
    tables = sorted(folder.glob(f"*-{kernel}*{UTILIZATION}"))
    if not tables:
        raise ValueError(f"the program has no kernel {kernel}*: {sorted(path.name for path in folder.iterdir())}")
    found = [(path, *_table(path.read_text())) for path in tables]
    path, units, rows = max(found, key=lambda each: len(each[2]))
    stem = re.sub(r"-\d+" + re.escape(UTILIZATION), "", path.name)
    (listing,) = (each for each in folder.glob(f"{stem}-*{BUNDLES}") if "analysis" not in each.name)
    bundles = list(parse(listing.read_text().splitlines(), rows))
    totals = dict(zip(units, (sum(column) for column in zip(*rows, strict=True)), strict=True))
    loop = steady_loop(bundles, units)
    counted = None if loop is None else vars(measure(loop, units, GRANULE.get(generation, USUAL_GRANULE), prologues))
    return {"bundles": len(rows), "slots": totals, "steady": counted}


def _table(text: str) -> tuple[list[str], list[tuple[int, ...]]]:
    """Names of the units, and per bundle how many of their slots are filled."""
    lines = text.splitlines()
    units = [name.strip() for name in lines[1].split(",")]
    rows = [tuple(map(int, line.split())) for line in lines[4:] if line.strip()]
    if "MXU" not in units or any(len(row) != len(units) for row in rows):
        raise ValueError(f"unknown form of the utilization table: {lines[:5]}")
    return units, rows


def parse(lines: Iterable[str], rows: list[tuple[int, ...]]) -> list[Bundle]:
    """The bundles of a listing; ``rows`` are the slots they fill, by address."""
    found: list[Bundle] = []
    for line in lines:
        match = _BUNDLE.match(line)
        if match is None:
            if found and "control target key" not in line:  # a comment over several lines
                last = found.pop()
                found.append(Bundle(last.address, last.starts_loop, last.depth, last.slots, last.text + line))
            continue
        address, marker, arrows, text = match.groups()
        at = int(address, 16)
        if at != len(found):
            raise ValueError(f"bundle {at} follows bundle {len(found) - 1}")
        found.append(Bundle(at, marker in ("LB", "LH"), arrows.count(">"), rows[at] if at < len(rows) else (), text))
    if abs(len(found) - len(rows)) > 1:
        raise ValueError(f"{len(found)} bundles listed, {len(rows)} in the utilization table")
    return found


def steady_loop(bundles: list[Bundle], units: list[str]) -> list[Bundle] | None:
    """The innermost loop that multiplies matrices (of several, the longest); None if no loop does."""
    unit = units.index("MXU")
    found = []
    for first in bundles:
        if not first.starts_loop:
            continue
        # Branches and empty bundles may not say that they are in the loop: it ends with the last bundle that does.
        later = bundles[first.address + 1 :]
        inside = [first, *itertools.takewhile(lambda b, d=first.depth: not (b.starts_loop and b.depth <= d), later)]
        while inside[-1].depth < first.depth:
            inside.pop()
        if any(bundle.slots and bundle.slots[unit] for bundle in inside):
            found.append(inside)
    return max(found, key=lambda loop: (loop[0].depth, len(loop)), default=None)


def measure(loop: list[Bundle], units: list[str], granule: int, prologues: int = 0) -> Steady:
    """What a steady step of this loop runs."""
    unit = units.index("MXU")
    branches = list(_branches(loop))
    skipped: set[int] = set()
    busy = [branch for branch in branches if any(b.slots and b.slots[unit] for b in branch)]
    copying = [b for b in branches if b not in busy and any(_COPY.search(bundle.text) for bundle in b)]
    for branch in branches:
        if branch not in busy and branch not in copying[prologues:]:
            skipped.update(bundle.address for bundle in branch)
    skipped |= _inner_loops(loop, unit)
    kept = [bundle for bundle in loop if bundle.address not in skipped]
    multiplied = [i for i, bundle in enumerate(kept) if bundle.slots and bundle.slots[unit]]
    # Branches lie in each other: the work is the innermost one.
    work = min((len(branch) for branch in busy), default=multiplied[-1] - multiplied[0] + 1)
    sizes = [size for bundle in kept for size in _COPY.findall(bundle.text)]
    constant = all(size.isdigit() for size in sizes)
    slots = [sum(column) for column in zip(*(bundle.slots for bundle in kept if bundle.slots), strict=True)]
    copied = granule * sum(map(int, sizes)) if constant else 0
    return Steady(len(kept), work, len(sizes), copied, dict(zip(units, slots, strict=True)))


def _branches(loop: list[Bundle]) -> Iterable[list[Bundle]]:
    """Stretches of the loop that a forward branch can skip."""
    for i, bundle in enumerate(loop):
        for _, region in _BRANCH.findall(bundle.text):
            begins = re.compile(rf"Start(?:/End empty)? region {region}\b")
            for j in range(i + 1, len(loop)):
                if begins.search(loop[j].text):
                    yield loop[i + 1 + _DELAY_SLOTS : j]
                    break


def _inner_loops(loop: list[Bundle], unit: int) -> set[int]:
    """Addresses in deeper loops: searches for the next row to work on, which end at once in the steady state."""
    deeper = [bundle for bundle in loop if bundle.depth > loop[0].depth]
    if any(bundle.slots and bundle.slots[unit] for bundle in deeper):
        raise ValueError("matrices are multiplied in a loop inside of the innermost loop that does so")
    return {bundle.address for bundle in deeper}
