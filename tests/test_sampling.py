"""Sampling against a plain NumPy account of the same rules, and what holds for every sampler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from memjax.generate.sampling import FAILED, Sampler, mark_seen, process_logits, sample

SAMPLERS = [
    Sampler(),
    Sampler(repetition_penalty=1.3),
    Sampler(temperature=0.7),
    Sampler(temperature=1.0, top_k=5),
    Sampler(temperature=1.2, top_p=0.8),
    Sampler(temperature=0.9, min_p=0.1),
    Sampler(temperature=1.5, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.2),
]
ALL_STAGES = SAMPLERS[-1]


def normal(seed, rows, vocab, scale=3.0):
    return jnp.asarray(np.random.default_rng(seed).normal(0, scale, (rows, vocab)), jnp.float32)


def some_seen(seed, rows, vocab):
    return jnp.asarray(np.random.default_rng(seed).random((rows, vocab)) < 0.3)


def reference(row, seen, sampler, slack):
    """Scaled logits and the set of ids that stay, one row at a time; ``slack`` > 0 widens the thresholds, < 0 narrows."""
    x = row.astype(np.float64).copy()
    for i in np.flatnonzero(seen):
        x[i] = x[i] / sampler.repetition_penalty if x[i] > 0 else x[i] * sampler.repetition_penalty
    if sampler.temperature == 0:
        return x, set(range(len(x)))
    x /= sampler.temperature
    ranked = sorted(range(len(x)), key=lambda i: (-x[i], i))
    if sampler.top_k:
        ranked = ranked[: sampler.top_k]
    weights = np.exp(x[ranked] - x[ranked[0]])
    probs = weights / weights.sum()
    if sampler.top_p < 1:
        total, nucleus = 0.0, []
        for i, p in zip(ranked, probs, strict=True):
            nucleus.append(i)
            total += p
            if total >= sampler.top_p + slack:
                break
        ranked = nucleus
    return x, {i for i, w in zip(ranked, weights, strict=False) if w >= sampler.min_p * (1 - slack) or i == ranked[0]}


# Scales by powers of two are exact, so that ties in the logits stay ties here and there.
samplers = st.builds(
    Sampler,
    temperature=st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]),
    top_k=st.integers(0, 9),
    top_p=st.one_of(st.just(1.0), st.floats(1e-3, 1.0)),
    min_p=st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
    repetition_penalty=st.sampled_from([0.5, 1.0, 2.0, 4.0]),
)
# XLA takes subnormal numbers for zero and NumPy does not: none here, nor after scaling.
floats = st.floats(-30, 30, width=32).map(lambda x: x if abs(x) > 1e-30 else 0.0)
numbers = st.one_of(st.integers(-8, 8).map(lambda n: n / 4), floats)
ROWS, VOCAB = 2, 7
rows_of_logits = st.lists(numbers, min_size=ROWS * VOCAB, max_size=ROWS * VOCAB)
rows_of_marks = st.lists(st.booleans(), min_size=ROWS * VOCAB, max_size=ROWS * VOCAB)
NONE_SEEN = [False] * (ROWS * VOCAB)


@settings(max_examples=300, deadline=None)
@given(rows_of_logits, rows_of_marks, samplers)
@example([0.0] * 14, NONE_SEEN, Sampler(1.0, top_k=3))
@example([0.0] * 14, NONE_SEEN, Sampler(1.0, top_p=0.5))
@example([0.0, -0.0] * 7, NONE_SEEN, Sampler(1.0, top_k=2))
@example([-0.0, 0.0] * 7, NONE_SEEN, Sampler(1.0, top_p=0.4))
def test_processed_logits_are_those_of_plain_numpy(values, marks, sampler):
    logits = np.array(values, np.float32).reshape(ROWS, VOCAB)
    seen = np.array(marks).reshape(ROWS, VOCAB)
    got = np.asarray(process_logits(jnp.asarray(logits), sampler, jnp.asarray(seen)))
    for row, row_seen, out in zip(logits, seen, got, strict=True):
        scaled, most = reference(row, row_seen, sampler, 1e-5)
        _, least = reference(row, row_seen, sampler, -1e-5)
        kept = set(np.flatnonzero(out > -np.inf).tolist())
        assert least <= kept <= most
        np.testing.assert_allclose(out[sorted(kept)], scaled[sorted(kept)], rtol=1e-6, atol=1e-30)


@settings(max_examples=100, deadline=None)
@given(rows_of_logits, rows_of_marks, st.floats(0.01, 100), st.floats(0.01, 100))
def test_any_temperature_and_penalty(values, marks, temperature, penalty):
    logits = np.array(values, np.float32).reshape(ROWS, VOCAB)
    seen = np.array(marks).reshape(ROWS, VOCAB)
    sampler = Sampler(temperature, repetition_penalty=penalty)
    expected = np.stack([reference(*pair, sampler, 0.0)[0] for pair in zip(logits, seen, strict=True)])
    got = process_logits(jnp.asarray(logits), sampler, jnp.asarray(seen))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_a_large_vocabulary_agrees_with_numpy(sampler):
    logits, seen = normal(0, 3, 5000), some_seen(1, 3, 5000)
    got = np.asarray(process_logits(logits, sampler, seen))
    for row, row_seen, out in zip(np.asarray(logits), np.asarray(seen), got, strict=True):
        scaled, most = reference(row, row_seen, sampler, 1e-5)
        kept = set(np.flatnonzero(out > -np.inf).tolist())
        assert reference(row, row_seen, sampler, -1e-5)[1] <= kept <= most
        np.testing.assert_allclose(out[sorted(kept)], scaled[sorted(kept)], rtol=1e-6)


@pytest.mark.parametrize(
    "sampler", [Sampler(1.0, top_k=700), Sampler(2.0, top_p=0.8), Sampler(8.0, 3000, 0.7)], ids=str
)
def test_of_many_equal_logits_the_lower_ids_stay(sampler):
    logits = jnp.round(normal(13, 3, 5000))
    got = np.asarray(process_logits(logits, sampler))
    for row, out in zip(np.asarray(logits), got, strict=True):
        kept = np.flatnonzero(out > -np.inf)
        cutoff = row[kept].min()
        equal = np.flatnonzero(row == cutoff)
        chosen = kept[row[kept] == cutoff]
        assert 0 < len(chosen) < len(equal)
        np.testing.assert_array_equal(chosen, equal[: len(chosen)])
        np.testing.assert_array_equal(kept[row[kept] > cutoff], np.flatnonzero(row > cutoff))
        fewest, most = (len(reference(row, [], sampler, slack)[1]) for slack in (-1e-5, 1e-5))
        assert fewest <= len(kept) <= most


@pytest.mark.parametrize(
    ("sampler", "kept"),
    [
        (Sampler(1.0, top_p=0.5), [1]),
        (Sampler(1.0, top_p=0.51), [1, 3]),
        (Sampler(1.0, top_p=0.75), [1, 3]),
        (Sampler(1.0, top_p=0.76), [0, 1, 3]),
        (Sampler(1.0, top_p=1e-30), [1]),
        (Sampler(1.0, top_p=1e-60), [1]),
        (Sampler(1.0, top_k=2), [1, 3]),
        (Sampler(1.0, top_k=3), [0, 1, 3]),
        (Sampler(1.0, min_p=0.25), [0, 1, 2, 3]),
        (Sampler(1.0, min_p=0.26), [1, 3]),
        (Sampler(1.0, min_p=1.0), [1]),
        # Of the two that top-k leaves, the first has 2/3 of the probability: top-p comes after it.
        (Sampler(1.0, top_k=2, top_p=0.6), [1]),
        # At temperature 1/2 the probabilities go as the squares.
        (Sampler(0.5, min_p=0.25), [1, 3]),
    ],
    ids=str,
)
def test_what_stays_of_one_half_one_quarter_and_two_eighths(sampler, kept):
    logits = jnp.asarray([[-3.0, -1.0, -3.0, -2.0]], jnp.float32)  # powers of two, so that softmax is exact
    got = process_logits(logits * jnp.float32(np.log(2)), sampler)
    assert np.flatnonzero(np.asarray(got[0]) > -np.inf).tolist() == kept


def test_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens():
    logits = jnp.asarray([[4.0, -4.0, 0.0, 4.0, -4.0, -jnp.inf]], jnp.float32)
    seen = jnp.asarray([[True, True, True, False, False, True]])
    got = process_logits(logits, Sampler(repetition_penalty=2.0), seen)
    np.testing.assert_array_equal(got, [[2.0, -8.0, 0.0, 4.0, -4.0, -np.inf]])


@pytest.mark.parametrize("off", [{"top_k": 50}, {"top_k": 51}, {"top_p": 1.0}, {"min_p": 0.0}], ids=str)
def test_a_stage_that_keeps_everything_changes_nothing(off):
    logits = normal(2, 4, 50)
    np.testing.assert_array_equal(process_logits(logits, Sampler(0.8, **off)), process_logits(logits, Sampler(0.8)))


@pytest.mark.parametrize(
    ("sampler", "sorts", "top_ks"),
    [
        (Sampler(), 0, 0),
        (Sampler(top_k=5, top_p=0.5), 0, 0),  # greedy
        (Sampler(1.0), 0, 0),
        (Sampler(1.0, min_p=0.1), 0, 0),
        (Sampler(1.0, top_k=99), 0, 0),
        (Sampler(1.0, top_k=5), 0, 1),
        (Sampler(1.0, top_p=0.5), 1, 0),
        (Sampler(1.0, top_k=5, top_p=0.5, min_p=0.1), 0, 1),
    ],
    ids=str,
)
def test_at_most_one_sort(sampler, sorts, top_ks):
    jaxpr = str(jax.make_jaxpr(lambda logits: process_logits(logits, sampler))(jnp.zeros((2, 50))))
    assert (jaxpr.count("sort["), jaxpr.count("top_k[")) == (sorts, top_ks)


@pytest.mark.parametrize("sampler", SAMPLERS[2:], ids=str)
def test_frequencies_follow_the_processed_distribution(sampler):
    draws, logits = 20_000, jnp.asarray([[0.3, -0.5, 1.1, 0.0, 0.7, -2.0, 0.9, -0.1]], jnp.float32)
    seen = jnp.asarray([[True, False, True, False, False, False, False, True]])
    processed = np.asarray(process_logits(logits, sampler, seen), np.float64)[0]
    expected = np.exp(processed) / np.exp(processed).sum() * draws
    keys = jax.random.split(jax.random.key(7), draws)
    many = jnp.broadcast_to(logits, (draws, 8)), jnp.broadcast_to(seen, (draws, 8))
    tokens = jax.jit(sample, static_argnums=2)(many[0], keys, sampler, many[1])
    counts = np.bincount(np.asarray(tokens), minlength=8)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = np.sum((counts[possible] - expected[possible]) ** 2 / expected[possible])
    # 99.9 % quantiles of chi-square for 1 to 7 degrees of freedom.
    assert chi_square < [10.83, 13.82, 16.27, 18.47, 20.52, 22.46, 24.32][possible.sum() - 2]


@pytest.mark.parametrize(
    ("sampler", "impl"),
    [*((s, "threefry2x32") for s in SAMPLERS), (Sampler(1.0), "rbg"), (ALL_STAGES, "rbg"), (ALL_STAGES, "unsafe_rbg")],
    ids=str,
)
def test_a_row_gives_in_a_batch_what_it_gives_alone(sampler, impl):
    rows, vocab = 5, 1003
    logits, seen = normal(3, rows, vocab), some_seen(4, rows, vocab)
    keys = jax.random.split(jax.random.key(11, impl=impl), rows)
    draw = jax.jit(sample, static_argnames="sampler")
    process = jax.jit(process_logits, static_argnames="sampler")
    together, processed = draw(logits, keys, sampler, seen), process(logits, sampler, seen)
    for b in range(rows):
        row = slice(b, b + 1)
        assert int(draw(logits[row], keys[row], sampler, seen[row])[0]) == int(together[b])
        np.testing.assert_array_equal(process(logits[row], sampler, seen[row])[0], processed[b])


def test_the_key_alone_decides():
    logits = jnp.broadcast_to(normal(5, 1, 200, scale=1.0), (64, 200))
    first, second = (jax.random.split(jax.random.key(seed), 64) for seed in (0, 1))
    once, again = (sample(logits, first, Sampler(1.0)) for _ in range(2))
    np.testing.assert_array_equal(once, again)
    assert np.sum(np.asarray(once) != np.asarray(sample(logits, second, Sampler(1.0)))) > 50
    same = jnp.broadcast_to(first[:1], (64,))
    np.testing.assert_array_equal(sample(logits, same, Sampler(1.0)), np.full(64, once[0]))


def test_raw_keys_draw_like_typed_ones():
    logits, keys = normal(6, 8, 30), jax.random.split(jax.random.key(2), 8)
    raw = sample(logits, jax.random.key_data(keys), Sampler(1.0))
    np.testing.assert_array_equal(raw, sample(logits, keys, Sampler(1.0)))


def test_greedy_takes_the_lowest_of_equals_and_needs_no_key():
    logits = jnp.asarray([[0.0, 2.0, 2.0], [-1.0, -1.0, -1.0], [-0.0, 0.0, -1.0]], jnp.float32)
    greedy = sample(logits, None, Sampler())
    assert greedy.dtype == jnp.int32
    assert greedy.tolist() == [1, 0, 0]
    keys = jax.random.split(jax.random.key(0), 3)
    for sampler in (Sampler(1.0, top_k=1), Sampler(1.0, top_p=1e-9), Sampler(1e-6, top_k=1)):
        assert sample(logits, keys, sampler).tolist() == greedy.tolist()


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_rows_without_a_distribution_fail_and_leave_the_others_alone(sampler):
    good = normal(8, 1, 60)[0]
    rows = [good, good.at[17].set(jnp.nan), good.at[0].set(jnp.nan), good.at[5].set(jnp.inf), jnp.full(60, -jnp.inf)]
    logits = jnp.stack([*rows, jnp.full(60, jnp.nan), jnp.where(jnp.arange(60) == 9, good, -jnp.inf)])
    seen = some_seen(9, 7, 60)
    keys = jax.random.split(jax.random.key(4), 7)
    tokens = jax.jit(sample, static_argnums=2)(logits, keys, sampler, seen)
    alone = sample(good[None], keys[:1], sampler, seen[:1])
    assert tokens.tolist() == [int(alone[0]), *[FAILED] * 5, 9]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("sampler", [Sampler(), ALL_STAGES, Sampler(0.7, top_p=0.8)], ids=str)
def test_every_float_type_is_computed_in_float32(sampler, dtype):
    assert jax.config.jax_numpy_dtype_promotion == "strict"
    logits, seen = normal(10, 4, 300).astype(dtype), some_seen(11, 4, 300)
    keys = jax.random.split(jax.random.key(5), 4)
    wide = logits.astype(jnp.float32)
    processed = process_logits(logits, sampler, seen)
    assert processed.dtype == jnp.float32
    np.testing.assert_array_equal(processed, process_logits(wide, sampler, seen))
    tokens = sample(logits, keys, sampler, seen)
    np.testing.assert_array_equal(tokens, sample(wide, keys, sampler, seen))


def test_equal_samplers_share_one_trace():
    traces = []

    def counted(logits, keys, sampler):
        traces.append(sampler)
        return sample(logits, keys, sampler)

    draw = jax.jit(counted, static_argnames="sampler")
    logits, keys = normal(12, 2, 20), jax.random.split(jax.random.key(0), 2)
    equal = [Sampler(0.5, top_k=4), Sampler(np.float32(0.5), top_k=np.int64(4)), Sampler(temperature=0.5, top_k=4.0)]
    tokens = [draw(logits, keys, sampler=sampler).tolist() for sampler in equal]
    assert len(traces) == 1
    assert tokens[0] == tokens[1] == tokens[2]
    draw(logits, keys, sampler=Sampler(0.5, top_k=5))
    assert len(traces) == 2


def test_numpy_numbers_become_plain_ones():
    sampler = Sampler(np.float32(0.5), np.int32(3), np.float64(0.5), np.float16(0.25), np.float32(2))
    assert [type(v) for v in vars(sampler).values()] == [float, int, float, float, float]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-2, 9), st.booleans()), min_size=6, max_size=6), st.integers(0, 2**16 - 1))
def test_mark_seen_adds_the_valid_tokens(pairs, bits):
    before = np.array([bits >> i & 1 for i in range(16)], bool).reshape(2, 8)
    tokens, valid = (np.array(column).reshape(2, 3) for column in zip(*pairs, strict=True))
    expected = before.copy()
    for b in range(2):
        for token, fine in zip(tokens[b], valid[b], strict=True):
            if fine and 0 <= token < 8:
                expected[b, token] = True
    got = mark_seen(jnp.asarray(before), jnp.asarray(tokens, jnp.int32), jnp.asarray(valid))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, r"temperature must be 0 \(greedy\) or from 1e-06 to 1e\+06, got -1.0"),
        ({"temperature": 1e-40}, "temperature must be 0"),
        ({"temperature": float("inf")}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"temperature": None}, "temperature must be a number, got None"),
        ({"top_k": -1}, "top_k must be at least 0; use 0 for all tokens, got -1"),
        ({"top_k": 2.5}, "top_k must be an integer, got 2.5"),
        ({"top_k": True}, "top_k must be an integer, got True"),
        ({"top_k": float("inf")}, "top_k must be an integer, got inf"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1; use 1 for all tokens, got 0.0"),
        ({"top_p": 1.01}, "top_p must be above 0"),
        ({"min_p": -0.1}, "min_p must be from 0 to 1; use 0 for all tokens, got -0.1"),
        ({"min_p": 1.5}, "min_p must be from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be from 1e-06 to 1e.06; use 1 for no penalty, got 0.0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty must be from"),
    ],
)
def test_bad_samplers(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**arguments)


@pytest.mark.parametrize(
    ("logits", "keys", "sampler", "seen", "message"),
    [
        (jnp.zeros(5), None, Sampler(), None, r"logits must be \[batch, vocabulary\], got shape \(5,\)"),
        (jnp.zeros((2, 0)), None, Sampler(), None, "logits must be"),
        (jnp.zeros((2, 5), jnp.int32), None, Sampler(), None, "floating point, got int32"),
        (jnp.zeros((2, 5)), None, Sampler(repetition_penalty=1.1), None, "1.1 needs the tokens seen"),
        (jnp.zeros((2, 5)), None, Sampler(repetition_penalty=2), jnp.zeros((2, 4), bool), r"bool \(2, 5\) like"),
        (jnp.zeros((2, 5)), None, Sampler(repetition_penalty=2), jnp.zeros((2, 5)), "got float32"),
        (jnp.zeros((2, 5)), None, Sampler(1.0), None, r"one PRNG key per row \(2\): pass keys"),
        (jnp.zeros((2, 5)), jax.random.key(0), Sampler(1.0), None, r"one PRNG key per row \(2\), got shape \(\)"),
        (jnp.zeros((2, 5)), jax.random.PRNGKey(0), Sampler(1.0), None, r"per row \(2\), got shape \(2,\)"),
        (jnp.zeros((2, 5)), jax.random.split(jax.random.key(0), 3), Sampler(1.0), None, r"got shape \(3,\)"),
    ],
)
def test_bad_arrays(logits, keys, sampler, seen, message):
    with pytest.raises(ValueError, match=message):
        sample(logits, keys, sampler, seen)
