"""The notebooks of examples/: they run, and their stored outputs are complete."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import nbformat
import pytest

from examples.execute_notebooks import FOLDER, execute

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
QUICK = ("1_the_idea", "2_train_and_look_inside")
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def text_of(output: nbformat.NotebookNode) -> str:
    return output.get("text", "") + output.get("data", {}).get("text/plain", "")


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=() if path.stem in QUICK else pytest.mark.slow, id=path.stem) for path in NOTEBOOKS],
)
def test_notebook_runs(path, monkeypatch):
    monkeypatch.setenv("ITERATIONS", "2")
    monkeypatch.delenv("DECATHLON_FOLDER", raising=False)
    stored = nbformat.read(path, as_version=4)
    for cell, before in zip(execute(path).cells, stored.cells, strict=True):
        kinds = [{frozenset(output.get("data", {})) for output in c.get("outputs", [])} for c in (cell, before)]
        assert kinds[0] == kinds[1], cell.source  # the same kinds of outputs as the stored ones


@every_notebook
def test_notebook_imports_exist(path):
    code = "\n".join(cell.source for cell in cells(path, "code"))
    tree = ast.parse(re.sub(r"^%.*$", "", code, flags=re.MULTILINE))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert any(node.module == "monai_conres" for node in imports)
    for node in imports:
        module = importlib.import_module(node.module)
        assert not [alias.name for alias in node.names if not hasattr(module, alias.name)], node.module


@every_notebook
def test_notebook_stores_clean_outputs(path):
    assert path.stat().st_size < 1e6
    code = cells(path, "code")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for output in outputs:
        assert output.output_type != "error"
        assert output.get("name") != "stderr", text_of(output)
        # no paths of this machine, no progress bars
        assert not re.search(r"/(home|tmp|root|work|usr|Users)/|[A-Z]:\\|\d+%\|", text_of(output)), text_of(output)
