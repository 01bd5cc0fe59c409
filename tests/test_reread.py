"""KVzip and KVCompose: scores against a plain softmax over the text and its second reading; the compressed cache in use."""

import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import numpy_rope, numpy_softmax, quick_jit, slow_but

import memjax as mj
from memjax.evict import KVCompose, KVzip
from memjax.evict.rereading import composite_counts
from memjax.generate.reread import compress, scores

INSTRUCTION, CHUNK, CAPACITY, SINKS, RECENT = [5, 6, 7], 8, 40, 2, 3
PROMPTS = [[int(t) for t in np.random.default_rng(seed).integers(0, 60, size)] for seed, size in ((0, 21), (1, 12))]
LONGEST = 21 + len(INSTRUCTION) + 8 + CHUNK


def read(model, policy, capacity: int = CAPACITY):
    tokens = np.zeros((2, 21), np.int32)
    for row, prompt in zip(tokens, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    cache = model.init_cache(mj.policy(policy) if isinstance(policy, str) else policy, 2, capacity, "float32")
    return quick_jit(mj.prefill)(model.decoder, cache, tokens, jnp.asarray([21, 12], jnp.int32))[1]


@pytest.fixture(scope="module")
def whole(tiny):
    return read(tiny, f"protect({SINKS},{RECENT})")


@pytest.fixture(scope="module")
def found(tiny, whole):
    return scores(tiny, whole, PROMPTS, KVzip(9), chunk=CHUNK, instruction=INSTRUCTION)


@quick_jit
def queries_and_keys(decoder, tokens):
    """Of every layer, before the rotary embedding, without a cache."""
    x, found = decoder.embed(tokens), []
    for layer in decoder.layers:
        found.append(layer.mixer.project(layer.mixer_norm(x))[:2])
        x, _ = layer(x, None, None, False)
    return found


def oracle(model, prompt: list[int]) -> list[np.ndarray]:
    """Scores [K, n] of a prompt's tokens in every layer."""
    size, best = len(prompt), None
    for begin in range(0, size, CHUNK):
        said = [*INSTRUCTION, *prompt[max(begin - 8, 0) : begin + CHUNK]]
        text = np.zeros((1, LONGEST), np.int32)
        text[0, : size + len(said)] = [*prompt, *said]
        j, new = np.arange(LONGEST), []
        seen = (j < 4) | ((j >= begin) & (j < min(begin + CHUNK, size)))
        for (q, k), rope in zip(queries_and_keys(model.decoder, text), model.config.ropes, strict=True):
            theta = None if rope is None else rope.theta
            q, k = (numpy_rope(np.asarray(x[0], np.float64).swapaxes(0, 1), j, theta) for x in (q, k))
            rows = slice(size, size + len(said))
            mask = seen | ((j >= size) & (j <= j[rows, None]))
            logits = q.reshape(k.shape[0], -1, *q.shape[1:])[:, :, rows] @ k[:, None].swapaxes(-1, -2)
            attention = numpy_softmax(logits / np.sqrt(k.shape[-1]), mask).max((1, 2))
            new.append(np.where((j >= begin) & (j < begin + CHUNK), attention, 0.0)[:, :size])
        best = new if best is None else [np.maximum(a, b) for a, b in zip(best, new, strict=True)]
    return [np.where(np.arange(size) < 4, 1.0, score) for score in best]


def test_scores_are_those_of_a_plain_softmax(tiny, found):
    """In chunks, of which the shorter row has fewer; the layer with a window of its own has none."""
    assert found[3] is None
    for row, prompt in enumerate(PROMPTS):
        for layer, expected in zip(found[:3], oracle(tiny, prompt), strict=False):
            entered = len(prompt) - SINKS - RECENT
            np.testing.assert_allclose(layer[row, :, :entered], expected[:, SINKS : SINKS + entered], rtol=1e-3, atol=1e-6)


def test_the_best_tokens_stay_and_any_question_may_follow(tiny, whole, found):
    """Two questions, one compressed cache: what it holds of the prompt is the same."""
    budget = 9
    small = compress(tiny, whole, PROMPTS, KVzip(budget, across="head"), room=6, chunk=CHUNK, instruction=INSTRUCTION)
    kept = budget - SINKS - RECENT
    for cache, score in zip(small[:3], found[:3], strict=True):
        assert cache.history.slots == kept + 6
        for row, prompt in enumerate(PROMPTS):
            for head in range(2):
                order = np.argsort(-np.asarray(score[row, head, : len(prompt) - SINKS - RECENT]), kind="stable")
                assert cache.history.pos[row, head, :kept].tolist() == sorted((order[:kept] + SINKS).tolist())
    assert small[3].history.slots == whole[3].history.slots
    ask = quick_jit(mj.prefill)
    answers = [ask(tiny.decoder, small, np.full((2, 4), token, np.int32)) for token in (3, 9)]
    for cache, other in zip(answers[0][1][:3], answers[1][1][:3], strict=True):
        np.testing.assert_array_equal(cache.history.pos, other.history.pos)
        np.testing.assert_array_equal(cache.history.k.data[..., :kept], other.history.k.data[..., :kept])
    assert np.isfinite(answers[0][0]).all()
    assert mj.nbytes(small).history < mj.nbytes(whole).history


@pytest.mark.parametrize("across", ["model", "layer"])
def test_the_best_tokens_of_all_heads_stay(tiny, whole, found, across):
    """Of all layers, too, up to whole slots per head; each row keeps its own best, as many as its layers have slots."""
    budget, entered = 4, [len(prompt) - SINKS - RECENT for prompt in PROMPTS]
    method = KVzip(budget + SINKS + RECENT, across=across)
    small = compress(tiny, whole, PROMPTS, method, room=6, chunk=CHUNK, instruction=INSTRUCTION)
    every = [np.stack([np.asarray(layer[row, :, :n]) for layer in found[:3]]) for row, n in enumerate(entered)]
    best = [row >= np.sort(row, axis=None)[-3 * 2 * budget] for row in every]
    wanted = np.mean([row.sum((1, 2)) for row in best], axis=0) / 2 if across == "model" else np.full(3, budget)
    assert all(cache.shared for cache in small[:3])
    slots = np.array([cache.history.slots // 2 - 6 for cache in small[:3]])
    assert slots.sum() == 3 * budget
    assert (abs(slots - wanted) < 1).all()
    assert (len(set(slots.tolist())) > 1) == (across == "model")
    for i, (cache, score) in enumerate(zip(small[:3], every[0], strict=True)):
        pos, owner = (np.asarray(x)[0, 0] for x in (cache.history.pos, cache.history.owner))
        kept = {(int(o), int(p) - SINKS) for o, p in zip(owner, pos, strict=True) if p >= 0}
        order = np.argsort(-score, axis=None, kind="stable")[: 2 * slots[i]]
        assert kept == set(zip(*(x.tolist() for x in np.unravel_index(order, score.shape)), strict=True))
    assert small[3].history.slots == whole[3].history.slots
    answer = quick_jit(mj.prefill)(tiny.decoder, small, np.full((2, 4), 3, np.int32))
    assert np.isfinite(answer[0]).all()


def test_rows_that_fit_whole_do_not_share_out_the_layers():
    rng = np.random.default_rng(0)
    scores = [rng.random((2, 2, 12)) * scale for scale in (1.0, 0.5)]
    budget = np.array([4, 4])
    both = KVzip(6).counts(scores, np.array([[12, 3], [12, 3]]), budget)
    alone = KVzip(6).counts([score[:1] for score in scores], np.array([[12], [12]]), budget)
    assert [each[0].sum() for each in alone] == [14, 2]
    assert [each[0].sum() for each in both] == [10, 6]  # the short row needs three slots per head in both layers
    assert [each[1].tolist() for each in both] == [[3, 3], [3, 3]]
    assert KVzip(6).counts(scores, np.array([[4, 3], [4, 3]]), budget)[0].tolist() == [[4, 4], [3, 3]]


def test_layers_may_protect_and_hold_different_numbers(tiny):
    """Their tokens compete all the same, with what each has to choose from."""
    for method in ("kvzip", "kvcompose"):
        policy = mj.protect_layers(mj.policy(f"{method}(9)+int8+protect({SINKS},{RECENT})"), 1)
        small = compress(tiny, read(tiny, policy), PROMPTS, room=3, chunk=CHUNK, instruction=INSTRUCTION)
        protected = [layer.layout.sinks + layer.layout.kept for layer in small[:3]]
        assert len(set(protected)) > 1
        slots = [each.history.slots // (2 if each.shared else 1) - 3 for each in small[:3]]
        assert sum(slots) == 3 * 9 - sum(protected)


def test_a_budget_of_all_changes_no_answer(tiny, whole):
    same = compress(tiny, whole, PROMPTS, KVzip(99), room=5, chunk=CHUNK, instruction=INSTRUCTION)
    ask, question = quick_jit(mj.prefill), np.full((2, 4), 3, np.int32)
    np.testing.assert_allclose(*(ask(tiny.decoder, cache, question)[0] for cache in (same, whole)), atol=1e-4)


def test_codes_are_scored_too_and_the_repetition_needs_no_room(tiny, found):
    full = read(tiny, f"int8+protect({SINKS},{RECENT})", capacity=21)
    coded = scores(tiny, full, PROMPTS, KVzip(9), chunk=CHUNK, instruction=INSTRUCTION)
    for a, b in zip(coded[:3], found[:3], strict=True):
        assert a.shape[-1] == 21 - SINKS - RECENT
        np.testing.assert_allclose(a, b[..., : a.shape[-1]], atol=0.03)


def composite_oracle(model) -> list[list[np.ndarray]]:
    """KVCompose's scores [K, n] of each prompt's tokens in every layer with a whole history."""
    found = []
    for prompt in PROMPTS:
        size, best = len(prompt), None
        for begin in range(0, size, CHUNK):
            said = prompt[begin : begin + CHUNK]
            text = np.zeros((1, LONGEST), np.int32)
            text[0, : size + len(said)] = [*prompt, *said]
            j, rows, new = np.arange(LONGEST), slice(size, size + len(said)), []
            for (q, k), rope in zip(queries_and_keys(model.decoder, text), model.config.ropes[:3], strict=False):
                q, k = (numpy_rope(np.asarray(x[0], np.float64).swapaxes(0, 1), j, rope and rope.theta) for x in (q, k))
                logits = q.reshape(k.shape[0], -1, *q.shape[1:])[:, :, rows] @ k[:, None].swapaxes(-1, -2)
                new.append(numpy_softmax(logits / np.sqrt(k.shape[-1]), j <= j[rows, None]).max(2)[..., :size])
            best = new if best is None else [np.maximum(a, b) for a, b in zip(best, new, strict=True)]
        own = [each.mean(1) for each in best]
        found.append([each + each.mean(0) for each in own])
    return found


def test_composite_tokens_share_the_budget_out(tiny, whole):
    """Every layer is rectangular, the counts sum to the budget, the first layer has most, heads keep their own best."""
    budget, method = 9, KVCompose(9)
    given = scores(tiny, whole, PROMPTS, method, chunk=CHUNK)
    expected = composite_oracle(tiny)
    entered = [len(prompt) - SINKS - RECENT for prompt in PROMPTS]
    for layer in range(3):
        for row, count in enumerate(entered):
            mine = expected[row][layer][:, SINKS : SINKS + count]
            np.testing.assert_allclose(given[layer][row, :, :count], mine, rtol=1e-3, atol=1e-6)

    composite = np.zeros((3, max(entered)))
    for layer in range(3):
        for row, count in enumerate(entered):
            mine = np.sort(expected[row][layer][:, SINKS : SINKS + count], axis=1)[:, ::-1].mean(0)
            composite[layer, :count] += mine / len(PROMPTS)
    composite[0] = composite.max(0)
    best = np.sort(composite, axis=None)[::-1][3 * (budget - SINKS - RECENT) - 1]
    counts = (composite >= best).sum(1)
    small = compress(tiny, whole, PROMPTS, method, chunk=CHUNK)
    assert [cache.history.slots for cache in small[:3]] == counts.tolist()
    assert counts.sum() == 3 * (budget - SINKS - RECENT)
    assert counts[0] == counts.max()
    for layer, count in enumerate(counts):
        for head in range(2):
            order = np.argsort(-np.asarray(given[layer][0, head, : entered[0]]), kind="stable")[:count]
            assert small[layer].history.pos[0, head].tolist() == sorted((order + SINKS).tolist())


def test_no_layer_goes_empty():
    assert composite_counts(np.array([[9.0, 8.0, 7.0], [0.3, 0.2, 0.1]]), 3) == [3, 1]


@pytest.mark.parametrize("text", slow_but(["kvzip(9)+massfold"], ["kvzip(9)", "kvcompose(9)", "kvzip(9)+massfold"]))
def test_a_policy_is_read_whole_and_compressed_between_prompt_and_answer(tiny, text, monkeypatch):
    """``generate`` gives what reading, compressing and decoding by hand give, and reports the bytes that are left."""
    monkeypatch.setattr(KVzip, "instruction", "")
    text += f"+int8+protect({SINKS},{RECENT})"
    assert str(mj.policy(text)) == text
    answer = mj.generate(tiny, PROMPTS, policy=text, max_new_tokens=4, cache_dtype="float32")
    small = mj.compress(tiny, read(tiny, text, capacity=25), PROMPTS, room=4)
    assert answer[0].cache == mj.nbytes(small)
    assert answer[0].cache.device < mj.nbytes(read(tiny, text, 25)).device
    greedy, step = [], quick_jit(mj.decode_step)
    tokens = np.zeros((2, 21), np.int32)
    for row, prompt in zip(tokens, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    whole = tiny.init_cache(mj.policy(text), 2, 25, "float32")
    logits, _ = quick_jit(mj.prefill)(tiny.decoder, whole, tokens, jnp.asarray([21, 12], jnp.int32))
    for _ in range(4):
        greedy.append(jnp.argmax(logits, axis=-1).astype(jnp.int32))
        logits, small = step(tiny.decoder, small, greedy[-1])
    stopped = [each.finish_reason == "stop" for each in answer]
    for row, each in enumerate(answer):
        mine = [int(token[row]) for token in greedy]
        assert list(each.tokens) == mine[: len(each.tokens)]
        assert (stopped[row] or len(each.tokens) == 4)


@pytest.mark.parametrize("method", [KVCompose, KVzip])
def test_bytes_are_a_limit(tiny, whole, method):
    """The largest budget within it: another token per head would go beyond."""
    options = {"room": 2, "chunk": CHUNK, "instruction": INSTRUCTION}
    by_count = [mj.nbytes(compress(tiny, whole, PROMPTS, method(n), **options)).device for n in (9, 10)]
    limit = sum(by_count) // 2
    small = compress(tiny, whole, PROMPTS, method(bytes=limit), **options)
    assert mj.nbytes(small).device == by_count[0] <= limit < by_count[1]
    with pytest.raises(ValueError, match="leaves none to choose"):
        compress(tiny, whole, PROMPTS, method(bytes=mj.nbytes(small).device // 2), **options)


@pytest.mark.parametrize("method", slow_but(["kvcompose"], ["kvzip", "kvcompose"]))
def test_bytes_are_a_limit_where_layers_differ_in_codec(tiny, method):
    """Slots that go to a layer whose slots are dear count as much as they cost."""
    plain, coded = (mj.policy(f"{method}(9){codec}+protect({SINKS},{RECENT})") for codec in ("", "+int4"))
    policy = mj.per_layer(coded, {0: plain})
    cache = read(tiny, policy)
    options = {"room": 2, "chunk": CHUNK, "instruction": INSTRUCTION}
    kind = {"kvzip": KVzip, "kvcompose": KVCompose}[method]
    sizes = [mj.nbytes(compress(tiny, cache, PROMPTS, kind(n), **options)).device for n in (8, 12)]
    for limit in range(sizes[0], sizes[1], (sizes[1] - sizes[0]) // 5):
        assert mj.nbytes(compress(tiny, cache, PROMPTS, kind(bytes=limit), **options)).device <= limit


@pytest.mark.parametrize("fold", slow_but([""], ["", "+massfold"]))
def test_a_policy_with_a_limit_in_bytes_reads_the_prompt_whole(tiny, fold):
    """Unlike an evictor's budget, the limit is spent by ``compress``, not when the cache is made."""
    rest = f"{fold}+int8+protect({SINKS},{RECENT})"
    by_count = mj.compress(tiny, read(tiny, f"kvcompose(10){rest}"), PROMPTS, room=2)
    limit = mj.nbytes(by_count).device
    cache = read(tiny, f"kvcompose(bytes={limit}){rest}")
    assert mj.nbytes(cache) == mj.nbytes(read(tiny, f"kvcompose(10){rest}"))
    assert mj.nbytes(mj.compress(tiny, cache, PROMPTS, room=2)) == mj.nbytes(by_count)


def test_what_does_not_go_is_refused(tiny, whole):
    for text, message in (("kvzip(256)+kivi(2)", "tiles of"), ("kvcompose(256)+host(64)", "host tier cannot move")):
        with pytest.raises(ValueError, match=message):
            mj.policy(text)
    with pytest.raises(ValueError, match="a budget of 64 tokens leaves none"):
        tiny.init_cache(mj.policy("kvzip(64)"), 1, 512)
    with pytest.raises(ValueError, match="compress needs a method"):
        compress(tiny, whole, PROMPTS)
    with pytest.raises(ValueError, match="repeats what a cache holds"):
        scores(tiny, whole, [PROMPTS[0], [1]], KVzip(9), instruction=INSTRUCTION)
    with pytest.raises(ValueError, match="no tokenizer"):
        scores(tiny, whole, PROMPTS, KVzip(9))
    with pytest.raises(ValueError, match="no layer with a whole history"):
        scores(tiny, read(tiny, "h2o(12)+protect(2,3)"), PROMPTS, KVzip(9), instruction=INSTRUCTION)
    with pytest.raises(ValueError, match="leaves none to choose besides the 5"):
        compress(tiny, whole, PROMPTS, KVzip(5), chunk=CHUNK, instruction=INSTRUCTION)
