"""Bits by kv head: what heads cost, pools of heads with the same bits, and the measurement head by head."""

import dataclasses

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from cache_helpers import BATCH, GROUPS, ROPE, SPEC, Row, oracle, qkv, quick_jit, run, slow_but, step
from jax.sharding import Mesh
from test_auto import LAYERS, TEXT, table, widths

import memjax as mj
from memjax.cache.layer import LayerCache
from memjax.cache.policy import CachePolicy, Windows, layer_policies
from memjax.cache.pools import HeadPools, pools_of
from memjax.cache.transforms import offload, quantize
from memjax.data import CODE, NOVEL
from memjax.evaluate.compare import Job, Reader, Setup
from memjax.evaluate.sensitivity import measure_sensitivity
from memjax.quantize import ByHead, Dense, Int4, Int8, Pair
from memjax.quantize.auto import layer_codec, stream_codec
from memjax.quantize.front import OFF
from memjax.quantize.sensitivity import OPTIONS, load_sensitivity, save_sensitivity

HEADS = 4
WIDE = dataclasses.replace(SPEC, kv_heads=HEADS, q_heads=HEADS * GROUPS, capacity=150)
CODECS = (Int8(True), Int4(), Int8(True), Dense())  # heads 0 and 2 make a pool
MIXED = CachePolicy(codec=ByHead(CODECS), windows=Windows(2, 8), front=OFF)


@pytest.fixture
def file(tmp_path) -> str:
    path = tmp_path / "by_head.json"
    save_sensitivity(path, table(heads=HEADS))
    return str(path)


# ---- pools ---------------------------------------------------------------------------------------------------------


def head(tokens, index: int):
    """Queries, keys and values of one kv head."""
    q, k, v = tokens
    return q[:, :, GROUPS * index : GROUPS * (index + 1)], k[:, :, index : index + 1], v[:, :, index : index + 1]


@pytest.mark.parametrize("sizes", [[49], [20, 9, 1]], ids=str)
def test_every_head_is_read_under_its_own_codec(sizes):
    tokens = tuple(x[:, : sum(sizes)] for x in qkv(3, heads=HEADS))
    found, cache = run(MIXED.init(WIDE), tokens, sizes)
    assert [pool.part.heads for pool in pools_of(MIXED, WIDE)] == [(0, 2), (1,), (3,)]
    assert mj.nbytes(cache) == mj.predict_nbytes(MIXED, WIDE)
    for i, codec in enumerate(CODECS):
        expected = oracle(Row("one head", codec, 2, 8), head(tokens, i), sizes, ROPE.theta)
        np.testing.assert_allclose(found[:, :, GROUPS * i : GROUPS * (i + 1)], expected, atol=1e-4)


def test_heads_of_two_kinds_in_two_ways():
    """A pool for each kind and codec, retrieval heads first."""
    policy = dataclasses.replace(MIXED, evictor=mj.duo(heads="1101", sinks=2, window=12).evictor)
    pools = pools_of(policy, WIDE)
    assert [pool.part.heads for pool in pools] == [(0,), (1,), (3,), (2,)]
    assert [pool.policy.codec for pool in pools] == [CODECS[i] for i in (0, 1, 3, 2)]
    tokens = qkv(4, heads=HEADS)
    found, cache = run(policy.init(WIDE), tokens, [30, 19])
    assert mj.nbytes(cache) == mj.predict_nbytes(policy, WIDE)
    for i, evict in enumerate((None, None, (2, 12), None)):
        like = Row("one head", CODECS[i], 2, 8, evict, text_positions=True)
        expected = oracle(like, head(tokens, i), [30, 19], ROPE.theta)
        np.testing.assert_allclose(found[:, :, GROUPS * i : GROUPS * (i + 1)], expected, atol=1e-4)


def test_a_cache_of_such_heads_is_kept_and_given_back(tmp_path):
    _, cache = run(MIXED.init(WIDE), qkv(5, heads=HEADS), [49])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "cache", cache)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "cache", mj.abstract(MIXED, WIDE))
    assert restored.policy == MIXED
    jax.tree.map(np.testing.assert_array_equal, restored, cache)


def test_transforms_leave_heads_their_codecs():
    _, cache = run(MIXED.init(WIDE), qkv(5, heads=HEADS), [49])
    moved = quick_jit(lambda cache: offload(cache, mj.host(8, 4)))(cache)
    assert mj.nbytes(moved) == mj.predict_nbytes(mj.chain(MIXED, mj.host(8, 4)), WIDE)
    more = tuple(x[:, :1] for x in qkv(6, heads=HEADS))
    np.testing.assert_allclose(step(moved, *more)[0], step(cache, *more)[0], atol=1e-5)
    with pytest.raises(ValueError, match="quantize starts from a dense history, but this one is int8 already"):
        quantize(cache, mj.int4())


def test_pools_on_a_mesh():
    mesh = Mesh(np.asarray(jax.devices()[:2]).reshape(1, 2), ("data", "model"))
    with pytest.raises(ValueError, match=r"pools of 2 and 1 and 1 kv heads.* over the 2 devices .* say head_axis=None"):
        mj.shardings(MIXED, WIDE, mesh)
    assert isinstance(mj.shardings(MIXED, WIDE, mesh, head_axis=None), HeadPools)
    even = dataclasses.replace(MIXED, codec=ByHead((Int8(True), Int4(), Int8(True), Int4())))
    placed = mj.shardings(even, WIDE, mesh)
    assert jax.tree.structure(placed) == jax.tree.structure(mj.abstract(even, WIDE))


# ---- the policy ----------------------------------------------------------------------------------------------------


def test_the_policys_text(file):
    policy = mj.policy("auto(bits=3.5,by_head=true)")
    assert policy == mj.auto(3.5, by_head=True)
    assert str(policy) == "auto(bits=3.5,by_head=true)"
    assert str(CachePolicy(codec=MIXED.codec)) == "by_head(int8(rotate=true),int4,int8(rotate=true),dense)"
    with pytest.raises(ValueError, match=r"for smollm2-135m is of a model with 30 layers, this one has 4: .* --by-head"):
        policy.init([WIDE] * LAYERS)
    with pytest.raises(ValueError, match="has codecs for 4 kv heads, this layer has 2"):
        MIXED.init(SPEC)


def chosen(bits: float, file: str, by_head: bool, specs) -> list[CachePolicy]:
    return layer_policies(mj.auto(bits=bits, file=file, by_head=by_head), specs)


def promised(file: str, policies) -> float:
    """The divergence that the table promises."""
    measured, total = load_sensitivity(file), 0.0
    for layer, policy in enumerate(policies):
        codecs = policy.codec.codecs if isinstance(policy.codec, ByHead) else [policy.codec] * HEADS
        for i, codec in enumerate(codecs):
            pair = widths([dataclasses.replace(policy, codec=codec)])
            total += sum(m[layer, i, OPTIONS.index(b)] for m, b in zip((measured.keys, measured.values), pair, strict=True))
    return total


@pytest.mark.parametrize("bits", [3.0, 3.2, 3.75, 5.0, 20])
def test_bits_are_the_ledgers_and_spent_better_than_by_layer(file, bits):
    policy, specs = mj.auto(bits=bits, file=file, by_head=True), [WIDE] * LAYERS
    caches = mj.abstract(policy, specs)
    held = mj.nbytes(caches)
    assert held == mj.predict_nbytes(policy, specs)
    assert held.bits_per_value <= bits
    assert held.bits_per_value > min(bits, 8.9) - 4 / (2 * LAYERS * HEADS)  # less is left than the dearest upgrade costs
    by_head, by_layer = (chosen(bits, file, each, specs) for each in (True, False))
    alike = bits in (3.0, 20)  # the least and the most for all
    assert {type(each) for each in caches} <= {LayerCache} if alike else {type(each) for each in caches} >= {HeadPools}
    assert promised(file, by_head) == promised(file, by_layer) if alike else promised(file, by_head) < promised(file, by_layer)


@pytest.mark.parametrize("extra", ["", "+protect(2,8)", "+streaming(4,100)", "+host(16,8)", "+duo(heads=1010,window=40)"])
def test_bytes_are_what_the_whole_cache_takes(file, extra):
    """Pools of several heads keep fewer counters than one each, which is what is reckoned with."""
    specs, counters = [WIDE] * LAYERS, 8 * BATCH * HEADS * LAYERS
    dearest = 4 * SPEC.head_dim // 8 * BATCH * WIDE.capacity  # from 4 bits of one head's keys to 8
    text = f"auto(bytes=%s,file={file},by_head=true){extra}"
    with pytest.raises(ValueError, match=r"auto\(bytes=9\) is less than the smallest cache of these layers takes") as refused:
        mj.policy(text % 9).init(specs)
    least = int(str(refused.value).partition("takes, ")[2].split()[0])
    for asked in (least, least + 999, least + 9999, 10 * least):
        found = mj.nbytes(mj.abstract(mj.policy(text % asked), specs))
        assert found == mj.predict_nbytes(mj.policy(text % asked), specs)
        assert found.device <= asked
        assert found.device > asked - dearest - counters or asked == 10 * least


def test_what_heads_of_their_own_do_not_go_with(file):
    with pytest.raises(ValueError, match=r"each of a layer's 2 kv heads, but .* has 4 for a layer: .* --by-head"):
        mj.auto(file=file, by_head=True).init([SPEC] * LAYERS)
    save_sensitivity(file, table())
    with pytest.raises(ValueError, match=r"needs numbers for each of a layer's 4 kv heads, but .* has 1 for a layer"):
        mj.auto(file=file, by_head=True).init([WIDE] * LAYERS)
    for evictor in ("tova(128)", "adakv(128)", "kvzip(128)", "kvcompose(128)"):
        with pytest.raises(ValueError, match="decides about all heads of a layer together"):
            mj.policy(f"{evictor}+auto(bits=4,by_head=true)")


EVICTORS = ["h2o(40)", "snapkv(40)+massfold", "knorm(40)", "quest(64,4)", "expected_attention(40)"]


@pytest.mark.parametrize("evictor", slow_but(["h2o(40)", "quest(64,4)"], EVICTORS))
def test_heads_that_decide_for_themselves_do_so_in_pools(evictor):
    """What a head reads does not depend on which others share its pool."""
    policy = mj.chain(mj.policy(evictor), dataclasses.replace(MIXED, front=OFF))
    alike = dataclasses.replace(policy, codec=Int8(True))
    tokens = qkv(7, heads=HEADS, tokens=120)
    found, cache = run(policy.init(WIDE), tokens, [60, 60])
    expected, _ = run(alike.init(WIDE), tokens, [60, 60])
    assert mj.nbytes(cache) == mj.predict_nbytes(policy, WIDE)
    for i in (0, 2):
        own = slice(GROUPS * i, GROUPS * (i + 1))
        np.testing.assert_allclose(found[:, :, own], expected[:, :, own], atol=1e-5)


# ---- the measurement -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts():
    return np.random.default_rng(5).integers(0, 61, (2, TEXT)).tolist()


@pytest.fixture(scope="module")
def measured(tiny, texts):
    return measure_sensitivity(tiny, texts, (2, 8), by_head=True)


def test_a_number_is_what_compare_measures(tiny, texts, measured):
    """The whole model with a cache for each layer, one of which codes the values of one head."""
    heads, layer, which = tiny.config.blocks[0].mixer.kv_heads, 2, 1
    assert measured.heads == heads > 1
    codecs = [Pair(Dense(), stream_codec(2) if i == which else Dense()) for i in range(heads)]
    coded = CachePolicy(codec=ByHead(tuple(codecs)), windows=Windows(4, 0))
    reader = Reader(tiny, TEXT + 1, Setup(chunk=TEXT, cache_dtype="float32", decode_tokens=0, static=True))
    job = Job(mj.per_layer(mj.dense(), {layer: coded}), static=True)
    expected = np.mean([reader.read_text(text, [job])[0].kld_per_token() for text in texts])
    assert measured.values[layer, which, 0] == pytest.approx(expected, rel=0.02)


def test_heads_add_up_to_about_their_layer(tiny, texts, measured):
    whole = measure_sensitivity(tiny, texts, (2, 8))
    assert whole.heads == 1
    for heads, layer in ((measured.keys, whole.keys), (measured.values, whole.values)):  # 8 bits lose what rounding does
        np.testing.assert_allclose(heads.sum(axis=1)[:, 0], layer[:, 0, 0], rtol=0.5)


def test_a_file_by_head_serves_by_layer_too(tiny, measured, tmp_path):
    path = tmp_path / "tiny.json"
    save_sensitivity(path, measured)
    found = load_sensitivity(path)
    np.testing.assert_allclose(found.keys, measured.keys, rtol=1e-3)
    np.testing.assert_allclose(found.values, measured.values, rtol=1e-3)
    for by_head in (False, True):
        policy = mj.chain(mj.auto(bits=5.7, file=str(path), by_head=by_head), mj.protect(2, 4))
        cache = tiny.init_cache(policy, 2, 120)
        assert any(isinstance(layer, HeadPools) for layer in cache) == by_head  # 7 of 16 streams can have 8 bits
        assert mj.nbytes(cache).bits_per_value <= 5.7
    assert layer_codec(8, 8).front == ByHead(()).front


@pytest.mark.slow
def test_bits_by_head_are_not_worse_than_uniform_ones_on_the_real_model(smollm2):
    """Static setting, the first tokens of two texts; the table that memjax brings along comes from later parts of them."""
    setup = Setup(chunk=256, cache_dtype="float32", decode_tokens=0, static=True)
    policies = ("turboquant(3,3)+protect(4,0)", "auto(bits=3.25,by_head=true)+protect(4,0)")
    jobs = [Job(mj.policy(each), static=True) for each in policies]
    reader = Reader(smollm2, 512, setup)
    for text in (NOVEL, CODE):
        readings = reader.read_text(smollm2.tokenizer.encode(text.read())[:512], jobs)
        uniform, mine = (reader.row(reading) for reading in readings)
        assert mine["bits_per_value"] <= uniform["bits_per_value"] == 3.25
        assert mine["kld_mean"] < 0.95 * uniform["kld_mean"]
