"""Checkpoint folders written here: one file, shards, every dtype, and every way in which they can be damaged."""

import json
import struct

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from memjax.models import hub
from memjax.models.hf_config import hf_config
from memjax.models.load import load
from memjax.models.safetensors import open_checkpoint, read_json
from memjax.models.source import check_tensors, expected_tensors

CONFIG = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "rope_theta": 1e4,
    "hidden_act": "silu",
}
INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


def weights(dtype=np.float32, **changed):
    shapes = expected_tensors(hf_config(CONFIG | changed))
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def single(folder, tensors, **changed):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changed))
    save_file(tensors, folder / "model.safetensors")
    return folder


def sharded(folder, tensors, shards=3):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    placed = {name: f"model-{1 + i % shards:05}-of-{shards:05}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(placed.values()):
        save_file({name: tensors[name] for name in tensors if placed[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return folder


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("layout", [single, sharded])
def test_tensors_come_back(tmp_path, layout, dtype):
    tensors = weights(dtype)
    config, source = open_checkpoint(layout(tmp_path / "m", tensors))
    check_tensors(config, source)
    assert source.names() == tensors.keys()
    for name, values in tensors.items():
        found = source.read(name)
        assert found.dtype == values.dtype
        assert source.shape(name) == values.shape
        np.testing.assert_array_equal(found, values)


def test_one_file_and_shards_load_the_same_model(tmp_path):
    tensors = weights()
    one, many = (load(layout(tmp_path / layout.__name__, tensors), "float32") for layout in (single, sharded))
    for model in (one, many):
        kernel = model.decoder.layers[1].mixer.k.kernel[...]
        np.testing.assert_array_equal(kernel, tensors["model.layers.1.self_attn.k_proj.weight"].T)


def test_rotary_buffers_and_a_second_copy_of_a_tied_embedding_are_dropped(tmp_path):
    tensors = weights(tie_word_embeddings=True)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float64)
    config, source = open_checkpoint(single(tmp_path / "m", tensors, tie_word_embeddings=True))
    check_tensors(config, source)
    assert config.tied


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), r"missing: model\.norm\.weight"),
        (lambda t: t.update({"model.extra": np.ones(3, np.float32)}), r"unexpected: model\.extra"),
        (lambda t: t.update({NORM: np.ones(15, np.float32)}), r"model\.norm\.weight is \[15\], not \[16\]"),
        (lambda t: t.update({NORM: np.ones((16, 1), np.float32)}), r"model\.norm\.weight is \[16, 1\], not \[16\]"),
        (lambda t: t.update({NORM: np.ones(16, np.int32)}), r"model\.norm\.weight has dtype I32.*F32, F16, BF16"),
        (lambda t: t.update({NORM: np.full(16, np.inf, np.float32)}), r"model\.norm\.weight holds values .* not finite"),
        (lambda t: [t.pop(n) for n in list(t) if "layers.1" in n], r"missing: .* and 5 more"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, message):
    tensors = weights()
    change(tensors)
    with pytest.raises(ValueError, match=message):
        load(single(tmp_path / "m", tensors), "float32")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        open_checkpoint(tmp_path)
    folder = sharded(tmp_path / "m", weights())
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003"):
        open_checkpoint(folder)
    (folder / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        open_checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -1000])
def test_truncated_files_are_named(tmp_path, keep):
    folder = single(tmp_path / "m", weights())
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or no safetensors file"):
        open_checkpoint(folder)
    folder = sharded(tmp_path / "s", weights())
    (folder / "model-00003-of-00003.safetensors").write_bytes(content[:keep])
    with pytest.raises(ValueError, match="model-00003-of-00003"):
        open_checkpoint(folder)


@pytest.mark.parametrize("size", [2**63, 2**40])
def test_a_lying_header_is_refused(tmp_path, size):
    folder = single(tmp_path / "m", weights())
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", size) + b"{}" + bytes(64))
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/secret.safetensors", "a/b.safetensors", "model.bin", "..", "", None, 3]
)
def test_an_index_cannot_leave_its_folder(tmp_path, file):
    save_file(weights(), tmp_path / "secret.safetensors")
    folder = sharded(tmp_path / "m", weights())
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(weights(), file)}))
    with pytest.raises(ValueError, match="no file name in its folder"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object, got list"),
        ("{}", "no weight_map"),
        ('{"weight_map": []}', "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        (b"\xff\xfe\x00", "not valid JSON"),
    ],
)
def test_a_damaged_index_is_named(tmp_path, content, message):
    folder = sharded(tmp_path / "m", weights())
    (folder / INDEX).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        open_checkpoint(folder)


def test_an_index_that_places_a_tensor_wrongly_is_named(tmp_path):
    folder = sharded(tmp_path / "m", weights())
    index = read_json(folder / INDEX)
    index["weight_map"][NORM] = next(file for file in index["weight_map"].values() if file != index["weight_map"][NORM])
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model\.norm\.weight in model-.*, which lacks it"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["gpt2", "a/b/c", "../x", "/etc/passwd", "owner/", "owner/na me", "öwner/x"])
def test_what_is_no_hub_id(name):
    assert not hub.is_repo_id(name)
    with pytest.raises(ValueError, match="owner/name"):
        hub.download(name)


def test_hub_downloads_take_weights_and_tokenizer_and_nothing_that_runs(monkeypatch, tmp_path):
    asked = {}

    def snapshot(repo_id, revision, allow_patterns):
        asked.update(repo_id=repo_id, revision=revision)
        names = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", INDEX, "tokenizer.json"]
        names += ["tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
        refused = ["pytorch_model.bin", "modeling_x.py", "consolidated.safetensors", "README.md"]
        kept = huggingface_hub.utils.filter_repo_objects([*names, *refused], allow_patterns=allow_patterns)
        assert list(kept) == names
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert hub.download("owner/name", "v1") == tmp_path
    assert asked == {"repo_id": "owner/name", "revision": "v1"}


def test_without_a_network_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'nobody/nothing-of-this-name'.*pass a local folder or GGUF file"):
        load("nobody/nothing-of-this-name")
