"""Phantoms: artificial brains with nested tumors in four noisy modalities, to try things out.

``python -m monai_conres.phantom FOLDER`` writes a data set in the layout of the Medical Segmentation Decathlon, or of
BraTS 2018 with ``--layout brats``.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from monai.utils import optional_import

from monai_conres.files import atomic_path

nib, _ = optional_import("nibabel", descriptor="{}; install it with: pip install 'monai-conres[io]'")

__all__ = ["tumor_phantom", "write_phantom_brats", "write_phantom_dataset"]

MODALITIES = ("FLAIR", "T1", "T1 with contrast", "T2")
CLASSES = ("edema", "necrosis", "enhancing tumor")
# intensity of brain, edema, necrosis and enhancing tumor in each modality
_CONTRAST = np.array([[1.0, 1.45, 1.2, 1.4], [1.0, 0.85, 0.7, 0.85], [1.0, 0.95, 0.75, 1.5], [1.0, 1.4, 1.6, 1.3]])


def tumor_phantom(
    size: Sequence[int] = (48, 56, 40), *, spacing: Sequence[float] = (1.0, 1.0, 1.0), seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Make one brain with a tumor that moves and changes its shape from slice to slice.

    Args:
        size: number of voxels along x, y and z.
        spacing: voxel size in mm. The shapes in mm do not depend on the spacing.
        seed: seed of the random numbers.

    Returns:
        The image ``(4, x, y, z)`` in float32, 0 outside the head, and the label ``(x, y, z)`` in uint8: 1 is edema,
        2 necrosis, 3 enhancing tumor. The edema encloses the other two classes.

    Raises:
        ValueError: when ``size`` or ``spacing`` are not three positive numbers, or ``seed`` is negative.

    Example:
        >>> image, label = tumor_phantom((24, 28, 20))
        >>> image.shape, label.shape, np.unique(label).tolist()
        ((4, 24, 28, 20), (24, 28, 20), [0, 1, 2, 3])
    """
    if len(size) != 3 or len(spacing) != 3 or min(size) < 1 or min(spacing) <= 0:
        raise ValueError(f"expected three positive numbers each, got size={tuple(size)} and spacing={tuple(spacing)}.")
    if seed < 0:
        raise ValueError(f"expected a seed of 0 or more, got {seed}.")
    random = np.random.default_rng(seed)
    extent = np.array(size) * spacing
    position = np.stack(np.meshgrid(*((np.arange(n) + 0.5) / n for n in size), indexing="ij")) - 0.5  # -0.5 to 0.5

    head = np.linalg.norm(position / 0.46, axis=0) + 0.05 * _smooth(random, size, 4) < 1
    # the tumor's center moves with z, its radius (a share of the shortest extent) depends on the direction
    center = random.uniform(-0.15, 0.15, 3)
    waves = [np.sin(random.uniform(4, 9) * position[2] + random.uniform(0, 6)) for _ in range(2)]
    wander = np.stack([random.uniform(-0.12, 0.12) * wave for wave in waves] + [np.zeros(size)])
    radius = random.uniform(0.2, 0.3) * extent.min()
    offset = position - center[:, None, None, None] - wander
    distance = np.linalg.norm(offset * extent[:, None, None, None], axis=0) / radius
    whole = head & (distance * np.exp(0.22 * _smooth(random, size, 6)) < 1)
    inner = distance * np.exp(0.25 * _smooth(random, size, 6))
    core = whole & (inner < 0.68)
    necrosis = core & (inner + 0.12 * _smooth(random, size, 8) < 0.4)
    label = np.select([necrosis, core, whole], [2, 3, 1]).astype(np.uint8)

    texture = 0.12 * _smooth(random, size, 10)
    image = np.empty((len(MODALITIES), *size), dtype=np.float32)
    for channel, contrast in enumerate(_CONTRAST):
        # patients differ: in the contrast of each structure and in the scale
        differences = (contrast - 1) * random.uniform(0.55, 1.1, 4)
        tissue = 1 + differences[label] + texture * (1 + 0.5 * random.normal())
        field = np.exp(0.15 * _smooth(random, size, 2))
        noise = random.normal(0, 0.16, (2, *size))
        image[channel] = np.hypot(tissue * field + noise[0], noise[1]) * random.uniform(100, 900)  # Rician
    return image * head, label


def write_phantom_dataset(
    folder: str | os.PathLike,
    *,
    cases: int = 24,
    size: Sequence[int] = (48, 56, 40),
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    seed: int = 0,
) -> None:
    """Write phantoms in the layout of the Medical Segmentation Decathlon. An interrupted run leaves no folder behind.

    Args:
        folder: a folder that does not exist yet.
        cases: number of cases.
        size: number of voxels along x, y and z.
        spacing: voxel size in mm.
        seed: seed of the first case; case ``n`` has ``seed + n``.

    Raises:
        ValueError: when ``folder`` exists, or there are no cases; and as :func:`tumor_phantom`.

    Example:
        >>> import tempfile
        >>> folder = os.path.join(tempfile.mkdtemp(), "Task00_Phantom")
        >>> write_phantom_dataset(folder, cases=2, size=(12, 14, 10))
        >>> sorted(os.listdir(folder))
        ['dataset.json', 'imagesTr', 'labelsTr']
    """
    affine = np.diag([*spacing, 1.0])
    training = [{kind: f"./{kind}sTr/phantom_{n:03d}.nii.gz" for kind in ("image", "label")} for n in range(cases)]
    with _new_folder(folder, cases) as temporary:
        for kind in ("imagesTr", "labelsTr"):
            (temporary / kind).mkdir(parents=True)
        for number, case in enumerate(training):
            image, label = tumor_phantom(size, spacing=spacing, seed=seed + number)
            nib.save(nib.Nifti1Image(np.moveaxis(image, 0, -1), affine), temporary / case["image"])
            nib.save(nib.Nifti1Image(label, affine), temporary / case["label"])
        description = {
            "name": "Phantom",
            "description": "artificial brains with nested tumors",
            "tensorImageSize": "4D",
            "modality": {str(number): name for number, name in enumerate(MODALITIES)},
            "labels": {str(number): name for number, name in enumerate(("background", *CLASSES))},
            "numTraining": cases,
            "numTest": 0,
            "training": training,
            "test": [],
        }
        (temporary / "dataset.json").write_text(json.dumps(description, indent=2))


def write_phantom_brats(
    folder: str | os.PathLike,
    *,
    cases: int = 24,
    size: Sequence[int] = (48, 56, 40),
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    seed: int = 0,
) -> None:
    """Write phantoms in the layout, orientation and label values of BraTS 2018.

    Arguments and errors are those of :func:`write_phantom_dataset`.

    Example:
        >>> import tempfile
        >>> folder = os.path.join(tempfile.mkdtemp(), "Training")
        >>> write_phantom_brats(folder, cases=2, size=(12, 14, 10))
        >>> sorted(os.listdir(os.path.join(folder, "LGG", "phantom_001")))[:2]
        ['phantom_001_flair.nii.gz', 'phantom_001_seg.nii.gz']
    """
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])  # BraTS is stored in LPS
    affine[1, 3] = (size[1] - 1) * spacing[1]
    label_values = np.array([0, 2, 1, 4], dtype=np.uint8)  # of background, edema, necrosis, enhancing tumor
    with _new_folder(folder, cases) as temporary:
        for number in range(cases):
            image, label = tumor_phantom(size, spacing=spacing, seed=seed + number)
            name = f"phantom_{number:03d}"
            case = temporary / ("HGG", "LGG")[number % 2] / name
            case.mkdir(parents=True)
            for kind, volume in zip(("flair", "t1", "t1ce", "t2", "seg"), (*image, label_values[label]), strict=True):
                nib.save(nib.Nifti1Image(volume[::-1, ::-1], affine), case / f"{name}_{kind}.nii.gz")


def _new_folder(folder: str | os.PathLike, cases: int) -> AbstractContextManager[Path]:
    """A temporary folder for cases that gets the name ``folder`` at the end of the block."""
    if cases < 1:
        raise ValueError(f"expected 1 or more cases, got {cases}.")
    if os.path.exists(folder):
        raise ValueError(f"expected a folder that does not exist yet, got {os.fspath(folder)}; remove it first.")
    return atomic_path(folder)


def _smooth(random: np.random.Generator, size: Sequence[int], cells: int) -> np.ndarray:
    """Smooth noise of mean 0 and standard deviation 1: ``cells`` random values along each axis, interpolated."""
    coarse = torch.from_numpy(random.normal(size=(1, 1, *(cells,) * 3)))
    noise = F.interpolate(coarse, size=tuple(size), mode="trilinear", align_corners=True)[0, 0].numpy()
    return (noise - noise.mean()) / max(noise.std(), 1e-6)


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m monai_conres.phantom", description="Write phantoms as a data set.")
    parser.add_argument("folder", help="folder to make")
    parser.add_argument("--layout", choices=("decathlon", "brats"), default="decathlon")
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--size", type=int, nargs=3, default=(48, 56, 40), metavar=("X", "Y", "Z"), help="in voxels")
    parser.add_argument("--spacing", type=float, nargs=3, default=(1, 1, 1), metavar=("X", "Y", "Z"), help="in mm")
    parser.add_argument("--seed", type=int, default=0)
    arguments = vars(parser.parse_args())
    try:
        write = {"decathlon": write_phantom_dataset, "brats": write_phantom_brats}[arguments.pop("layout")]
        write(arguments.pop("folder"), **arguments)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    _main()
