"""Who may import whom, what `import memjax` may do, and that packaging knows every folder."""

import ast
import fnmatch
import json
import re
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator

import pytest
from source_tree import REPOSITORY, ROOTS, modules, packages

LONGEST_FILE = 499
SLOWEST_IMPORT_SECONDS = 1.0
HEAVY = {"torch", "transformers", "matplotlib", "flax", "orbax", "tokenizers"}
MODELS_MAY_IMPORT = (
    "memjax._compat",
    "memjax.attention",
    "memjax.cache",
    "memjax.models",
    "memjax.pallas_kernels",
)
MAY_IMPORT_MODELS = re.compile(r"memjax(\.(cli(_\w+)?|convert|evaluate|generate|plan|serve|train)(\..*)?)?")
FOLDERS_WITH_CODE = [*ROOTS.values(), REPOSITORY / "tests", REPOSITORY / "benchmarks"]


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def imports(source: str, known: set[str]) -> Iterator[tuple[int, str]]:
    """Line and target of every import, a submodule by its own name and a relative import with its dots."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if full in known else base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def objection(importer: str, target: str) -> str | None:
    """Why the module ``importer`` must not import ``target``; None where it may."""
    if target.startswith(".") or target.partition(".")[0] in ("models", "pallas_kernels"):
        return "import by the full memjax.… name"
    if not inside(target, "memjax"):
        return None
    if inside(importer, "memjax.pallas_kernels"):
        return None if inside(target, "memjax.pallas_kernels") else "kernels know nothing of memjax"
    if inside(importer, "memjax.models"):
        allowed = any(inside(target, package) for package in MODELS_MAY_IMPORT)
        return None if allowed else f"models may import {', '.join(MODELS_MAY_IMPORT)} only"
    if inside(target, "memjax.models") and not MAY_IMPORT_MODELS.fullmatch(importer):
        return "only cli, convert, evaluate, generate, plan, serve, train and memjax itself may import models"
    return None


def objections(importer: str, source: str, known: set[str]) -> list[str]:
    found = ((line, target, objection(importer, target)) for line, target in imports(source, known))
    return [f"{importer}:{line} imports {target}: {why}" for line, target, why in found if why]


KNOWN = set(modules())


@pytest.mark.parametrize("name", modules())
def test_import_arrows(name):
    assert objections(name, modules()[name].read_text(), KNOWN) == []


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("memjax.pallas_kernels.decode.xla", "from memjax.cache.spec import CacheSpec"),
        ("memjax.pallas_kernels.codes", "import memjax"),
        ("memjax.pallas_kernels.codes", "def f():\n    from memjax import _compat"),
        ("memjax.models.decoder", "from memjax.generate import generate"),
        ("memjax.models.decoder", "import memjax as mj"),
        ("memjax.models.decoder", "from memjax import evaluate"),
        ("memjax.cache.policy", "from memjax import models"),
        ("memjax.cache.policy", "import memjax.models.config"),
        ("memjax.attention.rope", "import importlib\nimportlib.import_module('memjax.models.config')"),
        ("memjax.client", "from memjax.models import load"),
        ("memjax.cache.policy", "from .spec import CacheSpec"),
        ("memjax.models.decoder", "from . import config"),
        ("memjax.cli", "import models"),
        ("memjax.cli", "from pallas_kernels.decode import decode"),
    ],
)
def test_a_forbidden_import_is_found(importer, source):
    assert len(objections(importer, source, KNOWN)) == 1


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("memjax.pallas_kernels.decode.xla", "import jax\nfrom memjax.pallas_kernels.codes import Codes"),
        ("memjax.models.decoder", "from memjax import cache\nfrom memjax.attention.rope import Rope"),
        ("memjax.models.decoder", "from memjax.models.config import ModelConfig\nimport flax.nnx"),
        ("memjax", "from memjax.models import load"),
        ("memjax.cli_compare", "from memjax.models import load"),
        ("memjax.generate.loop", "from memjax.models.decoder import Decoder"),
        ("memjax.plan.planner", "from memjax.models.decoder import Decoder"),
        ("memjax.cache.policy", "import memjax.modelsque\nimport modelsque"),
    ],
)
def test_allowed_imports_pass(importer, source):
    assert objections(importer, source, KNOWN) == []


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_code_around_the_library_imports_by_full_names(folder):
    found = []
    for file in sorted((REPOSITORY / folder).rglob("*.py")):
        found += objections(file.name, file.read_text(), KNOWN)
    assert [each for each in found if "full memjax" in each] == []


def too_long(lengths: dict[str, int]) -> list[str]:
    return [f"{name}: {lines} lines" for name, lines in lengths.items() if lines > LONGEST_FILE]


def test_files_stay_short():
    files = [file for folder in FOLDERS_WITH_CODE for file in folder.rglob("*.py")]
    lengths = {str(file.relative_to(REPOSITORY)): len(file.read_text().splitlines()) for file in files}
    assert "tests/test_layout.py" in lengths
    assert too_long(lengths) == []
    assert too_long({"fits.py": 499, "long.py": 500}) == ["long.py: 500 lines"]


def settings() -> dict:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_packaging_lists_every_package():
    assert settings()["packages"] == sorted(packages())
    mapping = {root: str(folder.relative_to(REPOSITORY)) for root, folder in ROOTS.items()}
    assert settings()["package-dir"] == mapping


def test_packages_have_an_init():
    assert [name for name, folder in packages().items() if not (folder / "__init__.py").is_file()] == []


def unlisted_data(data: dict[str, list[str]], files: dict[str, list[str]]) -> list[str]:
    """Files of each package that are neither Python nor matched by the package's data patterns."""
    return [
        f"{package}: {file}"
        for package, names in files.items()
        for file in names
        if not any(fnmatch.fnmatch(file, pattern) for pattern in [*data.get(package, []), "*.py"])
    ]


def test_packaging_lists_every_data_file():
    files = {
        package: [file.name for file in folder.iterdir() if file.is_file()]
        for package, folder in packages().items()
    }
    assert unlisted_data(settings()["package-data"], files) == []
    example = {"memjax.data": ["__init__.py", "text.txt", "table.csv"]}
    assert unlisted_data({"memjax.data": ["*.txt"]}, example) == ["memjax.data: table.csv"]


PROBE = """
import json, sys, time
start = time.perf_counter()
import jax
before = dict(jax.config.values)
if {memjax}:
    import memjax
seconds = time.perf_counter() - start
from jax._src import xla_bridge  # no public way asks without answering
changed = [name for name, value in jax.config.values.items() if before.get(name) != value]
loaded = sorted({{name.partition(".")[0] for name in sys.modules}})
backends = xla_bridge.backends_are_initialized()
print(json.dumps(dict(seconds=seconds, backends=backends, loaded=loaded, changed=changed)))
"""


def probe(memjax: bool) -> dict:
    command = [sys.executable, "-c", PROBE.format(memjax=memjax)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.fixture(scope="module")
def imported() -> tuple[list[dict], list[dict]]:
    """Five fresh processes that import jax, and five that import memjax as well, in turn."""
    probe(True)  # writes the byte code, fills the page cache
    pairs = [(probe(False), probe(True)) for _ in range(5)]
    return [without for without, _ in pairs], [with_ for _, with_ in pairs]


def test_import_touches_no_device(imported):
    _, runs = imported
    assert all("memjax" in run["loaded"] for run in runs)
    assert [run["backends"] for run in runs] == [False] * len(runs)
    assert [run["changed"] for run in runs] == [[]] * len(runs)


def test_import_leaves_heavy_libraries_alone(imported):
    _, runs = imported
    assert [HEAVY & set(run["loaded"]) for run in runs] == [set()] * len(runs)


def test_import_is_quick(imported):
    without, with_ = ([run["seconds"] for run in runs] for runs in imported)
    assert statistics.median(with_) - statistics.median(without) < SLOWEST_IMPORT_SECONDS


def test_the_probe_sees_a_backend():
    script = PROBE.replace("before =", "jax.devices(); before =").format(memjax=False)
    run = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert json.loads(run.stdout)["backends"] is True
