"""The twins: one small decoder with five mixers, whose MLPs are as wide as makes their parameters equal.

| mixer | a token leaves in the cache of a layer |
|---|---|
| mha | keys and values of all heads |
| gqa | of ``Size.kv_heads`` heads (arXiv 2305.13245) |
| mqa | of one head (arXiv 1911.02150) |
| mla | one latent of four heads' channels and a rotary part of half a head, DeepSeek-V2's ratio (arXiv 2405.04434) |
| hybrid | nothing in three layers of four, Mamba-2 (arXiv 2405.21060); the other one is that of gqa |
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

import jax
from flax import nnx

from memjax.attention.rope import Rope
from memjax.models.config import AttentionConfig, Block, LatentConfig, MambaConfig, Mixer, MlpConfig, ModelConfig
from memjax.models.decoder import Decoder

MIXERS = ("mha", "gqa", "mqa", "mla", "hybrid")
CLOSENESS = 0.01  # how far a twin's parameters may lie from those of mha
_PERIOD, _ATTENTION = 4, 2  # of four layers of the hybrid the third is attention, as published hybrids put it inside


@dataclass(frozen=True, kw_only=True)
class Size:
    """Shapes that all twins share, and how they are trained unless said otherwise.

    Attributes:
      width, layers: of the residual stream.
      heads, head_dim: of attention.
      kv_heads: of gqa, and of the hybrid's attention.
      mlp_width: of mha; the others' follows.
      multiple: MLP widths are multiples of it.
      mamba_head_dim, state_dim: of Mamba-2, whose heads have 2 * width channels in all.
      context, batch: bytes of a sequence, sequences of a step.
      steps, rate: of training.
    """

    width: int
    layers: int
    heads: int
    head_dim: int
    kv_heads: int
    mlp_width: int
    multiple: int = 1
    mamba_head_dim: int
    state_dim: int
    context: int
    batch: int
    steps: int
    rate: float


SIZES = {
    "smoke": Size(
        width=128,
        layers=4,
        heads=8,
        head_dim=16,
        kv_heads=2,
        mlp_width=344,
        mamba_head_dim=32,
        state_dim=32,
        context=128,
        batch=8,
        steps=240,
        rate=3e-3,
    ),
    "real": Size(
        width=512,
        layers=8,
        heads=8,
        head_dim=64,
        kv_heads=2,
        mlp_width=1408,
        multiple=8,
        mamba_head_dim=64,
        state_dim=128,
        context=512,
        batch=32,
        steps=4000,
        rate=1e-3,
    ),
}


def twin_config(mixer: str, size: str | Size, vocab: int = 256) -> ModelConfig:
    """The configuration of a twin.

    Args:
      mixer: one of ``MIXERS``.
      size: the name of one of ``SIZES``, or shapes of one's own.

    Raises:
      ValueError: an unknown mixer or size, or shapes at which no MLP width makes the parameters equal to those of mha
        within ``CLOSENESS``.
    """
    if mixer not in MIXERS:
        raise ValueError(f"mixer {mixer!r} is not one of {', '.join(MIXERS)}")
    return _twin(mixer, sized(size), vocab)


def sized(size: str | Size) -> Size:
    """The shapes of a named size.

    Raises:
      ValueError: an unknown name.
    """
    if isinstance(size, Size):
        return size
    if size not in SIZES:
        raise ValueError(f"size {size!r} is not one of {', '.join(SIZES)}")
    return SIZES[size]


@functools.lru_cache(maxsize=64)
def parameters(config: ModelConfig) -> int:
    """How many numbers a decoder learns, counted on abstract shapes."""
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract))


@functools.lru_cache(maxsize=64)
def _twin(mixer: str, size: Size, vocab: int) -> ModelConfig:
    wanted = parameters(_config("mha", size, vocab, size.mlp_width))
    if mixer == "mha":
        return _config("mha", size, vocab, size.mlp_width)
    first = size.multiple
    least, each = parameters(_config(mixer, size, vocab, first)), 3 * first * size.width * size.layers
    more = max(0, round((wanted - least) / each))
    found = least + more * each
    if abs(found - wanted) > CLOSENESS * wanted:
        raise ValueError(
            f"no MLP width, in multiples of {first}, gives {mixer} the {wanted:,} parameters of mha within {CLOSENESS:.0%}; "
            f"the nearest is {found:,}: make mlp_width larger"
        )
    return _config(mixer, size, vocab, first * (1 + more))


def _config(mixer: str, size: Size, vocab: int, mlp_width: int) -> ModelConfig:
    return ModelConfig(
        family="twin",
        vocab=vocab,
        width=size.width,
        blocks=tuple(Block(_mixer(mixer, size, layer), MlpConfig(width=mlp_width)) for layer in range(size.layers)),
        norm_eps=1e-5,
        max_position=size.context,
        tied=True,
    )


def _mixer(mixer: str, size: Size, layer: int) -> Mixer:
    grouped = AttentionConfig(
        q_heads=size.heads, kv_heads=size.kv_heads, head_dim=size.head_dim, rope=Rope(size.head_dim)
    )
    match mixer:
        case "mha":
            return dataclasses.replace(grouped, kv_heads=size.heads)
        case "mqa":
            return dataclasses.replace(grouped, kv_heads=1)
        case "mla":
            return LatentConfig(
                q_heads=size.heads,
                q_rank=None,
                kv_rank=4 * size.head_dim,
                nope_dim=size.head_dim,
                rope_dim=size.head_dim // 2,
                value_dim=size.head_dim,
                rope=Rope(size.head_dim // 2),
            )
        case "hybrid" if layer % _PERIOD != _ATTENTION:
            heads = 2 * size.width // size.mamba_head_dim
            return MambaConfig(heads=heads, head_dim=size.mamba_head_dim, state_dim=size.state_dim)
    return grouped
