"""The notebook runs from top to bottom, and shows what it claims."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "colab" / "quickstart.ipynb"


def outputs_of(cell) -> str:
    return "".join(str(output.get("text", output.get("data", ""))) for output in cell.get("outputs", []))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_quickstart_runs(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = "\n".join(outputs_of(cell) for cell in notebook.cells if cell.cell_type == "code")
    assert "streaming(4,508)+int4(rotate=true) | True" in shown
    assert shown.count("Tokyo") >= 2
    assert "yes (74219)" in shown
    assert "image/png" in shown
    assert "as predicted: True" in shown
