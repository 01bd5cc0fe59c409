"""Codecs: how far a decoded vector may be from its original, what is exact, and what every value costs."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cache_helpers import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from memjax.pallas_kernels.codes import Codes, absmax_encode, zeros
from memjax.quantize import Dense, Fp8, Int4, Int8
from memjax.quantize.hadamard import hadamard_matrix, rotate, unrotate

FP8S = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
LARGEST = {"int8": 127.0, "int4": 15.0, "e4m3": 448.0, "e5m2": 57344.0}
PLAIN = [Int8(), Int4(), Fp8(), Fp8(format="e5m2")]
LOSSY = [*PLAIN, Int8(rotate=True), Int4(rotate=True), Fp8(rotate=True)]
TINY = float(jnp.finfo(jnp.bfloat16).tiny)
ROWS, DIM = 4, 16


def name(codec) -> str:
    return f"{codec.fmt}{'-rotated' if codec.rotate else ''}"


@functools.partial(jax.jit, static_argnums=0)
def code(codec, x):
    codes = codec.encode(x, x.dtype)
    return codes, codec.decode(codes)


def coded(codec, x):
    """Scales and decoded vectors in numpy float64."""
    codes, decoded = code(codec, np.asarray(x, np.float32))
    return np.asarray(codes.scale, np.float64), np.asarray(decoded, np.float64)


def rounding_bound(fmt: str, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Half the distance of neighbouring levels around each value."""
    if fmt in ("int8", "int4"):
        return scale[..., None] * {"int8": 0.5, "int4": 1.0}[fmt] * np.ones_like(x)
    relative, smallest = {"e4m3": (2.0**-4, 2.0**-10), "e5m2": (2.0**-3, 2.0**-17)}[fmt]
    return np.maximum(np.abs(x) * relative, scale[..., None] * smallest)


def vectors(largest: float = 1e4):
    size = st.floats(-largest, largest, width=32, allow_subnormal=False)
    return arrays(np.float32, (ROWS, DIM), elements=size)


@pytest.mark.parametrize("codec", PLAIN, ids=name)
@given(x=vectors())
@settings(max_examples=40, deadline=None)
def test_rounding_is_to_the_nearest_level(codec, x):
    """Vectors whose scale would be subnormal may vanish."""
    scale, decoded = coded(codec, x)
    allowed = rounding_bound(codec.fmt, np.float64(x), scale) * (1 + 1e-5) + LARGEST[codec.fmt] * TINY
    assert (np.abs(decoded - x) <= allowed).all()


@pytest.mark.parametrize("codec", [codec for codec in LOSSY if codec.rotate], ids=name)
@given(x=vectors())
@settings(max_examples=20, deadline=None)
def test_a_rotated_vector_is_off_by_its_rounding(codec, x):
    scale, decoded = coded(codec, x)
    turned = np.float64(x) @ hadamard_matrix(DIM)
    allowed = np.linalg.norm(rounding_bound(codec.fmt, turned, scale), axis=-1)
    norm = np.linalg.norm(x, axis=-1)
    assert (np.linalg.norm(decoded - x, axis=-1) <= allowed * (1 + 1e-5) + 1e-5 * norm + 1e-32).all()


@pytest.mark.parametrize("codec", PLAIN, ids=name)
@given(x=vectors(2.0**100))
@settings(max_examples=40, deadline=None)
def test_a_scale_is_rounded_up_and_by_little(codec, x):
    """Up, so that the largest value stays on the grid; by less than one unit of bfloat16."""
    scale, _ = coded(codec, x)
    exact = np.abs(np.float64(x)).max(-1) / LARGEST[codec.fmt]
    normal = exact > TINY
    assert (scale[normal] >= exact[normal] * (1 - 1e-7)).all()
    assert (scale[normal] <= exact[normal] * (1 + 2.0**-7)).all()
    assert (scale[exact == 0] == 0).all()


@pytest.mark.parametrize("codec", LOSSY, ids=name)
@pytest.mark.parametrize("power", [-90, -20, 20, 90])
def test_powers_of_two_pass_through(codec, power):
    """From 1e-27 to 1e27: the same codes, another scale."""
    x = np.random.default_rng(0).standard_normal((ROWS, DIM)).astype(np.float32)
    codes, decoded = code(codec, x)
    moved_codes, moved = code(codec, x * np.float32(2.0**power))
    np.testing.assert_array_equal(np.asarray(codes.data), np.asarray(moved_codes.data))
    np.testing.assert_allclose(moved, np.asarray(decoded) * np.float32(2.0**power), rtol=1e-6)


@pytest.mark.parametrize("codec", LOSSY, ids=name)
def test_special_vectors(codec):
    x = np.random.default_rng(1).standard_normal((ROWS, DIM)).astype(np.float32)
    x[0], x[1], x[2] = 0.0, -3.7, 1e-42
    scale, decoded = coded(codec, x)
    np.testing.assert_array_equal(decoded[0], 0.0)
    assert scale[0] == 0
    assert np.abs(decoded[1] + 3.7).max() <= 3.7 * (0.5 if codec.rotate and codec.fmt == "int4" else 2.0**-4)
    assert np.abs(decoded[2]).max() < 1e-36


@pytest.mark.parametrize("codec", PLAIN, ids=name)
def test_a_constant_vector_loses_its_scales_rounding_at_most(codec):
    _, decoded = coded(codec, np.full((ROWS, DIM), -3.7))
    assert np.abs(decoded + 3.7).max() <= 3.7 * 2.0**-7


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("codec", LOSSY, ids=name)
def test_what_is_not_finite_shows(codec, bad):
    x = np.random.default_rng(2).standard_normal((ROWS, DIM)).astype(np.float32)
    clean = coded(codec, x)[1]
    x[1, 5] = bad
    _, decoded = coded(codec, x)
    assert np.isnan(decoded[1]).all()
    np.testing.assert_array_equal(np.delete(decoded, 1, 0), np.delete(clean, 1, 0))


def test_every_int4_byte_holds_two_levels():
    """Low nibble: channel j; high nibble: channel j + H/2; encoding gives the byte back."""
    data = np.arange(256, dtype=np.uint8).reshape(16, 16)
    codes = Codes(jnp.asarray(data), jnp.ones((16,), jnp.bfloat16), "int4")
    levels = np.asarray(jax.jit(lambda c: c.decode())(codes))
    np.testing.assert_array_equal(levels[:, :16], 2 * (data & 15).astype(int) - 15)
    np.testing.assert_array_equal(levels[:, 16:], 2 * (data >> 4).astype(int) - 15)
    full = np.concatenate([levels, np.full((16, 2), 15.0)], axis=-1)[:, [*range(16), 32, *range(16, 32), 33]]
    again = jax.jit(absmax_encode, static_argnums=1)(full * 0.25, "int4")
    np.testing.assert_array_equal(np.asarray(again.data)[:, :16], data)
    np.testing.assert_array_equal(np.asarray(again.scale, np.float32), 0.25)


@pytest.mark.parametrize("fmt", ["int8", *FP8S])
def test_what_is_on_the_grid_is_exact(fmt):
    grid = np.arange(-127.0, 128.0) if fmt == "int8" else np.arange(256, dtype=np.uint8).view(FP8S[fmt]).astype(float)
    grid = grid[np.isfinite(grid)]
    x = np.float32(np.stack([grid, -grid]) * 2.0**-5)
    _, decoded = coded(Int8() if fmt == "int8" else Fp8(format=fmt), x)
    np.testing.assert_array_equal(decoded, x)


@pytest.mark.parametrize(
    ("codec", "at_64", "at_128"),
    [(Dense(), 16, 16), (Int8(), 8.25, 8.125), (Int4(True), 4.25, 4.125), (Fp8(), 8.25, 8.125)],
    ids=lambda x: str(x),
)
def test_bits_per_value_are_those_of_the_buffers(codec, at_64, at_128):
    for dim, bits in ((64, at_64), (128, at_128)):
        codes = jax.eval_shape(lambda x: codec.encode(x, jnp.bfloat16), jnp.zeros((3, dim), jnp.bfloat16))
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(codes))
        assert 8 * held / (3 * dim) == codec.bits_per_value(dim) == bits
        assert codes.dim == dim
        empty = jax.eval_shape(functools.partial(zeros, codec.fmt, (3, dim), jnp.bfloat16))
        assert jax.tree.map(lambda a: (a.shape, a.dtype), empty) == jax.tree.map(lambda a: (a.shape, a.dtype), codes)


def test_dense_casts_and_no_more():
    x = jnp.linspace(-1, 1, 48, dtype=jnp.float32).reshape(3, DIM)
    codes = Dense().encode(x, jnp.bfloat16)
    assert codes.scale is None
    np.testing.assert_array_equal(codes.data, x.astype(jnp.bfloat16))


@pytest.mark.parametrize(("dim", "block"), [(8, 8), (64, 64), (128, 128), (80, 16), (96, 32), (24, 8)])
def test_the_rotation_is_orthonormal(dim, block):
    matrix = np.float64(hadamard_matrix(dim))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(dim), atol=1e-6)
    blocks = np.kron(np.eye(dim // block), np.ones((block, block)))
    np.testing.assert_allclose(np.abs(matrix), blocks / np.sqrt(block), atol=1e-6)


@pytest.mark.parametrize("dim", [64, 80, 96])
def test_scores_do_not_change_under_rotation(dim):
    q, k = np.random.default_rng(3).standard_normal((2, 20, dim)).astype(np.float32)
    turned_q, turned_k = jax.jit(lambda *x: jax.tree.map(rotate, x))(q, k)
    np.testing.assert_allclose(turned_q @ turned_k.T, q @ k.T, atol=1e-4)
    np.testing.assert_allclose(jax.jit(unrotate)(turned_q), q, atol=1e-5)
    assert jax.eval_shape(rotate, jnp.zeros((2, dim), jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_constant_vector_does_not_end_up_in_one_channel():
    turned = np.ones(64, np.float32) @ hadamard_matrix(64)
    assert np.abs(turned).max() / np.linalg.norm(turned) < 0.5


def test_rotation_pays_where_channels_stand_out():
    """One channel twenty times the others, as in keys: more than three times less error; without it, no gain."""
    x = np.random.default_rng(4).standard_normal((512, 64))
    spiky = x.copy()
    spiky[:, 7] *= 20
    without, with_ = (relative_error(coded(Int4(rotate), spiky)[1], spiky) for rotate in (False, True))
    others = np.delete(np.arange(64), 7)
    lost, kept = (relative_error(coded(Int4(r), spiky)[1][:, others], spiky[:, others]) for r in (False, True))
    assert with_ * 2 < without
    assert kept * 2 < lost
    flat = [relative_error(coded(Int4(rotate), x)[1], x) for rotate in (False, True)]
    assert 0.9 < flat[0] / flat[1] < 1.1


@pytest.mark.parametrize("dim", [1, 2, 4, 12, 20, 65])
def test_dimensions_that_cannot_be_rotated(dim):
    with pytest.raises(ValueError, match=f"divisible by 8, got {dim}; use rotate=false"):
        Int8(rotate=True).validate(dim)
    Int8().validate(dim)


def test_what_codecs_refuse():
    with pytest.raises(ValueError, match="even head dimension, got 33"):
        Int4().validate(33)
    with pytest.raises(ValueError, match="'e3m4' is not one of e4m3, e5m2"):
        Fp8(format="e3m4")
