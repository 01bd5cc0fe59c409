"""Small JSON files of what was measured on a model: one reader for every kind, which names what is wrong with a file."""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LARGEST_FILE = 2**20  # bytes
BUNDLED_MODEL = "smollm2-135m"


@dataclass(frozen=True)
class Kind:
    """A kind of file, which the command ``memjax NAME`` writes.

    Attributes:
      name: that the file gives of itself, under "memjax".
      version: the one that is read.
      bundled: the name of the file that memjax brings along for ``BUNDLED_MODEL``.
      advice: how to come by a file.
    """

    name: str
    version: int
    bundled: str
    advice: str

    def title(self, path: str) -> str:
        """What to call a file in an error."""
        return path or f"the {self.name} file that memjax brings along for {BUNDLED_MODEL}"

    def head(self) -> dict[str, object]:
        """The first entries of a file."""
        return {"memjax": self.name, "version": self.version}


def load[T](kind: Kind, path: str | Path, parse: Callable[[dict], T]) -> T:
    """What ``parse`` makes of the record in a file; "": the one that memjax brings along.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file that is too large, damaged, of another kind or version, or that ``parse`` refuses (by KeyError,
        TypeError or ValueError).
    """
    found = Path(path) if str(path) else importlib.resources.files("memjax.data") / kind.bundled
    if not found.is_file():
        raise FileNotFoundError(f"no {kind.name} file {found}: {kind.advice}")
    if isinstance(found, Path):
        return _read(kind, str(found), found.stat().st_mtime_ns, parse)
    return _parse(kind, str(found), found.read_text(encoding="utf-8"), parse)  # inside an archive


def check_model(kind: Kind, path: str, found: tuple[str, int], layers: int, fingerprint: str | None) -> None:
    """Raises ValueError if a file is of another model.

    Args:
      found: the fingerprint in the file and the number of its layers.
      layers, fingerprint: the model's; None: not known.
    """
    name, (measured, count) = kind.title(path), found
    if fingerprint is not None and measured != fingerprint:
        raise ValueError(
            f"{name} was measured on another model (fingerprint {measured}, this one is {fingerprint}): {kind.advice}"
        )
    if count != layers:
        raise ValueError(f"{name} is of a model with {count} layers, this one has {layers}: {kind.advice}")


@functools.lru_cache(maxsize=16)
def _read[T](kind: Kind, path: str, changed: int, parse: Callable[[dict], T]) -> T:
    del changed  # part of the key: a file that was written anew is read anew
    size = Path(path).stat().st_size
    if size > LARGEST_FILE:
        raise ValueError(f"{path} has {size} bytes, a {kind.name} file at most {LARGEST_FILE}")
    try:
        return _parse(kind, path, Path(path).read_text(encoding="utf-8"), parse)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no {kind.name} file: {error}") from error


def _parse[T](kind: Kind, path: str, text: str, parse: Callable[[dict], T]) -> T:
    try:
        record = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no {kind.name} file: {error}") from error
    if not isinstance(record, dict) or record.get("memjax") != kind.name:
        raise ValueError(f"{path} is JSON, but none that `memjax {kind.name}` wrote")
    version = record.get("version")
    if version != kind.version:
        raise ValueError(f"{path} is a {kind.name} file of version {version!r}, this memjax reads {kind.version}")
    try:
        return parse(record)
    except KeyError as error:
        raise ValueError(f"{path} is a damaged {kind.name} file: it lacks {error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is a damaged {kind.name} file: {error}") from error
