"""Bytes: counted on the buffers, added up over the leaves, and predicted by arithmetic, to the byte."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from cache_helpers import DIM, ROPE, ROWS, SPEC, qkv, row_id

import memjax as mj
from memjax.cache.ledger import dense_nbytes_per_token
from memjax.models.decoder import cache_specs

GQA = mj.CacheSpec(3, 4, 64, 100, "bfloat16", rope=mj.Rope(64))
LATENT = mj.CacheSpec(2, 1, 80, 90, "bfloat16", rope=mj.Rope(16, start=64), latent_dim=64)
PURE_LATENT = mj.CacheSpec(1, 1, 64, 33, "float16", rope=None, latent_dim=64)
WINDOWED = dataclasses.replace(GQA, window=30)
WIDE = dataclasses.replace(SPEC, capacity=1000)
SMALL = dataclasses.replace(SPEC, capacity=3)
RECURRENT = mj.RecurrentSpec(2, conv_dim=24, conv_width=4, heads=2, head_dim=8, state_dim=6)
SPECS = {
    "gqa": GQA,
    "latent": LATENT,
    "pure latent": PURE_LATENT,
    "windowed": WINDOWED,
    "float32": WIDE,
    "smaller than its windows": SMALL,
    "recurrent": RECURRENT,
    "a model": (GQA, LATENT, RECURRENT, WINDOWED, dataclasses.replace(GQA, rope=None)),
}
HOLDS_LATENT = ("latent", "pure latent", "a model")


def summed(cache) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_prediction_count_and_sum_agree(row):
    for name, spec in SPECS.items():
        if row.codec.two_streams and name in HOLDS_LATENT:
            with pytest.raises(ValueError, match="stores two streams"):
                mj.abstract(row.policy, spec)
            continue
        abstract = mj.abstract(row.policy, spec)
        counted = mj.nbytes(abstract)
        assert counted == mj.predict_nbytes(row.policy, spec)
        assert counted.total == summed(abstract)
        assert counted.total == counted.history + counted.windows + counted.state + counted.basis + counted.counters
        assert counted.total == counted.device + counted.host
        assert counted.disk == 0


@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_real_buffers_agree_too(row):
    cache = row.policy.init(SPEC)
    leaves = jax.tree.leaves(cache)
    assert sum(leaf.nbytes for leaf in leaves) == mj.nbytes(cache).total == mj.predict_nbytes(row.policy, SPEC).total
    on_host = sum(leaf.nbytes for leaf in jax.tree.leaves(cache.host))
    assert on_host == mj.nbytes(cache).host
    assert (on_host > 0) == (row.policy.tier is not None)
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


def test_a_models_buffers_agree_too():
    policy = mj.per_layer(mj.policy("streaming(4,24)+int4+protect(2,8)+host(8,4)"), {0: mj.dense(), -1: mj.int8()})
    cache = policy.init(SPECS["a model"])
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) == mj.nbytes(cache).total
    assert mj.nbytes(cache) == mj.predict_nbytes(policy, SPECS["a model"])
    assert mj.nbytes(cache).state == 4 * 2 * (3 * 24 + 2 * 8 * 6)


def test_staged_tokens_count_as_windows():
    cache = mj.int8().init(SPEC)
    _, k, v = (x[:, :7] for x in qkv(0))
    staged = mj.nbytes(jax.eval_shape(mj.update, cache, k, v))
    empty = mj.nbytes(cache)
    assert staged.windows - empty.windows == k.nbytes + v.nbytes
    assert staged.counters - empty.counters == 4 * 2
    assert staged.history == empty.history


def test_an_eviction_is_counted_with_its_positions():
    cache = mj.dense().init(SPEC)
    scores = np.zeros((2, 2, SPEC.capacity), np.float32)
    kept = mj.nbytes(jax.eval_shape(lambda c: mj.cache.evict(c, scores, 10, room=2), cache))
    assert kept.history == 2 * 2 * 12 * (2 * DIM * 4 + 4)


def test_ledgers_add_up():
    a, b = mj.Bytes(1, 2, 3, 4, 5, 6, 7, 8), mj.Bytes(10, 20, 30, 40, 50, 60, 70, 80)
    assert a + b == mj.Bytes(11, 22, 33, 44, 55, 66, 77, 88)
    assert (a + b).total == 66
    assert mj.Bytes(history=10, history_values=16).bits_per_value == 5
    assert math.isnan(mj.Bytes().bits_per_value)


MODELS = {
    "Llama-3-70B": ([mj.CacheSpec(1, 8, 128, 10_000, rope=mj.Rope(128, 5e5))] * 80, 327_680),
    "SmolLM2-135M": ([mj.CacheSpec(1, 3, 64, 10_000, rope=mj.Rope(64))] * 30, 23_040),
    "DeepSeek-V2-Lite": ([mj.CacheSpec(1, 1, 576, 10_000, rope=mj.Rope(64, start=512), latent_dim=512)] * 27, 31_104),
    "DeepSeek-V3": ([mj.CacheSpec(1, 1, 576, 10_000, rope=mj.Rope(64, start=512), latent_dim=512)] * 61, 70_272),
}


@pytest.mark.parametrize("model", MODELS)
def test_bytes_per_token_of_known_models(model):
    """Published sizes of a token in bfloat16; a hundred gigabytes are counted without holding them."""
    specs, per_token = MODELS[model]
    assert dense_nbytes_per_token(specs) == per_token
    held = mj.nbytes(mj.abstract(mj.dense(), specs))
    assert held.history == per_token * 10_000
    assert held.bits_per_value == 16


@pytest.mark.parametrize(
    ("text", "at_64", "at_128"),
    [("int8", 8.25, 8.125), ("int4", 4.25, 4.125), ("int4(rotate=true)", 4.25, 4.125), ("fp8", 8.25, 8.125)],
)
def test_realised_bits_per_value(text, at_64, at_128):
    for dim, bits in ((64, at_64), (128, at_128)):
        spec = mj.CacheSpec(2, 3, dim, 1000, rope=mj.Rope(dim))
        held = mj.nbytes(mj.abstract(mj.policy(text), spec))
        assert held.bits_per_value == bits
        assert held.windows == 2 * 3 * (4 + 64) * 2 * dim * 2


def test_bits_of_a_latent_stream_hold_its_dense_rotary_part():
    spec = mj.CacheSpec(1, 1, 576, 1000, rope=mj.Rope(64, start=512), latent_dim=512)
    held = mj.nbytes(mj.abstract(mj.policy("int4+protect(0,0)"), spec))
    assert held.history == 1000 * (512 // 2 + 2 + 64 * 2)


def test_a_host_tier_moves_bytes_and_keeps_few():
    """One page of padding at most, and a copy of the resident tokens on the device."""
    spec = mj.CacheSpec(1, 2, 64, 1000, rope=mj.Rope(64))
    plain = mj.predict_nbytes(mj.policy("int8+protect(4,64)"), spec)
    tiered = mj.predict_nbytes(mj.policy("int8+protect(4,64)+host(100,50)"), spec)
    per_token = 2 * 2 * 66
    assert plain.history == (1000 - 68) * per_token
    assert tiered.host == 950 * per_token
    assert tiered.device == plain.device - plain.history + 100 * per_token


def test_a_short_history_needs_no_tier():
    spec = dataclasses.replace(GQA, capacity=40)
    assert mj.predict_nbytes(mj.host(64), spec) == mj.predict_nbytes(mj.dense(), spec)


def test_windowed_layers_of_a_model_are_bounded_by_their_window():
    from memjax.models.config import llama_config

    config = llama_config(
        family="mistral", vocab=10, width=64, layers=2, q_heads=2, kv_heads=1, head_dim=32, mlp_width=64, norm_eps=1e-5,
        tied=True, max_position=4096, ropes=(ROPE,) * 2, windows=(None, 128), bos_id=None, eos_ids=(),
    )  # fmt: skip
    full, windowed = (mj.predict_nbytes(mj.dense(), spec).history for spec in cache_specs(config, 1, 4096))
    assert (full, windowed) == (4096 * 32 * 2 * 2, 128 * 32 * 2 * 2)
