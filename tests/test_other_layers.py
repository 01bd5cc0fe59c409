"""Layers that are not plain attention: latent attention (DeepSeek-V2), a recurrent state (Mamba-2), and a model of all.

The layers are small and random, and each is written twice: as it runs through a cache, and from its definition in
numpy float64 without one.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import Row, lossy, numpy_softmax, quick_jit, relative_error

import memjax as mj
from memjax.quantize import Dense, Int4, Int8, Progressive

BATCH, WIDTH, HEADS, CAPACITY = 2, 24, 4, 64
LATENT, ROPED, PLAIN, VALUE = 16, 4, 8, 6
THETA = 100.0
MLA_SPEC = mj.CacheSpec(
    BATCH,
    1,
    LATENT + ROPED,
    CAPACITY,
    "float32",
    rope=mj.Rope(ROPED, THETA, interleaved=True, start=LATENT),
    scale=(PLAIN + ROPED) ** -0.5,
    latent_dim=LATENT,
)


def random_weights(seed: int, **shapes) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        k: (rng.standard_normal(s) / np.sqrt(s[0] if len(s) > 1 else 1)).astype(np.float32) for k, s in shapes.items()
    }


def rms(x):
    return x / (x * x).mean(-1, keepdims=True) ** 0.5


# ---- multi-head latent attention -------------------------------------------------------------------------------------


def mla_weights(seed=0):
    return random_weights(
        seed,
        query=(WIDTH, HEADS, PLAIN + ROPED),
        down=(WIDTH, LATENT + ROPED),
        up_key=(LATENT, HEADS, PLAIN),
        up_value=(LATENT, HEADS, VALUE),
        out=(HEADS * VALUE, WIDTH),
    )


def mla_step(w, cache, x, lengths=None):
    """Absorbed form: queries are taken into the latent space, the cache holds [latent | rotary part] once."""
    q = jnp.einsum("btd,dnh->btnh", x, w["query"])
    stream = x @ w["down"]
    stream = jnp.concatenate([rms(stream[..., :LATENT]), stream[..., LATENT:]], axis=-1)
    absorbed = jnp.einsum("btnh,cnh->btnc", q[..., :PLAIN], w["up_key"])
    cache = mj.update(cache, stream[:, :, None], lengths=lengths)
    out, cache = mj.attend(cache, jnp.concatenate([absorbed, q[..., PLAIN:]], axis=-1))
    out = jnp.einsum("btnc,cnv->btnv", out, w["up_value"])
    return out.reshape(*x.shape[:2], -1) @ w["out"], cache


def turned(x, positions):
    """Interleaved rotary embedding as complex numbers; x [..., T, ROPED]."""
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(
        1j * positions[:, None] * THETA ** (-2 * np.arange(ROPED // 2) / ROPED)
    )
    return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)


def mla_oracle(w, x, row=None, sizes=None):
    """Naive form: every head's keys and values made from the latents, those of coded tokens from what the codec left."""
    w, x = {k: np.float64(v) for k, v in w.items()}, np.float64(x)
    row, t = row or Row("dense"), np.arange(x.shape[1])
    start = np.repeat(np.cumsum([0, *sizes[:-1]]), sizes) if sizes else t
    exact = (t < row.sinks) | (t >= start[:, None] - row.recent)
    q = np.einsum("btd,dnh->bnth", x, w["query"])
    latent, roped = np.split(x @ w["down"], [LATENT], axis=-1)
    latent = rms(latent)
    mask, moved = t <= t[:, None], t
    if row.evict is not None:
        sinks, window = row.evict
        mask = mask & ((t[:, None] - t < window) | (t < sinks))
        moved = np.minimum(t, sinks + window - 1)
    near, far = (turned(q[..., PLAIN:], at) @ turned(roped, t).swapaxes(-1, -2)[:, None] for at in (t, moved))
    rotary = np.where(t < row.sinks, far, near)

    def scores_and_values(latent):
        keys = np.einsum("bsc,cnh->bnsh", latent, w["up_key"])
        return q[..., :PLAIN] @ keys.swapaxes(-1, -2), np.einsum("bsc,cnv->bnsv", latent, w["up_value"])

    (scores, values), (coded_scores, coded_values) = (
        scores_and_values(each) for each in (latent, lossy(row.codec.keys, latent))
    )
    scores = np.where(exact, scores, coded_scores) + rotary
    weights = numpy_softmax(scores * (PLAIN + ROPED) ** -0.5, mask)
    out = (weights * exact) @ values + (weights * ~exact) @ coded_values
    return out.swapaxes(1, 2).reshape(*x.shape[:2], -1) @ w["out"]


MLA_ROWS = [
    Row("dense"),
    Row("int8+host(6,4)+protect(2,4)", Int8(), 2, 4),
    Row("int4(rotate=true)+protect(2,4)", Int4(True), 2, 4),
    Row("progressive(refine=1.0,page=8,share=0.0)+protect(2,4)", Progressive(1.0, 8, 0.0), 2, 4),
    Row("streaming(3,12)", Dense(), 3, 0, (3, 12)),
    Row("streaming(3,20)+int4(rotate=true)+protect(3,4)+host(5,4)", Int4(True), 3, 4, (3, 20)),
]
mla = quick_jit(mla_step)


@functools.cache
def some_inputs(tokens=40):
    return np.random.default_rng(7).standard_normal((BATCH, tokens, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("row", MLA_ROWS, ids="{0.text}".format)
def test_latent_attention(row):
    w, x, sizes = mla_weights(), some_inputs(), [8] * 5
    cache, outs = row.policy.init(MLA_SPEC), []
    for start in range(0, 40, 8):
        out, cache = mla(w, cache, x[:, start : start + 8])
        outs.append(np.asarray(out))
    out = np.concatenate(outs, axis=1)
    np.testing.assert_allclose(out, mla_oracle(w, x, row, sizes), atol=1e-5)
    if row.evict is None:
        largest = {"dense": 1e-5, "int8": 0.03, "int4": 0.3, "progressive": 0.6}[row.codec.name]
        assert relative_error(out, mla_oracle(w, x)) < largest
    assert cache.history.v is None
    assert mj.nbytes(cache) == mj.predict_nbytes(row.policy, MLA_SPEC)
    assert {leaf.dtype for leaf in jax.tree.leaves(cache.history.extra)} == {jnp.dtype("float32")}


def test_latent_transforms():
    w, x = mla_weights(), some_inputs()
    cache = mj.protect(2, 4).init(MLA_SPEC)
    for start in range(0, 32, 8):
        _, cache = mla(w, cache, x[:, start : start + 8])
    int8 = mj.int8(centre="none", balance="off")
    small = quick_jit(lambda c: mj.cache.offload(mj.cache.quantize(c, int8), mj.host(6, 4)))(cache)
    out, _ = mla(w, small, x[:, 32:])
    row = Row("", Int8(), 2, 4)
    np.testing.assert_allclose(out, mla_oracle(w, x, row, [32, 8])[:, 32:], atol=1e-5)


def test_padding_of_a_latent_stream_may_hold_anything():
    """Its keys are its values too, and 0 * NaN is NaN."""
    w, x = mla_weights(), some_inputs()[:, :8].copy()
    x[0, 5:], x[1, 7:] = np.nan, np.inf
    out, cache = mla(w, mj.dense().init(MLA_SPEC), x, jnp.array([5, 7]))
    for row, length in enumerate((5, 7)):
        expected = mla_oracle(w, x[row : row + 1, :length])
        np.testing.assert_allclose(out[row : row + 1, :length], expected, atol=1e-5)
    assert np.isfinite(np.asarray(cache.history.k.data)).all()


def test_a_latent_stream_takes_no_values():
    cache, stream = mj.dense().init(MLA_SPEC), jnp.zeros((BATCH, 3, 1, LATENT + ROPED))
    with pytest.raises(ValueError, match="no values of its own"):
        mj.update(cache, stream, stream)
    with pytest.raises(ValueError, match=r"got \[2, 3, 1, 16\]"):
        mj.update(cache, stream[..., :LATENT])


# ---- a recurrent layer -----------------------------------------------------------------------------------------------

SSM_HEADS, SSM_DIM, STATE, KERNEL = 2, 8, 6, 4
CONV = SSM_HEADS * SSM_DIM + 2 * STATE
SSM_SPEC = mj.RecurrentSpec(BATCH, CONV, KERNEL, SSM_HEADS, SSM_DIM, STATE)


def ssm_weights(seed=0):
    w = random_weights(
        seed, input=(WIDTH, CONV), step=(WIDTH, SSM_HEADS), kernel=(KERNEL, CONV), out=(SSM_HEADS * SSM_DIM, WIDTH)
    )
    return w | {"decay": np.array([-0.3, -1.2], np.float32)}


def ssm_split(u, lib):
    """Convolved inputs to x [..., heads, dim], B and C [..., state]."""
    u = u / (1 + lib.exp(-u))
    x, b, c = lib.split(u, [SSM_HEADS * SSM_DIM, SSM_HEADS * SSM_DIM + STATE], axis=-1)
    return x.reshape(*x.shape[:-1], SSM_HEADS, SSM_DIM), b, c


def ssm_step(w, cache, x):
    """Token by token: state <- exp(dt a) state + dt x B,  y = state C."""

    def one(carry, token):
        conv, state = carry
        u, dt = token
        window = jnp.concatenate([conv, u[:, None]], axis=1)
        x, b, c = ssm_split(jnp.einsum("bwc,wc->bc", window, w["kernel"]), jnp)
        keep = jnp.exp(dt * w["decay"])[..., None, None]
        state = keep * state + (dt[..., None] * x)[..., None] * b[:, None, None]
        return (window[:, 1:], state), jnp.einsum("bhpn,bn->bhp", state, c)

    u, dt = x @ w["input"], jax.nn.softplus(x @ w["step"])
    carry, y = jax.lax.scan(one, (cache.conv, cache.state), (u.swapaxes(0, 1), dt.swapaxes(0, 1)))
    out = y.swapaxes(0, 1).reshape(*x.shape[:2], -1) @ w["out"]
    return out, cache.advance(*carry, x.shape[1])


def ssm_oracle(w, x):
    """As one masked matrix product: y_t = sum over s <= t of exp(a (dt_{s+1} + .. + dt_t)) dt_s (C_t . B_s) x_s."""
    w, inputs = {k: np.float64(v) for k, v in w.items()}, np.float64(x)
    tokens = inputs.shape[1]
    padded = np.pad(inputs @ w["input"], ((0, 0), (KERNEL - 1, 0), (0, 0)))
    x, b, c = ssm_split(sum(padded[:, i : i + tokens] * w["kernel"][i] for i in range(KERNEL)), np)
    dt = np.log1p(np.exp(inputs @ w["step"]))
    total = np.cumsum(dt * w["decay"], axis=1)
    decay = np.tril(np.exp(np.minimum(total[:, :, None] - total[:, None], 0)).transpose(0, 3, 1, 2))
    weights = decay * (c @ b.swapaxes(-1, -2))[:, None] * dt.transpose(0, 2, 1)[:, :, None]
    y = weights @ x.transpose(0, 2, 1, 3)
    return y.transpose(0, 2, 1, 3).reshape(*inputs.shape[:2], -1) @ w["out"]


@pytest.mark.parametrize("text", ["dense", "streaming(4,8)+int4+host(8,4)"])
def test_a_recurrent_layer(text):
    """Policies leave it alone; chunks and single tokens lead to the same state."""
    w, x, run = ssm_weights(), some_inputs(), quick_jit(ssm_step)
    cache, outs = mj.policy(text).init(SSM_SPEC), []
    for start in (0, 10, 20, 30):
        out, cache = run(w, cache, x[:, start : start + 10])
        outs.append(np.asarray(out))
    np.testing.assert_allclose(np.concatenate(outs, axis=1), ssm_oracle(w, x), atol=1e-5)
    assert cache.length.tolist() == [40, 40]
    assert {leaf.dtype for leaf in (cache.conv, cache.state)} == {jnp.dtype("float32")}
    assert mj.nbytes(cache).state == 4 * BATCH * ((KERNEL - 1) * CONV + SSM_HEADS * SSM_DIM * STATE)


@pytest.mark.parametrize(
    "changes", [{"conv": jnp.zeros((2, 4, CONV))}, {"state": jnp.zeros((2, 2, 8, 6), jnp.bfloat16)}]
)
def test_a_recurrent_state_keeps_its_shape_and_dtype(changes):
    cache = mj.dense().init(SSM_SPEC)
    with pytest.raises(ValueError, match=f"recurrent {next(iter(changes))} must stay float32"):
        cache.advance(**({"conv": cache.conv, "state": cache.state} | changes), count=1)


@pytest.mark.parametrize("name", ["batch", "conv_dim", "conv_width", "heads", "head_dim", "state_dim"])
def test_wrong_recurrent_specs_are_refused(name):
    sizes = {"batch": 1, "conv_dim": 8, "conv_width": 4, "heads": 2, "head_dim": 4, "state_dim": 4} | {name: 0}
    with pytest.raises(ValueError, match=f"{name} to be an integer of at least 1, got 0"):
        mj.RecurrentSpec(**sizes)


# ---- a model of all three --------------------------------------------------------------------------------------------

VOCAB, HEAD_DIM, KV_HEADS, PROMPT, NEW = 40, 8, 2, 20, 24
GQA_SPEC = mj.CacheSpec(BATCH, KV_HEADS, HEAD_DIM, CAPACITY, "float32", rope=mj.Rope(HEAD_DIM, THETA))
SPECS = (GQA_SPEC, MLA_SPEC, SSM_SPEC)


def gqa_step(w, cache, x):
    q, k, v = (jnp.einsum("btd,dnh->btnh", x, w[name]) for name in ("query", "key", "value"))
    out, cache = mj.attend(mj.update(cache, k, v), q)
    return out.reshape(*x.shape[:2], -1) @ w["out"], cache


def gqa_oracle(w, x):
    from cache_helpers import dense_oracle

    x = np.float64(x)
    qkv = tuple(np.einsum("btd,dnh->btnh", x, np.float64(w[name])) for name in ("query", "key", "value"))
    return dense_oracle(qkv, THETA).reshape(*x.shape[:2], -1) @ np.float64(w["out"])


def model_weights():
    narrow, wide = (WIDTH, KV_HEADS, HEAD_DIM), (WIDTH, HEADS, HEAD_DIM)
    return {
        **random_weights(3, table=(VOCAB, WIDTH), head=(WIDTH, VOCAB)),
        "layers": [
            random_weights(4, query=wide, key=narrow, value=narrow, out=(HEADS * HEAD_DIM, WIDTH)),
            mla_weights(5),
            ssm_weights(6),
        ],
    }


def model_step(w, caches, tokens):
    """Logits of every token, and the caches: attention, then latent attention, then the recurrence."""
    x, after = w["table"][tokens], []
    for layer, weights, cache in zip((gqa_step, mla_step, ssm_step), w["layers"], caches, strict=True):
        mixed, cache = layer(weights, cache, rms(x))
        x = x + mixed
        after.append(cache)
    return rms(x) @ w["head"], tuple(after)


def model_oracle(w, tokens):
    x = np.float64(w["table"])[tokens]
    for layer, weights in zip((gqa_oracle, mla_oracle, ssm_oracle), w["layers"], strict=True):
        x = x + layer(weights, rms(x))
    return rms(x) @ np.float64(w["head"])


@dataclass(frozen=True)
class Generated:
    tokens: np.ndarray  # [B, PROMPT + NEW]
    logits: np.ndarray  # [B, NEW, VOCAB], those that chose the new tokens
    caches: tuple
    traces: int


@functools.cache
def generated(text: str) -> Generated:
    """Greedy: the prompt, then a scan over decode steps, all in one program."""
    traces = 0

    @quick_jit
    def generate(w, caches, prompt):
        nonlocal traces
        traces += 1
        w = jax.tree.map(jnp.asarray, w)
        logits, caches = model_step(w, caches, prompt)

        def decode(carry, _):
            logits, caches = carry
            token = jnp.argmax(logits, axis=-1)
            following, caches = model_step(w, caches, token[:, None])
            return (following[:, 0], caches), (token, logits)

        (_, caches), (tokens, logits) = jax.lax.scan(decode, (logits[:, -1], caches), length=NEW)
        return tokens.swapaxes(0, 1), logits.swapaxes(0, 1), caches

    prompt = np.random.default_rng(8).integers(0, VOCAB, (BATCH, PROMPT))
    w, policy = model_weights(), mj.policy(text)
    for _ in range(2):
        tokens, logits, caches = generate(w, policy.init(SPECS), prompt)
    return Generated(np.concatenate([prompt, tokens], axis=1), np.asarray(logits), caches, traces)


def test_generation_through_the_cache_is_recomputation_from_scratch():
    found = generated("dense")
    scratch = model_oracle(model_weights(), found.tokens)[:, PROMPT - 1 : -1]
    np.testing.assert_allclose(found.logits, scratch, atol=1e-4)
    np.testing.assert_array_equal(found.tokens[:, PROMPT:], scratch.argmax(-1))
    assert len(np.unique(found.tokens[:, PROMPT:])) > 4
    assert found.traces == 1


@pytest.mark.parametrize("text", ["int8+protect(2,4)", "streaming(4,16)+int8+protect(4,4)+host(6,4)"])
def test_generation_under_a_policy(text):
    found, policy = generated(text), mj.policy(text)
    assert found.traces == 1
    assert [layer.length.tolist() for layer in found.caches] == [[PROMPT + NEW] * BATCH] * 3
    assert mj.nbytes(found.caches) == mj.predict_nbytes(policy, SPECS) == mj.nbytes(mj.abstract(policy, SPECS))
    assert mj.nbytes(found.caches).device < mj.nbytes(generated("dense").caches).device
    first = relative_error(found.logits[:, 0], generated("dense").logits[:, 0])
    assert first < (0.02 if "streaming" not in text else 0.6)
    assert np.isfinite(found.logits).all()
