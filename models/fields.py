"""Checked reading of the fields of a model's configuration file."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from memjax.models.config import checked_size


def need(config: Mapping[str, Any], key: str) -> Any:
    """The value of a key.

    Raises:
      ValueError: there is none.
    """
    value = config.get(key)
    if value is None:
        raise ValueError(f"the model's configuration lacks {key!r}")
    return value


def size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """An integer of at least 1; ``default`` where the key is absent.

    Raises:
      ValueError: absent without a default, or something else.
    """
    if default is not None and config.get(key) is None:
        return default
    return checked_size(key, need(config, key))


def number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A finite number; ``default`` where the key is absent.

    Raises:
      ValueError: absent without a default, or something else.
    """
    if default is not None and config.get(key) is None:
        return default
    value = need(config, key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"a model needs {key} to be a finite number, got {value!r}")
    return float(value)


def kinds(config: Mapping[str, Any], layers: int, known: Collection[str], key: str = "layer_types") -> list[str] | None:
    """What a list says of each layer; None where the key is absent.

    Raises:
      ValueError: no list of ``layers`` of the ``known`` names.
    """
    found = config.get(key)
    if found is not None and (not isinstance(found, list) or len(found) != layers or set(found) - set(known)):
        raise ValueError(f"{key} must name {' or '.join(known)} for each of {layers} layers, got {found!r}")
    return found


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """The ids of a configuration's bos_token_id or eos_token_id: one, several or none.

    Raises:
      ValueError: anything else.
    """
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ValueError(f"token ids must be integers >= 0, got {value!r}")
    return tuple(ids)


def refuse(config: Mapping[str, Any], **only: Any) -> None:
    """Raises ValueError if a key that is there does not have the one value that is supported."""
    for key, value in only.items():
        if config.get(key) is not None and config[key] != value:
            raise ValueError(f"{key} = {config[key]!r} is not supported, only {value!r}")
