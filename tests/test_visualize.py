"""Slices and residual masks in figures, voxel by voxel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from monai_conres.visualize import COLORS, plot_residuals, plot_slices, save_figure

SIZE = (12, 16, 9)
SPACING = (1.0, 1.5, 4.0)


@pytest.fixture
def image() -> np.ndarray:
    return np.zeros((1, *SIZE), dtype=np.float32)


@pytest.fixture
def label() -> np.ndarray:
    """Two nested classes without any symmetry."""
    label = np.zeros(SIZE, dtype=np.int64)
    label[2:8, 3:12, 2:7] = 1
    label[3:6, 5:9, 3:5] = 2
    return label


def pictures(figure) -> list[np.ndarray]:
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes]


def legend(figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_slices_show_each_voxel_in_its_color(image, label, axis):
    number = (4, 6, 3)[axis]
    figure = plot_slices(image, {"reference": label}, slices=[number], spatial_axis=axis, spacing=SPACING)
    background, overlay = pictures(figure)
    first, second = (other for other in range(3) if other != range(3)[axis])
    assert background.shape == (SIZE[second], SIZE[first])  # the first axis is horizontal
    for row in range(SIZE[second]):
        for column in range(SIZE[first]):
            voxel = [0, 0, 0]
            voxel[axis], voxel[first], voxel[second] = number, column, row
            value = label[tuple(voxel)]
            expected = 0.55 * np.array(to_rgb(COLORS[value - 1])) if value else np.zeros(3)
            np.testing.assert_allclose(overlay[row, column], expected, atol=1e-6)
    axes = figure.axes[0]
    assert axes.get_aspect() == pytest.approx(SPACING[second] / SPACING[first])
    assert axes.images[0].origin == "lower"
    assert [axes.get_title() for axes in figure.axes] == ["image", "reference"]


def test_slices_accept_indices_channels_and_residuals(image, label):
    multi_hot = np.stack([label > 0, label == 2])  # nested: the smaller mask is on top
    residual = torch.zeros(2, *SIZE)
    residual[1, 4, 5, 3] = 0.25
    figure = plot_slices(
        torch.from_numpy(image[0]),
        {"indices": torch.from_numpy(label)[None], "channels": multi_hot},
        residuals={"residual": residual},
        slices=[3, 4],
        class_names=["edema", "core"],
    )
    panels = pictures(figure)
    assert len(panels) == 8
    np.testing.assert_allclose(panels[1], panels[2])
    assert panels[3][5, 4] == 0.25
    assert panels[3].sum() == 0.25
    assert panels[7].sum() == 0
    assert legend(figure) == ["edema", "core"]


def test_slices_are_spread_over_the_mask(image, label):
    figure = plot_slices(image, {"reference": label}, slices=5)
    assert [axes.get_ylabel() for axes in figure.axes[::2]] == [f"slice {i}" for i in (2, 3, 4, 5, 6)]
    figure = plot_slices(image, {"reference": np.zeros_like(label)}, slices=3)
    assert [axes.get_ylabel() for axes in figure.axes[::2]] == ["slice 1", "slice 4", "slice 7"]


def test_residuals_show_what_changes_in_each_slice(image, label):
    figure = plot_residuals(image, label, slices=[2, 3, 4, 5])
    panels = pictures(figure)
    assert len(panels) == 12
    changed = [panel.any(axis=-1) for panel in panels[8:]]
    np.testing.assert_array_equal(changed[0].T, label[:, :, 2] == 1)  # the tumor begins
    np.testing.assert_array_equal(changed[1].T, label[:, :, 3] == 2)  # both classes change
    assert not changed[2].any()
    largest = plot_residuals(image, label, slices=3)
    assert [axes.get_title() for axes in largest.axes[:3]] == ["slice 1", "slice 2", "slice 3"]


def test_saved_figure_is_a_png(image, label, tmp_path):
    path = tmp_path / "new" / "slices.png"
    save_figure(plot_slices(image, {"reference": label}, slices=1), path, dpi=50)
    color = 0.55 * np.array(to_rgb(COLORS[0]))
    assert (np.abs(imread(path)[..., :3] - color).max(-1) < 0.02).sum() > 50


def test_slices_accept_any_dtype(image, label):
    expected = pictures(plot_slices(image, {"reference": label}))
    half = torch.from_numpy(image).bfloat16(), torch.from_numpy(label).bfloat16()
    for own, mask in ((image, label.astype(">i2")), (image, label.astype("u4")), half):
        for one, two in zip(pictures(plot_slices(own, {"reference": mask})), expected, strict=True):
            np.testing.assert_array_equal(one, two)


def test_legend_names_given_and_present_classes(image, label):
    for mask, names, expected in (
        (label, ["a", "b", "c"], ["a", "b", "c"]),
        (np.where(label == 1, 2**31 - 2, 0), [], [f"class {2**31 - 2}"]),  # atlases have large indices
        (np.stack([label == 1, label == 9]), ["a"], ["a", "class 2"]),
        (np.zeros(SIZE, int), [], []),
    ):
        assert legend(plot_slices(image, {"reference": mask}, class_names=names)) == expected


def test_errors_name_what_is_expected(image, label):
    indices = r"expected class indices 0, 1, \.\.\. in one channel, got values from"
    for mask, message in (
        (label - 1, indices),
        (label + 0.5, indices),
        (np.where(label == 1, np.nan, label), indices),
        (np.stack([label, label]), "zeros and ones, or class indices in one channel"),
        (label[..., :8], r"spatial size \(12, 16, 9\).*got shape \(1, 12, 16, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            plot_slices(image, {"reference": mask})
    with pytest.raises(ValueError, match="slices from 0 to 8, got 9"):
        plot_slices(image, {"reference": label}, slices=[9])
    with pytest.raises(ValueError, match="spatial_axis between -3 and 2"):
        plot_slices(image, {"reference": label}, spatial_axis=3)
    with pytest.raises(ValueError, match="take one image of a batch"):
        plot_slices(image[None], {"reference": label})
