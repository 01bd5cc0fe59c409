"""Measures a model's calibration file, from second moments of queries and of centred keys and values over texts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from memjax.attention.rope import apply_rope
from memjax.cache.spec import CacheSpec
from memjax.evaluate.layerwise import next_hidden
from memjax.models.config import check_attention
from memjax.models.decoder import Layer
from memjax.models.load import LanguageModel
from memjax.quantize.calibration import SHRINK, balanced_basis, save_calibration
from memjax.quantize.front import Basis, FrontEnd, centred_keys, empty_basis, turn

SINKS = 4  # first tokens, which caches keep dense, and which would spoil the means


def calibrate(
    model: LanguageModel,
    texts: Sequence[Sequence[int]],
    path: str | Path,
    shrink: float = SHRINK,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Writes a calibration file for ``model``.

    Args:
      texts: token ids of one or more texts, each read from its beginning. A mix of kinds of text serves unknown prompts
        better than one kind.
      progress: called with each layer that is done.

    Raises:
      ValueError: no text of more than a few tokens, or activations that are not finite.
    """
    check_attention(model.config, "calibration")
    texts = [np.asarray(text, np.int32)[None] for text in texts]
    if not texts or min(text.shape[1] for text in texts) < 2 * SINKS:
        raise ValueError(f"calibration needs texts of at least {2 * SINKS} tokens, got {[t.shape[1] for t in texts]}")
    capacity = max(text.shape[1] for text in texts)
    specs = [dataclasses.replace(s, batch=1) for s in model.decoder.cache_specs(1, capacity, "float32")]
    hidden, layers = [model.decoder.embed(text) for text in texts], []
    for i, (layer, spec) in enumerate(zip(model.decoder.layers, specs, strict=True)):
        layers.append(_statistics(layer, hidden, spec, shrink))
        hidden = [next_hidden(layer, x) for x in hidden]
        if progress is not None:
            progress(f"layer {i + 1} of {len(specs)}")
    facts = {"fingerprint": model.fingerprint, "tokens": sum(t.shape[1] for t in texts), "shrink": shrink}
    save_calibration(path, layers, facts)


def _statistics(layer: Layer, hidden: list, spec: CacheSpec, shrink: float) -> dict[str, np.ndarray]:
    """The arrays of one layer."""
    sums = [_sums(layer, x, spec=spec) for x in hidden]
    count = sum(x.shape[1] - SINKS for x in hidden)
    k_mean, v_mean = (sum(np.float64(s[i]) for s in sums) / count for i in range(2))
    basis = dataclasses.replace(empty_basis(FrontEnd(), spec), k_mean=jnp.float32(k_mean), v_mean=jnp.float32(v_mean))
    moments = [_moments(layer, x, basis, spec=spec) for x in hidden]
    k_spread, v_spread, q_weight = (sum(np.float64(m[i])[0] for m in moments) / count for i in range(3))
    kernel = np.asarray(layer.mixer.out.kernel[...], np.float64).reshape(
        spec.kv_heads, -1, spec.value_dim, hidden[0].shape[2]
    )
    gram = np.einsum("kghd,kged->khe", kernel, kernel)
    found = {}
    for side, spread, weight in (("k", k_spread, q_weight), ("v", v_spread, gram)):
        matrices = [balanced_basis(s, w, shrink) for s, w in zip(spread, weight, strict=True)]
        found |= {f"{side}_balance": np.stack([m[0] for m in matrices]), f"{side}_inverse": np.stack([m[1] for m in matrices])}
    return found


def _projected(layer: Layer, x: Array, spec: CacheSpec) -> tuple[Array, Array, Array, Array]:
    """Roped queries [1, K, G T, H], roped keys and values [1, K, H, T] behind the sinks, and their positions [1, T]."""
    q, k, v = layer.mixer.project(layer.mixer_norm(x))
    position = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    if spec.rope is not None:
        q, k = (apply_rope(each, position, spec.rope, spec.capacity) for each in (q, k))
    q = jnp.moveaxis(q[:, SINKS:].reshape(1, -1, spec.kv_heads, q.shape[2] // spec.kv_heads, q.shape[3]), 2, 1)
    k, v = (jnp.moveaxis(each[:, SINKS:].astype(jnp.float32), 1, -1) for each in (k, v))
    return q.reshape(1, spec.kv_heads, -1, q.shape[-1]).astype(jnp.float32), k, v, position[:, SINKS:]


@functools.partial(jax.jit, static_argnames="spec")
def _sums(layer: Layer, x: Array, *, spec: CacheSpec) -> tuple[Array, Array]:
    _, k, v, position = _projected(layer, x, spec)
    return jnp.sum(turn(k, -position[:, None], spec), axis=-1), jnp.sum(v, axis=-1)


@functools.partial(jax.jit, static_argnames="spec")
def _moments(layer: Layer, x: Array, basis: Basis, *, spec: CacheSpec) -> tuple[Array, Array, Array]:
    q, k, v, position = _projected(layer, x, spec)
    y, v = centred_keys(basis, k, position[:, None], spec), v - basis.v_mean[..., None]
    high = jax.lax.Precision.HIGHEST
    squares = [jnp.einsum("bkht,bket->bkhe", z, z, precision=high) for z in (y, v)]
    return *squares, jnp.einsum("bkmh,bkme->bkhe", q, q, precision=high)
