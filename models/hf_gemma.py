"""Gemma 2's and Gemma 3's config.json (arXiv 2408.00118, 2503.19786): layers with and without a window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memjax.attention.rope import Rope
from memjax.models.config import AttentionConfig, Block, MlpConfig, ModelConfig
from memjax.models.fields import kinds, number, refuse, size
from memjax.models.hf_llama import FULL, SLIDING, common
from memjax.models.hf_rope import hf_rope

# What multimodal Gemma 3 files leave out of their text_config: the defaults of Hugging Face's class.
_GEMMA3_DEFAULTS = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131072,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "query_pre_attn_scalar": 256,
    "sliding_window_pattern": 6,
    "hidden_activation": "gelu_pytorch_tanh",
}


def gemma_family(config: Mapping[str, Any]) -> ModelConfig:
    """Reads the configuration of gemma2, gemma3_text or the text part of gemma3.

    Raises:
      ValueError: a missing key, or an option that is not supported.
    """
    if config["model_type"] == "gemma3":
        text = config.get("text_config")
        if not isinstance(text, Mapping):
            raise ValueError(f"a gemma3 configuration needs a text_config, got {text!r}")
        tokens = {key: config[key] for key in ("bos_token_id", "eos_token_id") if key in config}
        config = _GEMMA3_DEFAULTS | tokens | dict(text) | {"model_type": "gemma3_text"}
    refuse(config, hidden_activation="gelu_pytorch_tanh", attention_bias=False, use_bidirectional_attention=False)
    first = config["model_type"] == "gemma2"
    layers, width, head_dim = (size(config, key) for key in ("num_hidden_layers", "hidden_size", "head_dim"))
    window = size(config, "sliding_window")
    near, far = _ropes(config, head_dim)
    attention = {
        "q_heads": size(config, "num_attention_heads"),
        "kv_heads": size(config, "num_key_value_heads"),
        "head_dim": head_dim,
        "scale": number(config, "query_pre_attn_scalar") ** -0.5,
        "softcap": _softcap(config, "attn_logit_softcapping"),
        "qk_norm": not first,
    }
    mlp = MlpConfig(width=size(config, "intermediate_size"), activation="gelu_tanh")
    local = AttentionConfig(**attention, rope=near, window=window)
    everywhere = AttentionConfig(**attention, rope=far)
    return ModelConfig(
        **common(config, tied=True),
        width=width,
        blocks=tuple(Block(local if slides else everywhere, mlp) for slides in _local_layers(config, layers)),
        unit_offset=True,
        post_norms=True,
        embedding_scale=width**0.5,
        logits_softcap=_softcap(config, "final_logit_softcapping"),
    )


def _softcap(config: Mapping[str, Any], key: str) -> float | None:
    return None if config.get(key) is None else number(config, key)


def _ropes(config: Mapping[str, Any], head_dim: int) -> tuple[Rope, Rope]:
    """The rotary embeddings of local and of global layers."""
    family, longest = config["model_type"], size(config, "max_position_embeddings")
    new = config.get("rope_parameters")
    if isinstance(new, Mapping) and FULL in new:
        return tuple(hf_rope({"rope_parameters": new[kind]}, family, head_dim, longest) for kind in (SLIDING, FULL))
    far = hf_rope(config, family, head_dim, longest)
    if family == "gemma2":
        return far, far
    return Rope(head_dim, number(config, "rope_local_base_freq"), original_max_position=longest), far


def _local_layers(config: Mapping[str, Any], layers: int) -> list[bool]:
    found = kinds(config, layers, (FULL, SLIDING))
    if found is None:
        pattern = config.get("sliding_window_pattern", config.get("_sliding_window_pattern"))
        every = 2 if config["model_type"] == "gemma2" else size({"sliding_window_pattern": pattern}, "sliding_window_pattern")
        return [(i + 1) % every != 0 for i in range(layers)]
    return [kind == SLIDING for kind in found]
