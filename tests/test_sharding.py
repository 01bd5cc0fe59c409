"""A cache over a mesh: batch over one axis, kv heads over the other, the same results."""

import dataclasses

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from cache_helpers import SPEC, dense_oracle, qkv, quick_jit, run, step
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import memjax as mj

MESH = Mesh(np.array(jax.devices("cpu")[:4]).reshape(2, 2), ("data", "model"))
TEXT = qkv(0, tokens=28)
LATENT = mj.CacheSpec(2, 1, 20, 40, "float32", rope=mj.Rope(4, start=16), latent_dim=16)
RECURRENT = mj.RecurrentSpec(2, conv_dim=24, conv_width=4, heads=2, head_dim=8, state_dim=6)
CHAIN = "streaming(4,12)+int4(rotate=true)+protect(2,4)"
PAGED = "progressive(refine=0.5,page=8)+protect(2,4)"
HOST = "int8+protect(2,4)+host(8,4)"


def specs_of(tree) -> dict[str, PartitionSpec]:
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf.spec for path, leaf in paths}


@pytest.mark.parametrize("text", ["dense", CHAIN, HOST, PAGED])
def test_sharded_steps_give_the_unsharded_result(text):
    policy = mj.policy(text)
    placed = mj.shardings(policy, SPEC, MESH)
    tokens = NamedSharding(MESH, PartitionSpec("data", None, "model"))
    sharded = quick_jit(
        step.__wrapped__,
        in_shardings=(placed, tokens, tokens, tokens),
        out_shardings=(tokens, placed),
        donate_argnums=0,
    )
    cache = jax.jit(lambda: policy.init(SPEC), out_shardings=placed)()
    outs = []
    for start in range(0, 28, 7):
        out, cache = sharded(cache, *(x[:, start : start + 7] for x in TEXT))
        outs.append(np.asarray(out))
    expected, alone = run(policy.init(SPEC), TEXT, [7] * 4)
    np.testing.assert_allclose(np.concatenate(outs, axis=1), expected, atol=1e-5)
    assert jax.tree.map(lambda x: x.sharding, cache) == placed
    assert mj.nbytes(cache) == mj.nbytes(alone)
    if text == "dense":
        np.testing.assert_allclose(expected, dense_oracle(TEXT), atol=1e-5)
        assert cache.history.k.data.addressable_shards[0].data.shape == (1, 1, *cache.history.k.data.shape[2:])


def test_where_each_leaf_goes():
    placed = mj.shardings(mj.policy(CHAIN), (SPEC, LATENT, RECURRENT), MESH)
    assert jax.tree.structure(placed) == jax.tree.structure(mj.abstract(mj.policy(CHAIN), (SPEC, LATENT, RECURRENT)))
    heads, rows = PartitionSpec("data", "model"), PartitionSpec("data")
    attention, latent, recurrent = (specs_of(each) for each in placed)
    assert {name for name, spec in attention.items() if spec == rows} == {".length", ".written"}
    assert set(attention.values()) == {heads, rows}
    assert set(latent.values()) == {rows}
    assert recurrent == {".conv": rows, ".state": heads, ".length": rows}


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ((None, "model"), PartitionSpec(None, "model")),
        (("data", None), PartitionSpec("data")),
        ((None, None), PartitionSpec(None)),
    ],
)
def test_axes_may_be_left_out(axes, expected):
    placed = mj.shardings(mj.dense(), SPEC, MESH, *axes)
    assert placed.history.k.data.spec == expected


def test_a_host_tier_is_placed_like_the_rest_but_in_its_memory():
    placed = mj.shardings(mj.policy(HOST), SPEC, MESH)
    assert {leaf.spec for leaf in jax.tree.leaves(placed.host)} == {PartitionSpec(None, "data", "model")}
    assert {leaf.memory_kind for leaf in jax.tree.leaves(placed.host)} == {"pinned_host"}
    assert "pinned_host" not in {leaf.memory_kind for leaf in jax.tree.leaves((placed.history, placed.tail))}


@pytest.mark.parametrize(
    ("changes", "axes", "message"),
    [
        ({"batch": 3}, ("data", "model"), "batch of size 3 does not divide over the 2 devices of axis 'data'"),
        ({"kv_heads": 5}, ("data", "model"), "heads of size 5 does not divide over the 2 devices of axis 'model'"),
        ({}, ("rows", "model"), "the mesh has no axis 'rows', only data, model"),
        ({}, ("data", "heads"), "the mesh has no axis 'heads'"),
    ],
)
def test_what_does_not_divide_is_refused(changes, axes, message):
    with pytest.raises(ValueError, match=message):
        mj.shardings(mj.dense(), dataclasses.replace(SPEC, **changes), MESH, *axes)


def test_a_cache_is_restored_onto_a_mesh(tmp_path):
    """From one device to four, by the shapes and shardings that follow from policy and spec."""
    policy = mj.policy(CHAIN)
    _, cache = run(policy.init(SPEC), TEXT, [7] * 4)
    abstract = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        mj.abstract(policy, SPEC),
        mj.shardings(policy, SPEC, MESH),
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "cache", cache)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "cache", abstract)
    assert restored.policy == policy
    for before, after, where in zip(*map(jax.tree.leaves, (cache, restored, abstract)), strict=True):
        np.testing.assert_array_equal(np.asarray(before), np.asarray(after))
        assert after.sharding == where.sharding
