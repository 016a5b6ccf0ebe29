"""What every reader of a data set returns: the cases, and the structures in their labels."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monai.data import partition_dataset
from monai.utils import ensure_tuple, optional_import

from monai_conres.files import check_same_grid, find_files, load_volume, read_header, repeated, stem
from monai_conres.scans import Structures

tqdm, _ = optional_import("tqdm", name="tqdm", descriptor="{}; install it with: pip install 'monai-conres[examples]'")

Cases = list[dict[str, Any]]


@dataclass(frozen=True)
class Datalist:
    """Cases of a data set, and what their labels mean.

    Attributes:
        cases: one dictionary for each case, for MONAI's dictionary transforms. ``"image"`` is a file, or a list of
            files with one for each channel. ``"label"`` is a file, if there is a label. ``"name"`` is unique.
        structures: the label values of each structure. Structures may overlap: the core is part of the whole tumor.
        folds: names of the validation cases of each fold, if the data set defines folds.

    Raises:
        ValueError: when two cases have one name.
    """

    cases: Cases
    structures: Structures
    folds: list[set[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if (twice := repeated([case["name"] for case in self.cases])) is not None:
            files = [case["image"] for case in self.cases if case["name"] == twice]
            raise ValueError(f"expected a different name for each case, got {twice} for {files}; keep or rename one.")

    def split(self, fold: int = 0, *, folds: int = 5, seed: int = 0) -> tuple[Cases, Cases]:
        """Training and validation cases of one fold, from 0. ``seed`` draws ``folds`` if the data set defines none.

        Raises:
            ValueError: when there is no such fold, or the fold leaves nothing to train or to validate with.
        """
        parts = self.folds
        if not parts:
            drawn = partition_dataset(self.cases, num_partitions=min(folds, len(self.cases)), shuffle=True, seed=seed)
            parts = [{case["name"] for case in part} for part in drawn]
        if not 0 <= fold < len(parts):
            raise ValueError(f"expected a fold from 0 to {len(parts) - 1}, got {fold}.")
        return self._parts(parts[fold], f"fold {fold}")

    def hold_out(self, number: int, *, seed: int = 0) -> tuple[Cases, Cases]:
        """Training and validation cases: ``seed`` draws ``number`` validation cases from the sorted names.

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
        """:func:`check_voxels` of each case; process ``rank`` of ``num_replicas`` reads its share.

        Raises:
            ValueError: one line for each case with an error.
        """
        values = {0}.union(*self.structures.values())
        share = tqdm(self.cases[rank::num_replicas], desc="check files", disable=rank > 0 or not progress)
        for_each(lambda case: check_voxels(case, values, channels), share)

    def _parts(self, held_out: set[str], what: str) -> tuple[Cases, Cases]:
        training = [case for case in self.cases if case["name"] not in held_out]
        validation = [case for case in self.cases if case["name"] in held_out]
        if not training or not validation:
            raise ValueError(
                f"expected cases to train and to validate with in {what}, got {len(training)} and {len(validation)} of "
                f"{len(self.cases)}; are the names in splits_final.json those of the images?"
            )
        return training, validation


def read_scans(folder: str | os.PathLike, structures: Structures) -> Datalist:
    """Read a folder of new scans: each NIfTI file is a case without a label.

    Raises:
        ValueError: when there is no file, two files have one name, or a file cannot be read.
    """
    files = [file for file in find_files(folder, "*.nii*") if file.parent == Path(folder)]
    if not files:
        raise ValueError(f"expected NIfTI files (*.nii.gz) in {folder}, found none.")
    for_each(read_header, files)
    return Datalist([{"name": stem(file), "image": str(file)} for file in files], structures)


def check_voxels(case: Mapping[str, Any], values: Collection[int], channels: int | None = None) -> None:
    """Read the files of one case to their ends, and compare their voxel grids.

    A broken download often has a good header. The grid of a DICOM series is not compared.

    Args:
        case: ``"image"``, a file or several, and ``"label"``, if there is one.
        values: values that a label may have, including the background's 0.
        channels: number of channels of the image, over all its files. ``None`` accepts any number.

    Raises:
        ValueError: when a file cannot be read, has voxels that are not finite, lies on another grid, or has other
            channels or values. The error names the file.
    """
    found, images = 0, ensure_tuple(case["image"])
    grids = [*images, *([case["label"]] if "label" in case else [])]
    if not any(Path(file).is_dir() for file in images):
        check_same_grid(grids)
    for file in images:
        volume = load_volume(file)
        if not volume.isfinite().all():
            raise ValueError(f"expected finite numbers in {file}, got others; repair the file or take the case out.")
        found += len(volume)
    if channels not in (None, found):
        raise ValueError(
            f"expected {channels} channels in the image {case['image']}, got {found}; take the case out, or choose the "
            "channels that the network takes."
        )
    if "label" in case:
        label = load_volume(case["label"])
        if len(label) != 1:
            raise ValueError(f"expected one channel in {case['label']}, got {len(label)}; store classes as numbers.")
        if others := sorted(set(label.unique().tolist()) - set(values)):
            raise ValueError(
                f"expected the values {sorted(values)} in {case['label']}, got {others[:5]}; repair the file or take "
                "the case out."
            )


def for_each(function: Callable, items: Iterable) -> list:
    """Results of a function for each item. All its ``ValueError`` become one, with one line for each."""
    results, errors = [], []
    for item in items:
        try:
            results.append(function(item))
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise ValueError("\n".join(errors[:20] + [f"... and {len(errors) - 20} more."] * (len(errors) > 20)))
    return results
