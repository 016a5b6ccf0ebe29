"""Surfaces against volume and area of a ball, and where they are drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from monai_conres.visualize import COLORS, plot_slices, plot_surfaces
from monai_conres.visualize.surfaces import surface_mesh

SIZE = (40, 36, 24)
SPACING = (1.0, 1.0, 2.0)
CENTER = np.array([18.0, 17.0, 22.0])  # mm


def ball(radius: float, size: tuple = SIZE, spacing: tuple = SPACING) -> np.ndarray:
    position = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), axis=-1) * spacing
    return np.linalg.norm(position - CENTER, axis=-1) < radius


def volume_and_area(vertices: np.ndarray, faces: np.ndarray) -> tuple[float, float]:
    a, b, c = np.moveaxis(vertices[faces], 1, 0)
    return (a * np.cross(b, c)).sum() / 6, np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2


@pytest.mark.parametrize(("factor", "tolerance"), [(1, 0.03), (4, 0.06)])  # 4: the mesh is coarser than the voxels
def test_mesh_of_a_ball_has_its_volume_and_area(factor, tolerance):
    spacing = tuple(edge / factor for edge in SPACING)
    vertices, faces = surface_mesh(ball(12.3, tuple(n * factor for n in SIZE), spacing), spacing)
    volume, area = volume_and_area(vertices, faces)  # positive: the faces look outward
    assert volume == pytest.approx(4 / 3 * np.pi * 12.3**3, rel=tolerance)
    assert area == pytest.approx(4 * np.pi * 12.3**2, rel=tolerance)
    np.testing.assert_allclose(vertices.min(axis=0), CENTER - 12.3, atol=1)
    np.testing.assert_allclose(vertices.max(axis=0), CENTER + 12.3, atol=1)
    assert len(faces) < 40_000


def test_mesh_keeps_single_voxels():
    mask = np.zeros((9, 9, 9), dtype=bool)
    mask[4, 2, 6] = True
    mask[0, :, 0] = True  # a line along the border
    vertices, faces = surface_mesh(mask, torch.tensor([1, 1, 3]))
    assert np.isfinite(vertices).all()
    near = np.abs(vertices - [4, 2, 18]).max(axis=1) < 3.1
    assert volume_and_area(vertices, faces)[0] > 0
    assert near.sum() >= 6
    assert vertices[~near].max(axis=0)[1] > 7.5


def test_surfaces_share_one_box_in_true_proportions():
    figure = plot_surfaces({"reference": ball(12.3), "predicted": ball(6.1)}, class_names=["ball"], spacing=SPACING)
    first, second = figure.axes
    limits = np.array([first.get_xlim(), first.get_ylim(), first.get_zlim()])
    np.testing.assert_array_equal(limits, [second.get_xlim(), second.get_ylim(), second.get_zlim()])
    np.testing.assert_allclose(limits, np.transpose([CENTER - 12.3, CENTER + 12.3]), atol=2.5)
    proportions = first._box_aspect / np.ptp(limits, axis=1)
    np.testing.assert_allclose(proportions, proportions[0])
    assert [axes.get_title() for axes in figure.axes] == ["reference", "predicted"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ball"]


def test_class_that_encloses_another_is_translucent():
    label = ball(12.3).astype(int)
    label[ball(6.1)] = 2
    figure = plot_surfaces({"reference": label, "inner": (label == 2) * 2}, spacing=SPACING)
    figure.canvas.draw()
    both, inner = figure.axes
    assert sorted(set(both.collections[0].get_facecolor()[:, 3].round(3).tolist())) == [0.4, 1.0]
    colors = inner.collections[0].get_facecolor()
    assert (colors[:, 3] == 1).all()
    # shaded, with one hue
    share = colors[:, :3] / colors[:, :3].max(axis=1, keepdims=True)
    hue = np.array(to_rgb(COLORS[1])) / max(to_rgb(COLORS[1]))
    np.testing.assert_allclose(share, np.tile(hue, (len(share), 1)), atol=0.02)
    assert np.ptp(colors[:, 2]) > 0.2


def test_surfaces_fill_the_row_below_the_slices():
    label = ball(12.3).astype(int)
    image = np.zeros((1, *SIZE), dtype=np.float32)
    figure = plot_slices(image, {"a": label, "empty": label * 0}, residuals={"r": label}, slices=2, surfaces=True)
    spaces = [axes for axes in figure.axes if axes.name == "3d"]
    assert [len(axes.collections) for axes in spaces] == [1, 0]
    assert [axes.get_subplotspec().colspan.start for axes in spaces] == [1, 2]
    assert {axes.get_subplotspec().rowspan.start for axes in spaces} == {2}
    assert len(figure.axes) - len(spaces) == 8


def test_errors_name_what_is_expected():
    with pytest.raises(ValueError, match="one or more masks"):
        plot_surfaces({})
    with pytest.raises(ValueError, match=r"\(4, 5, 6\).*got shape \(1, 4, 5, 7\)"):
        plot_surfaces({"a": np.zeros((4, 5, 6), dtype=int), "b": np.zeros((4, 5, 7), dtype=int)})


@pytest.mark.parametrize("voxels", [[(0, 1, 0), (1, 0, 0), (129, 1, 1)], [(0, 0, 0), (1, 1, 1), (300, 2, 3)]])
def test_single_voxels_of_a_long_mask_stay_visible(voxels):
    mask = np.zeros((400, 8, 8), bool)
    mask[tuple(np.transpose(voxels))] = True
    vertices, _ = surface_mesh(mask, (1, 1, 1))
    step = round(max(np.ptp(voxels, axis=0) + 1) / 96)
    for voxel in voxels:
        assert np.abs(vertices - voxel).max(axis=1).min() <= step + 1
