"""Every family and every rotary variant against Hugging Face transformers, through checkpoints in its own format.

The golden files are made by tests/goldens/make_logits.py; tests/goldens/README.md describes them.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import quick_jit, slow_but
from safetensors.numpy import load_file, save_file

import memjax as mj
from memjax.models.config import ModelConfig
from memjax.models.hf_config import FAMILIES, hf_config
from memjax.models.load import load
from memjax.models.safetensors import SafetensorsSource

GOLDENS = Path(__file__).parent / "goldens"
VARIANTS = sorted(path.parent.name for path in GOLDENS.glob("*/config.json"))
TOLERANCE = 1e-4
CHUNKED = ("llama_llama3", "llama_dynamic", "llama_bias")  # rotary variants differ in a table of frequencies
# Multi-token prediction adds nothing to a model that is loaded without it; tests/test_mtp.py runs it in chunks, too.
USUAL = [v for v in VARIANTS if (not v.startswith("llama") or v in CHUNKED) and "mtp" not in v]
OTHER_NAMES = {"kimi_k2": "deepseek_v3", "youtu_llm": "youtu"}  # of the same architecture
CHUNK, CHUNKS = 20, 3  # the rest of the text is decoded token by token


def opened(variant: str):
    folder = GOLDENS / variant
    return load(folder, "float32"), dict(np.load(folder / "logits.npz"))


@quick_jit
def forward(decoder, tokens):
    return decoder.logits(decoder(tokens)[0])


def through_the_cache(decoder, tokens, lengths, specs):
    """Ragged: chunks, then single tokens; row b ends after lengths[b] tokens."""
    cache, outputs = mj.policy("dense").init(specs), []
    for start in range(0, CHUNK * CHUNKS, CHUNK):
        count = jnp.clip(lengths - start, 0, CHUNK)
        hidden, cache = decoder(tokens[:, start : start + CHUNK], cache, count)
        outputs.append(decoder.logits(hidden))

    def step(cache, inputs):
        position, token = inputs
        hidden, cache = decoder(token[:, None], cache, (position < lengths).astype(jnp.int32))
        return cache, decoder.logits(hidden[:, 0])

    positions = jnp.arange(CHUNK * CHUNKS, tokens.shape[1])
    _, decoded = jax.lax.scan(step, cache, (positions, tokens[:, CHUNK * CHUNKS :].T))
    return jnp.concatenate([*outputs, decoded.swapaxes(0, 1)], axis=1)


def test_every_family_has_a_golden_file():
    found = {json.loads((GOLDENS / v / "config.json").read_text())["model_type"] for v in VARIANTS}
    assert found == set(FAMILIES) - OTHER_NAMES.keys() - {"gemma3"}
    kinds = {rope.kind for v in VARIANTS for rope in config_of(v).ropes if rope is not None}
    assert kinds == {"default", "linear", "dynamic", "llama3", "yarn", "longrope"}


def config_of(variant: str, file: str = "config.json") -> ModelConfig:
    return hf_config(json.loads((GOLDENS / variant / file).read_text()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant):
    model, arrays = opened(variant)
    found = np.asarray(forward(model.decoder, arrays["tokens"]))
    assert np.abs(found - arrays["logits"]).max() <= TOLERANCE
    for name in (name for name in arrays if name.startswith("logits_")):
        length = int(name.removeprefix("logits_"))
        alone = np.asarray(forward(model.decoder, arrays["tokens"][:1, :length]))
        assert np.abs(alone - arrays[name]).max() <= TOLERANCE


@pytest.mark.parametrize("variant", slow_but(USUAL, VARIANTS))
def test_chunks_and_decoding_of_a_ragged_batch_equal_transformers(variant):
    model, arrays = opened(variant)
    tokens, lengths = jnp.asarray(arrays["tokens"]), jnp.asarray(arrays["lengths"])
    specs = model.decoder.cache_specs(*tokens.shape)
    found = np.asarray(quick_jit(through_the_cache, static_argnums=3)(model.decoder, tokens, lengths, specs))
    for row, length in enumerate(arrays["lengths"]):
        assert np.abs(found[row, :length] - arrays["logits"][row, :length]).max() <= TOLERANCE


def without_ropes(config: ModelConfig) -> ModelConfig:
    def bare(block):
        return dataclasses.replace(block, mixer=dataclasses.replace(block.mixer, rope=None))

    blocks = tuple(bare(block) if hasattr(block.mixer, "rope") else block for block in config.blocks)
    return dataclasses.replace(config, blocks=blocks)


@pytest.mark.parametrize("path", sorted(GOLDENS.glob("*/config_v4*.json")), ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_both_spellings_of_a_configuration_are_the_same_model(path):
    new, old = config_of(path.parent.name), config_of(path.parent.name, path.name)
    frequencies = [rope and rope.inv_freq(80).tolist() for rope in new.ropes]
    assert frequencies == [rope and rope.inv_freq(80).tolist() for rope in old.ropes]
    assert without_ropes(old) == without_ropes(new)


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_other_names_of_a_family(name):
    given = json.loads((GOLDENS / OTHER_NAMES[name] / "config.json").read_text())
    same = hf_config(given | {"model_type": name})
    assert dataclasses.replace(same, family=OTHER_NAMES[name]) == hf_config(given)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_multimodal_checkpoint(prefix, tmp_path):
    """Its configuration is nested, its tensors have a prefix, and what sees pictures is left alone."""
    folder = GOLDENS / "gemma3_text"
    described = {"model_type": "gemma3", "text_config": json.loads((folder / "config.json").read_text()), "eos_token_id": 7}
    (tmp_path / "config.json").write_text(json.dumps(described))
    tensors = {prefix + name.removeprefix("model."): x for name, x in load_file(folder / "model.safetensors").items()}
    save_file(tensors | {"vision_tower.patch.weight": np.ones((2, 2), np.float32)}, tmp_path / "model.safetensors")
    model, arrays = load(tmp_path, "float32"), np.load(folder / "logits.npz")
    assert model.eos_ids == (2,)
    assert np.abs(np.asarray(forward(model.decoder, arrays["tokens"])) - arrays["logits"]).max() <= TOLERANCE


def _counted(left: list[int]):
    """Notes after each tensor how many are still to come, that one included."""
    return lambda done, total: left.append(total - done + 1)


@pytest.mark.parametrize("variant", ["deepseek_v3_fp8", "granite_hybrid_moe", "llama_tied"])
def test_a_tensor_of_several_parameters_is_read_once(variant, monkeypatch):
    """Keys' and values' up-projections, or experts' gates and inputs, lie in one tensor each."""
    read, left = [], []
    inner = SafetensorsSource.read
    monkeypatch.setattr(SafetensorsSource, "read", lambda source, name: read.append(name) or inner(source, name))
    load(GOLDENS / variant, progress=_counted(left))
    assert len(read) == len(set(read)) >= len(left)  # fp8 blocks have tensors of scales besides
    assert left == list(range(len(left), 0, -1))


def test_layers_for_drafts_are_left_alone(tmp_path):
    """DeepSeek-V3 keeps its multi-token prediction behind the last layer; elsewhere such tensors are unexpected."""
    for variant in ("deepseek_v3", "llama_default"):
        folder = tmp_path / variant
        folder.mkdir()
        (folder / "config.json").write_text((GOLDENS / variant / "config.json").read_text())
        tensors = load_file(GOLDENS / variant / "model.safetensors")
        save_file(tensors | {"model.layers.9.eh_proj.weight": np.ones((2, 2), np.float32)}, folder / "model.safetensors")
    assert load(tmp_path / "deepseek_v3", progress=_counted(seen := [])).config == load(GOLDENS / "deepseek_v3").config
    assert seen == list(range(len(seen), 0, -1))
    with pytest.raises(ValueError, match=r"unexpected: model\.layers\.9\.eh_proj\.weight"):
        load(tmp_path / "llama_default")


def test_greedy_generation_equals_transformers():
    golden = np.load(GOLDENS / "llama_default" / "greedy.npz")
    model = dataclasses.replace(load(GOLDENS / "llama_default", "float32"), eos_ids=())
    found = mj.generate(model, golden["prompt"].tolist(), max_new_tokens=len(golden["tokens"]))
    assert list(found[0].tokens) == golden["tokens"].tolist()


def test_smollm2_equals_transformers(smollm2):
    golden = np.load(GOLDENS / "smollm2_135m.npz")
    tokens = jnp.asarray(golden["tokens"])[None]
    log_probs = np.asarray(jax.nn.log_softmax(forward(smollm2.decoder, tokens)[0]))
    assert np.abs(log_probs[:, golden["sample_ids"]] - golden["sample_logprobs"]).max() <= 2e-3
    found = np.take_along_axis(log_probs, golden["top_ids"].astype(np.int64), axis=1)
    assert np.abs(found - golden["top_logprobs"]).max() <= 2e-3
    assert tokens.shape == (1, 512)


def test_the_dense_cache_equals_no_cache_on_the_real_model(smollm2):
    tokens = jnp.asarray(np.load(GOLDENS / "smollm2_135m.npz")["tokens"])[None, :160]
    cache = smollm2.init_cache(mj.policy("dense"), 1, 160)
    step = jax.jit(lambda decoder, cache, chunk: decoder(chunk, cache))
    found = []
    for start in (0, 80):
        hidden, cache = step(smollm2.decoder, cache, tokens[:, start : start + 80])
        found.append(hidden)
    expected = jax.jit(lambda decoder, tokens: decoder(tokens)[0])(smollm2.decoder, tokens)
    difference = jnp.abs(jnp.concatenate(found, axis=1) - expected).max()
    assert difference <= 1e-5 * jnp.abs(expected).max()


def test_bfloat16_weights_stay_close():
    tokens = np.load(GOLDENS / "llama_default" / "logits.npz")["tokens"]
    full, half = (load(GOLDENS / "llama_default", dtype).decoder for dtype in ("float32", "bfloat16"))
    assert half.embedding.embedding[...].dtype == jnp.bfloat16
    expected, found = (jax.nn.softmax(forward(decoder, tokens)) for decoder in (full, half))
    assert float(jnp.abs(expected - found).sum(axis=-1).mean()) < 0.1
