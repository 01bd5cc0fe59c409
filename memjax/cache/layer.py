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
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from memjax.attention.rope import Rope, apply_rope
from memjax.cache.admit import admit
from memjax.cache.bounds import KeyBounds, bounds_after, empty_bounds
from memjax.cache.layout import Layout, layout
from memjax.cache.share import admit_shared
from memjax.cache.slots import take, write, write_ring
from memjax.cache.spec import CacheSpec
from memjax.offload import pool
from memjax.pallas_kernels.codes import Codes, dense
from memjax.pallas_kernels.slots import FREE
from memjax.quantize.calibration import load_basis
from memjax.quantize.codec import Dense, KeyValueCodec
from memjax.quantize.front import Basis, empty_basis, measure, observe, prepare_keys, prepare_values, restore_keys

if TYPE_CHECKING:
    from memjax.cache.policy import CachePolicy


@functools.partial(jax.tree_util.register_dataclass, data_fields=["k", "v", "extra", "pos", "score", "owner"], meta_fields=[])
@dataclass(frozen=True)
class Segment:
    """Key and value codes [B, K, C, S]; ``v`` is None for a latent stream, ``extra`` its dense rotary part.

    ``pos`` int32 [B, K, S] is stored where slots and positions have come apart (-1: free), else None; ``score`` float32
    [B, K, S] where the policy judges tokens. Where the kv heads share one pool of slots, the shapes are those of one head with
    the slots of all of them, and ``owner`` int8 [B, 1, S] says whose a slot is.
    """

    k: Codes
    v: Codes | None
    extra: Codes | None
    pos: Array | None = None
    score: Array | None = None
    owner: Array | None = None

    @property
    def slots(self) -> int:
        return self.k.slots


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
        "length",
        "written",
        "basis",
        "refined",
        "bounds",
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
      length: int32 [B], tokens committed.
      written: int32 [B], tokens that have entered the history.
      basis: statistics in which the history is coded; None without a front end.
      refined: float32 [B, 2], pages that decode steps have read in full and pages that they have read at all, summed over kv
        heads; None for codecs whose pages are all read alike.
      bounds: of the keys of each page of the history; None for policies that read all pages.
      policy, spec: static.
    """

    sinks: Segment | None
    history: Segment | None
    rest: Segment | None
    host: Segment | None
    tail: Segment | None
    staged: Segment | None
    staged_count: Array | None
    length: Array
    written: Array
    basis: Basis | None
    policy: CachePolicy
    spec: CacheSpec
    refined: Array | None = None
    bounds: KeyBounds | None = None

    @property
    def layout(self) -> Layout:
        return layout(self.policy, self.spec)


def init_layer(policy: CachePolicy, spec: CacheSpec, layer: int = 0) -> LayerCache:
    """An empty cache; ``layer``: which of the model's layers, for policies with a calibration file."""
    policy.validate(spec)
    place, codec = layout(policy, spec), policy.codec

    def segment(
        slots: int, codec: KeyValueCodec, placed: bool = False, scored: bool = False, shared: bool = False
    ) -> Segment | None:
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
            owner=jnp.zeros((*lead, slots), jnp.int8) if shared else None,
        )

    scored = place.judge is not None and place.judge.scored
    host = segment(place.host_slots, codec)
    return LayerCache(
        sinks=segment(place.sinks, Dense()),
        history=segment(place.resident - place.rest, codec, place.placed, scored, place.shared),
        rest=segment(place.rest, codec.rest, place.placed) if place.rest else None,
        host=None if host is None else pool.store(host, policy.tier.page),
        tail=segment(place.tail, Dense(), scored=place.observer is not None),
        staged=None,
        staged_count=None,
        length=jnp.zeros((spec.batch,), jnp.int32),
        written=jnp.zeros((spec.batch,), jnp.int32),
        basis=init_basis(policy, spec, layer) if place.slots else None,
        policy=policy,
        spec=spec,
        refined=init_counters(policy, spec) if place.slots else None,
        bounds=empty_bounds(place, spec),
    )


def init_counters(policy: CachePolicy, spec: CacheSpec) -> Array | None:
    """Nothing refined and nothing read yet; None if the codec's pages are all read alike."""
    return jnp.zeros((spec.batch, 2), jnp.float32) if policy.codec.page > 1 else None


def init_basis(policy: CachePolicy, spec: CacheSpec, layer: int) -> Basis | None:
    """What the codec's front end starts from: nothing measured yet, or a calibration file."""
    front = policy.resolved_front()
    return load_basis(front.calibration, spec, layer) if front.calibration else empty_basis(front, spec)


def update(
    cache: LayerCache,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"] | None = None,
    lengths: Int[Array, "B"] | None = None,
    queries: Float[Array, "B T N H"] | None = None,
    output_projection: Float[Array, "N H D"] | None = None,
) -> LayerCache:
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
    _check_new_tokens(spec, k, v, lengths)
    if queries is None and cache.policy.resolved_front().balance == "channels":
        raise ValueError("balance=channels needs update(..., queries=q); give them, or use balance=off")
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
    if cache.basis is None or cache.policy.resolved_front().calibration:
        return cache
    return _measured(cache, queries, output_projection)


def _measured(cache: LayerCache, queries: Array | None, output_projection: Array | None) -> LayerCache:
    """The cache with the basis of rows whose first token leaves for the history with what is staged now."""
    spec, basis, place = cache.spec, cache.basis, cache.layout
    tokens = cache.staged.slots
    if queries is not None:
        at = staged_positions(cache, tokens)
        if isinstance(spec.rope, Rope):
            queries = apply_rope(queries, at, spec.rope, spec.capacity)
        basis = observe(basis, queries, at - cache.length[:, None] < cache.staged_count[:, None])
    first = (cache.written == 0) & (leaving_count(cache) > 0)

    def measured(basis: Basis) -> Basis:
        staged, position = _cast(cache.staged, jnp.float32), staged_positions(cache, tokens)
        real = position - cache.length[:, None] < cache.staged_count[:, None]
        if cache.tail is not None:  # nothing has left it yet: slot j holds token sinks + something that is j modulo the tail
            tail, slot = _cast(cache.tail, jnp.float32), jnp.arange(place.tail, dtype=jnp.int32)
            held = place.sinks + (slot - place.sinks) % place.tail
            staged = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=-1), tail, staged)
            position = jnp.concatenate([jnp.broadcast_to(held, (spec.batch, place.tail)), position], axis=-1)
            real = jnp.concatenate([held < cache.length[:, None], real], axis=-1)
        real &= position >= place.sinks
        v = None if staged.v is None else staged.v.data
        new = measure(basis, staged.k.data, v, position[:, None], real[:, None], spec, output_projection)
        return jax.tree.map(lambda a, b: jnp.where(first[:, None, None], a, b), new, basis)

    return dataclasses.replace(cache, basis=jax.lax.cond(jnp.any(first), measured, lambda basis: basis, basis))


def _check_new_tokens(spec: CacheSpec, k: Array, v: Array | None, lengths: Array | None) -> None:
    if lengths is not None and lengths.shape != (spec.batch,):
        raise ValueError(f"update needs lengths of shape [{spec.batch}], one per row, got {list(lengths.shape)}")
    expected = (spec.batch, spec.kv_heads, spec.head_dim)
    if k.ndim != 4 or (k.shape[0], *k.shape[2:]) != expected:
        raise ValueError(
            f"update needs keys [batch, tokens, kv_heads, head_dim] = [{spec.batch}, T, {spec.kv_heads}, "
            f"{spec.head_dim}], got {list(k.shape)}"
        )
    if spec.latent_dim is not None:
        if v is not None:
            raise ValueError("a latent stream has no values of its own (they are a prefix of the keys): pass v=None")
    elif v is None or v.shape != k.shape:
        raise ValueError(f"update needs values of the keys' shape {list(k.shape)}, got {None if v is None else v.shape}")


def staged_positions(cache: LayerCache, tokens: int) -> Int[Array, "B T"]:
    """Positions in the text of the ``tokens`` that come next."""
    return cache.length[:, None] + jnp.arange(tokens, dtype=jnp.int32)


def commit(cache: LayerCache) -> LayerCache:
    """Moves the staged tokens to where they belong: sinks, tail, or, encoded, the history."""
    return cache if cache.staged is None else _moved(cache, *_commit_history([cache])[0])


def commit_all(caches: Sequence) -> tuple:
    """``commit`` for every layer of a model; layers of one codec and shape encode their tokens together.

    That is one program instead of one per layer, which is much of what a decode step takes to compile, and one launch. The
    tokens of all layers are staged until then: for a step of few tokens.
    """
    groups: dict[tuple, list[int]] = {}
    for i, cache in enumerate(caches):
        if getattr(cache, "staged", None) is not None:
            arrays, structure = jax.tree.flatten((cache.staged, cache.tail, cache.basis))
            shapes = tuple((x.shape, x.dtype) for x in arrays)
            groups.setdefault((cache.policy.codec, cache.spec, cache.layout, structure, shapes), []).append(i)
    done = list(caches)
    for members in groups.values():
        for i, found in zip(members, _commit_history([caches[i] for i in members]), strict=True):
            done[i] = _moved(caches[i], *found)
    return tuple(done)


def _moved(cache: LayerCache, kept: Kept, written: Array) -> LayerCache:
    """The cache with its staged tokens in the sinks and the tail, and what has become of the history."""
    start, count = cache.length, cache.staged_count
    sinks, tail = cache.sinks, cache.tail
    staged = _cast(cache.staged, cache.spec.dtype)
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
        stored = dataclasses.replace(stored, pos=jnp.broadcast_to(position[:, None], shape))
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
    new = dataclasses.replace(stored, pos=at, score=exact.score if score is None else score)

    end = _end(cache)
    alive = jnp.zeros_like(end) if spec.window is None else end - spec.window + 1
    if place.shared:
        return admit_shared(history, new, judge, end, alive)

    def keys() -> Array:
        coded = cache.policy.codec.keys.decode(history.k)
        held = restore_keys(cache.basis, coded, jnp.maximum(history.pos, 0), spec)
        return jnp.concatenate([held, exact.k.data.astype(jnp.float32)], axis=-1)

    return admit(history, new, judge, end, keys, alive)


def encode_in_two(
    block: Segment,
    position: Int[Array, "B T"],
    end: Int[Array, "B"],
    codec: KeyValueCodec,
    basis: Basis | None,
    spec: CacheSpec,
) -> tuple[Segment, Segment]:
    """The most attended tokens of each tile of a dense block in the codec's own bits, the others in those of ``codec.rest``.

    Attention is the mean over the queries that saw a token; ``end``: tokens seen so far.
    """
    lead, tile = block.score.shape[:2], codec.tile
    seen = jnp.maximum(end[:, None] - position, 1)[:, None].astype(jnp.float32)
    rank = (block.score / seen).reshape(*lead, -1, tile)
    order = jnp.argsort(-rank, axis=-1)
    first = jnp.arange(rank.shape[-2], dtype=jnp.int32)[:, None] * tile

    def part(chosen: Array, codec: KeyValueCodec) -> Segment:
        index = (jnp.sort(chosen, axis=-1) + first).reshape(*lead, -1)
        at = jnp.take_along_axis(jnp.broadcast_to(position[:, None], (*lead, position.shape[1])), index, axis=-1)
        return dataclasses.replace(encode(take(bare(block), index), at, codec, basis, spec), pos=at)

    return part(order[..., : codec.salient], codec), part(order[..., codec.salient :], codec.rest)


def encode(block: Segment, position: Array, codec: KeyValueCodec, basis: Basis | None, spec: CacheSpec) -> Segment:
    """Codes of a dense block of tokens at ``position`` [B, 1|K, T]."""
    k = prepare_keys(basis, block.k.data, position, spec)
    v = None if block.v is None else prepare_values(basis, block.v.data)
    return Segment(
        k=codec.keys.encode(k, spec.dtype),
        v=None if v is None else codec.values.encode(v, spec.dtype),
        extra=None if block.extra is None else dense(block.extra.data, spec.dtype),
    )


def _source(written: Array, written_after: Array, place: Layout) -> Int[Array, "B S"]:
    """Which token of the step (by its number in the block) each slot of the host pool gets; -1: none."""
    slot, end = jnp.arange(place.host_slots, dtype=jnp.int32), written_after[:, None]
    newest = end - 1 - (end - 1 - slot) % place.slots if place.ring else slot
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
    if cache.tail is None:
        source, offset = staged, position - start[:, None]
    elif staged.slots <= place.kept:  # what leaves has been in the tail
        source, offset = _cast(cache.tail, staged.k.data.dtype), position % place.tail
    else:
        tail = _cast(cache.tail, staged.k.data.dtype)
        source = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=-1), tail, staged)
        offset = position - start[:, None]
        offset = jnp.where(offset < 0, position % place.tail, offset + place.tail)
    return take(source, jnp.clip(offset, 0, source.slots - 1)), position, count


def _cast(segment: Segment, dtype: DTypeLike) -> Segment:
    """With keys and values in another dtype."""
    wide = jax.tree.map(lambda x: x.astype(dtype), bare(segment))
    return dataclasses.replace(wide, pos=segment.pos, score=segment.score)


def bare(segment: Segment) -> Segment:
    """The tokens alone, without positions, scores and owners."""
    return dataclasses.replace(segment, pos=None, score=None, owner=None)
