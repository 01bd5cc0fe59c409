"""Append: writes new tokens' codes into their slots, in place."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jaxtyping import Array, Int

from memjax.pallas_kernels.append import gpu, tpu
from memjax.pallas_kernels.append.reference import append_reference, append_xla
from memjax.pallas_kernels.choose import Choice, Target, choose
from memjax.pallas_kernels.sharding import over_mesh

__all__ = ["append", "append_reference", "append_xla", "choice"]


def append[Tree](
    target: Tree,
    new: Tree,
    start: Int[Array, "B"],
    count: Int[Array, "B"] | None = None,
    *,
    implementation: str | None = None,
    interpret: object = False,
) -> Tree:
    """Token t < count[b] of row b goes to slot ``start[b] + t`` of every leaf; slots that do not exist take nothing.

    Args:
      target: any pytree of leaves [B, K, ..., S], such as ``Codes`` with scales per slot. Donate it to the ``jit`` around
        this call: then nothing but the touched slots moves.
      new: the same with T new tokens along the last axis: one token, a chunk, or whole pages.
      start: first slot, int32 [B].
      count: how many of the T tokens are real, int32 [B]; None: all.
      implementation, interpret: as in ``decode``.

    Raises:
      ValueError: leaves that do not match, or a named implementation that cannot serve the case, with the reason.
    """
    if jax.tree.structure(target) != jax.tree.structure(new):
        raise ValueError(f"append needs new tokens of the target's structure {jax.tree.structure(target)}")
    for leaf, block in zip(jax.tree.leaves(target), jax.tree.leaves(new), strict=True):
        if leaf.shape[:-1] != block.shape[:-1] or start.shape != leaf.shape[:1]:
            raise ValueError(
                f"append needs new tokens {list(leaf.shape[:-1])} + [T] and start [{leaf.shape[0]}], got "
                f"{list(block.shape)} and {list(start.shape)}"
            )
        if leaf.dtype != block.dtype:
            raise ValueError(f"append got new tokens of {block.dtype} for a target of {leaf.dtype}: encode them first")
    if count is None:
        count = jax.numpy.full_like(start, jax.tree.leaves(new)[0].shape[-1])
    chosen = choose("append", implementation, _refusals(target), bool(interpret)).implementation
    if chosen == "reference":
        return append_reference(target, new, start, count)
    if chosen == "xla":
        return append_xla(target, new, start, count)
    kernel = tpu.append_tpu if chosen == "tpu" else gpu.append_gpu
    arrays = {"target": target, "new": new, "start": start, "count": count}

    def run(arrays: dict):
        return kernel(**arrays, interpret=interpret)

    return over_mesh(run, arrays, {"target": "bk", "new": "bk", "start": "b", "count": "b"}, "bk")(arrays)


def choice(target, *, implementation: str | None = None, interpret: bool = False) -> Choice:
    """What ``append`` would run for this target, and why."""
    return choose("append", implementation, _refusals(target), interpret)


def _refusals(target) -> dict[str, Callable[[Target], str | None]]:
    leaves = jax.tree.leaves(target)
    return {
        "reference": lambda on: None,
        "xla": lambda on: None,
        "tpu": lambda on: tpu.why_not(on, leaves),
        "gpu": lambda on: gpu.why_not(on, leaves),
    }
