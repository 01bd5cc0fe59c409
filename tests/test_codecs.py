"""Codes and codecs: what bytes mean, how far a decoded vector may be from its original, and what every value costs."""

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

from memjax.pallas_kernels.codes import (
    BITS,
    Codes,
    absmax_encode,
    deinterleave,
    interleave,
    nbytes_per_vector,
    pack,
    packed_dim,
    unpack,
    zeros,
)
from memjax.quantize import Dense, Fp8, Int4, Int8
from memjax.quantize.hadamard import hadamard_matrix, rotate, unrotate

FP8S = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
LARGEST = {"int8": 127.0, "int4": 15.0, "int3": 7.0, "int2": 3.0, "e4m3": 448.0, "e5m2": 57344.0}
PLAIN = [Int8(), Int4(), Fp8(), Fp8(format="e5m2")]
LOSSY = [*PLAIN, Int8(rotate=True), Int4(rotate=True), Fp8(rotate=True)]
TINY = float(jnp.finfo(jnp.bfloat16).tiny)
ROWS, DIM = 4, 16


def name(codec) -> str:
    return f"{codec.fmt}{'-rotated' if codec.rotate else ''}"


@functools.partial(jax.jit, static_argnums=0)
def code(codec, x):
    """Codes of vectors [..., S, H] and what they decode to."""
    codes = codec.encode(x.swapaxes(-1, -2), x.dtype)
    return codes, codec.decode(codes).swapaxes(-1, -2)


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


def fields(data: np.ndarray, fmt: str) -> np.ndarray:
    """The codes [..., H, S] in bytes [..., C, S]: byte r holds channels r, r + C .., from its low bits up.

    int3: two such parts, 2 C / 3 rows of two's complement codes of two bits above C / 3 rows of the third bit.
    """
    if fmt == "int3":
        high, low = data[..., : data.shape[-2] * 2 // 3, :], data[..., data.shape[-2] * 2 // 3 :, :].astype(int)
        return 2 * fields(high, "int2") + np.concatenate([(low >> j) % 2 for j in range(8)], axis=-2)
    bits, half = BITS[fmt], 2 ** (BITS[fmt] - 1)
    planes = [(data.astype(int) >> shift) % 2**bits for shift in range(0, 8, bits)]
    codes = np.concatenate(planes, axis=-2)
    return np.where(codes < half, codes, codes - 2 * half)


@pytest.mark.parametrize("fmt", ["int4", "int3", "int2", "int8"])
def test_what_every_byte_holds(fmt):
    """Two's complement codes; packing and encoding give the bytes back."""
    data = np.arange(256, dtype=np.uint8).reshape(2, 4, 32)
    if fmt == "int3":
        data = np.concatenate([data, data[:, ::-2, ::-1]], axis=1)
    stored = jnp.asarray(data.view(np.int8) if fmt == "int8" else data)
    codes = np.asarray(jax.jit(unpack, static_argnums=1)(stored, fmt))
    np.testing.assert_array_equal(codes, fields(data, fmt))
    assert codes.dtype == np.int8
    np.testing.assert_array_equal(jax.jit(pack, static_argnums=1)(codes, fmt), stored)
    if fmt == "int8":
        codes = np.maximum(codes, -127)
    levels = codes if fmt == "int8" else 2 * codes + 1
    peaks = np.concatenate([levels, np.full((2, 8, 32), LARGEST[fmt])], axis=1)
    again = jax.jit(absmax_encode, static_argnums=1)(np.float32(0.25 * peaks), fmt)
    np.testing.assert_array_equal(again.decode(), 0.25 * peaks)
    np.testing.assert_array_equal(np.asarray(again.scale, np.float32), 0.25)


@pytest.mark.parametrize(
    ("fmt", "order"), [("int8", range(8)), ("int4", "04152637"), ("int3", "04152637"), ("int2", "02461357")]
)
def test_the_order_in_which_neighbours_are_unpacked(fmt, order):
    rows = jnp.arange(16).reshape(2, 8)
    turned = interleave(rows, fmt)
    np.testing.assert_array_equal(turned, np.asarray(rows)[:, [int(channel) for channel in order]])
    np.testing.assert_array_equal(deinterleave(turned, fmt), rows)


TABLES = {
    "int4": (-127, -99, -77, -60, -45, -31, -18, -6, 6, 18, 31, 45, 60, 77, 99, 127),
    "int3": (-127, -80, -45, -14, 15, 46, 81, 127),
    "int2": (-120, -30, 31, 127),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("grid", ["uniform", "cubic", "table"])
@pytest.mark.parametrize("fmt", ["int4", "int3", "int2"])
def test_levels_of_a_grid(fmt, grid, dtype):
    """Uniform and table levels are exact in bfloat16 too, cubic ones rounded to it."""
    data = np.random.default_rng(0).integers(0, 256, (3, 12, 11)).astype(np.uint8)
    codes = Codes(jnp.asarray(data), None, fmt, grid=TABLES[fmt] if grid == "table" else grid)
    expected = {
        "uniform": lambda c: 2 * c + 1,
        "cubic": lambda c: np.asarray(cubic_levels(fmt))[c + 2 ** BITS[fmt] // 2],
        "table": lambda c: np.asarray(TABLES[fmt])[c + len(TABLES[fmt]) // 2],
    }[grid](fields(data, fmt))
    levels = jax.jit(lambda c: c.levels(dtype))(codes)
    assert levels.dtype == dtype
    assert (codes.dim, codes.slots) == levels.shape[1:]
    exact = 2.0**-8 if (grid, dtype) == ("cubic", "bfloat16") else 1e-6
    np.testing.assert_allclose(np.asarray(levels, np.float64), expected, rtol=exact)


def test_int3_codes_hold_int2_codes():
    """The first two thirds of the bytes are codes of the middles between the levels that they leave open."""
    rng = np.random.default_rng(0)
    data = jnp.asarray(rng.integers(0, 256, (2, 24, 5)), jnp.uint8)
    scale, zero, gain = (jnp.asarray(rng.uniform(0.5, 1, shape), jnp.bfloat16) for shape in ((2, 5), (2, 5), (2, 64, 1)))
    codes = Codes(data, scale, "int3", zero, gain=gain)
    coarse = jax.jit(Codes.coarse)(codes)
    np.testing.assert_array_equal(coarse.data, data[:, :16])
    assert (coarse.fmt, coarse.dim) == ("int2", 64)
    apart = (codes.decode() - coarse.decode()) / np.float32(scale)[:, None] / np.float32(gain)
    np.testing.assert_allclose(np.abs(apart), 1.0, atol=1e-4)
    with pytest.raises(ValueError, match="only uniform int3 codes have a coarse part, not int3 with grid cubic"):
        Codes(data, scale, "int3", grid="cubic").coarse()


@pytest.mark.parametrize("dim", [8, 64, 80, 128])
def test_int3_takes_three_bits(dim):
    x = np.random.default_rng(0).standard_normal((dim, 3)).astype(np.float32)
    codes = absmax_encode(x, "int3")
    assert codes.data.nbytes == 3 * 3 * dim // 8 == 3 * (nbytes_per_vector("int3", dim, "bfloat16") - 2)
    assert (codes.dim, codes.slots) == (dim, 3)
    assert np.abs(codes.decode() - x).max() <= float(codes.scale.max()) * (1 + 1e-6)
    np.testing.assert_array_equal(jax.eval_shape(lambda: zeros("int3", (dim, 3), "bfloat16")).data.shape, codes.data.shape)


def cubic_levels(fmt: str) -> list[float]:
    a, b = {"int4": (0.240507, 0.002098), "int3": (0.471455, 0.011585), "int2": (0.892887, 0.050693)}[fmt]
    half = 2 ** (BITS[fmt] - 1)
    return [x * (a + b * x**2) for x in np.arange(-half, half) + 0.5]


@pytest.mark.parametrize(
    ("fmt", "lloyd_max", "loss"), [("int2", 0.117482, 1e-5), ("int3", 0.034548, 0.0022), ("int4", 0.009501, 0.021)]
)
def test_the_cubic_grid_is_nearly_the_best_for_a_gaussian(fmt, lloyd_max, loss):
    """Its mean squared error beside that of the optimal quantizer (Max, 1960)."""
    x = np.linspace(-8, 8, 400_001)
    nearest = np.abs(x[:, None] - np.asarray(cubic_levels(fmt))).min(axis=1)
    error = np.sum(nearest**2 * np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)) * (x[1] - x[0])
    assert lloyd_max * (1 - 1e-3) < error < lloyd_max * (1 + loss + 1e-3)


TILES = {"one per slot": (None, 1), "a channel's tile": (1, 4), "groups of channels": (4, 1), "both": (2, 6), "all": (16, 12)}


@pytest.mark.parametrize("fmt", ["int8", "int4", "int3", "int2", "e4m3"])
@pytest.mark.parametrize("scale_tile", TILES)
@pytest.mark.parametrize("zero_tile", [None, *TILES])
def test_factors_of_slots_and_tiles(fmt, scale_tile, zero_tile):
    """x[h, s] = gain[h // a'', s // b''] (scale[h // a, s // b] * level[h, s] + zero[h // a', s // b'])."""
    dim, slots, rng = 16, 12, np.random.default_rng(1)

    def factor(tile: str | None):
        if tile is None:
            return None, 0.0
        a, b = TILES[tile]
        shape = (2, 3, slots) if a is None else (2, 3, dim // a, slots // b)
        drawn = jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
        wide = np.asarray(drawn, np.float64)
        wide = wide[:, :, None] if a is None else wide.repeat(a, axis=2).repeat(b, axis=3)
        return drawn, wide

    (scale, wide_scale), (zero, wide_zero) = factor(scale_tile), factor(zero_tile)
    gain_tile = dict(zip([None, *TILES], [*TILES, None], strict=True))[zero_tile]
    gain, wide_gain = factor(gain_tile)
    wide_gain = 1.0 if gain is None else wide_gain
    data = jnp.asarray(rng.integers(0, 100, (2, 3, packed_dim(fmt, dim), slots)), jnp.uint8)
    data = jax.lax.bitcast_convert_type(data, {"int8": jnp.int8, "e4m3": jnp.float8_e4m3fn}.get(fmt, jnp.uint8))
    codes = Codes(data, scale, fmt, zero, gain=gain)
    levels = 2 * fields(np.asarray(data), fmt) + 1 if fmt.startswith("int") and fmt != "int8" else np.asarray(data, np.float64)
    found = jax.jit(lambda c: c.decode())(codes)
    expected = wide_gain * (levels * wide_scale + wide_zero)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=2e-6 * np.abs(levels).max())
    assert codes.per_slot == all(each in (None, "one per slot") for each in (scale_tile, zero_tile, gain_tile))


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
        codes = jax.eval_shape(lambda x: codec.encode(x, jnp.bfloat16), jnp.zeros((dim, 3), jnp.bfloat16))
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(codes))
        assert 8 * held / (3 * dim) == codec.bits_per_value(dim) == bits
        assert (codes.dim, codes.slots) == (dim, 3)
        empty = jax.eval_shape(functools.partial(zeros, codec.fmt, (dim, 3), jnp.bfloat16))
        assert jax.tree.map(lambda a: (a.shape, a.dtype), empty) == jax.tree.map(lambda a: (a.shape, a.dtype), codes)


def test_dense_casts_and_no_more():
    x = jnp.linspace(-1, 1, 48, dtype=jnp.float32).reshape(DIM, 3)
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


@pytest.mark.parametrize("turn", [rotate, unrotate])
def test_vectors_in_slots_are_rotated_like_rows(turn):
    x = np.random.default_rng(5).standard_normal((2, 3, 24, 7)).astype(np.float32)
    slots, rows = jax.jit(lambda x: (turn(x, axis=-2), turn(x.swapaxes(-1, -2)).swapaxes(-1, -2)))(x)
    np.testing.assert_allclose(slots, rows, atol=1e-6)
    assert relative_error(slots, x) > 1


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
    with pytest.raises(ValueError, match="multiple of 2 channels, got 33"):
        Int4().validate(33)
    with pytest.raises(ValueError, match="int2 packs 4 values per byte and needs a multiple of 4 channels, got 66"):
        packed_dim("int2", 66)
    with pytest.raises(ValueError, match="int3 packs 8 values into 3 bytes and needs a multiple of 8 channels, got 68"):
        packed_dim("int3", 68)
    with pytest.raises(ValueError, match="'e3m4' is not one of e4m3, e5m2"):
        Fp8(format="e3m4")
