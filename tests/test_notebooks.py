"""Notebooks run from top to bottom, and what is stored of their output is small, in order, and says nothing of the machine.

``python tests/test_notebooks.py notebooks/02*.ipynb`` runs notebooks and stores what they show.
"""

import json
import re
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

MOST_BYTES = 300_000
WHOLE = ("03_mixed_precision.ipynb", "06_serving_and_cost.ipynb")
"""Notebooks that make no sense of two blocks: of their text, or within their budgets."""
NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def run(path: Path, folder: Path, model: str = "demo") -> nbformat.NotebookNode:
    """Return a notebook as it is after it has run in a folder, with another model in the place of the demo's."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace('"demo"', json.dumps(model))
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def store(path: Path) -> None:
    """Run a notebook and store it with what it shows, without warnings and the times of cells."""
    with tempfile.TemporaryDirectory() as folder:
        notebook = run(path, Path(folder))
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        cell.metadata.pop("execution", None)
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(notebook, path)


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_what_is_stored_is_small_and_says_nothing_of_the_machine(path):
    assert path.stat().st_size < MOST_BYTES
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in cells]
    assert counts in ([None] * len(cells), [*range(1, len(cells) + 1)]), "all of it from one run, or nothing"
    for output in (output for cell in cells for output in cell.outputs):
        assert output.output_type in ("stream", "display_data", "execute_result")
        assert output.get("name") != "stderr"
        assert not re.search(r"(?<![\w.])/(tmp|home|root|work|usr)/", str(output.get("text", "")))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_runs_and_shows_something(path, tmp_path, first_blocks):
    notebook = run(path, tmp_path, "demo" if path.name in WHOLE else str(first_blocks))
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in shown)
    assert not [output for output in shown if output.get("name") == "stderr" and "Error" in output["text"]]


if __name__ == "__main__":
    for name in sys.argv[1:]:
        store(Path(name))
