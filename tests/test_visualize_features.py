"""Figures of features and loss curves, voxel by voxel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from monai_conres.visualize import (
    COLORS,
    StageFeatures,
    plot_attention,
    plot_curves,
    plot_feature_residuals,
    plot_stages,
)

SIZE = (12, 16, 10)
SPACING = (1.0, 1.5, 4.0)


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).random((1, *SIZE)).astype(np.float32)


def stage(*factor: int, seed: int = 0) -> StageFeatures:
    size = [edge // f for edge, f in zip(SIZE, factor, strict=True)]
    return StageFeatures(*torch.randn(4, 2, 3, *size, generator=torch.Generator().manual_seed(seed)))


def picture(axes) -> np.ndarray:
    return np.asarray(axes.images[0].get_array())


def mean(tensor: torch.Tensor, *factor: int) -> np.ndarray:
    """Mean over the channels of the first image of the batch, with each voxel repeated."""
    volume = tensor[0].numpy().mean(axis=0)
    for axis, f in enumerate(factor):
        volume = np.repeat(volume, f, axis=axis)
    return volume


@pytest.mark.parametrize("axis", [0, -1])
def test_feature_residuals_are_differences_of_slices(image, axis):
    coarse = stage(2, 4, 1)
    factor = [2, 4, 1]
    factor[axis] = 1  # slices of the features
    figure = plot_feature_residuals(image, coarse, slices=[1, 2], spatial_axis=axis, spacing=SPACING)
    features = mean(coarse.features, *factor)
    for column, number in enumerate((1, 2)):
        now, before = (np.take(features, n, axis=axis).T for n in (number, number - 1))
        np.testing.assert_allclose(picture(figure.axes[2 + column]), now, atol=1e-6)
        np.testing.assert_allclose(picture(figure.axes[4 + column]), np.abs(now - before), atol=1e-6)
        assert figure.axes[column].get_title() == f"slice {number}"
    first, second = (other for other in range(3) if other != range(3)[axis])
    assert figure.axes[2].get_aspect() == pytest.approx(SPACING[second] / SPACING[first])
    middle = int((1 + 0.5) * (2, 4, 1)[axis])  # the image's slice in the middle of the features' slice
    np.testing.assert_array_equal(picture(figure.axes[0]), np.take(image[0], middle, axis=axis).T)
    assert len({tuple(axes.images[0].get_clim()) for axes in figure.axes[2:4]}) == 1


def test_default_slices_are_in_the_middle_or_change_most(image):
    middle = plot_feature_residuals(image, stage(1, 1, 1))
    assert [axes.get_title() for axes in middle.axes[:4]] == [f"slice {number}" for number in (3, 4, 5, 6)]
    residual = np.zeros((2, *SIZE))
    residual[1, 3, 4, 7] = 1
    chosen = plot_attention(image, stage(1, 2, 5), residuals={"reference": residual})
    assert [axes.get_ylabel() for axes in chosen.axes[::5] if axes.get_ylabel()] == ["slice 7"]
    assert plot_stages(image, {"a": [stage(1, 1, 1)]}).axes[0].get_title() == "slice 5"


def test_attention_shows_features_with_and_without_gate(image):
    fine = stage(1, 2, 5)
    residual = np.zeros((2, *SIZE))
    residual[1, 3, 4, 7] = 1
    figure = plot_attention(image, fine, residuals={"reference": residual}, slices=[7, 8], spacing=SPACING)
    titles = [axes.get_title() for axes in figure.axes[:5]]
    assert titles == ["image", "features\nwithout gate", "attention", "features\nwith gate", "reference"]
    for row, number in enumerate((7, 8)):
        panels = figure.axes[5 * row : 5 * row + 5]
        np.testing.assert_array_equal(picture(panels[0]), image[0, :, :, number].T)
        for axes, tensor in zip(panels[1:4], (fine.features, fine.gate, fine.gated), strict=True):
            np.testing.assert_allclose(picture(axes), mean(tensor, 1, 2, 5)[:, :, number].T, atol=1e-6)
        np.testing.assert_array_equal(picture(panels[4]), residual.max(0)[:, :, number].T)
        assert panels[1].images[0].get_clim() == panels[3].images[0].get_clim() != panels[2].images[0].get_clim()
    shown = [mean(tensor, 1, 2, 5)[:, :, 7:9] for tensor in (fine.features, fine.gated)]
    np.testing.assert_allclose(panels[1].images[0].get_clim(), np.percentile(shown, (1, 99.5)), rtol=1e-5)


def test_stages_of_networks_with_different_depth(image):
    coarse, fine, other = stage(2, 4, 5, seed=1), stage(1, 1, 1, seed=2), stage(3, 1, 2, seed=3)
    figure = plot_stages(image, {"baseline": [other], "ConResNet": [coarse, fine]}, slice_number=6, spacing=SPACING)
    panels = figure.axes
    assert [axes.get_title() for axes in panels[:3]] == ["slice 6", "stage 1", "stage 2"]
    assert [axes.get_ylabel() for axes in panels[::3]] == ["baseline", "ConResNet"]
    np.testing.assert_allclose(picture(panels[1]), mean(other.gated, 3, 1, 2)[:, :, 6].T, atol=1e-6)
    np.testing.assert_allclose(picture(panels[4]), mean(coarse.gated, 2, 4, 5)[:, :, 6].T, atol=1e-6)
    np.testing.assert_allclose(picture(panels[5]), mean(fine.gated, 1, 1, 1)[:, :, 6].T, atol=1e-6)
    assert not panels[2].images
    assert not panels[2].axison


def test_enlarged_voxels_take_the_value_at_their_center():
    features = torch.arange(3.0).reshape(1, 1, 3, 1, 1)
    figure = plot_stages(np.zeros((5, 1, 1)), {"a": [StageFeatures(features, None, None, features)]})
    # centers 0.5 ... 4.5 of 5 voxels are at 0.3, 0.9, 1.5, 2.1 and 2.7 of 3
    assert picture(figure.axes[1])[0].tolist() == [0, 0, 1, 2, 2]


def test_curves_show_values_and_their_mean():
    (axes,) = plot_curves({"baseline": [8, 4, 6, 2], "ConResNet": [4, 2, 3, 1]}, window=2).axes
    raw, line, _, other = axes.lines
    assert raw.get_xydata().tolist() == [[1, 8], [2, 4], [3, 6], [4, 2]]
    assert line.get_xydata().tolist() == [[2, 6], [3, 5], [4, 4]]
    assert other.get_ydata().tolist() == [3, 2.5, 2]
    assert axes.get_ylabel() == "loss, mean of 2 iterations"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["baseline", "ConResNet"]
    assert to_rgb(line.get_color()) == to_rgb(COLORS[4])
    plain = plot_curves({"a": [3, 1]}, name="Dice").axes[0]
    assert plain.get_ylabel() == "Dice"
    assert [line.get_ydata().tolist() for line in plain.lines] == [[3, 1]]


def test_errors_name_the_remedy(image):
    features = stage(1, 1, 1)
    with pytest.raises(ValueError, match='context="attention"'):
        plot_attention(image, features._replace(gate=None))
    with pytest.raises(ValueError, match="stages of one or more networks"):
        plot_stages(image, {})
    with pytest.raises(ValueError, match="slices from 0 to 9, got 10"):
        plot_stages(image, {"a": [features]}, slice_number=10)
    with pytest.raises(ValueError, match=r"spatial size \(12, 16, 10\)"):
        plot_attention(image, features, residuals={"reference": np.zeros((2, 3, 4))})
    for curves, window in (({}, 1), ({"a": [1, 2]}, 3), ({"a": [1, 2]}, 0)):
        with pytest.raises(ValueError, match="expected a window from 1 to"):
            plot_curves(curves, window=window)
