"""Multi-head latent attention (MLA): DeepSeek-V2 and V3, MiniCPM3, Youtu-LLM, GLM-4.7-Flash (arXiv 2405.04434).

    [qn_h | qr_h] = W_q x, or W_qb norm(W_qa x)           qr turned by the rotary embedding
    [a | b] = W_kva x,  c = norm(a),  kr = turned b       one latent c and one rotary part kr for all heads: the cache
    naive:     score_h = scale (qn_h . (U_h c) + qr_h . kr)        out_h = sum of p V_h c
    absorbed:  score_h = scale ((U_h^T qn_h) . c + qr_h . kr)      out_h = V_h (sum of p c)

with U_h = ``up_key[h]`` and V_h = ``up_value[h]`` transposed. Both forms are exact. The absorbed one never makes a head's keys
and values: it is attention with one kv head over what the cache holds.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from memjax.attention.attend import attend_committed, reads_apart
from memjax.attention.rope import Rope, apply_rope
from memjax.cache.layer import LayerCache, commit, staged_positions, update, written_after
from memjax.cache.spec import CacheSpec
from memjax.models.config import LatentConfig
from memjax.models.norm import RMSNorm
from memjax.models.through import first_positions, read_new, through_cache
from memjax.pallas_kernels.merge import Part, merge


def yarn_softmax_scale(dim: int, rope: Rope | None) -> float:
    """DeepSeek's factor on q . k: dim^-0.5 m^2, m = 1 + 0.1 mscale_all_dim ln(factor) under YaRN that states it, else 1.

    Args:
      dim: channels of a head's query and key, rotary ones included.

    Source: the model code of DeepSeek-V2 and V3; YaRN (arXiv 2309.00071). For DeepSeek-V2-Lite:

    >>> round(yarn_softmax_scale(192, Rope(64, kind="yarn", factor=40, original_max_position=4096, mscale_all_dim=0.707)), 6)
    0.114721
    """
    if rope is None or rope.kind != "yarn" or not rope.mscale_all_dim:
        return dim**-0.5
    return dim**-0.5 * (1.0 + 0.1 * rope.mscale_all_dim * math.log(max(rope.factor, 1.0))) ** 2


def _scale(config: LatentConfig) -> float:
    return (config.nope_dim + config.rope_dim) ** -0.5 if config.scale is None else config.scale


def latent_spec(config: LatentConfig, batch: int, capacity: int, dtype: str = "bfloat16") -> CacheSpec:
    """What a layer of latent attention asks of a cache: one stream [latent | rotary part] per token."""
    return CacheSpec(
        batch,
        1,
        config.kv_rank + config.rope_dim,
        capacity,
        dtype,
        rope=None if config.rope is None else dataclasses.replace(config.rope, start=config.kv_rank),
        scale=_scale(config),
        latent_dim=config.kv_rank,
        q_heads=config.q_heads,
    )


def naive_from(config: LatentConfig) -> float:
    """New tokens from which on reading each other naively takes fewer multiplications, keys and values included.

    DeepSeek-V3:

    >>> sizes = {"q_heads": 128, "kv_rank": 512, "nope_dim": 128, "rope_dim": 64, "value_dim": 128}
    >>> round(naive_from(LatentConfig(**sizes, q_rank=1536, rope=None)))
    171
    """
    made = config.nope_dim + config.value_dim
    saved = 2 * config.kv_rank - made
    return config.kv_rank * made / saved if saved > 0 else math.inf


class LatentAttention(nnx.Module):
    """MLA: what the cache holds is read in the absorbed form, many new tokens read each other naively.

    Per head and pair of tokens the absorbed form takes 2 kv_rank + rope_dim multiplications and the naive one nope_dim +
    rope_dim + value_dim (DeepSeek-V3: 1,088 and 320), and kv_rank (nope_dim + value_dim) per head and token to make keys and
    values. So from ``naive_from(config)`` new tokens on those are kept out of the absorbed reading, and both are merged by
    log-sum-exp; unless the cache's scores come from attention to the new tokens, or they are compressed first.

    Attributes:
      q, or q_a, q_norm, q_b: the queries' projection, directly or through a latent.
      kv_a, kv_norm: the projection to [latent | rotary part], and the latent's norm.
      up_key: [N, nope_dim, kv_rank].
      up_value: [N, kv_rank, value_dim].
      out: the output's projection.
    """

    def __init__(self, config: LatentConfig, width: int, dtype: DTypeLike, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, dtype=dtype, param_dtype=dtype, rngs=rngs)
        heads, rank = config.q_heads, config.kv_rank
        queries = heads * (config.nope_dim + config.rope_dim)

        def norm(size: int | None) -> RMSNorm | None:
            return RMSNorm(size, config.norm_eps, dtype) if size and config.latent_norm else None

        if config.q_rank is None:
            self.q = linear(width, queries, use_bias=False)
        else:
            self.q_a = linear(width, config.q_rank, use_bias=config.bias)
            self.q_b = linear(config.q_rank, queries, use_bias=False)
        self.kv_a = linear(width, rank + config.rope_dim, use_bias=config.bias)
        self.q_norm, self.kv_norm = norm(config.q_rank), norm(rank)
        draw = nnx.initializers.lecun_normal(in_axis=2, out_axis=1, batch_axis=0)
        self.up_key = nnx.Param(draw(rngs.params(), (heads, config.nope_dim, rank), dtype))
        self.up_value = nnx.Param(draw(rngs.params(), (heads, config.value_dim, rank), dtype).swapaxes(1, 2))
        self.out = linear(heads * config.value_dim, width, use_bias=config.bias)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: LayerCache | None,
        lengths: Int[Array, "B"] | None,
        compress_first: bool,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """What the tokens read, and the cache that has taken them in.

        Args:
          cache: made for ``latent_spec(config, ...)``; None: the tokens stand alone.
          lengths: how many tokens of each row are real; the others, on the right, may hold anything.
          compress_first: commit the tokens before they are read.
        """
        if lengths is not None:  # 0 * NaN would reach scores, statistics and gradients
            real = jnp.arange(x.shape[1], dtype=jnp.int32) < lengths[:, None]
            x = jnp.where(real[..., None], x, 0)
        queries, latent = self._queries(x), self._latent(x)
        if cache is None:
            own, _ = self._read_new(queries, latent, first_positions(x), x.shape[1])
            return self._project_out(own.astype(x.dtype)), None
        q, stream = self._absorbed(queries), self._stream(latent)
        if x.shape[1] >= naive_from(self.config) and not compress_first and reads_apart(cache):
            cache = update(cache, stream, None, lengths, queries=q)
            place, at = cache.layout, staged_positions(cache, x.shape[1])
            limits = {"recent": place.recent, "sinks": place.sinks}
            own = self._read_new(queries, latent, at, cache.spec.capacity, cache.staged_count, **limits)
            cache, (before, lse) = written_after(cache, attend_committed(cache, q))
            before = self._values(before.astype(x.dtype)).astype(jnp.float32)
            return self._project_out(merge([(before, lse), own])[0].astype(x.dtype)), commit(cache)
        read, cache = through_cache(cache, q, stream, None, lengths, compress_first)
        return self.finish(read), cache

    def project(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T N H"], Float[Array, "B T 1 H"], None]:
        """Absorbed queries, the stream that is cached, and no values; not rotated yet. H = kv_rank + rope_dim."""
        return self._absorbed(self._queries(x)), self._stream(self._latent(x)), None

    def _absorbed(self, queries: tuple[Array, Array]) -> Float[Array, "B T N H"]:
        plain, rotary = queries
        return jnp.concatenate([jnp.einsum("btnh,nhc->btnc", plain, self.up_key[...]), rotary], axis=-1)

    def _stream(self, latent: tuple[Array, Array]) -> Float[Array, "B T 1 H"]:
        return jnp.concatenate(latent, axis=-1)[:, :, None]

    def finish(self, read: Float[Array, "B T N C"]) -> Float[Array, "B T D"]:
        """The layer's output from the latents that absorbed queries have read."""
        return self._project_out(self._values(read))

    def _values(self, latents: Float[Array, "B T N C"]) -> Float[Array, "B T N V"]:
        return jnp.einsum("btnc,ncv->btnv", latents, self.up_value[...])

    def _project_out(self, heads: Float[Array, "B T N V"]) -> Float[Array, "B T D"]:
        return self.out(heads.reshape(*heads.shape[:2], -1))

    def _queries(self, x: Float[Array, "B T D"]) -> tuple[Array, Array]:
        """[B, T, N, nope_dim] and [B, T, N, rope_dim]."""
        if self.config.q_rank is None:
            q = self.q(x)
        else:
            low = self.q_a(x)
            q = self.q_b(low if self.q_norm is None else self.q_norm(low))
        q = q.reshape(*x.shape[:2], self.config.q_heads, -1)
        return q[..., : self.config.nope_dim], q[..., self.config.nope_dim :]

    def _latent(self, x: Float[Array, "B T D"]) -> tuple[Array, Array]:
        """[B, T, kv_rank], normalised, and [B, T, rope_dim]."""
        latent, rotary = jnp.split(self.kv_a(x), [self.config.kv_rank], axis=-1)
        return latent if self.kv_norm is None else self.kv_norm(latent), rotary

    def _read_new(
        self,
        queries: tuple[Array, Array],
        latent: tuple[Array, Array],
        positions: Int[Array, "B T"],
        capacity: int,
        lengths: Int[Array, "B"] | None = None,
        **limits,
    ) -> Part:
        """The naive form among new tokens: [B, T, N, value_dim], float32, and log-sum-exps [B, T, N]."""
        config, (plain, q_rotary), (latent, rotary) = self.config, queries, latent
        rotary = rotary[:, :, None]
        if config.rope is not None:
            q_rotary, rotary = (apply_rope(each, positions, config.rope, capacity) for each in (q_rotary, rotary))
        keys = jnp.einsum("btc,nhc->btnh", latent, self.up_key[...])
        rotary = jnp.broadcast_to(rotary, (*keys.shape[:3], config.rope_dim))
        return read_new(
            jnp.concatenate([plain, q_rotary], axis=-1),
            jnp.concatenate([keys, rotary], axis=-1),
            jnp.einsum("btc,ncv->btnv", latent, self.up_value[...]),
            positions,
            lengths,
            scale=_scale(config),
            **limits,
        )
