"""The last line of a bundle that fails."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.data import DataLoader, Dataset
from monai.transforms import Compose

from monai_conres.bundle import explain_errors
from monai_conres.bundle.errors import cause_of
from monai_conres.volumes import LoadScand


def loading_error(folder: Path, workers: int) -> BaseException:
    values = np.zeros((4, 5, 6), np.float32)
    values[1, 2, 3] = np.nan
    nib.save(nib.Nifti1Image(values, np.eye(4)), folder / "scan.nii.gz")
    data = Dataset([{"image": folder / "scan.nii.gz"}], Compose([LoadScand("image")]))
    with pytest.raises(RuntimeError) as caught:
        next(iter(DataLoader(data, num_workers=workers)))
    return caught.value


@pytest.mark.parametrize("workers", [0, 1])
def test_cause_of_a_transforms_error_is_the_file(tmp_path, workers):
    text = cause_of(loading_error(tmp_path, workers))
    assert text.startswith(f"expected finite numbers in {tmp_path / 'scan.nii.gz'}, below 1e+09 in size, got NaN")
    assert text.endswith("or take the case out.")


@pytest.mark.parametrize("error", [ValueError("expected a file."), RuntimeError("out of memory"), KeyboardInterrupt()])
def test_errors_that_nothing_wraps_have_no_cause(error):
    assert cause_of(error) == ""


def test_cause_keeps_all_lines_of_an_error_and_leaves_out_its_own_cause():
    inner = ValueError("one file\nanother file")
    inner.__cause__ = OSError("no header")
    middle, outer = RuntimeError("Failed to evaluate"), RuntimeError("Failed to evaluate")
    outer.__cause__, middle.__cause__ = middle, inner
    assert cause_of(outer) == "one file\nanother file"


def chain(*errors: BaseException) -> BaseException:
    """The first error, which the second one caused, and so on."""
    for outer, inner in pairwise(errors):
        outer.__cause__ = inner
    return errors[0]


def test_cause_is_found_behind_any_class():
    download = Exception("Error processing URL: no connection")  # as MONAI's download raises it
    error = chain(RuntimeError("Failed to instantiate"), download, ConnectionError("no connection"), KeyError("x"))
    assert cause_of(error) == "no connection"


def test_innermost_error_is_the_cause_where_no_message_says_what_to_do():
    assert cause_of(chain(RuntimeError("Failed to evaluate"), KeyError("x"))) == "KeyError: 'x'"
    missing = ModuleNotFoundError("No module named 'tensorboard'")
    assert cause_of(chain(RuntimeError("a"), RuntimeError("b"), missing)) == f"ModuleNotFoundError: {missing}"


def test_last_line_of_a_program_is_the_cause(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    explain_errors()
    error = loading_error(tmp_path, 0)
    sys.excepthook(type(error), error, error.__traceback__)
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert printed.splitlines()[-1].startswith(f"error: expected finite numbers in {tmp_path}")
