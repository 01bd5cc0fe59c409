"""Training the twins: equal parameters, equal data, gradients everywhere, a resume that leaves no trace."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import quick_jit
from flax import nnx
from process_helpers import run

import memjax as mj
from memjax.cache.ledger import dense_nbytes_per_token
from memjax.models.decoder import Decoder, cache_specs
from memjax.train import loop, twins
from memjax.train.checkpoints import RunFolder
from memjax.train.data import (
    byte_tokenizer,
    check_corpus,
    make_corpus,
    packaged_texts,
    read_texts,
    training_batch,
    unigram_entropy,
    validation_batches,
)
from memjax.train.loop import Plan, TrainState, mean_loss, train, validation_loss
from memjax.train.report import SEQUENCE, cache_bytes, curve_json, machine, result_row, twins_markdown, twins_plot
from memjax.train.twins import MIXERS, SIZES, Size, parameters, twin_config

TINY = Size(
    width=32,
    layers=4,
    heads=4,
    head_dim=8,
    kv_heads=2,
    mlp_width=64,
    mamba_head_dim=16,
    state_dim=8,
    context=32,
    batch=8,
    steps=60,
    rate=2e-2,
)
ONE_LAYER, TWO_LAYERS, THREE_LAYERS = (dataclasses.replace(TINY, layers=layers) for layers in (1, 2, 3))
SHALLOW = dict.fromkeys(MIXERS, ONE_LAYER) | {"gqa": TWO_LAYERS, "hybrid": THREE_LAYERS}  # its third is attention
PLAN = Plan(steps=TINY.steps, batch=TINY.batch, context=TINY.context, rate=TINY.rate, every=20)


@pytest.fixture(scope="module")
def corpus():
    return make_corpus(packaged_texts())


@pytest.fixture(autouse=True, scope="module")
def quick_steps():
    """The jitted functions of the loop, compiled without LLVM's optimisations: minutes for a few dozen tiny steps, else."""
    with pytest.MonkeyPatch.context() as patch:
        step = quick_jit(loop.train_step.__wrapped__, static_argnums=0, donate_argnums=1)
        patch.setattr(loop, "train_step", step)
        patch.setattr(loop, "init_state", quick_jit(loop.init_state.__wrapped__, static_argnums=(0, 1)))
        patch.setattr(loop, "_row_losses", quick_jit(loop._row_losses.__wrapped__))
        yield


slope = quick_jit(jax.value_and_grad(mean_loss))
forward = quick_jit(lambda decoder, tokens, cache: decoder(tokens, cache))


@functools.cache
def decoder_of(mixer: str) -> Decoder:
    """Random weights of all layer kinds of a twin."""
    return quick_jit(lambda: Decoder(twin_config(mixer, SHALLOW[mixer]), rngs=nnx.Rngs(0)))()


@pytest.fixture(scope="module")
def whole(corpus):
    """A run without interruption."""
    return train(twin_config("gqa", TWO_LAYERS), PLAN, corpus)


@pytest.mark.parametrize("size", [TINY, *SIZES.values()], ids=["tiny", *SIZES])
def test_twins_have_equal_parameters(size):
    counts = {mixer: parameters(twin_config(mixer, size)) for mixer in MIXERS}
    assert all(abs(count / counts["mha"] - 1) < twins.CLOSENESS for count in counts.values())
    assert len({twin_config(mixer, size).blocks for mixer in MIXERS}) == len(MIXERS)


def test_parameters_are_those_of_a_decoder():
    leaves = jax.tree.leaves(decoder_of("hybrid"))
    assert parameters(twin_config("hybrid", THREE_LAYERS)) == sum(leaf.size for leaf in leaves)


def test_the_hybrid_has_one_attention_layer_of_four():
    kinds = [type(block.mixer).__name__ for block in twin_config("hybrid", "real").blocks]
    assert kinds == 2 * ["MambaConfig", "MambaConfig", "AttentionConfig", "MambaConfig"]


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_parameter_has_a_gradient(mixer, corpus):
    decoder = decoder_of(mixer)
    tokens = training_batch(corpus, 0, 0, 2, TINY.context)
    _, gradient = slope(decoder, tokens)
    leaves = jax.tree_util.tree_leaves_with_path(gradient)
    assert len(leaves) == len(jax.tree.leaves(decoder))
    for path, leaf in leaves:
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
        assert np.count_nonzero(leaf) > 0.9 * leaf.size, jax.tree_util.keystr(path)


def test_a_gradient_is_the_slope_of_the_loss(corpus):
    """Central differences along the gradient, through attention's blocked softmax."""
    decoder = decoder_of("gqa")
    tokens = training_batch(corpus, 0, 0, 2, TINY.context)
    _, gradient = slope(decoder, tokens)
    squared = sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(gradient))
    step = np.float32(1e-2 / np.sqrt(squared))
    after, before = (
        float(slope(jax.tree.map(lambda x, g, sign=sign: x + sign * step * g, decoder, gradient), tokens)[0])
        for sign in (np.float32(1), np.float32(-1))
    )
    assert (after - before) / (2 * float(step) * squared) == pytest.approx(1, rel=0.01)


def test_the_loss_falls_below_the_entropy_of_single_bytes(whole, corpus):
    _, curve = whole
    entropy = unigram_entropy(corpus.validation)
    assert 3.1 < entropy < 3.3
    assert len(curve.train) == TINY.steps
    assert curve.train[0] > 5.0  # 256 bytes, as likely as each other: 5.55
    assert [step for step, _ in curve.validation] == [20, 40, 60]
    assert curve.validation[-1][1] < entropy - 0.1


def test_a_resumed_run_equals_one_without_interruption(whole, corpus, tmp_path):
    config, folder = twin_config("gqa", TWO_LAYERS), tmp_path / "run"
    train(config, PLAN, corpus, folder=RunFolder(folder, config, PLAN, corpus), until=25)
    assert RunFolder(folder, config, PLAN, corpus, resume=True).steps() == [20, 25]
    kept = RunFolder(folder, config, PLAN, corpus, resume=True)
    state, curve = train(config, PLAN, corpus, folder=kept)
    assert kept.steps() == [40, 60]
    assert int(state.step) == 60
    assert (curve.train, curve.validation) == (whole[1].train, whole[1].validation)
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), state, whole[0])
    assert len(jax.tree.leaves(same)) > 50
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"config": twin_config("mqa", TWO_LAYERS)}, "config.blocks.0.0.kv_heads is 2, this one's is 1"),
        ({"config": twin_config("mla", TWO_LAYERS)}, "config.blocks.0.0.kind is 'attention', this one's is 'latent'"),
        ({"plan": dataclasses.replace(PLAN, steps=61)}, "plan.steps is 60, this one's is 61"),
        ({"corpus": make_corpus([bytes(1000)])}, "its text is"),
        ({"resume": False}, "not empty"),
    ],
)
def test_a_folder_of_another_run_is_refused(change, named, corpus, tmp_path):
    same = {"config": twin_config("gqa", TWO_LAYERS), "plan": PLAN, "corpus": corpus}
    RunFolder(tmp_path / "run", **same)
    with pytest.raises(ValueError, match=named):
        RunFolder(tmp_path / "run", **{**same, "resume": True, **change})


def test_a_folder_of_other_things_is_refused(corpus, tmp_path):
    (tmp_path / "letter.txt").write_text("Dear reader")
    with pytest.raises(ValueError, match=r"no run of memjax train \(no run.json\)"):
        RunFolder(tmp_path, twin_config("gqa", TINY), PLAN, corpus, resume=True)
    assert [each.name for each in tmp_path.iterdir()] == ["letter.txt"]


def test_batches_depend_on_seed_and_step_alone(corpus):
    batch = training_batch(corpus, 3, 7, 4, 32)
    assert batch.shape == (4, 33)
    assert batch.dtype == np.int32
    np.testing.assert_array_equal(batch, training_batch(corpus, 3, 7, 4, 32))
    assert all((batch != training_batch(corpus, *other, 4, 32)).any() for other in ((3, 8), (4, 7)))
    text = corpus.train.tobytes()
    assert all(bytes(row.astype(np.uint8)) in text for row in batch)


def test_all_twins_see_the_same_batches(corpus, monkeypatch):
    """What the step is given, recorded for every mixer."""
    seen = {mixer: [] for mixer in MIXERS}
    plan = dataclasses.replace(PLAN, steps=4, every=4)
    monkeypatch.setattr(loop, "validation_loss", lambda decoder, batches: 0.0)
    monkeypatch.setattr(loop, "init_state", lambda config, plan: TrainState(jnp.int32(0), None, None))
    for mixer in MIXERS:

        def record(plan, state, tokens, mixer=mixer):
            seen[mixer].append(tokens.tobytes())
            return state._replace(step=state.step + 1), jnp.float32(1)

        monkeypatch.setattr(loop, "train_step", record)
        train(twin_config(mixer, TWO_LAYERS), plan, corpus)
    assert len(set(seen["mha"])) == 4
    assert all(seen[mixer] == seen["mha"] for mixer in MIXERS)


def test_validation_predicts_every_held_out_byte_once(corpus):
    batches = validation_batches(corpus, 8, 32)
    kept = np.concatenate([tokens[weights > 0] for tokens, weights in batches])
    assert all(tokens.shape == (8, 33) for tokens, _ in batches)
    assert len(kept) == (len(corpus.validation) - 1) // 32
    np.testing.assert_array_equal(kept[:, 1:].reshape(-1), corpus.validation[1 : 1 + 32 * len(kept)])
    assert len(corpus.validation) - 32 * len(kept) <= 32


def test_validation_loss_is_the_mean_over_real_rows(whole, corpus):
    decoder, batches = whole[0].decoder, validation_batches(corpus, TINY.batch, TINY.context)[-2:]
    rows = np.concatenate([np.asarray(loop._row_losses(decoder, tokens))[weights > 0] for tokens, weights in batches])
    assert 8 < len(rows) < 16
    assert validation_loss(decoder, batches) == pytest.approx(rows.mean(), rel=1e-6)


@pytest.fixture(scope="module")
def saved(whole, corpus, tmp_path_factory):
    config, folder = twin_config("gqa", TWO_LAYERS), tmp_path_factory.mktemp("saved") / "run"
    kept = RunFolder(folder, config, PLAN, corpus)
    assert kept.finish(whole[0]) == kept.finish(whole[0]) == folder / "model"
    return kept.model


def cached_and_not(decoder, tokens) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states of tokens that come one by one through a cache, and of all at once without one."""
    cache, found = mj.policy("dense").init(decoder.cache_specs(len(tokens), tokens.shape[1])), []
    for i in range(tokens.shape[1]):
        hidden, cache = forward(decoder, tokens[:, i : i + 1], cache)
        found.append(hidden)
    return np.concatenate(found, axis=1), np.asarray(forward(decoder, tokens, None)[0])


def test_the_saved_model_is_the_trained_one(saved, whole, corpus):
    model = mj.load(saved)
    assert model.config == twin_config("gqa", TWO_LAYERS)
    pairs = zip(jax.tree.leaves(model.decoder), jax.tree.leaves(whole[0].decoder), strict=True)
    assert all((a == b).all() for a, b in pairs)
    assert model.tokenizer.encode("Ahab") == list(b"Ahab")
    cached, uncached = cached_and_not(model.decoder, training_batch(corpus, 0, 0, 2, 12))
    np.testing.assert_allclose(cached, uncached, atol=2e-5)


def test_bytes_are_tokens():
    tokenizer, every = byte_tokenizer(), "".join(map(chr, range(0x800))) + "\u20ac\U0001f40b"
    assert tokenizer.vocab_size == 256
    assert tokenizer.encode(every) == list(every.encode())
    assert tokenizer.decode(list(every.encode())) == every


@pytest.mark.parametrize("mixer", MIXERS)
def test_cached_decoding_equals_the_forward_pass(mixer, corpus):
    cached, uncached = cached_and_not(decoder_of(mixer), training_batch(corpus, 0, 0, 2, 12))
    np.testing.assert_allclose(cached, uncached, atol=2e-5)
    assert uncached.shape == (2, 13, TINY.width)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2)])
def test_reported_bytes_are_those_of_the_buffers(mixer, dtype, itemsize):
    config = twin_config(mixer, TINY)
    per_token, state, total = cache_bytes(config, dtype)
    specs = cache_specs(config, 1, SEQUENCE, dtype)
    assert per_token == dense_nbytes_per_token(specs, itemsize)
    ledger = mj.nbytes(jax.eval_shape(lambda: mj.policy("dense").init(specs)))
    assert (ledger.state, ledger.total) == (state, total)
    layers = {"mha": 4 * 2 * 32, "gqa": 4 * 2 * 16, "mqa": 4 * 2 * 8, "mla": 4 * 36, "hybrid": 2 * 16}
    assert per_token == layers[mixer] * itemsize
    assert (state > 0) == (mixer == "hybrid")


def test_a_loss_that_is_not_finite_is_an_error(corpus, monkeypatch, tmp_path):
    config, step = twin_config("gqa", TWO_LAYERS), loop.train_step

    def breaks(plan, state, tokens):
        state, loss = step(plan, state, tokens)
        return state, jnp.where(state.step == 24, jnp.nan, loss)

    monkeypatch.setattr(loop, "train_step", breaks)
    folder = RunFolder(tmp_path / "run", config, PLAN, corpus)
    with pytest.raises(FloatingPointError, match="the loss of step 23 is nan"):
        train(config, PLAN, corpus, folder=folder)
    assert folder.steps() == [20]


def test_a_validation_loss_that_is_not_finite_is_an_error(whole, corpus):
    broken = jax.tree.map(lambda x: x.at[0].set(jnp.nan), whole[0].decoder)
    with pytest.raises(FloatingPointError, match="validation loss is nan"):
        validation_loss(broken, validation_batches(corpus, TINY.batch, TINY.context)[:1])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: twin_config("lstm", "smoke"), "mixer 'lstm' is not one of mha, gqa"),
        (lambda: twin_config("gqa", "huge"), "size 'huge' is not one of smoke, real"),
        (lambda: twin_config("hybrid", dataclasses.replace(TINY, mlp_width=1)), "make mlp_width larger"),
        (lambda: dataclasses.replace(PLAN, steps=0), "training's steps to be an integer >= 1, got 0"),
        (lambda: dataclasses.replace(PLAN, rate=-1.0), "positive rate"),
        (lambda: dataclasses.replace(PLAN, seed=-1), "seed >= 0, got -1"),
        (lambda: check_corpus(make_corpus([bytes(290)]), 8, 32), "261 bytes to train on and 29 to validate on"),
    ],
)
def test_bad_input_is_named(bad, message):
    with pytest.raises(ValueError, match=message):
        bad()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mixer", "lstm"], "mixer 'lstm' is not one of"),
        (["--steps", "0"], "steps to be an integer >= 1, got 0"),
        (["--text-file", "nowhere.txt"], "no text file at nowhere.txt"),
    ],
)
def test_the_command_names_bad_input(arguments, message, monkeypatch, capsys, tmp_path):
    status, _, err = run(monkeypatch, capsys, "train", "--out", tmp_path / "run", *arguments)
    assert status == 2
    assert message in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--twins", "--resume"])
def test_the_command_needs_a_folder(option, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("x")
    status, _, err = run(monkeypatch, capsys, "train", "--out", tmp_path / "file", option)
    assert status == 2
    assert "is a file" in err


def test_the_command_trains_and_goes_on(whole, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(twins.SIZES, "smoke", TWO_LAYERS)
    options = ["--mixer", "gqa", "--every", 20, "--out", tmp_path / "run"]
    status, out, _ = run(monkeypatch, capsys, "train", *options)
    assert status == 0
    assert "cache of 128 bytes per token (bfloat16) and 0 of state" in out
    record = json.loads((tmp_path / "run/loss.json").read_text())
    assert record["validation"] == curve_json(whole[1])["validation"]
    assert len(record["train"]) == TINY.steps
    assert (tmp_path / "run/loss.png").stat().st_size > 10_000
    status, _, err = run(monkeypatch, capsys, "train", *options)
    assert (status, "is not empty" in err) == (2, True)
    status, again, _ = run(monkeypatch, capsys, "train", *options, "--resume")
    assert (status, again.split(" (")[0]) == (0, out.split(" (")[0])


def test_the_table_of_twins(whole, corpus, tmp_path):
    curve = whole[1]
    rows = [result_row(mixer, twin_config(mixer, TINY), curve) for mixer in MIXERS]
    text = {"train_bytes": len(corpus.train), "validation_bytes": len(corpus.validation), "unigram_entropy": 3.2}
    result = {"command": "memjax train --twins", "size": "tiny", "plan": dataclasses.asdict(PLAN), "text": text, "rows": rows}
    result |= machine() | {"shapes": dataclasses.asdict(TINY)} | {"curves": {mixer: curve_json(curve) for mixer in MIXERS}}
    lines = twins_markdown(result).splitlines()
    assert [line.split(" | ")[0] for line in lines[-5:]] == [f"| {mixer}" for mixer in MIXERS]
    assert f"{curve.validation[-1][1] / np.log(2):.3f} | 512 | 256 | 0 |" in lines[-4]  # gqa
    twins_plot(result, tmp_path / "twins.png")
    assert (tmp_path / "twins.png").stat().st_size > 10_000


def test_further_texts_are_read(tmp_path):
    (tmp_path / "more.txt").write_bytes(b"\xff" * 100)
    assert read_texts([tmp_path / "more.txt"]) == [b"\xff" * 100]
    longer = make_corpus([*packaged_texts(), *read_texts([tmp_path / "more.txt"])])
    assert longer.train[-1] == 255
    assert longer.digest != make_corpus(packaged_texts()).digest
