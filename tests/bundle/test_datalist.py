"""What the readers of folders find, leave out and refuse, and how they split."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from monai_conres.bundle import Datalist, check_voxels, read_brats, read_decathlon, read_folders, read_scans
from monai_conres.phantom import write_phantom_brats, write_phantom_dataset
from monai_conres.volumes import find_series
from tests.nih import write_series

SIZE = (6, 7, 5)
CORE = {"core": (1,)}


def save(file: Path, value: float = 0, affine=None, size=SIZE) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.full(size, value, np.float32), np.eye(4) if affine is None else affine), file)
    return file


@pytest.fixture
def pairs(tmp_path) -> Path:
    for name in "abc":
        save(tmp_path / "images" / f"{name}.nii.gz", 2)
        save(tmp_path / "labels" / f"{name}.nii.gz", 1)
    return tmp_path


def names(cases) -> list[str]:
    return [case["name"] for case in cases]


# what is found


def test_read_scans_says_what_it_leaves_out(tmp_path):
    save(tmp_path / "a.nii.gz")
    save(tmp_path / "sub" / "b.nii.gz")
    for name in ("c.nrrd", "d.nii.gz.bak", "._a.nii.gz", "notes.txt", "a.json", "e.dcm"):
        (tmp_path / name).write_bytes(b"x")
    write_series(tmp_path / "series", np.zeros((4, 5, 3), int))
    message = (
        r"Found 1 scans in .*; left out c\.nrrd \(no \.nii or \.nii\.gz\), d\.nii\.gz\.bak \(no .*\), e\.dcm \(.*\), "
    )
    message += r"sub/b\.nii\.gz \(in a folder below\), series \(DICOM\)\.$"
    with pytest.warns(UserWarning, match=message):
        assert names(read_scans(tmp_path, CORE).cases) == ["a"]


def test_read_scans_is_quiet_when_nothing_is_left_out(pairs):
    (pairs / "images" / "dataset.json").write_text("{}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names(read_scans(pairs / "images", CORE).cases) == ["a", "b", "c"]


def test_empty_folder_names_what_is_there(tmp_path):
    save(tmp_path / "sub" / "b.nii.gz")
    (tmp_path / "c.mha").touch()
    with pytest.raises(ValueError, match=r"NIfTI files .*, found c\.mha, sub/b\.nii\.gz; give the folder"):
        read_scans(tmp_path, CORE)


def test_read_folders_pairs_names(pairs):
    data = read_folders(pairs / "images", pairs / "labels", CORE)
    assert names(data.cases) == ["a", "b", "c"]
    assert data.cases[1]["label"] == str(pairs / "labels" / "b.nii.gz")
    data.check(channels=1, progress=False)


def test_read_folders_takes_the_names_of_nnunet(pairs):
    for file in (pairs / "images").iterdir():
        name = file.name.removesuffix(".nii.gz")
        shutil.copy(file, file.with_name(f"{name}_0001.nii.gz"))
        file.rename(file.with_name(f"{name}_0000.nii.gz"))
    data = read_folders(pairs / "images", pairs / "labels", CORE)
    assert [Path(file).name for file in data.cases[2]["image"]] == ["c_0000.nii.gz", "c_0001.nii.gz"]
    data.check(channels=2, progress=False)
    with pytest.raises(ValueError, match=r"expected 2 channels .*, got 1; nnU-Net's _0000 is one of several channels"):
        read_scans(pairs / "images", CORE).check(channels=2, progress=False)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["b.nii"], r"one file named b in .*images, got several with other endings; keep one"),
        (["d_0000.nii.gz", "d_0002.nii.gz"], r"d_0000, d_0001 for the channels of d in .*, got d_0000, d_0002; add"),
        (["d_0001.nii.gz"], r"expected d_0000 for the channels of d in .*images, got d_0001"),
    ],
)
def test_read_folders_refuses_ambiguous_files(pairs, files, message):
    """A channel in the place of another one, and one of two files, were chosen without a word."""
    for name in files:
        save(pairs / "images" / name)
    save(pairs / "labels" / "d.nii.gz")
    with pytest.raises(ValueError, match=message):
        read_folders(pairs / "images", pairs / "labels", CORE)


def test_read_folders_says_what_it_leaves_out(pairs):
    (pairs / "images" / "a.nii.gz").rename(pairs / "images" / "z.nii.gz")
    (pairs / "labels" / "._b.nii.gz").write_bytes(b"of a Mac")
    with pytest.warns(
        UserWarning, match=r"Found 2 scans with labels; left out .*a\.nii\.gz \(no scan\), .*z\.nii\.gz \(no l"
    ):
        assert names(read_folders(pairs / "images", pairs / "labels", CORE).cases) == ["b", "c"]
    for name in "bc":
        (pairs / "labels" / f"{name}.nii.gz").unlink()
    with pytest.raises(ValueError, match=r"scans and labels of the same names in .*, found \['b', 'c', 'z'\] without"):
        read_folders(pairs / "images", pairs / "labels", CORE)


def test_read_brats_says_what_it_leaves_out(tmp_path):
    write_phantom_brats(tmp_path / "data", cases=2, size=(12, 14, 10))
    save(tmp_path / "data" / "HGG" / "phantom_000" / "phantom_000_flair_corrected.nii.gz")
    with pytest.warns(
        UserWarning, match=r"Found 2 cases .*left out .*_flair_corrected\.nii\.gz \(no name of a sequence\)"
    ):
        read_brats(tmp_path / "data")
    with pytest.raises(ValueError, match=r"such as CASE_flair\.nii\.gz .*, found a\.nii\.gz; give the folder"):
        read_brats(save(tmp_path / "other" / "a.nii.gz").parent)


@pytest.fixture
def decathlon(tmp_path) -> Path:
    write_phantom_dataset(tmp_path / "data", cases=4, size=(12, 14, 10))
    return tmp_path / "data"


def describe(folder: Path, **changes) -> None:
    file = folder / "dataset.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_read_decathlon_says_what_it_leaves_out(decathlon):
    save(decathlon / "imagesTr" / "new.nii.gz")
    with pytest.warns(UserWarning, match=r"Found 4 cases .*left out new\.nii\.gz \(not in dataset\.json\)"):
        read_decathlon(decathlon)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"labels": {"0": "background", "1": "tumor", "2": "edema", "3": "tumor"}},
            r"different name for each class in 'labels' .*, got 'tumor' more than once",
        ),
        ({"labels": {"0": "", "1": "1", "2": 1, "3": "x"}}, "got '1' more than once"),
        ({"training": []}, r"expected cases in 'training' of .*dataset\.json, got none"),
        ({"training": None, "channel_names": {"0": "MR"}}, r"nnU-Net's dataset\.json without; read the folders with"),
        ({"training": {"image": "a"}}, "Every item in items must be a dict"),
    ],
)
def test_ambiguous_descriptions_are_refused(decathlon, changes, message):
    describe(decathlon, **changes)
    with pytest.raises(ValueError, match=message):
        read_decathlon(decathlon)


def test_images_named_as_nnunet_does_are_pointed_out(decathlon):
    for file in (decathlon / "imagesTr").iterdir():
        file.rename(file.with_name(file.name.replace(".nii.gz", "_0000.nii.gz")))
    with pytest.raises(
        ValueError, match=r"phantom_000\.nii\.gz, found none; there is phantom_000_0000\.nii\.gz: nnU-Net"
    ):
        read_decathlon(decathlon)


# every case is checked alike


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("image", {"value": np.nan}, r"finite numbers in .*images/b\.nii\.gz"),
        ("image", {"value": -1e30}, r"finite numbers in .*images/b\.nii\.gz, below 1e\+09"),
        ("label", {"value": np.nan}, r"finite numbers in .*labels/b\.nii\.gz"),
        ("label", {"value": 255}, r"values \[0, 1\] in .*labels/b\.nii\.gz, got \[255\.0\]"),
        ("label", {"value": 0.5}, r"whole numbers in the label .*labels/b\.nii\.gz, got 0\.5;"),
        ("label", {"size": (6, 7, 6)}, r"same size in .*images/b.* and .*labels/b"),
        ("label", {"size": (*SIZE, 2)}, r"one channel in .*labels/b\.nii\.gz, got 2"),
        ("image", {"size": (*SIZE, 2)}, r"expected 1 channels in the image .*images/b\.nii\.gz, got 2"),
        ("label", {"affine": np.eye(4) + 50 * np.eye(4, k=3)}, r"same affine in .*images/b.* and .*labels/b"),
    ],
)
def test_check_voxels_reads_everything(pairs, key, change, message):
    save(pairs / f"{key}s" / "b.nii.gz", **{"value": 1, **change})
    case = {kind: str(pairs / f"{kind}s" / "b.nii.gz") for kind in ("image", "label")}
    with pytest.raises(ValueError, match=message):
        check_voxels(case, {0, 1}, 1)


def test_class_that_no_label_has_is_named(pairs):
    for name, value in (("a", 1), ("b", 0), ("c", 3)):
        save(pairs / "labels" / f"{name}.nii.gz", value=value)
    structures = {"core": (1,), "rim": (2,), "whole": (1, 2), "edge": (3,), "cyst": (4, 5)}
    data = read_folders(pairs / "images", pairs / "labels", structures)
    with pytest.warns(UserWarning, match=r"None of 3 labels has a voxel of \{'rim': \(2,\), 'cyst': \(4, 5\)\}; check"):
        data.check(progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.check(progress=False, rank=1, num_replicas=2)  # the other process has the other labels
        Datalist([{"name": "a", "image": data.cases[0]["image"]}], structures).check(progress=False)


def test_label_of_a_series_is_compared_with_it(tmp_path):
    write_series(tmp_path / "series", np.zeros((6, 7, 5), int))
    case = {"image": str(tmp_path / "series"), "label": str(save(tmp_path / "label.nii.gz"))}
    with pytest.raises(ValueError, match=r"same affine in .*series and .*label\.nii\.gz"):
        check_voxels(case, {0, 1})
    check_voxels({**case, "label_header": False}, {0, 1})
    assert find_series(tmp_path) == [tmp_path / "series"]


# splits


def datalist(*found: str) -> Datalist:
    return Datalist([{"name": name, "image": f"{name}.nii.gz"} for name in found], CORE)


@pytest.mark.parametrize("split", [lambda data: data.split(), lambda data: data.hold_out(1)])
@pytest.mark.parametrize(("found", "number"), [(["a"], 1), ([], 0)])
def test_one_case_is_too_few_to_split(split, found, number):
    with pytest.raises(ValueError, match=rf"two patients or more, to train and to validate with, got {number} with"):
        split(datalist(*found))


def test_scans_of_one_patient_stay_on_one_side():
    scans = datalist("p1_1", "p1_2", "p2_1", "p3_1", "p3_2", "p3_3", "p4_1", "p5_1")
    with pytest.warns(UserWarning, match="8 cases of 5 patients: all scans of one are on one side"):
        parts = [scans.split(fold, folds=3, seed=1, patient=r"(.*)_\d$") for fold in range(3)]
    with pytest.warns(UserWarning, match="of 5 patients"):
        parts += [scans.hold_out(number, seed=seed, patient=r"(.*)_\d$") for number in (1, 3) for seed in range(5)]
    for sides in parts:
        training, validation = ({name[:2] for name in names(side)} for side in sides)
        assert not training & validation
        assert len(sides[0]) + len(sides[1]) == 8
    assert sorted(name for _, side in parts[:3] for name in names(side)) == names(scans.cases)
    with pytest.raises(ValueError, match=r"finds the patient in each name, got '\(x\)' for \['p1_1'"):
        scans.split(patient="(x)")
    with pytest.raises(ValueError, match="two patients or more"):
        scans.split(patient="(p)")


@pytest.mark.parametrize(
    ("found", "patients"),
    [
        (["BraTS-GLI-00005-100", "BraTS-GLI-00005-101", "BraTS-GLI-00006-100"], 2),
        (["Brats18_TCIA02_135_1", "Brats18_TCIA02_135_2", "Brats18_CBICA_AAB_1"], 2),
        (["BraTS20_Training_001", "BraTS20_Training_002", "BraTS2021_00000"], 3),
    ],
)
def test_read_brats_knows_the_patients(tmp_path, found, patients):
    kinds = ("t2f", "t1n", "t1c", "t2w", "seg") if "GLI" in found[0] else ("flair", "t1", "t1ce", "t2", "seg")
    for name in found:
        for kind in kinds:
            save(tmp_path / name / f"{name}-{kind}.nii.gz")
    data = read_brats(tmp_path)
    assert len({case["patient"] for case in data.cases}) == patients
    if patients == 2:
        with pytest.warns(UserWarning, match="3 cases of 2 patients"):
            training, validation = data.split(0, folds=2)
        assert not {case["patient"] for case in training} & {case["patient"] for case in validation}


def test_given_folds_that_share_a_patient_are_named():
    cases = [{"name": name, "image": name, "patient": name[0]} for name in ("a1", "a2", "b1")]
    with pytest.warns(UserWarning, match=r"Fold 0 trains and validates with scans of \['a'\]"):
        Datalist(cases, CORE, [({"a1"}, {"a2", "b1"})]).split(0)


def test_draws_without_patients_stay_as_they_were():
    """Folds of stored results: random.sample and MONAI's partition_dataset over the cases."""
    data = datalist(*(f"case{number:02d}" for number in range(20)))
    training, validation = data.hold_out(4, seed=3)
    assert names(validation) == ["case04", "case07", "case17", "case18"]
    assert len(training) == 16
    assert names(data.split(1, seed=2)[1]) == ["case03", "case04", "case16", "case19"]
