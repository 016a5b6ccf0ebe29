"""The results of an experiment: one tracked table, and the single runs that are not in the table yet.

An experiment has a name, one setting and many runs: one run for each arm, fold and seed.

    results/NAME.csv         all merged runs, one row for each case and class; tracked
    results/NAME.json        the settings of the experiment; tracked
    runs/NAME/ARM_...json    one run with its settings; not tracked

Each run writes its own file. So runs can go on at the same time, also on several machines. The processes of one machine
share the runs: each takes the next one that no other process works on.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from monai.utils import optional_import

from monai_conres.files import atomic_path, write_csv

fcntl, has_locks = optional_import("fcntl")

KEY = ("arm", "fold", "seed")
COST = ("parameters", "multiply_adds", "seconds", "memory")
METRICS = ("dice", "hd95", "nsd", "residual_dice_of_segmentation", "residual_dice_predicted")
COLUMNS = (*KEY, *COST, "case", "class", *METRICS)

Run = tuple[str, int, int]  # arm, fold, seed
Rows = list[dict[str, str]]  # the columns of each case and class, as text


@dataclass(frozen=True)
class Experiment:
    """The files of one experiment.

    Args:
        name: name of the experiment.
        folder: folder with ``results`` and ``runs``.
        columns: of the table.
    """

    name: str
    folder: Path = Path(__file__).parent
    columns: Sequence[str] = COLUMNS

    @property
    def table(self) -> Path:
        return self.folder / "results" / f"{self.name}.csv"

    @property
    def settings_file(self) -> Path:
        return self.table.with_suffix(".json")

    @property
    def runs(self) -> Path:
        return self.folder / "runs" / self.name

    def run_file(self, run: Run) -> Path:
        arm, fold, seed = run
        return self.runs / f"{arm}_fold{fold}_seed{seed}.json"

    def settings(self) -> dict[str, Any] | None:
        """The settings of the experiment: those of the tracked file, or else those of the first run file."""
        if self.settings_file.exists():
            return json.loads(self.settings_file.read_text())
        return next((json.loads(file.read_text())["settings"] for file in sorted(self.runs.glob("*.json"))), None)

    def check(self, settings: Mapping[str, Any], source: str) -> None:
        """Raise ValueError unless ``settings``, which come from ``source``, are the settings of the experiment."""
        expected = self.settings() or settings
        different = [name for name in {**expected, **settings} if expected.get(name) != settings.get(name)]
        if different:
            wanted, got = (", ".join(f"{name}={s.get(name)!r}" for name in different) for s in (expected, settings))
            raise ValueError(
                f"expected {wanted}, as in the experiment {self.name}, got {got} from {source}; give the same options, "
                "or another name to start another experiment."
            )

    def merged_runs(self) -> dict[Run, Rows]:
        """The runs in the tracked table."""
        runs: dict[Run, Rows] = {}
        if self.table.exists():
            with self.table.open(newline="") as file:
                for row in csv.DictReader(file):
                    runs.setdefault((row["arm"], int(row["fold"]), int(row["seed"])), []).append(row)
        return runs

    def missing_runs(self, arms: Sequence[str], fold: int, seeds: Sequence[int]) -> list[Run]:
        """The runs of one fold that have no result yet, all arms of a seed together."""
        known = self.merged_runs()
        runs = [(arm, fold, seed) for seed in seeds for arm in arms]
        return [run for run in runs if run not in known and not self.run_file(run).exists()]

    @contextmanager
    def claim(self, run: Run, *, wait_for: Path | None = None) -> Iterator[bool]:
        """Claim a run for this process until the context, or the process, ends: whether no other process has it.

        With ``wait_for``, a file that the run writes, a claimed run is waited for until the file is there.
        """
        lock = self.run_file(run).with_suffix(".lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as file:
            while not (is_free := _is_free(file)) and wait_for is not None and not wait_for.exists():
                time.sleep(0.5)
            try:
                yield is_free
            finally:
                if is_free:
                    lock.unlink(missing_ok=True)  # the process that had the run before may have done so

    def claimed(self, runs: Iterable[Run]) -> Iterator[Run]:
        """Those of ``runs`` that no other process works on, or has a result of by now; each one is claimed."""
        for run in runs:
            with self.claim(run) as is_free:
                if is_free and not self.run_file(run).exists():
                    yield run

    def write_run(self, run: Run, settings: Mapping[str, Any], rows: list[dict[str, Any]]) -> None:
        """Write one run to its own file. The file is complete or absent."""
        with atomic_path(self.run_file(run)) as temporary:
            temporary.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")

    def merge(self) -> dict[Run, Rows]:
        """Add the run files to the tracked table, in the order of arm, fold and seed, and return all runs.

        Raises:
            ValueError: when there is no run, when the settings of a run are not those of the experiment, or when the
                table holds other results of the same run.
        """
        runs = self.merged_runs()
        for file in sorted(self.runs.glob("*.json")):
            content = json.loads(file.read_text())
            self.check(content["settings"], str(file))
            rows = [{column: str(row.get(column, "")) for column in self.columns} for row in content["rows"]]
            run = (rows[0]["arm"], int(rows[0]["fold"]), int(rows[0]["seed"]))
            if runs.setdefault(run, rows) != rows:
                raise ValueError(f"expected the results of {run} in {self.table}, got others in {file}; delete one.")
        if not runs:
            raise ValueError(f"expected runs in {self.table} or {self.runs}, got none.")
        runs = dict(sorted(runs.items()))
        if not self.settings_file.exists():
            with atomic_path(self.settings_file) as temporary:
                temporary.write_text(json.dumps(self.settings(), indent=1) + "\n")
        write_csv(self.table, [row for rows in runs.values() for row in rows])
        return runs


def _is_free(file: IO[str]) -> bool:
    """Lock ``file`` unless another process has locked it. The lock ends with the file, or with the process.

    Windows has no such locks: run one process there.
    """
    if not has_locks:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
