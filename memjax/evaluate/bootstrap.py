"""How sure a mean over a text's tokens is: the circular block bootstrap (Politis and Romano, 1992).

Neighbouring tokens are alike, so whole blocks of neighbours are drawn, not single tokens. The text counts as a ring: every
token is as likely to be drawn as any other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

BLOCK, SAMPLES, LEVEL = 64, 2000, 0.95
_FEWEST_BLOCKS = 8  # of a text: fewer would say little about how blocks differ


@dataclass(frozen=True)
class Interval:
    """A mean and the interval that holds it with the level asked for."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def block_length(tokens: int, block: int = BLOCK) -> int:
    """The length of the blocks drawn from ``tokens``: ``block``, or less in a text of fewer than eight blocks."""
    return max(1, min(block, tokens // _FEWEST_BLOCKS))


def mean_interval(
    values: Float[np.ndarray, "T"], block: int = BLOCK, samples: int = SAMPLES, level: float = LEVEL, seed: int = 0
) -> Interval:
    """The mean over tokens and its percentile interval.

    Args:
      values: one number per token, in the text's order.
      block: tokens per block, see ``block_length``.
      samples: how many texts are drawn.
      level: share of the drawn means inside the interval.
      seed: the same seed gives the same interval.

    Raises:
      ValueError: values that are no finite vector of at least two numbers, or another number out of range.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(f"a bootstrap needs a vector of at least 2 finite numbers, got shape {list(values.shape)}")
    if block < 1 or samples < 1 or not 0 < level < 1:
        raise ValueError(f"a bootstrap needs block, samples >= 1 and 0 < level < 1, got {block}, {samples}, {level}")
    tail = 50 * (1 - level)
    low, high = np.percentile(_drawn_means(values, block_length(len(values), block), samples, seed), [tail, 100 - tail])
    return Interval(float(values.mean()), float(low), float(high))


def paired_difference(a: Float[np.ndarray, "T"], b: Float[np.ndarray, "T"], **options) -> Interval:
    """The mean of ``a - b`` token by token, where both were measured on the same text; ``options`` as for the mean.

    Pairing removes what both share, that some tokens are hard: two policies whose intervals overlap may yet be told apart.

    Raises:
      ValueError: different lengths, or as for ``mean_interval``.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"a paired comparison needs the same tokens twice, got {list(a.shape)} and {list(b.shape)}")
    return mean_interval(a - b, **options)


def _drawn_means(values: np.ndarray, block: int, samples: int, seed: int) -> np.ndarray:
    """Means of texts of the same length, put together from blocks; the last block is cut to fit."""
    n = len(values)
    blocks = -(-n // block)
    lengths = np.full(blocks, block)
    lengths[-1] = n - block * (blocks - 1)
    before = np.concatenate([[0.0], np.cumsum(np.concatenate([values, values[:block]]))])
    starts = np.random.default_rng(seed).integers(n, size=(samples, blocks))
    return (before[starts + lengths] - before[starts]).sum(axis=1) / n
