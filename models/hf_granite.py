"""Granite 4.0's config.json (granitemoehybrid): attention and Mamba-2 layers, a shared MLP and experts, multipliers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from memjax.models.config import AttentionConfig, Block, MambaConfig, Mixer, Mlp, MlpConfig, ModelConfig, MoeConfig
from memjax.models.fields import kinds, need, number, refuse, size
from memjax.models.hf_llama import common
from memjax.models.hf_rope import hf_rope

# As transformers 4 and 5 call them.
_KINDS = {"attention": "attention", "full_attention": "attention", "mamba": "mamba", "linear_attention": "mamba"}


def granite_family(config: Mapping[str, Any]) -> ModelConfig:
    """Reads a granitemoehybrid configuration. Which layers are recurrent is what the file says, never a rule.

    Raises:
      ValueError: a missing key, or an option that is not supported.
    """
    layers, width = size(config, "num_hidden_layers"), size(config, "hidden_size")
    need(config, "layer_types")
    mixed = [_KINDS[kind] for kind in kinds(config, layers, _KINDS)]
    mixers: dict[str, Mixer] = {}
    if "attention" in mixed:
        mixers["attention"] = _attention(config, width)
    if "mamba" in mixed:  # dense models leave unused mamba_* keys in their files
        mixers["mamba"] = _mamba(config, width)
    mlp = _mlp(config)
    return ModelConfig(
        **common(config, tied=False),
        width=width,
        blocks=tuple(Block(mixers[kind], mlp) for kind in mixed),
        embedding_scale=number(config, "embedding_multiplier"),
        residual_scale=number(config, "residual_multiplier"),
        logits_scale=1 / number(config, "logits_scaling"),
    )


def _attention(config: Mapping[str, Any], width: int) -> AttentionConfig:
    heads, kind = size(config, "num_attention_heads"), config.get("position_embedding_type")
    if kind not in ("rope", "nope", None):
        raise ValueError(f"position_embedding_type {kind!r} is not supported, only 'rope' and 'nope'")
    head_dim, bias = size(config, "head_dim", width // heads), bool(config.get("attention_bias", False))
    rotary = kind == "rope"
    return AttentionConfig(
        q_heads=heads,
        kv_heads=size(config, "num_key_value_heads"),
        head_dim=head_dim,
        rope=hf_rope(config, config["model_type"], head_dim, size(config, "max_position_embeddings")) if rotary else None,
        scale=number(config, "attention_multiplier"),
        qkv_bias=bias,
        out_bias=bias,
    )


def _mamba(config: Mapping[str, Any], width: int) -> MambaConfig:
    # JSON knows no infinity: transformers 5 writes an object in its place.
    limits = [math.inf if isinstance(x, Mapping) else x for x in config.get("time_step_limit") or (0.0, math.inf)]
    mixer = MambaConfig(
        heads=size(config, "mamba_n_heads"),
        head_dim=size(config, "mamba_d_head") if config.get("mamba_d_head") != "auto" else _auto_head_dim(config, width),
        state_dim=size(config, "mamba_d_state"),
        groups=size(config, "mamba_n_groups"),
        conv_width=size(config, "mamba_d_conv"),
        chunk=size(config, "mamba_chunk_size"),
        conv_bias=bool(config.get("mamba_conv_bias", True)),
        bias=bool(config.get("mamba_proj_bias", False)),
        step_limits=(float(limits[0]), float(limits[1])),
    )
    wanted = size(config, "mamba_expand") * width
    if mixer.inner != wanted:
        raise ValueError(f"mamba_n_heads * mamba_d_head must be mamba_expand * hidden_size = {wanted}, got {mixer.inner}")
    return mixer


def _auto_head_dim(config: Mapping[str, Any], width: int) -> int:
    return size(config, "mamba_expand") * width // size(config, "mamba_n_heads")


def _mlp(config: Mapping[str, Any]) -> Mlp:
    refuse(config, hidden_act="silu")
    shared, experts = size(config, "shared_intermediate_size"), config.get("num_local_experts", 0)
    if not experts:
        return MlpConfig(width=shared)
    return MoeConfig(
        experts=size(config, "num_local_experts"),
        chosen=size(config, "num_experts_per_tok"),
        width=size(config, "intermediate_size"),
        shared_width=shared,
        scoring="softmax_of_chosen",
    )
