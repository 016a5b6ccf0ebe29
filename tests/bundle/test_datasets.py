from __future__ import annotations

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from monai.transforms import Compose, LoadImage, Orientation

from monai_conres.bundle import check_voxels, read_decathlon, read_scans, training_plan
from monai_conres.bundle.structures import LabelToTargetd, ProbabilityToLabeld
from monai_conres.phantom import write_phantom_dataset


@pytest.fixture
def folder(tmp_path):
    write_phantom_dataset(tmp_path / "data", cases=5, size=(12, 14, 10), spacing=(1, 1, 2.5))
    return tmp_path / "data"


def test_read_decathlon(folder):
    data = read_decathlon(folder)
    assert [case["name"] for case in data.cases] == [f"phantom_00{i}" for i in range(5)]
    assert data.channels == 4
    assert data.classes == ("background", "edema", "necrosis", "enhancing tumor")
    assert data.shape == (12, 14, 10)
    assert data.spacing == (1, 1, 2.5)
    for case in data.cases:
        check_voxels(case, range(4))


def test_shape_and_spacing_are_in_the_order_of_the_prepared_volume(folder):
    """Stored with slices first, running down, as some data sets are."""
    for file in sorted(folder.glob("*Tr/*.nii.gz")):
        volume = nib.load(file)
        stored = np.moveaxis(np.asarray(volume.dataobj), 2, 0)[::-1]
        affine = np.zeros((4, 4))
        affine[2, 0], affine[0, 1], affine[1, 2], affine[3, 3] = -2.5, 1, 1, 1
        nib.save(nib.Nifti1Image(stored, affine), file)
    data = read_decathlon(folder)
    prepared = Compose([LoadImage(ensure_channel_first=True), Orientation("RAS", labels=None)])(data.cases[0]["label"])
    assert data.shape == tuple(prepared.shape[1:]) == (12, 14, 10)
    assert data.spacing == tuple(prepared.pixdim.tolist()) == (1, 1, 2.5)


@pytest.mark.parametrize(
    ("edges", "message"),
    [((-1, -1, 2.5), "same orientation, got others in the headers of"), ((1, 1, 1), "voxels of the same size")],
)
def test_image_and_label_of_other_headers(folder, edges, message):
    file = sorted(folder.glob("labelsTr/*.nii.gz"))[2]
    label = nib.load(file)
    nib.save(nib.Nifti1Image(np.asarray(label.dataobj), np.diag([*edges, 1])), file)
    with pytest.raises(ValueError, match=f"{message}.*{file.name}"):
        read_decathlon(folder)


def test_a_header_that_contradicts_itself(folder):
    """Some tools change the voxel size in one place of a header and not in the other."""
    file = folder / "imagesTr" / "phantom_001.nii.gz"
    volume = nib.load(file)
    array = np.asarray(volume.dataobj)
    header = volume.header.copy()
    header["pixdim"][3] = 5
    nib.save(nib.Nifti1Image(array, None, header), file)  # the affine is that of the sform still
    with pytest.raises(
        ValueError, match=r"phantom_001\.nii\.gz, got \[1\.0, 1\.0, 2\.5\] mm in its affine and .*5\.0\]"
    ):
        read_decathlon(folder)


@pytest.mark.parametrize(("shape", "depth"), [((12, 14), 1), ((12, 14, 10), 0)], ids=["2D", "flat"])
def test_a_file_that_is_no_volume(tmp_path, shape, depth):
    array = np.zeros(shape, np.float32)
    header = nib.Nifti1Image(array, np.eye(4)).header
    header["srow_z"][2] = depth
    nib.save(nib.Nifti1Image(array, None, header), tmp_path / "scan.nii.gz")
    with pytest.raises(ValueError, match=r"expected (a volume|an affine of three axes) in .*scan\.nii\.gz"):
        read_scans(tmp_path, {"tumor": (1,)})


def test_label_values_that_eight_bits_do_not_hold(folder):
    for values in ((0,), (1, 256), (1.5,), (-1,), 4):
        with pytest.raises(ValueError, match=r"whole numbers from 1 to 255, .* for tumor; .*MapLabelValued"):
            read_scans(folder / "imagesTr", {"tumor": values})
        for transform in (LabelToTargetd, ProbabilityToLabeld):
            with pytest.raises(ValueError, match="whole numbers from 1 to 255"):
                transform("label", {"tumor": values})


def test_two_images_of_one_name(folder):
    description = json.loads((folder / "dataset.json").read_text())
    description["training"][1] = description["training"][0]
    (folder / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"file name of its own .* got 'phantom_000' more than once"):
        read_decathlon(folder)


def test_two_scans_of_one_name(folder):
    scans = folder / "imagesTr"
    assert len(read_scans(scans, {"tumor": (1,)}).cases) == len(list(scans.glob("*.nii.gz")))
    image = nib.load(scans / "phantom_000.nii.gz")
    nib.save(image, scans / "phantom_000.nii")
    with pytest.raises(ValueError, match=r"each scan once in .*, got phantom_000\.nii and phantom_000\.nii\.gz"):
        read_scans(scans, {"tumor": (1,)})


def test_channels_and_axes_are_checked_for_every_file(folder):
    scans = folder / "imagesTr"
    data = read_scans(scans, {"tumor": (1,)})
    data.check(channels=4, progress=False)
    with pytest.raises(ValueError, match=r"expected 1 channels in the image of .*phantom_000\.nii\.gz, got 4"):
        data.check(channels=1, progress=False)
    image = nib.load(scans / "phantom_003.nii.gz")
    stored = np.asarray(image.dataobj)
    nib.save(nib.Nifti1Image(stored[..., :3], image.affine), scans / "phantom_003.nii.gz")
    nib.save(nib.Nifti1Image(stored[..., None], image.affine), scans / "phantom_004.nii.gz")
    with pytest.raises(
        ValueError,
        match=r"^expected 4 channels .*_003.*\nexpected a volume in .*_004.*got the shape \(12, 14, 10, 4, 1\)",
    ):
        data.check(channels=4, progress=False)


def test_scans_with_endings_in_capitals(folder):
    scans = folder / "imagesTr"
    for file in list(scans.iterdir()):
        file.rename(scans / file.name.upper())
    data = read_scans(scans, {"tumor": (1,)})
    assert [case["name"] for case in data.cases] == [f"PHANTOM_00{number}" for number in range(5)]
    data.check(channels=4, progress=False)


def test_seeded_folds_are_disjoint_and_complete(folder):
    data = read_decathlon(folder)
    parts = [data.split(fold, folds=3, seed=1) for fold in range(3)]
    for training, validation in parts:
        names = [case["name"] for case in training + validation]
        assert sorted(names) == [case["name"] for case in data.cases]
    held_out = [case["name"] for _, validation in parts for case in validation]
    assert len(held_out) == len(set(held_out)) == 5
    assert parts[0] == data.split(0, folds=3, seed=1)
    assert any(data.split(0, folds=3, seed=seed) != parts[0] for seed in (2, 3, 4))
    with pytest.raises(ValueError, match="fold from 0 to 2, got 3"):
        data.split(3, folds=3)


def test_folds_of_the_data_set_come_first(folder):
    splits = [{"train": [], "val": ["phantom_003", "phantom_001"]}]
    (folder / "splits_final.json").write_text(json.dumps(splits))
    training, validation = read_decathlon(folder).split(0)
    assert [case["name"] for case in validation] == ["phantom_001", "phantom_003"]
    assert len(training) == 3


@pytest.mark.parametrize(
    ("shape", "spacing", "voxels", "patch", "strides"),
    [
        ((40, 48, 40), (1, 1, 1), 10**6, (40, 48, 40), ((2, 2, 2),) * 3),
        ((256, 256, 36), (1.25, 1.25, 7.7), 48 * 56 * 48, (96, 96, 16), ((2, 2, 1), (2, 2, 1), (2, 2, 2))),
        ((6, 64, 64), (1, 1, 1), 10**6, (6, 64, 64), ((1, 2, 2),) * 3),  # too few voxels to halve
    ],
)
def test_training_plan(shape, spacing, voxels, patch, strides):
    assert training_plan(shape, spacing, max_voxels=voxels) == (patch, strides)


def test_errors_name_the_file(folder):
    image = folder / "imagesTr" / "phantom_002.nii.gz"
    label = folder / "labelsTr" / "phantom_002.nii.gz"
    whole = image.read_bytes()

    image.write_bytes(whole[: len(whole) // 2])  # the header can still be read
    case = read_decathlon(folder).cases[2]
    with pytest.raises(ValueError, match=r"cannot read .*imagesTr/phantom_002\.nii\.gz"):
        check_voxels(case, range(4))
    image.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot read .*imagesTr/phantom_002\.nii\.gz"):
        read_decathlon(folder)
    image.unlink()
    with pytest.raises(ValueError, match=r"imagesTr/phantom_002\.nii\.gz.*missing"):
        read_decathlon(folder)

    image.write_bytes(whole)
    nib.save(nib.Nifti1Image(np.zeros((12, 14, 9), np.uint8), np.eye(4)), label)
    with pytest.raises(
        ValueError, match=r"same size, got .*12, 14, 10.* in .*phantom_002.* and .*12, 14, 9.*phantom_002"
    ):
        read_decathlon(folder)
    affine = np.diag([1, 1, 2.5, 1])
    nib.save(nib.Nifti1Image(np.full((12, 14, 10), 0.5, np.float32), affine), label)
    with pytest.raises(ValueError, match=r"the values \[0, 1, 2, 3\] in .*labelsTr/phantom_002"):
        check_voxels(read_decathlon(folder).cases[2], range(4))
    nib.save(nib.Nifti1Image(np.full((12, 14, 10), 4, np.uint8), affine), label)
    with pytest.raises(ValueError, match=r"the values \[0, 1, 2, 3\] in .*labelsTr/phantom_002"):
        check_voxels(read_decathlon(folder).cases[2], range(4))

    description = json.loads((folder / "dataset.json").read_text())
    for change, message in [
        ({"labels": {"background": 0}}, "a name for each of the classes"),
        ({"labels": {"0": "background", "2": "tumor"}}, "the keys of 'labels' are"),
        ({"training": [{"image": "imagesTr/phantom_000.nii.gz"}]}, "an image and a label for each case"),
        ({"training": [{"image": ["a.nii", "b.nii"], "label": "c.nii"}]}, "without one file as 'image'"),
    ]:
        (folder / "dataset.json").write_text(json.dumps(description | change))
        with pytest.raises(ValueError, match=message):
            read_decathlon(folder)
    (folder / "dataset.json").write_text(json.dumps(description))
    (folder / "splits_final.json").write_text('[{"train": ["a"], "val": ["b"]}]')
    with pytest.raises(ValueError, match=r"got 5 and 0 of 5; are the names in splits_final\.json"):
        read_decathlon(folder).split(0)
    (folder / "splits_final.json").write_text("{")
    with pytest.raises(ValueError, match=r"splits_final\.json"):
        read_decathlon(folder)

    (folder / "dataset.json").write_text("{}")
    with pytest.raises(ValueError, match=r"dataset\.json to list 'training'"):
        read_decathlon(folder)
    (folder / "dataset.json").write_text("{")
    with pytest.raises(ValueError, match=r"dataset\.json to list"):
        read_decathlon(folder)
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match=r"found no .*dataset\.json"):
        read_decathlon(folder)


def test_real_data(real_data):
    hippocampus = read_decathlon(real_data / "Task04_Hippocampus")
    assert len(hippocampus.cases) == 260
    assert hippocampus.classes == ("background", "Anterior", "Posterior")
    assert [[len(part) for part in hippocampus.split(fold)] for fold in range(5)] == [[208, 52]] * 5
    thick = read_decathlon(real_data / "CHAOS_T2SPIR")
    assert thick.spacing == (1.25, 1.25, 7.7)
    assert thick.channels == 1
