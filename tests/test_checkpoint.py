"""Saved models: the same weights, tokenizer and configuration come back, and damage is found before any weight is used."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import memjax as mj
from memjax.attention.rope import Rope
from memjax.models.checkpoint import is_saved_model
from memjax.models.config import llama_config
from memjax.models.decoder import Decoder
from memjax.models.load import load

ROPES = (
    Rope(16, 5e5, "llama3", 8.0, 64),
    None,
    Rope(16, 1e4, "longrope", 2.0, 64, short_factor=(1.0,) * 8, long_factor=(2.0,) * 8),
    Rope(16, freq_factors=(1.5,) * 8),
)
CONFIG = llama_config(
    family="qwen3",
    vocab=61,
    width=32,
    layers=4,
    q_heads=4,
    kv_heads=2,
    head_dim=16,
    mlp_width=48,
    norm_eps=1e-6,
    max_position=256,
    ropes=ROPES,
    windows=(None, 24, None, 8),
    qk_norm=True,
    bos_id=1,
    eos_ids=(2, 60),
)


@functools.cache
def model(config=CONFIG, dtype="float32", seed=0):
    return Decoder(config, dtype=dtype, rngs=nnx.Rngs(seed))


def weights(decoder):
    return nnx.to_pure_dict(nnx.state(decoder))


def assert_same(found, expected):
    assert jax.tree.structure(weights(found)) == jax.tree.structure(weights(expected))
    for a, b in zip(jax.tree.leaves(weights(found)), jax.tree.leaves(weights(expected)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    mj.save_model(folder, model())
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(tmp_path, dtype, tied):
    decoder = model(dataclasses.replace(CONFIG, tied=tied), dtype, seed=3)
    mj.save_model(tmp_path / "new" / "model", decoder)
    assert is_saved_model(tmp_path / "new" / "model")
    found, tokenizer = mj.restore_model(tmp_path / "new" / "model")
    assert tokenizer is None
    assert found.config == decoder.config
    assert_same(found, decoder)


def test_a_restored_model_computes_the_same(saved):
    forward = jax.jit(lambda decoder, tokens: decoder.logits(decoder(tokens)[0]))
    tokens = jnp.arange(12).reshape(1, 12)
    np.testing.assert_array_equal(forward(mj.restore_model(saved)[0], tokens), forward(model(), tokens))


@pytest.mark.slow
def test_the_real_model(tmp_path, smollm2):
    mj.save_model(tmp_path / "m", smollm2.decoder, smollm2.tokenizer)
    again = load(tmp_path / "m")
    assert_same(again.decoder, smollm2.decoder)
    assert again.eos_ids == smollm2.eos_ids


def test_a_tokenizer_comes_back(tmp_path, smollm2):
    mj.save_model(tmp_path / "m", model(), smollm2.tokenizer)
    again = load(tmp_path / "m")
    assert again.eos_ids == (2, 60)
    for name in ("bos_id", "add_bos", "eos_ids", "chat_template", "vocab_size"):
        assert getattr(again.tokenizer, name) == getattr(smollm2.tokenizer, name)
    text = "Call me Ishmael. <|im_end|> 1234 ½"
    assert again.tokenizer.encode(text) == smollm2.tokenizer.encode(text)


def test_nothing_is_pickled(saved):
    for path in saved.rglob("*"):
        if path.is_file():
            assert b"\x80\x04\x95" not in path.read_bytes()[:64], path  # how a pickle of protocol 4 or 5 begins


def test_restoring_to_one_sharding(saved):
    devices = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = NamedSharding(devices, PartitionSpec())
    decoder, _ = mj.restore_model(saved, everywhere)
    assert {leaf.sharding for leaf in jax.tree.leaves(weights(decoder))} == {everywhere}
    assert_same(decoder, model())


def test_restoring_to_a_sharding_for_each_parameter(saved):
    devices = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    asked = {}

    def place(path, leaf):
        asked[path] = leaf.shape
        return NamedSharding(devices, PartitionSpec(None, "model") if path.endswith("q/kernel") else PartitionSpec())

    decoder, _ = mj.restore_model(saved, place)
    assert asked["layers/2/mixer/q/kernel"] == (32, 64)
    assert len(asked) == len(jax.tree.leaves(weights(decoder)))
    kernel = decoder.layers[2].mixer.q.kernel[...]
    assert kernel.sharding.spec == PartitionSpec(None, "model")
    assert kernel.addressable_shards[0].data.shape == (32, 16)
    assert_same(decoder, model())


def test_a_folder_in_use_is_not_overwritten(saved, tmp_path):
    before = (saved / "memjax.json").read_bytes()
    with pytest.raises(ValueError, match="is not empty"):
        mj.save_model(saved, model(seed=1))
    assert (saved / "memjax.json").read_bytes() == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is not empty"):
        mj.save_model(tmp_path / "file", model())


def test_no_saved_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no memjax\.json"):
        mj.restore_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        mj.restore_model(tmp_path / "nowhere")


def edit(folder, **changed):
    path = folder / "memjax.json"
    described = json.loads(path.read_text()) | changed
    path.write_text(json.dumps({key: value for key, value in described.items() if value is not None}))


def described_config(folder, **changed):
    return json.loads((folder / "memjax.json").read_text())["config"] | changed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": 99}, "format 99; this version reads 1"),
        ({"config": None}, "needs a config"),
        ({"config": {"family": "llama"}}, "no saved model configuration"),
        ({"dtype": "int8"}, "a dtype among float32, bfloat16, float16"),
        ({"files": None}, "lists no files"),
        ({"files": {"_METADATA": [1, "0"]}}, "missing or added"),
    ],
)
def test_a_description_that_does_not_fit_is_named(copy, changed, message):
    edit(copy, **changed)
    with pytest.raises(ValueError, match=message):
        mj.restore_model(copy)


@pytest.mark.parametrize(
    "changed",
    [
        lambda config: config["blocks"][1][1].update(width=56),
        lambda config: config.update(vocab=64),
        lambda config: config["blocks"][0][0].update(qkv_bias=True),
        lambda config: config["blocks"][0][0].update(qk_norm=False),
        lambda config: config["blocks"].pop(),
    ],
)
def test_weights_of_another_configuration_are_refused(copy, changed):
    config = described_config(copy)
    changed(config)
    edit(copy, config=config)
    with pytest.raises(ValueError, match="not of its configuration"):
        mj.restore_model(copy)


def largest(folder):
    return max((path for path in (folder / "weights").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "missing or added"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is damaged"),
        (lambda path: path.write_bytes(b""), "is damaged"),
        (lambda path: path.with_name("more").write_bytes(b"x"), "missing or added: .*more"),
    ],
)
def test_damaged_weights_are_named(copy, damage, message):
    damage(largest(copy))
    with pytest.raises(ValueError, match=message):
        mj.restore_model(copy)


def test_one_flipped_bit_is_found(copy):
    path = largest(copy)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        mj.restore_model(copy)
    shutil.rmtree(copy / "weights")
    with pytest.raises(ValueError, match="missing or added"):
        mj.restore_model(copy)
