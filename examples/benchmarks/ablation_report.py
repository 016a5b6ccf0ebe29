"""Table and figure of the runs of ablation.py: each arm against its reference, with its uncertainty.

    python examples/benchmarks/ablation_report.py RUNS --out docs/tables

The reference of NAME+anything is NAME, that of any other arm baseline_NAME where there is one, and else the baseline;
other people's networks have none; ``--reference ARM`` compares all arms with that one. The difference is paired by
case, fold and seed, averaged over classes, on the seeds that both have.

Its 95 % interval is a bootstrap (10,000 draws) over seeds, over folds, and in each fold over cases. A seed is the
same draw in all folds. With few seeds it is too narrow (tests/test_benchmarks.py simulates how often it holds the
true difference); with one it says nothing of another training. The p value is Wilcoxon's signed
rank test over cases (means over seeds), corrected by Holm for the number of arms: of these trained networks, not of
others.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import wilcoxon

from monai_conres.files import atomic_path
from monai_conres.visualize import save_figure

OTHER_NETWORKS = ("dynunet", "resenc", "segresnet")


@dataclass
class Results:
    """All runs of one arm, on cases that all arms share."""

    seeds: list[int]
    folds: np.ndarray  # of each case
    values: dict[str, np.ndarray]  # of each column, (seeds, cases, classes)
    about: dict[str, float]  # parameters, multiply-adds, seconds, bytes of a GPU

    def mean(self, column: str, seeds: Sequence[int] | None = None) -> float:
        return float(self.values[column][[self.seeds.index(seed) for seed in seeds or self.seeds]].mean())


def read_runs(folder: Path, arms: Sequence[str] | None = None) -> dict[str, Results]:
    """The results of each arm, or of ``arms`` alone."""
    rows: dict[str, dict[int, dict[tuple[str, str, int], dict[str, str]]]] = defaultdict(lambda: defaultdict(dict))
    for file in sorted(folder.glob("*.csv")):
        with file.open() as opened:
            for row in csv.DictReader(opened):
                rows[row["arm"]][int(row["seed"])][row["fold"], row["case"], int(row["class"])] = row
    if not rows:
        raise SystemExit(f"error: expected the runs of ablation.py in {folder}, found none.")
    if unknown := [arm for arm in arms or () if arm not in rows]:
        raise SystemExit(f"error: expected arms that {folder} has, {', '.join(rows)}, got {', '.join(unknown)}.")
    rows = {arm: rows[arm] for arm in rows if arms is None or arm in arms}
    runs = [run for seeds in rows.values() for run in seeds.values()]
    keys = sorted(set.intersection(*(set(run) for run in runs)))
    if not keys:
        raise SystemExit(f"error: expected a fold that all runs in {folder} have; give --arms that share one.")
    classes = len({number for _, _, number in keys})
    results = {}
    for arm, seeds in rows.items():
        first = next(iter(seeds.values()))[keys[0]]
        columns = [key for key in first if key.startswith(("dice", "hd95", "nsd", "residual"))]
        results[arm] = Results(
            seeds=sorted(seeds),
            folds=np.array([int(fold) for fold, _, _ in keys[::classes]]),
            values={
                column: np.reshape(
                    [[float(seeds[seed][key][column]) for key in keys] for seed in sorted(seeds)],
                    (len(seeds), -1, classes),
                )
                for column in columns
            },
            about={
                key: float(np.median([float(row[key] or "nan") for run in seeds.values() for row in run.values()]))
                for key in ("parameters", "multiply_adds", "seconds", "memory")
            },
        )
    return results


def reference_of(arm: str, results: dict[str, Results], every: str | None = None) -> str | None:
    """The arm that another one is compared with: ``every``, or its own."""
    name = arm.partition("+")[0]
    plain = arm in OTHER_NETWORKS
    own = f"baseline_{arm}" if f"baseline_{arm}" in results else "baseline"
    reference = name if name != arm else None if plain or arm == "baseline" else own
    if every is not None:
        reference = every if every != arm else None
    return reference if reference in results and shared_seeds(results, arm, reference) else None


def shared_seeds(results: dict[str, Results], arm: str, reference: str) -> list[int]:
    return sorted(set(results[arm].seeds) & set(results[reference].seeds))


def difference(results: dict[str, Results], arm: str, reference: str, column: str = "dice") -> np.ndarray:
    """Paired differences, ``(seeds, cases)``, of the seeds that both have."""
    seeds = shared_seeds(results, arm, reference)
    own, other = (
        results[name].values[column][[results[name].seeds.index(seed) for seed in seeds]].mean(-1)
        for name in (arm, reference)
    )
    return own - other


def interval(values: np.ndarray, folds: np.ndarray, draws: int = 10_000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean: seeds and folds are drawn, and of each fold its cases.

    Args:
        values: ``(seeds, cases)``.
        folds: of each case.
    """
    random = np.random.default_rng(0)
    parts = [values[:, folds == fold] for fold in np.unique(folds)]

    def drawn(number: int) -> np.ndarray:
        # one fewer than there are: else the mean of three would vary by a third less than it does
        return random.integers(0, number, max(1, number - 1))

    means = np.empty(draws)
    for draw in range(draws):
        seeds = drawn(len(values))
        chosen = [parts[number][np.ix_(seeds, drawn(parts[number].shape[1]))] for number in drawn(len(parts))]
        means[draw] = np.concatenate(chosen, axis=1).mean()
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def holm(p_values: list[float]) -> list[float]:
    """Corrected p values, in the order given."""
    order = np.argsort(p_values)
    corrected = np.empty(len(p_values))
    largest = 0.0
    for rank, number in enumerate(order):
        largest = max(largest, (len(p_values) - rank) * p_values[number])
        corrected[number] = min(1.0, largest)
    return corrected.tolist()


def report(
    results: dict[str, Results], reference: str | None = None
) -> tuple[str, list[tuple[str, float, float, float]]]:
    """Two tables in Markdown, and what the figure shows: arm, mean difference and its interval.

    The first table has what was reached; the second what it took, and Wilcoxon's p of the cases.

    All arms are compared with ``reference``; ``None`` compares each with its own.
    """
    references = {arm: reference_of(arm, results, reference) for arm in results}
    differences = {arm: difference(results, arm, other) for arm, other in references.items() if other is not None}
    p_values = [wilcoxon(values.mean(0)).pvalue for values in differences.values()]
    corrected = dict(zip(differences, holm(p_values), strict=True))
    lines = [
        "| arm | seeds | Dice (each class) | Dice | reference's Dice, same seeds | difference [95 %] "
        "| improved: seeds, cases | HD95 (mm) | NSD | residual Dice: of segmentation / predicted |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    further = [
        "| arm | parameters (M) | multiply-adds (1e9) | training (s, peak GiB of a GPU) | p of cases (Holm) |",
        "|---|---:|---:|---:|---:|",
    ]
    bars = []
    for arm in _ordered(references):
        own = results[arm]
        other = paired = improved = p = "-"
        if arm in differences:
            values = differences[arm]
            low, high = interval(values, own.folds)
            bars.append((arm, float(values.mean()), low, high))
            paired = f"{values.mean():+.4f} [{low:+.4f}, {high:+.4f}]"
            improved = f"{(values.mean(1) > 0).sum()} of {len(values)}, {100 * (values.mean(0) > 0).mean():.0f} %"
            seeds = shared_seeds(results, arm, references[arm])
            other = f"{results[references[arm]].mean('dice', seeds):.4f}"
            p = f"{corrected[arm]:.3f}"
        classes = " / ".join(f"{value:.4f}" for value in own.values["dice"].mean((0, 1)))
        memory = f", {own.about['memory'] / 2**30:.1f}" if own.about["memory"] > 0 else ""
        predicted = f"{own.mean('residual_dice_predicted'):.3f}" if "residual_dice_predicted" in own.values else "-"
        lines.append(
            f"| {arm} | {len(own.seeds)} | {classes} | {own.mean('dice'):.4f} | {other} | {paired} "
            f"| {improved} | {own.mean('hd95'):.3f} | {own.mean('nsd'):.4f} "
            f"| {own.mean('residual_dice_of_segmentation'):.3f} / {predicted} |"
        )
        further.append(
            f"| {arm} | {own.about['parameters'] / 1e6:.3f} | {own.about['multiply_adds'] / 1e9:.2f} "
            f"| {own.about['seconds']:.0f}{memory} | {p} |"
        )
    any_arm = next(iter(results.values()))
    numbers = ", ".join(map(str, np.unique(any_arm.folds)))
    about = f"{len(any_arm.folds)} cases, folds {numbers}."
    return "\n".join([*lines, "", about, "", *further]) + "\n", bars


def _ordered(references: dict[str, str | None]) -> list[str]:
    """Each reference, followed by what is compared with it."""
    plain = [arm for arm, reference in references.items() if reference is None]
    order = []
    for arm in sorted(plain, key=lambda arm: (arm != "baseline", arm)):
        order += [arm, *(other for other, reference in references.items() if reference == arm)]
    # an arm with a baseline of its own, behind that
    for other, reference in references.items():
        if other not in order:
            order.insert(order.index(reference) + 1, other)
    return order


def draw(bars: list[tuple[str, float, float, float]]) -> Figure:
    """Mean differences with their intervals."""
    figure = Figure(figsize=(6.5, 0.32 * len(bars) + 1.2), layout="constrained")
    axes = figure.subplots()
    for row, (_, mean, low, high) in enumerate(reversed(bars)):
        color = "#0072B2" if low > 0 else "#D55E00" if high < 0 else "0.35"
        axes.plot((low, high), (row, row), color=color, linewidth=2)
        axes.plot(mean, row, "o", color=color)
    axes.axvline(0, color="0.7", linewidth=1, zorder=0)
    axes.set_yticks(range(len(bars)), [bar[0] for bar in reversed(bars)])
    axes.set_xlabel("difference in mean Dice to the reference, 95 % interval")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of the runs")
    parser.add_argument("--out", type=Path, required=True, help="folder for NAME.md and NAME.png")
    parser.add_argument("--name", default="ablation")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="these alone (default: all)")
    parser.add_argument("--reference", metavar="ARM", help="one of them, to compare the others with")
    options = parser.parse_args()
    results = read_runs(options.runs, options.arms)
    if options.reference is not None and options.reference not in results:
        parser.error(f"expected a --reference among {', '.join(results)}, got {options.reference}.")
    table, bars = report(results, options.reference)
    print(table)
    with atomic_path(options.out / f"{options.name}.md") as temporary:
        temporary.write_text(table)
    if bars:
        save_figure(draw(bars), options.out / f"{options.name}.png")


if __name__ == "__main__":
    main()
