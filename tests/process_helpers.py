"""What tests of commands and of compilers share: running ``memjax`` in this process, and finding a Python with compilers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from source_tree import REPOSITORY

from memjax import cli

AOT_PYTHON = Path(os.environ.get("MEMJAX_AOT_PYTHON", REPOSITORY / ".venv-aot/bin/python"))


def run(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of ``memjax ARGUMENTS``."""
    monkeypatch.setattr(sys, "argv", ["memjax", *map(str, arguments)])
    status = 0
    try:
        cli.main()
    except SystemExit as exited:
        status = exited.code or 0
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def python_with(*modules: str) -> str:
    """A Python that has these modules; skips the test where there is none."""
    if not AOT_PYTHON.exists():
        pytest.skip(f"{AOT_PYTHON} does not exist: `make test` makes it, or MEMJAX_AOT_PYTHON names another")
    for module in modules:
        if subprocess.run([AOT_PYTHON, "-c", f"import {module}"], capture_output=True).returncode:
            pytest.skip(f"{AOT_PYTHON} cannot import {module}")
    return str(AOT_PYTHON)
