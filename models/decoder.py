"""Decoders in Flax NNX: attention, latent attention and Mamba-2 layers, dense or with experts; used as pure functions.

A decoder is a pytree: pass it to ``jax.jit`` as an argument. It owns no cache; caches go in and come out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from memjax.attention.rope import apply_rope
from memjax.cache.layer import LayerCache, commit_all
from memjax.cache.policy import ModelCache
from memjax.cache.pools import HeadPools
from memjax.cache.spec import CacheSpec, LayerSpec
from memjax.models.config import AttentionConfig, Block, LatentConfig, MambaConfig, Mixer, ModelConfig, MoeConfig
from memjax.models.latent import LatentAttention, latent_spec
from memjax.models.mamba import Mamba, recurrent_spec
from memjax.models.mlp import MLP, MoE
from memjax.models.mtp import MtpModule
from memjax.models.norm import RMSNorm
from memjax.models.source import TensorSource, check_tensors
from memjax.models.tensors import Path, Stored, stored_copies, stored_parameters
from memjax.models.through import first_positions, read_new, through_cache


def _norm(config: ModelConfig, size: int, dtype: DTypeLike) -> RMSNorm:
    return RMSNorm(size, config.norm_eps, dtype, unit_offset=config.unit_offset)


def scaled(x: Array, factor: float) -> Array:
    """``x`` times a constant that is rounded to its dtype, as torch does."""
    return x if factor == 1.0 else x * jnp.asarray(factor, x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention that reads and writes a layer's cache, or attends to its own tokens without one."""

    def __init__(self, config: AttentionConfig, model: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int, bias: bool) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, use_bias=bias, dtype=dtype, param_dtype=dtype, rngs=rngs)

        def norm() -> RMSNorm | None:
            return _norm(model, config.head_dim, dtype) if config.qk_norm else None

        queries, keys = config.q_heads * config.head_dim, config.kv_heads * config.head_dim
        self.q = linear(model.width, queries, config.qkv_bias)
        self.k = linear(model.width, keys, config.qkv_bias)
        self.v = linear(model.width, keys, config.qkv_bias)
        self.out = linear(queries, model.width, config.out_bias)
        self.q_norm, self.k_norm, self.config = norm(), norm(), config

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: LayerCache | HeadPools | None,
        lengths: Int[Array, "B"] | None,
        compress_first: bool,
    ) -> tuple[Float[Array, "B T D"], LayerCache | HeadPools | None]:
        batch, tokens, _ = x.shape
        q, k, v = self.project(x)
        if cache is None:
            out = self._own_tokens(q, k, v)
        else:
            projection = self.out.kernel[...].reshape(q.shape[2], self.config.head_dim, -1)
            out, cache = through_cache(cache, q, k, v, lengths, compress_first, projection)
        return self.out(out.reshape(batch, tokens, -1)), cache

    def project(self, x: Float[Array, "B T D"]) -> tuple[Array, Array, Array]:
        """Queries [B, T, N, H], keys and values [B, T, K, H], not rotated yet."""
        q, k, v = (linear(x).reshape(*x.shape[:2], -1, self.config.head_dim) for linear in (self.q, self.k, self.v))
        return (q, k, v) if self.q_norm is None else (self.q_norm(q), self.k_norm(k), v)

    def _own_tokens(self, q: Array, k: Array, v: Array) -> Array:
        config, positions = self.config, first_positions(q)
        if config.rope is not None:
            q, k = (apply_rope(x, positions, config.rope, q.shape[1]) for x in (q, k))
        scale = q.shape[-1] ** -0.5 if config.scale is None else config.scale
        out, _ = read_new(q, k, v, positions, scale=scale, window=config.window, softcap=config.softcap)
        return out.astype(q.dtype)


def _mixer(mixer: Mixer, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Module:
    match mixer:
        case AttentionConfig():
            return Attention(mixer, config, dtype, rngs)
        case LatentConfig():
            return LatentAttention(mixer, config.width, dtype, rngs)
        case MambaConfig():
            return Mamba(mixer, config.width, config.norm_eps, dtype, rngs)


class Layer(nnx.Module):
    """One pre-norm decoder layer; Gemma's have norms behind the mixer and the MLP, too."""

    def __init__(self, config: ModelConfig, block: Block, dtype: DTypeLike, rngs: nnx.Rngs):
        norm = functools.partial(_norm, config, config.width, dtype)
        self.mixer_norm = norm()
        self.mixer = _mixer(block.mixer, config, dtype, rngs)
        self.mixer_post_norm = norm() if config.post_norms else None
        self.mlp_norm = norm()
        self.mlp = (MoE if isinstance(block.mlp, MoeConfig) else MLP)(block.mlp, config.width, dtype, rngs)
        self.mlp_post_norm = norm() if config.post_norms else None
        self.residual_scale = config.residual_scale

    def __call__(self, x, cache, lengths, compress_first):
        mixed, cache = self.mixer(self.mixer_norm(x), cache, lengths, compress_first)
        x = self.with_mixed(x, mixed)
        return self.with_mlp(x), cache

    def with_mixed(self, x: Float[Array, "B T D"], mixed: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The residual stream with what the mixer gave."""
        return self._add(x, mixed, self.mixer_post_norm)

    def with_mlp(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The residual stream with what the MLP makes of it."""
        return self._add(x, self.mlp(self.mlp_norm(x)), self.mlp_post_norm)

    def _add(self, x: Array, change: Array, norm: RMSNorm | None) -> Array:
        change = change if norm is None else norm(change)
        return x + scaled(change, self.residual_scale)


class Decoder(nnx.Module):
    """Token embeddings, layers, final norm and vocabulary projection; ``mtp``: modules that look further ahead, if any."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.embedding = nnx.Embed(config.vocab, config.width, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.layers = nnx.List([Layer(config, block, dtype, rngs) for block in config.blocks])
        self.norm = _norm(config, config.width, dtype)
        head = functools.partial(nnx.Linear, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.head = None if config.tied else head(config.width, config.vocab)
        ahead = [MtpModule(config, Layer(config, block, dtype, rngs), dtype, rngs) for block in config.mtp_blocks]
        self.mtp = nnx.List(ahead)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        cache: ModelCache | None = None,
        lengths: Int[Array, "B"] | None = None,
        *,
        compress_first: bool = False,
    ) -> tuple[Float[Array, "B T D"], ModelCache | None]:
        """Hidden states of new tokens, after the final norm, and the cache that has taken them in.

        Args:
          tokens: ids of the tokens that follow what the cache holds.
          cache: one entry per layer, from ``policy.init(decoder.cache_specs(...))``; None: the tokens stand alone.
          lengths: how many tokens of each row are real; the others, on the right, are padding.
          compress_first: commit the new tokens before they are read, so that even a token's own key is compressed:
            the static setting of quantization papers, for evaluation.
        """
        x = self.embed(tokens)
        caches = []
        for i, layer in enumerate(self.layers):
            x, layer_cache = layer(x, None if cache is None else cache[i], lengths, compress_first)
            caches.append(layer_cache)
        return self.norm(x), None if cache is None else commit_all(caches)

    def predict_ahead(
        self,
        hidden: Float[Array, "B T D"],
        tokens: Int[Array, "B T"],
        cache: LayerCache | None = None,
        lengths: Int[Array, "B"] | None = None,
        *,
        depth: int = 1,
        compress_first: bool = False,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Hidden states one token further ahead, by a module for multi-token prediction (``memjax.models.mtp``).

        Args:
          hidden: what ``__call__`` returned for T tokens in a row; at depth 2 and beyond what this method returned for them
            at the depth before.
          tokens: the ids ``depth`` places behind those tokens; at depth 1 the T next ones.
          cache: the module's own, an entry of ``policy.init(decoder.mtp_cache_specs(...))``, which has taken in the same
            tokens before these as the decoder's; None: the tokens stand alone.
          lengths: how many of each row are real; the others, on the right, are padding.
          depth: the module's place in ``mtp``, from 1 on.
          compress_first: as for ``__call__``.

        Returns:
          Hidden states in the dtype of ``hidden``, of which ``logits`` makes the logits of the tokens ``depth`` + 1 places
          behind, and the cache.

        Raises:
          ValueError: no module of this depth, or other shapes of ``hidden`` and ``tokens``.
        """
        if not 1 <= depth <= len(self.mtp):
            raise ValueError(
                f"the decoder has {len(self.mtp)} modules for multi-token prediction, none of depth {depth!r}; they are "
                "loaded with mtp=True"
            )
        if hidden.shape != (*tokens.shape, self.config.width):
            raise ValueError(
                f"hidden states must be [B, T, {self.config.width}] for tokens [B, T], got {list(hidden.shape)} and "
                f"{list(tokens.shape)}"
            )
        hidden, cache = self.mtp[depth - 1](self.embed(tokens), hidden, cache, lengths, compress_first)
        return hidden, None if cache is None else commit_all((cache,))[0]

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """What the first layer reads."""
        return scaled(self.embedding(tokens), self.config.embedding_scale)

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Next-token logits, float32."""
        logits, cap = self._projected(hidden) * jnp.float32(self.config.logits_scale), self.config.logits_softcap
        return logits if cap is None else cap * jnp.tanh(logits / jnp.float32(cap))

    def _projected(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        if self.head is not None:
            return self.head(hidden).astype(jnp.float32)
        # Contracting the embedding where it lies; nnx.Embed.attend would transpose a copy of it on the CPU.
        table = self.embedding.embedding[...]
        dims = (((hidden.ndim - 1,), (1,)), ((), ()))
        return jax.lax.dot_general(hidden, table, dims).astype(jnp.float32)

    def cache_specs(self, batch: int, capacity: int, dtype: str | None = None) -> tuple[LayerSpec, ...]:
        """What each layer asks of a cache; ``dtype`` None: the dtype of the weights."""
        return cache_specs(self.config, batch, capacity, dtype or str(jnp.dtype(self.embedding.dtype)))

    def mtp_cache_specs(self, batch: int, capacity: int, dtype: str | None = None) -> tuple[LayerSpec, ...]:
        """What each module for multi-token prediction asks of a cache; ``dtype`` None: the dtype of the weights."""
        return mtp_cache_specs(self.config, batch, capacity, dtype or str(jnp.dtype(self.embedding.dtype)))


def cache_specs(config: ModelConfig, batch: int, capacity: int, dtype: str = "bfloat16") -> tuple[LayerSpec, ...]:
    """What each layer of a model asks of a cache, without the model; for ``config.mtp_blocks`` see ``mtp_cache_specs``."""
    return _specs(config.blocks, batch, capacity, dtype)


def mtp_cache_specs(config: ModelConfig, batch: int, capacity: int, dtype: str = "bfloat16") -> tuple[LayerSpec, ...]:
    """What each module for multi-token prediction asks of a cache, without the model."""
    return _specs(config.mtp_blocks, batch, capacity, dtype)


def _specs(blocks: Sequence[Block], batch: int, capacity: int, dtype: str) -> tuple[LayerSpec, ...]:
    def spec(mixer: Mixer) -> LayerSpec:
        match mixer:
            case LatentConfig():
                return latent_spec(mixer, batch, capacity, dtype)
            case MambaConfig():
                return recurrent_spec(mixer, batch)
            case AttentionConfig():
                return CacheSpec(
                    batch,
                    mixer.kv_heads,
                    mixer.head_dim,
                    capacity,
                    dtype,
                    rope=mixer.rope,
                    scale=mixer.scale,
                    window=mixer.window,
                    softcap=mixer.softcap,
                    q_heads=mixer.q_heads,
                )

    return tuple(spec(block.mixer) for block in blocks)


def load_decoder(
    config: ModelConfig,
    source: TensorSource,
    dtype: DTypeLike = jnp.float32,
    progress: Callable[[str], None] | None = None,
) -> Decoder:
    """A decoder with the weights of a checkpoint, each tensor read once, those of one parameter at a time.

    Args:
      progress: called with each tensor's name, of ``expected_tensors``, once it is in place.

    Raises:
      ValueError: missing, unexpected or misshapen tensors, found before any is read; copies that differ from their originals.
    """
    check_tensors(config, source)
    abstract = nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    variables, filled = dict(nnx.to_flat_state(state)), {}
    for names, places in _by_tensors(stored_parameters(config)).items():
        read = [source.read(name) for name in names]
        tensor = np.stack(read) if len(read) > 1 else read[0]
        for path, place in places:
            variable = variables[path]
            filled[path] = variable.replace(jnp.asarray(place(tensor), dtype=variable.get_value().dtype))
        if progress is not None:
            for name in names:
                progress(name)
    _check_copies(config, source, filled)
    return nnx.merge(graphdef, nnx.from_flat_state(list(filled.items())))


def _check_copies(config: ModelConfig, source: TensorSource, filled: Mapping[Path, nnx.Variable]) -> None:
    """Raises ValueError if a module for multi-token prediction brings an embedding or a head that is not the decoder's."""
    stored = source.names()
    for name, (path, original) in stored_copies(config).items():
        if name not in stored:
            continue
        kept = filled[path].get_value()
        if not jnp.array_equal(jnp.asarray(original.place(source.read(name)), dtype=kept.dtype), kept):
            raise ValueError(
                f"tensor {name} is not a copy of {original.names[0]}, which multi-token prediction shares with the model; "
                "without it in the checkpoint the model's is used"
            )


def _by_tensors(stored: Mapping[Path, Stored]) -> dict[tuple[str, ...], list[tuple[Path, Callable]]]:
    """Parameters by the tensors that they are made of: keys' and values' up-projections, say, lie in one."""
    found: dict[tuple[str, ...], list[tuple[Path, Callable]]] = {}
    for path, each in stored.items():
        found.setdefault(each.names, []).append((path, each.place))
    return found
