"""Attention over one layer's cache: segment by segment, merged exactly by log-sum-exp."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax.attention.progressive import progressive_attention
from memjax.attention.quest import page_scores, pages_seen, quest_attention
from memjax.attention.rope import Rope, apply_rope
from memjax.cache.encode import fitted
from memjax.cache.layer import LayerCache, leaving_count, staged_positions, written_after
from memjax.cache.pools import HeadPools
from memjax.cache.segment import Segment, bare
from memjax.cache.share import heads_apart, shared_queries, slots_per_head
from memjax.cache.slots import order_in_ring
from memjax.evict.expected_attention import SKIPPED, add_queries
from memjax.evict.observer import Look
from memjax.offload import pool
from memjax.pallas_kernels.decode import Centre, decode
from memjax.pallas_kernels.merge import merge
from memjax.pallas_kernels.prefill import prefill
from memjax.pallas_kernels.slots import FREE, Positions, Span
from memjax.pallas_kernels.slots import positions as as_array
from memjax.quantize.codec import CodePair
from memjax.quantize.front import centre_term, prepare_queries, restore_outputs

LOOKED_AT = 64  # queries whose logits over the whole cache exist at once, for scores, at most
LOGITS = 1 << 22  # so many of their logits, unless that leaves a matrix product fewer than 64 rows
DECODE_TOKENS = 8  # with more new tokens than these, kernels work on blocks of query rows


def attend(
    cache: LayerCache | HeadPools, q: Float[Array, "B T N H"], positions: Int[Array, "B T"] | None = None
) -> tuple[Float[Array, "B T N Hv"], LayerCache | HeadPools]:
    """What queries read from the cache: everything committed and everything staged that is not in their future.

    Args:
      q: queries, not yet rotated if ``spec.rope`` is a ``Rope``; N is a multiple of kv_heads.
      positions: where the queries stand in the text. None: at the staged tokens, or, if nothing is staged, at the last T
        committed ones.

    Returns:
      Attention outputs in q's dtype; for a latent stream Hv = latent_dim, else head_dim. NaN in rows that were given more
      tokens than ``spec.capacity``, so that an overflow inside ``jit`` cannot pass for a result. And the cache: the same but
      for the scores of its tokens, if its policy judges them by the attention of the staged tokens' queries, and the count of
      what was read, if it keeps one.

    Raises:
      ValueError: query heads are no multiple of kv_heads or not those of the spec, another batch or head_dim, or without
        ``positions`` another number of queries than of staged tokens.
    """
    spec = cache.spec
    if q.ndim != 4 or q.shape[0] != spec.batch or q.shape[2] % spec.kv_heads or q.shape[3] != spec.head_dim:
        raise ValueError(
            f"attend needs queries [batch={spec.batch}, T, N, head_dim={spec.head_dim}] with N a multiple of "
            f"kv_heads={spec.kv_heads}, got {list(q.shape)}"
        )
    batch, tokens, heads, _ = q.shape
    if spec.q_heads not in (None, heads):
        raise ValueError(f"attend got {heads} query heads for a cache that was made for q_heads={spec.q_heads}")
    if isinstance(cache, HeadPools):
        found = [attend(pool, part, positions) for pool, part in zip(cache.pools, cache.split(q, 2), strict=True)]
        out, cache = cache.join([each for each, _ in found], 2), cache.replaced(pool for _, pool in found)
        lost = functools.reduce(jnp.logical_or, map(_overflowed, cache.pools))  # streaming heads alone would not tell
        return jnp.where(lost[:, None, None, None], jnp.nan, out), cache
    consecutive = positions is None
    if positions is None:
        if cache.staged is not None and cache.staged.slots != tokens:
            raise ValueError(
                f"attend got {tokens} queries for {cache.staged.slots} staged tokens: pass the positions of the queries"
            )
        positions = staged_positions(cache, tokens) - (0 if cache.staged is not None else tokens)
    reader, observer = Reader(cache, q, positions, consecutive), cache.layout.observer
    fresh = consecutive and cache.staged is not None
    observed = fresh and observer is not None
    reader.keeps_logits = observed and tokens <= DECODE_TOKENS
    parts = reader.recent_parts()
    apart = [reader.sink_part()] if reader.sinks_stand_apart else []
    if cache.history is not None:
        parts += reader.history_parts(parts + apart)
    out, lse = merge(parts + apart)
    if fresh and cache.moments is not None:
        counts = (positions >= SKIPPED) & (positions - cache.length[:, None] < cache.staged_count[:, None])
        cache = dataclasses.replace(cache, moments=add_queries(cache.moments, q, counts))
    if observed:
        cache = _observed(reader, q, out, lse)
    if reader.counts is not None:
        cache = dataclasses.replace(cache, refined=cache.refined + reader.counts)
    out = out.reshape(batch, heads, tokens, -1).swapaxes(1, 2)
    out = jnp.where(_overflowed(cache)[:, None, None, None], jnp.nan, out).astype(q.dtype)
    cache, out = written_after(cache, out)
    return out, cache


def reads_apart(cache: LayerCache) -> bool:
    """Whether ``attend_committed`` can serve: staged tokens need no attention but their own, and no sinks stand apart."""
    place = cache.layout
    judged = any(x is not None for x in (place.observer, cache.moments, cache.bounds, cache.refined))
    return not judged and not (isinstance(cache.spec.rope, Rope) and place.recent is not None and place.sinks)


def attend_committed(
    cache: LayerCache, q: Float[Array, "B T N H"]
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """What the staged tokens' queries read from the tokens before those: a part of ``attend``, to be merged with the rest.

    Args:
      cache: one for which ``reads_apart`` holds.
      q: as for ``attend``, one query per staged token.

    Returns:
      Outputs, float32, and the log-sum-exp of the scores: 0 and -inf where nothing has been committed. NaN in rows that were
      given more tokens than ``spec.capacity``.
    """
    batch, tokens, heads, _ = q.shape
    reader = Reader(dataclasses.replace(cache, staged=None), q, staged_positions(cache, tokens), True)
    parts = reader.recent_parts()
    if cache.history is not None:
        parts += reader.history_parts(parts)
    nothing = jnp.zeros((*reader.q.shape[:3], cache.spec.value_dim)), jnp.full(reader.q.shape[:3], -jnp.inf)
    out, lse = merge(parts) if parts else nothing
    out, lse = (x.reshape(batch, heads, tokens, *x.shape[3:]).swapaxes(1, 2) for x in (out, lse))
    return jnp.where(_overflowed(cache)[:, None, None, None], jnp.nan, out), lse


def _observed(reader: Reader, q: Array, out: Array, lse: Array) -> LayerCache:
    """The cache with the scores that the attention of its observer's queries gives to tokens."""
    cache, observer, tokens = reader.cache, reader.cache.layout.observer, q.shape[1]
    if reader.logits:
        index = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (q.shape[0], tokens))
        decay, weights = observer.weights(index, cache.staged_count)
        return reader.scored(decay, reader.seen(out, lse, weights))

    rows = min(observer.queries or tokens, tokens)  # a second look, by the last real tokens of each row

    def look(start: int | Array, count: int) -> tuple[Array, dict[str, Array]]:
        index = cache.staged_count[:, None] - rows + start + jnp.arange(count, dtype=jnp.int32)
        kept = jnp.maximum(index, 0)
        at = jnp.where(index >= 0, jnp.take_along_axis(reader.positions, kept, axis=1), FREE)
        again = Reader(cache, jnp.take_along_axis(q, kept[:, :, None, None], axis=1), at, False)
        again.observe("xla")
        decay, weights = observer.weights(index, cache.staged_count)
        return decay, again.seen(*(_of_tokens(x, kept, reader.groups) for x in (out, lse)), weights)

    block = looked_at(cache, q.shape[2])

    def step(found: dict[str, Array], i: Array) -> tuple[dict[str, Array], None]:
        return jax.tree.map(jnp.add, found, look(i * block, block)[1]), None

    whole, rest = divmod(rows, block)
    decay, found = look(whole * block, rest) if rest else look(0, block)
    if others := range(0 if rest else 1, whole):
        found, _ = jax.lax.scan(step, found, jnp.asarray(others, jnp.int32))
    return reader.scored(decay, found)


def looked_at(cache: LayerCache, heads: int) -> int:
    """Queries, of so many heads each, whose logits over the whole cache may exist at once: a power of two."""
    slots = sum(part.slots for part in (cache.sinks, cache.history, cache.tail, cache.staged) if part is not None)
    rows = heads if cache.shared else heads // cache.spec.kv_heads
    most = max(LOGITS // (cache.spec.batch * heads * slots), 64 // rows, 1)
    return min(1 << most.bit_length() - 1, LOOKED_AT)


def _of_tokens(x: Array, index: Int[Array, "B n"], groups: int) -> Array:
    """The rows [B, K, G * n, ...] of chosen tokens, of all rows [B, K, G * T, ...]."""
    by_token = x.reshape(*x.shape[:2], groups, -1, *x.shape[3:])
    chosen = jnp.take_along_axis(by_token, index.reshape(-1, 1, 1, index.shape[1], *(1,) * (x.ndim - 3)), axis=3)
    return chosen.reshape(*x.shape[:2], -1, *x.shape[3:])


def _overflowed(cache: LayerCache) -> Array:
    """Rows in which a token, committed or staged, finds no slot."""
    if cache.layout.ring:
        return jnp.zeros_like(cache.length, bool)
    slots = max(slots_per_head(cache), cache.layout.slots if cache.host else 0)
    if cache.history is not None and cache.history.pos is None:  # the last page may be longer than the capacity asks for
        place = cache.layout
        slots -= max(place.sinks + place.kept + place.slots - cache.spec.capacity, 0)
    written = cache.written if cache.staged is None else cache.written + leaving_count(cache)
    return written > slots


class Reader:
    """The queries of one call, prepared once, and the attention over each kind of segment."""

    def __init__(self, cache: LayerCache, q: Array, positions: Array, consecutive: bool):
        self.cache, self.spec, self.place = cache, cache.spec, cache.layout
        self.positions = positions
        self.kernels = cache.policy.kernels
        self.keeps_logits, self.logits = False, {}
        self.consecutive = consecutive
        self.in_blocks = consecutive and q.shape[1] > DECODE_TOKENS
        self.groups = q.shape[2] // self.spec.kv_heads
        self.q = self._rows(self._rotate(q, positions))
        self.sinks_stand_apart = False
        self.counts = None  # pages refined and read, once they are
        # Only a rotary embedding and the model's own window depend on where a query stands.
        placed = isinstance(self.spec.rope, Rope) or self.spec.window is not None
        if placed and self.place.recent is not None and self.place.sinks:
            kept = self.place.sinks + self.place.recent
            self.sink_positions = cache.policy.evictor.sink_query_positions(positions, kept)
            self.sinks_stand_apart = self.sink_positions is not positions
            self.q_sinks = self._rows(self._rotate(q, self.sink_positions))

    def _rotate(self, q: Array, positions: Array) -> Array:
        if not isinstance(self.spec.rope, Rope):
            return q
        return apply_rope(q, positions, self.spec.rope, self.spec.capacity)

    def _rows(self, q: Array) -> Array:
        """[B, T, N, H] to one row per query of a kv head, [B, K, G * T, H]."""
        batch, tokens, _, dim = q.shape
        return q.swapaxes(1, 2).reshape(batch, self.spec.kv_heads, self.groups * tokens, dim)

    def _attend(
        self,
        q: Array,
        segment: Segment,
        k_pos: Positions,
        implementation: str | None,
        q_pos: Array | None = None,
        centre: Centre | None = None,
        keep: str = "",
        **paging,
    ):
        """Attention over one segment.

        Args:
          q_pos: where the queries stand, if not at ``self.positions``.
          keep: the name by which logits are kept for scores, if any are wanted.
          paging: a page table, and what goes with it.
        """
        k, extra, coded = segment.k, segment.extra, self.spec.coded_dim
        groups = q.shape[2] // self.positions.shape[1]
        if isinstance(k, CodePair):  # the second stream is read as the rotary part of a latent stream is
            k, extra, coded = k.first, k.second, k.first.dim
        arguments = {
            "k_pos": k_pos,
            "q_extra": None if extra is None else q[..., coded:],
            "k_extra": extra,
            "scale": self.spec.attention_scale,
            "softcap": self.spec.softcap,
            "window": self.spec.window,
            "recent": self.place.recent,
            "sinks": self.place.sinks,
            "centre": centre,
            "implementation": implementation,
        }
        q = q[..., :coded]
        if self.in_blocks and q_pos is None and segment.bias is None:
            read = functools.partial(prefill, q, k, q_start=self.positions[:, 0], groups=groups, **arguments)
        else:
            q_pos = jnp.tile(self.positions if q_pos is None else q_pos, (1, groups))
            read = functools.partial(decode, q, k, q_pos=q_pos, bias=segment.bias, **arguments, **paging)
        first, second = (segment.v.first, segment.v.second) if isinstance(segment.v, CodePair) else (segment.v, None)
        if keep and self.keeps_logits:
            out, lse, self.logits[keep] = read(v=first, logits=True)
        else:
            out, lse = read(v=first)
        return (out if second is None else jnp.concatenate([out, read(v=second)[0]], axis=-1)), lse

    def observe(self, implementation: str) -> None:
        """Fills ``logits``, for scores alone."""
        self.keeps_logits, self.kernels = True, implementation
        self.recent_parts()
        observer = self.cache.layout.observer
        if self.cache.history is not None and (observer is None or observer.history):
            self.history_parts([])

    def seen(self, out: Array, lse: Array, weights: Array) -> dict[str, Array]:
        """What the observer sees in the slots of each segment, by the queries' weighted rows."""
        cache, observer, found = self.cache, self.cache.layout.observer, {}
        weights = jnp.tile(weights, (1, self.groups)) / self.groups
        at = 0 if self.sinks_stand_apart else cache.layout.sinks
        for name in ("tail", "staged"):
            segment = getattr(cache, name)
            if segment is not None:
                logits = self.logits["recent"][..., at : at + segment.slots]
                found[name] = observer.score(Look(logits, lse, weights, out, functools.partial(self._values, segment)))
                at += segment.slots
        if "history" in self.logits:
            if cache.shared:
                lse, weights = lse.reshape(lse.shape[0], 1, -1), jnp.tile(weights, (1, lse.shape[1]))
            found["history"] = observer.score(Look(self.logits["history"], lse, weights, out, self._history_values))
        return found

    def scored(self, decay: Array, seen: dict[str, Array]) -> LayerCache:
        """The cache with decayed scores plus what the observer has seen."""

        def add(segment: Segment, new: Array) -> Segment:
            return dataclasses.replace(segment, score=decay[:, None, None] * segment.score + new)

        return dataclasses.replace(self.cache, **{name: add(getattr(self.cache, name), new) for name, new in seen.items()})

    def _values(self, segment: Segment) -> Float[Array, "B K Hv S"]:
        """Dense values; those of a latent stream are its keys."""
        return (segment.k if segment.v is None else segment.v).data.astype(jnp.float32)

    def _history_values(self) -> Float[Array, "B K Hv S"]:
        """Values of the history, out of their codes."""
        history, (keys, values) = self.cache.history, fitted(self.cache.policy.codec, self.cache.basis)
        coded = keys.decode(history.k) if history.v is None else values.decode(history.v)
        rows = coded.astype(jnp.float32).swapaxes(-1, -2)
        return restore_outputs(self.cache.basis, rows, jnp.zeros(rows.shape[:3]), self.spec).swapaxes(-1, -2)

    def recent_parts(self):
        """Sinks, tail and staged tokens: all dense, so one segment (without the sinks if those see other queries).

        They are few, and joining them copies them: XLA does that. A chunk of many staged tokens is a kernel's own part.
        """
        cache, parts, found = self.cache, [], []
        if cache.sinks is not None and not self.sinks_stand_apart:
            found.append((cache.sinks, sink_positions(cache)))
        if cache.tail is not None:
            found.append((cache.tail, tail_positions(cache)))
        if cache.staged is not None:
            position = Span(cache.length, cache.staged_count)
            if self.sinks_stand_apart:
                position = as_array(position, cache.staged.slots)
                position = jnp.where(position >= self.place.sinks, position, FREE)
            if self.in_blocks and self.kernels not in (None, "xla"):
                parts.append(self._attend(self.q, cache.staged, position, self.kernels))
            else:
                found.append((cache.staged, position))
        return [self._attend_joined(self.q, found, keep="recent"), *parts] if found else parts

    def sink_part(self):
        """Sinks under queries that stand elsewhere (positions inside the cache), staged sinks included."""
        cache, sinks = self.cache, self.place.sinks
        found = [(cache.sinks, sink_positions(cache))]
        if cache.staged is not None:
            first = jax.tree.map(lambda x: x[..., :sinks], cache.staged)
            count = jnp.clip(sinks - cache.length, 0, jnp.minimum(cache.staged_count, first.slots))
            found.append((first, Span(cache.length, count)))
        return self._attend_joined(self.q_sinks, found, self.sink_positions)

    def _attend_joined(self, q: Array, found: list[tuple[Segment, Positions]], q_pos: Array | None = None, keep: str = ""):
        """Dense segments as one."""
        wide = [jax.tree.map(lambda x: x.astype(q.dtype), bare(segment)) for segment, _ in found]
        if len(found) == 1:
            return self._attend(q, wide[0], found[0][1], "xla", q_pos, keep=keep)
        joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-1), *wide)
        k_pos = jnp.concatenate([as_array(pos, segment.slots) for segment, pos in found], axis=-1)
        return self._attend(q, joined, k_pos, "xla", q_pos, keep=keep)

    def history_parts(self, others: list):
        """The coded history, in the codec's basis, and the older part of it in host memory; ``others``: parts found before."""
        cache, coded, basis = self.cache, self.spec.coded_dim, self.cache.basis
        if others and self.in_blocks:  # else the scores of both exist at once
            self.q, _ = jax.lax.optimization_barrier((self.q, others))
        keys, values = fitted(cache.policy.codec, basis)
        centre = centre_term(basis, self.q[..., :coded], self.spec)
        prepared = keys.into_basis(prepare_queries(basis, self.q[..., :coded]))
        q = jnp.concatenate([prepared, self.q[..., coded:]], axis=-1)
        if cache.refined is not None and self.positions.shape[1] <= DECODE_TOKENS:
            parts = [self._progressive_part(q, centre, others)]
        elif cache.bounds is not None and self.positions.shape[1] <= DECODE_TOKENS:
            parts = [self._chosen_part(q, centre)]
        else:
            observer = cache.layout.observer
            keep = "" if observer is not None and not observer.history else "history"
            read = self._shared_part if cache.shared else self._history_part
            parts = [read(q, centre, keep)]
        if cache.rest is not None:
            parts.append(self._attend(q, cache.rest, cache.rest.pos, self.kernels, centre=centre))
        if cache.host is not None:
            parts.append(self._host_part(q, centre))
        values = keys if self.spec.latent_dim else values
        return [(restore_outputs(basis, values.out_of_basis(out), lse, self.spec), lse) for out, lse in parts]

    def _history_part(self, q: Array, centre: Centre | None, keep: str):
        """All of the coded history on the device."""
        return self._attend(q, self.cache.history, history_positions(self.cache), self.kernels, centre=centre, keep=keep)

    def _shared_part(self, q: Array, centre: Centre | None, keep: str):
        """A history that the heads share: each sees the slots that it owns."""
        history, heads = self.cache.history, q.shape[1]
        q, owners, lower = shared_queries(q, history.owner, self.spec.attention_scale)
        if centre is not None:
            centre = Centre(centre.weights.reshape(*q.shape[:3], -1), centre.inv_freq)
        pool = dataclasses.replace(bare(history), extra=owners, bias=history.bias)
        return heads_apart(*self._attend(q, pool, history.pos, self.kernels, centre=centre, keep=keep), heads, lower)

    def _progressive_part(self, q: Array, centre: Centre | None, others: list):
        """The coded history, pages that matter with all their bits."""
        cache = self.cache
        lse = merge(others)[1] if others else jnp.full(q.shape[:3], -jnp.inf)
        part, self.counts = progressive_attention(
            self._attend_table,
            q,
            dataclasses.replace(cache.history, pos=None),
            history_positions(cache),
            cache.policy.codec,
            scale=self.spec.attention_scale,
            others=lse,
            blocks=self.kernels in (None, "xla"),
            q_pos=self.positions,
            centre=centre,
        )
        return part

    def _chosen_part(self, q: Array, centre: Centre | None):
        """Of the coded history the pages whose bounds promise most to the queries of real tokens."""
        cache, place, real = self.cache, self.place, jnp.ones(self.positions.shape, bool)
        if self.consecutive and cache.staged is not None:
            real = jnp.arange(real.shape[1], dtype=jnp.int32) < cache.staged_count[:, None]
        k_pos = history_positions(cache)
        seen = pages_seen(k_pos, cache.history.slots, place.page, self.positions, real, self.spec.window)
        score = page_scores(cache.bounds, self.q, jnp.tile(real, (1, self.groups)), seen)
        return quest_attention(
            self._attend_table,
            q,
            bare(cache.history),
            k_pos,
            score,
            place.chosen,
            place.page,
            q_pos=self.positions,
            centre=centre,
        )

    def _attend_table(self, q: Array, segment: Segment, k_pos: Positions, q_pos: Array, centre: Centre | None, **paging):
        """``_attend`` by a page table."""
        return self._attend(q, segment, k_pos, self.kernels, q_pos=q_pos, centre=centre, **paging)

    def _host_part(self, q: Array, centre: Centre | None):
        """Streams the host pool page by page; only a page at a time is on the device."""
        cache, page = self.cache, self.cache.policy.tier.page
        positions = host_positions(cache)

        def one_page(i: int | Array):
            segment = pool.load_page(cache.host, cache.history, i)
            if isinstance(positions, Span):
                of_page = Span(positions.start + i * page, jnp.clip(positions.count - i * page, 0, page))
            else:
                of_page = jax.lax.dynamic_slice_in_dim(positions, i * page, page, axis=-1)
            return self._attend(q, segment, of_page, self.kernels, centre=centre)

        def step(carry, i: Array):
            return merge([carry, one_page(i)]), None

        pages = self.place.host_slots // page
        return jax.lax.scan(step, one_page(0), jnp.arange(1, pages))[0]


def sink_positions(cache: LayerCache) -> Span:
    return Span(jnp.zeros_like(cache.length), jnp.minimum(cache.length, cache.layout.sinks))


def tail_positions(cache: LayerCache) -> Int[Array, "B 1 S"]:
    """Slot j of the tail holds the newest committed position that is j modulo the tail's length, if not the history does."""
    tail = cache.layout.tail
    position = order_in_ring(cache.length[:, None], jnp.arange(tail, dtype=jnp.int32), tail)
    return jnp.where(position >= cache.layout.sinks + cache.written[:, None], position, FREE)[:, None]


def history_positions(cache: LayerCache) -> Positions:
    """Positions of the history's slots on the device."""
    history, place = cache.history, cache.layout
    if history.pos is not None:
        return history.pos
    if not place.ring and cache.host is None:
        return _from_first_slot(cache, jnp.minimum(cache.written, history.slots))
    order = order_in_ring(cache.written[:, None], jnp.arange(history.slots, dtype=jnp.int32), history.slots)
    return jnp.where(order >= 0, order + place.sinks, FREE)[:, None]


def _from_first_slot(cache: LayerCache, count: Array) -> Span:
    return Span(jnp.full_like(cache.length, cache.layout.sinks), count)


def host_positions(cache: LayerCache, resident: bool = False) -> Positions:
    """Positions of the host pool but for the padding of the last page; tokens that the device holds too: if ``resident``."""
    place = cache.layout
    both = 0 if resident else place.resident
    if not place.ring:
        return _from_first_slot(cache, jnp.clip(cache.written - both, 0, place.slots))
    order = order_in_ring(cache.written[:, None], jnp.arange(place.slots, dtype=jnp.int32), place.slots)
    older = (order >= 0) & (order < cache.written[:, None] - both)
    position = jnp.where(older, order + place.sinks, FREE)
    padding = place.host_slots - place.slots
    return jnp.pad(position, ((0, 0), (0, padding)), constant_values=FREE)[:, None]
