"""Peak memory while a prompt is read, by the compiler's memory analysis: what a budget promises."""

import functools

import jax
import jax.numpy as jnp
import pytest
from cache_helpers import slow_but

import memjax as mj

HEADS, KV_HEADS, DIM, CHUNK = 8, 2, 64, 64
BUDGETED = ("streaming", "h2o", "tova", "snapkv", "pyramidkv", "adakv", "dropkv", "expected_attention", "knorm", "keydiff")


@functools.cache
def bytes_needed(text: str, capacity: int) -> tuple[int, int]:
    """Of the step that reads a chunk, the cache donated: arguments, and temporaries."""
    rope = mj.Rope(DIM)
    spec = mj.CacheSpec(1, KV_HEADS, DIM, capacity, "bfloat16", rope=rope, q_heads=HEADS)
    new = [jax.ShapeDtypeStruct((1, CHUNK, heads, DIM), jnp.bfloat16) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    step = jax.jit(lambda cache, q, k, v: mj.attend(mj.update(cache, k, v), q), donate_argnums=0)
    found = step.lower(mj.abstract(mj.policy(text), spec), *new).compile().memory_analysis()
    return found.argument_size_in_bytes, found.temp_size_in_bytes


@pytest.mark.parametrize("name", slow_but(["streaming", "h2o", "snapkv", "adakv"], BUDGETED))
def test_the_peak_of_a_prompt_falls_with_the_budget(name):
    def needed(budget: int, capacity: int) -> tuple[int, int]:
        return bytes_needed(f"{name}({f'4,{budget - 4}' if name == 'streaming' else budget})", capacity)

    short, long = (sum(bytes_needed("dense", capacity)) for capacity in (8192, 32_768))
    least, more = needed(1024, 32_768), needed(4096, 32_768)
    assert sum(least) < sum(more)
    assert needed(1024, 8192) == least  # the text's length costs nothing
    if name == "adakv":  # its queries score the slots of all heads, a budget of a quarter is no less than a dense cache
        assert sum(least) < long
    else:
        assert sum(least) < short
        assert sum(more) < long
