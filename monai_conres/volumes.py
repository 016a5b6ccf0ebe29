"""Scans and label maps on the disk: NIfTI files and DICOM series, read and checked.

Every reader of the package goes through :func:`read_grid` (headers) and :func:`load_volume` (voxels), so all of them
refuse the same files.
"""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import ensure_tuple, optional_import

nib, _ = optional_import("nibabel", descriptor="{}; install it with: pip install 'monai-conres[io]'")
pydicom, _ = optional_import("pydicom", descriptor="{}; install it with: pip install 'monai-conres[dicom]'")

__all__ = [
    "Grid",
    "LoadScand",
    "check_same_grid",
    "find_files",
    "find_series",
    "load_label",
    "load_volume",
    "read_grid",
    "voxel_sizes",
]

File = str | os.PathLike
Files = File | Sequence[File]

ORDINALS = ("first", "second", "third")  # axes of a file
TOLERANCE = 0.1  # voxels by which two statements about the place of a voxel may differ
FRACTION = 1e-3  # by which a stored number of a label may differ from a whole one
LARGEST = 1e9  # no scanner gives larger numbers; voxels without data are often -1e30 or the smallest float32
HEADER = "nifti_header"  # key of a MetaTensor's meta: the header of the scan's file in hexadecimal digits
MILLIMETRES = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # by NIfTI's code: unknown, meter, mm, micrometre
NIFTI = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
GZIP = b"\x1f\x8b"  # first bytes of a compressed file
DICOM_ENDINGS = (".dcm", ".ima")
DICOM_TAGS = ["SeriesInstanceUID", "InstanceNumber", "Rows", "Columns", "SamplesPerPixel", "NumberOfFrames"]
DICOM_TAGS += ["PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient", "RescaleSlope", "RescaleIntercept"]
DICOM_TAGS += ["SliceThickness", "SpacingBetweenSlices"]  # of a single slice


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a NIfTI file or a DICOM series lie.

    Attributes:
        file: the file, or the folder of the series.
        shape: number of voxels along the three axes.
        affine: from the indices of a voxel to its place in mm, ``(4, 4)``, in RAS.
        channels: number of channels.
        header: the header of the NIfTI file as it is stored; None for a series.
    """

    file: Path
    shape: tuple[int, ...]
    affine: np.ndarray
    channels: int = 1
    header: Any = None

    def agrees(self, other: Grid) -> bool:
        """Whether another grid has the same size, and its voxels lie in the same places."""
        return other.shape == self.shape and self.shift(other.affine) <= TOLERANCE

    def shift(self, affine: np.ndarray) -> float:
        """How far the corners lie from their places by another affine, in voxels."""
        ends = np.meshgrid(*([0, size - 1] for size in self.shape), [1], indexing="ij")
        corners = np.stack(ends, -1).reshape(-1, 4)
        return float(np.abs(corners @ (np.linalg.inv(self.affine) @ affine - np.eye(4)).T).max())


def read_grid(file: File) -> Grid:
    """Read and check the header of a NIfTI file, or the headers of a folder with one DICOM series.

    A NIfTI header may have a qform, an sform, neither, or both where they agree. Meters and micrometres become mm. The
    slices of a series lie in the order of their positions, from the smaller to the larger instance number.

    Raises:
        ValueError: when there is no such file, or its headers cannot be read, contradict each other or leave the place
            of a voxel open. The error names the file.

    Example:
        >>> import tempfile
        >>> import nibabel as nib
        >>> file = Path(tempfile.mkdtemp(), "scan.nii.gz")
        >>> nib.save(nib.Nifti1Image(np.zeros((4, 5, 6)), np.diag([2.0, 2.0, 3.0, 1.0])), file)
        >>> read_grid(file).shape, read_grid(file).affine.diagonal().tolist()
        ((4, 5, 6), [2.0, 2.0, 3.0, 1.0])
    """
    file = Path(file)
    if not file.exists():
        raise ValueError(f"expected the file {file}, found none; {_similar_names(file)}")
    return _read_series(file)[0] if file.is_dir() else _read_nifti(file)[0]


def check_same_grid(files: Sequence[File]) -> None:
    """Raise unless the voxels of NIfTI files or DICOM series lie in the same places, up to a tenth of a voxel.

    Raises:
        ValueError: as :func:`read_grid`, or when a size or an affine differs from the first file. The error names both
            files.
    """
    first, *others = map(read_grid, files)
    for other in others:
        _check_same(first, other)


def _check_same(first: Grid, other: Grid) -> None:
    if other.shape != first.shape:
        raise ValueError(
            f"expected the same size in {first.file} and {other.file}, got {first.shape} and {other.shape}; resample "
            "one of them, or take them out."
        )
    if (shift := first.shift(other.affine)) > TOLERANCE:
        raise ValueError(
            f"expected the same affine in {first.file} and {other.file}, got corners that lie up to {shift:.3g} voxels "
            "apart; repair the header that is wrong, resample one of them, or take them out."
        )


def load_volume(file: Files) -> MetaTensor:
    """Load an image or label ``(c, *spatial)`` in float32 from a NIfTI file or from a folder with one DICOM series.

    Several files give the channels of one image. The first file gives the affine, in mm.

    Raises:
        ValueError: as :func:`read_grid`, or when a file cannot be read to its end, has voxels that are not finite or
            larger than 1e9 in size, or lies on another grid than the first one. The error names the file.
    """
    parts = [_load_file(Path(each)) for each in ensure_tuple(file)]
    grid = parts[0][0]
    for other, _ in parts[1:]:
        _check_same(grid, other)
    voxels = torch.cat([part for _, part in parts]) if len(parts) > 1 else parts[0][1]
    meta = {
        "filename_or_obj": str(grid.file),
        "original_affine": grid.affine.copy(),
        "spatial_shape": np.asarray(grid.shape),
        "original_channel_dim": -1 if len(voxels) > 1 else float("nan"),
        "space": "RAS",
    }
    if grid.header is not None:
        meta[HEADER] = grid.header.binaryblock.hex()
    return MetaTensor(voxels, affine=torch.from_numpy(grid.affine.copy()), meta=meta)


def load_label(file: File, values: Collection[int] | None = None) -> MetaTensor:
    """Load a label map ``(1, *spatial)`` of whole numbers in float32.

    Programs that store scaled numbers write 0.99999 for 1. So a number up to 0.001 from a whole number becomes the
    whole number.

    Args:
        file: a NIfTI file or a folder with one DICOM series.
        values: the values that the label may have; ``None`` accepts whole numbers from 0 to 255.

    Raises:
        ValueError: as :func:`load_volume`, or when there are several channels, numbers that are not whole, or other
            values than ``values``.
    """
    label = load_volume(file)
    if len(label) != 1:
        raise ValueError(f"expected one channel in {file}, got {len(label)}; store classes as numbers.")
    voxels = label.as_tensor()
    whole = voxels.round()
    if not torch.allclose(voxels, whole, rtol=0, atol=FRACTION):
        found = sorted({f"{value:.6g}" for value in voxels[voxels != whole][:100000].tolist()}, key=float)
        raise ValueError(
            f"expected whole numbers in the label {file}, got {', '.join(found[:5])}; if it is an image, give the "
            "label; if it was resampled, do so again with the nearest neighbor, or take the case out."
        )
    voxels.copy_(whole)
    if values is None:  # torch.isin would sort all voxels
        known, others = "0 to 255", voxels[(voxels < 0) | (voxels > 255)]
    else:
        known = str(sorted(values))
        others = voxels[~torch.isin(voxels, torch.tensor(sorted(values), dtype=voxels.dtype))]
    if len(others):
        found = sorted(set(others[:100000].tolist()))
        raise ValueError(
            f"expected the values {known} in {file}, got {found[:5]}; repair the file, take the case out, or "
            "name the value of voxels without a label (--ignore, in Python ignore_index)."
        )
    return label


def voxel_sizes(volume: MetaTensor | Grid) -> list[float]:
    """Size of a voxel along each axis in mm, for distances.

    Raises:
        ValueError: when the axes are not perpendicular, as in a sheared scan: then indices times sizes are no distance.

    Example:
        >>> voxel_sizes(MetaTensor(torch.zeros(1, 4, 5, 6), affine=torch.diag(torch.tensor([2.0, 2.0, 3.0, 1.0]))))
        [2.0, 2.0, 3.0]
    """
    affine = torch.as_tensor(volume.affine).cpu().double().numpy()
    if sheared(affine):
        name = volume.file if isinstance(volume, Grid) else volume.meta.get("filename_or_obj", "the volume")
        raise ValueError(
            f"expected perpendicular axes for distances in mm, got the sheared affine {affine[:3, :3].tolist()} of "
            f"{name}; resample scan and label to perpendicular axes, or measure only the Dice."
        )
    return [round(float(size), 6) for size in np.linalg.norm(affine[:3, :3], axis=0)]


def reoriented(grid: Grid) -> Grid:
    """The grid with its axes along R, A and S, as ``Orientationd("RAS")`` turns a volume."""
    turn = nib.io_orientation(grid.affine)
    shape = tuple(grid.shape[int(axis)] for axis in turn[:, 0].argsort())
    return dataclasses.replace(grid, shape=shape, affine=grid.affine @ nib.orientations.inv_ornt_aff(turn, grid.shape))


def sheared(affine: np.ndarray) -> bool:
    """Whether the axes of an affine are not perpendicular."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.abs(axes.T @ axes - np.eye(3)).max() > 1e-3)


class LoadScand(MapTransform):
    """Load scans and label maps: :func:`load_volume` for dictionaries, instead of MONAI's ``LoadImaged``.

    The volumes ``(c, *spatial)`` of all keys must lie on the same grid. The key ``"label"`` goes to :func:`load_label`.

    The arguments are those of MONAI's ``MapTransform``; each key has a file, several files or the folder of a series.

    Raises:
        ValueError: as :func:`load_volume`, :func:`load_label` and :func:`check_same_grid`.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """``data`` with files replaced by volumes."""
        volumes = self.load(data)
        self.check([(ensure_tuple(data[key])[0], volume) for key, volume in volumes.items()])
        return {**data, **volumes}

    def load(self, data: Mapping[Hashable, Any]) -> dict[Hashable, MetaTensor]:
        """The volumes of the keys."""
        return {
            key: (load_label if key == "label" else load_volume)(data[key]) for key in self.key_iterator(dict(data))
        }

    def check(self, loaded: Sequence[tuple[File, MetaTensor]]) -> None:
        """Raise unless all volumes have the grid of the first one."""
        grids = [Grid(Path(file), tuple(volume.shape[1:]), volume.affine.numpy()) for file, volume in loaded]
        for other in grids[1:]:
            _check_same(grids[0], other)


def find_files(folder: File, pattern: str) -> list[Path]:
    """Files at any depth whose names match a pattern in lower case, sorted. The case of the names does not matter.

    The function leaves out hidden files and folders. It follows links to folders, into each folder once.
    """
    found: list[Path] = []
    seen: set[str] = set()
    for here, folders, names in os.walk(Path(folder), followlinks=True):
        if (real := os.path.realpath(here)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(here, name) for name in names if fnmatch(name.lower(), pattern) and not name.startswith(".")]
    return sorted(found)


def find_series(folder: File) -> list[Path]:
    """Folders at any depth with DICOM files, whatever the endings of their names, sorted."""
    parents: dict[Path, bool] = {}
    for file in find_files(folder, "*"):
        if not parents.get(file.parent) and not NIFTI.search(file.name):
            parents[file.parent] = file.suffix.lower() in DICOM_ENDINGS or _is_dicom(file)
    return [parent for parent, found in parents.items() if found]


def stem(file: Path) -> str:
    """The name of a NIfTI file without its ending."""
    return NIFTI.sub("", file.name)


def repeated(names: Sequence[str]) -> str | None:
    """The first name that occurs more than once, or None."""
    return next((name for name, number in Counter(names).items() if number > 1), None)


def say_left_out(found: str, left_out: Mapping[Any, str]) -> None:
    """Warn about files that are not read: what was found, and each file with the reason."""
    if left_out:
        listed = [f"{name} ({reason})" for name, reason in left_out.items()]
        more = [f"and {len(listed) - 10} more"] * (len(listed) > 10)
        warnings.warn(f"{found}; left out {', '.join([*listed[:10], *more])}.", stacklevel=3)


def brief(error: BaseException) -> str:
    """An error's type and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


# NIfTI


def _read_nifti(file: Path) -> tuple[Grid, Any]:
    """The checked grid of a NIfTI file, and nibabel's image."""
    try:
        image = nib.load(file)
        header = image.header
        if not isinstance(header, nib.Nifti1Header):
            raise TypeError(f"it is a {type(image).__name__}")
        # nibabel repairs a header that it loads: some of these repairs are guesses
        with image.file_map["header" if "header" in image.file_map else "image"].get_prepare_fileobj("rb") as stream:
            raw = type(header).from_fileobj(stream, check=False)
        shape, affine = tuple(map(int, header.get_data_shape())), header.get_best_affine()
        qform = header.get_qform(coded=True)[0]
    except Exception as error:
        raise ValueError(f"expected a NIfTI file, cannot read {file} ({brief(error)}); {_remedy(file)}.") from error
    codes = [int(raw["sform_code"]), int(raw["qform_code"])]
    unit, voxel = int(raw["xyzt_units"]) % 8, np.abs(raw["pixdim"][1:4]).astype(float)
    edges = np.linalg.norm(affine[:3, :3], axis=0)
    if not 2 <= len(shape) <= 4 or min(shape) < 1:
        wrong = f"a volume, three axes and at most one for channels, got the shape {shape}"
    elif not 0 <= min(codes) <= max(codes) <= 5:
        wrong = f"codes of sform and qform from 0 to 5, got {codes}"
    elif np.isinf([raw["scl_slope"], raw["scl_inter"]]).any():
        wrong = f"a finite scale of the voxels, got {float(raw['scl_slope'])} and {float(raw['scl_inter'])},"
    elif unit not in MILLIMETRES:
        wrong = f"a unit of mm, meters or micrometres, got the code {unit}"
    elif not (np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 1e-3 * edges.prod() > 0):
        wrong = f"an affine of three axes, got {affine[:3].tolist()}"
    elif not np.allclose(edges, voxel, rtol=0.01, atol=0):
        wrong = f"one voxel size, got {edges.round(4).tolist()} (affine) and {voxel.round(4).tolist()} (pixdim),"
    elif min(codes) and not (away := Grid(file, (*shape, 1)[:3], affine).shift(qform)) <= TOLERANCE:
        wrong = (
            f"the same place of each voxel by sform and qform, got corners that lie up to {away:.3g} voxels apart, "
            f"sform {affine[:3].round(4).tolist()} and qform {qform[:3].round(4).tolist()},"
        )
    else:
        return dataclasses.replace(stored_grid(header), file=file), image
    raise ValueError(f"expected {wrong} in the header of {file}; repair it, or take the file out.")


def _remedy(file: Path) -> str:
    """What to do about a file that is no NIfTI file."""
    if not NIFTI.search(file.name):
        return "fetch it again, or convert the scan to .nii.gz"
    with suppress(OSError), file.open("rb") as stream:
        start = stream.read(2)
        if start and (start == GZIP) != file.name.lower().endswith(".gz"):
            ending, is_compressed = (".nii.gz", "is") if start == GZIP else (".nii", "is not")
            return f"it {is_compressed} compressed: if it is a NIfTI file, rename it to {stem(file)}{ending}"
    return "fetch it again"


def stored_grid(header: Any) -> Grid:
    """The grid of a valid NIfTI header. A file of two dimensions holds one slice."""
    shape, affine = tuple(map(int, header.get_data_shape())), header.get_best_affine().astype(float)
    affine[:3] *= MILLIMETRES[int(header["xyzt_units"]) % 8]
    return Grid(Path(), (*shape, 1)[:3], affine, channels=shape[3] if len(shape) > 3 else 1, header=header)


def stored_header(volume: MetaTensor) -> Any:
    """The header of the NIfTI file that a volume was loaded from, or None."""
    block = bytes.fromhex(volume.meta.get(HEADER, ""))
    if not block:
        return None
    kind = nib.Nifti1Header if len(block) == nib.Nifti1Header.sizeof_hdr else nib.Nifti2Header
    return kind(block, check=False)


def _missing(dataset: Any) -> str:
    """What to do where pydicom cannot read the pixels of a file."""
    from pydicom.pixels import get_decoder

    with suppress(Exception):
        syntax = dataset.file_meta.TransferSyntaxUID
        if syntax.is_compressed and not get_decoder(syntax).is_available:
            return f"for {syntax.name} install 'pylibjpeg[all]', or convert the series to NIfTI"
    return "fetch it again"


def _load_file(file: Path) -> tuple[Grid, torch.Tensor]:
    """The grid and the voxels ``(c, *spatial)`` in float32 of a NIfTI file or a DICOM series."""
    if file.is_dir():
        grid, datasets = _read_series(file, pixels=True)
        try:
            array = np.stack([_pixels(dataset) for dataset in datasets], -1)[None]
        except Exception as error:
            raise ValueError(
                f"expected the pixels of a DICOM series, cannot read {file} ({brief(error)}); {_missing(datasets[0])}."
            ) from error
    else:
        if not file.exists():
            read_grid(file)
        grid, image = _read_nifti(file)
        try:
            if image.header.get_data_dtype().kind not in "iufb":
                raise TypeError(f"expected one number in each voxel, got {image.header.get_data_dtype()}")
            with np.errstate(all="ignore"):
                stored = np.asarray(image.dataobj, dtype=np.float32)
            array = np.moveaxis(stored.reshape(*grid.shape, grid.channels), -1, 0)
        except Exception as error:
            raise ValueError(f"expected an image, cannot read {file} ({brief(error)}); fetch it again.") from error
    voxels = torch.from_numpy(np.ascontiguousarray(array))
    if not float(voxels.abs().amax()) < LARGEST:  # also NaN
        wrong = voxels[~(voxels.abs() < LARGEST)]
        found = "NaN" if wrong.isnan().any() else f"{wrong[0]:.4g}"
        raise ValueError(
            f"expected finite numbers in {file}, below {LARGEST:g} in size, got {found} in {len(wrong)} voxels; give "
            "voxels without data the value of the background, or take the case out."
        )
    return grid, voxels


def _similar_names(file: Path) -> str:
    """What to do about a file that is missing."""
    name = stem(file)
    ending = file.name[len(name) :]
    others = [f"{name}_0000{ending}", re.sub(r"_\d{4}$", "", name) + ending]
    if found := [other for other in others if other != file.name and file.with_name(other).exists()]:
        return f"there is {found[0]}: nnU-Net adds _0000 to the names of images; rename the files, or list these names."
    return "check its name and its folder."


# DICOM


def _is_dicom(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _pixels(dataset: Any) -> np.ndarray:
    """The values ``(columns, rows)`` of a slice."""
    values = pydicom.pixels.apply_modality_lut(dataset.pixel_array, dataset)
    if values.shape != (dataset.Rows, dataset.Columns):
        raise ValueError(f"expected {dataset.Rows} x {dataset.Columns} pixels, got {values.shape}")
    return values.astype(np.float32).T


def _read_series(folder: Path, *, pixels: bool = False) -> tuple[Grid, list[Any]]:
    """The checked grid of the series in a folder, and its datasets in the order of the slices."""
    found, left_out = {}, {}
    for file in sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")):
        if not _is_dicom(file) and file.suffix.lower() not in DICOM_ENDINGS:
            left_out[file.name] = "no DICOM file"
            continue
        try:
            tags = None if pixels else DICOM_TAGS
            found[file] = pydicom.dcmread(file, stop_before_pixels=not pixels, specific_tags=tags)
        except Exception as error:
            raise ValueError(f"expected a DICOM file, cannot read {file} ({brief(error)}); fetch it again.") from error
    slices = {file: dataset for file, dataset in found.items() if "Rows" in dataset}
    if not slices:
        below = [str(parent) for parent in find_series(folder) if parent != folder]
        remedy = (
            f"give one of the folders below it: {', '.join(below[:5])}" if below else "check the name of the folder"
        )
        raise ValueError(f"expected a DICOM series in {folder}, found no DICOM image; {remedy}.")
    try:
        kinds = {"", *map(_kind, slices.values())}
        for file in found.keys() - slices.keys():  # a report, or a slice that is cut or broken
            if _kind(found[file]) in kinds:
                raise ValueError(f"{file.name} has no Rows")
            left_out[file.name] = "no image"
        ordered, affine = _place_slices(slices)
        size = int(slices[ordered[0]].Columns), int(slices[ordered[0]].Rows), len(ordered)
    except Exception as error:  # pydicom reads an element when it is asked for
        reason = str(error) if type(error) is ValueError else brief(error)
        raise ValueError(
            f"expected one DICOM series with evenly spaced slices in {folder}: {reason}; complete or separate the "
            "series, or convert it to NIfTI (dcm2niix) and look at the result."
        ) from error
    if pixels:
        say_left_out(f"Found {len(slices)} DICOM slices in {folder}", left_out)
    return Grid(folder, size, affine), [slices[file] for file in ordered]


def _kind(dataset: Any) -> str:
    """The name of a DICOM file's kind, as its first bytes say; nothing for an unknown one."""
    kind = pydicom.uid.UID(dataset.file_meta.get("MediaStorageSOPClassUID", ""))
    return "" if kind.name == kind else kind.name


def _place_slices(slices: Mapping[Path, Any]) -> tuple[list[Path], np.ndarray]:
    """The files in the order of their positions, and the affine ``(4, 4)`` in RAS."""
    files = list(slices)
    for file, dataset in slices.items():
        if int(dataset.get("NumberOfFrames") or 1) > 1:
            raise ValueError(f"{file.name} has several frames (enhanced DICOM)")
        if int(dataset.get("SamplesPerPixel") or 1) != 1:
            raise ValueError(f"{file.name} has colors")
    for tag in ("SeriesInstanceUID", "Rows", "Columns"):
        if len(found := {str(dataset.get(tag)) for dataset in slices.values()}) > 1:
            raise ValueError(f"the {len(files)} files have {len(found)} different values of {tag}")
    rescaled = [(tag in dataset) for dataset in slices.values() for tag in ("RescaleSlope", "RescaleIntercept")]
    if any(rescaled) and not all(rescaled):
        raise ValueError("some of the files lack RescaleSlope or RescaleIntercept")
    positions, orientations, spacings = (
        np.stack([_numbers(file, slices[file], tag, count) for file in files])
        for tag, count in (("ImagePositionPatient", 3), ("ImageOrientationPatient", 6), ("PixelSpacing", 2))
    )
    for tag, values, tolerance in (("ImageOrientationPatient", orientations, 1e-3), ("PixelSpacing", spacings, 1e-4)):
        if (different := np.abs(values - values[0]).max(1)).max() > tolerance:
            raise ValueError(f"{files[0].name} and {files[int(different.argmax())].name} differ in {tag}")
    row, column = orientations[0, :3], orientations[0, 3:]
    if not np.allclose([row @ row, column @ column, row @ column], [1, 1, 0], atol=1e-3) or spacings[0].min() <= 0:
        raise ValueError(f"ImageOrientationPatient {orientations[0].tolist()} and PixelSpacing {spacings[0].tolist()}")
    normal = np.cross(row, column)
    order = np.argsort(positions @ normal, kind="stable")
    numbers = [slices[files[index]].get("InstanceNumber") for index in order[[0, -1]]]
    if None not in numbers and int(numbers[0]) > int(numbers[1]):
        order = order[::-1]
    ordered, places = [files[index] for index in order], positions[order]
    if len(files) == 1:
        tag = "SpacingBetweenSlices" if slices[files[0]].get("SpacingBetweenSlices") else "SliceThickness"
        step = normal * _numbers(files[0], slices[files[0]], tag, 1)[0]
    else:
        step = (places[-1] - places[0]) / (len(files) - 1)
    if not abs(step @ normal) > 1e-3:
        raise ValueError(f"{ordered[0].name} and {ordered[-1].name} are at the same position")
    affine = np.eye(4)
    affine[:3] = np.stack([row * spacings[0, 1], column * spacings[0, 0], step, places[0]], -1)
    away = (places - places[0]) @ np.linalg.inv(affine[:3, :3]).T - np.arange(len(files))[:, None] * [0, 0, 1]
    if np.abs(away).max() > TOLERANCE:
        gaps = np.diff(places @ normal) * np.sign(step @ normal)
        if gaps.min() < 1e-3:
            worst = int(gaps.argmin())
            raise ValueError(f"{ordered[worst].name} and {ordered[worst + 1].name} are at the same position")
        worst = int(np.abs(gaps - np.median(gaps)).argmax())
        raise ValueError(
            f"the gaps between the {len(files)} slices are {gaps.min():.4g} to {gaps.max():.4g} mm, the one between "
            f"{ordered[worst].name} and {ordered[worst + 1].name} {gaps[worst]:.4g} mm"
        )
    return ordered, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _numbers(file: Path, dataset: Any, tag: str, count: int) -> np.ndarray:
    """The numbers of a DICOM header."""
    try:
        values = np.atleast_1d(np.asarray(dataset.get(tag), dtype=float))
    except (TypeError, ValueError):
        values = np.empty(0)
    if values.shape != (count,) or not np.isfinite(values).all():
        raise ValueError(f"{file.name} has {dataset.get(tag, 'nothing')} as {tag}")
    return values
