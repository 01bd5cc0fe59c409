"""The Llama family's config.json: Llama, Mistral, Qwen2, Qwen3, SmolLM3, and Qwen3's mixture of experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from memjax.models.config import Block, ModelConfig, MoeConfig, llama_config
from memjax.models.fields import kinds, need, number, size, token_ids
from memjax.models.hf_rope import hf_rope

LLAMA_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "smollm3")
SLIDING, FULL = "sliding_attention", "full_attention"


def llama_family(config: Mapping[str, Any]) -> ModelConfig:
    """Reads the configuration of one of ``LLAMA_FAMILIES``."""
    family = config["model_type"]
    layers, heads, width, longest = (
        size(config, key)
        for key in ("num_hidden_layers", "num_attention_heads", "hidden_size", "max_position_embeddings")
    )
    head_dim = _head_dim(config, family, width, heads)
    bias = family == "qwen2" or bool(config.get("attention_bias", False))
    rotary = _rotary_layers(config, family, layers)
    rope = hf_rope(config, family, head_dim, longest)
    dense = llama_config(
        **common(config, tied=family == "smollm3"),
        width=width,
        layers=layers,
        q_heads=heads,
        kv_heads=_kv_heads(config, family, heads),
        head_dim=head_dim,
        mlp_width=size(config, "intermediate_size"),
        ropes=tuple(rope if flag else None for flag in rotary),
        windows=_windows(config, family, rotary),
        qkv_bias=bias,
        out_bias=bias and family != "qwen2",
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=family in ("qwen3", "qwen3_moe"),
    )
    return _with_experts(dense, config) if family == "qwen3_moe" else dense


def common(config: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    """What all families say alike: fields of ``ModelConfig``; ``tied``: what a file means that does not say it."""
    return {
        "family": config["model_type"],
        "vocab": size(config, "vocab_size"),
        "norm_eps": number(config, "rms_norm_eps"),
        "max_position": size(config, "max_position_embeddings"),
        "tied": bool(config.get("tie_word_embeddings", tied)),
        "bos_id": next(iter(token_ids(config.get("bos_token_id"))), None),
        "eos_ids": token_ids(config.get("eos_token_id")),
    }


def _with_experts(dense: ModelConfig, config: Mapping[str, Any]) -> ModelConfig:
    """Qwen3-MoE: experts in every ``decoder_sparse_step``-th layer but for ``mlp_only_layers``."""
    moe = MoeConfig(
        experts=size(config, "num_experts" if "num_experts" in config else "num_local_experts"),  # transformers 4, 5
        chosen=size(config, "num_experts_per_tok"),
        width=size(config, "moe_intermediate_size"),
        normalise=bool(config.get("norm_topk_prob", False)),
    )
    step, plain = size(config, "decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    blocks = (
        Block(block.mixer, block.mlp if i in plain or (i + 1) % step else moe) for i, block in enumerate(dense.blocks)
    )
    return dataclasses.replace(dense, blocks=tuple(blocks))


def _head_dim(config: Mapping[str, Any], family: str, width: int, heads: int) -> int:
    # Qwen3's heads are wider than width / heads; its class default is no fact about a checkpoint.
    return size(config, "head_dim", None if family.startswith("qwen3") else width // heads)


def _kv_heads(config: Mapping[str, Any], family: str, heads: int) -> int:
    if "num_key_value_heads" not in config and family != "llama":
        raise ValueError(f"the configuration of a {family} model lacks 'num_key_value_heads'")
    return size(config, "num_key_value_heads", heads)


def _rotary_layers(config: Mapping[str, Any], family: str, layers: int) -> list[bool]:
    if family != "smollm3":
        return [True] * layers
    flags = config.get("no_rope_layers")  # despite the name: 1 = the layer has a rotary embedding
    if flags is None:
        interval = size(config, "no_rope_layer_interval", 4)
        return [(i + 1) % interval != 0 for i in range(layers)]
    if not isinstance(flags, list) or len(flags) != layers or set(flags) - {0, 1}:
        raise ValueError(f"no_rope_layers needs {layers} entries of 0 or 1, one per layer, got {flags!r}")
    return [bool(flag) for flag in flags]


def _windows(config: Mapping[str, Any], family: str, rotary: list[bool]) -> tuple[int | None, ...]:
    layers = len(rotary)
    found = kinds(config, layers, (FULL, SLIDING))
    if family == "mistral":
        return _mistral_windows(config, found, layers)
    window = config.get("sliding_window")
    if family == "llama" or not config.get("use_sliding_window", False) or window is None:
        if family == "llama" and SLIDING in (found or ()):
            raise ValueError(f"layer_types with {SLIDING} are not supported for llama")
        return (None,) * layers
    if found is not None:
        slides = [kind == SLIDING for kind in found]
    elif family == "smollm3":
        slides = [not flag for flag in rotary]
    else:
        first = need(config, "max_window_layers")
        slides = [i >= first for i in range(layers)]
    return tuple(window if flag else None for flag in slides)


def _mistral_windows(config: Mapping[str, Any], found: list[str] | None, layers: int) -> tuple[int | None, ...]:
    if "sliding_window" not in config:
        raise ValueError("the configuration of a mistral model lacks 'sliding_window' (null: every token is seen)")
    window = config["sliding_window"]
    if window is not None and FULL in (found or ()):
        raise ValueError(f"a mistral model slides in every layer; layer_types with {FULL} belong to another family")
    return (window,) * layers
