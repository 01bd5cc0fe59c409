"""Every evictor with every codec and every kind of window: it works, or it is refused where it is said, with a reason."""

import dataclasses
import functools
import inspect

import jax
import numpy as np
import pytest
from cache_helpers import BATCH, DIM, GROUPS, HEADS, SPEC, plain, qkv, quick_jit, slow_but

import memjax as mj
from memjax.cache.layer import commit
from memjax.cache.parse import PARTS
from memjax.evict import Streaming

BUDGET = 20
EVICTORS = ("streaming(2,18)", "h2o(20)", "tova(20)", "snapkv(20,window=4)", "pyramidkv(20)", "knorm(20)", "keydiff(20)")
EVICTORS += ("dropkv(20,window=4)", "expected_attention(20)", "adakv(20,window=4)")
CODECS = ("dense", "int8", "int4(rotate=true)", "int2(rotate=true)", "fp8", "nf4", "nvfp4", "turboquant(3,2)")
CODECS += ("kivi(2,8)", "kvarn(4,2,8)", "zipcache(4,2,16,8,0.5)", "progressive(page=8,share=0.0)", "gear(int4,2)", "auto")
WINDOWS = {"none": "protect(0,0)", "recent": "protect(2,6)"}
# Codecs that a budget cannot go with, and why.
NEIGHBOURS = dict.fromkeys(("kivi", "kvarn", "zipcache"), "codes tiles of") | {"progressive": "reads pages of"}
DUO = "duo(sinks=2,window=18,heads=10)"  # two caches in a layer: one streams, the other keeps everything
NOT_CODECS = {"host", "protect", "kernels", "dense", "massfold"}
SELECTORS = {"quest", "kvzip", "kvcompose"}  # which free nothing while a text is read, and have tests of their own
SPEC = dataclasses.replace(SPEC, q_heads=HEADS * GROUPS)


def name(text: str) -> str:
    return text.partition("(")[0]


def chained(*texts: str):
    """Chained part by part, as a user does it in Python."""
    return mj.chain(*map(mj.policy, texts))


def impossible(evictor: str, codec: str) -> str | None:
    """Why a budget cannot go with a codec: the reason that has to be named."""
    return None if name(evictor) == "streaming" else NEIGHBOURS.get(name(codec))


def test_the_table_names_every_part():
    """A new evictor or codec has to take a row here."""
    evictors = {each for each, build in PARTS.items() if "budget" in inspect.signature(build).parameters}
    evictors |= {"streaming", name(DUO)}
    assert {name(each) for each in (*EVICTORS, DUO)} | SELECTORS == evictors
    assert {name(each) for each in CODECS} - {"dense"} == set(PARTS) - evictors - NOT_CODECS


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("evictor", EVICTORS)
def test_every_chain_is_made_or_refused(evictor, window, sensitivity_file):
    for codec in CODECS:
        codec = f"auto(bits=10,file={sensitivity_file})" if codec == "auto" else codec
        reason = impossible(evictor, codec)
        if (name(evictor), name(codec)) == ("adakv", "gear"):  # what a layer's heads share is known with its spec
            with pytest.raises(ValueError, match="cannot be joined with gear"):
                chained(evictor, codec, WINDOWS[window]).init(SPEC)
            continue
        if reason is None:
            _check_made(chained(evictor, codec, WINDOWS[window]))
            continue
        with pytest.raises(ValueError, match=f"{name(codec)}.* {reason} .*{name(evictor)}"):
            chained(evictor, codec)
        with pytest.raises(ValueError, match=reason):
            chained(WINDOWS[window], codec, evictor)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("window", WINDOWS)
def test_heads_of_two_kinds_go_with_every_codec(codec, window, sensitivity_file):
    codec = f"auto(bits=10,file={sensitivity_file})" if codec == "auto" else codec
    policy, specs = chained(DUO, codec, WINDOWS[window]), [SPEC] * 2
    assert mj.policy(str(policy)) == policy
    caches = mj.abstract(policy, specs)
    assert mj.nbytes(caches) == mj.predict_nbytes(policy, specs)
    for cache in caches:
        places, unit = [pool.layout for pool in cache.pools], max(policy.codec.tile, policy.codec.page)
        assert [place.ring for place in places] == [False, True]
        assert BUDGET <= places[1].sinks + places[1].kept + places[1].slots < BUDGET + unit


def _check_made(policy):
    """It is what it prints, its bytes are those that were predicted, and its slots those of the budget."""
    assert mj.policy(str(policy)) == policy
    specs = [SPEC] * 2
    caches = mj.abstract(policy, specs)
    assert mj.nbytes(caches) == mj.predict_nbytes(policy, specs)
    places = [cache.layout for cache in caches]
    kept = sum(place.sinks + place.kept + place.slots for place in places)
    unit = max(policy.codec.tile, policy.codec.page)  # a ring of tiles or pages keeps the one that is half gone
    assert BUDGET * len(specs) <= kept < (BUDGET + unit) * len(specs)
    assert unit > 1 or kept == BUDGET * len(specs)
    assert {place.judge is None for place in places} == {isinstance(policy.evictor, Streaming)}


def test_a_budget_and_the_host_tier_are_refused():
    for evictor in EVICTORS[1:]:
        with pytest.raises(ValueError, match=f"{name(evictor)} scatters tokens over slots"):
            chained(evictor, "host(8,4)")
    assert chained(EVICTORS[0], "host(8,4)").tier is not None


@pytest.mark.parametrize("evictor", EVICTORS[1:])
def test_windows_that_leave_nothing_to_choose_are_refused(evictor):
    """The capacity is known to ``init`` only; the usual windows protect 68 tokens."""
    with pytest.raises(ValueError, match="a budget of 20 tokens leaves none to choose besides the 68"):
        mj.policy(evictor).init(SPEC)


# ---- running: each evictor with a codec; with others, streaming is in the table of cache_helpers --------------------

_FREE = [codec for codec in CODECS if name(codec) not in NEIGHBOURS and codec != "auto"]
RUNS = [(evictor, _FREE[i % len(_FREE)], "none" if i % 2 else "recent") for i, evictor in enumerate(EVICTORS[1:], 1)]
RUNS += [("streaming(2,18)", "kvarn(4,2,8)", "none"), ("streaming(2,18)", "zipcache(4,2,16,8,0.5)", "recent")]


@functools.cache
def step(policy):
    """A chunk, jitted for one policy."""
    return quick_jit(lambda cache, q, k, v: mj.attend(mj.update(cache, k, v, queries=q), q))


@pytest.mark.parametrize("run", slow_but(RUNS[::4], RUNS), ids=lambda run: "+".join(map(name, run)))
def test_chains_run(run):
    """Two chunks, the second of which evicts: finite outputs, as many tokens as promised, the same pytree, the same bytes."""
    evictor, codec, window = run
    policy = plain(str(chained(evictor, codec, WINDOWS[window])))
    cache, tokens = policy.init(SPEC), qkv(5, tokens=48)
    before = jax.tree.map(lambda x: (x.shape, x.dtype), cache)
    for start in (0, 24):
        out, cache = step(policy)(cache, *(x[:, start : start + 24] for x in tokens))
        assert out.shape == (BATCH, 24, HEADS * 2, DIM)
        assert np.isfinite(np.asarray(out)).all()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), cache) == before
    assert mj.nbytes(cache) == mj.predict_nbytes(policy, SPEC)
    assert np.asarray(commit(cache).length).tolist() == [48] * BATCH
    if cache.layout.judge is not None and not cache.layout.competing:
        held = np.asarray(cache.history.pos)
        assert (held >= 0).sum(-1).tolist() == [[cache.layout.slots] * HEADS] * BATCH
        assert all(len(set(each)) == cache.layout.slots for row in held for each in row.tolist())
        assert (held < 48 - cache.layout.kept).all()
        assert (held >= cache.layout.sinks).all()
