"""DuoAttention: each kind of head against its oracle, in pools whose bytes are real, through all that caches go through."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from cache_helpers import (
    BATCH,
    CAPACITY,
    DIM,
    ROPE,
    TOKENS,
    Row,
    dense_oracle,
    in_chunks,
    numpy_rope,
    numpy_softmax,
    oracle,
    qkv,
    quick_jit,
    slow_but,
)
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import memjax as mj
from memjax.cache import evict, offload, quantize
from memjax.cache.layer import LayerCache
from memjax.cache.pools import HeadPools, pools_of
from memjax.evaluate.gates import CITIES, hide_and_recite, measure_gates
from memjax.evict import Duo, KVzip, Streaming
from memjax.evict.duo import choose
from memjax.evict.gates import Gates, load_gates, save_gates
from memjax.generate.reread import scores
from memjax.quantize.calibration import save_calibration

HEADS, GROUPS, KEPT, STREAMS = 3, 2, (0, 2), (1,)
SPEC = mj.CacheSpec(BATCH, HEADS, DIM, CAPACITY, "float32", rope=ROPE, q_heads=HEADS * GROUPS)
DUO = "duo(sinks=3,window=9,heads=101)"
TEXT = qkv(0, heads=HEADS)
PROJECTION = np.random.default_rng(9).standard_normal((HEADS * GROUPS, DIM, 24)).astype(np.float32)
SIZES = {"whole": [TOKENS], "chunks": [20, 20, 9], "tokens": [1] * TOKENS}


def queries_of(heads) -> list[int]:
    """The query heads of kv heads."""
    return [GROUPS * head + i for head in heads for i in range(GROUPS)]


def of_heads(tokens, heads):
    """What is left of (q, k, v) for some kv heads."""
    return tokens[0][:, :, queries_of(heads)], *(x[:, :, list(heads)] for x in tokens[1:])


@quick_jit
def step(cache, q, k, v, projection=None, lengths=None):
    return mj.attend(mj.update(cache, k, v, lengths, queries=q, output_projection=projection), q)


def run(cache, tokens, sizes, projection=None):
    """Outputs of tokens in chunks of ``sizes``, and the cache."""
    return in_chunks(step, cache, tokens, sizes, projection)


@functools.cache
def found(sizes: str):
    return run(mj.policy(DUO).init(SPEC), TEXT, SIZES[sizes])


# ---- what attention gives ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES)
def test_each_head_is_its_oracle(sizes):
    out, cache = found(sizes)
    window = Row("streaming(3,9,positions=text)", evict=(3, 9), text_positions=True)
    kept, streamed = queries_of(KEPT), queries_of(STREAMS)
    np.testing.assert_allclose(out[:, :, kept], dense_oracle(TEXT)[:, :, kept], atol=1e-5)
    np.testing.assert_allclose(out[:, :, streamed], oracle(window, TEXT, SIZES[sizes])[:, :, streamed], atol=1e-5)
    np.testing.assert_allclose(out, found("tokens")[0], atol=2e-6)
    assert np.abs(out - dense_oracle(TEXT))[:, 12:, streamed].max() > 0.1
    assert cache.length.tolist() == [TOKENS] * BATCH


def test_retrieval_heads_are_those_of_a_dense_cache():
    dense, _ = run(mj.dense().init(SPEC), TEXT, SIZES["chunks"])
    np.testing.assert_allclose(found("chunks")[0][:, :, queries_of(KEPT)], dense[:, :, queries_of(KEPT)], atol=1e-6)


@pytest.mark.parametrize(("heads", "evictor"), [("111", None), ("000", Streaming(3, 9, "text"))])
def test_heads_of_one_kind_are_a_plain_cache(heads, evictor):
    duo = mj.policy(f"duo(sinks=3,window=9,heads={heads})")
    plain = dataclasses.replace(mj.dense(), evictor=evictor)
    cache = duo.init(SPEC)
    assert isinstance(cache, LayerCache)
    assert cache.policy == plain
    assert mj.nbytes(cache) == mj.predict_nbytes(duo, SPEC) == mj.predict_nbytes(plain, SPEC)
    np.testing.assert_array_equal(run(cache, TEXT, [20, 29])[0], run(plain.init(SPEC), TEXT, [20, 29])[0])
    out, _ = duo.attend(duo.update(cache, *TEXT[1:]), TEXT[0])
    assert np.isfinite(out).all()


RAW = "centre=none,balance=off"
CODED = ["int4+protect(2,6)", f"turboquant(4,3,{RAW})+protect(2,6)", "kivi(2,8)+protect(2,6)"]
CODED += ["zipcache(4,2,16,8,0.5)+protect(2,4)", f"int8({RAW})+protect(2,6)+host(8,4)"]


@pytest.mark.parametrize("text", slow_but(CODED[:2], CODED))
def test_a_pool_is_what_its_heads_alone_would_be(text):
    policy = mj.policy("duo(sinks=4,window=16,heads=101)+" + text)
    out, cache = run(policy.init(SPEC), TEXT, [24, 24], PROJECTION)
    assert mj.nbytes(cache) == mj.predict_nbytes(policy, SPEC)
    for heads, alone in ((KEPT, mj.policy(text)), (STREAMS, mj.policy("streaming(4,16,positions=text)+" + text))):
        spec = dataclasses.replace(SPEC, kv_heads=len(heads), q_heads=GROUPS * len(heads))
        projection = PROJECTION[queries_of(heads)]
        expected, pool = run(alone.init(spec), of_heads(TEXT, heads), [24, 24], projection)
        np.testing.assert_allclose(out[:, :, queries_of(heads)], expected, atol=2e-3)
        assert jax.tree.structure(pool) == jax.tree.structure(cache.pools[heads == STREAMS])


def test_ragged_rows_are_what_each_gives_alone():
    policy, counts = mj.policy(DUO + f"+int8({RAW})+protect(2,4)"), [30, 17]
    q, k, v = (x[:, :30].copy() for x in TEXT)
    k[1, 17:], v[1, 17:] = np.nan, np.nan
    out, cache = step(policy.init(SPEC), q, k, v, None, jnp.asarray(counts, jnp.int32))
    assert mj.cache.policy.lengths((cache,)).tolist() == counts
    more = tuple(x[:, 40:41] for x in TEXT)
    after, _ = step(cache, *more)
    for row, count in enumerate(counts):
        one = dataclasses.replace(SPEC, batch=1)
        mine = tuple(x[row : row + 1, :count] for x in TEXT)
        expected, alone = run(policy.init(one), mine, [count])
        np.testing.assert_allclose(np.asarray(out)[row, :count], expected[0], atol=1e-5)
        np.testing.assert_allclose(after[row], step(alone, *(x[row : row + 1] for x in more))[0][0], atol=1e-5)


def test_an_overflow_spoils_all_heads_of_its_row():
    spec = dataclasses.replace(SPEC, capacity=24)
    lengths = jnp.asarray([30, 20], jnp.int32)
    out, _ = step(mj.policy(DUO).init(spec), *(x[:, :30] for x in TEXT), None, lengths)
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1, :20]).all()


# ---- bytes and programs --------------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_tokens_that_are_there():
    policy, spec = mj.policy("duo(heads=101)"), dataclasses.replace(SPEC, capacity=2048, dtype="bfloat16")
    predicted = mj.predict_nbytes(policy, spec)
    tokens = len(KEPT) * 2048 + len(STREAMS) * (64 + 256)
    counters = 2 * 2 * 4 * BATCH
    assert predicted.device == BATCH * tokens * 2 * DIM * 2 + counters
    assert mj.nbytes(mj.abstract(policy, spec)) == predicted
    assert predicted.device < 0.72 * mj.predict_nbytes(mj.dense(), spec).device
    _, cache = found("chunks")
    assert mj.nbytes(cache) == mj.predict_nbytes(mj.policy(DUO), SPEC)
    assert mj.nbytes(cache).device == sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert not policy.simulated()


def test_decode_steps_share_a_program():
    cache, traces = found("chunks")[1], []

    def decode(cache, token):
        traces.append(1)
        out, cache = mj.attend(mj.update(cache, *token[1:]), token[0])
        return cache, out

    tokens = tuple(np.moveaxis(x[:, :6, None], 1, 0) for x in qkv(3, heads=HEADS))
    looped, outs = jax.jit(lambda cache: jax.lax.scan(decode, cache, tokens))(cache)
    assert len(traces) == 1
    assert jax.tree.structure(looped) == jax.tree.structure(cache)
    for i in range(6):
        out, cache = step(cache, *(x[i] for x in tokens))
        np.testing.assert_allclose(out, outs[i], atol=1e-6)


# ---- tools ---------------------------------------------------------------------------------------------------------


MESH = Mesh(np.array(jax.devices("cpu")[:4]).reshape(2, 2), ("data", "model"))
WIDE = dataclasses.replace(SPEC, kv_heads=4, q_heads=8)


def test_pools_on_a_mesh_and_back_from_a_disk(tmp_path):
    policy, tokens = mj.policy("duo(sinks=3,window=9,heads=1001)+int8(centre=none)+protect(2,4)"), qkv(1, heads=4, tokens=24)
    placed = mj.shardings(policy, WIDE, MESH)
    heads = {leaf.spec for leaf in jax.tree.leaves(placed) if len(leaf.spec) == 2}
    assert heads == {PartitionSpec("data", "model")}
    where = NamedSharding(MESH, PartitionSpec("data", None, "model"))
    sharded = quick_jit(
        step.__wrapped__, in_shardings=(placed, where, where, where), out_shardings=(where, placed), donate_argnums=0
    )
    expected, alone = run(policy.init(WIDE), tokens, [12, 12])
    cache, outs = jax.jit(lambda: policy.init(WIDE), out_shardings=placed)(), []
    for start in (0, 12):
        out, cache = sharded(cache, *(x[:, start : start + 12] for x in tokens))
        outs.append(np.asarray(out))
    np.testing.assert_allclose(np.concatenate(outs, axis=1), expected, atol=1e-5)
    assert jax.tree.map(lambda x: x.sharding, cache) == placed

    abstract = jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), mj.abstract(policy, WIDE), placed
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "cache", alone)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "cache", abstract)
    assert isinstance(restored, HeadPools)
    assert restored.policy == policy
    jax.tree.map(np.testing.assert_array_equal, restored, alone)
    with pytest.raises(ValueError, match=r"pools of 3 and 1 kv heads, which do not all divide over the 2 .*multiple=2"):
        mj.shardings(mj.policy("duo(heads=1101)"), WIDE, MESH)
    assert isinstance(mj.shardings(mj.policy("duo(heads=1101)"), WIDE, MESH, head_axis=None), HeadPools)


def test_transforms_go_through_the_pools():
    before = found("chunks")[1]
    coded = mj.policy(f"int8({RAW})")
    after = quick_jit(lambda cache: quantize(cache, coded))(before)
    made = mj.chain(mj.policy(DUO), coded, mj.protect(0, 0))
    assert jax.tree.structure(after) == jax.tree.structure(made.init(SPEC))
    assert mj.nbytes(after) == mj.predict_nbytes(made, SPEC)
    more = tuple(x[:, :1] for x in qkv(4, heads=HEADS))
    np.testing.assert_allclose(step(after, *more)[0], step(before, *more)[0], atol=0.05)
    moved = quick_jit(lambda cache: offload(cache, mj.host(8, 4)))(before)
    assert mj.nbytes(moved) == mj.predict_nbytes(mj.policy(DUO + "+host(8,4)"), SPEC)
    np.testing.assert_allclose(step(moved, *more)[0], step(before, *more)[0], atol=1e-5)
    pair = jax.eval_shape(lambda cache: quantize((cache, cache), coded), before)
    assert [type(each) for each in pair] == [HeadPools] * 2
    for caches in (before, (before,)):
        with pytest.raises(ValueError, match=r"heads of this one lie in pools .*; leave duo"):
            evict(caches, [np.zeros((BATCH, HEADS, 4))], 2)


def test_a_calibration_file_is_about_all_heads(tmp_path):
    draw, file = np.random.default_rng(0), str(tmp_path / "file.safetensors")
    layer = {f"{side}_{what}": draw.standard_normal((HEADS, DIM, DIM)) for side in "kv" for what in ("balance", "inverse")}
    save_calibration(file, [layer], {"fingerprint": "abc", "tokens": 9})
    coded = f"int8(calibration={file})+protect(2,4)"
    policy, whole = mj.policy(f"{DUO}+{coded}"), mj.policy(coded).init(SPEC).basis
    cache = policy.init(SPEC)
    assert mj.nbytes(cache) == mj.predict_nbytes(policy, SPEC)
    for pool, heads in zip(cache.pools, (KEPT, STREAMS), strict=True):
        jax.tree.map(lambda a, b, heads=heads: np.testing.assert_array_equal(a, b[:, list(heads)]), pool.basis, whole)


# ---- which heads ---------------------------------------------------------------------------------------------------


GATES = Gates("", "by hand", ((0.9, 0.1), (0.5, 0.8), (0.0, 0.2), (0.7, 0.6)))


@pytest.mark.parametrize(
    ("share", "multiple", "heads"),
    [
        (0.5, 1, ("10", "01", "00", "11")),
        (0.25, 1, ("10", "01", "00", "00")),
        (0.4, 1, ("10", "01", "00", "10")),
        (1.0, 1, ("11",) * 4),
        (0.0, 1, ("00",) * 4),
        (0.5, 2, ("00", "11", "00", "11")),
    ],
)
def test_the_largest_gates_of_the_model_retrieve(share, multiple, heads):
    assert choose(GATES, share, multiple) == heads


@pytest.fixture
def file(tmp_path) -> str:
    save_gates(tmp_path / "gates.json", GATES)
    return str(tmp_path / "gates.json")


def test_a_file_is_read_as_it_was_written(file):
    assert load_gates(file) == GATES
    assert json.loads(Path(file).read_text())["layers"] == [[0.9, 0.1], [0.5, 0.8], [0.0, 0.2], [0.7, 0.6]]


def test_layers_get_the_heads_of_the_file(file):
    policy, two = mj.duo(0.5, 3, 9, file), dataclasses.replace(SPEC, kv_heads=2, q_heads=4)
    caches = policy.init([two] * 4)
    assert [type(each) for each in caches] == [HeadPools, HeadPools, LayerCache, LayerCache]
    assert caches[1].policy.evictor == Duo(sinks=3, window=9, heads="01")
    assert [each.policy.evictor for each in caches[2:]] == [Streaming(3, 9, "text"), None]
    assert mj.nbytes(caches) == mj.predict_nbytes(policy, [two] * 4)
    assert mj.policy(str(policy)) == policy
    assert mj.policy(str(caches[0].policy)) == caches[0].policy
    ends = mj.protect_layers(policy, 1)
    assert [type(each) for each in ends.init([two] * 4)] == [LayerCache, HeadPools, LayerCache, LayerCache]
    everything = mj.duo(1, file=file).init([two] * 4)
    assert {each.policy for each in everything} == {mj.dense()}
    mixed = (two, mj.RecurrentSpec(2, 24, 4, 2, 8, 6), two, two)
    assert mj.nbytes(policy.init(mixed)) == mj.predict_nbytes(policy, mixed)


def test_a_model_generates_with_it(tiny, file):
    """Token by token as in one piece, and what the pools of several layers do together is what each does."""
    policy = mj.chain(mj.duo(0.5, 2, 5, file), mj.policy(f"int8({RAW})+protect(2,3)"))
    tokens = np.random.default_rng(2).integers(0, 60, (2, 12)).astype(np.int32)
    cache = tiny.init_cache(policy, 2, 32, "float32")
    hidden, whole = quick_jit(lambda decoder, cache: decoder(tokens, cache))(tiny.decoder, cache)
    assert [each.staged for each in mj.cache.layer.layer_caches(whole)] == [None] * 6
    one = quick_jit(lambda decoder, token, cache: decoder(token, cache))
    dense = tiny.init_cache(mj.dense(), 2, 32, "float32")
    for i in range(12):
        out, cache = one(tiny.decoder, tokens[:, i : i + 1], cache)
        expected, dense = one(tiny.decoder, tokens[:, i : i + 1], dense)
        if i < 5:  # nothing has been left out yet
            np.testing.assert_allclose(out, expected, atol=0.05)
    assert jax.tree.structure(cache) == jax.tree.structure(whole)
    assert np.abs(np.asarray(out[:, 0] - hidden[:, -1])).max() < 0.2
    with pytest.raises(ValueError, match="but duo keeps them in pools"):
        scores(tiny, whole, tokens.tolist(), KVzip(9), instruction=[1])


# ---- the measurement -----------------------------------------------------------------------------------------------


def test_gates_are_what_streaming_changes(tiny):
    """Against float64, head by head; one layer has no rotary embedding, one a window of its own."""
    text, recited, sinks, window = np.random.default_rng(6).integers(0, 60, 40), 7, 2, 9
    done = []
    gates = measure_gates(tiny, text, recited, sinks, window, done.append)
    assert done == [f"layer {i + 1} of 4" for i in range(4)]
    assert gates.fingerprint == tiny.fingerprint
    x, t, expected = tiny.decoder.embed(text[None]), np.arange(40), []
    distance = t[:, None] - t
    for layer, rope, own in zip(tiny.decoder.layers, tiny.config.ropes, tiny.config.windows, strict=True):
        q, k, v = (np.asarray(y[0], np.float64).swapaxes(0, 1) for y in layer.mixer.project(layer.mixer_norm(x)))
        q, k = (numpy_rope(y, t, rope and rope.theta) for y in (q, k))
        kernel = np.asarray(layer.mixer.out.kernel[...], np.float64).reshape(len(k), -1, q.shape[-1], x.shape[-1])
        logits = q.reshape(len(k), -1, *q.shape[1:]) @ k[:, None].swapaxes(-1, -2) / np.sqrt(q.shape[-1])
        seen = (distance >= 0) & (distance < (own or 40))
        masks = seen, seen & ((t < sinks) | (distance < window))
        whole, short = (np.einsum("kgrh,kghd->krd", numpy_softmax(logits, m) @ v[:, None], kernel) for m in masks)
        behind = np.square(np.asarray(x[0], np.float64) + whole.sum(0)).sum(-1)
        expected.append(np.sqrt((np.square(whole - short).sum(-1) / behind)[:, -recited:].mean(-1)))
        x, _ = layer(x, None, None, False)
    np.testing.assert_allclose(gates.layers, np.array(expected) / np.max(expected), rtol=1e-3)
    with pytest.raises(ValueError, match="of more than the 40 tokens of sinks and window before what is recited, got 40"):
        measure_gates(tiny, text, recited, 20, 20)


class Letters:
    """A tokenizer of characters."""

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        return [ord(letter) for letter in text]


def test_the_recital_says_what_is_hidden():
    words = Letters().encode("word " * 400)
    ids, recited = hide_and_recite(Letters(), words, 300)
    hidden, recital = "".join(map(chr, ids[:-recited])), "".join(map(chr, ids[-recited:]))
    assert len(hidden) == len(words)
    said = dict(re.findall(r"(\w+) = (\d{5})", recital))
    assert set(said) == set(CITIES)
    assert all(hidden[:-300].count(f"{city} = {number}") == 2 for city, number in said.items())
    assert "=" not in hidden[-300:]
    with pytest.raises(ValueError, match="cannot hide a pass key"):
        hide_and_recite(Letters(), words[:500], 300)


def test_the_file_that_comes_along_has_heads_of_both_kinds():
    gates = load_gates()
    assert [len(row) for row in gates.layers] == [3] * 30
    chosen = "".join(choose(gates, 0.5))
    assert chosen.count("1") == 45
    kinds = {type(each) for each in mj.abstract(mj.duo(0.5), [dataclasses.replace(SPEC, capacity=1024)] * 30)}
    assert kinds == {HeadPools, LayerCache}


def test_bad_input(tiny, file, tmp_path):
    latent = mj.CacheSpec(1, 1, 20, 40, latent_dim=16)
    cases = {
        "share of the heads between 0 and 1, got 1.5": lambda: mj.duo(1.5),
        "share of the heads between 0 and 1, got nan": lambda: mj.duo(float("nan")),
        "window to be an integer of at least 1, got 0": lambda: mj.duo(window=0),
        "sinks to be an integer of at least 0, got -1": lambda: mj.duo(sinks=-1),
        "heads as zeros and ones, such as 101 for a layer of three, got '1x'": lambda: mj.duo(heads="1x"),
        "heads=10 or chooses them by share": lambda: mj.duo(0.25, heads="10"),
        "a latent stream is one for all": lambda: mj.duo(heads="1").init(latent),
        "needs the specs of all its layers": lambda: mj.duo().init(SPEC),
        "for 2 kv heads (10), this layer has 3": lambda: mj.duo(heads="10").init(SPEC),
        "a model with 4 layers, this one has 2": lambda: mj.duo(file=file).init([SPEC] * 2),
        "kinds for 2 kv heads (10), this layer has 3": lambda: mj.duo(file=file).init([SPEC] * 4),
        "by 3, which does not divide the 2 kv heads of layer 0": lambda: mj.duo(file=file, multiple=3).init([SPEC] * 4),
        "memjax brings along for smollm2-135m was measured on another model": lambda: tiny.init_cache(mj.duo(), 1, 8),
        "both decide eviction": lambda: mj.policy("duo(0.5)+h2o(64)"),
        "massfold folds tokens that a budget lets go": lambda: mj.policy("duo(0.5)+massfold"),
        "no gates file nowhere: measure this model with `memjax gates": lambda: mj.duo(file="nowhere").init([SPEC]),
    }
    for message, call in cases.items():
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
            call()
    good = {"memjax": "gates", "version": 1, "fingerprint": "", "how": "", "layers": [[0.5]]}
    damaged = {
        "none that `memjax gates` wrote": {"memjax": "sensitivity"},
        "a gates file of version 2, this memjax reads 1": {"version": 2},
        "it lacks 'layers'": {"layers": None},
        "got none": {"layers": []},
        "between 0 and 1, got 1.5 for head 1 of layer 0": {"layers": [[0.5, 1.5]]},
        "between 0 and 1, got 'x'": {"layers": [["x"]]},
        "is a damaged gates file: 'int' object": {"layers": 7},
    }
    for i, (message, changes) in enumerate(damaged.items()):
        record = {key: value for key, value in (good | changes).items() if value is not None}
        path = tmp_path / f"{i}.json"
        path.write_text(json.dumps(record))
        with pytest.raises(ValueError, match=re.escape(message)):
            load_gates(path)


def test_queries_are_told_apart_by_their_groups():
    cache = mj.policy(DUO).init(SPEC)
    x = np.arange(HEADS * GROUPS)[None, None, :, None] * np.ones((1, 1, 1, 2))
    parts = cache.split(jnp.asarray(x), 2)
    assert [np.asarray(part)[0, 0, :, 0].tolist() for part in parts] == [[0, 1, 4, 5], [2, 3]]
    np.testing.assert_array_equal(cache.join(parts, 2), x)
    assert [pool.spec.q_heads for pool in pools_of(cache.policy, SPEC)] == [4, 2]
