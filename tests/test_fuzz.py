"""Damaged files: a ``ValueError`` that names the file, or what the file says; never a wrong or half written result."""

from __future__ import annotations

import gzip
import logging
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch

from monai_conres import ConResNet
from monai_conres.__main__ import main
from monai_conres.files import save_network
from monai_conres.scans import ScanSettings
from monai_conres.volumes import load_volume
from tests.nih import write_series

SIZE = (9, 8, 7)
AFFINE = np.array([[0, -2.0, 0, 17], [1.5, 0, 0, -8], [0, 0, 3.0, 9], [0, 0, 0, 1]])
SPECIAL = [0, 1, -1, 2, 5, 7, 255, 32767, -32768, np.nan, np.inf, -np.inf, 1e30, -1e30, 1e-30]
SECONDS = [pytest.param(2, id="seconds"), pytest.param(60, id="a minute", marks=pytest.mark.slow)]


def damaged(content: bytes, random: np.random.Generator) -> bytes:
    """A NIfTI file with one to three bytes or one field of its header changed, or a piece missing."""
    changed = bytearray(content)
    match random.integers(4):
        case 0:
            for place in random.integers(352, size=random.integers(1, 4)):
                changed[place] = random.integers(256)
        case 1:
            header = np.frombuffer(changed, nib.Nifti1Header.template_dtype, count=1)[0]
            name = str(random.choice([name for name in header.dtype.names if header.dtype[name].kind != "S"]))
            with np.errstate(all="ignore"):
                value = np.float64(random.choice(SPECIAL)).astype(header.dtype[name].base)
            if header[name].ndim:
                header[name][random.integers(header[name].size)] = value
            else:
                header[name] = value
        case 2:
            return content[: random.integers(len(content))]
        case 3:  # the voxels too
            place = random.integers(352, len(content))
            changed[place : place + 4] = random.integers(256, size=4, dtype=np.uint8).tobytes()
    return bytes(changed)


def rounds(seconds: float, seed: int) -> Iterator[tuple[int, np.random.Generator]]:
    """Numbered random generators, at most 600 of them, until the time is over."""
    end = time.monotonic() + seconds
    for number in range(600):
        if time.monotonic() > end:
            return
        yield number, np.random.default_rng((seed, number))


@pytest.fixture(autouse=True)
def _quiet():
    """Nibabel and pydicom complain about what they repair."""
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def nifti(values: np.ndarray) -> bytes:
    image = nib.Nifti1Image(values, AFFINE)
    image.set_qform(AFFINE, code=1)
    image.header.set_xyzt_units("mm")
    return image.to_bytes()


def check_volume(file: Path) -> None:
    """What was read equals what nibabel says, without the package."""
    volume, image = load_volume(file), nib.load(file)
    expected = image.affine
    expected[:3] *= {1: 1000, 3: 0.001}.get(int(image.header["xyzt_units"]) & 7, 1)
    np.testing.assert_allclose(volume.affine, expected)
    values = image.get_fdata(dtype=np.float32)
    values = (
        np.moveaxis(values, 3, 0)
        if values.ndim == 4
        else values.reshape(1, *values.shape[:3], *[1] * (3 - values.ndim))
    )
    np.testing.assert_array_equal(volume.numpy(), values)
    assert np.isfinite(values).all()
    if image.header["sform_code"] > 0 and image.header["qform_code"] > 0:
        corner = np.array([*volume.shape[1:], 1]) - [1, 1, 1, 0]
        away = np.linalg.inv(image.get_sform()) @ (image.get_qform() @ corner) - corner
        assert np.abs(away).max() < 0.11


def outcome(read: Callable[[], None], name: str) -> str:
    try:
        read()
        return "read"
    except ValueError as error:
        message = str(error)
    assert name in message
    assert len(message) < 2000
    return "refused"


def check_share(seen: Counter) -> None:
    """Both outcomes occur, in enough rounds."""
    if seen.total() > 60:  # a busy machine does less in the time
        assert min(seen["read"], seen["refused"]) > 0


@pytest.mark.parametrize("seconds", SECONDS)
@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_damaged_nifti_is_refused_or_read_as_it_says(tmp_path, seconds, ending):
    content = nifti(np.random.default_rng(0).integers(0, 200, SIZE).astype(np.int16))
    seen: Counter = Counter()
    for number, random in rounds(seconds, seed=1):
        file = tmp_path / f"scan{number}.{ending}"
        if ending == "nii":
            file.write_bytes(damaged(content, random))
        elif random.random() < 0.7:
            file.write_bytes(gzip.compress(damaged(content, random), 1))
        else:
            packed = bytearray(gzip.compress(content, 1))
            packed[random.integers(len(packed))] ^= 1 << random.integers(8)
            file.write_bytes(packed[: random.integers(len(packed))] if random.random() < 0.5 else packed)
        seen[outcome(lambda file=file: check_volume(file), file.name)] += 1
        file.unlink()
    check_share(seen)


@pytest.mark.parametrize("seconds", SECONDS)
def test_damaged_series_is_refused_or_read_as_it_says(tmp_path, seconds):
    values = np.random.default_rng(0).integers(-900, 900, (6, 5, 4))
    write_series(tmp_path / "whole", values)
    seen: Counter = Counter()
    for number, random in rounds(seconds, seed=2):
        folder = tmp_path / f"series{number}"
        shutil.copytree(tmp_path / "whole", folder)
        file = sorted(folder.iterdir())[random.integers(4)]
        content = bytearray(file.read_bytes())
        match random.integers(4):
            case 0:
                file.write_bytes(content[: random.integers(len(content))])
            case 1:
                file.unlink() if random.random() < 0.5 else shutil.copy(file, folder / "again.dcm")
            case 2:
                for place in random.integers(128, len(content), size=random.integers(1, 4)):
                    content[place] = random.integers(256)
                file.write_bytes(content)
            case 3:
                dataset = pydicom.dcmread(file)
                tags = ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "InstanceNumber", "Rows"]
                tags += ["SeriesInstanceUID", "RescaleSlope", "Columns", "BitsAllocated", "SamplesPerPixel"]
                del dataset[str(random.choice(tags))]
                dataset.save_as(file)

        def check(folder: Path = folder) -> None:
            volume = load_volume(folder)
            for index in range(volume.shape[3]):  # each slice is that of one file, where this file says
                place = volume.affine.numpy() @ [0, 0, index, 1] * [-1, -1, 1, 1]
                datasets = [pydicom.dcmread(file) for file in folder.iterdir()]
                distances = [np.linalg.norm(np.array(d.ImagePositionPatient, float) - place[:3]) for d in datasets]
                dataset = datasets[int(np.argmin(distances))]
                assert min(distances) < 0.3
                slope, intercept = (
                    float(dataset.get(f"Rescale{name}", 1 - k)) for k, name in enumerate(("Slope", "Intercept"))
                )
                np.testing.assert_allclose(volume[0, ..., index], slope * dataset.pixel_array.T + intercept, rtol=1e-6)

        seen[outcome(check, folder.name)] += 1
        shutil.rmtree(folder)
    check_share(seen)


@pytest.mark.parametrize("seconds", SECONDS)
def test_completion_of_damaged_files_writes_all_or_nothing(tmp_path, capsys, seconds):
    scans = ScanSettings(channels=["MR"], patch_size=[8, 8, 8], classes={"core": [1]}, activation="softmax")
    torch.manual_seed(0)
    network = ConResNet(1, 2, include_background=False, channels=(8, 8), strides=((1, 1, 1),), blocks=(1, 1, 1))
    save_network(tmp_path / "run", network, scans)
    drawn = np.zeros(SIZE, np.uint8)
    drawn[2:6, 3:6, 3] = 1
    contents = {"scan": nifti(np.random.default_rng(0).normal(100, 9, SIZE).astype(np.float32)), "drawn": nifti(drawn)}
    (tmp_path / "case").mkdir()
    files = {name: tmp_path / "case" / f"{name}.nii" for name in contents}
    out = tmp_path / "case" / "volume.nii.gz"
    options = ["complete", "--network", tmp_path / "run", "--image", files["scan"], "--drawn", files["drawn"]]
    seen: Counter = Counter()
    for _, random in rounds(seconds, seed=3):
        broken = str(random.choice(["scan", "drawn"]))
        for name, file in files.items():
            file.write_bytes(damaged(contents[name], random) if name == broken else contents[name])
        code = None
        try:
            main([*map(str, options), "--out", str(out), "--next", "0"])
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        if code is not None:
            assert code == 2
            assert f"{broken}.nii" in printed.err
            assert sorted((tmp_path / "case").iterdir()) == sorted(files.values())
            seen["refused"] += 1
            continue
        written, scan = nib.load(out), nib.load(files["scan"])
        for field in ("srow_x", "srow_y", "srow_z", "sform_code", "qform_code", "quatern_b", "qoffset_x", "xyzt_units"):
            np.testing.assert_array_equal(written.header[field], scan.header[field])
        stored = np.round(np.asarray(nib.load(files["drawn"]).dataobj))  # 1e-44 is read as 0
        for number in np.flatnonzero(stored.reshape(*SIZE).any((0, 1))):
            np.testing.assert_array_equal(np.asarray(written.dataobj)[..., number], stored[..., number])
        out.unlink()
        seen["read"] += 1
    check_share(seen)
