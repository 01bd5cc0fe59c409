"""Every module imports by its installed name, and its docstring examples run."""

import doctest
import importlib
from pathlib import Path

import pytest
from source_tree import modules

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("name", [name for name in modules() if not name.endswith(".__main__")])
def test_examples_in_docstrings(name):
    module = importlib.import_module(name)
    assert Path(module.__file__).resolve() == modules()[name], "another copy of memjax is installed"
    failed, _ = doctest.testmod(module, optionflags=FLAGS)
    assert failed == 0, "the report is above, in the captured output"


def test_a_wrong_example_is_found(tmp_path, monkeypatch):
    (tmp_path / "wrong_example.py").write_text('"""\n>>> 1 + 1\n3\n"""\n')
    monkeypatch.syspath_prepend(tmp_path)
    failed, attempted = doctest.testmod(
        importlib.import_module("wrong_example"), optionflags=FLAGS, report=False
    )
    assert (failed, attempted) == (1, 1)
