"""Bytes: counted on the buffers, and predicted from the spec by arithmetic. The two agree exactly, or a test fails."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import jax
import jax.numpy as jnp

from memjax.cache.layer import LayerCache
from memjax.cache.layout import layout
from memjax.cache.policy import AnyLayerCache, CachePolicy, ModelCache, Policy, layer_policies
from memjax.cache.pools import HeadPools, pools_of
from memjax.cache.recurrent import RecurrentCache
from memjax.cache.share import slots_per_head
from memjax.cache.spec import CacheSpec, LayerSpec, RecurrentSpec
from memjax.quantize.codec import Dense, KeyValueCodec


@dataclass(frozen=True)
class Bytes:
    """Bytes of a cache, by tier and by what they hold; ledgers add up with ``+``.

    Attributes:
      device, host, disk: by tier.
      history: the coded history on every tier, scales, stored positions, bounds of keys and page padding included.
      windows: sinks, tail and staged tokens, dense.
      state: recurrent states.
      basis: statistics of a codec's front end.
      counters: lengths, moments of queries and the like.
      history_values: numbers (keys and values) that the slots of the history stand for, device and host copies apart.
    """

    device: int = 0
    host: int = 0
    disk: int = 0
    history: int = 0
    windows: int = 0
    state: int = 0
    basis: int = 0
    counters: int = 0
    history_values: int = 0

    @property
    def total(self) -> int:
        """Bytes on all tiers."""
        return self.device + self.host + self.disk

    @property
    def bits_per_value(self) -> float:
        """Realised bits per value of the history; NaN where there is none."""
        return 8 * self.history / self.history_values if self.history_values else math.nan

    def __add__(self, other: Bytes) -> Bytes:
        names = [field.name for field in dataclasses.fields(self)]
        return Bytes(**{name: getattr(self, name) + getattr(other, name) for name in names})


def _size(tree) -> int:
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def nbytes(cache: AnyLayerCache | ModelCache) -> Bytes:
    """The ledger of a cache's buffers (or of their abstract shapes)."""
    if isinstance(cache, RecurrentCache):
        state, counters = _size((cache.conv, cache.state)), _size(cache.length)
        return Bytes(device=state + counters, state=state, counters=counters)
    if not isinstance(cache, LayerCache):
        return sum((nbytes(layer) for layer in (cache.pools if isinstance(cache, HeadPools) else cache)), Bytes())
    windows = _size((cache.sinks, cache.tail, cache.staged))
    counters = _size(
        (cache.length, cache.written, cache.staged_count, cache.staged_weight, cache.refined, cache.moments)
    )
    device, host, basis = _size((cache.history, cache.rest, cache.bounds)), _size(cache.host), _size(cache.basis)
    slots = slots_per_head(cache) + (0 if cache.host is None else cache.layout.host_slots)
    return Bytes(
        device=windows + basis + counters + device,
        host=host,
        history=device + host,
        windows=windows,
        basis=basis,
        counters=counters,
        history_values=cache.spec.batch * slots * cache.spec.values_per_token,
    )


def predict_nbytes(policy: Policy, spec: LayerSpec | Sequence[LayerSpec]) -> Bytes:
    """What ``nbytes(policy.init(spec))`` will say, by arithmetic: nothing is built."""
    if isinstance(spec, Sequence):
        layers = zip(layer_policies(policy, spec), spec, strict=True)
        return sum((predict_nbytes(one, each) for one, each in layers), Bytes())
    if isinstance(spec, RecurrentSpec):
        floats = (spec.conv_width - 1) * spec.conv_dim + spec.heads * spec.head_dim * spec.state_dim
        state, counters = 4 * spec.batch * floats, 4 * spec.batch
        return Bytes(device=state + counters, state=state, counters=counters)
    pools = pools_of(policy.for_layer(0, 1), spec)
    return sum((_predict_attention(pool.policy, pool.spec) for pool in pools), Bytes())


def _predict_attention(policy: CachePolicy, spec: CacheSpec) -> Bytes:
    place, vectors = layout(policy, spec), spec.batch * spec.kv_heads
    extra = spec.extra_dim * jnp.dtype(spec.dtype).itemsize

    def slot_bytes(codec: KeyValueCodec) -> Fraction:
        streams = [codec.keys] if spec.latent_dim else [codec.keys, codec.values]
        bits = sum(Fraction(each.bits_per_value(spec.coded_dim, spec.dtype)) for each in streams)
        return vectors * (bits * spec.coded_dim / 8 + extra)

    device = round((place.resident - place.rest) * slot_bytes(policy.codec))
    device += round(place.rest * slot_bytes(policy.codec.rest)) if place.rest else 0
    device += 4 * vectors * place.resident * (place.placed + (place.judge is not None and place.judge.scored) + place.folds)
    device += vectors * place.resident * place.competing
    if place.chosen:
        device += 2 * vectors * place.slots // place.page * spec.head_dim * jnp.dtype(spec.dtype).itemsize
    host = round(place.host_slots * slot_bytes(policy.codec))
    windows = round((place.sinks + place.tail) * slot_bytes(Dense()))
    windows += 4 * vectors * place.tail * (place.observer is not None)
    basis = _basis_numbers(policy, spec) * 4 if place.slots else 0
    counters = (4 if policy.codec.page > 1 and place.slots else 2) * 4 * spec.batch
    counters += 4 * spec.batch * (1 + spec.q_heads * spec.head_dim * (1 + spec.head_dim)) if place.moments else 0
    return Bytes(
        device=windows + basis + counters + device,
        host=host,
        history=device + host,
        windows=windows,
        basis=basis,
        counters=counters,
        history_values=spec.batch * (place.resident + place.host_slots) * spec.values_per_token,
    )


def _basis_numbers(policy: CachePolicy, spec: CacheSpec) -> int:
    """Numbers that the front end and the codec keep.

    Means of each row, and factors of each or one set of matrices from a file; and what the codec measures itself.
    """
    front, streams = policy.resolved_front(), 1 if spec.latent_dim else 2
    means = spec.kv_heads * spec.coded_dim
    shapes = [each.fit_shape(spec.coded_dim) for each in (policy.codec.keys, policy.codec.values)]
    fits = spec.batch * spec.kv_heads * sum(math.prod(shape) for shape in shapes if shape is not None)
    if front.calibration:
        return fits + streams * means * (spec.batch + 2 * spec.coded_dim)
    balanced = front.balance != "off"
    queries = balanced and spec.latent_dim is None
    return fits + spec.batch * means * (streams * ((front.centre != "none") + balanced) + queries)


def dense_nbytes_per_token(spec: LayerSpec | Sequence[LayerSpec], itemsize: int = 2) -> int:
    """Bytes that one token of one sequence leaves in an uncompressed cache of ``itemsize`` bytes per value."""
    if isinstance(spec, Sequence):
        return sum(dense_nbytes_per_token(each, itemsize) for each in spec)
    return 0 if isinstance(spec, RecurrentSpec) else itemsize * spec.values_per_token
