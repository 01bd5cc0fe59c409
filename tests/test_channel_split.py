"""Codecs over a part of the channels each: which channels, what their bits cost, and attention over both."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import SPEC, Row, oracle, plain, qkv, quick_jit, relative_error, run

import memjax as mj
from memjax.pallas_kernels.decode import decode
from memjax.pallas_kernels.slots import Span
from memjax.quantize import TurboQuant
from memjax.quantize.turboquant import Lloyd

DIM = 32
WIDE = dataclasses.replace(SPEC, head_dim=DIM, rope=mj.Rope(DIM, theta=100.0))
BITS = {  # realised, with one bfloat16 scale in each part
    2.5: {64: (16 * 3 + 48 * 2 + 2 * 16) / 64, 128: (32 * 3 + 96 * 2 + 2 * 16) / 128},
    3.5: {64: (16 * 4 + 48 * 3 + 2 * 16) / 64, 128: (32 * 4 + 96 * 3 + 2 * 16) / 128},
}


@functools.partial(quick_jit, static_argnums=0)
def coded(codec, order, x):
    codec = codec.fitted(order)
    codes = codec.encode(x, x.dtype)
    return codes, codec.decode(codes)


@functools.partial(quick_jit, static_argnums=0)
def fit(codec, x, real):
    return codec.fit(x, real)


def vectors(tokens: int = 400):
    """[2, 2, H, T]: the channels of each row and head in another order of sizes."""
    rng = np.random.default_rng(0)
    sizes = rng.permuted(np.broadcast_to(np.linspace(0.1, 4, DIM) ** 1.5, (2, 2, DIM)), axis=-1)
    return sizes, (sizes[..., None] * rng.standard_normal((2, 2, DIM, tokens))).astype(np.float32)


@pytest.mark.parametrize("bits", BITS)
def test_bits_are_those_of_the_buffers(bits):
    codec = TurboQuant(bits, bits).keys
    for dim, expected in BITS[bits].items():
        codes = jax.eval_shape(lambda x: codec.encode(x, jnp.bfloat16), jnp.zeros((dim, 6)))
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(codes))
        assert 8 * held / (6 * dim) == codec.bits_per_value(dim) == expected
        spec = mj.CacheSpec(2, 3, dim, 300, rope=mj.Rope(dim))
        policy = mj.turboquant(bits, bits)
        assert mj.nbytes(mj.abstract(policy, spec)) == mj.predict_nbytes(policy, spec)
        assert mj.predict_nbytes(policy, spec).bits_per_value == expected
    assert {bits: realised[128] for bits, realised in BITS.items()} == {2.5: 2.5, 3.5: 3.5}


def test_the_channels_with_most_energy_come_first():
    """Tokens that are not real may hold anything."""
    sizes, x = vectors()
    real = np.arange(x.shape[-1]) < 380
    order = fit(TurboQuant(2.5, 2).keys, np.where(real, x, np.float32(np.nan)), np.broadcast_to(real, (2, 1, real.size)))
    assert order.dtype == jnp.int32
    np.testing.assert_array_equal(np.sort(order), np.broadcast_to(np.arange(DIM), order.shape))
    first = np.take_along_axis(sizes, np.asarray(order[..., : DIM // 4]), -1)
    assert set(np.unique(first.round(6))) <= set(np.sort(np.unique(sizes.round(6)))[-10:])


def test_the_order_pays_and_is_undone():
    """Each part is what its own codec makes of it; a quarter chosen by energy has under two thirds of any quarter's error."""
    _, x = vectors()
    codec, parts = TurboQuant(2.5, 2).keys, (Lloyd(3, "search"), Lloyd(2, "search", rotation="dense"))
    order = np.asarray(fit(codec, x, np.ones((2, 1, x.shape[-1]), bool)))
    _, found = coded(codec, order, x)
    for row in range(2):
        for head in range(2):
            for part, own in zip(np.split(order[row, head], [DIM // 4]), parts, strict=True):
                expected = coded(own, None, x[row, head][part])[1]
                np.testing.assert_allclose(found[row, head][part], expected, atol=1e-5)
    unchosen = relative_error(coded(codec, None, x)[1], x)
    assert relative_error(found, x) ** 2 < 2 / 3 * unchosen**2


def test_halves_lie_between_whole_bits():
    """The error of vectors without large channels too, but nearer to that of the fewer bits: three quarters have those."""
    x = np.random.default_rng(1).standard_normal((1, 1, 128, 500)).astype(np.float32)
    errors = [relative_error(coded(TurboQuant(bits, 2).keys, None, x)[1], x) ** 2 for bits in (2, 2.5, 3, 3.5, 4)]
    for fewer, half, more in (errors[:3], errors[2:]):
        assert abs(half / (0.75 * fewer + 0.25 * more) - 1) < 0.05


def test_attention_reads_both_parts():
    """As attention over vectors that were put together first, in the order that the cache has measured."""
    tokens, sizes = qkv(3, dim=DIM), [7] * 7
    tokens = tuple(x * np.float32(np.linspace(0.2, 2, DIM)) for x in tokens)
    policy = plain("turboquant(3.5,2.5)+protect(2,8)")
    out, cache = run(policy.init(WIDE), tokens, sizes)
    method = policy.codec
    keys = method.keys.fitted(cache.basis.k_fit[:, :, None])
    values = method.values.fitted(cache.basis.v_fit[:, :, None])
    row = Row("", SimpleNamespace(keys=keys, values=values, tile=1), 2, 8)
    np.testing.assert_allclose(out, oracle(row, tokens, sizes), atol=2e-4)
    assert (np.asarray(cache.basis.v_fit[..., : DIM // 4]) >= DIM // 2).all()
    assert mj.nbytes(cache) == mj.predict_nbytes(policy, WIDE)


@pytest.mark.slow
def test_kernels_read_both_parts():
    """The TPU's, in interpret mode, at the smallest head dimension whose quarter is whole words of 3-bit codes."""
    x = np.random.default_rng(2).standard_normal((1, 1, 128, 128)).astype(np.float32)
    codes, _ = coded(TurboQuant(2.5, 2.5).keys, None, x)
    q = jnp.asarray(np.random.default_rng(3).standard_normal((1, 1, 2, 128)), jnp.bfloat16)
    arguments = {
        "q_pos": jnp.full((1, 2), 127, jnp.int32),
        "k_pos": Span(jnp.zeros(1, jnp.int32), jnp.full(1, 100, jnp.int32)),
        "q_extra": q[..., 32:],
        "k_extra": codes.second,
        "scale": 128**-0.5,
    }
    expected, found = (
        decode(q[..., :32], codes.first, codes.second, implementation=name, interpret=name == "tpu", **arguments)[0]
        for name in ("reference", "tpu")
    )
    assert relative_error(found, expected) < 5e-3


WRONG = {
    "multiple of 32 of them, got 80": lambda: mj.turboquant(2.5, 4).init(mj.CacheSpec(1, 1, 80, 300)),
    "2.5 and 3.5 bits are two of them": lambda: mj.turboquant(4, 4.5),
    "TurboQuant codes have 2, 3 or 4 bits, got nan": lambda: mj.policy("turboquant(nan,4)"),
    "turboquant stores two streams": lambda: mj.turboquant(3.5, 4).init(
        mj.CacheSpec(1, 1, 80, 64, rope=mj.Rope(16, start=64), latent_dim=64)
    ),
    "gear adds a second stream of codes, and turboquant has two": lambda: mj.policy("gear(turboquant(2.5,2),4)"),
    "streaming needs window to be a number .int., got '16.5'": lambda: mj.policy("streaming(4,16.5)"),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_split_is_refused(message):
    with pytest.raises(ValueError, match=message):
        WRONG[message]()


def test_halves_are_read_and_printed():
    assert str(mj.policy("turboquant(3.5, value_bits=2.5)")) == "turboquant(3.5,2.5)"
    assert str(mj.policy("turboquant(3.0,4)")) == str(mj.turboquant(3, 4)) == "turboquant(3,4)"
