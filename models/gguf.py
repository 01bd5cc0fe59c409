"""GGUF files: configuration, tokenizer metadata and dequantized tensors.

The header is read here, every count and length checked against the size of the file before it is believed (the reader of the
``gguf`` package trusts them, and needs seconds for a vocabulary); block layouts and dequantization are the package's.

Architectures ``llama`` and ``smollm3`` store query and key rows permuted for interleaved rotary pairs (their converters share
that step); they are put back in the half-split order of Hugging Face's checkpoints. ``qwen2`` and ``qwen3`` are not permuted.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from memjax.models.config import ModelConfig
from memjax.models.gguf_config import gguf_config
from memjax.models.source import check_finite

# Of the block types that the package dequantizes, those of published checkpoints.
_T = GGMLQuantizationType
TENSOR_TYPES = (_T.F32, _T.F16, _T.BF16, _T.Q4_0, _T.Q4_1, _T.Q5_0, _T.Q5_1, _T.Q8_0)
TENSOR_TYPES += (_T.Q2_K, _T.Q3_K, _T.Q4_K, _T.Q5_K, _T.Q6_K)
TENSOR_TYPES += (_T.IQ1_S, _T.IQ1_M, _T.IQ2_XXS, _T.IQ2_XS, _T.IQ2_S, _T.IQ3_XXS, _T.IQ3_S, _T.IQ4_NL, _T.IQ4_XS)
TENSOR_TYPES += (_T.TQ1_0, _T.TQ2_0)
_PERMUTED = ("llama", "smollm3")
_ROPE_FREQS = "rope_freqs.weight"  # its contents are part of the configuration
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
# Value types of metadata; 8 is a string, 9 an array.
_SCALARS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "?", 10: "u8", 11: "i8", 12: "f8"}
_STRING, _ARRAY = 8, 9
_DEEPEST_ARRAY = 4


@dataclass(frozen=True)
class _Tensor:
    """Where a tensor lies in the file. ``shape`` is in torch's order."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    size: int


class GGUFSource:
    """The tensors of an open GGUF file (a ``TensorSource``)."""

    def __init__(self, data: np.ndarray, tensors: dict[str, _Tensor], config: ModelConfig):
        self._data = data
        self._tensors = {_hf_name(name): tensor for name, tensor in tensors.items() if name != _ROPE_FREQS}
        attention = config.blocks[0].mixer
        heads = {"self_attn.q_proj": attention.q_heads, "self_attn.k_proj": attention.kv_heads}
        self._permuted_heads = heads if config.family in _PERMUTED else {}

    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def read(self, name: str) -> np.ndarray:
        """The tensor in float32, or float16 where the file holds that. Raises ValueError for values that are not finite."""
        values = _values(self._data, self._tensors[name])
        check_finite(name, values)
        heads = next((n for part, n in self._permuted_heads.items() if part in name), 0)
        return _half_split_rows(values, heads) if heads else values


def _values(data: np.ndarray, tensor: _Tensor) -> np.ndarray:
    # The result never shares memory with the file: arrays made from it must outlive changes to it.
    stored = data[tensor.start : tensor.start + tensor.size]
    if tensor.kind == _T.F32:
        return stored.view("<f4").reshape(tensor.shape).copy()
    if tensor.kind == _T.F16:
        return stored.view("<f2").reshape(tensor.shape).copy()
    # A damaged scale is reported by name afterwards; the arithmetic on it need not warn as well.
    with np.errstate(all="ignore"):
        return dequantize(stored, tensor.kind).reshape(tensor.shape)


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
    """Opens a GGUF file: configuration, tensors and all its metadata. Reads no weight.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a GGUF file, truncated or damaged, an architecture or tensor type that is not supported.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no GGUF file at {path}")
    _check_magic(path)
    data = np.memmap(path, mode="r")
    metadata, tensors = _Header(path, data).read()
    factors: tuple[float, ...] = ()
    if _ROPE_FREQS in tensors:
        values = _values(data, tensors[_ROPE_FREQS]).astype(np.float64).ravel()
        check_finite(_ROPE_FREQS, values)
        if (values <= 0).any():
            raise ValueError(f"GGUF tensor {_ROPE_FREQS} must be positive: the file is damaged")
        factors = tuple(values.tolist())
    config = gguf_config(metadata, tensors.keys(), factors)
    return config, GGUFSource(data, tensors, config), metadata


def _check_magic(path: Path) -> None:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(f"{path} is not a GGUF file: it begins with {magic!r}, not b'GGUF'")


class _Header:
    """A cursor over the header that never reads past the end and never believes a count that cannot fit."""

    def __init__(self, path: Path, data: np.ndarray):
        self._path, self._data, self._at = path, memoryview(data), 4

    def read(self) -> tuple[dict[str, Any], dict[str, _Tensor]]:
        version = self._number("u4")
        if version not in (2, 3):
            raise ValueError(
                f"{self._path} has GGUF version {version} (or another byte order); versions 2 and 3 are supported"
            )
        tensor_count, field_count = self._number("u8"), self._number("u8")
        # A field takes at least 13 bytes and the entry of a tensor 32.
        self._room(tensor_count * 32 + field_count * 13, f"{tensor_count} tensors and {field_count} fields")
        metadata: dict[str, Any] = {}
        for _ in range(field_count):
            key = self._string()
            if key in metadata:
                raise ValueError(f"{self._path} is damaged: the field {key!r} occurs twice")
            metadata[key] = self._value(self._number("u4"), key)
        entries = [self._entry() for _ in range(tensor_count)]
        return metadata, self._placed(entries, metadata.get("general.alignment", 32))

    def _room(self, size: int, what: str) -> None:
        left = len(self._data) - self._at
        if size > left:
            raise ValueError(f"{self._path} is truncated or damaged: {what} need {size} bytes, {left} are left")

    def _take(self, size: int, what: str) -> memoryview:
        self._room(size, what)
        self._at += size
        return self._data[self._at - size : self._at]

    def _number(self, code: str):
        dtype = np.dtype(f"<{code}")
        return np.frombuffer(self._take(dtype.itemsize, "a number"), dtype)[0].item()

    def _string(self) -> str:
        (size,) = struct.unpack("<Q", self._take(8, "a string's length"))
        taken = self._take(size, "a string")
        try:
            return str(taken, "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self._path} is damaged: a string at byte {self._at - size} is no UTF-8: {error}") from error

    def _value(self, kind: int, key: str, depth: int = 0):
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY or depth == _DEEPEST_ARRAY:
            raise ValueError(f"{self._path} is damaged: the field {key!r} has a value of unknown type {kind}")
        kind, count = self._number("u4"), self._number("u8")
        if kind in _SCALARS:
            dtype = np.dtype(f"<{_SCALARS[kind]}")
            return np.frombuffer(self._take(count * dtype.itemsize, f"the array {key!r}"), dtype).tolist()
        self._room(count * 8, f"the {count} items of {key!r}")
        return [self._value(kind, key, depth + 1) for _ in range(count)]

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name, rank = self._string(), self._number("u4")
        if not 1 <= rank <= 4:
            raise ValueError(f"{self._path} is damaged: tensor {name!r} has {rank} dimensions")
        shape = tuple(self._number("u8") for _ in range(rank))
        return name, shape[::-1], self._number("u4"), self._number("u8")

    def _placed(self, entries: list[tuple[str, tuple[int, ...], int, int]], alignment: int) -> dict[str, _Tensor]:
        if not isinstance(alignment, int) or not 8 <= alignment <= 2**20 or alignment % 8:
            raise ValueError(f"{self._path} has general.alignment {alignment!r}; a multiple of 8 up to {2**20} is expected")
        begin = -(-self._at // alignment) * alignment
        tensors: dict[str, _Tensor] = {}
        for name, shape, kind, offset in entries:
            if name in tensors:
                raise ValueError(f"{self._path} is damaged: tensor {name!r} occurs twice")
            tensor = _Tensor(name, shape, self._kind(name, kind), begin + offset, self._size(name, shape, kind))
            if offset % alignment:
                raise ValueError(f"{self._path} is damaged: tensor {name!r} at {offset} is not aligned to {alignment}")
            if tensor.start + tensor.size > len(self._data):
                raise ValueError(
                    f"{self._path} is truncated: tensor {name!r} ends at byte {tensor.start + tensor.size} "
                    f"of a file of {len(self._data)}"
                )
            tensors[name] = tensor
        return tensors

    def _kind(self, name: str, kind: int) -> GGMLQuantizationType:
        if kind not in {known.value for known in TENSOR_TYPES}:
            called = GGMLQuantizationType(kind).name if kind in set(GGMLQuantizationType) else f"number {kind}"
            known = ", ".join(known.name for known in TENSOR_TYPES)
            raise ValueError(f"GGUF tensor {name!r} has type {called}; the supported ones are {known}")
        return GGMLQuantizationType(kind)

    def _size(self, name: str, shape: tuple[int, ...], kind: int) -> int:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if shape[-1] % block:
            raise ValueError(f"{self._path} is damaged: rows of {shape[-1]} in tensor {name!r} are no blocks of {block}")
        return math.prod(shape) // block * block_bytes
