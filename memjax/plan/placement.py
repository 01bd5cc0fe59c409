"""Where a decode step's arrays lie on a mesh of two axes, ``data`` and ``model``; nothing is allocated.

Weights, [inputs, outputs], an expert's with a leading axis that stays whole:

  q, k, v, gate, up and other projections from the stream, head:   inputs over data, outputs over model
  out, down (back into the stream), embedding [V, D]:               the other way round
  up_key, up_value of latent attention [N, ., .]:                   heads over model, the next axis over data
  norms, biases, router, convolutions, Mamba's vectors:             whole on every device

An axis that its devices do not divide stays whole. So each device holds an even part of nearly everything, whatever the mesh;
before use a layer's weights are gathered over ``data``: a rule for fitting, no advice for speed.

Caches: batch over data, kv heads (and heads of a recurrent state) over model, each layer whose heads do not divide whole on
every device of a row. A latent stream has one head: it is spread over ``data`` only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memjax.cache.policy import Policy, abstract, layer_policies
from memjax.cache.sharding import shardings
from memjax.cache.spec import LayerSpec
from memjax.models.config import ModelConfig
from memjax.models.decoder import Decoder

AXES = ("data", "model")
_INTO_STREAM = ("out", "down", "embedding")
_HEADS_FIRST = ("up_key", "up_value")
_WHOLE = ("router", "conv_kernel")


def stand_in_mesh(data: int, model: int) -> Mesh:
    """A mesh of this shape for asking about shapes of shards: its devices are one CPU device, so nothing can run on it."""
    return Mesh(np.array([jax.devices("cpu")[0]] * (data * model)).reshape(data, model), AXES)


def abstract_decoder(config: ModelConfig, dtype: str = "bfloat16") -> Decoder:
    """The model's weights as shapes."""
    return nnx.eval_shape(lambda: Decoder(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)))


def weight_spec(name: str, shape: Sequence[int], sizes: dict[str, int]) -> PartitionSpec:
    """How the weight that a module calls ``name`` is split over axes of these sizes, by the rule above."""
    if len(shape) < 2 or name in _WHOLE:
        return PartitionSpec()
    turned = name in _INTO_STREAM or name in _HEADS_FIRST
    pair = ("model", "data") if turned else ("data", "model")
    axes = [*pair, None] if name in _HEADS_FIRST else [None] * (len(shape) - 2) + list(pair)
    return PartitionSpec(*(
        axis if axis is not None and size % sizes[axis] == 0 else None for axis, size in zip(axes, shape, strict=True)
    ))


def place_weights(decoder: Decoder, mesh: Mesh) -> Decoder:
    """The same decoder with every leaf an abstract array that has its sharding."""

    def place(path, leaf) -> jax.ShapeDtypeStruct:
        spec = weight_spec(_name(path), leaf.shape, dict(mesh.shape))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, decoder)


def _name(path) -> str:
    names = [str(getattr(key, "name", getattr(key, "key", ""))) for key in path]
    return next(name for name in reversed(names) if name not in ("value", "kernel", ""))


def place_cache(policy: Policy, specs: Sequence[LayerSpec], mesh: Mesh) -> tuple[Any, ...]:
    """Abstract arrays of an empty cache, layer by layer, each with its sharding.

    Raises:
      ValueError: a batch that ``data`` does not divide, or what ``memjax.shardings`` refuses.
    """
    place = functools.cache(functools.partial(_place_layer, mesh))  # most layers of a model are equal
    return tuple(place(one, spec) for one, spec in zip(layer_policies(policy, specs), specs, strict=True))


def _place_layer(mesh: Mesh, policy: Policy, spec: LayerSpec) -> Any:
    try:
        where = shardings(policy, spec, mesh, *AXES)
    except ValueError:
        where = shardings(policy, spec, mesh, AXES[0], None)
    return jax.tree.map(_with, abstract(policy, spec), where)


def _with(leaf, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def device_nbytes(tree: Any, host: bool = False) -> int:
    """Bytes that one device holds of abstract arrays with shardings; ``host``: of those in host memory instead."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if (leaf.sharding.memory_kind == "pinned_host") == host
    )
