"""Whole-cache transforms, ``cache -> cache``: for research code that starts from a dense cache.

They act on the history of every attention layer and leave protected tokens (sinks and tail) alone, so give the dense cache
windows when it is made: ``mj.protect(4, 64).init(spec)``. They compose in any order that makes sense, are pure and run
inside ``jit``; a ``LayerCache`` or a model's tuple of caches goes in, the same comes out. Recurrent layers pass through.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from memjax.attention.attend import history_positions, host_positions
from memjax.cache.bounds import bounds_of
from memjax.cache.encode import decode_keys, encode, fit_codec, fitted, init_basis
from memjax.cache.layer import LayerCache, commit, init_counters
from memjax.cache.policy import AnyLayerCache, CachePolicy, ModelCache
from memjax.cache.pools import HeadPools, Part, pools_of
from memjax.cache.recurrent import RecurrentCache
from memjax.cache.segment import Segment
from memjax.cache.share import check_shared, pooled
from memjax.cache.slots import pad, take
from memjax.evict.massfold import Fates, fold_all, only
from memjax.offload import HostTier, pool
from memjax.pallas_kernels.slots import FREE, positions
from memjax.quantize import Dense, FrontEnd, KeyValueCodec
from memjax.quantize.front import measure

OneOrAll = LayerCache | HeadPools | ModelCache


def quantize(cache: OneOrAll, codec: KeyValueCodec | CachePolicy) -> OneOrAll:
    """Encodes a dense history with ``codec`` (or with the codec of a policy such as ``mj.int4()``).

    The front end measures the tokens of the history; no queries are known, so channels are balanced only by a calibration
    file.

    Raises:
      ValueError: the history is coded already, the codec cannot serve the cache, or something that is no codec.
    """
    front = codec.front if isinstance(codec, CachePolicy) else None
    if isinstance(codec, CachePolicy):
        codec = dataclasses.replace(codec, front=None)
    codec = _one_axis("quantize", "codec", codec, KeyValueCodec, "mj.int4()")
    return _each(cache, lambda layer, index, part: _quantize(layer, index, part, codec, front))


def _quantize(
    cache: LayerCache, index: int, part: Part | None, codec: KeyValueCodec, front: FrontEnd | None
) -> LayerCache:
    if cache.policy.codec != Dense():
        raise ValueError(f"quantize starts from a dense history, but this one is {cache.policy.codec.name} already")
    if codec.tile > 1:
        raise ValueError(f"{codec.name} codes tiles of {codec.tile} tokens: make the cache with it instead")
    if cache.shared:
        raise ValueError(f"quantize cannot sort out slots that heads share ({cache.policy}): make the cache with the codec")
    cache, spec = commit(cache), cache.spec
    policy = dataclasses.replace(cache.policy, codec=codec, front=front, windows=cache.policy.resolved_windows())
    policy.validate(spec)
    if cache.history is None:
        return dataclasses.replace(cache, policy=policy)
    refined = init_counters(policy, spec)
    _check_pages("quantize", codec, cache.history.slots)
    basis, position = init_basis(policy, spec, index, part), positions(history_positions(cache), cache.history.slots)
    whole, at = cache.history, position
    if cache.host is not None:
        whole = pool.load(cache.host, cache.history)
        at = positions(host_positions(cache, resident=True), whole.slots)
    if basis is not None:
        v = None if whole.v is None else whole.v.data
        basis = measure(basis, whole.k.data, v, at, at >= 0, spec, None)
        basis = fit_codec(basis, codec, whole, at, at >= 0, spec)
    history = encode(cache.history, position, codec, basis, spec)
    old, host = cache.history, None
    history = dataclasses.replace(history, pos=old.pos, score=old.score, bias=old.bias)
    if cache.host is not None:
        host = pool.store(encode(whole, at, codec, basis, spec), cache.policy.tier.page)
    cache = dataclasses.replace(cache, history=history, host=host, policy=policy, basis=basis, refined=refined)
    if cache.bounds is None:
        return cache
    pages = jnp.arange(history.slots // cache.layout.page, dtype=jnp.int32)
    every = jnp.broadcast_to(pages, (spec.batch, pages.size))
    return dataclasses.replace(cache, bounds=bounds_of(cache, history, every, cache.written))


def _check_pages(transform: str, codec: KeyValueCodec, slots: int) -> None:
    if slots % codec.page:
        pages = f"{codec.name} reads pages of {codec.page}: make it a multiple"
        raise ValueError(f"{transform} would leave a history of {slots} slots, but {pages}")


def evict(
    cache: OneOrAll,
    scores: Float[Array, "B K S"] | Sequence[Float[Array, "B K S"]],
    budget: int | Int[np.ndarray, "B K"],
    room: int = 0,
) -> OneOrAll:
    """Keeps the ``budget`` highest-scored tokens of the history per kv head, in text order, with their positions.

    Works on coded histories too (token-wise codes survive a gather). Sinks and tail are not in the history and stay. Where the
    policy says ``massfold``, what goes is folded into what stays, each token counting as many as it stands for.

    Args:
      scores: higher is kept; one per history slot, [B, K, S] ([B, 1, S]: the same for all heads). For a model's caches one
        array per attention layer. Free slots lose against any token.
      budget: tokens kept per kv head, 1 <= budget <= S. Rows with fewer tokens keep all and have free slots. Or, in numpy,
        a whole number for each head of each row, 0 <= number <= S and one of a row above 0: the heads of a layer, if there are
        several, share slots from then on, as with ``adakv``, as many as the row that keeps most needs, rounded up to whole
        slots per head.
      room: free slots after them, for tokens still to come.

    Raises:
      ValueError: a budget outside 1..S, negative room, scores or budgets of another shape, a history in a ring or on a host
        tier, heads that cannot share slots (``memjax.cache.share.check_shared``) or do already.
    """
    if isinstance(cache, LayerCache):
        return _evict(cache, scores, budget, room)
    if any(isinstance(layer, HeadPools) for layer in ((cache,) if isinstance(cache, HeadPools) else cache)):
        raise ValueError(
            "evict goes layer by layer, but the heads of this one lie in pools of different shapes; leave duo or by_head away"
        )
    attention = sum(isinstance(layer, LayerCache) for layer in cache)
    if len(scores) != attention:
        raise ValueError(f"evict needs one array of scores per attention layer, {attention}, got {len(scores)}")
    remaining = iter(scores)
    return _each(cache, lambda layer, *_: _evict(layer, next(remaining), budget, room))


def _evict(cache: LayerCache, scores: Array, budget: int | np.ndarray, room: int) -> LayerCache:
    cache, shape = commit(cache), (cache.spec.batch, cache.spec.kv_heads)
    shares = np.ndim(budget) > 0 and cache.spec.kv_heads > 1
    counts = np.asarray(budget) if np.ndim(budget) else np.full(shape, budget)
    _check_evict(cache, scores, counts, room, shares)
    counts = counts.astype(np.int32)
    slots, most = cache.history.slots, int(counts.max())
    pos = jnp.broadcast_to(positions(history_positions(cache), slots), (*shape, slots))
    order = _by_rank(jnp.broadcast_to(scores, pos.shape), pos >= 0)
    stays = jnp.argsort(order, axis=-1) < counts[..., None]
    chosen = jnp.argsort(~stays, axis=-1)[..., :most]
    written = jnp.minimum(cache.written[:, None], counts)

    everyone = dataclasses.replace(cache.history, pos=jnp.maximum(pos, FREE))
    if cache.policy.fold is not None and counts.min() < slots:
        history = _folded(cache, everyone, Fates(chosen, order[..., counts.min() :]), stays)
    else:
        history = take(only(everyone, stays), chosen)
    kept, filled, owners = most, written[:, 0], 1
    if shares:
        owners = shape[1]
        kept, filled = -(-int(counts.sum(axis=1).max()) // owners), -(-jnp.sum(written, axis=1) // owners)
        history = pooled(history, kept * owners)
    # A row that has lost tokens to an overflow must stay one: more written than there are slots.
    filled = jnp.where(cache.written > slots, kept + room + 1, filled)
    pos = pad(history.pos, room * owners, FREE)
    return dataclasses.replace(
        cache, history=dataclasses.replace(pad(history, room * owners), pos=pos), written=filled
    )


def _check_evict(cache: LayerCache, scores: Array, counts: np.ndarray, room: int, shares: bool) -> None:
    shape = (cache.spec.batch, cache.spec.kv_heads)
    if cache.history is None or cache.host is not None or cache.layout.ring:
        raise ValueError(f"evict needs a whole history on the device, but policy {cache.policy} keeps none; evict first")
    if cache.layout.tile > 1:
        raise ValueError(f"evict cannot take single tokens out of {cache.policy.codec.name}'s tiles; evict first")
    if cache.shared:
        raise ValueError(f"evict cannot sort out slots that heads share ({cache.policy}); evict once")
    if cache.bounds is not None:
        raise ValueError(f"evict would scatter the tokens of {cache.policy.evictor.name}'s pages; make the cache without it")
    if shares:
        check_shared(cache.spec, cache.policy.codec, "give evict one budget for all of them")
    if counts.shape != shape or not np.issubdtype(counts.dtype, np.integer):
        raise ValueError(
            f"evict needs one budget or whole numbers of batch and kv heads, {list(shape)}, got {counts.dtype.name} "
            f"{list(counts.shape)}"
        )
    least, most, slots = counts.max(axis=1).min(), counts.max(), cache.history.slots
    _check_pages("evict", cache.policy.codec, int(most) + room)
    if not 1 <= least <= most <= slots or counts.min() < 0 or room < 0:
        given = " to ".join(map(str, dict.fromkeys((counts.min(), most))))
        raise ValueError(
            f"evict needs 1 <= budget <= {slots} history slots, at least of one head of each row, and room >= 0, got {given} "
            f"and {room}"
        )
    if scores.shape not in [(shape[0], heads, slots) for heads in (1, shape[1])]:
        raise ValueError(f"evict needs scores [batch, kv_heads or 1, {slots}], got {list(scores.shape)}")


def _by_rank(scores: Array, filled: Array) -> Array:
    """Indices of the slots, the best first and free ones last."""
    # Two keys, so that no score, -inf included, can tie with "free".
    return jnp.lexsort((-scores, ~filled), axis=-1)


def _folded(cache: LayerCache, everyone: Segment, fates: Fates, stays: Array) -> Segment:
    codec, position = cache.policy.codec, jnp.maximum(everyone.pos, 0)
    bias = jnp.zeros(position.shape, jnp.float32) if everyone.bias is None else everyone.bias
    keys = decode_keys(everyone.k, position, codec, cache.basis, cache.spec)
    return fold_all(dataclasses.replace(everyone, bias=bias), fates, stays, keys, fitted(codec, cache.basis)[1])


def offload(cache: OneOrAll, tier: HostTier | CachePolicy) -> OneOrAll:
    """Moves the history to host memory; its newest ``tier.resident`` tokens stay on the device as well.

    Raises:
      ValueError: the history has a tier already, an eviction left holes in it, or something that is no tier.
    """
    tier = _one_axis("offload", "tier", tier, HostTier, "mj.host(256)")
    return _each(cache, lambda layer, *_: _offload(layer, tier))


def _offload(cache: LayerCache, tier: HostTier) -> LayerCache:
    cache = commit(cache)
    if cache.host is not None or (cache.history is not None and cache.history.pos is not None):
        raise ValueError("offload needs a history without holes on the device; make the cache with the tier instead")
    cache = dataclasses.replace(cache, policy=dataclasses.replace(cache.policy, tier=tier))
    cache.policy.validate(cache.spec)
    place = cache.layout
    if not place.host_slots:
        return cache
    newest = cache.written[:, None] - 1 - jnp.arange(place.resident, dtype=jnp.int32)
    ring_slot = jnp.argsort(newest % place.resident, axis=-1)
    source = jnp.take_along_axis(jnp.maximum(newest, 0) % place.slots, ring_slot, axis=-1)

    host = pool.store(pad(cache.history, place.host_slots - place.slots), tier.page)
    return dataclasses.replace(cache, history=take(cache.history, source), host=host)


def _one_axis(transform: str, field: str, given, kind: type, example: str):
    """What ``given`` is, or what a policy that says nothing else says about one axis."""
    if isinstance(given, CachePolicy) and given == dataclasses.replace(CachePolicy(), **{field: getattr(given, field)}):
        given = getattr(given, field)
    if not isinstance(given, kind):
        raise ValueError(f"{transform} takes a {field} such as {example} and nothing else, got {given}")
    return given


def _each(cache: OneOrAll, transform) -> OneOrAll:
    """``transform(cache, number of the layer, which heads of it)`` of every attention layer, or pool of one."""
    if isinstance(cache, LayerCache | HeadPools):
        return _layer(cache, 0, transform)
    return tuple(_layer(each, i, transform) for i, each in enumerate(cache))


def _layer(cache: AnyLayerCache, index: int, transform) -> AnyLayerCache:
    if isinstance(cache, RecurrentCache):
        return cache
    if isinstance(cache, LayerCache):
        return transform(cache, index, None)
    made = pools_of(cache.policy, cache.spec)
    pools = [transform(pool, index, each.part) for pool, each in zip(cache.pools, made, strict=True)]
    before, after = made[0].policy, pools[0].policy  # which is the layer's but for what its heads differ in
    changed = [name for name in ("codec", "front", "tier", "windows") if getattr(after, name) != getattr(before, name)]
    policy = dataclasses.replace(cache.policy, **{name: getattr(after, name) for name in changed})
    made = pools_of(policy, cache.spec)  # the same as if it had been made with it
    pools = [dataclasses.replace(pool, policy=each.policy) for pool, each in zip(pools, made, strict=True)]
    return HeadPools(tuple(pools), policy, cache.spec)
