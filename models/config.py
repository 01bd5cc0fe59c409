"""What a decoder is made of: one configuration for all families, layer by layer.

A layer is a ``Block``: a mixer (attention, latent attention or Mamba-2) and an MLP (SwiGLU or mixture of experts). What
families share has a name here; what differs between two families is a field. ``memjax.models.families`` reads the files.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from memjax.attention.rope import Rope

ACTIVATIONS = ("silu", "gelu_tanh")
SCORINGS = ("softmax", "sigmoid", "softmax_of_chosen")
MTP_FAMILIES = ("deepseek_v3", "kimi_k2", "glm4_moe_lite")  # may keep modules for multi-token prediction behind the last layer
_MOST_LAYERS = 10_000  # a file that claims more would cost memory before anything else could refuse it


def checked_size(name: str, value: Any) -> int:
    """``value``, if it is an integer of at least 1 that a model can have.

    Raises:
      ValueError: anything else.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
        raise ValueError(f"a model needs {name} to be an integer >= 1, got {value!r}")
    if name.endswith(("layers", "block_count")) and value > _MOST_LAYERS:
        raise ValueError(f"{name} is {value}; at most {_MOST_LAYERS} layers are accepted")
    return value


def _check_sizes(owner: Any, *names: str) -> None:
    for name in names:
        checked_size(name, getattr(owner, name))


def _check_eps(eps: Any) -> None:
    if not (isinstance(eps, float) and 0.0 < eps < 1.0):
        raise ValueError(f"a model needs norm_eps between 0 and 1, got {eps!r}")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Grouped-query attention.

    Attributes:
      q_heads, kv_heads, head_dim: sizes.
      rope: the rotary embedding; None: a layer without one (NoPE).
      window: the sliding window: query i sees keys i - W + 1 .. i. None: all.
      scale: factor on q . k; None: head_dim ** -0.5.
      softcap: c * tanh(score / c) on every score.
      qkv_bias, out_bias: biases of the projections.
      qk_norm: an RMS norm on each head's queries and keys.
    """

    q_heads: int
    kv_heads: int
    head_dim: int
    rope: Rope | None
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self):
        _check_sizes(self, "q_heads", "kv_heads", "head_dim")
        if self.q_heads % self.kv_heads:
            raise ValueError(f"query heads ({self.q_heads}) must be a multiple of kv heads ({self.kv_heads})")
        if self.window is not None:
            checked_size("every sliding window", self.window)


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

    Attributes:
      q_heads: query heads, N.
      q_rank: size of the queries' latent; None: queries are projected directly.
      kv_rank: size of the latent that keys and values are made from: what the cache holds, with the rotary part.
      nope_dim, rope_dim: channels of a head's query and key without and with rotary embedding.
      value_dim: channels of a head's value.
      rope: of the rotary part, ``rope_dim`` channels from 0 on; None: not rotated.
      scale: factor on q . k; None: (nope_dim + rope_dim) ** -0.5.
      latent_norm: RMS norms on the latents, with their own ``norm_eps``.
      bias: biases of the projections into the latents and of the output's.
    """

    q_heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    rope: Rope | None
    scale: float | None = None
    latent_norm: bool = True
    norm_eps: float = 1e-6
    bias: bool = False

    def __post_init__(self):
        _check_sizes(self, "q_heads", "kv_rank", "nope_dim", "rope_dim", "value_dim")
        if self.q_rank is not None:
            checked_size("q_rank", self.q_rank)
        _check_eps(self.norm_eps)
        if self.rope is not None and (self.rope.dim != self.rope_dim or self.rope.start):
            raise ValueError(
                f"latent attention rotates all of its rope_dim={self.rope_dim} channels, got a rope of {self.rope.dim} from "
                f"channel {self.rope.start} on"
            )


@dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """Mamba-2 (arXiv 2405.21060).

    Attributes:
      heads, head_dim, state_dim: shape of the state per sequence.
      groups: input and output matrices B and C, each shared by heads / groups heads.
      conv_width: kernel of the causal convolution.
      chunk: tokens that the parallel form takes at a time.
      conv_bias, bias: biases of the convolution, of the projections.
      step_limits: smallest and largest step size.
    """

    heads: int
    head_dim: int
    state_dim: int
    groups: int = 1
    conv_width: int = 4
    chunk: int = 256
    conv_bias: bool = True
    bias: bool = False
    step_limits: tuple[float, float] = (0.0, math.inf)

    def __post_init__(self):
        _check_sizes(self, "heads", "head_dim", "state_dim", "groups", "conv_width", "chunk")
        if self.heads % self.groups:
            raise ValueError(f"Mamba heads ({self.heads}) must be a multiple of its groups ({self.groups})")

    @property
    def inner(self) -> int:
        """Channels of all heads."""
        return self.heads * self.head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: of x, B and C."""
        return self.inner + 2 * self.groups * self.state_dim


@dataclass(frozen=True, kw_only=True)
class MlpConfig:
    """A gated MLP (SwiGLU, GEGLU; arXiv 2002.05202) of ``width`` hidden channels."""

    width: int
    activation: str = "silu"
    bias: bool = False

    def __post_init__(self):
        _check_sizes(self, "width")
        _check_activation(self.activation)


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Routed experts, each a gated MLP, and one that sees every token.

    Attributes:
      experts, chosen: how many there are, and how many a token goes to.
      width: hidden channels of an expert.
      shared_width: hidden channels of the expert that sees every token; None: there is none.
      scoring: "softmax" of all router logits, "sigmoid" of each, or "softmax_of_chosen": the softmax of the chosen logits.
      groups, kept_groups: of so many groups of experts the best are kept before the choice; a group's score is its best
        expert's, or the sum of its two best if there is a ``score_bias``.
      score_bias: numbers that are added to the scores for the choice, but not to the weights (DeepSeek-V3).
      normalise: the chosen weights add up to 1 (before ``scale``).
      scale: factor on the chosen weights.
    """

    experts: int
    chosen: int
    width: int
    shared_width: int | None = None
    activation: str = "silu"
    scoring: str = "softmax"
    groups: int = 1
    kept_groups: int = 1
    score_bias: bool = False
    normalise: bool = False
    scale: float = 1.0

    def __post_init__(self):
        _check_sizes(self, "experts", "chosen", "width", "groups", "kept_groups")
        if self.shared_width is not None:
            checked_size("shared_width", self.shared_width)
        _check_activation(self.activation)
        if self.scoring not in SCORINGS:
            raise ValueError(f"router scoring {self.scoring!r} is not one of {', '.join(SCORINGS)}")
        if self.experts % self.groups or not self.kept_groups <= self.groups:
            raise ValueError(
                f"{self.experts} experts cannot lie in {self.groups} equal groups of which {self.kept_groups} are kept"
            )
        if self.chosen > self.experts // self.groups * self.kept_groups:
            raise ValueError(
                f"a token cannot go to {self.chosen} of {self.experts // self.groups * self.kept_groups} experts that are kept"
            )


def _check_activation(name: str) -> None:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not one of {', '.join(ACTIVATIONS)}")


Mixer = AttentionConfig | LatentConfig | MambaConfig
Mlp = MlpConfig | MoeConfig
_KINDS = {
    "attention": AttentionConfig,
    "latent": LatentConfig,
    "mamba": MambaConfig,
    "mlp": MlpConfig,
    "moe": MoeConfig,
}


@dataclass(frozen=True)
class Block:
    """One layer: ``mixer`` lets tokens see each other, ``mlp`` works on each alone."""

    mixer: Mixer
    mlp: Mlp


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder. Frozen and hashable.

    Attributes:
      family: its Hugging Face model_type: the names of its tensors.
      vocab, width: sizes.
      blocks: its layers.
      mtp_blocks: the layers of its modules for multi-token prediction, one each; none: the decoder has no such modules.
      max_position: length that the model was made for, in tokens.
      tied: the vocabulary projection is the embedding.
      unit_offset: norms multiply by 1 + weight, in float32 (Gemma).
      post_norms: a norm on what a mixer and an MLP give, too (Gemma).
      embedding_scale: factor on the embeddings.
      residual_scale: factor on what a mixer and an MLP add.
      logits_scale: factor on the logits.
      logits_softcap: c * tanh(logit / c) on every logit.
      bos_id: the id that begins a text.
      eos_ids: ids that end a generation.

    Raises:
      ValueError: sizes that do not fit together.
    """

    family: str
    vocab: int
    width: int
    blocks: tuple[Block, ...]
    norm_eps: float
    max_position: int
    tied: bool = False
    unit_offset: bool = False
    post_norms: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    logits_softcap: float | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    mtp_blocks: tuple[Block, ...] = ()

    def __post_init__(self):
        _check_sizes(self, "vocab", "width", "layers", "max_position")
        _check_eps(self.norm_eps)
        if self.mtp_blocks and self.family not in MTP_FAMILIES:
            raise ValueError(f"multi-token prediction is supported for {', '.join(MTP_FAMILIES)} only, not for {self.family}")

    @property
    def layers(self) -> int:
        """How many there are."""
        return len(self.blocks)

    @property
    def ropes(self) -> tuple[Rope | None, ...]:
        """The rotary embedding of each layer; None: it has none."""
        return tuple(getattr(block.mixer, "rope", None) for block in self.blocks)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The sliding window of each layer; None: it has none."""
        return tuple(getattr(block.mixer, "window", None) for block in self.blocks)

    def to_json(self) -> dict:
        """A JSON-compatible dict; ``from_json`` inverts it."""
        return dataclasses.asdict(self) | {key: _parts(getattr(self, key)) for key in ("blocks", "mtp_blocks")}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Inverts ``to_json``.

        Raises:
          ValueError: a field is missing, unknown, or of an impossible value.
        """
        try:
            blocks = {"blocks": _from_parts(data["blocks"]), "mtp_blocks": _from_parts(data.get("mtp_blocks", ()))}
            return cls(**_tuples(data) | blocks)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"this is no saved model configuration: {error}") from error


def _parts(blocks: tuple[Block, ...]) -> list[list[dict[str, Any]]]:
    return [[_part(block.mixer), _part(block.mlp)] for block in blocks]


def _part(part: Mixer | Mlp) -> dict[str, Any]:
    return {"kind": _kind(part)} | dataclasses.asdict(part)


def _from_parts(data: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> tuple[Block, ...]:
    return tuple(Block(_from_part(mixer), _from_part(mlp)) for mixer, mlp in data)


def _tuples(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}


def _from_part(data: Mapping[str, Any]) -> Mixer | Mlp:
    fields = _tuples(data)
    if fields.get("rope") is not None:
        fields["rope"] = Rope(**_tuples(fields["rope"]))
    return _KINDS[fields.pop("kind")](**fields)


def check_attention(config: ModelConfig, task: str) -> None:
    """Raises ValueError if ``task``, which looks into attention layers, meets one of another kind."""
    for i, block in enumerate(config.blocks):
        if not isinstance(block.mixer, AttentionConfig):
            raise ValueError(f"{task} needs keys and values in all layers, but layer {i} is {_kind(block.mixer)}")


def _kind(part: Mixer | Mlp) -> str:
    return next(kind for kind, of in _KINDS.items() if type(part) is of)


def llama_config(
    *,
    family: str = "llama",
    layers: int,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    mlp_width: int,
    ropes: tuple[Rope | None, ...],
    windows: tuple[int | None, ...] = (),
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    **rest: Any,
) -> ModelConfig:
    """A decoder of the Llama family: layers of one size that differ in rotary embedding and window only.

    Args:
      ropes, windows: one for each layer; no windows: none has one.
      rest: fields of ``ModelConfig``; for the others see ``AttentionConfig`` and ``MlpConfig``.

    Raises:
      ValueError: as ``ModelConfig``; ropes or windows that are not one per layer.
    """
    checked_size("layers", layers)
    windows = windows or (None,) * layers
    if len(ropes) != layers or len(windows) != layers:
        raise ValueError(
            f"a model of {layers} layers needs as many rope and window entries, got {len(ropes)} and {len(windows)}"
        )
    attention = AttentionConfig(
        q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim, rope=None, qkv_bias=qkv_bias, out_bias=out_bias, qk_norm=qk_norm
    )
    mlp = MlpConfig(width=mlp_width, bias=mlp_bias)
    blocks = tuple(
        Block(dataclasses.replace(attention, rope=rope, window=window), mlp)
        for rope, window in zip(ropes, windows, strict=True)
    )
    return ModelConfig(family=family, blocks=blocks, **rest)
