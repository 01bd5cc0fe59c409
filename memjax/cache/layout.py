"""Where a policy puts a layer's tokens: sizes that follow from (policy, spec) alone, so everything is static."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memjax.cache.spec import CacheSpec
from memjax.evict import AdaKV, Budgeted, Quest, Streaming
from memjax.evict.observer import Observer

if TYPE_CHECKING:
    from memjax.cache.policy import CachePolicy

LANES = 128  # slots of a row of a TPU's memory, which small pages have to fill together


@dataclass(frozen=True)
class Layout:
    """Slots of every segment of one layer.

    Attributes:
      sinks: first tokens, dense, kept for ever.
      tail: newest tokens, dense, in a ring (slot = position mod tail). With tiles it has room for one that is not full yet.
      kept: tokens that stay in the tail when all whole tiles have left it.
      tile: tokens that enter the history together.
      slots: history slots, whole pages. Token number o to enter the history sits in slot o, or o mod slots when
        ``ring``.
      ring: the history forgets its oldest token for a new one.
      recent: an evictor's window, at most what the capacity leaves for it: keys at this distance are gone (sinks apart).
        None: nothing is evicted.
      resident: history slots on the device; equal to ``slots`` without a tier.
      host_slots: history slots in host memory, whole pages; 0 without a tier.
      rest: how many of the device's slots lie in the part of fewer bits.
      placed: the history's slots hold positions of their own.
      judge: who decides which tokens of the history stay; None: all, or by age alone.
      folds: tokens that go are folded into those that stay.
      moments: those of the queries are kept.
      observer: whose attention gives scores to tokens; None: nobody's.
      page: slots of the history that are read together by who reads some pages only.
      chosen: pages that a decode step reads per kv head; 0: it reads all of the history.
      competing: the kv heads compete for one history from the start, ``slots`` of it for each on average.
    """

    sinks: int
    tail: int
    kept: int
    tile: int
    slots: int
    ring: bool
    recent: int | None
    resident: int
    host_slots: int
    rest: int
    placed: bool
    judge: Budgeted | None
    folds: bool
    moments: bool
    observer: Observer | None
    page: int
    chosen: int
    competing: bool


@functools.lru_cache(maxsize=1024)
def layout(policy: CachePolicy, spec: CacheSpec) -> Layout:
    """The layout of ``policy`` for one layer."""
    windows, evictor, tier = policy.resolved_windows(), policy.evictor, policy.tier
    sinks, recent, keep = min(windows.sinks, spec.capacity), None, spec.capacity
    if isinstance(evictor, Streaming):
        sinks = min(windows.sinks, spec.capacity - 1)
        recent = min(evictor.window, spec.capacity - sinks)
        keep = sinks + recent
    in_sight = keep if spec.window is None else min(keep, sinks + spec.window)
    judge = evictor if isinstance(evictor, Budgeted) and evictor.tokens(spec.capacity) < in_sight else None
    keep = in_sight if judge is None else judge.tokens(spec.capacity)
    ring, tile = keep < spec.capacity or recent is not None, policy.codec.tile
    kept = min(windows.recent, keep - sinks)
    slots = keep - sinks - kept
    # In a ring a tile takes the place of one that the window has left altogether.
    slots = (-(-slots // tile) if ring else slots // tile) * tile
    page, chosen = policy.codec.page, 0
    if isinstance(evictor, Quest) and evictor.pages(sinks + kept) * evictor.page < slots:
        page, chosen = evictor.page, evictor.pages(sinks + kept)
    block = math.lcm(page, LANES) if chosen and slots >= LANES else page
    slots = -(-slots // block) * block
    tail = kept + tile - 1 if slots else keep - sinks
    resident, host_slots = slots, 0
    if tier is not None and tier.resident < slots:
        resident, host_slots = tier.resident, -(-slots // tier.page) * tier.page
    return Layout(
        sinks=sinks,
        tail=tail,
        kept=kept if slots else tail,
        tile=tile,
        slots=slots,
        ring=ring,
        recent=recent,
        resident=resident,
        host_slots=host_slots,
        rest=0 if policy.codec.rest is None else slots // tile * (tile - policy.codec.salient),
        placed=judge is not None or policy.codec.rest is not None,
        judge=judge,
        folds=judge is not None and policy.fold is not None,
        moments=judge is not None and judge.studies_queries,
        observer=policy.codec.observer if judge is None else judge.observer,
        page=page,
        chosen=chosen,
        competing=isinstance(judge, AdaKV) and spec.kv_heads > 1,
    )
