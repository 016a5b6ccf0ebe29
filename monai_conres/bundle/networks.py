"""Trained networks: loaded from their run folders, averaged, and exported."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.inferers import SlidingWindowInferer
from monai.networks import eval_mode
from monai.utils import ensure_tuple

from monai_conres.bundle.datalist import Datalist
from monai_conres.conresnet import ConResNet
from monai_conres.decoder import ConResDecoder
from monai_conres.files import atomic_path, load_network, plain_values, read_network
from monai_conres.residual import slice_dim
from monai_conres.scans import ScanSettings, label_values

__all__ = [
    "MeanProbability",
    "ProbabilityInferer",
    "held_out_cases",
    "load_networks",
    "same_classes",
    "save_torchscript",
    "stored_network",
    "stored_scans",
]

Run = str | os.PathLike  # a folder with model.pt and network.json


class MeanProbability(nn.Module):
    """Mean of the probabilities of several networks, each on the image and on its mirror images.

    It is a network of its own. So sliding-window inference blends probabilities, as Zhang et al., 2021, do, and takes
    no more memory than with one of the networks.

    Args:
        networks: networks that return logits, one tensor, in ``eval()`` mode.
        softmax: True for a softmax over the channels, False for a sigmoid of each.
        flip_axes: sets of spatial axes to flip the image along, such as ``[[0], [0, 1]]``. The image without a flip
            always counts. Negative axes count from the end.

    Shape:
        ``(b, c, *spatial)``. The result is between 0 and 1.

    Raises:
        ValueError: when there is no network, or the image does not have a flip axis.

    Example:
        >>> predictor = MeanProbability([nn.Identity(), nn.Identity()], flip_axes=[[2]])
        >>> predictor(torch.zeros(1, 1, 2, 2, 3)).unique()
        tensor([0.5000])
    """

    def __init__(
        self, networks: Sequence[nn.Module], *, softmax: bool = False, flip_axes: Sequence[Sequence[int]] = ()
    ) -> None:
        super().__init__()
        if not networks:
            raise ValueError("expected one network or more to average, got none.")
        self.networks = nn.ModuleList(networks)
        self.softmax = softmax
        self.flip_axes = [(), *(tuple(axes) for axes in flip_axes)]

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Mean probabilities ``(b, c, *spatial)`` of ``image``."""
        total: Any = 0.0
        for dims in self._flips(image):
            for network in self.networks:
                logits = network(_flip(image, dims))
                total = total + _flip(logits.softmax(1) if self.softmax else logits.sigmoid(), dims)
        return total / (len(self.flip_axes) * len(self.networks))

    def with_residual(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits ``(segmentation, residual)`` of ``image``, for an inferer: ``inferer(image, self.with_residual)``.

        The softmax or sigmoid of the segmentation is the mean probability, and the residual is the mean of the logits.
        A flip along the slice axis shifts the residual by one slice, which is undone. There the residual of the first
        slice has no meaning, as in a single network.

        Raises:
            ValueError: when a network has no residual, or the networks have different slice axes.
        """
        total: Any = None  # log of the summed probabilities: of each class, or of yes and no
        residuals: Any = 0.0
        slice_axes = set()
        for dims in self._flips(image):
            network: Any
            for network in self.networks:
                segmentation, residual = (_flip(x, dims) for x in network.with_residual(_flip(image, dims)))
                slices = slice_dim(image.ndim, _spatial_axis(network))
                slice_axes.add(slices - 2)
                residuals = residuals + (residual.roll(1, slices) if slices in dims else residual)
                if self.softmax:
                    log_probability = segmentation.log_softmax(1)
                else:
                    log_probability = torch.stack((F.logsigmoid(segmentation), F.logsigmoid(-segmentation)))
                total = log_probability if total is None else torch.logaddexp(total, log_probability)
        if len(slice_axes) > 1:
            raise ValueError(f"expected networks with one slice axis, got spatial_axis {sorted(slice_axes)}.")
        number = len(self.flip_axes) * len(self.networks)
        return total - math.log(number) if self.softmax else total[0] - total[1], residuals / number

    def _flips(self, image: torch.Tensor) -> list[list[int]]:
        return [[slice_dim(image.ndim, axis) for axis in axes] for axes in self.flip_axes]


def _flip(volume: torch.Tensor, dims: list[int]) -> torch.Tensor:
    return volume.flip(dims) if dims else volume


def _spatial_axis(network: nn.Module) -> int:
    """The slice axis of a network with residuals."""
    return next(module.spatial_axis for module in network.modules() if isinstance(module, ConResDecoder))


class ProbabilityInferer(SlidingWindowInferer):
    """MONAI's sliding-window inferer that blends probabilities: of a network of logits it takes the mean probability.

    MONAI's tools, which know a network and an inferer, so get what :class:`MeanProbability` gives. A
    :class:`MeanProbability` passes unchanged.

    Args:
        args: arguments of ``SlidingWindowInferer``, such as ``roi_size``.
        softmax: as in :class:`MeanProbability`.
        flip_axes: as in :class:`MeanProbability`.
        kwargs: further arguments of ``SlidingWindowInferer``.

    Example:
        >>> ProbabilityInferer(roi_size=(4, 4, 4))(torch.zeros(1, 1, 4, 4, 6), nn.Identity()).unique()
        tensor([0.5000])
    """

    def __init__(
        self, *args: Any, softmax: bool = False, flip_axes: Sequence[Sequence[int]] = (), **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.softmax = softmax
        self.flip_axes = flip_axes

    def __call__(self, inputs: torch.Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Probabilities of whole volumes ``(b, c, *spatial)``."""
        if not isinstance(network, MeanProbability):
            network = MeanProbability([network], softmax=self.softmax, flip_axes=self.flip_axes)
        return super().__call__(inputs, network, *args, **kwargs)


def load_networks(
    run_dirs: Run | Sequence[Run],
    *,
    held_out: Sequence[Mapping[str, Any]] = (),
    scans: ScanSettings | None = None,
    network: nn.Module | None = None,
) -> list[nn.Module]:
    """The networks of one or several run folders, in ``eval()`` mode on the CPU.

    Args:
        run_dirs: one run folder or more.
        held_out: cases to be scored, as in a :class:`~monai_conres.bundle.Datalist`. Their names must not be names of
            training cases.
        scans: how the scans are prepared here. Channels, class names, activation, orientation, spacing and
            normalization must be those of each network. ``None`` compares with the first network.
        network: the first folder's network, if :func:`stored_network` has loaded it already.

    Raises:
        ValueError: when a run folder has no complete network, a network was trained with a case to be scored, or a
            network takes scans that are prepared in another way.
    """
    networks: list[nn.Module] = []
    for run_dir in ensure_tuple(run_dirs):
        content = read_network(run_dir)
        seen = set(content["training"].get("cases", ()))
        if shared := [case["name"] for case in held_out if case["name"] in seen]:
            raise ValueError(
                f"expected cases that {run_dir} was not trained with, got {shared[:5]}, {len(shared)} of "
                f"{len(held_out)} in all; choose other cases, or an empty held_out to score training cases."
            )
        scans = content["scans"] if scans is None else scans
        for name in ("channels", "classes", "activation", "orientation", "spacing", "normalization"):
            stored, here = getattr(content["scans"], name), getattr(scans, name)
            if name == "classes":  # the values may differ between data sets, the order may not
                stored, here = list(stored), list(here)
            if stored != here:
                raise ValueError(
                    f"expected {name} {_plain(stored)}, with which {run_dir} was trained, got {_plain(here)}; average "
                    "networks that were trained in the same way."
                )
        loaded = None if networks else network
        networks.append(load_network(run_dir).network if loaded is None else loaded)
    return networks


def stored_network(run_dir: Run, default: Mapping[str, Any], **given: Any) -> nn.Module:
    """The trained network of a run folder, or an untrained :class:`ConResNet` if there is no ``network.json``.

    As ``network_def`` of a configuration it gives MONAI's tools a network also before any training.

    Args:
        run_dir: a run folder.
        default: arguments of the untrained network.
        given: arguments from the command line, such as ``--network_def#context none``. They replace those of
            ``default``, and must agree with ``network.json``. ``None`` means not given.

    Raises:
        ValueError: when ``given`` contradicts ``network.json``.

    Example:
        >>> stored_network("no_run", {"in_channels": 1, "out_channels": 2}, blocks=(1, 1, 1, 1, 1)).in_channels
        1
    """
    given = {name: value for name, value in given.items() if value is not None}
    if (content := _content(run_dir)) is None:
        return ConResNet(**{**default, **given})
    stored = content["network"].get("arguments", {})
    for name, value in given.items():
        _check_agreement(run_dir, f"network_def#{name}", stored.get(name), value)
    return load_network(run_dir).network


def stored_scans(run_dir: Run, default: Mapping[str, Any], **given: Any) -> ScanSettings:
    """The :class:`~monai_conres.files.ScanSettings` of a run folder, or of ``default`` without a ``network.json``.

    Args:
        run_dir: a run folder.
        default: settings for the untrained network.
        given: settings from the command line, such as ``--scans#overlap 0.5``. ``patch_size``, ``overlap`` and
            ``flip_axes`` replace those of the training. Others must agree with them. ``None`` means not given.

    Raises:
        ValueError: when ``given`` contradicts ``network.json``.

    Example:
        >>> default = {"channels": ["T1"], "patch_size": [8, 8, 8], "classes": {"core": [1]}, "activation": "sigmoid"}
        >>> stored_scans("no_run", default, overlap=0.5).overlap
        0.5
    """
    given = {name: value for name, value in given.items() if value is not None}
    if (content := _content(run_dir)) is None:
        return ScanSettings(**{**default, **given})
    scans = content["scans"]
    changed = dataclasses.replace(scans, **given)
    for name in set(given) - {"patch_size", "overlap", "flip_axes"}:
        _check_agreement(run_dir, f"scans#{name}", getattr(scans, name), getattr(changed, name))
    return changed


def held_out_cases(data: Datalist, run_dir: Run) -> list[dict[str, Any]]:
    """The cases that the network of a run folder was not trained with; all cases without a ``network.json``.

    Raises:
        ValueError: when the network was trained with all cases.
    """
    if (content := _content(run_dir)) is None:
        return data.cases
    seen = set(content["training"].get("cases", ()))
    cases = [case for case in data.cases if case["name"] not in seen]
    if not cases:
        raise ValueError(
            f"expected cases that {run_dir} was not trained with, got only training cases; give the cases to score and "
            "an empty held_out, or a network that was trained with fewer cases."
        )
    return cases


def same_classes(structures: Mapping[str, Sequence[int]], scans: ScanSettings) -> Mapping[str, Sequence[int]]:
    """``structures``, which must have the class names of ``scans``. Their label values may be other numbers.

    Raises:
        ValueError: when names or the number of values differ.

    Example:
        >>> scans = ScanSettings(channels=["T1"], patch_size=[8, 8, 8], classes={"ET": [4]}, activation="sigmoid")
        >>> same_classes({"ET": (3,)}, scans)
        {'ET': (3,)}
    """
    numbers = [len(label_values(classes)) for classes in (structures, scans.classes)]
    if list(structures) != list(scans.classes) or (scans.activation == "softmax" and numbers[0] != numbers[1]):
        raise ValueError(
            f"expected the network's classes {_plain(scans.classes)} in the labels, got {_plain(structures)}; choose "
            "another data set or another network."
        )
    return structures


def _content(run_dir: Run) -> dict[str, Any] | None:
    """What ``network.json`` says, if there is one."""
    return read_network(run_dir) if Path(run_dir, "network.json").is_file() else None


def _check_agreement(run_dir: Run, name: str, stored: Any, given: Any) -> None:
    if name == "network_def#spatial_axis" and isinstance(given, int):
        stored, given = stored % 3, given % 3
    if _plain(stored) != _plain(given):
        raise ValueError(
            f"expected {name} {_plain(stored)}, as in network.json of {run_dir}, got {_plain(given)}; leave out "
            f"--{name}, or give the run_dir of a network that was trained with it."
        )


def _plain(value: Any) -> str:
    """A text, for tuples the same as for lists. Two dictionaries need the same order."""
    return str(plain_values(value))


def save_torchscript(network: nn.Module, path: str | os.PathLike, image: torch.Tensor) -> None:
    """Write a network, such as a :class:`MeanProbability`, as TorchScript, which loads without this package.

    Args:
        network: a network of one tensor to one tensor. The file computes what it computes in ``eval()`` mode.
        path: name of the file.
        image: an image ``(b, c, d, h, w)`` on the network's device to trace the network with. The file also takes
            other sizes and numbers of images.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "model.ts")
        >>> save_torchscript(MeanProbability([nn.Identity()], flip_axes=[[2]]), path, torch.zeros(1, 1, 8, 8, 8))
        >>> torch.jit.load(path)(torch.zeros(2, 1, 4, 5, 6)).unique()
        tensor([0.5000])
    """
    with torch.no_grad(), eval_mode(network), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # about numbers that do not depend on sizes
        traced = torch.jit.trace(network, image, check_trace=False)
    with atomic_path(path) as temporary:
        torch.jit.save(traced, temporary)
