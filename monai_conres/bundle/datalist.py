"""What every reader of a data set returns: its cases and the structures in their labels."""

from __future__ import annotations

import os
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from monai.data import MetaTensor, partition_dataset
from monai.transforms import LoadImage
from monai.utils import ensure_tuple, optional_import

from monai_conres.bundle.structures import check_structures
from monai_conres.files import is_named

nib, _ = optional_import("nibabel", descriptor="{}; install it with: pip install 'monai-conres[io]'")
tqdm, _ = optional_import("tqdm", name="tqdm", descriptor="{}; install it with: pip install 'monai-conres[examples]'")

__all__ = ["Datalist", "check_voxels", "load_volume", "read_header", "read_scans"]


T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Datalist:
    """Cases of a data set and what their labels mean.

    Attributes:
        cases: for each case the files of its ``"image"`` (one, or a list with one for each channel), the file of its
            ``"label"`` where it has one, and its ``"name"``, as MONAI's dictionary transforms take them.
        structures: the values in a label that make up each structure. Structures may overlap: the core of a tumor is
            part of the whole tumor. See :mod:`monai_conres.bundle.structures`.
        folds: names of the validation cases of each fold, where the data set has folds of its own.

    Raises:
        ValueError: when a value of a structure is not from 1 to 255.
    """

    cases: list[dict[str, Any]]
    structures: dict[str, tuple[int, ...]]
    folds: list[set[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_structures(self.structures)

    def split(
        self, fold: int = 0, *, folds: int = 5, seed: int = 0
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Training and validation cases of one fold: the data set's own folds where it has them, else seeded ones.

        Args:
            fold: number of the fold, from 0.
            folds: how many parts to make, where the data set has no folds of its own.
            seed: seed of these.

        Raises:
            ValueError: when there is no such fold, or nothing to train or to validate with in it.
        """
        parts = self.folds or [
            {case["name"] for case in part}
            for part in partition_dataset(
                self.cases, num_partitions=min(folds, len(self.cases)), shuffle=True, seed=seed
            )
        ]
        if not 0 <= fold < len(parts):
            raise ValueError(f"expected a fold from 0 to {len(parts) - 1}, got {fold}.")
        return self._parts(parts[fold], f"fold {fold}")

    def hold_out(self, number: int, *, seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Training and validation cases, ``number`` of them for validation, drawn by ``seed`` from the sorted names.

        Raises:
            ValueError: when nothing is left to train or to validate with.

        Example:
            >>> data = Datalist([{"name": name, "image": f"{name}.nii.gz"} for name in "abcd"], {"tumor": (1,)})
            >>> training, validation = data.hold_out(1, seed=2)
            >>> [case["name"] for case in training], [case["name"] for case in validation]
            (['b', 'c', 'd'], ['a'])
        """
        names = sorted(case["name"] for case in self.cases)
        if not 0 < number < len(names):
            raise ValueError(f"expected 1 to {len(names) - 1} of the {len(names)} cases to hold out, got {number}.")
        return self._parts(set(random.Random(seed).sample(names, number)), "the hold-out")

    def check(
        self, *, rank: int = 0, num_replicas: int = 1, channels: int | None = None, progress: bool = True
    ) -> None:
        """Read every file to its end, the share of one process: see :func:`check_voxels`.

        Args:
            rank: number of this process.
            num_replicas: number of processes that share the work.
            channels: how many channels each image has to have.
            progress: True shows how far it is.

        Raises:
            ValueError: with what is wrong, one line for each case.
        """
        values = {0, *(value for values in self.structures.values() for value in values)}
        share = tqdm(self.cases[rank::num_replicas], desc="check files", disable=rank > 0 or not progress)
        for_each(lambda case: check_voxels(case, values, channels), share)

    def _parts(self, held_out: set[str], what: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        training = [case for case in self.cases if case["name"] not in held_out]
        validation = [case for case in self.cases if case["name"] in held_out]
        if not training or not validation:
            raise ValueError(
                f"expected cases to train and to validate with in {what}, got {len(training)} and {len(validation)} of "
                f"{len(self.cases)}; are the names in splits_final.json those of the images?"
            )
        return training, validation


def read_scans(folder: str | os.PathLike, structures: Mapping[str, Sequence[int]]) -> Datalist:
    """The NIfTI files of a folder, each a case to be segmented.

    Args:
        folder: folder with ``*.nii`` or ``*.nii.gz`` files.
        structures: what is to be segmented, as in :class:`Datalist`.

    Raises:
        ValueError: when there are none, two have one name, a file is no NIfTI file, or a value of a structure is not
            from 1 to 255.
    """
    check_structures(structures)
    files = sorted(file for file in Path(folder).glob("*") if is_named(file.name, "*.nii*"))
    if not files:
        raise ValueError(f"expected NIfTI files (*.nii.gz) in {folder}, found none.")
    for file in files:
        read_header(file)
    if (twice := repeated([stem(file) for file in files])) is not None:
        raise ValueError(f"expected each scan once in {folder}, got {twice}.nii and {twice}.nii.gz; keep one of them.")
    return Datalist(
        [{"name": stem(file), "image": str(file)} for file in files],
        {name: tuple(values) for name, values in structures.items()},
    )


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


def check_voxels(case: Mapping[str, Any], values: Collection[int], channels: int | None = None) -> None:
    """Read the files of one case to their ends: a download that broke off has a good header, too.

    Args:
        case: one of the cases of a :class:`Datalist`.
        values: values that a label may have, the background's among them.
        channels: how many channels the image has to have, that of all its files together; ``None`` is any number.

    Raises:
        ValueError: when a file cannot be read, an image is no volume, has voxels that are not finite or another number
            of channels, or a label has other values. It names the file.
    """
    files = ensure_tuple(case["image"])
    found_channels = 0
    for file in files:
        volume = load_volume(file)
        _check_axes(volume, file)
        if not volume.isfinite().all():
            raise ValueError(f"expected finite intensities in {file}, got others; mend the file or take the case out.")
        found_channels += len(volume)
    if channels is not None and found_channels != channels:
        raise ValueError(
            f"expected {channels} channels in the image of {', '.join(map(str, files))}, got {found_channels}; take "
            "the case out, or choose the channels that the network takes."
        )
    if "label" not in case:
        return
    label = load_volume(case["label"])
    _check_axes(label, case["label"])
    if len(label) != 1:
        raise ValueError(
            f"expected a label of one channel in {case['label']}, got {len(label)}; store its classes as numbers."
        )
    found = np.unique(label.numpy())
    if not (allowed := np.isin(found, list(values))).all():
        raise ValueError(
            f"expected the values {sorted(values)} in {case['label']}, got {found[~allowed][:5].tolist()}; mend the "
            "file or take the case out."
        )


def _check_axes(volume: MetaTensor, file: str | os.PathLike) -> None:
    if volume.ndim != 4:
        raise ValueError(
            f"expected a volume in {file}, three axes and one for channels at most, got the shape "
            f"{(*volume.shape[1:], len(volume))}, channels last; mend the file or take the case out."
        )


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


def check_same_grid(name: str, files: Sequence[str]) -> None:
    """Raise unless the NIfTI files of a case have one size and one geometry."""
    headers = [read_header(file) for file in files]
    first = headers[0]
    for file, header in zip(files, headers, strict=True):
        if header.get_data_shape()[:3] != first.get_data_shape()[:3]:
            raise ValueError(
                f"expected files of the same size in case {name}, got {first.get_data_shape()[:3]} in {files[0]} and "
                f"{header.get_data_shape()[:3]} in {file}; take the case out or mend it."
            )
        if not np.allclose(header.get_best_affine(), first.get_best_affine(), atol=1e-2):
            raise ValueError(
                f"expected files of the same geometry in case {name}, got another affine in {file} than in "
                f"{files[0]}; register them to each other, or mend the header."
            )


def for_each(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Results of a function for each item; what is wrong with any of them is one error, a line for each.

    Raises:
        ValueError: when the function raised one, after all items.

    Example:
        >>> for_each(int, ["1", "x", "2", "y"])
        Traceback (most recent call last):
        ValueError: invalid literal for int() with base 10: 'x'
        invalid literal for int() with base 10: 'y'
    """
    results, errors = [], []
    for item in items:
        try:
            results.append(function(item))
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise ValueError("\n".join(errors[:20] + [f"... and {len(errors) - 20} more."] * (len(errors) > 20)))
    return results


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
