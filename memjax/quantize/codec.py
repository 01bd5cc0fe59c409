"""What a codec is: a pure pair encode / decode of the vectors in slots, with an optional rotated basis."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from memjax.evict.observer import Observer
from memjax.pallas_kernels.codes import Codes, absmax_encode, dense, nbytes_per_vector
from memjax.quantize.front import OFF, FrontEnd
from memjax.quantize.hadamard import hadamard_matrix, rotate, unrotate


@functools.partial(jax.tree_util.register_dataclass, data_fields=["first", "second"], meta_fields=[])
@dataclass(frozen=True)
class CodePair:
    """Vectors stored as two streams of codes, in the same slots.

    In the codec's basis channels of the second lie behind those of the first: scores over both add up, and outputs are read
    one stream after the other.
    """

    first: Codes
    second: Codes

    @property
    def slots(self) -> int:
        """Vectors along the last axis, S."""
        return self.first.slots


@dataclass(frozen=True)
class KeyValueCodec:
    """A method: how keys and how values are coded. A ``Codec`` is the method that codes both alike.

    ``front`` is what is done to them before, unless the policy says otherwise.
    """

    name: ClassVar[str] = "codec"
    lossy: ClassVar[bool] = True
    front: ClassVar[FrontEnd] = OFF

    @property
    def keys(self) -> Codec:
        """The codec of the keys."""
        raise NotImplementedError

    @property
    def values(self) -> Codec:
        """The codec of the values."""
        raise NotImplementedError

    @property
    def tile(self) -> int:
        """Tokens that are encoded together: they enter the history in whole tiles."""
        return math.lcm(self.keys.tile, self.values.tile)

    @property
    def claimed_bits(self) -> float | None:
        """Bits per value at head_dim 128 as the method's paper counts them; None: it has none, or says nothing."""
        return None

    @property
    def rest(self) -> KeyValueCodec | None:
        """The codec of the tokens of a tile that are not among its ``salient`` most attended ones; None: all are alike."""
        return None

    @property
    def salient(self) -> int:
        """Tokens of a tile that are coded with ``keys`` and ``values``."""
        return self.tile

    @property
    def observer(self) -> Observer | None:
        """Whose attention decides which tokens are salient."""
        return None

    @property
    def page(self) -> int:
        """Slots that are chosen and read together: the history has a multiple of them."""
        return 1

    @property
    def heads_apart(self) -> bool:
        """Whether a layer's kv heads may be coded differently, each kind in a pool of its own."""
        return False

    @property
    def two_streams(self) -> bool:
        """Whether keys or values are stored as a ``CodePair``."""
        return self.keys.paired or self.values.paired

    def validate(self, dim: int) -> None:
        """Raises ValueError if vectors of ``dim`` values cannot be encoded."""
        for codec in (self.keys, self.values):
            codec.validate(dim)

    def check_model(self, layers: int, fingerprint: str) -> None:
        """Raises ValueError if the codec holds figures of another model than that of ``fingerprint``."""


@dataclass(frozen=True)
class Codec(KeyValueCodec):
    """Encodes the vector of each slot on its own (token-wise, per kv head). Subclasses name a format of
    ``pallas_kernels.codes``. Vectors in slots lie along the axis before the last, [..., H, S]; queries and outputs are rows.

    Attention reads the codes in the codec's own basis: queries go through ``into_basis`` once per step, outputs through
    ``out_of_basis``. Lossy codecs keep sinks and recent tokens dense unless the policy says otherwise.

    A codec that measures something on a row's first tokens (``fit``) is given it back by ``fitted`` before it codes or reads.
    """

    paired: ClassVar[bool] = False  # whether ``encode`` gives a ``CodePair``
    rotate: bool = False

    @property
    def keys(self) -> Codec:
        return self

    @property
    def values(self) -> Codec:
        return self

    @property
    def tile(self) -> int:
        return 1

    @property
    def fmt(self) -> str:
        """The format of the codes (a key of ``pallas_kernels.codes``)."""
        return self.name

    def fit_shape(self, dim: int) -> tuple[int, ...] | None:
        """Shape, per row and kv head, of what ``fit`` gives for vectors of ``dim`` values, 4 bytes a number; None: nothing."""
        del dim
        return None

    def unfitted(self, lead: tuple[int, ...], dim: int) -> Array | None:
        """What stands for a fit before anything is measured."""
        del lead, dim
        return None

    def fit(self, x: Float[Array, "B K H T"], real: Bool[Array, "B 1|K T"]) -> Array | None:
        """What the codec measures on a row's first tokens; tokens that are not real may hold anything."""
        del x, real
        return None

    def fitted(self, fit: Array | None) -> Codec:
        """This codec with what it has measured; only to code and to read with."""
        del fit
        return self

    def validate(self, dim: int) -> None:
        """Raises ValueError if vectors of ``dim`` values cannot be encoded."""
        if self.rotate:
            hadamard_matrix(dim)
        nbytes_per_vector(self.fmt, dim, jnp.float32)

    def encode(self, x: Float[Array, "... H S"], dtype: DTypeLike) -> Codes:
        """Codes of every vector; ``dtype`` is the storage type of dense codecs."""
        del dtype
        x = x.astype(jnp.float32)
        return absmax_encode(rotate(x, axis=-2) if self.rotate else x, self.fmt)

    def decode(self, codes: Codes) -> Float[Array, "... H S"]:
        """The float32 vectors that the codes stand for."""
        x = codes.decode()
        return unrotate(x, axis=-2) if self.rotate else x

    def into_basis(self, x: Float[Array, "... H"]) -> Float[Array, "... H"]:
        """Queries in the basis of the codes."""
        return rotate(x) if self.rotate else x

    def out_of_basis(self, x: Float[Array, "... H"]) -> Float[Array, "... H"]:
        """The inverse of ``into_basis``, for outputs."""
        return unrotate(x) if self.rotate else x

    def middle(self, x: Float[Array, "... H S"]) -> Float[Array, "... H S"] | Float[Array, ""]:
        """What codes are counted from, float32: 0 without a zero point. Scales grow with what is far from it."""
        del x
        return jnp.zeros((), jnp.float32)

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> Codes:
        """Zero bytes for vectors of shape [..., H, S]."""
        like = jax.eval_shape(lambda: self.encode(jnp.zeros(shape, jnp.float32), dtype))
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)

    def bits_per_value(self, dim: int, dtype: DTypeLike = jnp.bfloat16) -> float:
        """Realised bits per value for vectors of ``dim`` values, scales and padding included."""
        return 8 * nbytes_per_vector(self.fmt, dim, dtype) / dim


@dataclass(frozen=True)
class Dense(Codec):
    """No quantization: vectors in the cache's dtype. 16 bits per value in bfloat16."""

    name: ClassVar[str] = "dense"
    lossy: ClassVar[bool] = False

    def encode(self, x: Float[Array, "... H S"], dtype: DTypeLike) -> Codes:
        return dense(x, dtype)
