"""Errors that later tokens and layers build on: a random decoder read in blocks, each compressed before the next is read."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import quick_jit
from flax import nnx

import memjax as mj
from memjax.models.config import llama_config
from memjax.models.decoder import Decoder

LAYERS, TOKENS, BLOCK, DIM = 4, 384, 128, 32
POLICIES = ("int8", "int4(rotate=true)", "turboquant(3,3)", "turboquant(2,2)", "int2(rotate=true)")  # the best first
read = quick_jit(lambda layer, x, cache: layer(x, cache, None, False))


@pytest.fixture(scope="module")
def decoder():
    config = llama_config(
        family="llama",
        vocab=61,
        width=64,
        layers=LAYERS,
        q_heads=4,
        kv_heads=2,
        head_dim=DIM,
        mlp_width=96,
        norm_eps=1e-5,
        max_position=TOKENS,
        ropes=(mj.Rope(DIM),) * LAYERS,
        windows=(None,) * LAYERS,
        tied=True,
    )
    decoder = Decoder(config, rngs=nnx.Rngs(0))
    for layer in decoder.layers:  # attention of random weights is flat and weighs little
        layer.mixer.q.kernel[...] *= jnp.float32(6.0)
        layer.mixer.out.kernel[...] *= jnp.float32(3.0)
    return decoder


def run(decoder, policy: str, accumulated: bool) -> np.ndarray:
    """Hidden states [T, D] behind the last layer; if errors are not to accumulate, every layer is given exact inputs."""
    specs = decoder.cache_specs(1, TOKENS, "float32")
    caches, exact_caches = (list(mj.policy(text).init(specs)) for text in (policy + "+protect(0,0)", "dense"))
    tokens, outs = np.random.default_rng(0).integers(0, 61, (1, TOKENS)).astype(np.int32), []
    for start in range(0, TOKENS, BLOCK):
        x = exact = decoder.embed(tokens[:, start : start + BLOCK])
        for i, layer in enumerate(decoder.layers):
            x, caches[i] = read(layer, x if accumulated else exact, caches[i])
            exact, exact_caches[i] = read(layer, exact, exact_caches[i])
        outs.append(np.asarray(x[0], np.float64))
    return np.concatenate(outs)


def test_errors_accumulate_and_keep_the_order_of_the_codecs(decoder):
    """By block: mean absolute error, and its parts, lengths and directions of the hidden states."""
    exact = run(decoder, "dense", True)
    found = {}
    for policy in POLICIES:
        for accumulated in (False, True):
            x = run(decoder, policy, accumulated)
            sizes = np.linalg.norm(x, axis=1), np.linalg.norm(exact, axis=1)
            errors = (
                np.abs(x - exact).mean(1),
                np.abs(sizes[0] / sizes[1] - 1),
                1 - (x * exact).sum(1) / sizes[0] / sizes[1],
            )
            found[policy, accumulated] = np.stack([each.reshape(-1, BLOCK).mean(1) for each in errors])
    for (policy, accumulated), each in found.items():
        assert np.all(each[:, 0] < 1e-6), "a block is exact to itself"
        assert each[0, -1] > each[0, 1] > 0, "more of what is read is lossy"
        if accumulated:
            assert np.all(each[:, 1:] > 1.5 * found[policy, False][:, 1:])
    for accumulated in (False, True):
        for better, worse in itertools.pairwise(POLICIES):
            assert np.all(found[better, accumulated][[0, 2], 1:] < found[worse, accumulated][[0, 2], 1:])
