"""Masks as surfaces in space, as in Fig. 4 and 5 of Zhang et al., 2021."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import LightSource
from matplotlib.figure import Figure
from monai.config import NdarrayOrTensor
from mpl_toolkits.mplot3d import Axes3D
from mpl_toolkits.mplot3d.art3d import Poly3DCollection
from mpl_toolkits.mplot3d.proj3d import proj_transform
from scipy import ndimage
from skimage.measure import marching_cubes

from monai_conres.visualize.panels import PANEL, Masks, class_color, class_legend, class_masks

__all__ = ["plot_surfaces"]

_TRANSLUCENT = 0.4
_STEPS = 64  # of the mesh along the longest edge; a small panel does not show more


def plot_surfaces(
    masks: Mapping[str, NdarrayOrTensor],
    *,
    class_names: Sequence[str] = (),
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
) -> Figure:
    """Draw the surfaces of several masks next to each other, in one view and one scale.

    The first axis goes to the right, the second away from the viewer, the third up. A class that encloses others in
    the first mask is translucent. The surfaces are smoothed by less than a voxel, and single voxels stay visible.

    Args:
        masks: masks by title: class indices ``(d, h, w)`` or ``(1, d, h, w)``, or zeros and ones ``(c, d, h, w)``.
        class_names: names of the foreground classes for the legend.
        spacing: voxel size in mm.

    Raises:
        ValueError: when there is no mask, or the masks have different spatial sizes.

    Example:
        >>> label = np.zeros((20, 24, 10), dtype=int)
        >>> label[5:12, 6:15, 2:8] = 1
        >>> len(plot_surfaces({"reference": label, "predicted": label}, spacing=(1, 1, 3)).axes)
        2
    """
    if not masks:
        raise ValueError("expected one or more masks to draw, got none.")
    size = tuple(next(iter(masks.values())).shape[-3:])
    classes = [class_masks(mask, size) for mask in masks.values()]
    figure = Figure(figsize=(len(masks) * 1.3 * PANEL + 0.2, 1.3 * PANEL + 0.6), layout="constrained")
    panels = figure.subplots(1, len(masks), squeeze=False, subplot_kw={"projection": "3d"})[0]
    draw_surfaces(panels, classes, size, spacing)
    for axes, title in zip(panels, masks, strict=True):
        axes.set_title(title, fontsize=9)
    class_legend(figure, classes, class_names)
    return figure


def draw_surfaces(
    panels: Sequence[Axes3D], masks: Sequence[Masks], size: tuple[int, ...], spacing: Sequence[float]
) -> None:
    """Draw ``masks[i]``, of a volume of ``size`` voxels, in ``panels[i]``; all panels have the same limits."""
    light = LightSource(azdeg=225, altdeg=45)
    meshes = [{n: surface_mesh(part, spacing) for n, part in mask.items() if part.any()} for mask in masks]
    vertices = [mesh[0] for panel in meshes for mesh in panel.values()] or [np.array([(0, 0, 0), size])]
    corners = np.concatenate(vertices)
    low, high = corners.min(axis=0), corners.max(axis=0)
    for axes, panel in zip(panels, meshes, strict=True):
        axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), zlim=(low[2], high[2]))
        axes.set_proj_type("ortho")
        axes.set_axis_off()
        axes.set_box_aspect(high - low)
        # as large as the panel allows
        reach = np.abs(proj_transform(*corners.T, axes.get_proj())[:2]).max()
        axes.set_box_aspect(high - low, zoom=0.48 * axes.viewLim.width / reach)
        if panel:
            # the first mask decides, so that a class looks the same in all panels
            opacity = {n: _TRANSLUCENT / k if (k := _enclosed(n, masks[0])) else 1.0 for n in panel}
            colors = [np.tile((*class_color(n), opacity[n]), (len(faces), 1)) for n, (_, faces) in panel.items()]
            # one collection, so that faces of different classes hide each other
            triangles = np.concatenate([points[faces] for points, faces in panel.values()])
            axes.add_collection3d(
                Poly3DCollection(triangles, facecolors=np.concatenate(colors), shade=True, lightsource=light)
            )


def surface_mesh(mask: np.ndarray, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Surface of a mask ``(d, h, w)`` that is not empty.

    Returns:
        Vertices ``(n, 3)`` in mm from the center of the first voxel, and triangles ``(m, 3)`` of their numbers.
    """
    low, high = _box(mask)
    step = max(1, round(max(high - low) / _STEPS))
    border = 2 * step
    inside = np.pad(mask[tuple(map(slice, low, high))], border).astype(np.float32)
    field = ndimage.gaussian_filter(inside, sigma=0.7 * step)
    vanished = (inside > 0) & (ndimage.maximum_filter(field, size=3) <= 0.5)  # small structures
    vanished = ndimage.maximum_filter(vanished, size=step)  # marching cubes reads each step-th voxel only
    vertices, faces, *_ = marching_cubes(np.where(vanished, 1, field), 0.5, step_size=step, gradient_direction="ascent")
    return (vertices - border + low) * np.asarray(spacing, dtype=float), faces


def _enclosed(number: int, masks: Masks) -> int:
    """Number of classes whose bounding box lies in the bounding box of one class."""
    boxes = {key: _box(mask) for key, mask in masks.items() if mask.any()}
    if number not in boxes:
        return 0
    low, high = boxes.pop(number)
    return sum(bool((low <= box[0]).all() and (high >= box[1]).all()) for box in boxes.values())


def _box(mask: np.ndarray) -> np.ndarray:
    """Bounding box: the first voxel and the voxel after the last, ``(2, 3)``."""
    voxels = np.argwhere(mask)
    return np.array([voxels.min(axis=0), voxels.max(axis=0) + 1])
