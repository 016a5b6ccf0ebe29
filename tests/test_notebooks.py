"""The notebooks of examples/: they run, and their stored outputs are complete."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import nbformat
import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from examples.execute_notebooks import FOLDER, execute
from monai_conres.phantom import write_phantom_dataset

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


@pytest.mark.slow
def test_slices_are_drawn_along_any_axis_of_the_files(tmp_path, monkeypatch):
    """Notebook 6 takes scans that are stored with the axes A, S, R."""
    folder = tmp_path / "Task00_Phantom"
    write_phantom_dataset(folder, cases=5, size=(34, 42, 26))
    for file in folder.glob("*Tr/*.nii.gz"):
        image = nib.load(file)
        turned = image.as_reoriented(ornt_transform(io_orientation(image.affine), axcodes2ornt("ASR")))
        nib.save(nib.Nifti1Image(np.asarray(turned.dataobj), turned.affine), file)
    monkeypatch.setenv("ITERATIONS", "2")
    monkeypatch.setenv("DECATHLON_FOLDER", str(folder))
    notebook = execute(FOLDER / "6_draw_one_slice.ipynb")
    printed = "".join(text_of(output) for cell in notebook.cells for output in cell.get("outputs", []))
    finished = [float(value) for value in re.findall(r"drawn: Dice of the finished volume (\d\.\d+)", printed)]
    assert len(finished) == 6
    assert finished[-1] == max(finished)


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
