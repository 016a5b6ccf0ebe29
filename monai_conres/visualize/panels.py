"""What the pictures share: arrays checked and cut into slices, panels in true proportions, masks in their colors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from monai.config import NdarrayOrTensor
from monai.utils import convert_to_numpy, optional_import

from monai_conres.files import atomic_path
from monai_conres.residual import check_values, slice_dim

INSTALL = "{}; install it with: pip install 'monai-conres[plot]'"
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.patches import Patch
else:
    Figure, _ = optional_import("matplotlib.figure", name="Figure", descriptor=INSTALL)
    Patch, _ = optional_import("matplotlib.patches", name="Patch", descriptor=INSTALL)
    to_rgb, _ = optional_import("matplotlib.colors", name="to_rgb", descriptor=INSTALL)

__all__ = ["COLORS", "save_figure"]

#: colors of the classes, distinguishable to the color-blind (Okabe and Ito, 2008)
COLORS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
OPACITY = 0.55
PANEL = 1.9  # inches, of the longer edge
Window: TypeAlias = tuple[float, float]
Masks: TypeAlias = Mapping[int, np.ndarray]


def save_figure(figure: Figure, path: str | os.PathLike, *, dpi: int = 150) -> None:
    """Write a figure as a PNG file. A file of that name is replaced when the new one is complete, not before.

    Args:
        figure: a figure of one of the functions here.
        path: name of the file; folders on the way are made.
        dpi: dots per inch.

    Example:
        >>> import tempfile
        >>> from monai_conres.visualize import plot_curves
        >>> save_figure(plot_curves({"ConResNet": [3, 2, 1]}), f"{tempfile.mkdtemp()}/curves.png")
    """
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, bbox_inches="tight", pad_inches=0.05)


def slice_axis(spatial_axis: int) -> int:
    """``spatial_axis`` as a number from 0 to 2."""
    return slice_dim(5, spatial_axis) - 2


def to_numpy(array: NdarrayOrTensor) -> np.ndarray:
    """An array of any kind, in this machine's order of bytes; numpy has no bfloat16."""
    if isinstance(array, torch.Tensor) and array.dtype == torch.bfloat16:
        array = array.float()
    converted = convert_to_numpy(array)
    return converted.astype(converted.dtype.newbyteorder("="), copy=False)


def first_channel(image: NdarrayOrTensor) -> np.ndarray:
    """The first channel of an image, ``(*spatial)``."""
    volume = to_numpy(image)
    volume = volume[0] if volume.ndim == 4 else volume
    if volume.ndim != 3:
        raise ValueError(
            f"expected an image of shape (c, d, h, w) or (d, h, w), got {volume.shape}; take one of a batch."
        )
    return volume.astype(np.float32)


def all_channels(array: NdarrayOrTensor, size: tuple[int, ...] | None = None) -> np.ndarray:
    """``(c, *spatial)``."""
    channels = to_numpy(array)
    channels = channels[None] if channels.ndim == 3 else channels
    if channels.ndim != 4:
        raise ValueError(f"expected an array of shape (c, d, h, w) or (d, h, w), got {channels.shape}.")
    if size is not None and channels.shape[1:] != size:
        raise ValueError(
            f"expected an array of the image's spatial size {size}, with or without a channel, got {channels.shape}."
        )
    return channels


def class_masks(mask: NdarrayOrTensor, size: tuple[int, ...] | None = None) -> Masks:
    """Booleans ``(*spatial)`` by the number of the foreground class, from 0; of class indices those that are there."""
    channels = np.ascontiguousarray(all_channels(mask, size))
    if len(channels) > 1:
        check_values(torch.from_numpy(channels), 2, "zeros and ones, or class indices in one channel")
        return dict(enumerate(channels.astype(bool)))
    values = np.unique(channels)
    check_values(torch.from_numpy(values), 2**31, "class indices")
    return {int(value) - 1: channels[0] == value for value in values if value > 0}


def chosen_slices(slices: int | Sequence[int], take: Callable[[int], Sequence[int]]) -> Sequence[int]:
    """The numbers of the slices, or as many as asked for."""
    if isinstance(slices, (int, np.integer)):
        slices = take(int(slices)) if slices > 0 else ()
    if not len(slices):
        raise ValueError("expected one or more slices to draw, got none.")
    return slices


def spread_slices(masks: Iterable[np.ndarray], size: tuple[int, ...], axis: int, count: int) -> list[int]:
    """Numbers of slices, evenly spread over those where one of some masks ``(*spatial)`` is not empty."""
    others = tuple(other for other in range(3) if other != axis)
    filled = np.zeros(size[axis], dtype=bool)
    for mask in masks:
        filled |= mask.any(axis=others)
    candidates = np.flatnonzero(filled) if filled.any() else np.arange(size[axis])
    count = min(count, len(candidates))
    return [int(candidates[round((2 * i + 1) * len(candidates) / (2 * count) - 0.5)]) for i in range(count)]


def adjacent_slices(middle: int, number: int, count: int) -> range:
    """``count`` adjacent ones of ``number`` slices, around the one in the middle."""
    first = min(max(0, middle - count // 2), max(0, number - count))
    return range(first, min(first + count, number))


def cut(volume: np.ndarray, axis: int, number: int) -> np.ndarray:
    """One slice, its first axis from left to right and its second from bottom to top."""
    if not 0 <= number < volume.shape[axis]:
        raise ValueError(f"expected slices from 0 to {volume.shape[axis] - 1}, got {number}.")
    return np.take(volume, number, axis=axis).T


def cut_masks(masks: Masks, axis: int, number: int) -> Masks:
    """One slice of each mask."""
    return {key: cut(mask, axis, number) for key, mask in masks.items()}


def paint_masks(background: np.ndarray, window: Window, masks: Masks, opacity: float = OPACITY) -> np.ndarray:
    """Masks in their colors over a gray slice, the largest first, so that nested ones all show; ``(h, w, 3)``."""
    low, high = window
    gray = np.clip((background - low) / max(high - low, 1e-6), 0, 1)
    picture = np.repeat(gray[..., None], 3, axis=-1)
    for number, inside in sorted(masks.items(), key=lambda item: -int(item[1].sum())):
        picture[inside] = (1 - opacity) * gray[inside][:, None] + opacity * np.array(class_color(number))
    return picture


def class_color(number: int) -> tuple[float, float, float]:
    """Red, green and blue of a foreground class, counted from 0."""
    return to_rgb(COLORS[number % len(COLORS)])


def new_figure(
    size: Sequence[int], axis: int, spacing: Sequence[float], rows: int, columns: int, *, extra: float = 0.0
) -> tuple[Figure, list[list[Axes]]]:
    """A figure of equal panels in the shape of a slice, and ``extra`` inches of height."""
    width, height = (size[other] * spacing[other] for other in range(3) if other != axis)
    scale = PANEL / max(width, height)
    figure = Figure(
        figsize=(columns * (width * scale + 0.06) + 0.4, rows * (height * scale + 0.06) + 0.7 + extra),
        layout="compressed",
    )
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


def show(
    axes: Axes,
    picture: np.ndarray,
    window: Window | None,
    spacing: Sequence[float],
    axis: int,
    *,
    colormap: str = "gray",
) -> AxesImage:
    """Draw one slice in its true proportions."""
    horizontal, vertical = (spacing[other] for other in range(3) if other != axis)
    low, high = (None, None) if window is None else window
    axes.set_xticks([])
    axes.set_yticks([])
    return axes.imshow(
        picture,
        cmap=colormap,
        vmin=low,
        vmax=high,
        origin="lower",
        aspect=vertical / horizontal,
        interpolation="nearest",
    )


def value_window(pictures: Iterable[np.ndarray]) -> Window:
    """The values that have the first and the last color: nearly all of those in some pictures of one size."""
    low, high = np.percentile(np.stack(list(pictures)), (1, 99.5))
    return float(low), float(high)


def class_legend(figure: Figure, masks: Iterable[Masks], names: Sequence[str]) -> None:
    """Names of the foreground classes below the panels: those that have one, and those that are there."""
    labels = {number: f"class {number + 1}" for number in sorted({number for mask in masks for number in mask})}
    labels = dict(sorted((labels | dict(enumerate(names))).items()))
    if labels:
        handles = [Patch(color=class_color(number), label=label) for number, label in labels.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(labels), 4), fontsize=8, frameon=False)
