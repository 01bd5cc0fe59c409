"""Which implementation runs, for which target, and how kernels run under a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, PartitionSpec
from kernel_helpers import Case, build, relative

from memjax.pallas_kernels import choose as chooser
from memjax.pallas_kernels.append import append
from memjax.pallas_kernels.append import choice as append_choice
from memjax.pallas_kernels.choose import Target, choose, target
from memjax.pallas_kernels.decode import choice, decode, decode_reference
from memjax.pallas_kernels.prefill import choice as prefill_choice
from memjax.pallas_kernels.prefill import prefill, prefill_reference
from memjax.pallas_kernels.slots import Span

FITS = {"xla": lambda on: None, "tpu": lambda on: None, "gpu": lambda on: "no such layout"}


def on_device(kind: str, platform: str):
    """As while a program is traced for a device that this machine lacks."""
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=AbstractDevice(kind, 1, platform)))


def test_the_target_is_the_mesh_in_force_else_the_default_device():
    assert target().platform == "cpu"
    with on_device("TPU v6 lite", "tpu"):
        assert target() == Target("tpu", "TPU v6 lite")
    with on_device("NVIDIA H200", "cuda"):
        assert target() == Target("gpu", "NVIDIA H200")


def test_unproven_kernels_are_not_the_default(monkeypatch):
    monkeypatch.setattr(chooser, "CHECKED_ON_HARDWARE", frozenset({("new", "tpu"), ("new", "gpu")}))
    assert choose("new", None, FITS).implementation == "xla"
    with on_device("TPU v6 lite", "tpu"):
        assert choose("new", None, FITS).implementation == "tpu"
        old = choose("old", None, FITS)
        assert old.implementation == "xla"
        assert "experimental: not checked on hardware yet" in old.reason
        assert choose("old", "pallas", FITS).implementation == "tpu"
    with on_device("NVIDIA H200", "cuda"):
        assert choose("new", None, FITS) == chooser.Choice("xla", "no such layout")
        with pytest.raises(ValueError, match="new: implementation 'gpu' cannot serve this case: no such layout; use"):
            choose("new", "pallas", FITS)
        with pytest.raises(ValueError, match="'tpu' runs on a TPU, this program is for gpu"):
            choose("new", "tpu", FITS)


def test_operations_report_their_choice():
    (q, k, v), kw = build(Case())
    assert choice(q, k, v, **kw) == chooser.Choice("xla", "no kernel of its own for cpu")
    assert choice(q, k, v, implementation="tpu", interpret=True, **kw).implementation == "tpu"
    assert append_choice(k).implementation == "xla"
    with on_device("TPU v6 lite", "tpu"):
        assert choice(q, k, v, implementation="pallas", **kw).implementation == "tpu"
        assert prefill_choice(q, k, v, implementation="pallas", **kw).implementation == "tpu"
        assert append_choice(k, implementation="pallas").implementation == "tpu"


MESHES = {"rows and heads": (2, 2), "heads": (1, 2), "rows": (2, 1), "rows that do not divide": (4, 2)}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("page", [0, 128])
def test_a_mesh_splits_rows_and_heads(mesh, page):
    case = Case("int8", dim=32, page=page, slots=256, lengths=(256, 100), bias=True)
    (q, k, v), kw = build(case)
    shape = MESHES[mesh]
    devices = np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
    static = {"scale": kw.pop("scale")}

    def call(q, k, v, kw):
        return decode(q, k, v, mass=True, implementation="tpu", interpret=True, **kw, **static)

    with jax.set_mesh(Mesh(devices, ("data", "model"))):
        placed = jax.device_put((q, k, v, kw), NamedSharding(jax.sharding.get_mesh(), PartitionSpec()))
        compiled = jax.jit(call).lower(*placed).compile()
        found = compiled(*placed)
    for x, expected in zip(found, decode_reference(q, k, v, **kw, **static), strict=True):
        assert relative(x, expected) < 3e-3
    # Each device has its rows and its heads of the outputs.
    rows, heads = (2 // n if 2 % n == 0 else 2 for n in shape)
    assert {s.data.shape[:2] for s in found[0].addressable_shards} == {(rows, heads)}


def test_prefill_and_append_split_over_a_mesh():
    (q, k, v), kw = build(Case("dense", dim=32, rows=12, slots=128, lengths=(128, 60)))
    kw = {"q_start": jnp.array([100, 3]), "k_pos": Span(jnp.zeros(2, jnp.int32), kw["k_pos"].count), "groups": 2, "scale": 0.2}
    new = jax.tree.map(lambda x: x[..., :5] + jnp.ones((), x.dtype), k)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    with jax.set_mesh(mesh):
        found = jax.jit(lambda: prefill(q, k, v, implementation="tpu", interpret=True, **kw))()
        appended = jax.jit(lambda: append(k, new, jnp.array([3, 120]), implementation="tpu", interpret=True))()
    for x, expected in zip(found, prefill_reference(q, k, v, **kw), strict=True):
        assert relative(x, expected) < 3e-3
    assert {s.data.shape[:2] for s in found[0].addressable_shards} == {(1, 1)}
    np.testing.assert_array_equal(appended.data, append(k, new, jnp.array([3, 120]), implementation="reference").data)
