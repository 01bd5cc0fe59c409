"""Signed Hadamard rotation: spreads outlier channels over all channels before rounding.

    x -> (x * signs) @ H / sqrt(n),   H the Sylvester-Hadamard matrix of order n, signs fixed in {-1, +1}

The rotation is orthogonal, so q . k = rot(q) . rot(k): queries are rotated once per step and cached keys never rotated back.
Values are: one inverse rotation of the attention output (QuaRot, arXiv 2404.00456). The signs keep a constant vector from
landing in a single channel. Head dimensions that are not powers of two use a block-diagonal matrix of the largest power
of two that divides them.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_SMALLEST_BLOCK = 8


@functools.lru_cache(maxsize=32)
def hadamard_matrix(dim: int) -> np.ndarray:
    """The orthogonal float32 [dim, dim] matrix, signs included, that row vectors are multiplied with from the right.

    Raises:
      ValueError: no power of two from 8 up divides ``dim``.

    >>> m = hadamard_matrix(64)
    >>> bool(np.allclose(m @ m.T, np.eye(64), atol=1e-6))
    True
    """
    block = dim & -dim
    if block < _SMALLEST_BLOCK:
        raise ValueError(
            f"a Hadamard rotation needs a head dimension divisible by {_SMALLEST_BLOCK}, got {dim}; use rotate=false"
        )
    h = np.ones((1, 1))
    while h.shape[0] < block:
        h = np.block([[h, h], [h, -h]])
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=dim)
    matrix = (np.kron(np.eye(dim // block), h / np.sqrt(block)) * signs[:, None]).astype(np.float32)
    matrix.setflags(write=False)
    return matrix


def rotate(x: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
    """The vectors along ``axis``, -1 or -2, in the rotated basis, in x's dtype."""
    return _multiply(x, hadamard_matrix(x.shape[axis]), axis)


def unrotate(x: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
    """The inverse of ``rotate``."""
    return _multiply(x, hadamard_matrix(x.shape[axis]).T, axis)


def _multiply(x: Array, matrix: np.ndarray, axis: int) -> Array:
    subscripts = {-1: "...h,hg->...g", -2: "...hs,hg->...gs"}[axis]
    product = jnp.einsum(subscripts, x.astype(jnp.float32), matrix, precision=jax.lax.Precision.HIGHEST)
    return product.astype(x.dtype)
