"""The distance metrics against all pairs of surface voxels, and their rules for empty masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from monai_conres import BratsHausdorffDistanceMetric, BratsSurfaceDiceMetric

SIZE = (6, 7, 9)
THICK = (1.25, 1.25, 7.7)
EMPTY = torch.zeros(1, 1, *SIZE)


def blob(seed: int) -> torch.Tensor:
    random = np.random.default_rng(seed)
    center = np.array([2.5, 3, 4]) + random.uniform(-0.8, 0.8, 3)
    distance = np.linalg.norm(np.stack(np.indices(SIZE)) - center[:, None, None, None], axis=0)
    return torch.from_numpy((distance + random.uniform(-0.6, 0.6, SIZE) < 2.4).astype(np.float32))[None, None]


def surface(mask: np.ndarray) -> np.ndarray:
    """Voxels of the mask with a neighbor outside the mask or outside the volume."""
    inside = np.ones(mask.shape, bool)
    padded = np.pad(mask.astype(bool), 1)
    for axis in range(3):
        for shift in (-1, 1):
            inside &= np.roll(padded, shift, axis)[1:-1, 1:-1, 1:-1]
    return np.argwhere(mask.astype(bool) & ~inside)


def surface_distances(a: torch.Tensor, b: torch.Tensor, spacing: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Distance of every surface voxel of each mask to the other surface, from all pairs of voxels."""
    points = [surface(mask.numpy()[0, 0]) * np.array(spacing) for mask in (a, b)]
    distance = np.linalg.norm(points[0][:, None] - points[1][None], axis=-1)
    return distance.min(1), distance.min(0)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), THICK])
def test_distances_match_all_pairs_of_surface_voxels(spacing):
    prediction, reference = blob(1), blob(2)
    there, back = surface_distances(prediction, reference, spacing)
    for percentile in (95, 100):
        got = BratsHausdorffDistanceMetric(percentile=percentile)(prediction, reference, spacing=spacing)
        expected = max(np.percentile(there, percentile), np.percentile(back, percentile))
        assert expected > 0
        assert got.item() == pytest.approx(expected, rel=1e-5)
    for tolerance in (1.0, 1.5):
        got = BratsSurfaceDiceMetric(tolerance=tolerance)(prediction, reference, spacing=spacing)
        near = (there <= tolerance).sum() + (back <= tolerance).sum()
        assert 0 < near < len(there) + len(back)
        assert got.item() == pytest.approx(near / (len(there) + len(back)), rel=1e-6)


@pytest.mark.parametrize(
    ("metric", "both", "one"),
    [
        (BratsHausdorffDistanceMetric(), 0, (6**2 + 7**2 + 9**2) ** 0.5),
        (BratsHausdorffDistanceMetric(empty_distance=374), 0, 374),
        (BratsSurfaceDiceMetric(), 1, 0),
    ],
)
@pytest.mark.filterwarnings("error::UserWarning")
def test_empty_masks_get_the_values_of_brats(metric, both, one):
    metric(torch.cat([EMPTY, EMPTY, blob(1)]), torch.cat([EMPTY, blob(1), EMPTY]))
    expected = torch.tensor([[both], [one], [one]], dtype=torch.float32)
    torch.testing.assert_close(metric.get_buffer(), expected)
    torch.testing.assert_close(metric.aggregate(), expected.mean(0))


def test_spacing_differs_between_cases_of_a_batch():
    prediction, reference = torch.cat([blob(1), blob(1)]), torch.cat([blob(2), EMPTY])
    metric = BratsHausdorffDistanceMetric()
    got = metric(prediction, reference, spacing=[torch.ones(3), torch.tensor(THICK)])  # as MONAI's pixdim
    diagonal = ((6 * 1.25) ** 2 + (7 * 1.25) ** 2 + (9 * 7.7) ** 2) ** 0.5
    torch.testing.assert_close(got, torch.tensor([[metric(prediction[:1], reference[:1]).item()], [diagonal]]))


def test_lists_hold_cases_of_different_sizes_and_spacings():
    metric = BratsHausdorffDistanceMetric()
    predictions, references = [blob(1)[0], blob(1)[0, :, :5]], [blob(2)[0], blob(2)[0, :, :5]]
    got = metric(predictions, references, spacing=[(1, 1, 1), THICK])
    for value, prediction, reference, spacing in zip(got, predictions, references, [(1, 1, 1), THICK], strict=True):
        torch.testing.assert_close(value[None], metric(prediction[None], reference[None], spacing=spacing))


@pytest.mark.parametrize(("reduction", "shape"), [("mean_batch", (2,)), ("mean_channel", (1,)), ("mean", (1,))])
def test_mean_of_no_known_value_is_not_a_number(reduction, shape):
    metric = BratsHausdorffDistanceMetric(reduction=reduction, ignore_index=255)
    prediction = torch.ones(1, 2, 4, 4, 4, dtype=torch.uint8)
    reference = torch.full_like(prediction, 255)
    metric(prediction, reference)
    assert metric.aggregate().shape == shape
    assert metric.aggregate().isnan().all()
    reference[:, 0] = 1
    metric.reset()
    metric(prediction, reference)
    assert metric.aggregate("mean_batch").tolist() == pytest.approx([0, float("nan")], nan_ok=True)
    assert metric.aggregate("mean").item() == 0


def test_calls_accumulate_until_aggregate():
    metric = BratsSurfaceDiceMetric()
    metric([blob(1)[0], EMPTY[0]], [blob(1)[0], blob(1)[0]])
    metric(blob(3).bool(), blob(3).to(torch.uint8))
    torch.testing.assert_close(metric.get_buffer(), torch.tensor([[1.0], [0.0], [1.0]]))
    assert metric.aggregate("mean").item() == pytest.approx(2 / 3)
    two = torch.cat([blob(1), EMPTY], dim=1)
    assert BratsSurfaceDiceMetric(include_background=False)(two, two).tolist() == [[1.0]]


def test_errors_name_the_remedy():
    mask, metric = blob(1), BratsSurfaceDiceMetric()
    with pytest.raises(ValueError, match=r"one shape .*got \(1, 1, 6, 7, 9\) and \(1, 1, 6, 7, 8\)"):
        metric(mask, mask[..., :8])
    with pytest.raises(ValueError, match="expected a prediction of zeros and ones"):
        metric(mask * 0.5, mask)
    with pytest.raises(ValueError, match="expected a reference of zeros and ones"):
        metric(mask, mask * 2)
    with pytest.raises(ValueError, match="2 or more channels"):
        BratsSurfaceDiceMetric(include_background=False)(mask, mask)
    with pytest.raises(ValueError, match="spacing of 3 numbers"):
        metric(mask, mask, spacing=(1, 2))
    with pytest.raises(ValueError, match="got none; call the metric"):
        metric.aggregate()


def test_structure_that_was_missed_where_slices_are_drawn_has_the_worst_value():
    """A stroke of the structure and one of the background, with no labelled voxel at the surface."""
    reference = torch.full((1, 1, *SIZE), 255.0)
    reference[..., 3:5, 4, 4], reference[..., 0, 0, :] = 1, 0
    distance, surface_dice = BratsHausdorffDistanceMetric(ignore_index=255), BratsSurfaceDiceMetric(ignore_index=255)
    assert distance(EMPTY, reference).item() == pytest.approx(np.linalg.norm(SIZE))
    assert surface_dice(EMPTY, reference).item() == 0
    found = (reference == 1).float()  # no surface is known
    assert distance(found, reference).isnan().all()
    assert surface_dice(found, reference).isnan().all()
