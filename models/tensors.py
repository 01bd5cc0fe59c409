"""Where each parameter of a ``Decoder`` lies in a checkpoint: Hugging Face's names, and torch's layout of linear weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from memjax.models.config import AttentionConfig, Block, LatentConfig, MambaConfig, ModelConfig, MoeConfig

Shape = tuple[int, ...]
Path = tuple[str | int, ...]


def _as_it_is(x: np.ndarray) -> np.ndarray:
    return x


def _transposed(x: np.ndarray) -> np.ndarray:
    return x.swapaxes(-1, -2)


@dataclass(frozen=True)
class Stored:
    """One parameter as it lies in a checkpoint.

    Attributes:
      names: of the tensor; several: they are stacked along a new first axis.
      shape: of each of them.
      place: makes the parameter of it.
    """

    names: tuple[str, ...]
    shape: Shape
    place: Callable[[np.ndarray], np.ndarray] = _as_it_is


def stored_parameters(config: ModelConfig) -> dict[Path, Stored]:
    """By the path of the parameter: ("layers", 5, "mixer", "q", "kernel")."""
    found: dict[Path, Stored] = {
        ("embedding", "embedding"): Stored(("model.embed_tokens.weight",), (config.vocab, config.width)),
        ("norm", "scale"): Stored(("model.norm.weight",), (config.width,)),
    }
    if not config.tied:
        found["head", "kernel"] = Stored(("lm_head.weight",), (config.vocab, config.width), _transposed)
    for i, block in enumerate(config.blocks):
        found |= _behind(("layers", i), f"model.layers.{i}", _layer(block, config))
    for k, block in enumerate(config.mtp_blocks):
        found |= _behind(("mtp", k), _mtp_prefix(config, k), _mtp(block, config))
    return found


def stored_copies(config: ModelConfig) -> dict[str, tuple[Path, Stored]]:
    """Tensors that a checkpoint may have a second time, in its modules for multi-token prediction.

    Returns:
      By the tensor's name: the path of the parameter that it is a copy of, and how it is stored.
    """
    shape = (config.vocab, config.width)
    embedding = ("embedding", "embedding"), Stored(("model.embed_tokens.weight",), shape)
    head = embedding if config.tied else (("head", "kernel"), Stored(("lm_head.weight",), shape, _transposed))
    prefixes = [_mtp_prefix(config, k) for k in range(len(config.mtp_blocks))]
    names = {"embed_tokens.weight": embedding, "shared_head.head.weight": head}
    return {f"{prefix}.{name}": copied for prefix in prefixes for name, copied in names.items()}


def _behind(path: Path, prefix: str, part: dict[Path, Stored]) -> dict[Path, Stored]:
    def named(each: Stored) -> Stored:
        return Stored(tuple(f"{prefix}.{name}" for name in each.names), each.shape, each.place)

    return {(*path, *end): named(each) for end, each in part.items()}


def _mtp_prefix(config: ModelConfig, k: int) -> str:
    return f"model.layers.{config.layers + k}"


def _mtp(block: Block, config: ModelConfig) -> dict[Path, Stored]:
    """A module for multi-token prediction: its layer's tensors lie beside its own, as if all were one layer's."""
    width = config.width
    found = _norm("enorm", "enorm", width) | _norm("hnorm", "hnorm", width) | _norm("norm", "shared_head.norm", width)
    found |= _linear("eh_proj", "eh_proj", width, 2 * width)
    return found | {("layer", *path): each for path, each in _layer(block, config).items()}


def _layer(block: Block, config: ModelConfig) -> dict[Path, Stored]:
    norms = {"mixer_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if config.post_norms:
        norms = {
            "mixer_norm": "input_layernorm",
            "mixer_post_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        }
    found = {(norm, "scale"): Stored((f"{name}.weight",), (config.width,)) for norm, name in norms.items()}
    found |= {("mixer", *path): each for path, each in _mixer(block, config.width).items()}
    return found | {("mlp", *path): each for path, each in _mlp(block, config).items()}


def _linear(module: str, name: str, outputs: int, inputs: int, bias: bool = False) -> dict[Path, Stored]:
    found: dict[Path, Stored] = {(module, "kernel"): Stored((f"{name}.weight",), (outputs, inputs), _transposed)}
    if bias:
        found[module, "bias"] = Stored((f"{name}.bias",), (outputs,))
    return found


def _norm(module: str, name: str, size: int) -> dict[Path, Stored]:
    return {(module, "scale"): Stored((f"{name}.weight",), (size,))}


def _mixer(block: Block, width: int) -> dict[Path, Stored]:
    match block.mixer:
        case AttentionConfig():
            return _attention(block.mixer, width)
        case LatentConfig():
            return _latent(block.mixer, width)
        case MambaConfig():
            return _mamba(block.mixer, width)


def _attention(config: AttentionConfig, width: int) -> dict[Path, Stored]:
    queries, keys = config.q_heads * config.head_dim, config.kv_heads * config.head_dim
    found = _linear("q", "self_attn.q_proj", queries, width, config.qkv_bias)
    found |= _linear("k", "self_attn.k_proj", keys, width, config.qkv_bias)
    found |= _linear("v", "self_attn.v_proj", keys, width, config.qkv_bias)
    found |= _linear("out", "self_attn.o_proj", width, queries, config.out_bias)
    if config.qk_norm:
        found |= _norm("q_norm", "self_attn.q_norm", config.head_dim) | _norm("k_norm", "self_attn.k_norm", config.head_dim)
    return found


def _latent(config: LatentConfig, width: int) -> dict[Path, Stored]:
    heads, both = config.q_heads, config.nope_dim + config.value_dim
    queries = heads * (config.nope_dim + config.rope_dim)
    if config.q_rank is None:
        found = _linear("q", "self_attn.q_proj", queries, width)
    else:
        found = _linear("q_a", "self_attn.q_a_proj", config.q_rank, width, config.bias)
        found |= _linear("q_b", "self_attn.q_b_proj", queries, config.q_rank)
    found |= _linear("kv_a", "self_attn.kv_a_proj_with_mqa", config.kv_rank + config.rope_dim, width, config.bias)
    found |= _linear("out", "self_attn.o_proj", width, heads * config.value_dim, config.bias)
    if config.latent_norm:
        found |= _norm("kv_norm", "self_attn.kv_a_layernorm", config.kv_rank)
        if config.q_rank is not None:
            found |= _norm("q_norm", "self_attn.q_a_layernorm", config.q_rank)

    def heads_of(x: np.ndarray) -> np.ndarray:  # per head: rows of its keys, then of its values
        return x.reshape(heads, both, config.kv_rank)

    name, shape = ("self_attn.kv_b_proj.weight",), (heads * both, config.kv_rank)
    found["up_key",] = Stored(name, shape, lambda x: heads_of(x)[:, : config.nope_dim])
    found["up_value",] = Stored(name, shape, lambda x: heads_of(x)[:, config.nope_dim :].swapaxes(1, 2))
    return found


def _mamba(config: MambaConfig, width: int) -> dict[Path, Stored]:
    found = _linear("inputs", "mamba.in_proj", config.inner + config.conv_dim + config.heads, width, config.bias)
    found |= _linear("out", "mamba.out_proj", width, config.inner, config.bias)
    found |= _norm("norm", "mamba.norm", config.inner)
    shape = (config.conv_dim, 1, config.conv_width)
    found["conv_kernel",] = Stored(("mamba.conv1d.weight",), shape, lambda x: x[:, 0].T)
    if config.conv_bias:
        found["conv_bias",] = Stored(("mamba.conv1d.bias",), (config.conv_dim,))
    for path, name in (("dt_bias", "dt_bias"), ("a_log", "A_log"), ("skip", "D")):
        found[path,] = Stored((f"mamba.{name}",), (config.heads,))
    return found


def _mlp(block: Block, config: ModelConfig) -> dict[Path, Stored]:
    width, mlp = config.width, block.mlp
    if config.family == "granitemoehybrid":
        return _granite_mlp(block, width)
    if not isinstance(mlp, MoeConfig):
        return _gated("mlp", mlp.width, width, mlp.bias)
    found: dict[Path, Stored] = {("router",): Stored(("mlp.gate.weight",), (mlp.experts, width), _transposed)}
    if mlp.score_bias:
        found["score_bias",] = Stored(("mlp.gate.e_score_correction_bias",), (mlp.experts,))
    for part, shape in (("gate", (mlp.width, width)), ("up", (mlp.width, width)), ("down", (width, mlp.width))):
        names = tuple(f"mlp.experts.{e}.{part}_proj.weight" for e in range(mlp.experts))
        found[part,] = Stored(names, shape, _transposed)
    if mlp.shared_width:
        shared = _gated("mlp.shared_experts", mlp.shared_width, width)
        found |= {("shared", *path): each for path, each in shared.items()}
    return found


def _gated(name: str, hidden: int, width: int, bias: bool = False) -> dict[Path, Stored]:
    found = _linear("gate", f"{name}.gate_proj", hidden, width, bias) | _linear("up", f"{name}.up_proj", hidden, width, bias)
    return found | _linear("down", f"{name}.down_proj", width, hidden, bias)


def _granite_mlp(block: Block, width: int) -> dict[Path, Stored]:
    """Gate and up projection lie in one tensor, as its first and second half; so do the experts, all in one."""
    mlp = block.mlp
    if not isinstance(mlp, MoeConfig):
        return _granite_shared(mlp.width, width)
    found = {("shared", *path): each for path, each in _granite_shared(mlp.shared_width, width).items()}
    name, half = "block_sparse_moe", mlp.width
    inputs = (f"{name}.input_linear.weight",), (mlp.experts, 2 * half, width)
    found["router",] = Stored((f"{name}.router.layer.weight",), (mlp.experts, width), _transposed)
    found["gate",] = Stored(*inputs, lambda x: _transposed(x[:, :half]))
    found["up",] = Stored(*inputs, lambda x: _transposed(x[:, half:]))
    found["down",] = Stored((f"{name}.output_linear.weight",), (mlp.experts, width, half), _transposed)
    return found


def _granite_shared(hidden: int, width: int) -> dict[Path, Stored]:
    inputs = ("shared_mlp.input_linear.weight",), (2 * hidden, width)
    return {
        ("gate", "kernel"): Stored(*inputs, lambda x: x[:hidden].T),
        ("up", "kernel"): Stored(*inputs, lambda x: x[hidden:].T),
    } | _linear("down", "shared_mlp.output_linear", width, hidden)
