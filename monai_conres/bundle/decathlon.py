"""Folders in the layout of the Medical Segmentation Decathlon, and a plan to train on them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from monai.data import load_decathlon_datalist
from monai.utils import optional_import

from monai_conres.bundle.datalist import Datalist
from monai_conres.files import path_text
from monai_conres.volumes import check_same_grid, find_files, read_grid, repeated, say_left_out, stem

nib, _ = optional_import("nibabel", descriptor="{}; install it with: pip install 'monai-conres[io]'")


@dataclass(frozen=True, kw_only=True)
class DecathlonDatalist(Datalist):
    """Cases of a data set in this layout, with their median shape and voxel size.

    Attributes:
        modalities: names of the images' channels in ``dataset.json``. A channel without a name has its number.
        classes: names of the classes, the background first.
        shape: median number of voxels along each axis, in the order of ``Orientationd("RAS")``.
        spacing: median size of a voxel along each axis, in mm, in that order.
    """

    modalities: tuple[str, ...]
    classes: tuple[str, ...]
    shape: tuple[float, ...]
    spacing: tuple[float, ...]

    @property
    def channels(self) -> int:
        """Number of channels of the images."""
        return len(self.modalities)


def read_decathlon(folder: str | os.PathLike, *, nnunet_folds: bool = False) -> DecathlonDatalist:
    """Read the training cases of a data set in the layout of the Medical Segmentation Decathlon.

    The function reads headers, and :meth:`Datalist.check` reads voxels.

    Args:
        folder: the folder with ``dataset.json``. nnU-Net's ``splits_final.json`` next to that file is optional.
        nnunet_folds: True makes the five folds that nnU-Net makes, if there is no ``splits_final.json``.

    Raises:
        ValueError: when ``dataset.json`` or a file it names is missing or cannot be read, image and label have
            different sizes, orientations or voxels, or two cases have one name. The error names the file.

    Example:
        >>> import tempfile
        >>> from monai_conres.phantom import write_phantom_dataset
        >>> folder = Path(tempfile.mkdtemp(), "Task00_Phantom")
        >>> write_phantom_dataset(folder, cases=3, size=(12, 14, 10))
        >>> data = read_decathlon(folder)
        >>> data.modalities, data.shape
        (('FLAIR', 'T1', 'T1 with contrast', 'T2'), (12.0, 14.0, 10.0))
        >>> [len(cases) for cases in data.split(0, folds=3)]
        [2, 1]
    """
    folder = Path(path_text(folder))
    file = folder / "dataset.json"
    description: dict = {}
    try:
        description = json.loads(file.read_text())
        labels, modalities = dict(description["labels"]), dict(description.get("modality", {}))
        cases = load_decathlon_datalist(str(file), data_list_key="training")
        if not all(case[key] and isinstance(case[key], str) for case in cases for key in ("image", "label")):
            raise ValueError("an entry of 'training' without one file as 'image' and one as 'label'")
        if sorted(map(int, labels)) != list(range(len(labels))):
            raise ValueError(f"the keys of 'labels' are {sorted(labels)}")
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        if "channel_names" in description:
            raise ValueError(
                f"expected {file} to list 'training', got nnU-Net's dataset.json without; read the folders with "
                "monai_conres.bundle.read_folders, or write the list (docs/your_data.md)."
            ) from error
        raise ValueError(
            f"expected a data set in the layout of the Medical Segmentation Decathlon, with {file} that lists "
            "'training', an image and a label for each case, and 'labels', a name for each of the classes "
            f'"0", "1", ..., got an error: {error!r}.'
        ) from error
    if (twice := repeated(list(map(str, labels.values())))) is not None:
        raise ValueError(
            f"expected a different name for each class in 'labels' of {file}, got {twice!r} more than once; give each "
            "value its own name, or make the values one in the label files."
        )
    if not cases:
        raise ValueError(f"expected cases in 'training' of {file}, got none; list an image and a label for each case.")
    shapes, spacings, channels = [], [], set()
    for case in cases:
        case["name"] = stem(Path(case["image"]))
        check_same_grid([case["image"], case["label"]])
        image = read_grid(case["image"])
        axes = nib.io_orientation(image.affine)[:, 0].argsort()  # the axes of RAS
        shapes.append(np.asarray(image.shape)[axes])
        spacings.append(np.linalg.norm(image.affine[:3, :3], axis=0)[axes])
        channels.add(image.channels)
    listed = {Path(case[key]).resolve() for case in cases for key in ("image", "label")}
    others = [other for parent in sorted({each.parent for each in listed}) for other in find_files(parent, "*.nii*")]
    say_left_out(
        f"Found {len(cases)} cases in {file}",
        {other.name: "not in dataset.json" for other in others if other.resolve() not in listed},
    )
    if len(channels) != 1:
        raise ValueError(f"expected the same number of channels in all images of {file}, got {sorted(channels)}.")
    names = sorted(case["name"] for case in cases)
    folds = _read_splits(folder / "splits_final.json", names)
    if nnunet_folds and not folds:
        order = np.random.RandomState(12345).permutation(len(names))  # as nnU-Net
        held_out = [{names[index] for index in part} for part in np.array_split(order, 5)]
        folds = [(set(names) - part, part) for part in held_out]
    classes = tuple(labels[key] for key in sorted(labels, key=int))
    return DecathlonDatalist(
        cases=cases,
        structures={name: (value,) for value, name in enumerate(classes) if value > 0},
        modalities=tuple(str(modalities.get(str(channel), channel)) for channel in range(channels.pop())),
        classes=classes,
        shape=tuple(np.median(shapes, axis=0).tolist()),
        spacing=tuple(round(float(edge), 4) for edge in np.median(spacings, axis=0)),
        folds=folds,
    )


def _read_splits(file: Path, names: Sequence[str]) -> list[tuple[set[str], set[str]]]:
    """The folds of nnU-Net's ``splits_final.json``, or none without this file."""
    if not file.is_file():
        return []
    try:
        folds = [(set(split["train"]), set(split["val"])) for split in json.loads(file.read_text())]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"expected a list of {{'train': [...], 'val': [...]}} in {file}, got {error!r}.") from error
    for training, validation in folds:
        if unknown := sorted(map(str, (training | validation) - set(names))):
            raise ValueError(
                f"expected names of cases, such as {names[0]}, in {file}, got {unknown[:5]}, {len(unknown)} of "
                f"{len(training | validation)}; correct the names, or add the cases to dataset.json."
            )
        if both := sorted(training & validation):
            raise ValueError(f"expected each case in one list of a fold of {file}, got {both[:5]} in both; keep one.")
    return folds


def training_plan(
    shape: Sequence[float], spacing: Sequence[float], *, max_voxels: int, levels: int = 4
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Patch size and strides for volumes of some shape and spacing, as nnU-Net plans them.

    A stride halves an axis while its voxels are shorter than twice the shortest ones. So the number of thick slices
    stays until the pixels are as large. The patch has about the same length in mm along every axis.

    Args:
        shape: usual number of voxels along each axis.
        spacing: usual size of a voxel along each axis, in mm.
        max_voxels: approximate size of the patch, in voxels.
        levels: number of resolutions of the network.

    Returns:
        The patch size, and the strides between the resolutions.

    Example:
        >>> training_plan((256, 256, 37), (1.25, 1.25, 7.7), max_voxels=64 * 64 * 32)
        ((96, 96, 16), ((2, 2, 1), (2, 2, 1), (2, 2, 2)))
    """
    edges = np.asarray(spacing, dtype=float)
    voxels = np.asarray(shape, dtype=float)
    strides = []
    for _ in range(levels - 1):
        divisible = voxels >= 8  # 4 voxels are left
        stride = np.where(divisible & (edges < 2 * edges.min(where=divisible, initial=np.inf)), 2, 1)
        strides.append(tuple(stride.tolist()))
        edges, voxels = edges * stride, voxels / stride
    length = max(np.multiply(shape, spacing))  # mm
    while np.prod(np.minimum(shape, length / np.asarray(spacing))) > max_voxels:
        length *= 0.98
    multiple = np.prod(strides, axis=0)
    patch = np.ceil(np.minimum(shape, length / np.asarray(spacing)) / multiple - 0.25) * multiple
    return tuple(int(size) for size in np.maximum(patch, multiple)), tuple(strides)
