"""Pancreas-CT of the NIH, as downloaded from TCIA, and the Decathlon's Task07."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from monai_conres.bundle.datalist import Datalist, for_each, read_scans
from monai_conres.bundle.decathlon import read_decathlon
from monai_conres.files import path_text
from monai_conres.volumes import (
    Grid,
    LoadScand,
    find_files,
    find_series,
    read_grid,
    reoriented,
    say_left_out,
)

# The test cases of the four folds that Zhang et al., 2021, published.
FOLDS = (
    (10, 68, 44, 7, 70, 43, 80, 19, 3, 57, 74, 20, 50, 46, 9, 25, 6, 71, 72, 29),
    (60, 30, 37, 81, 64, 56, 79, 48, 76, 31, 27, 23, 16, 42, 63, 34, 65, 32, 24, 82),
    (11, 17, 15, 40, 18, 53, 35, 51, 26, 36, 8, 13, 67, 22, 12, 52, 59, 54, 66, 33, 73),
    (14, 77, 45, 58, 2, 78, 28, 21, 41, 1, 55, 61, 39, 38, 75, 4, 5, 47, 49, 62, 69),
)


def read_pancreas_ct(folder: str | os.PathLike, *, labels: bool = True, exclude: Sequence[int] = ()) -> Datalist:
    """Read the cases of Pancreas-CT with the published four folds, or the cases of the Decathlon's Task07.

    TCIA's files may be at any depth of ``folder``: ``PANCREAS_0001/.../*``, one DICOM series for each case, and
    ``label0001.nii.gz`` from the archive of labels. Task07 has a ``dataset.json``; its pancreas and tumor become one
    structure. With ``labels=False``, a folder of NIfTI files also works. A warning names what is left out.

    Args:
        folder: the folder with both downloads.
        labels: False for scans without labels. In Task07 these are the scans of ``imagesTs``.
        exclude: numbers of cases of Pancreas-CT to leave out. 25 and 70 are known to repeat other patients. Later
            versions of the collection do not have them.

    Raises:
        ValueError: when there are no cases, a series is not complete, a label is missing, or scan and label have
            different sizes or axes. The error names case and file.
    """
    folder = Path(path_text(folder))
    if (folder / "dataset.json").is_file():
        if not labels:
            return read_scans(folder / "imagesTs", {"pancreas": (1, 2)})
        data = read_decathlon(folder)
        return Datalist(data.cases, {"pancreas": tuple(range(1, len(data.classes)))}, data.folds)
    series: dict[int, Path] = {}
    others: dict[Path, str] = {}
    for parent in find_series(folder):
        found = re.search(r"PANCREAS_(\d{4})", str(parent.relative_to(folder)))
        if found is None:
            others[parent.relative_to(folder)] = "a series without the name PANCREAS_0001, ..."
        elif (number := int(found[1])) not in exclude and series.setdefault(number, parent) != parent:
            raise ValueError(
                f"expected one DICOM series for {_name(number)}, got {series[number]} and {parent}; keep one."
            )
    if not series:
        if not labels:
            return read_scans(folder, {"pancreas": (1,)})
        raise ValueError(
            f"expected DICOM series such as PANCREAS_0001/.../*.dcm of the collection Pancreas-CT, or the dataset.json "
            f"of the Decathlon's Task07, in {folder}, found neither"
            f"{', only the series in ' if others else ''}{', '.join(map(str, list(others)[:5]))}."
        )
    found_labels = find_files(folder, "label*.nii.gz") if labels else None
    cases = for_each(lambda number: _case(number, series[number], found_labels), sorted(series))
    say_left_out(f"Found {len(cases)} cases in {folder}", others)
    present = {case["name"] for case in cases}
    tests = [present & {_name(number) for number in fold} for fold in FOLDS]
    return Datalist(cases, {"pancreas": (1,)}, [(present - test, test) for test in tests])


class LoadPancreasCTd(LoadScand):
    """Load image and label. The label of a DICOM series gets the geometry of the series.

    The headers of Pancreas-CT's NIfTI labels put them next to the scans. But their voxels are the voxels of the series:
    column, row, and slice by instance number. Two public preprocessing codes agree on this. It was not checked on the
    real data: look at the pictures of the first evaluation.

    The arguments are those of MONAI's ``MapTransform``; ``keys`` are ``"image"``, with or without ``"label"``.

    Raises:
        ValueError: when a file cannot be read. The error names the file.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """``data`` with files replaced by volumes ``(1, *spatial)``."""
        if "label" not in data or not Path(data["image"]).is_dir():
            return super().__call__(data)
        volumes = self.load(data)
        if "label" in volumes and "image" in volumes:
            volumes["label"].affine = volumes["image"].affine.clone()
        return {**data, **volumes}


def _case(number: int, series: Path, labels: Sequence[Path] | None) -> dict[str, Any]:
    """One case, with its label if ``labels`` are given."""
    case = {"name": _name(number), "image": str(series)}
    if labels is None:
        return case
    found = [file for file in labels if file.name.lower() == f"label{number:04d}.nii.gz"]
    if len(found) != 1:
        raise ValueError(
            f"expected one label of {_name(number)}, label{number:04d}.nii.gz, found "
            f"{' and '.join(map(str, found)) or 'none'}; fetch TCIA_pancreas_labels, keep one, or exclude the case."
        )
    label = found[0]
    scan, drawn = read_grid(series), read_grid(label)
    if drawn.shape != scan.shape:
        raise ValueError(
            f"expected a label of the size {scan.shape} of the series in {series}, got {drawn.shape} in {label}; fetch "
            "both again, or exclude the case."
        )
    # the published labels lie elsewhere, along the axes of the series
    if np.abs(np.abs(_directions(scan) @ _directions(drawn).T) - np.eye(3)).max() > 0.01:
        raise ValueError(
            f"expected the axes of the series in {series}, got others in {label}: {drawn.affine[:3, :3].tolist()}; "
            "resample the label to the voxels of the series, or exclude the case."
        )
    if not scan.agrees(drawn) and reoriented(scan).agrees(reoriented(drawn)):
        raise ValueError(
            f"expected the voxels of {label} in the order of the series in {series}, got a label that lies on the "
            "series but runs along its axes the other way; store it in the order of the series, or exclude the case."
        )
    offset = drawn.affine[:3, 3]
    if not scan.agrees(drawn) and offset.any() and np.allclose(drawn.affine[:3, :3], scan.affine[:3, :3], atol=1e-3):
        away = np.linalg.norm(offset - scan.affine[:3, 3])
        warnings.warn(
            f"The header of {label} has the axes of the series in {series} but lies {away:.4g} mm away. The label is "
            "read voxel by voxel all the same: look at its picture, or exclude the case.",
            stacklevel=2,
        )
    return {**case, "label": str(label), "label_header": False}


def _directions(grid: Grid) -> np.ndarray:
    """The directions of the axes in the rows."""
    return (grid.affine[:3, :3] / np.linalg.norm(grid.affine[:3, :3], axis=0)).T


def _name(number: int) -> str:
    return f"PANCREAS_{number:04d}"
