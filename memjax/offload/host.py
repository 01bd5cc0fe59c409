"""Host tier: the history in host memory, its newest tokens on the device as well.

Every token that enters the history is written through to a pool in host memory (memory kind ``pinned_host``); a ring on
the device keeps the newest ``resident`` of them. Attention reads the ring where it lies and streams the older tokens from
the pool one page at a time, merging the pages by log-sum-exp: the device never holds more than a page or two of them. The
idea of keeping the cache in a slower tier and streaming it is FlexGen's (arXiv 2303.06865); quantized codes are moved as
they are, so a codec saves transfer time as well.

Where a backend has no memory of its own for the host (the CPU), the pool is kept apart in the same memory: results are the
same, nothing is saved, and reports say ``simulated``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from memjax.cache.spec import check_integers


@dataclass(frozen=True)
class HostTier:
    """``resident`` newest history tokens on the device, all of them in host memory in pages of ``page`` tokens.

    Raises:
      ValueError: one of them is no integer or below 1.
    """

    name: ClassVar[str] = "host"
    resident: int = 256
    page: int = 256

    def __post_init__(self):
        check_integers("host", 1, resident=self.resident, page=self.page)
