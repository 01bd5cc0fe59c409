"""Bits by sensitivity: TurboQuant in which each layer's keys and values, or each head's, have bits of their own.

    minimise  sum_s D[s, b_s]   subject to   sum_s bytes(s, b_s) <= limit,     b_s in {2, 3, 4, 8}

over the streams s: a model's layers, or their kv heads, keys and values apart. D is measured once per model: the mean KL
divergence that coding this one stream costs (``memjax.quantize.sensitivity``). The divergence is quadratic in small errors,
and those of different streams are nearly uncorrelated, so that the sum stands for the divergence of all together. The minimum
is exact: a dynamic program over the pairs (bytes, divergence) that no other pair beats. Nothing is protected by rule: first
and last layers get more bits where the measurement says that it pays. Where the minimum promises less than 5 % over the best
uniform policy within the limit, that policy is taken: on other text the measured numbers are not that exact.

Layout: that of ``turboquant`` in every layer, with 2, 3 or 4 bits and a bfloat16 scale per vector; streams that deserve 8 have
rotated int8 codes. Per value at head_dim H: b + 16 / H bits. Heads of one array have one format: by head, those of the same
bits make a pool of their own (``memjax.cache.pools``), which attention reads with a call of its own.

The project's own method. Related: KVTuner (arXiv 2502.04420) searches per-layer pairs of bits for keys and values offline.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np

from memjax.quantize.codec import Codec, KeyValueCodec
from memjax.quantize.front import FrontEnd
from memjax.quantize.int8 import Int8
from memjax.quantize.sensitivity import check_sensitivity
from memjax.quantize.turboquant import BITS, TurboQuant

_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_LEAST_GAIN = 0.05
_MOST_STATES = 1 << 16  # of the dynamic program; beyond, which takes a model of ever different layers, it keeps some of them


@dataclass(frozen=True)
class Pair(KeyValueCodec):
    """Keys and values under a codec each, with TurboQuant's front end."""

    name: ClassVar[str] = "pair"
    front: ClassVar[FrontEnd] = FrontEnd()
    key_codec: Codec
    value_codec: Codec

    @property
    def keys(self) -> Codec:
        return self.key_codec

    @property
    def values(self) -> Codec:
        return self.value_codec


def stream_codec(bits: int) -> Codec:
    """The codec of keys or of values with 2, 3, 4 or 8 bits."""
    return Int8(rotate=True) if bits == 8 else TurboQuant(bits, bits).keys


def layer_codec(key_bits: int, value_bits: int) -> KeyValueCodec:
    """The codec of one layer.

    >>> layer_codec(4, 3)
    TurboQuant(key_bits=4, value_bits=3, scale='search', grid='lloyd', rotation='hadamard')
    >>> layer_codec(8, 3).keys
    Int8(rotate=True)
    """
    if key_bits in BITS and value_bits in BITS:
        return TurboQuant(key_bits, value_bits)
    return Pair(stream_codec(key_bits), stream_codec(value_bits))


@dataclass(frozen=True)
class ByHead(KeyValueCodec):
    """A codec for each kv head of a layer. Its cache is made pool by pool (``memjax.cache.pools``), each under one of them."""

    name: ClassVar[str] = "by_head"
    front: ClassVar[FrontEnd] = FrontEnd()
    codecs: tuple[KeyValueCodec, ...]

    @property
    def tile(self) -> int:
        return 1

    @property
    def heads_apart(self) -> bool:
        return True

    @property
    def keys(self) -> Codec:
        raise ValueError(f"the {len(self.codecs)} kv heads of this layer have codecs of their own: {self.codecs}")

    values = keys


@dataclass(frozen=True)
class Auto(KeyValueCodec):
    """Stands for the codecs of a model's layers until the cache is made (``memjax.cache.allocate``).

    Args:
      bits: realised bits per value of the coded history, scales included, at most: the ledger's ``bits_per_value`` over all
        layers that have this policy. 0: as ``bytes`` says.
      bytes: what the whole cache may take on the device, windows and all; 0: as ``bits`` says.
      file: a sensitivity file; "": the one of smollm2-135m that memjax brings along, by layer or by head.
      by_head: whether each kv head has bits of its own, too, for which the file must have been measured by head.

    Raises:
      ValueError: both or none of ``bits`` and ``bytes``, or one that is not positive.
    """

    name: ClassVar[str] = "auto"
    front: ClassVar[FrontEnd] = FrontEnd()
    bits: float = 0.0
    bytes: int = 0
    file: str = ""
    by_head: bool = False

    def __post_init__(self):
        real = [isinstance(x, int | float) and 0 <= x < float("inf") for x in (self.bits, self.bytes)]
        if not all(real) or (self.bits > 0) == (self.bytes > 0):
            raise ValueError(f"auto needs either bits or bytes, a positive number, got bits={self.bits}, bytes={self.bytes}")
        object.__setattr__(self, "bits", float(self.bits))  # 4 prints as 4.0, as it is read

    @property
    def tile(self) -> int:
        return 1

    @property
    def heads_apart(self) -> bool:
        return self.by_head

    @property
    def keys(self) -> Codec:
        raise ValueError(
            "auto gives every layer bits of its own: it needs the specs of all layers of a model (policy.init([spec, ...]))"
        )

    values = keys

    def check_model(self, layers: int, fingerprint: str) -> None:
        check_sensitivity(self.file, layers, fingerprint, self.by_head)


def byte_count(text: str | int) -> int:
    """A number of bytes, such as 65536, "64MiB" or "1.5 GB"; "": 0.

    Raises:
      ValueError: something else.

    >>> byte_count("64MiB"), byte_count("1.5 kB")
    (67108864, 1500)
    """
    if text == "":
        return 0
    match = _BYTES.fullmatch(str(text))
    unit = match and match[2].upper()
    if unit not in _UNITS:
        raise ValueError(f"bytes must be a number such as 67108864 or 64MiB, with kB, MB, GB, KiB, MiB or GiB, got {text!r}")
    return int(Fraction(match[1]) * _UNITS[unit])


def spend(divergence: Sequence[Sequence[float]], cost: Sequence[Sequence[int]], limit: int) -> list[int]:
    """``cheapest_sum``, or the best uniform choice if that is nearly as good; keys and values of the layers in turn."""
    best = cheapest_sum(divergence, cost, limit)

    def total(table: Sequence[Sequence], chosen: Sequence[int]) -> float:
        return sum(each[option] for each, option in zip(table, chosen, strict=True))

    pairs = itertools.product(range(len(cost[0]) if cost else 0), repeat=2)
    uniform = [list(pair) * (len(cost) // 2) for pair in pairs]
    fitting = [chosen for chosen in uniform if total(cost, chosen) <= limit]
    plain = min(fitting, key=lambda chosen: total(divergence, chosen), default=best)
    return plain if total(divergence, plain) * (1 - _LEAST_GAIN) <= total(divergence, best) else best


def cheapest_sum(divergence: Sequence[Sequence[float]], cost: Sequence[Sequence[int]], limit: int) -> list[int]:
    """Which option each stream takes so that the divergences' sum is smallest and the costs' sum at most ``limit``.

    Exact, and deterministic: of equal sums the cheaper one.

    Raises:
      ValueError: even the cheapest options cost more.

    >>> cheapest_sum([[9, 1, 0], [3, 2, 0]], [[0, 1, 2], [0, 1, 2]], 2)
    [1, 1]
    """
    costs, sums = np.zeros(1, np.int64), np.zeros(1)
    least, parents = [min(each) for each in cost], []
    for stream, (found, price) in enumerate(zip(divergence, cost, strict=True)):
        all_costs = (costs[:, None] + np.asarray(price, np.int64)).ravel()
        all_sums = (sums[:, None] + np.asarray(found, np.float64)).ravel()
        order = np.lexsort((all_sums, all_costs))
        order = order[all_costs[order] <= limit - sum(least[stream + 1 :])]
        if not order.size:
            raise ValueError(f"the cheapest options cost {sum(least)}, which is more than {limit}")
        best = np.minimum.accumulate(all_sums[order])
        order = order[np.append(True, best[1:] < best[:-1])]
        if order.size > _MOST_STATES:
            order = order[np.linspace(0, order.size - 1, _MOST_STATES).astype(np.int64)]
        costs, sums = all_costs[order], all_sums[order]
        parents.append(np.divmod(order, len(price)))
    state, chosen = len(sums) - 1, []
    for before, option in reversed(parents):
        chosen.append(int(option[state]))
        state = before[state]
    return chosen[::-1]
