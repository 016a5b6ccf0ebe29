"""Pictures of slices: masks of reference and predictions as in Fig. 4 of Zhang et al., 2021, residuals as in Fig. 1.

Everything works without a display. An axis that is not sliced is drawn from left to right or from bottom to top; after
``Orientationd("RAS")`` an axial slice has anterior at the top and the patient's right on the right.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from monai.config import NdarrayOrTensor
from monai.utils import convert_to_numpy, optional_import

from monai_conres.files import atomic_path
from monai_conres.residual import foreground_masks, residual_mask, slice_dim

_INSTALL = "{}; install it with: pip install 'monai-conres[plot]'"
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
else:
    Figure, _ = optional_import("matplotlib.figure", name="Figure", descriptor=_INSTALL)
    Patch, _ = optional_import("matplotlib.patches", name="Patch", descriptor=_INSTALL)
    to_rgb, _ = optional_import("matplotlib.colors", name="to_rgb", descriptor=_INSTALL)

__all__ = ["COLORS", "plot_residuals", "plot_slices", "save_figure"]

#: colors of the classes, distinguishable to the color-blind (Okabe and Ito, 2008)
COLORS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
_OPACITY = 0.55


def plot_slices(
    image: NdarrayOrTensor,
    masks: Mapping[str, NdarrayOrTensor],
    *,
    residuals: Mapping[str, NdarrayOrTensor] | None = None,
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
    volume = _spatial(image)
    colored = {title: _class_masks(mask, volume.shape) for title, mask in masks.items()}
    grays = {
        title: _channels(residual, volume.shape).max(axis=0).astype(np.float32)
        for title, residual in (residuals or {}).items()
    }
    axis = slice_dim(5, spatial_axis) - 2
    if isinstance(slices, int):
        slices = _spread_slices(next(iter(colored.values()), None), volume.shape, axis, slices)
    if not len(slices):
        raise ValueError("expected one or more slices to draw, got none.")
    figure, grid = _figure(volume.shape, axis, spacing, len(slices), 1 + len(colored) + len(grays))
    window = np.percentile(volume, (1, 99.5))
    for row, number in zip(grid, slices, strict=True):
        background = _cut(volume, axis, number)
        _show(row[0], background, window, spacing, axis)
        row[0].set_ylabel(f"slice {number}", fontsize=8)
        for axes, mask in zip(row[1:], colored.values(), strict=False):
            _show(
                axes,
                _overlay(background, window, [_cut(channel, axis, number) for channel in mask]),
                None,
                spacing,
                axis,
            )
        for axes, gray in zip(row[1 + len(colored) :], grays.values(), strict=True):
            _show(axes, _cut(gray, axis, number), (0, 1), spacing, axis)
    for axes, title in zip(grid[0], ["image", *colored, *grays], strict=True):
        axes.set_title(title, fontsize=9)
    _legend(figure, max((len(mask) for mask in colored.values()), default=0), class_names)
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
    volume = _spatial(image)
    masks = _class_masks(label, volume.shape)
    residual = residual_mask(torch.from_numpy(masks)[None], spatial_axis=spatial_axis)[0].numpy()
    axis = slice_dim(5, spatial_axis) - 2
    if isinstance(slices, int):
        changed = residual.any(axis=0).sum(axis=tuple(other for other in range(3) if other != axis))
        first = int(np.clip(changed.argmax() - slices // 2, 0, max(0, volume.shape[axis] - slices)))
        slices = range(first, min(first + slices, volume.shape[axis]))
    figure, grid = _figure(volume.shape, axis, spacing, 3, len(slices))
    window = np.percentile(volume, (1, 99.5))
    for column, number in enumerate(slices):
        background = _cut(volume, axis, number)
        _show(grid[0][column], background, window, spacing, axis)
        overlay = _overlay(background, window, [_cut(mask, axis, number) for mask in masks])
        _show(grid[1][column], overlay, None, spacing, axis)
        # in the colors of the classes, on black
        changes = _overlay(
            np.zeros_like(background), (0, 1), [_cut(mask, axis, number) for mask in residual], opacity=1.0
        )
        _show(grid[2][column], changes, None, spacing, axis)
        grid[0][column].set_title(f"slice {number}", fontsize=9)
    for row, name in zip(grid, ("image", "mask", "residual mask"), strict=True):
        row[0].set_ylabel(name, fontsize=9)
    _legend(figure, len(masks), class_names)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike, *, dpi: int = 150) -> None:
    """Write a figure as a PNG file. A file of that name is replaced when the new one is complete, not before.

    Args:
        figure: a figure of :func:`plot_slices` or :func:`plot_residuals`.
        path: name of the file; folders on the way are made.
        dpi: dots per inch.
    """
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)


def _channels(array: NdarrayOrTensor, size: tuple[int, ...]) -> np.ndarray:
    """``(c, *spatial)``."""
    channels = convert_to_numpy(array)
    channels = channels[None] if channels.ndim == 3 else channels
    if channels.shape[1:] != size:
        raise ValueError(
            f"expected an array of the image's spatial size {size}, with or without a channel, got {channels.shape}."
        )
    return channels


def _spatial(image: NdarrayOrTensor) -> np.ndarray:
    """The first channel of an image, ``(*spatial)``."""
    volume = convert_to_numpy(image)
    volume = volume[0] if volume.ndim == 4 else volume
    if volume.ndim != 3:
        raise ValueError(
            f"expected an image of shape (c, d, h, w) or (d, h, w), got {volume.shape}; take one of a batch."
        )
    return volume.astype(np.float32)


def _class_masks(mask: NdarrayOrTensor, size: tuple[int, ...]) -> np.ndarray:
    """Booleans ``(c, *spatial)``, a channel for each foreground class."""
    channels = torch.from_numpy(np.ascontiguousarray(_channels(mask, size)))
    if len(channels) == 1:
        num_classes = max(2, int(channels.max()) + 1)
        return foreground_masks(channels[None], num_classes=num_classes)[0].bool().numpy()
    return foreground_masks(channels[None])[0].bool().numpy()


def _spread_slices(mask: np.ndarray | None, size: tuple[int, ...], axis: int, count: int) -> list[int]:
    """Numbers of slices, evenly spread over those where the mask is not empty."""
    candidates = np.arange(size[axis])
    if mask is not None and mask.any():
        candidates = candidates[np.any(mask, axis=(0, *(1 + other for other in range(3) if other != axis)))]
    count = min(count, len(candidates))
    return [int(candidates[round((2 * i + 1) * len(candidates) / (2 * count) - 0.5)]) for i in range(count)]


def _cut(volume: np.ndarray, axis: int, number: int) -> np.ndarray:
    """One slice, its first axis from left to right and its second from bottom to top."""
    if not 0 <= number < volume.shape[axis]:
        raise ValueError(f"expected slices from 0 to {volume.shape[axis] - 1}, got {number}.")
    return np.take(volume, number, axis=axis).T


def _overlay(
    background: np.ndarray, window: Sequence[float], masks: Sequence[np.ndarray], opacity: float = _OPACITY
) -> np.ndarray:
    """Masks in their colors over a gray slice, the largest first, so that nested ones all show; ``(h, w, 3)``."""
    low, high = window
    gray = np.clip((background - low) / max(high - low, 1e-6), 0, 1)
    picture = np.repeat(gray[..., None], 3, axis=-1)
    for number in sorted(range(len(masks)), key=lambda number: -int(masks[number].sum())):
        color = np.array(to_rgb(COLORS[number % len(COLORS)]))
        inside = masks[number].astype(bool)
        picture[inside] = (1 - opacity) * gray[inside][:, None] + opacity * color
    return picture


def _figure(
    size: tuple[int, ...], axis: int, spacing: Sequence[float], rows: int, columns: int
) -> tuple[Figure, list[list[Axes]]]:
    """A figure of equal panels in the shape of a slice."""
    width, height = (size[other] * spacing[other] for other in range(3) if other != axis)
    panel = 1.9  # inches, of the longer edge
    scale = panel / max(width, height)
    figure = Figure(
        figsize=(columns * (width * scale + 0.06) + 0.4, rows * (height * scale + 0.06) + 0.7), layout="compressed"
    )
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


def _show(axes: Axes, picture: np.ndarray, window: Sequence[float] | None, spacing: Sequence[float], axis: int) -> None:
    """Draw one slice in its true proportions."""
    horizontal, vertical = (spacing[other] for other in range(3) if other != axis)
    low, high = (None, None) if window is None else window
    axes.imshow(
        picture, cmap="gray", vmin=low, vmax=high, origin="lower", aspect=vertical / horizontal, interpolation="nearest"
    )
    axes.set_xticks([])
    axes.set_yticks([])


def _legend(figure: Figure, classes: int, names: Sequence[str]) -> None:
    if classes:
        labels = [names[i] if i < len(names) else f"class {i + 1}" for i in range(classes)]
        handles = [Patch(color=COLORS[i % len(COLORS)], label=label) for i, label in enumerate(labels)]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(classes, 4), fontsize=8, frameon=False)
