"""What memjax wraps of JAX because versions or backends differ. Tried on JAX 0.11.2 and 0.12.0.

Memory spaces, as they are in both versions: ``jax.device_put(x, jax.memory.Space.Host)`` works inside and
outside ``jit`` on every backend, and the space becomes part of the array's type (``float32<host>[4,8]``), so
that an operation whose operands lie in different spaces is refused when it is traced.

On the CPU backend a device lists the kinds ``device``, ``pinned_host`` and ``unpinned_host``, but all three
are the same RAM. A transfer inside ``jit`` compiles to nothing, one outside ``jit`` makes a copy, and the
compiler counts a host array among the device's bytes. Hence ``has_host_memory`` is False there, although
types are checked as strictly as on a TPU.

Pytree dataclasses need no wrapper: ``jax.tree_util.register_dataclass`` is alike in both versions.
"""

from __future__ import annotations

import jax

OLDEST_JAX, FIRST_UNTRIED_JAX = (0, 11, 2), (0, 13)


def check_jax_version(version: tuple[int, ...] = jax.__version_info__) -> None:
    """Refuses versions of JAX that memjax is not tried on.

    >>> check_jax_version((0, 13, 0))
    Traceback (most recent call last):
        ...
    ImportError: memjax needs jax >= 0.11.2 and < 0.13, found 0.13.0: pip install 'jax>=0.11.2,<0.13'

    Raises:
      ImportError: ``version`` is outside 0.11.2 <= version < 0.13.
    """
    if not OLDEST_JAX <= version < FIRST_UNTRIED_JAX:
        needed, found = "jax >= 0.11.2 and < 0.13", ".".join(map(str, version))
        raise ImportError(f"memjax needs {needed}, found {found}: pip install 'jax>=0.11.2,<0.13'")


check_jax_version()


def host_memory_kinds(device: jax.Device) -> tuple[str, ...]:
    """Memory kinds of ``device`` whose arrays JAX types as lying in host memory.

    Only ``pinned_host`` is; ``unpinned_host``, which CPU and TPU devices list too, is typed as device memory.
    A kind that is listed need not be another memory than the device's own: see ``has_host_memory``.
    """
    return tuple(memory.kind for memory in device.addressable_memories() if memory.kind == "pinned_host")


def has_host_memory(device: jax.Device) -> bool:
    """Whether arrays placed in host memory really leave the memory of ``device``; False on the CPU backend.

    >>> has_host_memory(jax.devices("cpu")[0])
    False
    """
    if device.platform == "cpu":
        return False
    return any(kind != device.default_memory().kind for kind in host_memory_kinds(device))


def to_host[Tree](tree: Tree) -> Tree:
    """Every array of ``tree`` in pinned host memory, inside or outside ``jit``; shape, dtype, sharding stay.

    Only slices, updates and copies should touch the result until ``to_device`` brings it back: arithmetic
    with device arrays is refused. On the CPU backend only the type changes, and no memory is freed.
    """
    return jax.device_put(tree, jax.memory.Space.Host)


def to_device[Tree](tree: Tree) -> Tree:
    """Every array of ``tree`` in the device's own memory, inside or outside ``jit``; undoes ``to_host``."""
    return jax.device_put(tree, jax.memory.Space.Device)
