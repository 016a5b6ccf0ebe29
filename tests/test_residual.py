from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch.utils.flop_counter import FlopCounterMode

from monai_conres import inter_slice_residual, residual_mask, restore_mask
from monai_conres.residual import class_masks
from tests import reference

SIZES = [(9,), (4, 7), (3, 5, 6)]
DTYPES = [torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.float32, torch.float64]


def axes_of_sizes() -> list[tuple[tuple[int, ...], int]]:
    return [(size, axis) for size in SIZES for axis in range(-len(size), len(size))]


@pytest.mark.parametrize(("size", "axis"), axes_of_sizes())
def test_inter_slice_residual_is_eq_1_of_any_volume(size, axis):
    volume = np.random.default_rng(0).normal(size=(2, 3, *size))
    dim = 2 + axis % len(size)
    expected = reference.residual_mask(volume, dim)  # Eq. 1 is the absolute difference, of any volume
    np.testing.assert_allclose(inter_slice_residual(torch.from_numpy(volume), spatial_axis=axis).numpy(), expected)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int64], ids=str
)
def test_inter_slice_residual_of_integers_does_not_wrap_around(dtype):
    volume = torch.tensor([[[0, 100, 3, 127, 126]]], dtype=dtype)
    got = inter_slice_residual(volume)
    assert got.dtype == dtype
    assert got.tolist() == [[[0, 100, 97, 124, 1]]]


def test_inter_slice_residual_of_booleans():
    volume = torch.tensor([[[True, True, False, False, True]]])
    assert inter_slice_residual(volume).tolist() == [[[False, False, True, False, True]]]


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_inter_slice_residual_gradient(memory_format, axis):
    volume = torch.randn(1, 2, 3, 4, 5, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: inter_slice_residual(v, spatial_axis=axis), volume)
    residual = inter_slice_residual(volume.sigmoid(), spatial_axis=axis)
    expected = reference.residual_mask(volume.detach().sigmoid().numpy(), 2 + axis)
    np.testing.assert_allclose(residual.detach().numpy(), expected)
    (gradient,) = torch.autograd.grad(residual.sum(), volume)
    assert residual.is_contiguous(memory_format=memory_format)
    assert gradient.shape == volume.shape


def test_residual_mask_checks_values_while_operations_are_counted():
    with FlopCounterMode(display=False), pytest.raises(ValueError, match="zeros and ones"):
        residual_mask(torch.full((1, 1, 4), 7))


def test_inter_slice_residual_of_infinite_values():
    volume = torch.tensor([[[float("inf"), 1.0, 1.0]]])
    assert inter_slice_residual(volume).tolist() == [[[0.0, float("inf"), 0.0]]]


@pytest.mark.parametrize(("size", "axis"), axes_of_sizes())
@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_mask_is_eq_1_for_each_channel(size, axis, dtype):
    mask = np.random.default_rng(0).integers(0, 2, (2, 3, *size))
    got = residual_mask(torch.from_numpy(mask).to(dtype), spatial_axis=axis)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.double().numpy(), reference.residual_mask(mask, 2 + axis % len(size)))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_residual_mask_of_class_indices_is_eq_13(axis, dtype):
    classes = np.random.default_rng(0).integers(0, 4, (2, 1, 3, 5, 6))
    onehot = np.concatenate([classes == c for c in range(4)], axis=1)
    expected = reference.residual_mask(onehot, axis + 2)[:, 1:]  # no residual of the background
    got = residual_mask(torch.from_numpy(classes).to(dtype), num_classes=4, spatial_axis=axis)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.double().numpy(), expected)
    got = residual_mask(torch.from_numpy(onehot), include_background=False, spatial_axis=axis)
    np.testing.assert_array_equal(got.double().numpy(), expected)


@pytest.mark.parametrize(("size", "axis"), axes_of_sizes())
@pytest.mark.parametrize("dtype", DTYPES)
def test_restore_mask_inverts_residual_mask(size, axis, dtype):
    mask = torch.randint(0, 2, (2, 3, *size)).to(dtype)
    first = mask.narrow(2 + axis % len(size), 0, 1)
    restored = restore_mask(first, residual_mask(mask, spatial_axis=axis), spatial_axis=axis)
    assert restored.dtype == dtype
    assert torch.equal(restored, mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint16])
def test_residual_mask_of_rare_dtypes(dtype):
    indices = torch.tensor([[[0, 1, 1, 0]]]).to(dtype)
    assert residual_mask(indices, num_classes=2).tolist() == [[[0, 1, 0, 1]]]
    assert residual_mask(indices).tolist() == [[[0, 1, 0, 1]]]


def test_residual_of_one_slice_is_zero():
    mask = torch.ones(1, 2, 4, 5, 1)
    assert torch.equal(residual_mask(mask), torch.zeros_like(mask))
    assert torch.equal(inter_slice_residual(mask), torch.zeros_like(mask))
    assert torch.equal(restore_mask(mask, residual_mask(mask)), mask)


def test_residual_mask_of_a_meta_tensor_keeps_its_affine():
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64))
    label = MetaTensor(torch.randint(0, 2, (1, 1, 3, 4, 5)), affine=affine)
    got = residual_mask(label)
    assert isinstance(got, MetaTensor)
    torch.testing.assert_close(got.affine, affine)


def test_residual_mask_has_no_gradient():
    assert not residual_mask(torch.ones(1, 1, 2, 2, requires_grad=True)).requires_grad


@pytest.mark.parametrize(
    ("label", "arguments", "message"),
    [
        (torch.zeros(3, 4), {}, r"expected a tensor of shape \(b, c, \*spatial\), got 2 dimension"),
        (torch.zeros(1, 1, 4, 5, 6), {"spatial_axis": 3}, "spatial_axis between -3 and 2 for 3 spatial axes, got 3"),
        (torch.zeros(1, 1, 4, 5, 6), {"spatial_axis": -4}, "got -4; it counts the spatial axes only"),
        (torch.full((1, 1, 4), 2), {}, "zeros and ones.*got values from 2 to 2.*MapLabelValued"),
        (torch.full((1, 1, 4), 0.5), {}, "got values from 0.5 to 0.5, not whole numbers; resample"),
        (torch.full((1, 1, 4), float("nan")), {}, "got NaN"),
        (torch.full((1, 1, 4), -1), {"num_classes": 3}, "class indices from 0 to 2, got values from -1 to -1"),
        (torch.full((1, 1, 4), 3), {"num_classes": 3}, "class indices from 0 to 2, got values from 3 to 3"),
        (
            torch.zeros(1, 2, 4),
            {"num_classes": 3},
            r"class indices of shape \(b, 1, \*spatial\).*got shape \(1, 2, 4\)",
        ),
        (torch.zeros(1, 1, 4), {"num_classes": 1}, "num_classes of 2 or more"),
        (torch.zeros(1, 1, 4), {"include_background": False}, "one-hot label of 2 or more channels"),
    ],
)
def test_residual_mask_errors(label, arguments, message):
    with pytest.raises(ValueError, match=message):
        residual_mask(label, **arguments)


def test_restore_mask_errors():
    residual = torch.zeros(1, 1, 3, 4, 5)
    with pytest.raises(
        ValueError, match=r"first_slice of shape \(1, 1, 3, 1, 5\).*got \(1, 1, 1, 4, 5\).*narrow\(3, 0, 1\)"
    ):
        restore_mask(residual[:, :, :1], residual, spatial_axis=1)
    with pytest.raises(ValueError, match="zeros and ones"):
        restore_mask(residual[..., :1] + 2, residual)
    with pytest.raises(ValueError, match="zeros and ones"):
        restore_mask(residual[..., :1], residual + 0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("spatial_axis", [0, 1, 2])
def test_inter_slice_residual_is_the_same_with_gradients(spatial_axis, layout, dtype):
    generator = torch.Generator().manual_seed(0)
    volume = torch.randn(2, 3, 4, 5, 6, generator=generator).to(dtype).contiguous(memory_format=layout)
    expected = np.zeros((2, 3, 4, 5, 6))
    slices = np.moveaxis(volume.double().numpy(), 2 + spatial_axis, 0)
    np.moveaxis(expected, 2 + spatial_axis, 0)[1:] = np.abs(slices[1:] - slices[:-1])
    plain = inter_slice_residual(volume, spatial_axis=spatial_axis)
    assert plain.is_contiguous(memory_format=layout)
    np.testing.assert_allclose(plain.double().numpy(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6)
    watched = inter_slice_residual(volume.requires_grad_(), spatial_axis=spatial_axis)
    assert watched.requires_grad
    assert torch.equal(watched, plain)


@pytest.mark.parametrize(
    "label",
    [
        torch.tensor([[[0, 0, 0, 1], [0, 1, 1, 0]]]),  # masks
        torch.tensor([[[1, 0, 0, 0], [0, 0, 0, 1], [0, 1, 1, 0]]]),  # one-hot
        torch.tensor([[[0, 2, 2, 1]]]),  # class indices
    ],
)
def test_class_masks_read_three_kinds_of_label(label):
    assert class_masks(label, 2).tolist() == [[[0, 0, 0, 1], [0, 1, 1, 0]]]


def test_class_masks_of_one_class_are_the_label():
    label = torch.tensor([[[0, 1, 1, 0]]])
    assert torch.equal(class_masks(label, 1), label)
    assert torch.equal(class_masks(torch.cat([1 - label, label], 1), 1), label)


def test_class_masks_refuse_other_numbers_of_channels():
    with pytest.raises(
        ValueError, match=r"1 channel \(class indices\), 3 \(masks\) or 4 \(one-hot\).*label\[:, None\]"
    ):
        class_masks(torch.zeros(1, 5, 4), 3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64], ids=str)
def test_values_of_every_integer_are_checked(dtype):
    mask = torch.tensor([[[5, 0, 0, 1]]]).to(dtype)
    with pytest.raises(ValueError, match="got values from 5 to 5"):
        restore_mask(mask[..., :1], mask)
