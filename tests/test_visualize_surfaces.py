"""Surfaces against the volume and area of a ball, and where they are drawn."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from monai_conres.visualize import COLORS, plot_slices, plot_surfaces
from monai_conres.visualize.surfaces import surface_mesh

SIZE = (40, 36, 24)
SPACING = (1.0, 1.0, 2.0)
CENTER = np.array([18.0, 17.0, 22.0])  # mm


def ball(radius: float, size: tuple = SIZE, spacing: tuple = SPACING, center: np.ndarray = CENTER) -> np.ndarray:
    position = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), axis=-1) * spacing
    return np.linalg.norm(position - center, axis=-1) < radius


def volume_and_area(vertices: np.ndarray, faces: np.ndarray) -> tuple[float, float]:
    a, b, c = np.moveaxis(vertices[faces], 1, 0)
    return (a * np.cross(b, c)).sum() / 6, np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2


@pytest.mark.parametrize(("factor", "tolerance"), [(1, 0.03), (5, 0.06)])
def test_a_ball_has_its_volume_area_and_place(factor, tolerance):
    """Of 12 voxels, and of so many that the mesh is coarser than the voxels."""
    spacing = tuple(edge / factor for edge in SPACING)
    vertices, faces = surface_mesh(ball(12.3, tuple(n * factor for n in SIZE), spacing), spacing)
    volume, area = volume_and_area(vertices, faces)  # positive: the faces look outward
    assert volume == pytest.approx(4 / 3 * np.pi * 12.3**3, rel=tolerance)
    assert area == pytest.approx(4 * np.pi * 12.3**2, rel=tolerance)
    np.testing.assert_allclose(vertices.min(axis=0), CENTER - 12.3, atol=1)
    np.testing.assert_allclose(vertices.max(axis=0), CENTER + 12.3, atol=1)
    assert len(faces) < 40_000


def test_small_structures_stay():
    mask = np.zeros((9, 9, 9), dtype=bool)
    mask[4, 2, 6] = True  # a voxel
    mask[0, :, 0] = True  # a line along the border
    vertices, faces = surface_mesh(mask, (1, 1, 3))
    assert np.isfinite(vertices).all()
    near = np.abs(vertices - [4, 2, 18]).max(axis=1) < 3.1
    assert volume_and_area(vertices, faces)[0] > 0
    assert near.sum() >= 6
    assert vertices[~near].max(axis=0)[1] > 7.5


def test_all_panels_show_the_same_box_to_scale():
    large, small = ball(12.3), ball(6.1)
    figure = plot_surfaces({"reference": large, "predicted": small}, class_names=["ball"], spacing=SPACING)
    first, second = figure.axes
    for get in ("get_xlim", "get_ylim", "get_zlim"):
        assert getattr(first, get)() == getattr(second, get)()
    extent = np.array([np.ptp(limits) for limits in (first.get_xlim(), first.get_ylim(), first.get_zlim())])
    np.testing.assert_allclose(first._box_aspect / extent, (first._box_aspect / extent)[0])
    assert [axes.get_title() for axes in figure.axes] == ["reference", "predicted"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ball"]
    figure.canvas.draw()
    low, high = np.transpose([first.get_xlim(), first.get_ylim(), first.get_zlim()])
    np.testing.assert_allclose(low, CENTER - 12.3, atol=2.5)
    np.testing.assert_allclose(high, CENTER + 12.3, atol=2.5)


def test_a_class_that_encloses_another_is_translucent():
    label = ball(12.3).astype(int)
    label[ball(6.1)] = 2
    figure = plot_surfaces({"reference": label, "alone": (label == 2) * 2}, spacing=SPACING)
    figure.canvas.draw()
    outer, inner = figure.axes
    alpha = outer.collections[0].get_facecolor()[:, 3]
    assert sorted(set(alpha.round(3).tolist())) == [0.4, 1.0]
    (alone,) = inner.collections
    colors = alone.get_facecolor()
    assert (colors[:, 3] == 1).all()
    # shaded, but all of one hue
    share = colors[:, :3] / colors[:, :3].max(axis=1, keepdims=True)
    np.testing.assert_allclose(
        share, np.tile(np.array(to_rgb(COLORS[1])) / max(to_rgb(COLORS[1])), (len(share), 1)), atol=0.02
    )
    assert np.ptp(colors[:, 2]) > 0.2


def test_surfaces_below_slices():
    label = ball(12.3).astype(int)
    image = np.zeros((1, *SIZE), dtype=np.float32)
    figure = plot_slices(image, {"a": label, "empty": label * 0}, residuals={"r": label}, slices=2, surfaces=True)
    spaces = [axes for axes in figure.axes if axes.name == "3d"]
    assert [len(axes.collections) for axes in spaces] == [1, 0]
    assert [axes.get_subplotspec().colspan.start for axes in spaces] == [1, 2]
    assert {axes.get_subplotspec().rowspan.start for axes in spaces} == {2}
    assert len(figure.axes) - len(spaces) == 8


def test_errors():
    with pytest.raises(ValueError, match="one or more masks"):
        plot_surfaces({})
    with pytest.raises(ValueError, match=r"\(4, 5, 6\).*got \(1, 4, 5, 7\)"):
        plot_surfaces({"a": np.zeros((4, 5, 6), dtype=int), "b": np.zeros((4, 5, 7), dtype=int)})
