"""Slices: masks of reference and predictions as in Fig. 4 of Zhang et al., 2021, residuals as in Fig. 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from monai.config import NdarrayOrTensor

from monai_conres.residual import residual_mask
from monai_conres.visualize.panels import (
    Masks,
    adjacent_slices,
    all_channels,
    chosen_slices,
    class_legend,
    class_masks,
    cut,
    cut_masks,
    first_channel,
    new_figure,
    paint_masks,
    show,
    slice_axis,
    spread_slices,
    value_window,
)
from monai_conres.visualize.surfaces import draw_surfaces

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_residuals", "plot_slices"]


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
) -> Figure:
    """Draw slices of an image (rows): as it is, under each of several masks, and residual masks (columns).

    Args:
        image: ``(*spatial)``, or ``(c, *spatial)`` of which the first channel is drawn.
        masks: masks by the title of their column: class indices ``(*spatial)`` or ``(1, *spatial)``, or zeros and ones
            ``(c, *spatial)``.
        residuals: residual masks or their probabilities by title, ``(*spatial)`` or ``(c, *spatial)``, of which the
            largest channel is drawn: white where a slice differs from the one before it.
        surfaces: True adds a row with the surface of each mask in space, see :func:`plot_surfaces`.
        slices: numbers of the slices, or how many to spread over those where the first mask is not empty.
        class_names: names of the foreground classes for the legend.
        spatial_axis: index of the slice axis among the three spatial axes.
        spacing: size of a voxel, in mm.

    Raises:
        ValueError: when an array has not the image's spatial size, or a slice does not exist.

    Example:
        >>> label = np.zeros((20, 24, 10), dtype=int)
        >>> label[5:12, 6:15, 2:8] = 1
        >>> figure = plot_slices(np.random.rand(1, 20, 24, 10), {"reference": label}, residuals={"residual": label})
        >>> len(figure.axes)  # 3 slices of 3 columns
        9
    """
    volume = first_channel(image)
    colored = {title: class_masks(mask, volume.shape) for title, mask in masks.items()}
    grays = {
        title: all_channels(residual, volume.shape).max(axis=0).astype(np.float32)
        for title, residual in (residuals or {}).items()
    }
    axis = slice_axis(spatial_axis)
    first: Masks = next(iter(colored.values()), {})
    slices = chosen_slices(slices, lambda count: spread_slices(first.values(), volume.shape, axis, count))
    rows = len(slices) + surfaces
    figure, grid = new_figure(volume.shape, axis, spacing, rows, 1 + len(colored) + len(grays))
    if surfaces:
        bottom = grid.pop()
        spaces = [figure.add_subplot(axes.get_subplotspec(), projection="3d") for axes in bottom[1 : 1 + len(colored)]]
        draw_surfaces(spaces, list(colored.values()), volume.shape, spacing)
        for axes in bottom:
            axes.remove()
    window = value_window([volume])
    for row, number in zip(grid, slices, strict=True):
        background = cut(volume, axis, number)
        show(row[0], background, window, spacing, axis)
        row[0].set_ylabel(f"slice {number}", fontsize=8)
        for axes, mask in zip(row[1:], colored.values(), strict=False):
            show(axes, paint_masks(background, window, cut_masks(mask, axis, number)), None, spacing, axis)
        for axes, gray in zip(row[1 + len(colored) :], grays.values(), strict=True):
            show(axes, cut(gray, axis, number), (0, 1), spacing, axis)
    for axes, title in zip(grid[0], ["image", *colored, *grays], strict=True):
        axes.set_title(title, fontsize=9)
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
) -> Figure:
    """Draw adjacent slices (columns): image, mask and residual mask (rows), as Fig. 1 of Zhang et al., 2021.

    Args:
        image: ``(*spatial)``, or ``(c, *spatial)`` of which the first channel is drawn.
        label: class indices ``(*spatial)`` or ``(1, *spatial)``, or zeros and ones ``(c, *spatial)``.
        slices: numbers of the slices, or how many adjacent ones to take around the largest residual.
        class_names: names of the foreground classes for the legend.
        spatial_axis: index of the slice axis among the three spatial axes.
        spacing: size of a voxel, in mm.

    Raises:
        ValueError: when the label has not the image's spatial size, or a slice does not exist.

    Example:
        >>> label = np.zeros((20, 24, 10), dtype=int)
        >>> label[5:12, 6:15, 2:8] = 1
        >>> len(plot_residuals(np.random.rand(1, 20, 24, 10), label).axes)
        12
    """
    volume = first_channel(image)
    masks = class_masks(label, volume.shape)
    residuals = {
        number: residual_mask(torch.from_numpy(mask)[None, None], spatial_axis=spatial_axis)[0, 0].numpy()
        for number, mask in masks.items()
    }
    axis = slice_axis(spatial_axis)
    changed = np.zeros(volume.shape, dtype=bool)
    for residual in residuals.values():
        changed |= residual
    most = int(changed.sum(axis=tuple(other for other in range(3) if other != axis)).argmax())
    slices = chosen_slices(slices, lambda count: adjacent_slices(most, volume.shape[axis], count))
    figure, grid = new_figure(volume.shape, axis, spacing, 3, len(slices))
    window = value_window([volume])
    for column, number in enumerate(slices):
        background = cut(volume, axis, number)
        show(grid[0][column], background, window, spacing, axis)
        painted = paint_masks(background, window, cut_masks(masks, axis, number))
        show(grid[1][column], painted, None, spacing, axis)
        # in the colors of the classes, on black
        changes = paint_masks(np.zeros_like(background), (0, 1), cut_masks(residuals, axis, number), opacity=1.0)
        show(grid[2][column], changes, None, spacing, axis)
        grid[0][column].set_title(f"slice {number}", fontsize=9)
    for row, name in zip(grid, ("image", "mask", "residual mask"), strict=True):
        row[0].set_ylabel(name, fontsize=9)
    class_legend(figure, [masks], class_names)
    return figure
