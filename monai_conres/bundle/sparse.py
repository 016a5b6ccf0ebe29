"""Scans with few drawn slices: how many slices have labels, and transforms that ignore the other slices."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.utils import convert_to_dst_type, convert_to_tensor

from monai_conres.volumes import FRACTION, ORDINALS


def labelled_slices(label: torch.Tensor, ignore_index: int, file: Any = "the label map") -> str:
    """How many slices of a label map ``(1, *spatial)`` have a label, along each axis along which slices are drawn.

    Where only parts of slices have a label, it is the axis along which the fewest slices have one.

    Raises:
        ValueError: when no voxel has a label. The error names ``file``.

    Example:
        >>> label = torch.full((1, 4, 5, 6), 255)
        >>> label[..., 2:4] = 0
        >>> labelled_slices(label, 255)
        '2 of 6 slices along the third axis, 33.3 % of the voxels'
    """
    labelled = convert_to_tensor(label, track_meta=False)[0] != ignore_index
    if not labelled.any():
        raise ValueError(
            f"expected a voxel with a label in {file}, got only {ignore_index}; draw a slice, or leave the scan out."
        )
    axes = range(labelled.ndim)
    slices = [labelled.movedim(axis, 0).flatten(1) for axis in axes]
    whole = [part.all(1) for part in slices]
    drawn = torch.zeros_like(labelled)
    for axis in axes:
        drawn.movedim(axis, 0)[whole[axis]] = True
    if torch.equal(drawn, labelled) and not labelled.all():
        counts = {axis: int(whole[axis].sum()) for axis in axes if whole[axis].any()}
    else:
        some = [int(part.any(1).sum()) for part in slices]
        fewest = min(axes, key=lambda axis: some[axis] / labelled.shape[axis])
        counts = {fewest: some[fewest]}
    texts = [f"{n} of {labelled.shape[axis]} slices along the {ORDINALS[axis]} axis" for axis, n in counts.items()]
    return f"{' and '.join(texts)}, {100 * labelled.float().mean().item():.1f} % of the voxels"


def describe_labelled(found: Mapping[str, str]) -> Iterable[str]:
    """One line for all cases with the same number of labelled slices.

    Args:
        found: what :func:`labelled_slices` returns, by name of the case.

    Example:
        >>> list(describe_labelled({"a": "2 of 6 slices", "b": "3 of 6 slices", "c": "2 of 6 slices"}))
        ['2 of 6 slices have labels: a, c', '3 of 6 slices have labels: b']
    """
    cases: dict[str, list[str]] = {}
    for name, text in found.items():
        cases.setdefault(text.partition(",")[0], []).append(name)
    for text, names in cases.items():
        yield f"{text} have labels: {', '.join(names)}"


class IgnoredToZerod(MapTransform):
    """Ignored voxels become 0, all other values are raised by 1. :class:`ZeroToIgnoredd` is the inverse.

    Between the two, voxels that padding or rotation brings in are ignored, and the labelled voxels are the foreground.

    Args:
        keys: keys of label maps.
        ignore_index: value of voxels without a label.

    Raises:
        ValueError: when a label has other than whole numbers, which a transform has mixed.

    Example:
        >>> IgnoredToZerod("label", 255)({"label": torch.tensor([[0, 255, 2]])})["label"]
        tensor([[1, 0, 3]], dtype=torch.int16)
    """

    def __init__(self, keys: KeysCollection, ignore_index: int) -> None:
        super().__init__(keys)
        self.ignore_index = ignore_index

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """``data`` with other values in the labels, which keep type and metadata."""
        result = dict(data)
        for key in self.key_iterator(result):
            given = convert_to_tensor(data[key], track_meta=False)
            label = (given.round() if given.is_floating_point() else given).to(torch.int16)
            if not torch.allclose(given.float(), label.float(), rtol=0, atol=FRACTION):
                raise ValueError(
                    f"expected whole numbers in {key}, got others; give spatial transforms mode='nearest' for labels, "
                    "and lazy=False, because MONAI's lazy resampling mixes labels in either mode."
                )
            result[key] = convert_to_dst_type(self._convert(label), data[key], dtype=torch.int16)[0]
        return result

    def _convert(self, label: torch.Tensor) -> torch.Tensor:
        return (label + 1).masked_fill(label == self.ignore_index, 0)


class ZeroToIgnoredd(IgnoredToZerod):
    """The inverse of :class:`IgnoredToZerod`.

    Example:
        >>> ZeroToIgnoredd("label", 255)({"label": torch.tensor([[1, 0, 3]])})["label"]
        tensor([[  0, 255,   2]], dtype=torch.int16)
    """

    def _convert(self, label: torch.Tensor) -> torch.Tensor:
        return (label - 1).masked_fill(label == 0, self.ignore_index)
