"""The README tells the truth: its code runs, its commands exist, its figures are those of the committed results."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from memjax import cli
from memjax.evaluate.eviction_report import eviction_markdown, keys_summary
from memjax.evaluate.markdown import codec_markdown, evaluation_markdown, eviction_summary, markdown

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


def test_every_block_is_of_a_kind_that_is_tested():
    assert {name for name, _ in BLOCKS} <= {"python", "sh", "text"}


def test_python_blocks_run_and_print_what_is_shown(capsys):
    namespace: dict = {}
    for i, (language, text) in enumerate(BLOCKS):
        if language != "python":
            continue
        exec(compile(text, f"README.md block {i}", "exec"), namespace)
        printed = capsys.readouterr().out
        if i + 1 < len(BLOCKS) and BLOCKS[i + 1][0] == "text":
            assert printed.split() == BLOCKS[i + 1][1].split()
    assert namespace


@pytest.mark.slow
def test_shell_blocks_run(monkeypatch, tmp_path):
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    ran = 0
    for line in (line for text in blocks("sh") for line in text.replace("\\\n", " ").splitlines()):
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert words[1] in targets
        elif words[:1] == ["memjax"]:
            paths = [str(ROOT / word) if word.startswith("memjax/") else word for word in words]
            monkeypatch.setattr(sys, "argv", paths)
            monkeypatch.chdir(tmp_path)
            cli.app(standalone_mode=False)
            ran += 1
        elif words:  # installing is what test_packaging does
            assert words[0] in ("git", "cd", "pip")
    assert ran >= 2


def test_the_table_is_the_committed_result():
    rows = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    assert markdown(rows) in README


def test_the_table_of_codecs_is_the_committed_result():
    result = json.loads((ROOT / "benchmarks" / "results" / "kv_eval.json").read_text())
    assert codec_markdown(result, intervals=False) in README
    assert evaluation_markdown(result) == (ROOT / "benchmarks" / "results" / "kv_eval.md").read_text()


def test_the_table_of_evictors_is_the_committed_result():
    result = json.loads((ROOT / "benchmarks" / "results" / "evict_eval.json").read_text())
    assert eviction_summary(result) in README
    assert eviction_markdown(result) == (ROOT / "benchmarks" / "results" / "evict_eval.md").read_text()
    keys = json.loads((ROOT / "benchmarks" / "results" / "evict_keys.json").read_text())
    assert keys_summary(keys, 0.25) in README
    assert eviction_markdown(keys) == (ROOT / "benchmarks" / "results" / "evict_keys.md").read_text()


def test_named_files_exist():
    for name in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / name).exists(), name
