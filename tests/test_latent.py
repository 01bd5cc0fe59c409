"""Multi-head latent attention: both forms against each other and against its equations in numpy float64, and its cache."""

import collections
import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import numpy_softmax, quick_jit, relative_error
from flax import nnx

import memjax as mj
from memjax.cache.layer import commit_all
from memjax.models import latent
from memjax.models.config import LatentConfig
from memjax.models.latent import LatentAttention, latent_spec, naive_from, yarn_softmax_scale

BATCH, WIDTH, TOKENS, CAPACITY = 2, 24, 66, 80
SIZES = {"q_heads": 4, "kv_rank": 32, "nope_dim": 10, "rope_dim": 8, "value_dim": 6}
HALF_SPLIT = mj.Rope(8, theta=100.0)
INTERLEAVED = dataclasses.replace(HALF_SPLIT, interleaved=True)
YARN = mj.Rope(8, theta=100.0, kind="yarn", factor=8.0, original_max_position=16, mscale=0.5, mscale_all_dim=1.5)
CONFIGS = {
    "direct": LatentConfig(**SIZES, q_rank=None, rope=INTERLEAVED),
    "low rank, half-split, yarn": LatentConfig(
        **SIZES, q_rank=12, rope=YARN, scale=yarn_softmax_scale(18, YARN), bias=True, norm_eps=1e-3
    ),
    "low rank, interleaved, yarn": LatentConfig(
        **SIZES, q_rank=12, rope=dataclasses.replace(YARN, interleaved=True), scale=yarn_softmax_scale(18, YARN)
    ),
    "no norms, no rope": LatentConfig(**SIZES, q_rank=12, rope=None, latent_norm=False),
}
PLAIN = "direct"
TRACES = collections.Counter()  # of ``run`` with a cache, by its policy and the number of tokens


@functools.cache
def layer_of(name: str) -> LatentAttention:
    """Random weights, those of norms and biases too."""
    layer, rng = LatentAttention(CONFIGS[name], WIDTH, jnp.float32, nnx.Rngs(0)), np.random.default_rng(1)
    for path, param in nnx.to_flat_state(nnx.state(layer)):
        if path[-1] in ("scale", "bias"):
            param[...] = jnp.asarray(rng.uniform(0.5, 1.5, param.shape), jnp.float32)
    return layer


@functools.cache
def inputs() -> np.ndarray:
    return np.random.default_rng(7).standard_normal((BATCH, TOKENS, WIDTH)).astype(np.float32)


def _run(layer, x, cache=None, lengths=None, compress_first=False):
    """As a decoder of one layer does it."""
    if cache is None:
        return layer(x, None, lengths, compress_first)
    TRACES[str(cache.policy), x.shape[1]] += 1
    out, cache = layer(x, cache, lengths, compress_first)
    return out, commit_all((cache,))[0]


run = quick_jit(_run, static_argnames="compress_first")


def through(text: str, sizes, name=PLAIN, run=run, **how):
    """Outputs of tokens that come in chunks of ``sizes``, and the cache."""
    cache, outs, start = mj.policy(text).init(latent_spec(CONFIGS[name], BATCH, CAPACITY, "float32")), [], 0
    for size in sizes:
        out, cache = run(layer_of(name), inputs()[:, start : start + size], cache, **how)
        outs.append(np.asarray(out))
        start += size
    return np.concatenate(outs, axis=1), cache


def turned(x: np.ndarray, rope: mj.Rope | None) -> np.ndarray:
    """x [B, ..., T, dim] under its rotary embedding, as complex numbers."""
    if rope is None:
        return x
    half = rope.dim // 2
    pairs = x.reshape(*x.shape[:-1], half, 2) if rope.interleaved else x.reshape(*x.shape[:-1], 2, half).swapaxes(-1, -2)
    turns = np.exp(1j * np.arange(x.shape[-2])[:, None] * np.float64(rope.inv_freq(CAPACITY)))
    z = (pairs[..., 0] + 1j * pairs[..., 1]) * turns
    if rope.kind == "yarn":
        z = z * (0.1 * rope.mscale * np.log(rope.factor) + 1) / (0.1 * rope.mscale_all_dim * np.log(rope.factor) + 1)
    return np.stack([z.real, z.imag], axis=-1 if rope.interleaved else -2).reshape(x.shape)


@functools.cache
def oracle(name: str) -> np.ndarray:
    """The equations, head by head."""
    config = CONFIGS[name]
    w = {path: np.float64(p[...]) for path, p in nnx.to_flat_state(nnx.state(layer_of(name)))}
    x, t = np.float64(inputs()), np.arange(TOKENS)

    def linear(x, name):
        return x @ w[name, "kernel"] + w.get((name, "bias"), 0.0)

    def norm(x, name):
        if not config.latent_norm:
            return x
        return w[name, "scale"] * x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps)

    q = linear(x, "q") if config.q_rank is None else linear(norm(linear(x, "q_a"), "q_norm"), "q_b")
    kv = linear(x, "kv_a")
    latent, rotary = norm(kv[..., : config.kv_rank], "kv_norm"), turned(kv[..., config.kv_rank :], config.rope)
    factor = 1.0 if config.scale is None else (1 + 0.1 * YARN.mscale_all_dim * np.log(YARN.factor)) ** 2
    heads = []
    for head, queries in enumerate(np.split(q, config.q_heads, axis=-1)):
        plain, moved = queries[..., : config.nope_dim], turned(queries[..., config.nope_dim :], config.rope)
        keys, values = latent @ w["up_key",][head].T, latent @ w["up_value",][head]
        scores = plain @ keys.swapaxes(-1, -2) + moved @ rotary.swapaxes(-1, -2)
        heads.append(numpy_softmax(scores * factor / np.sqrt(config.nope_dim + config.rope_dim), t <= t[:, None]) @ values)
    return linear(np.concatenate(heads, axis=-1), "out")


# ---- two forms of one thing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_both_forms_are_the_equations(name):
    few = int(naive_from(CONFIGS[name]))
    naive, absorbed = run(layer_of(name), inputs())[0], through("dense", [few] * (TOKENS // few), name)[0]
    np.testing.assert_allclose(naive, oracle(name), atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(absorbed, oracle(name)[:, : absorbed.shape[1]], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "text",
    ["int8+protect(2,4)", *(pytest.param(x, marks=pytest.mark.slow) for x in ("streaming(0,12)", "protect(2,4)+host(8,4)"))],
)
def test_a_prompt_is_read_alike_in_both_forms(text, monkeypatch):
    """In chunks, so that both the committed and the new tokens count; what the cache then holds is the same, too."""
    sizes = [22, 22]
    naive, cache = through(text, sizes)
    monkeypatch.setattr(latent, "naive_from", lambda config: np.inf)
    absorbed, other = through(text, sizes, run=quick_jit(lambda *a: _run(*a)))
    np.testing.assert_allclose(naive, absorbed, atol=2e-5, rtol=1e-5)
    chex.assert_trees_all_equal(cache, other)


def test_bfloat16_weights_and_cache():
    layer, x = LatentAttention(CONFIGS[PLAIN], WIDTH, jnp.bfloat16, nnx.Rngs(0)), jnp.asarray(inputs()[:, :44], jnp.bfloat16)
    cache = mj.policy("dense").init(latent_spec(CONFIGS[PLAIN], BATCH, CAPACITY, "bfloat16"))
    whole, (first, cache) = run(layer, x)[0], run(layer, x[:, :22], cache)
    rest, _ = run(layer, x[:, 22:], cache)
    assert rest.dtype == jnp.bfloat16
    assert relative_error(np.float32(jnp.concatenate([first, rest], axis=1)), np.float32(whole)) < 0.02


def test_a_prompt_takes_fewer_operations_naively(monkeypatch):
    """With 66 new tokens, far above ``naive_from``; the scores are the same."""
    layer, cache = layer_of(PLAIN), mj.policy("dense").init(latent_spec(CONFIGS[PLAIN], BATCH, TOKENS, "float32"))

    def operations() -> float:
        return jax.jit(lambda *a: layer(*a, None, False)).lower(inputs(), cache).cost_analysis()["flops"]

    naive = operations()
    monkeypatch.setattr(latent, "naive_from", lambda config: np.inf)
    assert naive < operations()


def test_chunks_and_single_tokens_are_the_whole_pass():
    """And all decode steps are one program."""
    TRACES.clear()
    whole = oracle(PLAIN)
    for sizes in ([22, 22, 22], [1] * TOKENS):
        out, cache = through("dense", sizes)
        np.testing.assert_allclose(out, whole, atol=2e-5, rtol=1e-5)
        assert cache.length.tolist() == [TOKENS] * BATCH
    assert TRACES["dense", 1] == 1


@pytest.mark.parametrize(("text", "atol"), [("dense", 2e-5), ("h2o(12)+int8+protect(2,4)", 2e-3)])
def test_a_ragged_batch_is_its_rows_alone(text, atol):
    """Its padding holds NaN: in a chunk, and in the place of a decode step's token of a row that has ended."""
    layer, policy, start = layer_of(PLAIN), mj.policy(text), np.zeros(BATCH, np.int32)
    spec = latent_spec(CONFIGS[PLAIN], BATCH, 24, "float32")
    together, alone = policy.init(spec), [policy.init(dataclasses.replace(spec, batch=1)) for _ in range(BATCH)]
    for tokens, counts in ((16, (16, 9)), (1, (1, 1)), (1, (0, 1))):
        chunk, expected = np.full((BATCH, tokens, WIDTH), np.nan, np.float32), [None] * BATCH
        for row, count in enumerate(counts):
            if count:
                chunk[row, :count] = inputs()[row, start[row] : start[row] + count]
                expected[row], alone[row] = run(layer, chunk[row : row + 1, :count], alone[row])
        out, together = run(layer, chunk, together, jnp.array(counts, jnp.int32))
        for row, count in enumerate(counts):
            if count:
                np.testing.assert_allclose(out[row, :count], expected[row][0], atol=atol)
        start += counts
    assert together.length.tolist() == start.tolist()
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(together))


def test_the_naive_form_has_gradients_and_takes_padding():
    x, lengths = inputs().copy(), jnp.array([TOKENS, 40], jnp.int32)
    x[1, 40:] = np.nan

    @quick_jit
    def loss_and_gradients(layer, x):
        def loss(layer, x):
            out = layer(x, None, lengths, False)[0]
            return jnp.sum(jnp.where((jnp.arange(TOKENS) < lengths[:, None])[..., None], out**2, 0.0)), out

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layer, x)

    (_, out), gradients = loss_and_gradients(layer_of("low rank, half-split, yarn"), x)
    whole = oracle("low rank, half-split, yarn")
    np.testing.assert_allclose(out[0], whole[0], atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(out[1, :40], whole[1, :40], atol=2e-5, rtol=1e-5)
    for leaf in jax.tree.leaves(gradients):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0


# ---- what the cache makes of it --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [
        ("host(8,4)", 0.0, 1e-6),
        ("int8+protect(2,4)", 1e-4, 0.01),
        ("int4(rotate=true)+protect(2,4)", 0.01, 0.15),
        ("streaming(4,40)", 0.01, 0.6),
    ],
)
def test_policies(text, least, most):
    out, cache = through(text, [31, 31, 1, 1, 1, 1])
    assert least <= relative_error(out, oracle(PLAIN)) < most
    assert mj.nbytes(cache) == mj.predict_nbytes(mj.policy(text), cache.spec)


@pytest.mark.parametrize(("text", "least", "most"), [("dense", 0.0, 1e-6), ("int8+protect(0,0)", 1e-3, 0.02)])
def test_tokens_may_be_compressed_before_they_are_read(text, least, most):
    out, _ = through(text, [33, 33], compress_first=True)
    assert least <= relative_error(out, oracle(PLAIN)) < most


@pytest.mark.parametrize(("dtype", "itemsize"), [("bfloat16", 2), ("float32", 4)])
def test_a_token_costs_its_latent_and_its_rotary_part(dtype, itemsize):
    spec, policy = latent_spec(CONFIGS[PLAIN], BATCH, CAPACITY, dtype), mj.dense()
    found, token = mj.predict_nbytes(policy, spec), (SIZES["kv_rank"] + SIZES["rope_dim"]) * itemsize
    assert found == mj.nbytes(mj.abstract(policy, spec))
    assert found.total - found.counters == BATCH * CAPACITY * token


def test_bfloat16_stays_bfloat16():
    layer = nnx.eval_shape(lambda: LatentAttention(CONFIGS["low rank, half-split, yarn"], WIDTH, jnp.bfloat16, nnx.Rngs(0)))
    x, cache = jnp.asarray(inputs(), jnp.bfloat16), mj.dense().init(latent_spec(CONFIGS[PLAIN], BATCH, CAPACITY))
    for held in (None, cache):
        found = jax.eval_shape(lambda layer, x, held: layer(x, held, None, False), layer, x, held)
        floats = {leaf.dtype for leaf in jax.tree.leaves(found) if jnp.issubdtype(leaf.dtype, jnp.floating)}
        assert floats == {jnp.dtype("bfloat16")}


# ---- specs and scales ------------------------------------------------------------------------------------------------


def test_the_spec_of_a_layer():
    spec = latent_spec(CONFIGS["low rank, half-split, yarn"], 3, 100)
    assert (spec.batch, spec.kv_heads, spec.head_dim, spec.latent_dim, spec.q_heads) == (3, 1, 40, 32, 4)
    assert (spec.capacity, spec.dtype, spec.rope) == (100, "bfloat16", dataclasses.replace(YARN, start=32))
    assert spec.attention_scale == CONFIGS["low rank, half-split, yarn"].scale
    assert latent_spec(CONFIGS["no norms, no rope"], 1, 8).rope is None
    assert latent_spec(CONFIGS[PLAIN], 1, 8).attention_scale == 18**-0.5


@pytest.mark.parametrize(
    ("dim", "factor", "mscale_all_dim", "scale"),
    [
        (192, 40.0, 0.707, 0.114721),  # DeepSeek-V2-Lite
        (192, 40.0, 1.0, 0.135234),  # DeepSeek-V2, V3, R1
        (192, 32.0, 1.0, 0.130861),  # Kimi-K2
        (64, 40.0, None, 0.125),
        (64, 0.5, 1.0, 0.125),
    ],
)
def test_the_softmax_scale_under_yarn(dim, factor, mscale_all_dim, scale):
    rope = mj.Rope(64, kind="yarn", factor=factor, original_max_position=4096, mscale_all_dim=mscale_all_dim)
    assert yarn_softmax_scale(dim, rope) == pytest.approx(scale, abs=5e-7)
    assert yarn_softmax_scale(dim, dataclasses.replace(rope, kind="linear")) == yarn_softmax_scale(dim, None) == dim**-0.5
