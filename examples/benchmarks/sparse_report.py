"""Merge the runs of sparse.py into the tracked table, and write docs/tables/NAME.md.

    python examples/benchmarks/sparse_report.py hippocampus_sparse

The first table is about the plain prediction of validation scans, the second about training scans that are completed
from their own drawn slices. A difference is paired by case, fold and seed; its 95 % interval is the bootstrap of
ablation_report.py over seeds, folds and cases. With one seed it says nothing about another training.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ablation_report import interval
from experiment import Experiment, Rows, Run
from sparse import COLUMNS, METHODS

from monai_conres.files import atomic_path

Key = tuple[int, int, str]  # seed, fold, case
Scores = dict[tuple[str, str, str], dict[Key, float]]  # by arm, set and column: the mean over the classes
LAYOUTS = {"even": "single", "pairs": "pairs", "all": "all"}


def collect(runs: dict[Run, Rows]) -> Scores:
    """The scores of each case. A class that is not there does not count."""
    found: dict[tuple[str, str, str], dict[Key, list[float]]] = {}
    for (arm, fold, seed), rows in runs.items():
        for row in rows:
            for column in ("dice", "completed", "fitted"):
                if row[column] not in ("", "nan"):
                    cases = found.setdefault((arm, row["set"], column), {})
                    cases.setdefault((seed, fold, row["case"]), []).append(float(row[column]))
    return {name: {key: float(np.mean(values)) for key, values in cases.items()} for name, cases in found.items()}


def difference(one: dict[Key, float], other: dict[Key, float]) -> str:
    """Mean paired difference with its interval, over the folds and seeds that both have."""
    keys = set(one) & set(other)
    seeds = sorted({seed for seed, _, _ in keys})
    cases = sorted({(fold, case) for _, fold, case in keys if all((seed, fold, case) in keys for seed in seeds)})
    if not cases:
        return "-"
    values = np.array([[one[seed, fold, case] - other[seed, fold, case] for fold, case in cases] for seed in seeds])
    low, high = interval(values, np.array([fold for fold, _ in cases]))
    return f"{values.mean():+.3f} [{low:+.3f}, {high:+.3f}]"


def table(fields: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [fields, ["---"] * 3 + ["---:"] * (len(fields) - 3), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def percent(drawing: str) -> int:
    """25 of pairs25."""
    return int(drawing.lstrip("abcdefghijklmnopqrstuvwxyz"))


def report(runs: dict[Run, Rows]) -> str:
    """Both tables in Markdown."""
    scores = collect(runs)
    shares = {arm: rows[0] for (arm, _, _), rows in runs.items()}
    drawings = sorted({arm.partition("_")[0] for arm in shares}, key=lambda name: (percent(name), name))
    predicted, finished = [], []
    for drawing in drawings:
        layout = drawing.rstrip("0123456789")
        arms = {method: f"{drawing}_{method}" for method in METHODS if f"{drawing}_{method}" in shares}
        about = shares[next(iter(arms.values()))]
        name = [f"{percent(drawing)} %", LAYOUTS[layout], f"{100 * float(about['known']):.0f} %"]
        own = {method: scores[arm, "validation", "dice"] for method, arm in arms.items()}
        partial = own.get("partial", {})
        line = [f"{np.mean(list(partial.values())):.3f}" if partial else "-"]
        line += [difference(own.get(method, {}), partial) for method in METHODS[1:]]
        predicted.append(name + line)
        for method in ("partial", "residual", "chain"):
            if (arms.get(method, ""), "training", "dice") in scores:
                columns = [scores[arms[method], "training", column] for column in ("dice", "completed", "fitted")]
                means = [f"{np.mean(list(column.values())):.3f}" for column in columns]
                finished.append([*name[:2], method, *means, difference(columns[1], columns[0])])
    head = ["drawn", "slices", "residual known"]
    return (
        table([*head, "partial loss", *METHODS[1:]], predicted)
        + "\n"
        + table(["drawn", "slices", "loss", "network", "completed", "chain fitted", "completed less network"], finished)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="name of the experiment")
    parser.add_argument("--folder", type=Path, default=Experiment.folder, help="folder of results and runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "docs" / "tables")
    options = parser.parse_args()
    text = report(Experiment(options.name, options.folder, COLUMNS).merge())
    with atomic_path(options.out / f"{options.name}.md") as temporary:
        temporary.write_text(text)
    print(text)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
