from __future__ import annotations

import shutil
import warnings

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_conres.bundle import LoadPancreasCTd, check_voxels, read_pancreas_ct
from monai_conres.bundle.pancreas import FOLDS
from monai_conres.files import load_volume
from monai_conres.phantom import write_phantom_dataset
from tests.nih import ORIGIN, SPACING, write_pancreas_ct


@pytest.fixture
def folder(tmp_path):
    write_pancreas_ct(tmp_path / "data", [1, 10, 25, 60], size=(12, 14, 9))
    return tmp_path / "data"


def test_published_folds_hold_each_case_once(folder):
    assert sorted(number for fold in FOLDS for number in fold) == list(range(1, 83))
    assert [len(fold) for fold in FOLDS] == [20, 20, 21, 21]
    data = read_pancreas_ct(folder)
    assert [case["name"] for case in data.cases] == [f"PANCREAS_00{n}" for n in ("01", "10", "25", "60")]
    assert data.structures == {"pancreas": (1,)}
    held_out = [[case["name"][-2:] for case in data.split(fold)[1]] for fold in (0, 1, 3)]
    assert held_out == [["10", "25"], ["60"], ["01"]]
    assert len(read_pancreas_ct(folder, exclude=[25, 70]).cases) == 3
    with pytest.raises(ValueError, match="fold from 0 to 3, got 4"):
        data.split(4)


def test_label_gets_the_geometry_of_the_series(folder):
    case = read_pancreas_ct(folder).cases[1]
    loaded = LoadPancreasCTd(["image", "label"])(case)
    image, label = loaded["image"], loaded["label"]
    assert image.shape == label.shape == (1, 12, 14, 9)
    np.testing.assert_array_equal(image[0].numpy() >= 150, label[0].numpy() == 1)
    np.testing.assert_allclose(label.affine, image.affine)
    voxel = np.array([3, 5, 7])
    x, y, z = ORIGIN + voxel * SPACING  # LPS
    np.testing.assert_allclose((image.affine.numpy() @ [*voxel, 1])[:3], [-x, -y, z], rtol=1e-5)
    check_voxels(case, {0, 1})


def test_hidden_files_next_to_the_slices_do_not_count(folder):
    """macOS leaves such files."""
    series = folder / "PANCREAS_0001" / "study" / "series"
    expected = load_volume(series)
    (series / f"._{next(series.glob('*.dcm')).name}").write_bytes(b"no DICOM")
    case = read_pancreas_ct(folder).cases[0]
    assert case["image"] == str(series)
    torch.testing.assert_close(load_volume(case["image"]), expected)


def test_task07_has_one_structure(tmp_path):
    write_phantom_dataset(tmp_path / "data", cases=3, size=(12, 14, 10))  # three foreground classes
    data = read_pancreas_ct(tmp_path / "data")
    assert data.structures == {"pancreas": (1, 2, 3)}
    loaded = LoadPancreasCTd(["image", "label"])(data.cases[0])
    np.testing.assert_array_equal(loaded["label"][0], np.asarray(nib.load(data.cases[0]["label"]).dataobj))


def test_task07_without_labels_reads_the_test_scans(tmp_path):
    write_phantom_dataset(tmp_path / "data", cases=3, size=(12, 14, 10))
    (tmp_path / "data" / "imagesTs").mkdir()
    (tmp_path / "data" / "imagesTr" / "phantom_001.nii.gz").rename(tmp_path / "data" / "imagesTs" / "pancreas_9.nii.gz")
    data = read_pancreas_ct(tmp_path / "data", labels=False)
    assert data.cases == [{"name": "pancreas_9", "image": str(tmp_path / "data" / "imagesTs" / "pancreas_9.nii.gz")}]
    assert data.structures == {"pancreas": (1, 2)}


def test_errors_name_case_and_file(folder, tmp_path):
    label = folder / "TCIA_pancreas_labels" / "label0010.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((12, 14, 8), np.uint8), np.eye(4)), label)
    with pytest.raises(ValueError, match=r"\(12, 14, 9\).*PANCREAS_0010.*\(12, 14, 8\) in .*label0010"):
        read_pancreas_ct(folder)
    (folder / "edited").mkdir()
    shutil.copy(label, folder / "edited")
    with pytest.raises(ValueError, match=r"one label of PANCREAS_0010, .*, found .*TCIA_.* and .*edited/label0010"):
        read_pancreas_ct(folder)
    shutil.rmtree(folder / "edited")
    label.unlink()
    with pytest.raises(ValueError, match=r"label of PANCREAS_0010, label0010\.nii\.gz, found none"):
        read_pancreas_ct(folder)
    assert len(read_pancreas_ct(folder, labels=False).cases) == 4

    series = folder / "PANCREAS_0001" / "study" / "series"
    shutil.copytree(series, folder / "PANCREAS_0001" / "study" / "other")
    with pytest.raises(ValueError, match="one DICOM series for PANCREAS_0001"):
        read_pancreas_ct(folder)
    shutil.rmtree(folder / "PANCREAS_0001" / "study" / "other")
    file = next(series.glob("*.dcm"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cannot read .*PANCREAS_0001"):
        check_voxels(read_pancreas_ct(folder, labels=False).cases[0], {0, 1})

    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="found neither"):
        read_pancreas_ct(tmp_path / "empty")
    with pytest.raises(ValueError, match="expected NIfTI files"):
        read_pancreas_ct(tmp_path / "empty", labels=False)


def store_label(folder, affine, number=10) -> None:
    file = folder / "TCIA_pancreas_labels" / f"label{number:04d}.nii.gz"
    nib.save(nib.Nifti1Image(np.asarray(nib.load(file).dataobj), affine), file)


def test_slices_need_no_ending_and_other_series_are_named(folder):
    series = folder / "PANCREAS_0010" / "study" / "series"
    expected = load_volume(series)
    for number, file in enumerate(sorted(series.iterdir())):
        file.rename(series / f"IM{number}")
    (folder / "PANCREAS_0001").rename(folder / "patient1")
    with pytest.warns(
        UserWarning, match=r"Found 3 cases .*left out patient1/study/series \(a series without the name PANC"
    ):
        data = read_pancreas_ct(folder)
    torch.testing.assert_close(load_volume(data.cases[0]["image"]), expected)


def test_incomplete_series_is_refused_when_it_is_listed(folder):
    series = folder / "PANCREAS_0010" / "study" / "series"
    sorted(series.iterdir())[4].unlink()
    with pytest.raises(ValueError, match=r"evenly spaced slices in .*PANCREAS_0010.*gaps between the 8 slices"):
        read_pancreas_ct(folder)


def test_header_of_a_label_counts_where_it_can(folder):
    """Those of the collection lie elsewhere, but along the axes of the series."""
    affine = load_volume(read_pancreas_ct(folder).cases[1]["image"]).affine.numpy()
    without_origin = affine.copy()
    without_origin[:3, 3] = 0
    for accepted in (affine, without_origin, affine * [[-1], [1], [1], [1]]):
        store_label(folder, accepted)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_voxels(read_pancreas_ct(folder).cases[1], {0, 1})
    store_label(folder, affine + 50 * np.eye(4, k=3))
    with pytest.warns(UserWarning, match=r"label0010\.nii\.gz has the axes of the series .* lies 50 mm away"):
        read_pancreas_ct(folder)
    mirrored = affine @ np.diag([-1.0, 1, 1, 1])
    mirrored[:3, 3] += 11 * affine[:3, 0]  # the same places, along the first axis the other way
    store_label(folder, mirrored)
    with pytest.raises(ValueError, match=r"label0010\.nii\.gz in the order of the series .*the other way"):
        read_pancreas_ct(folder)
    c, s = np.cos(np.pi / 6), np.sin(np.pi / 6)
    store_label(folder, np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ affine)
    with pytest.raises(ValueError, match=r"the axes of the series in .*PANCREAS_0010.*, got others in .*label0010"):
        read_pancreas_ct(folder)
