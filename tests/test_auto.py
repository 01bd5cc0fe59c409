"""Bits by sensitivity: the allocation against brute force, limits against the ledger, files, and the measurement."""

import dataclasses
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import SPEC, oracle, plain, qkv, relative_error, row, run, slow_but
from hypothesis import given, settings
from hypothesis import strategies as st

import memjax as mj
from memjax.cache.policy import CachePolicy, Windows, layer_policies
from memjax.cache.spec import RecurrentSpec
from memjax.data import CODE, NOVEL
from memjax.evaluate.compare import Job, Reader, Setup
from memjax.evaluate.sensitivity import measure_sensitivity
from memjax.quantize import Auto, Dense, Int8, Pair, TurboQuant
from memjax.quantize.auto import byte_count, cheapest_sum, layer_codec, spend, stream_codec
from memjax.quantize.front import OFF
from memjax.quantize.sensitivity import OPTIONS, Sensitivity, load_sensitivity, save_sensitivity
from memjax.quantize.turboquant import Lloyd

LAYERS, TEXT = 4, 23  # the tiny model's layers, and what fits into its shortest sliding window with one token more

# ---- the optimum ---------------------------------------------------------------------------------------------------


@st.composite
def problems(draw):
    streams, options = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    table = st.lists(st.lists(st.integers(0, 40), min_size=options, max_size=options), min_size=streams, max_size=streams)
    divergence, cost = draw(table), draw(table)
    return divergence, cost, sum(map(min, cost)) + draw(st.integers(0, 60))


def total(table, chosen) -> int:
    return sum(each[option] for each, option in zip(table, chosen, strict=True))


@given(problem=problems())
@settings(deadline=None)
def test_the_allocation_is_the_best_there_is(problem):
    """Of all that fit; and no cheaper one is as good."""
    divergence, cost, limit = problem
    chosen = cheapest_sum(divergence, cost, limit)
    every = itertools.product(*(range(len(each)) for each in cost))
    best = min((total(divergence, c), total(cost, c)) for c in every if total(cost, c) <= limit)
    assert (total(divergence, chosen), total(cost, chosen)) == best


@pytest.mark.parametrize(("gain", "chosen"), [(0.04, [1, 1, 1, 1]), (0.06, [0, 1, 2, 1])])
def test_uniform_bits_stay_where_others_promise_little(gain, chosen):
    """One stream down a step and another one up gain so much of the sum, which is 100."""
    cost = [[0, 1, 2]] * 4
    divergence = [[26, 25, 24.5], [90, 25, 24.9], [90, 25, 24 - 100 * gain], [90, 25, 24.9]]
    assert cheapest_sum(divergence, cost, 4) == [0, 1, 2, 1]
    assert spend(divergence, cost, 4) == chosen
    assert spend([], [], 0) == []


def test_what_cannot_be_paid_is_refused():
    with pytest.raises(ValueError, match="the cheapest options cost 3, which is more than 2"):
        cheapest_sum([[1, 0], [1, 0]], [[1, 2], [2, 3]], 2)


# ---- files ---------------------------------------------------------------------------------------------------------


def table(seed: int = 0, layers: int = LAYERS, fingerprint: str = "abc", heads: int = 1) -> Sensitivity:
    """Numbers that fall by about four with each bit, as real ones do, and differ a hundredfold between layers."""
    draw = np.random.default_rng(seed).uniform
    keys, values = (10.0 ** draw(-3, -1, (layers, heads, 1)) * np.array([1, 0.25, 0.06, 0.001]) for _ in range(2))
    return Sensitivity(fingerprint, 48, OPTIONS, keys, values)


@pytest.fixture
def file(tmp_path) -> str:
    path = tmp_path / "sensitivity.json"
    save_sensitivity(path, table())
    return str(path)


def test_a_table_is_written_and_read(file):
    found, written = load_sensitivity(file), table()
    assert (found.fingerprint, found.tokens, found.bits, found.layers) == ("abc", 48, OPTIONS, LAYERS)
    np.testing.assert_allclose(found.keys, written.keys, rtol=1e-3)
    np.testing.assert_allclose(found.values, written.values, rtol=1e-3)
    save_sensitivity(file, dataclasses.replace(written, tokens=96))
    assert load_sensitivity(file).tokens == 96


def record(**changes) -> str:
    layer = {"keys": [0.1, 0.01], "values": [0.2, 0.02]}
    good = {"memjax": "sensitivity", "version": 1, "fingerprint": "abc", "tokens": 9, "bits": [2, 3], "layers": [layer] * 4}
    return json.dumps({name: value for name, value in (good | changes).items() if value != "left out"})


WRONG_FILES = {
    "[1": "no sensitivity file",
    "[" * 100_000: "no sensitivity file",
    "[]": "JSON, but none that `memjax sensitivity` wrote",
    record(memjax="calibration"): "JSON, but none that `memjax sensitivity` wrote",
    record(version=2): "a sensitivity file of version 2, this memjax reads 1",
    record(bits="left out"): "a damaged sensitivity file: it lacks 'bits'",
    record(layers=[{"keys": [0.1, 0.01]}]): "a damaged sensitivity file: it lacks 'values'",
    record(layers=[]): "a damaged sensitivity file: keys must be a number for each layer, kv head and option, [0, 2], got [0]",
    record(layers=7): "a damaged sensitivity file: 'int' object is not iterable",
    record(bits=[2, 5]): "bits must be some of 2, 3, 4, 8 in ascending order, got [2, 5]",
    record(bits=[3, 2]): "bits must be some of 2, 3, 4, 8 in ascending order, got [3, 2]",
    record(bits=[2, 3, 4]): "keys must be a number for each layer, kv head and option, [4, 1, 3], got [4, 1, 2]",
    record(layers=[{"keys": [0.1], "values": [0.1, 0.1]}]): "for each layer, kv head and option, [1, 1, 2], got [1, 1, 1]",
    record(layers=[{"keys": [float("nan"), 0.1], "values": [0.1, 0.1]}]): "keys of layer 0 at 2 bits have nan, which is no KL",
    record(layers=[{"keys": [0.1, 0.1], "values": [0.1, -0.1]}]): "values of layer 0 at 3 bits have -0.1, which is no KL",
    record(layers=[{"keys": ["x", 0.1], "values": [0.1, 0.1]}]): "a damaged sensitivity file: could not convert",
    " " * (2**20 + 1): "has 1048577 bytes, a sensitivity file at most 1048576",
}


@pytest.mark.parametrize("number", range(len(WRONG_FILES)))
def test_damaged_files_are_refused(tmp_path, number):
    text, message = list(WRONG_FILES.items())[number]
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        load_sensitivity(path)
    assert str(path) in str(refused.value)


def test_files_of_other_models_are_refused(tiny, tmp_path, file):
    with pytest.raises(FileNotFoundError, match="no sensitivity file nowhere: measure this model with `memjax sensitivity"):
        mj.auto(file="nowhere").init([SPEC] * 4)
    with pytest.raises(ValueError, match="is of a model with 4 layers, this one has 3: measure this model"):
        mj.auto(file=file).init([SPEC] * 3)
    with pytest.raises(ValueError, match=rf"measured on another model \(fingerprint abc, this one is {tiny.fingerprint}\)"):
        mj.generate(tiny, [1, 2], policy=mj.auto(file=file))
    with pytest.raises(ValueError, match="brings along for smollm2-135m was measured on another model"):
        tiny.init_cache(mj.auto(), 1, 32)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is no sensitivity file: 'utf-8' codec"):
        load_sensitivity(tmp_path / "binary.json")


# ---- the policy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"), [(70, 70), ("70", 70), ("64MiB", 2**26), (" 1.5 kb ", 1500), ("2GiB", 2**31), ("3 B", 3), ("", 0)]
)
def test_ways_of_writing_bytes(text, count):
    assert byte_count(text) == count


@pytest.mark.parametrize("bad", ["64 potatoes", "MiB", "-4", -4, "1e3", "nan", True, None])
def test_what_is_no_number_of_bytes(bad):
    with pytest.raises(ValueError, match="bytes must be a number such as 67108864 or 64MiB"):
        mj.auto(bytes=bad)


def test_the_policys_arguments():
    assert mj.auto().codec == Auto(bits=3.25)
    assert mj.policy("auto(4)") == mj.auto(4) == mj.auto(bits=4.0)
    assert str(mj.auto(4)) == "auto(bits=4.0)"
    assert str(mj.auto(bytes="1MiB", file="f", centre="fixed")) == "auto(bytes=1048576,file=f,centre=fixed)"
    for wrong in ({"bits": 3, "bytes": 9}, {"bits": -1}, {"bits": float("nan")}, {"bits": float("inf")}, {"bits": None}):
        with pytest.raises(ValueError, match="auto needs either bits or bytes, a positive number"):
            mj.auto(**wrong)
    one_layer = "needs the specs of all layers of a model"
    for call in (mj.auto().init, lambda spec: mj.predict_nbytes(mj.auto(), spec), lambda spec: mj.abstract(mj.auto(), spec)):
        with pytest.raises(ValueError, match=one_layer):
            call(SPEC)


WIDE = dataclasses.replace(SPEC, capacity=150)
SPECS = [WIDE, dataclasses.replace(WIDE, window=90), dataclasses.replace(WIDE, capacity=40), WIDE]  # the third has no history


@pytest.mark.parametrize("bits", [3.0, 3.1, 3.7, 4.25, 6.0, 20])
def test_bits_are_the_ledgers_and_at_most_what_was_asked(file, bits):
    """At head_dim 16 a scale is one bit per value. The rest is less than what the cheapest upgrade costs."""
    policy = mj.auto(bits=bits, file=file)
    caches = mj.abstract(policy, SPECS)
    held = mj.nbytes(caches)
    assert held == mj.predict_nbytes(policy, SPECS)
    assert held.bits_per_value <= bits
    largest = next(s for s in SPECS if s.window is None)
    assert held.bits_per_value > min(bits, 8.9) - 4 * 2 / len(SPECS) * largest.capacity / 100
    assert all(cache.policy.front is None and cache.policy.resolved_front() == TurboQuant.front for cache in caches)


def widths(policies) -> list[int]:
    """Bits of every stream that TurboQuant or int8 codes."""
    streams = [stream for policy in policies for stream in (policy.codec.keys, policy.codec.values)]
    return [8 if isinstance(stream, Int8) else stream.bits for stream in streams]


def divergence(file: str, policies) -> float:
    measured = load_sensitivity(file)
    rows = np.concatenate([measured.keys, measured.values], axis=1).reshape(-1, len(OPTIONS))
    return sum(numbers[OPTIONS.index(b)] for numbers, b in zip(rows, widths(policies), strict=True))


def test_more_bits_are_never_worse_and_uniform_ones_no_better(file):
    found = [layer_policies(mj.auto(bits=bits, file=file), [WIDE] * LAYERS) for bits in np.arange(3.0, 9.5, 0.25)]
    assert widths(found[0]) == [2] * 8
    assert widths(found[-1]) == [8] * 8
    sums = [divergence(file, each) for each in found]
    assert sums == sorted(sums, reverse=True)
    for width in (3, 4):  # 4 and 5 bits with the scale
        mine, uniform = (mj.auto(bits=width + 1, file=file), mj.turboquant(width, width))
        assert mj.predict_nbytes(mine, [WIDE] * LAYERS).total <= mj.predict_nbytes(uniform, [WIDE] * LAYERS).total
        chosen = layer_policies(mine, [WIDE] * LAYERS)
        assert divergence(file, chosen) < divergence(file, [uniform] * LAYERS)
        assert len(set(widths(chosen))) > 1


@pytest.mark.parametrize("extra", ["", "+protect(2,8)", "+streaming(4,100)", "+host(16,8)"])
def test_bytes_are_what_the_whole_cache_takes(file, extra):
    """Windows, statistics and a recurrent layer included; the smallest that is named can be had, and no less."""
    specs = [*SPECS[:3], RecurrentSpec(2, 8, 4, 2, 4, 8)]
    with pytest.raises(ValueError, match=r"auto\(bytes=9\) is less than the smallest cache of these layers takes") as refused:
        mj.policy(f"auto(bytes=9,file={file}){extra}").init(specs)
    least = int(re.search(r"takes, (\d+) bytes", str(refused.value))[1])
    for asked in (least, least + 200, least + 1999, 10 * least):
        policy = mj.policy(f"auto(bytes={asked},file={file}){extra}")
        found = mj.nbytes(policy.init(specs))
        assert found == mj.predict_nbytes(policy, specs)
        assert found.device <= asked
    with pytest.raises(ValueError, match=rf"bytes={least - 1}\) is less"):
        mj.policy(f"auto(bytes={least - 1},file={file}){extra}").init(specs)
    with pytest.raises(ValueError, match=r"auto\(bits=2.9\) is less than the smallest of these layers, 3 with its scales"):
        mj.auto(2.9, file=file).init(SPECS)


def test_layers_of_other_policies_are_left_alone(file):
    policy = mj.protect_layers(mj.auto(bits=3.5, file=file), 1)
    found = layer_policies(policy, [WIDE] * LAYERS)
    assert [str(found[0]), str(found[3])] == ["dense", "dense"]
    assert mj.predict_nbytes(mj.per_layer(mj.dense(), {1: found[1], 2: found[2]}), [WIDE] * 4).history_values > 0
    middle = sum((mj.predict_nbytes(found[i], WIDE) for i in (1, 2)), mj.Bytes())
    assert middle.bits_per_value == 3.5
    dense = mj.predict_nbytes(mj.dense(), WIDE).device
    asked = 2 * dense + middle.device
    policy = mj.protect_layers(mj.auto(bytes=asked, file=file), 1)
    assert layer_policies(policy, [WIDE] * 4) == found
    both = mj.per_layer(mj.auto(bytes=asked, file=file), {0: mj.auto(bytes=asked + 1, file=file)})
    with pytest.raises(ValueError, match=r"one auto\(bytes=\.\.\.\) decides about a whole cache"):
        both.init([WIDE] * LAYERS)
    two = mj.per_layer(mj.auto(bytes=10**6, file=file), {0: mj.auto(bits=3.0, file=file)})
    assert widths(layer_policies(two, [WIDE] * LAYERS)) == [2, 2] + [8] * 6


def test_the_codec_of_a_layer():
    assert layer_codec(2, 4) == TurboQuant(2, 4)
    assert layer_codec(8, 3) == Pair(Int8(rotate=True), Lloyd(3, "search"))
    assert layer_codec(4, 3).front == layer_codec(8, 8).front
    with pytest.raises(ValueError, match="bits"):
        layer_codec(5, 3)


@pytest.mark.parametrize("sizes", [[40, 9]])
def test_a_cache_whose_keys_and_values_have_codecs_of_their_own(sizes):
    like = dataclasses.replace(row("int8+protect(2,8)"), codec=layer_codec(8, 4))
    tokens = qkv(3)
    policy = CachePolicy(codec=like.codec, windows=Windows(2, 8), front=OFF)
    cache = policy.init(SPEC)
    assert mj.nbytes(cache) == mj.predict_nbytes(policy, SPEC)
    found, _ = run(cache, tokens, sizes)
    np.testing.assert_allclose(found, oracle(like, tokens, sizes), atol=1e-4)
    keys_only, _ = run(plain("int8(rotate=true)+protect(2,8)").init(SPEC), tokens, sizes)
    assert relative_error(found, keys_only) > 0.005


# ---- the measurement -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts():
    return np.random.default_rng(5).integers(0, 61, (2, TEXT)).tolist()


@pytest.fixture(scope="module")
def measured(tiny, texts):
    done = []
    found = measure_sensitivity(tiny, texts, (2, 8), done.append)
    assert done == [f"layer {i + 1} of {LAYERS}" for i in range(LAYERS)] * 2
    return found


@pytest.mark.parametrize("which", slow_but([(3, 1)], [(0, 0), (3, 1)]), ids=str)
def test_a_number_is_what_compare_measures(tiny, texts, measured, which):
    """The whole model with a cache for each layer, one of which codes one stream."""
    layer, side = which
    streams = [Dense(), Dense()]
    streams[side] = stream_codec(2)
    coded = CachePolicy(codec=Pair(*streams), windows=Windows(4, 0))
    setup = Setup(chunk=TEXT, cache_dtype="float32", decode_tokens=0, static=True)
    policy = mj.per_layer(mj.dense(), {layer: coded})
    reader = Reader(tiny, TEXT + 1, setup)
    readings = [reader.read_text(text, [Job(policy, static=True)])[0] for text in texts]
    expected = np.mean([reading.kld_per_token() for reading in readings])
    found = (measured.keys, measured.values)[side][layer, 0, 0]
    assert found == pytest.approx(expected, rel=0.02)


def test_what_was_measured_serves_the_model(tiny, measured, tmp_path):
    assert (measured.fingerprint, measured.tokens, measured.layers) == (tiny.fingerprint, 2 * TEXT, LAYERS)
    assert (measured.keys[..., 0] > 5 * measured.keys[..., 1]).all()
    save_sensitivity(tmp_path / "tiny.json", measured)
    policy = mj.auto(bits=6, file=str(tmp_path / "tiny.json"))
    cache = tiny.init_cache(policy, 2, 120)
    assert sorted(set(widths([layer.policy for layer in cache]))) == [2, 8]
    assert 5 < mj.nbytes(cache).bits_per_value <= 6
    traces = []

    @jax.jit
    def decode(decoder, cache, tokens):
        traces.append(1)

        def step(cache, token):
            hidden, cache = decoder(token[:, None], cache)
            return cache, hidden[:, 0]

        return jax.lax.scan(step, cache, tokens)

    tokens = jnp.asarray(np.random.default_rng(6).integers(0, 61, (100, 2)), jnp.int32)
    found, hidden = decode(tiny.decoder, cache, tokens)
    decode(tiny.decoder, found, tokens)
    assert traces == [1]
    exact, _ = jax.jit(lambda decoder, tokens: decoder(tokens))(tiny.decoder, tokens.T)
    assert relative_error(hidden.swapaxes(0, 1), exact) < 0.1
    assert relative_error(hidden[:64].swapaxes(0, 1), exact[:, :64]) < 1e-4


@pytest.mark.slow
def test_auto_is_not_worse_than_uniform_bits_on_the_real_model(smollm2):
    """Static setting, the first tokens of two texts; the table that memjax brings along comes from later parts of them."""
    setup = Setup(chunk=256, cache_dtype="float32", decode_tokens=0, static=True)
    jobs = [Job(mj.policy(f"{text}+protect(4,0)"), static=True) for text in ("turboquant(3,3)", "auto(bits=3.25)")]
    reader = Reader(smollm2, 512, setup)
    for text in (NOVEL, CODE):
        readings = reader.read_text(smollm2.tokenizer.encode(text.read())[:512], jobs)
        uniform, mine = (reader.row(reading) for reading in readings)
        assert mine["bits_per_value"] <= uniform["bits_per_value"] == 3.25
        assert mine["bytes_device"] <= uniform["bytes_device"]
        assert mine["kld_mean"] <= uniform["kld_mean"]


def test_texts_that_cannot_be_measured(tiny):
    with pytest.raises(ValueError, match=r"texts of at least 8 tokens, got \[7\]"):
        measure_sensitivity(tiny, [[1] * 7])
    with pytest.raises(ValueError, match="texts of at least 8 tokens"):
        measure_sensitivity(tiny, [])
    with pytest.raises(ValueError, match=r"the model's sliding window of 24 tokens, got \[9, 25\]"):
        measure_sensitivity(tiny, [[1] * 9, [1] * 25])


def test_shardings_of_a_cache(file):
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4])
    policy = mj.auto(bits=3.5, file=file)
    places = mj.shardings(policy, SPECS, mesh)
    assert jax.tree.structure(places) == jax.tree.structure(mj.abstract(policy, SPECS))
