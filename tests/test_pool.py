"""Pages of the host tier: what is stored, read and rewritten, and what a TPU's compiler makes of it."""

import importlib.util
import json
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from source_tree import REPOSITORY

import memjax as mj
from memjax.cache.policy import abstract
from memjax.offload import pool

BATCH, HEADS, PAGES = 2, 3, 5


def segment(slots: int, dim: int = 16, seed: int = 0) -> dict:
    """Leaves of the kinds that segments have."""
    draw = np.random.default_rng(seed).integers
    lead = (BATCH, HEADS)
    return {
        "codes": jnp.asarray(draw(-127, 128, (*lead, dim, slots)), jnp.int8),
        "scale": jnp.asarray(draw(-9, 9, (*lead, slots)), jnp.bfloat16),
        "dense": jnp.asarray(draw(-9, 9, (*lead, 2 * dim, slots)), jnp.float32),
    }


@pytest.mark.parametrize(("page", "dim"), [(1, 1), (3, 16), (4, 32), (256, 16), (64, 128), (128, 3), (2048, 8)])
def test_what_is_stored_comes_back(page, dim):
    slots = segment(PAGES * page, dim)
    stored = pool.store(slots, page)
    chex.assert_trees_all_equal(pool.load(stored, slots), slots)
    for i in (0, PAGES - 1):
        expected = jax.tree.map(lambda leaf, i=i: leaf[..., i * page : (i + 1) * page], slots)
        chex.assert_trees_all_equal(pool.load_page(stored, slots, i), expected)
    for leaf, kept in zip(jax.tree.leaves(slots), jax.tree.leaves(stored), strict=True):
        assert kept.shape[:3] == (PAGES, BATCH, HEADS)
        assert kept.nbytes == leaf.nbytes
        assert kept.sharding.memory_kind == "pinned_host"


@pytest.mark.parametrize(
    ("dim", "page", "shapes"),
    [
        (128, 256, {"codes": (16, 8, 256), "scale": (2, 128), "dense": (32, 8, 256)}),
        (20, 256, {"codes": (5, 8, 128), "scale": (2, 128), "dense": (5, 8, 256)}),
        (64, 64, {"codes": (4, 8, 128), "scale": (64,), "dense": (8, 8, 128)}),
        (3, 1024, {"codes": (3, 8, 128), "scale": (1, 8, 128), "dense": (6, 8, 128)}),
    ],
)
def test_pages_are_whole_tiles_where_they_can_be(dim, page, shapes):
    """Channels as they lie if they come in eights and the page in lanes, else folded into rows."""
    assert jax.tree.map(lambda leaf: leaf.shape[3:], pool.store(segment(2 * page, dim), page)) == shapes


@pytest.mark.parametrize(("page", "tokens", "filled"), [(4, 7, 0.3), (4, 1, 0.05), (3, 20, 1.0), (5, 3, 0.0)])
def test_a_write_puts_each_token_where_it_is_told(page, tokens, filled):
    slots, block = segment(PAGES * page), segment(tokens, seed=1)
    draw = np.random.default_rng(2)
    source = draw.integers(0, tokens, (BATCH, PAGES * page))
    source = np.where(draw.random(source.shape) < filled, source, -1).astype(np.int32)
    write = jax.jit(lambda kept, new, at: pool.write(kept, new, at, page))
    written = pool.load(write(pool.store(slots, page), block, source), slots)
    for name, leaf in slots.items():
        expected = np.array(leaf)
        for row, slot in np.argwhere(source >= 0):
            expected[row, ..., slot] = block[name][row, ..., source[row, slot]]
        np.testing.assert_array_equal(written[name], expected)


def test_a_donated_pool_is_rewritten_in_place():
    slots, block = segment(20), segment(1, seed=1)
    kept = pool.store(slots, 4)
    where = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(kept)]
    source = jnp.full((BATCH, 20), -1).at[:, 9].set(0)
    written = jax.jit(lambda kept, new, at: pool.write(kept, new, at, 4), donate_argnums=0)(kept, block, source)
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(written)] == where


@pytest.mark.parametrize(
    ("text", "dtype", "page"),
    [("host(8,64)", "bfloat16", None), ("host(8,1)", "bfloat16", 2), ("int8+host(8,128)", "bfloat16", 256)],
)
def test_a_tpu_refuses_pages_that_it_cannot_move(text, dtype, page):
    policy = mj.policy(text)
    cache = abstract(policy, mj.CacheSpec(1, 8, 128, 1024, dtype, rope=mj.Rope(128)))
    assert pool.check_page(cache.host, policy.tier.page, "cpu") is None
    if page is None:
        assert pool.check_page(cache.host, policy.tier.page, "tpu") is None
        return
    with pytest.raises(ValueError, match=f"multiple of {page} tokens, got page={policy.tier.page}"):
        pool.check_page(cache.host, policy.tier.page, "tpu")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install 'jax[tpu]'")
@pytest.mark.parametrize("text", ["host(256,256)", "int8+host(256,256)"])
def test_a_tpu_streams_the_pool(text):
    script = (
        "import json, sys; sys.path.insert(0, 'benchmarks'); import tpu_host_tier as t;"
        f"row = t.in_child('v5e', {text!r}, t.CASES[-1]); print(json.dumps(t.problems(row)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    assert json.loads(done.stdout) == []
