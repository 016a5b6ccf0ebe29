"""Trained networks: loaded from their run folders, averaged, and exported."""

from __future__ import annotations

import dataclasses
import itertools
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.inferers import SlidingWindowInferer
from monai.networks.utils import convert_to_torchscript
from monai.utils import ensure_tuple

from monai_conres.bundle.datalist import Datalist
from monai_conres.conresnet import ConResNet
from monai_conres.decoder import ConResDecoder
from monai_conres.files import atomic_path, load_network, path_text, plain_values, read_network
from monai_conres.residual import slice_dim
from monai_conres.scans import ScanSettings, Structures, label_values

Run = str | os.PathLike  # a folder with model.pt and network.json
Flips = Sequence[Sequence[int]]


class MeanProbability(nn.Module):
    """Mean of the probabilities of several networks, each on the image and on its mirror images.

    This is a network. So sliding-window inference blends probabilities, as Zhang et al., 2021, do, and takes no more
    memory than with one of the networks.

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

    def __init__(self, networks: Sequence[nn.Module], *, softmax: bool = False, flip_axes: Flips = ()) -> None:
        super().__init__()
        if not networks:
            raise ValueError("expected one network or more to average, got none.")
        self.networks = nn.ModuleList(networks)
        self.softmax = softmax
        self.flip_axes = [(), *(tuple(axes) for axes in flip_axes)]

    def _passes(self, image: torch.Tensor) -> list[tuple[list[int], Any]]:
        """Each pair of dimensions to flip and a network."""
        flips = [[slice_dim(image.ndim, axis) for axis in axes] for axes in self.flip_axes]
        return list(itertools.product(flips, self.networks))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Mean probabilities ``(b, c, *spatial)`` of ``image``."""
        total: Any = 0.0
        passes = self._passes(image)
        for dims, network in passes:
            logits = network(image.flip(dims)).float()  # sigmoids in bfloat16 round up to 0.5
            total = total + (logits.softmax(1) if self.softmax else logits.sigmoid()).flip(dims)
        return total / len(passes)

    def with_residual(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits ``(segmentation, residual)`` of ``image``, for an inferer: ``inferer(image, self.with_residual)``.

        The softmax or sigmoid of the segmentation is the mean probability, and the residual is the mean of the logits.
        A flip along the slice axis shifts the residual by one slice, and the method shifts it back. The residual of the
        first slice has no meaning, as in a single network.

        Raises:
            ValueError: when a network has no residual, or the networks have different slice axes.
        """
        decoders = [module for module in self.modules() if isinstance(module, ConResDecoder)]
        slices = {slice_dim(image.ndim, decoder.spatial_axis) for decoder in decoders}
        if len(slices) > 1:
            axes = sorted(dim - 2 for dim in slices)
            raise ValueError(f"expected networks with one slice axis, got spatial_axis {axes}; average others.")
        total: Any = None  # log of the summed probabilities: of each class, or of yes and no
        residuals: Any = 0.0
        passes = self._passes(image)
        for dims, network in passes:
            segmentation, residual = (x.float().flip(dims) for x in network.with_residual(image.flip(dims)))
            residuals = residuals + (residual.roll(1, tuple(slices)) if slices & set(dims) else residual)
            if self.softmax:
                log_probability = segmentation.log_softmax(1)
            else:
                log_probability = torch.stack((F.logsigmoid(segmentation), F.logsigmoid(-segmentation)))
            total = log_probability if total is None else torch.logaddexp(total, log_probability)
        return total if self.softmax else total[0] - total[1], residuals / len(passes)


class ProbabilityInferer(SlidingWindowInferer):
    """MONAI's sliding-window inferer, which takes the :class:`MeanProbability` of a network of logits.

    So MONAI's tools, which know a network and an inferer, blend probabilities. A :class:`MeanProbability` goes through
    unchanged.

    ``softmax`` and ``flip_axes`` are arguments of :class:`MeanProbability`, all others of ``SlidingWindowInferer``.

    Example:
        >>> ProbabilityInferer(roi_size=(4, 4, 4))(torch.zeros(1, 1, 4, 4, 6), nn.Identity()).unique()
        tensor([0.5000])
    """

    def __init__(self, *args: Any, softmax: bool = False, flip_axes: Flips = (), **kwargs: Any) -> None:
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
    for run_dir in run_folders(run_dirs):
        content = read_network(run_dir)
        seen = set(content["training"].get("cases", ()))
        if shared := [case["name"] for case in held_out if case["name"] in seen]:
            raise ValueError(
                f"expected cases that {run_dir} was not trained with, got {shared[:5]}, {len(shared)} of "
                f"{len(held_out)} in all; choose other cases, or an empty held_out to score training cases."
            )
        scans = scans or content["scans"]
        stored, here = ({**vars(each), "classes": list(each.classes)} for each in (content["scans"], scans))
        for name in ("channels", "classes", "activation", "orientation", "spacing", "normalization"):
            _check_agreement(run_dir, f"scans#{name}", stored[name], here[name])
        networks.append(load_network(run_dir).network if networks or network is None else network)
    return networks


def run_folders(run_dirs: Run | Sequence[Run]) -> list[str]:
    """One run folder or several as a list, as they were typed: see :func:`~monai_conres.files.path_text`.

    Example:
        >>> run_folders("runs/first"), run_folders(["runs/0", "runs/1"])
        (['runs/first'], ['runs/0', 'runs/1'])
    """
    return [path_text(run_dir) for run_dir in ensure_tuple(run_dirs)]


def stored_network(run_dir: Run, default: Mapping[str, Any], **given: Any) -> nn.Module:
    """The trained network of a run folder, or an untrained :class:`ConResNet` if there is no ``network.json``.

    So a configuration's ``network_def`` gives MONAI's tools a network also before any training.

    Args:
        run_dir: a run folder.
        default: arguments of the untrained network.
        given: arguments from the command line, such as ``--network_def#context none``. They replace those of
            ``default``, and must agree with ``network.json``.

    Raises:
        ValueError: when ``given`` contradicts ``network.json``.

    Example:
        >>> stored_network("no_run", {"in_channels": 1, "out_channels": 2}, blocks=(1, 1, 1, 1, 1)).in_channels
        1
    """
    if not Path(run_dir, "network.json").is_file():
        return ConResNet(**{**default, **given})
    stored = read_network(run_dir)["network"].get("arguments", {})
    for name, value in given.items():
        _check_agreement(run_dir, f"network_def#{name}", stored.get(name), value)
    return load_network(run_dir).network


def stored_scans(run_dir: Run, default: Mapping[str, Any], **given: Any) -> ScanSettings:
    """The :class:`~monai_conres.files.ScanSettings` of a run folder, or of ``default`` without a ``network.json``.

    Arguments and errors are those of :func:`stored_network`. But ``patch_size``, ``overlap`` and ``flip_axes``, such as
    ``--scans#overlap 0.5``, replace those of the training.

    Example:
        >>> default = {"channels": ["T1"], "patch_size": [8, 8, 8], "classes": {"core": [1]}, "activation": "sigmoid"}
        >>> stored_scans("no_run", default, overlap=0.5).overlap
        0.5
    """
    if not Path(run_dir, "network.json").is_file():
        return ScanSettings(**{**default, **given})
    scans = read_network(run_dir)["scans"]
    changed = dataclasses.replace(scans, **given)
    for name in set(given) - {"patch_size", "overlap", "flip_axes"}:
        _check_agreement(run_dir, f"scans#{name}", getattr(scans, name), getattr(changed, name))
    return changed


def held_out_cases(data: Datalist, run_dir: Run) -> list[dict[str, Any]]:
    """The cases that the training of a run folder held out: the names in ``"validation"`` of ``network.json``.

    Raises:
        ValueError: when ``network.json`` has no such names, or the data do not have each of them.
    """
    names = read_network(run_dir)["training"].get("validation", [])
    cases = [case for case in data.cases if case["name"] in names]
    if not cases or len(cases) < len(names):
        missing = sorted(set(names) - {case["name"] for case in cases})
        raise ValueError(
            f"expected all cases that the training of {run_dir} held out in the data, found {len(cases)} of "
            f"{len(names)}, missing {missing[:5]}; give these data, or the cases to score: --cases '$@data.cases'."
        )
    return cases


def same_classes(structures: Structures, scans: ScanSettings) -> Structures:
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
            f"expected the network's classes {scans.classes} in the labels, got {dict(structures)}; choose another "
            "data set or another network."
        )
    return structures


def _check_agreement(run_dir: Run, name: str, stored: Any, given: Any) -> None:
    """Tuples may be lists, but dictionaries need one order."""
    stored, given = (plain_values(list(v.items()) if isinstance(v, Mapping) else v) for v in (stored, given))
    if stored != given:
        raise ValueError(
            f"expected {name} {stored}, as in network.json of {run_dir}, got {given}; leave this setting out, or "
            "choose a run_dir of a network that was trained with it."
        )


def save_torchscript(network: nn.Module, path: str | os.PathLike, image: torch.Tensor) -> None:
    """Write a network, such as a :class:`MeanProbability`, as TorchScript, which loads without this package.

    ``image`` ``(b, c, *spatial)`` on the network's device is for tracing. The file also takes images of other sizes.
    The function sets ``eval()`` mode.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "model.ts")
        >>> save_torchscript(MeanProbability([nn.Identity()], flip_axes=[[2]]), path, torch.zeros(1, 1, 8, 8, 8))
        >>> torch.jit.load(path)(torch.zeros(2, 1, 4, 5, 6)).unique()
        tensor([0.5000])
    """
    with warnings.catch_warnings(), atomic_path(path_text(path)) as temporary:
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # about numbers that do not depend on sizes
        convert_to_torchscript(network, temporary, inputs=(image,), use_trace=True, check_trace=False)
