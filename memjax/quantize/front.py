"""A front end for every codec: the constant part of keys and values is removed before coding, and channels are balanced.

    y_t = (k_t - c_t) s          c_t = R_t mu (rotary pairs) or the mean (other channels)
    q . k_t = (q / s) . y_t + q . c_t                                                       exact but for the coding of y

A key before its rotary embedding is k = mu + x; in models with biased projections mu dwarfs x. R_t turns mu with the position,
so that a fixed mean removes only the slow pairs. The term q . R_t mu is a sum of a cosine and a sine per pair, which the
kernels add to the scores (``Centre``); nothing more is stored than one mu per kv head. s_j = (E q_j^2 / E y_j^2)^(1/4)
minimises the expected error of a logit under a rotated codec, (sum_j E q_j^2 / s_j^2) (sum_j s_j^2 E y_j^2); values have the
squared norms of the output projection's rows in place of E q^2, and their mean is added back to the output once, for the
probabilities sum to 1.

Channels of a latent stream, which is keys and values at once, all get the same variance, s_j = (E y_j^2)^(-1/2): in tokens
that attention rests on small values lie beside large keys, and the error of those would drown them. (SmolLM2-135M converted
to latent attention, 4 bits: KL .0009; with the s_j that suits keys .0056.)

Statistics come from a row's own first tokens, all those that are there when the first of them enters the history (the sinks
apart), and never change again. A calibration file (``memjax.quantize.calibration``) has the better form of the balance, by
covariances; means are the row's own with it, too. The front end is this project's own; subtracting a mean from keys is
SageAttention2's (arXiv 2411.10958), balancing as in the balanced truncation of linear systems. It is on for TurboQuant and can
be asked of any codec.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from memjax.attention.rope import Rope
from memjax.cache.spec import CacheSpec
from memjax.pallas_kernels.decode.reference import Centre

ALL = -1  # of the rotary pairs
CENTRES = ("auto", "none", "fixed", "rope")
BALANCES = ("auto", "off", "channels")
_LARGEST_RATIO = 2.0**6  # of a channel's balance to the mean one
_LEAST_TURN = 0.25  # radians within the capacity, below which a pair's mean may as well be fixed


@dataclass(frozen=True)
class FrontEnd:
    """How keys and values are prepared for a codec.

    Args:
      centre: ``rope`` follows the constant part of the keys through the rotary embedding; ``fixed`` subtracts a fixed mean
        of the cached keys; ``none``; ``auto`` is ``rope`` where the layer has a rotary embedding of its own to apply, else
        ``fixed``.
      balance: ``channels``, from queries given to ``update``; ``off``; ``auto`` is ``channels`` for rows that were given
        queries, and for a latent stream.
      calibration: a file written by ``memjax calibrate`` from which the balance comes; "": from the row's own tokens.
      pairs: how many rotary pairs ``rope`` follows, ``ALL`` (-1) or a number; the others have a fixed mean of the cached
        keys, like channels outside of pairs. See ``followed``.

    Raises:
      ValueError: another name, a calibration file together with ``centre`` or ``balance``, which the file decides, or a
        number of pairs where none is followed.
    """

    centre: str = "auto"
    balance: str = "auto"
    calibration: str = ""
    pairs: int = ALL

    def __post_init__(self):
        if self.pairs < ALL:
            raise ValueError(f"pairs must be a number of rotary pairs, or {ALL} for all of them, got {self.pairs}")
        if self.pairs != ALL and (self.calibration or self.centre not in ("auto", "rope")):
            raise ValueError(
                f"pairs={self.pairs} says which rotary pairs centre=rope follows: leave it away with "
                f"{'a calibration file' if self.calibration else f'centre={self.centre}'}"
            )
        for name, allowed in (("centre", CENTRES), ("balance", BALANCES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.calibration and (self.centre, self.balance) != ("auto", "auto"):
            raise ValueError("a calibration file decides centring and balance: leave centre and balance away")

    @property
    def off(self) -> bool:
        """Whether nothing is done at all."""
        return self.centre == "none" and self.balance == "off"

    def resolved(self, spec: CacheSpec) -> FrontEnd:
        """Without ``auto`` in ``centre``.

        Raises:
          ValueError: ``rope`` for a layer whose keys arrive rotated or have no rotary embedding.
        """
        if self.calibration:
            return self
        own = isinstance(spec.rope, Rope)
        if self.centre == "rope" and not own:
            raise ValueError(
                f"centre=rope needs the layer's rotary embedding (CacheSpec(rope=Rope(...))), got rope={spec.rope!r}; use "
                "centre=fixed"
            )
        if self.centre != "auto":
            return self
        return dataclasses.replace(self, centre="rope") if own else dataclasses.replace(self, centre="fixed", pairs=ALL)


OFF = FrontEnd("none", "off")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["k_mean", "k_balance", "v_mean", "v_balance", "q_square", "k_inverse", "v_inverse", "k_fit", "v_fit"],
    meta_fields=["centre", "pairs"],
)
@dataclass(frozen=True)
class Basis:
    """What a cache's rows have measured: float32 [B, K, H], or None where the front end does without.

    Attributes:
      k_mean: mu for channels in rotary pairs that are followed (``centre``, ``pairs``), else means of the cached keys.
      k_balance, v_balance: the factor s of each channel; or, from a calibration file, [1, K, H, H], the matrix that vectors
        are multiplied with from the right.
      v_mean: means of the values; None for a latent stream, whose values are its keys.
      q_square: sums of squares of the queries seen so far; None if nothing is to be measured, and for a latent stream.
      k_inverse, v_inverse: the inverses of matrices; None for factors.
      k_fit, v_fit: what the codec itself has measured, [B, K, ...] (``Codec.fit``); None for most.
    """

    k_mean: Array | None
    k_balance: Array | None
    v_mean: Array | None
    v_balance: Array | None
    q_square: Array | None
    k_inverse: Array | None = None
    v_inverse: Array | None = None
    k_fit: Array | None = None
    v_fit: Array | None = None
    centre: str = "none"
    pairs: int = ALL


def empty_basis(front: FrontEnd, spec: CacheSpec) -> Basis | None:
    """Nothing measured yet: zero means, balance 1."""
    if front.off:
        return None
    front = front.resolved(spec)
    shape = (spec.batch, spec.kv_heads, spec.coded_dim)
    latent = spec.latent_dim is not None

    def filled(wanted: bool, value: float) -> Array | None:
        return jnp.full(shape, value, jnp.float32) if wanted else None

    centred, balanced = front.centre != "none", front.balance != "off"
    return Basis(
        k_mean=filled(centred, 0),
        k_balance=filled(balanced, 1),
        v_mean=filled(centred and not latent, 0),
        v_balance=filled(balanced and not latent, 1),
        q_square=filled(balanced and not latent, 0),
        centre=front.centre,
        pairs=front.pairs,
    )


def observe(basis: Basis, q: Float[Array, "B T N H"], real: Bool[Array, "B T"]) -> Basis:
    """Takes queries, rotated as they will meet the keys, into ``q_square``."""
    batch, tokens, _, _ = q.shape
    heads, dim = basis.q_square.shape[1:]
    rows = q[..., :dim].astype(jnp.float32).reshape(batch, tokens, heads, -1, dim)
    squares = jnp.einsum("btkgh,bt->bkh", rows * rows, real.astype(jnp.float32))
    return dataclasses.replace(basis, q_square=basis.q_square + squares)


def measure(
    basis: Basis,
    k: Float[Array, "B K H T"],
    v: Float[Array, "B K H T"] | None,
    position: Int[Array, "B 1|K T"],
    real: Bool[Array, "B 1|K T"],
    spec: CacheSpec,
    v_weight: Float[Array, "K H"] | None,
) -> Basis:
    """The basis that tokens give, keys as they are cached; without ``value_weight`` values are not balanced."""
    count = jnp.maximum(jnp.sum(real, axis=-1, keepdims=True), 1).astype(jnp.float32)

    def mean(x: Array) -> Array:
        return jnp.sum(jnp.where(real[:, :, None], x, 0.0), axis=-1) / count

    k = k.astype(jnp.float32)
    k_mean = basis.k_mean
    if k_mean is not None:
        k_mean = mean(turn(k, -position, spec, basis.pairs) if basis.centre == "rope" else k)
    found = dataclasses.replace(basis, k_mean=k_mean)
    if v is not None and basis.v_mean is not None:
        found = dataclasses.replace(found, v_mean=mean(v.astype(jnp.float32)))
    if basis.k_balance is None or basis.k_inverse is not None:  # the matrices of a calibration file stay
        return found
    power = mean(jnp.square(centred_keys(found, k, position, spec)))
    if spec.latent_dim is not None:
        return dataclasses.replace(found, k_balance=_balance(jnp.ones_like(power), jnp.square(power)))
    known = jnp.any(basis.q_square > 0, axis=(1, 2), keepdims=True)
    found = dataclasses.replace(found, k_balance=jnp.where(known, _balance(basis.q_square, power), 1.0))
    if v is None or v_weight is None:
        return found
    spread = jnp.square(v.astype(jnp.float32) - (0.0 if found.v_mean is None else found.v_mean[..., None]))
    return dataclasses.replace(found, v_balance=_balance(v_weight, mean(spread)))


def value_weight(output_projection: Float[Array, "N H D"], spec: CacheSpec) -> Float[Array, "K H"]:
    """What channels of the values count for: squared norms of the output projection's rows, over the heads of a group."""
    squares = jnp.sum(jnp.square(output_projection.astype(jnp.float32)), axis=-1)
    return jnp.sum(squares.reshape(spec.kv_heads, -1, spec.value_dim), axis=1)


def _balance(weight: Array, power: Array) -> Array:
    """(weight / power)^(1/4), relative to its mean over a head's channels and kept near it."""

    def relative(x: Array) -> Array:
        x = jnp.maximum(x, 1e-6 * jnp.mean(x, axis=-1, keepdims=True))
        return jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1.0)), 0.0)

    log = 0.25 * (relative(weight) - relative(power))
    log = log - jnp.mean(log, axis=-1, keepdims=True)
    bound = float(np.log(_LARGEST_RATIO))
    return jnp.exp(jnp.clip(log, -bound, bound))


def followed(spec: CacheSpec, count: int = ALL) -> Int[np.ndarray, "J"]:
    """Numbers of the rotary pairs that ``centre=rope`` follows, of those inside the coded channels.

    Kernels want the same ones for all heads, so the frequencies alone decide. Mu is largest in slow pairs, but one that
    hardly turns within the capacity needs no following: the slowest come first of those that turn by a quarter of a radian
    or more, then faster ones, then the ones that do not turn.
    """
    rope = spec.rope
    if not isinstance(rope, Rope) or rope.start + rope.dim > spec.coded_dim:
        return np.arange(0)
    frequency = rope.inv_freq(spec.capacity)
    if count == ALL:
        return np.arange(len(frequency))
    turning = frequency * spec.capacity >= _LEAST_TURN
    order = np.lexsort((np.where(turning, frequency, -frequency), ~turning))
    return np.sort(order[:count])


def pairs(spec: CacheSpec, count: int = ALL) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Channels a [J] and b [J] of each rotary pair that is followed, and the other coded channels."""
    chosen, rope = followed(spec, count), spec.rope
    if not chosen.size:
        return chosen, chosen, np.arange(spec.coded_dim)
    a, b = (channels[chosen] for channels in rope.pairs)
    return a, b, np.setdiff1d(np.arange(spec.coded_dim), [*a, *b])


def turn(
    x: Float[Array, "B K H T"], position: Int[Array, "B 1|K T"], spec: CacheSpec, count: int = ALL
) -> Float[Array, "B K H T"]:
    """Vectors rotated by their position in the pairs that are followed (a pure rotation, without yarn's factor)."""
    a, b, rest = pairs(spec, count)
    if not a.size:
        return x
    frequency = jnp.asarray(spec.rope.inv_freq(spec.capacity)[followed(spec, count)])
    angle = position.astype(jnp.float32)[:, :, None, :] * frequency[:, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    xa, xb = _channels(x, a, -2), _channels(x, b, -2)
    parts = [xa * cos - xb * sin, xb * cos + xa * sin]
    if rest.size:
        lead = parts[0].shape
        parts.append(jnp.broadcast_to(_channels(x, rest, -2), (*lead[:2], rest.size, lead[-1])))
    return _channels(jnp.concatenate(parts, axis=-2), np.argsort(np.concatenate([a, b, rest])), -2)


def _channels(x: Array, index: np.ndarray, axis: int) -> Array:
    """``x`` at static channels; as a slice, which compiles and runs faster than a gather, if they are in a row."""
    if np.array_equal(index, np.arange(index[0], index[0] + index.size)):
        return jax.lax.slice_in_dim(x, int(index[0]), int(index[0]) + index.size, axis=axis)
    return jnp.take(x, index, axis=axis)


def centred_keys(
    basis: Basis, k: Float[Array, "B K H T"], position: Int[Array, "B 1|K T"], spec: CacheSpec
) -> Float[Array, "B K H T"]:
    """Keys without their constant part, float32."""
    return k.astype(jnp.float32) - _constant(basis, position, spec)


def _constant(basis: Basis, position: Int[Array, "B 1|K T"], spec: CacheSpec) -> Array | float:
    """The constant part of keys as they are cached."""
    if basis.k_mean is None:
        return 0.0
    constant = basis.k_mean[..., None]
    return turn(constant, position, spec, basis.pairs) if basis.centre == "rope" else constant


def prepare_keys(basis: Basis | None, k: Array, position: Int[Array, "B 1|K T"], spec: CacheSpec) -> Array:
    """What the codec is given for keys [B, K, H, T]."""
    return k if basis is None else _multiply(centred_keys(basis, k, position, spec), basis.k_balance)


def restore_keys(basis: Basis | None, y: Float[Array, "B K H T"], position: Int[Array, "B 1|K T"], spec: CacheSpec) -> Array:
    """Inverts ``prepare_keys``, float32."""
    if basis is None:
        return y
    if basis.k_balance is not None:
        y = jnp.swapaxes(_divide(jnp.swapaxes(y, -1, -2), basis.k_balance, basis.k_inverse, "bkmh,khg->bkmg"), -1, -2)
    return y + _constant(basis, position, spec)


def prepare_values(basis: Basis | None, v: Array) -> Array:
    """What the codec is given for values [B, K, H, T]."""
    if basis is None:
        return v
    v = v.astype(jnp.float32)
    return _multiply(v if basis.v_mean is None else v - basis.v_mean[..., None], basis.v_balance)


def prepare_queries(basis: Basis | None, q: Float[Array, "B K M H"]) -> Float[Array, "B K M H"]:
    """Queries that meet prepared keys, in q's dtype."""
    if basis is None or basis.k_balance is None:
        return q
    return _divide(q.astype(jnp.float32), basis.k_balance, basis.k_inverse, "bkmh,kgh->bkmg").astype(q.dtype)


def restore_outputs(basis: Basis | None, out: Float[Array, "B K M H"], lse: Array, spec: CacheSpec) -> Array:
    """Attention outputs over prepared values, in the model's basis."""
    if basis is None:
        return out
    latent = spec.latent_dim is not None
    balance, inverse, mean = (
        (basis.k_balance, basis.k_inverse, basis.k_mean) if latent else (basis.v_balance, basis.v_inverse, basis.v_mean)
    )
    if balance is not None:
        out = _divide(out, balance, inverse, "bkmh,khg->bkmg")
    if mean is None:
        return out
    return out + jnp.where(jnp.isfinite(lse), 1.0, 0.0)[..., None] * mean[:, :, None]


def centre_term(basis: Basis | None, q: Float[Array, "B K M H"], spec: CacheSpec) -> Centre | None:
    """What the constant part of the keys adds to the scores of rotated queries.

    Channels outside of the pairs that are followed, and all of them if the mean is fixed, make one more pair, of frequency
    zero.
    """
    if basis is None or basis.k_mean is None:
        return None
    count = basis.pairs if basis.centre == "rope" else 0
    a, b, rest = pairs(spec, count)
    q, mu = q.astype(jnp.float32), basis.k_mean[:, :, None]
    cos, sin, frequency = [], [], np.zeros(0, np.float32)
    if a.size:
        (qa, qb), (ma, mb) = ([_channels(x, index, -1) for index in (a, b)] for x in (q, mu))
        cos, sin = [qa * ma + qb * mb], [qb * ma - qa * mb]
        frequency = spec.rope.inv_freq(spec.capacity)[followed(spec, count)]
    if rest.size:
        constant = jnp.sum(_channels(q, rest, -1) * _channels(mu, rest, -1), axis=-1, keepdims=True)
        cos, sin, frequency = [*cos, constant], [*sin, jnp.zeros_like(constant)], np.append(frequency, np.float32(0))
    return Centre(jnp.concatenate([*cos, *sin], axis=-1), frequency)


def _multiply(x: Float[Array, "B K H T"], balance: Array | None) -> Array:
    """s x, or x A for a matrix."""
    if balance is None:
        return x
    if balance.ndim == 3:
        return x * balance[..., None]
    return jnp.einsum("bkht,khg->bkgt", x, balance[0], precision=jax.lax.Precision.HIGHEST)


def _divide(x: Float[Array, "B K M H"], balance: Array, inverse: Array | None, subscripts: str) -> Array:
    """x / s, or the product with the inverse of a matrix."""
    if inverse is None:
        return x / balance[:, :, None]
    return jnp.einsum(subscripts, x, inverse[0], precision=jax.lax.Precision.HIGHEST)
