"""Loaded models on disk: weights through Orbax, configuration, tokenizer and checksums as JSON beside them. No pickle.

    folder/memjax.json      configuration, dtype, size and SHA-256 of every file of weights/
    folder/tokenizer.json   if the model has a tokenizer
    folder/weights/         Orbax

Orbax restores altered bytes without a word, hence the checksums.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Sharding, SingleDeviceSharding

from memjax.models.config import ModelConfig
from memjax.models.decoder import Decoder
from memjax.models.safetensors import read_json
from memjax.models.tokenizer import Tokenizer

_CONFIG, _WEIGHTS = "memjax.json", "weights"
_FORMAT = 1
_DTYPES = ("float32", "bfloat16", "float16")

# Where a parameter of this path ("layers/0/attention/q/kernel") and abstract value goes.
Placement = Callable[[str, jax.ShapeDtypeStruct], Sharding]


def save_model(folder: str | Path, decoder: Decoder, tokenizer: Tokenizer | None = None) -> None:
    """Writes a model into a new folder: Orbax weights, configuration, tokenizer.

    Raises:
      ValueError: the folder exists and is not empty, or is a file.
    """
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty; save into a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / _WEIGHTS, nnx.to_pure_dict(nnx.state(decoder)))
    dtype = str(jnp.dtype(decoder.embedding.dtype))
    described = {"format": _FORMAT, "dtype": dtype, "config": decoder.config.to_json()}
    if tokenizer is not None:
        tokenizer.backend.save(str(folder / "tokenizer.json"))
        described["tokenizer"] = {
            "bos_id": tokenizer.bos_id,
            "add_bos": tokenizer.add_bos,
            "eos_ids": tokenizer.eos_ids,
            "chat_template": tokenizer.chat_template,
        }
    described["shapes"] = _shapes(nnx.to_pure_dict(nnx.state(decoder)))
    described["files"] = {name: [path.stat().st_size, _sha256(path)] for name, path in _files(folder / _WEIGHTS).items()}
    # Last, so that a folder with this file is a complete one.
    (folder / _CONFIG).write_text(json.dumps(described, indent=1), encoding="utf-8")


def is_saved_model(folder: Path) -> bool:
    """Whether ``save_model`` finished writing this folder."""
    return (folder / _CONFIG).is_file()


def restore_model(
    folder: str | Path, sharding: Sharding | Placement | None = None
) -> tuple[Decoder, Tokenizer | None]:
    """Reads what ``save_model`` wrote.

    Args:
      sharding: of every parameter, or a function of its path and abstract value; None: the first device.

    Raises:
      FileNotFoundError: no saved model there.
      ValueError: another format, files that are missing or altered, or weights that do not fit the configuration.
    """
    folder = Path(folder).absolute()
    described = read_json(folder / _CONFIG)
    if described.get("format") != _FORMAT:
        raise ValueError(f"{folder / _CONFIG} has format {described.get('format')!r}; this version reads {_FORMAT}")
    config, dtype = _described_model(folder, described)
    _check_files(folder, described.get("files"))
    abstract = nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    # Before Orbax begins: a restore that fails halfway leaves reads behind that nobody waits for.
    if described.get("shapes") != _shapes(nnx.to_pure_dict(state)):
        raise ValueError(f"the weights in {folder} are not of its configuration: {_CONFIG} lists other shapes")
    target = jax.tree.map_with_path(_placed(sharding), nnx.to_pure_dict(state))
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            values = checkpointer.restore(folder / _WEIGHTS, target)
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise ValueError(f"the weights in {folder} are damaged or not of its configuration: {error}") from error
    nnx.replace_by_pure_dict(state, values)
    return nnx.merge(graphdef, state), _saved_tokenizer(folder, described)


def _described_model(folder: Path, described: dict[str, Any]) -> tuple[ModelConfig, str]:
    if not isinstance(described.get("config"), dict) or described.get("dtype") not in _DTYPES:
        raise ValueError(f"{folder / _CONFIG} needs a config and a dtype among {', '.join(_DTYPES)}")
    return ModelConfig.from_json(described["config"]), described["dtype"]


def _placed(sharding: Sharding | Placement | None) -> Callable[[tuple, Any], jax.ShapeDtypeStruct]:
    whole = SingleDeviceSharding(jax.devices()[0]) if sharding is None else sharding

    def place(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
        plain = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        chosen = whole if isinstance(whole, Sharding) else whole(jax.tree_util.keystr(path, simple=True, separator="/"), plain)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=chosen)

    return place


def _shapes(tree: dict[str, Any]) -> dict[str, list[int]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): list(leaf.shape) for path, leaf in leaves}


def _files(weights: Path) -> dict[str, Path]:
    return {path.relative_to(weights).as_posix(): path for path in sorted(weights.rglob("*")) if path.is_file()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_files(folder: Path, recorded: Any) -> None:
    if not isinstance(recorded, dict) or not recorded:
        raise ValueError(f"{folder / _CONFIG} lists no files of {_WEIGHTS}")
    found = _files(folder / _WEIGHTS)
    if found.keys() != recorded.keys():
        differing = ", ".join(sorted(found.keys() ^ recorded.keys())[:4])
        raise ValueError(f"{folder / _WEIGHTS} does not hold the files that were saved; missing or added: {differing}")
    for name, path in found.items():
        if [path.stat().st_size, _sha256(path)] != recorded[name]:
            raise ValueError(f"{path} is damaged: its size or SHA-256 is not that of the file that was saved")


def _saved_tokenizer(folder: Path, described: dict) -> Tokenizer | None:
    if "tokenizer" not in described:
        return None
    return Tokenizer(Tokenizer.from_folder(folder).backend, **described["tokenizer"])
