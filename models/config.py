"""Model configurations: one form, read from Hugging Face's config.json (transformers 4 and 5) and from GGUF metadata."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memjax.attention.rope import ROPE_KINDS, Rope

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder of the Llama family. Frozen and hashable.

    Attributes:
      family: one of ``FAMILIES``.
      vocab, width, layers, q_heads, kv_heads, head_dim, mlp_width: sizes.
      ropes: the rotary embedding of each layer; None: a layer without one (NoPE).
      windows: the sliding window of each layer: query i sees keys i - W + 1 .. i. None: all.
      tied: the vocabulary projection is the embedding.
      max_position: length that the model was made for, in tokens.
      eos_ids: ids that end a generation.

    Raises:
      ValueError: sizes that do not fit together.
    """

    family: str
    vocab: int
    width: int
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    norm_eps: float
    max_position: int
    ropes: tuple[Rope | None, ...]
    windows: tuple[int | None, ...]
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ValueError(f"model family {self.family!r} is not one of {', '.join(FAMILIES)}")
        for name in ("vocab", "width", "layers", "q_heads", "kv_heads", "head_dim", "mlp_width", "max_position"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"a model needs {name} >= 1, got {getattr(self, name)!r}")
        if self.q_heads % self.kv_heads:
            raise ValueError(f"query heads ({self.q_heads}) must be a multiple of kv heads ({self.kv_heads})")
        if len(self.ropes) != self.layers or len(self.windows) != self.layers:
            raise ValueError(
                f"a model of {self.layers} layers needs as many rope and window entries, "
                f"got {len(self.ropes)} and {len(self.windows)}"
            )

    def to_json(self) -> dict:
        """A JSON-compatible dict; ``from_json`` inverts it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Inverts ``to_json``."""

        def rope(entry):
            return entry and Rope(**{k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()})

        plain = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**plain | {"ropes": tuple(rope(entry) for entry in data["ropes"])})

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Reads a config.json of transformers 4 or 5.

        Raises:
          ValueError: unknown model_type, rope type or activation, an unsupported option, or a missing key.
        """
        family = config.get("model_type")
        if family not in FAMILIES:
            raise ValueError(f"model_type {family!r} is not supported; the supported ones are {', '.join(FAMILIES)}")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act {config['hidden_act']!r} is not supported, only 'silu'")
        if config.get("quantization_config"):
            raise ValueError("checkpoints with a quantization_config are not supported; load unquantized weights or GGUF")
        layers, heads, width = (
            _need(config, key) for key in ("num_hidden_layers", "num_attention_heads", "hidden_size")
        )
        head_dim = config.get("head_dim") or width // heads
        ropes = _hf_ropes(config, family, _hf_rope(config, family, head_dim), layers)
        bias = family == "qwen2" or bool(config.get("attention_bias", False))
        eos = config.get("eos_token_id")
        return cls(
            family=family,
            vocab=_need(config, "vocab_size"),
            width=width,
            layers=layers,
            q_heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            mlp_width=_need(config, "intermediate_size"),
            norm_eps=float(_need(config, "rms_norm_eps")),
            max_position=_need(config, "max_position_embeddings"),
            ropes=ropes,
            windows=_hf_windows(config, family, ropes),
            tied=bool(config.get("tie_word_embeddings", family == "smollm3")),
            qkv_bias=bias,
            out_bias=bias and family != "qwen2",
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            bos_id=config.get("bos_token_id"),
            eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], tied: bool, freq_factors: tuple[float, ...] = ()) -> ModelConfig:
        """Reads GGUF metadata (keys as in the file).

        Args:
          tied: the file has no output projection.
          freq_factors: contents of the tensor rope_freqs.weight, if any.

        Raises:
          ValueError: unknown architecture or a missing key.
        """
        family = metadata.get("general.architecture")
        if family not in FAMILIES:
            raise ValueError(f"GGUF architecture {family!r} is not supported; the supported ones are {', '.join(FAMILIES)}")

        def need(key: str):
            return _need(metadata, f"{family}.{key}")

        layers, heads, width = need("block_count"), need("attention.head_count"), need("embedding_length")
        head_dim = metadata.get(f"{family}.attention.key_length") or width // heads
        rope = _gguf_rope(metadata, family, head_dim, need("context_length"), freq_factors)
        # smollm3 files do not say which layers lack the rotary embedding: every fourth does.
        ropes = tuple(None if family == "smollm3" and (i + 1) % 4 == 0 else rope for i in range(layers))
        eos = {metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")} - {None}
        return cls(
            family=family,
            vocab=metadata.get(f"{family}.vocab_size") or len(_need(metadata, "tokenizer.ggml.tokens")),
            width=width,
            layers=layers,
            q_heads=heads,
            kv_heads=metadata.get(f"{family}.attention.head_count_kv") or heads,
            head_dim=head_dim,
            mlp_width=need("feed_forward_length"),
            norm_eps=float(need("attention.layer_norm_rms_epsilon")),
            max_position=need("context_length"),
            ropes=ropes,
            windows=(metadata.get(f"{family}.attention.sliding_window") or None,) * layers,
            tied=tied,
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
            eos_ids=tuple(sorted(eos)),
        )


def _need(config: Mapping[str, Any], key: str):
    value = config.get(key)
    if value is None:
        raise ValueError(f"the model's configuration lacks {key!r}")
    return value


def _hf_rope(config: Mapping[str, Any], family: str, head_dim: int) -> Rope:
    """One rope from either spelling: rope_parameters (transformers 5) or rope_theta + rope_scaling (4)."""
    new = config.get("rope_parameters")
    given = dict(new or config.get("rope_scaling") or {})
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in ROPE_KINDS:
        raise ValueError(f"rope type {kind!r} is not supported; the supported ones are {', '.join(ROPE_KINDS)}")
    theta = given.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        # Llama 1 and 2 were published before the key existed; anywhere else a guess would be silent garbage.
        if family != "llama" or new is not None:
            raise ValueError(f"the configuration of a {family} model lacks 'rope_theta'")
        theta = 10000.0
    if given.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("partial_rotary_factor other than 1 is not supported")
    longest = _need(config, "max_position_embeddings")
    original = longest
    if kind in ("llama3", "yarn", "longrope"):
        original = config.get("original_max_position_embeddings") or given.get(
            "original_max_position_embeddings", longest
        )
    factor = given.get("factor")
    if factor is None:
        if kind in ("linear", "dynamic", "llama3"):
            raise ValueError(f"rope type {kind!r} needs 'factor'")
        factor = longest / original
    optional = ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor")
    optional += ("mscale", "mscale_all_dim", "truncate")
    chosen = {key: given[key] for key in optional if given.get(key) is not None}
    if kind == "longrope":
        chosen |= {key: tuple(map(float, _need(given, key))) for key in ("short_factor", "long_factor")}
    return Rope(
        dim=head_dim, theta=float(theta), kind=kind, factor=float(factor), original_max_position=original, **chosen
    )


def _hf_ropes(config: Mapping[str, Any], family: str, rope: Rope, layers: int) -> tuple[Rope | None, ...]:
    if family != "smollm3":
        return (rope,) * layers
    flags = config.get("no_rope_layers")  # despite the name: 1 = the layer has a rotary embedding
    if flags is None:
        interval = config.get("no_rope_layer_interval", 4)
        flags = [int((i + 1) % interval != 0) for i in range(layers)]
    if len(flags) != layers:
        raise ValueError(f"no_rope_layers has {len(flags)} entries for {layers} layers")
    return tuple(rope if flag else None for flag in flags)


def _hf_windows(
    config: Mapping[str, Any], family: str, ropes: tuple[Rope | None, ...]
) -> tuple[int | None, ...]:
    window, layers = config.get("sliding_window"), len(ropes)
    if family == "llama" or (family != "mistral" and not config.get("use_sliding_window", False)) or window is None:
        return (None,) * layers
    kinds = config.get("layer_types")
    if kinds is not None:
        if len(kinds) != layers or set(kinds) - {"full_attention", "sliding_attention"}:
            raise ValueError(f"layer_types must name full_attention or sliding_attention for each of {layers} layers")
        slides = [kind == "sliding_attention" for kind in kinds]
    elif family == "smollm3":
        slides = [rope is None for rope in ropes]
    else:
        first = 0 if family == "mistral" else config.get("max_window_layers", 28)
        slides = [i >= first for i in range(layers)]
    return tuple(window if slide else None for slide in slides)


def _gguf_rope(
    metadata: Mapping[str, Any], family: str, head_dim: int, longest: int, freq_factors: tuple[float, ...]
) -> Rope:
    def get(key: str, default=None):
        return metadata.get(f"{family}.rope.{key}", default)

    kind = get("scaling.type") or "none"
    kinds = {"none": "default", "linear": "linear", "yarn": "yarn"}
    if kind not in kinds:
        raise ValueError(f"GGUF rope scaling {kind!r} is not supported; the supported ones are {', '.join(kinds)}")
    dim = get("dimension_count", head_dim)
    if dim != head_dim:
        raise ValueError(f"GGUF rope over {dim} of {head_dim} channels is not supported for {family}")
    factor = float(get("scaling.factor", 1.0))
    if math.isclose(factor, 0.0):
        factor = 1.0
    return Rope(
        dim=head_dim,
        theta=float(get("freq_base", 10000.0)),
        kind=kinds[kind],
        factor=factor,
        original_max_position=get("scaling.original_context_length", longest),
        freq_factors=freq_factors,
    )
