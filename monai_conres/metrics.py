"""Surface distances in which every case counts, also a case with an empty mask.

MONAI's distance metrics leave out a case if one mask is empty. So a structure that the network missed does not count in
the mean. The rules of the BraTS challenge count every case:

================  ==================  =============
mask              Hausdorff distance  surface Dice
================  ==================  =============
both empty        0                   1
one empty         the worst possible  0
================  ==================  =============

For the Dice coefficient MONAI has these rules: ``DiceMetric(ignore_empty=False)``.

Where only some slices are drawn, ``ignore_index`` is the value of all other voxels in the reference. The surface then
consists of voxels of the mask with a labelled neighbor outside the mask. So a drawn slice has its outline. For the Dice
coefficient, give class indices to ``DiceMetric(ignore_empty=False, num_classes=..., ignore_index=...)``.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import reduce

import numpy as np
import torch
import torch.nn.functional as F
from monai.metrics import (
    CumulativeIterationMetric,
    compute_hausdorff_distance,
    compute_surface_dice,
    do_metric_reduction,
)
from monai.utils import convert_to_numpy

from monai_conres.residual import check_ignore_index, labelled_voxels

__all__ = ["BratsHausdorffDistanceMetric", "BratsSurfaceDiceMetric"]


class _DistanceMetric(CumulativeIterationMetric):
    """One value for each case and channel, with rules for empty masks."""

    both_empty: float  # value where prediction and reference are empty

    def __init__(self, *, include_background: bool, reduction: str, ignore_index: int | None) -> None:
        super().__init__()
        self.include_background = include_background
        self.reduction = reduction
        self.ignore_index = ignore_index

    def aggregate(self, reduction: str | None = None) -> torch.Tensor:
        """Reduce the values of all cases, as MONAI's metrics do; ``get_buffer()`` returns the single values.

        A mean of no known value is NaN, where MONAI's is 0.
        """
        values = self.get_buffer()
        if not isinstance(values, torch.Tensor):
            raise ValueError("expected values to aggregate, got none; call the metric on predictions first.")
        reduced, known = do_metric_reduction(values, reduction or self.reduction)
        is_mean = str(reduction or self.reduction).startswith("mean")
        return reduced.masked_fill(known == 0, float("nan")) if is_mean else reduced

    def _compute_list(
        self, y_pred: Sequence[torch.Tensor], y: Sequence[torch.Tensor], spacing: float | Sequence | None = None
    ) -> torch.Tensor:
        """Cases ``(c, *spatial)`` of any sizes, with one spacing for all cases or one for each case."""
        spacings = _spacings(len(y), y[0].ndim - 1, spacing)
        return torch.cat(
            [self._compute_tensor(p[None], r[None], s) for p, r, s in zip(y_pred, y, spacings, strict=True)]
        )

    def _compute_tensor(
        self, y_pred: torch.Tensor, y: torch.Tensor, spacing: float | Sequence | None = None
    ) -> torch.Tensor:
        """Prediction and reference ``(b, c, *spatial)`` to values ``(b, c)``."""
        if y_pred.shape != y.shape or y.ndim < 4:
            raise ValueError(
                f"expected prediction and reference of one shape (b, c, *spatial), got {tuple(y_pred.shape)} and "
                f"{tuple(y.shape)}; turn both into one-hot or multi-hot channels (AsDiscrete)."
            )
        if not self.include_background:
            if y.shape[1] < 2:
                raise ValueError("expected 2 or more channels with include_background=False, got 1; use True.")
            y_pred, y = y_pred[:, 1:], y[:, 1:]
        labelled = None
        if self.ignore_index is not None:
            check_ignore_index(self.ignore_index, y.dtype, 2)
            labelled = labelled_voxels(y, self.ignore_index, one_hot=False)
            y_pred, y = (mask.masked_fill(~labelled, 0) for mask in (y_pred, y))
        for name, mask in (("prediction", y_pred), ("reference", y)):
            if not ((mask == 0) | (mask == 1)).all():
                raise ValueError(
                    f"expected a {name} of zeros and ones, got other values; threshold it (AsDiscrete), or turn class "
                    "indices into channels (AsDiscrete(to_onehot=...))."
                )
        y_pred, y = y_pred.float(), y.float()
        no_prediction, no_reference = (~_any(mask) for mask in (y_pred, y))
        unknown = torch.zeros_like(no_reference)
        if labelled is not None:
            y_pred, y = _outline(y_pred, labelled), _outline(y, labelled)
            lost = ~(no_prediction | no_reference) & ~(_any(y_pred) & _any(y))
            unknown = lost | ~_any(labelled)
        spacings = _spacings(len(y), y.ndim - 2, spacing)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the (ground truth|prediction) of class")  # empty masks
            warnings.filterwarnings("ignore", message=".*always_return_as_numpy")  # MONAI calls itself
            values = self._values(y_pred, y, spacings)
        values = torch.where(no_prediction ^ no_reference, self._one_empty(y, spacings).to(values), values)
        values = values.masked_fill(no_prediction & no_reference, self.both_empty)
        return values.masked_fill(unknown, torch.nan)

    def _values(self, y_pred: torch.Tensor, y: torch.Tensor, spacings: list[list[float]]) -> torch.Tensor:
        """Values ``(b, c)`` where no mask is empty."""
        raise NotImplementedError

    def _one_empty(self, y: torch.Tensor, spacings: list[list[float]]) -> torch.Tensor:
        """Value where one mask is empty: one for each case, ``(b, 1)``, or one for all."""
        return torch.tensor(0.0)


class BratsHausdorffDistanceMetric(_DistanceMetric):
    """95th percentile of the Hausdorff distance, in mm: 0 if both masks are empty, the worst value if one is empty.

    Args:
        include_background: False leaves out channel 0.
        percentile: percentile of the surface distances, 0 to 100. 100 is the maximum (Eq. 12 of Zhang et al., 2021).
        empty_distance: value where one mask is empty, in mm. ``None`` is the diagonal of the volume, 373.1287 mm for
            BraTS.
        reduction: MONAI's name of a reduction. ``"mean_batch"`` is the mean over the cases for each channel.
        ignore_index: value of voxels without a label, in the channels of the reference. The value is NaN, which the
            reduction leaves out, where no voxel is labelled, or where no voxel next to one of the two masks is.

    Shape:
        Call it with prediction and reference, ``(b, c, *spatial)`` of zeros and ones, or with lists of
        ``(c, *spatial)``. It returns and collects ``(b, c)``. A further argument ``spacing`` is the voxel size in mm:
        one number for each axis, or such a sequence for each case.

    Raises:
        ValueError: when the shapes differ, a value is neither zero nor one, or ``ignore_index`` is zero or one.

    Note:
        The distances need scipy. On a GPU without cupy and cucim, MONAI copies the masks to the CPU.

    Example:
        >>> metric = BratsHausdorffDistanceMetric()
        >>> prediction, reference = torch.zeros(2, 1, 2, 155, 240, 240)
        >>> prediction[0, 0, :2, 0, 0], reference[0, 0, :4, 0, 0], reference[0, 1] = 1, 1, 1
        >>> metric(prediction, reference)
        tensor([[  1.8500, 373.1287]])
    """

    both_empty = 0.0

    def __init__(
        self,
        *,
        include_background: bool = True,
        percentile: float = 95,
        empty_distance: float | None = None,
        reduction: str = "mean_batch",
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(include_background=include_background, reduction=reduction, ignore_index=ignore_index)
        self.percentile = percentile
        self.empty_distance = empty_distance

    def _values(self, y_pred: torch.Tensor, y: torch.Tensor, spacings: list[list[float]]) -> torch.Tensor:
        return compute_hausdorff_distance(
            y_pred, y, include_background=True, percentile=self.percentile, spacing=spacings
        )

    def _one_empty(self, y: torch.Tensor, spacings: list[list[float]]) -> torch.Tensor:
        if self.empty_distance is not None:
            return torch.tensor(self.empty_distance)
        return (torch.tensor(spacings) * torch.tensor(y.shape[2:])).norm(dim=1, keepdim=True)


class BratsSurfaceDiceMetric(_DistanceMetric):
    """Share of both surfaces within a tolerance of the other surface: 1 if both masks are empty, 0 if one is empty.

    Args:
        tolerance: largest distance that counts as agreement, in mm.
        include_background: False leaves out channel 0.
        reduction: see :class:`BratsHausdorffDistanceMetric`.
        ignore_index: see :class:`BratsHausdorffDistanceMetric`.

    Shape:
        See :class:`BratsHausdorffDistanceMetric`. The values are between 0 and 1.

    Raises:
        ValueError: when the shapes differ, a value is neither zero nor one, or ``ignore_index`` is zero or one.

    Example:
        >>> metric = BratsSurfaceDiceMetric(tolerance=1)
        >>> prediction, reference = torch.zeros(2, 1, 1, 6, 6, 6)
        >>> prediction[0, 0, 1, 1, 1:3], reference[0, 0, 1, 1, 1:5] = 1, 1
        >>> metric(prediction, reference)  # 2 of 2 and 3 of 4 voxels
        tensor([[0.8333]])
    """

    both_empty = 1.0

    def __init__(
        self,
        *,
        tolerance: float = 1.0,
        include_background: bool = True,
        reduction: str = "mean_batch",
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(include_background=include_background, reduction=reduction, ignore_index=ignore_index)
        self.tolerance = tolerance

    def _values(self, y_pred: torch.Tensor, y: torch.Tensor, spacings: list[list[float]]) -> torch.Tensor:
        thresholds = [float(self.tolerance)] * y.shape[1]
        return compute_surface_dice(y_pred, y, thresholds, include_background=True, spacing=spacings)


def _outline(mask: torch.Tensor, labelled: torch.Tensor) -> torch.Tensor:
    """The voxels of a mask that have a labelled neighbor outside the mask; all around the volume is outside.

    MONAI takes the surface of a mask again, and the surface of an outline is the outline.
    """
    outside = F.pad((labelled & (mask == 0)).to(mask.dtype), (1, 1) * (mask.ndim - 2), value=1)
    neighbors = (outside.roll(step, dim) for dim in range(2, mask.ndim) for step in (1, -1))
    return mask * F.pad(reduce(torch.maximum, neighbors), (-1, -1) * (mask.ndim - 2))


def _any(masks: torch.Tensor) -> torch.Tensor:
    """Which masks of ``(b, c, *spatial)`` are not empty, ``(b, c)``."""
    return (masks != 0).flatten(2).any(2)


def _spacings(cases: int, axes: int, spacing: float | Sequence | None) -> list[list[float]]:
    """Voxel size of each case, ``(cases, axes)``, in floats: MONAI refuses a mixture of integers and floats."""
    sizes = torch.as_tensor(np.asarray(convert_to_numpy(1 if spacing is None else spacing), dtype=np.float64))
    try:
        return sizes.expand(cases, axes).tolist()
    except RuntimeError:
        raise ValueError(f"expected a spacing of {axes} numbers, or {cases} times {axes}, got {spacing}.") from None
