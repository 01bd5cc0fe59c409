"""Configurations: both spellings of config.json, GGUF metadata, refusals, and the round trip through JSON."""

import json
import math

import pytest

from memjax.attention.rope import Rope
from memjax.models.config import ModelConfig, llama_config
from memjax.models.gguf_config import gguf_config
from memjax.models.hf_config import hf_config

LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "hidden_act": "silu",
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "rope_theta": 500000.0,
}
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": 4096}
QWEN2 = LLAMA | {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 2}
QWEN3 = LLAMA | {"model_type": "qwen3", "head_dim": 128, "hidden_size": 1024, "num_attention_heads": 16}
SMOLLM3 = LLAMA | {"model_type": "smollm3", "num_hidden_layers": 8}

GGUF = {
    "general.architecture": "llama",
    "llama.block_count": 8,
    "llama.attention.head_count": 8,
    "llama.attention.head_count_kv": 2,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.context_length": 2048,
    "llama.vocab_size": 100,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 5000.0,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 3,
    "tokenizer.ggml.eot_token_id": 2,
}


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


def gguf(architecture="llama", **changed):
    """The metadata above under another architecture."""
    own = {key.replace("llama.", f"{architecture}.", 1): value for key, value in GGUF.items()}
    return own | {"general.architecture": architecture} | changed


def test_llama_3_in_full():
    config = hf_config(LLAMA | {"rope_scaling": LLAMA3_SCALING | {"rope_type": "llama3"}})
    rope = Rope(128, 500000.0, "llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    assert config == llama_config(
        family="llama",
        vocab=128256,
        width=4096,
        layers=4,
        q_heads=32,
        kv_heads=8,
        head_dim=128,
        mlp_width=14336,
        norm_eps=1e-5,
        max_position=131072,
        ropes=(rope,) * 4,
        windows=(None,) * 4,
        bos_id=128000,
        eos_ids=(128001, 128008, 128009),
    )


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("default", {}),
        ("linear", {"factor": 4.0}),
        ("dynamic", {"factor": 4.0}),
        ("llama3", LLAMA3_SCALING),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 32768, "beta_fast": 16.0, "truncate": False}),
        ("longrope", {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64, "original_max_position_embeddings": 4096}),
    ],
)
def test_the_three_spellings_of_rope_agree(kind, extra):
    new = hf_config(
        without(LLAMA, "rope_theta") | {"rope_parameters": extra | {"rope_type": kind, "rope_theta": 5e5}, "dtype": "bfloat16"}
    )
    for key in ("type", "rope_type"):
        assert hf_config(LLAMA | {"rope_scaling": extra | {key: kind}, "torch_dtype": "bfloat16"}) == new
    assert {rope.kind for rope in new.ropes} == {kind}
    assert new.ropes[0].theta == 5e5


def test_longrope_derives_its_factor_from_the_lengths():
    factors = {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
    config = hf_config(
        LLAMA | {"rope_scaling": factors | {"type": "longrope"}, "original_max_position_embeddings": 4096}
    )
    assert config.ropes[0].factor == 32.0
    assert config.ropes[0].cos_sin_scale(8192) == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))


def test_only_llama_may_lack_theta():
    assert hf_config(without(LLAMA, "rope_theta")).ropes[0].theta == 10000.0
    for config in (MISTRAL, QWEN2, QWEN3, SMOLLM3):
        with pytest.raises(ValueError, match="lacks 'rope_theta'"):
            hf_config(without(config, "rope_theta"))
    for parameters in ({"rope_type": "default"}, {}):
        with pytest.raises(ValueError, match="lacks 'rope_theta'"):
            hf_config(without(LLAMA, "rope_theta") | {"rope_parameters": parameters})


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (LLAMA, {}),
        (LLAMA | {"attention_bias": True, "mlp_bias": True}, {"qkv_bias": True, "out_bias": True, "mlp_bias": True}),
        (LLAMA | {"head_dim": 64}, {"head_dim": 64}),
        (LLAMA | {"head_dim": None}, {"head_dim": 128}),
        (without(LLAMA, "num_key_value_heads"), {"kv_heads": 32}),
        (LLAMA | {"eos_token_id": 2, "tie_word_embeddings": True}, {"eos_ids": (2,), "tied": True}),
        (LLAMA | {"eos_token_id": None, "bos_token_id": None}, {"eos_ids": (), "bos_id": None}),
        (QWEN2, {"qkv_bias": True, "out_bias": False}),
        (QWEN3, {"qk_norm": True, "head_dim": 128, "qkv_bias": False}),
        (SMOLLM3, {"tied": True}),
    ],
)
def test_options_of_the_families(config, fields):
    found = hf_config(config)
    plain = {"qkv_bias": False, "out_bias": False, "mlp_bias": False, "qk_norm": False, "tied": False, "kv_heads": 8}
    mixer = found.blocks[0].mixer
    for name, value in (plain | fields).items():
        where = found if name in ("tied", "eos_ids", "bos_id") else found.blocks[0].mlp if name == "mlp_bias" else mixer
        assert getattr(where, "bias" if name == "mlp_bias" else name) == value, name


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (LLAMA | {"sliding_window": 4096}, (None,) * 4),
        (MISTRAL, (4096,) * 4),
        (MISTRAL | {"sliding_window": None}, (None,) * 4),
        (QWEN2, (None,) * 4),
        (QWEN2 | {"use_sliding_window": True}, (None, None, 4096, 4096)),
        (QWEN2 | {"layer_types": ["sliding_attention"] * 4}, (None,) * 4),
        (
            QWEN2 | {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"] * 2},
            (None, 4096, None, 4096),
        ),
        (SMOLLM3 | {"sliding_window": 16}, (None,) * 8),
        # Without layer_types, SmolLM3 slides where it has no rotary embedding.
        (SMOLLM3 | {"sliding_window": 16, "use_sliding_window": True}, (None, None, None, 16) * 2),
    ],
)
def test_windows(config, windows):
    assert hf_config(config).windows == windows


@pytest.mark.parametrize(
    ("extra", "rotary"),
    [
        ({}, [True, True, True, False] * 2),
        ({"no_rope_layer_interval": 2}, [True, False] * 4),
        ({"no_rope_layers": [1, 0, 0, 1, 1, 1, 1, 1], "no_rope_layer_interval": 2}, [1, 0, 0, 1, 1, 1, 1, 1]),
    ],
)
def test_smollm3_layers_without_a_rotary_embedding(extra, rotary):
    config = hf_config(SMOLLM3 | extra)
    assert [rope is not None for rope in config.ropes] == [bool(flag) for flag in rotary]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LLAMA | {"model_type": "gpt2"}, "'gpt2'.*gemma2, .*llama, .*mistral"),
        (without(LLAMA, "model_type"), "model_type None"),
        (LLAMA | {"hidden_act": "gelu"}, "'gelu'.*'silu'"),
        (LLAMA | {"quantization_config": {"bits": 4}}, "quantization_config"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA | {"rope_scaling": {"type": "mrope"}}, "'mrope'.*default, linear, dynamic, llama3, yarn, longrope"),
        (LLAMA | {"rope_scaling": {"type": "linear"}}, "'linear' needs 'factor'"),
        (LLAMA | {"rope_scaling": {"type": "longrope"}}, "'short_factor'"),
        (LLAMA | {"rope_scaling": "linear"}, "must be objects"),
        (without(LLAMA, "rms_norm_eps"), "'rms_norm_eps'"),
        (without(LLAMA, "num_hidden_layers"), "'num_hidden_layers'"),
        (without(QWEN3, "head_dim"), "'head_dim'"),
        (without(QWEN2, "num_key_value_heads"), "'num_key_value_heads'"),
        (without(MISTRAL, "sliding_window"), "'sliding_window'"),
        (without(QWEN2, "max_window_layers") | {"use_sliding_window": True}, "'max_window_layers'"),
        (MISTRAL | {"layer_types": ["full_attention"] * 4}, "slides in every layer"),
        (LLAMA | {"layer_types": ["sliding_attention"] * 4}, "not supported for llama"),
        (QWEN2 | {"layer_types": ["full_attention"]}, "each of 4 layers"),
        (QWEN2 | {"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
        (SMOLLM3 | {"no_rope_layers": [1, 0]}, "8 entries"),
        (SMOLLM3 | {"no_rope_layers": [2] * 8}, "0 or 1"),
        (LLAMA | {"num_attention_heads": 0}, "num_attention_heads.*0"),
        (LLAMA | {"num_attention_heads": "32"}, "num_attention_heads.*'32'"),
        (LLAMA | {"hidden_size": True}, "hidden_size.*True"),
        (LLAMA | {"num_key_value_heads": 7}, r"32.*7"),
        (LLAMA | {"num_hidden_layers": 10**9}, "at most 10000 layers"),
        (LLAMA | {"rms_norm_eps": float("nan")}, "rms_norm_eps.*nan"),
        (LLAMA | {"rms_norm_eps": -1.0}, "norm_eps.*-1.0"),
        (LLAMA | {"eos_token_id": ["</s>"]}, "token ids"),
        (LLAMA | {"eos_token_id": -1}, "token ids"),
        (MISTRAL | {"sliding_window": -5}, "window.*-5"),
    ],
)
def test_unsupported_configurations_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        hf_config(config)


def test_gguf_in_full():
    config = gguf_config(GGUF, {"output.weight"})
    assert config == llama_config(
        family="llama",
        vocab=100,
        width=64,
        layers=8,
        q_heads=8,
        kv_heads=2,
        head_dim=8,
        mlp_width=96,
        norm_eps=1e-5,
        max_position=2048,
        ropes=(Rope(8, 5000.0, original_max_position=2048),) * 8,
        windows=(None,) * 8,
        bos_id=1,
        eos_ids=(2, 3),
    )


def biases_of(config):
    """Of queries, keys and values; of the output; of the MLP."""
    mixer, mlp = config.blocks[0].mixer, config.blocks[0].mlp
    return mixer.qkv_bias, mixer.out_bias, mlp.bias


def test_gguf_tensors_tell_tied_embeddings_and_biases():
    biases = {"blk.0.attn_q.bias", "blk.0.attn_output.bias", "blk.0.ffn_up.bias"}
    config = gguf_config(GGUF, biases)
    assert (config.tied, *biases_of(config)) == (True, True, True, True)
    config = gguf_config(gguf("qwen2"), {"output.weight"})
    assert (config.tied, *biases_of(config)) == (False, True, False, False)


def test_gguf_of_qwen3_and_smollm3():
    config = gguf_config(gguf("qwen3") | {"qwen3.attention.key_length": 32}, ())
    assert (config.family, config.blocks[0].mixer.head_dim, config.blocks[0].mixer.qk_norm) == ("qwen3", 32, True)
    config = gguf_config(gguf("smollm3"), ())
    assert [rope is not None for rope in config.ropes] == [True, True, True, False] * 2


@pytest.mark.parametrize(
    ("keys", "factors", "rope"),
    [
        ({"scaling.type": "none"}, (), Rope(8, 5000.0, original_max_position=2048)),
        (
            {"scaling.type": "linear", "scaling.factor": 2.0},
            (),
            Rope(8, 5000.0, "linear", 2.0, 2048),
        ),
        (
            {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 512},
            (),
            Rope(8, 5000.0, "yarn", 4.0, 512),
        ),
        (
            {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.attn_factor": 0.5, "scaling.yarn_beta_fast": 16.0},
            (),
            Rope(8, 5000.0, "yarn", 4.0, 2048, beta_fast=16.0, attention_factor=0.5 * (0.1 * math.log(4.0) + 1)),
        ),
        ({}, (1.0, 1.0, 4.0, 8.0), Rope(8, 5000.0, original_max_position=2048, freq_factors=(1.0, 1.0, 4.0, 8.0))),
    ],
)
def test_gguf_rope(keys, factors, rope):
    metadata = GGUF | {f"llama.rope.{key}": value for key, value in keys.items()}
    assert gguf_config(metadata, (), factors).ropes == (rope,) * 8


def test_gguf_freq_factors_are_llama3_scaling():
    """Converters store what llama3 scaling makes of each frequency, as divisors."""
    scaled = Rope(128, 5e5, "llama3", 8.0, 8192)
    plain = Rope(128, 5e5)
    factors = tuple((plain.inv_freq(1).astype(float) / scaled.inv_freq(1)).tolist())
    wide = {"llama.embedding_length": 1024, "llama.rope.freq_base": 5e5}
    rope = gguf_config(GGUF | wide, (), factors).ropes[0]
    assert rope.inv_freq(1).tolist() == pytest.approx(scaled.inv_freq(1).tolist(), rel=1e-6)


def test_gguf_windows():
    key = "llama.attention.sliding_window"
    assert gguf_config(GGUF | {key: 64}, ()).windows == (64,) * 8
    assert gguf_config(GGUF | {key: 64, f"{key}_pattern": [True, False] * 4}, ()).windows == (64, None) * 4
    assert gguf_config(GGUF | {key: 0}, ()).windows == (None,) * 8


def test_gguf_theta_may_be_missing_only_for_llama():
    assert gguf_config(without(GGUF, "llama.rope.freq_base"), ()).ropes[0].theta == 10000.0
    with pytest.raises(ValueError, match=r"'qwen2\.rope\.freq_base'"):
        gguf_config(without(gguf("qwen2"), "qwen2.rope.freq_base"), ())


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (gguf("gemma"), "'gemma'.*llama, qwen2, qwen3, smollm3"),
        (gguf("mistral"), "'mistral'"),
        ({}, "architecture None"),
        (without(GGUF, "llama.block_count"), r"'llama\.block_count'"),
        (without(GGUF, "llama.vocab_size"), r"'tokenizer\.ggml\.tokens'"),
        (GGUF | {"llama.attention.head_count": [8, 4]}, r"head_count.*\[8, 4\]"),
        (GGUF | {"llama.attention.head_count": 0}, "head_count.*0"),
        (GGUF | {"llama.block_count": 2**30}, "at most 10000 layers"),
        (GGUF | {"llama.attention.value_length": 16}, "values whose length differs"),
        (GGUF | {"llama.rope.dimension_count": 4}, "4 of 8 channels"),
        (GGUF | {"llama.rope.scaling.type": "longrope"}, "'longrope'.*none, linear, yarn"),
        (GGUF | {"llama.rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier"),
        (GGUF | {"llama.attention.sliding_window": 64, "llama.attention.sliding_window_pattern": 4}, "one flag per layer"),
    ],
)
def test_unsupported_gguf_metadata_is_named(metadata, message):
    with pytest.raises(ValueError, match=message):
        gguf_config(metadata, ())


def test_freq_factors_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"freq_factors.*4"):
        gguf_config(GGUF, (), (1.0, 2.0))


@pytest.mark.parametrize("config", [LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3, None], ids=str)
def test_json_round_trip(config):
    if config is None:
        factors = {"type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
        config = LLAMA | {"rope_scaling": factors, "original_max_position_embeddings": 4096}
    config = hf_config(config)
    again = ModelConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert again == config
    assert hash(again) == hash(config)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data.pop("width"),
        lambda data: data.update(unknown=1),
        lambda data: data.update(blocks=None),
        lambda data: data.update(blocks=[]),
        lambda data: data["blocks"][0].pop(),
        lambda data: data["blocks"][0][0].update(kind="spiral"),
        lambda data: data["blocks"][0][0]["rope"].update(kind="spiral"),
        lambda data: data["blocks"][0][1].update(unknown=1),
    ],
)
def test_damaged_json_is_refused(spoil):
    data = json.loads(json.dumps(hf_config(LLAMA).to_json()))
    spoil(data)
    with pytest.raises(ValueError, match=r"configuration|layers|spiral"):
        ModelConfig.from_json(data)
