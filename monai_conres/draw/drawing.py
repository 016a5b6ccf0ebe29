"""What is drawn in a scan: the slices that somebody works on, their file, and the volume that they give."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.utils import convert_to_tensor

from monai_conres.completion import ScanCompletion
from monai_conres.files import atomic_path, is_written_by, write_label_map
from monai_conres.scans import label_values
from monai_conres.volumes import load_volume, read_grid

__all__ = ["Drawing", "DrawnSlice"]


@dataclass(frozen=True)
class DrawnSlice:
    """A slice that somebody has painted in.

    Attributes:
        values: the label values in uint8, of the shape of a slice of the file.
        done: True: the volume is completed from this slice. False: somebody still works on the slice.
    """

    values: np.ndarray
    done: bool


class Drawing:
    """A scan whose slices are drawn, and what the chain makes of them. Every change is written to a file at once.

    Volumes for the page have the slice axis first: ``(slices, rows, columns)`` are the axes of the scan file in order,
    with the slice axis moved to the front. Methods may be called from several threads.

    Args:
        scan: the scan and its network.
        out: the file for the completed label map, ``.nii`` or ``.nii.gz``.
        drawn: a label map whose slices with any label are done at the start.
        slices: the slices of ``drawn`` that are done, if not all with any label.
        ignore_index: value of the slices of ``drawn`` that are not drawn, if it is not 0.

    Attributes:
        out: as above.
        drawn_file: the file for the drawn slices as a label map, next to ``out``.
        file: the file of this drawing, next to ``out``. A drawing continues when the file is there.
        slices: what is drawn, by the number of the slice.
        progress: the part of the network's windows that is done; 1 when the volume can be completed.
        problem: why the network stopped, or ``None``.

    Raises:
        ValueError: when a file cannot be used, or would be replaced.
    """

    def __init__(
        self,
        scan: ScanCompletion,
        out: Path,
        *,
        drawn: Path | None = None,
        slices: Sequence[int] | None = None,
        ignore_index: int | None = None,
    ) -> None:
        self.scan, self.out = scan, out
        ending = re.search(r"\.nii(\.gz)?$", out.name)
        if ending is None:
            raise ValueError(f"expected a name that ends with .nii or .nii.gz for the completed label map, got {out}.")
        stem = out.name[: ending.start()]
        self.drawn_file = out.with_name(f"{stem}_drawn{ending.group()}")
        self.file = out.with_name(f"{stem}.drawing.npz")
        self.values = sorted(label_values(scan.scans.classes))
        self.slices: dict[int, DrawnSlice] = {}
        self.progress = 0.0
        self.problem: str | None = None
        self._lock = threading.RLock()
        self._saving = threading.Lock()  # strokes do not wait until the results are written
        self._identity = self._describe()
        self._written = _stamp(self.file)
        # results that this drawing may replace, as they were written
        results = (self.out, self.drawn_file) if self.file.exists() else ()
        self._saved = {file: _stamp(file) for file in results if is_written_by(file)}
        self._start(drawn, slices, ignore_index)

    def _start(self, drawn: Path | None, slices: Sequence[int] | None, ignore_index: int | None) -> None:
        if self.file.exists():
            if drawn is not None:
                raise ValueError(
                    f"expected no drawing in {self.file} when another one starts from {drawn}; leave out --drawn to "
                    "continue the drawing, or give another --out."
                )
            self.slices = self._read()
        else:
            for file in (self.out, self.drawn_file):
                if file.exists():
                    raise ValueError(f"expected a new name for the result, got {file}, which exists; give --out.")
            if drawn is not None:
                planes, _ = self.scan.read_drawn(drawn, slices, ignore_index)
                self.slices = {number: DrawnSlice(plane.numpy().copy(), True) for number, plane in planes.items()}
                self._write(self.slices)
        self.scan.draw({k: torch.from_numpy(part.values) for k, part in self.slices.items() if part.done})

    def predict(self) -> None:
        """Run the network, and complete the volume from what is drawn until then. Errors go to :attr:`problem`."""

        def report(part: float) -> None:
            self.progress = min(part, 0.99)

        try:
            self.scan.predict(progress=report)
            with self._lock:
                _ = self.scan.chain
                self.scan.image = None  # the page shows the voxels of the file
                self.progress = 1.0
        except Exception as error:  # the page shows it; what is drawn is safe
            self.problem = f"{type(error).__name__}: {error}"

    @property
    def completes(self) -> bool:
        """Whether the network has run."""
        return self.progress == 1

    def image(self, channel: int) -> np.ndarray:
        """A channel of the scan in float32, ``(slices, rows, columns)``, read again: the network needs the memory."""
        places = [(file, number) for file in self.scan.files for number in range(read_grid(file).channels)]
        file, number = places[channel]
        return self._slices_first(load_volume(file)[number]).numpy()

    def completed(self, slices: range | None = None) -> np.ndarray:
        """The completed label map in uint8, ``(slices, rows, columns)``, or some slices of it."""
        with self._lock:
            return self._slices_first(self.scan.label(slices)[0]).numpy()

    def predicted(self) -> np.ndarray:
        """The network's label map in uint8, ``(slices, rows, columns)``."""
        assert self.scan.predicted is not None
        return self._slices_first(self.scan.predicted[0]).numpy()

    def doubt(self, slices: range | None = None) -> np.ndarray:
        """The probability that a voxel of :meth:`completed` is wrong, in steps of 1 / 255, or some slices of it."""
        slices = slices if slices is not None else range(self.scan.shape[self.scan.spatial_axis])
        with self._lock:
            error = self.scan.chain.error.narrow(self.scan.spatial_axis + 1, slices.start, len(slices))
            return self._slices_first(error.amax(0)).numpy()

    def ranking(self) -> dict[int, float]:
        """Which slice to draw next, and how many voxels of each one are probably wrong."""
        with self._lock:
            ranking = self.scan.chain.ranking()
        # somebody already works on these
        return {number: error for number, error in ranking.items() if number not in self.slices}

    def change(self, number: int, drawn: DrawnSlice | None) -> range:
        """Replace what is drawn in a slice, or take it away with ``None``.

        Returns:
            The slices of :meth:`completed` that may have changed.

        Raises:
            ValueError: for a slice outside the scan, of another shape, or with values that the network does not know.
            OSError: when the file of the drawing cannot be written. Then nothing has changed.
        """
        with self._lock:
            slices = {**self.slices, number: drawn}
            before = self.slices.get(number)
            was_done, is_done = (part is not None and part.done for part in (before, drawn))
            self._check(number, drawn)
            kept = {key: part for key, part in slices.items() if part is not None}
            self._write(kept)
            self.slices = kept
            if not was_done and not is_done:
                return range(0)
            values = drawn.values if drawn is not None and drawn.done else None
            return self.scan.draw({number: None if values is None else torch.from_numpy(values)})

    def save(self) -> list[Path]:
        """Write the completed label map, and the slices that are done, with the geometry of the scan.

        Returns:
            The files.

        Raises:
            ValueError: when no slice is done, the network has not run, or another program wrote a file that would be
                replaced.
            OSError: when a file cannot be written. A file that was there before stays complete.
        """
        with self._saving:
            with self._lock:
                if not self.completes:
                    raise ValueError(
                        "expected the network's result before saving; wait until the progress bar is full."
                    )
                if not self.scan.drawn:
                    raise ValueError("expected a slice that is done before saving; press D in a slice.")
                label, drawn = self.scan.label(), self.scan.drawn_label()
            for file in (self.out, self.drawn_file):
                if _stamp(file) not in (None, self._saved.get(file)):
                    raise ValueError(
                        f"expected no file of this name, or the last result, in {file}, got another file; move it "
                        "away, and save again."
                    )
            for file, volume in ((self.out, label), (self.drawn_file, drawn)):
                write_label_map(file, volume, volume)
                self._saved[file] = _stamp(file)
        return [self.out, self.drawn_file]

    def _slices_first(self, volume: torch.Tensor | MetaTensor) -> torch.Tensor:
        return convert_to_tensor(volume, track_meta=False).movedim(self.scan.spatial_axis, 0).contiguous()

    def _check(self, number: int, drawn: DrawnSlice | None) -> None:
        size, *plane = self._slices_first(torch.empty(self.scan.shape, device="meta")).shape
        if not 0 <= number < size:
            raise ValueError(f"expected slices from 0 to {size - 1}, got {number}.")
        if drawn is None:
            return
        if drawn.values.shape != tuple(plane) or drawn.values.dtype != np.uint8:
            raise ValueError(f"expected a slice of shape {tuple(plane)} in uint8, got {drawn.values.shape}.")
        if wrong := sorted(set(np.unique(drawn.values).tolist()) - {0, *self.values}):
            raise ValueError(f"expected the values {[0, *self.values]}, which the network knows, got {wrong[:5]}.")

    def _write(self, slices: Mapping[int, DrawnSlice]) -> None:
        numbers = sorted(slices)
        content: dict[str, Any] = {
            "numbers": np.array(numbers, dtype=int),
            "done": np.array([slices[number].done for number in numbers], dtype=bool),
            "slices": np.array([slices[number].values for number in numbers], dtype=np.uint8),
            **self._identity,
        }
        if _stamp(self.file) not in (None, self._written):  # a file that is gone is written again
            raise ValueError(
                f"expected {self.file} as this program wrote it, got another one; a second program draws on it. Stop "
                "one of them, and load the page of the other one again."
            )
        with atomic_path(self.file) as temporary:
            np.savez_compressed(temporary, **content)
        self._written = _stamp(self.file)

    def _read(self) -> dict[int, DrawnSlice]:
        remedy = "move the file away, or give another --out."
        try:
            with np.load(self.file, allow_pickle=False) as file:
                content = dict(file)
            identity = {name: content.get(name, own) for name, own in self._identity.items()}  # older files have fewer
            parts = list(zip(content["numbers"], content["slices"], content["done"], strict=True))
        except Exception as error:  # zlib, zipfile and numpy raise many
            raise ValueError(
                f"expected a drawing in {self.file}, got another file or a broken one; {remedy}"
            ) from error
        for name, own in self._identity.items():
            if not _agree(identity[name], own):
                raise ValueError(f"expected a drawing of this scan in {self.file}, got other {name}; {remedy}")
        slices = {int(number): DrawnSlice(values, bool(done)) for number, values, done in parts}
        for number, drawn in slices.items():
            try:
                self._check(number, drawn)
            except ValueError as error:
                raise ValueError(f"{error} The drawing is in {self.file}; {remedy}") from error
        return slices

    def _describe(self) -> dict[str, np.ndarray]:
        """What two drawings of one scan have in common. Networks may differ, but not in what a value means."""
        voxels = hashlib.sha256()
        for file in self.scan.files:
            voxels.update(np.ascontiguousarray(load_volume(file).numpy()).data)
        classes = self.scan.scans.classes
        meaning = {value: [name for name, values in classes.items() if value in values] for value in self.values}
        return {
            "shape": np.array(self.scan.shape),
            "affine": np.asarray(self.scan.affine, dtype=float),
            "spatial_axis": np.array(self.scan.spatial_axis),
            "voxels": np.frombuffer(voxels.digest(), np.uint8),
            "classes": np.array(json.dumps(meaning)),
        }


def _agree(stored: np.ndarray, own: np.ndarray) -> bool:
    """Whether a drawing and this scan have a part of the description in common; of the classes, values of both."""
    if own.dtype.kind != "U":
        return stored.shape == own.shape and np.allclose(stored, own)
    earlier, now = json.loads(str(stored)), json.loads(str(own))
    return all(earlier[value] == now[value] for value in earlier.keys() & now.keys())


def _stamp(file: Path) -> tuple[int, int] | None:
    """What tells one state of a file from another; ``None`` without a file."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns
