"""Model configurations of GGUF files: the Llama family as llama.cpp's converter writes it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from memjax.attention.rope import Rope
from memjax.models.config import ModelConfig, checked_size, llama_config
from memjax.models.fields import need, number, size

# As GGUF files name them: Mistral's checkpoints are stored as llama.
GGUF_FAMILIES = ("llama", "qwen2", "qwen3", "smollm3")
_GGUF_ROPE_KINDS = {"none": "default", "linear": "linear", "yarn": "yarn"}


def gguf_config(
    metadata: Mapping[str, Any], tensors: Collection[str], freq_factors: tuple[float, ...] = ()
) -> ModelConfig:
    """Reads GGUF metadata (keys as in the file).

    Args:
      tensors: the file's own names of its tensors: they tell tied embeddings and biases.
      freq_factors: contents of the tensor rope_freqs.weight, if any.

    Raises:
      ValueError: unknown architecture or rope scaling, a missing key, an impossible size.
    """
    family = metadata.get("general.architecture")
    if family not in GGUF_FAMILIES:
        raise ValueError(
            f"GGUF architecture {family!r} is not supported; the supported ones are {', '.join(GGUF_FAMILIES)}"
        )
    layers, heads, width, longest = (
        size(metadata, f"{family}.{key}")
        for key in ("block_count", "attention.head_count", "embedding_length", "context_length")
    )
    head_dim = size(metadata, f"{family}.attention.key_length", width // heads)
    if size(metadata, f"{family}.attention.value_length", head_dim) != head_dim:
        raise ValueError(f"GGUF values whose length differs from the keys' ({head_dim}) are not supported for {family}")
    vocab = metadata.get(f"{family}.vocab_size") or len(need(metadata, "tokenizer.ggml.tokens"))
    rope = _gguf_rope(metadata, family, head_dim, longest, freq_factors)
    return llama_config(
        family=family,
        vocab=checked_size(f"{family}.vocab_size", vocab),
        width=width,
        layers=layers,
        q_heads=heads,
        kv_heads=size(metadata, f"{family}.attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp_width=size(metadata, f"{family}.feed_forward_length"),
        norm_eps=number(metadata, f"{family}.attention.layer_norm_rms_epsilon"),
        max_position=longest,
        # smollm3 files do not say which layers lack the rotary embedding: every fourth does.
        ropes=tuple(None if family == "smollm3" and (i + 1) % 4 == 0 else rope for i in range(layers)),
        windows=_gguf_windows(metadata, family, layers),
        tied="output.weight" not in tensors,
        qkv_bias=family == "qwen2" or "blk.0.attn_q.bias" in tensors,
        out_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        qk_norm=family == "qwen3",
        bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_ids=gguf_eos_ids(metadata),
    )


def gguf_eos_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids that end a text, a turn or a message, sorted."""
    ids = {metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")} - {None}
    return tuple(sorted(ids))


def _gguf_rope(
    metadata: Mapping[str, Any], family: str, head_dim: int, longest: int, freq_factors: tuple[float, ...]
) -> Rope:
    def get(key: str, default=None):
        return metadata.get(f"{family}.rope.{key}", default)

    kind = get("scaling.type") or "none"
    if kind not in _GGUF_ROPE_KINDS:
        raise ValueError(
            f"GGUF rope scaling {kind!r} is not supported; the supported ones are {', '.join(_GGUF_ROPE_KINDS)}"
        )
    dim = get("dimension_count", head_dim)
    if dim != head_dim:
        raise ValueError(f"GGUF rope over {dim} of {head_dim} channels is not supported for {family}")
    for key, neutral in (("scaling.alpha", 0), ("scaling.yarn_log_multiplier", 0), ("scaling.yarn_ext_factor", 1)):
        if get(key, neutral) != neutral:
            raise ValueError(f"GGUF key {family}.rope.{key} = {get(key)} is not supported")
    # Files made from Llama 1 and 2 lack the base when config.json did; elsewhere a guess would be silent garbage.
    theta = get("freq_base", 10000.0 if family == "llama" else None)
    if theta is None:
        raise ValueError(f"the model's configuration lacks '{family}.rope.freq_base'")
    factor = float(get("scaling.factor") or 1.0)
    chosen = {key: float(get(f"scaling.yarn_{key}")) for key in ("beta_fast", "beta_slow") if get(f"scaling.yarn_{key}")}
    extra = get("scaling.attn_factor") or get("scaling.yarn_attn_factor")
    if kind == "yarn" and extra:
        chosen["attention_factor"] = float(extra) * (0.1 * math.log(max(factor, 1.0)) + 1.0)
    return Rope(
        dim=head_dim,
        theta=float(theta),
        kind=_GGUF_ROPE_KINDS[kind],
        factor=factor,
        original_max_position=get("scaling.original_context_length") or longest,
        freq_factors=freq_factors,
        **chosen,
    )


def _gguf_windows(metadata: Mapping[str, Any], family: str, layers: int) -> tuple[int | None, ...]:
    window = metadata.get(f"{family}.attention.sliding_window") or None
    pattern = metadata.get(f"{family}.attention.sliding_window_pattern")
    if window is None or pattern is None:
        return (window,) * layers
    if not isinstance(pattern, list) or len(pattern) != layers:
        raise ValueError(f"{family}.attention.sliding_window_pattern needs one flag per layer ({layers}), got {pattern!r}")
    return tuple(window if slides else None for slides in pattern)
