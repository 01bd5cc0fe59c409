"""StreamingLLM: attention sinks and a sliding window, arXiv 2309.17453.

The first ``sinks`` tokens stay for ever, of the others the newest ``window``; a ring of slots holds them, so memory does not
grow with the text, which may be of any length. A cache whose capacity is below sinks + window has a window of what its
capacity leaves. As in the paper, positions restart inside the cache: a query at position p of the text sits at
min(p, sinks + window - 1), the newest tokens right below it, the sinks at 0 .. sinks - 1.

The paper caches keys before the rotary embedding and rotates the whole cache at every step. Here keys are cached rotated
by their position in the text, and for the sinks alone the *query* is rotated by its position in the cache: a rotary
score depends on the difference of two positions only, and for the window that difference is the same in both. The result
is the paper's, nothing is ever rotated twice, and quantized keys work. ``positions="text"`` keeps distances to the sinks
as they are in the text (what kvpress calls StreamingLLM without key re-rotation).

One more choice: what a query sees does not depend on how the text is cut into chunks. In a chunk of T tokens each query
sees its own last ``window`` tokens; the reference code makes room for the whole chunk first and so shows less to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Int

from memjax.cache.spec import check_integers
from memjax.evict.evictor import Evictor


@dataclass(frozen=True)
class Streaming(Evictor):
    """Keeps ``sinks`` first and ``window`` newest tokens (the token being written among them).

    Raises:
      ValueError: sinks or a window that is no integer, negative sinks, empty window, unknown ``positions``.
    """

    name: ClassVar[str] = "streaming"
    sinks: int = 4
    window: int = 1020
    positions: str = "cache"

    def __post_init__(self):
        check_integers("streaming", 0, sinks=self.sinks)
        check_integers("streaming", 1, window=self.window)
        if self.positions not in ("cache", "text"):
            raise ValueError(f"streaming positions {self.positions!r} is not one of cache, text")

    def sink_query_positions(self, positions: Int[Array, "B T"], kept: int) -> Int[Array, "B T"]:
        """Where queries stand, as the sinks see it; ``kept`` tokens are in the cache, sinks and window."""
        return positions if self.positions == "text" else jnp.minimum(positions, kept - 1)
