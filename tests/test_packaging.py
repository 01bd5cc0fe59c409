"""The wheel, installed elsewhere, is complete and works beside folders of the same names."""

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from source_tree import REPOSITORY, ROOTS, installed_path, modules

pytestmark = pytest.mark.slow

NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv*", "build", "dist", "demo_out", "*.egg-info", "__pycache__", ".*_cache"
)
OTHERS = {"models/__init__.py": "OTHER = 'models'\n", "pallas_kernels/__init__.py": "OTHER = 'kernels'\n"}


def run(*command: str | Path, cwd: Path) -> str:
    """Output of a command that knows nothing of the source tree; its errors are shown when it fails."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    kept.pop("XLA_FLAGS", None)
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=kept, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of a copy of the source tree: nothing stale goes in, nothing is left behind."""
    folder = tmp_path_factory.mktemp("build")
    shutil.copytree(REPOSITORY, folder / "source", ignore=NOT_SOURCE)
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--wheel-dir",
        folder / "wheels",
        cwd=folder / "source",
    )
    (found,) = (folder / "wheels").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """A new environment with the wheel; a path file lends it the dependencies that are installed here.

    Path files in a folder that was itself added by a path file are not read: an editable memjax stays out.
    """
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv/bin/python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=folder,
    )
    site = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    )
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "dependencies.pth").write_text("\n".join(sorted(here)) + "\n")
    return python


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Path:
    """A folder with packages of its own named as two of ours are in the source tree."""
    folder = tmp_path_factory.mktemp("research")
    for name, text in OTHERS.items():
        (folder / name).parent.mkdir()
        (folder / name).write_text(text)
    return folder


def test_the_wheel_holds_exactly_the_source(wheel):
    files = [file for root in ROOTS.values() for file in root.rglob("*") if file.is_file()]
    expected = {installed_path(file) for file in files if "__pycache__" not in file.parts}
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert {
        "memjax/py.typed",
        "memjax/models/__init__.py",
        "memjax/pallas_kernels/decode/__init__.py",
    } <= expected


def test_the_wheel_describes_itself(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(archive.read(name))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.12"
    assert set(metadata.get_all("Provides-Extra")) == {"tpu", "cuda12", "cuda13", "notebook", "peers", "test"}
    assert "jax<0.13,>=0.11.2" in metadata.get_all("Requires-Dist")
    licence = archive.read(name.replace("METADATA", "licenses/LICENSE")).decode()
    assert "Copyright 2026 The memjax authors" in licence


def test_every_module_imports_beside_namesakes(python, elsewhere):
    script = f"""
import importlib
import models, pallas_kernels
assert (models.OTHER, pallas_kernels.OTHER) == ("models", "kernels")
for name in {[name for name in modules() if not name.endswith("__main__")]}:
    print(importlib.import_module(name).__file__)
"""
    files = run(python, "-c", script, cwd=elsewhere).split()
    site = python.parent.parent / "lib"
    assert len(files) == len([name for name in modules() if not name.endswith("__main__")])
    assert [file for file in files if not Path(file).is_relative_to(site)] == []


@pytest.mark.parametrize("start", [["memjax"], ["python", "-m", "memjax.cli"]], ids=["script", "module"])
def test_the_installed_command_generates_text_elsewhere(python, elsewhere, start):
    prompt = "The capital of France is"
    command = [python.parent / start[0], *start[1:], "generate", "--model", "smollm2-135m"]
    printed = run(*command, "--prompt", prompt, "--max-new-tokens", "4", cwd=elsewhere)
    assert "Paris" in printed, "the greedy answer of these weights in transformers"
