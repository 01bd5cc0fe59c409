"""Sensitivity files: how much a model suffers when one layer's keys, or its values, are kept in few bits.

A number is the mean KL divergence, in nats per token, of the model's next-token distributions to the uncompressed ones when
that one stream alone is coded: every token but the first four, before it is read. ``memjax sensitivity`` measures them, by
layer or by kv head, ``memjax.quantize.auto`` spends bits by them. The file is JSON of a few kilobytes:

    {"memjax": "sensitivity", "version": 1, "fingerprint": "...", "tokens": 1024, "bits": [2, 3, 4, 8],
     "layers": [{"keys": [.01, .002, .0005, 1e-6], "values": [...]}, ...]}                  one number for each of "bits"

By head, "keys" and "values" are lists of such lists, one for each kv head.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from memjax import measured

OPTIONS = (2, 3, 4, 8)  # bits of a code
_MEASURE = "measure this model with `memjax sensitivity --model MODEL --text-file TEXT --out FILE` and say file=FILE"
KIND = measured.Kind("sensitivity", 1, "sensitivity_smollm2_135m.json", _MEASURE)
_BY_HEAD = dataclasses.replace(
    KIND,
    bundled="sensitivity_smollm2_135m_by_head.json",
    advice=_MEASURE.replace("memjax sensitivity", "memjax sensitivity --by-head"),
)


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """What was measured.

    Attributes:
      fingerprint: of the model, as ``LanguageModel.fingerprint`` gives it.
      tokens: that were read, of all texts.
      bits: which of ``OPTIONS`` were tried, ascending.
      keys, values: mean KL divergence of each layer's kv heads at each of ``bits``; K = 1: all heads of a layer at once.

    Raises:
      ValueError: options or numbers that no measurement gives.
    """

    fingerprint: str
    tokens: int
    bits: tuple[int, ...]
    keys: Float[np.ndarray, "L K O"]
    values: Float[np.ndarray, "L K O"]

    def __post_init__(self):
        if not self.bits or any(b not in OPTIONS for b in self.bits) or list(self.bits) != sorted(set(self.bits)):
            raise ValueError(f"bits must be some of {', '.join(map(str, OPTIONS))} in ascending order, got {list(self.bits)}")
        for side, found in (("keys", self.keys), ("values", self.values)):
            wanted = (len(self.keys), *self.keys.shape[1:2], len(self.bits))
            if found.shape != wanted or not found.size:
                numbers = f"a number for each layer, kv head and option, {list(wanted)}"
                raise ValueError(f"{side} must be {numbers}, got {list(found.shape)}")
            bad = np.argwhere(~(np.isfinite(found) & (found >= 0)))
            if bad.size:
                layer, head, option = bad[0]
                where = f"{side} of layer {layer}" + (f", head {head}" if self.heads > 1 else "")
                raise ValueError(
                    f"{where} at {self.bits[option]} bits have {found[layer, head, option]}, which is no KL divergence"
                )

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return len(self.keys)

    @property
    def heads(self) -> int:
        """Groups of a layer's kv heads that were measured apart: 1, or each head for itself."""
        return self.keys.shape[1]


def save_sensitivity(path: str | Path, table: Sensitivity) -> None:
    """Writes a sensitivity file, four significant digits of each number."""

    def row(numbers: np.ndarray) -> list:
        rounded = [[float(f"{number:.4g}") for number in head] for head in numbers]
        return rounded if table.heads > 1 else rounded[0]

    record = KIND.head() | {"fingerprint": table.fingerprint, "tokens": table.tokens}
    layers = [{"keys": row(k), "values": row(v)} for k, v in zip(table.keys, table.values, strict=True)]
    record |= {"bits": list(table.bits), "layers": layers}
    Path(path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def load_sensitivity(path: str | Path = "", by_head: bool = False) -> Sensitivity:
    """Reads a sensitivity file; "": the one of smollm2-135m that memjax brings along, by layer or by head.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file that is too large, damaged, of another kind or version, or with numbers that no measurement gives.
    """
    return measured.load(_kind(by_head), path, _parse)


def _kind(by_head: bool) -> measured.Kind:
    return _BY_HEAD if by_head else KIND


def _parse(record: dict) -> Sensitivity:
    layers = record["layers"]
    keys, values = (np.array([layer[side] for layer in layers], np.float64) for side in ("keys", "values"))
    if keys.ndim == values.ndim == 2:
        keys, values = keys[:, None], values[:, None]
    bits = tuple(int(b) for b in record["bits"])
    return Sensitivity(str(record["fingerprint"]), int(record["tokens"]), bits, keys, values)


def check_sensitivity(path: str, layers: int, fingerprint: str | None = None, by_head: bool = False) -> Sensitivity:
    """The table of ``path``, which has to be one of this model.

    Args:
      layers: how many the model has.
      fingerprint: the model's; None: not known.
      by_head: which file "" stands for.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file that cannot be read, or of another model.
    """
    table = load_sensitivity(path, by_head)
    measured.check_model(_kind(by_head), path, (table.fingerprint, table.layers), layers, fingerprint)
    return table
