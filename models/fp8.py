"""Checkpoints with weights in fp8 and a scale per block, as DeepSeek-V3 is published (arXiv 2412.19437, section 3.3).

    weight[i, j] = stored[i, j] * weight_scale_inv[i // 128, j // 128]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from memjax.models.source import TensorSource, check_finite

_SCALES = "_scale_inv"


def fp8_block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block; None: the weights are not quantized.

    Raises:
      ValueError: another quantization, or blocks without a size.
    """
    given = config.get("quantization_config")
    if not given:
        return None
    method = given.get("quant_method") if isinstance(given, Mapping) else given
    if method != "fp8":
        raise ValueError(
            f"checkpoints with a quantization_config are not supported but for fp8, got {method!r}; load unquantized weights "
            "or GGUF"
        )
    block = given.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
        raise ValueError(f"fp8 checkpoints need weight_block_size, rows and columns of a block, got {block!r}")
    return block[0], block[1]


class Fp8Source:
    """A checkpoint whose fp8 tensors are read as float32, by the scales that lie beside them (a ``TensorSource``)."""

    def __init__(self, source: TensorSource, block: tuple[int, int]):
        self._source, self._block, self._stored = source, block, source.names()

    def names(self) -> frozenset[str]:
        return frozenset(name for name in self._stored if not name.endswith(_SCALES))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def read(self, name: str) -> np.ndarray:
        """The tensor. Raises ValueError for fp8 without scales, scales of another shape or values that are not finite."""
        values = self._source.read(name)
        if values.dtype != ml_dtypes.float8_e4m3fn:
            return values
        if name + _SCALES not in self._stored:
            raise ValueError(f"tensor {name} is fp8, but the checkpoint has no {name}{_SCALES}")
        scales = self._source.read(name + _SCALES).astype(np.float32)
        blocks = tuple(-(-n // size) for n, size in zip(values.shape, self._block, strict=True))
        if scales.shape != blocks:
            raise ValueError(
                f"tensor {name} of shape {list(values.shape)} has {blocks[0]} x {blocks[1]} blocks, but {name}{_SCALES} is "
                f"{list(scales.shape)}"
            )
        wide = np.repeat(np.repeat(scales, self._block[0], axis=0), self._block[1], axis=1)
        values = values.astype(np.float32) * wide[: values.shape[0], : values.shape[1]]
        check_finite(name, values)
        return values
