"""Quest: every token stays, a decode step reads the pages that may matter to its query (arXiv 2406.10774).

    bound of page t = sum_d max(q_d low[t, d], q_d high[t, d]) >= q . k        for every key k of the page

with ``low`` and ``high`` the channelwise minimum and maximum of the page's keys, rotated as they are cached. The pages with
the largest bounds are read, as many as the budget has room for besides the protected tokens; attention is over them alone.

Nothing is freed: memory grows by ``low`` and ``high``, [B, K, H, S / page] in the cache's dtype, 2 / page of the bytes of
dense keys (12.5 % at pages of 16), and histories of 128 slots or more are filled up to whole rows of a TPU's memory. What
falls is what a step reads: budget tokens, and the bounds of all pages.

The keys are those that attention computes with: out of their codes, the front end's centre put back, and a bound that the
dtype cannot hold is rounded outwards. So it holds under every codec, up to the rounding of queries and products themselves.
``memjax.cache.bounds`` keeps it, by looking again at the pages that tokens came to; ``memjax.attention.quest`` reads.

Deviations. The paper takes pages for each query head; here the heads of a group (and the tokens of a step of several) choose
together, by their largest bound, so that a page is read once. Its page of the newest tokens, always read, is here the
cache's windows: sinks and recent tokens, which the budget counts. Chunks of more tokens than a decode step has read
everything, as in the paper. Its first two layers, which it leaves alone, are ``dense_layers``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Self

from memjax.cache.spec import check_integers
from memjax.evict.evictor import Evictor


@dataclass(frozen=True)
class Quest(Evictor):
    """Keeps all tokens, reads ``budget`` of them.

    Args:
      budget: tokens that a query reads per kv head, the protected ones among them.
      page: neighbouring tokens that are judged and read together.
      dense_layers: so many first layers are read in full and have no bounds.

    Raises:
      ValueError: no budget, an empty page, or a number that is no integer.

    >>> Quest(256).pages(68), Quest(256).for_layer(0, 30, 68)
    (11, None)
    """

    name: ClassVar[str] = "quest"
    budget: int = dataclasses.field(default=0, metadata={"unset": 0})
    page: int = 16
    dense_layers: int = 2

    def __post_init__(self):
        check_integers(self.name, 1, budget=self.budget, page=self.page)
        check_integers(self.name, 0, dense_layers=self.dense_layers)

    def for_layer(self, index: int, layers: int, protected: int) -> Self | None:
        del protected
        return None if layers > 1 and index < self.dense_layers else self

    def pages(self, protected: int) -> int:
        """Pages that are read besides so many protected tokens."""
        return (self.budget - protected) // self.page
