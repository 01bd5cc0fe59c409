"""Where a cache's arrays go on a mesh: batch over one axis, kv heads over another, tiers in their memory."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memjax._compat import host_memory_kinds
from memjax.cache.layer import LayerCache
from memjax.cache.policy import AnyLayerCache, ModelCache, Policy, abstract, layer_policies
from memjax.cache.pools import HeadPools, Pool, pools_of
from memjax.cache.spec import CacheSpec, LayerSpec
from memjax.offload import pool


def shardings(
    policy: Policy,
    spec: LayerSpec | Sequence[LayerSpec],
    mesh: Mesh,
    batch_axis: str | None = "data",
    head_axis: str | None = "model",
) -> AnyLayerCache | ModelCache:
    """A ``NamedSharding`` for every leaf of ``policy.init(spec)``, in the same pytree structure.

    Batch goes over ``batch_axis``, kv heads (heads of a recurrent state) over ``head_axis``; None: replicated. A latent
    stream has one head and is replicated over ``head_axis``, as are the convolution state and a history that heads share
    (``adakv``). Heads of ``duo`` and of ``auto(by_head=true)`` are spread pool by pool. The host tier's arrays get the memory
    kind ``pinned_host`` where the devices have one.

    Raises:
      ValueError: an axis that the mesh lacks, a size that it does not divide (of one of the pools, too), or pages of the
        host tier that its devices cannot move.
    """
    if isinstance(spec, Sequence):
        layers = zip(layer_policies(policy, spec), spec, strict=True)
        return tuple(shardings(one, each, mesh, batch_axis, head_axis) for one, each in layers)
    pools = pools_of(policy, spec) if isinstance(spec, CacheSpec) else []
    if len(pools) > 1:
        _check_pools(pools, mesh, head_axis)
        placed = (shardings(pool.policy, pool.spec, mesh, batch_axis, head_axis) for pool in pools)
        return HeadPools(tuple(placed), policy, spec)
    latent = isinstance(spec, CacheSpec) and spec.latent_dim is not None
    heads = (spec.kv_heads if isinstance(spec, CacheSpec) else spec.heads) if head_axis and not latent else None
    _check_axis(mesh, batch_axis, spec.batch, "batch")
    if heads is not None:
        _check_axis(mesh, head_axis, heads, "heads")
    device, cache = mesh.devices.flat[0], abstract(policy, spec)
    host_kind = next(iter(host_memory_kinds(device)), None)
    if isinstance(cache, LayerCache) and cache.host is not None:
        pool.check_page(cache.host, cache.policy.tier.page, device.platform)

    def place(path, leaf) -> NamedSharding:
        names = [getattr(key, "name", None) for key in path]
        shared = names[0] == "history" and cache.shared
        on_heads = heads is not None and leaf.ndim >= 3 and "conv" not in names and not shared
        rows = None if names[0] == "basis" and leaf.shape[0] != spec.batch else batch_axis  # a calibrated basis serves all
        axes = (rows, head_axis) if on_heads else (rows,)
        if names[0] == "host":  # pages lead
            return NamedSharding(mesh, PartitionSpec(None, *axes), memory_kind=host_kind)
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(place, cache)


def _check_pools(pools: list[Pool], mesh: Mesh, axis: str | None) -> None:
    sizes, devices = [pool.spec.kv_heads for pool in pools], mesh.shape.get(axis, 1)
    if any(size % devices for size in sizes):
        codecs = {pool.policy.codec for pool in pools}
        remedy = f"say multiple={devices}, or head_axis=None" if len(codecs) == 1 else "say head_axis=None"
        raise ValueError(
            f"a layer has pools of {' and '.join(map(str, sizes))} kv heads, which do not all divide over the {devices} "
            f"devices of axis {axis!r}; {remedy}"
        )


def _check_axis(mesh: Mesh, axis: str | None, size: int, what: str) -> None:
    if axis is None:
        return
    if axis not in mesh.shape:
        raise ValueError(f"the mesh has no axis {axis!r}, only {', '.join(mesh.shape)}")
    if size % mesh.shape[axis]:
        raise ValueError(f"{what} of size {size} does not divide over the {mesh.shape[axis]} devices of axis {axis!r}")


