"""A run of slots of one layer's cache: what tokens leave there."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import jax
from jax.typing import DTypeLike
from jaxtyping import Array

from memjax.pallas_kernels.codes import Codes
from memjax.quantize.codec import CodePair


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["k", "v", "extra", "pos", "score", "bias", "owner"], meta_fields=[]
)
@dataclass(frozen=True)
class Segment:
    """Key and value codes [B, K, C, S]; ``v`` is None for a latent stream, ``extra`` its dense rotary part.

    Codes of a history may come in pairs. ``pos`` int32 [B, K, S] is stored where slots and positions have come apart (-1:
    free), else None; ``score`` float32 [B, K, S] where the policy judges tokens; ``bias`` float32 [B, K, S], on the logits,
    where slots stand for several tokens. Where the kv heads share one pool of slots, the shapes are those of one head with the
    slots of all of them, and ``owner`` int8 [B, 1, S] says whose a slot is.
    """

    k: Codes | CodePair
    v: Codes | CodePair | None
    extra: Codes | None
    pos: Array | None = None
    score: Array | None = None
    bias: Array | None = None
    owner: Array | None = None

    @property
    def slots(self) -> int:
        return self.k.slots


def cast(segment: Segment, dtype: DTypeLike) -> Segment:
    """With keys and values in another dtype."""
    wide = jax.tree.map(lambda x: x.astype(dtype), bare(segment))
    return dataclasses.replace(wide, pos=segment.pos, score=segment.score)


def bare(segment: Segment) -> Segment:
    """The tokens alone."""
    return dataclasses.replace(segment, pos=None, score=None, bias=None, owner=None)
