"""Names that a package offers and imports only when they are first used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def attach(namespace: dict[str, Any], names: Mapping[str, Sequence[str]]) -> tuple[Callable, Callable, list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` for a package.

    Args:
      namespace: the package's ``globals()``.
      names: for each module, the names to take from it; no names: the module itself, by its last name.
    """
    home = {name: module for module, offered in names.items() for name in offered or (module.rpartition(".")[2],)}

    def getter(name: str):
        if name not in home:
            raise AttributeError(f"module {namespace['__name__']!r} has no attribute {name!r}")
        module = importlib.import_module(home[name])
        namespace[name] = getattr(module, name) if names[home[name]] else module
        return namespace[name]

    return getter, lambda: sorted({*namespace, *home}), sorted(home)
