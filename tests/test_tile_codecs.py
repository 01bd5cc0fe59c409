"""KIVI, KVarN, NF4, NVFP4, int2: their grids, bytes and special cases, and what all codecs do to attention.

Targets of the attention table are the reference sheet's: 4,096 keys of 128 channels, 64 queries, logits scaled to a standard
deviation of 2 within a query, only keys (or only values) encoded.
"""

import functools
import statistics
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cache_helpers import quick_jit

from memjax.pallas_kernels.codes import unpack
from memjax.quantize.blocks import E2M1_TABLE, NF4, NF4_TABLE, NVFP4
from memjax.quantize.hadamard import hadamard_matrix
from memjax.quantize.int2 import Int2
from memjax.quantize.kivi import Kivi, KiviKeys, KiviValues
from memjax.quantize.kvarn import KVarN, KVarNKeys, KVarNValues, balance
from memjax.quantize.turboquant import Lloyd, prod_decode, prod_encode

DIM, KEYS, QUERIES = 128, 4096, 64
# The sheet's four outlier channels are not said; these, with these signs, reproduce its figures to 2 %. Other channels move
# TurboQuant's error on them by up to 20 %: what a Hadamard matrix makes of a few offsets depends on their rows.
OUTLIERS = (0, 1, 2, 3), (10.0, 10.0, 10.0, -10.0)


@functools.partial(quick_jit, static_argnums=0)
def code(codec, x):
    """Codes of vectors [..., S, H] and what they decode to."""
    codes = codec.encode(x.swapaxes(-1, -2), x.dtype)
    return codes, codec.decode(codes).swapaxes(-1, -2)


def decoded(codec, x) -> np.ndarray:
    return np.asarray(code(codec, np.float32(x))[1], np.float64)


@functools.partial(quick_jit, static_argnums=0)
def prod(bits, x):
    return prod_decode(prod_encode(x.T, bits), bits).T


@dataclass(frozen=True)
class Attention:
    """Exact attention of the table and what a change of its keys or values does to it."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray

    @functools.cached_property
    def scale(self) -> float:
        logits = self.q @ self.k.T
        return 2 / np.std(logits - logits.mean(1, keepdims=True))

    def weights(self, k: np.ndarray) -> np.ndarray:
        logits = self.q @ k.T * self.scale
        p = np.exp(logits - logits.max(1, keepdims=True))
        return p / p.sum(1, keepdims=True)

    def with_keys(self, k: np.ndarray) -> tuple[float, float]:
        """Relative squared error of the keys, KL divergence of the weights in nats."""
        p, found = self.weights(self.k), self.weights(k)
        return float(np.mean((k - self.k) ** 2) / np.mean(self.k**2)), float(np.mean(np.sum(p * np.log(p / found), 1)))

    def with_values(self, v: np.ndarray) -> float:
        """Relative error of the outputs."""
        p = self.weights(self.k)
        return float(np.linalg.norm(p @ (v - self.v)) / np.linalg.norm(p @ self.v))


@functools.cache
def attention(kind: str) -> Attention:
    rng = np.random.default_rng(0)
    k, q, v = (rng.standard_normal((n, DIM)) for n in (KEYS, QUERIES, KEYS))
    if kind == "outlier4":
        channels, offsets = OUTLIERS
        k[:, channels] = 3 * k[:, channels] + np.asarray(offsets)
    if kind == "t4":
        k = rng.standard_t(4, (KEYS, DIM)) / 2**0.5
    return Attention(q, k, v)


def tokenwise(bits: int, k: np.ndarray) -> np.ndarray:
    """INT: asymmetric, one group per token."""
    return decoded(KiviValues(bits, DIM), k)


def rotated_tokenwise(bits: int, k: np.ndarray) -> np.ndarray:
    matrix = np.float64(hadamard_matrix(DIM))
    return tokenwise(bits, k @ matrix) @ matrix.T


def centred(bits: int, k: np.ndarray) -> np.ndarray:
    mean = k.mean(0)
    return decoded(Lloyd(bits), k - mean) + mean


METHODS = {
    "INT": tokenwise,
    "RHT+INT": rotated_tokenwise,
    "KIVI": lambda bits, k: decoded(KiviKeys(bits), k),
    "TurboQuant": lambda bits, k: decoded(Lloyd(bits), k),
    "centred": centred,
    "prod": lambda bits, k: np.float64(prod(bits, np.float32(k))),
    "KVarN": lambda bits, k: decoded(KVarNKeys(bits), k),
}


@functools.cache
def measured(method: str, kind: str, bits: int) -> tuple[float, float]:
    case = attention(kind)
    return case.with_keys(METHODS[method](bits, case.k))


# Relative squared error of the keys and KL divergence at 2, 3 and 4 bits.
SHEET = {
    ("INT", "gauss"): ((0.251, 0.50), (0.046, 0.095), (0.010, 0.020)),
    ("INT", "outlier4"): ((1.32, 13.2), (0.20, 1.94), (0.044, 0.31)),
    ("RHT+INT", "gauss"): ((0.250, 0.50), (0.046, 0.094), (0.0099, 0.020)),
    ("RHT+INT", "outlier4"): ((0.141, 1.03), (0.027, 0.19), (0.0058, 0.040)),
    ("KIVI", "gauss"): ((0.155, 0.30), (0.028, 0.055), (0.0061, 0.012)),
    ("KIVI", "outlier4"): ((0.044, 0.30), (0.008, 0.055), (0.0018, 0.012)),
    ("TurboQuant", "gauss"): ((0.118, 0.24), (0.034, 0.067), (0.0091, 0.018)),
    ("TurboQuant", "outlier4"): ((0.115, 0.75), (0.032, 0.22), (0.0090, 0.062)),
    ("centred", "gauss"): ((0.118, 0.24), (0.034, 0.067), (0.0091, 0.018)),
    ("centred", "outlier4"): ((0.034, 0.24), (0.0095, 0.067), (0.0026, 0.018)),
    ("prod", "gauss"): ((0.57, 1.10), (0.18, 0.36), (0.053, 0.11)),
    ("prod", "outlier4"): ((0.64, 3.3), (0.18, 1.12), (0.049, 0.35)),
    ("KVarN", "gauss"): ((0.246, 0.49), (0.045, 0.091), (0.0098, 0.020)),
    ("KVarN", "outlier4"): ((0.075, 0.53), (0.014, 0.095), (0.0030, 0.021)),
}
T4_AT_3_BITS = {
    "INT": (0.104, 1.67),
    "RHT+INT": (0.043, 0.11),
    "KIVI": (0.041, 0.062),
    "TurboQuant": (0.033, 0.20),
    "centred": (0.033, 0.19),
    "prod": (0.18, 1.24),
    "KVarN": (0.044, 0.27),
}


@pytest.mark.parametrize(("method", "kind"), SHEET, ids=lambda x: x)
def test_keys_of_attention(method, kind):
    """Errors to 2 % and the sheet's own rounding, KL to 6 % and that: it varies by 2 to 5 % from draw to draw.

    Prod's errors are those of one sketch, whose draw alone moves them by 3 %, and on offsets, one direction that all keys
    share, by more: 0.49 to 0.60 at 2 bits in twelve draws of sketch and rotation.
    """
    for (mse, kl), (found_mse, found_kl) in zip(
        SHEET[method, kind], (measured(method, kind, bits) for bits in (2, 3, 4)), strict=True
    ):
        loose = 0.17 if (method, kind) == ("prod", "outlier4") else 0.035 if method == "prod" else 0.02
        assert found_mse == pytest.approx(mse, abs=loose * mse + half_digit(mse))
        loose = 0.17 if (method, kind) == ("prod", "outlier4") else 0.06
        assert found_kl == pytest.approx(kl, abs=loose * kl + half_digit(kl))


def half_digit(x: float) -> float:
    """Half a unit of the last of the digits that a figure of the sheet was printed with."""
    return 0.5 * 10.0 ** -len(str(x).partition(".")[2])


@pytest.mark.parametrize("method", T4_AT_3_BITS)
def test_keys_with_heavy_tails(method):
    """Errors to 4 %; KL hangs on a few keys and differs by a factor of two between draws, here and on the sheet."""
    mse, kl = measured(method, "t4", 3)
    assert mse == pytest.approx(T4_AT_3_BITS[method][0], rel=0.04)
    assert T4_AT_3_BITS[method][1] / 2 < kl < T4_AT_3_BITS[method][1] * 2


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_orderings(bits):
    for kind in ("gauss", "outlier4"):
        rotated = {method: measured(method, kind, bits)[1] for method in ("RHT+INT", "TurboQuant", "centred", "KVarN")}
        assert measured("prod", kind, bits)[1] > 1.5 * max(rotated.values())
    # Centring removes what offsets cost, exactly: softmax does not see the mean.
    assert measured("centred", "outlier4", bits)[1] == pytest.approx(measured("centred", "gauss", bits)[1], rel=0.05)
    if bits == 4:
        assert measured("RHT+INT", "outlier4", 4)[1] < 0.8 * measured("TurboQuant", "outlier4", 4)[1]


V_ONLY = {
    "INT": (lambda bits: KiviValues(bits, DIM), (0.51, 0.22, 0.10)),
    "KIVI": (KiviValues, (0.41, 0.17, 0.08)),
    "TurboQuant": (Lloyd, (0.34, 0.185, 0.095)),
}


@pytest.mark.parametrize("method", V_ONLY)
def test_values_of_attention(method):
    """Outputs to 8 %: they are averages over the few keys that a query attends to."""
    case = attention("gauss")
    codec, targets = V_ONLY[method]
    for bits, target in zip((2, 3, 4), targets, strict=True):
        assert case.with_values(decoded(codec(bits), case.v)) == pytest.approx(target, rel=0.08)


def test_balancing_pays_where_tokens_differ_in_size():
    """Log-normal norms, sigma 1: the error of a token relative to its own size, by the mean and for the worst."""
    rng = np.random.default_rng(3)
    k = rng.standard_normal((1024, DIM)) * np.exp(rng.standard_normal((1024, 1)))

    def relative(codec) -> np.ndarray:
        return np.sum((decoded(codec, k) - k) ** 2, 1) / np.sum(k**2, 1)

    plain, balanced = (relative(KVarNKeys(2, iterations=iterations)) for iterations in (0, 8))
    assert balanced.mean() < plain.mean() / 4
    assert np.median(balanced) < 0.45
    assert np.median(plain) > 1


def tiles(x: np.ndarray, size: int) -> np.ndarray:
    return x.reshape(*x.shape[:-1], -1, size)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("side", ["keys", "values"])
def test_kivi_against_its_formula(side, bits):
    """min + (max - min) / (2^b - 1) * round(..), in float64, but for the rounding of scale and zero point to bfloat16."""
    x = np.random.default_rng(0).standard_normal((2, 64, 32)) + 3 * np.random.default_rng(1).standard_normal((32,))
    codec = KiviKeys(bits, 16) if side == "keys" else KiviValues(bits, 16)
    axes = tiles(x.swapaxes(1, 2), 16) if side == "keys" else tiles(x, 16)
    low, high = axes.min(-1, keepdims=True), axes.max(-1, keepdims=True)
    step = (high - low) / (2**bits - 1 if bits < 8 else 254)
    expected = (low + step * np.round((axes - low) / step)).reshape(
        x.swapaxes(1, 2).shape if side == "keys" else x.shape
    )
    expected = expected.swapaxes(1, 2) if side == "keys" else expected
    codes, again = code(codec, np.float32(x))
    shape = (2, 32, 4) if side == "keys" else (2, 2, 64)
    assert codes.scale.shape == codes.zero.shape == shape
    mine, theirs = np.mean((np.float64(again) - x) ** 2), np.mean((expected - x) ** 2)
    assert theirs * 0.97 < mine < theirs * {2: 1.01, 3: 1.02, 4: 1.04, 8: 1.15}[bits]


@pytest.mark.parametrize("offset", [0.0, 10.0, 1000.0])
def test_kivi_covers_its_groups_whatever_their_offset(offset):
    """No value is off by more than half a step, the rounding of the zero point included."""
    x = offset + np.random.default_rng(2).standard_normal((64, 16))
    codes, again = code(KiviKeys(4, 32), np.float32(x))
    step = 2 * np.asarray(codes.scale, np.float64).repeat(32, axis=1).T
    assert (np.abs(again - x) <= step * (0.5 + 15 * 2.0**-9) + 1e-6 * offset).all()
    widest = (2 * np.asarray(codes.scale, np.float64) * 15).max()
    assert widest < (x.max() - x.min()) * 1.02 + 2 * offset * 2.0**-8


SMALL = [
    KiviKeys(2, 8),
    KiviKeys(8, 4),
    KiviValues(3, 8),
    KiviValues(4, 16),
    KVarNKeys(2, 8),
    KVarNValues(4, 8),
    NF4(),
    NF4(rotate=True),
    NF4(group=8),
    NVFP4(),
    Int2(),
    Int2(rotate=True),
]


@pytest.mark.parametrize("codec", SMALL, ids=str)
def test_heads_and_tiles_are_encoded_apart(codec):
    x = np.random.default_rng(4).standard_normal((2, 3, 16, 32)).astype(np.float32)
    codes, again = code(codec, x)
    alone = np.stack([decoded(codec, part) for part in x.reshape(6 * 2, 8, 32)])
    np.testing.assert_allclose(again, alone.reshape(x.shape), rtol=1e-5, atol=1e-5)
    assert (codes.dim, codes.slots) == (32, 16)
    basis = codec.out_of_basis(jnp.swapaxes(codes.decode(), -1, -2))
    np.testing.assert_allclose(basis, again, atol=1e-5)
    np.testing.assert_allclose(codec.out_of_basis(codec.into_basis(jnp.asarray(x))), x, atol=1e-5)


@pytest.mark.parametrize("codec", SMALL, ids=str)
def test_powers_of_two_pass_through(codec):
    x = np.random.default_rng(5).standard_normal((8, 32)).astype(np.float32)
    codes, again = code(codec, x)
    for power in (-90, 90):
        moved_codes, moved = code(codec, x * np.float32(2.0**power))
        np.testing.assert_array_equal(codes.data, moved_codes.data)
        np.testing.assert_allclose(moved, np.asarray(again) * np.float32(2.0**power), rtol=1e-6)


@pytest.mark.parametrize("codec", SMALL, ids=str)
def test_special_tiles(codec):
    """Zeros stay zeros, a constant is kept, and what is not finite shows in its group and nowhere outside its tile."""
    rng = np.random.default_rng(6)
    zeros, random = np.zeros((8, 32), np.float32), rng.standard_normal((8, 32)).astype(np.float32)
    constant = np.full((8, 32), -3.7, np.float32)
    spoiled = random.copy()
    spoiled[2, 5], spoiled[6, 7] = np.nan, np.inf
    again = np.asarray(code(codec, np.concatenate([zeros, constant, random, spoiled]))[1])
    np.testing.assert_array_equal(again[:8], 0.0)
    if not codec.rotate:
        assert np.abs(again[8:16] + 3.7).max() < 3.7 * 2.0**-3
    np.testing.assert_allclose(again[16:24], decoded(codec, random), rtol=1e-5, atol=1e-6)
    assert np.isnan(again[24:][[2, 6], [5, 7]]).all()
    assert np.isfinite(again[:24]).all()
    if codec.tile == 1 or isinstance(codec, KVarNValues):
        assert np.isfinite(np.delete(again[24:], [2, 6], 0)).all()


@pytest.mark.parametrize("codec", [KiviKeys(2, 8), KVarNKeys(4, 8)], ids=str)
def test_a_constant_channel_costs_its_neighbours_nothing(codec):
    """An offset of 1000 in one channel: KIVI's other channels are untouched; KVarN's see the rotation of it."""
    x = np.random.default_rng(7).standard_normal((16, 32))
    moved = x.copy()
    moved[:, 3] = 1000.0
    others = np.delete(np.arange(32), 3)
    before, after = decoded(codec, x)[:, others], decoded(codec, moved)[:, others]
    if isinstance(codec, KiviKeys):
        np.testing.assert_array_equal(before, after)
    assert np.abs(decoded(codec, moved)[:, 3] - 1000).max() < 8


def test_balanced_tiles():
    """Token sizes are found up to a common factor; the factors never make the imbalance worse."""
    rng = np.random.default_rng(8)
    size = np.exp2(rng.integers(0, 3, 64)).astype(np.float32)
    size[::16] = 8.0
    x = (rng.standard_normal((256, 64)) * size).astype(np.float32)
    balanced = quick_jit(functools.partial(balance, iterations=16))
    channel, token = balanced(x[:, None])
    before = np.ptp(np.log(x.var(0))) + np.ptp(np.log(x.var(1)))
    scaled = x / np.asarray(channel)[:, 0] / np.asarray(token)[0]
    after = np.ptp(np.log(scaled.var(0))) + np.ptp(np.log(scaled.var(1)))
    assert after < 0.75 * before
    large = size >= 4
    np.testing.assert_allclose(
        (np.asarray(token)[0, 0] / size)[large], (np.asarray(token)[0, 0] / size)[large][0], rtol=0.3
    )
    channel, token = balanced(np.ones_like(x)[:, None])
    assert np.isfinite(channel).all()
    assert np.isfinite(token).all()


def test_kvarn_codes_are_rounded_with_what_is_stored():
    """Decoded in the basis of the codes, every value is within half a step of its own, in float64."""
    x = np.random.default_rng(9).standard_normal((32, 64)) * np.exp(np.random.default_rng(10).standard_normal((32, 1)))
    turned = x @ np.float64(hadamard_matrix(64))
    for codec in (KVarNKeys(4, 16), KVarNValues(4, 16)):
        codes, _ = code(codec, np.float32(x))
        step = 2 * np.float64(codes.spread(codes.scale)) * np.float64(codes.spread(codes.gain))
        off = np.abs(np.float64(codes.decode()) - turned.T)
        assert (off <= step * (0.5 + 15 * 2.0**-9) + 1e-5).all()
        assert (codes.scale.shape, codes.gain.shape) == (
            ((64, 2), (32,)) if isinstance(codec, KVarNKeys) else ((32,), (64, 2))
        )


def test_the_table_of_nf4():
    """Quantiles of a Gaussian as QLoRA builds them: eight above zero, seven below, ends at 1; integers change under 0.1 %.

    Ends at 2.2 to 3: the largest of 40 to 400 Gaussian values.
    """
    inverse = statistics.NormalDist().inv_cdf
    above = [inverse(p) for p in np.linspace(0.9677083, 0.5, 9)[:-1]]
    below = [-inverse(p) for p in np.linspace(0.9677083, 0.5, 8)[:-1]]
    table = np.sort([*below, 0.0, *above])
    table /= table[-1]
    assert tuple(np.round(109 * table).astype(int)) == NF4_TABLE
    x = np.linspace(-8, 8, 40_001)
    weight = np.exp(-(x**2) / 2)
    for end in (2.2, 2.6, 3.0):
        exact, rounded = (
            weight @ np.abs(x[:, None] - end * levels).min(1) ** 2 for levels in (table, np.asarray(NF4_TABLE) / 109)
        )
        assert abs(rounded / exact - 1) < 1e-3


@pytest.mark.parametrize("codec", [NF4(), NF4(group=16), NVFP4()], ids=str)
def test_table_codes_are_the_nearest_levels(codec):
    x = np.random.default_rng(11).standard_normal((64, 64)).astype(np.float32)
    codes, again = code(codec, x)
    scale = np.asarray(codes.spread(codes.scale), np.float64)
    distance = np.abs(x.T[..., None] - scale[..., None] * np.asarray(codes.grid, np.float64))
    np.testing.assert_allclose(np.abs(again - x), distance.min(-1).T, atol=1e-6)
    assert np.asarray(unpack(codes.data, "int4")).max() == 7


def test_nvfp4_is_the_format_of_the_hardware():
    """Against ml_dtypes' float4 and float8, a block at a time, where no block needs the scale of a tensor."""
    x = np.random.default_rng(12).standard_normal((32, 4, 16)).astype(np.float32)
    block = (np.abs(x).max(-1, keepdims=True) / 6).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    expected = (x / block).astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * block
    again = decoded(NVFP4(), x.reshape(32, 64)).reshape(x.shape)
    assert (np.abs(again - expected) < 1e-6).mean() > 0.999  # ties go elsewhere
    assert sorted({abs(level) / 2 for level in E2M1_TABLE}) == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


BITS_PER_VALUE = [
    (KiviKeys(2), 3.0, 3.0),
    (KiviKeys(3), 4.0, 4.0),
    (KiviKeys(4), 5.0, 5.0),
    (KiviKeys(8), 9.0, 9.0),
    (KiviKeys(2, 128), 2.25, 2.25),
    (KiviValues(2), 3.0, 3.0),
    (KiviValues(4, 64), 4.5, 4.5),
    (KVarNKeys(2), 2.5, 2.375),
    (KVarNKeys(4), 4.5, 4.375),
    (KVarNValues(2), 2.625, 2.375),
    (KVarNValues(3), 3.625, 3.375),
    (NF4(), 4.25, 4.125),
    (NF4(group=32), 4.5, 4.5),
    (NVFP4(), 5.0, 5.0),
    (Int2(), 2.25, 2.125),
]


@pytest.mark.parametrize(("codec", "at_64", "at_128"), BITS_PER_VALUE, ids=str)
def test_bits_per_value_are_those_of_the_buffers(codec, at_64, at_128):
    for dim, bits in ((64, at_64), (128, at_128)):
        codes = jax.eval_shape(lambda x: codec.encode(x, x.dtype), jnp.zeros((2, dim, 256), jnp.bfloat16))
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(codes))
        assert 8 * held / (2 * dim * 256) == codec.bits_per_value(dim) == bits


def test_both_streams_of_a_method():
    assert (Kivi(4, 16).keys, Kivi(4, 16).values) == (KiviKeys(4, 16), KiviValues(4, 16))
    assert (Kivi(4, 16).keys.tile, Kivi(4, 16).values.tile) == (16, 1)
    assert (KVarN(3, 2, 64).keys, KVarN(3, 2, 64).values) == (KVarNKeys(3, 64), KVarNValues(2, 64))


def test_what_they_refuse():
    x = jnp.zeros((64, 40))
    with pytest.raises(ValueError, match="KIVI encodes whole tiles of 32 tokens, got 40; keep the rest dense"):
        KiviKeys().encode(x, x.dtype)
    with pytest.raises(ValueError, match="KVarN encodes whole tiles of 128 tokens, got 40"):
        KVarNValues().encode(x, x.dtype)
    with pytest.raises(ValueError, match="KIVI groups of 32 channels do not divide head_dim 80; use a group that does"):
        KiviValues().validate(80)
    with pytest.raises(ValueError, match="nvfp4 groups of 16 channels do not divide head_dim 72"):
        NVFP4().validate(72)
    for method in (lambda: Kivi(5), lambda: KVarN(4, 5)):
        with pytest.raises(ValueError, match="codes have 2, 3, 4, 8 bits, got 5; no packed format"):
            method()
    with pytest.raises(ValueError, match="at least 1 value, got 0"):
        Kivi(2, 0)
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        KVarN(tile=1)
    with pytest.raises(ValueError, match="0 or more iterations, got -1"):
        KVarNKeys(iterations=-1)
    with pytest.raises(ValueError, match="1 channel or more, or 0 for the whole vector, got -1"):
        NF4(group=-1)
    with pytest.raises(ValueError, match="divisible by 8, got 36"):
        KVarNKeys().validate(36)
