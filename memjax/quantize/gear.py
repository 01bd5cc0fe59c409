"""GEAR (arXiv 2403.05527): a low-rank correction of what any codec loses.

    x ~ C(x) + P a,   a = P' (x - C(x))         C: what the base codec makes of x; P [H, r], orthonormal columns

    q . x ~ q . C(x) + (P' q) . a,              sum_t p_t x_t ~ sum_t p_t C(x_t) + P sum_t p_t a_t

so that attention reads two streams and nothing is ever put together: the base's codes, and r dense numbers per token whose
queries are P' q and whose outputs are multiplied with P once. Whatever reads the base's codes reads them. The values' second
stream is a second reading of the keys. Rank 1 is too narrow for the TPU kernels and left to the plain path.

P spans the largest principal directions of the base's error on a row's first tokens, all those that are there when the first
of them enters the history (the sinks apart), per kv head, found by subspace iteration from a fixed start. It is orthonormal,
so that no token's error is larger than the base's, at any rank, and at rank H it is the rounding of a.

Layout: the base's codes and a [B, K, r, S] in the cache's dtype, 2 r bytes per token, kv head and stream in bfloat16: 16 r / H
bits per value beside the base's, 1 at head_dim 64 and rank 4. P float32 [B, K, H, r], kept once per row in the front end's
basis.

Deviations: P is measured once and then frozen, where the paper factorises every block of tokens anew: a block's own P would
be another query for every block, which no kernel reads. The paper's third part, the outliers of every vector kept exactly in
a sparse matrix, is left out: kernels cannot read it, and rotations and balanced channels are there for outliers. Hence this is
the paper's GEAR-L with a fixed basis.

P corrects what is alike in the errors of all tokens, and a good codec's errors are not: at equal bytes more bits are better.
SmolLM2-135M (head_dim 64), 1,024 tokens of Moby-Dick, static setting, KL divergence at bits per value (a in bfloat16):
turboquant(2,2) .219 at 2.25; with rank 2 .216 at 2.75, rank 4 .201 at 3.25, rank 8 .166 at 4.25; but turboquant(3,3) .051 at
3.25 and turboquant(4,4) .012 at 4.25.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from memjax.cache.spec import check_integers
from memjax.pallas_kernels.codes import WIDEST_SPARSE, Codes, dense, sparse
from memjax.quantize.codec import Codec, CodePair, KeyValueCodec
from memjax.quantize.front import FrontEnd

_ITERATIONS = 16
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@dataclass(frozen=True)
class Corrected(Codec):
    """One stream of GEAR: a base codec, the outliers of every vector, ``rank`` coefficients of the error that is left.

    ``sparse``: outliers as a share of the channels, at least one if it is not 0. ``directions``: P, if it is measured.
    """

    name: ClassVar[str] = "gear"
    paired: ClassVar[bool] = True
    rotate: ClassVar[bool] = False
    base: Codec
    rank: int
    sparse: float = 0.0
    directions: Float[Array, "B K H r"] | None = None

    @property
    def tile(self) -> int:
        return self.base.tile

    @property
    def fmt(self) -> str:
        return self.base.fmt

    def entries(self, dim: int) -> int:
        """Outliers of a vector of ``dim`` values, n."""
        return max(round(self.sparse * dim), 1) if self.sparse else 0

    def validate(self, dim: int) -> None:
        self.base.validate(dim)
        if self.rank > dim:
            raise ValueError(f"an error of {dim} channels has at most rank {dim}, got rank={self.rank}; use a smaller one")
        if self.sparse and dim > WIDEST_SPARSE:
            raise ValueError(
                f"gear keeps outliers of up to {WIDEST_SPARSE} channels, whose numbers bfloat16 holds exactly, got {dim}; use "
                "sparse=0"
            )

    def fit_shape(self, dim: int) -> tuple[int, ...] | None:
        return (dim, self.rank) if self.rank else None

    def unfitted(self, lead: tuple[int, ...], dim: int) -> Float[Array, "B K H r"] | None:
        return jnp.broadcast_to(jnp.eye(dim, self.rank), (*lead, dim, self.rank)) if self.rank else None

    def fit(self, x: Float[Array, "B K H T"], real: Bool[Array, "B 1|K T"]) -> Float[Array, "B K H r"] | None:
        if not self.rank:
            return None
        _, error, _ = self._coded(x, jnp.float32)
        error = jnp.where(real[:, :, None], error, 0.0)
        return principal_directions(_einsum("bkht,bkgt->bkhg", error, error), self.rank)

    def fitted(self, fit: Array | None) -> Corrected:
        return dataclasses.replace(self, directions=fit)

    def encode(self, x: Float[Array, "... H S"], dtype: DTypeLike) -> CodePair:
        codes, error, places = self._coded(x, dtype)
        found = None
        if self.rank:
            found = _einsum("...hs,...hr->...rs", error, self._directions(x.shape[-2])).astype(dtype)
        if places is None:
            return CodePair(codes, dense(found))
        # What is there without the outliers, so that with them every rounding but their own is undone.
        left = x.astype(jnp.float32) - self.base.decode(codes) - self._low_rank(found, x.shape[-2])
        values = jnp.take_along_axis(left, places, axis=-2)
        values = jnp.where(jnp.isfinite(values), values, jnp.nan)
        return CodePair(codes, sparse(values, places, x.shape[-2], found, dtype))

    def decode(self, codes: CodePair) -> Float[Array, "... H S"]:
        x, more = self.base.decode(codes.first), codes.second.decode()
        if self.sparse:
            outliers, more = jnp.split(more, [x.shape[-2]], axis=-2)
            x = x + outliers
        return x + self._low_rank(more, x.shape[-2])

    def into_basis(self, x: Float[Array, "... H"]) -> Float[Array, "... H+r"] | Float[Array, "... 2H+r"]:
        parts = [self.base.into_basis(x)]
        if self.sparse:
            parts.append(x)
        if self.rank:
            more = _einsum("...mh,...hr->...mr", x.astype(jnp.float32), self._directions(x.shape[-1]))
            parts.append(more.astype(x.dtype))
        return jnp.concatenate(parts, axis=-1)

    def out_of_basis(self, x: Float[Array, "... H+r"] | Float[Array, "... 2H+r"]) -> Float[Array, "... H"]:
        dim = (x.shape[-1] - self.rank) // (2 if self.sparse else 1)
        base, outliers, more = jnp.split(x, [dim, x.shape[-1] - self.rank], axis=-1)
        found = self.base.out_of_basis(base)
        if self.sparse:
            found = found + outliers
        if self.rank:
            more = _einsum("...mr,...hr->...mh", more.astype(jnp.float32), self._directions(dim))
            found = found + more.astype(x.dtype)
        return found

    def bits_per_value(self, dim: int, dtype: DTypeLike = jnp.bfloat16) -> float:
        rows = self.rank + 2 * self.entries(dim)
        return self.base.bits_per_value(dim, dtype) + 8 * jnp.dtype(dtype).itemsize * rows / dim

    def _coded(self, x: Float[Array, "... H S"], dtype: DTypeLike) -> tuple[Codes, Array, Array | None]:
        """The base's codes without outliers, its error float32 [..., H, S], 0 at outliers, and their places [..., n, S]."""
        wide, count = x.astype(jnp.float32), self.entries(x.shape[-2])
        if not count:
            codes = self.base.encode(x, dtype)
            return codes, wide - self.base.decode(codes), None
        middle = jnp.broadcast_to(self.base.middle(wide), wide.shape)
        far = jnp.abs(wide - middle).swapaxes(-1, -2)
        places = jax.lax.top_k(far, count)[1].swapaxes(-1, -2)
        channel = jnp.arange(x.shape[-2], dtype=places.dtype)[:, None]
        taken = functools.reduce(jnp.logical_or, [places[..., j : j + 1, :] == channel for j in range(count)])
        codes = self.base.encode(jnp.where(taken, middle, wide), dtype)
        return codes, jnp.where(taken, 0.0, wide - self.base.decode(codes)), places

    def _low_rank(self, found: Float[Array, "... r S"] | None, dim: int) -> Float[Array, "... H S"] | float:
        """P a; 0 without it."""
        if not self.rank:
            return 0.0
        return _einsum("...rs,...hr->...hs", found.astype(jnp.float32), self._directions(dim))

    def _directions(self, dim: int) -> Float[Array, "... H r"]:
        return self.unfitted((), dim) if self.directions is None else self.directions


@dataclass(frozen=True)
class Gear(KeyValueCodec):
    """A codec and a correction of its errors, for keys and for values.

    Args:
      rank: directions per row and kv head; 0: outliers alone.
      sparse: outliers of every vector, as a share of its channels, at least one; 0: none.

    Raises:
      ValueError: a base that loses nothing or that has two streams of its own, a rank below 0, a share outside 0 .. 0.5, or
        neither of both; ``validate``: a rank above the head dimension, outliers among more than 256 channels.

    >>> from memjax.quantize import Int4
    >>> Gear(Int4(rotate=True), rank=4).keys.bits_per_value(128)
    4.625
    >>> Gear(Int4(rotate=True), rank=4, sparse=0.02).keys.bits_per_value(128)
    5.375
    """

    name: ClassVar[str] = "gear"
    base: KeyValueCodec
    rank: int = 4
    sparse: float = 0.0

    def __post_init__(self):
        if isinstance(self.sparse, bool) or not isinstance(self.sparse, int | float) or not 0 <= self.sparse < 0.5:
            raise ValueError(f"gear needs sparse to be a share of the channels, 0 or more and below 0.5, got {self.sparse!r}")
        check_integers("gear", 0 if self.sparse else 1, rank=self.rank)
        if not isinstance(self.base, KeyValueCodec) or not self.base.lossy:
            raise ValueError(f"gear corrects what a codec such as int4 loses, got {getattr(self.base, 'name', self.base)}")
        if self.base.two_streams:
            raise ValueError(f"gear adds a second stream of codes, and {self.base.name} has two; use a base of one stream")
        if self.base.rest is not None or self.base.page > 1:
            raise ValueError(f"gear corrects one kind of codes, and {self.base.name} has two; use a base such as kivi(2)")

    @property
    def front(self) -> FrontEnd:
        """The base's."""
        return self.base.front

    @property
    def keys(self) -> Corrected:
        return Corrected(self.base.keys, self.rank, self.sparse)

    @property
    def values(self) -> Corrected:
        return Corrected(self.base.values, self.rank, self.sparse)


def principal_directions(moment: Float[Array, "... H H"], rank: int) -> Float[Array, "... H r"]:
    """Orthonormal directions of the largest eigenvalues of second moments, nearly: by subspace iteration.

    >>> found = principal_directions(jnp.diag(jnp.array([1.0, 9.0, 4.0])), 2)
    >>> bool(jnp.allclose(found @ found.T, jnp.diag(jnp.array([0.0, 1.0, 1.0])), atol=1e-5))
    True
    """
    dim = moment.shape[-1]
    start = np.random.default_rng(0).standard_normal((dim, rank)).astype(np.float32)
    # Scaled by its largest entry first: fourth powers of what float32 holds overflow.
    peak = jnp.max(jnp.abs(moment), axis=(-2, -1), keepdims=True)
    moment = moment / jnp.where(peak > 0, peak, 1.0)

    def step(_, found: Array) -> Array:
        return jnp.linalg.qr(_einsum("...hg,...gr->...hr", moment, found))[0]

    found = jnp.broadcast_to(jnp.asarray(start), (*moment.shape[:-2], dim, rank))
    return jax.lax.fori_loop(0, _ITERATIONS, step, found)
