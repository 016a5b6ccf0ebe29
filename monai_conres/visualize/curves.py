"""Loss curves, as in Fig. 8 of Zhang et al., 2021."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from monai_conres.visualize.panels import COLORS

__all__ = ["plot_curves"]


def plot_curves(
    curves: Mapping[str, Sequence[float]], *, window: int = 1, name: str = "loss", step: str = "iteration"
) -> Figure:
    """Draw a value of each iteration or epoch, one curve for each network or setting.

    Args:
        curves: values by title, from the first step on.
        window: the line is the mean of this many values, up to its own step. The single values are pale.
        name: what the values are.
        step: what each value belongs to.

    Raises:
        ValueError: when there is no curve, or a curve is shorter than ``window``.

    Example:
        >>> figure = plot_curves({"baseline": [4, 3, 2], "ConResNet": [3, 2, 1]}, window=2)
        >>> figure.axes[0].get_ylabel()
        'loss, mean of 2 iterations'
    """
    shortest = min((len(values) for values in curves.values()), default=0)
    if not 1 <= window <= shortest:
        raise ValueError(f"expected a window from 1 to {shortest}, the length of the shortest curve, got {window}.")
    figure = Figure(figsize=(5.5, 3.2), layout="constrained")
    axes = figure.subplots()
    for number, (title, values) in enumerate(curves.items()):
        color = COLORS[(4, 5, 2, 6, 0, 1, 3)[number % len(COLORS)]]  # blue and orange differ most
        mean = np.convolve(values, np.full(window, 1 / window), mode="valid")
        if window > 1:
            axes.plot(np.arange(1, len(values) + 1), values, color=color, alpha=0.2, linewidth=0.7)
        axes.plot(np.arange(window, len(values) + 1), mean, color=color, label=title)
    axes.set_xlabel(step)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(name if window == 1 else f"{name}, mean of {window} {step}s")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
