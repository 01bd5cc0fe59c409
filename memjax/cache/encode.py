"""From tokens to codes and back: a codec with its front end, on the segments of a cache."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from memjax.cache.pools import Part
from memjax.cache.segment import Segment, bare
from memjax.cache.slots import take
from memjax.cache.spec import CacheSpec
from memjax.pallas_kernels.codes import Codes, dense
from memjax.quantize.calibration import load_basis
from memjax.quantize.codec import Codec, CodePair, KeyValueCodec
from memjax.quantize.front import Basis, empty_basis, prepare_keys, prepare_values, restore_keys

if TYPE_CHECKING:
    from memjax.cache.policy import CachePolicy


def init_basis(policy: CachePolicy, spec: CacheSpec, layer: int, part: Part | None = None) -> Basis | None:
    """What the codec and its front end start from: nothing measured yet, or a calibration file.

    ``part``: which of the layer's heads ``spec`` is about; None: all.
    """
    if part is not None:  # a file is about all heads
        basis = init_basis(policy, part.whole, layer)
        return jax.tree.map(lambda x: x[:, np.asarray(part.heads, np.int32)], basis)
    front, codec, lead = policy.resolved_front(), policy.codec, (spec.batch, spec.kv_heads)
    basis = load_basis(front.calibration, spec, layer) if front.calibration else empty_basis(front, spec)
    fits = {"k_fit": codec.keys.unfitted(lead, spec.coded_dim), "v_fit": codec.values.unfitted(lead, spec.value_dim)}
    if all(fit is None for fit in fits.values()):
        return basis
    return dataclasses.replace(basis or Basis(None, None, None, None, None), **fits)


def encode(block: Segment, position: Array, codec: KeyValueCodec, basis: Basis | None, spec: CacheSpec) -> Segment:
    """Codes of a dense block of tokens at ``position`` [B, 1|K, T]."""
    keys, values = fitted(codec, basis)
    k = prepare_keys(basis, block.k.data, position, spec)
    v = None if block.v is None else prepare_values(basis, block.v.data)
    return Segment(
        k=keys.encode(k, spec.dtype),
        v=None if v is None else values.encode(v, spec.dtype),
        extra=None if block.extra is None else dense(block.extra.data, spec.dtype),
    )


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


def fitted(codec: KeyValueCodec, basis: Basis | None) -> tuple[Codec, Codec]:
    """The codecs of keys and values with what they have measured."""
    if basis is None:
        return codec.keys, codec.values
    return codec.keys.fitted(basis.k_fit), codec.values.fitted(basis.v_fit)


def fit_codec(
    basis: Basis, codec: KeyValueCodec, block: Segment, position: Array, real: Array, spec: CacheSpec
) -> Basis:
    """The basis with what the codec measures on a dense block of tokens at ``position`` [B, 1|K, T]."""
    k_fit, v_fit = basis.k_fit, basis.v_fit
    if k_fit is not None:
        k_fit = codec.keys.fit(prepare_keys(basis, block.k.data, position, spec), real)
    if v_fit is not None:
        v_fit = codec.values.fit(prepare_values(basis, block.v.data), real)
    return dataclasses.replace(basis, k_fit=k_fit, v_fit=v_fit)


def decode_keys(
    codes: Codes | CodePair, position: Int[Array, "B 1|K S"], codec: KeyValueCodec, basis: Basis | None, spec: CacheSpec
) -> Float[Array, "B K H S"]:
    """The cached keys that codes stand for, float32."""
    return restore_keys(basis, fitted(codec, basis)[0].decode(codes), position, spec)
