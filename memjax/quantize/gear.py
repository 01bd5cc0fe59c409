"""GEAR (arXiv 2403.05527): what any codec loses, corrected in two ways: outliers kept apart, and a low-rank part.

    x ~ C(x - s) + s + P a,   a = P' (x - C(x - s) - s)      C: what the base codec makes of x; s: n numbers, else 0
    q . x ~ q . C(x - s) + q . s + (P' q) . a                P [H, r], orthonormal columns; sum_t p_t x_t likewise

so that attention reads two streams and nothing is ever put together: the base's codes; and n values, their n places and r
numbers per token, which stand for H + r channels (the format sparse of ``pallas_kernels.codes``; dense without outliers). Its
queries are [q | P' q], and of its outputs the last r are multiplied with P once. Whatever reads the base's codes reads both.
The values' second stream is a second reading of the keys. Rank 1 alone is too narrow for the TPU kernels and left to XLA.

**Outliers** (``sparse`` = n / H, the paper's 2 % is ``sparse=0.02``; 0, the default, is the paper's GEAR-L): the n entries of
each vector that are farthest from where the base's codes are counted from (``Codec.middle``: 0; KIVI: the median of a group,
of a channel's neighbouring tokens for keys and of a token's neighbouring channels for values). The base codes this middle in
their stead, so that its scale shrinks to what the others need, and s holds what base and low-rank part then leave of an entry:
these are exact but for one rounding to the cache's dtype. They are taken before the base's own rotation, behind the front end.

**P** spans the largest principal directions of what is then left of the errors on a row's first tokens, all those that are
there when the first of them enters the history (the sinks apart), per kv head, found by subspace iteration from a fixed start.
It is orthonormal and outliers are exact, so that no token's error is larger than without P, at any rank, and at rank H it is
the rounding of a. That keeping outliers apart makes errors smaller holds on average, as tests measure, not for every vector.

Layout: the base's codes and a [B, K, 2 n + r, S] in the cache's dtype, 2 (2 n + r) bytes per token, kv head and stream in
bfloat16: at head_dim 64 one bit per value beside the base's for rank 4, and half a bit for each outlier (n = 1 at 2 %; n = 3
at head_dim 128, .75 bits). A TPU pads 2 n + r rows to a multiple of 8, and copies them before it reads them if they are none:
2 n + r = 8 costs it no more than 6. P float32 [B, K, H, r], kept once per row in the front end's basis.

Deviations: P is measured once and then frozen, where the paper factorises every block of tokens anew: a block's own P would
be another query for every block, which no kernel reads. Every token has the same number of outliers, where the paper takes
the s / 2 largest and smallest of each channel of keys and of each token's values: buffers are static, and tokens are written
one by one. A place costs 16 bits, as a value does, where 8 are enough, so that one array holds both.

SmolLM2-135M (head_dim 64), 1,024 tokens of Moby-Dick, static setting, bfloat16 caches, KL divergence at bits per value:

=============================  ===========  ===========  ==================  ===========  ===========================
base                           alone        rank 4       sparse=.02, rank 0  both         instead
=============================  ===========  ===========  ==================  ===========  ===========================
int4(centre=none,balance=off)  .200 (4.25)  .185 (5.25)  .068 (4.75)         .059 (5.75)  rotate=true .076 (4.25)
  and rotate=true              .076 (4.25)               .038 (4.75)                      turboquant(4,4) .009 (4.25)
int4                           .022 (4.25)               .015 (4.75)                      turboquant(4,4) .009 (4.25)
kivi(2)                        .387 (3.00)  .267 (4.00)  .250 (3.50)         .214 (4.50)  kivi(3) .059 (4.00)
turboquant(2,2)                .162 (2.25)  .148 (3.25)  .124 (2.75)         .109 (3.75)  turboquant(3,3) .041 (3.25)
=============================  ===========  ===========  ==================  ===========  ===========================

P corrects what is alike in the errors of all tokens, and a good codec's errors are not. Outliers earn their bits on a format
that has nothing else against them, more than P does; a rotation, the front end or one bit more is better still.
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
