"""What a checkpoint is to the models: named tensors in Hugging Face's names and torch's layout, read one at a time."""

from __future__ import annotations

import re
from typing import Protocol

import numpy as np

from memjax.models.config import MTP_FAMILIES, ModelConfig
from memjax.models.tensors import stored_copies, stored_parameters

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


class TensorSource(Protocol):
    """A lazily read checkpoint. Linear weights are [out, in], as torch stores them."""

    def names(self) -> frozenset[str]:
        """Names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""

    def read(self, name: str) -> np.ndarray:
        """The tensor: float32, float16 or bfloat16."""


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a model of this configuration is made of."""
    return {name: each.shape for each in stored_parameters(config).values() for name in each.names}


def ignorable(name: str, layers: int | None = None) -> bool:
    """Whether no model reads this: a rotary buffer of an old checkpoint, or a layer behind the last of ``layers``.

    DeepSeek-V3 and its kin keep their modules for multi-token prediction there.
    """
    behind = layers is not None and (found := _LAYER.match(name)) is not None and int(found[1]) >= layers
    return behind or name.endswith("rotary_emb.inv_freq")


def check_tensors(config: ModelConfig, source: TensorSource) -> None:
    """Compares a checkpoint's tensors with the configuration's; reads none.

    The sets must be equal, but for rotary buffers, modules for multi-token prediction that the configuration leaves out, their
    copies of embedding and head and, where embeddings are tied, a second copy of them.

    Raises:
      ValueError: names the tensors that are missing, unexpected or of another shape.
    """
    expected, copies = expected_tensors(config), {name: each.shape for name, (_, each) in stored_copies(config).items()}
    dropped = {"lm_head.weight"} if config.tied else set()
    layers = config.layers if config.family in MTP_FAMILIES and not config.mtp_blocks else None
    found = {name for name in source.names() if not ignorable(name, layers)} - dropped
    problems = []
    if missing := sorted(expected.keys() - found):
        problems.append(f"missing: {_some(missing)}")
    expected |= {name: copies[name] for name in copies.keys() & found}
    if unexpected := sorted(found - expected.keys()):
        problems.append(f"unexpected: {_some(unexpected)}")
    shapes = {name: tuple(source.shape(name)) for name in sorted(expected.keys() & found)}
    if wrong := [f"{n} is {list(s)}, not {list(expected[n])}" for n, s in shapes.items() if s != expected[n]]:
        problems.append(f"wrong shape: {_some(wrong)}")
    if problems:
        raise ValueError(f"the checkpoint does not fit its {config.family} configuration; {'; '.join(problems)}")


def check_finite(name: str, values: np.ndarray) -> None:
    """Raises ValueError naming the tensor when a value is infinite or NaN, as a damaged file's scales make them."""
    if not np.isfinite(values).all():
        raise ValueError(f"tensor {name} holds values that are not finite: the file is damaged")


def _some(items: list[str], shown: int = 4) -> str:
    rest = f" and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(items[:shown]) + rest
