"""Classes of a label map: the values of each class, its mask, and a label map from masks.

A class is a set of values, such as ``{"ET": (4,), "WT": (1, 2, 4), "TC": (1, 4)}`` of BraTS 2018. One class may contain
another.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from numbers import Integral

import torch

__all__ = ["check_structures", "label_values", "paint_structures", "structure_masks"]

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
