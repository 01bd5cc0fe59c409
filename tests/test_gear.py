"""GEAR: what the correction captures of a codec's error, and attention over two streams."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import (
    DIM,
    HEADS,
    SPEC,
    Row,
    by_kv_head,
    numpy_rope,
    oracle,
    qkv,
    quick_jit,
    relative_error,
    run,
    step,
)
from jax.sharding import Mesh, PartitionSpec

import memjax as mj
from memjax.cache.layer import commit, commit_all
from memjax.quantize import Gear, Int2, Int4, Kivi, KVarN, TurboQuant
from memjax.quantize.gear import Corrected

TOKENS = 96


@functools.partial(quick_jit, static_argnums=0)
def fit(codec, x, real):
    return codec.fit(x, real)


@functools.partial(quick_jit, static_argnums=(0, 3))
def corrected(codec, directions, x, dtype):
    """What the base makes of vectors [B, K, H, T], and what the correction makes of that."""
    codec = codec.fitted(directions)
    codes = codec.encode(x, dtype)
    return codec.base.decode(codes.first), codec.decode(codes)


def vectors(seed: int = 0):
    """[2, 2, H, T] with channels of unlike sizes, so that errors have directions; the last third of row 1 is not real."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.standard_normal((2, 2, DIM, 1)))
    x = (sizes * rng.standard_normal((2, 2, DIM, TOKENS))).astype(np.float32)
    real = np.arange(TOKENS) < np.array([[[TOKENS]], [[TOKENS * 2 // 3]]])
    return x, real


PLAIN = "int2(centre=none,balance=off)"


@pytest.mark.parametrize("base", [Int2(), Kivi(2, 8).keys, Kivi(2, 8).values], ids=["int2", "kivi keys", "kivi values"])
@pytest.mark.parametrize("rank", [1, 4, DIM])
def test_what_is_left_is_the_tail_of_the_singular_values(base, rank):
    """On the tokens that were measured; those that are not real may hold anything."""
    x, real = vectors()
    only = np.where(real[:, :, None], x, np.float32(np.nan))
    directions = np.asarray(fit(Corrected(base, rank), only, real), np.float64)
    gram = np.einsum("bkhr,bkhs->bkrs", directions, directions)
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(rank), gram.shape), atol=1e-5)
    plain, found = (np.float64(each) for each in corrected(Corrected(base, rank), directions, x, "float32"))
    for row, count in enumerate(real.sum(-1)[:, 0]):
        for head in range(2):
            seen = np.s_[row, head, :, :count]
            tail = np.sum(np.linalg.svd(x[seen] - plain[seen], compute_uv=False)[rank:] ** 2)
            left = np.sum((x[seen] - found[seen]) ** 2)
            assert tail * (1 - 1e-4) - 1e-6 <= left <= tail * 1.02 + 1e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_token_has_more_error_than_before(dtype):
    """Tokens that were not measured neither, whose errors have other directions."""
    (x, real), (other, _) = vectors(0), vectors(1)
    codec = Corrected(Int2(), 4)
    plain, found = (np.asarray(each) for each in corrected(codec, fit(codec, x, real), other, dtype))
    before, after = (np.linalg.norm(other - each, axis=2) for each in (plain, found))
    assert (after <= before * (1 + 1e-5)).all()
    assert after.mean() < 0.97 * before.mean()


def test_an_exact_base_leaves_nothing_to_correct():
    codec, x = Corrected(Int4(), 2), np.full((1, 1, DIM, 5), 0.0, np.float32)
    directions = fit(codec, x, np.ones((1, 1, 5), bool))
    assert np.isfinite(directions).all()
    np.testing.assert_array_equal(corrected(codec, directions, x, "float32")[1], x)


@pytest.mark.parametrize("base", [Int4(True), Kivi(2, 32), TurboQuant(2, 3)], ids=lambda base: base.name)
@pytest.mark.parametrize(("dim", "rank", "sparse", "entries"), [(64, 4, 0, 0), (128, 2, 0.02, 3), (64, 0, 0.001, 1)])
def test_bits_are_those_of_the_buffers(base, dim, rank, sparse, entries):
    both = Gear(base, rank, sparse)
    for mine, theirs in ((both.keys, base.keys), (both.values, base.values)):
        codes = jax.eval_shape(lambda x, mine=mine: mine.encode(x, jnp.bfloat16), jnp.zeros((dim, 64)))
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(codes))
        expected = theirs.bits_per_value(dim) + 16 * (rank + 2 * entries) / dim
        assert 8 * held / (dim * 64) == mine.bits_per_value(dim) == expected


def with_outliers(seed: int = 0, size: float = 30.0, count: int = 2):
    """``vectors`` with ``count`` numbers per token at places of their own that are ``size`` and more, and where they are."""
    x, real = vectors(seed)
    rng = np.random.default_rng(seed + 100)
    planted = np.argsort(np.argsort(rng.random(x.shape), axis=2), axis=2) < count
    large = rng.choice([-1, 1], x.shape) * size * rng.uniform(1, 2, x.shape)
    return np.where(planted, large, x).astype(np.float32), real, planted


SPARSE_BASES = [Int2(), Int4(True), Kivi(2, 8).keys, Kivi(2, 8).values, TurboQuant(2, 2).keys, KVarN(2, 2, 8).keys]
SPARSE_IDS = ["int2", "rotated int4", "kivi keys", "kivi values", "turboquant", "kvarn keys"]


def straightforward(base, x, count: int, directions) -> np.ndarray:
    """What is made of one head's vectors [H, T], token by token in float64; the base's own coding is taken from the base."""
    x = np.float64(x)
    middle = np.zeros_like(x)
    if base.name == "kivi":
        for h in range(DIM):
            for t in range(x.shape[1]):
                group = x[h, t // 8 * 8 :][:8] if base.tile == 8 else x[h // 8 * 8 :, t][:8]
                middle[h, t] = np.median(group)
    rest, kept = x.copy(), np.zeros(x.shape, bool)
    for t in range(x.shape[1]):
        for channel in np.argsort(-np.abs(x[:, t] - middle[:, t]))[:count]:
            kept[channel, t], rest[channel, t] = True, middle[channel, t]
    coded = np.float64(quick_jit(lambda y: base.decode(base.encode(y, "float32")))(np.float32(rest)))
    error = np.where(kept, 0, x - coded)
    return np.where(kept, x, coded + directions @ (directions.T @ error))


@pytest.mark.parametrize("base", SPARSE_BASES[:4], ids=SPARSE_IDS[:4])
@pytest.mark.parametrize("rank", [0, 3])
def test_outliers_and_correction_are_what_they_are_said_to_be(base, rank):
    x, real, _ = with_outliers()
    codec = Corrected(base, rank, 0.2)
    assert codec.entries(DIM) == 3
    directions = fit(codec, x, real) if rank else None
    found = corrected(codec, directions, x, "float32")[1]
    for row in range(2):
        for head in range(2):
            each = np.zeros((DIM, 1)) if directions is None else np.float64(directions[row, head])
            expected = straightforward(base, x[row, head], 3, each)
            np.testing.assert_allclose(found[row, head], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 1e-6), ("bfloat16", 2**-8)])
@pytest.mark.parametrize("base", SPARSE_BASES, ids=SPARSE_IDS)
def test_planted_outliers_are_kept_and_cost_the_others_nothing(base, dtype, rounding):
    x, real, planted = with_outliers()
    plain, found = (Corrected(base, 2, sparse) for sparse in (0.0, 0.125))
    plain, found = (np.asarray(corrected(each, fit(each, x, real), x, dtype)[1]) for each in (plain, found))
    np.testing.assert_allclose(found[planted], x[planted], rtol=rounding)
    before, after = (np.mean((x - each)[~planted] ** 2) for each in (plain, found))
    assert after < before / 8


@pytest.mark.parametrize("base", SPARSE_BASES, ids=SPARSE_IDS)
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "outliers", "an offset"])
def test_outliers_apart_are_never_worse_on_average(base, kind):
    x, real = vectors()
    if kind == "heavy tails":
        x = np.random.default_rng(1).standard_t(2, x.shape).astype(np.float32)
    elif kind == "outliers":
        x = with_outliers(size=5.0, count=1)[0]
    elif kind == "an offset":
        x = x + 3 * np.random.default_rng(1).standard_normal((2, 2, DIM, 1)).astype(np.float32)
    errors = []
    for sparse in (0.0, 0.06, 0.2):
        codec = Corrected(base, 2, sparse)
        errors.append(np.mean((x - np.asarray(corrected(codec, fit(codec, x, real), x, "float32")[1])) ** 2))
    assert errors[2] < errors[1] < errors[0]


def test_a_number_that_is_none_does_not_become_plausible():
    x, codec = np.ones((DIM, 3), np.float32), Corrected(Int4(), 0, 0.1)
    x[3, 1], x[4, 2] = np.nan, np.inf
    found = np.asarray(codec.decode(codec.encode(jnp.asarray(x), "float32")))
    assert np.isnan([found[3, 1], found[4, 2]]).all()
    np.testing.assert_allclose(found[:, 0], 1, atol=0.1)


def test_places_survive_every_dtype_up_to_the_widest_head():
    x = np.zeros((256, 256), np.float32)
    np.fill_diagonal(x, 100.0)
    codec = Corrected(Int4(), 0, 0.001)
    for dtype in ("bfloat16", "float16", "float32"):
        np.testing.assert_array_equal(codec.decode(codec.encode(jnp.asarray(x), dtype)), x)


@functools.cache
def after_chunks(text: str):
    tokens, sizes = qkv(3), [7] * 7
    return tokens, sizes, *run(mj.policy(text).init(SPEC), tokens, sizes)


@pytest.mark.parametrize("sparse", [0, 0.1])
@pytest.mark.parametrize(("base", "codec", "tile"), [(PLAIN, Int2(), 1), ("kivi(2,8)", Kivi(2, 8), 8)])
def test_attention_reads_codes_and_their_correction(base, codec, tile, sparse):
    """As attention over vectors that were put together first, with the directions that the cache has measured."""
    tokens, sizes, out, cache = after_chunks(f"gear({base},4,sparse={sparse})+protect(2,8)")
    method = Gear(codec, 4, sparse)
    directions = (each[:, :, None] for each in (cache.basis.k_fit, cache.basis.v_fit))
    keys, values = (each.fitted(found) for each, found in zip((method.keys, method.values), directions, strict=True))
    row = Row("", SimpleNamespace(keys=keys, values=values, tile=tile), 2, 8)
    np.testing.assert_allclose(out, oracle(row, tokens, sizes), atol=2e-5)
    plain = relative_error(after_chunks(f"{base}+protect(2,8)")[2], oracle(Row("", sinks=2, recent=8), tokens, sizes))
    assert relative_error(out, oracle(Row("", sinks=2, recent=8), tokens, sizes)) < 0.8 * plain


@pytest.mark.parametrize(("base", "codec", "tile"), [(PLAIN, Int2(), 1), ("kivi(2,8)", Kivi(2, 8), 8)])
def test_directions_come_from_all_tokens_that_are_there(base, codec, tile):
    """When the first leaves: tokens 2 .. 13, or 2 .. 20 in tiles of eight, of which two are whole."""
    (_, k, v), _, _, cache = after_chunks(f"gear({base},4)+protect(2,8)")
    _, k, v = by_kv_head((k, k, v))
    k = numpy_rope(k, np.arange(k.shape[-2]), SPEC.rope.theta)
    seen = slice(2, 14) if tile == 1 else slice(2, 18)
    for x, stream, found in ((k, codec.keys, cache.basis.k_fit), (v, codec.values, cache.basis.v_fit)):
        x = np.float32(x[:, :, 0, seen].swapaxes(-1, -2))
        error = np.float64(x - quick_jit(lambda x, stream=stream: stream.decode(stream.encode(x, "float32")))(x))
        for row in range(2):
            for head in range(HEADS):
                captured = np.linalg.norm(np.asarray(found[row, head]).T @ error[row, head]) ** 2
                best = np.sum(np.linalg.svd(error[row, head], compute_uv=False)[:4] ** 2)
                assert 0.98 * best < captured < best * (1 + 1e-4)


def test_rows_of_a_ragged_batch_measure_their_own_tokens():
    """Row 1 is too short in the first chunks: its directions are those that it measures alone."""
    policy, tokens = mj.policy("gear(int2,4)+protect(2,4)"), tuple(x[:, :27] for x in qkv(4))
    cache, start, outs = policy.init(SPEC), 0, []
    for size, lengths in ((9, [9, 3]), (9, [9, 2]), (9, [9, 9])):
        chunk = [x[:, start : start + size] for x in tokens]
        out, cache = step(cache, *chunk, jnp.asarray(lengths, jnp.int32))
        outs.append(out[1, : lengths[1]])
        start += size
    own = [np.concatenate([x[1:, 0:3], x[1:, 9:11], x[1:, 18:27]], axis=1) for x in tokens]
    alone, single = run(policy.init(dataclasses.replace(SPEC, batch=1)), own, [3, 2, 9])
    np.testing.assert_allclose(np.concatenate(outs), alone[0], atol=1e-5)
    np.testing.assert_allclose(cache.basis.k_fit[1], single.basis.k_fit[0], atol=1e-5)
    assert np.abs(cache.basis.k_fit[0] - cache.basis.k_fit[1]).max() > 0.1


def test_layers_that_commit_together_keep_their_own_directions():
    policy, caches = mj.policy("gear(int2,4)+protect(0,0)"), []
    for seed in (0, 1):
        _, cache = run(policy.init(SPEC), tuple(x[:, :6] for x in qkv(seed)), [6])
        caches.append(quick_jit(mj.update)(cache, *(x[:, 6:8] for x in qkv(seed)[1:])))
    together = quick_jit(commit_all)(caches)
    for found, cache in zip(together, caches, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found.history, commit(cache).history)


def test_transforms_carry_the_correction():
    """A dense cache, quantized at full rank, with its worst tokens evicted, gives what the dense one would."""
    tokens = qkv(5)
    _, cache = run(mj.dense().init(SPEC), tokens, [40, 9])
    scores = jnp.asarray(np.random.default_rng(0).standard_normal((2, HEADS, SPEC.capacity)), jnp.float32)
    q = jnp.asarray(tokens[0][:, -1:])
    coded = mj.cache.quantize(cache, mj.gear("int2", DIM))
    assert not np.allclose(coded.basis.k_fit, np.eye(DIM), atol=0.1)
    for change in (lambda x: x, lambda x: mj.cache.evict(x, scores, 20)):
        expected, found = (mj.attend(change(each), q)[0] for each in (cache, coded))
        np.testing.assert_allclose(found, expected, atol=1e-4)
    assert mj.nbytes(coded) == mj.predict_nbytes(coded.policy, SPEC)


def test_every_array_has_its_place_on_a_mesh():
    policy, mesh = mj.policy("gear(int4,4)+protect(2,8)"), Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    placed = mj.shardings(policy, SPEC, mesh)
    assert jax.tree.structure(placed) == jax.tree.structure(mj.abstract(policy, SPEC))
    assert placed.basis.k_fit.spec == placed.history.k.second.data.spec == PartitionSpec("data", "model")


def test_the_front_end_is_the_bases():
    policy = mj.gear(mj.turboquant(2, 2, centre="fixed"), rank=2)
    assert policy.front.centre == "fixed"
    assert str(policy) == "gear(turboquant(2,2,centre=fixed),2)"
    assert mj.policy("gear(turboquant(2,2))").resolved_front() == TurboQuant.front
    assert mj.gear() == mj.policy("gear") == mj.policy("gear(int4,4)") == mj.policy("gear(rank=4,base=int4())")
    assert mj.gear("int4", 0, 0.02) == mj.policy("gear(int4,0,0.02)")
    assert str(mj.gear("int4", 0, 0.02)) == "gear(int4,0,sparse=0.02)"
    assert mj.policy("gear(int4,4,sparse=0)") == mj.gear()
    text = "streaming(4,16) + gear( base = kivi( 2, group=16 ), rank = 3 )"
    assert str(mj.policy(text)) == "streaming(4,16)+gear(kivi(2,16),3)"


WIDE = mj.CacheSpec(1, 1, 512, 64)
LATENT = mj.CacheSpec(1, 1, 48, 64, rope=mj.Rope(16, start=32), latent_dim=32)
WRONG = {
    "gear needs rank to be an integer of at least 1, got 0": lambda: mj.gear("int4", 0),
    "gear needs rank to be an integer of at least 0, got -1": lambda: mj.gear("int4", -1, 0.02),
    "gear needs sparse to be a share of the channels, 0 or more and below 0.5, got -0.1": lambda: mj.gear("int4", 4, -0.1),
    "below 0.5, got 0.5": lambda: mj.policy("gear(int4,4,sparse=0.5)"),
    "below 0.5, got nan": lambda: mj.policy("gear(int4,4,sparse=nan)"),
    "below 0.5, got True": lambda: Gear(Int4(), 4, True),
    "outliers of up to 256 channels, whose numbers bfloat16 holds": lambda: mj.gear("int4", 4, 0.02).init(WIDE),
    "gear corrects what a codec such as int4 loses, got dense": lambda: mj.gear("dense"),
    "gear adds a second stream of codes, and gear has two": lambda: Gear(Gear(Int4(), 2), 2),
    "gear corrects a codec such as int4 and nothing else, got int4.protect": lambda: mj.gear("int4+protect(4,8)"),
    "unknown policy 'int5'": lambda: mj.policy("gear(int5,4)"),
    "cannot read": lambda: mj.policy("gear(gear(kivi(2),2),2)"),
    "at most rank 16, got rank=17": lambda: mj.gear("int4", 17).init(SPEC),
    "gear stores two streams, of which a latent stream's rotary part is one": lambda: mj.gear("int4").init(LATENT),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_corrected_is_refused(message):
    with pytest.raises(ValueError, match=message):
        WRONG[message]()
