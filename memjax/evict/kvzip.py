"""KVzip: tokens stay that the model looks at when it writes its own context down again (arXiv 2505.23416).

    score[j] = max over the query heads of a group, over the queries i of the repetition of softmax(q_i . k)[j]

The text is repeated in chunks of up to 2,048 tokens, each after an instruction and, from the second chunk on, the eight tokens
before it, as if the model had written that: queries come from a forward pass over the whole uncompressed cache. The softmax of
the scores runs over the first four tokens, the chunk and the repetition up to the query; the first four tokens get score 1. No
question is asked, so one compressed cache serves all that come; it costs two to three times the prefill.

The best tokens of all heads of all layers stay, as in the paper, and the bytes are real: the heads of a layer share its
slots, as with ``adakv``, at whose price in compute, and a layer has as many slots as its heads need. Their number depends on
the text, so a step is compiled anew for every prompt; ``across="layer"`` gives all layers equally many, so that heads compete
with those of their layer and shapes do not depend on the text. ``across="head"`` keeps equally many tokens of every head: no
price in compute, codecs of two streams and softcaps go with it, and far more is lost (benchmarks/results/evict_keys.md).

Deviations: the rows of a batch share the numbers of slots that their layers have, the mean over the rows of what each would
take, so a row does not get quite what it gets alone; rows that fit whole do not count, and lose nothing. A layer has one slot
per head at least. Protected tokens, the cache's sinks and tail, stay in every head and count into the budget. Later chunks
follow the same instruction as the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from memjax.evict.rereading import Rereading, best_counts

FIRST_TOKENS = 4
ACROSS = ("model", "layer", "head")


@dataclass(frozen=True)
class KVzip(Rereading):
    """Keeps what the repetition of the prompt looks at most.

    Args:
      across: what tokens compete across for the budget: "model", "layer" or "head".

    Raises:
      ValueError: as ``Limited``; another word for ``across``.

    >>> KVzip(256).shares_slots, KVzip(256, across="head").shares_slots
    (True, False)
    """

    name: ClassVar[str] = "kvzip"
    instruction: ClassVar[str] = "Repeat the previous context exactly."
    preceding: ClassVar[int] = 8
    instead: ClassVar[str] = "say across=head"
    across: str = "model"

    def __post_init__(self):
        super().__post_init__()
        if self.across not in ACROSS:
            raise ValueError(f"kvzip lets tokens compete across {', '.join(ACROSS)}, one of them, got across={self.across!r}")

    @property
    def shares_slots(self) -> bool:
        return self.across != "head"

    def sees(
        self, pos: Int[Array, "B 1|K S"], begin: Int[Array, "B"], end: Int[Array, "B"], again: Int[Array, "B"]
    ) -> Bool[Array, "B 1|K S"]:
        return (pos < FIRST_TOKENS) | ((pos >= begin) & (pos < end)) | (pos >= again)

    def scores(self, attention: Float[Array, "B K G S"], pos: Int[Array, "S"]) -> Float[Array, "B K S"]:
        return jnp.where(pos < FIRST_TOKENS, 1.0, jnp.max(attention, axis=2))

    def counts(
        self, scores: Sequence[Float[np.ndarray, "B K S"]], written: Int[np.ndarray, "L B"], budget: Int[np.ndarray, "L"]
    ) -> list[int] | list[Int[np.ndarray, "B K"]]:
        if self.across == "head":
            return super().counts(scores, written, budget)
        rows = [[x[b, :, :n] for x, n in zip(scores, count, strict=True)] for b, count in enumerate(written.T)]
        heads, each = np.array([score.shape[1] for score in scores]), budget
        fits = (written <= budget[:, None]).all(axis=0)
        if self.across == "model" and not fits.all():
            long = [row for row, whole in zip(rows, fits, strict=True) if not whole]
            needed = np.mean([best_counts(row, int(heads @ budget)) for row in long], axis=0) / heads
            each = whole_numbers(needed, int(needed.sum() + 1e-6), np.where(fits, written, 1).max(axis=1))
        return [np.stack([best_counts(row[i], heads[i] * n) for row in rows]) for i, n in enumerate(each)]


def whole_numbers(parts: Float[np.ndarray, "L"], total: int, least: Int[np.ndarray, "L"]) -> Int[np.ndarray, "L"]:
    """Whole numbers of the given sum, none below ``least``, near to ``parts`` of about the same sum.

    >>> whole_numbers(np.array([2.6, 0.1, 3.3]), 6, np.ones(3, int))
    array([2, 1, 3])
    """
    found = np.maximum(np.floor(parts).astype(int), least)
    while found.sum() != total:
        step = 1 if found.sum() < total else -1
        found[np.argmax(np.where((found > least) | (step > 0), step * (parts - found), -np.inf))] += step
    return found
