"""The Llama family of decoders in Flax NNX: Llama, Mistral, Qwen2, Qwen3, SmolLM; used as pure functions.

A decoder is a pytree: pass it to ``jax.jit`` as an argument. It owns no cache; caches go in and come out.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from memjax.attention.attend import attend
from memjax.attention.rope import apply_rope
from memjax.cache.layer import LayerCache, commit, commit_all, update
from memjax.cache.policy import ModelCache
from memjax.cache.pools import HeadPools
from memjax.cache.spec import CacheSpec
from memjax.models.config import ModelConfig
from memjax.models.source import TensorSource, check_tensors
from memjax.pallas_kernels.codes import dense
from memjax.pallas_kernels.decode import decode
from memjax.pallas_kernels.slots import Span

STAGED_IN_ALL_LAYERS = 16  # new tokens up to which layers wait for each other, to encode theirs together


class RMSNorm(nnx.Module):
    """Root-mean-square norm: normalised in float32, cast back, then scaled, the order of the Llama checkpoints."""

    def __init__(self, dim: int, eps: float, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((dim,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return self.scale[...] * normed.astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention that reads and writes a layer's cache, or attends to its own tokens without one."""

    def __init__(self, config: ModelConfig, layer: int, dtype: DTypeLike, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int, bias: bool) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, use_bias=bias, dtype=dtype, param_dtype=dtype, rngs=rngs)

        queries, keys = config.q_heads * config.head_dim, config.kv_heads * config.head_dim
        self.q = linear(config.width, queries, config.qkv_bias)
        self.k = linear(config.width, keys, config.qkv_bias)
        self.v = linear(config.width, keys, config.qkv_bias)
        self.out = linear(queries, config.width, config.out_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps, dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps, dtype) if config.qk_norm else None
        self.head_dim, self.rope, self.window = config.head_dim, config.ropes[layer], config.windows[layer]

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
            projection = self.out.kernel[...].reshape(q.shape[2], self.head_dim, -1)
            cache = update(cache, k, v, lengths, queries=q, output_projection=projection)
            if compress_first:
                cache = commit(attend(cache, q)[1] if cache.observed else cache)
            out, cache = attend(cache, q)
            cache = cache if tokens <= STAGED_IN_ALL_LAYERS else commit(cache)
        return self.out(out.reshape(batch, tokens, -1)), cache

    def project(self, x: Float[Array, "B T D"]) -> tuple[Array, Array, Array]:
        """Queries [B, T, N, H], keys and values [B, T, K, H], not rotated yet."""
        q, k, v = (linear(x).reshape(*x.shape[:2], -1, self.head_dim) for linear in (self.q, self.k, self.v))
        return (q, k, v) if self.q_norm is None else (self.q_norm(q), self.k_norm(k), v)

    def _own_tokens(self, q: Array, k: Array, v: Array) -> Array:
        batch, tokens, heads, dim = q.shape
        positions = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (batch, tokens))
        if self.rope is not None:
            q, k = (apply_rope(x, positions, self.rope, tokens) for x in (q, k))
        groups = heads // k.shape[2]
        out, _ = decode(
            q.swapaxes(1, 2).reshape(batch, -1, groups * tokens, dim),
            dense(jnp.moveaxis(k, 1, -1)),
            dense(jnp.moveaxis(v, 1, -1)),
            q_pos=jnp.tile(positions, (1, groups)),
            k_pos=Span(jnp.zeros((batch,), jnp.int32), jnp.full((batch,), tokens, jnp.int32)),
            scale=dim**-0.5,
            window=self.window,
            implementation="xla",
        )
        return out.reshape(batch, heads, tokens, dim).swapaxes(1, 2).astype(q.dtype)


class MLP(nnx.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, use_bias=config.mlp_bias, dtype=dtype, param_dtype=dtype, rngs=rngs)

        self.gate = linear(config.width, config.mlp_width)
        self.up = linear(config.width, config.mlp_width)
        self.down = linear(config.mlp_width, config.width)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: ModelConfig, layer: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.width, config.norm_eps, dtype)
        self.attention = Attention(config, layer, dtype, rngs)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps, dtype)
        self.mlp = MLP(config, dtype, rngs)

    def __call__(self, x, cache, lengths, compress_first):
        mixed, cache = self.attention(self.attention_norm(x), cache, lengths, compress_first)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), cache


class Decoder(nnx.Module):
    """Token embeddings, layers, final norm and vocabulary projection."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.embedding = nnx.Embed(config.vocab, config.width, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.layers = nnx.List([Layer(config, i, dtype, rngs) for i in range(config.layers)])
        self.norm = RMSNorm(config.width, config.norm_eps, dtype)
        head = functools.partial(nnx.Linear, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.head = None if config.tied else head(config.width, config.vocab)

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
        x = self.embedding(tokens)
        caches = []
        for i, layer in enumerate(self.layers):
            x, layer_cache = layer(x, None if cache is None else cache[i], lengths, compress_first)
            caches.append(layer_cache)
        return self.norm(x), None if cache is None else commit_all(caches)

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Next-token logits, float32."""
        if self.head is not None:
            return self.head(hidden).astype(jnp.float32)
        # Contracting the embedding where it lies; nnx.Embed.attend would transpose a copy of it on the CPU.
        table = self.embedding.embedding[...]
        dims = (((hidden.ndim - 1,), (1,)), ((), ()))
        return jax.lax.dot_general(hidden, table, dims).astype(jnp.float32)

    def cache_specs(self, batch: int, capacity: int, dtype: str | None = None) -> tuple[CacheSpec, ...]:
        """What each layer asks of a cache; ``dtype`` None: the dtype of the weights."""
        return cache_specs(self.config, batch, capacity, dtype or str(jnp.dtype(self.embedding.dtype)))


def cache_specs(config: ModelConfig, batch: int, capacity: int, dtype: str = "bfloat16") -> tuple[CacheSpec, ...]:
    """What each layer of a model asks of a cache, without the model."""
    one = CacheSpec(batch, config.kv_heads, config.head_dim, capacity, dtype, q_heads=config.q_heads)
    return tuple(
        dataclasses.replace(one, rope=rope, window=window)
        for rope, window in zip(config.ropes, config.windows, strict=True)
    )


_TENSORS = {
    ("embedding", "embedding"): "model.embed_tokens.weight",
    ("norm", "scale"): "model.norm.weight",
    ("head", "kernel"): "lm_head.weight",
    ("attention_norm", "scale"): "input_layernorm.weight",
    ("mlp_norm", "scale"): "post_attention_layernorm.weight",
    ("attention", "q_norm", "scale"): "self_attn.q_norm.weight",
    ("attention", "k_norm", "scale"): "self_attn.k_norm.weight",
}
_LINEARS = {
    ("attention", "q"): "self_attn.q_proj",
    ("attention", "k"): "self_attn.k_proj",
    ("attention", "v"): "self_attn.v_proj",
    ("attention", "out"): "self_attn.o_proj",
    ("mlp", "gate"): "mlp.gate_proj",
    ("mlp", "up"): "mlp.up_proj",
    ("mlp", "down"): "mlp.down_proj",
}
_TENSORS |= {(*path, "kernel"): f"{name}.weight" for path, name in _LINEARS.items()}
_TENSORS |= {(*path, "bias"): f"{name}.bias" for path, name in _LINEARS.items()}


def tensor_name(path: tuple) -> str:
    """The Hugging Face name of a parameter of ``Decoder``."""
    if path[0] == "layers":
        return f"model.layers.{path[1]}.{_TENSORS[path[2:]]}"
    return _TENSORS[path]


def load_decoder(
    config: ModelConfig,
    source: TensorSource,
    dtype: DTypeLike = jnp.float32,
    progress: Callable[[str], None] | None = None,
) -> Decoder:
    """A decoder with the weights of a checkpoint, read one tensor at a time.

    Args:
      progress: called with each tensor's name once it is in place.

    Raises:
      ValueError: missing, unexpected or misshapen tensors, found before any is read.
    """
    check_tensors(config, source)
    abstract = nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    filled = []
    for path, variable in nnx.to_flat_state(state):
        name = tensor_name(path)
        tensor = source.read(name)
        tensor = tensor.T if path[-1] == "kernel" else tensor
        filled.append((path, variable.replace(jnp.asarray(tensor, dtype=dtype))))
        if progress is not None:
            progress(name)
    return nnx.merge(graphdef, nnx.from_flat_state(filled))
