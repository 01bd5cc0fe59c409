"""Conformance of every policy: what attention over its cache has to give, however the text is cut."""

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
    ROWS,
    SPEC,
    TOKENS,
    TRACES,
    Row,
    as_output,
    by_kv_head,
    dense_oracle,
    numpy_rope,
    numpy_softmax,
    oracle,
    plain,
    qkv,
    quick_jit,
    relative_error,
    row,
    row_id,
    run,
    slow_but,
    step,
)

import memjax as mj
from memjax.attention.attend import history_positions
from memjax.pallas_kernels.slots import Span, positions
from memjax.quantize import Fp8, Int4, Int8

CUTS = {"whole": [TOKENS], "sevens": [7] * 7, "ones": [1] * TOKENS}
TEXT = qkv(0)
CHAIN = "streaming(4,24)+int4+protect(2,8)+host(8,4)"
CODED = "int8+protect(2,8)"
HOST = "int8+protect(2,8)+host(8,4)"
RAGGED = "int4+protect(2,0)"
PAGED = "progressive(refine=1.0,page=8,share=0.0)+protect(2,8)"
SPARSE = "gear(int4,0,sparse=0.2)+protect(2,8)"
# These meet every cut; a codec or a window more changes nothing about cuts, so the others meet one.
TILED = "kivi(4,8)+protect(2,8)"
EVERY_CUT = ["dense", CODED, TILED, RAGGED, PAGED, "streaming(4,16)", "streaming(4,16)+int8+protect(4,8)", HOST, CHAIN]
EVERY_CUT += [SPARSE]
CASES = [(each, cut) for each in ROWS for cut in CUTS if each.text in EVERY_CUT or cut == "sevens"]


@functools.cache
def result(text: str, cut: str):
    """Outputs and cache of the common text under a policy."""
    return run(plain(text).init(SPEC), TEXT, CUTS[cut])


FAST = [case for case in CASES if case[1] == "sevens" or case[0].text in ("dense", CHAIN)]


@pytest.mark.parametrize("case", slow_but(FAST, CASES), ids=[f"{each.text}-{cut}" for each, cut in CASES])
def test_attention_over_the_cache_is_what_the_policy_says(case):
    row, cut = case
    out, cache = result(row.text, cut)
    np.testing.assert_allclose(out, oracle(row, TEXT, CUTS[cut]), atol=row.atol)
    assert cache.length.tolist() == [TOKENS] * BATCH
    if row.evict is None:
        assert relative_error(out, dense_oracle(TEXT)) < row.bound


@pytest.mark.parametrize("text", ["dense", "streaming(4,16)"])
def test_without_a_codec_chunks_do_not_matter(text):
    whole = result(text, "whole")[0]
    for cut in ("sevens", "ones"):
        np.testing.assert_allclose(result(text, cut)[0], whole, atol=1e-5)


@pytest.mark.parametrize("text", EVERY_CUT)
def test_what_is_stored_does_not_depend_on_chunks(text):
    """In float32 the same codes come out; rotated keys may differ by a rounding of cos and sin. Counts of steps apart."""
    whole, *others = (jax.tree.leaves(dataclasses.replace(result(text, cut)[1], refined=None)) for cut in CUTS)
    for other in others:
        for a, b in zip(whole, other, strict=True):
            a, b = (np.asarray(x, np.float32) for x in (a, b))
            assert np.mean(np.abs(a - b) > 1e-5) < 0.002


@pytest.mark.parametrize(("text", "first"), [("dense", 0), (CODED, 2), (RAGGED, 2), ("streaming(4,16)", None), (HOST, None)])
def test_a_history_of_consecutive_tokens_is_a_span(text, first):
    """Kernels then read no positions; a ring has an array of them."""
    cache = result(text, "sevens")[1]
    found = history_positions(cache)
    assert isinstance(found, Span) == (first is not None)
    held = np.sort(np.asarray(positions(found, cache.history.slots))[:, 0])
    end, count = TOKENS - cache.layout.tail, cache.history.slots if first is None else TOKENS - first - cache.layout.tail
    np.testing.assert_array_equal(held[:, -count:], [np.arange(end - count, end)] * BATCH)
    assert (held[:, :-count] == -1).all()


def paper_streaming(tokens, sinks: int, window: int, model_window: int | None = None) -> np.ndarray:
    """StreamingLLM as its paper does it: unrotated keys are kept and all rotated anew at every step, as 0 .. n - 1."""
    q, k, v = by_kv_head(tokens)
    outs = []
    for p in range(q.shape[-2]):
        kept = [s for s in range(p + 1) if s < sinks or p - s < window]
        place = np.arange(len(kept))
        rotated = numpy_rope(k[..., kept, :], place, ROPE.theta)
        query = numpy_rope(q[..., [p], :], place[-1:], ROPE.theta)
        seen = place[-1] - place < (model_window or len(kept))
        weights = numpy_softmax(query @ rotated.swapaxes(-1, -2) / np.sqrt(q.shape[-1]), seen)
        outs.append(weights @ v[..., kept, :])
    return as_output(np.concatenate(outs, axis=-2))


@pytest.mark.parametrize("sinks", [0, 4])
def test_streaming_is_the_papers(sinks):
    out, cache = result(f"streaming({sinks},16)", "sevens")
    np.testing.assert_allclose(out, paper_streaming(TEXT, sinks, 16), atol=1e-5)
    kept = sum(part.slots for part in (cache.sinks, cache.history, cache.tail) if part is not None)
    assert kept == sinks + 16


def test_streaming_with_positions_of_the_text_is_another_thing():
    apart = relative_error(result("streaming(4,16,positions=text)", "sevens")[0], paper_streaming(TEXT, 4, 16))
    assert apart > 0.01


def test_an_evictor_with_room_for_the_text_is_dense():
    """Also when its capacity is beyond its budget (the table has the other case)."""
    out, _ = run(mj.streaming(4, TOKENS - 4).init(dataclasses.replace(SPEC, capacity=400)), TEXT, CUTS["sevens"])
    np.testing.assert_allclose(out, dense_oracle(TEXT), atol=1e-5)


@pytest.mark.parametrize("text", EVERY_CUT)
def test_all_decode_steps_share_one_trace(text):
    """From an empty cache as well as after a prompt."""
    policy = plain(text)
    _, cache = result(text, "ones")
    _, prompted = result(text, "whole")
    _, after = step(prompted, *(x[:, :1] for x in TEXT))
    assert TRACES[policy, SPEC, 1] == 1
    assert jax.tree.structure(after) == jax.tree.structure(cache) == jax.tree.structure(policy.init(SPEC))


@pytest.mark.parametrize("text", [CHAIN, SPARSE])
def test_a_scan_over_decode_steps(text):
    def decode(cache, token):
        out, cache = mj.attend(mj.update(cache, *(x[:, None] for x in token[1:])), token[0][:, None])
        return cache, out[:, 0]

    tokens = tuple(jnp.asarray(x).swapaxes(0, 1) for x in TEXT)
    cache, out = quick_jit(functools.partial(jax.lax.scan, decode))(plain(text).init(SPEC), tokens)
    np.testing.assert_allclose(out.swapaxes(0, 1), result(text, "ones")[0], atol=1e-5)
    assert cache.length.tolist() == [TOKENS] * BATCH


@pytest.mark.parametrize("text", ["dense", "streaming(4,16)+int8+protect(4,8)"])
def test_a_donated_cache_is_updated_in_place(text):
    cache = plain(text).init(SPEC)
    donating = quick_jit(step.__wrapped__, donate_argnums=0)
    analysis = donating.lower(cache, *(x[:, :1] for x in TEXT)).compile().memory_analysis()
    assert analysis.alias_size_in_bytes == mj.nbytes(cache).total
    out, after = donating(cache, *(x[:, :1] for x in TEXT))
    assert cache.length.is_deleted()
    assert after.length.tolist() == [1, 1]
    np.testing.assert_allclose(out, result(text, "ones")[0][:, :1], atol=1e-6)


@pytest.mark.parametrize("text", ["dense", "int4(rotate=true)+protect(4,8)", "streaming(4,4092)+int8+protect(4,8)"])
@pytest.mark.parametrize("tokens", [1, 7])
def test_a_step_writes_its_tokens_and_copies_no_history(text, tokens):
    """The compiler's temporaries do not grow with the history."""
    policy = mj.policy(text)
    write = quick_jit(lambda cache, k, v: mj.commit(mj.update(cache, k, v)), donate_argnums=0)
    _, k, v = (x[:, :tokens] for x in TEXT)
    temporaries = []
    for capacity in (4096, 8192):
        cache = mj.abstract(policy, dataclasses.replace(SPEC, capacity=capacity))
        analysis = write.lower(cache, k, v).compile().memory_analysis()
        assert analysis.alias_size_in_bytes == mj.nbytes(cache).total
        temporaries.append(analysis.temp_size_in_bytes)
    assert temporaries[0] == temporaries[1] < mj.nbytes(cache).history / 16


LONG = ["dense", "int4(rotate=true)+protect(4,8)", "streaming(4,4092)+int8+protect(4,8)", "kivi(2)", "zipcache"]
LONG = [(each, 1) for each in (*LONG, "quest(512)+int8+protect(4,8)", "host(256)+int8")]
LONG += [("dense", 7), ("host(256)+int8", 7)]


@pytest.mark.parametrize(("text", "tokens"), LONG)
def test_a_step_reads_the_history_and_copies_none_of_it(text, tokens):
    """Temporaries do not grow with it, but for the positions of its slots, though a step writes to what it has read."""
    dim, temporaries, held = 64, [], []
    donating = quick_jit(step.__wrapped__, donate_argnums=0)
    for capacity in (8192, 16_384):
        spec = mj.CacheSpec(BATCH, HEADS, dim, capacity, "float32", rope=mj.Rope(dim))
        cache = mj.abstract(mj.policy(text), spec)
        analysis = donating.lower(cache, *qkv(0, tokens=tokens, dim=dim)).compile().memory_analysis()
        assert analysis.alias_size_in_bytes == mj.nbytes(cache).total
        temporaries.append(analysis.temp_size_in_bytes)
        held.append(mj.nbytes(cache).total)
    assert temporaries[1] - temporaries[0] <= (held[1] - held[0]) / 8


@pytest.mark.parametrize("text", [RAGGED, CHAIN])
def test_ragged_rows_are_what_each_is_alone(text):
    policy, lengths, most, steps = plain(text), [3, 7], 7, 30
    tokens = qkv(1)
    prompt = [np.where(np.arange(most)[:, None, None] < np.array(lengths)[:, None, None, None], x[:, :most], np.nan)
              for x in tokens]  # fmt: skip
    first, cache = step(policy.init(SPEC), *prompt, jnp.array(lengths))
    assert cache.length.tolist() == lengths
    decoded = []
    for i in range(steps):
        out, cache = step(cache, *(np.stack([x[b, n + i] for b, n in enumerate(lengths)])[:, None] for x in tokens))
        decoded.append(np.asarray(out)[:, 0])
    for b, length in enumerate(lengths):
        alone = tuple(x[b : b + 1, : length + steps] for x in tokens)
        expected = oracle(row(text), alone, [length] + [1] * steps)[0]
        np.testing.assert_allclose(first[b, :length], expected[:length], atol=1e-5)
        np.testing.assert_allclose(np.stack(decoded, axis=1)[b], expected[length:], atol=1e-5)


@pytest.mark.parametrize("text", [RAGGED, HOST, PAGED])
def test_a_row_that_overflows_is_nan_and_only_it(text):
    chunk = tuple(x[:, :7] for x in qkv(2))
    cache = result(text, "whole")[1]
    out, cache = step(cache, *chunk, jnp.array([7, 6]))
    assert cache.length.tolist() == [CAPACITY, CAPACITY - 1]
    assert np.isfinite(out).all()
    out, cache = step(cache, *chunk, jnp.array([1, 1]))
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1]).all()
    out, _ = step(cache, *chunk, jnp.array([0, 0]))
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1]).all()


def test_a_ring_takes_any_length():
    text = (np.tile(x, (1, 4, 1, 1)) for x in TEXT)
    out, cache = run(mj.streaming(4, 16).init(SPEC), tuple(text), CUTS["ones"] * 4)
    assert cache.length.tolist() == [4 * TOKENS] * BATCH
    assert np.isfinite(out).all()


@pytest.mark.parametrize(
    ("capacity", "evict"), [(21, (4, 16)), (20, (4, 16)), (13, (4, 9)), (5, (4, 1)), (4, (3, 1)), (1, (0, 1))]
)
def test_a_capacity_below_its_window_bounds_a_stream_and_does_not_end_it(capacity, evict):
    """At one more than sinks and window, at just these, below them, below the sinks, and at a single token."""
    spec = dataclasses.replace(SPEC, capacity=capacity)
    out, cache = run(mj.policy("streaming(4,16)").init(spec), TEXT, CUTS["sevens"])
    np.testing.assert_allclose(out, oracle(Row("", evict=evict), TEXT, CUTS["sevens"]), atol=1e-5)
    assert sum(part.slots for part in (cache.sinks, cache.history) if part is not None) == min(capacity, 20)


@pytest.mark.parametrize("text", [CODED, CHAIN, SPARSE])
def test_a_nan_key_gives_no_plausible_output(text):
    q, k, v = (x.copy() for x in TEXT)
    k[0, 10, 0] = np.nan
    out, _ = run(plain(text).init(SPEC), (q, k, v), CUTS["ones"])
    seen = slice(10, 34 if text == CHAIN else None)
    assert np.isnan(out[0, seen, :GROUPS]).all()
    untouched = np.ones(out.shape[:3], bool)
    untouched[0, seen, :GROUPS] = False
    np.testing.assert_allclose(out[untouched], result(text, "ones")[0][untouched], atol=1e-6)


def test_protected_tokens_are_kept_bit_by_bit():
    cache = mj.policy("streaming(4,16)+int4(rotate=true)+protect(0,8)").init(dataclasses.replace(SPEC, rope=None))
    _, k, v = (jnp.asarray(x, jnp.float32) for x in TEXT)
    fill = quick_jit(lambda cache, k, v: mj.commit(mj.update(cache, k, v)))
    for start in range(0, TOKENS, 7):
        cache = fill(cache, k[:, start : start + 7], v[:, start : start + 7])
    ring = [t % 8 for t in range(TOKENS - 8, TOKENS)]
    for segment, source in (("k", k), ("v", v)):
        source = jnp.moveaxis(source, 1, -1)
        sinks, tail = (getattr(getattr(cache, name), segment).data for name in ("sinks", "tail"))
        np.testing.assert_array_equal(sinks, source[..., :4])
        np.testing.assert_array_equal(tail[..., ring], source[..., -8:])


def test_updates_without_attend_are_committed():
    tokens = tuple(x[:, :14] for x in TEXT)
    policy = mj.policy(CODED)

    @quick_jit
    def twice(cache, q, k, v):
        cache = mj.update(mj.update(cache, k[:, :7], v[:, :7]), k[:, 7:], v[:, 7:])
        return mj.attend(cache, q[:, 7:])

    out, cache = twice(policy.init(SPEC), *tokens)
    assert cache.staged is None
    assert cache.length.tolist() == [14] * BATCH
    expected = oracle(Row(CODED, Int8(), 2, 8), tokens, [7, 7])
    np.testing.assert_allclose(out, expected[:, 7:], atol=1e-5)


def test_queries_may_stand_anywhere():
    """Without staged tokens at the last committed ones; with ``positions`` where they say."""
    q = TEXT[0]
    cache = result("dense", "ones")[1]
    last = quick_jit(lambda cache, q: mj.attend(cache, q)[0])(cache, q[:, -3:])
    expected = dense_oracle(TEXT)
    np.testing.assert_allclose(last, expected[:, -3:], atol=1e-5)
    places = jnp.array([[5, 40, 0], [48, 20, 7]])
    asked = jnp.take_along_axis(jnp.asarray(q), places[..., None, None], axis=1)
    out = quick_jit(lambda cache, q, at: mj.attend(cache, q, at)[0])(cache, asked, places)
    np.testing.assert_allclose(out, np.take_along_axis(expected, np.asarray(places)[..., None, None], 1), atol=1e-5)


WINDOWED = [
    Row("int4+protect(2,8)", Int4(), 2, 8),
    Row("int8+protect(2,4)+host(4,3)", Int8(), 2, 4),
    Row("streaming(4,8)+int8+protect(4,2)", Int8(), 4, 2, evict=(4, 8)),
]


@pytest.mark.parametrize("row", WINDOWED, ids=row_id)
def test_a_models_own_window_bounds_the_cache(row):
    spec = dataclasses.replace(SPEC, window=12)
    out, cache = run(row.policy.init(spec), TEXT, CUTS["sevens"])
    np.testing.assert_allclose(out, oracle(row, TEXT, CUTS["sevens"], model_window=12), atol=1e-5)
    place = cache.layout
    assert place.sinks + place.tail + place.slots <= row.sinks + 12


def test_streaming_in_a_windowed_model_never_loses_its_sinks():
    """Positions inside the cache count for the model's window too: without sinks models break."""
    spec = dataclasses.replace(SPEC, window=20)
    out, _ = run(mj.streaming(4, 12).init(spec), TEXT, CUTS["ones"])
    np.testing.assert_allclose(out, paper_streaming(TEXT, 4, 12, model_window=20), atol=1e-5)


def test_softcap_and_scale():
    spec = dataclasses.replace(SPEC, softcap=1.5, scale=DIM**-0.5)
    out, _ = run(mj.dense().init(spec), TEXT, CUTS["sevens"])
    np.testing.assert_allclose(out, dense_oracle(TEXT, softcap=1.5), atol=1e-5)
    assert relative_error(out, dense_oracle(TEXT)) > 0.01


def test_a_layer_without_rotary_embedding():
    out, _ = run(mj.streaming(4, 16).init(dataclasses.replace(SPEC, rope=None)), TEXT, CUTS["sevens"])
    np.testing.assert_allclose(out, oracle(row("streaming(4,16)"), TEXT, CUTS["sevens"], theta=None), atol=1e-5)


def test_keys_that_arrive_rotated():
    q, k, v = TEXT
    q, k = (numpy_rope(x.swapaxes(1, 2), np.arange(TOKENS), ROPE.theta).swapaxes(1, 2) for x in (q, k))
    spec = dataclasses.replace(SPEC, rope="applied")
    tokens = tuple(np.float32(x) for x in (q, k, v))
    out, _ = run(mj.streaming(4, 16, positions="text").init(spec), tokens, CUTS["sevens"])
    np.testing.assert_allclose(out, result("streaming(4,16,positions=text)", "sevens")[0], atol=1e-5)


SIXTEEN_BITS = [
    (Row("dense"), "bfloat16", 0.01),
    (Row("int8+protect(2,8)", Int8(), 2, 8), "bfloat16", 0.01),
    (Row("fp8(format=e5m2)+protect(0,0)", Fp8(format="e5m2")), "float16", 0.01),
]


@pytest.mark.parametrize(("row", "dtype", "bound"), SIXTEEN_BITS, ids=[f"{r.text}-{d}" for r, d, _ in SIXTEEN_BITS])
def test_sixteen_bit_caches(row, dtype, bound):
    """Segments are stored and queries answered in the dtype of the spec, near the result of float32."""
    spec = dataclasses.replace(SPEC, dtype=dtype)
    tokens = tuple(jnp.asarray(x, dtype) for x in TEXT)
    out, cache = run(row.policy.init(spec), tokens, CUTS["sevens"])
    assert out.dtype == dtype
    stored = {leaf.dtype for part in (cache.sinks, cache.tail) for leaf in jax.tree.leaves(part)}
    assert stored <= {jnp.dtype(dtype)}
    wide = tuple(np.float32(x) for x in tokens)
    assert relative_error(out, oracle(row, wide, CUTS["sevens"])) < bound


BAD = {
    "keys of another head count": (
        lambda c, q, k, v: mj.update(c, k[:, :, :1], v[:, :, :1]),
        r"kv_heads.*\[2, 7, 1, 16\]",
    ),
    "keys of another batch": (lambda c, q, k, v: mj.update(c, k[:1], v[:1]), r"got \[1, 7, 2, 16\]"),
    "no values": (lambda c, q, k, v: mj.update(c, k), "needs values .* got None"),
    "values of another shape": (lambda c, q, k, v: mj.update(c, k, v[:, :3]), r"got \(2, 3, 2, 16\)"),
    "one length for all": (lambda c, q, k, v: mj.update(c, k, v, jnp.array(3)), r"lengths of shape \[2\]"),
    "three query heads": (lambda c, q, k, v: mj.attend(mj.update(c, k, v), q[:, :, :3]), "multiple of kv_heads=2"),
    "queries of another dim": (lambda c, q, k, v: mj.attend(c, q[..., :8]), "head_dim=16"),
    "queries of another batch": (lambda c, q, k, v: mj.attend(c, q[:1]), "batch=2"),
    "too few queries": (lambda c, q, k, v: mj.attend(mj.update(c, k, v), q[:, :3]), "3 queries for 7 staged"),
    "another policy": (lambda c, q, k, v: mj.int4().update(c, k, v), "made by policy dense, not by int4"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_shapes_are_refused(case):
    call, message = BAD[case]
    tokens = tuple(jax.ShapeDtypeStruct((BATCH, 7, n, DIM), jnp.float32) for n in (HEADS * GROUPS, HEADS, HEADS))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call, mj.dense().init(SPEC), *tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch to be an integer of at least 1, got 0"),
        ({"capacity": -5}, "capacity .* got -5"),
        ({"head_dim": 2.5}, "head_dim .* got 2.5"),
        ({"kv_heads": True}, "kv_heads"),
        ({"window": 0}, "window"),
        ({"dtype": "int8"}, "'int8' is not one of bfloat16, float16, float32"),
        ({"dtype": "float8_e4m3fn"}, "is not one of"),
        ({"dtype": "nonsense"}, "'nonsense' is not one of"),
        ({"rope": "none"}, "rope must be a Rope, None or 'applied'"),
        ({"latent_dim": 24, "kv_heads": 1}, "latent_dim <= head_dim"),
        ({"latent_dim": 8}, "kv_heads=1"),
    ],
)
def test_wrong_specs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SPEC, **changes)


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("streaming(4,16)", {"rope": "applied"}, "positions=text"),
        ("int4", {"head_dim": 15, "rope": None}, "multiple of 2 channels, got 15"),
        ("int8(rotate=true)", {"head_dim": 12, "rope": None}, "divisible by 8, got 12; use rotate=false"),
    ],
)
def test_policies_that_cannot_serve_a_spec_are_refused(text, changes, message):
    with pytest.raises(ValueError, match=message):
        plain(text).init(dataclasses.replace(SPEC, **changes))
