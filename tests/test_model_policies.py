"""Codecs and evictors on whole models without plain attention in every layer: latent attention, Mamba-2, sliding windows.

Small random decoders read a ragged batch in chunks and then single tokens, under jit, as a generation loop does. That the
layers are right by themselves is for test_latent.py, test_mamba.py and test_models.py; here policies meet models.
"""

import collections
import dataclasses
import functools
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import quick_jit, relative_error, slow_but
from flax import nnx

import memjax as mj
from memjax.cache.recurrent import RecurrentCache
from memjax.generate import loop
from memjax.models.config import AttentionConfig, Block, LatentConfig, MambaConfig, MlpConfig, ModelConfig
from memjax.models.decoder import Decoder
from memjax.models.load import LanguageModel

VOCAB, WIDTH, CAPACITY, CHUNK, NEW = 61, 48, 80, 32, 8
LENGTHS = (64, 51)  # of the two prompts
BUDGET = 24
MLP = MlpConfig(width=40)
LATENT = LatentConfig(q_heads=4, q_rank=None, kv_rank=32, nope_dim=16, rope_dim=16, value_dim=16, rope=mj.Rope(16, 100.0))
GROUPED = AttentionConfig(q_heads=4, kv_heads=2, head_dim=32, rope=None)
MAMBA = MambaConfig(heads=4, head_dim=8, state_dim=10, chunk=16)
WIDE = dataclasses.replace(GROUPED, rope=mj.Rope(32, 1000.0), qk_norm=True)
MIXERS = {
    "latent": (LATENT, LATENT),
    "hybrid": (MAMBA, GROUPED, MAMBA),
    "local": (dataclasses.replace(WIDE, window=12), WIDE),
}
BOUNDS = {  # of codecs: the largest relative error of logits that is allowed
    "int8+protect(2,4)": 0.02,
    "fp8+protect(2,4)": 0.1,
    "int4(rotate=true)+protect(2,4)": 0.3,
    "turboquant(4,4)+protect(2,4)": 0.3,
    "kivi(4,8)+protect(2,4)": 0.3,
    "turboquant(2,2)+protect(2,4)": 0.8,
}
EVICTORS = ("streaming(2,22)", "h2o(24)+protect(2,8)", "snapkv(24,window=4)+protect(2,4)", "tova(24)+protect(2,4)")
EVICTORS += ("keydiff(24)+protect(2,4)", "adakv(24,window=4)+protect(2,4)")
CHAINS = ("snapkv(24,window=4)+turboquant(4,4)+protect(2,4)", "h2o(24)+int4(rotate=true)+protect(2,4)")
TIERS = ("host(16,8)", "int8+protect(2,4)+host(16,8)")
BOUNDED = tuple(BOUNDS)
POLICIES = (*BOUNDED, *EVICTORS, *CHAINS, *TIERS)
FAST = [("latent", CHAINS[0]), ("hybrid", CHAINS[1])]
CASES = slow_but(FAST, [(name, text) for name in ("latent", "hybrid") for text in POLICIES])
CASES += slow_but([], [("local", text) for text in ("turboquant(4,4)+protect(2,4)", EVICTORS[0], *CHAINS, TIERS[1])])


@functools.cache
def model(name: str) -> LanguageModel:
    """Random weights; those of queries and keys are large enough that attention is not the same everywhere."""
    config = ModelConfig(
        family="random",
        vocab=VOCAB,
        width=WIDTH,
        blocks=tuple(Block(mixer, MLP) for mixer in MIXERS[name]),
        norm_eps=1e-5,
        max_position=256,
    )
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    state = quick_jit(lambda: nnx.state(Decoder(config, rngs=nnx.Rngs(0))))()
    for path, param in nnx.to_flat_state(state):
        if path[-2] in ("q", "q_norm"):
            param.set_value(3.0 * param.get_value())
    return LanguageModel(name, nnx.merge(graphdef, state), None, eos_ids=())


@functools.cache
def tokens() -> np.ndarray:
    """Two texts [2, T]: prompts, of which the second is shorter, and what follows."""
    return np.random.default_rng(3).integers(0, VOCAB, (len(LENGTHS), max(LENGTHS) + NEW)).astype(np.int32)


@dataclass(frozen=True)
class Read:
    """Logits [T, V] of every row's tokens, the cache behind them, and traces by the number of tokens of a step."""

    logits: list[np.ndarray]
    cache: tuple
    traces: dict[int, int]


@functools.cache
def read(name: str, text: str, rows: tuple[int, ...] = (0, 1)) -> Read:
    """The given rows as a batch: their prompts in chunks, then token by token."""
    decoder, traces, counted = model(name).decoder, collections.Counter(), np.asarray([LENGTHS[row] for row in rows])

    @quick_jit
    def step(decoder, cache, ids, counts):
        traces[ids.shape[1]] += 1
        hidden, cache = decoder(ids, cache, counts)
        return decoder.logits(hidden), cache

    cache = mj.policy(text).init(decoder.cache_specs(len(rows), CAPACITY))
    logits, texts = [[] for _ in rows], tokens()[list(rows)]

    def take(cache, at, size, counts):
        ids = np.full((len(rows), size), VOCAB - 1, np.int32)
        for i, count in enumerate(counts):
            ids[i, :count] = texts[i, at[i] : at[i] + count]
        found, cache = step(decoder, cache, ids, jnp.asarray(counts, jnp.int32))
        for i, count in enumerate(counts):
            logits[i].append(np.asarray(found[i, :count]))
        return cache

    done = np.zeros_like(counted)
    for start in range(0, max(LENGTHS), CHUNK):
        counts = np.clip(counted - start, 0, CHUNK)
        cache, done = take(cache, done, CHUNK, counts), done + counts
    for _ in range(NEW):
        cache, done = take(cache, done, 1, np.ones_like(done)), done + 1
    return Read([np.concatenate(each) for each in logits], cache, dict(traces))


def error(name: str, text: str) -> float:
    """Relative error of all logits to those of a dense cache."""
    found, dense = (np.concatenate(read(name, each).logits) for each in (text, "dense"))
    return relative_error(found, dense)


# ---- every policy on every kind of model -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_policy_serves_a_model(case):
    """One program for all chunks and one for all decode steps, and the bytes that were predicted from shapes alone."""
    name, text = case
    found, policy = read(name, text), mj.policy(text)
    specs = model(name).decoder.cache_specs(len(LENGTHS), CAPACITY)
    assert found.traces == {CHUNK: 1, 1: 1}
    assert all(np.isfinite(each).all() for each in found.logits)
    assert [layer.length.tolist() for layer in found.cache] == [[length + NEW for length in LENGTHS]] * len(specs)
    held = mj.nbytes(found.cache)
    assert held == mj.predict_nbytes(policy, specs) == mj.nbytes(mj.abstract(policy, specs))
    dense = mj.predict_nbytes(mj.dense(), specs)
    assert held.state == dense.state
    assert (held.total if policy.tier is None else held.device) < dense.total
    assert error(name, text) < 1e-6 if text == TIERS[0] else 1e-4 < error(name, text) < BOUNDS.get(text, 1.0)


ALONE = [(name, BOUNDED[3]) for name in MIXERS] + [("latent", text) for text in (BOUNDED[4], EVICTORS[0], TIERS[1])]
ALONE += [("hybrid", EVICTORS[1]), ("local", CHAINS[0])]


@pytest.mark.parametrize("case", slow_but(FAST, FAST + ALONE), ids="-".join)
def test_a_row_of_a_ragged_batch_is_itself_alone(case):
    """The shorter row, which has padding in a chunk."""
    name, text = case
    together, alone = read(name, text), read(name, text, (1,))
    assert relative_error(together.logits[1], alone.logits[0]) < 1e-5


@pytest.mark.parametrize("name", slow_but([], ["latent", "hybrid"]))
def test_codecs_lose_by_their_bits(name):
    eight, eight_floating, *four, two = (error(name, text) for text in BOUNDS)
    assert 2 * eight < eight_floating < min(four)
    assert max(four) < two / 2


PAIRS = [("int8", "int8(balance=off)"), ("turboquant(4,4)", "turboquant(4,4,balance=off)")]


@pytest.mark.parametrize("codecs", PAIRS, ids="-".join)
def test_small_values_survive_beside_large_keys(codecs):
    """A latent is keys and values at once. Queries that look at the large channels would leave these the finer steps."""
    spec = mj.CacheSpec(1, 1, 48, 64, "float32", rope=mj.Rope(16, start=32), scale=1e-4, latent_dim=32)
    draw, large = np.random.default_rng(4).standard_normal, np.where(np.arange(48) < 2, 40.0, 1.0)
    stream, q = ((draw((1, 48, heads, 48)) * large).astype(np.float32) for heads in (1, 4))

    @quick_jit
    def step(cache, stream, q):
        return mj.attend(mj.update(cache, stream, queries=q), q)

    def small_values(text):
        cache = mj.policy(f"{text}+protect(0,0)").init(spec)
        _, cache = step(cache, stream[:, :24], q[:, :24])
        return step(cache, stream[:, 24:], q[:, 24:])[0][..., 2:]

    exact, found, plain = map(small_values, ("dense", *codecs))
    assert relative_error(found, exact) < relative_error(plain, exact) / 4


# ---- what policies leave alone ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", slow_but([CHAINS[1]], POLICIES))
def test_a_recurrent_state_is_counted_and_left_alone(text):
    """Bitwise in front of the first layer that a policy reaches; behind it, its input is another one."""
    found, dense = read("hybrid", text).cache, read("hybrid", "dense").cache
    assert [isinstance(layer, RecurrentCache) for layer in found] == [True, False, True]
    for name in ("conv", "state"):
        np.testing.assert_array_equal(getattr(found[0], name), getattr(dense[0], name))
        if text != TIERS[0]:
            assert np.abs(np.asarray(getattr(found[2], name)) - np.asarray(getattr(dense[2], name))).max() > 0
    numbers = (MAMBA.conv_width - 1) * MAMBA.conv_dim + MAMBA.heads * MAMBA.head_dim * MAMBA.state_dim
    assert mj.nbytes(found).state == 2 * len(LENGTHS) * 4 * numbers


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_tokens_of_the_first_chunk_read_each_other_exactly(case):
    """Nothing happens to them before; only ``streaming`` has its window inside of a chunk, too."""
    name, text = case
    exact = BUDGET if text.startswith("streaming") else CHUNK
    for found, dense in zip(read(name, text).logits, read(name, "dense").logits, strict=True):
        np.testing.assert_allclose(found[:exact], dense[:exact], atol=1e-5)


WHOLE = ("streaming(2,90)", "h2o(80)", "snapkv(80,window=4)", "tova(fraction=1.0)", "keydiff(80)")


@pytest.mark.parametrize(
    "case", slow_but([], [(name, text) for name in ("latent", "hybrid") for text in WHOLE]), ids="-".join
)
def test_a_budget_that_holds_everything_changes_nothing(case):
    """To the bit what the same windows give without an evictor, but for latents that ``streaming`` reads in another form."""
    name, text = case
    windows = "protect(2,4)"
    found, dense = read(name, f"{text}+{windows}"), read(name, windows)
    for mine, theirs in zip(found.logits, dense.logits, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-5 if (name, text) == ("latent", WHOLE[0]) else 0)
    assert error(name, windows) < 1e-5


# ---- what is refused, before anything is computed --------------------------------------------------------------------

REFUSED = {
    ("latent", "kvzip(24)"): "kvzip reads a prompt again through keys and values, and a latent stream is neither",
    ("latent", "kvcompose(24)"): "kvcompose reads a prompt again through keys and values, and a latent stream is neither",
    ("latent", "duo(heads=1)"): "duo tells a layer's kv heads apart, but a latent stream is one for all",
    ("latent", "expected_attention(24)+protect(2,4)"): "expected_attention needs whole keys, but the rotary part of a latent",
    ("latent", "h2o(24)+massfold+protect(2,4)"): "massfold changes values and leaves keys, but a latent stream has one vector",
    ("latent", "gear(int4,2)"): "gear stores two streams, of which a latent stream's rotary part is one already",
    ("hybrid", "kvzip(24)"): "kvzip reads a prompt again through keys and values, and a recurrent layer has none",
    ("hybrid", "kvcompose(24)"): "kvcompose reads a prompt again through keys and values, and a recurrent layer has none",
    ("local", "snapkv(4)"): "a budget of 4 tokens leaves none to choose besides the 68 that are protected",
}


@pytest.mark.parametrize(("name", "text"), REFUSED, ids=str)
def test_what_cannot_serve_a_model_is_refused_with_the_reason(name, text, monkeypatch):
    def computed(*arguments):
        raise AssertionError("the prompt was read first")

    monkeypatch.setattr(loop, "prefill_chunk", computed)
    with pytest.raises(ValueError, match=REFUSED[name, text]):
        mj.generate(model(name), tokens()[0, :40].tolist(), policy=text, max_new_tokens=NEW)


@pytest.mark.parametrize("name", slow_but([], MIXERS))
def test_generation_under_a_chain(name):
    """A whole generation of a ragged batch is what each prompt gives alone, in a cache of the predicted bytes."""
    prompts = [row[:length].tolist() for row, length in zip(tokens(), LENGTHS, strict=True)]
    options = {"policy": CHAINS[0], "max_new_tokens": NEW, "chunk": CHUNK, "capacity": CAPACITY}
    together = mj.generate(model(name), prompts, **options)
    alone = [mj.generate(model(name), prompt, **options)[0] for prompt in prompts]
    assert [each.tokens for each in together] == [each.tokens for each in alone]
    assert len({each.tokens for each in together}) == 2
    specs = model(name).decoder.cache_specs(len(prompts), CAPACITY)
    assert together[0].cache == mj.predict_nbytes(mj.policy(CHAINS[0]), specs)
