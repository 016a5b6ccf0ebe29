from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise

import nibabel as nib
import numpy as np
import pytest
from monai.data import load_decathlon_datalist

from monai_conres.phantom import tumor_phantom, write_phantom_dataset

SIZE = (28, 34, 22)


def test_phantoms_are_reproducible_and_different():
    image, label = tumor_phantom(SIZE, seed=3)
    again, label_again = tumor_phantom(SIZE, seed=3)
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(label, label_again)
    other, _ = tumor_phantom(SIZE, seed=4)
    assert np.abs(other - image).mean() > 1


@pytest.mark.parametrize("seed", range(5))
def test_structures_are_nested_and_deform_from_slice_to_slice(seed):
    image, label = tumor_phantom(SIZE, seed=seed)
    assert image.shape == (4, *SIZE)
    assert image.dtype == np.float32
    assert np.unique(label).tolist() == [0, 1, 2, 3]
    assert (image[:, label > 0] > 0).all()  # inside the head
    assert (image == 0).all(axis=0).mean() > 0.2  # and there is an outside
    whole = label > 0
    assert 0.01 < whole.mean() < 0.3
    slices = [whole[..., s] for s in range(SIZE[2]) if whole[..., s].any()]
    changed = [(a ^ b).sum() for a, b in pairwise(slices)]
    assert np.median(changed) > 5


def test_contrast_is_not_enough_to_threshold():
    """The task is to be learned: no threshold of one modality gives a good edema."""
    image, label = tumor_phantom(seed=0)
    head = image[0] > 0
    thresholds = np.percentile(image[0][head], range(50, 100))
    truth = label > 0
    dice = max(2 * ((image[0] > t) & truth).sum() / ((image[0] > t).sum() + truth.sum()) for t in thresholds)
    assert dice < 0.7


def test_thick_slices_have_the_same_form_in_mm():
    _, thin = tumor_phantom((48, 48, 48), seed=5)
    _, thick = tumor_phantom((48, 48, 8), spacing=(1, 1, 6), seed=5)
    assert (thick > 0).mean() == pytest.approx((thin > 0).mean(), rel=0.3)


def test_the_data_set_has_decathlon_layout(tmp_path):
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


def test_an_interrupted_data_set_is_not_there(tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("monai_conres.phantom.nib.save", stop)
    with pytest.raises(KeyboardInterrupt):
        write_phantom_dataset(tmp_path / "data", cases=2, size=SIZE)
    assert list(tmp_path.iterdir()) == []


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="expected a folder that does not exist yet"):
        write_phantom_dataset(tmp_path)
    with pytest.raises(ValueError, match="three positive numbers"):
        tumor_phantom((10, 10))
    with pytest.raises(ValueError, match="1 or more cases"):
        write_phantom_dataset(tmp_path / "data", cases=0)


def test_command(tmp_path):
    command = [sys.executable, "-m", "monai_conres.phantom", str(tmp_path / "data"), "--cases", "1"]
    subprocess.run([*command, "--size", "12", "14", "10"], check=True)
    assert (tmp_path / "data" / "imagesTr" / "phantom_000.nii.gz").is_file()
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "does not exist yet" in again.stderr
