"""Kernels under a mesh: each device runs its own rows of the batch and its own kv heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
from jax.sharding import PartitionSpec

BATCH_AXIS, HEAD_AXIS = "data", "model"


def over_mesh(function: Callable, arrays: Mapping[str, object], roles: Mapping[str, str], outputs: str) -> Callable:
    """``function(arrays)``, run through ``shard_map`` over the mesh in force (``jax.set_mesh``), if there is one.

    XLA cannot split a kernel by itself: without this it would gather all operands on every device.

    Args:
      roles: per name of ``arrays`` what its leading axes are, a letter each: b batch (mesh axis ``data``), k kv heads
        (mesh axis ``model``), - neither. An axis that the mesh does not divide is not split.
      outputs: the roles of every output.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = [name for name in (BATCH_AXIS, HEAD_AXIS) if name in mesh.axis_names and name not in mesh.manual_axes]
    if all(mesh.shape[name] == 1 for name in free):
        return function
    sizes: dict[str, set[int]] = {"b": set(), "k": set()}
    for name, value in arrays.items():
        for leaf in jax.tree.leaves(value):
            for letter, size in zip(roles[name], leaf.shape, strict=False):
                if letter in sizes and size > 1:
                    sizes[letter].add(size)
    axes = {"-": None}
    for letter, axis in (("b", BATCH_AXIS), ("k", HEAD_AXIS)):
        fits = axis in free and sizes[letter] and all(size % mesh.shape[axis] == 0 for size in sizes[letter])
        axes[letter] = axis if fits else None

    def spec(role: str, shape: tuple[int, ...]) -> PartitionSpec:
        return PartitionSpec(*(axes[letter] if size > 1 else None for letter, size in zip(role, shape, strict=False)))

    specs = {name: jax.tree.map(lambda leaf, r=roles[name]: spec(r, leaf.shape), value) for name, value in arrays.items()}
    out = PartitionSpec(*(axes[letter] for letter in outputs))
    return jax.shard_map(function, in_specs=(specs,), out_specs=out, check_vma=False)
