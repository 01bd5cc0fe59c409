"""How the GPU benchmarks measure: many calls in one program, over inputs that the L2 cache cannot hold, variants in turn."""

from __future__ import annotations

import importlib.metadata
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

L2_BYTES = 64 * 2**20  # of an H200 60 MB
ROUNDS, CALLS = 7, 12  # rounds of all variants in turn; calls per program and round, at least


class Variant:
    """One kernel on one shape, compiled: ``call(q, operands) -> output`` shaped like ``q`` in its leading axes.

    ``sets`` of operands are read in turn, together more than the L2 cache, so that every call reads device memory. Calls
    depend on each other through the query, or XLA would run one of them.
    """

    def __init__(self, name: str, call: Callable, q: jax.Array, sets: Sequence, nbytes: int):
        self.name, self.nbytes, self.count = name, nbytes, -(-CALLS // len(sets)) * len(sets)

        def program(q, sets):
            for i in range(self.count):
                out = call(q, sets[i % len(sets)])
                q = q + (jnp.sum(out, dtype=jnp.float32) * 1e-30).astype(q.dtype)
            return q

        self.arguments = (q, tuple(sets))
        self.compiled = jax.jit(program).lower(*self.arguments).compile()
        for _ in range(3):
            jax.block_until_ready(self.compiled(*self.arguments))

    def seconds(self) -> float:
        """Seconds per call of one run, launch of the program included once."""
        begin = time.perf_counter()
        jax.block_until_ready(self.compiled(*self.arguments))
        return (time.perf_counter() - begin) / self.count


def copies(nbytes: int) -> int:
    """Sets of operands of ``nbytes`` that exceed twice the L2 cache."""
    return max(1, -(-2 * L2_BYTES // max(nbytes, 1)))


def in_turn(variants: Sequence[Variant], rounds: int = ROUNDS) -> dict[str, dict[str, float]]:
    """Median and extremes of each variant's seconds per call, all variants in turn in every round."""
    found: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for i in range(rounds):
        order = variants if i % 2 == 0 else list(reversed(variants))
        for variant in order:
            found[variant.name].append(variant.seconds())
    return {
        name: {"median": statistics.median(times), "least": min(times), "most": max(times)} for name, times in found.items()
    }


def copy_bandwidth(nbytes: int = 2 * 2**30) -> float:
    """Bytes per second that a copy reads and writes: the ceiling that kernels are measured against."""
    x = jnp.ones(nbytes // 4, jnp.float32)
    program = jax.jit(lambda x: x + 1.0)
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        x = jax.block_until_ready(program(x))
        times.append(time.perf_counter() - begin)
    return 2 * nbytes / statistics.median(times[3:])


def environment() -> dict[str, str]:
    """Device and versions, for the report."""
    names = ["jax", "jaxlib", "memjax"]
    versions = {name: importlib.metadata.version(name) for name in names}
    return {"device": jax.devices()[0].device_kind} | versions
