"""Rotary position embeddings (RoFormer, arXiv 2104.09864) and the published ways to stretch them.

    pair j of a vector at position p turns by the angle p * inv_freq[j],  j = 0 .. dim/2 - 1

``Rope`` is a frozen, hashable description (a static jit argument); ``apply_rope`` rotates arrays. ``linear`` is position
interpolation (arXiv 2306.15595), ``yarn`` is arXiv 2309.00071, ``longrope`` is arXiv 2402.13753, ``dynamic`` is the NTK-aware
rescaling of the base, and ``llama3`` the wavelength-dependent scaling of Llama 3.1.

``dynamic`` and ``longrope`` depend on the length of the text. Reference implementations recompute the frequencies while the
text grows and leave the cached keys rotated by the old ones; here ``seq_len`` (the cache's capacity) decides once, so that
all keys of one cache are rotated alike.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of ``dim`` consecutive channels, beginning at channel ``start``.

    Args:
      dim: number of rotated channels, even.
      theta: base of the frequencies.
      kind: one of ``ROPE_KINDS``.
      factor: stretch factor of every kind but ``default``.
      original_max_position: length the model was trained for, in tokens (dynamic, llama3, yarn, longrope).
      low_freq_factor, high_freq_factor: band edges of llama3.
      beta_fast, beta_slow, truncate: ramp of yarn.
      attention_factor: multiplies cos and sin (yarn, longrope); None: the formula of the kind.
      mscale, mscale_all_dim: yarn's attention factor as DeepSeek states it.
      short_factor, long_factor: per-pair divisors of longrope, dim/2 numbers each.
      freq_factors: extra per-pair divisors of the frequencies, as GGUF files store llama3 scaling.
      interleaved: pairs are channels (2j, 2j+1) instead of (j, j + dim/2).
      start: first rotated channel.

    Raises:
      ValueError: unknown kind, odd dim, a parameter the kind needs is missing or of the wrong length.

    >>> Rope(dim=4, theta=100.0).inv_freq(seq_len=16).tolist()
    [1.0, 0.10000000149011612]
    """

    dim: int
    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_position: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    freq_factors: tuple[float, ...] = ()
    interleaved: bool = False
    start: int = 0

    def __post_init__(self):
        if self.kind not in ROPE_KINDS:
            raise ValueError(f"rope kind {self.kind!r} is not one of {', '.join(ROPE_KINDS)}")
        if self.dim <= 0 or self.dim % 2:
            raise ValueError(f"rope dim must be even and positive, got {self.dim}")
        if self.theta <= 1.0 or self.factor <= 0.0:
            raise ValueError(f"rope needs theta > 1 and factor > 0, got theta={self.theta}, factor={self.factor}")
        if self.kind in ("dynamic", "llama3", "yarn", "longrope") and not self.original_max_position:
            raise ValueError(f"rope kind {self.kind!r} needs original_max_position, the length of training in tokens")
        lists = ["freq_factors"] if self.freq_factors else []
        lists += ["short_factor", "long_factor"] if self.kind == "longrope" else []
        for name in lists:
            if len(getattr(self, name)) != self.dim // 2:
                raise ValueError(f"rope {name} needs dim/2 = {self.dim // 2} numbers, got {len(getattr(self, name))}")

    @property
    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """First and second channel of each pair, [dim/2] each."""
        inside = self.start + np.arange(self.dim)
        return (inside[0::2], inside[1::2]) if self.interleaved else (inside[: self.dim // 2], inside[self.dim // 2 :])

    def inv_freq(self, seq_len: int) -> np.ndarray:
        """Angle per position of each pair, float32 [dim/2], for texts of up to ``seq_len`` tokens."""
        return _frequencies(self, seq_len)[0]

    def cos_sin_scale(self, seq_len: int) -> float:
        """The factor on cos and sin (1.0 except for yarn and longrope)."""
        return _frequencies(self, seq_len)[1]


def _mscale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def _llama3(rope: Rope, inv: np.ndarray) -> np.ndarray:
    wavelength = 2 * math.pi / inv
    low = rope.original_max_position / rope.low_freq_factor
    high = rope.original_max_position / rope.high_freq_factor
    smooth = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - smooth) * inv / rope.factor + smooth * inv
    return np.where(wavelength > low, inv / rope.factor, np.where(wavelength < high, inv, between))


def _yarn(rope: Rope, inv: np.ndarray) -> tuple[np.ndarray, float]:
    def correction(turns: float) -> float:
        return rope.dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = correction(rope.beta_fast), correction(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(rope.dim // 2) - low) / (high - low), 0, 1)
    scale = rope.attention_factor
    if scale is None and rope.mscale and rope.mscale_all_dim:
        scale = _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    elif scale is None:
        scale = _mscale(rope.factor)
    return inv / rope.factor * ramp + inv * (1 - ramp), scale


def _longrope_scale(rope: Rope) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1.0:
        return 1.0
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position))


@functools.lru_cache(maxsize=256)
def _frequencies(rope: Rope, seq_len: int) -> tuple[np.ndarray, float]:
    exponents = np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim
    theta, scale = rope.theta, 1.0
    if rope.kind == "dynamic":
        length = max(seq_len, rope.original_max_position)
        stretch = rope.factor * length / rope.original_max_position - (rope.factor - 1)
        theta = theta * stretch ** (rope.dim / (rope.dim - 2))
    inv = theta**-exponents
    if rope.kind == "linear":
        inv = inv / rope.factor
    elif rope.kind == "llama3":
        inv = _llama3(rope, inv)
    elif rope.kind == "yarn":
        inv, scale = _yarn(rope, inv)
    elif rope.kind == "longrope":
        factors = rope.long_factor if seq_len > rope.original_max_position else rope.short_factor
        inv, scale = inv / np.asarray(factors), _longrope_scale(rope)
    if rope.freq_factors:
        inv = inv / np.asarray(rope.freq_factors)
    inv = inv.astype(np.float32)
    inv.setflags(write=False)
    return inv, float(scale)


def apply_rope(
    x: Float[Array, "B T heads H"], positions: Int[Array, "B T"], rope: Rope, seq_len: int
) -> Float[Array, "B T heads H"]:
    """Rotates channels ``[start, start + dim)`` of ``x`` by its position; angles in float32, result in x's dtype.

    Raises:
      ValueError: the rotated channels do not lie inside the head dimension.
    """
    end = rope.start + rope.dim
    if end > x.shape[-1]:
        raise ValueError(f"rope rotates channels {rope.start}..{end}, but the head dimension is {x.shape[-1]}")
    angles = positions.astype(jnp.float32)[..., None, None] * rope.inv_freq(seq_len)
    scale = jnp.float32(rope.cos_sin_scale(seq_len))
    cos, sin = jnp.cos(angles) * scale, jnp.sin(angles) * scale
    turned = x[..., rope.start : end].astype(jnp.float32)
    if rope.interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(turned.shape)
    else:
        a, b = jnp.split(turned, 2, axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    turned = turned.astype(x.dtype)
    if rope.dim == x.shape[-1]:
        return turned
    return jnp.concatenate([x[..., : rope.start], turned, x[..., end:]], axis=-1)
