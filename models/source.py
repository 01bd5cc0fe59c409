"""What a checkpoint is to the models: named tensors in Hugging Face's names and torch's layout, read one at a time."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from memjax.models.config import ModelConfig


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
    width, queries, keys = config.width, config.q_heads * config.head_dim, config.kv_heads * config.head_dim
    linears = {
        "self_attn.q_proj": (queries, width, config.qkv_bias),
        "self_attn.k_proj": (keys, width, config.qkv_bias),
        "self_attn.v_proj": (keys, width, config.qkv_bias),
        "self_attn.o_proj": (width, queries, config.out_bias),
        "mlp.gate_proj": (config.mlp_width, width, config.mlp_bias),
        "mlp.up_proj": (config.mlp_width, width, config.mlp_bias),
        "mlp.down_proj": (width, config.mlp_width, config.mlp_bias),
    }
    layer: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,)}
    for name, (outputs, inputs, bias) in linears.items():
        layer[f"{name}.weight"] = (outputs, inputs)
        if bias:
            layer[f"{name}.bias"] = (outputs,)
    if config.qk_norm:
        layer |= {"self_attn.q_norm.weight": (config.head_dim,), "self_attn.k_norm.weight": (config.head_dim,)}
    tensors = {"model.embed_tokens.weight": (config.vocab, width), "model.norm.weight": (width,)}
    if not config.tied:
        tensors["lm_head.weight"] = (config.vocab, width)
    for i in range(config.layers):
        tensors |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return tensors


def ignorable(name: str) -> bool:
    """Whether this is a rotary buffer, which old checkpoints carry and no model reads."""
    return name.endswith("rotary_emb.inv_freq")


def check_tensors(config: ModelConfig, source: TensorSource) -> None:
    """Compares a checkpoint's tensors with the configuration's; reads none.

    The sets must be equal, but for rotary buffers and, where embeddings are tied, a second copy of them.

    Raises:
      ValueError: names the tensors that are missing, unexpected or of another shape.
    """
    expected = expected_tensors(config)
    dropped = {"lm_head.weight"} if config.tied else set()
    found = {name for name in source.names() if not ignorable(name)} - dropped
    problems = []
    if missing := sorted(expected.keys() - found):
        problems.append(f"missing: {_some(missing)}")
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
