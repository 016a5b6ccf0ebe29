"""Evaluation and inference: networks averaged, one table of all cases, a report of several runs.

``python -m monai_conres.bundle.evaluation RUN/*/evaluation/cases.csv --out FOLDER`` joins the tables of several runs, such as
the folds of a cross-validation.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn as nn
from monai.data import MetaTensor
from monai.networks import eval_mode
from monai.transforms import Orientation
from monai.utils import convert_to_tensor, ensure_tuple, optional_import

from monai_conres.bundle.datalist import load_volume, repeated, stem
from monai_conres.bundle.structures import structure_masks
from monai_conres.bundle.training import network_settings, plain_values, settings_file
from monai_conres.files import atomic_path, write_csv
from monai_conres.metrics import BratsDiceMetric, BratsHausdorffDistanceMetric, BratsSurfaceDiceMetric
from monai_conres.residual import slice_dim

if TYPE_CHECKING:
    from ignite.engine import Engine
Events, _ = optional_import("ignite.engine", name="Events")
idist, _ = optional_import("ignite.distributed")
nib, _ = optional_import("nibabel", descriptor="{}; install it with: pip install 'monai-conres[io]'")

__all__ = ["CaseReport", "MeanProbability", "join_reports", "load_networks", "save_torchscript", "summarize"]


class MeanProbability(nn.Module):
    """Mean of the probabilities of several networks, each on the image and on its mirror images.

    As a network of its own it goes through sliding-window inference, which then blends probabilities, as Zhang et al.,
    2021, do, and takes no more memory than one of them.

    Args:
        networks: networks that return logits, one tensor, in ``eval()`` mode.
        softmax: True for a softmax over the channels, False for a sigmoid each.
        flip_axes: sets of spatial axes to mirror the image along, such as ``[[0], [0, 1]]``; the image as it is always
            counts, too. Negative ones count from the end.

    Shape:
        ``(b, c, *spatial)``; the result is between 0 and 1.

    Raises:
        ValueError: when there is no network, or a flip axis is no axis of the image.

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
        """Probabilities of ``image``."""
        total: Any = 0.0
        for axes in self.flip_axes:
            dims = [slice_dim(image.ndim, axis) for axis in axes]
            flipped = image.flip(dims) if dims else image
            for network in self.networks:
                logits = network(flipped)
                probability = logits.softmax(1) if self.softmax else logits.sigmoid()
                total = total + (probability.flip(dims) if dims else probability)
        return total / (len(self.flip_axes) * len(self.networks))


def load_networks(
    network: nn.Module,
    paths: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    held_out: Sequence[Mapping[str, Any]] = (),
    **settings: Any,
) -> list[nn.Module]:
    """Copies of a network with the weights of several files.

    The weights of a network often fit one of other settings, another slice axis for example. Where
    :class:`~monai_conres.bundle.training.TrainingCheckpoint` has written the settings of the training beside the weights
    (``model.pt.json``), they are compared; a missing file is a warning. They know of one training, and not of one that
    it went on from.

    Args:
        network: the network; of one of this package the settings have to be those that it was trained with.
        paths: files of weights, one or more.
        held_out: cases, as in a :class:`~monai_conres.bundle.Datalist`, that are to be scored: the networks must not
            have seen them in training, by their names.
        settings: others that have to be those of the training, such as the order of the image's channels.

    Raises:
        ValueError: when a file is missing, cannot be read, or has the weights of another network, or of one that was
            trained in another way.
    """
    networks = []
    for path in ensure_tuple(paths):
        if not Path(path).is_file():
            raise ValueError(
                f"expected a network's weights in {path}, found no file; train first, or give checkpoints."
            )
        check_training(path, {**plain_values(settings), **network_settings(network)}, held_out)
        network = copy.deepcopy(network)
        try:
            network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"expected weights of this network in {path}, got others ({reason}); give the overrides that it was "
                "trained with, such as --network_def#channels."
            ) from error
        networks.append(network)
    return networks


def save_torchscript(network: nn.Module, path: str | os.PathLike, image: torch.Tensor) -> None:
    """Write a network, such as a :class:`MeanProbability`, as TorchScript, to be loaded without this package.

    Args:
        network: of one tensor to one tensor; what it computes in ``eval()`` mode is written.
        path: name of the file.
        image: an image ``(b, c, d, h, w)`` on the network's device to trace it with; the file takes other sizes and
            numbers of images, too.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "model.ts")
        >>> save_torchscript(MeanProbability([nn.Identity()], flip_axes=[[2]]), path, torch.zeros(1, 1, 8, 8, 8))
        >>> torch.jit.load(path)(torch.zeros(2, 1, 4, 5, 6)).unique()
        tensor([0.5000])
    """
    with torch.no_grad(), eval_mode(network), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # torch's own, of numbers that do not depend on sizes
        traced = torch.jit.trace(network, image, check_trace=False)
    with atomic_path(path) as temporary:
        torch.jit.save(traced, temporary)


def check_training(
    weights: str | os.PathLike, settings: Mapping[str, Any], held_out: Sequence[Mapping[str, Any]]
) -> None:
    """Raise unless the settings of a training, where they are known, are these and it left these cases out."""
    file = settings_file(weights)
    if not file.is_file():
        warnings.warn(
            f"{file} is not there, which TrainingCheckpoint writes: whether {weights} was trained with these settings"
            + (", and without the cases to be scored," if held_out else "")
            + " cannot be checked.",
            stacklevel=3,
        )
        return
    try:
        trained = json.loads(file.read_text())
        trained |= trained.get("network", {})
        seen = set(trained.get("training_cases", ()))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"expected the settings of a training in {file}, cannot read it ({error}).") from error
    for name, value in settings.items():
        if name in trained and trained[name] != value:
            raise ValueError(
                f"expected {name} {trained[name]}, with which {weights} was trained, got {value}; give the overrides "
                "of the training."
            )
    if shared := [case["name"] for case in held_out if case["name"] in seen]:
        raise ValueError(
            f"expected cases that {weights} was not trained with, got {shared[:5]}, {len(shared)} of {len(held_out)} "
            "in all; give the overrides of the training that split the cases (fold, hold_out, split_seed), or an empty "
            "held_out, if these are others of the same names or are to be scored all the same."
        )


class CaseReport:
    """A handler that measures, writes and draws each case of an evaluator, and writes a table of all cases.

    It compares files: the prediction in the geometry and the values of the data set against the label as it is on disk.
    With several processes each does its own cases, and the first one writes the table of all.

    ======================  ============================================================================
    file                    content
    ======================  ============================================================================
    ``NAME.nii.gz``         prediction
    ``NAME.png``            slices of the image, the label and the prediction, in RAS orientation
    ``cases.csv``           Dice, HD95 (mm) and NSD of each structure, a row for each case with a label
    ``summary.json``        their means over the cases: see :func:`summarize`
    ======================  ============================================================================

    Args:
        output_dir: folder for all this.
        cases: the cases as in a :class:`~monai_conres.bundle.Datalist`; those without a label are not measured.
        structures: values of each structure.
        full: False measures the Dice alone and writes the tables alone, in seconds: for validation while training.
        tolerance: tolerance of the NSD, in mm.
        pictures: False leaves the ``.png`` files out.

    Raises:
        ValueError: when a process has no case to do, or a prediction would take the place of an image or a label.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        cases: Sequence[Mapping[str, Any]],
        structures: Mapping[str, Sequence[int]],
        *,
        full: bool = True,
        tolerance: float = 1.0,
        pictures: bool = True,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.cases = {case["name"]: case for case in cases}
        self.structures = structures
        self.full = full
        self.pictures = pictures
        if full:
            self._check_places()
        self.metrics: dict[str, Any] = {"Dice": BratsDiceMetric()}
        if full:  # a poor prediction has a large surface, and its distances take minutes
            self.metrics |= {"HD95": BratsHausdorffDistanceMetric(), "NSD": BratsSurfaceDiceMetric(tolerance=tolerance)}
        self.rows: list[dict[str, Any]] = []

    def _check_places(self) -> None:
        files = [
            Path(file)
            for case in self.cases.values()
            for key in ("image", "label")
            if key in case
            for file in ensure_tuple(case[key])
        ]
        given = {(file.parent.resolve(), stem(file).lower()): file for file in files}
        for name in self.cases:
            if (file := given.get((self.output_dir.resolve(), name.lower()))) is not None:
                raise ValueError(
                    f"expected another folder for the predictions than {self.output_dir}, where that of {name} would "
                    f"take the place of {file}, or its name; give another output_dir."
                )

    def _place(self, name: str) -> Path:
        return self.output_dir / f"{name}.nii.gz"

    def attach(self, engine: Engine) -> None:
        """Do the cases of ``engine``, an evaluator whose output has a label map ``"pred"`` for each case."""
        if engine.state.epoch_length == 0:
            raise ValueError("expected a case for each process at least, got none for this one; start fewer processes.")
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def _start(self, engine: Engine) -> None:
        self.rows = []

    def _add(self, engine: Engine) -> None:
        for case, output in zip(engine.state.batch, engine.state.output, strict=True):
            case = self.cases[case["name"]]
            prediction = output["pred"]
            label = load_volume(case["label"]) if "label" in case else None
            if label is not None:
                self.rows.append({"case": case["name"], **self._measure(prediction, label)})
            if self.full:
                self._write(case, prediction)
                if self.pictures:
                    self._draw(case, prediction, label)

    def __call__(self, engine: Engine) -> None:
        """Write the table of all cases; the mean Dice becomes one of the engine's metrics."""
        rows = self.rows
        if idist.get_world_size() > 1:
            gathered: list[Any] = [None] * idist.get_world_size()
            torch.distributed.all_gather_object(gathered, rows)
            rows = [row for part in gathered for row in part]
        if not rows:
            return
        rows = sorted(rows, key=lambda row: row["case"])
        summary = summarize(rows)
        if idist.get_rank() == 0:
            write_report(self.output_dir, rows, summary)
            for key, value in summary.items():
                low, high = value["interval"]
                engine.logger.info(f"{key}: {value['mean']:.4f} (95 % interval {low:.4f} to {high:.4f})")
        dice = [value["mean"] for key, value in summary.items() if key.startswith("Dice")]
        engine.state.metrics["mean_dice"] = sum(dice) / len(dice)
        engine.state.metrics |= {key: value["mean"] for key, value in summary.items()}

    def _measure(self, prediction: torch.Tensor, label: torch.Tensor) -> dict[str, float]:
        spacing = prediction.pixdim.tolist() if isinstance(prediction, MetaTensor) else None
        volumes = [convert_to_tensor(volume, track_meta=False) for volume in (prediction.cpu(), label)]
        # the columns in the order of the metrics
        found = {f"{name} {structure}": 0.0 for name in self.metrics for structure in self.structures}
        for structure, values in self.structures.items():  # one at a time: whole volumes in float32
            masks = [structure_masks(volume, {structure: values})[None] for volume in volumes]
            for name, metric in self.metrics.items():
                found[f"{name} {structure}"] = metric(*masks, spacing=spacing).item()
                metric.reset()
        return found

    def _write(self, case: Mapping[str, Any], prediction: MetaTensor) -> None:
        if not isinstance(prediction, MetaTensor):
            raise TypeError(
                f"expected a prediction with the scan's geometry, a MetaTensor, got a {type(prediction).__name__}; "
                "invert the preprocessing with Invertd."
            )
        affine = prediction.affine.cpu()
        written = nib.Nifti1Image(prediction.cpu().numpy()[0].astype(np.uint8), affine.numpy())
        # what the affine's space is: the scanner's, or a template's; a DICOM series does not say
        codes = [int(prediction.meta.get(key, 0)) for key in ("sform_code", "qform_code")]
        code = next((code for code in codes if code), 1)
        written.set_qform(affine.numpy(), code=code)
        written.set_sform(affine.numpy(), code=code)
        written.header.set_xyzt_units("mm")
        with atomic_path(self._place(case["name"])) as temporary:
            nib.save(written, temporary)

    def _draw(self, case: Mapping[str, Any], prediction: MetaTensor, label: MetaTensor | None) -> None:
        from monai_conres.visualize import plot_slices, save_figure  # matplotlib, which the rest does without

        affine = prediction.affine.cpu()
        ras = Orientation("RAS", labels=None)
        image = load_volume(ensure_tuple(case["image"])[0])[:1]
        volumes = {"image": image, "label": label, "prediction": prediction.cpu()}
        drawn = {  # one geometry for all: that of a label may differ from the scan's in the header
            title: ras(MetaTensor(volume.as_tensor(), affine=affine))
            for title, volume in volumes.items()
            if volume is not None
        }
        image = drawn.pop("image")
        masks = {title: structure_masks(volume.as_tensor(), self.structures) for title, volume in drawn.items()}
        figure = plot_slices(image, masks, class_names=list(self.structures), spacing=image.pixdim.tolist())
        save_figure(figure, self.output_dir / f"{case['name']}.png")


def summarize(rows: Sequence[Mapping[str, Any]], *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Mean, 95 % interval, smallest and largest value of each column of a table of cases.

    The interval is that of the mean, by bootstrap over the cases (2,000 draws, percentiles).

    Example:
        >>> summary = summarize([{"case": "a", "Dice ET": 0.5}, {"case": "b", "Dice ET": 1.0}])["Dice ET"]
        >>> summary["mean"], summary["min"], summary["cases"]
        (0.75, 0.5, 2)
    """
    draws = np.random.default_rng(seed).integers(len(rows), size=(2000, len(rows)))
    summary = {}
    for key in [key for key in rows[0] if key != "case"]:
        values = np.array([float(row[key]) for row in rows])
        interval = np.percentile(values[draws].mean(1), [2.5, 97.5])
        summary[key] = {
            "mean": values.mean().item(),
            "interval": interval.tolist(),
            "min": values.min().item(),
            "max": values.max().item(),
            "cases": len(rows),
        }
    return summary


def write_report(folder: Path, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
    """Write ``cases.csv`` and ``summary.json``."""
    write_csv(folder / "cases.csv", rows)
    with atomic_path(folder / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n")


def join_reports(tables: Sequence[str | os.PathLike], folder: str | os.PathLike) -> str:
    """Join the ``cases.csv`` of several runs into one in ``folder``, with its summary.

    Returns:
        The summary as a table in Markdown.

    Raises:
        ValueError: when a table cannot be read, has other columns than the first, or a case comes twice.
    """
    rows: list[dict[str, Any]] = []
    for table in tables:
        try:
            with open(table, newline="") as file:
                found = list(csv.DictReader(file))
        except OSError as error:
            raise ValueError(f"expected a cases.csv, cannot read {table} ({error}).") from error
        if not found or (rows and list(found[0]) != list(rows[0])) or "case" not in found[0]:
            raise ValueError(f"expected a cases.csv with cases, and the columns of {tables[0]}, got others in {table}.")
        rows += found
    if (twice := repeated([row["case"] for row in rows])) is not None:
        raise ValueError(f"expected each case in one table, got {twice!r} more than once; join runs of unlike folds.")
    summary = summarize(rows)
    write_report(Path(folder), rows, summary)
    lines = ["| | mean | 95 % interval | min | max |", "|---|---:|---:|---:|---:|"]
    lines += [
        f"| {key} | {v['mean']:.4f} | {v['interval'][0]:.4f} to {v['interval'][1]:.4f} | {v['min']:.4f} | "
        f"{v['max']:.4f} |"
        for key, v in summary.items()
    ]
    return "\n".join(lines)


def _main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m monai_conres.bundle.evaluation", description="Join tables of cases."
    )
    parser.add_argument("tables", nargs="+", help="cases.csv of each run")
    parser.add_argument("--out", required=True, help="folder for the table of all cases and its summary")
    arguments = parser.parse_args()
    try:
        print(join_reports(arguments.tables, arguments.out))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    _main()
