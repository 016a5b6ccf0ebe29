"""Merge the runs of completion.py into tracked tables, and compare the methods.

    python examples/benchmarks/completion_report.py hippocampus_completion chaos_completion sts_completion

writes the main table and figure of these experiments, ``docs/tables/completion.md`` and ``.png``, and the long tables
behind them, ``results/completion.md``. The main table has columns for each experiment.

A difference is paired by case, fold and seed; its 95 % interval is the bootstrap of ablation_report.py over seeds,
folds and cases. Methods of one network share the training, so their difference does not depend on the seed much.
Between networks it does: with one seed the interval says nothing about another training.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from ablation_report import interval
from completion import COLUMNS, NUMBERS
from experiment import Experiment
from matplotlib.figure import Figure

from monai_conres.files import atomic_path
from monai_conres.visualize import save_figure

PRIMARY = (1, 2, 3)
Way = tuple[str, str]  # arm and method
# the rows of the tables, in this order
NAMES: dict[Way, str] = {
    ("baseline", "network"): "baseline: network",
    ("baseline", "interpolation"): "interpolation of drawn slices",
    ("baseline", "contours"): "ITK's contour interpolation",
    ("baseline", "random_walker"): "random walker (smaller scans)",
    ("baseline", "constant"): "baseline: chain, constant",
    ("baseline", "image"): "baseline: chain, image",
    ("baseline", "derived"): "baseline: chain, residuals of its segmentation",
    ("plain_head", "network"): "plain head: network",
    ("plain_head", "image"): "plain head: chain, image",
    ("plain_head", "residual"): "plain head: chain, residual",
    ("plain_head", "both"): "plain head: chain, both",
    ("conres", "network"): "ConResNet: network",
    ("conres", "constant"): "ConResNet: chain, constant",
    ("conres", "image"): "ConResNet: chain, image",
    ("conres", "residual"): "ConResNet: chain, residual",
    ("conres", "both"): "ConResNet: chain, both",
    ("conres_chain", "network"): "trained through the chain: network",
    ("conres_chain", "image"): "trained through the chain: chain, image",
    ("conres_chain", "both"): "trained through the chain: chain, both",
    ("conres_double", "network"): "its control: network",
    ("conres_double", "image"): "its control: chain, image",
    ("conres_double", "both"): "its control: chain, both",
}
# the rows of the short table
MAIN: list[Way] = [
    ("baseline", "network"),
    ("baseline", "interpolation"),
    ("baseline", "image"),
    ("plain_head", "both"),
    ("conres", "image"),
    ("conres", "both"),
    ("conres_chain", "both"),
]
# method, what it is compared with
COMPARISONS: list[tuple[Way, Way]] = [
    (("conres", "both"), ("conres", "network")),
    (("conres", "both"), ("conres", "image")),
    (("conres", "both"), ("baseline", "image")),
    (("conres", "both"), ("plain_head", "both")),
    (("conres_chain", "both"), ("conres_double", "both")),
]
# only in the long table
MORE: list[tuple[Way, Way]] = [
    (("conres", "both"), ("baseline", "random_walker")),
    (("conres_chain", "both"), ("conres", "both")),
]
CURVES: list[tuple[Way, str, str]] = [
    (("baseline", "network"), "baseline: network", "0.5"),
    (("baseline", "interpolation"), "interpolation (partly lower)", "#E69F00"),
    (("baseline", "image"), "baseline: chain, image contrast", "#56B4E9"),
    (("plain_head", "both"), "plain head: chain, residuals and image", "#009E73"),
    (("conres", "both"), "ConResNet: chain, residuals and image", "#D55E00"),
]


@dataclass
class Results:
    """The runs of one experiment: for each way, the rows of each seed, fold and case."""

    name: str
    rows: dict[Way, dict[tuple[int, int, str], dict[str, str]]]

    @classmethod
    def read(cls, name: str, folder: Path, folds: Sequence[int] | None = None) -> Results:
        """All runs of an experiment, or those of some ``folds``."""
        rows: dict[Way, dict[tuple[int, int, str], dict[str, str]]] = {}
        for (_, fold, _), run in Experiment(name, folder, COLUMNS).merge().items():
            for row in run if folds is None or fold in folds else ():
                key = (int(row["seed"]), int(row["fold"]), row["case"])
                rows.setdefault((row["arm"], row["method"]), {})[key] = row
        return cls(name, rows)

    def seeds(self, *ways: Way) -> list[int]:
        """Seeds that all ``ways`` have in all folds of the experiment."""
        folds = {fold for rows in self.rows.values() for _, fold, _ in rows}
        found = [{(seed, fold) for seed, fold, _ in self.rows.get(way, {})} for way in ways]
        every = {seed for seed, _ in set.union(*found)}
        return sorted(seed for seed in every if all((seed, fold) in own for own in found for fold in folds))

    def values(self, way: Way, column: str, seeds: Sequence[int], number: int | None = None) -> np.ndarray:
        """``(seeds, cases)``: the mean over the classes of each case, or one class. NaN where nothing was measured.

        The cases are all cases of the experiment, sorted by fold.
        """
        rows, keys = self.rows[way], self.cases
        return np.array(
            [[_value(rows.get((seed, fold, case), {}), column, number) for fold, case in keys] for seed in seeds]
        )

    @cached_property
    def cases(self) -> list[tuple[int, str]]:
        """Fold and name of each case, sorted."""
        return sorted({(fold, case) for rows in self.rows.values() for _, fold, case in rows})


def _value(row: dict[str, str], column: str, number: int | None) -> float:
    values = np.array([float(value) for value in row.get(column, "").split()] or [np.nan])
    chosen = values if number is None else values[number : number + 1]
    return float(np.nanmean(chosen)) if np.isfinite(chosen).any() else np.nan


def mean(results: Results, way: Way, column: str, number: int | None = None) -> str:
    seeds = results.seeds(way) if way in results.rows else []
    values = results.values(way, column, seeds, number) if seeds else np.array(np.nan)
    if not np.isfinite(values).any():
        return "-"
    if column.startswith("until"):  # a case that never gets there counts with all its slices
        return f"{np.nanmedian(values):.1f}"
    return f"{np.nanmean(values):.{1 if column.startswith('hd95') else 3}f}"


def table(header: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    """Markdown; rows without any value are left out."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    lines += [row for row in rows if any(cell != "-" for cell in row[1:])]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main_table(experiments: Sequence[Results], numbers: Sequence[int], ways: Iterable[Way]) -> str:
    """Dice of the slices that are not drawn, for some numbers of drawn slices."""
    header = ["method", *(f"{title(results.name)}: {number}" for results in experiments for number in numbers)]
    return table(
        header,
        (
            [NAMES[way], *(mean(results, way, f"even_{number}") for results in experiments for number in numbers)]
            for way in ways
        ),
    )


def difference(results: Results, way: Way, other: Way, column: str) -> str:
    """``way`` minus ``other`` with its interval."""
    seeds = results.seeds(way, other)
    if not seeds:
        return "-"
    values = results.values(way, column, seeds) - results.values(other, column, seeds)
    known = np.isfinite(values).all(0)
    if not known.any():
        return "-"
    low, high = interval(values[:, known], np.array([fold for fold, _ in results.cases])[known])
    return f"{values[:, known].mean():+.3f} [{low:+.3f}, {high:+.3f}]"


def difference_table(experiments: Sequence[Results], numbers: Sequence[int], comparisons: Iterable) -> str:
    """Paired differences for some numbers of drawn slices."""
    header = ["difference", *(f"{title(results.name)}: {number}" for results in experiments for number in numbers)]
    return table(
        header,
        (
            [
                f"{NAMES[way]}, less {NAMES[other]}",
                *(difference(results, way, other, f"even_{number}") for results in experiments for number in numbers),
            ]
            for way, other in comparisons
        ),
    )


def worse(results: Results, way: Way, column: str) -> str:
    """The share of cases in which ``way`` is worse than its network."""
    network = way[0], "network"
    if not (seeds := results.seeds(way, network)):
        return "-"
    values = results.values(way, column, seeds) - results.values(network, column, seeds)
    return f"{(values[np.isfinite(values)] < 0).mean():.2f}"


def worse_table(experiments: Sequence[Results]) -> str:
    """Cases that the completion makes worse."""
    header = ["method", *(f"{title(results.name)}: {number}" for results in experiments for number in NUMBERS)]
    ways = [way for way in MAIN if way[1] in ("image", "both")]
    return table(
        header,
        (
            [NAMES[way], *(worse(results, way, f"even_{number}") for results in experiments for number in NUMBERS)]
            for way in ways
        ),
    )


def detail_table(results: Results) -> str:
    """Everything else of one experiment."""
    columns = [*COLUMNS[COLUMNS.index("next_1") : COLUMNS.index("slices")], "completion_seconds"]
    header = ["method", *(column.replace("_", " ") for column in columns)]
    return table(header, ([name, *(mean(results, way, column) for column in columns)] for way, name in NAMES.items()))


def class_table(results: Results, classes: int) -> str:
    """Dice of each class with one drawn slice."""
    header = ["method, 1 slice", *(f"class {number + 1}" for number in range(classes))]
    return table(
        header,
        ([name, *(mean(results, way, "even_1", number) for number in range(classes))] for way, name in NAMES.items()),
    )


def draw(experiments: Sequence[Results]) -> Figure:
    """Dice of the slices that are not drawn, against the number of drawn slices."""
    figure = Figure(figsize=(3.4 * len(experiments), 3.2), layout="constrained")
    for axes, results in zip(figure.subplots(1, len(experiments), squeeze=False)[0], experiments, strict=True):
        for way, name, color in CURVES:
            points = [(number, mean(results, way, f"even_{number}")) for number in (0, *NUMBERS)]
            points = [(number, float(value)) for number, value in points if value != "-"]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=color, label=name, markersize=3.5, linewidth=1.5)
        if shown := [y for line in axes.lines if "interpolation" not in line.get_label() for y in line.get_ydata()]:
            axes.set_ylim(min(shown) - 0.03, max(shown) + 0.02)  # interpolation can be far below
        axes.set_title(title(results.name), fontsize=10)
        axes.set_xlabel("drawn slices")
        axes.set_xticks((0, *NUMBERS))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("Dice of the other slices")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    return figure


def title(name: str) -> str:
    """What the tables call an experiment: its data, the width of its networks, and the iterations if named."""
    data, *rest = name.split("_")
    words = [{"sts": "STS", "chaos": "CHAOS"}.get(data, data.capitalize())]
    words += ["full width"] * ("full" in rest) + [f"{word} iterations" for word in rest if word.isdigit()]
    return ", ".join(words)


def report(experiments: Sequence[Results]) -> str:
    """The page: the main table and the differences."""
    parts = [
        "Dice of the slices that are not drawn, after 1, 2 and 3 evenly spaced drawn slices:\n",
        main_table(experiments, PRIMARY, MAIN),
        "Paired differences after 1 and 3 drawn slices, with 95 % intervals:\n",
        difference_table(experiments, PRIMARY[::2], COMPARISONS),
    ]
    return "\n".join(parts)


def details(experiments: Sequence[Results]) -> str:
    """The long tables behind the page."""
    parts = ["Evenly spaced slices:\n", main_table(experiments, (0, *NUMBERS), NAMES)]
    parts += ["Paired differences:\n", difference_table(experiments, (0, *NUMBERS), [*COMPARISONS, *MORE])]
    parts += ["Share of cases with a lower Dice than the network's:\n", worse_table(experiments)]
    for results in experiments:
        number = max(len(row["even_1"].split()) for rows in results.rows.values() for row in rows.values())
        name = title(results.name)
        if any(row.get("next_1") for rows in results.rows.values() for row in rows.values()):  # not of --short
            parts.append(f"{name}, {len(results.cases)} cases, slices by `next_slice` and bad drawings:\n")
            parts.append(detail_table(results))
        if number > 1:
            parts.append(class_table(results, number))
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="names of the experiments")
    parser.add_argument("--folder", type=Path, default=Experiment.folder, help="folder of results and runs")
    parser.add_argument("--out", type=Path, default=Path("docs/tables"), help="folder for the page and its figure")
    parser.add_argument("--file", default="completion", help="name of the written files")
    parser.add_argument(
        "--folds", type=int, nargs="+", help="only these folds; a way that lacks one of them has no row"
    )
    options = parser.parse_args()
    experiments = [Results.read(name, options.folder, options.folds) for name in options.names]
    for results in experiments:
        if ways := [f"{arm} {method}" for arm, method in results.rows if not results.seeds((arm, method))]:
            print(f"{results.name}: without all folds, so left out: {', '.join(ways)}", file=sys.stderr)
    name = f"{options.file}.md"
    files = {options.out / name: report, options.folder / "results" / name: details}
    for file, function in files.items():
        text = function(experiments)
        print(text)
        with atomic_path(file) as temporary:
            temporary.write_text(text)
    save_figure(draw(experiments), options.out / f"{options.file}.png")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # the message names the remedy
        sys.exit(f"error: {error}")
