"""The suite: its statistics against closed forms, its rows, its plot, and what it refuses."""

import dataclasses
import io
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import memjax as mj
from memjax.evaluate import generated, report
from memjax.evaluate.bootstrap import block_length, mean_interval, paired_difference
from memjax.evaluate.compare import Job, Reader, Setup, compare
from memjax.evaluate.generated import Cache, first_difference, generate_samples, retrieve
from memjax.evaluate.markdown import evaluation_markdown
from memjax.evaluate.passkey import Passkey
from memjax.evaluate.report import evaluation_tables, pareto_front, pareto_plot, save_json
from memjax.evaluate.suite import SUITES, Evaluation, compare_settings, evaluate, neighbours, spearman, static_policy

POLICIES = ("int8", "int4+protect(4,16)")
SMALL = Evaluation(policies=POLICIES, tokens=112, retrieval_tokens=0, chunk=32, cache_dtype="float32")


class Bytes:
    """A tokenizer of sixty ids: bytes, exact for digits and spaces."""

    def encode(self, text, add_bos=None):
        return [byte % 60 for byte in text.encode()]

    def decode(self, ids, skip_special=True):
        return "".join(map(chr, ids))

    def stream(self):
        from memjax.models.tokenizer import TextStream

        return TextStream(self)


@pytest.fixture(scope="module")
def model():
    """A random decoder of one layer that sees everything."""
    from flax import nnx

    from memjax.attention.rope import Rope
    from memjax.models.config import llama_config
    from memjax.models.decoder import Decoder
    from memjax.models.load import LanguageModel

    config = llama_config(
        family="llama",
        vocab=61,
        width=32,
        layers=1,
        q_heads=4,
        kv_heads=2,
        head_dim=16,
        mlp_width=48,
        norm_eps=1e-5,
        max_position=256,
        ropes=(Rope(16),),
        windows=(None,),
        tied=True,
    )
    return LanguageModel("one-layer", Decoder(config, rngs=nnx.Rngs(0)), Bytes(), eos_ids=(60,))


@pytest.fixture(scope="module")
def result(model):
    steps = []
    found = evaluate(model, SMALL, steps.append)
    assert len(steps) == SMALL.steps()
    return found


# ---- statistics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 16, 64])
def test_intervals_of_independent_tokens_are_those_of_the_normal_distribution(block):
    n, rng = 4096, np.random.default_rng(1)
    values = rng.normal(3.0, 2.0, n)
    found = mean_interval(values, block=block)
    assert found.mean == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(n), rel=0.15)
    assert found.low < found.mean < found.high


def test_correlated_tokens_widen_the_interval_as_their_blocks_do():
    """An autoregression's block means vary more by 1 + 2 sum_k (1 - k / L) rho^k, which single tokens do not show."""
    rho, block, n = 0.8, 64, 8192
    noise = np.random.default_rng(2).normal(size=n)
    values = np.zeros(n)
    for i in range(1, n):
        values[i] = rho * values[i - 1] + noise[i]
    widths = {length: mean_interval(values, block=length, samples=1000) for length in (1, block)}
    lags = np.arange(1, block)
    widening = math.sqrt(1 + 2 * np.sum((1 - lags / block) * rho**lags))
    ratio = (widths[block].high - widths[block].low) / (widths[1].high - widths[1].low)
    assert widening > 2.5
    assert ratio == pytest.approx(widening, rel=0.15)


def test_pairing_tells_apart_what_intervals_alone_do_not():
    rng = np.random.default_rng(3)
    hardness = rng.exponential(1.0, 2048)
    worse, better = hardness * 1.05, hardness
    assert mean_interval(worse).low < mean_interval(better).high
    difference = paired_difference(worse, better)
    assert difference.excludes_zero
    assert difference.mean == pytest.approx(0.05 * hardness.mean())
    assert not paired_difference(rng.normal(size=512), rng.normal(size=512)).excludes_zero


def test_the_bootstrap_is_seeded_and_keeps_constants():
    values = np.random.default_rng(4).normal(size=300)
    assert mean_interval(values, seed=5) == mean_interval(values, seed=5) != mean_interval(values, seed=6)
    constant = mean_interval(np.full(100, 0.25))
    assert (constant.mean, constant.low, constant.high) == pytest.approx((0.25, 0.25, 0.25))


def test_short_texts_get_shorter_blocks():
    assert [block_length(n) for n in (2, 7, 96, 256, 511, 512, 4096)] == [1, 1, 12, 32, 63, 64, 64]


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (([1.0],), {}),
        (([[1.0, 2.0]],), {}),
        (([1.0, math.nan],), {}),
        (([1.0, 2.0],), {"block": 0}),
        (([1, 2],), {"level": 1}),
    ],
)
def test_bad_bootstraps_are_refused(arguments, options):
    with pytest.raises(ValueError, match="a bootstrap needs"):
        mean_interval(*arguments, **options)
    with pytest.raises(ValueError, match="the same tokens twice"):
        paired_difference([1.0, 2.0], [1.0])


def test_rank_correlation_by_hand():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert spearman([1, 1], [1, 2]) is None
    assert spearman([], []) is None
    with pytest.raises(ValueError, match="as many values"):
        spearman([1], [1, 2])


def test_settings_are_compared_over_the_policies_that_have_both():
    static = {"a": 0.1, "b": 0.2, "c": 0.3, "d": 9.0}
    accumulated = {"a": 0.01, "b": 0.03, "c": 0.02, "e": 0.0}
    rows = [
        {"text": "novel", "setting": setting, "name": name, "kld_mean": value}
        for setting, values in (("static", static), ("accumulated", accumulated))
        for name, value in values.items()
    ]
    rows.append({"text": "code", "setting": "static", "name": "a", "kld_mean": 1.0})
    found = compare_settings(rows)
    assert found["novel"] == pytest.approx(0.5)
    assert found["code"] is None


def test_neighbours_are_compared_in_order():
    rng = np.random.default_rng(0)
    base = rng.exponential(size=512)
    rows = neighbours({"bad": 4 * base, "good": base, "same": base + rng.normal(0, 0.1, 512) * (1 - 1e-9) + 1e-3})
    assert [(row["better"], row["worse"]) for row in rows][-1][1] == "bad"
    assert rows[1]["apart"]
    assert rows[1]["low"] <= rows[1]["difference"] <= rows[1]["high"]


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([(8, 1.0), (4, 3.0), (4, 2.0), (2, 9.0), (5, 2.5)], [3, 2, 0]),
        ([(1, 1), (1, 1), (2, 2)], [0, 1]),
        ([(3, 1), (2, 1), (1, 1)], [2]),
        ([(1, 3), (2, 2), (3, 1)], [0, 1, 2]),
        ([(5, 5)], [0]),
        ([], []),
    ],
)
def test_the_pareto_front(points, front):
    assert pareto_front(points) == front


# ---- the run -------------------------------------------------------------------------------------------------------


def test_rows_are_those_of_compare_with_intervals(model, result):
    assert [(row["text"], row["setting"], row["name"]) for row in result["rows"]] == [
        (text, setting, name) for text in ("novel", "code") for setting in ("static", "accumulated") for name in POLICIES
    ]
    for row in result["rows"]:
        assert row["kld_low"] <= row["kld_mean"] <= row["kld_high"]
        assert (row["model"], row["tokens"], row["device"]) == ("one-layer", 112, result["device"])
    novel = model.tokenizer.encode(SUITES["kv"].texts[0].read())[:112]
    plain = compare(model, novel, [mj.policy("int8")], dataclasses.replace(SMALL.setup(), decode_tokens=0))[0]
    assert result["rows"][2]["kld_mean"] == pytest.approx(plain["kld_mean"])
    assert result["rows"][2]["bits_per_value"] == plain["bits_per_value"]
    assert result["rows"][0]["policy"] == "int8+protect(4,0)"
    assert result["rows"][1]["policy"] == "int4+protect(4,16)"


def test_the_result_says_how_it_was_made(result, tmp_path):
    save_json(result, tmp_path / "rows.json")
    read = json.loads((tmp_path / "rows.json").read_text())
    assert read["versions"]["memjax"] == mj.__version__
    assert {"python", "jax", "jaxlib", "flax", "numpy"} < set(read["versions"])
    assert read["bootstrap"] == {"block": 14, "samples": 2000, "level": 0.95}
    assert (read["suite"], read["weights"], read["settings"]) == ("kv", "float32", ["static", "accumulated"])
    assert len(read["pairs"]) == 4
    assert [each["text"] for each in read["ranking"]] == ["novel", "code"]
    assert read["retrieval"] == read["samples"] == []


def test_a_job_is_compiled_once_for_all_texts(model):
    reader, job = Reader(model, 32, Setup(chunk=16, decode_tokens=0)), Job(mj.policy("int8"))
    first = reader.start(job, "bfloat16")
    reader.read_text(list(range(32)), [job])
    assert reader.start(job, "bfloat16").step is first.step
    assert len(reader._steps) == 2


def test_pass_keys_are_asked_at_every_depth(model, monkeypatch):
    calls, answers = [], [[" 74219", " 74219", " 74210"], [" 74219", "x", " 7421"]]

    def answering(model, cache, prompts, chunk, new):
        calls.append(prompts.tolist())
        assert (len(cache), chunk, new) == (model.config.layers, 16, 6)
        return [np.asarray(model.tokenizer.encode(text)) for text in answers[len(calls) - 1]]

    key = Passkey("74219")
    monkeypatch.setattr(generated, "answer", answering)
    caches = [Cache("uncompressed", mj.policy("dense"), None), Cache("int4", mj.policy("int4"), "bfloat16")]
    rows = retrieve(model, caches, [7] * 200, (0.1, 0.5, 0.9), 16, lambda done: None, key)
    statement, question = (model.tokenizer.encode(text) for text in (key.statement, key.question))
    room = 200 - len(statement)
    for prompt, depth in zip(calls[1], (0.1, 0.5, 0.9), strict=True):
        at = round(depth * room)
        assert prompt == [7] * at + statement + [7] * (room - at) + question
    assert rows[1]["distances"] == [room - round(depth * room) for depth in (0.1, 0.5, 0.9)]
    assert [row["name"] for row in rows] == ["uncompressed", "int4"]
    assert [row["found"] for row in rows] == [[True, True, False], [True, False, False]]
    assert [row["fraction"] for row in rows] == pytest.approx([2 / 3, 1 / 3])
    assert rows[0]["answers"] == ["74219", "74219", "74210"]


def test_samples_part_where_they_part(model):
    caches = [Cache("uncompressed", mj.policy("dense"), None), Cache("exact", mj.policy("dense"), "float32")]
    prompts = {"novel": [3, 4, 5, 6], "code": [9, 8]}
    rows = generate_samples(model, caches, prompts, 8, 16, lambda done: None)
    assert [(row["text"], row["name"], row["first_difference"]) for row in rows] == [
        ("novel", "exact", None),
        ("code", "exact", None),
    ]
    assert all(row["uncompressed"] == row["generated"] for row in rows)
    assert [first_difference(*pair) for pair in (([1, 2], [1, 3]), ([1], [1, 2]), ([], []), ([5], [6]))] == [1, 1, None, 0]


def test_reports_show_every_policy(result, tmp_path):
    answers = {"depths": [0.1], "answers": ["74210"], "found": [False], "fraction": 0.0, "tokens": 100}
    sample = {"text": "novel", "name": "int8", "new_tokens": 9, "first_difference": 7, "prompt_tokens": 5}
    sample |= {"uncompressed": "as it was", "generated": "as it is"}
    full = result | {"retrieval": [{"name": "int8", **answers}], "samples": [sample]}
    console = Console(width=200, record=True, file=io.StringIO())
    for table in evaluation_tables(full):
        console.print(table)
    shown = console.export_text()
    for words in ("int8+protect(4,0)", "int4+protect(4,16)", "95 % interval", "no (74210)", "First of 9", "Spearman"):
        assert words in shown
    page = evaluation_markdown(full)
    for words in ("| `int8` | - | 8.25 | 8.125 |", "| pass keys |", "| `int8` | '74210' |", "as it is", "same up to token 7"):
        assert words in page
    assert page.count("| `int4+protect(4,16)` |") == 1
    assert "pass keys" not in evaluation_markdown(result)
    pareto_plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    lossless = [row | {"kld_mean": 0.0, "kld_low": -1e-9, "kld_high": 1e-9} for row in result["rows"]]
    pareto_plot(result | {"rows": lossless}, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 10_000


def test_labels_of_a_crowded_plot_do_not_overlap(result, tmp_path, monkeypatch):
    placed, label = [], report._label

    def collecting(axes, *arguments):
        placed.append(label(axes, *arguments))
        assert len(arguments[3]) > 10  # error bars and steps of the front
        assert not any(report._overlap(box, other) for box in placed[-1] for other in arguments[3])

    monkeypatch.setattr(report, "_label", collecting)
    rows = []
    for i, bits in enumerate((2.25, 2.25, 2.5, 3.25, 3.25, 4.25, 4.25, 4.25, 4.5, 8.25)):
        loss = 0.3 * 4 ** -(bits - 2) * (1 + 0.15 * i)
        rows.append(result["rows"][0] | {"name": f"method{i}(4,4)", "bits_per_value": bits, "kld_mean": loss})
        rows[-1] |= {"kld_low": loss * 0.8, "kld_high": loss * 1.3}
    pareto_plot(result | {"rows": rows}, tmp_path / "plot.png")
    (boxes,) = placed
    assert len(boxes) == 10
    assert not any(report._overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i])


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suite": "mt"}, "unknown suite 'mt'; the known ones are kv"),
        ({"policies": ("int5",)}, "unknown policy 'int5'"),
        ({"policies": ("int4", "int4(rotate=false)")}, "policy int4 is given twice"),
        ({"setting": "dynamic"}, "one of static, accumulated, both"),
        ({"tokens": 1, "setting": "static"}, "between 2 and the 25660 bytes of the text 'code', got 1"),
        ({"tokens": 10**6}, "between 2 and the 25660 bytes of the text 'code', got 1000000"),
        ({"retrieval_tokens": 10**6}, "must not exceed the .* bytes of the text 'novel', got 1000000"),
        ({"retrieval_tokens": -1}, "must be >= 0, got -1"),
        ({"sample": -1}, "must be >= 0"),
        ({"chunk": 0}, "chunk >= 1"),
        ({"tokens": 128}, "more than a chunk in the accumulated setting, got 128 and 128"),
        ({"cache_dtype": "int3"}, "not one of bfloat16"),
    ],
)
def test_bad_evaluations_are_refused_without_a_model(options, message):
    with pytest.raises(ValueError, match=message):
        Evaluation(**options)


def test_what_needs_the_model_is_refused_before_anything_is_computed(model, monkeypatch):
    monkeypatch.setattr("memjax.evaluate.suite.Reader", None)
    with pytest.raises(ValueError, match="cannot hide a pass key"):
        evaluate(model, dataclasses.replace(SMALL, retrieval_tokens=20))
    with pytest.raises(ValueError, match="has no tokenizer"):
        evaluate(dataclasses.replace(model, tokenizer=None), SMALL)
    halved = dataclasses.replace(model, tokenizer=Pairs())
    with pytest.raises(ValueError, match="the 12830 tokens of the text 'code', got 20000"):
        evaluate(halved, dataclasses.replace(SMALL, tokens=20_000))


class Pairs(Bytes):
    """Two bytes a token."""

    def encode(self, text, add_bos=None):
        return super().encode(text)[::2]


def test_a_policy_that_gives_nan_is_named(model):
    broken = dataclasses.replace(model, decoder=_with_nan(model.decoder))
    with pytest.raises(FloatingPointError, match="int8 gave NaN at token 0"):
        compare(broken, [1, 2, 3], [mj.policy("int8")], Setup(chunk=16, decode_tokens=0))


def _with_nan(decoder):
    from flax import nnx

    copy = nnx.clone(decoder)
    copy.norm.scale[...] = jnp.full_like(copy.norm.scale[...], jnp.nan)
    return copy


def test_the_static_setting_refuses_what_forgets(model, tiny):
    static = Setup(chunk=16, static=True)
    with pytest.raises(ValueError, match="accumulated setting or chunks of one"):
        compare(model, list(range(40)), [mj.policy("streaming(2,8)")], static)
    with pytest.raises(ValueError, match="layers with a sliding window"):
        compare(tiny, list(range(40)), [mj.policy("int8")], static)


def test_static_policies_protect_sinks_only():
    assert str(static_policy(mj.policy("int4(rotate=true)"))) == "int4(rotate=true)+protect(4,0)"
    assert str(static_policy(mj.policy("int4+protect(8,8)"))) == "int4+protect(8,8)"
    assert str(static_policy(mj.policy("dense"))) == "dense"


def test_the_suite_can_be_read():
    suite = SUITES["kv"]
    assert [text.name for text in suite.texts] == ["novel", "code"]
    assert [mj.policy(text) for text in suite.policies]
    assert all(len(text.read()) > 25_000 for text in suite.texts)


@pytest.mark.slow
@pytest.mark.timeout(2400)  # eleven compilations of a 30-layer model
def test_the_suite_on_the_real_model(smollm2):
    evaluation = Evaluation(policies=("int8", "int4"), tokens=96, retrieval_tokens=256, chunk=16)
    result = evaluate(smollm2, evaluation)
    kld = {(row["text"], row["setting"], row["name"]): row["kld_mean"] for row in result["rows"]}
    for text in ("novel", "code"):
        for setting in ("static", "accumulated"):
            assert kld[text, setting, "int8"] < kld[text, setting, "int4"]
        assert kld[text, "accumulated", "int4"] < kld[text, "static", "int4"]
    assert [row["fraction"] for row in result["retrieval"]] == [1.0, 1.0, 1.0]
    assert [each["spearman"] for each in result["ranking"]] == pytest.approx([1.0, 1.0])
