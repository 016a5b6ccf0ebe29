"""Slices: masks of reference and predictions as in Fig. 4 of Zhang et al., 2021, residuals as in Fig. 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from monai.config import NdarrayOrTensor

from monai_conres.residual import known_residuals, residual_mask
from monai_conres.visualize.panels import (
    Masks,
    View,
    adjacent_slices,
    class_legend,
    class_masks,
    first_channel,
    ignored_voxels,
    largest_channel,
    value_window,
)
from monai_conres.visualize.surfaces import draw_surfaces

__all__ = ["plot_residuals", "plot_slices"]

UNKNOWN = 0.35  # brightness of residuals that are not known


def plot_slices(
    image: NdarrayOrTensor,
    masks: Mapping[str, NdarrayOrTensor],
    *,
    residuals: Mapping[str, NdarrayOrTensor] | None = None,
    surfaces: bool = False,
    slices: int | Sequence[int] = 3,
    class_names: Sequence[str] = (),
    spatial_axis: int = -1,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    ignore_index: int | None = None,
) -> Figure:
    """Draw slices (rows) of an image, of the image under each of several masks, and of residual masks (columns).

    Args:
        image: ``(d, h, w)`` or ``(c, d, h, w)``. The first channel is drawn.
        masks: masks by the title of their column: class indices ``(d, h, w)`` or ``(1, d, h, w)``, or zeros and ones
            ``(c, d, h, w)``.
        residuals: residual masks or their probabilities by title, ``(d, h, w)`` or ``(c, d, h, w)``. The largest
            channel is drawn. White is where a slice differs from the slice before it.
        surfaces: True adds a row with the surface of each mask in space, see :func:`plot_surfaces`.
        slices: numbers of the slices, or how many to spread over the slices where the first mask is not empty.
        class_names: names of the foreground classes for the legend.
        spatial_axis: index of the slice axis among the three spatial axes.
        spacing: voxel size in mm.
        ignore_index: value of voxels without a label. Their image is dark under the mask.

    Raises:
        ValueError: when an array does not have the image's spatial size, or a slice does not exist.

    Example:
        >>> label = np.zeros((20, 24, 10), dtype=int)
        >>> label[5:12, 6:15, 2:8] = 1
        >>> figure = plot_slices(np.random.rand(1, 20, 24, 10), {"reference": label}, residuals={"residual": label})
        >>> len(figure.axes)  # 3 slices of 3 columns
        9
    """
    volume = first_channel(image)
    view = View(volume.shape, spatial_axis, spacing)
    colored = {title: class_masks(mask, volume.shape, ignore_index) for title, mask in masks.items()}
    ignored = {title: ignored_voxels(mask, volume.shape, ignore_index) for title, mask in masks.items()}
    grays = {title: largest_channel(residual, volume.shape) for title, residual in (residuals or {}).items()}
    if isinstance(slices, int):
        first: Masks = next(iter(colored.values()), {})
        slices = view.spread_slices(first.values(), slices)
    rows = [*(f"slice {number}" for number in slices), *([""] if surfaces else [])]
    figure, grid = view.figure(rows, ["image", *colored, *grays])
    if surfaces:
        bottom = grid.pop()
        spaces = [figure.add_subplot(axes.get_subplotspec(), projection="3d") for axes in bottom[1 : 1 + len(colored)]]
        draw_surfaces(spaces, list(colored.values()), volume.shape, spacing)
        for axes in bottom:
            axes.remove()
    window = value_window([volume])
    for row, number in zip(grid, slices, strict=True):
        view.show(row[0], view.cut(volume, number), window)
        for axes, (title, mask) in zip(row[1:], colored.items(), strict=False):
            view.show(axes, view.paint(number, mask, volume, window, ignored=ignored[title]))
        for axes, gray in zip(row[1 + len(colored) :], grays.values(), strict=True):
            view.show(axes, view.cut(gray, number), (0, 1))
    class_legend(figure, colored.values(), class_names)
    return figure


def plot_residuals(
    image: NdarrayOrTensor,
    label: NdarrayOrTensor,
    *,
    slices: int | Sequence[int] = 4,
    class_names: Sequence[str] = (),
    spatial_axis: int = -1,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    ignore_index: int | None = None,
) -> Figure:
    """Draw adjacent slices (columns): image, mask and residual mask (rows), as Fig. 1 of Zhang et al., 2021.

    Args:
        image: see :func:`plot_slices`.
        label: class indices ``(d, h, w)`` or ``(1, d, h, w)``, or zeros and ones ``(c, d, h, w)``.
        slices: numbers of the slices, or how many adjacent slices to take around the largest residual.
        class_names: names of the foreground classes for the legend.
        spatial_axis: index of the slice axis among the three spatial axes.
        spacing: voxel size in mm.
        ignore_index: value of voxels without a label. Residuals that are not known are gray.

    Raises:
        ValueError: when the label does not have the image's spatial size, or a slice does not exist.

    Example:
        >>> label = np.zeros((20, 24, 10), dtype=int)
        >>> label[5:12, 6:15, 2:8] = 1
        >>> len(plot_residuals(np.random.rand(1, 20, 24, 10), label).axes)
        12
    """
    volume = first_channel(image)
    view = View(volume.shape, spatial_axis, spacing)
    masks = class_masks(label, volume.shape, ignore_index)
    ignored = ignored_voxels(label, volume.shape, ignore_index)
    known, gray = np.ones(volume.shape, dtype=bool), np.zeros_like(volume)
    if ignored is not None:
        known = known_residuals(torch.from_numpy(~ignored)[None, None], spatial_axis=spatial_axis)[0, 0].numpy()
        gray = np.where(known, 0, UNKNOWN).astype(np.float32)
    residuals = {
        number: residual_mask(torch.from_numpy(mask)[None, None], spatial_axis=spatial_axis)[0, 0].numpy() & known
        for number, mask in masks.items()
    }
    if isinstance(slices, int):
        changes = sum((residual.sum(axis=tuple(view.plane)) for residual in residuals.values()), np.zeros(1))
        slices = adjacent_slices(int(changes.argmax()), volume.shape[view.axis], slices)
    figure, grid = view.figure(["image", "mask", "residual mask"], [f"slice {number}" for number in slices])
    window = value_window([volume])
    for column, number in enumerate(slices):
        view.show(grid[0][column], view.cut(volume, number), window)
        view.show(grid[1][column], view.paint(number, masks, volume, window, ignored=ignored))
        view.show(grid[2][column], view.paint(number, residuals, gray, (0, 1), opacity=1.0))
    class_legend(figure, [masks], class_names)
    return figure
