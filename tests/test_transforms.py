from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from monai.data import DataLoader, MetaTensor, PersistentDataset
from monai.transforms import Compose, EnsureTyped, Flip, RandFlipd

import monai_conres.transforms as transforms
from monai_conres import InterSliceResidual, InterSliceResiduald, ResidualMask, ResidualMaskd
from monai_conres.chain import ChainSettings, complete_mask
from monai_conres.transforms import CompleteMaskd
from tests import reference

AFFINE = torch.diag(torch.tensor([1.25, 1.25, 7.7, 1.0], dtype=torch.float64))


@pytest.fixture
def classes() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 3, (1, 4, 5, 7))


def expected_mask(classes: np.ndarray, axis: int = 3) -> np.ndarray:
    return reference.residual_mask(np.concatenate([classes == 1, classes == 2]), axis)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_residual_mask_keeps_type_and_metadata(classes, axis, dtype):
    transform, label = ResidualMask(num_classes=3, spatial_axis=axis), classes.astype(dtype)
    got = transform(label)
    assert isinstance(got, np.ndarray)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, expected_mask(classes, axis + 1))
    tensor = transform(torch.from_numpy(label))
    assert type(tensor) is torch.Tensor
    np.testing.assert_array_equal(tensor.numpy(), got)
    meta = transform(MetaTensor(torch.from_numpy(label), affine=AFFINE, meta={"filename_or_obj": "case"}))
    assert isinstance(meta, MetaTensor)
    assert meta.dtype == tensor.dtype
    torch.testing.assert_close(meta.affine, AFFINE)
    assert meta.meta["filename_or_obj"] == "case"
    np.testing.assert_array_equal(meta.numpy(), got)


def test_inter_slice_residual_is_the_difference_of_slices():
    image = np.random.default_rng(0).normal(size=(2, 4, 5, 7)).astype(np.float32)
    expected = np.zeros_like(image)
    expected[:, :, 1:] = np.abs(image[:, :, 1:] - image[:, :, :-1])
    got = InterSliceResidual(spatial_axis=1)(MetaTensor(image, affine=AFFINE))
    np.testing.assert_allclose(got.numpy(), expected)
    torch.testing.assert_close(got.affine, AFFINE)


def test_dictionary_transforms_add_a_key(classes):
    data = {"image": np.float32([[[1, 4, 2]]]), "label": classes, "name": "case"}
    result = Compose([ResidualMaskd("label", num_classes=3), InterSliceResiduald("image", new_key_prefix="d_")])(data)
    assert set(result) == {"image", "label", "name", "residual_label", "d_image"}
    assert result["label"] is classes
    np.testing.assert_array_equal(result["residual_label"], expected_mask(classes))
    np.testing.assert_array_equal(result["d_image"], [[[0, 3, 2]]])
    result = ResidualMaskd(["label", "seg"], num_classes=3, allow_missing_keys=True)({"label": classes})
    assert set(result) == {"label", "residual_label"}
    with pytest.raises(KeyError, match="seg"):
        ResidualMaskd(["label", "seg"], num_classes=3)({"label": classes})


def test_residual_mask_of_a_one_hot_label(classes):
    onehot = np.concatenate([classes == c for c in range(3)])
    got = ResidualMaskd("label", include_background=False)({"label": onehot})["residual_label"]
    np.testing.assert_array_equal(got, expected_mask(classes).astype(bool))


def test_transforms_run_in_worker_processes(classes, tmp_path):
    data = [{"label": np.roll(classes, i, axis=2)} for i in range(4)]
    transform = Compose([ResidualMaskd("label", num_classes=3), EnsureTyped(["label", "residual_label"])])
    dataset = PersistentDataset(data, pickle.loads(pickle.dumps(transform)), cache_dir=tmp_path)
    got = torch.cat([batch["residual_label"] for batch in DataLoader(dataset, batch_size=2, num_workers=2)])
    np.testing.assert_array_equal(got.numpy(), np.stack([expected_mask(item["label"]) for item in data]))


def test_flipped_residual_is_shifted_by_one_slice(classes):
    flip, residual = Flip(spatial_axis=2), ResidualMask(num_classes=3)
    label = torch.from_numpy(classes)
    right, wrong = residual(flip(label)), flip(residual(label))
    assert not torch.equal(right, wrong)
    torch.testing.assert_close(right[..., 1:], wrong[..., :-1])
    pipeline = Compose([RandFlipd("label", prob=1, spatial_axis=2), ResidualMaskd("label", num_classes=3)])
    torch.testing.assert_close(pipeline({"label": label})["residual_label"].as_tensor(), right)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor, MetaTensor], ids=["array", "tensor", "MetaTensor"])
def test_complete_mask_replaces_drawn_labels(classes, kind):
    logits = {key: torch.randn(c, 4, 5, 7) for key, c in (("pred", 3), ("residual", 2), ("image", 1))}
    settings = ChainSettings(offset=-1.0)
    transform = CompleteMaskd(["label", "other"], image_key="image", settings=settings, spatial_axis=1)
    data = {**logits, "slices": [0, 3], "label": kind(classes), "other": kind(classes[:, ::-1].copy())}
    got = transform(data)
    assert set(got) == set(data)
    batches = [x[None] for x in (logits["pred"], logits["residual"])]
    for key in ("label", "other"):
        drawn = torch.as_tensor(np.asarray(data[key]))[None]
        arguments = {"image": logits["image"][None], "settings": settings, "spatial_axis": 1}
        expected = complete_mask(*batches, drawn, slices=[0, 3], **arguments)
        assert (type(got[key]), got[key].dtype) == (type(data[key]), data[key].dtype)
        np.testing.assert_array_equal(np.asarray(got[key]), expected[0].numpy())
        np.testing.assert_array_equal(np.asarray(got[key])[:, :, [0, 3]], np.asarray(data[key])[:, :, [0, 3]])


def test_complete_mask_takes_networks_without_residual(classes):
    data = {"logits": torch.randn(3, 4, 5, 7), "image": torch.randn(2, 4, 5, 7), "label": np.array(classes)}
    data["label"][..., 1:] = 0
    keys = {"segmentation_key": "logits", "residual_key": None, "image_key": "image"}
    got = CompleteMaskd("label", **keys, softmax=True)(data)["label"]
    np.testing.assert_array_equal(got[..., 0], classes[..., 0])  # slices with any label are drawn
    with pytest.raises(ValueError, match="one of sigmoid=True and softmax=True"):
        CompleteMaskd("label", **keys)(data)
    with pytest.raises(KeyError, match="pred"):
        CompleteMaskd("label")(data)


def test_aliases_follow_monai():
    assert transforms.CompleteMaskDict is transforms.CompleteMaskD is CompleteMaskd
    assert transforms.ResidualMaskDict is transforms.ResidualMaskD is ResidualMaskd
    assert transforms.InterSliceResidualDict is transforms.InterSliceResidualD is InterSliceResiduald


def test_errors_name_the_remedy(classes):
    with pytest.raises(ValueError, match=r"expected an array of shape \(c, \*spatial\), got \(3,\).*LoadImaged"):
        InterSliceResidual()(np.zeros(3))
    with pytest.raises(ValueError, match="spatial_axis between -3 and 2"):
        InterSliceResidual(spatial_axis=3)(np.zeros((1, 4, 5, 6)))
    with pytest.raises(ValueError, match="class indices from 0 to 1, got values from 0 to 2"):
        ResidualMask(num_classes=2)(classes)
