"""What one layer asks of a cache, apart from how it is compressed: frozen, hashable, a static jit argument."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from memjax.attention.rope import Rope


def check_integers(owner: str, least: int, **values: int) -> None:
    """Raises ValueError if a value is no integer of at least ``least``."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"{owner} needs {name} to be an integer of at least {least}, got {value!r}")


def _check_float_dtype(owner: str, dtype: str) -> None:
    try:
        known = jnp.issubdtype(jnp.dtype(dtype), jnp.floating) and jnp.dtype(dtype).itemsize in (2, 4)
    except TypeError:
        known = False
    if not known:
        raise ValueError(f"{owner} dtype {dtype!r} is not one of bfloat16, float16, float32")


@dataclass(frozen=True)
class CacheSpec:
    """One attention layer: shapes, dtype and the attention it does.

    Args:
      batch: sequences, B.
      kv_heads: key and value heads, K. Query heads may be any multiple of it.
      head_dim: values per key vector, H.
      capacity: tokens per sequence that the cache must be able to see, at least 1.
      dtype: storage type of whatever is not quantized.
      rope: the rotary embedding to apply to keys and queries; None for a layer without one (NoPE); "applied" when keys
        and queries arrive rotated.
      scale: factor on q . k; None: head_dim ** -0.5.
      window: the model's sliding window: query i sees keys i - window + 1 .. i. None: all keys.
      softcap: c * tanh(score / c) on every score.
      latent_dim: for multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): the cached stream is
        [latent | rotary part], values are its first ``latent_dim`` channels and only these are ever quantized. Then
        kv_heads is 1 and ``update`` takes no values.
      q_heads: query heads, N, for methods that keep something of each of them; None: not said.

    Raises:
      ValueError: a size below 1, a dtype that is not a float of 16 or 32 bits, or an inconsistent combination.
    """

    batch: int
    kv_heads: int
    head_dim: int
    capacity: int
    dtype: str = "bfloat16"
    rope: Rope | str | None = "applied"
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    latent_dim: int | None = None
    q_heads: int | None = None

    def __post_init__(self):
        sizes = {name: getattr(self, name) for name in ("batch", "kv_heads", "head_dim", "capacity")}
        check_integers("CacheSpec", 1, **sizes)
        _check_float_dtype("CacheSpec", self.dtype)
        if isinstance(self.rope, str) and self.rope != "applied":
            raise ValueError(f"CacheSpec rope must be a Rope, None or 'applied', got {self.rope!r}")
        if self.window is not None:
            check_integers("CacheSpec", 1, window=self.window)
        if self.q_heads is not None:
            check_integers("CacheSpec", 1, q_heads=self.q_heads)
            if self.q_heads % self.kv_heads:
                raise ValueError(f"CacheSpec q_heads must be a multiple of kv_heads={self.kv_heads}, got {self.q_heads}")
        if self.latent_dim is not None:
            check_integers("CacheSpec", 1, latent_dim=self.latent_dim)
            if self.latent_dim > self.head_dim or self.kv_heads != 1:
                raise ValueError(
                    f"a latent stream has kv_heads=1 and latent_dim <= head_dim, got kv_heads={self.kv_heads}, "
                    f"latent_dim={self.latent_dim}, head_dim={self.head_dim}"
                )

    @property
    def attention_scale(self) -> float:
        """The factor on q . k."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def coded_dim(self) -> int:
        """Key channels that a codec may quantize."""
        return self.latent_dim or self.head_dim

    @property
    def extra_dim(self) -> int:
        """Key channels that stay dense: the rotary part of a latent stream."""
        return self.head_dim - self.coded_dim

    @property
    def value_dim(self) -> int:
        """Channels of an attention output."""
        return self.coded_dim

    @property
    def values_per_token(self) -> int:
        """Numbers that one token leaves in this layer."""
        return self.head_dim if self.latent_dim else 2 * self.kv_heads * self.head_dim


def check_new_tokens(spec: CacheSpec, k: Array, v: Array | None, lengths: Array | None) -> None:
    """Raises ValueError if what ``update`` was given does not fit ``spec``."""
    if lengths is not None and lengths.shape != (spec.batch,):
        raise ValueError(f"update needs lengths of shape [{spec.batch}], one per row, got {list(lengths.shape)}")
    expected = (spec.batch, spec.kv_heads, spec.head_dim)
    if k.ndim != 4 or (k.shape[0], *k.shape[2:]) != expected:
        raise ValueError(
            f"update needs keys [batch, tokens, kv_heads, head_dim] = [{spec.batch}, T, {spec.kv_heads}, "
            f"{spec.head_dim}], got {list(k.shape)}"
        )
    if spec.latent_dim is not None:
        if v is not None:
            raise ValueError("a latent stream has no values of its own (they are a prefix of the keys): pass v=None")
    elif v is None or v.shape != k.shape:
        raise ValueError(f"update needs values of the keys' shape {list(k.shape)}, got {None if v is None else v.shape}")


@dataclass(frozen=True)
class RecurrentSpec:
    """One recurrent layer (Mamba-2, arXiv 2405.21060): a convolution state and an SSM state, both float32.

    Args:
      batch: sequences, B.
      conv_dim: channels of the causal convolution.
      conv_width: its kernel width; width - 1 columns are kept.
      heads, head_dim, state_dim: shape of the SSM state per sequence.

    Raises:
      ValueError: a size below 1.
    """

    batch: int
    conv_dim: int
    conv_width: int
    heads: int
    head_dim: int
    state_dim: int

    def __post_init__(self):
        sizes = {name: getattr(self, name) for name in ("batch", "conv_dim", "heads", "head_dim", "state_dim")}
        check_integers("RecurrentSpec", 1, **sizes, conv_width=self.conv_width)


LayerSpec = CacheSpec | RecurrentSpec
