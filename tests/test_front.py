"""The codecs' front end: what it adds back is exactly what it takes away, from statistics that are what they say."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import (
    BATCH,
    CAPACITY,
    DIM,
    GROUPS,
    HEADS,
    ROPE,
    SPEC,
    dense_oracle,
    in_chunks,
    plain,
    qkv,
    quick_jit,
    relative_error,
    slow_but,
)

import memjax as mj
from memjax.attention.rope import Rope, apply_rope
from memjax.cache.parse import PARTS
from memjax.cache.policy import CachePolicy
from memjax.pallas_kernels.decode.reference import centre_scores
from memjax.quantize.calibration import (
    balanced_basis,
    check_fingerprint,
    load_basis,
    read_facts,
    save_calibration,
)
from memjax.quantize.front import (
    ALL,
    OFF,
    Basis,
    FrontEnd,
    centre_term,
    followed,
    pairs,
    prepare_keys,
    prepare_queries,
    prepare_values,
    restore_outputs,
    turn,
)

LONG = (1.0, 1.0, 1.5, 2.0, 3.0, 4.0, 4.0, 4.0)
ROPES = {
    "half-split": ROPE,
    "interleaved": Rope(DIM, theta=100.0, interleaved=True),
    "some channels": Rope(8, theta=100.0, start=4),
    "some channels, interleaved": Rope(8, theta=100.0, start=8, interleaved=True),
    "linear": Rope(DIM, theta=100.0, kind="linear", factor=4.0),
    "dynamic": Rope(DIM, theta=100.0, kind="dynamic", factor=2.0, original_max_position=32),
    "llama3": Rope(DIM, kind="llama3", factor=8.0, original_max_position=32),
    "yarn": Rope(DIM, kind="yarn", factor=4.0, original_max_position=32),
    "yarn, another factor": Rope(DIM, kind="yarn", factor=4.0, original_max_position=32, attention_factor=1.5),
    "longrope": Rope(DIM, kind="longrope", factor=4.0, original_max_position=32, long_factor=LONG, short_factor=LONG),
    "none": None,
}
T = 40


def spec_of(rope) -> mj.CacheSpec:
    return dataclasses.replace(SPEC, rope=rope)


def random_basis(seed: int, centre: str, matrices: bool, count: int = ALL) -> Basis:
    draw = np.random.default_rng(seed).standard_normal
    lead = (1 if matrices else BATCH, HEADS)
    means = [draw((*lead, DIM)) for _ in range(2)]
    if matrices:
        balances = [draw((*lead, DIM, DIM)) + 4 * np.eye(DIM) for _ in range(2)]
        inverses = [np.linalg.inv(x) for x in balances]
    else:
        balances, inverses = [np.exp(draw((*lead, DIM))) for _ in range(2)], [None, None]
    wide = [None if x is None else jnp.asarray(x, jnp.float32) for x in (*means, *balances, *inverses)]
    return Basis(wide[0], wide[2], wide[1], wide[3], None, wide[4], wide[5], centre, count)


@pytest.mark.parametrize("matrices", [False, True], ids=["channels", "matrices"])
@pytest.mark.parametrize(("centre", "count"), [("fixed", ALL), ("rope", ALL), ("rope", 3)])
@pytest.mark.parametrize("rope", ROPES)
def test_scores_and_outputs_are_what_they_were(rope, centre, count, matrices):
    """With nothing rounded in between: q . k for keys as they are cached, rotated, and any mean whatever."""
    spec = spec_of(ROPES[rope])
    if rope == "none" and centre == "rope":
        pytest.skip("there is nothing to follow")
    basis, rng = random_basis(0, centre, matrices, count), np.random.default_rng(1)
    k, v = (jnp.asarray(rng.standard_normal((BATCH, HEADS, DIM, T)), jnp.float32) for _ in range(2))
    q = jnp.asarray(rng.standard_normal((BATCH, HEADS, 3, DIM)), jnp.float32)
    position = jnp.asarray(rng.integers(0, 50, (BATCH, 1, T)), jnp.int32)
    hi = jax.lax.Precision.HIGHEST
    prepared = prepare_keys(basis, k, position, spec)
    found = jnp.einsum("bkmh,bkht->bkmt", prepare_queries(basis, q), prepared, precision=hi)
    found += centre_scores(centre_term(basis, q, spec), position)
    np.testing.assert_allclose(found, jnp.einsum("bkmh,bkht->bkmt", q, k, precision=hi), atol=2e-4)
    assert relative_error(prepared, k) > 0.5

    weights = jax.nn.softmax(found, axis=-1)
    out = jnp.einsum("bkmt,bkht->bkmh", weights, prepare_values(basis, v), precision=hi)
    lse = jnp.zeros(out.shape[:-1]).at[:, :, 0].set(-jnp.inf)
    restored = restore_outputs(basis, out.at[:, :, 0].set(0), lse, spec)
    expected = jnp.einsum("bkmt,bkht->bkmh", weights, v, precision=hi)
    np.testing.assert_allclose(restored[:, :, 1:], expected[:, :, 1:], atol=1e-4)
    np.testing.assert_array_equal(restored[:, :, 0], 0.0)  # a part that saw nothing stays empty


@pytest.mark.parametrize("rope", [name for name in ROPES if name != "none"])
def test_turn_is_the_layers_rotation(rope):
    spec = spec_of(ROPES[rope])
    x = np.random.default_rng(2).standard_normal((1, T, HEADS, DIM)).astype(np.float32)
    position = jnp.arange(T, dtype=jnp.int32)[None]
    expected = jnp.moveaxis(apply_rope(jnp.asarray(x), position, spec.rope, spec.capacity), 1, -1)
    a, b, _ = pairs(spec)
    factor = np.ones(DIM, np.float32)
    factor[[*a, *b]] = spec.rope.cos_sin_scale(spec.capacity)  # yarn's, which turn leaves away
    found = turn(jnp.moveaxis(jnp.asarray(x), 1, -1), position[:, None], spec)
    np.testing.assert_allclose(found * factor[:, None], expected, atol=1e-5)
    np.testing.assert_allclose(turn(found, -position[:, None], spec), jnp.moveaxis(x, 1, -1), atol=1e-5)


@quick_jit
def read_step(cache, q, k, v):
    return mj.attend(mj.update(cache, k, v, queries=q, output_projection=projection()), q)


@pytest.mark.parametrize("rope", slow_but([*ROPES][::3], ROPES))
def test_attention_over_centred_tokens_is_attention(rope):
    """From end to end with a codec that rounds nothing: chunks read the history in the basis that the first one measured."""
    spec, tokens = spec_of(ROPES[rope]), biased(14, size=3.0, tokens=36)
    cache, outs = CachePolicy(front=FrontEnd(pairs=3)).init(spec), []
    for start in range(0, 36, 12):
        out, cache = read_step(cache, *(x[:, start : start + 12] for x in tokens))
        outs.append(out)
    assert float(jnp.abs(cache.basis.k_mean).max()) > 1.0
    assert relative_error(cache.basis.k_balance, jnp.ones(())) > 0.1
    q, k, v = tokens
    if rope != "none":
        q, k = (apply_rope(jnp.asarray(x), jnp.arange(36)[None], spec.rope, spec.capacity) for x in (q, k))
    assert relative_error(np.concatenate(outs, axis=1), dense_oracle((q, k, v), theta=None)) < 2e-5


def test_a_centred_history_with_holes_reads_like_any_other():
    tokens, scores = biased(15, size=3.0), np.random.default_rng(15).standard_normal((BATCH, HEADS, CAPACITY))
    found = []
    for policy in (CachePolicy(front=FrontEnd()), CachePolicy()):
        _, cache = read_step(policy.init(SPEC), *(x[:, :30] for x in tokens))
        cache = mj.cache.evict(cache, jnp.asarray(scores[..., : cache.history.slots], jnp.float32), 12, 20)
        found.append(read_step(cache, *(x[:, 30:31] for x in tokens))[0])
    assert relative_error(*found) < 1e-5


FOLLOWED = {  # theta, capacity, count: pairs that turn by 0.25 or more within the capacity, the slowest first; then others
    (1e4, 500, 0): [],
    (1e4, 500, 2): [5, 6],
    (1e4, 500, 7): [0, 1, 2, 3, 4, 5, 6],
    (1e4, 500, ALL): [0, 1, 2, 3, 4, 5, 6, 7],
    (1e4, 500, 99): [0, 1, 2, 3, 4, 5, 6, 7],
    (1e4, 10_000, 2): [6, 7],
    (1e4, 20, 2): [2, 3],
    (1e4, 20, 5): [0, 1, 2, 3, 4],
}


@pytest.mark.parametrize("case", FOLLOWED)
def test_the_slowest_pairs_that_turn_are_followed(case):
    theta, capacity, count = case
    spec = dataclasses.replace(SPEC, capacity=capacity, rope=Rope(DIM, theta=theta))
    assert followed(spec, count).tolist() == FOLLOWED[case]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("pairs=-2", "pairs must be a number of rotary pairs, or -1 for all of them, got -2"),
        ("centre=fixed,pairs=4", "pairs=4 says which rotary pairs centre=rope follows: leave it away with centre=fixed"),
        ("pairs=4,calibration=x", "leave it away with a calibration file"),
    ],
)
def test_pairs_that_say_nothing_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        mj.policy(f"turboquant(4,4,{arguments})")


# ---- what is measured ----------------------------------------------------------------------------------------------

SINKS, RECENT, ON = 2, 6, "centre=auto,balance=auto"
POLICY = mj.policy(f"int8({ON})+protect({SINKS},{RECENT})")


def biased(seed: int, size: float = 8.0, tokens: int = 49):
    """Queries, keys and values with a large constant part, the keys' before their rotation."""
    q, k, v = qkv(seed, tokens=tokens)
    rng = np.random.default_rng(seed + 1)
    k_mean, v_mean = (size * rng.standard_normal((HEADS, DIM), np.float32) for _ in range(2))
    return q, k + k_mean, v + v_mean


def projection(seed: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((HEADS * GROUPS, DIM, 24)).astype(np.float32)


@quick_jit
def step(cache, q, k, v, lengths=None):
    return mj.attend(mj.update(cache, k, v, lengths, queries=q, output_projection=projection()), q)


def read(cache, tokens, sizes, lengths=None):
    return in_chunks(step, cache, tokens, sizes, lengths)


@pytest.mark.parametrize("sizes", [[30], [3, 4, 3], [1] * 9], ids=str)
def test_a_row_measures_the_tokens_that_are_there_when_the_first_leaves(sizes):
    tokens = biased(0)
    _, cache = read(POLICY.init(SPEC), tokens, sizes)
    seen, used = sum(sizes), next(n for n in np.cumsum(sizes) if n > SINKS + RECENT)
    q, k, v = (np.float64(x[:, :used]) for x in tokens)
    np.testing.assert_allclose(cache.basis.k_mean, k[:, SINKS:].mean(1), atol=1e-3)
    np.testing.assert_allclose(cache.basis.v_mean, v[:, SINKS:].mean(1), atol=1e-3)

    turned = np.moveaxis(np.asarray(apply_rope(jnp.float32(k - k[:, SINKS:].mean(1, keepdims=True)), jnp.arange(used)[None],
                                               ROPE, SPEC.capacity), np.float64), 1, -1)  # fmt: skip
    roped = np.asarray(apply_rope(jnp.float32(q), jnp.arange(used)[None], ROPE, SPEC.capacity), np.float64)
    weight = (roped**2).reshape(BATCH, used, HEADS, GROUPS, DIM).sum((1, 3))
    expected = (weight / (turned[..., SINKS:] ** 2).mean(-1)) ** 0.25
    expected /= np.exp(np.log(expected).mean(-1, keepdims=True))
    np.testing.assert_allclose(cache.basis.k_balance, expected, rtol=2e-3)
    weight = (np.float64(projection()) ** 2).sum(-1).reshape(HEADS, GROUPS, DIM).sum(1)
    expected = (weight / ((v[:, SINKS:] - v[:, SINKS:].mean(1, keepdims=True)) ** 2).mean(1)) ** 0.25
    expected /= np.exp(np.log(expected).mean(-1, keepdims=True))
    np.testing.assert_allclose(cache.basis.v_balance, expected, rtol=2e-3)

    _, after = read(cache, [x[:, seen:] for x in tokens], [5, 1])
    for name in ("k_mean", "k_balance", "v_mean", "v_balance"):
        np.testing.assert_array_equal(getattr(after.basis, name), getattr(cache.basis, name))


def test_pairs_that_are_not_followed_have_their_mean_after_the_rotation():
    tokens = biased(2)
    _, cache = read(mj.policy(f"int8({ON},pairs=3)+protect({SINKS},{RECENT})").init(SPEC), tokens, [30])
    k = tokens[1][:, :30]
    roped = np.asarray(apply_rope(jnp.asarray(k), jnp.arange(30)[None], ROPE, SPEC.capacity))
    followed_channels = np.zeros(DIM, bool)
    chosen = followed(SPEC, 3)
    followed_channels[[*chosen, *(chosen + DIM // 2)]] = True
    expected = np.where(followed_channels, k[:, SINKS:].mean(1), roped[:, SINKS:].mean(1))
    np.testing.assert_allclose(cache.basis.k_mean, expected, atol=1e-3)
    term = centre_term(cache.basis, jnp.ones((BATCH, HEADS, 1, DIM)), SPEC)
    assert term.inv_freq.tolist() == [*ROPE.inv_freq(SPEC.capacity)[chosen], 0.0]


def test_ragged_rows_measure_their_own_tokens_only():
    tokens = biased(3)
    lengths = jnp.array([30, 12])
    real = np.arange(30)[:, None, None] < np.array(lengths)[:, None, None, None]
    padded = [np.where(real, x[:, :30], np.nan) for x in tokens]
    _, cache = step(POLICY.init(SPEC), *padded, lengths)
    for b, length in enumerate(lengths.tolist()):
        np.testing.assert_allclose(cache.basis.k_mean[b], tokens[1][b, SINKS:length].mean(0), atol=1e-3)
        np.testing.assert_allclose(cache.basis.v_mean[b], tokens[2][b, SINKS:length].mean(0), atol=1e-3)


CONSTANT = {  # and what is dense instead
    f"int4(rotate=true,{ON})+protect(2,0)": "dense",
    f"int4(rotate=true,{ON})+streaming(2,24)+protect(2,0)": "streaming(2,24)",
    f"int4(rotate=true,{ON})+host(8,4)+protect(2,4)": "dense",
    "turboquant(3,2)+protect(2,0)": "dense",
    f"fp8({ON})+protect(2,0)": "dense",
}


@pytest.mark.parametrize("text", slow_but([*CONSTANT][1:2], CONSTANT))
def test_a_constant_part_costs_a_codec_little(text):
    """Keys and values with a constant part ten times their spread. It sharpens the attention, so errors count for more."""
    errors = {}
    for size in (0.0, 10.0):
        tokens = biased(5, size)
        expected, _ = read(mj.policy(CONSTANT[text]).init(SPEC), tokens, [35, 14])
        for name, policy in (("on", mj.policy(text)), ("off", plain(text))):
            if name == "on" or size:
                found, _ = read(policy.init(SPEC), tokens, [35, 14])
                errors[name, size] = np.linalg.norm(found[:, 35:] - expected[:, 35:])
    assert errors["on", 10.0] < 4.0 * errors["on", 0.0]
    assert errors["off", 10.0] > 3.0 * errors["on", 10.0]


def test_fixed_means_help_where_positions_do_not_turn():
    """NoPE layers and keys that arrive rotated: ``auto`` is a fixed mean, and ``rope`` is refused."""
    for rope in (None, "applied"):
        spec, tokens = spec_of(rope), biased(6)
        policy = mj.policy(f"int4(rotate=true,{ON})+protect(2,0)")
        found, cache = read(policy.init(spec), tokens, [40, 9])
        assert cache.basis.centre == "fixed"
        assert relative_error(found, dense_oracle(tokens, theta=None)) < 0.02
        with pytest.raises(ValueError, match="centre=rope needs the layer's rotary embedding"):
            mj.policy("int4(centre=rope)").init(spec)


def test_the_front_end_of_a_latent_stream():
    spec = mj.CacheSpec(BATCH, 1, 24, 64, "float32", rope=Rope(8, start=16), latent_dim=16)
    rng = np.random.default_rng(8)
    stream = rng.standard_normal((BATCH, 40, 1, 24)).astype(np.float32) + 5 * rng.standard_normal(24).astype(np.float32)
    q = rng.standard_normal((BATCH, 40, 4, 24)).astype(np.float32)

    def outputs(policy):
        cache = policy.init(spec)
        assert mj.nbytes(cache) == mj.predict_nbytes(policy, spec)
        _, cache = mj.attend(mj.update(cache, stream[:, :30], queries=q[:, :30]), q[:, :30])
        return mj.attend(mj.update(cache, stream[:, 30:], queries=q[:, 30:]), q[:, 30:])[0]

    exact, on, off = (outputs(p) for p in (mj.dense(), mj.policy(f"int4({ON})+protect(2,0)"), plain("int4+protect(2,0)")))
    assert relative_error(on, exact) < 0.02
    assert relative_error(off, exact) > 3 * relative_error(on, exact)


@pytest.mark.parametrize("text", ["turboquant(4,4)", f"int4({ON})+protect(2,4)", f"kivi(4,8,{ON})+protect(2,4)"])
def test_one_trace_and_bytes_as_predicted(text):
    policy, traces = mj.policy(text), []

    @jax.jit
    def decode(cache, q, k, v):
        traces.append(1)
        return mj.attend(mj.update(cache, k, v, queries=q), q)

    cache, tokens = policy.init(dataclasses.replace(SPEC, capacity=200)), qkv(9, tokens=30)
    before = mj.nbytes(cache)
    assert before == mj.predict_nbytes(policy, cache.spec)
    assert before.basis == sum(leaf.nbytes for leaf in jax.tree.leaves(cache.basis)) > 0
    for i in range(30):
        _, cache = decode(cache, *(x[:, i : i + 1] for x in tokens))
    assert traces == [1]
    assert mj.nbytes(cache) == before


def test_what_is_asked_for_must_be_given():
    _, k, v = qkv(10)
    cache = mj.policy("int4(balance=channels)").init(SPEC)
    with pytest.raises(ValueError, match=r"balance=channels needs update\(\.\.\., queries=q\)"):
        mj.update(cache, k, v)
    assert mj.policy("dense").init(SPEC).basis is None
    paper = "turboquant(4,4,centre=none,balance=off)+protect(2,4)"
    assert mj.policy(paper).init(SPEC).basis is None
    assert mj.policy(paper).resolved_front() == OFF


CODECS = sorted(name for name, build in PARTS.items() if "centre" in inspect.signature(build).parameters)


@pytest.mark.parametrize("name", CODECS)
def test_codecs_of_single_tokens_have_it_unless_they_are_told(name):
    assert mj.policy(name).resolved_front() == (OFF if name in ("kivi", "kvarn", "zipcache") else FrontEnd())
    assert mj.policy(f"{name}(centre=none,balance=off)").resolved_front() == OFF


# ---- calibration files ---------------------------------------------------------------------------------------------


def calibration(path, layers: int = 2, fingerprint: str = "abc", seed: int = 11) -> str:
    rng, stored = np.random.default_rng(seed), []
    for _ in range(layers):
        arrays = {}
        for side in "kv":
            moments = [np.cov(rng.standard_normal((DIM, 99))) for _ in range(2 * HEADS)]
            both = [balanced_basis(*moments[2 * h : 2 * h + 2]) for h in range(HEADS)]
            arrays |= {f"{side}_balance": np.stack([b[0] for b in both]), f"{side}_inverse": np.stack([b[1] for b in both])}
        stored.append(arrays)
    save_calibration(path, stored, {"fingerprint": fingerprint})
    return str(path)


def test_the_balanced_basis_makes_both_moments_the_same_diagonal():
    rng = np.random.default_rng(12)
    spread, weight = (np.cov(rng.standard_normal((DIM, 99)) * np.exp(rng.standard_normal((DIM, 1)))) for _ in range(2))
    basis, inverse = balanced_basis(spread, weight, shrink=0.0)
    np.testing.assert_allclose(basis @ inverse, np.eye(DIM), atol=1e-9)
    left, right = basis.T @ spread @ basis, inverse @ weight @ inverse.T
    np.testing.assert_allclose(left, right, atol=1e-8)
    np.testing.assert_allclose(left, np.diag(np.diag(left)), atol=1e-8)


def test_a_calibrated_cache(tmp_path):
    """Its rows share matrices, which the ledger counts and nothing changes; means are each row's own."""
    path = calibration(tmp_path / "model.safetensors")
    policy = mj.policy(f"int8(calibration={path})+protect(2,4)")
    caches = policy.init([SPEC, SPEC])
    assert mj.nbytes(caches) == mj.predict_nbytes(policy, [SPEC, SPEC])
    assert not np.array_equal(caches[0].basis.k_balance, caches[1].basis.k_balance)
    tokens = biased(13, size=1.0)
    found, cache = read(caches[1], tokens, [40, 9])
    for name in ("k_balance", "k_inverse", "v_balance", "v_inverse"):
        np.testing.assert_array_equal(getattr(cache.basis, name), getattr(caches[1].basis, name))
    own = read(mj.policy("int8(balance=off)+protect(2,4)").init(SPEC), tokens, [40, 9])[1].basis
    for name in ("k_mean", "v_mean"):
        np.testing.assert_array_equal(getattr(cache.basis, name), getattr(own, name))
        assert np.abs(np.asarray(getattr(own, name))).max() > 0.1
    assert relative_error(found, dense_oracle(tokens)) < 0.05


def test_wrong_calibration_files_are_refused(tmp_path):
    path = calibration(tmp_path / "model.safetensors")
    load_basis(path, SPEC, 1)
    assert read_facts(path)["layers"] == 2
    with pytest.raises(ValueError, match=r"calibrated on another model \(fingerprint abc, this one is xyz\)"):
        check_fingerprint(path, "xyz")
    with pytest.raises(ValueError, match="holds 2 layers, this model has a layer 2"):
        load_basis(path, SPEC, 2)
    with pytest.raises(ValueError, match=r"k_balance \[2, 16, 16\] for layer 0, this layer needs \[2, 32, 32\]"):
        load_basis(path, dataclasses.replace(SPEC, head_dim=32, rope=None), 0)
    with pytest.raises(FileNotFoundError, match="no calibration file nowhere: write one with `memjax calibrate`"):
        mj.policy("int4(calibration=nowhere)+protect(2,4)").init(SPEC)
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(ValueError, match="cannot be read as a calibration file"):
        read_facts(tmp_path / "text.safetensors")
    broken = {name: np.ones((HEADS, DIM, DIM)) for name in ("k_inverse", "v_balance", "v_inverse")}
    broken["k_balance"] = np.full((HEADS, DIM, DIM), np.nan)
    save_calibration(tmp_path / "nan.safetensors", [broken], {"fingerprint": "abc"})
    with pytest.raises(ValueError, match="numbers in k_balance of layer 0 that are not finite"):
        load_basis(str(tmp_path / "nan.safetensors"), SPEC, 0)
    with pytest.raises(ValueError, match="not finite cannot be balanced"):
        balanced_basis(np.full((2, 2), np.nan), np.eye(2))
