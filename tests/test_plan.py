"""The planner: bytes of real models without their weights, shards counted on a mesh, verdicts, and the compiler's word."""

import dataclasses
import json
import math
import subprocess

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from process_helpers import python_with, run
from source_tree import REPOSITORY

import memjax as mj
from memjax.attention.rope import Rope
from memjax.models.config import LatentConfig, MambaConfig, ModelConfig, MoeConfig, llama_config
from memjax.models.decoder import Decoder, cache_specs
from memjax.plan import planner
from memjax.plan.compiled import MISSING, Compiled, CompileError
from memjax.plan.hardware import GIB, tpu
from memjax.plan.models import model_config, names
from memjax.plan.placement import abstract_decoder, place_cache, place_weights, weight_spec
from memjax.plan.planner import extrapolate, plan

TURBO = "turboquant(4,4)"
TINY = llama_config(
    vocab=256,
    width=64,
    layers=2,
    q_heads=8,
    kv_heads=4,
    head_dim=16,
    mlp_width=96,
    norm_eps=1e-5,
    max_position=256,
    ropes=(Rope(16),) * 2,
    qkv_bias=True,
)


def with_first_mixer(mixer) -> ModelConfig:
    """TINY whose first layer is ``mixer``."""
    first, *rest = TINY.blocks
    return dataclasses.replace(TINY, blocks=(dataclasses.replace(first, mixer=mixer), *rest))


def with_experts() -> ModelConfig:
    experts = MoeConfig(experts=4, chosen=2, width=24, shared_width=16, score_bias=True)
    return dataclasses.replace(TINY, blocks=tuple(dataclasses.replace(block, mlp=experts) for block in TINY.blocks))


CONFIGS = {
    "grouped": TINY,
    "odd": dataclasses.replace(TINY, vocab=255),
    "latent": with_first_mixer(
        LatentConfig(q_heads=8, q_rank=24, kv_rank=32, nope_dim=16, rope_dim=8, value_dim=16, rope=Rope(8))
    ),
    "mamba": with_first_mixer(MambaConfig(heads=8, head_dim=16, state_dim=16)),
    "experts": with_experts(),
}


def predict(config: ModelConfig, policy: str = "dense", batch: int = 4, context: int = 128, name: str = "v5e:2x4", **options):
    return plan(config, policy, batch, context, name, compile_step=False, **options)


@pytest.mark.parametrize(
    ("name", "per_token", "state"),
    [
        ("llama-3-8b", 131_072, 0),
        ("llama-3-70b", 327_680, 0),
        ("qwen3-8b", 147_456, 0),
        ("qwen3-30b-a3b", 98_304, 0),
        ("smollm2-135m", 23_040, 0),
        ("deepseek-v2-lite", 31_104, 0),
        ("deepseek-v3", 70_272, 0),
        ("granite-4.0-h-1b", 8_192, 36 * 4 * (48 * 64 * 128 + 3 * (48 * 64 + 2 * 128))),
    ],
)
def test_bytes_per_token_of_real_models(name, per_token, state):
    config, before = model_config(name), len(jax.live_arrays())
    short, long = (mj.nbytes(mj.abstract(mj.dense(), cache_specs(config, 1, tokens))) for tokens in (1024, 1025))
    assert long.device - short.device == per_token
    assert short.state == state
    assert len(jax.live_arrays()) == before


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-3-8b", 8.03),
        ("llama-3-70b", 70.55),
        ("qwen3-30b-a3b", 30.53),
        ("deepseek-v2-lite", 15.71),
        ("granite-4.0-h-1b", 1.46),
        ("gemma-3-1b", 1.0),
        ("smollm2-135m", 0.1345),
    ],
)
def test_parameters_of_real_models(name, billions):
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_decoder(model_config(name))))
    assert count / 1e9 == pytest.approx(billions, rel=5e-3)


def test_every_named_model_has_a_cache():
    assert len(names()) >= 10
    assert all(len(cache_specs(model_config(name), 1, 64)) == model_config(name).layers for name in names())


def on_first_device(tree) -> int:
    device = jax.devices("cpu")[0]
    shards = (shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


@pytest.mark.parametrize(
    ("name", "policy", "mesh"),
    [
        ("grouped", TURBO, (2, 4)),
        ("grouped", "streaming(4,60)+int8(centre=none,balance=off)", (4, 2)),
        ("grouped", "dense", (1, 8)),  # 4 kv heads do not divide over 8 devices
        ("odd", "dense", (2, 4)),
        ("latent", "int8", (4, 2)),
        ("mamba", "dense", (2, 4)),
        ("experts", "dense", (2, 4)),
    ],
)
def test_predicted_bytes_are_those_of_real_arrays(name, policy, mesh):
    config, parsed = CONFIGS[name], mj.policy(policy)
    found = predict(config, policy, mesh=mesh).predicted
    real = Mesh(np.array(jax.devices("cpu")).reshape(mesh), ("data", "model"))
    graph, state = nnx.split(Decoder(config, dtype="bfloat16", rngs=nnx.Rngs(0)))
    placed = nnx.state(place_weights(nnx.merge(graph, state), real))
    weights = jax.tree.map(lambda x, where: jax.device_put(x, where.sharding), state, placed)
    where = place_cache(parsed, cache_specs(config, 4, 128), real)
    cache = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), where)
    assert on_first_device(weights) == found.weights
    assert on_first_device(cache) == found.cache
    assert mj.nbytes(cache) == mj.predict_nbytes(parsed, cache_specs(config, 4, 128))


@pytest.mark.parametrize(
    ("name", "shape", "spec"),
    [
        ("q", (64, 128), PartitionSpec("data", "model")),
        ("out", (128, 64), PartitionSpec("model", "data")),
        ("gate", (4, 64, 24), PartitionSpec(None, "data", "model")),
        ("down", (4, 24, 64), PartitionSpec(None, "model", "data")),
        ("embedding", (255, 64), PartitionSpec(None, "data")),
        ("up_key", (8, 16, 32), PartitionSpec("model", "data", None)),
        ("router", (64, 4), PartitionSpec()),
        ("scale", (64,), PartitionSpec()),
    ],
)
def test_the_rule_for_weights(name, shape, spec):
    assert weight_spec(name, shape, {"data": 2, "model": 4}) == spec


@pytest.mark.parametrize(
    ("name", "batch", "slice_name", "mesh"),
    [
        ("grouped", 8, "v5e:2x4", (2, 4)),
        ("grouped", 1, "v5e:2x4", (1, 8)),  # one row cannot be spread
        ("grouped", 3, "v5e:2x2", (1, 4)),
        ("latent", 8, "v5e:2x4", (8, 1)),  # one head: only rows can be spread
    ],
)
def test_the_mesh_that_needs_least_is_chosen(name, batch, slice_name, mesh):
    long = 2**17
    found = predict(CONFIGS[name], batch=batch, name=slice_name, context=long)
    assert found.mesh == mesh
    sides = [d for d in range(1, found.tpu.devices + 1) if found.tpu.devices % d == 0 and batch % d == 0]
    totals = [
        predict(CONFIGS[name], batch=batch, name=slice_name, context=long, mesh=(d, found.tpu.devices // d)).predicted.total
        for d in sides
    ]
    assert found.predicted.total == min(totals)


@pytest.mark.parametrize(
    ("name", "chips", "devices", "gib"),
    [("v5e:4x4", 16, 16, 15.75), ("v6e:1x1", 1, 1, 31.24), ("v4:2x2x1", 4, 8, 15.25), ("7x:2x2x1", 4, 8, 94.74)],
)
def test_slices(name, chips, devices, gib):
    found = tpu(name)
    assert (found.chips, found.devices, found.hbm) == (chips, devices, round(gib * GIB))


def test_the_largest_context_fits_and_the_next_does_not():
    sizes = (2048, 1024, "v5e:2x2")
    largest = predict(TINY, "int8", *sizes, mesh=(1, 4)).largest_context
    assert 1024 < largest < planner.MOST_CONTEXT
    fits = [predict(TINY, "int8", 2048, largest + more, "v5e:2x2", mesh=(1, 4)).fits for more in (-128, 256)]
    assert fits == [True, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "v9:2x2"}, r"unknown TPU 'v9:2x2'; say .* v5e:2x2"),
        ({"name": "v5e"}, "unknown TPU 'v5e'"),
        ({"name": "v5e:2x2x2"}, "a slice of v5e has 2 axes, such as 2x2"),
        ({"name": "v5e:32x32"}, "at most 16 long"),
        ({"policy": "int5"}, "unknown policy 'int5'"),
        ({"batch": 0}, "batch must lie between 1 and"),
        ({"context": 0}, "context must lie between 1 and"),
        ({"mesh": (2, 2)}, "v5e:2x4 has 8 devices; a mesh data x model of 2x2"),
        ({"mesh": (8, 1)}, "a batch of 4 does not divide over the 8 devices"),
        ({"dtype": "int8"}, "dtype 'int8' is not one of"),
        ({"layers": 2}, "compile at least 2 and fewer than those, got 2"),
    ],
)
def test_bad_input_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        predict(**{"config": TINY} | changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no model 'nowhere': give smollm2-135m, llama-3-8b"),
        (["llama-3-8b", "--tpu", "v9:1x1"], "unknown TPU 'v9:1x1'"),
        (["llama-3-8b", "--mesh", "4"], "--mesh is two numbers"),
        (["llama-3-8b", "--json", "no/where.json"], "no folder"),
        (["llama-3-8b", "--kv", "int5"], "unknown policy 'int5'"),
    ],
)
def test_the_command_says_what_is_wrong_in_a_line(monkeypatch, capsys, arguments, message):
    status, out, err = run(monkeypatch, capsys, "plan", *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_model_that_does_not_fit(monkeypatch, capsys, tmp_path):
    file = tmp_path / "plan.json"
    options = ["--tpu", "v5e:2x2", "--context", 1024, "--no-compile", "--json", file]
    status, out, _ = run(monkeypatch, capsys, "plan", "llama-3-8b", *options, "--batch", 512)
    data = json.loads(file.read_text())
    assert (status, data["fits"]) == (1, False)
    assert data["hbm"] == round(15.75 * GIB)
    assert data["predicted"]["total"] > data["hbm"]
    assert 8.03e9 * 2 / 4 < data["predicted"]["weights"] < 8.04e9 * 2 / 4
    assert data["dense_per_token"] == 131_072
    assert "NO" in out
    assert "131,072 bytes per token uncompressed" in out


def test_a_checkpoint_folder_and_a_file_are_read_without_weights(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(planner, "compiler_available", lambda python: False)
    named = json.loads((REPOSITORY / "memjax/data/configs.json").read_text())["smollm2-135m"]
    (tmp_path / "config.json").write_text(json.dumps(named))
    for model in (tmp_path, tmp_path / "config.json"):
        status, out, _ = run(monkeypatch, capsys, "plan", model, "--tpu", "v6e:1x1", "--context", 8192)
        assert status == 0
        assert MISSING in out
        assert "23,040 bytes per token" in out
    (tmp_path / "config.json").write_text(" " * (4 * 2**20 + 1))
    with pytest.raises(ValueError, match=r"too many for a config\.json"):
        model_config(tmp_path)


@pytest.mark.parametrize(
    ("message", "status"),
    [("RESOURCE_EXHAUSTED: Ran out of memory on HBM", 1), ("INTERNAL: Mosaic failed", 2)],
)
def test_what_the_compiler_refuses(monkeypatch, capsys, message, status):
    def refuse(request, python):
        raise CompileError(message)

    monkeypatch.setattr(planner, "compiler_available", lambda python: True)
    monkeypatch.setattr(planner, "compile_in_child", refuse)
    found, out, _ = run(monkeypatch, capsys, "plan", "smollm2-135m", "--tpu", "v6e:1x1", "--context", 1024)
    assert found == status
    assert message in out


def test_few_layers_are_extrapolated():
    numbers = {"arguments": 100, "temporaries": 10, "outputs": 5, "code": 4, "aliased": 50, "host": 0, "kernels": 2}
    few = Compiled(**numbers, seconds=1.0)
    more = dataclasses.replace(few, arguments=160, aliased=90, kernels=4, seconds=2.0)
    found = extrapolate({2: few, 4: more}, 10)
    assert found == dataclasses.replace(few, arguments=340, aliased=210, kernels=10, seconds=3.0)
    assert found.total == 340 + 10 + 5 + 4


def test_the_compiler_agrees():
    python = python_with("libtpu")
    subprocess.run([python, "-c", "import memjax.plan"], check=True)
    config = llama_config(
        vocab=8192,
        width=1024,
        layers=2,
        q_heads=8,
        kv_heads=4,
        head_dim=128,
        mlp_width=2048,
        norm_eps=1e-5,
        max_position=8192,
        ropes=(Rope(128),) * 2,
    )
    found = plan(config, f"{TURBO}+kernels(pallas)", 4, 4096, "v5e:2x2", mesh=(1, 4), python=python)
    assert found.note == ""
    assert found.compiled.arguments == pytest.approx(found.predicted.arguments, rel=0.03)
    assert found.compiled.aliased >= 0.97 * found.predicted.cache
    assert found.compiled.kernels == 2
    assert found.fits
