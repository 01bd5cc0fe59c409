"""Gated MLPs, routers and mixtures of experts against loops in numpy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import quick_jit, relative_error
from flax import nnx

from memjax.models.config import MlpConfig, MoeConfig
from memjax.models.mlp import MLP, MoE, route

SMALL = {"experts": 8, "chosen": 2, "width": 12}
V3_SCORES = {"scoring": "sigmoid", "score_bias": True, "normalise": True}
ROUTERS = {
    "DeepSeek-V2-Lite": MoeConfig(experts=64, chosen=6, width=1),
    "DeepSeek-V2": MoeConfig(experts=160, chosen=6, width=1, groups=8, kept_groups=3, scale=16.0),
    "DeepSeek-V3": MoeConfig(experts=256, chosen=8, width=1, groups=8, kept_groups=4, scale=2.5, **V3_SCORES),
    "Kimi-K2": MoeConfig(experts=384, chosen=8, width=1, scale=2.827, **V3_SCORES),
    "Qwen3-30B-A3B": MoeConfig(experts=128, chosen=8, width=1, normalise=True),
    "Granite-4.0-H-Tiny": MoeConfig(experts=64, chosen=6, width=1, scoring="softmax_of_chosen"),
    "biased softmax": MoeConfig(experts=16, chosen=2, width=1, score_bias=True, groups=4, kept_groups=2),
    "groups of one": MoeConfig(experts=8, chosen=3, width=1, groups=8, kept_groups=4, **V3_SCORES),
    "all groups, all experts": MoeConfig(experts=8, chosen=8, width=1, groups=2, kept_groups=2, scoring="sigmoid", scale=0.5),
    "grouped logits": MoeConfig(experts=12, chosen=3, width=1, groups=4, kept_groups=2, scoring="softmax_of_chosen"),
}


def softmax(x):
    weights = np.exp(x - np.max(x))
    return weights / weights.sum()


def numpy_choice(config, scores, ranked):
    """Chosen experts of one token: those outside the kept groups are no candidates."""
    candidates = np.arange(config.experts)
    if config.kept_groups < config.groups:
        members = np.split(candidates, config.groups)
        best = 2 if config.score_bias else 1
        worth = [sum(sorted((ranked[e] for e in group), reverse=True)[:best]) for group in members]
        kept = sorted(range(config.groups), key=lambda group: -worth[group])[: config.kept_groups]
        candidates = np.concatenate([members[group] for group in kept])
    return sorted(candidates, key=lambda e: (-ranked[e], e))[: config.chosen]


def numpy_route(config, logits, bias):
    """Weights and chosen experts, token by token, float64."""
    weights, chosen = [], []
    for row in np.asarray(logits, np.float64):
        scores = {"softmax": softmax, "sigmoid": lambda x: 1 / (1 + np.exp(-x)), "softmax_of_chosen": lambda x: x}
        scores = scores[config.scoring](row)
        best = numpy_choice(config, scores, scores + (0 if bias is None else np.asarray(bias, np.float64)))
        w = softmax(scores[best]) if config.scoring == "softmax_of_chosen" else scores[best]
        weights.append((w / w.sum() if config.normalise else w) * config.scale)
        chosen.append(best)
    return np.array(weights), np.array(chosen)


def numpy_mlp(x, gate, up, down, activation, biases=(0, 0, 0)):
    a = x @ gate + biases[0]
    tanh = np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3))
    a = a / (1 + np.exp(-a)) if activation == "silu" else a / 2 * (1 + tanh)
    return a * (x @ up + biases[1]) @ down + biases[2]


def wide(tree):
    return jax.tree.map(lambda x: np.asarray(x.astype(jnp.float32), np.float64), tree)


def numpy_moe(model, x):
    """A loop over tokens and their experts."""
    p, x = wide(nnx.to_pure_dict(nnx.state(model))), wide(jnp.asarray(x))
    rows, config = x.reshape(-1, x.shape[-1]), model.config
    weights, chosen = numpy_route(config, rows @ p["router"], p.get("score_bias"))
    out = np.zeros_like(rows)
    for token, row in enumerate(rows):
        for w, e in zip(weights[token], chosen[token], strict=True):
            out[token] += w * numpy_mlp(row, p["gate"][e], p["up"][e], p["down"][e], config.activation)
        if "shared" in p:
            out[token] += numpy_mlp(row, *(p["shared"][name]["kernel"] for name in ("gate", "up", "down")), config.activation)
    return out.reshape(x.shape)


def random_model(kind, config, dtype=jnp.float32):
    """Of width 16, drawn by numpy: JAX would compile a program for each shape."""
    graph, state = nnx.split(nnx.eval_shape(lambda: kind(config, 16, dtype, nnx.Rngs(0))))
    draw = np.random.default_rng(3).normal
    return nnx.merge(graph, jax.tree.map(lambda leaf: jnp.asarray(draw(size=leaf.shape, scale=0.3), leaf.dtype), state))


def tokens(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), dtype)


@quick_jit
def run(model, x):
    return model(x)


@pytest.mark.parametrize("config", ROUTERS.values(), ids=ROUTERS)
def test_route(config):
    """A row of NaN goes to experts that exist, and all different."""
    draw = np.random.default_rng(0)
    logits = draw.normal(scale=2.0, size=(40, config.experts)).astype(np.float32)
    bias = draw.normal(loc=-1.0, size=config.experts).astype(np.float32) if config.score_bias else None
    logits[-1] = np.nan
    weights, chosen = quick_jit(route, static_argnums=0)(config, logits.reshape(5, 8, -1), bias)
    assert (weights.dtype, chosen.dtype) == (jnp.float32, jnp.int32)
    assert weights.shape == chosen.shape == (5, 8, config.chosen)
    weights, chosen = np.reshape(weights, (40, -1)), np.reshape(chosen, (40, -1))
    assert len(set(chosen[-1].tolist()) & set(range(config.experts))) == config.chosen
    expected_weights, expected = numpy_route(config, logits[:-1], bias)
    np.testing.assert_array_equal(chosen[:-1], expected)
    np.testing.assert_allclose(weights[:-1], expected_weights, rtol=2e-6)


def test_route_without_normalising_keeps_the_probabilities():
    config = ROUTERS["DeepSeek-V2-Lite"]
    logits = tokens(20, config.experts)
    weights, chosen = route(config, logits)
    np.testing.assert_allclose(weights, jnp.take_along_axis(jax.nn.softmax(logits), chosen, -1), rtol=1e-6)
    assert np.all(weights.sum(-1) < 0.6)


def test_route_never_goes_to_dropped_groups():
    """Where all biased scores are negative, filling dropped groups with 0 instead of -inf would choose them."""
    config = MoeConfig(experts=8, chosen=2, width=1, groups=4, kept_groups=1, **V3_SCORES)
    logits = jnp.zeros((1, 8), jnp.float32)
    weights, chosen = route(config, logits, jnp.asarray([-3, -3, -3, -3, -2, -1.5, -3, -3], jnp.float32))
    assert chosen.tolist() == [[5, 4]]
    assert weights.tolist() == [[0.5, 0.5]]


def test_route_of_scores_that_round_to_nothing():
    config = MoeConfig(experts=4, chosen=2, width=1, scoring="sigmoid", normalise=True)
    weights, _ = route(config, jnp.full((1, 4), -200.0, jnp.float32))
    assert weights.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("bias", [False, True])
def test_mlp(activation, bias):
    model, x = random_model(MLP, MlpConfig(width=12, activation=activation, bias=bias)), tokens(2, 3, 16)
    p = wide(nnx.to_pure_dict(nnx.state(model)))
    gate, up, down = (p[name]["kernel"] for name in ("gate", "up", "down"))
    biases = [p[name].get("bias") for name in ("gate", "up", "down")]
    assert all((each is not None) == bias for each in biases)
    biases = biases if bias else 3 * [0]
    np.testing.assert_allclose(run(model, x), numpy_mlp(wide(x), gate, up, down, activation, biases), atol=1e-5)


MODELS = {  # configuration, batch, tokens: blocks of 1, 6, 16, 16, 64 and 256 rows
    "one token": (MoeConfig(**SMALL), 1, 1),
    "few": (MoeConfig(**SMALL, shared_width=20, scale=2.0), 2, 3),
    "DeepSeek-V3": (MoeConfig(**SMALL, **V3_SCORES, groups=4, kept_groups=2, shared_width=12, scale=2.5), 2, 40),
    "Granite, GELU": (MoeConfig(**SMALL, scoring="softmax_of_chosen", shared_width=8, activation="gelu_tanh"), 3, 21),
    "many": (MoeConfig(experts=4, chosen=2, width=8, normalise=True), 2, 70),
    "most": (MoeConfig(experts=2, chosen=1, width=4), 1, 600),
    "one expert": (MoeConfig(experts=1, chosen=1, width=4), 1, 20),
}


@pytest.mark.parametrize(("config", "batch", "length"), MODELS.values(), ids=MODELS)
def test_moe(config, batch, length):
    model, x = random_model(MoE, config), tokens(batch, length, 16)
    out = run(model, x)
    assert (out.shape, out.dtype) == (x.shape, x.dtype)
    np.testing.assert_allclose(out, numpy_moe(model, x), atol=1e-5)


@pytest.mark.parametrize("name", ["one token", "DeepSeek-V3"])
def test_moe_in_bfloat16(name):
    config, batch, length = MODELS[name]
    model, x = random_model(MoE, config, dtype=jnp.bfloat16), tokens(batch, length, 16, dtype=jnp.bfloat16)
    out = run(model, x)
    assert out.dtype == jnp.bfloat16
    assert relative_error(out.astype(jnp.float32), numpy_moe(model, x)) < 0.01


def test_parameters():
    config = MoeConfig(**SMALL, score_bias=True, shared_width=20)
    state = nnx.state(nnx.eval_shape(lambda: MoE(config, 16, jnp.bfloat16, nnx.Rngs(0))))
    shapes = {"/".join(map(str, path)): (leaf.shape, leaf.dtype) for path, leaf in nnx.to_flat_state(state)}
    assert shapes.pop("score_bias") == ((8,), jnp.float32)
    assert {name: shape for name, (shape, dtype) in shapes.items() if dtype == jnp.bfloat16} == {
        "router": (16, 8),
        "gate": (8, 16, 12),
        "up": (8, 16, 12),
        "down": (8, 12, 16),
        "shared/gate/kernel": (16, 20),
        "shared/up/kernel": (16, 20),
        "shared/down/kernel": (20, 16),
    }


@pytest.mark.parametrize("expert", [0, 5, 7])
def test_all_tokens_to_one_expert(expert):
    model = random_model(MoE, MoeConfig(experts=8, chosen=1, width=12, scoring="sigmoid", score_bias=True))
    model.score_bias[...] = 5.0 * jax.nn.one_hot(expert, 8, dtype=jnp.float32)
    x = tokens(2, 35, 16)
    _, chosen = numpy_route(model.config, wide(x).reshape(70, 16) @ wide(model.router[...]), model.score_bias[...])
    assert np.all(chosen == expert)
    np.testing.assert_allclose(run(model, x), numpy_moe(model, x), atol=1e-5)


@pytest.mark.parametrize("name", ["few", "DeepSeek-V3", "Granite, GELU"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_row_stays_alone(name, bad):
    config, batch, length = MODELS[name]
    model, x = random_model(MoE, config), tokens(batch, length, 16)
    spoilt = x.at[0, -1].set(bad).at[1, 0, 3].set(bad)
    out = np.asarray(run(model, spoilt))
    rows = np.ones((batch, length), bool)
    rows[0, -1] = rows[1, 0] = False
    assert np.isnan(out[~rows]).all()
    np.testing.assert_allclose(out[rows], np.asarray(run(model, x))[rows], atol=1e-6)


def dense_moe(model, x):
    """Every expert on every token, times a weight that is 0 where it was not chosen."""
    logits = x @ model.router[...]
    weights, chosen = route(model.config, logits, None if model.score_bias is None else model.score_bias[...])
    mix = jnp.sum(jax.nn.one_hot(chosen, model.config.experts, dtype=jnp.float32) * weights[..., None], axis=-2)
    hidden = jax.nn.silu(jnp.einsum("btd,edf->btef", x, model.gate[...])) * jnp.einsum("btd,edf->btef", x, model.up[...])
    out = jnp.einsum("bte,btef,efd->btd", mix, hidden, model.down[...])
    return out if model.shared is None else out + model.shared(x)


@pytest.mark.parametrize("name", ["one token", "DeepSeek-V3"])
def test_gradients(name):
    config, batch, length = MODELS[name]
    graph, state = nnx.split(random_model(MoE, config))
    x = tokens(batch, length, 16)
    direction = x[..., ::-1]

    def gradient(apply):
        return quick_jit(jax.grad(lambda state, x: jnp.sum(apply(nnx.merge(graph, state), x) * direction), (0, 1)))(state, x)

    found, expected = gradient(lambda model, x: model(x)), gradient(dense_moe)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)


@pytest.mark.parametrize("length", [1, 8, 128])
def test_temporaries_are_small(length):
    """No copy of all weights, and not one of the rows for every expert, as a dense formulation has."""
    model = nnx.eval_shape(lambda: MoE(MoeConfig(experts=64, chosen=4, width=64), 128, jnp.float32, nnx.Rngs(0)))
    x = jax.ShapeDtypeStruct((1, length, 128), jnp.float32)
    temporaries = run.lower(model, x).compile().memory_analysis().temp_size_in_bytes
    kernels, rows = 3 * 128 * 64 * 4, length * 128 * 4
    assert temporaries < 2 * kernels + 2 * rows


REFUSED = {
    "experts": ({"experts": 0}, "a model needs experts to be an integer >= 1, got 0"),
    "chosen": ({"chosen": 2.0}, r"a model needs chosen to be an integer >= 1, got 2\.0"),
    "width": ({"width": -1}, "a model needs width to be an integer >= 1, got -1"),
    "shared": ({"shared_width": 0}, "a model needs shared_width to be an integer >= 1, got 0"),
    "activation": ({"activation": "relu"}, "activation 'relu' is not one of silu, gelu_tanh"),
    "scoring": ({"scoring": "tanh"}, "router scoring 'tanh' is not one of softmax, sigmoid, softmax_of_chosen"),
    "groups": ({"groups": 3}, "8 experts cannot lie in 3 equal groups of which 1 are kept"),
    "kept": ({"groups": 2, "kept_groups": 3}, "8 experts cannot lie in 2 equal groups of which 3 are kept"),
    "too many": ({"chosen": 9}, "a token cannot go to 9 of 8 experts that are kept"),
    "too many for the groups": ({"groups": 8}, "a token cannot go to 2 of 1 experts that are kept"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(fields, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        MoeConfig(**SMALL | fields)
