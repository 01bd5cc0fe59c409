"""GGUF files: configuration, tokenizer metadata and dequantized tensors, through the ``gguf`` package.

Every block type that the package dequantizes is read (F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K .. Q6_K, ...).
Architecture ``llama`` stores query and key rows permuted for interleaved rotary pairs; they are put back in the half-split
order of Hugging Face's checkpoints.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from memjax.models.config import ModelConfig

_GLOBAL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_DROPPED = ("rope_freqs.weight",)  # its contents are part of the configuration


class GGUFSource:
    """The tensors of an open GGUF file (a ``TensorSource``)."""

    def __init__(self, tensors: dict[str, Any], config: ModelConfig):
        self._tensors = {_hf_name(name): tensor for name, tensor in tensors.items() if name not in _DROPPED}
        self._permuted = config.family == "llama"
        self._heads = {"self_attn.q_proj": config.q_heads, "self_attn.k_proj": config.kv_heads}

    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def read(self, name: str) -> np.ndarray:
        """Raises ValueError for a tensor type that cannot be dequantized or values that are not finite."""
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        try:
            values = dequantize(tensor.data, tensor.tensor_type).reshape(self.shape(name))
        except NotImplementedError as error:
            raise ValueError(f"GGUF tensor {name}: type {tensor.tensor_type.name} cannot be dequantized") from error
        if not np.isfinite(values).all():
            raise ValueError(f"GGUF tensor {name} holds values that are not finite: the file is damaged")
        heads = next((n for part, n in self._heads.items() if part in name), 0) if self._permuted else 0
        return _half_split_rows(values, heads) if heads else values


def _half_split_rows(values: np.ndarray, heads: int) -> np.ndarray:
    rows = values.shape[0]
    paired = values.reshape(heads, rows // heads // 2, 2, *values.shape[1:])
    return paired.swapaxes(1, 2).reshape(values.shape)


def _hf_name(name: str) -> str:
    if name in _GLOBAL:
        return _GLOBAL[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _BLOCK:
        return f"model.layers.{parts[1]}.{_BLOCK[parts[2]]}.{parts[3]}"
    return name  # not ours: the check against the configuration will name it


def open_gguf(path: str | Path) -> tuple[ModelConfig, GGUFSource, dict[str, Any]]:
    """Opens a GGUF file: configuration, tensors and all its metadata. Reads no tensor.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a GGUF file, truncated or damaged, or an architecture that is not supported.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no GGUF file at {path}")
    _check_header(path)
    reader = _reader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    factors: tuple[float, ...] = ()
    if "rope_freqs.weight" in tensors:
        factors = tuple(float(x) for x in np.asarray(tensors["rope_freqs.weight"].data, np.float32).ravel())
    config = ModelConfig.from_gguf(metadata, tied="output.weight" not in tensors, freq_factors=factors)
    return config, GGUFSource(tensors, config), metadata


def _check_header(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(24)
    if head[:4] != b"GGUF":
        raise ValueError(f"{path} is not a GGUF file: it begins with {head[:4]!r}, not b'GGUF'")
    if len(head) < 24:
        raise ValueError(f"{path} is truncated: {size} bytes, less than a GGUF header")
    version, tensors, fields = struct.unpack("<IQQ", head[4:])
    if version not in (2, 3):
        raise ValueError(f"{path} has GGUF version {version} (or another byte order); versions 2 and 3 are supported")
    # A field takes at least 13 bytes and a tensor's entry 33: counts beyond that are damage, not data.
    if tensors * 33 + fields * 13 > size:
        raise ValueError(f"{path} is truncated or damaged: {tensors} tensors and {fields} fields in {size} bytes")


def _reader(path: Path):
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except Exception as error:  # the reader fails in many ways on bytes that end too early
        raise ValueError(f"{path} is truncated or damaged: {error}") from error
    size = path.stat().st_size
    for tensor in reader.tensors:
        if tensor.data_offset + tensor.n_bytes > size or math.prod(map(int, tensor.shape)) != tensor.n_elements:
            raise ValueError(f"{path} is truncated: tensor {tensor.name} ends beyond its {size} bytes")
    return reader
