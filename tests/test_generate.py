"""Generation: batches, chunks, samplers, stopping, one compile; on a small random model and on the real one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import slow_but

import memjax as mj
from memjax.generate.loop import decode_block, prefill_chunk

PROMPTS = [list(range(1, 30)), [7, 3, 5], list(range(40, 1, -1))]
POLICIES = ["dense", "int8+protect(2,8)", "int4(rotate=true)+protect(2,8)", "streaming(2,20)+int8", "host(8,4)"]


def tokens_of(generations):
    return [generation.tokens for generation in generations]


def recomputed(model, prompt, new):
    """Greedy decoding that runs the whole sequence through the model, without a cache, for every token."""
    ids = list(prompt)
    forward = jax.jit(lambda decoder, tokens: decoder.logits(decoder(tokens)[0]))
    for _ in range(new):
        padded = jnp.asarray([ids + [0] * (len(prompt) + new - len(ids))], jnp.int32)
        ids.append(int(jnp.argmax(forward(model.decoder, padded)[0, len(ids) - 1])))
        if ids[-1] in model.eos_ids:
            return tuple(ids[len(prompt) : -1])
    return tuple(ids[len(prompt) :])


def test_dense_generation_equals_recomputation(tiny):
    for prompt, found in zip(PROMPTS, mj.generate(tiny, PROMPTS, max_new_tokens=20), strict=True):
        assert found.tokens == recomputed(tiny, prompt, 20)
        assert found.prompt_tokens == len(prompt)


BATCHES = [(policy, 0.0) for policy in POLICIES] + [("dense", 0.8)]


@pytest.mark.parametrize("case", slow_but([(POLICIES[1], 0.0), ("dense", 0.8)], BATCHES), ids=str)
def test_a_batch_gives_what_each_prompt_gives_alone(tiny, case):
    policy, temperature = case
    sampler = mj.Sampler(temperature=temperature, top_k=20)
    options = {"policy": policy, "max_new_tokens": 12, "sampler": sampler, "capacity": 64, "chunk": 8}
    together = mj.generate(tiny, PROMPTS, **options)
    alone = mj.generate(tiny, PROMPTS[0], **options)
    assert together[0].tokens == alone[0].tokens
    swapped = mj.generate(tiny, [PROMPTS[0], PROMPTS[2], PROMPTS[1]], **options)
    assert swapped[0].tokens == together[0].tokens
    if temperature == 0.0:  # otherwise rows 1 and 2 draw from each other's keys
        assert tokens_of(swapped)[1:] == [together[2].tokens, together[1].tokens]


def test_any_chunking_of_the_prompt_gives_the_same_text(tiny):
    found = {tokens_of(mj.generate(tiny, PROMPTS, max_new_tokens=10, chunk=chunk))[0] for chunk in (3, 16, 64)}
    assert len(found) == 1


def test_the_same_seed_gives_the_same_text_and_rows_differ(tiny):
    sampler = mj.Sampler(temperature=1.5)
    options = {"sampler": sampler, "max_new_tokens": 16}
    first = tokens_of(mj.generate(tiny, [PROMPTS[0]] * 2, seed=3, **options))
    assert first == tokens_of(mj.generate(tiny, [PROMPTS[0]] * 2, seed=3, **options))
    assert first != tokens_of(mj.generate(tiny, [PROMPTS[0]] * 2, seed=4, **options))
    assert first[0] != first[1]


def test_one_compile_for_a_whole_generation(tiny):
    decode_block.clear_cache()
    prefill_chunk.clear_cache()
    options = {"policy": "int8+protect(2,8)", "capacity": 128, "chunk": 16, "block": 4}
    mj.generate(tiny, list(range(1, 50)), max_new_tokens=40, **options)
    assert (prefill_chunk._cache_size(), decode_block._cache_size()) == (1, 1)
    mj.generate(tiny, list(range(1, 20)), max_new_tokens=25, **options)
    assert (prefill_chunk._cache_size(), decode_block._cache_size()) == (1, 1)


def test_the_cache_is_donated(tiny):
    cache = tiny.init_cache(mj.policy("int8"), 1, 512)
    logits = jnp.zeros((1, tiny.config.vocab))
    lowered = prefill_chunk.lower(tiny.decoder, cache, logits, jnp.zeros((1, 8), jnp.int32), jnp.asarray([8]))
    aliased = lowered.compile().memory_analysis().alias_size_in_bytes
    assert aliased >= mj.nbytes(cache).device


def test_stop_ids_end_a_row_and_only_that_row(tiny):
    free = mj.generate(dataclasses.replace(tiny, eos_ids=()), PROMPTS, max_new_tokens=20)
    target = free[0].tokens[4]
    stopped = mj.generate(dataclasses.replace(tiny, eos_ids=(target,)), PROMPTS, max_new_tokens=20)
    assert stopped[0].tokens == free[0].tokens[: free[0].tokens.index(target)]
    assert stopped[0].finish_reason == "stop"
    for before, after in zip(free, stopped, strict=True):
        assert after.tokens == before.tokens[: len(after.tokens)]
        assert (after.finish_reason == "length") == (target not in before.tokens)


def test_repetition_penalty_changes_what_repeats(tiny):
    plain = mj.generate(tiny, PROMPTS[0], max_new_tokens=24)[0].tokens
    punished = mj.generate(tiny, PROMPTS[0], max_new_tokens=24, sampler=mj.Sampler(repetition_penalty=1e6))[0].tokens
    assert len(set(plain)) < len(plain)
    assert len(set(punished) | set(PROMPTS[0])) == len(punished) + len(PROMPTS[0])


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "at least one prompt"),
        ([[]], {}, "prompt 0 is empty"),
        ([[1, 61]], {}, r"outside the vocabulary 0\.\.60"),
        ([[1, 2, 3]], {"capacity": 10, "max_new_tokens": 8}, "need a capacity of 11, got 10"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ([[1]], {"policy": "int5"}, "unknown policy 'int5'"),
        ([[1]], {"policy": "int4+int8"}, "both decide quantization"),
        ([[1]], {"cache_dtype": "int32"}, "dtype 'int32' is not one of"),
        (["text"], {}, "no tokenizer"),
    ],
)
def test_bad_input_is_refused_before_any_compute(tiny, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        mj.generate(tiny, prompts, **options)


def test_nan_is_an_error_and_not_a_token(tiny):
    broken = jax.tree.map(lambda x: x * jnp.nan, tiny.decoder)
    with pytest.raises(FloatingPointError, match="NaN for prompt 0"):
        mj.generate(dataclasses.replace(tiny, decoder=broken), [PROMPTS[0]], max_new_tokens=4)


@pytest.mark.parametrize("policy", slow_but(["dense"], ["dense", "int4(rotate=true)+protect(4,8)"]))
def test_the_real_model_knows_japan(smollm2, policy):
    chat = mj.render_chat(smollm2.tokenizer, [{"role": "user", "content": "What is the capital of Japan?"}])
    ids = smollm2.tokenizer.encode(chat, add_bos=False)
    found = mj.generate(smollm2, ids, policy=policy, max_new_tokens=12)[0]
    assert "Tokyo" in found.text
    assert found.finish_reason == "stop"


def test_text_streams_and_stop_strings_end_it(smollm2):
    pieces = []
    running = mj.stream(smollm2, ["The capital of Japan is"], max_new_tokens=16, stop=["Alps"], block=2)
    while True:
        try:
            pieces += next(running)
        except StopIteration as finished:
            result = finished.value[0]
            break
    assert "".join(pieces) == result.text
    assert result.text.startswith(" Tokyo")
    assert "Alps" not in result.text
    assert result.finish_reason == "stop"


def test_a_research_loop_of_ones_own(tiny):
    """The public steps in a lax.scan give what generate gives."""
    prompt = jnp.asarray([PROMPTS[0]], jnp.int32)
    cache = tiny.init_cache(mj.policy("int8+protect(2,8)"), batch=1, capacity=64)
    logits, cache = jax.jit(mj.prefill)(tiny.decoder, cache, prompt)

    def step(carry, _):
        logits, cache = carry
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return mj.decode_step(tiny.decoder, cache, token), token

    _, tokens = jax.lax.scan(step, (logits, cache), length=10)
    expected = mj.generate(
        dataclasses.replace(tiny, eos_ids=()), PROMPTS[0], policy="int8+protect(2,8)", max_new_tokens=10, capacity=64
    )
    np.testing.assert_array_equal(tokens[:, 0], expected[0].tokens)
