"""From a scan to the network's input, and from the network's output to a label map."""

from __future__ import annotations

import json
import warnings

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import CacheDataset
from monai.transforms import Compose, RandFlipd

from monai_conres.scans import ScanSettings, spacing_range, structure_masks

BRATS = {"ET": (4,), "WT": (1, 2, 4), "TC": (1, 4)}


def settings(**changes) -> ScanSettings:
    arguments = {"channels": ("T1",), "patch_size": (8, 8, 8), "classes": BRATS, "activation": "sigmoid"}
    return ScanSettings(**arguments | changes)


@pytest.fixture
def scan(tmp_path):
    """A stored scan whose axes are (posterior, right, superior), with voxels of 2, 1.5 and 3 mm."""
    affine = np.array([[0, 1.5, 0, 7], [-2.0, 0, 0, 8], [0, 0, 3.0, 9], [0, 0, 0, 1]])
    values = np.random.default_rng(0).normal(5, 2, (12, 10, 8))
    nib.save(nib.Nifti1Image(values.astype(np.float32), affine), tmp_path / "scan.nii.gz")
    label = np.zeros((12, 10, 8), np.uint8)
    label[3:8, 2:7, 2:6] = 2
    label[4:6, 3:5, 3:5] = 4
    nib.save(nib.Nifti1Image(label, affine), tmp_path / "label.nii.gz")
    return {"image": str(tmp_path / "scan.nii.gz"), "label": str(tmp_path / "label.nii.gz")}, values, label


def test_preprocessing_orients_and_normalizes(scan):
    files, values, label = scan
    prepared = settings(normalization=[{"name": "NormalizeIntensity"}]).preprocessing(label=True)(files)
    expected = np.transpose(values, (1, 0, 2))[:, ::-1]  # right, anterior, superior
    np.testing.assert_allclose(
        prepared["image"][0].numpy(), (expected - values.mean()) / values.std(), rtol=2e-5, atol=1e-5
    )
    np.testing.assert_array_equal(prepared["label"][0].numpy(), np.transpose(label, (1, 0, 2))[:, ::-1])
    assert prepared["label"].dtype == torch.uint8
    assert prepared["image"].pixdim.tolist() == [1.5, 2.0, 3.0]


@pytest.mark.parametrize("orientation", ["RAS", "SPR"])
def test_spacing_is_compared_along_the_same_axes(scan, orientation):
    seen = spacing_range([scan[0]])
    assert seen == [(1.5, 1.5), (2.0, 2.0), (3.0, 3.0)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settings(orientation=orientation, seen_spacing=seen).preprocessing()(scan[0])
    thick = settings(orientation=orientation, seen_spacing=[*seen[:2], (1.0, 1.9)])
    size, trained = (
        ("1.5 x 2 x 3", "1.5 x 2 x 1 to 1.9") if orientation == "RAS" else ("3 x 2 x 1.5", "1 to 1.9 x 2 x 1.5")
    )
    with pytest.warns(
        UserWarning, match=rf"{size} mm \({orientation}\), and the network was trained with {trained} mm"
    ):
        thick.preprocessing()(scan[0])


def test_channels_come_from_several_files(scan):
    file = scan[0]["image"]
    assert settings(channels=("a", "b")).preprocessing()({"image": [file, file]})["image"].shape == (2, 10, 12, 8)


def test_cache_holds_the_result_of_all_transforms_that_are_not_random(scan):
    steps = settings(normalization=[{"name": "NormalizeIntensity"}]).preprocessing(label=True)
    flip = RandFlipd(("image", "label"), prob=1.0, spatial_axis=0)
    for transforms in (steps.transforms, [*steps.transforms, flip]):
        cached = CacheDataset([scan[0]], Compose(transforms), progress=False)._cache[0]
        assert cached["label"].dtype == torch.uint8
        torch.testing.assert_close(cached["image"].as_tensor(), steps(scan[0])["image"].as_tensor())


def test_normalization_runs_in_order(scan):
    steps = [
        {"name": "ScaleIntensityRange", "a_min": 3, "a_max": 7, "b_min": 0, "b_max": 1, "clip": True},
        {"name": "NormalizeIntensity", "subtrahend": 0.5, "divisor": 0.25},
    ]
    prepared = settings(orientation="PRS", normalization=steps).preprocessing()(scan[0])["image"]
    expected = (np.clip((scan[1] - 3) / 4, 0, 1) - 0.5) / 0.25
    np.testing.assert_allclose(prepared[0].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("spacing", [None, (1.0, 1.0, 1.5)])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_prediction_returns_to_the_voxels_of_the_scan(scan, spacing, activation):
    files, _, label = scan
    scans = settings(spacing=spacing, activation=activation)
    prepared = scans.preprocessing(label=True)(files)
    if activation == "sigmoid":
        masks = structure_masks(prepared["label"].as_tensor(), BRATS)
    else:
        masks = torch.cat([prepared["label"].as_tensor() == value for value in (0, 4, 1, 2)])
    back = scans.to_scan(masks * 20.0 - 10, prepared["image"])
    found = scans.to_labels(back)
    assert found.shape == (1, 12, 10, 8)
    np.testing.assert_allclose(found.affine.numpy(), nib.load(files["image"]).affine, atol=1e-5)
    agreement = (found[0].numpy() == label).mean()
    assert agreement == 1 if spacing is None else agreement > 0.97


def test_inferer_takes_the_settings_and_other_arguments():
    inferer = settings(patch_size=(8, 8, 4), overlap=0.5).inferer(sw_batch_size=3)
    assert (inferer.roi_size, inferer.overlap, str(inferer.mode), inferer.sw_batch_size) == (
        (8, 8, 4),
        0.5,
        "gaussian",
        3,
    )


def test_logits_become_the_values_of_the_file():
    logits = torch.tensor([[0.0, 3, 0, 0], [1, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 4]])  # of 0, 4, 1, 2
    assert settings(activation="softmax").to_labels(logits).tolist() == [[4, 0, 1, 2]]
    logits = torch.tensor([[-1.0, 1, -1, -1], [-1, 1, 1, 1], [-1, 1, -1, 1]])
    assert settings().to_labels(logits).tolist() == [[0, 4, 2, 1]]
    with pytest.raises(ValueError, match=r"expected 4 channels for .* got 3"):
        settings(activation="softmax").to_labels(logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": "T1"}, "channels of the scans to be a list of names"),
        ({"channels": ()}, "channels of the scans to be a list of names"),
        ({"patch_size": (8, 8)}, "patch_size of the scans to be three positive whole numbers"),
        ({"patch_size": (8, 8, 0)}, "three positive whole numbers"),
        ({"classes": {}}, "classes of the scans to be lists of whole numbers from 1 to 255"),
        *[({"classes": {"a": v}}, "1 to 255.*MapLabelValued") for v in ((), (0,), (1, 256), (1.5,), (-1,), 4)],
        ({"classes": {"a": (1,), "b": (2,), "c": (1, 2)}}, "a value of c that no smaller structure has"),
        ({"activation": "tanh"}, "to be 'sigmoid' or 'softmax', got 'tanh'"),
        ({"orientation": "RAR"}, "orientation of the scans"),
        ({"spacing": (1, 1, 0)}, "spacing of the scans"),
        ({"overlap": 1}, "overlap of the scans to be 0 or more, below 1, got 1"),
        ({"classes": {"a": (1, 2), "b": (1, 3)}}, "without a common value, or one inside the other"),
        ({"flip_axes": (0, 1)}, "flip_axes of the scans"),
        ({"flip_axes": ((3,),)}, "flip_axes of the scans"),
        ({"flip_axes": ((0, -3),)}, "flip_axes of the scans"),
        ({"seen_spacing": (1, 1, 2)}, "seen_spacing of the scans to be None or 3 times the smallest and the largest"),
        ({"seen_spacing": ((1, 1), (1, 1), (2, 1))}, "seen_spacing of the scans"),
        ({"normalization": [{"name": "Lambda"}]}, "intensity transforms of MONAI"),
        ({"normalization": [{"nonzero": True}]}, "intensity transforms of MONAI"),
        ({"normalization": [{"name": "NormalizeIntensity", "zero": True}]}, "unexpected keyword argument 'zero'"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_scan_settings_refuse_two_classes_with_the_same_values(activation):
    with pytest.raises(ValueError, match="other label values in each class"):
        ScanSettings(channels=["a"], patch_size=[8] * 3, classes={"b": [1, 2], "c": [2, 1]}, activation=activation)


def test_settings_take_numbers_of_numpy():
    arguments = {"channels": ["T1"], "classes": {"tumor": [1]}, "activation": "softmax"}
    scans = ScanSettings(**arguments, patch_size=np.array([8, 8, 4]), spacing=np.array([1, 1, 2.5], np.float32))
    assert scans == ScanSettings(**arguments, patch_size=[8, 8, 4], spacing=[1.0, 1.0, 2.5])
    assert json.dumps(scans.patch_size + scans.spacing)
