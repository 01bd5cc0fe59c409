"""JAX versions and memory spaces."""

import re

import chex
import jax
import jax.numpy as jnp
import pytest

from memjax._compat import check_jax_version, has_host_memory, host_memory_kinds, to_device, to_host


@pytest.mark.parametrize("version", [(0, 11, 1), (0, 10, 2), (0, 13, 0), (1, 0, 0)])
def test_versions_outside_the_range_are_refused(version):
    with pytest.raises(ImportError, match=re.escape("found " + ".".join(map(str, version)))):
        check_jax_version(version)


@pytest.mark.parametrize("version", [(0, 11, 2), (0, 11, 9), (0, 12, 0, 1), (0, 12, 7)])
def test_versions_inside_the_range_pass(version):
    assert check_jax_version(version) is None


class Memory:
    def __init__(self, kind):
        self.kind = kind


class Device:
    def __init__(self, platform, kinds, default):
        self.platform, self._kinds, self._default = platform, kinds, default

    def addressable_memories(self):
        return [Memory(kind) for kind in self._kinds]

    def default_memory(self):
        return Memory(self._default)


@pytest.mark.parametrize(
    ("device", "kinds", "distinct"),
    [
        (Device("tpu", ["device", "pinned_host", "unpinned_host"], "device"), ("pinned_host",), True),
        (Device("gpu", ["device", "pinned_host"], "device"), ("pinned_host",), True),
        (Device("cpu", ["device", "pinned_host", "unpinned_host"], "device"), ("pinned_host",), False),
        (Device("other", ["device"], "device"), (), False),
        (Device("other", ["pinned_host"], "pinned_host"), ("pinned_host",), False),
    ],
)
def test_host_memory_counts_only_where_it_is_another_memory(device, kinds, distinct):
    assert host_memory_kinds(device) == kinds
    assert has_host_memory(device) is distinct


def test_cpu_lists_host_memory_that_is_its_own():
    cpu = jax.devices("cpu")[0]
    assert host_memory_kinds(cpu) == ("pinned_host",)
    assert not has_host_memory(cpu)


@pytest.mark.parametrize("wrap", [lambda move: move, jax.jit], ids=["eager", "jit"])
def test_a_round_trip_keeps_values_and_changes_the_type(wrap):
    tree = {"codes": jnp.arange(12, dtype=jnp.uint8).reshape(3, 4), "scale": (jnp.ones(3, jnp.bfloat16),)}
    host = wrap(to_host)(tree)
    back = wrap(to_device)(host)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(host)} == {"pinned_host"}
    assert {jax.typeof(leaf).memory_space for leaf in jax.tree.leaves(host)} == {jax.memory.Space.Host}
    assert {jax.typeof(leaf).memory_space for leaf in jax.tree.leaves(back)} == {jax.memory.Space.Device}
    chex.assert_trees_all_equal(host, tree)
    chex.assert_trees_all_equal(back, tree)


def test_spaces_do_not_mix_silently():
    x = jnp.ones(4)
    with pytest.raises(ValueError, match="memory_space"):
        jax.jit(jnp.add)(to_host(x), x)


def test_a_donated_pool_is_written_in_place():
    @jax.jit
    def read(pool, slot):
        return to_device(jax.lax.dynamic_slice_in_dim(pool, slot, 1)) + 1

    def write(pool, token, slot):
        return jax.lax.dynamic_update_slice_in_dim(pool, to_host(token), slot, axis=0)

    pool = to_host(jnp.zeros((256, 64)))
    where = pool.unsafe_buffer_pointer()
    written = jax.jit(write, donate_argnums=0)(pool, jnp.full((1, 64), 3.0), 7)
    assert pool.is_deleted()
    assert written.unsafe_buffer_pointer() == where
    assert written.sharding.memory_kind == "pinned_host"
    chex.assert_trees_all_equal(read(written, 7), jnp.full((1, 64), 4.0))
    chex.assert_trees_all_equal(read(written, 8), jnp.ones((1, 64)))


def test_shardings_survive_the_trip():
    mesh = jax.make_mesh((8,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.P("data"))
    host = to_host(jax.device_put(jnp.arange(16.0), sharding))
    assert host.sharding == sharding.with_memory_kind("pinned_host")
    assert to_device(host).sharding == sharding
