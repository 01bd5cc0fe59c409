"""config.json of models with multi-head latent attention: DeepSeek-V2 and V3, Kimi-K2, GLM-4.7-Flash, MiniCPM3, Youtu-LLM."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from memjax.models.config import Block, LatentConfig, Mlp, MlpConfig, ModelConfig, MoeConfig
from memjax.models.fields import kinds, number, refuse, size
from memjax.models.hf_llama import common
from memjax.models.hf_rope import hf_rope
from memjax.models.latent import yarn_softmax_scale

# Sigmoid scores and a bias for the choice (DeepSeek-V3); V2 has softmax scores.
_SIGMOID = ("deepseek_v3", "kimi_k2", "glm4_moe_lite")
LATENT_FAMILIES = ("deepseek_v2", *_SIGMOID, "minicpm3", "youtu", "youtu_llm")
_DENSE = ("minicpm3", "youtu", "youtu_llm")
_NORM_EPS = 1e-6  # of the latents' norms: a constant in DeepSeek's code, whatever rms_norm_eps is


def latent_family(config: Mapping[str, Any]) -> ModelConfig:
    """Reads the configuration of one of ``LATENT_FAMILIES``.

    Raises:
      ValueError: a missing key, or an option that is not supported.
    """
    family, layers = config["model_type"], size(config, "num_hidden_layers")
    mixer = _latent(config, family)
    blocks = (Block(mixer, mlp) for mlp in _mlps(config, family, layers))
    model = ModelConfig(
        **common(config, tied=family in ("youtu", "youtu_llm")), width=size(config, "hidden_size"), blocks=tuple(blocks)
    )
    if family != "minicpm3":
        return model
    return dataclasses.replace(
        model,
        embedding_scale=number(config, "scale_emb"),
        residual_scale=number(config, "scale_depth") / layers**0.5,
        logits_scale=number(config, "dim_model_base") / model.width,
    )


def with_mtp(model: ModelConfig, config: Mapping[str, Any]) -> ModelConfig:
    """``model`` with the modules for multi-token prediction that its configuration has.

    Their layers have experts wherever the model has any: ``first_k_dense_replace`` is about the model's own layers.

    Raises:
      ValueError: num_nextn_predict_layers is absent or 0, or no number of layers; a family without such modules.
    """
    depths = config.get("num_nextn_predict_layers")
    if depths is None or (depths == 0 and not isinstance(depths, bool)):
        raise ValueError(
            f"mtp=True needs num_nextn_predict_layers >= 1 in the model's configuration, got {depths!r}: this {model.family} "
            "model has no modules for multi-token prediction"
        )
    mlp = _mlps({**config, "first_k_dense_replace": 0, "mlp_layer_types": None}, model.family, 1)[0]
    block = Block(model.blocks[-1].mixer, mlp)
    return dataclasses.replace(model, mtp_blocks=(block,) * size(config, "num_nextn_predict_layers"))


def _latent(config: Mapping[str, Any], family: str) -> LatentConfig:
    nope, rotary = size(config, "qk_nope_head_dim"), size(config, "qk_rope_head_dim")
    interleaved = bool(config.get("rope_interleave", family != "minicpm3"))
    rope = hf_rope(config, family, rotary, size(config, "max_position_embeddings"), interleaved=interleaved)
    return LatentConfig(
        q_heads=size(config, "num_attention_heads"),
        q_rank=None if config.get("q_lora_rank") is None else size(config, "q_lora_rank"),
        kv_rank=size(config, "kv_lora_rank"),
        nope_dim=nope,
        rope_dim=rotary,
        value_dim=size(config, "v_head_dim"),
        rope=rope,
        scale=yarn_softmax_scale(nope + rotary, rope),
        norm_eps=_NORM_EPS,
        bias=bool(config.get("attention_bias", False)),
    )


def _mlps(config: Mapping[str, Any], family: str, layers: int) -> list[Mlp]:
    plain = MlpConfig(width=size(config, "intermediate_size"))
    if family in _DENSE or config.get("n_routed_experts") is None:
        return [plain] * layers
    refuse(config, moe_layer_freq=1)
    moe, found = _experts(config, family), kinds(config, layers, ("dense", "sparse"), "mlp_layer_types")
    if found is not None:
        return [moe if kind == "sparse" else plain for kind in found]
    first = config.get("first_k_dense_replace", 0)
    return [plain if i < first else moe for i in range(layers)]


def _experts(config: Mapping[str, Any], family: str) -> MoeConfig:
    sigmoid = family in _SIGMOID
    method = config.get("topk_method", "noaux_tc" if sigmoid else "greedy")
    known = ("noaux_tc",) if sigmoid else ("greedy", "group_limited_greedy")
    if method not in known:
        raise ValueError(f"topk_method {method!r} is not supported for {family}, only {' and '.join(known)}")
    refuse(config, scoring_func="sigmoid" if sigmoid else "softmax")
    width, shared = size(config, "moe_intermediate_size"), config.get("n_shared_experts")
    normalise = bool(config.get("norm_topk_prob", sigmoid))
    grouped = method != "greedy"
    return MoeConfig(
        experts=size(config, "n_routed_experts"),
        chosen=size(config, "num_experts_per_tok"),
        width=width,
        shared_width=width * shared if shared else None,
        scoring="sigmoid" if sigmoid else "softmax",
        groups=size(config, "n_group", 1) if grouped else 1,
        kept_groups=size(config, "topk_group", 1) if grouped else 1,
        score_bias=sigmoid,
        normalise=normalise,
        # DeepSeek-V2's own code either normalises or scales.
        scale=1.0 if normalise and not sigmoid else number(config, "routed_scaling_factor", 1.0),
    )
