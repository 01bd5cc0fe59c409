"""The cache of one attention layer: a frozen pytree of up to six segments, and the pure steps on it.

    sinks | history (codes; the part on the device) | rest | host (codes) | tail (ring) | staged (new, exact)

with, under a lossy codec, the basis of the codes (``memjax.quantize.front``). ``rest`` is the part of the history that a codec
of two precisions keeps in fewer bits.

``update`` stages new tokens, exact; ``attend`` reads every segment, merges them by log-sum-exp and commits the staged
tokens: those older than the tail are encoded into the history. So a chunk of a prompt attends to the compressed past
plus its exact self, and memory is bounded by the chunk.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from memjax.attention.rope import Rope, apply_rope
from memjax.cache.admit import admit
from memjax.cache.bounds import KeyBounds, bounds_after, empty_bounds
from memjax.cache.encode import decode_keys, encode, encode_in_two, fit_codec, fitted, init_basis
from memjax.cache.layout import Layout, layout
from memjax.cache.pools import HeadPools, Part
from memjax.cache.segment import Segment, bare, cast
from memjax.cache.share import admit_shared, append
from memjax.cache.slots import beside, order_in_ring, take, write, write_ring
from memjax.cache.spec import CacheSpec, check_new_tokens
from memjax.evict.expected_attention import Moments, expected_logits, mean_rotation, no_moments
from memjax.offload import pool
from memjax.pallas_kernels.codes import dense
from memjax.pallas_kernels.slots import FREE
from memjax.quantize.codec import Dense, KeyValueCodec
from memjax.quantize.front import Basis, measure, observe, value_weight

if TYPE_CHECKING:
    from memjax.cache.policy import CachePolicy


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "sinks",
        "history",
        "rest",
        "host",
        "tail",
        "staged",
        "staged_count",
        "staged_weight",
        "length",
        "written",
        "basis",
        "refined",
        "bounds",
        "moments",
    ],
    meta_fields=["policy", "spec"],
)
@dataclass(frozen=True)
class LayerCache:
    """One attention layer's cache. Made by ``policy.init(spec)``; every operation returns a new one.

    Attributes:
      sinks, history, rest, host, tail: committed tokens, see ``Layout``; None where a policy has none. The leaves of ``host``
        lie in pages, see ``memjax.offload.pool``.
      staged: tokens given to ``update`` and not committed yet, [B, K, H, T], exact; None after ``attend``.
      staged_count: int32 [B], how many of the staged tokens are real (the others are padding).
      staged_weight: float32 [K, H], what the staged values count for in the layer's output, if the front end is about to
        measure them; None if nobody said so.
      length: int32 [B], tokens committed.
      written: int32 [B], tokens that have entered the history; where heads share slots after an eviction, slots per head.
      basis: statistics in which the history is coded; None without a front end.
      refined: float32 [B, 2], pages that decode steps have read in full and pages that they have read at all, summed over kv
        heads; None for codecs whose pages are all read alike.
      bounds: of the keys of each page of the history; None for policies that read all pages.
      moments: of the queries so far, for an evictor that studies them.
      policy, spec: static.
    """

    sinks: Segment | None
    history: Segment | None
    rest: Segment | None
    host: Segment | None
    tail: Segment | None
    staged: Segment | None
    staged_count: Array | None
    staged_weight: Array | None
    length: Array
    written: Array
    basis: Basis | None
    policy: CachePolicy
    spec: CacheSpec
    refined: Array | None = None
    bounds: KeyBounds | None = None
    moments: Moments | None = None

    @property
    def layout(self) -> Layout:
        return layout(self.policy, self.spec)

    @property
    def observed(self) -> bool:
        """Whether attention gives scores to tokens."""
        return self.layout.observer is not None

    @property
    def shared(self) -> bool:
        """Whether the kv heads share the slots of the history."""
        return self.history is not None and self.history.owner is not None


def layer_caches(cache) -> list[LayerCache]:
    """The attention layers' caches of a model, each pool of heads for itself."""
    leaves = jax.tree.leaves(cache, is_leaf=lambda x: isinstance(x, LayerCache))
    return [x for x in leaves if isinstance(x, LayerCache)]


def init_layer(policy: CachePolicy, spec: CacheSpec, layer: int = 0, part: Part | None = None) -> LayerCache:
    """An empty cache; ``layer``: which of the model's layers, for policies with a calibration file; ``part``: of its heads."""
    policy.validate(spec)
    place, codec = layout(policy, spec), policy.codec

    def segment(slots: int, codec: KeyValueCodec, placed=False, scored=False, biased=False, shared=False) -> Segment | None:
        if slots == 0:
            return None
        lead = (spec.batch, 1 if shared else spec.kv_heads)
        slots *= spec.kv_heads if shared else 1
        latent = spec.latent_dim is not None
        return Segment(
            k=codec.keys.zeros((*lead, spec.coded_dim, slots), spec.dtype),
            v=None if latent else codec.values.zeros((*lead, spec.value_dim, slots), spec.dtype),
            extra=Dense().zeros((*lead, spec.extra_dim, slots), spec.dtype) if spec.extra_dim else None,
            pos=jnp.full((*lead, slots), FREE, jnp.int32) if placed else None,
            score=jnp.zeros((*lead, slots), jnp.float32) if scored else None,
            bias=jnp.zeros((*lead, slots), jnp.float32) if biased else None,
            owner=jnp.zeros((*lead, slots), jnp.int8) if shared else None,
        )

    scored = place.judge is not None and place.judge.scored
    host = segment(place.host_slots, codec)
    return LayerCache(
        sinks=segment(place.sinks, Dense()),
        history=segment(place.resident - place.rest, codec, place.placed, scored, place.folds, place.competing),
        rest=segment(place.rest, codec.rest, place.placed) if place.rest else None,
        host=None if host is None else pool.store(host, policy.tier.page),
        tail=segment(place.tail, Dense(), scored=place.observer is not None),
        staged=None,
        staged_count=None,
        staged_weight=None,
        length=jnp.zeros((spec.batch,), jnp.int32),
        written=jnp.zeros((spec.batch,), jnp.int32),
        basis=init_basis(policy, spec, layer, part) if place.slots else None,
        policy=policy,
        spec=spec,
        refined=init_counters(policy, spec) if place.slots else None,
        bounds=empty_bounds(place, spec),
        moments=no_moments(spec) if place.moments else None,
    )


def init_counters(policy: CachePolicy, spec: CacheSpec) -> Array | None:
    """Nothing refined and nothing read yet; None if the codec's pages are all read alike."""
    return jnp.zeros((spec.batch, 2), jnp.float32) if policy.codec.page > 1 else None


def update(
    cache: LayerCache | HeadPools,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"] | None = None,
    lengths: Int[Array, "B"] | None = None,
    queries: Float[Array, "B T N H"] | None = None,
    output_projection: Float[Array, "N H D"] | None = None,
) -> LayerCache | HeadPools:
    """Stages new tokens: a whole prompt, a chunk of it, or one decode step.

    Args:
      k: keys, not yet rotated if ``spec.rope`` is a ``Rope``. For a latent stream [B, T, 1, latent + rotary part].
      v: values; None for a latent stream.
      lengths: how many of the T tokens of each row are real, for ragged batches; the others, on the right, are ignored,
        whatever they hold.
      queries: the new tokens' queries, rotated as little as the keys, from which a codec's channels are balanced; used
        until a row's first token enters the history.
      output_projection: what the outputs are multiplied with, from which channels of the values are balanced.

    Returns:
      The cache with the tokens staged. Tokens staged before are committed first.

    Raises:
      ValueError: shapes that do not fit the spec, or no queries for a policy that asks for ``balance=channels``.
    """
    spec = cache.spec
    check_new_tokens(spec, k, v, lengths)
    if queries is None and cache.policy.resolved_front().balance == "channels":
        raise ValueError("balance=channels needs update(..., queries=q); give them, or use balance=off")
    if isinstance(cache, HeadPools):
        parts = zip(cache.pools, *map(cache.split, (k, v, queries), (2, 2, 2)), cache.split(output_projection, 0), strict=True)
        return cache.replaced(update(pool, k, v, lengths, q, out) for pool, k, v, q, out in parts)
    cache = commit(cache)
    if lengths is None:
        count = jnp.full((spec.batch,), k.shape[1], jnp.int32)
    else:
        count = lengths.astype(jnp.int32)
        real = (jnp.arange(k.shape[1], dtype=jnp.int32) < count[:, None])[..., None, None]
        # A NaN in the padding would reach real outputs as 0 * NaN.
        k, v = jnp.where(real, k, 0), None if v is None else jnp.where(real, v, 0)
    if isinstance(spec.rope, Rope):
        k = apply_rope(k, staged_positions(cache, k.shape[1]), spec.rope, spec.capacity)
    k, v = jnp.moveaxis(k, 1, -1), None if v is None else jnp.moveaxis(v, 1, -1)
    staged = Segment(
        k=dense(k[:, :, : spec.coded_dim]),
        v=None if v is None else dense(v),
        extra=dense(k[:, :, spec.coded_dim :]) if spec.extra_dim else None,
        score=jnp.zeros((spec.batch, spec.kv_heads, k.shape[-1]), jnp.float32) if cache.layout.observer else None,
    )
    cache = dataclasses.replace(cache, staged=staged, staged_count=count)
    return _observed(cache, queries, output_projection) if cache.basis is not None else cache


def _starts(cache: LayerCache) -> Bool[Array, "B"]:
    """Rows whose first token leaves for the history with what is staged now."""
    return (cache.written == 0) & (leaving_count(cache) > 0)


def _observed(cache: LayerCache, queries: Array | None, output_projection: Array | None) -> LayerCache:
    """The cache with what ``_measured`` will need of a step and cannot ask for later."""
    spec, basis, weight = cache.spec, cache.basis, None
    if queries is not None and basis.q_square is not None:
        at = staged_positions(cache, cache.staged.slots)
        if isinstance(spec.rope, Rope):
            queries = apply_rope(queries, at, spec.rope, spec.capacity)
        basis = observe(basis, queries, at - cache.length[:, None] < cache.staged_count[:, None])
    if output_projection is not None and basis.v_balance is not None and basis.v_inverse is None:
        # Most steps would read the projection for nothing.
        weight = jax.lax.cond(
            jnp.any(_starts(cache)),
            lambda projection: value_weight(projection, spec),
            lambda projection: jnp.zeros((spec.kv_heads, spec.value_dim), jnp.float32),
            output_projection,
        )
    return dataclasses.replace(cache, basis=basis, staged_weight=weight)


def _measured(caches: list[LayerCache]) -> list[LayerCache]:
    """Caches that look alike, with the basis of rows whose first token is about to enter the history.

    Nothing reads a row's basis before that, so it can wait for the commit, where the layers of a decode step share a program.
    """
    if caches[0].basis is None:
        return caches
    apart = dict.fromkeys(("sinks", "history", "rest", "host", "refined", "bounds"))
    light = [dataclasses.replace(cache, policy=caches[0].policy, **apart) for cache in caches]

    def all_measured(light: list[LayerCache]) -> list[Basis]:
        if len(light) == 1:
            return [_own_basis(light[0])]
        # One after the other: it happens once, and a loop's body compiles faster than a program for all.
        together = jax.lax.map(_own_basis, jax.tree.map(lambda *x: jnp.stack(x), *light))
        return [jax.tree.map(lambda x, i=i: x[i], together) for i in range(len(light))]

    anything = functools.reduce(jnp.logical_or, [jnp.any(_starts(cache)) for cache in light])
    found = jax.lax.cond(anything, all_measured, lambda light: [cache.basis for cache in light], light)
    return [dataclasses.replace(cache, basis=basis) for cache, basis in zip(caches, found, strict=True)]


def _own_basis(cache: LayerCache) -> Basis:
    """The basis, of rows that start from the tokens at hand."""
    spec, old = cache.spec, cache.basis
    new, first = old, _starts(cache)
    block, position, real = _at_hand(cache, 1)
    v = None if block.v is None else block.v.data
    new = measure(new, block.k.data, v, position, real, spec, cache.staged_weight)
    new = fit_codec(new, cache.policy.codec, *_at_hand(cache, cache.layout.tile), spec)
    return jax.tree.map(lambda a, b: a if a is b else jnp.where(first.reshape(-1, *(1,) * (a.ndim - 1)), a, b), new, old)


def staged_positions(cache: LayerCache, tokens: int) -> Int[Array, "B T"]:
    """Positions in the text of the ``tokens`` that come next."""
    return cache.length[:, None] + jnp.arange(tokens, dtype=jnp.int32)


def written_after[Tree](cache: LayerCache, out: Tree) -> tuple[LayerCache, Tree]:
    """The same, but what is committed to the cache from here on is written after ``out`` has been found.

    XLA's CPU compiler does not see to that by itself: it copies a whole history that a loop reads before it writes one token
    to it. The barrier is on the numbers of the slots that are written; on the history it would keep XLA from choosing layouts.
    """
    out, length, written = jax.lax.optimization_barrier((out, cache.length, cache.written))
    return dataclasses.replace(cache, length=length, written=written), out


def commit(cache: LayerCache | HeadPools) -> LayerCache | HeadPools:
    """Moves the staged tokens to where they belong: sinks, tail, or, encoded, the history."""
    return commit_all((cache,))[0]


def commit_all(caches: Sequence) -> tuple:
    """``commit`` for every layer of a model; layers of one codec and shape measure and encode their tokens together.

    That is one program instead of one per layer, which is much of what a decode step takes to compile, and one launch. The
    tokens of all layers are staged until then: for a step of few tokens.
    """
    groups: dict[tuple, list[int]] = {}
    done, structure_of_all = jax.tree.flatten(tuple(caches), is_leaf=lambda x: isinstance(x, LayerCache))
    for i, cache in enumerate(done):
        if getattr(cache, "staged", None) is not None:
            arrays, structure = jax.tree.flatten((cache.staged, cache.tail, cache.basis, cache.staged_weight))
            shapes = tuple((x.shape, x.dtype) for x in arrays)
            alike = (cache.policy.codec, cache.policy.resolved_front(), cache.spec, cache.layout, structure, shapes)
            groups.setdefault(alike, []).append(i)
    for members in groups.values():
        for i, found in zip(members, _commit_alike([done[i] for i in members]), strict=True):
            done[i] = found
    return jax.tree.unflatten(structure_of_all, done)


def _commit_alike(caches: list[LayerCache]) -> list[LayerCache]:
    caches = _measured(caches)
    return [_moved(cache, *found) for cache, found in zip(caches, _commit_history(caches), strict=True)]


def _moved(cache: LayerCache, kept: Kept, written: Array) -> LayerCache:
    """The cache with its staged tokens in the sinks and the tail, and what has become of the history."""
    start, count = cache.length, cache.staged_count
    sinks, tail = cache.sinks, cache.tail
    staged = cast(cache.staged, cache.spec.dtype)
    if sinks is not None:
        sinks = write(sinks, bare(staged), start, count)
    if tail is not None:
        tail = write_ring(tail, staged, start, count)
    return dataclasses.replace(
        cache,
        sinks=sinks,
        **kept._asdict(),
        tail=tail,
        staged=None,
        staged_count=None,
        staged_weight=None,
        length=start + count,
        written=written,
    )


class Kept(NamedTuple):
    """The segments of the history, and the bounds of its keys."""

    history: Segment | None
    rest: Segment | None
    host: Segment | None
    bounds: KeyBounds | None = None


def _commit_history(caches: list[LayerCache]) -> list[tuple[Kept, Array]]:
    """Encodes the tokens that leave the tail (or skip it) and writes them behind the history; caches that look alike."""
    written = [cache.written + leaving_count(cache) for cache in caches]
    keep = lambda caches: [Kept(cache.history, cache.rest, cache.host, cache.bounds) for cache in caches]  # noqa: E731
    if caches[0].history is None:
        found = keep(caches)
    elif caches[0].layout.tile == 1:
        found = _write_histories(caches)
    else:  # most steps fill no tile, and encoding one is dear
        anything = functools.reduce(jnp.logical_or, [jnp.any(leaving_count(cache) > 0) for cache in caches])
        found = jax.lax.cond(anything, _write_histories, keep, caches)
    return list(zip(found, written, strict=True))


def _write_histories(caches: list[LayerCache]) -> list[Kept]:
    codec, spec = caches[0].policy.codec, caches[0].spec
    blocks = [_leaving(cache) for cache in caches]

    def coded(block: Segment, position: Array, end: Array, basis: Basis | None) -> tuple[Segment, Segment | None]:
        if codec.rest is not None:
            return encode_in_two(block, position, end, codec, basis, spec)
        return encode(block, position[:, None], codec, basis, spec), None

    if len(caches) == 1:
        found = [coded(*blocks[0][:2], _end(caches[0]), caches[0].basis)]
    else:
        each = [(*block[:2], _end(cache), cache.basis) for block, cache in zip(blocks, caches, strict=True)]
        together = jax.vmap(coded)(*jax.tree.map(lambda *x: jnp.stack(x), *each))
        found = [jax.tree.map(lambda x, i=i: x[i], together) for i in range(len(caches))]
    return [_write_history(*each) for each in zip(caches, found, blocks, strict=True)]


def _write_history(
    cache: LayerCache, coded: tuple[Segment, Segment | None], block: tuple[Segment, Array, Array]
) -> Kept:
    place, written, spec = cache.layout, cache.written, cache.spec
    (stored, rest), (source, position, count) = coded, block
    if place.judge is not None:
        return Kept(_admitted(cache, stored, source, position, count), None, None)
    put = write_ring if place.ring or cache.host is not None else write
    if rest is not None:  # each tile leaves a fixed number of tokens to each part
        salient, tile = cache.policy.codec.salient, place.tile
        parts = ((cache.history, stored, salient), (cache.rest, rest, tile - salient))
        return Kept(*(put(old, new, written // tile * n, count // tile * n) for old, new, n in parts), None)
    if cache.history.pos is not None:
        shape = (spec.batch, spec.kv_heads, position.shape[1])
        bias = None if cache.history.bias is None else jnp.zeros(shape, jnp.float32)
        stored = dataclasses.replace(stored, pos=jnp.broadcast_to(position[:, None], shape), bias=bias)
        put = append if cache.shared else put
    history = put(cache.history, stored, written, count)
    if cache.host is None:
        return Kept(history, None, None, bounds_after(cache, history, position.shape[1], written + count))
    source = _source(written, written + count, place)
    return Kept(history, None, pool.write(cache.host, coded[0], source, cache.policy.tier.page))


def _admitted(cache: LayerCache, stored: Segment, exact: Segment, position: Array, count: Array) -> Segment:
    """The history after its judge has compared the tokens that leave the tail, in codes and exact, with those it holds."""
    spec, place, judge, history = cache.spec, cache.layout, cache.layout.judge, cache.history
    real = jnp.arange(position.shape[1], dtype=jnp.int32) < count[:, None]
    shape = (spec.batch, spec.kv_heads, position.shape[1])
    at = jnp.broadcast_to(jnp.where(real, position, FREE)[:, None], shape)
    score = judge.first_score(exact.k.data, None if exact.v is None else exact.v.data)
    bias = jnp.zeros(shape, jnp.float32) if place.folds else None
    new = dataclasses.replace(stored, pos=at, score=exact.score if score is None else score, bias=bias)

    end = _end(cache)
    alive = jnp.zeros_like(end) if spec.window is None else end - spec.window + 1
    if place.competing:
        return admit_shared(history, new, judge, end, alive)

    def keys() -> Array:
        held = decode_keys(history.k, jnp.maximum(history.pos, 0), cache.policy.codec, cache.basis, spec)
        return jnp.concatenate([held, exact.k.data.astype(jnp.float32)], axis=-1)

    def expected(horizon: int) -> Array:
        return expected_logits(cache.moments, keys(), mean_rotation(spec, end, horizon), spec.attention_scale)

    values = fitted(cache.policy.codec, cache.basis)[1] if place.folds else None
    return admit(history, new, judge, end, keys, alive, values, expected)


def _source(written: Array, written_after: Array, place: Layout) -> Int[Array, "B S"]:
    """Which token of the step (by its number in the block) each slot of the host pool gets; -1: none."""
    slot, end = jnp.arange(place.host_slots, dtype=jnp.int32), written_after[:, None]
    newest = order_in_ring(end, slot, place.slots) if place.ring else slot
    fresh = (newest >= written[:, None]) & (newest < end) & (slot < place.slots)
    return jnp.where(fresh, newest - written[:, None], -1)


def leaving_count(cache: LayerCache) -> Int[Array, "B"]:
    """How many tokens enter the history when the staged ones are committed."""
    return _entered(cache, _end(cache)) - _entered(cache, cache.length)


def _end(cache: LayerCache) -> Int[Array, "B"]:
    return cache.length + cache.staged_count


def _entered(cache: LayerCache, length: Array) -> Int[Array, "B"]:
    """How many tokens of a text of ``length`` are in the history: all but the sinks and the tail, in whole tiles."""
    place = cache.layout
    return jnp.maximum(length - place.kept - place.sinks, 0) // place.tile * place.tile


def _leaving(cache: LayerCache) -> tuple[Segment, Array, Array]:
    """The staged step's tokens for the history: a block in text order, their positions, and how many are real."""
    place, start, staged = cache.layout, cache.length, cache.staged
    count = leaving_count(cache)
    first = place.sinks + _entered(cache, start)
    size = (staged.slots + place.tile - 1) // place.tile * place.tile
    position = first[:, None] + jnp.arange(size, dtype=jnp.int32)
    if place.sinks == 0 and place.tail == 0:
        return staged, position, count
    if cache.tail is not None and staged.slots <= place.kept:  # what leaves has been in the tail
        return take(cast(cache.tail, staged.k.data.dtype), position % place.tail), position, count
    return _recent(cache, position), position, count


def _recent(cache: LayerCache, position: Int[Array, "B T"]) -> Segment:
    """Tokens at ``position`` that are in the tail or staged; anything where there is none."""
    source, offset, place = cache.staged, position - cache.length[:, None], cache.layout
    if cache.tail is not None:
        tail = cast(cache.tail, source.k.data.dtype)
        source = beside(tail, source)
        offset = jnp.where(offset < 0, position % place.tail, offset + place.tail)
    return take(source, jnp.clip(offset, 0, source.slots - 1))


def _at_hand(cache: LayerCache, tile: int) -> tuple[Segment, Array, Array]:
    """Whole tiles of all tokens of rows whose history is empty, the sinks apart, as they are or will be encoded.

    In text order, with their positions [B, 1, T] and whether they are there.
    """
    place = cache.layout
    size = -(-(place.tail + cache.staged.slots) // tile) * tile
    order = jnp.arange(size, dtype=jnp.int32)
    position = jnp.broadcast_to(place.sinks + order, (cache.spec.batch, size))
    count = (_end(cache) - place.sinks) // tile * tile
    return cast(_recent(cache, position), jnp.float32), position[:, None], (order < count[:, None])[:, None]
