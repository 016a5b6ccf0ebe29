"""An app for MONAI Label's server: bundles segment scans, and networks complete what a person has drawn.

README.md in this folder says how to start it and what a client sends.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastapi import HTTPException
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from monailabel.tasks.infer.bundle import BundleInferTask

from monai_conres.commands import load_on_device
from monai_conres.commands.complete import value_name
from monai_conres.completion import ScanCompletion
from monai_conres.files import check_same_grid, load_volume, write_label_map
from monai_conres.scans import label_values


class ConResApp(MONAILabelApp):
    """``--conf models A,B``: folders of bundles with ``models/model.pt``, or run folders."""

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        self.folders = [Path(folder.strip()) for folder in conf.get("models", "").split(",") if folder.strip()]
        if not self.folders:
            raise ValueError("expected folders of bundles or runs, got none; start the server with --conf models A,B.")
        super().__init__(app_dir, studies, conf, "ConRes", "Segment a scan, draw a slice, get the volume", "0.2.0")

    def init_infers(self) -> dict[str, InferTask]:
        tasks: dict[str, InferTask] = {}
        for folder in self.folders:
            name = folder.resolve().name
            is_bundle = (folder / "configs").is_dir()
            if is_bundle:
                tasks[name] = BundleInferTask(str(folder), self.conf)
                if not tasks[name].is_valid():
                    raise ValueError(
                        f"expected a trained bundle in {folder}, found no models/model.pt; train it first."
                    )
            tasks[f"{name}_complete"] = CompletionTask(folder / "models" if is_bundle else folder)
        return tasks


class CompletionTask(InferTask):
    """Completes the label map of a scan from the drawn slices that come with the request.

    3D Slicer sends the segments with the request for the type "scribbles" only, so the task has this type. The network
    runs once for each scan. Then a request computes only what its drawn slices change.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.trained = folder, load_on_device(folder)
        classes = self.trained.scans.classes
        names = {value_name(value, classes).lower(): value for value in sorted(label_values(classes))}
        super().__init__(InferType.SCRIBBLES, names, 3, "Complete a label map from a few drawn slices", {"slices": ""})
        self._lock = threading.Lock()
        self._file: tuple[str, float] | None = None
        self._scan: ScanCompletion | None = None
        self._sent: np.ndarray | None = None  # what the client got last for this scan

    def is_valid(self) -> bool:
        return True

    def __call__(self, request: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        try:
            with self._lock:
                return self._complete(request)
        except ValueError as error:
            raise HTTPException(status_code=400, detail=str(error)) from error

    def _complete(self, request: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        if not request.get("label"):
            raise ValueError("expected a label map with drawn slices as the file 'label' of the request, got none.")
        file = request["image"], os.path.getmtime(request["image"])
        if self._scan is None or self._file != file:
            self._scan, self._sent = ScanCompletion(self.trained, request["image"]), None
            self._file = file
        scan, axis = self._scan, self._scan.spatial_axis
        check_same_grid([request["image"], request["label"]])
        label, painted = self._read_label(request)
        slices = _numbers(request.get("slices"))
        if slices is None:
            found = _slices(painted, axis)
            if "label_info" in request and self._sent is not None:
                # 3D Slicer also sends what it got: of that, drawn are the slices that were drawn before or changed
                changed = (label != self._sent) | (painted & (label == 0))
                found &= set(scan.drawn) | _slices(changed, axis)
            slices = sorted(found)
        if not slices:
            raise ValueError("expected a drawn slice, got none; draw a slice, or name one that is empty in 'slices'.")
        size = scan.shape[axis]
        if not 0 <= min(slices) <= max(slices) < size:
            raise ValueError(f"expected slices from 0 to {size - 1}, got {slices}.")
        scan.predict()
        taken_back = dict.fromkeys(set(scan.drawn) - set(slices))
        scan.draw({**taken_back, **{number: torch.from_numpy(label.take(number, axis)) for number in slices}})
        completed = scan.label()
        self._sent = completed[0].numpy()
        with tempfile.NamedTemporaryFile(suffix=".nii.gz", delete=False) as out:
            write_label_map(out.name, completed, completed)  # the server deletes the file when it is sent
        result = {"label_names": self.labels, "slices": slices, "next": list(scan.chain.ranking())[:3]}
        return out.name, {**result, "axis": axis, "direction": scan.direction}

    def _read_label(self, request: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """The label map with the values of the network's classes, and where anything is painted.

        3D Slicer numbers its segments and names them in ``label_info``. Two of them are its scribbles: the foreground
        belongs to the selected class, and the background makes a slice count as drawn.
        """
        stored = load_volume(request["label"])[0].numpy()
        if "label_info" not in request:
            values = {value: value for value in (0, *self.labels.values())}
        else:
            names = {**self.labels, "background": 0, "background_scribbles": 0}
            names["foreground_scribbles"] = names.get(str(request.get("selected_label_name")).lower())
            segments = {int(segment["id"]): str(segment["name"]).lower() for segment in request["label_info"]}
            values = {0: 0, **{number: names.get(name) for number, name in segments.items()}}
        label = np.zeros(stored.shape, np.uint8)
        for value in np.unique(stored).tolist():
            if values.get(value) is None:
                raise ValueError(f"expected the classes {self.labels} in the label map, got the value {value:g}.")
            label[stored == value] = values[value]
        return label, stored != 0


def _numbers(slices: Any) -> list[int] | None:
    """Slice numbers of a request: a list, or text such as "12 40"; ``None``, if there are none."""
    try:
        numbers = slices.replace(",", " ").split() if isinstance(slices, str) else slices
        return sorted({int(number) for number in numbers}) if numbers is not None and numbers != [] else None
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected numbers of slices, such as [12, 40], got {slices!r}.") from error


def _slices(mask: np.ndarray, axis: int) -> set[int]:
    """Slices in which a mask has a voxel."""
    return set(np.flatnonzero(mask.any(tuple({0, 1, 2} - {axis}))).tolist())
