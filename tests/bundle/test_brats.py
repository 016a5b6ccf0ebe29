from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_conres.bundle import read_brats
from monai_conres.phantom import write_phantom_brats, write_phantom_dataset
from monai_conres.scans import label_values, structure_masks

SIZE = (12, 14, 10)
NAMES_2023 = {"flair": "t2f", "t1": "t1n", "t1ce": "t1c", "t2": "t2w", "seg": "seg"}


def save(path, values=0, size=SIZE, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.full(size, values, np.int16), np.eye(4) if affine is None else affine), path)


@pytest.fixture
def folder(tmp_path):
    write_phantom_brats(tmp_path / "data", cases=4, size=SIZE)
    return tmp_path / "data"


def test_channels_have_the_order_of_the_modalities(folder):
    data = read_brats(folder, ["t2", "flair"])
    assert [case["name"] for case in data.cases] == ["phantom_000", "phantom_002", "phantom_001", "phantom_003"]
    assert [file.rsplit("_", 1)[1] for file in data.cases[0]["image"]] == ["t2.nii.gz", "flair.nii.gz"]
    assert data.cases[0]["label"].endswith("HGG/phantom_000/phantom_000_seg.nii.gz")


def test_hold_out_draws_cases_by_the_seed(folder):
    data = read_brats(folder)
    training, validation = data.hold_out(1, seed=3)
    assert (len(training), len(validation)) == (3, 1)
    assert data.hold_out(1, seed=3)[1] == validation
    assert len({data.hold_out(1, seed=seed)[1][0]["name"] for seed in range(20)}) == 4
    with pytest.raises(ValueError, match="1 to 3 of the 4 cases to hold out, got 35"):
        data.hold_out(35)


@pytest.mark.parametrize(
    ("name", "files", "enhancing"),
    [
        ("BraTS20_Training_001", {kind: f"BraTS20_Training_001_{kind}.nii" for kind in NAMES_2023}, 4),
        ("BraTS2021_00000", {kind: f"BraTS2021_00000_{kind}.nii.gz" for kind in NAMES_2023}, 4),
        ("BraTS-GLI-00000-000", {k: f"BraTS-GLI-00000-000-{name}.nii.gz" for k, name in NAMES_2023.items()}, 3),
        # only the label of this case has another name in 2020
        ("BraTS20_Training_355", {k: f"x_{k}.nii" for k in NAMES_2023} | {"seg": "W39_1998.09.19_Segm.nii"}, 4),
    ],
)
def test_read_brats_takes_the_names_of_other_years(tmp_path, name, files, enhancing):
    for file in files.values():
        save(tmp_path / name / file)
    data = read_brats(tmp_path)
    (case,) = data.cases
    assert case["name"] == name
    expected = [str(tmp_path / name / files[kind]) for kind in ("flair", "t1", "t1ce", "t2", "seg")]
    assert [*case["image"], case["label"]] == expected
    label = torch.tensor([[0, 1, 2, enhancing]])
    assert structure_masks(label, data.structures).tolist() == [[0, 0, 0, 1], [0, 1, 1, 1], [0, 1, 0, 1]]


def test_task01_has_other_label_values(tmp_path):
    write_phantom_dataset(tmp_path / "data", cases=2, size=SIZE)  # 1 edema, 2 necrosis, 3 enhancing tumor
    data = read_brats(tmp_path / "data")
    masks = structure_masks(torch.tensor([[0, 1, 2, 3]]), data.structures)
    assert dict(zip(data.structures, masks.tolist(), strict=True)) == {
        "ET": [0, 0, 0, 1],
        "WT": [0, 1, 1, 1],
        "TC": [0, 0, 1, 1],
    }
    # the softmax classes have the same order: enhancing tumor, necrosis, edema
    assert label_values(data.structures) == [3, 2, 1]
    write_phantom_brats(tmp_path / "2018", cases=1, size=SIZE)
    assert label_values(read_brats(tmp_path / "2018").structures) == [4, 1, 2]
    with pytest.raises(ValueError, match=r"Task01 .* in this order, got \['flair'\]"):
        read_brats(tmp_path / "data", ["flair"])


def test_task01_without_labels_reads_the_test_scans(tmp_path):
    write_phantom_dataset(tmp_path / "data", cases=2, size=SIZE)
    (tmp_path / "data" / "imagesTs").mkdir()
    (tmp_path / "data" / "imagesTr" / "phantom_001.nii.gz").rename(tmp_path / "data" / "imagesTs" / "BRATS_9.nii.gz")
    data = read_brats(tmp_path / "data", labels=False)
    assert data.cases == [{"name": "BRATS_9", "image": str(tmp_path / "data" / "imagesTs" / "BRATS_9.nii.gz")}]
    assert data.structures == {"ET": (3,), "WT": (2, 1, 3), "TC": (2, 3)}
    data.check(channels=4, progress=False)


def test_two_challenges_in_one_folder_are_an_error(tmp_path):
    for kind, name in NAMES_2023.items():
        save(tmp_path / "old" / f"old_{kind}.nii.gz")
        save(tmp_path / "new" / f"new-{name}.nii.gz")
    with pytest.raises(ValueError, match="the cases of one challenge"):
        read_brats(tmp_path)


def test_errors_name_case_and_file(folder, tmp_path):
    case = folder / "LGG" / "phantom_001"
    t1 = case / "phantom_001_t1.nii.gz"
    whole = t1.read_bytes()
    t1.unlink()
    with pytest.raises(ValueError, match=r"sequence t1 of case phantom_001 in .*found none.*phantom_001_t1ce"):
        read_brats(folder)
    other = folder / "HGG" / "phantom_002" / "phantom_002_t2.nii.gz"
    moved = other.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"(?s)sequence t2 of case phantom_002.*\n.*sequence t1 of case phantom_001"):
        read_brats(folder)  # all of it in one error
    moved.rename(other)
    assert len(read_brats(folder, ["flair"]).cases) == 4
    save(t1, affine=np.diag([-1, -1, 2, 1]))
    with pytest.raises(ValueError, match=r"same affine in .*phantom_001_t1\.nii\.gz"):
        read_brats(folder)
    save(t1, size=(12, 14, 9), affine=np.eye(4))
    with pytest.raises(ValueError, match=r"same size in .*phantom_001_t1\.nii\.gz.*12, 14, 9"):
        read_brats(folder)
    moved = nib.load(case / "phantom_001_t2.nii.gz").affine + np.eye(4, k=3)
    save(t1, affine=moved)
    with pytest.raises(ValueError, match=r"same affine in .*phantom_001_t1\.nii\.gz"):
        read_brats(folder)
    t1.write_bytes(whole[:100])
    with pytest.raises(ValueError, match=r"cannot read .*phantom_001_t1\.nii\.gz"):
        read_brats(folder)
    t1.write_bytes(whole[: len(whole) // 2])  # the header is whole
    with pytest.raises(ValueError, match=r"cannot read .*phantom_001_t1\.nii\.gz"):
        read_brats(folder).check()
    t1.write_bytes(whole)
    read_brats(folder).check()

    seg = case / "phantom_001_seg.nii.gz"
    affine = nib.load(seg).affine
    save(seg, values=3, affine=affine)
    with pytest.raises(ValueError, match=r"values \[0, 1, 2, 4\] in .*phantom_001_seg\.nii\.gz, got \[3\.0\]"):
        read_brats(folder).check()
    save(case / "other_seg.nii.gz", affine=affine)
    with pytest.raises(ValueError, match=r"one file for the label.*phantom_001.*'other_seg\.nii\.gz'"):
        read_brats(folder)
    (case / "other_seg.nii.gz").unlink()
    seg.unlink()
    with pytest.raises(ValueError, match=r"label \(_seg\) of case phantom_001"):
        read_brats(folder)
    assert "label" not in read_brats(folder, labels=False).cases[0]

    with pytest.raises(ValueError, match="modalities among"):
        read_brats(folder, ["flair", "dwi"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"expected a folder for each case .*empty"):
        read_brats(tmp_path / "empty")


def test_read_brats_reads_real_data(real_data):
    data = read_brats(real_data / "BraTS_sample", ["flair", "t1ce"])
    assert len(data.cases) == 6
    assert data.structures["ET"] == (4,)
    with pytest.raises(ValueError, match="sequence t1 of case brats_2013_pat0001_1"):
        read_brats(real_data / "BraTS_sample")
