"""TPUs as JAX sees them: devices of a topology, and how much of its memory a program may use.

A device is what a mesh is made of: a chip, or on v4 and 7x one of a chip's two cores, each with its half of the HBM.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Generation:
    """A TPU generation.

    Attributes:
      prefix: the beginning of its topologies' names in JAX.
      chip_gib: HBM of a chip, as Google's documentation states it, GiB.
      cores: devices per chip, as the topologies list them.
      usable_gib: what a program may use of a device's HBM, GiB: what the compiler of libtpu 0.0.50 names when it refuses
        one that needs more ("exceeds available HBM (15.75G)"; of v5p it names more than the documentation does, which is
        therefore the limit here).
      sides: axes of its topologies.
      longest: of an axis; the compiler aborts beyond it. None: not known.
    """

    prefix: str
    chip_gib: int
    cores: int
    usable_gib: float
    sides: int
    longest: int | None = None

    @property
    def example(self) -> str:
        """Axes of a small topology."""
        return "2x2" if self.sides == 2 else "2x2x1"


GENERATIONS = {
    "v4": Generation("v4", 32, 2, 15.25, 3),
    "v5e": Generation("v5e", 16, 1, 15.75, 2, 16),
    "v5p": Generation("v5p", 95, 1, 95.0, 3),
    "v6e": Generation("v6e", 32, 1, 31.24, 2, 16),
    "7x": Generation("tpu7x", 192, 2, 94.74, 3),
}
_NAME = re.compile(r"(?:tpu)?(\w+):(\d{1,3}(?:x\d{1,3}){1,2})")


@dataclass(frozen=True)
class Tpu:
    """A topology, such as ``v5e:4x4``.

    Attributes:
      name: as the user says it.
      generation: a key of ``GENERATIONS``.
      topology: the name that JAX knows it by.
      chips, devices: how many; weights and caches are spread over devices.
    """

    name: str
    generation: str
    topology: str
    chips: int
    devices: int

    @property
    def hbm(self) -> int:
        """Bytes of HBM that a program may use on one device."""
        return round(GENERATIONS[self.generation].usable_gib * GIB)


def tpu(name: str) -> Tpu:
    """Reads ``generation:AxB`` or ``generation:AxBxC``.

    Raises:
      ValueError: an unknown generation, or axes that it does not have.

    >>> tpu("v5e:4x4").devices, tpu("7x:2x2x1").devices
    (16, 8)
    """
    known = ", ".join(f"{each}:{GENERATIONS[each].example}" for each in GENERATIONS)
    match = _NAME.fullmatch(name)
    if match is None or match[1] not in GENERATIONS:
        raise ValueError(f"unknown TPU {name!r}; say a generation and the axes of a slice, such as {known}")
    generation, axes = GENERATIONS[match[1]], [int(side) for side in match[2].split("x")]
    if len(axes) != generation.sides or not all(axes):
        raise ValueError(f"a slice of {match[1]} has {generation.sides} axes, such as {generation.example}; got {name!r}")
    if generation.longest is not None and max(axes) > generation.longest:
        raise ValueError(f"an axis of a slice of {match[1]} is at most {generation.longest} long, got {name!r}")
    topology, chips = f"{generation.prefix}:{match[2]}", math.prod(axes)
    return Tpu(name, match[1], topology, chips, chips * generation.cores)
