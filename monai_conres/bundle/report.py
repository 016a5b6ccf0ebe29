"""Scores of segmented cases: files for each case, one table of all cases, one table of several runs."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.metrics import compute_dice
from monai.transforms import Orientation
from monai.utils import convert_to_tensor, ensure_tuple, optional_import

from monai_conres.files import atomic_path, check_writable, is_written_by, path_text, write_csv, write_label_map
from monai_conres.metrics import BratsHausdorffDistanceMetric, BratsSurfaceDiceMetric
from monai_conres.scans import Structures, structure_masks
from monai_conres.volumes import load_label, load_volume, read_grid, repeated, voxel_sizes

if TYPE_CHECKING:
    from ignite.engine import Engine
Events, _ = optional_import("ignite.engine", name="Events")
idist, _ = optional_import("ignite.distributed")

WRITER = "monai_conres prediction"  # only such files may be replaced, not what was drawn or completed


class CaseReport:
    """A handler that measures, writes and draws each case of an evaluator, and writes a table of all cases.

    The handler compares the label on the disk with the prediction, which has the geometry and the label values of the
    data set. Each of several processes takes its own cases, and the first process writes the table of all.

    ======================  ============================================================================
    file                    content
    ======================  ============================================================================
    ``NAME.nii.gz``         prediction
    ``NAME.png``            slices of the image, the label and the prediction, in RAS orientation
    ``cases.csv``           Dice, HD95 (mm) and NSD (tolerance 1 mm) of each structure, a row for each
                            case with a label
    ``summary.json``        their means over the cases: see :func:`summarize`
    ======================  ============================================================================

    Args:
        output_dir: folder for these files.
        cases: the cases as in a :class:`~monai_conres.bundle.Datalist`. Cases without a label are not measured.
        structures: the label values of each structure.
        full: False measures only the Dice and writes only the tables, in seconds: for validation during training.
        pictures: False leaves out the ``.png`` files.
        ignore_index: value of voxels without a label in the label files. They do not count.

    Raises:
        ValueError: when the folder has a file of a case or another NIfTI file than predictions,
            a label has other values, or distances are not defined: see :func:`~monai_conres.volumes.voxel_sizes`.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        cases: Sequence[Mapping[str, Any]],
        structures: Structures,
        *,
        full: bool = True,
        pictures: bool = True,
        ignore_index: int | None = None,
    ) -> None:
        self.ignore_index = ignore_index
        self.output_dir = Path(path_text(output_dir))
        self.cases = {case["name"]: case for case in cases}
        self.structures = structures
        self.full = full
        self.pictures = pictures
        self.rows: list[dict[str, Any]] = []
        if not full:
            return
        check_writable(self.output_dir, cases)
        for file in sorted(self.output_dir.glob("[!.]*.nii*")):
            if not is_written_by(file, WRITER):
                raise ValueError(
                    f"expected a folder for the predictions only, got {self.output_dir}, whose {file.name} is none; "
                    "give another output_dir."
                )
        for case in cases:
            if "label" in case:
                voxel_sizes(read_grid(ensure_tuple(case["image"])[0]))

    def attach(self, engine: Engine) -> None:
        """Report the cases of ``engine``, an evaluator whose output has a label map ``"pred"`` for each case."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def _add(self, engine: Engine) -> None:
        for item, output in zip(engine.state.batch, engine.state.output, strict=True):
            case, prediction = self.cases[item["name"]], output["pred"]
            values = {0}.union(*self.structures.values(), () if self.ignore_index is None else (self.ignore_index,))
            label = load_label(case["label"], values) if "label" in case else None
            if self.full:
                file = self.output_dir / f"{case['name']}.nii.gz"
                write_label_map(file, prediction, prediction, writer=WRITER)
                if self.pictures:
                    self._draw(case, prediction, label)
            if label is not None:
                self.rows.append({"case": case["name"], **self._measure(prediction, label)})

    def __call__(self, engine: Engine) -> None:
        """Write the table of all cases. Its means become metrics of the engine."""
        rows = sorted((row for part in idist.all_gather(self.rows) for row in part), key=lambda row: row["case"])
        self.rows = []
        if not rows:
            return
        summary = summarize(rows)
        if idist.get_rank() == 0:
            _write_tables(self.output_dir, rows, summary)
            for key, value in summary.items():
                low, high = value["interval"]
                engine.logger.info(f"{key}: {value['mean']:.4f} (95 % interval {low:.4f} to {high:.4f})")
        means = {key: value["mean"] for key, value in summary.items()}
        dice = [mean for key, mean in means.items() if key.startswith("Dice")]
        engine.state.metrics |= {"mean_dice": sum(dice) / len(dice), **means}

    def _measure(self, prediction: MetaTensor, label: torch.Tensor) -> dict[str, float]:
        volumes = [convert_to_tensor(volume, track_meta=False) for volume in (prediction.cpu(), label)]
        if self.ignore_index is not None:
            ignored = volumes[1] == self.ignore_index
            volumes = [volume.masked_fill(ignored, self.ignore_index) for volume in volumes]
        metrics: dict[str, Callable] = {"Dice": partial(compute_dice, ignore_empty=False)}
        if self.full:  # a poor prediction has a large surface, whose distances take minutes
            distances: Any = {
                "HD95": BratsHausdorffDistanceMetric(ignore_index=self.ignore_index),
                "NSD": BratsSurfaceDiceMetric(tolerance=1.0, ignore_index=self.ignore_index),
            }
            metrics |= {name: partial(metric, spacing=voxel_sizes(prediction)) for name, metric in distances.items()}
        row = {}
        for metric, compute in metrics.items():
            for structure, values in self.structures.items():  # one at a time: these are whole volumes in float32
                ignore = None if metric == "Dice" else self.ignore_index  # for Dice both masks are empty there
                masks = [structure_masks(volume, {structure: values}, ignore)[None].float() for volume in volumes]
                row[f"{metric} {structure}"] = compute(*masks).item()
        return row

    def _draw(self, case: Mapping[str, Any], prediction: MetaTensor, label: MetaTensor | None) -> None:
        from monai_conres.visualize import plot_slices, save_figure  # imports matplotlib

        def turn(volume: MetaTensor) -> MetaTensor:
            """In the prediction's geometry: the header of a label may differ from the scan's."""
            return Orientation("RAS", labels=None)(MetaTensor(volume.as_tensor().cpu(), affine=prediction.affine.cpu()))

        image = turn(load_volume(ensure_tuple(case["image"])[0])[:1])
        drawn = {"prediction": prediction} if label is None else {"label": label, "prediction": prediction}
        masks = {
            title: structure_masks(turn(volume).as_tensor(), self.structures, self.ignore_index)
            for title, volume in drawn.items()
        }
        names, spacing = list(self.structures), image.pixdim.tolist()
        figure = plot_slices(image, masks, class_names=names, spacing=spacing, ignore_index=self.ignore_index)
        save_figure(figure, self.output_dir / f"{case['name']}.png")


def summarize(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean, 95 % interval, smallest and largest value of each column of a table of cases.

    The interval of the mean comes from a bootstrap over the cases: percentiles of 2,000 draws. NaN, a distance that is
    not known, does not count, and a column without other values is left out.

    Example:
        >>> summary = summarize([{"case": "a", "Dice ET": 0.5}, {"case": "b", "Dice ET": 1.0}])["Dice ET"]
        >>> summary["mean"], summary["min"], summary["cases"]
        (0.75, 0.5, 2)
    """
    summary = {}
    for key in [key for key in rows[0] if key != "case"]:
        values = np.array([float(row[key]) for row in rows])
        values = values[~np.isnan(values)]
        if not len(values):
            continue
        draws = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
        summary[key] = {
            "mean": values.mean().item(),
            "interval": np.percentile(values[draws].mean(1), [2.5, 97.5]).tolist(),
            "min": values.min().item(),
            "max": values.max().item(),
            "cases": len(values),
        }
    return summary


def join_reports(tables: Sequence[str | os.PathLike], folder: str | os.PathLike) -> str:
    """Join the ``cases.csv`` of several runs into one in ``folder``, with its summary.

    Returns:
        The summary as a table in Markdown.

    Raises:
        OSError: when a table cannot be read.
        ValueError: when a table has other columns than the first, a case is in two tables, or a table is in ``folder``.
    """
    rows: list[dict[str, Any]] = []
    if Path(folder).resolve() in {Path(table).resolve().parent for table in tables}:
        raise ValueError(f"expected a new folder for the joined table, got {folder}, whose table would be replaced.")
    for table in tables:
        with open(table, newline="") as file:
            found = list(csv.DictReader(file))
        if not found or list(found[0]) != list((rows or found)[0]) or "case" not in found[0]:
            raise ValueError(f"expected a cases.csv with cases, and the columns of {tables[0]}, got others in {table}.")
        rows += found
    if (twice := repeated([row["case"] for row in rows])) is not None:
        raise ValueError(f"expected each case in one table, got {twice!r} more than once; join different folds.")
    summary = summarize(rows)
    _write_tables(Path(folder), rows, summary)
    lines = ["| | mean | 95 % interval | min | max |", "|---|---:|---:|---:|---:|"]
    for key, v in summary.items():
        low, high = v["interval"]
        lines.append(f"| {key} | {v['mean']:.4f} | {low:.4f} to {high:.4f} | {v['min']:.4f} | {v['max']:.4f} |")
    return "\n".join(lines)


def _write_tables(folder: Path, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
    write_csv(folder / "cases.csv", rows)
    with atomic_path(folder / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n")
