"""Metrics with the BraTS rules for empty masks, on MONAI's cumulative metric classes.

MONAI's own leave a case out where a mask is empty: a structure that the prediction missed has no Hausdorff distance and
drops out of the mean, and false positives on an empty reference do not lower the Dice. By the rules of the BraTS
challenge every case counts:

================  ====  ==================  =============
mask              Dice  Hausdorff distance  surface Dice
================  ====  ==================  =============
both empty        1     0                   1
one empty         0     the worst possible  0
================  ====  ==================  =============
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from monai.metrics import (
    CumulativeIterationMetric,
    compute_dice,
    compute_hausdorff_distance,
    compute_surface_dice,
    do_metric_reduction,
)
from monai.utils import convert_to_numpy

__all__ = ["BratsDiceMetric", "BratsHausdorffDistanceMetric", "BratsSurfaceDiceMetric"]


class _BratsMetric(CumulativeIterationMetric):
    """A metric for each case and channel, and what it is where masks are empty."""

    def __init__(self, *, include_background: bool, reduction: str) -> None:
        super().__init__()
        self.include_background = include_background
        self.reduction = reduction

    def aggregate(self, reduction: str | None = None) -> torch.Tensor:
        """Reduce the values of all cases, as MONAI's metrics do; ``get_buffer()`` has them by case and channel."""
        values = self.get_buffer()
        if not isinstance(values, torch.Tensor):
            raise ValueError("expected values to aggregate, got none; call the metric on predictions first.")
        return do_metric_reduction(values, reduction or self.reduction)[0]

    def _compute_list(
        self, y_pred: Sequence[torch.Tensor], y: Sequence[torch.Tensor], spacing: float | Sequence | None = None
    ) -> torch.Tensor:
        """Cases ``(c, *spatial)``, of any sizes, each with its own spacing where there is one for each."""
        pairs = zip(y_pred, y, _spacing((len(y), y[0].ndim - 1), spacing), strict=True)
        return torch.cat([self._compute_tensor(p[None], r[None], edges) for p, r, edges in pairs])

    def _compute_tensor(
        self, y_pred: torch.Tensor, y: torch.Tensor, spacing: float | Sequence | None = None
    ) -> torch.Tensor:
        """``(b, c, *spatial)`` of zeros and ones, twice, to values ``(b, c)``."""
        if y_pred.shape != y.shape or y.ndim < 4:
            raise ValueError(
                f"expected prediction and reference of the same shape (b, c, *spatial), got {tuple(y_pred.shape)} and "
                f"{tuple(y.shape)}; bring both to one-hot or multi-hot channels (AsDiscrete)."
            )
        if not self.include_background:
            if y.shape[1] < 2:
                raise ValueError("expected 2 or more channels with include_background=False, got 1; use True.")
            y_pred, y = y_pred[:, 1:], y[:, 1:]
        for name, mask in (("prediction", y_pred), ("reference", y)):
            if not ((mask == 0) | (mask == 1)).all():
                raise ValueError(
                    f"expected a {name} of zeros and ones, got others; threshold it first (AsDiscrete), or turn class "
                    "indices into channels (AsDiscrete(to_onehot=...))."
                )
        y_pred, y = y_pred.float(), y.float()
        edges = _spacing((len(y), y.ndim - 2), spacing)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the (ground truth|prediction) of class")  # that is our business
            warnings.filterwarnings("ignore", message=".*always_return_as_numpy")  # MONAI's own call
            values = self._values(y_pred, y, edges)
        empty_pred, empty = y_pred.flatten(2).sum(-1) == 0, y.flatten(2).sum(-1) == 0
        best, worst = self._empty_values(y, edges)
        values = torch.where(empty_pred ^ empty, worst.to(values), values)
        return torch.where(empty_pred & empty, best.to(values), values)

    def _values(self, y_pred: torch.Tensor, y: torch.Tensor, edges: list[list[float]]) -> torch.Tensor:
        """Values ``(b, c)``; ``edges`` are those of the voxels of each case, in mm."""
        raise NotImplementedError

    def _empty_values(self, y: torch.Tensor, edges: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Values where both masks are empty and where one is, for each case ``(b, 1)`` or for all."""
        return torch.tensor(1.0), torch.tensor(0.0)


class BratsDiceMetric(_BratsMetric):
    """Dice coefficient (Eq. 11 of Zhang et al., 2021): 1 where both masks are empty, 0 where one is.

    Args:
        include_background: False leaves out channel 0.
        reduction: MONAI's word for what :meth:`aggregate` reduces over; ``"mean_batch"`` is a mean over cases for each
            channel.

    Shape:
        Called on prediction and reference, ``(b, c, *spatial)`` of zeros and ones, or lists of ``(c, *spatial)``; it
        returns and collects ``(b, c)``.

    Raises:
        ValueError: when shapes differ or values are not zeros and ones.

    Example:
        >>> metric = BratsDiceMetric()
        >>> prediction, reference = torch.zeros(2, 1, 2, 2, 2, 2)
        >>> prediction[0, 0, 0], reference[0, 0, 0, 0] = 1, 1
        >>> metric(prediction, reference)
        tensor([[0.6667, 1.0000]])
    """

    def __init__(self, *, include_background: bool = True, reduction: str = "mean_batch") -> None:
        super().__init__(include_background=include_background, reduction=reduction)

    def _values(self, y_pred: torch.Tensor, y: torch.Tensor, edges: list[list[float]]) -> torch.Tensor:
        return compute_dice(y_pred, y, include_background=True)


class BratsHausdorffDistanceMetric(_BratsMetric):
    """Hausdorff distance, its 95th percentile by default: 0 where both masks are empty, the worst where one is.

    Args:
        include_background: False leaves out channel 0.
        percentile: percentile of the surface distances, 0 to 100; 100 is the maximum (Eq. 12 of Zhang et al., 2021).
        empty_distance: value where one mask is empty, in mm. ``None`` is the diagonal of the volume, ``spacing *
            size``: 373.1287 for BraTS.
        reduction: as for :class:`BratsDiceMetric`.

    Shape:
        Called on prediction and reference, ``(b, c, *spatial)`` of zeros and ones, or lists of ``(c, *spatial)``; it
        returns and collects ``(b, c)``, in mm. ``spacing``, a further argument of the call, is the voxel size in mm:
        one number for each axis, or such a sequence for each case of a batch.

    Raises:
        ValueError: when shapes differ or values are not zeros and ones.

    Note:
        The distances need scipy on the CPU, cupy and cucim on a GPU.

    Example:
        >>> metric = BratsHausdorffDistanceMetric()
        >>> prediction, reference = torch.zeros(2, 1, 2, 155, 240, 240)
        >>> prediction[0, 0, :2, 0, 0], reference[0, 0, :4, 0, 0], reference[0, 1] = 1, 1, 1
        >>> metric(prediction, reference, spacing=(1, 1, 2.5))[0, 0]
        tensor(1.8500)
        >>> metric(prediction, reference)
        tensor([[  1.8500, 373.1287]])
    """

    def __init__(
        self,
        *,
        include_background: bool = True,
        percentile: float = 95,
        empty_distance: float | None = None,
        reduction: str = "mean_batch",
    ) -> None:
        super().__init__(include_background=include_background, reduction=reduction)
        self.percentile = percentile
        self.empty_distance = empty_distance

    def _values(self, y_pred: torch.Tensor, y: torch.Tensor, edges: list[list[float]]) -> torch.Tensor:
        return compute_hausdorff_distance(y_pred, y, include_background=True, percentile=self.percentile, spacing=edges)

    def _empty_values(self, y: torch.Tensor, edges: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
        if self.empty_distance is not None:
            return torch.tensor(0.0), torch.tensor(self.empty_distance)
        lengths = torch.tensor(edges) * torch.tensor(y.shape[2:])
        return torch.tensor(0.0), lengths.norm(dim=1, keepdim=True)


class BratsSurfaceDiceMetric(_BratsMetric):
    """Normalized surface Dice: share of both surfaces that lies within a tolerance of the other one.

    1 where both masks are empty, 0 where one is.

    Args:
        tolerance: distance that counts as agreement, in mm.
        include_background: False leaves out channel 0.
        reduction: as for :class:`BratsDiceMetric`.

    Shape:
        As for :class:`BratsHausdorffDistanceMetric`; the values are between 0 and 1.

    Raises:
        ValueError: when shapes differ or values are not zeros and ones.

    Example:
        >>> metric = BratsSurfaceDiceMetric(tolerance=1)
        >>> prediction, reference = torch.zeros(2, 1, 1, 6, 6, 6)
        >>> prediction[0, 0, 1, 1, 1:3], reference[0, 0, 1, 1, 1:5] = 1, 1
        >>> metric(prediction, reference)  # 2 of 2 and 3 of 4 voxels
        tensor([[0.8333]])
    """

    def __init__(
        self, *, tolerance: float = 1.0, include_background: bool = True, reduction: str = "mean_batch"
    ) -> None:
        super().__init__(include_background=include_background, reduction=reduction)
        self.tolerance = tolerance

    def _values(self, y_pred: torch.Tensor, y: torch.Tensor, edges: list[list[float]]) -> torch.Tensor:
        thresholds = [float(self.tolerance)] * y.shape[1]
        return compute_surface_dice(y_pred, y, thresholds, include_background=True, spacing=edges)


def _spacing(shape: tuple[int, int], spacing: float | Sequence | None) -> list[list[float]]:
    """Voxel size of each case, ``(cases, axes)``, as floats: MONAI refuses a mixture of integers and floats."""
    sizes = torch.as_tensor(np.asarray(convert_to_numpy(1 if spacing is None else spacing), dtype=np.float64))
    try:
        return sizes.expand(shape).tolist()
    except RuntimeError:
        raise ValueError(
            f"expected a spacing of {shape[1]} numbers, or of shape {shape} for {shape[0]} case(s), got {spacing}."
        ) from None
