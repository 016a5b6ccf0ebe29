"""Features and attention of a decoder's stages, as in Fig. 3, 6 and 7 of Zhang et al., 2021.

Maps are means over the channels. Of a batch the first image is drawn. A map of a coarser stage is shown voxel by voxel,
magnified to the size of the image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from monai.config import NdarrayOrTensor
from monai.utils import convert_to_numpy, optional_import

from monai_conres.residual import inter_slice_residual
from monai_conres.visualize.capture import StageFeatures
from monai_conres.visualize.panels import (
    INSTALL,
    Window,
    adjacent_slices,
    all_channels,
    chosen_slices,
    cut,
    first_channel,
    new_figure,
    show,
    slice_axis,
    spread_slices,
    value_window,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.ticker import MaxNLocator
else:
    MaxNLocator, _ = optional_import("matplotlib.ticker", name="MaxNLocator", descriptor=INSTALL)

__all__ = ["plot_attention", "plot_feature_residuals", "plot_stages"]

_FEATURES, _CHANGES = "viridis", "magma"  # color maps


def plot_feature_residuals(
    image: NdarrayOrTensor,
    stage: StageFeatures,
    *,
    slices: int | Sequence[int] = 4,
    spatial_axis: int = -1,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
) -> Figure:
    """Draw adjacent slices of features (columns): image, features, difference to the slice before (rows), as Fig. 3.

    Args:
        image: ``(*spatial)``, or ``(c, *spatial)`` of which the first channel is drawn.
        stage: one of the stages of :func:`capture_features`; its features before the gate are drawn.
        slices: numbers of slices of the features, or how many adjacent ones to take in the middle.
        spatial_axis: index of the slice axis among the three spatial axes.
        spacing: size of a voxel of the image, in mm.

    Raises:
        ValueError: when a slice does not exist, or the image is a batch.

    Example:
        >>> features = torch.randn(1, 8, 10, 12, 5)
        >>> figure = plot_feature_residuals(torch.rand(1, 20, 24, 10), StageFeatures(features, None, None, features))
        >>> len(figure.axes)  # 3 rows of 4 slices, a scale for features and one for differences
        14
    """
    volume = first_channel(image)
    axis = slice_axis(spatial_axis)
    mean = _channel_mean(stage.features)
    change = inter_slice_residual(torch.from_numpy(mean)[None, None], spatial_axis=axis)[0, 0].numpy()
    slices = chosen_slices(slices, lambda count: adjacent_slices(mean.shape[axis] // 2, mean.shape[axis], count))
    figure, grid = new_figure(volume.shape, axis, spacing, 3, len(slices), extra=0.3)
    # at the image's size in plane, and slice by slice
    size = tuple(mean.shape[axis] if other == axis else volume.shape[other] for other in range(3))
    rows = [_magnify(array, size) for array in (volume, mean, change)]
    windows: list[Window] = [
        value_window([volume]),
        value_window(cut(rows[1], axis, number) for number in slices),
        value_window(cut(rows[2], axis, number) for number in slices),
    ]
    for row, array, window, colormap in zip(grid, rows, windows, ("gray", _FEATURES, _CHANGES), strict=True):
        for axes, number in zip(row, slices, strict=True):
            shown = show(axes, cut(array, axis, number), window, spacing, axis, colormap=colormap)
        if colormap != "gray":
            _scale(figure, shown, row)
    for axes, number in zip(grid[0], slices, strict=True):
        axes.set_title(f"slice {number}", fontsize=9)
    for row, name in zip(grid, ("image", "features", "difference"), strict=True):
        row[0].set_ylabel(name, fontsize=9)
    return figure


def plot_attention(
    image: NdarrayOrTensor,
    stage: StageFeatures,
    *,
    residuals: Mapping[str, NdarrayOrTensor] | None = None,
    slices: int | Sequence[int] = 3,
    spatial_axis: int = -1,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
) -> Figure:
    """Draw slices (rows): image, features without the gate, attention, features with it (columns), as Fig. 6.

    Features without and with the gate have one scale.

    Args:
        image: ``(*spatial)``, or ``(c, *spatial)`` of which the first channel is drawn.
        stage: one of the stages of :func:`capture_features`; the last one is what the paper shows.
        residuals: residual masks or their probabilities by title, as in :func:`plot_slices`, to compare with.
        slices: numbers of slices of the image, or how many to spread over those where the first of ``residuals`` is
            not empty.
        spatial_axis: index of the slice axis among the three spatial axes.
        spacing: size of a voxel of the image, in mm.

    Raises:
        ValueError: when the stage has no gate, an array has not the image's spatial size, a slice does not exist, or
            the image is a batch.

    Example:
        >>> stage = StageFeatures(*torch.rand(4, 1, 8, 20, 24, 10))
        >>> figure = plot_attention(torch.rand(1, 20, 24, 10), stage, slices=[4, 5])
        >>> [axes.get_title() for axes in figure.axes[:4]]
        ['image', 'features\\nwithout gate', 'attention', 'features\\nwith gate']
    """
    if stage.gate is None:
        raise ValueError(
            "expected a stage with a gate, got one without: the network has attention=False, or no module."
        )
    volume = first_channel(image)
    axis = slice_axis(spatial_axis)
    grays = {
        title: all_channels(residual, volume.shape).max(axis=0).astype(np.float32)
        for title, residual in (residuals or {}).items()
    }
    first = [gray > 0.5 for gray in grays.values()][:1]
    slices = chosen_slices(slices, lambda count: spread_slices(first, volume.shape, axis, count))
    maps = [_magnify(_channel_mean(tensor), volume.shape) for tensor in (stage.features, stage.gate, stage.gated)]
    shared = value_window(cut(array, axis, number) for array in (maps[0], maps[2]) for number in slices)
    attention = value_window(cut(maps[1], axis, number) for number in slices)
    titles = ["image", "features\nwithout gate", "attention", "features\nwith gate", *grays]
    arrays = [volume, *maps, *grays.values()]
    windows: list[Window] = [value_window([volume]), shared, attention, shared, *((0, 1) for _ in grays)]
    colormaps = ["gray", _FEATURES, _CHANGES, _FEATURES, *("gray" for _ in grays)]
    figure, grid = new_figure(volume.shape, axis, spacing, len(slices), len(arrays), extra=0.6)
    for column, (title, array, window, colormap) in enumerate(zip(titles, arrays, windows, colormaps, strict=True)):
        panels = [row[column] for row in grid]
        panels[0].set_title(title, fontsize=9)
        for axes, number in zip(panels, slices, strict=True):
            shown = show(axes, cut(array, axis, number), window, spacing, axis, colormap=colormap)
        if colormap != "gray":
            _scale(figure, shown, panels, below=True)
    for row, number in zip(grid, slices, strict=True):
        row[0].set_ylabel(f"slice {number}", fontsize=8)
    return figure


def plot_stages(
    image: NdarrayOrTensor,
    networks: Mapping[str, Sequence[StageFeatures]],
    *,
    slice_number: int | None = None,
    spatial_axis: int = -1,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
) -> Figure:
    """Draw the features that each decoder stage (columns) of several networks (rows) hands on, in one slice, as Fig. 7.

    Every panel has a scale of its own, without its most extreme values: features of different networks have no
    common unit.

    Args:
        image: ``(*spatial)``, or ``(c, *spatial)`` of which the first channel is drawn.
        networks: stages of :func:`capture_features` by the network's title; the features after the gate are drawn.
        slice_number: number of the slice of the image; ``None`` is the middle.
        spatial_axis: index of the slice axis among the three spatial axes.
        spacing: size of a voxel of the image, in mm.

    Raises:
        ValueError: when there is no network or no stage, the slice does not exist, or the image is a batch.

    Example:
        >>> features = torch.rand(1, 8, 10, 12, 5), torch.rand(1, 4, 20, 24, 10)
        >>> stages = [StageFeatures(tensor, None, None, tensor) for tensor in features]
        >>> figure = plot_stages(torch.rand(1, 20, 24, 10), {"baseline": stages, "ConResNet": stages})
        >>> [axes.get_title() for axes in figure.axes[:3]]
        ['slice 5', 'stage 1', 'stage 2']
    """
    if not networks or not all(networks.values()):
        raise ValueError(
            f"expected the stages of one or more networks, got {dict(networks)}; capture_features has them."
        )
    volume = first_channel(image)
    axis = slice_axis(spatial_axis)
    number = volume.shape[axis] // 2 if slice_number is None else slice_number
    columns = max(map(len, networks.values()))
    figure, grid = new_figure(volume.shape, axis, spacing, len(networks), 1 + columns)
    for row, (title, stages) in zip(grid, networks.items(), strict=True):
        show(row[0], cut(volume, axis, number), value_window([volume]), spacing, axis)
        row[0].set_ylabel(title, fontsize=9)
        for axes, stage in zip(row[1:], stages, strict=False):
            picture = cut(_magnify(_channel_mean(stage.gated), volume.shape), axis, number)
            show(axes, picture, value_window([picture]), spacing, axis, colormap=_FEATURES)
        for axes in row[1 + len(stages) :]:
            axes.set_axis_off()
    for axes, title in zip(grid[0], [f"slice {number}", *(f"stage {i + 1}" for i in range(columns))], strict=True):
        axes.set_title(title, fontsize=9)
    return figure


def _channel_mean(features: torch.Tensor) -> np.ndarray:
    """``(b, c, *spatial)`` to ``(*spatial)``."""
    return convert_to_numpy(features[0].float().mean(dim=0))


def _magnify(volume: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Each voxel of ``size`` gets the value of the one that its center lies in."""
    for axis, number in enumerate(size):
        nearest = (np.arange(number) + 0.5) * volume.shape[axis] / number
        volume = np.take(volume, nearest.astype(int), axis=axis)
    return volume


def _scale(figure: Figure, shown: AxesImage, panels: list[Axes], *, below: bool = False) -> None:
    """A color bar for several panels."""
    bar = figure.colorbar(
        shown, ax=panels, location="bottom" if below else "right", aspect=12, pad=0.02, ticks=MaxNLocator(3)
    )
    bar.ax.tick_params(labelsize=7)
