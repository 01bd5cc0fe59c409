"""Attention over one layer's cache: segment by segment, merged exactly by log-sum-exp."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax.attention.rope import Rope, apply_rope
from memjax.cache.layer import LayerCache, Segment, leaving_count, staged_positions
from memjax.offload import pool
from memjax.pallas_kernels.decode import Centre, decode
from memjax.pallas_kernels.merge import merge
from memjax.pallas_kernels.prefill import prefill
from memjax.pallas_kernels.slots import FREE, Positions, Span
from memjax.pallas_kernels.slots import positions as as_array
from memjax.quantize.front import centre_term, prepare_queries, restore_outputs

DECODE_TOKENS = 8  # with more new tokens than these, kernels work on blocks of query rows


def attend(
    cache: LayerCache, q: Float[Array, "B T N H"], positions: Int[Array, "B T"] | None = None
) -> Float[Array, "B T N Hv"]:
    """What queries read from the cache: everything committed and everything staged that is not in their future.

    Args:
      q: queries, not yet rotated if ``spec.rope`` is a ``Rope``; N is a multiple of kv_heads.
      positions: where the queries stand in the text. None: at the staged tokens, or, if nothing is staged, at the last T
        committed ones.

    Returns:
      Attention outputs in q's dtype; for a latent stream Hv = latent_dim, else head_dim. NaN in rows that were given more
      tokens than ``spec.capacity``, so that an overflow inside ``jit`` cannot pass for a result.

    Raises:
      ValueError: query heads are no multiple of kv_heads, another batch or head_dim, or without ``positions`` another
        number of queries than of staged tokens.
    """
    spec = cache.spec
    if q.ndim != 4 or q.shape[0] != spec.batch or q.shape[2] % spec.kv_heads or q.shape[3] != spec.head_dim:
        raise ValueError(
            f"attend needs queries [batch={spec.batch}, T, N, head_dim={spec.head_dim}] with N a multiple of "
            f"kv_heads={spec.kv_heads}, got {list(q.shape)}"
        )
    batch, tokens, heads, _ = q.shape
    consecutive = positions is None
    if positions is None:
        if cache.staged is not None and cache.staged.slots != tokens:
            raise ValueError(
                f"attend got {tokens} queries for {cache.staged.slots} staged tokens: pass the positions of the queries"
            )
        positions = staged_positions(cache, tokens) - (0 if cache.staged is not None else tokens)
    reader = _Reader(cache, q, positions, consecutive)
    parts = reader.recent_parts()
    if cache.history is not None:
        parts += reader.history_parts()
    if reader.sinks_stand_apart:
        parts.append(reader.sink_part())
    out, _ = merge(parts)
    out = out.reshape(batch, heads, tokens, -1).swapaxes(1, 2)
    return jnp.where(_overflowed(cache)[:, None, None, None], jnp.nan, out).astype(q.dtype)


def _overflowed(cache: LayerCache) -> Array:
    """Rows in which a token, committed or staged, finds no slot."""
    if cache.layout.ring:
        return jnp.zeros_like(cache.length, bool)
    slots = 0 if cache.history is None else max(cache.history.slots, cache.layout.slots if cache.host else 0)
    written = cache.written if cache.staged is None else cache.written + leaving_count(cache)
    return written > slots


class _Reader:
    """The queries of one call, prepared once, and the attention over each kind of segment."""

    def __init__(self, cache: LayerCache, q: Array, positions: Array, consecutive: bool):
        self.cache, self.spec, self.place = cache, cache.spec, cache.layout
        self.positions = positions
        self.kernels = cache.policy.kernels
        self.in_blocks = consecutive and q.shape[1] > DECODE_TOKENS
        self.groups = q.shape[2] // self.spec.kv_heads
        self.q = self._rows(self._rotate(q, positions))
        self.sinks_stand_apart = False
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
    ):
        """Attention over one segment; ``q_pos``: where the queries stand, if not at ``self.positions``."""
        coded = self.spec.coded_dim
        arguments = {
            "k_pos": k_pos,
            "q_extra": q[..., coded:] if self.spec.extra_dim else None,
            "k_extra": segment.extra,
            "scale": self.spec.attention_scale,
            "softcap": self.spec.softcap,
            "window": self.spec.window,
            "recent": self.place.recent,
            "sinks": self.place.sinks,
            "centre": centre,
            "implementation": implementation,
        }
        q = q[..., :coded]
        if self.in_blocks and q_pos is None:
            start = self.positions[:, 0]
            return prefill(q, segment.k, segment.v, q_start=start, groups=self.groups, **arguments)
        q_pos = jnp.tile(self.positions if q_pos is None else q_pos, (1, self.groups))
        return decode(q, segment.k, segment.v, q_pos=q_pos, **arguments)

    def recent_parts(self):
        """Sinks, tail and staged tokens: all dense, so one segment (without the sinks if those see other queries).

        They are few, and joining them copies them: XLA does that. A chunk of many staged tokens is a kernel's own part.
        """
        cache, parts, found = self.cache, [], []
        if cache.sinks is not None and not self.sinks_stand_apart:
            found.append((cache.sinks, _sink_positions(cache)))
        if cache.tail is not None:
            found.append((cache.tail, _tail_positions(cache)))
        if cache.staged is not None:
            position = Span(cache.length, cache.staged_count)
            if self.sinks_stand_apart:
                position = as_array(position, cache.staged.slots)
                position = jnp.where(position >= self.place.sinks, position, FREE)
            if self.in_blocks and self.kernels not in (None, "xla"):
                parts.append(self._attend(self.q, cache.staged, position, self.kernels))
            else:
                found.append((cache.staged, position))
        return [self._attend_joined(self.q, found), *parts] if found else parts

    def sink_part(self):
        """Sinks under queries that stand elsewhere (positions inside the cache), staged sinks included."""
        cache, sinks = self.cache, self.place.sinks
        found = [(cache.sinks, _sink_positions(cache))]
        if cache.staged is not None:
            first = jax.tree.map(lambda x: x[..., :sinks], cache.staged)
            count = jnp.clip(sinks - cache.length, 0, jnp.minimum(cache.staged_count, first.slots))
            found.append((first, Span(cache.length, count)))
        return self._attend_joined(self.q_sinks, found, self.sink_positions)

    def _attend_joined(self, q: Array, found: list[tuple[Segment, Positions]], q_pos: Array | None = None):
        """Dense segments as one."""
        wide = [jax.tree.map(lambda x: x.astype(q.dtype), segment) for segment, _ in found]
        if len(found) == 1:
            return self._attend(q, wide[0], found[0][1], "xla", q_pos)
        joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-1), *wide)
        k_pos = jnp.concatenate([as_array(pos, segment.slots) for segment, pos in found], axis=-1)
        return self._attend(q, joined, k_pos, "xla", q_pos)

    def history_parts(self):
        """The coded history, in the codec's basis, and the older part of it in host memory."""
        cache, codec, coded, basis = self.cache, self.cache.policy.codec, self.spec.coded_dim, self.cache.basis
        centre = centre_term(basis, self.q[..., :coded], self.spec)
        prepared = codec.keys.into_basis(prepare_queries(basis, self.q[..., :coded]))
        q = jnp.concatenate([prepared, self.q[..., coded:]], axis=-1)
        parts = [self._attend(q, cache.history, history_positions(cache), self.kernels, centre=centre)]
        if cache.host is not None:
            parts.append(self._host_part(q, centre))
        values = codec.keys if self.spec.latent_dim else codec.values
        return [(restore_outputs(basis, values.out_of_basis(out), lse, self.spec), lse) for out, lse in parts]

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


def _sink_positions(cache: LayerCache) -> Span:
    return Span(jnp.zeros_like(cache.length), jnp.minimum(cache.length, cache.layout.sinks))


def _tail_positions(cache: LayerCache) -> Int[Array, "B 1 S"]:
    """Slot j of the tail holds the newest committed position that is j modulo the tail's length, if not the history does."""
    tail, length = cache.layout.tail, cache.length[:, None]
    position = length - 1 - (length - 1 - jnp.arange(tail, dtype=jnp.int32)) % tail
    return jnp.where(position >= cache.layout.sinks + cache.written[:, None], position, FREE)[:, None]


def _order_in_ring(written: Array, slots: int) -> Array:
    """Which token (by its number of entry into the history) sits in each slot of a ring; negative: none."""
    last = written[:, None] - 1
    return last - (last - jnp.arange(slots, dtype=jnp.int32)) % slots


def history_positions(cache: LayerCache) -> Positions:
    """Positions of the history's slots on the device."""
    history, place = cache.history, cache.layout
    if history.pos is not None:
        return history.pos
    if not place.ring and cache.host is None:
        return _from_first_slot(cache, jnp.minimum(cache.written, history.slots))
    order = _order_in_ring(cache.written, history.slots)
    return jnp.where(order >= 0, order + place.sinks, FREE)[:, None]


def _from_first_slot(cache: LayerCache, count: Array) -> Span:
    return Span(jnp.full_like(cache.length, cache.layout.sinks), count)


def host_positions(cache: LayerCache, resident: bool = False) -> Positions:
    """Positions of the host pool but for the padding of the last page; tokens that the device holds too: if ``resident``."""
    place = cache.layout
    both = 0 if resident else place.resident
    if not place.ring:
        return _from_first_slot(cache, jnp.clip(cache.written - both, 0, place.slots))
    order = _order_in_ring(cache.written, place.slots)
    older = (order >= 0) & (order < cache.written[:, None] - both)
    position = jnp.where(older, order + place.sinks, FREE)
    padding = place.host_slots - place.slots
    return jnp.pad(position, ((0, 0), (0, padding)), constant_values=FREE)[:, None]
