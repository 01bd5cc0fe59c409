"""Rotary embeddings against formulas written down a second time, in numpy float64."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.attention.rope import ROPE_KINDS, Rope, apply_rope

DIM = 16
SHORT, LONG = tuple(1.0 + 0.1 * i for i in range(8)), tuple(2.0 + i for i in range(8))


def plain(theta=10000.0, dim=DIM):
    return [theta ** (-2 * i / dim) for i in range(dim // 2)]


def llama3(inv, factor, low, high, trained):
    out = []
    for f in inv:
        turns = trained * f / (2 * math.pi)  # rotations during training
        if turns < low:
            out.append(f / factor)
        elif turns > high:
            out.append(f)
        else:
            blend = (turns - low) / (high - low)
            out.append((1 - blend) * f / factor + blend * f)
    return out


def yarn(inv, theta, factor, trained, fast=32.0, slow=1.0, truncate=True):
    def pair_that_turns(turns):
        return len(inv) * math.log(trained / (turns * 2 * math.pi)) / math.log(theta)

    low, high = pair_that_turns(fast), pair_that_turns(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * len(inv) - 1)
    ramp = [min(max((i - low) / max(high - low, 1e-3), 0), 1) for i in range(len(inv))]
    return [f * (1 - r) + f / factor * r for f, r in zip(inv, ramp, strict=True)]


# Name: the rope, the frequencies it must have at a capacity of 4096, and its factor on cos and sin.
KINDS = {
    "default": (Rope(DIM), plain(), 1.0),
    "theta": (Rope(DIM, theta=5e5), plain(5e5), 1.0),
    "linear": (Rope(DIM, kind="linear", factor=4.0), [f / 4 for f in plain()], 1.0),
    "dynamic": (
        Rope(DIM, kind="dynamic", factor=2.0, original_max_position=1024),
        plain(10000.0 * (2.0 * 4096 / 1024 - 1.0) ** (16 / 14)),
        1.0,
    ),
    "dynamic, short": (Rope(DIM, kind="dynamic", factor=2.0, original_max_position=8192), plain(), 1.0),
    "llama3": (
        Rope(DIM, 5e5, "llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0),
        llama3(plain(5e5), 8.0, 1.0, 4.0, 8192),
        1.0,
    ),
    "yarn": (
        Rope(DIM, 1e4, "yarn", 40.0, 4096),
        yarn(plain(), 1e4, 40.0, 4096),
        0.1 * math.log(40.0) + 1,
    ),
    "yarn of DeepSeek": (
        Rope(DIM, 1e4, "yarn", 40.0, 4096, mscale=0.707, mscale_all_dim=1.0, beta_fast=16.0, truncate=False),
        yarn(plain(), 1e4, 40.0, 4096, fast=16.0, truncate=False),
        (0.1 * 0.707 * math.log(40.0) + 1) / (0.1 * math.log(40.0) + 1),
    ),
    "yarn with its factor": (
        Rope(DIM, 1e4, "yarn", 4.0, 2048, attention_factor=0.9),
        yarn(plain(), 1e4, 4.0, 2048),
        0.9,
    ),
    "longrope, long": (
        Rope(DIM, kind="longrope", factor=4.0, original_max_position=1024, short_factor=SHORT, long_factor=LONG),
        [f / d for f, d in zip(plain(), LONG, strict=True)],
        math.sqrt(1 + math.log(4.0) / math.log(1024)),
    ),
    "longrope, short": (
        Rope(
            DIM,
            kind="longrope",
            original_max_position=4096,
            attention_factor=1.2,
            short_factor=SHORT,
            long_factor=LONG,
        ),
        [f / d for f, d in zip(plain(), SHORT, strict=True)],
        1.2,
    ),
    "frequency factors": (
        Rope(DIM, freq_factors=LONG),
        [f / d for f, d in zip(plain(), LONG, strict=True)],
        1.0,
    ),
}


@functools.partial(jax.jit, static_argnums=(2, 3))
def turn(x, positions, rope, seq_len=4096):
    return apply_rope(x, positions, rope, seq_len)


@functools.cache
def vectors(dim=DIM):
    """[B, T, heads, dim] and positions [B, T] that are no range."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((2, 5, 3, dim)).astype(np.float32), rng.integers(0, 2000, (2, 5)).astype(np.int32)


def rotated(x, positions, inv_freq, scale=1.0):
    """Pairs (j, j + dim/2) as complex numbers."""
    half = x.shape[-1] // 2
    z = (x[..., :half] + 1j * x[..., half:]) * scale
    z = z * np.exp(1j * positions[..., None, None] * np.asarray(inv_freq))
    return np.concatenate([z.real, z.imag], -1)


def test_every_kind_is_in_the_table():
    assert {rope.kind for rope, _, _ in KINDS.values()} == set(ROPE_KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_frequencies(kind):
    rope, inv_freq, scale = KINDS[kind]
    np.testing.assert_allclose(rope.inv_freq(4096), inv_freq, rtol=1e-6)
    assert rope.inv_freq(4096).dtype == np.float32
    assert rope.cos_sin_scale(4096) == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize("kind", ["default", "yarn of DeepSeek"])
def test_rotation(kind):
    rope, inv_freq, scale = KINDS[kind]
    x, positions = vectors()
    out = turn(x, positions, rope)
    np.testing.assert_allclose(out, rotated(np.float64(x), positions, inv_freq, scale), atol=5e-4)
    near = positions % 50
    np.testing.assert_allclose(turn(x, near, rope), rotated(np.float64(x), near, inv_freq, scale), atol=2e-5)


def test_a_score_depends_on_the_difference_of_positions():
    x, positions = vectors()
    q, k = np.split(x, [2], axis=2)
    scores = [
        np.sum(np.asarray(turn(q, positions + shift, Rope(DIM))) * turn(k, positions // 2 + shift, Rope(DIM)), -1)
        for shift in (0, 777)
    ]
    np.testing.assert_allclose(scores[0], scores[1], atol=2e-3)
    unmoved = np.sum(q * k, -1)
    assert np.abs(scores[0] - unmoved).max() > 0.5


def test_interleaved_pairs_are_a_permutation_of_split_ones():
    x, positions = vectors()
    order = np.arange(DIM).reshape(2, -1).T.ravel()  # where channel j of the interleaved form lies in the split one
    split = np.empty_like(x)
    split[..., order] = x
    out = turn(x, positions, Rope(DIM, interleaved=True))
    np.testing.assert_allclose(out, np.asarray(turn(split, positions, Rope(DIM)))[..., order], atol=1e-6)


@pytest.mark.parametrize(("start", "dim"), [(0, 8), (4, 8), (8, 8)])
def test_other_channels_stay(start, dim):
    x, positions = vectors()
    out = np.asarray(turn(x, positions, Rope(dim, start=start)))
    inside = slice(start, start + dim)
    np.testing.assert_allclose(out[..., inside], turn(x[..., inside], positions, Rope(dim)), atol=1e-6)
    np.testing.assert_array_equal(np.delete(out, inside, -1), np.delete(x, inside, -1))


def test_angles_are_float32_for_narrow_vectors():
    """At position 2000 bfloat16 angles would be off by whole turns."""
    x, positions = vectors()
    narrow = jnp.asarray(x, jnp.bfloat16)
    out = turn(narrow, positions, Rope(DIM))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(out), turn(np.float32(narrow), positions, Rope(DIM)), atol=0.02)


def test_a_rope_is_a_static_argument():
    rope = Rope(DIM, kind="linear", factor=2.0)
    assert hash(rope) == hash(dataclasses.replace(rope))
    assert rope != dataclasses.replace(rope, factor=3.0)
    assert not rope.inv_freq(8).flags.writeable


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 7}, "dim must be even and positive, got 7"),
        ({"dim": 0}, "even and positive"),
        ({"dim": 8, "kind": "ntk"}, "'ntk' is not one of default, linear, dynamic, llama3, yarn, longrope"),
        ({"dim": 8, "theta": 1.0}, "theta > 1"),
        ({"dim": 8, "factor": 0.0}, "factor > 0"),
        ({"dim": 8, "kind": "yarn"}, "'yarn' needs original_max_position"),
        ({"dim": 8, "kind": "llama3", "original_max_position": 0}, "needs original_max_position"),
        ({"dim": 8, "freq_factors": (1.0,)}, "freq_factors needs dim/2 = 4 numbers, got 1"),
        (
            {"dim": 8, "kind": "longrope", "original_max_position": 9, "short_factor": (1.0,) * 4},
            "long_factor .* got 0",
        ),
    ],
)
def test_wrong_ropes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Rope(**arguments)


def test_a_rope_beyond_the_head_is_refused():
    with pytest.raises(ValueError, match=r"channels 4\.\.12, but the head dimension is 8"):
        apply_rope(jnp.zeros((1, 1, 1, 8)), jnp.zeros((1, 1), jnp.int32), Rope(8, start=4), 16)
