"""Where memjax's source lies: the folders that pyproject maps into the package, and the modules in them."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
ROOTS = {
    "memjax": REPOSITORY / "memjax",
    "memjax.models": REPOSITORY / "models",
    "memjax.pallas_kernels": REPOSITORY / "pallas_kernels",
}


def packages() -> dict[str, Path]:
    """Every package name with its folder: each folder that holds a Python file."""
    found = {}
    for root, folder in ROOTS.items():
        for parent in sorted({file.parent for file in folder.rglob("*.py")}):
            found[".".join([root, *parent.relative_to(folder).parts])] = parent
    return found


def modules() -> dict[str, Path]:
    """Every module name, packages included, with its file."""
    found = {}
    for package, folder in packages().items():
        for file in sorted(folder.glob("*.py")):
            found[package if file.stem == "__init__" else f"{package}.{file.stem}"] = file
    return found


def installed_path(file: Path) -> str:
    """Where a file of the source tree lies in an installation, relative to site-packages."""
    for root, folder in ROOTS.items():
        if file.is_relative_to(folder):
            return "/".join([*root.split("."), *file.relative_to(folder).parts])
    raise ValueError(f"{file} is outside {', '.join(str(folder) for folder in ROOTS.values())}")
