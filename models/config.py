"""Model configurations: one form, read from Hugging Face's config.json (transformers 4 and 5) and from GGUF metadata."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from memjax.attention.rope import ROPE_KINDS, Rope

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
# As GGUF files name them: Mistral's checkpoints are stored as llama.
GGUF_FAMILIES = ("llama", "qwen2", "qwen3", "smollm3")
_MOST_LAYERS = 10_000  # a file that claims more would cost memory before anything else could refuse it
_SLIDING, _FULL = "sliding_attention", "full_attention"


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
            _checked_size(name, getattr(self, name))
        if not (isinstance(self.norm_eps, float) and 0.0 < self.norm_eps < 1.0):
            raise ValueError(f"a model needs norm_eps between 0 and 1, got {self.norm_eps!r}")
        if self.q_heads % self.kv_heads:
            raise ValueError(f"query heads ({self.q_heads}) must be a multiple of kv heads ({self.kv_heads})")
        if len(self.ropes) != self.layers or len(self.windows) != self.layers:
            raise ValueError(
                f"a model of {self.layers} layers needs as many rope and window entries, "
                f"got {len(self.ropes)} and {len(self.windows)}"
            )
        for window in self.windows:
            if window is not None:
                _checked_size("every sliding window", window)

    def to_json(self) -> dict:
        """A JSON-compatible dict; ``from_json`` inverts it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Inverts ``to_json``.

        Raises:
          ValueError: a field is missing, unknown, or of an impossible value.
        """

        def plain(entry: Mapping[str, Any]) -> dict[str, Any]:
            return {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}

        try:
            ropes = tuple(None if entry is None else Rope(**plain(entry)) for entry in data["ropes"])
            return cls(**plain(data) | {"ropes": ropes})
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"this is no saved model configuration: {error}") from error

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
        layers, heads, width, longest = (
            _size(config, key)
            for key in ("num_hidden_layers", "num_attention_heads", "hidden_size", "max_position_embeddings")
        )
        head_dim = _hf_head_dim(config, family, width, heads)
        bias = family == "qwen2" or bool(config.get("attention_bias", False))
        rotary = _hf_rotary_layers(config, family, layers)
        rope = _hf_rope(config, family, head_dim, longest)
        return cls(
            family=family,
            vocab=_size(config, "vocab_size"),
            width=width,
            layers=layers,
            q_heads=heads,
            kv_heads=_hf_kv_heads(config, family, heads),
            head_dim=head_dim,
            mlp_width=_size(config, "intermediate_size"),
            norm_eps=_number(config, "rms_norm_eps"),
            max_position=longest,
            ropes=tuple(rope if flag else None for flag in rotary),
            windows=_hf_windows(config, family, rotary),
            tied=bool(config.get("tie_word_embeddings", family == "smollm3")),
            qkv_bias=bias,
            out_bias=bias and family != "qwen2",
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            bos_id=next(iter(token_ids(config.get("bos_token_id"))), None),
            eos_ids=token_ids(config.get("eos_token_id")),
        )

    @classmethod
    def from_gguf(
        cls, metadata: Mapping[str, Any], tensors: Collection[str], freq_factors: tuple[float, ...] = ()
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
            _size(metadata, f"{family}.{key}")
            for key in ("block_count", "attention.head_count", "embedding_length", "context_length")
        )
        head_dim = _size(metadata, f"{family}.attention.key_length", width // heads)
        if _size(metadata, f"{family}.attention.value_length", head_dim) != head_dim:
            raise ValueError(f"GGUF values whose length differs from the keys' ({head_dim}) are not supported for {family}")
        vocab = metadata.get(f"{family}.vocab_size") or len(_need(metadata, "tokenizer.ggml.tokens"))
        rope = _gguf_rope(metadata, family, head_dim, longest, freq_factors)
        return cls(
            family=family,
            vocab=_checked_size(f"{family}.vocab_size", vocab),
            width=width,
            layers=layers,
            q_heads=heads,
            kv_heads=_size(metadata, f"{family}.attention.head_count_kv", heads),
            head_dim=head_dim,
            mlp_width=_size(metadata, f"{family}.feed_forward_length"),
            norm_eps=_number(metadata, f"{family}.attention.layer_norm_rms_epsilon"),
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


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """The ids of a configuration's bos_token_id or eos_token_id: one, several or none.

    Raises:
      ValueError: anything else.
    """
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ValueError(f"token ids must be integers >= 0, got {value!r}")
    return tuple(ids)


def gguf_eos_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids that end a text, a turn or a message, sorted."""
    ids = {metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")} - {None}
    return tuple(sorted(ids))


def _need(config: Mapping[str, Any], key: str):
    value = config.get(key)
    if value is None:
        raise ValueError(f"the model's configuration lacks {key!r}")
    return value


def _checked_size(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
        raise ValueError(f"a model needs {name} to be an integer >= 1, got {value!r}")
    if name.endswith(("layers", "block_count")) and value > _MOST_LAYERS:
        raise ValueError(f"{name} is {value}; at most {_MOST_LAYERS} layers are accepted")
    return value


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    if default is not None and config.get(key) is None:
        return default
    return _checked_size(key, _need(config, key))


def _number(config: Mapping[str, Any], key: str) -> float:
    value = _need(config, key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"a model needs {key} to be a finite number, got {value!r}")
    return float(value)


def _hf_head_dim(config: Mapping[str, Any], family: str, width: int, heads: int) -> int:
    # Qwen3's heads are wider than width / heads; its class default is no fact about a checkpoint.
    return _size(config, "head_dim", None if family == "qwen3" else width // heads)


def _hf_kv_heads(config: Mapping[str, Any], family: str, heads: int) -> int:
    if "num_key_value_heads" not in config and family != "llama":
        raise ValueError(f"the configuration of a {family} model lacks 'num_key_value_heads'")
    return _size(config, "num_key_value_heads", heads)


def _hf_rope(config: Mapping[str, Any], family: str, head_dim: int, longest: int) -> Rope:
    """One rope from either spelling: rope_parameters (transformers 5) or rope_theta + rope_scaling (4)."""
    new = config.get("rope_parameters")
    given = new if new is not None else config.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise ValueError(f"rope_parameters and rope_scaling must be objects, got {given!r}")
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


def _hf_rotary_layers(config: Mapping[str, Any], family: str, layers: int) -> list[bool]:
    if family != "smollm3":
        return [True] * layers
    flags = config.get("no_rope_layers")  # despite the name: 1 = the layer has a rotary embedding
    if flags is None:
        interval = _size(config, "no_rope_layer_interval", 4)
        return [(i + 1) % interval != 0 for i in range(layers)]
    if not isinstance(flags, list) or len(flags) != layers or set(flags) - {0, 1}:
        raise ValueError(f"no_rope_layers needs {layers} entries of 0 or 1, one per layer, got {flags!r}")
    return [bool(flag) for flag in flags]


def _hf_windows(config: Mapping[str, Any], family: str, rotary: list[bool]) -> tuple[int | None, ...]:
    layers, kinds = len(rotary), config.get("layer_types")
    if kinds is not None and (len(kinds) != layers or set(kinds) - {_SLIDING, _FULL}):
        raise ValueError(f"layer_types must name {_FULL} or {_SLIDING} for each of {layers} layers, got {kinds!r}")
    if family == "mistral":
        return _mistral_windows(config, kinds, layers)
    window = config.get("sliding_window")
    if family == "llama" or not config.get("use_sliding_window", False) or window is None:
        if family == "llama" and _SLIDING in (kinds or ()):
            raise ValueError(f"layer_types with {_SLIDING} are not supported for llama")
        return (None,) * layers
    if kinds is not None:
        slides = [kind == _SLIDING for kind in kinds]
    elif family == "smollm3":
        slides = [not flag for flag in rotary]
    else:
        first = _need(config, "max_window_layers")
        slides = [i >= first for i in range(layers)]
    return tuple(window if flag else None for flag in slides)


def _mistral_windows(config: Mapping[str, Any], kinds: list[str] | None, layers: int) -> tuple[int | None, ...]:
    if "sliding_window" not in config:
        raise ValueError("the configuration of a mistral model lacks 'sliding_window' (null: every token is seen)")
    window = config["sliding_window"]
    if window is not None and _FULL in (kinds or ()):
        raise ValueError(f"a mistral model slides in every layer; layer_types with {_FULL} belong to another family")
    return (window,) * layers


_GGUF_ROPE_KINDS = {"none": "default", "linear": "linear", "yarn": "yarn"}


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
