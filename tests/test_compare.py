"""The comparison: its measurements against plain ones, its report, and the real model's figures."""

import io
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import memjax as mj
from memjax.data import NOVEL
from memjax.evaluate.compare import Setup, compare
from memjax.evaluate.passkey import Passkey
from memjax.evaluate.report import plot, save_json, table

KEYS = {
    "policy",
    "tokens",
    "bytes_device",
    "bytes_host",
    "bytes_disk",
    "bits_per_value",
    "compression",
    "kld_mean",
    "kld_p95",
    "top1",
    "ppl",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "simulated",
}
TEXT = [int(token) for token in np.random.default_rng(0).integers(0, 60, 90)]


@pytest.fixture(scope="module")
def rows(tiny):
    policies = [mj.policy(text) for text in ("dense", "int4+protect(2,8)", "host(8,4)", "streaming(2,14)")]
    return compare(tiny, TEXT, policies, Setup(chunk=16, cache_dtype="float32", decode_tokens=4))


def test_rows_have_the_promised_keys_and_survive_json(rows, tmp_path):
    save_json(rows, tmp_path / "rows.json")
    for row in json.loads((tmp_path / "rows.json").read_text()):
        assert set(row) >= KEYS
        assert row["tokens"] == len(TEXT)
        assert row["prefill_tokens_per_s"] > 0
        assert row["decode_tokens_per_s"] > 0


def test_a_dense_float32_cache_loses_nothing(rows):
    assert rows[0]["kld_mean"] < 1e-6
    assert rows[0]["top1"] == 1.0
    assert rows[0]["bits_per_value"] == 32
    assert rows[2]["kld_mean"] < 1e-6


def test_perplexity_is_that_of_the_plain_model(tiny, rows):
    tokens = jnp.asarray([TEXT], jnp.int32)
    logits = jax.jit(lambda decoder: decoder.logits(decoder(tokens)[0]))(tiny.decoder)
    log_probs = jax.nn.log_softmax(logits[0, :-1])
    nll = -np.take_along_axis(np.asarray(log_probs), np.asarray(tokens[0, 1:, None]), axis=1)
    assert rows[0]["ppl"] == pytest.approx(float(np.exp(nll.mean())), rel=1e-4)


def test_bytes_are_those_of_the_cache(tiny, rows):
    for row in rows:
        held = mj.predict_nbytes(mj.policy(row["policy"]), tiny.decoder.cache_specs(1, row["capacity"], "float32"))
        assert (row["bytes_device"], row["bytes_host"], row["bytes_disk"]) == (held.device, held.host, 0)
        dense = row["capacity"] * 2 * 2 * 2 * 16 * 4
        assert row["compression"] == pytest.approx(dense / held.total)
    assert [row["simulated"] for row in rows] == [False, False, jax.default_backend() == "cpu", False]


def test_lossy_rows_say_what_they_lose(rows):
    assert rows[1]["kld_mean"] > 1e-4
    assert rows[1]["kld_p95"] >= rows[1]["kld_mean"]
    assert rows[3]["kld_mean"] > 1e-4


def test_reports_show_every_policy(rows, tmp_path):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table(rows))
    shown = console.export_text()
    for row in rows:
        assert row["policy"] in shown
    assert "simulated" in shown
    plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("tokens", "policies", "message"),
    [([1], ["dense"], "at least 2 tokens"), (TEXT, [], "at least one policy")],
)
def test_bad_input_is_refused(tiny, tokens, policies, message):
    with pytest.raises(ValueError, match=message):
        compare(tiny, tokens, [mj.policy(p) for p in policies])


@pytest.mark.parametrize("bad", [{"chunk": 0}, {"decode_tokens": -1}])
def test_bad_setups_are_refused(bad):
    with pytest.raises(ValueError, match="chunk >= 1"):
        Setup(**bad)


@pytest.mark.parametrize("bad", [{"key": "abc"}, {"depth": 1.5}])
def test_bad_pass_keys_are_refused(bad):
    with pytest.raises(ValueError, match="pass key"):
        Passkey(**bad)


def test_a_pass_key_is_hidden_whole_and_where_asked(smollm2):
    ids = smollm2.tokenizer.encode("word " * 500)
    for depth in (0.0, 0.5, 1.0):
        key = Passkey("31337", depth)
        hidden = key.hide(smollm2.tokenizer, ids[:200])
        text = smollm2.tokenizer.decode(hidden)
        assert len(hidden) == 200
        assert key.statement in text
        assert text.index(key.statement) / len(text) == pytest.approx(depth, abs=0.2)
    with pytest.raises(ValueError, match="cannot hide a pass key"):
        key.hide(smollm2.tokenizer, ids[:5])


@pytest.fixture(scope="session")
def novel(smollm2):
    return smollm2.tokenizer.encode(NOVEL.read())[:1024]


PLAIN = "centre=none,balance=off"


@pytest.mark.slow
def test_the_static_figures_of_the_real_model(smollm2, novel):
    """Every token but four sinks compressed before any query sees it, all layers: the harshest setting of a codec."""
    codecs = [f"int8({PLAIN})", f"int4({PLAIN})", f"int4(rotate=true,{PLAIN})", f"fp8({PLAIN})", "int4", "int4(rotate=true)"]
    policies = [mj.policy(f"{codec}+protect(4,0)") for codec in codecs]
    rows = compare(smollm2, novel, policies, Setup(static=True, decode_tokens=0, chunk=256))
    int8, int4, rotated, fp8, prepared, both = rows
    assert prepared["kld_mean"] < 0.25 * int4["kld_mean"]
    assert both["kld_mean"] < 0.25 * rotated["kld_mean"]
    assert int8["kld_mean"] <= 0.002
    assert rotated["kld_mean"] < 0.6 * int4["kld_mean"]
    assert int8["kld_mean"] < fp8["kld_mean"] < rotated["kld_mean"]
    assert int8["bits_per_value"] <= 8.3
    assert int4["bits_per_value"] == rotated["bits_per_value"] <= 4.3


@pytest.mark.slow
def test_the_accumulated_figures_of_the_real_model_and_its_pass_key(smollm2, novel):
    key = Passkey()
    policies = [mj.policy(codec) for codec in ("dense", f"int8({PLAIN})", f"int4({PLAIN})", f"int4(rotate=true,{PLAIN})")]
    found = compare(smollm2, key.hide(smollm2.tokenizer, novel), policies, Setup(), key)
    dense, int8, int4, rotated = found
    assert dense["kld_mean"] < 1e-4  # bfloat16
    assert int8["kld_mean"] <= 0.002
    assert rotated["kld_mean"] < 0.6 * int4["kld_mean"]
    assert all(row["passkey_found"] for row in found)
    assert math.isclose(dense["ppl"], int8["ppl"], rel_tol=0.01)
