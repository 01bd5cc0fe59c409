"""One layer's cache in pools of kv heads, each a ``LayerCache`` of its own, for policies that treat heads differently.

    pool 0: retrieval heads, every token | pool 1: streaming heads, sinks and a window            (``memjax.evict.duo``)
    pool 0: heads with 4 bits for keys and 3 for values | pool 1: heads with 3 and 2 | ...        (``auto(by_head=true)``)

A pool has the layer's spec with fewer heads, so its slots, codes, tiers and bytes are what its own policy says, and nothing is
masked. Heads are told apart by their numbers alone, which are static: what comes in is split by head, what attention gives is
put back in the order of the heads. A layer whose heads are all of one kind is a plain ``LayerCache``. A step reads every pool
with a call of its own, so pools cost time where heads are few.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from memjax.cache.spec import CacheSpec
from memjax.evict import Duo
from memjax.quantize.auto import ByHead

if TYPE_CHECKING:
    from memjax.cache.layer import LayerCache
    from memjax.cache.policy import CachePolicy


class Part(NamedTuple):
    """Some of a layer's kv heads, by their numbers, and the whole layer's spec."""

    heads: tuple[int, ...]
    whole: CacheSpec


class Pool(NamedTuple):
    """What a pool is made by: which heads, and a policy and a spec for these alone."""

    part: Part
    policy: CachePolicy
    spec: CacheSpec


@functools.partial(jax.tree_util.register_dataclass, data_fields=["pools"], meta_fields=["policy", "spec"])
@dataclass(frozen=True)
class HeadPools:
    """The cache of a layer with heads of several kinds; made by ``policy.init(spec)``, used like a ``LayerCache``.

    Attributes:
      pools: in the order of ``pools_of``.
      policy, spec: the layer's, static.
    """

    pools: tuple[LayerCache, ...]
    policy: CachePolicy
    spec: CacheSpec

    @property
    def length(self) -> Int[Array, "B"]:
        """Tokens committed; the same in every pool."""
        return self.pools[0].length

    @property
    def observed(self) -> bool:
        """Whether attention gives scores to tokens."""
        return any(pool.observed for pool in self.pools)

    def replaced(self, pools: Iterable[LayerCache]) -> HeadPools:
        """The same with other pools."""
        return dataclasses.replace(self, pools=tuple(pools))

    def split(self, x: Array | None, axis: int) -> list[Array | None]:
        """What each pool gets of an array with one entry, or one per query head, for each kv head along ``axis``."""
        if x is None:
            return [None] * len(self.pools)
        by_head = x.reshape(*x.shape[:axis], self.spec.kv_heads, -1, *x.shape[axis + 1 :])
        found = (jnp.take(by_head, np.asarray(h, np.int32), axis=axis, mode="clip") for h in self._heads())
        return [part.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :]) for part in found]

    def join(self, parts: list[Array], axis: int) -> Array:
        """The array that ``split`` gives ``parts`` of."""
        lead, rest = parts[0].shape[:axis], parts[0].shape[axis + 1 :]
        by_head = [x.reshape(*lead, len(h), -1, *rest) for x, h in zip(parts, self._heads(), strict=True)]
        back = np.argsort(np.concatenate(self._heads())).astype(np.int32)
        found = jnp.take(jnp.concatenate(by_head, axis=axis), back, axis=axis, mode="clip")
        return found.reshape(*lead, -1, *rest)

    def _heads(self) -> list[tuple[int, ...]]:
        return [pool.part.heads for pool in pools_of(self.policy, self.spec)]


def pools_of(policy: CachePolicy, spec: CacheSpec) -> list[Pool]:
    """The pools of one layer: one for policies that treat heads alike, and for layers whose heads are all of one kind.

    Of several: retrieval heads before streaming ones, and of each kind in the order in which codecs first appear.

    Raises:
      ValueError: a policy that cannot tell this layer's heads apart.
    """
    duo, codec = policy.evictor, policy.codec
    kinds = [(tuple(range(spec.kv_heads)), duo)]
    if isinstance(duo, Duo):
        duo.validate(spec)
        kinds = [(duo.retrieval, None), (duo.streaming, duo.streams)]
    codecs = codec.codecs if isinstance(codec, ByHead) else (codec,) * spec.kv_heads
    if len(codecs) != spec.kv_heads:
        raise ValueError(f"{policy} has codecs for {len(codecs)} kv heads, this layer has {spec.kv_heads}")
    found = []
    for heads, evictor in kinds:
        for one in dict.fromkeys(codecs[head] for head in heads):
            own = tuple(head for head in heads if codecs[head] == one)
            changed = dataclasses.replace(policy, evictor=evictor, codec=one)
            found.append(Pool(Part(own, spec), changed, _some_heads(spec, len(own))))
    return found


def one_head(policy: CachePolicy, spec: CacheSpec, head: int) -> tuple[CachePolicy, CacheSpec]:
    """Policy and spec of a cache for one kv head, with as many slots as it has in its pool."""
    [pool] = [pool for pool in pools_of(policy, spec) if head in pool.part.heads]
    return pool.policy, _some_heads(pool.spec, 1)


def _some_heads(spec: CacheSpec, count: int) -> CacheSpec:
    queries = None if spec.q_heads is None else spec.q_heads // spec.kv_heads * count
    return dataclasses.replace(spec, kv_heads=count, q_heads=queries)
