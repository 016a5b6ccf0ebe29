"""What every reader of a data set returns: the cases, and the structures in their labels."""

from __future__ import annotations

import os
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monai.data import partition_dataset
from monai.utils import ensure_tuple, optional_import

from monai_conres.bundle.sparse import describe_labelled, labelled_slices
from monai_conres.files import path_text
from monai_conres.scans import Structures, check_ignored_value
from monai_conres.volumes import (
    NIFTI,
    check_same_grid,
    find_files,
    find_series,
    load_label,
    load_volume,
    read_grid,
    repeated,
    say_left_out,
    stem,
)

tqdm, _ = optional_import("tqdm", name="tqdm", descriptor="{}; install it with: pip install 'monai-conres[examples]'")

Cases = list[dict[str, Any]]
# these files next to scans are not scans that somebody forgot
SIDE_FILES = {".json", ".txt", ".csv", ".tsv", ".md", ".png", ".jpg", ".bval", ".bvec", ".xml", ".yaml", ".pdf"}


@dataclass(frozen=True)
class Datalist:
    """Cases of a data set, and what their labels mean.

    Attributes:
        cases: one dictionary for each case, for MONAI's dictionary transforms. ``"image"`` is a file, or a list of
            files with one for each channel. ``"label"`` is a file, if there is a label. ``"name"`` is unique.
            ``"patient"``, if it is there, is shared by the scans of one patient. ``"label_header": False`` says that
            the label has the voxels of the image and a header that does not count.
        structures: the label values of each structure. Structures may overlap: the core is part of the whole tumor.
        folds: names of the training cases and of the validation cases of each fold, if the data set defines folds.

    Raises:
        ValueError: when two cases have one name.
    """

    cases: Cases
    structures: Structures
    folds: list[tuple[set[str], set[str]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if (twice := repeated([case["name"] for case in self.cases])) is not None:
            files = [case["image"] for case in self.cases if case["name"] == twice]
            raise ValueError(f"expected a different name for each case, got {twice} for {files}; keep or rename one.")

    def split(self, fold: int = 0, *, folds: int = 5, seed: int = 0, patient: str | None = None) -> tuple[Cases, Cases]:
        """Training and validation cases of one fold, from 0. ``seed`` draws ``folds`` if the data set defines none.

        All scans of a patient are on one side. ``patient`` is a regular expression whose first group in a case's name
        is the patient, such as ``r"(.*)_\\d+$"``; ``None`` takes the patients that the cases name.

        Raises:
            ValueError: when there is no such fold, or the fold leaves nothing to train or to validate with.
        """
        parts, patients = self.folds, self._patients(patient)
        if not parts:
            names = list(dict.fromkeys(patients.values()))
            _say_grouped(patients)
            drawn = partition_dataset(names, num_partitions=min(folds, len(names)), shuffle=True, seed=seed)
            sides = [{case for case, own in patients.items() if own in part} for part in drawn]
            parts = [(set(patients) - side, side) for side in sides]
        if not 0 <= fold < len(parts):
            raise ValueError(f"expected a fold from 0 to {len(parts) - 1}, got {fold}.")
        both = {patients[name] for name in parts[fold][0]} & {patients[name] for name in parts[fold][1]}
        if both:
            warnings.warn(f"Fold {fold} trains and validates with scans of {sorted(both)[:5]}.", stacklevel=2)
        return self._parts(*parts[fold], f"fold {fold}")

    def hold_out(self, number: int, *, seed: int = 0, patient: str | None = None) -> tuple[Cases, Cases]:
        """Training and validation cases: ``seed`` draws ``number`` validation cases from the sorted names.

        All scans of a patient are on one side, so a few more cases may be held out. ``patient`` is that of
        :meth:`split`.

        Raises:
            ValueError: when nothing is left to train or to validate with.

        Example:
            >>> data = Datalist([{"name": name, "image": f"{name}.nii.gz"} for name in "abcd"], {"tumor": (1,)})
            >>> training, validation = data.hold_out(1, seed=2)
            >>> [case["name"] for case in training], [case["name"] for case in validation]
            (['b', 'c', 'd'], ['a'])
        """
        patients = self._patients(patient)
        if not 0 < number < len(patients):
            raise ValueError(
                f"expected 1 to {len(patients) - 1} of the {len(patients)} cases to hold out, got {number}."
            )
        _say_grouped(patients)
        names = sorted(set(patients.values()))
        held_out: set[str] = set()
        for drawn in random.Random(seed).sample(names, min(number, len(names))):
            if len(held_out) < number:
                held_out |= {case for case, own in patients.items() if own == drawn}
        return self._parts(set(patients) - held_out, held_out, "the hold-out")

    def check(
        self,
        cases: Cases | None = None,
        *,
        rank: int = 0,
        num_replicas: int = 1,
        channels: int | None = None,
        ignore_index: int | None = None,
        progress: bool = True,
    ) -> None:
        """:func:`check_voxels` of each case, or only of some; process ``rank`` of ``num_replicas`` reads its share.

        With ``ignore_index``, the value of voxels without a label, it prints how many slices of each case have labels.
        One process warns of a class that no label has.

        Raises:
            ValueError: one line for each case with an error.
        """
        values = {0}.union(*self.structures.values())
        share = (self.cases if cases is None else cases)[rank::num_replicas]
        bar = tqdm(share, desc="check files", disable=rank > 0 or not progress)
        labels = Counter[int]()
        found = for_each(lambda case: _check_voxels(case, values, channels, ignore_index, labels), bar)
        if ignore_index is not None:
            print(*describe_labelled({case["name"]: text for case, text in zip(share, found, strict=True)}), sep="\n")
        missing = {name: own for name, own in self.structures.items() if not any(labels[value] for value in own)}
        if missing and num_replicas == 1 and any("label" in case for case in share):
            warnings.warn(f"None of {len(share)} labels has a voxel of {missing}; check the values.", stacklevel=2)

    def _patients(self, pattern: str | None) -> dict[str, str]:
        """The patient of each case."""
        names = [case["name"] for case in self.cases]
        patients: dict[str, str] = {case["name"]: str(case.get("patient", case["name"])) for case in self.cases}
        if pattern is not None:
            found = {name: re.search(pattern, name) for name in names}
            if wrong := [name for name, match in found.items() if match is None or not match.groups()]:
                raise ValueError(
                    f"expected a regular expression with a group that finds the patient in each name, got {pattern!r} "
                    f"for {wrong[:5]}; for example r'(.*)_\\d+$' finds case7 in case7_1."
                )
            patients = {name: str(match[1]) for name, match in found.items() if match}
        number = len(set(patients.values()))
        if number < 2:
            raise ValueError(
                f"expected two patients or more, to train and to validate with, got {number} with {names[:5]}; add "
                "others, or choose the cases of both sides yourself."
            )
        return patients

    def _parts(self, training: set[str], validation: set[str], what: str) -> tuple[Cases, Cases]:
        sides = tuple([case for case in self.cases if case["name"] in names] for names in (training, validation))
        if not all(sides):
            raise ValueError(
                f"expected cases to train and to validate with in {what}, got {len(sides[0])} and {len(sides[1])} of "
                f"{len(self.cases)}; choose another fold, or add cases."
            )
        neither = [case["name"] for case in self.cases if case["name"] not in training | validation]
        found = f"Found {len(sides[0])} training and {len(sides[1])} validation cases in {what}"
        say_left_out(found, dict.fromkeys(neither, "in neither list"))
        return sides[0], sides[1]


def _say_grouped(patients: Mapping[str, str]) -> None:
    """Warn where the scans of a patient are kept together."""
    if (number := len(set(patients.values()))) < len(patients):
        warnings.warn(f"{len(patients)} cases of {number} patients: all scans of one are on one side.", stacklevel=3)


def read_scans(folder: str | os.PathLike, structures: Structures) -> Datalist:
    """Read a folder of new scans: each NIfTI file is a case without a label. A warning names what is left out.

    Raises:
        ValueError: when there is no file, two files have one name, or a file cannot be read.
    """
    files = _scans_in(folder)
    for_each(read_grid, files)
    return Datalist([{"name": stem(file), "image": str(file)} for file in files], structures)


def read_folders(images: str | os.PathLike, labels: str | os.PathLike, structures: Structures) -> Datalist:
    """Read scans from one folder and their label maps from another one.

    The image of the label ``NAME.nii.gz`` is ``NAME.nii.gz``, or one file for each channel as nnU-Net names them:
    ``NAME_0000.nii.gz``, ``NAME_0001.nii.gz``. A warning names what is left out. The function reads headers, and
    :meth:`Datalist.check` reads voxels.

    Args:
        images: folder of the scans.
        labels: folder of the label maps.
        structures: the label values of each class, such as ``{"core": [1]}``.

    Raises:
        ValueError: when no scan has a label, two scans have one name, the number of a channel is missing, a file cannot
            be read, or the files of a case are on different grids. One line names the file of each error.
    """
    found = _scans_in(images)
    if (twice := repeated([stem(file) for file in found])) is not None:
        raise ValueError(f"expected one file named {twice} in {images}, got several with other endings; keep one.")
    scans, cases = {stem(file): file for file in found}, []
    used, left_out = set(), {}
    for label in _scans_in(labels):
        name = stem(label)
        own = (
            [name]
            if name in scans
            else sorted(scan for scan in scans if re.fullmatch(rf"{re.escape(name)}_\d{{4}}", scan))
        )
        if own:
            numbers = [f"{name}_{number:04d}" for number in range(len(own))]
            if own not in ([name], numbers):
                raise ValueError(
                    f"expected {', '.join(numbers)} for the channels of {name} in {images}, got {', '.join(own)}; add "
                    "the channel that is missing, or rename the files."
                )
            files = [str(scans[scan]) for scan in own]
            cases.append({"name": name, "image": files[0] if len(files) == 1 else files, "label": str(label)})
        else:
            left_out[label] = "no scan"
        used |= set(own)
    left_out |= {scans[scan]: "no label" for scan in scans if scan not in used}
    if not cases:
        raise ValueError(
            f"expected scans and labels of the same names in {images} and {labels}, found {sorted(scans)[:5]} without; "
            "name the label of images/NAME.nii.gz labels/NAME.nii.gz."
        )
    say_left_out(f"Found {len(cases)} scans with labels", left_out)
    for_each(lambda case: check_same_grid([*ensure_tuple(case["image"]), case["label"]]), cases)
    return Datalist(cases, structures)


def _scans_in(folder: str | os.PathLike) -> list[Path]:
    """The NIfTI files of a folder. A warning names its other files, except for tables, texts and pictures."""
    folder, found, left_out = Path(path_text(folder)), [], {}
    series = [parent for parent in find_series(folder) if parent != folder]
    for file in find_files(folder, "*"):
        if file.parent in series:
            continue
        if file.parent != folder:
            left_out[file] = "in a folder below"
        elif NIFTI.search(file.name):
            found.append(file)
        else:
            left_out[file] = "no .nii or .nii.gz"
    others = {file: why for file, why in left_out.items() if file.suffix.lower() not in SIDE_FILES}
    others |= dict.fromkeys(series, "DICOM")
    listed = {file.relative_to(folder): why for file, why in others.items()}
    if not found:
        names = ", ".join(map(str, list(listed)[:5])) or "none"
        raise ValueError(
            f"expected NIfTI files (*.nii.gz) in {folder}, found {names}; give the folder that they are in, or convert "
            "them (DICOM: dcm2niix)."
        )
    say_left_out(f"Found {len(found)} scans in {folder}", listed)
    return found


def check_voxels(
    case: Mapping[str, Any], values: Collection[int], channels: int | None = None, ignore_index: int | None = None
) -> str:
    """Read the files of one case to their ends, and compare their voxel grids.

    A broken download often has a good header.

    Args:
        case: ``"image"``, a file or several, and ``"label"``, if there is one: see :class:`Datalist`.
        values: values that a label may have, including the background's 0.
        channels: number of channels of the image, over all its files. ``None`` accepts any number.
        ignore_index: value of voxels without a label; none of ``values``.

    Returns:
        How many slices have labels (:func:`~monai_conres.bundle.labelled_slices`), where some may have none.

    Raises:
        ValueError: when a file cannot be read, has voxels that are not finite, lies on another grid, or has other
            channels or values, or no voxel has a label. The error names the file.
    """
    return _check_voxels(case, values, channels, ignore_index, Counter())


def _check_voxels(
    case: Mapping[str, Any],
    values: Collection[int],
    channels: int | None,
    ignore_index: int | None,
    labels: Counter[int],
) -> str:
    """:func:`check_voxels`, which counts the cases with each value in ``labels``."""
    image = load_volume(case["image"])
    if channels not in (None, len(image)):
        name = stem(Path(ensure_tuple(case["image"])[0]))
        hint = "; nnU-Net's _0000 is one of several channels" if name.endswith("_0000") else ""
        raise ValueError(
            f"expected {channels} channels in the image {case['image']}, got {len(image)}{hint}; take the case out, or "
            "choose the channels that the network takes."
        )
    if "label" not in case:
        return "no slices"
    if case.get("label_header", True):
        check_same_grid([ensure_tuple(case["image"])[0], case["label"]])
    check_ignored_value(ignore_index, values)
    label = load_label(case["label"], values if ignore_index is None else {*values, ignore_index})
    if label.shape[1:] != image.shape[1:]:
        raise ValueError(
            f"expected the same size in {case['image']} and {case['label']}, got {tuple(image.shape[1:])} and "
            f"{tuple(label.shape[1:])}; take the case out."
        )
    labels.update(value for value in values if (label.as_tensor() == value).any())
    return "all slices" if ignore_index is None else labelled_slices(label, ignore_index, case["label"])


def for_each(function: Callable, items: Iterable) -> list:
    """Results of a function for each item. All its ``ValueError`` become one, with one line for each."""
    results, errors = [], []
    for item in items:
        try:
            results.append(function(item))
        except ValueError as error:
            errors.append(str(error))
    errors = list(dict.fromkeys(errors))
    if errors:
        raise ValueError("\n".join(errors[:20] + [f"... and {len(errors) - 20} more."] * (len(errors) > 20)))
    return results
