"""Loaded models on disk: weights through Orbax, configuration and tokenizer as JSON beside them."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx

from memjax.models.config import ModelConfig
from memjax.models.decoder import Decoder
from memjax.models.safetensors import read_json
from memjax.models.tokenizer import Tokenizer

_CONFIG = "memjax.json"
_FORMAT = 1


def save_model(folder: str | Path, decoder: Decoder, tokenizer: Tokenizer | None = None) -> None:
    """Writes a model into a new folder: Orbax weights, configuration, tokenizer.

    Raises:
      ValueError: the folder exists and is not empty.
    """
    folder = Path(folder).absolute()
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; save into a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "weights", nnx.to_pure_dict(nnx.state(decoder)))
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
    # Last, so that a folder with this file is a complete one.
    (folder / _CONFIG).write_text(json.dumps(described, indent=1), encoding="utf-8")


def is_saved_model(folder: Path) -> bool:
    """Whether ``save_model`` finished writing this folder."""
    return (folder / _CONFIG).is_file()


def restore_model(folder: str | Path) -> tuple[Decoder, Tokenizer | None]:
    """Reads what ``save_model`` wrote.

    Raises:
      FileNotFoundError: no saved model there.
      ValueError: another format, or weights that do not fit the configuration.
    """
    folder = Path(folder).absolute()
    described = read_json(folder / _CONFIG)
    if described.get("format") != _FORMAT:
        raise ValueError(f"{folder / _CONFIG} has format {described.get('format')!r}; this version reads {_FORMAT}")
    config, dtype = ModelConfig.from_json(described["config"]), described["dtype"]
    abstract = nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), nnx.to_pure_dict(state)
    )
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            values = checkpointer.restore(folder / "weights", target)
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise ValueError(f"the weights in {folder} are missing, damaged or not of its configuration: {error}") from error
    nnx.replace_by_pure_dict(state, values)
    return nnx.merge(graphdef, state), _saved_tokenizer(folder, described)


def _saved_tokenizer(folder: Path, described: dict) -> Tokenizer | None:
    if "tokenizer" not in described:
        return None
    return Tokenizer(Tokenizer.from_folder(folder).backend, **described["tokenizer"])
