"""The Mamba-2 mixer against its definition, token by token in numpy float64; chunks, ragged batches and gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import quick_jit, relative_error
from flax import nnx

import memjax as mj
from memjax.models.config import MambaConfig
from memjax.models.mamba import Mamba, recurrent_spec

BATCH, WIDTH, EPS, CHUNK, LONG = 2, 12, 1e-5, 8, 27
CONFIG = MambaConfig(heads=4, head_dim=4, state_dim=6, chunk=CHUNK)
CONFIGS = {
    "plain": CONFIG,
    "groups": dataclasses.replace(CONFIG, groups=2),
    "groups, biases, limits": dataclasses.replace(CONFIG, groups=4, bias=True, step_limits=(0.4, 0.9), conv_width=2),
    "no convolution": dataclasses.replace(CONFIG, conv_width=1, conv_bias=False),
}
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@functools.cache
def layer(config=CONFIG, dtype=jnp.float32):
    """Random weights, drawn in numpy: a layer's own start is many small programs."""
    rng = np.random.default_rng(1)
    centres = {"scale": 1.0, "a_log": 1.0}
    spreads = {"kernel": WIDTH**-0.5, "conv_kernel": 0.5, "dt_bias": 2.0}

    def drawn(path, variable):
        value = centres.get(path[-1], 0.0) + spreads.get(path[-1], 0.4) * rng.standard_normal(variable.shape)
        return path, variable.replace(jnp.asarray(value.astype(np.float32), variable.dtype))

    graphdef, state = nnx.split(nnx.eval_shape(lambda: Mamba(config, WIDTH, EPS, dtype, nnx.Rngs(0))))
    return nnx.merge(graphdef, nnx.from_flat_state([drawn(*each) for each in nnx.to_flat_state(state)]))


@functools.cache
def strong_layer(chunk):
    """Heads that forget at once, and one that hardly does; step sizes from 0 to 60."""
    config = dataclasses.replace(CONFIG, chunk=chunk)
    graphdef, state = nnx.split(layer(config))
    kernel = np.array(state["inputs"]["kernel"][...])
    kernel[:, -config.heads :] *= 20
    state["inputs"]["kernel"].set_value(jnp.asarray(kernel))
    state["a_log"].set_value(jnp.asarray(np.log(np.float32([0.01, 1.0, 30.0, 1000.0]))))
    return nnx.merge(graphdef, state)


@functools.cache
def some_tokens(tokens=LONG):
    return np.random.default_rng(2).standard_normal((BATCH, tokens, WIDTH)).astype(np.float32)


def empty(config=CONFIG, batch=BATCH):
    return mj.dense().init(recurrent_spec(config, batch))


@quick_jit
def run(layer, x, cache, lengths=None):
    return layer(x, cache, lengths, False)


def oracle(layer, inputs):
    """Per row: outputs [T, D], the state after each token and the columns of the convolution, W - 1 zeros first."""
    config = layer.config
    w = {".".join(path): np.float64(v[...].astype(jnp.float32)) for path, v in nnx.to_flat_state(nnx.state(layer))}
    return tuple(zip(*(oracle_row(config, w, row) for row in np.float64(inputs)), strict=True))


def oracle_row(config, w, row):
    projected = row @ w["inputs.kernel"] + w.get("inputs.bias", 0.0)
    gate, xbc, dt = np.split(projected, [config.inner, config.inner + config.conv_dim], axis=-1)
    columns = np.concatenate([np.zeros((config.conv_width - 1, config.conv_dim)), xbc])
    state = np.zeros((config.heads, config.head_dim, config.state_dim))
    outs, states = [], []
    for t in range(len(row)):
        u = (columns[t : t + config.conv_width] * w["conv_kernel"]).sum(0) + w.get("conv_bias", 0.0)
        x, b, c = np.split(u / (1 + np.exp(-u)), [config.inner, config.inner + config.groups * config.state_dim])
        x = x.reshape(config.heads, -1)
        b, c = (np.repeat(each.reshape(config.groups, -1), config.heads // config.groups, axis=0) for each in (b, c))
        step = np.clip(np.logaddexp(dt[t] + w["dt_bias"], 0), *config.step_limits)[:, None]
        decay = np.exp(-np.exp(w["a_log"])[:, None] * step)
        state = decay[..., None] * state + (step * x)[..., None] * b[:, None]
        y = (state @ c[..., None])[..., 0] + w["skip"][:, None] * x
        y = y.reshape(-1) * gate[t] / (1 + np.exp(-gate[t]))
        y = w["norm.scale"] * y / np.sqrt((y * y).mean() + EPS)
        outs.append(y @ w["out.kernel"] + w.get("out.bias", 0.0))
        states.append(state)
    return np.stack(outs), np.stack(states), columns


@functools.cache
def expected(name="plain"):
    return oracle(layer(CONFIGS[name]), some_tokens())


def check_cache(cache, config, expected, tokens):
    """The state after ``tokens`` [B] of the rows."""
    _, states, columns = expected
    assert cache.length.tolist() == list(tokens)
    for row, count in enumerate(tokens):
        np.testing.assert_allclose(cache.state[row], states[row][count - 1], **TOLERANCE)
        np.testing.assert_allclose(cache.conv[row], columns[row][count : count + config.conv_width - 1], **TOLERANCE)


def check_parts(name, sizes):
    """Parts of the tokens, one after the other, against the definition."""
    config, tokens, cache, outs = CONFIGS[name], sum(sizes), empty(CONFIGS[name]), []
    for part in np.split(some_tokens()[:, :tokens], np.cumsum(sizes)[:-1], axis=1):
        out, cache = run(layer(config), part, cache)
        outs.append(np.asarray(out))
    np.testing.assert_allclose(np.concatenate(outs, axis=1), np.stack(expected(name)[0])[:, :tokens], **TOLERANCE)
    check_cache(cache, config, expected(name), [tokens] * BATCH)


@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_and_single_tokens_equal_the_definition(name):
    """Three chunks, the last of them padded, then the recurrent form from their state."""
    check_parts(name, [2 * CHUNK + 1, 1, 1])


BORDERS = [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK]


@pytest.mark.parametrize("sizes", [*([n, 1] for n in BORDERS), [7, 9, 1, 8, 2], [17, 9], [1, 2, 2, 8, 1, 1]], ids=str)
def test_chunk_borders_and_uneven_parts(sizes):
    """n tokens and one more, and what any part leaves to the next."""
    check_parts("plain", sizes)


@pytest.mark.parametrize("name", ["plain", "groups, biases, limits", "no convolution"])
def test_ragged_rows_equal_each_row_alone(name):
    """Padding of NaN in chunks, in the last columns of the convolution, and in decode steps of which a row has none."""
    config, done = CONFIGS[name], np.zeros(BATCH, int)
    cache, outs = empty(config), expected(name)[0]
    for size, counts in [(19, [3, 17]), (7, [0, 2]), (7, [7, 1]), (1, [1, 0]), (1, [0, 1])]:
        x = np.full((BATCH, size, WIDTH), np.nan, np.float32)
        for row, count in enumerate(counts):
            x[row, :count] = some_tokens()[row, done[row] : done[row] + count]
        out, cache = run(layer(config), x, cache, jnp.array(counts))
        for row, count in enumerate(counts):
            np.testing.assert_allclose(out[row, :count], outs[row][done[row] : done[row] + count], **TOLERANCE)
        done += counts
        check_cache(cache, config, expected(name), done)


def test_a_row_without_tokens():
    """It stays at zero, whatever the other rows do."""
    x = np.stack([np.full_like(some_tokens()[0, :19], np.inf), some_tokens()[1, :19]])
    _, cache = run(layer(), x, empty(), jnp.array([0, 19]))
    assert cache.length.tolist() == [0, 19]
    assert float(jnp.abs(cache.state[0]).max()) == float(jnp.abs(cache.conv[0]).max()) == 0.0
    np.testing.assert_allclose(cache.state[1], expected()[1][1][18], **TOLERANCE)


def test_strong_decays_leave_weak_ones_exact():
    """Sums of thousands within a chunk, between tokens that hardly decay: their differences need all digits."""
    outs, states, _ = oracle(strong_layer(64), some_tokens(60))
    out, cache = run(strong_layer(64), some_tokens(60), empty())
    for head in range(CONFIG.heads):
        reference = np.stack(states)[:, -1, head]
        np.testing.assert_allclose(cache.state[:, head], reference, rtol=1e-5, atol=1e-5 * np.abs(reference).max())
    assert relative_error(out, np.stack(outs)) < 3e-6


def token_by_token(layer, x):
    def step(cache, token):
        out, cache = layer(token[:, None], cache, None, False)
        return cache, out[:, 0]

    return jax.lax.scan(step, empty(), x.swapaxes(0, 1))[1].swapaxes(0, 1)


def without_cache(layer, x, lengths):
    out, cache = layer(x, None, lengths, False)
    assert cache is None
    return out


def test_chunks_and_single_tokens_have_the_same_gradients():
    """And the same values: with padding of NaN, and decays whose exp overflows above the diagonal."""
    graphdef, state = nnx.split(strong_layer(CHUNK))
    x, lengths = jnp.asarray(some_tokens(19)), jnp.array([19, 11])
    real = (jnp.arange(19) < lengths[:, None])[..., None]
    target = jnp.asarray(np.random.default_rng(3).standard_normal(x.shape).astype(np.float32))

    def loss(state, chunked):
        model = nnx.merge(graphdef, state)
        out = without_cache(model, jnp.where(real, x, jnp.nan), lengths) if chunked else token_by_token(model, x)
        return jnp.sum(jnp.where(real, out * target, 0))

    chunks, tokens = (quick_jit(jax.value_and_grad(functools.partial(loss, chunked=each)))(state) for each in (True, False))
    for (path, one), other in zip(jax.tree.leaves_with_path(chunks), jax.tree.leaves(tokens), strict=True):
        assert relative_error(one, other) < 1e-4, path
        assert float(jnp.abs(one).max()) > 0, path


def test_one_program_decodes():
    """Traced once for all steps, each of which gives its cache away."""
    traces = 0

    @functools.partial(quick_jit, donate_argnums=1)
    def decode(layer, cache, token):
        nonlocal traces
        traces += 1
        return layer(token[:, None], cache, None, False)

    cache, outs = empty(), []
    for t in range(10):
        before = cache
        out, cache = decode(layer(), cache, some_tokens()[:, t])
        outs.append(np.asarray(out[:, 0]))
    assert traces == 1
    assert before.state.is_deleted()
    np.testing.assert_allclose(np.stack(outs, axis=1), np.stack(expected()[0])[:, :10], **TOLERANCE)


def test_the_state_of_bfloat16_weights_is_float32():
    """And so is what reaches it: only the two projections round."""
    small = layer(dtype=jnp.bfloat16)
    cache, x = empty(), jnp.asarray(some_tokens()[:, :20], jnp.bfloat16)
    for part in (x[:, :17], x[:, 17:18], x[:, 18:19]):
        out, cache = run(small, part, cache)
    outs, states, _ = oracle(small, x.astype(jnp.float32))
    assert out.dtype == jnp.bfloat16
    assert {cache.state.dtype, cache.conv.dtype} == {jnp.dtype("float32")}
    assert relative_error(cache.state, np.stack(states)[:, 18]) < 0.01
    assert relative_error(out[:, 0].astype(jnp.float32), np.stack(outs)[:, 18]) < 0.02


def test_untrained_weights_remember():
    """Step sizes in [1e-3, 0.1] and rates in [1, 16], as in the paper's code; the sizes of Granite 4.0 H 350M."""
    config = MambaConfig(heads=48, head_dim=32, state_dim=128)
    state = quick_jit(lambda: nnx.state(Mamba(config, 768, EPS, jnp.bfloat16, nnx.Rngs(0))))()
    steps, rates = np.logaddexp(state["dt_bias"][...], 0), np.exp(state["a_log"][...])
    assert 0.9e-3 < steps.min() < 5e-3 < 5e-2 < steps.max() < 0.11
    assert 1.0 <= rates.min() < 4.0 < 12.0 < rates.max() <= 16.0
    assert state["inputs"]["kernel"].shape == (768, 3376)
    assert recurrent_spec(config, 3) == mj.RecurrentSpec(3, 1792, 4, 48, 32, 128)
