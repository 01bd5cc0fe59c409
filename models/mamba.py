"""The Mamba-2 mixer (arXiv 2405.21060) in the form of Granite 4.0: a recurrent layer whose state never grows.

Each head of a sequence has a state S [head_dim, state_dim]. With the convolved inputs x, B, C and a step size dt per token:

  a = exp(-exp(a_log) dt),   S <- a S + dt x B^T,   y = S C + skip x

One token is computed that way; more of them in chunks, in each of which the recurrence is a masked matrix product.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from memjax.cache.recurrent import RecurrentCache, init_recurrent
from memjax.cache.spec import RecurrentSpec
from memjax.models.config import MambaConfig
from memjax.models.norm import rms

FIRST_STEPS = (1e-3, 1e-1)  # step sizes and decay rates of untrained weights, those of the paper's code
FIRST_RATES = (1.0, 16.0)
_VANISHED = -128.0  # exp of it is 0 in float32
_GRID = 512.0  # 256 tokens' multiples of 1 / 512, none below _VANISHED, add up without rounding

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def recurrent_spec(config: MambaConfig, batch: int) -> RecurrentSpec:
    """What a Mamba-2 layer asks of a cache."""
    return RecurrentSpec(batch, config.conv_dim, config.conv_width, config.heads, config.head_dim, config.state_dim)


class GatedRMSNorm(nnx.Module):
    """scale * rms(y * silu(gate)) over all channels, float32: the gate comes before the norm (arXiv 2405.21060, 7.1)."""

    def __init__(self, dim: int, eps: float, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((dim,), dtype))
        self.eps = eps

    def __call__(self, y: Float[Array, "... D"], gate: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return self.scale[...].astype(jnp.float32) * rms(y * jax.nn.silu(gate), self.eps)


class Mamba(nnx.Module):
    """Projection into gate, xBC and dt; causal convolution of xBC; the recurrence; gated norm; projection back.

    Everything between the projections is float32. ``dt_bias``, ``a_log`` and ``skip`` are float32 parameters.
    """

    def __init__(self, config: MambaConfig, width: int, norm_eps: float, dtype: DTypeLike, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, use_bias=config.bias, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.config = config
        self.inputs = linear(width, config.inner + config.conv_dim + config.heads)
        kernel = jax.random.normal(rngs.params(), (config.conv_width, config.conv_dim), dtype)
        self.conv_kernel = nnx.Param(kernel * config.conv_width**-0.5)
        self.conv_bias = nnx.Param(jnp.zeros((config.conv_dim,), dtype)) if config.conv_bias else None
        self.dt_bias = nnx.Param(_first_dt_bias(rngs.params(), config.heads))
        rates = jax.random.uniform(rngs.params(), (config.heads,), jnp.float32, *FIRST_RATES)
        self.a_log = nnx.Param(jnp.log(rates))
        self.skip = nnx.Param(jnp.ones((config.heads,), jnp.float32))
        self.norm = GatedRMSNorm(config.inner, norm_eps, dtype)
        self.out = linear(config.inner, width)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: RecurrentCache | None,
        lengths: Int[Array, "B"] | None,
        compress_first: bool,
    ) -> tuple[Float[Array, "B T D"], RecurrentCache | None]:
        """The mixed tokens, and the cache that has taken them in.

        Args:
          x: the tokens that follow those the cache has seen.
          cache: the state to start from; None: the zero state, and none is returned.
          lengths: how many of the T tokens of each row are real; the others, on the right, may hold anything.
          compress_first: ignored: a recurrent state is not compressed.
        """
        del compress_first
        batch, tokens, _ = x.shape
        if lengths is not None:
            lengths = lengths.astype(jnp.int32)
            # A NaN in the padding would reach the state as 0 * NaN, and the weights' gradient.
            x = jnp.where(_real(tokens, lengths)[..., None], x, 0)
        before = init_recurrent(recurrent_spec(self.config, batch)) if cache is None else cache
        (conv, state), y = self._in_chunks((before.conv, before.state), self.inputs(x), lengths)
        after = None if cache is None else cache.advance(conv, state, tokens if lengths is None else lengths)
        return self.out(y), after

    def _in_chunks(self, carry: tuple[Array, Array], projected: Array, lengths: Array | None):
        """``_mix`` over chunks of one size, as even as T allows; float32 intermediates exist for one chunk at a time."""
        batch, tokens, _ = projected.shape
        chunks = -(-tokens // self.config.chunk)
        if chunks == 1:
            return self._mix(carry, (projected, lengths))
        size = -(-tokens // chunks)
        extra = chunks * size - tokens
        if extra:
            lengths = jnp.full((batch,), tokens, jnp.int32) if lengths is None else lengths
            projected = jnp.pad(projected, ((0, 0), (0, extra), (0, 0)))
        starts = jnp.arange(chunks, dtype=jnp.int32)[:, None] * size
        counts = None if lengths is None else jnp.clip(lengths - starts, 0, size)
        by_chunk = projected.reshape(batch, chunks, size, -1).swapaxes(0, 1)
        # Else the gradient would keep the square matrices of all chunks.
        mix = jax.checkpoint(self._mix, prevent_cse=False)
        carry, y = jax.lax.scan(mix, carry, (by_chunk, counts))
        return carry, y.swapaxes(0, 1).reshape(batch, chunks * size, -1)[:, :tokens]

    def _mix(self, carry: tuple[Array, Array], chunk: tuple[Array, Array | None]):
        """What lies between the two projections.

        Args:
          carry: the last columns of the convolution [B, W - 1, conv_dim] and the state [B, heads, head_dim, state_dim].
          chunk: projected tokens [B, T, .], and how many of each row are real.

        Returns:
          The carry, and the tokens [B, T, inner] in the dtype they came in.
        """
        (conv, state), (projected, counts) = carry, chunk
        sizes, (batch, tokens, _) = self.config, projected.shape
        grouped = (batch, tokens, sizes.groups, sizes.heads // sizes.groups)
        split = [sizes.inner, sizes.inner + sizes.conv_dim]
        gate, xbc, dt = jnp.split(projected.astype(jnp.float32), split, axis=-1)
        xbc, conv = self._convolve(conv, xbc, counts)
        x, b, c = jnp.split(xbc, [sizes.inner, sizes.inner + sizes.groups * sizes.state_dim], axis=-1)
        x = x.reshape(*grouped, sizes.head_dim)
        b, c = (each.reshape(*grouped[:3], sizes.state_dim) for each in (b, c))
        steps, log_decay = (each.reshape(grouped) for each in self._steps(dt, counts))
        recurrence = one_token if tokens == 1 else one_chunk
        y, new = recurrence(state.reshape(batch, *grouped[2:], *state.shape[2:]), x, b, c, steps, log_decay)
        y = y + self.skip[...].astype(jnp.float32).reshape(*grouped[2:], 1) * x
        y = self.norm(y.reshape(batch, tokens, -1), gate)
        return (conv, new.reshape(state.shape)), y.astype(projected.dtype)

    def _convolve(self, conv: Array, xbc: Array, counts: Array | None) -> tuple[Array, Array]:
        """silu(convolution) of each token's column and the W - 1 before it, and the last columns that are real."""
        tokens, kernel = xbc.shape[1], self.conv_kernel[...].astype(jnp.float32)
        columns = jnp.concatenate([conv, xbc], axis=1)
        out = sum(columns[:, i : i + tokens] * kernel[i] for i in range(len(kernel)))
        if self.conv_bias is not None:
            out = out + self.conv_bias[...].astype(jnp.float32)
        if counts is None:
            return jax.nn.silu(out), columns[:, tokens:]
        last = counts[:, None] + jnp.arange(len(kernel) - 1, dtype=jnp.int32)
        return jax.nn.silu(out), jnp.take_along_axis(columns, last[..., None], axis=1)

    def _steps(self, dt: Float[Array, "B T h"], counts: Array | None) -> tuple[Array, Array]:
        """Step sizes, and the logarithm of what a token leaves of the state; both 0 at padding."""
        steps = jax.nn.softplus(dt + self.dt_bias[...].astype(jnp.float32))
        steps = jnp.clip(steps, *self.config.step_limits)
        if counts is not None:  # after the limits: the lower one may not be 0
            steps = jnp.where(_real(dt.shape[1], counts)[..., None], steps, 0)
        return steps, -jnp.exp(self.a_log[...].astype(jnp.float32)) * steps


def one_token(
    state: Float[Array, "B g r p n"],
    x: Float[Array, "B 1 g r p"],
    b: Float[Array, "B 1 g n"],
    c: Float[Array, "B 1 g n"],
    steps: Float[Array, "B 1 g r"],
    log_decay: Float[Array, "B 1 g r"],
) -> tuple[Float[Array, "B 1 g r p"], Float[Array, "B g r p n"]]:
    """S <- exp(log_decay) S + dt x B^T,  y = S C: the definition, for g groups of r heads each."""
    new = (x * steps[..., None])[:, 0, ..., None] * b[:, 0, :, None, None]
    state = jnp.exp(log_decay)[:, 0, ..., None, None] * state + new
    return _einsum("bgrpn,bgn->bgrp", state, c[:, 0])[:, None], state


def one_chunk(
    state: Float[Array, "B g r p n"],
    x: Float[Array, "B T g r p"],
    b: Float[Array, "B T g n"],
    c: Float[Array, "B T g n"],
    steps: Float[Array, "B T g r"],
    log_decay: Float[Array, "B T g r"],
) -> tuple[Float[Array, "B T g r p"], Float[Array, "B g r p n"]]:
    """All tokens of a chunk at once (state space duality, arXiv 2405.21060, section 6).

    With s_ij = log_decay_j+1 + .. + log_decay_i, from the state S before the chunk, whose index is 0:
      y_i = exp(s_i0) S C_i + sum over j <= i of exp(s_ij) (C_i . B_j) dt_j x_j
      S   = exp(s_T0) S + sum over j of exp(s_Tj) dt_j x_j B_j^T
    """
    sums = _running_sums(jnp.moveaxis(log_decay, 1, -1))
    passed, since, left = sum(sums), sum(s[..., None] - s[..., None, :] for s in sums), sum(s[..., -1:] - s for s in sums)
    # The mask comes before exp, which may overflow above the diagonal, where the gradient would be 0 * inf.
    decay = jnp.exp(jnp.where(jnp.tri(x.shape[1], dtype=bool), since, -jnp.inf))
    weights = decay * _einsum("bign,bjgn->bgij", c, b)[:, :, None]
    inputs = x * steps[..., None]
    y = _einsum("bgrij,bjgrp->bigrp", weights, inputs)
    y = y + _einsum("bign,bgrpn->bigrp", c, state) * _by_token(jnp.exp(passed))
    new = _einsum("bjgrp,bjgn->bgrpn", inputs * _by_token(jnp.exp(left)), b)
    return y, jnp.exp(passed[..., -1])[..., None, None] * state + new


def _running_sums(log_decay: Float[Array, "... T"]) -> tuple[Float[Array, "... T"], Float[Array, "... T"]]:
    """Cumulative sum in two parts, a coarse one without rounding and a small one.

    Differences of one float32 sum would lose what a weak decay adds after a strong one.
    """
    log_decay = jnp.maximum(log_decay, _VANISHED)
    coarse = jnp.round(log_decay * _GRID) / _GRID
    return jnp.cumsum(coarse, axis=-1), jnp.cumsum(log_decay - coarse, axis=-1)


def _by_token(weights: Float[Array, "B g r T"]) -> Float[Array, "B T g r 1"]:
    return jnp.moveaxis(weights, -1, 1)[..., None]


def _real(tokens: int, counts: Int[Array, "B"]) -> Array:
    return jnp.arange(tokens, dtype=jnp.int32) < counts[:, None]


def _first_dt_bias(key: Array, heads: int) -> Float[Array, "h"]:
    """softplus of it is log-uniform in ``FIRST_STEPS``."""
    low, high = jnp.log(jnp.float32(FIRST_STEPS[0])), jnp.log(jnp.float32(FIRST_STEPS[1]))
    steps = jnp.exp(jax.random.uniform(key, (heads,), jnp.float32, low, high))
    return jnp.log(jnp.expm1(steps))
