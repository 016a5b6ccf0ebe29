from __future__ import annotations

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from monai.transforms import Compose, LoadImage, Orientation

from monai_conres.bundle import (
    check_voxels,
    read_decathlon,
    read_scans,
    training_plan,
)
from monai_conres.phantom import write_phantom_dataset


@pytest.fixture
def folder(tmp_path):
    write_phantom_dataset(tmp_path / "data", cases=5, size=(12, 14, 10), spacing=(1, 1, 2.5))
    return tmp_path / "data"


def test_read_decathlon_lists_cases_channels_and_classes(folder):
    data = read_decathlon(folder)
    assert [case["name"] for case in data.cases] == [f"phantom_00{i}" for i in range(5)]
    assert data.channels == 4
    assert data.modalities == ("FLAIR", "T1", "T1 with contrast", "T2")
    assert data.classes == ("background", "edema", "necrosis", "enhancing tumor")
    assert data.shape == (12, 14, 10)
    assert data.spacing == (1, 1, 2.5)
    data.check(channels=4, progress=False)


@pytest.mark.parametrize(
    ("modality", "expected"), [(None, ("0", "1", "2", "3")), ({"0": "T1", "2": "T2"}, ("T1", "1", "T2", "3"))]
)
def test_channels_without_a_name_have_their_number(folder, modality, expected):
    file = folder / "dataset.json"
    description = json.loads(file.read_text()) | {"modality": modality}
    if modality is None:
        del description["modality"]
    file.write_text(json.dumps(description))
    assert read_decathlon(folder).modalities == expected


def test_shape_and_spacing_have_the_axes_of_the_prepared_volume(folder):
    """Some data sets store slices first, from top to bottom."""
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
    ("size", "edges", "message"),
    [
        ((12, 14, 9), (1, 1, 2.5), r"same size in .*, got \(12, 14, 10\) and \(12, 14, 9\)"),
        ((12, 14, 10), (-1, -1, 2.5), "same affine in .*, got corners"),
        ((12, 14, 10), (1, 1, 1), "same affine in .*, got corners"),
    ],
)
def test_headers_of_image_and_label_must_agree(folder, size, edges, message):
    file = folder / "labelsTr" / "phantom_002.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros(size, np.uint8), np.diag([*edges, 1])), file)
    with pytest.raises(ValueError, match=message.replace(".*", f".*{file.name}")):
        read_decathlon(folder)


def test_read_scans_needs_different_names(folder):
    scans = folder / "imagesTr"
    assert len(read_scans(scans, {"tumor": (1,)}).cases) == 5
    nib.save(nib.load(scans / "phantom_000.nii.gz"), scans / "phantom_000.nii")
    with pytest.raises(
        ValueError, match=r"different name .*, got phantom_000 for .*phantom_000\.nii'.*phantom_000\.nii\.gz'"
    ):
        read_scans(scans, {"tumor": (1,)})


def test_read_scans_takes_endings_in_capitals(folder):
    scans = folder / "imagesTr"
    for file in list(scans.iterdir()):
        file.rename(scans / file.name.upper())
    data = read_scans(scans, {"tumor": (1,)})
    assert [case["name"] for case in data.cases] == [f"PHANTOM_00{number}" for number in range(5)]
    data.check(channels=4, progress=False)


def test_check_names_every_file_with_other_channels_or_axes(folder):
    scans = folder / "imagesTr"
    data = read_scans(scans, {"tumor": (1,)})
    with pytest.raises(ValueError, match=r"expected 1 channels in the image .*phantom_000\.nii\.gz, got 4"):
        data.check(channels=1, progress=False)
    image = nib.load(scans / "phantom_003.nii.gz")
    stored = np.asarray(image.dataobj)
    nib.save(nib.Nifti1Image(stored[..., :3], image.affine), scans / "phantom_003.nii.gz")
    nib.save(nib.Nifti1Image(stored[..., None], image.affine), scans / "phantom_004.nii.gz")
    message = r"^expected 4 channels .*_003.*\nexpected a volume, .*got the shape \(12, 14, 10, 4, 1\) .*_004"
    with pytest.raises(ValueError, match=message):
        data.check(channels=4, progress=False)


@pytest.mark.parametrize("value", [-1, 4])
def test_check_voxels_refuses_other_label_values(folder, value):
    case = read_decathlon(folder).cases[2]
    label = nib.Nifti1Image(np.full((12, 14, 10), value, np.float32), np.diag([1, 1, 2.5, 1]))
    nib.save(label, case["label"])
    with pytest.raises(ValueError, match=r"the values \[0, 1, 2, 3\] in .*labelsTr/phantom_002"):
        check_voxels(case, range(4))


def test_check_voxels_compares_the_grids(folder):
    """A plain folder of files has no reader that compares image and label."""
    case = read_decathlon(folder).cases[0]
    label = nib.load(case["label"])
    moved = label.affine.copy()
    moved[0, 3] += 9
    nib.save(nib.Nifti1Image(np.asarray(label.dataobj), moved), case["label"])
    with pytest.raises(ValueError, match=r"same affine in .*, got corners that lie up to 9 voxels apart"):
        check_voxels(case, range(4))


def test_check_voxels_reads_to_the_end(folder):
    case = read_decathlon(folder).cases[2]
    file = folder / "imagesTr" / "phantom_002.nii.gz"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    read_decathlon(folder)  # the header is complete
    with pytest.raises(ValueError, match=r"cannot read .*imagesTr/phantom_002\.nii\.gz"):
        check_voxels(case, range(4))


def test_seeded_folds_are_disjoint_and_complete(folder):
    data = read_decathlon(folder)
    parts = [data.split(fold, folds=3, seed=1) for fold in range(3)]
    for training, validation in parts:
        assert sorted(case["name"] for case in training + validation) == [case["name"] for case in data.cases]
    held_out = [case["name"] for _, validation in parts for case in validation]
    assert len(held_out) == len(set(held_out)) == 5
    assert parts[0] == data.split(0, folds=3, seed=1)
    assert any(data.split(0, folds=3, seed=seed) != parts[0] for seed in (2, 3, 4))
    with pytest.raises(ValueError, match="fold from 0 to 2, got 3"):
        data.split(3, folds=3)


def test_folds_of_the_data_set_come_first(folder):
    file = folder / "splits_final.json"
    file.write_text(json.dumps([{"train": ["phantom_004", "phantom_000"], "val": ["phantom_003", "phantom_001"]}]))
    with pytest.warns(UserWarning, match=r"2 training and 2 validation cases in fold 0; left out phantom_002"):
        training, validation = read_decathlon(folder).split(0)
    assert [case["name"] for case in validation] == ["phantom_001", "phantom_003"]
    assert [case["name"] for case in training] == ["phantom_000", "phantom_004"]
    file.write_text('[{"train": ["a"], "val": ["b"]}]')
    with pytest.raises(ValueError, match=r"such as phantom_000, in .*splits_final\.json, got \['a', 'b'\], 2 of 2"):
        read_decathlon(folder)
    file.write_text('[{"train": ["phantom_001"], "val": ["phantom_001"]}]')
    with pytest.raises(ValueError, match=r"splits_final\.json, got \['phantom_001'\] in both"):
        read_decathlon(folder)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"splits_final\.json"):
        read_decathlon(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": {"background": 0}}, "a name for each of the classes"),
        ({"modality": 4}, "an error: TypeError"),
        ({"labels": {"0": "background", "2": "tumor"}}, "the keys of 'labels' are"),
        ({"training": [{"image": "imagesTr/phantom_000.nii.gz"}]}, "an image and a label for each case"),
        ({"training": [{"image": ["a.nii", "b.nii"], "label": "c.nii"}]}, "without one file as 'image'"),
        ({"training": [{"image": "a.nii.gz", "label": "c.nii"}]}, r"expected the file .*a\.nii\.gz, found none"),
        (
            {"training": 2 * [{key: f"{key}sTr/phantom_000.nii.gz" for key in ("image", "label")}]},
            "a different name for each case, got phantom_000",
        ),
        (None, r"dataset\.json that lists 'training'"),
    ],
)
def test_errors_of_dataset_json(folder, change, message):
    file = folder / "dataset.json"
    file.write_text("{}" if change is None else json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        read_decathlon(folder)
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match=r"Decathlon, with .*No such file"):
        read_decathlon(folder)


@pytest.mark.parametrize(
    ("shape", "spacing", "voxels", "patch", "strides"),
    [
        ((40, 48, 40), (1, 1, 1), 10**6, (40, 48, 40), ((2, 2, 2),) * 3),
        ((256, 256, 36), (1.25, 1.25, 7.7), 48 * 56 * 48, (96, 96, 16), ((2, 2, 1), (2, 2, 1), (2, 2, 2))),
        ((6, 64, 64), (1, 1, 1), 10**6, (6, 64, 64), ((1, 2, 2),) * 3),  # too few voxels to halve
    ],
)
def test_training_plan_keeps_thick_slices(shape, spacing, voxels, patch, strides):
    assert training_plan(shape, spacing, max_voxels=voxels) == (patch, strides)


def test_read_decathlon_makes_the_folds_of_nnunet(real_data, tmp_path):
    folder = real_data / "Task04_Hippocampus"
    for name in ("dataset.json", "imagesTr", "labelsTr"):  # without splits_final.json
        (tmp_path / name).symlink_to(folder / name)
    data = read_decathlon(tmp_path, nnunet_folds=True)
    assert len(data.cases) == 260
    assert data.classes == ("background", "Anterior", "Posterior")
    folds = json.loads((folder / "splits_final.json").read_text())
    assert data.folds == [(set(fold["train"]), set(fold["val"])) for fold in folds]
    assert [[len(part) for part in data.split(fold)] for fold in range(5)] == [[208, 52]] * 5


def test_read_decathlon_reads_thick_slices(real_data):
    data = read_decathlon(real_data / "CHAOS_T2SPIR")
    assert (data.spacing, data.channels, data.folds) == ((1.25, 1.25, 7.7), 1, [])
