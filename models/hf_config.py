"""Hugging Face's config.json, in the spellings of transformers 4 and 5, as a ``ModelConfig``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memjax.models.config import ModelConfig
from memjax.models.fp8 import fp8_block
from memjax.models.hf_gemma import gemma_family
from memjax.models.hf_granite import granite_family
from memjax.models.hf_latent import LATENT_FAMILIES, latent_family, with_mtp
from memjax.models.hf_llama import LLAMA_FAMILIES, llama_family

_READERS = dict.fromkeys(LLAMA_FAMILIES, llama_family) | dict.fromkeys(LATENT_FAMILIES, latent_family)
_READERS |= dict.fromkeys(("gemma2", "gemma3", "gemma3_text"), gemma_family) | {"granitemoehybrid": granite_family}
FAMILIES = tuple(sorted(_READERS))


def hf_config(config: Mapping[str, Any], *, mtp: bool = False) -> ModelConfig:
    """Reads a config.json of transformers 4 or 5.

    Args:
      mtp: with the modules for multi-token prediction, which are left out otherwise.

    Raises:
      ValueError: unknown model_type, rope type or activation, an unsupported option or quantization, or a missing key; for
        ``mtp`` also a model that has no such modules.
    """
    family = config.get("model_type")
    if family not in _READERS:
        raise ValueError(f"model_type {family!r} is not supported; the supported ones are {', '.join(FAMILIES)}")
    act = config.get("hidden_act")
    if act not in (None, "silu") and not family.startswith("gemma"):
        raise ValueError(f"hidden_act {act!r} is not supported, only 'silu'")
    fp8_block(config)
    model = _READERS[family](config)
    return with_mtp(model, config) if mtp else model
