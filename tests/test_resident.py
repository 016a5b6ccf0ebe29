"""Patches that stay on the device: crops, padding and augmentation."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "benchmarks"))
import resident


@pytest.fixture
def still(monkeypatch):
    """No augmentation."""
    monkeypatch.setattr(resident, "augment", lambda image, label, extent, generator: (image, label))


def test_patches_of_image_and_label_match_and_depend_on_the_seed(still):
    sizes = [(9, 12, 7), (6, 8, 10)]
    cases = [{"image": torch.arange(math.prod(size)).reshape(1, *size) + 1000 * i} for i, size in enumerate(sizes)]
    cases = [{"image": MetaTensor(case["image"]), "label": MetaTensor(case["image"] % 3)} for case in cases]
    patches = resident.ResidentPatches(cases, (6, 8, 7), (1, 1, 1), "cpu")
    first, again, other = (list(patches.batches(5, 4, seed=seed)) for seed in (1, 1, 2))
    assert len(first) == 5
    starts = set()
    for image, label in first:
        assert image.shape == (4, 1, 6, 8, 7)
        assert type(image) is type(label) is torch.Tensor
        torch.testing.assert_close(label, image.long() % 3)
        for sample in image.long()[:, 0]:
            size = sizes[int(sample[0, 0, 0] >= 1000)]
            steps = [int(sample.diff(dim=axis).unique()) for axis in range(3)]
            assert steps == [size[1] * size[2], size[2], 1]  # neighbors in the patch are neighbors in the case
            starts.add(int(sample[0, 0, 0]))
    assert len(starts) > 8
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(first, other, strict=True))


def test_small_case_is_padded_with_its_minimum_on_both_sides(still):
    case = {"image": torch.full((1, 2, 3, 4), 5.0), "label": torch.ones(1, 2, 3, 4, dtype=torch.uint8)}
    case["image"][0, 0, 0, 0] = -2
    case["label"][0, 0, 0, 0] = 0
    ((image, label),) = resident.ResidentPatches([case], (4, 3, 4), (1, 1, 1), "cpu").batches(1, 1, seed=0)
    assert image[0, 0, :, 1, 1].tolist() == [-2, 5, 5, -2]
    assert label[0, 0, :, 1, 1].tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rotation_turns_voxels_in_mm(axis):
    """The rotation equals that of scipy on voxels that are no cubes."""
    shape, spacing, angle = (18, 14, 10), np.array([1.0, 1.5, 2.5]), 0.3
    volume = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=shape), 2)

    def fixed(low: float, high: float, *shape: int) -> torch.Tensor:
        angles = torch.zeros(1, *shape)
        if shape == (3,):
            angles[0, axis] = angle
            return angles
        return torch.ones(1, *shape)

    theta = resident._affine(fixed, torch.tensor(np.array(shape) * spacing, dtype=torch.float32))
    grid = torch.nn.functional.affine_grid(theta, [1, 1, *shape], align_corners=False)
    got = torch.nn.functional.grid_sample(torch.from_numpy(volume)[None, None].float(), grid, align_corners=False)
    # affine_grid counts axes from the last axis: x of its matrix is our third axis
    first, second = (2 - other for other in range(3) if other != axis)
    rotation = np.eye(3)
    rotation[first, first] = rotation[second, second] = math.cos(angle)
    rotation[first, second], rotation[second, first] = -math.sin(angle), math.sin(angle)
    matrix = rotation * spacing / spacing[:, None]  # from voxels to voxels
    center = (np.array(shape) - 1) / 2
    expected = ndimage.affine_transform(volume, matrix, offset=center - matrix @ center, order=1)
    inside = (slice(4, -4), slice(3, -3), slice(3, -3))
    np.testing.assert_allclose(got[0, 0].numpy()[inside], expected[inside], atol=1e-5)


def test_augmentation_moves_half_of_the_images_with_their_labels():
    mask = torch.zeros(16, 1, 20, 24, 16)
    mask[..., 6:14, 8:16, 5:11] = 1
    image, label = resident.augment(
        mask * 10, mask.long(), torch.tensor([20.0, 24.0, 16.0]), torch.Generator().manual_seed(0)
    )
    assert label.unique().tolist() == [0, 1]
    still = [torch.equal(moved, original) for moved, original in zip(label, mask.long(), strict=True)]
    assert 3 < sum(still) < 13
    for one, inside in zip(image, label.bool(), strict=True):
        assert one[inside].mean() > one[~inside].mean() + 4
