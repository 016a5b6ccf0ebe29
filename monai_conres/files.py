"""Files and folders that are there complete, or not at all."""

from __future__ import annotations

import csv
import os
import re
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImage
from monai.utils import convert_to_tensor, optional_import

nib, _ = optional_import("nibabel", descriptor="{}; install it with: pip install 'monai-conres[io]'")

__all__ = ["atomic_path", "check_writable", "find_files", "load_volume", "read_header", "write_csv", "write_label_map"]


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path to write a file or make a folder at; it gets its name when the block ends without an error.

    A file of that name is replaced, a folder of that name is an error. Folders on the way are made.

    Args:
        path: name of the file or folder.

    Raises:
        OSError: when ``path`` is a folder already and has something in it.

    Example:
        >>> folder = tempfile.mkdtemp()
        >>> with atomic_path(f"{folder}/table.md") as temporary:
        ...     _ = temporary.write_text("complete")
        >>> os.listdir(folder)
        ['table.md']
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        temporary = work / path.name  # the ending tells many writers the format
        yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(work)


def write_csv(path: str | os.PathLike, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows by the names of their columns, in the order in which they come; what a row lacks stays empty.

    Args:
        path: name of the file.
        rows: values by column.

    Example:
        >>> file = Path(tempfile.mkdtemp(), "cases.csv")
        >>> write_csv(file, [{"case": "a", "Dice": 0.5}, {"case": "b", "Dice": 0.75, "HD95": 2.0}])
        >>> file.read_text().split()
        ['case,Dice,HD95', 'a,0.5,', 'b,0.75,2.0']
    """
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def check_writable(folder: str | os.PathLike) -> None:
    """Make a folder, and see that files can be written to it, before hours of work end in an error.

    Args:
        folder: name of the folder.

    Raises:
        ValueError: when that is not possible.

    Example:
        >>> check_writable(tempfile.mkdtemp())
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=os.fspath(folder)) as file:
            file.write(b"1")
    except OSError as error:
        raise ValueError(f"expected a folder to write to, cannot write to {folder} ({error}).") from error


def find_files(folder: str | os.PathLike, pattern: str) -> list[Path]:
    """Files at any depth whose names match a pattern in lower case, sorted; the case of the names does not matter.

    Hidden files and folders, as some systems leave beside others, are passed over. Folders that are links are looked
    into, too, each folder once.

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "case").mkdir()
        >>> (folder / "case" / "scan.nii").touch()
        >>> [file.name for file in find_files(folder, "*.nii*")]
        ['scan.nii']
    """
    found: list[Path] = []
    seen: set[str] = set()
    for here, folders, names in os.walk(Path(folder), followlinks=True):
        if (real := os.path.realpath(here)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(here, name) for name in names if is_named(name, pattern)]
    return sorted(found)


def is_named(name: str, pattern: str) -> bool:
    """Whether the name of a file, which is not hidden, matches a pattern in lower case; its own case does not matter.

    Example:
        >>> is_named("SCAN.NII.GZ", "*.nii*"), is_named(".scan.nii", "*.nii*")
        (True, False)
    """
    return fnmatch(name.lower(), pattern) and not name.startswith(".")


def load_volume(file: str | os.PathLike) -> MetaTensor:
    """Load an image or label, ``(c, *spatial)`` in float32: a NIfTI file, or a folder with one DICOM series.

    A series is read with pydicom, its slices in the order of their instance numbers.

    Raises:
        ValueError: when it cannot be read to its end. It names the file.
    """
    try:
        return _loader(Path(file).is_dir(), threading.get_ident())(file)
    except Exception as error:
        raise ValueError(f"expected an image, cannot read {file} ({_brief(error)}); fetch it again.") from error


@lru_cache
def _loader(dicom: bool, thread: int) -> LoadImage:
    """One for each thread: the reader of DICOM series keeps the names of the files as it reads them."""
    # without a reader's name, a folder would go to ITK where that is installed, which orders slices by position
    return LoadImage(reader="PydicomReader" if dicom else None, ensure_channel_first=True)


def read_header(file: str | os.PathLike) -> Any:
    """The header of a NIfTI file of a volume, which has voxels of one size, whichever part of it is asked.

    Raises:
        ValueError: when it cannot be read, is of no volume, or contradicts itself. It names the file.
    """
    header = load_header(file)
    affine, voxel = header.get_best_affine(), np.asarray(header.get_zooms()[:3])
    edges = nib.affines.voxel_sizes(affine)
    if len(header.get_data_shape()) < 3:
        raise ValueError(f"expected a volume in {file}, got the shape {header.get_data_shape()}; take the file out.")
    if not abs(np.linalg.det(affine[:3, :3])) > 1e-3 * edges.prod():
        raise ValueError(
            f"expected an affine of three axes in the header of {file}, got {affine[:3].tolist()}; mend the header."
        )
    if not np.allclose(edges, voxel, rtol=0.01):
        raise ValueError(
            f"expected one size of the voxels in the header of {file}, got {edges.round(4).tolist()} mm in its affine "
            f"and {voxel.round(4).tolist()} mm in its pixdim; mend the one that is wrong."
        )
    return header


def load_header(file: str | os.PathLike) -> Any:
    """The header of a NIfTI file, whatever it says.

    Raises:
        ValueError: when it cannot be read. It names the file.
    """
    try:
        header = nib.load(file).header
        header.get_best_affine()  # what other formats do not have
    except Exception as error:
        raise ValueError(f"expected a NIfTI file, cannot read {file} ({_brief(error)}); fetch it again.") from error
    return header


def stored_axes(header: Any) -> np.ndarray:
    """For each axis of a stored volume the axis of RAS that it runs along, and 1 or -1 for its direction."""
    return nib.io_orientation(header.get_best_affine())


def repeated(names: Sequence[str]) -> str | None:
    """The first name that is there more than once, if there is one.

    Example:
        >>> repeated(["a", "b", "c", "b"])
        'b'
    """
    return next((name for name, number in Counter(names).items() if number > 1), None)


def stem(file: Path) -> str:
    """The name of a NIfTI file without its ending."""
    return re.sub(r"\.nii(\.gz)?$", "", file.name, flags=re.IGNORECASE)


def _brief(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def write_label_map(path: str | os.PathLike, label: torch.Tensor, like: MetaTensor) -> None:
    """Write a label map ``(1, *spatial)`` as 8-bit NIfTI in the geometry of a loaded image.

    Args:
        path: name of the file, ``.nii`` or ``.nii.gz``.
        label: whole numbers from 0 to 255, on the voxel grid of ``like``.
        like: the image, as :func:`load_volume` returns it, or a prediction brought back to the image's voxels. Its
            affine is in mm.

    Raises:
        TypeError: when ``like`` has no affine.

    Example:
        >>> image = MetaTensor(torch.zeros(1, 4, 5, 6), affine=torch.diag(torch.tensor([2.0, 2.0, 3.0, 1.0])))
        >>> file = Path(tempfile.mkdtemp(), "mask.nii.gz")
        >>> write_label_map(file, torch.ones(1, 4, 5, 6), image)
        >>> load_volume(file).shape, load_volume(file).pixdim.tolist()
        (torch.Size([1, 4, 5, 6]), [2.0, 2.0, 3.0])
    """
    if not isinstance(like, MetaTensor):
        raise TypeError(
            f"expected a MetaTensor with the scan's affine, got a {type(like).__name__}; load the scan with "
            "load_volume, or bring a prediction back with Invertd."
        )
    affine = like.affine.cpu().numpy()
    written = nib.Nifti1Image(convert_to_tensor(label, track_meta=False).cpu().numpy()[0].astype(np.uint8), affine)
    # The code names the space of the affine: the scanner's or a template's. A DICOM series has no code.
    codes = [int(like.meta.get(key, 0)) for key in ("sform_code", "qform_code")]
    code = next((code for code in codes if code), 1)
    written.set_qform(affine, code=code)
    written.set_sform(affine, code=code)
    written.header.set_xyzt_units("mm")
    with atomic_path(path) as temporary:
        nib.save(written, temporary)
