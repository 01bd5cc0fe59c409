"""Hugging Face checkpoint folders: config.json and safetensors files, single or sharded. Never pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from memjax.models.config import ModelConfig
from memjax.models.fp8 import Fp8Source, fp8_block
from memjax.models.hf_config import hf_config
from memjax.models.source import TensorSource, check_finite, ignorable

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_FP8 = "F8_E4M3"
_FLOATS = ("F32", "F16", "BF16", _FP8)
# Parts of multimodal checkpoints: where the language model's tensors lie, and what is left alone.
_LANGUAGE = (("language_model.model.", "model."), ("model.language_model.", "model."), ("language_model.lm_head.", "lm_head."))
_OTHER_PARTS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


class SafetensorsSource:
    """The tensors of one or several safetensors files (a ``TensorSource``)."""

    def __init__(self, files: dict[str, Path]):
        """``files`` maps each tensor's name to its file."""
        self._files, self._open = files, {}
        for path in sorted(set(files.values())):
            if not path.is_file():
                raise FileNotFoundError(f"the checkpoint's index names {path.name}, which is not at {path}")
            self._open[path] = _opened(path)
        held = {path: set(file.keys()) for path, file in self._open.items()}
        for name, path in files.items():
            if name not in held[path]:
                raise ValueError(f"the checkpoint's index places tensor {name} in {path.name}, which lacks it")
            dtype = self._open[path].get_slice(name).get_dtype()
            if dtype not in _FLOATS and not ignorable(name):
                raise ValueError(f"tensor {name} has dtype {dtype}; supported are {', '.join(_FLOATS)}")

    def names(self) -> frozenset[str]:
        return frozenset(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open[self._files[name]].get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """The tensor in its own dtype. Raises ValueError for values that are not finite."""
        path = self._files[name]
        file = self._open[path]
        if file.get_slice(name).get_dtype() == _FP8:
            return _fp8(path, name, self.shape(name))
        values = file.get_tensor(name)
        check_finite(name, values)
        return values


class LanguagePart:
    """The language model of a multimodal checkpoint, in the names of a model of text only (a ``TensorSource``)."""

    def __init__(self, source: TensorSource):
        self._source = source
        self._names = {_language_name(name): name for name in source.names() if not name.startswith(_OTHER_PARTS)}

    def names(self) -> frozenset[str]:
        return frozenset(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._names[name])

    def read(self, name: str) -> np.ndarray:
        """The tensor in its own dtype."""
        return self._source.read(self._names[name])


def _language_name(name: str) -> str:
    for prefix, plain in _LANGUAGE:
        if name.startswith(prefix):
            return plain + name.removeprefix(prefix)
    return name


def open_checkpoint(folder: str | Path, *, mtp: bool = False) -> tuple[ModelConfig, TensorSource]:
    """Opens a checkpoint folder. Reads no tensor.

    Args:
      mtp: as for ``hf_config``.

    Raises:
      FileNotFoundError: no config.json or no weights.
      ValueError: a damaged file, an index that leaves the folder, an unsupported configuration.
    """
    folder = Path(folder)
    described = read_json(folder / "config.json")
    config, block = hf_config(described, mtp=mtp), fp8_block(described)
    source: TensorSource = SafetensorsSource(_files(folder))
    if block is not None:
        source = Fp8Source(source, block)
    return config, LanguagePart(source) if described["model_type"] == "gemma3" else source


def _files(folder: Path) -> dict[str, Path]:
    if (folder / _INDEX).is_file():
        return _sharded(folder)
    path = folder / _SINGLE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds neither {_SINGLE} nor {_INDEX}")
    return dict.fromkeys(_tensor_names(path), path)


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
    with _opened(path) as file:
        return list(file.keys())


def _opened(path: Path) -> safe_open:
    try:
        # "numpy" leaves the devices alone, and gives bfloat16 since ml_dtypes teaches NumPy that type.
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:  # an empty file cannot be mapped: OSError
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error


def _fp8(path: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of float8_e4m3fn, which safetensors writes from NumPy but does not read into it."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        begin, end = json.loads(file.read(length))[name]["data_offsets"]
        file.seek(8 + length + begin)
        return np.frombuffer(file.read(end - begin), ml_dtypes.float8_e4m3fn).reshape(shape)


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
