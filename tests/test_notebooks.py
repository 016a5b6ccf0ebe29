"""The notebooks of examples/: they run, and what is stored in them is complete and clean."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import nbformat
import pytest

from examples.execute_notebooks import execute

FOLDER = Path(__file__).parent.parent / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def text_of(output: nbformat.NotebookNode) -> str:
    return output.get("text", "") + output.get("data", {}).get("text/plain", "")


def test_there_are_five():
    assert [path.name[0] for path in NOTEBOOKS] == list("12345")


@every_notebook
def test_it_runs(path, monkeypatch):
    monkeypatch.setenv("ITERATIONS", "2")
    monkeypatch.delenv("DECATHLON_FOLDER", raising=False)
    stored = nbformat.read(path, as_version=4)
    for cell, before in zip(execute(path).cells, stored.cells, strict=True):
        kinds = [{frozenset(output.get("data", {})) for output in c.get("outputs", [])} for c in (cell, before)]
        assert kinds[0] == kinds[1], cell.source  # as many pictures as are stored


@every_notebook
def test_its_outputs_are_stored_and_clean(path):
    assert path.stat().st_size < 1e6
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for output in outputs:
        assert output.output_type != "error"
        assert output.get("name") != "stderr", text_of(output)
        # no paths of the machine, no progress bars
        assert not re.search(r"/(home|tmp|root|work|usr|Users)/|[A-Z]:\\|\d+%\|", text_of(output)), text_of(output)


@every_notebook
def test_its_headings(path):
    """One title, and no level left out: a page of the documentation."""
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]
    levels = [len(match[1]) for source in cells for match in re.finditer(r"^(#+) ", source, flags=re.MULTILINE)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
