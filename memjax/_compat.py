"""Everything about JAX that memjax wraps because versions or backends differ. JAX 0.11.2 to 0.12.x."""

from __future__ import annotations

from typing import TypeVar

import jax

_OLDEST, _BEYOND = (0, 11, 2), (0, 13, 0)

Tree = TypeVar("Tree")


def check_jax_version(version: tuple[int, ...] = jax.__version_info__) -> None:
    """Raises ImportError outside the versions that memjax is tested with."""
    if not _OLDEST <= tuple(version[:3]) < _BEYOND:
        shown = ".".join(map(str, version))
        raise ImportError(f"memjax needs jax >= 0.11.2 and < 0.13, found {shown}: pip install 'jax>=0.11.2,<0.13'")


check_jax_version()


def host_memory_kinds(device: jax.Device) -> tuple[str, ...]:
    """Memory kinds of ``device`` that JAX addresses as host memory."""
    return tuple(memory.kind for memory in device.addressable_memories() if memory.kind == "pinned_host")


def has_host_memory(device: jax.Device) -> bool:
    """Whether host memory is another memory than the device's own.

    The CPU backend lists ``pinned_host`` and labels arrays with it, but nothing moves: it is the same RAM.
    """
    return device.platform != "cpu" and bool(host_memory_kinds(device))


def to_host(tree: Tree) -> Tree:
    """Every array in (pinned) host memory, inside or outside ``jit``. On the CPU backend this changes the label only."""
    return jax.device_put(tree, jax.memory.Space.Host)


def to_device(tree: Tree) -> Tree:
    """Every array in the device's own memory, inside or outside ``jit``."""
    return jax.device_put(tree, jax.memory.Space.Device)
