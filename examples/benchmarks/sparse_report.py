"""Merge the runs of sparse.py into the tracked table; write results/NAME.md and, with each arm, results/NAME_long.md.

    python examples/benchmarks/sparse_report.py hippocampus_sparse

The first table is about the plain prediction of validation scans: the Dice with the partial loss, and what
the other arms differ from it. The second is about training scans that the network of the arm ``chain`` completes from
their own drawn slices. Runs may be missing. A difference is paired by case, fold and seed, on what both arms have; its
95 % interval is the bootstrap of ablation_report.py over seeds, folds and cases. With one seed it says nothing about
another training.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ablation_report import interval
from experiment import Experiment, Rows, Run
from sparse import COLUMNS, METHODS

from monai_conres.files import atomic_path

Key = tuple[int, int, str]  # seed, fold, case
Scores = dict[tuple[str, str, str], dict[Key, float]]  # by arm, set and column: the mean over the classes
COMPLETIONS = ("dice", "completed", "fitted")  # by the network, by the chain with its default settings or fitted ones
LAYOUTS = {"even": "single", "pairs": "pairs", "all": "all"}


def collect(runs: dict[Run, Rows], number: str | None = None) -> Scores:
    """The scores of each case, or those of one class. A class that is not there does not count."""
    found: dict[tuple[str, str, str], dict[Key, list[float]]] = {}
    for (arm, fold, seed), rows in runs.items():
        for row in rows:
            for column in COMPLETIONS:
                if row[column] not in ("", "nan") and number in (None, row["class"]):
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


def mean(scores: dict[Key, float]) -> str:
    return f"{np.mean(list(scores.values())):.3f}" if scores else "-"


def table(fields: Sequence[str], lines: Sequence[Sequence[str]], words: int = 2) -> str:
    """Markdown; the first ``words`` columns have text, the others numbers."""
    rows = [fields, ["---"] * words + ["---:"] * (len(fields) - words), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def percent(drawing: str) -> int:
    """25 of pairs25."""
    return int(drawing.lstrip("abcdefghijklmnopqrstuvwxyz"))


def arms_of(shares: Mapping[str, Mapping[str, str]]) -> dict[str, list[str]]:
    """The arms of each drawing, such as pairs25, from few slices to many."""
    drawings = sorted({arm.partition("_")[0] for arm in shares}, key=lambda name: (percent(name), name))
    return {drawing: [arm for m in METHODS if (arm := f"{drawing}_{m}") in shares] for drawing in drawings}


def words(drawing: str) -> list[str]:
    return [f"{percent(drawing)} %", LAYOUTS[drawing.rstrip("0123456789")]]


def report(runs: dict[Run, Rows]) -> str:
    """Two short tables in Markdown."""
    scores = collect(runs)
    shares = {arm: rows[0] for (arm, _, _), rows in runs.items()}
    others = [method for method in METHODS[1:] if any(arm.endswith(f"_{method}") for arm in shares)]
    predicted, finished = [], []
    for drawing, arms in arms_of(shares).items():
        own = {method: scores.get((f"{drawing}_{method}", "validation", "dice"), {}) for method in METHODS}
        known = f"{100 * float(shares[arms[0]]['known']):.0f} %"
        line = [difference(own[method], own["partial"]) for method in others]
        predicted.append([*words(drawing), known, mean(own["partial"]), *line])
        if (f"{drawing}_chain", "training", "dice") in scores:
            columns = [scores[f"{drawing}_chain", "training", column] for column in COMPLETIONS]
            finished.append([*words(drawing), *map(mean, columns), difference(columns[1], columns[0])])
    head = ["drawn", "slices"]
    return (
        table([*head, "residual known", "partial loss", *others], predicted)
        + "\n"
        + table([*head, "network", "completed", "chain fitted", "completed less network"], finished)
    )


def details(runs: dict[Run, Rows]) -> str:
    """The long tables behind them: each arm, each comparison, each completion."""
    scores = collect(runs)
    shares = {arm: rows[0] for (arm, _, _), rows in runs.items()}
    numbers = sorted({row["class"] for rows in runs.values() for row in rows})
    classes = [collect(runs, number) for number in numbers]
    plain, compared, finished = [], [], []
    for drawing, arms in arms_of(shares).items():
        for arm in arms:
            method, key = arm.partition("_")[2], (arm, "validation", "dice")
            own = scores[key]
            seconds = [float(rows[0]["seconds"]) for (name, _, _), rows in runs.items() if name == arm]
            about = [f"{100 * float(shares[arm][name]):.1f} %" for name in ("labelled", "known")]
            about += [str(len({key[:2] for key in own})), str(len(own)), f"{np.median(seconds):.0f}"]
            line = [mean(own), *(mean(found.get(key, {})) for found in classes)]
            plain.append([*words(drawing), method, *about, *line])
            for other in METHODS[: METHODS.index(method)]:
                reference = scores.get((f"{drawing}_{other}", "validation", "dice"), {})
                if set(own) & set(reference):
                    compared.append([*words(drawing), method, other, difference(own, reference)])
            if (arm, "training", "dice") in scores:
                columns = [scores[arm, "training", column] for column in COMPLETIONS]
                gains = [difference(column, columns[0]) for column in columns[1:]]
                finished.append([*words(drawing), method, *map(mean, columns), *gains])
    head = ["drawn", "slices", "arm"]
    about = [
        "labelled",
        "residual known",
        "runs",
        "cases",
        "seconds",
        "Dice",
        *(f"class {number}" for number in numbers),
    ]
    gains = ["completed less network", "fitted less network"]
    return (
        "Plain prediction of validation scans:\n\n"
        + table([*head, *about], plain, 3)
        + "\nPaired differences of the Dice:\n\n"
        + table([*head, "less", "difference"], compared, 4)
        + "\nTraining scans, completed from their own drawn slices:\n\n"
        + table([*head, "network", "completed", "chain fitted", *gains], finished, 3)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="name of the experiment")
    parser.add_argument("--folder", type=Path, default=Experiment.folder, help="folder of results and runs")
    options = parser.parse_args()
    runs = Experiment(options.name, options.folder, COLUMNS).merge()
    for ending, function in (("", report), ("_long", details)):
        with atomic_path(options.folder / "results" / f"{options.name}{ending}.md") as temporary:
            temporary.write_text(text := function(runs))
        print(text)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
