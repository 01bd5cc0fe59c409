"""Hugging Face checkpoint folders: config.json and safetensors files, single or sharded. Never pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from memjax.models.config import ModelConfig

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_FLOATS = ("F32", "F16", "BF16")


class SafetensorsSource:
    """The tensors of one or several safetensors files (a ``TensorSource``)."""

    def __init__(self, files: dict[str, Path]):
        """``files`` maps each tensor's name to its file."""
        from safetensors import SafetensorError, safe_open

        self._files, self._open = files, {}
        for path in sorted(set(files.values())):
            if not path.is_file():
                raise FileNotFoundError(f"the checkpoint's index names {path.name}, which is not at {path}")
            try:
                self._open[path] = safe_open(path, framework="flax")
            except SafetensorError as error:
                raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error
        for name, path in files.items():
            if name not in self._open[path].keys():  # noqa: SIM118  (safe_open is no mapping)
                raise ValueError(f"the checkpoint's index places tensor {name} in {path.name}, which lacks it")

    def names(self) -> frozenset[str]:
        return frozenset(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open[self._files[name]].get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """Raises ValueError for a tensor that is not of 16 or 32 bit floats, or not finite."""
        file = self._open[self._files[name]]
        dtype = file.get_slice(name).get_dtype()
        if dtype not in _FLOATS:
            raise ValueError(f"tensor {name} has dtype {dtype}; supported are {', '.join(_FLOATS)}")
        values = np.asarray(file.get_tensor(name))
        if not np.isfinite(values.astype(np.float32)).all():
            raise ValueError(f"tensor {name} holds values that are not finite: the file is damaged")
        return values


def open_checkpoint(folder: str | Path) -> tuple[ModelConfig, SafetensorsSource]:
    """Opens a checkpoint folder. Reads no tensor.

    Raises:
      FileNotFoundError: no config.json or no weights.
      ValueError: a damaged file, an index that leaves the folder, an unsupported configuration.
    """
    folder = Path(folder)
    config = ModelConfig.from_hf(read_json(folder / "config.json"))
    if (folder / _INDEX).is_file():
        return config, SafetensorsSource(_sharded(folder))
    path = folder / _SINGLE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds neither {_SINGLE} nor {_INDEX}")
    return config, SafetensorsSource(dict.fromkeys(_tensor_names(path), path))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      FileNotFoundError, ValueError: no file; no JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data


def _tensor_names(path: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="flax") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error


def _sharded(folder: Path) -> dict[str, Path]:
    weight_map = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / _INDEX} has no weight_map")
    files = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{folder / _INDEX} places tensor {name} in {file!r}, which is no file name in its folder")
        files[name] = folder / file
    return files
