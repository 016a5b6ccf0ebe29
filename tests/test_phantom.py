from __future__ import annotations

import json
from itertools import pairwise
from runpy import run_path

import nibabel as nib
import numpy as np
import pytest
from monai.data import load_decathlon_datalist

from monai_conres import phantom
from monai_conres.phantom import tumor_phantom, write_phantom_brats, write_phantom_dataset

SIZE = (28, 34, 22)


def test_phantom_depends_only_on_the_seed():
    image, label = tumor_phantom(SIZE, seed=3)
    for got, want in zip(tumor_phantom(SIZE, seed=3), (image, label), strict=True):
        np.testing.assert_array_equal(got, want)
    assert np.abs(tumor_phantom(SIZE, seed=4)[0] - image).mean() > 1
    with pytest.raises(ValueError, match="three positive numbers"):
        tumor_phantom((10, 10))


@pytest.mark.parametrize("seed", range(3))
def test_tumor_changes_from_slice_to_slice(seed):
    image, label = tumor_phantom(SIZE, seed=seed)
    assert image.shape == (4, *SIZE)
    assert image.dtype == np.float32
    assert np.unique(label).tolist() == [0, 1, 2, 3]
    assert (image[:, label > 0] > 0).all()  # inside the head
    assert (image == 0).all(axis=0).mean() > 0.2  # voxels outside the head
    whole = label > 0
    assert 0.01 < whole.mean() < 0.3
    slices = [whole[..., s] for s in range(SIZE[2]) if whole[..., s].any()]
    assert np.median([(a ^ b).sum() for a, b in pairwise(slices)]) > 5


def test_thick_slices_show_the_same_shape():
    _, thin = tumor_phantom((48, 48, 48), seed=5)
    _, thick = tumor_phantom((48, 48, 8), spacing=(1, 1, 6), seed=5)
    assert (thick > 0).mean() == pytest.approx((thin > 0).mean(), rel=0.3)


def test_data_set_has_decathlon_layout(tmp_path):
    folder = tmp_path / "Task00_Phantom"
    write_phantom_dataset(folder, cases=2, size=SIZE, spacing=(1, 1.5, 3), seed=7)
    cases = load_decathlon_datalist(str(folder / "dataset.json"), data_list_key="training")
    assert len(cases) == 2
    image, label = (nib.load(cases[1][key]) for key in ("image", "label"))
    expected_image, expected_label = tumor_phantom(SIZE, spacing=(1, 1.5, 3), seed=8)
    np.testing.assert_array_equal(np.moveaxis(image.get_fdata(dtype=np.float32), -1, 0), expected_image)
    np.testing.assert_array_equal(np.asarray(label.dataobj), expected_label)
    assert image.header.get_zooms()[:3] == (1.0, 1.5, 3.0)
    description = json.loads((folder / "dataset.json").read_text())
    assert len(description["modality"]) == 4
    assert description["labels"]["3"] == "enhancing tumor"


def test_data_set_has_brats_orientation_and_labels(tmp_path):
    write_phantom_brats(tmp_path / "Training", cases=2, size=SIZE, spacing=(1, 1.5, 3))
    image, label = tumor_phantom(SIZE, spacing=(1, 1.5, 3), seed=1)
    case = tmp_path / "Training" / "LGG" / "phantom_001" / "phantom_001"
    t1ce, seg = (nib.load(f"{case}_{kind}.nii.gz") for kind in ("t1ce", "seg"))
    assert nib.aff2axcodes(seg.affine) == ("L", "P", "S")
    turned = nib.as_closest_canonical(seg)
    values = {0: 0, 1: 2, 2: 1, 3: 4}  # edema, necrosis and enhancing tumor in the challenge
    np.testing.assert_array_equal(np.asarray(turned.dataobj), np.vectorize(values.get)(label))
    np.testing.assert_array_equal(np.asarray(nib.as_closest_canonical(t1ce).dataobj), image[2])


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--cases", "0", "1 or more cases, got 0"), ("--seed", "-1", "a seed of 0 or more, got -1")],
)
@pytest.mark.parametrize("layout", ["decathlon", "brats"])
def test_command_without_cases_writes_nothing(tmp_path, monkeypatch, capsys, layout, option, value, message):
    arguments = ["phantom", str(tmp_path / "data"), "--layout", layout, option, value]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit):
        run_path(phantom.__file__, run_name="__main__")
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_command_writes_a_data_set_once(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "data"
    monkeypatch.setattr("sys.argv", ["phantom", str(folder), "--cases", "1", "--size", "12", "14", "10"])
    run_path(phantom.__file__, run_name="__main__")
    assert nib.load(folder / "imagesTr" / "phantom_000.nii.gz").shape == (12, 14, 10, 4)
    with pytest.raises(SystemExit):
        run_path(phantom.__file__, run_name="__main__")
    assert "expected a folder that does not exist yet" in capsys.readouterr().err
