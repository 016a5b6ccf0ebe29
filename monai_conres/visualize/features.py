"""Features and gates of a decoder's stages, as in Fig. 3, 6 and 7 of Zhang et al., 2021.

A map is the mean over the channels of the first image of a batch. Maps of coarse stages are enlarged to the size of the
image without interpolation, so that their voxels stay visible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from monai.config import NdarrayOrTensor

from monai_conres.residual import inter_slice_residual
from monai_conres.visualize.capture import StageFeatures
from monai_conres.visualize.panels import View, adjacent_slices, first_channel, largest_channel, value_window

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
        image: ``(d, h, w)`` or ``(c, d, h, w)``. The first channel is drawn.
        stage: a stage from :func:`capture_features`. Its features before the gate are drawn.
        slices: numbers of the features' slices, or how many adjacent slices to take in the middle.
        spatial_axis: index of the slice axis among the three spatial axes.
        spacing: voxel size of the image in mm.

    Raises:
        ValueError: when a slice does not exist, or the image is a batch.

    Example:
        >>> features = torch.randn(1, 8, 10, 12, 5)
        >>> figure = plot_feature_residuals(torch.rand(1, 20, 24, 10), StageFeatures(features, None, None, features))
        >>> len(figure.axes)  # 3 rows of 4 slices, and 2 color bars
        14
    """
    volume, features = first_channel(image), _channel_mean(stage.features)
    view = View(volume.shape, spatial_axis, spacing)
    change = inter_slice_residual(torch.from_numpy(features)[None, None], spatial_axis=spatial_axis)[0, 0].numpy()
    number_of_slices = features.shape[view.axis]
    if isinstance(slices, int):
        slices = adjacent_slices(number_of_slices // 2, number_of_slices, slices)
    size = [number_of_slices if axis == view.axis else edge for axis, edge in enumerate(volume.shape)]
    figure, grid = view.figure(["image", "features", "difference"], [f"slice {number}" for number in slices], extra=0.3)
    for row, array, colormap in zip(grid, (volume, features, change), ("gray", _FEATURES, _CHANGES), strict=True):
        pictures = [view.cut(_enlarge(array, size), number) for number in slices]
        window = value_window([volume] if array is volume else pictures)
        for axes, picture in zip(row, pictures, strict=True):
            shown = view.show(axes, picture, window, colormap=colormap)
        if array is not volume:
            _color_bar(figure, shown, row, "right")
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

    Features without and with the gate have one color scale.

    Args:
        image: ``(d, h, w)`` or ``(c, d, h, w)``. The first channel is drawn.
        stage: a stage from :func:`capture_features`. The paper shows the last stage.
        residuals: residual masks or their probabilities by title, as in :func:`plot_slices`, to compare with.
        slices: numbers of the image's slices, or how many to spread over the slices where the first of ``residuals``
            is not empty.
        spatial_axis: index of the slice axis among the three spatial axes.
        spacing: voxel size of the image in mm.

    Raises:
        ValueError: when the stage has no gate, an array does not have the image's spatial size, or a slice does not
            exist.

    Example:
        >>> stage = StageFeatures(*torch.rand(4, 1, 8, 20, 24, 10))
        >>> figure = plot_attention(torch.rand(1, 20, 24, 10), stage, slices=[4, 5])
        >>> [axes.get_title() for axes in figure.axes[:4]]
        ['image', 'features\\nwithout gate', 'attention', 'features\\nwith gate']
    """
    if stage.gate is None:
        raise ValueError('expected a stage with a gate, got none; capture a network with context="attention".')
    volume = first_channel(image)
    view = View(volume.shape, spatial_axis, spacing)
    grays = {title: largest_channel(residual, volume.shape) for title, residual in (residuals or {}).items()}
    if isinstance(slices, int):
        slices = view.spread_slices([gray > 0.5 for gray in grays.values()][:1], slices)
    before, gate, after = (_enlarge(_channel_mean(t), volume.shape) for t in (stage.features, stage.gate, stage.gated))
    shared = value_window(view.cut(array, number) for array in (before, after) for number in slices)
    columns = {
        "image": (volume, value_window([volume]), "gray"),
        "features\nwithout gate": (before, shared, _FEATURES),
        "attention": (gate, value_window(view.cut(gate, number) for number in slices), _CHANGES),
        "features\nwith gate": (after, shared, _FEATURES),
        **{title: (gray, (0.0, 1.0), "gray") for title, gray in grays.items()},
    }
    figure, grid = view.figure([f"slice {number}" for number in slices], list(columns), extra=0.6)
    for panels, (array, window, colormap) in zip(zip(*grid, strict=True), columns.values(), strict=True):
        for axes, number in zip(panels, slices, strict=True):
            shown = view.show(axes, view.cut(array, number), window, colormap=colormap)
        if colormap != "gray":
            _color_bar(figure, shown, panels, "bottom")
    return figure


def plot_stages(
    image: NdarrayOrTensor,
    networks: Mapping[str, Sequence[StageFeatures]],
    *,
    slice_number: int | None = None,
    spatial_axis: int = -1,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
) -> Figure:
    """Draw one slice of the features after each decoder stage (columns) of several networks (rows), as Fig. 7.

    Every panel has its own color scale, because features of different networks have no common unit.

    Args:
        image: ``(d, h, w)`` or ``(c, d, h, w)``. The first channel is drawn.
        networks: stages from :func:`capture_features` by the network's title. The features after the gate are drawn.
        slice_number: number of the image's slice; ``None`` is the middle.
        spatial_axis: index of the slice axis among the three spatial axes.
        spacing: voxel size of the image in mm.

    Raises:
        ValueError: when there is no network, the slice does not exist, or the image is a batch.

    Example:
        >>> features = torch.rand(1, 8, 10, 12, 5), torch.rand(1, 4, 20, 24, 10)
        >>> stages = [StageFeatures(tensor, None, None, tensor) for tensor in features]
        >>> figure = plot_stages(torch.rand(1, 20, 24, 10), {"baseline": stages, "ConResNet": stages})
        >>> [axes.get_title() for axes in figure.axes[:3]]
        ['slice 5', 'stage 1', 'stage 2']
    """
    if not networks:
        raise ValueError("expected the stages of one or more networks, got none; capture_features returns them.")
    volume = first_channel(image)
    view = View(volume.shape, spatial_axis, spacing)
    number = volume.shape[view.axis] // 2 if slice_number is None else slice_number
    columns = [f"stage {index + 1}" for index in range(max(map(len, networks.values())))]
    figure, grid = view.figure(list(networks), [f"slice {number}", *columns])
    for row, stages in zip(grid, networks.values(), strict=True):
        view.show(row[0], view.cut(volume, number), value_window([volume]))
        for axes, stage in zip(row[1:], stages, strict=False):
            picture = view.cut(_enlarge(_channel_mean(stage.gated), volume.shape), number)
            view.show(axes, picture, value_window([picture]), colormap=_FEATURES)
        for axes in row[1 + len(stages) :]:
            axes.set_axis_off()
    return figure


def _channel_mean(features: torch.Tensor) -> np.ndarray:
    """``(b, c, d, h, w)`` to ``(d, h, w)``."""
    return features[0].float().mean(dim=0).cpu().numpy()


def _enlarge(volume: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """A volume of ``size`` voxels: each has the value of the voxel at its center."""
    for axis, number in enumerate(size):
        nearest = (np.arange(number) + 0.5) * volume.shape[axis] / number
        volume = np.take(volume, nearest.astype(int), axis=axis)
    return volume


def _color_bar(figure: Figure, shown: AxesImage, panels: Sequence[Axes], location: str) -> None:
    """One color bar for several panels."""
    bar = figure.colorbar(shown, ax=panels, location=location, aspect=12, pad=0.02, ticks=MaxNLocator(3))
    bar.ax.tick_params(labelsize=7)
