"""``convert``: a model with grouped-query attention becomes one with latent attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from memjax.cache.ledger import predict_nbytes
from memjax.cache.parts import dense
from memjax.convert.mla import (
    Component,
    Distances,
    GroupedQuery,
    Latent,
    components,
    frequency_rope,
    keep_pairs,
    rotary_freqs,
    to_latent,
)
from memjax.evaluate.layerwise import next_hidden
from memjax.models.config import AttentionConfig, Block, LatentConfig, ModelConfig, check_attention
from memjax.models.decoder import Decoder, Layer
from memjax.models.load import LanguageModel

WINDOW = 256  # tokens of a calibration text that are read at once
FIRST = 0.05  # what a window's first token counts beside the mean of all: heads rest their attention on it
BALANCE = 2.0  # energy of plain keys against values in the joint compression
_ROPES = ("default", "linear", "llama3")


def convert(
    model: LanguageModel,
    rank: int | None = None,
    rope_dim: int | None = None,
    texts: Sequence[Sequence[int]] = (),
    *,
    fold: int = 1,
    plain: bool = False,
    distances: Distances | None = None,
    balance: float | None = None,
    moments: Sequence[Float[np.ndarray, "D D"]] | None = None,
    progress: Callable[[str], None] | None = None,
) -> LanguageModel:
    """``model`` with latent attention (MLA) in the place of grouped-query attention: ``memjax.convert.mla`` says how.

    Its cache holds (rank + rope_dim) numbers per token and layer instead of 2 K H. Exact, up to rounding, with the defaults
    rope_dim = rank = K H, which save nothing; with a smaller rope_dim, a rank of 2 K H - rope_dim loses nothing but
    rotations. The softmax scale stays the original's, queries keep their H channels and get rope_dim rotary ones, and latents
    have no norm. Biases, sliding windows, soft caps, norms on queries and keys and layers without a rotary embedding have no
    place in the form that is made here.

    Args:
      rank: channels of the latent, up to 2 K H - rope_dim; None: K H, which is lossless where rope_dim is K H.
      rope_dim: rotary channels, even, up to K H, the same in all layers; None: K H.
      texts: token ids to calibrate on, cut into windows of ``WINDOW``; a few thousand of several kinds. None are needed where
        the conversion is exact.
      fold: so many neighbouring frequencies are taken as one (FreqFold).
      plain: TransMLA as published, without the deviations that ``memjax.convert.mla`` lists.
      distances: how far queries look back, for the choice of rotary pairs.
      balance: energy of plain keys against values in the joint compression; None: ``BALANCE``, and 1 if ``plain``.
      moments: what ``input_moments`` gave, in the place of texts, for several conversions of one model.
      progress: called with each layer that is done.

    Returns:
      A model of family "deepseek_v2", which here only names tensors; ``save_model`` writes it, ``load`` reads it.

    Raises:
      ValueError: a model that cannot be converted, sizes that do not fit it, or texts that are too short.
    """
    mixer = _checked(model.config)
    whole = mixer.kv_heads * mixer.head_dim
    rope_dim = whole if rope_dim is None else rope_dim
    rank = whole if rank is None else rank
    _check_sizes(mixer, rank, rope_dim, fold)
    exact = rope_dim == whole and rank == whole
    if not exact and moments is None and not sum(len(text) for text in texts):
        raise ValueError(f"rank {rank} and rope_dim {rope_dim} lose something: give texts to calibrate on")
    distances = None if plain else distances or Distances()
    layers = [grouped_query(layer) for layer in model.decoder.layers]
    if moments is None:
        first = 0.0 if plain else FIRST
        moments = [np.eye(model.config.width)] * len(layers) if exact else input_moments(model, texts, progress, first)
    groups = [components(a, m, mixer.rope, fold, plain) for a, m in zip(layers, moments, strict=True)]
    kept = keep_pairs(groups, rope_dim // 2, distances or Distances(), plain)
    balance = (1.0 if plain else BALANCE) if balance is None else balance
    made = []
    for i, (attention, moment, own) in enumerate(zip(layers, moments, groups, strict=True)):
        made.append(to_latent(attention, moment, own, kept, rank, distances, balance, plain))
        if progress is not None:
            progress(f"converted layer {i + 1} of {len(layers)}")
    config = _latent_config(model.config, mixer, rank, groups[0], kept)
    decoder = _decoder(model.decoder, config, made)
    return dataclasses.replace(model, name=f"{model.name}-mla-{rank}-{rope_dim}", decoder=decoder)


def grouped_query(layer: Layer) -> GroupedQuery:
    """The projections of a layer's attention."""
    mixer, size = layer.mixer, layer.mixer.config.head_dim
    q, k, v = (np.asarray(each.kernel[...], np.float64) for each in (mixer.q, mixer.k, mixer.v))
    out = np.asarray(mixer.out.kernel[...], np.float64)
    heads = (each.reshape(len(each), -1, size) for each in (q, k, v))
    return GroupedQuery(*heads, out.reshape(-1, size, out.shape[1]))


def input_moments(
    model: LanguageModel,
    texts: Sequence[Sequence[int]],
    progress: Callable[[str], None] | None = None,
    first: float = FIRST,
) -> list[Float[np.ndarray, "D D"]]:
    """E[x x^T] of what each layer's attention reads, float64, over all windows of all texts, plus that of first tokens.

    Args:
      first: weight of the second term. Most heads look at a text's first token most of the time, but few tokens are one.
    """
    batches = [windows(text, WINDOW) for text in texts]
    hidden, found = [model.decoder.embed(batch) for batch in batches], []
    rows, count = sum(len(batch) for batch in batches), sum(batch.size for batch in batches)
    for i, layer in enumerate(model.decoder.layers):
        sums = [[np.asarray(each, np.float64) for each in _moments(layer, x)] for x in hidden]
        found.append(sum(each[0] for each in sums) / count + first * sum(each[1] for each in sums) / rows)
        if not np.isfinite(found[-1]).all():
            raise ValueError(f"activations of layer {i} are not finite")
        hidden = [next_hidden(layer, x) for x in hidden]
        if progress is not None:
            progress(f"read layer {i + 1} of {model.config.layers}")
    return found


def windows(text: Sequence[int], length: int) -> Int[np.ndarray, "R T"]:
    """A text cut into rows of ``length`` tokens, what is left at its end dropped; a shorter text is one row.

    Raises:
      ValueError: fewer than two tokens.
    """
    ids = np.asarray(text, np.int32)
    if ids.ndim != 1 or ids.size < 2:
        raise ValueError(f"a text needs at least 2 token ids, got an array of shape {ids.shape}")
    length = min(length, ids.size)
    return ids[: ids.size // length * length].reshape(-1, length)


@jax.jit
def _moments(layer: Layer, x: Float[Array, "R T D"]) -> tuple[Float[Array, "D D"], Float[Array, "D D"]]:
    """Sums of x x^T over all tokens, and over the rows' first ones."""
    x = layer.mixer_norm(x).astype(jnp.float32)
    return tuple(jnp.einsum("rtd,rte->de", each, each, precision=jax.lax.Precision.HIGHEST) for each in (x, x[:, :1]))


def _checked(config: ModelConfig) -> AttentionConfig:
    """The attention that all layers share, if it can be converted."""
    check_attention(config, "conversion to latent attention")
    mixer = config.blocks[0].mixer
    for i, block in enumerate(config.blocks):
        each = block.mixer
        no_place = {
            "a sliding window": each.window is not None,
            "a soft cap on scores": each.softcap is not None,
            "norms on queries and keys, which no matrix can absorb": each.qk_norm,
            "biases": each.qkv_bias or each.out_bias,
            "no rotary embedding": each.rope is None,
        }
        if found := [what for what, there in no_place.items() if there]:
            raise ValueError(f"conversion to latent attention has no place for {found[0]}, but layer {i} has that")
        if each != mixer:
            raise ValueError(f"conversion needs layers with the same attention, but layer {i} differs from layer 0")
    rope = mixer.rope
    if rope.dim != mixer.head_dim or rope.kind not in _ROPES:
        raise ValueError(
            f"conversion needs a rotary embedding of all {mixer.head_dim} channels and of kind {', '.join(_ROPES)}, got "
            f"{rope.dim} channels of kind {rope.kind!r}"
        )
    return mixer


def _check_sizes(mixer: AttentionConfig, rank: int, rope_dim: int, fold: int) -> None:
    whole = mixer.kv_heads * mixer.head_dim
    if rope_dim % 2 or not 2 <= rope_dim <= whole:
        raise ValueError(f"rope_dim must be even and between 2 and kv_heads x head_dim = {whole}, got {rope_dim}")
    if not 1 <= rank <= 2 * whole - rope_dim:
        raise ValueError(
            f"rank must lie between 1 and {2 * whole - rope_dim}, the plain keys and values that rope_dim {rope_dim} leaves, "
            f"got {rank}"
        )
    if fold < 1 or mixer.head_dim // 2 % fold:
        raise ValueError(f"fold must divide the {mixer.head_dim // 2} frequencies, got {fold}")


def _latent_config(
    config: ModelConfig, mixer: AttentionConfig, rank: int, groups: Sequence[Component], kept: Sequence[int]
) -> ModelConfig:
    rope = frequency_rope(rotary_freqs(groups, kept))
    latent = LatentConfig(
        q_heads=mixer.q_heads,
        q_rank=None,
        kv_rank=rank,
        nope_dim=mixer.head_dim,
        rope_dim=rope.dim,
        value_dim=mixer.head_dim,
        rope=rope,
        scale=mixer.head_dim**-0.5 if mixer.scale is None else mixer.scale,
        latent_norm=False,
    )
    blocks = tuple(Block(latent, block.mlp) for block in config.blocks)
    return dataclasses.replace(config, family="deepseek_v2", blocks=blocks)


def _decoder(original: Decoder, config: ModelConfig, layers: Sequence[Latent]) -> Decoder:
    """A decoder with the given attention, and everything else shared with the original."""
    dtype = original.embedding.dtype
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0))))
    kept = dict(nnx.to_flat_state(nnx.state(original)))
    made = [_parameters(layer) for layer in layers]
    filled = []
    for path, variable in nnx.to_flat_state(state):
        if path[0] == "layers" and path[2] == "mixer":
            value = jnp.asarray(made[path[1]][path[3:]], variable.get_value().dtype)
        else:
            value = kept[path].get_value()
        filled.append((path, variable.replace(value)))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def _parameters(layer: Latent) -> dict[tuple[str, ...], np.ndarray]:
    width = layer.kv_a.shape[0]
    return {
        ("q", "kernel"): layer.q.reshape(width, -1),
        ("kv_a", "kernel"): layer.kv_a,
        ("up_key",): layer.up_key,
        ("up_value",): layer.up_value,
        ("out", "kernel"): layer.out.reshape(-1, width),
    }


def bytes_per_token(model: LanguageModel, dtype: str = "bfloat16") -> int:
    """What a token adds to a dense cache of the model, all layers together, from the ledger's prediction."""
    one, two = (predict_nbytes(dense(), model.decoder.cache_specs(1, capacity, dtype)) for capacity in (1024, 2048))
    return (two.total - one.total) // 1024
