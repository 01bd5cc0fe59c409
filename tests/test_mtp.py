"""Multi-token prediction against Hugging Face transformers, through checkpoints under DeepSeek-V3's names.

The golden files are made by tests/goldens/make_logits.py; tests/goldens/README.md describes them.
"""

import dataclasses
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import quick_jit, relative_error, slow_but
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

import memjax as mj
from memjax.models.checkpoint import restore_model, save_model
from memjax.models.config import ModelConfig
from memjax.models.decoder import Decoder, cache_specs, mtp_cache_specs
from memjax.models.gguf import GGUFSource
from memjax.models.hf_config import hf_config
from memjax.models.latent import naive_from
from memjax.models.load import load
from memjax.models.safetensors import SafetensorsSource
from memjax.models.source import expected_tensors
from memjax.models.tensors import stored_copies
from memjax.plan.models import model_config
from memjax.plan.placement import abstract_decoder

GOLDENS = Path(__file__).parent / "goldens"
DEPTHS = {"deepseek_v3_mtp": 2, "deepseek_v3_mtp_fp8": 1, "glm4_moe_lite_mtp": 1}
TWO, FP8 = "deepseek_v3_mtp", "deepseek_v3_mtp_fp8"
TOLERANCE = 1e-4
TOKENS = 80
KEY = "num_nextn_predict_layers"


def golden(variant: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDENS / variant / "logits.npz"))


def described(variant: str) -> dict:
    return json.loads((GOLDENS / variant / "config.json").read_text())


def stored(variant: str) -> dict[str, np.ndarray]:
    """All tensors of a golden checkpoint in their own dtypes; safetensors' own reader knows no fp8 in NumPy."""
    path = GOLDENS / variant / "model.safetensors"
    with safe_open(path, framework="numpy") as file:
        source = SafetensorsSource(dict.fromkeys(file.keys(), path))
    return {name: source.read(name) for name in source.names()}


def changed(folder: Path, variant: str = TWO, without=(), extra=None, **config) -> Path:
    """A copy of a golden checkpoint with other tensors or another configuration; None takes an entry away."""
    tensors = {name: x for name, x in stored(variant).items() if name not in without}
    settings = {key: value for key, value in (described(variant) | config).items() if value is not None}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    save_file({**tensors, **(extra or {})}, folder / "model.safetensors")
    return folder


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


def weights(decoder: Decoder) -> dict[tuple, jax.Array]:
    """By path; those of modules for multi-token prediction begin with "mtp"."""
    return {path: x.get_value() for path, x in nnx.to_flat_state(nnx.state(decoder))}


def same(a: dict[tuple, jax.Array], b: dict[tuple, jax.Array]) -> bool:
    return a.keys() == b.keys() and all(jnp.array_equal(a[path], b[path]) for path in a)


# ---- logits ----------------------------------------------------------------------------------------------------------


@quick_jit
def forward(decoder, tokens):
    """Logits of the model, then of each depth, without a cache."""
    hidden, _ = decoder(tokens)
    found = [decoder.logits(hidden)]
    for depth in range(1, len(decoder.mtp) + 1):
        hidden, _ = decoder.predict_ahead(hidden[:, :-1], tokens[:, depth:], depth=depth)
        found.append(decoder.logits(hidden))
    return found


def through_the_caches(decoder, tokens, lengths, chunks, policy="dense"):
    """Ragged: ``chunks`` are (size, how many); the modules follow the model chunk by chunk, each through its own cache."""
    depths, policy = len(decoder.mtp), mj.policy(policy)
    caches = (policy.init(decoder.cache_specs(*tokens.shape)), policy.init(decoder.mtp_cache_specs(*tokens.shape)))
    ahead = [jnp.pad(tokens, ((0, 0), (0, depths)))[:, k : k + tokens.shape[1]] for k in range(depths + 1)]
    outputs, start = [], 0

    def step(caches, inputs):
        (main, others), (start, ids) = caches, inputs
        count = [jnp.clip(lengths - k - start, 0, ids.shape[-1]) for k in range(depths + 1)]
        hidden, main = decoder(ids[0], main, count[0])
        logits, after = [decoder.logits(hidden)], []
        for k, cache in enumerate(others, 1):
            hidden, cache = decoder.predict_ahead(hidden, ids[k], cache, count[k], depth=k)
            logits.append(decoder.logits(hidden))
            after.append(cache)
        return (main, tuple(after)), logits

    for size, many in chunks:
        ids = [x[:, start : start + size * many].reshape(x.shape[0], many, size).swapaxes(0, 1) for x in ahead]
        caches, found = jax.lax.scan(step, caches, (start + size * jnp.arange(many), jnp.stack(ids, axis=1)))
        outputs.append([x.swapaxes(0, 1).reshape(x.shape[1], size * many, -1) for x in found])
        start += size * many
    return [jnp.concatenate(parts, axis=1) for parts in zip(*outputs, strict=True)], caches


MIXED = ((20, 3), (1, 20))
FAST = [(TWO, ((80, 1),)), (TWO, MIXED), (FP8, MIXED)]
CASES = [*FAST, (TWO, ((5, 16),)), (TWO, ((1, 80),)), ("glm4_moe_lite_mtp", MIXED)]
run_through = quick_jit(through_the_caches, static_argnums=(3, 4))


@pytest.mark.parametrize(("variant", "depths"), DEPTHS.items())
def test_logits_equal_transformers(variant, depths):
    arrays, decoder = golden(variant), load(GOLDENS / variant, "float32", mtp=True).decoder
    assert len(decoder.mtp) == depths
    found = forward(decoder, arrays["tokens"])
    for name, logits in zip(["logits", *(f"mtp_{k}" for k in range(1, depths + 1))], found, strict=True):
        assert logits.shape == arrays[name].shape
        assert np.abs(np.asarray(logits) - arrays[name]).max() <= TOLERANCE


@pytest.mark.parametrize("case", slow_but(FAST, CASES), ids=str)
def test_prefill_chunks_and_decoding_of_a_ragged_batch_equal_transformers(case):
    """Chunks of 20 and more read each other naively, those of 5 and single tokens in the absorbed form."""
    variant, chunks = case
    decoder, arrays = load(GOLDENS / variant, "float32", mtp=True).decoder, golden(variant)
    assert 5 < naive_from(decoder.mtp[0].layer.mixer.config) < 20
    lengths = arrays["lengths"]
    tokens = np.where(np.arange(TOKENS) < lengths[:, None], arrays["tokens"], 0)
    found, (main, others) = run_through(decoder, jnp.asarray(tokens), jnp.asarray(lengths), chunks, "dense")
    for row, length in enumerate(lengths):
        for k, logits in enumerate(found):
            expected = arrays[f"mtp_{k}" if k else "logits"][row, : length - k]
            assert expected.shape[0] + k >= 53
            assert np.abs(np.asarray(logits)[row, : length - k] - expected).max() <= TOLERANCE
    assert [cache.length.tolist() for cache in main] == [lengths.tolist()] * 2
    assert [cache.length.tolist() for cache in others] == [(lengths - k).tolist() for k in range(1, len(others) + 1)]


@pytest.mark.parametrize(
    ("policy", "least", "most"),
    [("int8+protect(2,4)", 1e-4, 0.05), pytest.param("streaming(4,40)", 1e-3, 1.0, marks=pytest.mark.slow)],
)
def test_policies_serve_a_module_as_any_layer(policy, least, most):
    decoder, arrays = load(GOLDENS / FP8, "float32", mtp=True).decoder, golden(FP8)
    found, (_, (cache,)) = run_through(decoder, jnp.asarray(arrays["tokens"]), jnp.full(2, TOKENS), ((20, 4),), policy)
    assert least < relative_error(np.asarray(found[1])[:, : TOKENS - 1], arrays["mtp_1"]) < most
    assert mj.nbytes(cache) == mj.predict_nbytes(mj.policy(policy), decoder.mtp_cache_specs(2, TOKENS)[0])


def test_tokens_may_be_compressed_before_they_are_read():
    decoder, hidden = load(GOLDENS / FP8, "float32", mtp=True).decoder, jnp.asarray(floats(2, TOKENS, 24))
    tokens = jnp.asarray(golden(FP8)["tokens"])
    (cache,) = mj.policy("int8+protect(0,0)").init(decoder.mtp_cache_specs(2, TOKENS))

    @quick_jit
    def both(decoder, cache):
        ways = [decoder.predict_ahead(hidden, tokens, cache, compress_first=first) for first in (False, True)]
        return decoder.predict_ahead(hidden, tokens)[0], ways

    alone, ((exact, _), (coded, after)) = both(decoder, cache)
    assert relative_error(exact, alone) < 1e-5
    assert 1e-4 < relative_error(coded, alone) < 0.1
    assert after.length.tolist() == [TOKENS] * 2


def test_bfloat16_stays_bfloat16():
    decoder = load(GOLDENS / TWO, "bfloat16", mtp=True).decoder
    specs = decoder.mtp_cache_specs(2, TOKENS)
    assert {spec.dtype for spec in specs} == {"bfloat16"}
    tokens, hidden = jnp.asarray(golden(TWO)["tokens"]), jnp.asarray(floats(2, TOKENS, 24), jnp.bfloat16)
    for cache in (None, mj.dense().init(specs)[0]):
        found = jax.eval_shape(lambda *args: args[0].predict_ahead(*args[1:]), decoder, hidden, tokens, cache)
        assert {x.dtype for x in jax.tree.leaves(found) if jnp.issubdtype(x.dtype, jnp.floating)} == {jnp.dtype("bfloat16")}


# ---- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", DEPTHS)
def test_they_are_left_alone_unless_asked_for(variant, monkeypatch):
    read, left, inner = [], [], SafetensorsSource.read
    monkeypatch.setattr(SafetensorsSource, "read", lambda source, name: read.append(name) or inner(source, name))
    model = load(GOLDENS / variant, "float32", progress=lambda done, total: left.append(total - done))
    assert not [name for name in read if name.startswith("model.layers.2.")]
    assert left == list(range(len(left)))[::-1]
    assert (model.config.mtp_blocks, len(model.decoder.mtp)) == ((), 0)
    assert model.decoder.mtp_cache_specs(1, 8) == ()
    with_them = load(GOLDENS / variant, "float32", mtp=True)
    assert dataclasses.replace(with_them.config, mtp_blocks=()) == model.config
    assert with_them.fingerprint == model.fingerprint
    assert with_them.decoder.cache_specs(1, 8) == model.decoder.cache_specs(1, 8)
    own = {path: x for path, x in weights(with_them.decoder).items() if path[0] != "mtp"}
    assert len(own) < len(weights(with_them.decoder))
    assert same(own, weights(model.decoder))


@pytest.mark.parametrize("variant", DEPTHS)
def test_each_tensor_is_read_once(variant, monkeypatch):
    read, left, inner = [], [], SafetensorsSource.read
    monkeypatch.setattr(SafetensorsSource, "read", lambda source, name: read.append(name) or inner(source, name))
    load(GOLDENS / variant, progress=lambda done, total: left.append(total - done), mtp=True)
    with safe_open(GOLDENS / variant / "model.safetensors", framework="numpy") as file:
        assert sorted(read) == sorted(file.keys())
    assert left == list(range(len(left)))[::-1]


def test_copies_may_be_missing(tmp_path):
    copies = list(stored_copies(load(GOLDENS / TWO, mtp=True).config))
    assert len(copies) == 4
    shared = load(changed(tmp_path, without=copies), mtp=True).decoder
    assert same(weights(shared), weights(load(GOLDENS / TWO, mtp=True).decoder))


def test_a_head_that_is_the_embedding(tmp_path):
    """Tied: the copy of the head is one of the embedding."""
    heads = [f"model.layers.{layer}.shared_head.head.weight" for layer in (2, 3)]
    copies = dict.fromkeys(heads, stored(TWO)["model.embed_tokens.weight"])
    folder = changed(tmp_path, without=["lm_head.weight"], extra=copies, tie_word_embeddings=True)
    assert load(folder, mtp=True).decoder.head is None
    changed(tmp_path, without=["lm_head.weight"], tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"layers\.2\.shared_head\.head\.weight is not a copy of model\.embed_tokens\.weight"):
        load(folder, mtp=True)


def test_saved_models_keep_them(tmp_path):
    model = load(GOLDENS / TWO, "float32", mtp=True)
    assert ModelConfig.from_json(json.loads(json.dumps(model.config.to_json()))) == model.config
    save_model(tmp_path / "with", model.decoder)
    for decoder in (restore_model(tmp_path / "with")[0], *(load(tmp_path / "with", mtp=mtp).decoder for mtp in (False, True))):
        assert len(decoder.mtp) == 2
        assert same(weights(decoder), weights(model.decoder))
    save_model(tmp_path / "without", load(GOLDENS / TWO, "float32").decoder)
    assert len(load(tmp_path / "without").decoder.mtp) == 0
    with pytest.raises(ValueError, match=r"saved without multi-token prediction: load its checkpoint with mtp=True"):
        load(tmp_path / "without", mtp=True)


def test_a_configuration_saved_before_there_were_any():
    old = load(GOLDENS / TWO).config.to_json()
    assert old.pop("mtp_blocks") == []
    assert ModelConfig.from_json(old) == load(GOLDENS / TWO).config


# ---- what is refused -------------------------------------------------------------------------------------------------

ONE = "model.layers.3"


@pytest.mark.parametrize(
    "name",
    [
        "enorm.weight",
        "hnorm.weight",
        "eh_proj.weight",
        "shared_head.norm.weight",
        "input_layernorm.weight",
        "self_attn.kv_b_proj.weight",
        "mlp.gate.e_score_correction_bias",
        "mlp.experts.7.down_proj.weight",
    ],
)
def test_missing_and_misshapen_tensors(name, tmp_path):
    full = f"{ONE}.{name}"
    with pytest.raises(ValueError, match=rf"does not fit its deepseek_v3 configuration; missing: {full}$"):
        load(changed(tmp_path, without=[full]), mtp=True)
    wrong = f"wrong shape: {full} is [5, 1], not {list(stored(TWO)[full].shape)}"
    with pytest.raises(ValueError, match=re.escape(wrong)):
        load(changed(tmp_path, extra={full: floats(5, 1)}), mtp=True)
    assert load(tmp_path).config == load(GOLDENS / TWO).config


@pytest.mark.parametrize("name", ["model.layers.2.mtp.weight", "model.layers.4.enorm.weight", "model.layers.3.eh_proj.bias"])
def test_unexpected_tensors(name, tmp_path):
    folder = changed(tmp_path, extra={name: floats(24)})
    with pytest.raises(ValueError, match=f"unexpected: {name}$"):
        load(folder, mtp=True)
    assert load(folder).config == load(GOLDENS / TWO).config


@pytest.mark.parametrize(
    ("name", "original"),
    [("embed_tokens.weight", "model.embed_tokens.weight"), ("shared_head.head.weight", "lm_head.weight")],
)
def test_copies_that_are_none(name, original, tmp_path):
    with pytest.raises(ValueError, match=rf"{ONE}\.{name} is not a copy of {original}, which .* shares with the model"):
        load(changed(tmp_path, extra={f"{ONE}.{name}": floats(64, 24)}), mtp=True)
    with pytest.raises(ValueError, match=rf"wrong shape: {ONE}\.{name} is \[64, 23\], not \[64, 24\]"):
        load(changed(tmp_path, extra={f"{ONE}.{name}": floats(64, 23)}), mtp=True)


def test_a_module_in_fp8_without_scales(tmp_path):
    name = "model.layers.2.self_attn.o_proj.weight"
    folder = changed(tmp_path, FP8, without=[f"{name}_scale_inv"])
    with pytest.raises(ValueError, match=rf"{name} is fp8, but the checkpoint has no {name}_scale_inv"):
        load(folder, mtp=True)
    load(folder)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("deepseek_v3", {KEY: None}, f"mtp=True needs {KEY} >= 1 in the model's configuration, got None"),
        ("deepseek_v3", {KEY: 0}, f"mtp=True needs {KEY} >= 1 in the model's configuration, got 0"),
        ("deepseek_v3", {KEY: -1}, f"{KEY} to be an integer >= 1, got -1"),
        ("deepseek_v3", {KEY: True}, f"{KEY} to be an integer >= 1, got True"),
        ("deepseek_v3", {KEY: 1.5}, f"{KEY} to be an integer >= 1, got 1.5"),
        ("deepseek_v3", {KEY: 20_000}, "at most 10000 layers"),
        ("deepseek_v2", {}, f"mtp=True needs {KEY} >= 1 .* this deepseek_v2 model has no modules"),
        ("llama_default", {}, f"mtp=True needs {KEY} >= 1 .* this llama model has no modules"),
        ("llama_default", {KEY: 1}, "supported for deepseek_v3, kimi_k2, glm4_moe_lite only, not for llama"),
    ],
)
def test_configurations_without_such_modules(family, settings, message):
    given = {key: value for key, value in (described(family) | settings).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        hf_config(given, mtp=True)
    assert hf_config(given).mtp_blocks == ()


def test_gguf_files_have_none(tmp_path, monkeypatch):
    monkeypatch.setattr(GGUFSource, "read", None)
    for name in ("smollm2-135m", tmp_path / "none.gguf"):
        with pytest.raises(ValueError, match=r"mtp=True needs a checkpoint folder or a hub id; .* is a GGUF file"):
            load(name, mtp=True)


@pytest.mark.parametrize(("variant", "depth", "modules"), [(TWO, 0, 2), (TWO, 3, 2), ("deepseek_v3", 1, 0)])
def test_depths_that_there_are_not(variant, depth, modules):
    decoder = load(GOLDENS / variant, "float32", mtp=variant == TWO).decoder
    with pytest.raises(ValueError, match=rf"has {modules} modules .* none of depth {depth}; they are loaded with mtp=True"):
        decoder.predict_ahead(jnp.zeros((1, 4, 24)), jnp.zeros((1, 4), jnp.int32), depth=depth)


@pytest.mark.parametrize("shape", [(1, 5, 24), (1, 4, 64), (4, 24)])
def test_hidden_states_of_other_tokens(shape):
    decoder = load(GOLDENS / TWO, "float32", mtp=True).decoder
    with pytest.raises(ValueError, match=r"hidden states must be \[B, T, 24\] for tokens \[B, T\], got \["):
        decoder.predict_ahead(jnp.zeros(shape), jnp.zeros((1, 4), jnp.int32))


# ---- the sizes of DeepSeek-V3 ----------------------------------------------------------------------------------------


def v3_config() -> ModelConfig:
    """The published configuration with its one module: the file in memjax/data leaves the key out."""
    data = json.loads((Path(mj.__file__).parent / "data" / "configs.json").read_text())["deepseek-v3"]
    return hf_config(data | {KEY: 1}, mtp=True)


def test_a_module_of_deepseek_v3_caches_what_a_layer_does():
    config = v3_config()
    (spec,) = mtp_cache_specs(config, 1, 1024)
    assert spec == cache_specs(config, 1, 1024)[-1]
    short, long = (mj.nbytes(mj.abstract(mj.dense(), mtp_cache_specs(config, 1, tokens))) for tokens in (1024, 1025))
    assert long.device - short.device == 1_152
    assert cache_specs(config, 1, 1024) == cache_specs(model_config("deepseek-v3"), 1, 1024)


def test_the_tensors_of_deepseek_v3():
    """With scales for all matrices of layers but eh_proj and the router, these are the 91,991 tensors that are published."""
    config = v3_config()
    names = expected_tensors(config).keys() | stored_copies(config).keys()
    scales = [name for name in names if "_proj" in name and "eh_proj" not in name]
    assert len(names) + len(scales) == 91_991
    assert expected_tensors(config)["model.layers.61.eh_proj.weight"] == (7168, 14336)
    decoder = abstract_decoder(config)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(decoder.mtp))
    assert parameters == pytest.approx(11.5e9, rel=0.01)  # README_WEIGHTS.md of deepseek-ai/DeepSeek-V3


def test_the_layer_of_a_module_has_experts_wherever_the_model_has_any():
    settings = described(TWO)
    assert hf_config(settings | {"first_k_dense_replace": 2}, mtp=True).mtp_blocks == hf_config(settings, mtp=True).mtp_blocks
    glm = described("glm4_moe_lite_mtp")
    listed = hf_config(glm | {"mlp_layer_types": ["sparse", "dense"]}, mtp=True)
    assert listed.mtp_blocks == hf_config(glm, mtp=True).mtp_blocks != listed.blocks[-1:]
    plain = hf_config({**settings, "n_routed_experts": None}, mtp=True)
    assert plain.mtp_blocks == plain.blocks[-1:] * 2
    kimi = hf_config(settings | {"model_type": "kimi_k2"}, mtp=True)
    assert kimi.mtp_blocks == hf_config(settings, mtp=True).mtp_blocks
