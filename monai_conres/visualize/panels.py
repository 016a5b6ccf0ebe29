"""What the figures share: checked arrays, slices in true proportions, masks in their colors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch
from monai.config import NdarrayOrTensor
from monai.utils import convert_to_numpy

from monai_conres.files import atomic_path
from monai_conres.residual import slice_dim

__all__ = ["COLORS", "save_figure"]

#: colors of the classes that color-blind readers can tell apart (Okabe and Ito, 2008)
COLORS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
DARK = 0.4  # brightness of voxels without a label
PANEL = 1.9  # length of a panel's longer edge, in inches
Window: TypeAlias = tuple[float, float]  # values of the first and the last color
Masks: TypeAlias = Mapping[int, np.ndarray]  # booleans (d, h, w) by number of the foreground class, from 0


def save_figure(figure: Figure, path: str | os.PathLike, *, dpi: int = 150) -> None:
    """Write a figure as a PNG file. An existing file is replaced only when the new one is complete.

    Args:
        figure: a figure from one of the functions here.
        path: name of the file. Missing folders are made.
        dpi: dots per inch.

    Example:
        >>> import tempfile
        >>> from monai_conres.visualize import plot_curves
        >>> save_figure(plot_curves({"ConResNet": [3, 2, 1]}), f"{tempfile.mkdtemp()}/curves.png")
    """
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, bbox_inches="tight", pad_inches=0.05)


class View:
    """How volumes of one size are cut into slices and drawn.

    Args:
        size: number of voxels along each axis.
        spatial_axis: index of the slice axis among the three spatial axes.
        spacing: voxel size in mm.
    """

    def __init__(self, size: tuple[int, ...], spatial_axis: int, spacing: Sequence[float]) -> None:
        self.size = size
        self.axis = slice_dim(5, spatial_axis) - 2
        self.plane = [axis for axis in range(3) if axis != self.axis]
        self.spacing = [spacing[axis] for axis in self.plane]

    def figure(
        self, rows: Sequence[str], columns: Sequence[str], *, extra: float = 0.0
    ) -> tuple[Figure, list[list[Axes]]]:
        """A figure of equal panels in the shape of a slice, with names of rows and columns and ``extra`` inches."""
        width, height = (self.size[axis] * edge for axis, edge in zip(self.plane, self.spacing, strict=True))
        scale = PANEL / max(width, height)
        figsize = (len(columns) * (width * scale + 0.06) + 0.4, len(rows) * (height * scale + 0.06) + 0.7 + extra)
        figure = Figure(figsize=figsize, layout="compressed")
        grid = figure.subplots(len(rows), len(columns), squeeze=False).tolist()
        for panels, name in zip(grid, rows, strict=True):
            panels[0].set_ylabel(name, fontsize=9)
        for axes, title in zip(grid[0], columns, strict=True):
            axes.set_title(title, fontsize=9)
        return figure, grid

    def cut(self, volume: np.ndarray, number: int) -> np.ndarray:
        """One slice ``(vertical, horizontal)``."""
        if not 0 <= number < volume.shape[self.axis]:
            raise ValueError(f"expected slices from 0 to {volume.shape[self.axis] - 1}, got {number}.")
        return np.take(volume, number, axis=self.axis).T

    def show(
        self, axes: Axes, picture: np.ndarray, window: Window | None = None, *, colormap: str = "gray"
    ) -> AxesImage:
        """Draw one slice in its true proportions."""
        horizontal, vertical = self.spacing
        low, high = window or (None, None)
        axes.set(xticks=[], yticks=[])
        return axes.imshow(
            picture,
            cmap=colormap,
            vmin=low,
            vmax=high,
            origin="lower",
            aspect=vertical / horizontal,
            interpolation="nearest",
        )

    def paint(
        self,
        number: int,
        masks: Masks,
        background: np.ndarray,
        window: Window,
        *,
        opacity: float = 0.55,
        ignored: np.ndarray | None = None,
    ) -> np.ndarray:
        """Masks in their colors over one slice of the background, the largest mask first; ``(h, w, 3)``.

        The background is dark where ``ignored``, booleans ``(d, h, w)``, says so.
        """
        low, high = window
        gray = np.clip((self.cut(background, number) - low) / max(high - low, 1e-6), 0, 1)
        if ignored is not None:
            gray = np.where(self.cut(ignored, number), DARK * gray, gray)
        picture = np.repeat(gray[..., None], 3, axis=-1)
        pieces = {key: self.cut(mask, number) for key, mask in masks.items()}
        for key, inside in sorted(pieces.items(), key=lambda item: -int(item[1].sum())):
            picture[inside] = (1 - opacity) * gray[inside][:, None] + opacity * np.array(class_color(key))
        return picture

    def spread_slices(self, masks: Iterable[np.ndarray], count: int) -> list[int]:
        """Numbers of slices, evenly spread over the slices where a mask is not empty."""
        filled = np.zeros(self.size[self.axis], dtype=bool)
        for mask in masks:
            filled |= mask.any(axis=tuple(self.plane))
        candidates = np.flatnonzero(filled) if filled.any() else np.arange(len(filled))
        count = min(count, len(candidates))
        return [int(candidates[round((2 * i + 1) * len(candidates) / (2 * count) - 0.5)]) for i in range(count)]


def adjacent_slices(middle: int, number: int, count: int) -> range:
    """Numbers of ``count`` adjacent slices of ``number`` slices, around ``middle``."""
    first = min(max(0, middle - count // 2), max(0, number - count))
    return range(first, min(first + count, number))


def first_channel(image: NdarrayOrTensor) -> np.ndarray:
    """The first channel of an image, ``(d, h, w)``."""
    return all_channels(image)[0].astype(np.float32)


def all_channels(array: NdarrayOrTensor, size: tuple[int, ...] | None = None) -> np.ndarray:
    """Channels ``(c, d, h, w)`` of spatial size ``size``."""
    if isinstance(array, torch.Tensor) and array.dtype == torch.bfloat16:  # numpy does not have it
        array = array.float()
    channels = convert_to_numpy(array)
    channels = channels[None] if channels.ndim == 3 else channels
    if channels.ndim != 4:
        raise ValueError(
            f"expected an array of shape (c, d, h, w) or (d, h, w), got {channels.shape}; take one image of a batch."
        )
    if size is not None and channels.shape[1:] != size:
        raise ValueError(f"expected an array of the image's spatial size {size}, got shape {channels.shape}.")
    return channels


def largest_channel(array: NdarrayOrTensor, size: tuple[int, ...]) -> np.ndarray:
    """The largest value of all channels, ``(d, h, w)``."""
    return all_channels(array, size).max(axis=0).astype(np.float32)


def ignored_voxels(mask: NdarrayOrTensor, size: tuple[int, ...], ignore_index: int | None) -> np.ndarray | None:
    """True where no channel of the mask has a label, ``(d, h, w)``."""
    return None if ignore_index is None else (all_channels(mask, size) == ignore_index).all(0)


def class_masks(mask: NdarrayOrTensor, size: tuple[int, ...], ignore_index: int | None = None) -> Masks:
    """Masks of the foreground classes: of every channel, or of the class indices that one channel has."""
    channels = all_channels(mask, size)
    if ignore_index is not None:
        channels = np.where(channels == ignore_index, 0, channels)
    if len(channels) > 1:
        if not ((channels == 0) | (channels == 1)).all():
            raise ValueError("expected channels of zeros and ones, or class indices in one channel, got other values.")
        return dict(enumerate(channels.astype(bool)))
    values = np.unique(channels)
    if (values != np.round(values)).any() or values[0] < 0:
        raise ValueError(
            f"expected class indices 0, 1, ... in one channel, got values from {values[0]} to {values[-1]}."
        )
    return {int(value) - 1: channels[0] == value for value in values if value > 0}


def class_color(number: int) -> tuple[float, float, float]:
    """Red, green and blue of a foreground class, counted from 0."""
    return to_rgb(COLORS[number % len(COLORS)])


def value_window(pictures: Iterable[np.ndarray]) -> Window:
    """Values of the first and the last color: nearly all values of some pictures of one size."""
    low, high = np.percentile(np.stack(list(pictures)), (1, 99.5))
    return float(low), float(high)


def class_legend(figure: Figure, masks: Iterable[Masks], names: Sequence[str]) -> None:
    """Names of the foreground classes below the panels: named classes, and classes that a mask has."""
    labels = {number: f"class {number + 1}" for mask in masks for number in mask} | dict(enumerate(names))
    if labels:
        handles = [Patch(color=class_color(number), label=labels[number]) for number in sorted(labels)]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(labels), 4), fontsize=8, frameon=False)
