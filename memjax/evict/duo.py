"""DuoAttention: retrieval heads keep every token, streaming heads sinks and a window (arXiv 2410.10819).

    streaming head:  query i sees keys j <= i with j < sinks or i - j < window       (positions as they are in the text)
    retrieval head:  query i sees keys j <= i

Each kv head of a model has a gate in [0, 1], measured once (``memjax.evict.gates``); the ``share`` of all heads with the
largest gates retrieves, however they fall on the layers. The paper takes half of the heads of models with grouped queries and
a quarter of those without.

The bytes are real. A layer's cache is two pools (``memjax.cache.pools``): with R of K heads retrieving it holds
R S + (K - R) (sinks + window) keys and values instead of K S, each pool in any codec or tier of the policy, and a decode
step reads as much. ``protect`` is about what a codec leaves alone within a pool, whatever a streaming head's window.

Windows default to 64 sinks and 256 recent tokens, with which the authors' scripts evaluate; their gates are trained with 128
sinks and 256 recent tokens.

Deviations. The window includes the token that is written, and what a streaming head sees does not depend on how a prompt is
cut into chunks; the authors' code reads the first chunk in full and later ones with the sinks and window before it. All
heads of one kind in a layer make that layer an ordinary cache. Of equal gates the first heads retrieve.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar, Self

from memjax.cache.spec import CacheSpec, check_integers
from memjax.evict.evictor import Evictor
from memjax.evict.gates import Gates, check_gates
from memjax.evict.streaming import Streaming


@dataclass(frozen=True)
class Duo(Evictor):
    """Heads of two kinds.

    Args:
      share: the part of all kv heads of the model that keep every token.
      sinks, window: tokens that the other heads keep.
      file: a gates file; "": the one of smollm2-135m that memjax brings along.
      multiple: heads of each kind in a layer are a multiple of it, so that a mesh of so many devices can spread them.
      heads: for one layer, a character per kv head: 1 keeps everything, 0 is a streaming head. "": by the file.

    Raises:
      ValueError: a share outside 0..1, sinks or a window that is no integer or out of range, heads that are no zeros and ones,
        or heads beside a file or a share.

    >>> Duo(heads="101").retrieval, Duo(heads="101").streaming
    ((0, 2), (1,))
    """

    name: ClassVar[str] = "duo"
    share: float = 0.5
    sinks: int = 64
    window: int = 256
    file: str = ""
    multiple: int = 1
    heads: str = ""

    def __post_init__(self):
        if isinstance(self.share, bool) or not isinstance(self.share, int | float) or not 0 <= self.share <= 1:
            raise ValueError(f"duo needs a share of the heads between 0 and 1, got {self.share!r}")
        object.__setattr__(self, "share", float(self.share))  # 1 prints as 1.0, as it is read
        check_integers(self.name, 0, sinks=self.sinks)
        check_integers(self.name, 1, window=self.window, multiple=self.multiple)
        if set(self.heads) - {"0", "1"}:
            raise ValueError(f"duo needs heads as zeros and ones, such as 101 for a layer of three, got {self.heads!r}")
        if self.heads and (self.share, self.file, self.multiple) != (Duo.share, Duo.file, Duo.multiple):
            raise ValueError(f"duo takes heads={self.heads} or chooses them by share, file and multiple, not both")

    @property
    def retrieval(self) -> tuple[int, ...]:
        """Numbers of the kv heads that keep everything."""
        return tuple(i for i, kind in enumerate(self.heads) if kind == "1")

    @property
    def streaming(self) -> tuple[int, ...]:
        """Numbers of the others."""
        return tuple(i for i, kind in enumerate(self.heads) if kind == "0")

    @property
    def streams(self) -> Streaming:
        """What the others do."""
        return Streaming(self.sinks, self.window, "text")

    def for_layer(self, index: int, layers: int, protected: int) -> Self:
        del protected
        if self.heads:
            return self
        chosen = choose(check_gates(self.file, layers), self.share, self.multiple)
        return Duo(sinks=self.sinks, window=self.window, heads=chosen[index])

    def validate(self, spec: CacheSpec) -> None:
        if spec.latent_dim is not None:
            raise ValueError("duo tells a layer's kv heads apart, but a latent stream is one for all; use streaming or h2o")
        if not self.heads:
            raise ValueError(
                "duo chooses heads among those of a whole model: it needs the specs of all its layers, "
                f"policy.init([spec, ...]), or for one layer heads={'10' * (spec.kv_heads // 2) + '1' * (spec.kv_heads % 2)}"
            )
        if len(self.heads) != spec.kv_heads:
            raise ValueError(
                f"duo has kinds for {len(self.heads)} kv heads ({self.heads}), this layer has {spec.kv_heads}: was the gates "
                "file measured on another model?"
            )

    def check_model(self, layers: int, fingerprint: str) -> None:
        """Raises ValueError if the gates were measured on another model than the one with ``fingerprint``."""
        if not self.heads:
            check_gates(self.file, layers, fingerprint)


@functools.lru_cache(maxsize=64)
def choose(gates: Gates, share: float, multiple: int = 1) -> tuple[str, ...]:
    """The heads of each layer, 1 for those that retrieve: the largest gates of all, ``round(share * heads)`` of them.

    With a ``multiple`` a layer's heads are taken in groups of so many, in the order of their gates, by the mean gate.

    Raises:
      ValueError: a layer whose heads cannot be divided by ``multiple``.

    >>> choose(Gates("", "by hand", ((0.9, 0.1), (0.5, 0.8))), 0.5)
    ('10', '01')
    """
    groups = []
    for layer, row in enumerate(gates.layers):
        if len(row) % multiple:
            raise ValueError(f"duo takes heads by {multiple}, which does not divide the {len(row)} kv heads of layer {layer}")
        order = sorted(range(len(row)), key=lambda head: -row[head])
        blocks = [order[i : i + multiple] for i in range(0, len(order), multiple)]
        groups += [(-sum(row[head] for head in block) / multiple, layer, block) for block in blocks]
    kinds = [["0"] * len(row) for row in gates.layers]
    for _, layer, block in sorted(groups, key=lambda group: group[:2])[: round(share * len(groups))]:
        for head in block:
            kinds[layer][head] = "1"
    return tuple(map("".join, kinds))
