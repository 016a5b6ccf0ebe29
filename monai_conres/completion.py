"""Whole volumes: segmentation and residual by sliding windows, and scans that are completed from a few drawn slices."""

from __future__ import annotations

import itertools
import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.utils import convert_to_tensor, ensure_tuple, optional_import

from monai_conres.chain import ChainSettings, SliceChain
from monai_conres.chain_training import fit_chain
from monai_conres.decoder import ConResDecoder
from monai_conres.files import TrainedNetwork, check_same_grid, load_label
from monai_conres.residual import slice_dim
from monai_conres.scans import ScanSettings, check_ignored_value, label_values, paint_structures, structure_masks
from monai_conres.volumes import HEADER, ORDINALS, Files

nib, _ = optional_import("nibabel", descriptor="{}; install it with: pip install 'monai-conres[io]'")

__all__ = ["CompletedScan", "ScanCompletion", "complete_scan", "fit_completion", "predict_with_residual"]

ENDS = {"R": "left to right", "A": "posterior to anterior", "S": "inferior to superior"}
ENDS |= {"L": "right to left", "P": "anterior to posterior", "I": "superior to inferior"}
# slices by which the voxels of network and file may drift apart along the slice axis
TOLERANCE = 0.1


@torch.no_grad()
def predict_with_residual(
    image: torch.Tensor,
    network: Any,
    inferer: Callable[..., Any],
    *,
    flip_axes: Sequence[Sequence[int]] = (),
    spatial_axis: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits ``(segmentation, residual)`` of whole volumes by sliding windows, without a wrong residual at the borders.

    A residual tells the change from the slice before. The first slice of a window has no slice before it, so its
    residual is wrong and gets no weight where windows overlap. ``inferer(image, network.with_residual)`` would blend in
    this residual.

    Args:
        image: ``(b, c, *spatial)``.
        network: a network with the method ``with_residual``, in ``eval()`` mode.
        inferer: any inferer of MONAI, such as ``SlidingWindowInferer``. Its windows must overlap by one slice or more
            along the slice axis.
        flip_axes: sets of spatial axes to flip each window along, such as ``[[0], [0, 1]]``. The window without a flip
            always counts. The softmax or sigmoid of the segmentation is the mean probability, and the residual is the
            mean of the logits. The function undoes the shift of the residual in a flip.
        spatial_axis: index of the slice axis among the spatial axes; ``None`` takes the slice axis of the residual
            decoder.

    Returns:
        ``(b, c, *spatial)`` and ``(b, r, *spatial)``. The first slice of the volume has the smallest residual logit of
        the volume, because no slice is before it.

    Raises:
        ValueError: when windows do not overlap along the slice axis, or the network has no residual decoder.

    Example:
        >>> from monai.inferers import SlidingWindowInferer
        >>> from monai_conres import ConResNet
        >>> network = ConResNet(1, 3, include_background=False, channels=(8, 16), strides=(2,), blocks=(1, 1, 1)).eval()
        >>> inferer = SlidingWindowInferer(roi_size=(8, 8, 8), overlap=0.25)
        >>> segmentation, residual = predict_with_residual(torch.randn(1, 1, 8, 10, 13), network, inferer)
        >>> segmentation.shape, residual.shape
        (torch.Size([1, 3, 8, 10, 13]), torch.Size([1, 2, 8, 10, 13]))
    """
    if spatial_axis is None:
        spatial_axis = _slice_axis(network)
    dim = slice_dim(image.ndim, spatial_axis)

    def predictor(window: torch.Tensor) -> torch.Tensor:
        """Segmentation, weighted residual and its weight, as one tensor, which any inferer can stitch."""
        segmentation, residual = _mean_over_flips(network.with_residual, window, flip_axes, dim)
        weight = torch.ones_like(residual[:, :1])
        weight.select(dim, 0).zero_()
        return torch.cat([segmentation, residual * weight, weight], 1)

    stitched = convert_to_tensor(inferer(image, predictor), track_meta=False)
    # r residuals and their weight come with r segmentations of sigmoids, or r + 1 of a softmax
    foreground = (stitched.shape[1] - 1) // 2
    segmentation, residual, weight = stitched.split([stitched.shape[1] - foreground - 1, foreground, 1], dim=1)
    later = slice(1, None)
    if not (weight.movedim(dim, 0)[later] > 0).all():
        raise ValueError(
            "expected windows that overlap by at least one slice along the slice axis (spatial_axis="
            f"{spatial_axis}), got slices that are the first one in each of their windows; raise the inferer's overlap "
            "or its roi_size along this axis."
        )
    residual.div_(weight)  # in the memory of what was stitched
    residual.movedim(dim, 0)[0] = residual.movedim(dim, 0)[later].amin() if residual.shape[dim] > 1 else 0
    return segmentation, residual


@dataclass(frozen=True, kw_only=True)
class CompletedScan:
    """What :func:`complete_scan` returns. All volumes are on the voxels of the scan file.

    Attributes:
        label: the completed label map ``(1, *spatial)`` in uint8, with the values of the drawn file.
        predicted: the label map ``(1, *spatial)`` of the network without the drawn slices.
        drawn: the drawn slices ``(1, *spatial)`` in uint8, zero elsewhere.
        image: the image as the network sees it, ``(c, *spatial)``.
        slices: the drawn slices, from 0.
        left_out: slices with labels in the drawn file that do not count, because others were named.
        proposed: the slices to draw next, the most uncertain first. Each choice assumes that all slices earlier in the
            list are drawn exactly as they are completed now.
        spatial_axis: the axis of the file along which slices count.
        direction: the anatomical direction of that axis, such as ``"inferior to superior"``.
        uses_residual: False for a network without residual decoder, where only the image's contrast tells changes.
    """

    label: MetaTensor
    predicted: MetaTensor
    drawn: MetaTensor
    image: MetaTensor
    slices: list[int]
    left_out: list[int]
    proposed: list[int]
    spatial_axis: int
    direction: str
    uses_residual: bool


@torch.no_grad()
def complete_scan(
    trained: TrainedNetwork,
    image: Files,
    drawn: str | os.PathLike,
    *,
    slices: Sequence[int] | None = None,
    settings: ChainSettings | None = None,
    propose: int = 3,
    ignore_index: int | None = None,
    progress: bool = False,
) -> CompletedScan:
    """Complete the label map of a scan file from a few drawn slices.

    The network sees the scan as in its training. Segmentation and residual go back to the voxels of the scan file,
    where the chain runs. The network computes on its own device.

    Args:
        trained: what :func:`~monai_conres.files.load_network` returns.
        image: the NIfTI file of the scan, or one file for each channel in the order of ``trained.scans.channels``.
        drawn: a NIfTI label map on the voxels of the scan, with the label values of ``trained.scans.classes``.
        slices: all drawn slices, from 0, along the axis of the file that is the network's slice axis. ``None`` takes
            the slices with any label. If a drawn slice is empty, name all drawn slices. Labels in other slices then do
            not count.
        settings: weights of the chain; ``None`` takes the weights saved with the network, or the defaults.
        propose: how many slices to propose for drawing next.
        ignore_index: value of all voxels in slices that are not drawn. Drawn slices may then be empty.
        progress: True shows a progress bar of the windows.

    Returns:
        The completed label map and what belongs to it. Drawn slices have the values of the drawn file.

    Raises:
        ValueError: when a file cannot be read, the files do not lie on the same voxels, no slice is drawn, a slice is
            outside the scan, a drawn value is no label value of the network, or the network resamples along the slice
            axis.
    """
    scan = ScanCompletion(trained, image, settings=settings)
    planes, left_out = scan.read_drawn(drawn, slices, ignore_index)
    if not planes:
        raise ValueError(
            f"expected a drawn slice in {drawn}, got none; draw a slice, or name one that is drawn empty in slices."
        )
    scan.draw(planes)
    scan.predict(progress=progress)
    label = scan.label()  # before slices are drawn for proposals
    return CompletedScan(
        label=label,
        predicted=scan.predicted,
        drawn=scan.drawn_label(),
        image=scan.image,
        slices=scan.drawn,
        left_out=left_out,
        proposed=_propose(scan.chain, propose),
        spatial_axis=scan.spatial_axis,
        direction=scan.direction,
        uses_residual=scan.uses_residual,
    )


class ScanCompletion:
    """A scan whose slices are drawn one after the other: :func:`complete_scan` in steps.

    The network runs once. After each drawn slice the chain computes only what changes. All volumes are on the voxels of
    the scan file.

    Args:
        trained: what :func:`~monai_conres.files.load_network` returns.
        image: the NIfTI file of the scan, or one file for each channel in the order of ``trained.scans.channels``.
        settings: weights of the chain; ``None`` takes the weights saved with the network, or the defaults.

    Attributes:
        shape: spatial shape of the scan file.
        affine: affine of the scan file, in mm.
        spatial_axis: the axis of the file along which slices count.
        direction: the anatomical direction of that axis, such as ``"inferior to superior"``.
        uses_residual: False for a network without residual decoder.
        predicted: the label map ``(1, *spatial)`` of the network; ``None`` before :meth:`predict`.
        image: the image as the network sees it, ``(c, *spatial)``; ``None`` before :meth:`predict`.

    Raises:
        ValueError: when a file cannot be read, the files do not lie on the same voxels, or the network resamples along
            the slice axis.
    """

    def __init__(self, trained: TrainedNetwork, image: Files, *, settings: ChainSettings | None = None) -> None:
        self.trained, self.scans = trained, trained.scans
        self.files = [Path(file) for file in ensure_tuple(image)]
        self.settings = settings or trained.chain
        check_same_grid(self.files)
        self._scan: MetaTensor | None = _load_scan(self.scans, self.files)
        self._header = {HEADER: self._scan.meta[HEADER]} if HEADER in self._scan.meta else {}
        self.affine = np.asarray(self._scan.meta["original_affine"])
        self.shape = tuple(int(size) for size in self._scan.meta["spatial_shape"])
        self.spatial_axis, _ = _file_axis(self.scans, self._scan, _slice_axis(trained.network))
        self.direction = ENDS[nib.aff2axcodes(self.affine)[self.spatial_axis]]
        self.uses_residual = any(isinstance(module, ConResDecoder) for module in trained.network.modules())
        self.predicted: MetaTensor | None = None
        self.image: MetaTensor | None = None
        self._drawn: dict[int, torch.Tensor] = {}  # label values (*plane) in uint8 by slice
        self._outputs: dict[str, Any] = {}  # of the network, until the chain has them
        self._chain: SliceChain | None = None

    def read_drawn(
        self, file: str | os.PathLike, slices: Sequence[int] | None = None, ignore_index: int | None = None
    ) -> tuple[dict[int, torch.Tensor], list[int]]:
        """The drawn slices of a label map, as :meth:`draw` takes them, and other slices with labels.

        Raises:
            ValueError: when the file does not lie on the voxels of the scan, a slice is outside the scan or drawn in
                part, or a value is no label value of the network.
        """
        check_same_grid([*self.files, file])
        known, left_out, values = _drawn_slices(file, slices, self.spatial_axis, self.scans, ignore_index)
        planes = values[0].movedim(self.spatial_axis, 0)
        if ignore_index is not None and (partly := [n for n in known if (planes[n] == ignore_index).any()]):
            others = f" and {len(partly) - 5} others" if len(partly) > 5 else ""
            raise ValueError(
                f"expected whole slices to be drawn along the {ORDINALS[self.spatial_axis]} axis of {file}, got "
                f"{ignore_index} in some voxels of {partly[:5]}{others}; draw the rest, or name the slices that are "
                "drawn. In Python, complete_mask takes single voxels and slices along any axis."
            )
        return {number: planes[number] for number in known}, left_out

    @torch.no_grad()
    def predict(self, *, progress: bool | Callable[[float], None] = False) -> None:
        """Run the network on its own device.

        Args:
            progress: True shows a progress bar of the windows. A function gets the part that is done, up to 1.
        """
        if self._scan is None:
            return
        self.trained.network.eval()
        axis = _slice_axis(self.trained.network)
        segmentation, residual, image = _predict_scan(self.trained, self._scan, axis, progress)
        self.predicted = self._on_scan(self.scans.to_labels(segmentation))
        self.image = self._on_scan(image)
        self._outputs, self._scan = {"segmentation": segmentation, "residual": residual}, None

    @property
    def drawn(self) -> list[int]:
        """Numbers of the drawn slices, in order."""
        return sorted(self._drawn)

    @property
    def chain(self) -> SliceChain:
        """The slice chain with all drawn slices, after :meth:`predict`."""
        if self._chain is None:
            if not self._outputs:
                raise RuntimeError("expected predict() before the chain is asked for.")
            softmax = self.scans.activation == "softmax"
            try:
                self._chain = SliceChain(
                    **self._outputs,
                    image=self.image,
                    drawn={number: self._to_classes(values) for number, values in self._drawn.items()},
                    settings=self.settings,
                    spatial_axis=self.spatial_axis,
                    softmax=softmax,
                    sigmoid=not softmax,
                )
            except ValueError as error:  # numbers of the scan that the chain cannot take
                raise ValueError(f"{', '.join(map(str, self.files))}: {error}") from error
            self._outputs = {}
        return self._chain

    def draw(self, slices: Mapping[int, torch.Tensor | None]) -> range:
        """Draw slices, or take them back; the chain follows, if the network has run.

        Args:
            slices: by number, from 0, the values of the label map in uint8, of the shape of a slice of the file.
                ``None`` takes the slice back.

        Returns:
            The slices of :meth:`label` that may have changed.

        Raises:
            ValueError: when a slice is outside the scan, has another shape, or values that the network does not know.
        """
        size, allowed = self.shape[self.spatial_axis], [0, *label_values(self.scans.classes)]
        plane = tuple(part for axis, part in enumerate(self.shape) if axis != self.spatial_axis)
        for number, values in slices.items():
            if not 0 <= number < size:
                raise ValueError(f"expected slices from 0 to {size - 1}, got {number}.")
            if values is not None and values.shape != plane:
                raise ValueError(f"expected a slice of shape {plane}, got {tuple(values.shape)}.")
            if values is not None and not torch.isin(values, torch.tensor(allowed)).all():
                raise ValueError(f"expected the values {sorted(allowed)} in drawn slices, got others.")
        known = self._chain is not None
        changed = range(0)
        if known:
            classes = {k: None if x is None else self._to_classes(x) for k, x in slices.items()}
            changed = self.chain.draw(classes)
        for number, values in slices.items():
            if values is None:
                self._drawn.pop(number, None)
            else:
                self._drawn[number] = values.to(torch.uint8)
        return changed

    def label(self, slices: range | None = None) -> MetaTensor:
        """The completed label map ``(1, *spatial)`` in uint8; drawn slices have the values that were drawn.

        Args:
            slices: only these slices, which are next to each other; ``None``: all.
        """
        slices = slices if slices is not None else range(self.shape[self.spatial_axis])
        mask = self.chain.mask.narrow(self.spatial_axis + 1, slices.start, len(slices))
        label = _to_values(mask, self.scans).contiguous()
        # two values of one structure are one class, so what was drawn is copied
        for number in set(self._drawn).intersection(slices):
            label[0].select(self.spatial_axis, number - slices.start).copy_(self._drawn[number])
        return self._on_scan(label)

    def drawn_label(self) -> MetaTensor:
        """The drawn slices as a label map ``(1, *spatial)`` in uint8, zero elsewhere."""
        label = torch.zeros(1, *self.shape, dtype=torch.uint8)
        for number, values in self._drawn.items():
            label[0].select(self.spatial_axis, number).copy_(values)
        return self._on_scan(label)

    def _to_classes(self, values: torch.Tensor) -> torch.Tensor:
        """What the chain takes of a drawn slice."""
        classes = _to_classes(values[None], self.scans)
        return classes[0] if self.scans.activation == "softmax" else classes

    def _on_scan(self, volume: torch.Tensor) -> MetaTensor:
        return MetaTensor(volume, affine=torch.as_tensor(self.affine), meta=dict(self._header))


def fit_completion(
    trained: TrainedNetwork,
    cases: Iterable[Mapping[str, Any]],
    *,
    drawn: int | Sequence[int] = (1, 2, 3),
    ignore_index: int | None = None,
) -> ChainSettings:
    """Fit the weights of the chain for a trained network, as :func:`~monai_conres.chain_training.fit_chain` does.

    Args:
        trained: what :func:`~monai_conres.files.load_network` returns.
        cases: training cases of the network: ``image``, a NIfTI file or one for each channel, and ``label``, the label
            map. The function holds one case at a time.
        drawn: how many slices are drawn: one or more numbers, all in one fit.
        ignore_index: value of voxels without a label, where only some slices of the training cases are drawn.

    Returns:
        Settings for :func:`~monai_conres.files.save_chain`.

    Raises:
        ValueError: for files that :func:`complete_scan` refuses, and when no case has a label.
    """
    samples = (_chain_case(trained, case, ignore_index) for case in cases)
    return fit_chain(samples, drawn=drawn, ignore_index=ignore_index)


@torch.no_grad()
def _chain_case(trained: TrainedNetwork, case: Mapping[str, Any], ignore_index: int | None) -> dict[str, torch.Tensor]:
    """What :func:`~monai_conres.chain_training.fit_chain` takes of a case, with the slices last."""
    scans, axis = trained.scans, _slice_axis(trained.network)
    trained.network.eval()
    files = [Path(file) for file in ensure_tuple(case["image"])]
    check_same_grid([*files, case["label"]] if case.get("label_header", True) else files)
    scan = _load_scan(scans, files)
    file_axis, _ = _file_axis(scans, scan, axis)
    every_slice = range(scan.meta["spatial_shape"][file_axis])
    *_, values = _drawn_slices(case["label"], every_slice, file_axis, scans, ignore_index)
    label = _to_classes(values, scans)
    if ignore_index is not None:
        label = label.masked_fill(values == ignore_index, ignore_index)
    segmentation, residual, seen = _predict_scan(trained, scan, axis, progress=False)
    volumes = {"segmentation": segmentation, "image": seen, "label": label}
    volumes |= {} if residual is None else {"residual": residual}
    return {name: volume.movedim(file_axis + 1, -1)[None] for name, volume in volumes.items()}


def _slice_axis(network: nn.Module) -> int:
    """``spatial_axis`` of a network; of one without residual decoder, what it was built with."""
    axes = {module.spatial_axis for module in network.modules() if isinstance(module, ConResDecoder)}
    if len(axes) > 1:
        raise ValueError(f"expected one slice axis in the network, got spatial_axis {sorted(axes)}; give spatial_axis.")
    return axes.pop() if axes else getattr(network, "arguments", {}).get("spatial_axis", -1)


def _mean_logits(segmentations: Sequence[torch.Tensor], *, softmax: bool) -> torch.Tensor:
    """Logits ``(b, c, *spatial)`` whose softmax (or sigmoid) is the mean of those of several logits."""
    if len(segmentations) == 1:
        return segmentations[0]
    stacked = torch.stack([logits.float() for logits in segmentations])
    if softmax:
        return stacked.log_softmax(2).logsumexp(0)
    return F.logsigmoid(stacked).logsumexp(0) - F.logsigmoid(-stacked).logsumexp(0)


def _mean_over_flips(
    predict: Callable[[torch.Tensor], Sequence[torch.Tensor]],
    window: torch.Tensor,
    flip_axes: Sequence[Sequence[int]],
    dim: int,
    softmax: bool | None = None,
) -> list[torch.Tensor]:
    """Mean ``(segmentation,)`` or ``(segmentation, residual)`` over a window and its mirror images."""
    segmentations, residuals = [], []
    for axes in ((), *flip_axes):
        dims = [slice_dim(window.ndim, axis) for axis in axes]
        # a flip copies, also along no axis
        outputs = predict(window.flip(dims) if dims else window)
        segmentation, *residual = (logits.flip(dims) if dims else logits for logits in outputs)
        segmentations.append(segmentation)
        # a flip along the slice axis shifts the residual by one slice
        residuals += [logits.roll(1, dim) if dim in dims else logits for logits in residual]
    if softmax is None:
        softmax = segmentations[0].shape[1] > residuals[0].shape[1]
    mean = _mean_logits(segmentations, softmax=softmax)
    return [mean, torch.stack(residuals).mean(0)] if residuals else [mean]


def _segment(
    network: nn.Module, flip_axes: Sequence[Sequence[int]], softmax: bool, window: torch.Tensor
) -> torch.Tensor:
    """Mean of a network without residual decoder over a window and its mirror images, as logits."""
    return _mean_over_flips(lambda image: (network(image),), window, flip_axes, -1, softmax)[0]


def _predict(
    trained: TrainedNetwork, image: torch.Tensor, axis: int, progress: bool | Callable[[float], None]
) -> list[torch.Tensor]:
    """``[segmentation, residual]`` of ``(1, c, *spatial)`` on the CPU. There is no residual without its decoder."""
    network, scans = trained.network, trained.scans
    # windows that do not overlap along the slices leave out changes
    overlap = [max(scans.overlap, 0.25) if k == axis % 3 else scans.overlap for k in range(3)]
    device = next(network.parameters()).device
    inferer = scans.inferer(overlap=overlap, sw_device=device, device="cpu", progress=progress is True)
    if callable(progress):
        inferer = _reporting(inferer, progress, image.shape[2:], scans.patch_size, overlap)
    if any(isinstance(module, ConResDecoder) for module in network.modules()):
        return list(predict_with_residual(image, network, inferer, flip_axes=scans.flip_axes))
    return [inferer(image, partial(_segment, network, scans.flip_axes, scans.activation == "softmax"))]


def _reporting(
    inferer: Callable[..., Any],
    progress: Callable[[float], None],
    shape: Sequence[int],
    patch: Sequence[int],
    overlap: Sequence[float],
) -> Callable[..., Any]:
    """An inferer of one window after the other that tells ``progress`` the part of the windows that is done."""
    steps = (max(1, int(min(p, size) * (1 - part))) for p, size, part in zip(patch, shape, overlap, strict=True))
    windows = math.prod(
        1 + math.ceil(max(0, size - p) / step) for size, p, step in zip(shape, patch, steps, strict=True)
    )
    done = 0

    def reporting(image: torch.Tensor, predictor: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        def predict(window: torch.Tensor) -> torch.Tensor:
            nonlocal done
            result = predictor(window)
            done += 1
            progress(min(1.0, done / windows))
            return result

        return inferer(image, predict)

    return reporting


def _predict_scan(
    trained: TrainedNetwork, scan: MetaTensor, axis: int, progress: bool | Callable[[float], None]
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Segmentation, residual and image ``(c, *spatial)`` on the voxels of the scan file."""
    image = convert_to_tensor(scan, track_meta=False)[None]
    parts = [*_predict(trained, image, axis, progress), image]
    # one after the other: together they would be in memory twice
    segmentation, *residuals, seen = (
        trained.scans.to_scan(parts.pop(0)[0], scan).as_tensor() for _ in range(len(parts))
    )
    file_axis, flipped = _file_axis(trained.scans, scan, axis)
    if flipped:  # of two slices with a change between them, the other one comes second now
        residuals = [residual.roll(1, file_axis + 1) for residual in residuals]
    return segmentation, residuals[0] if residuals else None, seen


def _propose(chain: SliceChain, count: int) -> list[int]:
    """Slices to draw next, each one as if those before it were drawn as they are completed. They are drawn."""
    proposed: list[int] = []
    while len(proposed) < count and (ranking := chain.ranking()):
        number = next(iter(ranking))
        proposed.append(number)
        chain.draw({number: chain.plane(number)})
    return proposed


def _load_scan(scans: ScanSettings, files: Sequence[Path]) -> MetaTensor:
    """The network's input from the files of a scan, checked."""
    try:
        scan = scans.preprocessing()({"image": [str(file) for file in files]})["image"]
    except (OSError, RuntimeError) as error:
        reason = error.__cause__ or error  # MONAI's message names the transform only
        raise ValueError(f"expected a scan, cannot read {', '.join(map(str, files))} ({reason}).") from error
    if len(scan) != len(scans.channels):
        raise ValueError(
            f"expected {len(scans.channels)} channels, {', '.join(scans.channels)}, got {len(scan)}; give one file "
            "with all of them, or one file for each of them in this order."
        )
    if not scan.isfinite().all():
        raise ValueError(f"expected finite numbers in {', '.join(map(str, files))}, got NaN or infinity.")
    return scan


def _file_axis(scans: ScanSettings, scan: MetaTensor, axis: int) -> tuple[int, bool]:
    """The axis of the file that is the network's slice axis, and whether the file runs along it the other way."""
    affine = np.asarray(scan.meta["original_affine"])
    codes, letter = nib.aff2axcodes(affine), scans.orientation[axis]
    pair = next(pair for pair in ("LR", "PA", "IS") if letter in pair)
    (file_axis,) = (number for number, code in enumerate(codes) if code in pair)
    own = nib.affines.voxel_sizes(affine)[file_axis]
    seen, slices = float(scan.pixdim[axis]), scan.shape[1:][axis]
    if slices != scan.meta["spatial_shape"][file_axis] or abs(seen - own) * slices > TOLERANCE * own:
        raise ValueError(
            f"expected a scan with slices every {seen:.4g} mm ({ENDS[letter]}), because the network resamples scans to "
            f"this distance, got {own:.4g} mm; resample the scan along this axis first, and draw on the result."
        )
    return file_axis, codes[file_axis] != letter


def _drawn_slices(
    file: str | os.PathLike,
    slices: Sequence[int] | None,
    axis: int,
    scans: ScanSettings,
    ignore_index: int | None = None,
) -> tuple[list[int], list[int], torch.Tensor]:
    """The drawn slices, others with labels, and the label map ``(1, *spatial)`` in uint8 of the drawn ones."""
    allowed = [0, *sorted(label_values(scans.classes))]
    check_ignored_value(ignore_index, allowed)
    label = convert_to_tensor(load_label(file), track_meta=False)
    by_slice = label.movedim(axis + 1, 0)
    nothing = 0 if ignore_index is None else ignore_index  # what slices hold that are not drawn
    if slices is None and ignore_index is not None and not (label == ignore_index).any():
        raise ValueError(
            f"expected slices of {ignore_index} in {file}, which are not drawn, got none; leave out --ignore (in "
            "Python ignore_index), if slices that are not drawn are empty."
        )
    labelled = set((by_slice != nothing).flatten(1).any(1).nonzero()[:, 0].tolist())
    if slices is None and ignore_index is None:
        _check_drawn_axis(file, label[0] != 0, axis)
    known = sorted({operator.index(number) for number in slices} if slices is not None else labelled)
    if known and (known[0] < 0 or known[-1] >= len(by_slice)):
        raise ValueError(
            f"expected slices from 0 to {len(by_slice) - 1}, got {known}; they count from 0 along the "
            f"{ORDINALS[axis]} axis of the file."
        )
    values = torch.zeros_like(label, dtype=torch.uint8)
    drawn = by_slice[known]
    wrong = drawn[~torch.isin(drawn, torch.tensor([*allowed, nothing], dtype=drawn.dtype))]
    if len(wrong):
        found = ", ".join(sorted({f"{value:.9g}" for value in wrong[:10000].tolist()}, key=float)[:5])
        raise ValueError(
            f"expected the values {allowed} in the drawn slices of {file}, which the network knows as "
            f"{dict(scans.classes)}, got {found}; map the others to these, or to 0, or name the value of slices "
            "that are not drawn (--ignore, in Python ignore_index)."
        )
    values.movedim(axis + 1, 0)[known] = drawn.to(torch.uint8)
    return known, sorted(labelled - set(known)), values


def _check_drawn_axis(file: str | os.PathLike, labelled: torch.Tensor, axis: int) -> None:
    """Raise if slices were drawn along another axis than ``axis``: no two neighbors along it have labels."""

    def numbers(other: int) -> list[int]:
        return labelled.movedim(other, 0).flatten(1).any(1).nonzero()[:, 0].tolist()

    def apart(found: Sequence[int]) -> bool:
        return all(later - earlier > 1 for earlier, later in itertools.pairwise(found))

    found = numbers(axis)
    if len(found) < 4 or apart(found):
        return
    # a structure of one voxel looks alike from both other axes
    for other, wide in itertools.permutations({0, 1, 2} - {axis}):
        if apart(drawn := numbers(other)) and len(across := numbers(wide)) > 2 and not apart(across):
            raise ValueError(
                f"expected slices that are drawn along the {ORDINALS[axis]} axis of {file}, got labels only in "
                f"{'slice' if len(drawn) == 1 else 'slices'} {', '.join(map(str, drawn))} along the {ORDINALS[other]} "
                f"axis; draw along the {ORDINALS[axis]} axis, or name the slices that are drawn (--slices, in Python "
                "slices)."
            )


def _to_classes(label: torch.Tensor, scans: ScanSettings) -> torch.Tensor:
    """What the chain takes, of a label map ``(1, *spatial)``: class indices, or a mask for each structure."""
    if scans.activation == "sigmoid":
        return structure_masks(label, scans.classes)
    table = torch.zeros(256, dtype=torch.uint8)
    for index, value in enumerate(label_values(scans.classes), start=1):
        table[value] = index
    return table[label.long()]


def _to_values(classes: torch.Tensor, scans: ScanSettings) -> torch.Tensor:
    """The label map of what :func:`_to_classes` returns."""
    if scans.activation == "sigmoid":
        return paint_structures(classes, scans.classes)
    table = np.array([0, *label_values(scans.classes)], dtype=np.uint8)
    return torch.from_numpy(table.take(classes.numpy()))  # torch wants indices in int64, which take 8 times the memory
