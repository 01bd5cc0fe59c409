"""Lloyd-Max codebooks for the coordinates of randomly rotated vectors, as floats and as the integers that kernels look up.

A coordinate of a uniformly random point on the unit sphere in d dimensions, times sqrt(d), has mean zero, variance one and

    density f(x) ~ (1 - x^2 / d)^((d - 3) / 2) on [-sqrt(d), sqrt(d)],     the standard Gaussian as d grows

The Lloyd-Max levels c_k minimise D = E min_k (x - c_k)^2: every level is the mean of its cell, and cells end half-way between
neighbours (Max 1960, Lloyd 1982). TurboQuant (arXiv 2504.19874) scales the levels by 1 / sqrt(d); here the scale of a
vector holds that factor.

Kernels take tables of integers in -127 .. 127, exact in int8 and bfloat16. Of all units u the one is chosen whose rounded
levels u * round(c_k / u) distort least. At 64 to 256 dimensions and in the limit rounding raises D by at most 0.0001 % at
2 bits, 0.004 % at 3 and 0.08 % at 4.
"""

from __future__ import annotations

import functools

import numpy as np

from memjax.pallas_kernels.codes import CUBIC

LARGEST_LEVEL = 127
_SMALLEST_PEAK = 32
_BITS = (1, 2, 3, 4)


@functools.lru_cache(maxsize=64)
def lloyd_max(bits: int, dim: int | None = None) -> np.ndarray:
    """The 2^bits optimal levels of a coordinate with unit variance, float64, ascending and symmetric.

    Args:
      bits: 1 to 4.
      dim: of the rotated vectors, at least 3; None for the Gaussian limit.

    Raises:
      ValueError: other bits or dimensions.

    >>> lloyd_max(2).round(4).tolist()
    [-1.5104, -0.4528, 0.4528, 1.5104]
    """
    _validate(bits, dim)
    x, mass, moment = _law(dim)
    # Start from the levels of many bits (Panter and Dite): quantiles of the law with density f^(1/3).
    root = np.cumsum(np.gradient(mass) ** (1 / 3))
    half = 2 ** (bits - 1)
    levels = np.interp((np.arange(half) + 0.5) / half, root / root[-1], x)
    for _ in range(3000):
        found = _cell_means(levels, x, mass, moment)
        moved, levels = np.abs(found - levels).max(), found
        if moved < 1e-11:
            break
    levels = np.concatenate([-levels[::-1], levels])
    levels.setflags(write=False)
    return levels


@functools.lru_cache(maxsize=64)
def int_table(bits: int, dim: int | None = None) -> tuple[tuple[int, ...], float]:
    """Integers in -127 .. 127, ascending as the codes are, and the unit: ``unit * table`` are nearly the levels.

    >>> table, unit = int_table(2)
    >>> table, [round(unit * level, 3) for level in table]
    ((-90, -27, 27, 90), [-1.51, -0.453, 0.453, 1.51])
    """
    levels = lloyd_max(bits, dim)
    upper, unit = _integers(levels[levels.size // 2 :], cell_masses(levels, dim)[levels.size // 2 :])
    return _mirrored(upper), unit


@functools.lru_cache(maxsize=64)
def nested_levels(dim: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Levels of 2 + 1 bits: ``lloyd_max(2)``, and of each of its cells the two best, all ascending.

    >>> [levels.round(3).tolist()[-4:] for levels in nested_levels()]
    [[-1.51, -0.453, 0.453, 1.51], [0.231, 0.711, 1.283, 2.105]]
    """
    coarse = lloyd_max(2, dim)
    x, mass, moment = _law(dim)
    inner, edge, end = 0.0, midpoints(coarse)[-1], x[-1]
    split = np.array([edge / 2, edge + 0.7])
    for _ in range(3000):
        edges = np.array([inner, split[0], edge, split[1], end])
        fine = np.diff(np.interp(edges, x, moment)) / np.diff(np.interp(edges, x, mass))
        moved, split = np.abs((fine[0::2] + fine[1::2]) / 2 - split).max(), (fine[0::2] + fine[1::2]) / 2
        if moved < 1e-11:
            break
    fine = np.concatenate([-fine[::-1], fine])
    fine.setflags(write=False)
    return coarse, fine


def nested_edges(dim: int | None = None) -> np.ndarray:
    """Where the codes of ``nested_levels`` change: a cell of two bits ends where it does without the third."""
    coarse, fine = nested_levels(dim)
    edges = midpoints(fine)
    edges[1::2] = midpoints(coarse)
    return edges


@functools.lru_cache(maxsize=64)
def nested_tables(dim: int | None = None) -> tuple[tuple[int, ...], tuple[int, ...], float]:
    """The four and the eight levels as integers in -127 .. 127, and the unit of both.

    >>> coarse, fine, unit = nested_tables(64)
    >>> len(coarse), len(fine), max(fine) <= 127
    (4, 8, True)
    """
    coarse, fine = nested_levels(dim)
    x, mass, _ = _law(dim)
    weights = np.diff(np.interp(np.append(nested_edges(dim)[3:], x[-1]), x, mass)) / 2
    upper, unit = _integers(fine[4:], weights)
    return _mirrored(tuple(int(level) for level in np.round(coarse[2:] / unit))), _mirrored(upper), unit


def _integers(half: np.ndarray, weights: np.ndarray) -> tuple[tuple[int, ...], float]:
    """Positive levels as multiples of the best unit for levels that are met as often as ``weights`` says."""
    units = half[-1] / np.arange(_SMALLEST_PEAK, LARGEST_LEVEL + 0.5, 0.01)
    tables = np.round(half / units[:, None])
    units = (tables * half) @ weights / (tables**2 @ weights)
    best = int(np.argmin((tables * units[:, None] - half) ** 2 @ weights))
    return tuple(int(level) for level in tables[best]), float(units[best])


def _mirrored(upper: tuple[int, ...]) -> tuple[int, ...]:
    return (*(-level for level in reversed(upper)), *upper)


def cubic_levels(bits: int) -> np.ndarray:
    """The levels of grid ``cubic`` at unit variance, in the order of the codes."""
    a, b = CUBIC[f"int{bits}"]
    x = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)) + 0.5
    return x * (a + b * x * x)


def midpoints(levels: np.ndarray) -> np.ndarray:
    """Where the nearest level changes."""
    return (levels[1:] + levels[:-1]) / 2


def cell_masses(levels: np.ndarray, dim: int | None = None) -> np.ndarray:
    """The probability of each level of a symmetric, ascending codebook."""
    x, mass, _ = _law(dim)
    edges = midpoints(levels)
    below = 0.5 + np.sign(edges) * np.interp(np.abs(edges), x, mass) / 2
    return np.diff(np.concatenate([[0.0], below, [1.0]]))


def distortion(levels: np.ndarray, dim: int | None = None, edges: np.ndarray | None = None) -> float:
    """E min_k (x - c_k)^2 of a symmetric codebook under the law of a coordinate of unit variance; ``edges``: of other cells.

    >>> round(distortion(lloyd_max(4)), 5)
    0.0095
    """
    x, mass, _ = _law(dim)
    middle = (x[1:] + x[:-1]) / 2
    level = levels[np.searchsorted(midpoints(levels) if edges is None else edges, middle)]
    return float(np.sum(np.diff(mass) * (middle - level) ** 2))


@functools.lru_cache(maxsize=8)
def _law(dim: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points x >= 0, the mass of [-x, x] and the first moment of |x| up to there."""
    end = 10.0 if dim is None else min(10.0, dim**0.5)
    x = np.linspace(0.0, end, 40_001)
    middle = (x[1:] + x[:-1]) / 2
    density = np.exp(-(middle**2) / 2) if dim is None else (1 - middle**2 / dim) ** ((dim - 3) / 2)
    density /= density.sum()
    return x, np.concatenate([[0.0], np.cumsum(density)]), np.concatenate([[0.0], np.cumsum(density * middle)])


def _cell_means(levels: np.ndarray, x: np.ndarray, mass: np.ndarray, moment: np.ndarray) -> np.ndarray:
    edges = np.concatenate([[0.0], midpoints(levels), x[-1:]])
    return np.diff(np.interp(edges, x, moment)) / np.diff(np.interp(edges, x, mass))


def _validate(bits: int, dim: int | None) -> None:
    if bits not in _BITS:
        raise ValueError(f"a codebook has 1 to 4 bits, got {bits}; 8-bit codes are uniform: use int8")
    if dim is not None and dim < 3:
        raise ValueError(f"a coordinate on the sphere has a density from 3 dimensions up, got {dim}; use dim=None")
