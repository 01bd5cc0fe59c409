"""Quest: bounds that hold for what attention computes, and steps that read the pages which they name."""

import dataclasses
import functools

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
    TOKENS,
    TRACES,
    by_kv_head,
    dense_oracle,
    lossy,
    numpy_rope,
    numpy_softmax,
    qkv,
    quick_jit,
    run,
    step,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import memjax as mj
from memjax.attention.attend import history_positions
from memjax.attention.quest import page_bounds
from memjax.cache import evict, quantize
from memjax.cache.bounds import KeyBounds, measure_bounds
from memjax.evict import Quest
from memjax.pallas_kernels.decode import decode
from memjax.quantize.front import centre_term, prepare_queries

SINKS, RECENT, PAGE, CHOSEN = 2, 6, 4, 3
BUDGET = SINKS + RECENT + CHOSEN * PAGE
QUEST, WINDOWS = f"quest({BUDGET},{PAGE})", f"+protect({SINKS},{RECENT})"
PROMPT = np.array([40, 27])
STEPS = 9
LATENT = mj.CacheSpec(2, 1, 24, CAPACITY, "float32", rope=mj.Rope(8, theta=100.0, start=16), latent_dim=16)


@functools.cache
def text():
    """Tokens in which some old keys matter more than others."""
    q, k, v = qkv(3)
    k[:, 10:14] *= 3
    return q, k, v


def rows_from(starts, size: int):
    """The next tokens of every row, wherever it stands."""
    return tuple(np.stack([x[b, starts[b] : starts[b] + size] for b in range(BATCH)]) for x in text())


def after_prompt(policy, spec=SPEC):
    _, cache = step(policy.init(spec), *(x[:, : PROMPT.max()] for x in text()), jnp.asarray(PROMPT))
    return cache


def steps(cache, count=STEPS):
    """Outputs [B, count, N, H] of single tokens, rows going on where each stands."""
    outs = []
    for i in range(count):
        out, cache = step(cache, *rows_from(PROMPT + i, 1))
        outs.append(np.asarray(out))
    return np.concatenate(outs, axis=1), cache


def oracle(codec=None) -> tuple[np.ndarray, float]:
    """What the steps must give, from the paper; and the part of the top tokens of the history that they have read."""
    q, k, v = by_kv_head(text())
    at = np.arange(TOKENS)
    q, k = numpy_rope(q, at, ROPE.theta), numpy_rope(k, at, ROPE.theta)
    k_kept, v_kept = (k, v) if codec is None else (lossy(codec, k), lossy(codec, v))
    outs, recalls = np.zeros((BATCH, STEPS, HEADS, GROUPS, DIM)), []
    for b, i, h in np.ndindex(BATCH, STEPS, HEADS):
        now = PROMPT[b] + i
        history = np.arange(SINKS, now - RECENT)
        query, keys = q[b, h, :, now], np.where(np.isin(at, history)[:, None], k_kept[b, h, 0], k[b, h, 0])
        values = np.where(np.isin(at, history)[:, None], v_kept[b, h, 0], v[b, h, 0])
        pages = (history - SINKS) // PAGE
        bounds = []
        for page in range(pages[-1] + 1):
            held = keys[history[pages == page]]
            bounds.append(np.maximum(query * held.min(0), query * held.max(0)).sum(-1).max())
        best = np.argsort(bounds)[-CHOSEN:]
        read = np.ones(TOKENS, bool)
        read[history] = np.isin(pages, best)
        read[now + 1 :] = False
        scores = query @ keys.T / np.sqrt(DIM)
        outs[b, i, h] = numpy_softmax(scores, read) @ values
        top = history[np.argsort(scores[:, history].max(0))[-4:]]
        recalls.append(read[top].mean())
    return outs.reshape(BATCH, STEPS, -1, DIM), float(np.mean(recalls))


@pytest.mark.parametrize("codec", ["", "+int4(rotate=true,centre=none,balance=off)"])
def test_a_step_reads_the_pages_with_the_best_bounds(codec):
    policy = mj.policy(QUEST + codec + WINDOWS)
    out, cache = steps(after_prompt(policy))
    expected, recall = oracle(policy.codec if codec else None)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    assert recall > 0.7  # of the four tokens that matter most, by three of up to eleven pages
    assert TRACES[policy, SPEC, 1] == 1
    assert mj.nbytes(cache) == mj.predict_nbytes(policy, SPEC)


BOUNDED = {
    "dense": (QUEST, SPEC),
    "centred and balanced": (QUEST + "+turboquant(3,3)", dataclasses.replace(SPEC, dtype="bfloat16")),
    "tiles": (f"quest({BUDGET},8)+kivi(2,8)", SPEC),
    "a ring": (QUEST + "+int8(centre=rope)", dataclasses.replace(SPEC, window=30)),
    "a latent stream": (QUEST + "+int8", LATENT),
}


@pytest.mark.parametrize("case", BOUNDED)
def test_no_product_that_attention_computes_exceeds_its_pages_bound(case):
    """Tokens came in a ragged chunk and one by one, the pages are in all states; queries are any."""
    policy, spec = mj.policy(BOUNDED[case][0] + WINDOWS), BOUNDED[case][1]
    draw, cache = np.random.default_rng(0).standard_normal, policy.init(spec)
    shift = 2 * draw((spec.kv_heads, spec.head_dim))
    stage = quick_jit(lambda c, k, v, q, n: mj.commit(mj.update(c, k, v, n, q)))
    for size, lengths in ((30, [30, 23]), *[(1, [1, 1])] * 5, (30, [9, 2])):
        q, k, v = (draw((2, size, n, spec.head_dim)) for n in (2 * spec.kv_heads, spec.kv_heads, spec.kv_heads))
        values = None if spec.latent_dim else jnp.asarray(v, jnp.float32)
        keys, queries = (jnp.asarray(x, jnp.float32) for x in (k + shift, q))
        cache = stage(cache, keys, values, queries, jnp.array(lengths))
    rows = jnp.asarray(3 * draw((2, spec.kv_heads, 50, spec.head_dim)), jnp.float32)
    bound, products = quick_jit(lambda c, q: (page_bounds(c.bounds, q), logits(c, q)))(cache, rows)
    paged = np.asarray(products).reshape(*products.shape[:3], -1, cache.layout.page)
    slack = np.asarray(bound)[..., None] - paged
    held = np.isfinite(paged)
    assert held.any(axis=(0, 1, 2, 4)).sum() >= 4
    assert slack[held].min() > -1e-4
    assert mj.nbytes(cache) == mj.predict_nbytes(policy, spec)


def logits(cache, q):
    """Products of rotated queries [B, K, M, H] with the keys of the history, as attention takes them from the codes."""
    spec, codec = cache.spec, cache.policy.codec
    rows = codec.keys.into_basis(prepare_queries(cache.basis, q[..., : spec.coded_dim]))
    pos = history_positions(cache)
    found = decode(
        rows,
        cache.history.k,
        cache.history.v,
        q_pos=jnp.full((2, q.shape[2]), CAPACITY),
        k_pos=pos,
        q_extra=q[..., spec.coded_dim :] if spec.extra_dim else None,
        k_extra=cache.history.extra,
        centre=centre_term(cache.basis, q[..., : spec.coded_dim], spec),
        scale=1.0,
        logits=True,
        implementation="xla",
    )
    return found[2]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["float32", "bfloat16", "float16"]), st.floats(0.01, 100))
def test_bounds_are_least_and_largest_rounded_outwards(seed, dtype, size):
    rng = np.random.default_rng(seed)
    keys = (size * rng.standard_normal((2, 1, 3, 16))).astype(np.float32)
    filled = rng.random((2, 1, 16)) < 0.6
    bounds = measure_bounds(jnp.asarray(keys), jnp.asarray(filled), 4, dtype)
    assert bounds.low.dtype == dtype
    paged, held = (x.reshape(*x.shape[:-1], 4, 4) for x in (keys, np.broadcast_to(filled[:, :, None], keys.shape)))
    low = np.where(held, paged, np.inf).min(-1)
    high = np.where(held, paged, -np.inf).max(-1)
    some = held.any(-1)
    step_of = float(jnp.finfo(dtype).eps)
    for found, exact, sign in ((bounds.low, low, 1), (bounds.high, high, -1)):
        found = np.asarray(found, np.float64)
        assert (found[~some] == 0).all()
        off = sign * (exact - found)[some]
        assert (off >= 0).all()
        assert (off <= step_of * np.abs(exact[some]) + 1e-7).all()


def test_the_bound_is_reached_where_one_key_has_every_edge():
    bounds = KeyBounds(jnp.array([[[[-1.0], [2.0]]]]), jnp.array([[[[3.0], [2.0]]]]))
    q = jnp.array([[[[2.0, -1.0], [-2.0, 1.0], [0.0, 0.0]]]])
    assert page_bounds(bounds, q)[0, 0, :, 0].tolist() == [4.0, 4.0, 0.0]


def test_a_budget_of_all_is_a_dense_cache():
    for budget in (CAPACITY, CAPACITY + 100, SINKS + RECENT + 48):
        policy = mj.policy(f"quest({budget},{PAGE})" + WINDOWS)
        out, cache = steps(after_prompt(policy))
        expected, other = steps(after_prompt(mj.policy("dense" + WINDOWS)))
        np.testing.assert_array_equal(out, expected)
        assert mj.nbytes(cache) == mj.nbytes(other)
        assert cache.bounds is None


def test_a_text_within_the_budget_is_read_in_full():
    """Eleven of twelve pages can be read, and not more have tokens."""
    out, cache = run(mj.policy(f"quest({SINKS + RECENT + 44},{PAGE})" + WINDOWS).init(SPEC), text(), [9, *[1] * 40])
    assert cache.layout.chosen == 11
    np.testing.assert_allclose(out, dense_oracle(text()), atol=1e-5)


def test_what_padding_holds_does_not_choose():
    """A step of several tokens chooses by its real ones, whose outputs are as if the row were alone."""
    cache, lengths = after_prompt(mj.policy(QUEST + WINDOWS)), jnp.array([4, 1])
    q, k, v = (jnp.asarray(x) for x in rows_from(PROMPT, 4))
    out, _ = step(cache, q, k, v, lengths)
    other, _ = step(cache, q.at[1, 1:].mul(-50.0), k, v, lengths)
    np.testing.assert_array_equal(out[1, 0], other[1, 0])
    single, _ = step(cache, q[:, :1], k[:, :1], v[:, :1])
    np.testing.assert_allclose(out[1, 0], single[1, 0], atol=1e-5)
    np.testing.assert_array_equal(out[0], other[0])


def test_steps_in_a_loop_that_is_traced_once():
    policy = mj.policy(QUEST + WINDOWS)
    cache = after_prompt(policy)
    expected, _ = steps(cache)
    inputs = [jnp.stack(each) for each in zip(*[rows_from(PROMPT + i, 1) for i in range(STEPS)], strict=True)]

    @quick_jit
    def loop(cache, inputs):
        def one(cache, token):
            out, cache = mj.attend(mj.update(cache, *token[1:]), token[0])
            return cache, out

        return jax.lax.scan(one, cache, tuple(inputs))

    _, outs = loop(cache, inputs)
    np.testing.assert_allclose(outs[:, :, 0].swapaxes(0, 1), expected, atol=1e-6)


def test_bytes_are_those_of_all_tokens_and_the_bounds():
    policy, spec = mj.policy("quest(256)"), mj.CacheSpec(1, 2, 64, 1092, "bfloat16", rope=None)
    found, dense = mj.predict_nbytes(policy, spec), mj.predict_nbytes(mj.policy("protect(4,64)"), spec)
    assert found.device - dense.device == 2 * (1024 // 16) * 64 * 2 * 2
    assert (found.history - dense.history) / (dense.history / 2) == 2 / 16  # of the keys' bytes
    assert mj.nbytes(mj.cache.policy.abstract(policy, spec)) == found
    assert not policy.simulated()


def test_the_first_layers_are_left_alone():
    caches = mj.policy(QUEST + WINDOWS).init([SPEC] * 3)
    assert [cache.layout.chosen for cache in caches] == [0, 0, CHOSEN]
    assert [cache.policy.evictor for cache in caches] == [None, None, Quest(BUDGET, PAGE)]
    every = mj.policy(f"quest({BUDGET},{PAGE},0)" + WINDOWS)
    assert [cache.layout.chosen for cache in every.init([SPEC] * 2)] == [CHOSEN] * 2
    assert mj.nbytes(caches) == mj.predict_nbytes(mj.policy(QUEST + WINDOWS), [SPEC] * 3)


def test_a_cache_that_is_quantized_later_has_the_same_bounds():
    cache = after_prompt(mj.policy(QUEST + WINDOWS))
    coded = quantize(cache, mj.int8(centre="none", balance="off"))
    other = after_prompt(mj.policy(QUEST + "+int8(centre=none,balance=off)" + WINDOWS))
    for found, expected in zip(coded.bounds, other.bounds, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    with pytest.raises(ValueError, match="evict would scatter the tokens of quest's pages"):
        evict(cache, jnp.zeros((BATCH, HEADS, cache.history.slots)), 8)


BAD = {
    "quest": "budget",
    "quest(0)": "budget",
    "quest(64,0)": "page",
    "quest(64,dense_layers=-1)": "dense_layers",
    "quest(64)+snapkv(64)": "both decide eviction",
    "quest(64)+kivi(2,32)": "pages of 16 tokens cut through kivi's tiles of 32; use page=32",
    "quest(64)+zipcache": "decides itself",
    "quest(64)+progressive": "decides itself",
    "quest(64)+host(8,4)": "leave the host tier away",
    f"quest({SINKS + RECENT + 15})" + WINDOWS: "a budget of 23 tokens has no room for a page of 16 besides the 8",
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_go_is_refused(case):
    with pytest.raises(ValueError, match=BAD[case]):
        mj.policy(case).init(SPEC)


def test_string_forms_are_read_back():
    for form in ("quest(256)", "quest(256,32)", "quest(256,16,0)+int4", "quest(64,page=128)"):
        policy = mj.policy(form)
        assert mj.policy(str(policy)) == policy
    assert mj.quest(256) == mj.policy("quest(256)")
