"""StreamingLLM: attention sinks and a sliding window, arXiv 2309.17453.

The first ``sinks`` tokens stay for ever, of the others the newest ``window``; a ring of slots holds them, so memory does not
grow with the text. As in the paper, positions restart inside the cache: a query at position p of the text sits at
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


@dataclass(frozen=True)
class Streaming:
    """Keeps ``sinks`` first and ``window`` newest tokens (the token being written among them).

    Raises:
      ValueError: negative sinks, empty window, unknown ``positions``.
    """

    name: ClassVar[str] = "streaming"
    sinks: int = 4
    window: int = 1020
    positions: str = "cache"

    def __post_init__(self):
        if self.sinks < 0:
            raise ValueError(f"streaming needs sinks >= 0, got {self.sinks}")
        if self.window < 1:
            raise ValueError(f"streaming needs a window of at least 1 token, got {self.window}")
        if self.positions not in ("cache", "text"):
            raise ValueError(f"streaming positions {self.positions!r} is not one of cache, text")

    def budget(self, sinks: int) -> int:
        """Tokens that a layer keeps when ``sinks`` first tokens are protected."""
        return sinks + self.window

    def sink_query_positions(self, positions: Int[Array, "B T"], sinks: int) -> Int[Array, "B T"]:
        """Where queries stand, as the sinks see it."""
        if self.positions == "text":
            return positions
        return jnp.minimum(positions, sinks + self.window - 1)
