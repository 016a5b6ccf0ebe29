"""Label map to crop and to training target, and probabilities to label map, with the structures of a data set."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.utils import convert_to_dst_type, convert_to_tensor

from monai_conres.scans import Structures, label_values, paint_structures, structure_masks


def foreground_or_all(volume: torch.Tensor) -> torch.Tensor:
    """The voxels above 0, as ``select_fn`` of MONAI's ``CropForegroundd``; all voxels where none is above 0.

    MONAI's own choice crops a volume without foreground to nothing, and padding then makes zeros of the whole case.

    Example:
        >>> foreground_or_all(torch.tensor([[0, 2, 0]])), foreground_or_all(torch.tensor([[0, 0, 0]]))
        (tensor([[False,  True, False]]), tensor([[True, True, True]]))
    """
    foreground = volume > 0
    return foreground if foreground.any() else torch.ones_like(foreground)


class _StructuresTransform(MapTransform):
    """Replaces volumes ``(c, *spatial)`` with 8-bit volumes that depend on the structures."""

    def __init__(self, keys: KeysCollection, structures: Structures, *, softmax: bool = False) -> None:
        super().__init__(keys)
        self.structures = structures
        self.softmax = softmax

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """``data`` with the new volumes, which keep type and metadata of the old ones."""
        result = dict(data)
        for key in self.key_iterator(result):
            volume = convert_to_tensor(data[key], track_meta=False)  # metadata would slow down each operation
            result[key] = convert_to_dst_type(self._convert(volume), data[key], dtype=torch.uint8)[0]
        return result

    def _convert(self, volume: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class LabelToTargetd(_StructuresTransform):
    """Turn a label map ``(1, *spatial)`` into the target of a loss.

    Args:
        keys: keys of the labels.
        structures: label values of each structure.
        softmax: False makes a mask of each structure, ``(c, *spatial)``. True makes class indices ``(1, *spatial)``:
            0 is the background, then the values follow in the order of :func:`~monai_conres.scans.label_values`.
        ignore_index: value of voxels without a label, which stays in each channel.

    Example:
        >>> label = {"label": torch.tensor([[0, 1, 2, 4]])}
        >>> LabelToTargetd("label", {"ET": (4,), "WT": (1, 2, 4)}, softmax=True)(label)["label"]
        tensor([[0, 2, 3, 1]], dtype=torch.uint8)
    """

    def __init__(
        self,
        keys: KeysCollection,
        structures: Structures,
        *,
        softmax: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(keys, structures, softmax=softmax)
        self.ignore_index = ignore_index

    def _convert(self, volume: torch.Tensor) -> torch.Tensor:
        if not self.softmax:
            return structure_masks(volume, self.structures, self.ignore_index)
        target = torch.zeros_like(volume, dtype=torch.uint8)
        for index, value in enumerate(label_values(self.structures), start=1):
            target[volume == value] = index
        return (
            target if self.ignore_index is None else target.masked_fill(volume == self.ignore_index, self.ignore_index)
        )


class ProbabilityToLabeld(_StructuresTransform):
    """Turn probabilities ``(c, *spatial)`` into a label map ``(1, *spatial)`` with the label values of the data.

    :func:`~monai_conres.scans.paint_structures` says how, with the arguments of :class:`LabelToTargetd`.

    Example:
        >>> probabilities = {"pred": torch.tensor([[0.1, 0.2, 0.9], [0.4, 0.8, 0.7]])}
        >>> ProbabilityToLabeld("pred", {"ET": (4,), "WT": (2, 4)})(probabilities)["pred"]
        tensor([[0, 2, 4]], dtype=torch.uint8)
    """

    def _convert(self, volume: torch.Tensor) -> torch.Tensor:
        return paint_structures(volume, self.structures, softmax=self.softmax)
