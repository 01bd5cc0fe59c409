"""Configurations of real models by name, without their weights: ``memjax/data/configs.json``, in Hugging Face's keys.

The figures are those of the published files as model sheets and tests quote them; of two that disagree (``rope_theta`` of
qwen3-30b-a3b) the one of the first release. They say how large a model is; to load one, its own config.json is read.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memjax.models.config import ModelConfig
from memjax.models.hf_config import hf_config
from memjax.models.safetensors import read_json

LARGEST_FILE = 4 * 2**20  # bytes of a config.json


@functools.cache
def _named() -> Mapping[str, Any]:
    return json.loads((importlib.resources.files("memjax.data") / "configs.json").read_text(encoding="utf-8"))


def names() -> tuple[str, ...]:
    """The models that ``model_config`` knows by name."""
    return tuple(_named())


def model_config(name: str | Path) -> ModelConfig:
    """The configuration of a named model, of a config.json, or of a checkpoint folder. No weights are read.

    Raises:
      FileNotFoundError: neither a known name nor a file or folder with a config.json.
      ValueError: a file that is no configuration, or one that is not supported.
    """
    if str(name) in _named():
        return hf_config(_named()[str(name)])
    path = Path(name)
    if not path.exists():
        raise FileNotFoundError(f"no model {str(name)!r}: give {', '.join(names())}, a config.json or a folder with one")
    path = path / "config.json" if path.is_dir() else path
    if path.is_file() and path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, too many for a config.json; only that is read")
    return hf_config(read_json(path))
