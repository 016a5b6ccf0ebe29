"""How a scan becomes a network's input, and how the network's output becomes a label map.

A class is a set of values of the label file, such as ``{"ET": (4,), "WT": (1, 2, 4), "TC": (1, 4)}`` of BraTS 2018. One
class may contain another.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from numbers import Integral
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.transforms import Compose, EnsureTyped, Lambda, Orientation, Orientationd, Spacingd, SpatialResample
from monai.transforms.intensity import dictionary as intensity_transforms
from monai.utils import convert_to_dst_type, convert_to_tensor, ensure_tuple, optional_import

from monai_conres.volumes import LoadScand, read_grid

nib, _ = optional_import("nibabel", descriptor="{}; install it with: pip install 'monai-conres[io]'")

__all__ = ["ScanSettings", "label_values", "paint_structures", "spacing_range", "structure_masks"]

Structures = Mapping[str, Sequence[int]]
FACTOR = 1.5  # by which a voxel may be larger or smaller than those of the training without a warning


@dataclass(frozen=True, kw_only=True)
class ScanSettings:
    """What :func:`~monai_conres.files.save_network` writes about the scans, next to the weights.

    Attributes:
        channels: names of the image's channels, in order.
        patch_size: spatial size of the windows of :meth:`inferer`, in voxels.
        classes: for each class its values in the label file, from 1 to 255.
        activation: ``"sigmoid"``: the network has one channel for each class. ``"softmax"``: the network has a channel
            for the background and one for each of :func:`label_values`.
        orientation: directions of the three axes, as MONAI's ``Orientation`` names them.
        spacing: size of a voxel in mm along each axis; ``None`` keeps the scan's own size.
        normalization: MONAI's intensity transforms by name, in order, with their arguments:
            ``{"name": "NormalizeIntensity", "nonzero": True}``.
        overlap: overlap of neighboring windows, as a fraction of the window.
        flip_axes: sets of spatial axes to flip the image along at test time. :meth:`inferer` does not flip: give the
            axes to ``monai_conres.bundle.MeanProbability``.
        seen_spacing: smallest and largest size of a voxel in the training, as :func:`spacing_range` finds them, for
            :meth:`check_spacing`; ``None`` if the sizes are not known.

    Raises:
        ValueError: when a setting has a wrong value. The error names the setting.

    Example:
        >>> classes = {"edema": [2], "core": [1, 4]}
        >>> scans = ScanSettings(channels=["T1"], patch_size=[8, 8, 8], classes=classes, activation="softmax")
        >>> scans.out_channels  # the background and three values
        4
    """

    channels: tuple[str, ...]
    patch_size: tuple[int, ...]
    classes: dict[str, tuple[int, ...]]
    activation: str
    orientation: str = "RAS"
    spacing: tuple[float, ...] | None = None
    normalization: tuple[dict[str, Any], ...] = ()
    overlap: float = 0.25
    flip_axes: tuple[tuple[int, ...], ...] = ()
    seen_spacing: tuple[tuple[float, float], ...] | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _tuples(getattr(self, field.name)))
        flips, axes, seen = self.flip_axes, set(str(self.orientation)), self.seen_spacing
        values = list(self.classes.values()) if isinstance(self.classes, dict) else []
        checks = {
            "channels": (_are(self.channels, str), "a list of names"),
            "patch_size": (_are(self.patch_size, int, least=1, number=3), "three positive whole numbers"),
            "classes": (
                values and all(_are(v, Integral, least=1) and max(v) <= 255 for v in values),
                "lists of whole numbers from 1 to 255 by class (map other values of the labels first: MapLabelValued)",
            ),
            "activation": (self.activation in ("sigmoid", "softmax"), "'sigmoid' or 'softmax'"),
            "orientation": (len(axes) == 3 and all(axes & set(pair) for pair in ("LR", "PA", "IS")), "such as 'RAS'"),
            "spacing": (self.spacing is None or _are(self.spacing, (int, float), least=1e-6, number=3), "None or 3 mm"),
            "normalization": (_are(self.normalization, dict) or self.normalization == (), "a list of dicts"),
            "overlap": (isinstance(self.overlap, (int, float)) and 0 <= self.overlap < 1, "0 or more, below 1"),
            "flip_axes": (isinstance(flips, tuple) and all(map(_are_axes, flips)), "lists of axes"),
            "seen_spacing": (seen is None or _are_ranges(seen), "None or 3 times the smallest and the largest mm"),
        }
        for name, (right, expected) in checks.items():
            if not right:
                raise ValueError(f"expected {name} of the scans to be {expected}, got {getattr(self, name)!r}.")
        for one, other in combinations(map(set, values), 2):
            if self.activation == "sigmoid" and one & other and not (one <= other or other <= one):
                raise ValueError(
                    f"expected classes without a common value, or one inside the other, got {self.classes!r}; "
                    "a label map cannot hold both masks."
                )
        if len(set(map(frozenset, values))) < len(values):
            raise ValueError(f"expected other label values in each class, got {self.classes!r}; leave one of them out.")
        self.to_labels(torch.zeros(self.out_channels, 1))  # raises here what it would raise after a training
        self.normalize("image")

    @property
    def out_channels(self) -> int:
        """How many channels the network's output has."""
        return 1 + len(label_values(self.classes)) if self.activation == "softmax" else len(self.classes)

    def normalize(self, keys: KeysCollection) -> Compose:
        """The transforms of ``normalization`` for dictionaries.

        Raises:
            ValueError: when MONAI has no such intensity transform, or an argument is wrong.
        """
        transforms = []
        for entry in self.normalization:
            arguments = {key: value for key, value in entry.items() if key != "name"}
            try:
                transforms.append(getattr(intensity_transforms, f"{entry['name']}d")(keys, **arguments))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    "expected normalization of the scans to name intensity transforms of MONAI with their arguments, "
                    f"such as {{'name': 'NormalizeIntensity', 'nonzero': True}}, got {entry!r} ({error!r})."
                ) from error
        return Compose(transforms)

    def preprocessing(self, *, label: bool = False) -> Compose:
        """The transforms from ``{"image": FILE_OR_FILES}`` to the network's input, a ``MetaTensor`` ``(c, *spatial)``.

        They load, orient, resample and normalize. ``label=True`` also loads, orients and resamples ``"label"``. A file
        that cannot be read, or lies on another grid, is an error: see :class:`~monai_conres.volumes.LoadScand`. Voxels
        of other sizes than in the training give a warning: see :meth:`check_spacing`.
        """
        keys = ("image", "label") if label else ("image",)
        steps = [
            LoadScand(keys),
            Orientationd(keys, axcodes=self.orientation, labels=None),
            Lambda(self.check_spacing),  # a plain function would end the cache of MONAI's CacheDataset here
        ]
        if self.spacing is not None:
            steps.append(Spacingd(keys, pixdim=self.spacing, mode=("bilinear", "nearest")[: len(keys)]))
        typed = EnsureTyped(keys, dtype=(torch.float32, torch.uint8)[: len(keys)])
        return Compose([*steps, *self.normalize("image").transforms, typed])

    def check_spacing(self, case: Mapping[str, Any]) -> Mapping[str, Any]:
        """A transform that warns when voxels of ``"image"`` have other sizes than in the training.

        Sizes are compared along the axes of :attr:`orientation`. A size may be up to 1.5 times as large as the largest
        one of the training, or as small as the smallest one divided by 1.5. The result on other scans may still be
        good, so other sizes give no error. Networks whose scans are resampled to :attr:`spacing` see no other sizes.
        """
        if self.spacing is None and self.seen_spacing is not None:
            image = case["image"]
            sizes = image.pixdim.tolist()
            axes = nib.orientations.axcodes2ornt(self.orientation)[:, 0]
            ranges = [self.seen_spacing[int(axis)] for axis in axes]
            if any(not s / FACTOR <= size <= FACTOR * e for size, (s, e) in zip(sizes, ranges, strict=True)):
                seen = " x ".join(f"{s:.3g}" if s == e else f"{s:.3g} to {e:.3g}" for s, e in ranges)
                warnings.warn(
                    f"{image.meta.get('filename_or_obj', 'A scan')} has voxels of "
                    f"{' x '.join(f'{size:.3g}' for size in sizes)} mm ({self.orientation}), and the network was "
                    f"trained with {seen} mm: the result may be poor. Resample the scan to these sizes, or train with "
                    "such scans or with a fixed spacing.",
                    stacklevel=2,
                )
        return case

    def inferer(self, **kwargs: Any) -> SlidingWindowInferer:
        """MONAI's ``SlidingWindowInferer`` with these windows, Gaussian weights and ``kwargs``."""
        settings = {"roi_size": self.patch_size, "overlap": self.overlap, "mode": "gaussian"}
        return SlidingWindowInferer(**{**settings, **kwargs})

    def to_scan(self, prediction: torch.Tensor, image: MetaTensor) -> MetaTensor:
        """Bring logits or probabilities ``(c, *spatial)`` back to the voxels of the scan file.

        The method inverts orientation and spacing of ``image``, which :meth:`preprocessing` returned. Resampling is
        linear.
        """
        stored = image.meta["original_affine"]
        here = MetaTensor(convert_to_tensor(prediction, track_meta=False), meta=image.meta)
        turned = Orientation("".join(nib.aff2axcodes(stored)), labels=None)(here)
        if self.spacing is None:
            return turned
        back = SpatialResample(mode="bilinear", padding_mode="border")
        return back(turned, dst_affine=stored, spatial_size=image.meta["spatial_shape"])

    def to_labels(self, logits: torch.Tensor) -> torch.Tensor:
        """A label map ``(1, *spatial)`` in uint8, with the label file's values, of logits ``(c, *spatial)``.

        Raises:
            ValueError: when the logits have another number of channels than :attr:`out_channels`.

        Example:
            >>> classes = {"core": [4], "whole": [2, 4]}
            >>> scans = ScanSettings(channels=["T1"], patch_size=[8, 8, 8], classes=classes, activation="sigmoid")
            >>> scans.to_labels(torch.tensor([[-2.0, -1.0, 3.0], [-1.0, 2.0, 1.0]]))
            tensor([[0, 2, 4]], dtype=torch.uint8)
        """
        plain = convert_to_tensor(logits, track_meta=False)
        label = paint_structures(plain, self.classes, softmax=self.activation == "softmax", threshold=0.0)
        return convert_to_dst_type(label, logits, dtype=torch.uint8)[0]


def spacing_range(cases: Iterable[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Smallest and largest size of a voxel in mm from left to right, back to front, and feet to head.

    Args:
        cases: ``"image"`` of each is a file, or several files. The function reads the header of the first file.

    Raises:
        ValueError: when there is no case, or a header cannot be read.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> files = [f"{tempfile.mkdtemp()}/scan.nii.gz" for _ in range(2)]
        >>> for file, size in zip(files, (3, 5)):
        ...     nib.save(nib.Nifti1Image(np.zeros((4, 4, 4)), np.diag([1, -1, size, 1])), file)
        >>> spacing_range({"image": file} for file in files)
        [(1.0, 1.0), (1.0, 1.0), (3.0, 5.0)]
    """
    sizes = []
    for case in cases:
        affine = read_grid(ensure_tuple(case["image"])[0]).affine
        own = dict(zip(nib.io_orientation(affine)[:, 0].tolist(), nib.affines.voxel_sizes(affine), strict=True))
        sizes.append([round(float(own[axis]), 4) for axis in range(3)])
    if not sizes:
        raise ValueError("expected scans of the training, got none; give its cases.")
    return [(min(column), max(column)) for column in zip(*sizes, strict=True)]


def label_values(structures: Structures) -> list[int]:
    """The values of a label map next to the background's 0, in the order in which the structures name them.

    Two data sets with the same structures then have the same softmax classes, although the numbers differ. The example
    has BraTS 2018 and the Decathlon's Task01: enhancing tumor, necrosis and edema.

    Example:
        >>> label_values({"ET": (4,), "WT": (1, 2, 4), "TC": (1, 4)})
        [4, 1, 2]
        >>> label_values({"ET": (3,), "WT": (2, 1, 3), "TC": (2, 3)})
        [3, 2, 1]
    """
    return list(dict.fromkeys(value for values in structures.values() for value in values))


def check_ignored_value(ignore_index: int | None, values: Collection[int]) -> None:
    """Raise when the value of voxels without a label is one of the ``values`` in a label map, or not 0 to 255."""
    if ignore_index in values or not 0 <= (ignore_index or 0) <= 255:
        raise ValueError(
            f"expected ignore_index up to 255 that is none of {sorted(values)}, got {ignore_index}; give voxels "
            "without a label another value, such as 255."
        )


def structure_masks(label: torch.Tensor, structures: Structures, ignore_index: int | None = None) -> torch.Tensor:
    """Masks ``(c, *spatial)`` in uint8, one channel for each structure, of a label map ``(1, *spatial)``.

    Each mask has ``ignore_index`` where the label map does.

    Example:
        >>> structure_masks(torch.tensor([[0, 1, 2, 4]]), {"ET": (4,), "WT": (1, 2, 4), "TC": (1, 4)})
        tensor([[0, 0, 0, 1],
                [0, 1, 1, 1],
                [0, 1, 0, 1]], dtype=torch.uint8)
    """
    masks = [torch.isin(label, torch.tensor(values, device=label.device)) for values in structures.values()]
    stacked = torch.cat(masks).to(torch.uint8)
    return stacked if ignore_index is None else stacked.masked_fill(label == ignore_index, ignore_index)


def paint_structures(
    scores: torch.Tensor, structures: Structures, *, softmax: bool = False, threshold: float = 0.5
) -> torch.Tensor:
    """A label map ``(1, *spatial)`` in uint8 of masks or scores ``(c, *spatial)``.

    Args:
        scores: one channel for each structure, or with a softmax for the background and each of :func:`label_values`.
        structures: the label values of each structure.
        softmax: True: the channel with the largest score wins. False: a structure is where its score is ``threshold``
            or more. Where structures contradict each other, the one with fewer values wins: an enhancing tumor outside
            the whole tumor stays.
        threshold: 0.5 for masks and probabilities, 0 for logits.

    Raises:
        ValueError: when the number of channels is wrong, or every value of a structure also belongs to a smaller one.

    Example:
        >>> paint_structures(torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]]), {"core": (3,), "whole": (2, 3)})
        tensor([[0, 2, 3, 3]], dtype=torch.uint8)
    """
    channels = [0, *label_values(structures)] if softmax else list(structures)
    if len(scores) != len(channels):
        raise ValueError(
            f"expected {len(channels)} channels for {list(structures)} with a {'softmax' if softmax else 'sigmoid'}, "
            f"got {len(scores)}; give one case, (c, *spatial), without the batch dimension."
        )
    if softmax:
        return torch.tensor(channels, dtype=torch.uint8, device=scores.device)[scores.argmax(0, keepdim=True)]
    label = torch.zeros_like(scores[:1], dtype=torch.uint8)
    seen: set[int] = set()
    smallest_first = sorted(zip(scores, structures.items(), strict=True), key=lambda pair: len(pair[1][1]))
    for score, (name, values) in smallest_first:
        own = [value for value in values if value not in seen]
        if not own:
            raise ValueError(f"expected a value of {name} that no smaller structure has, got {dict(structures)}.")
        seen.update(values)
        label[(label == 0) & (score >= threshold)] = own[0]
    return label


def _are_ranges(values: Any) -> bool:
    """Whether values are three pairs of positive numbers, the smaller one first."""
    return _are(values, tuple, number=3) and all(
        _are(pair, (int, float), least=1e-6, number=2) and pair[0] <= pair[1] for pair in values
    )


def _are_axes(values: Any) -> bool:
    """Whether values are different spatial axes."""
    return _are(values, int, least=-3) and max(values) < 3 and len({axis % 3 for axis in values}) == len(values)


def _are(values: Any, kind: type | tuple[type, ...], *, least: float | None = None, number: int | None = None) -> bool:
    """Whether values are a tuple of ``number`` values, else one or more, of a kind and not below ``least``."""
    right = isinstance(values, tuple) and len(values) > 0 and all(isinstance(value, kind) for value in values)
    return right and number in (None, len(values)) and (least is None or min(values) >= least)


def _tuples(value: Any) -> Any:
    """The value with tuples in the place of lists, and Python's numbers in that of numpy's, as in a file."""
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return tuple(map(_tuples, value))
    return {key: _tuples(part) for key, part in value.items()} if isinstance(value, Mapping) else value
