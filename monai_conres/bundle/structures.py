"""Structures of a label map: what a network is trained for, and back to a label map in the same values.

A structure is a set of values, ``{"ET": (4,), "WT": (1, 2, 4), "TC": (1, 4)}`` for BraTS 2018, and may contain others.
A network has either a channel with a sigmoid for each structure, or one softmax over the background and each value.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from numbers import Integral

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.utils import convert_to_dst_type, convert_to_tensor

__all__ = ["LabelToTargetd", "ProbabilityToLabeld", "label_values", "paint_structures", "structure_masks"]

Structures = Mapping[str, Sequence[int]]


def label_values(structures: Structures) -> list[int]:
    """The values that a label has beside the background's 0, in the order in which the structures name them.

    So the softmax classes of two data sets agree where their structures do, whatever the numbers are: here those of
    BraTS 2018 and of the Decathlon's Task01, enhancing tumor, necrosis and edema.

    Example:
        >>> label_values({"ET": (4,), "WT": (1, 2, 4), "TC": (1, 4)})
        [4, 1, 2]
        >>> label_values({"ET": (3,), "WT": (2, 1, 3), "TC": (2, 3)})
        [3, 2, 1]
    """
    return list(dict.fromkeys(value for values in structures.values() for value in values))


def check_structures(structures: Structures) -> None:
    """Raise unless each structure is a list of whole numbers from 1 to 255.

    Label maps are kept in 8 bits, and 0 is the background.

    Raises:
        ValueError: with the first structure that is not.
    """
    for name, values in structures.items():
        if not isinstance(values, Collection) or not all(isinstance(v, Integral) and 1 <= v <= 255 for v in values):
            raise ValueError(
                f"expected a list of values, whole numbers from 1 to 255, for each structure, got {values!r} for "
                f"{name}; map other values of the labels first (MapLabelValued)."
            )


def structure_masks(label: torch.Tensor, structures: Structures) -> torch.Tensor:
    """Masks of zeros and ones ``(c, *spatial)``, in uint8, of a label map ``(1, *spatial)``, a channel per structure.

    Example:
        >>> structure_masks(torch.tensor([[0, 1, 2, 4]]), {"ET": (4,), "WT": (1, 2, 4), "TC": (1, 4)})
        tensor([[0, 0, 0, 1],
                [0, 1, 1, 1],
                [0, 1, 0, 1]], dtype=torch.uint8)
    """
    masks = [torch.isin(label, torch.tensor(values, device=label.device)) for values in structures.values()]
    return torch.cat(masks).to(torch.uint8)


def paint_structures(masks: torch.Tensor, structures: Structures) -> torch.Tensor:
    """A label map ``(1, *spatial)``, in uint8, of masks ``(c, *spatial)``: the inverse of :func:`structure_masks`.

    Where masks contradict each other the structure with fewer values wins: an enhancing tumor outside of the whole
    tumor stays.

    Raises:
        ValueError: when a structure has no value that no smaller one has, or masks and structures differ in number.

    Example:
        >>> paint_structures(torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]]), {"core": (3,), "whole": (2, 3)})
        tensor([[0, 2, 3, 3]], dtype=torch.uint8)
    """
    if len(masks) != len(structures):
        raise ValueError(f"expected {len(structures)} masks, one for each of {list(structures)}, got {len(masks)}.")
    label = torch.zeros_like(masks[:1], dtype=torch.uint8)
    painted: set[int] = set()
    order: list[tuple[int, int]] = []  # channel and value, the smallest structure first
    for channel, (name, values) in sorted(enumerate(structures.items()), key=lambda item: len(item[1][1])):
        own = next((value for value in values if value not in painted), None)
        if own is None:
            raise ValueError(f"expected a value of {name} that no smaller structure has, got {dict(structures)}.")
        painted.update(values)
        order.append((channel, own))
    for channel, value in reversed(order):
        label[masks[channel : channel + 1] > 0] = value
    return label


class LabelToTargetd(MapTransform):
    """Turn a label map ``(1, *spatial)`` into what a loss compares with.

    Args:
        keys: keys of the labels.
        structures: values of each structure.
        softmax: False makes masks of the structures ``(c, *spatial)``; True makes class indices ``(1, *spatial)``, 0
            the background and then the values in the order of :func:`label_values`.
        allow_missing_keys: True passes over keys that are not there.

    Raises:
        ValueError: when a value of a structure is not from 1 to 255.

    Example:
        >>> label = {"label": torch.tensor([[0, 1, 2, 4]])}
        >>> LabelToTargetd("label", {"ET": (4,), "WT": (1, 2, 4)}, softmax=True)(label)["label"]
        tensor([[0, 2, 3, 1]], dtype=torch.uint8)
    """

    def __init__(
        self, keys: KeysCollection, structures: Structures, *, softmax: bool = False, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        check_structures(structures)
        self.structures = structures
        self.softmax = softmax

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """``data`` with the labels replaced."""
        result = dict(data)
        for key in self.key_iterator(result):
            label = convert_to_tensor(data[key], track_meta=False)  # metadata cost time at each step
            if self.softmax:
                target = torch.zeros_like(label, dtype=torch.uint8)
                for index, value in enumerate(label_values(self.structures), start=1):
                    target[label == value] = index
            else:
                target = structure_masks(label, self.structures)
            result[key] = convert_to_dst_type(target, data[key], dtype=target.dtype)[0]
        return result


class ProbabilityToLabeld(MapTransform):
    """Turn probabilities ``(c, *spatial)`` into a label map ``(1, *spatial)`` with the values of the data's labels.

    Args:
        keys: keys of the probabilities.
        structures: values of each structure.
        softmax: False for a channel for each structure, which is there from a probability of 0.5; True for the
            background and each value, of which the likeliest is taken.
        allow_missing_keys: True passes over keys that are not there.

    Raises:
        ValueError: when a value of a structure is not from 1 to 255.

    Example:
        >>> probabilities = {"pred": torch.tensor([[0.1, 0.2, 0.9], [0.4, 0.8, 0.7]])}
        >>> ProbabilityToLabeld("pred", {"ET": (4,), "WT": (2, 4)})(probabilities)["pred"]
        tensor([[0, 2, 4]], dtype=torch.uint8)
    """

    def __init__(
        self, keys: KeysCollection, structures: Structures, *, softmax: bool = False, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        check_structures(structures)
        self.structures = structures
        self.softmax = softmax

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """``data`` with the probabilities replaced."""
        result = dict(data)
        for key in self.key_iterator(result):
            probabilities = convert_to_tensor(data[key], track_meta=False)
            if self.softmax:
                values = torch.tensor([0, *label_values(self.structures)], dtype=torch.uint8)
                label = values.to(probabilities.device)[probabilities.argmax(0, keepdim=True)]
            else:
                label = paint_structures(probabilities >= 0.5, self.structures)
            result[key] = convert_to_dst_type(label, data[key], dtype=label.dtype)[0]
        return result
