"""TurboQuant (arXiv 2504.19874, ICLR 2026): rotate, then round every coordinate to the Lloyd-Max levels of its known law.

    y = sqrt(H) R x / |x|,   code_h = the nearest level c to y_h,   x ~ s R' c        per token and kv head

R is orthogonal, so coordinates of y have nearly the standard Gaussian law whatever x is (``codebook``), and no zero point or
calibration is needed. ``s`` is one bfloat16 per vector that holds norm, sqrt(H) and the table's unit. How it is chosen:

===================  ===================  ===================================================================
``norm``             |x| / sqrt(H)        the paper's; shortens vectors: E |x'|^2 = (1 - D) |x|^2
``matched``          |x| / |c|            lengths exact up to rounding ("norm correction" in vLLM)
``unbiased``         |x|^2 / <R x, c>     E <q, x'> = <q, x> (EDEN, arXiv 2202.08820; its note 2604.18555)
``least_squares``    <R x, c> / |c|^2     the smallest error that these codes allow (EDEN's biased scale)
``search``           |x| / |c|            as matched, with the best of nine factors on y before it is rounded
===================  ===================  ===================================================================

``search`` is the default of ``TurboQuant``. A scale of least squares after the search has less error and is worse: SmolLM2's
KL divergence at 2 bits in the static setting is .27 then, and .22 with lengths that are kept.

Realised bits per value: bits + 16 / H, that is 4.25, 3.25, 2.25 at head_dim 64 and 4.125, 3.125, 2.125 at 128.

Deviations: the rotation is a signed Hadamard matrix (``dense`` is the paper's QR of a Gaussian); the codebook is that of the
head dimension's exact law, rounded to integers (D + 0.08 % at most); the scale is searched; whole bits set no channels apart,
2.5 and 3.5 do (``channel_split``). At head dimensions that are not powers of two the Hadamard blocks mix fewer channels and
the law is further from the codebook's.

``prod_encode``, ``prod_decode``: the paper's TurboQuant_prod, MSE codes of b - 1 bits and a QJL sketch (arXiv 2406.03482) of
the signs of the residual. Unbiased inner products, but with 5 times (iid sketch) or 2 times (orthogonal) the error of b MSE
bits, and softmax forgives bias, not variance: inferior for attention, and kept as a reference only, on unpacked arrays.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8

from memjax.pallas_kernels.codes import SCALE_DTYPE, Codes, Grid, cubic, pack
from memjax.quantize.channel_split import ChannelSplit
from memjax.quantize.codebook import cubic_levels, int_table, lloyd_max, midpoints
from memjax.quantize.codec import Codec, KeyValueCodec
from memjax.quantize.front import FrontEnd
from memjax.quantize.hadamard import hadamard_matrix

SCALES = ("norm", "matched", "unbiased", "least_squares", "search")
GRIDS = ("lloyd", "cubic")
ROTATIONS = ("hadamard", "dense", "none")
BITS = (2, 3, 4)
SPLIT_BITS = (2.5, 3.5)
# Around 1, where most vectors have their best factor; a vector with a heavy tail wants less of its grid cut off.
_FACTORS = (0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2)


@dataclass(frozen=True)
class Lloyd(Codec):
    """One stream of TurboQuant_mse: 2, 3 or 4 bits per value and one scale per vector.

    Raises:
      ValueError: another number of bits, scale, grid or rotation.

    >>> Lloyd(bits=2).bits_per_value(128), Lloyd(bits=4).bits_per_value(64)
    (2.125, 4.25)
    """

    name: ClassVar[str] = "lloyd"
    rotate: ClassVar[bool] = False  # ``rotation`` says it
    bits: int = 4
    scale: str = "matched"
    grid: str = "lloyd"
    rotation: str = "hadamard"

    def __post_init__(self):
        if self.bits not in BITS:
            raise ValueError(
                f"TurboQuant codes have 2, 3 or 4 bits, got {self.bits}; no packed format holds others (2.5 and 3.5 bits are "
                "two of them, over a quarter and over the rest of the channels)"
            )
        _one_of("scale", self.scale, SCALES)
        _one_of("grid", self.grid, GRIDS)
        _one_of("rotation", self.rotation, ROTATIONS)

    @property
    def fmt(self) -> str:
        return f"int{self.bits}"

    def validate(self, dim: int) -> None:
        super().validate(dim)
        if self.rotation == "hadamard":
            try:
                hadamard_matrix(dim)
            except ValueError as error:
                raise ValueError(str(error).replace("rotate=false", "rotation='dense'")) from None

    def code_grid(self, dim: int) -> Grid:
        """``Codes.grid`` of vectors of ``dim`` values."""
        return "cubic" if self.grid == "cubic" else int_table(self.bits, dim)[0]

    def encode(self, x: Float[Array, "... H S"], dtype: DTypeLike) -> Codes:
        """Codes with one scale per slot. A zero vector gets scale zero; a NaN or an infinity makes its vector NaN."""
        del dtype
        dim = x.shape[-2]
        x = x.astype(jnp.float32)
        peak = jnp.max(jnp.abs(x), axis=-2, keepdims=True)
        sound = jnp.isfinite(peak) & (peak > 0)
        # Divided by its largest value first: squares of what bfloat16 can hold overflow float32.
        y = jnp.where(sound, x / jnp.where(sound, peak, 1.0), 0.0)
        y = _turn(y, self._matrix(dim), rows=False)
        norm = jnp.linalg.norm(y, axis=-2, keepdims=True)
        codes, scale = self._search(y, norm) if self.scale == "search" else self._round(y, norm, 1.0)
        scale = jnp.where(jnp.isfinite(peak), scale * peak, jnp.nan)[..., 0, :]
        return Codes(pack(codes, self.fmt), scale.astype(SCALE_DTYPE), self.fmt, grid=self.code_grid(dim))

    def decode(self, codes: Codes) -> Float[Array, "... H S"]:
        return _turn(codes.decode(), self._inverse(codes.dim), rows=False)

    def into_basis(self, x: Float[Array, "... H"]) -> Float[Array, "... H"]:
        return _turn(x, self._matrix(x.shape[-1]), rows=True)

    def out_of_basis(self, x: Float[Array, "... H"]) -> Float[Array, "... H"]:
        return _turn(x, self._inverse(x.shape[-1]), rows=True)

    def _matrix(self, dim: int) -> np.ndarray | None:
        return {"hadamard": hadamard_matrix, "dense": dense_rotation, "none": lambda _: None}[self.rotation](dim)

    def _inverse(self, dim: int) -> np.ndarray | None:
        matrix = self._matrix(dim)
        return None if matrix is None else matrix.T

    def _levels(self, dim: int) -> tuple[np.ndarray, float]:
        """Levels as they are stored, ascending, and the unit that gives them variance one."""
        if self.grid == "cubic":
            return cubic_levels(self.bits), 1.0
        table, unit = int_table(self.bits, dim)
        return np.asarray(table, np.float64), unit

    def _edges(self, dim: int) -> np.ndarray:
        """Where the code changes, in units of the stored levels."""
        return midpoints(self._levels(dim)[0])

    def _round(self, y: Float[Array, "... H S"], norm: Float[Array, "... 1 S"], factor: float | Array):
        """Signed codes of ``y`` and the scale of its stored levels."""
        dim = y.shape[-2]
        levels, unit = self._levels(dim)
        step = unit * norm / (dim**0.5 * factor)  # what one stored level is worth while rounding
        codes = sum((y > np.float32(edge) * step).astype(jnp.int8) for edge in self._edges(dim))
        codes = codes - jnp.int8(2 ** (self.bits - 1))
        if self.scale == "norm":
            return codes, step
        found = self._look_up(codes, levels)
        length, dot = jnp.sum(found * found, -2, keepdims=True), jnp.sum(found * y, -2, keepdims=True)
        if self.scale in ("matched", "search"):
            return codes, norm / jnp.sqrt(length)
        if self.scale == "unbiased":
            return codes, jnp.where(dot > 0, norm * norm / jnp.where(dot > 0, dot, 1.0), 0.0)
        return codes, dot / length

    def _look_up(self, codes: Int8[Array, "... H S"], levels: np.ndarray) -> Float[Array, "... H S"]:
        if self.grid == "cubic":
            return cubic(codes.astype(jnp.float32) + 0.5, self.fmt)
        return jnp.asarray(levels, jnp.float32)[codes.astype(jnp.int32) + levels.size // 2]

    def _search(self, y: Float[Array, "... H S"], norm: Float[Array, "... 1 S"]):
        """Codes and scale of the factor with the smallest angle between ``y`` and its levels."""
        levels, unit = self._levels(y.shape[-2])
        factors = jnp.asarray(_FACTORS, jnp.float32)
        step = unit * norm / (y.shape[-2] ** 0.5 * factors.reshape(-1, *(1,) * y.ndim))
        # Sums over comparisons, which XLA fuses into the sums over channels: nothing of [factors, ..., H, S] is ever stored.
        level = levels[0] + sum(
            np.float32(rise) * (y > np.float32(edge) * step).astype(jnp.float32)
            for rise, edge in zip(np.diff(levels), self._edges(y.shape[-2]), strict=True)
        )
        length, dot = (jnp.sum(level * x, -2, keepdims=True) for x in (level, y))
        best = jnp.argmax(dot * dot / length, axis=0)
        return self._round(y, norm, factors[best])


@dataclass(frozen=True)
class TurboQuant(KeyValueCodec):
    """Keys and values, each with its own bits; keys deserve more. 2.5 and 3.5 split the channels.

    >>> TurboQuant(4, 3).values
    Lloyd(bits=3, scale='search', grid='lloyd', rotation='hadamard')
    """

    name: ClassVar[str] = "turboquant"
    front: ClassVar[FrontEnd] = FrontEnd()
    key_bits: float = 4
    value_bits: float = 4
    scale: str = "search"
    grid: str = "lloyd"
    rotation: str = "hadamard"

    def __post_init__(self):
        _ = self.keys, self.values  # refuses what they refuse

    @property
    def claimed_bits(self) -> float:
        """A norm in float16 per vector; bits that are split count theirs already."""
        return sum(b + (0.125 if b == int(b) else 0.0) for b in (self.key_bits, self.value_bits)) / 2

    @property
    def keys(self) -> Lloyd | ChannelSplit:
        return self._stream(self.key_bits)

    @property
    def values(self) -> Lloyd | ChannelSplit:
        return self._stream(self.value_bits)

    def _stream(self, bits: float) -> Lloyd | ChannelSplit:
        if bits not in SPLIT_BITS:
            return Lloyd(int(bits) if bits in BITS else bits, self.scale, self.grid, self.rotation)
        # Three quarters of the channels are no power of two, of which alone a Hadamard matrix mixes all.
        rest = "dense" if self.rotation == "hadamard" else self.rotation
        few, many = int(bits) + 1, int(bits)
        return ChannelSplit(Lloyd(few, self.scale, self.grid, self.rotation), Lloyd(many, self.scale, self.grid, rest))


@functools.lru_cache(maxsize=16)
def dense_rotation(dim: int, seed: int = 0) -> np.ndarray:
    """A uniformly random orthogonal float32 [dim, dim] matrix: QR of a Gaussian, R's diagonal made positive."""
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, dim)))
    matrix = (q * np.sign(np.diag(r))).astype(np.float32)
    matrix.setflags(write=False)
    return matrix


class Prod(NamedTuple):
    """TurboQuant_prod of vectors [..., H, S], unpacked: b bits per value and two floats per vector."""

    codes: Int8[Array, "... H S"] | None  # of b - 1 bits, 0 .. 2^(b - 1) - 1; None at b = 1
    signs: Int8[Array, "... H S"]  # of the sketched residual
    norm: Float[Array, "... 1 S"]
    residual_norm: Float[Array, "... 1 S"]  # of the residual of the vector scaled to length one


def prod_encode(x: Float[Array, "... H S"], bits: int, sketch: str = "iid") -> Prod:
    """b - 1 bits of Lloyd-Max codes, and the signs of S r for their residual r; ``sketch`` S is iid or orthogonal.

    Raises:
      ValueError: bits outside 1 .. 4, another sketch.

    >>> prod_encode(jnp.ones((8, 2)), bits=1).signs.shape
    (8, 2)
    """
    dim, matrix = x.shape[-2], _sketch(x.shape[-2], sketch)
    if bits not in (1, *BITS):
        raise ValueError(f"TurboQuant_prod takes 1 to 4 bits, its sign included, got {bits}")
    x = x.astype(jnp.float32)
    norm = jnp.linalg.norm(x, axis=-2, keepdims=True)
    y = _turn(x / jnp.where(norm > 0, norm, 1.0), dense_rotation(dim), rows=False)
    codes = None
    if bits > 1:
        levels = lloyd_max(bits - 1, dim) / dim**0.5
        codes = sum((y > np.float32(edge)).astype(jnp.int8) for edge in midpoints(levels))
    residual = y - _prod_mean(codes, bits, dim)
    signs = jnp.where(_turn(residual, matrix.T, rows=False) >= 0, jnp.int8(1), jnp.int8(-1))
    return Prod(codes, signs, norm, jnp.linalg.norm(residual, axis=-2, keepdims=True))


def prod_decode(stored: Prod, bits: int, sketch: str = "iid") -> Float[Array, "... H S"]:
    """The vectors whose inner products with any query are unbiased estimates."""
    dim = stored.signs.shape[-2]
    factor = (np.pi / 2) ** 0.5 / (dim if sketch == "iid" else dim**0.5)
    sketched = _turn(stored.signs.astype(jnp.float32), _sketch(dim, sketch), rows=False)
    y = _prod_mean(stored.codes, bits, dim) + np.float32(factor) * stored.residual_norm * sketched
    return stored.norm * _turn(y, dense_rotation(dim).T, rows=False)


def _prod_mean(codes: Array | None, bits: int, dim: int) -> Array:
    if codes is None:
        return jnp.float32(0.0)
    return jnp.asarray(lloyd_max(bits - 1, dim) / dim**0.5, jnp.float32)[codes.astype(jnp.int32)]


@functools.lru_cache(maxsize=8)
def _sketch(dim: int, kind: str) -> np.ndarray:
    _one_of("sketch", kind, ("iid", "orthogonal"))
    if kind == "orthogonal":
        return dense_rotation(dim, seed=1)
    return np.random.default_rng(1).standard_normal((dim, dim)).astype(np.float32)


def _turn(x: Array, matrix: np.ndarray | None, rows: bool) -> Array:
    """Rows x (last axis) times ``matrix``, or vectors in slots likewise, in x's dtype."""
    if matrix is None:
        return x
    subscripts = "...h,hg->...g" if rows else "...hs,hg->...gs"
    return jnp.einsum(subscripts, x.astype(jnp.float32), matrix, precision=jax.lax.Precision.HIGHEST).astype(x.dtype)


def _one_of(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{what} {value!r} is not one of {', '.join(allowed)}")
