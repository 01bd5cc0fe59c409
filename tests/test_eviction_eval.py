"""The suite ``evict``: its rows against plain reads of the same model, its tasks by hand, its report, what it refuses."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import quick_jit
from rich.console import Console
from test_eval import Bytes, model  # noqa: F401
from typer.testing import CliRunner

import memjax as mj
from memjax.cli import app
from memjax.evaluate.eviction import (
    METHODS,
    NOVEL,
    EvictionEvaluation,
    Method,
    Task,
    _Reader,
    evaluate_eviction,
    interleave,
    judge,
    pieces,
)
from memjax.evaluate.eviction_report import eviction_markdown, eviction_plot, eviction_table
from memjax.evaluate.passkey import Multikey, Passkey
from memjax.evaluate.report import save_json
from memjax.evict import Duo

H2O = "h2o({budget})+protect(2,8)"
SMALL = EvictionEvaluation(
    (H2O,), fractions=(1.0, 0.25), tokens=512, continuation=64, depths=(0.5,), chunk=64, cache_dtype="float32"
)


@pytest.fixture(scope="module")
def result(model):  # noqa: F811
    steps = []
    found = evaluate_eviction(model, SMALL, steps.append)
    assert len(steps) == SMALL.steps()
    return found


# ---- the tasks -----------------------------------------------------------------------------------------------------


def test_several_keys_lie_where_they_should():
    tokenizer, key = Bytes(), Multikey(depth=0.5)
    hidden = key.hide(tokenizer, [7] * 600)
    statements = {depth: tokenizer.encode(text) for depth, text in key.statements()}
    room = 600 - sum(map(len, statements.values()))
    expected, start = [], 0
    for depth in sorted(statements):
        at = round(depth * room)
        expected += [7] * (at - start) + statements[depth]
        start = at
    assert hidden == expected + [7] * (room - start)
    assert len(hidden) == 600
    assert len({text for _, text in key.statements()}) == 4
    assert key.question in key.statement
    assert not any(key.question in text for _, text in key.statements()[1:])
    with pytest.raises(ValueError, match="a text of 100 tokens cannot hide"):
        key.hide(tokenizer, [7] * 100)


def test_a_single_key_is_hidden_as_before():
    tokenizer, key = Bytes(), Passkey(depth=0.25)
    statement = tokenizer.encode(key.statement)
    at = round(0.25 * (300 - len(statement)))
    assert key.hide(tokenizer, list(range(300))) == [*range(at), *statement, *range(at, 300 - len(statement))]


def test_shown_questions_end_every_chunk(model):  # noqa: F811
    batch = SMALL.batch(model)
    assert [(task.kind, task.shown) for task in batch.tasks] == [
        ("passkey", False),
        ("passkey", True),
        ("multikey", False),
        ("multikey", True),
    ]
    for row, task in enumerate(batch.tasks, 1):
        question, reminder = (f(model.tokenizer) for f in (task.key.question_tokens, task.key.reminder_tokens))
        chunks = [batch.reads[row][i : i + 64] for i in range(0, len(batch.reads[row]), 64)]
        text = task.key.hide(model.tokenizer, model.tokenizer.encode(NOVEL.read())[:512])
        if task.shown:
            assert all(chunk[-len(reminder) :] == reminder for chunk in chunks)
            assert [token for chunk in chunks for token in chunk[: -len(reminder)]] == text
        else:
            assert batch.reads[row] == text
        assert batch.asks[row] == question + task.key.answer_tokens(model.tokenizer)[:-1]
    assert interleave([1, 2, 3], [9], 4) == [1, 2, 3, 9]


def test_a_key_is_found_if_greedy_decoding_gives_it():
    logits = np.full((3, 5), -20.0, np.float32)
    logits[[0, 1, 2], [4, 2, 2]] = 0.0
    task = Task("passkey", False, Passkey())
    found, lost = judge(task, logits, [4, 2, 2]), judge(task, logits, [4, 3, 2])
    assert (found["found"], found["right_tokens"], lost["found"]) == (True, 1.0, False)
    assert lost["right_tokens"] == pytest.approx(2 / 3)
    assert found["nll"] == pytest.approx(0, abs=1e-6)
    assert lost["nll"] == pytest.approx(20 / 3, rel=1e-4)


def test_rows_of_different_lengths_are_cut_alike():
    rows = [[1, 2, 3, 4, 5], [6, 7]]
    tokens, counts = zip(*pieces(rows, 2), strict=True)
    assert [list(count) for count in counts] == [[2, 2], [2, 0], [1, 0]]
    back = [[int(t) for piece, n in zip(tokens, counts, strict=True) for t in piece[b, : n[b]]] for b in (0, 1)]
    assert back == rows


# ---- the run -------------------------------------------------------------------------------------------------------


def test_rows_are_what_a_plain_read_gives(model, result):  # noqa: F811
    """Continuation and answers of the evicting row, from a loop of its own, one sequence at a time."""
    uncompressed, whole, quarter = result["rows"]
    assert [row["name"] for row in result["rows"]] == ["uncompressed", "h2o+protect(2,8)", "h2o+protect(2,8)"]
    assert uncompressed["kld_mean"] == 0.0
    assert whole["kld_mean"] == pytest.approx(0, abs=1e-6)  # budget 512: nothing goes before the continuation
    assert quarter["policy"] == "h2o(128)+protect(2,8)"
    assert quarter["kld_low"] <= quarter["kld_mean"] <= quarter["kld_high"]
    assert quarter["kld_mean"] > 1e-5
    batch = SMALL.batch(model)
    wanted = plain_read(model, mj.dense(), batch.reads[0], batch.asks[0], batch.capacity)
    found = plain_read(model, mj.policy(quarter["policy"]), batch.reads[0], batch.asks[0], batch.capacity)
    kld = np.sum(np.exp(wanted) * (wanted - found), axis=-1)
    assert quarter["kld_mean"] == pytest.approx(kld.mean(), rel=1e-3)
    row, answer = 4, batch.answers[3]
    logits = plain_read(model, mj.policy(quarter["policy"]), batch.reads[row], batch.asks[row], batch.capacity)
    expected = judge(batch.tasks[3], logits[-len(answer) :], answer)
    assert quarter["answers"][3]["nll"] == pytest.approx(expected["nll"], rel=1e-4)


def plain_read(model, policy, read, ask, capacity) -> np.ndarray:  # noqa: F811
    """Log probabilities after each token of ``ask``, which is read as one chunk."""
    cache = model.init_cache(policy, 1, capacity, "float32")
    for start in range(0, len(read), 64):
        _, cache = plain_step(model.decoder, cache, jnp.asarray([read[start : start + 64]], jnp.int32))
    hidden, _ = plain_step(model.decoder, cache, jnp.asarray([ask], jnp.int32))
    return np.asarray(jax.nn.log_softmax(model.decoder.logits(hidden)[0]))


@quick_jit
def plain_step(decoder, cache, tokens):
    return decoder(tokens, cache)


def test_bytes_are_those_of_one_sequence(model, result):  # noqa: F811
    capacity = SMALL.batch(model).capacity
    for row in result["rows"][1:]:
        specs = model.decoder.cache_specs(1, capacity, "float32")
        assert row["bytes_device"] == mj.predict_nbytes(mj.policy(row["policy"]), specs).device
    assert result["rows"][2]["bytes_device"] < 0.4 * result["rows"][1]["bytes_device"]


def test_reports_show_every_method(result, tmp_path):
    save_json(result, tmp_path / "rows.json")
    read = json.loads((tmp_path / "rows.json").read_text())
    assert (read["suite"], read["tokens"], read["continuation"], read["depths"]) == ("evict", 512, 64, [0.5])
    console = Console(width=220, record=True, file=io.StringIO())
    console.print(eviction_table(read))
    shown = console.export_text()
    headers = ("pass key, hidden", "pass key, shown", "multi-key, hidden", "multi-key, shown", "x smaller")
    for words in (*headers, "h2o+protect(2,8)", "uncompressed", "0/1"):
        assert words in shown
    assert eviction_markdown(read).count("\n| h2o+protect(2,8) |") == 2
    eviction_plot(read, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_command_line_writes_everything(result, tmp_path, monkeypatch):
    seen, files = [], [tmp_path / name for name in ("rows.json", "plot.png", "table.md")]
    monkeypatch.setattr("memjax.cli._load", lambda name: None)

    def run(lm, wanted, tell, known, keep):
        seen.append((wanted, known))
        tell("done")
        keep(result)
        return result

    monkeypatch.setattr("memjax.evaluate.eviction.evaluate_eviction", run)
    arguments = ["eval", "--suite", "evict", "--policy", H2O, "--fraction", "1", "--fraction", "0.25", "--depth", "0.5"]
    arguments += ["--tokens", "512", "--chunk", "64", "--continuation", "64", "--cache-dtype", "float32"]
    for option, file in zip(("--json", "--plot", "--markdown"), files, strict=True):
        arguments += [option, str(file)]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    assert seen == [(SMALL, None)]
    assert all(words in found.stdout for words in ("h2o+protect(2,8)", "uncompressed", "multi-key"))
    assert json.loads(files[0].read_text())["rows"] == result["rows"]
    assert files[1].stat().st_size > 10_000
    assert files[2].read_text() == eviction_markdown(result)
    assert CliRunner().invoke(app, [*arguments, "--resume"]).exit_code == 0
    assert seen[1] == (SMALL, json.loads(json.dumps(result)))
    assert "goes on with the results in --json FILE" in str(CliRunner().invoke(app, [*arguments[:3], "--resume"]).exception)


def test_what_is_known_is_not_measured_again(model, result, monkeypatch):  # noqa: F811
    """A run that was interrupted after the first method is finished, with the same rows, and keeps what else there was."""
    first, second = result["rows"][1:]
    other = second | {"policy": "h2o(64)"}
    known, kept, ran = result | {"rows": [result["rows"][0], other, first], "seconds": 100.0}, [], []
    run = _Reader.run
    monkeypatch.setattr(_Reader, "run", lambda self, policy, dtype: ran.append(policy) or run(self, policy, dtype))
    found = evaluate_eviction(model, SMALL, known=known, keep=kept.append)
    assert [str(policy) for policy in ran] == ["dense", second["policy"]]
    timeless = [{k: v for k, v in row.items() if k != "prefill_tokens_per_s"} for row in (found["rows"][2], second)]
    assert timeless[0] == timeless[1]
    assert [found["rows"][1], found["rows"][3]] == [first, other]
    assert kept[-1] == found
    assert found["seconds"] > 100.0
    for bad, message in ((known | {"tokens": 511}, "has tokens 511, not 512"), ([], "has no rows")):
        with pytest.raises(ValueError, match=message):
            evaluate_eviction(model, SMALL, known=bad)


# ---- methods, and what is refused ----------------------------------------------------------------------------------


def test_methods_leave_their_budget_open():
    assert [Method(text).name for text in METHODS][:3] == ["streaming(4)", "h2o", "h2o+protect(4)"]
    for text in METHODS:
        evictor = Method(text).policy(512, 4096).evictor
        if isinstance(evictor, Duo):
            kept = 4096 * evictor.share + (evictor.sinks + evictor.window) * (1 - evictor.share)
        else:
            kept = evictor.tokens(4096) if hasattr(evictor, "tokens") else 4 + evictor.window
        assert kept == pytest.approx(512, rel=1e-4)
    assert str(Method("h2o({budget},normalised=true)+int4").policy(99, 200)) == "h2o(99,normalised=true)+int4"
    assert Method("duo({share})").policy(4096, 4096).evictor.share == 1
    with pytest.raises(ValueError, match="duo keeps 320 tokens in every head, got a budget of 256 of 4096"):
        Method("duo({share})").policy(256, 4096)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("h2o(64)",)}, "leaves its budget open"),
        ({"methods": ("h2o({size})",)}, "leaves its budget open"),
        ({"methods": ("h3o({budget})",)}, "unknown policy 'h3o'"),
        ({"methods": ("h2o({budget})", "h2o({budget})")}, "is given twice"),
        ({"fractions": ()}, "lie in \\(0, 1\\]"),
        ({"fractions": (0.5, 1.5)}, "lie in \\(0, 1\\]"),
        ({"fractions": (0.5, 0.5)}, "fraction 0.5 is given twice"),
        ({"depths": (0.5, 2.0)}, "depth lies in"),
        ({"continuation": 1}, "a continuation >= 2"),
        ({"tokens": 10**6}, "must not exceed the .* bytes of the text 'novel'"),
        ({"cache_dtype": "int3"}, "not one of bfloat16"),
    ],
)
def test_bad_evaluations_are_refused_without_a_model(options, message):
    with pytest.raises(ValueError, match=message):
        EvictionEvaluation(**options)


def test_what_needs_the_model_is_refused_before_anything_is_computed(model, monkeypatch):  # noqa: F811
    monkeypatch.setattr("memjax.evaluate.eviction._Reader", None)
    for options, message in [
        ({"tokens": 100}, "cannot hide a pass key"),
        ({"chunk": 16}, "a chunk must hold a question and its answer"),
        ({"methods": ("h2o({budget})",), "fractions": (0.125,)}, "leaves none to choose"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate_eviction(model, dataclasses.replace(SMALL, **options))
    with pytest.raises(ValueError, match="has no tokenizer"):
        evaluate_eviction(dataclasses.replace(model, tokenizer=None), SMALL)
