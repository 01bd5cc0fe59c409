"""The small models of this folder, one per setting that a loader could get wrong; make_logits.py writes them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from transformers import AutoConfig

LENGTHS = (80, 53)  # row 1 also serves as a ragged row
ORIGINAL = 32  # length "of training" of the stretched variants: the text is longer
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    # Exact in float32: transformers rounds these factors, and a test would measure that rounding.
    "short_factor": [1.0, 1.0625, 1.25, 1.375],
    "long_factor": [1.125, 1.875, 3.25, 4.5],
    "original_max_position_embeddings": ORIGINAL,
}
PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
FOUR_LAYERS = {"num_hidden_layers": 4, "intermediate_size": 28, "vocab_size": 64}


@dataclass(frozen=True)
class Variant:
    """One small model.

    Attributes:
      changes: to SMALL, in the names of transformers 5.
      without: configuration entries that take the variant's setting away; the logits must then change. A tuple: one after
        the other.
      old, old_type: also write config_v4.json (rope_type) and config_v4_type.json (type).
      old_extra: entries that only the old spelling has.
      fp8: matrices as float8_e4m3fn with one scale per block of this many rows and columns.
      alone: lengths for which row 0 is also run by itself, because the length decides the frequencies.
      mtp: so many of the layers are written as modules for multi-token prediction.
      shard: save_pretrained's max_shard_size.
    """

    family: str
    name: str
    changes: dict
    without: dict | tuple[dict, ...] = field(default_factory=dict)
    old: bool = False
    old_type: bool = False
    old_extra: dict = field(default_factory=dict)
    alone: tuple[int, ...] = ()
    shard: str | None = None
    greedy: bool = False
    fp8: int | None = None
    mtp: int = 0

    def config(self):
        return AutoConfig.for_model(self.family, **copy.deepcopy(SMALL | self.changes))


def scaled(name: str, rope: dict, **options) -> Variant:
    """A llama whose rotary embedding is stretched."""
    without = PLAIN_ROPE | ({"rope_parameters": options.pop("against")} if "against" in options else {})
    changes = {"rope_parameters": rope} | options.pop("changes", {})
    return Variant("llama", f"llama_{name}", changes, without=without, **options)


WIDE_HEADS = {"head_dim": 16, "intermediate_size": 24}
NARROW = {"intermediate_size": 28}
SLOW = {"original_max_position_embeddings": 64, "beta_fast": 8.0, "beta_slow": 1.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,  # wavelengths 6, 30, 141, 665: one in each band and one more below
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}
LAYERS_WITHOUT_ROPE = {"no_rope_layers": [1, 1, 0, 1], "rms_norm_eps": 1e-6}
QWEN2_WINDOW = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}
ALL_ROPE, ALL_FULL = {"no_rope_layers": [1] * 4}, ["full_attention"] * 4

# Small enough for many layers and experts.
TINY = {"hidden_size": 24, "vocab_size": 64, "intermediate_size": 12}
GEMMA = TINY | {"num_hidden_layers": 4, "head_dim": 8, "intermediate_size": 8, "rms_norm_eps": 1e-6}
GEMMA2 = GEMMA | {
    "sliding_window": 16,
    "attn_logit_softcapping": 1.5,
    "final_logit_softcapping": 2.0,
    "query_pre_attn_scalar": 3,
}
LOCAL, GLOBAL = ({"rope_type": "default", "rope_theta": theta} for theta in (100.0, 5000.0))
GEMMA3 = GEMMA | {
    "num_key_value_heads": 1,
    "sliding_window": 16,
    "query_pre_attn_scalar": 5,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {"sliding_attention": LOCAL, "full_attention": {**GLOBAL, "rope_type": "linear", "factor": 8.0}},
}
GEMMA3_WITHOUT = (
    {"layer_types": ALL_FULL},
    {"rope_parameters": {"sliding_attention": LOCAL, "full_attention": GLOBAL}},
    {"rope_parameters": GEMMA3["rope_parameters"] | {"sliding_attention": GLOBAL}},
    {"query_pre_attn_scalar": 8},
)
QWEN3_MOE = TINY | {
    "num_hidden_layers": 3,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "moe_intermediate_size": 4,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
}
SPARSE_STEP = {"num_hidden_layers": 2, "num_experts_per_tok": 3, "norm_topk_prob": False, "decoder_sparse_step": 2}
UNUSED_WINDOW = {"sliding_window": 16, "max_window_layers": 0}  # use_sliding_window is false
GRANITE = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.6,
    "logits_scaling": 1.5,
    "shared_intermediate_size": 8,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "mamba_n_heads": 6,
    "mamba_d_head": 8,
    "mamba_d_state": 10,
    "mamba_chunk_size": 16,
}
MULTIPLIERS = tuple({key: 1.0} for key in GRANITE if key.endswith(("multiplier", "scaling")))
GRANITE_DENSE = GRANITE | {
    "vocab_size": 64,
    "shared_intermediate_size": 12,
    "position_embedding_type": "rope",
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "layer_types": ["full_attention"] * 2,
    "mamba_n_heads": 8,
}
GRANITE_HYBRID = (
    TINY
    | GRANITE
    | {
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "position_embedding_type": "nope",
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    }
)
GRANITE_MOE = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "intermediate_size": 5,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
MLA = TINY | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 14,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 4,
    "rms_norm_eps": 1e-2,  # not the epsilon of the two norms on latents, which is fixed: 1e-6
}
DEEPSEEK = MLA | {
    "tie_word_embeddings": False,
    "moe_intermediate_size": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}
DEEPSEEK_YARN = YARN | {"beta_fast": 32.0, "beta_slow": 1.0}
WITHOUT_MSCALE = {"rope_parameters": DEEPSEEK_YARN | {"attention_factor": 1.0}}
V2_LITE = DEEPSEEK | {
    "q_lora_rank": None,
    "topk_method": "greedy",
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "rope_parameters": DEEPSEEK_YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
}
V2 = DEEPSEEK | {
    "topk_method": "group_limited_greedy",
    "n_shared_experts": 1,
    "rope_parameters": DEEPSEEK_YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
}
V3 = DEEPSEEK | {
    "n_shared_experts": 1,
    "num_nextn_predict_layers": 0,
    "norm_topk_prob": True,
    "rope_parameters": DEEPSEEK_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
}
NOAUX_TC = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}  # transformers 5 does not keep these
GLM = {key: value for key, value in DEEPSEEK.items() if key != "first_k_dense_replace"} | {
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.8,
}
MINICPM3 = MLA | {"rope_parameters": LONG, "scale_emb": 3, "scale_depth": 1.0, "dim_model_base": 16}


VARIANTS = (
    Variant(
        "llama",
        "llama_default",
        {"tie_word_embeddings": False, "intermediate_size": 40, "rms_norm_eps": 1e-2, "eos_token_id": [2, 95]},
        without={"rms_norm_eps": 1e-6},
        old=True,
        greedy=True,
    ),
    Variant("llama", "llama_tied", {}),
    scaled("llama3", LLAMA3, old=True, old_type=True),
    scaled("linear", {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}, old=True, old_type=True),
    scaled(
        "dynamic",
        {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0},
        changes={"max_position_embeddings": ORIGINAL, "intermediate_size": 24},
        old=True,
        old_type=True,
        alone=(24, 53),
    ),
    scaled("yarn", YARN, changes=WIDE_HEADS, old=True, old_type=True),
    scaled("yarn_attention_factor", YARN | {"attention_factor": 0.7}, changes=WIDE_HEADS, against=YARN, old=True),
    scaled(
        "yarn_mscale",
        YARN | {"mscale": 2.0, "mscale_all_dim": 0.5},
        changes=WIDE_HEADS,
        against=YARN,
        old=True,
    ),
    scaled("yarn_betas", YARN | SLOW, changes=WIDE_HEADS, against=YARN, old=True),
    scaled(
        "yarn_no_truncate",
        YARN | SLOW | {"truncate": False},
        changes=WIDE_HEADS,
        against=YARN | SLOW,
        old=True,
    ),
    scaled("longrope", LONG, changes=NARROW, alone=(24, ORIGINAL), old=True, old_type=True),
    scaled(
        "longrope_attention_factor",
        LONG | {"attention_factor": 1.4, "factor": 2.0},
        changes=NARROW,
        against=LONG,
        alone=(24,),
        old=True,
    ),
    Variant("llama", "llama_bias", {"attention_bias": True, "mlp_bias": True, "intermediate_size": 40}, old=True),
    Variant("llama", "llama_head_dim", {"head_dim": 12, "intermediate_size": 36}, old=True),
    Variant("llama", "llama_sharded", {"num_key_value_heads": 4, "intermediate_size": 40}, shard="30KB"),
    Variant(
        "qwen2", "qwen2", {"rms_norm_eps": 1e-6}, old=True, old_extra={"sliding_window": 16, "max_window_layers": 0}
    ),
    Variant(
        "qwen2",
        "qwen2_window",
        FOUR_LAYERS | QWEN2_WINDOW,
        without={"layer_types": ALL_FULL},
        old=True,
    ),
    Variant(
        "qwen3",
        "qwen3",
        {"head_dim": 16, "rms_norm_eps": 1e-6, "intermediate_size": 28},
        old=True,
        old_extra={"sliding_window": None},
    ),
    Variant("mistral", "mistral", {"sliding_window": 16}, without={"sliding_window": None}, old=True),
    Variant(
        "smollm3",
        "smollm3",
        FOUR_LAYERS | LAYERS_WITHOUT_ROPE,
        without=ALL_ROPE,
        old=True,
        old_extra={"no_rope_layers": None, "no_rope_layer_interval": 3},  # the same [1, 1, 0, 1]
    ),
    Variant(
        "smollm3",
        "smollm3_window",
        FOUR_LAYERS | LAYERS_WITHOUT_ROPE | {"use_sliding_window": True, "sliding_window": 16},
        without={"layer_types": ALL_FULL},
        old=True,
    ),
    Variant(
        "gemma2",
        "gemma2",
        GEMMA2,
        without=(
            {"layer_types": ALL_FULL},
            {"attn_logit_softcapping": None},
            {"final_logit_softcapping": None},
            {"query_pre_attn_scalar": 8},
        ),
        old=True,
    ),
    Variant(
        "gemma3_text", "gemma3_text", GEMMA3, without=GEMMA3_WITHOUT, old=True, old_extra={"sliding_window_pattern": 3}
    ),
    Variant(
        "qwen3_moe",
        "qwen3_moe",
        QWEN3_MOE,
        without=({"norm_topk_prob": False}, {"num_experts_per_tok": 3}),
        old=True,
        old_extra=UNUSED_WINDOW,
    ),
    Variant(
        "qwen3_moe",
        "qwen3_moe_step",
        QWEN3_MOE | SPARSE_STEP | {"mlp_only_layers": []},
        without={"norm_topk_prob": True},
        old=True,
    ),
    Variant(
        "granitemoehybrid",
        "granite_dense",
        GRANITE_DENSE,
        without=(*MULTIPLIERS, {"position_embedding_type": "nope"}),
        old=True,
        old_extra={"layer_types": ["attention"] * 2},
    ),
    Variant(
        "granitemoehybrid",
        "granite_hybrid",
        GRANITE_HYBRID,
        without=(*MULTIPLIERS, {"position_embedding_type": "rope"}, {"time_step_limit": [0.0, 0.1]}),
        old=True,
        old_extra={"layer_types": ["mamba", "attention", "mamba"]},
    ),
    Variant(
        "granitemoehybrid",
        "granite_hybrid_moe",
        GRANITE_HYBRID | GRANITE_MOE,
        without={"num_experts_per_tok": 1},
        old=True,
        old_extra={"layer_types": ["mamba", "attention"]},
    ),
    Variant(
        "deepseek_v2",
        "deepseek_v2_lite",
        V2_LITE,
        without=(WITHOUT_MSCALE, {"routed_scaling_factor": 2.0}),
        old=True,
        old_type=True,
        old_extra={"scoring_func": "softmax"},
    ),
    Variant(
        "deepseek_v2",
        "deepseek_v2",
        V2,
        without=(WITHOUT_MSCALE, {"routed_scaling_factor": 1.0}, {"topk_method": "greedy"}),
        old=True,
        old_type=True,
        old_extra={"scoring_func": "softmax"},
    ),
    *(
        Variant(
            "deepseek_v3",
            name,
            V3,
            without=(
                WITHOUT_MSCALE,
                {"routed_scaling_factor": 1.0},
                {"norm_topk_prob": False},
                {"topk_group": 4},
                {"rope_interleave": False},
            ),
            old=True,
            old_type=True,
            old_extra=NOAUX_TC,
            fp8=block,
        )
        for name, block in (("deepseek_v3", None), ("deepseek_v3_fp8", 16))
    ),
    Variant(
        "glm4_moe_lite",
        "glm4_moe_lite",
        GLM,
        without=({"routed_scaling_factor": 1.0}, {"norm_topk_prob": False}, {"rope_interleave": False}),
        old=True,
        old_extra=NOAUX_TC | {"first_k_dense_replace": 1},
    ),
    Variant("deepseek_v3", "deepseek_v3_mtp", V3 | {"num_hidden_layers": 4}, mtp=2),
    Variant("deepseek_v3", "deepseek_v3_mtp_fp8", V3 | {"num_hidden_layers": 3}, mtp=1, fp8=16),
    Variant("glm4_moe_lite", "glm4_moe_lite_mtp", GLM | {"num_hidden_layers": 3}, mtp=1),
    Variant(
        "minicpm3",
        "minicpm3",
        MINICPM3,
        without=({"scale_emb": 1}, {"scale_depth": 1.4}, {"dim_model_base": 24}, PLAIN_ROPE),
        alone=(24, ORIGINAL),
        old=True,
    ),
    Variant("youtu", "youtu", MLA, without={"rope_interleave": False}, old=True),
)
