"""One layer of grouped-query attention rewritten as latent attention, in float64 NumPy (TransMLA, arXiv 2502.07864).

All K kv heads are seen as one stream. Let z[h, j] be pair j of head h as a complex number, which the rotary embedding
multiplies by exp(i w_j p). Any complex matrix that mixes the *heads* of one frequency commutes with that, so

    y_j = A_j z_j,   q~_j = A_j^-H q_j          leaves every score q . k unchanged          (RoRoPE)

and A_j can gather a frequency's energy in its first components. Of all components, ``pairs`` keep their rotary embedding: the
part of the cache that all heads share. The others lose it, and are compressed together with the values,

    c = P [y_plain | v],   y_plain ~ P_k^T c,   v ~ P_v^T c,    P: the r strongest directions of their second moments.

Everything is linear in the layer's input x, so that E[x x^T] is all that the activations are needed for, and everything but P
x and the rotary part is absorbed into per-head matrices: a query meets the latent through ``up_key[n] = D_k[g(n)] P_k^T``.

With ``fold`` g > 1, g neighbouring frequencies count as one, their geometric mean, and A mixes g K pairs (FreqFold): better
compression, but no longer exact.

Deviations from the paper, all off with ``plain=True``. (1) A is complex where the paper's is real: it commutes all the same.
(2) Moments are weighted by what an error costs: keys by the second moments of the queries that meet them, values by the output
projection; the paper takes both as they are. (3) The paper keeps the same number of components of every frequency; here those
whose scores suffer most without rotation are kept, over all frequencies, ``Distances`` telling how far queries look back.
(4) A component that loses its rotation gets the mean of it over those distances instead, a constant factor. And
``memjax.convert.model`` (5) counts a text's first token more than the others and (6) weighs plain keys above values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Complex, Float

from memjax.attention.rope import Rope

_FLOOR = 1e-4  # of a weight's mean eigenvalue: weights have to be inverted


@dataclass(frozen=True)
class GroupedQuery:
    """The projections of a layer of grouped-query attention, float64: y = x @ kernel.

    Attributes:
      q: [D, N, H].
      k, v: [D, K, H].
      out: [N, H, D].
    """

    q: Float[np.ndarray, "D N H"]
    k: Float[np.ndarray, "D K H"]
    v: Float[np.ndarray, "D K H"]
    out: Float[np.ndarray, "N H D"]

    def query_moments(self, moment: Float[np.ndarray, "D D"]) -> Float[np.ndarray, "KH KH"]:
        """Sum over query heads of E[q q^T], each in the place of its kv head: block diagonal."""
        heads, size = self.k.shape[1:]
        q = self.q.reshape(self.q.shape[0], heads, -1, size)
        q = q.transpose(1, 2, 3, 0)
        return _blocks((q @ moment @ q.swapaxes(-1, -2)).sum(axis=1))

    def value_weights(self) -> Float[np.ndarray, "KH KH"]:
        """Sum over query heads of W_o W_o^T, each in the place of its kv head: block diagonal."""
        heads, size = self.v.shape[1:]
        out = self.out.reshape(heads, -1, size, self.out.shape[-1])
        return _blocks((out @ out.swapaxes(-1, -2)).sum(axis=1))


@dataclass(frozen=True)
class Latent:
    """The projections of the same layer as latent attention, float64; shapes as in ``memjax.models.latent``.

    Attributes:
      q: [D, N, H + rope_dim]: the layer's own queries, then the rotary ones.
      kv_a: [D, r + rope_dim]: latent, then rotary keys.
      up_key: [N, H, r].
      up_value: [N, r, H].
      out: [N, H, D], as before.
    """

    q: Float[np.ndarray, "D N Q"]
    kv_a: Float[np.ndarray, "D C"]
    up_key: Float[np.ndarray, "N H r"]
    up_value: Float[np.ndarray, "N r H"]
    out: Float[np.ndarray, "N H D"]


@dataclass(frozen=True)
class Distances:
    """How far queries look back, when rotations are judged: distance d < reach with a weight of (1 + d)^-power."""

    reach: int = 512
    power: float = 1.5

    def mean_turn(self, freqs: Float[np.ndarray, "F"]) -> Complex[np.ndarray, "F"]:
        """E[exp(-i w d)] of every frequency: what the rotation between a query and the keys behind it is on average."""
        d = np.arange(self.reach, dtype=np.float64)
        weights = (1 + d) ** -self.power
        return np.exp(-1j * np.outer(freqs, d)) @ (weights / weights.sum())


@dataclass(frozen=True)
class Component:
    """Components of the keys of one group of frequencies, strongest first.

    Attributes:
      freq: angle per position that they have in common.
      channels: [M, 2]: first and second channel of each of the M = K g pairs that they mix, among the K H channels.
      encode: A, complex [M, M]; y = A z.
      energy: [M]: second moment of each component's part of the scores.
    """

    freq: float
    channels: np.ndarray
    encode: Complex[np.ndarray, "M M"]
    energy: Float[np.ndarray, "M"]


def frequency_rope(freqs: Sequence[float] | np.ndarray) -> Rope:
    """A rotary embedding of 2 F channels, half-split, that turns pair j by ``freqs[j]`` per position, whatever they are.

    The divisors of ``freq_factors`` express it; angles agree to a relative 1e-7, the rounding of ``inv_freq`` to float32.

    >>> frequency_rope([1.0, 1.0, 0.25]).inv_freq(1).tolist()
    [1.0, 1.0, 0.25]
    """
    freqs = np.asarray(freqs, np.float64)
    dim, theta = 2 * freqs.size, 10000.0
    own = theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    return Rope(dim, theta, freq_factors=tuple((own / freqs).tolist()))


def components(
    layer: GroupedQuery, moment: Float[np.ndarray, "D D"], rope: Rope, fold: int = 1, plain: bool = False
) -> list[Component]:
    """The keys of a layer, turned across heads so that few components hold most of each frequency (RoRoPE, FreqFold).

    Args:
      moment: E[x x^T] of the layer's input.
      fold: so many neighbouring frequencies are taken as one; it divides H / 2.
      plain: as the paper has it, real rotations by the principal components of the keys.
    """
    heads, size = layer.k.shape[1:]
    kernel = layer.k.reshape(-1, heads * size)
    keys, queries = kernel.T @ moment @ kernel, layer.query_moments(moment)
    first, second = rope.pairs
    freqs = rope.inv_freq(1).astype(np.float64)
    found = []
    for start in range(0, size // 2, fold):
        pairs = range(start, start + fold)
        channels = np.array([[h * size + first[j], h * size + second[j]] for j in pairs for h in range(heads)])
        spread, weight = _complex_moment(keys, channels), _complex_moment(queries, channels)
        if plain:
            spread, weight = spread.real, np.eye(len(channels))
        half = _root(weight)
        energy, basis = np.linalg.eigh(half @ spread @ half.conj().T)
        freq = float(np.exp(np.mean(np.log(freqs[start : start + fold]))))
        found.append(Component(freq, channels, basis.conj().T[::-1] @ half, np.maximum(energy[::-1], 0.0)))
    return found


def keep_pairs(
    layers: Sequence[Sequence[Component]], pairs: int, distances: Distances, plain: bool = False
) -> tuple[int, ...]:
    """How many components of each group keep their rotary embedding, the same in all layers so that they share one ``Rope``.

    What losing it costs, the mean over layers of energy x (1 - |mean turn|^2), decides; with ``plain`` all groups get as many.
    """
    turn = distances.mean_turn(np.array([group.freq for group in layers[0]]))
    cost = np.mean([[group.energy for group in groups] for groups in layers], axis=0) * (1 - np.abs(turn) ** 2)[:, None]
    if plain:
        cost = np.broadcast_to(1.0 / (1 + np.arange(cost.shape[1])), cost.shape)
    # Falling along components, so that the best are always a group's first.
    order = np.argsort(-cost, axis=None, kind="stable")[:pairs]
    return tuple(np.bincount(order // cost.shape[1], minlength=len(turn)).tolist())


def rotary_freqs(groups: Sequence[Component], kept: Sequence[int]) -> np.ndarray:
    """The frequency of every pair that keeps its rotary embedding."""
    return np.repeat([group.freq for group in groups], kept)


def to_latent(
    layer: GroupedQuery,
    moment: Float[np.ndarray, "D D"],
    groups: Sequence[Component],
    kept: Sequence[int],
    rank: int,
    distances: Distances | None = None,
    balance: float = 1.0,
    plain: bool = False,
) -> Latent:
    """The layer as latent attention with a latent of ``rank`` and 2 sum(kept) rotary channels.

    Args:
      kept: how many components of each group keep the rotary embedding.
      distances: tell the mean turn that the others get; None: no turn at all.
      balance: second moment of all plain keys against that of all values, once weighted; the paper's balance is 1.
    """
    rotary_in, rotary_out, plain_in, plain_out = _split(groups, kept, distances)
    heads, size = layer.k.shape[1:]
    k, v = (kernel.reshape(-1, heads * size) for kernel in (layer.k, layer.v))
    weights = (np.eye(len(plain_in)), np.eye(heads * size))
    if not plain:
        weights = (plain_out.T @ layer.query_moments(moment) @ plain_out, layer.value_weights())
    squeeze, expand_key, expand_value = _latent_basis(moment, k @ plain_in.T, v, weights, rank, balance)
    per_query = layer.q.shape[1] // heads
    up_key = np.repeat((plain_out @ expand_key).reshape(heads, size, rank), per_query, axis=0)
    up_value = np.repeat(expand_value.reshape(heads, size, rank), per_query, axis=0)
    by_head = np.repeat(rotary_out.reshape(heads, size, -1), per_query, axis=0)
    rotary_q = (layer.q.swapaxes(0, 1) @ by_head).swapaxes(0, 1)
    kv_a = np.concatenate([np.concatenate([k @ plain_in.T, v], axis=1) @ squeeze.T, k @ rotary_in.T], axis=1)
    return Latent(np.concatenate([layer.q, rotary_q], axis=-1), kv_a, up_key, up_value.swapaxes(1, 2), layer.out)


def _latent_basis(
    moment: np.ndarray, keys: np.ndarray, values: np.ndarray, weights: tuple, rank: int, balance: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[r, Ck + Cv] from plain keys and values to the latent, [Ck, r] and [Cv, r] back."""
    halves = [_root(weight) for weight in weights]
    for i, (kernel, share) in enumerate(((keys, balance), (values, 1.0))):
        energy = np.trace(halves[i] @ kernel.T @ moment @ kernel @ halves[i].T)
        if energy > 0:
            halves[i] = halves[i] * math.sqrt(share * kernel.shape[1] / energy)
    joined = np.concatenate([keys @ halves[0].T, values @ halves[1].T], axis=1)
    _, basis = np.linalg.eigh(joined.T @ moment @ joined)
    chosen = basis[:, ::-1][:, :rank].T
    cut = keys.shape[1]
    squeeze = np.concatenate([chosen[:, :cut] @ halves[0], chosen[:, cut:] @ halves[1]], axis=1)
    return squeeze, np.linalg.solve(halves[0], chosen[:, :cut].T), np.linalg.solve(halves[1], chosen[:, cut:].T)


def _split(groups: Sequence[Component], kept: Sequence[int], distances: Distances | None) -> tuple[np.ndarray, ...]:
    """Real matrices into the rotary pairs (half-split) and out of them, into the plain channels and out of them."""
    size = 2 * sum(len(group.channels) for group in groups)
    turns = np.ones(len(groups)) if distances is None else distances.mean_turn(np.array([g.freq for g in groups]))
    rotary: list[list[np.ndarray]] = [[], [], [], []]
    plain: list[list[np.ndarray]] = [[], [], [], []]
    for group, count, turn in zip(groups, kept, turns, strict=True):
        decode = np.linalg.inv(group.encode)
        for i in range(len(group.channels)):
            into = rotary if i < count else plain
            # y = A z means Re y = Re A a - Im A b, Im y = Im A a + Re A b; columns of the inverse give z back.
            rows = _real_rows(group.encode[i], group.channels, size)
            columns = _real_rows(np.conj(decode[:, i] * (1.0 if i < count else turn)), group.channels, size)
            for target, row in zip(into, (*rows, *columns), strict=True):
                target.append(row)

    def joined(rows: list[list[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        stacked = [np.array(each).reshape(-1, size) for each in rows]
        return np.concatenate(stacked[:2]), np.concatenate(stacked[2:]).T

    return *joined(rotary), *joined(plain)


def _real_rows(row: np.ndarray, channels: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    real, imaginary = np.zeros(size), np.zeros(size)
    real[channels[:, 0]], real[channels[:, 1]] = row.real, -row.imag
    imaginary[channels[:, 0]], imaginary[channels[:, 1]] = row.imag, row.real
    return real, imaginary


def _complex_moment(moment: np.ndarray, channels: np.ndarray) -> np.ndarray:
    """E[z z^H] of pairs z = a + i b, from E of their channels."""
    a, b = channels.T
    real = moment[np.ix_(a, a)] + moment[np.ix_(b, b)]
    return real + 1j * (moment[np.ix_(b, a)] - moment[np.ix_(a, b)])


def _root(weight: np.ndarray) -> np.ndarray:
    """The square root of a positive semidefinite matrix, lifted a little so that it has an inverse."""
    values, basis = np.linalg.eigh(weight)
    floor = _FLOOR * max(np.trace(weight).real / max(len(weight), 1), np.finfo(np.float64).tiny)
    return (basis * np.sqrt(np.maximum(values, floor))) @ basis.conj().T


def _blocks(each: np.ndarray) -> np.ndarray:
    heads, size, _ = each.shape
    whole = np.zeros((heads * size, heads * size))
    for h, block in enumerate(each):
        whole[h * size : (h + 1) * size, h * size : (h + 1) * size] = block
    return whole
