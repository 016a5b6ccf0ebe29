"""Merge the runs of ablation.py into the tracked table, and compare each arm with its reference.

    python examples/benchmarks/ablation_report.py hippocampus_cpu             # merge, and write results/NAME.md
    python examples/benchmarks/ablation_report.py hippocampus_cpu --figure    # also results/NAME.png
    python examples/benchmarks/ablation_report.py hippocampus_cpu --arms dynunet dynunet+wider    # only print

The reference of NAME+anything is NAME. The reference of another arm is baseline_NAME if that arm exists, otherwise
baseline. Other networks have no reference. ``--reference ARM`` compares all arms with ARM.

A difference is paired by case, fold and seed, on the seeds that both arms have, and averaged over classes. Its 95 %
interval is a bootstrap with 10,000 draws over seeds, over folds, and over the cases of each fold. All folds get the
same drawn seeds. With few seeds the interval is too narrow: tests/test_benchmarks.py simulates how often the interval
holds the true difference. With one seed the interval says nothing about another training. With several folds the spread
of cases counts twice, in the drawn folds and in the drawn cases: the interval is up to 1.4 times too wide if folds do
not differ. So an interval that holds zero does not show that nothing changes.

The p value is Wilcoxon's signed rank test over cases (means over seeds), corrected by Holm for the number of arms. It
is about these trained networks, not about other trainings.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from experiment import COST, METRICS, Experiment, Rows, Run
from matplotlib.figure import Figure
from scipy.stats import wilcoxon

from monai_conres.files import atomic_path
from monai_conres.visualize import save_figure

OTHER_NETWORKS = ("dynunet", "resenc", "segresnet")


@dataclass
class Results:
    """All runs of one arm, on the cases that all arms share."""

    seeds: list[int]
    folds: np.ndarray  # fold of each case
    values: dict[str, np.ndarray]  # of each metric, (seeds, cases, classes)
    cost: dict[str, float]  # medians: parameters, multiply-adds, seconds, bytes of a GPU

    def mean(self, metric: str) -> float:
        return float(self.values[metric].mean())

    def dice(self, seeds: Sequence[int]) -> np.ndarray:
        """Mean Dice over classes, ``(seeds, cases)``."""
        return self.values["dice"][[self.seeds.index(seed) for seed in seeds]].mean(-1)


def collect(
    runs: Mapping[Run, Rows], arms: Sequence[str] | None = None, seeds: Sequence[int] | None = None
) -> dict[str, Results]:
    """The results of each arm, optionally only of some arms and seeds.

    Raises:
        ValueError: when an arm has no run, or the arms share no fold.
    """
    rows: dict[str, dict[int, dict[tuple[str, str, int], dict[str, str]]]] = {}
    for (arm, _, seed), own in runs.items():
        if (arms is None or arm in arms) and (seeds is None or seed in seeds):
            own_seed = rows.setdefault(arm, {}).setdefault(seed, {})
            own_seed.update({(row["fold"], row["case"], int(row["class"])): row for row in own})
    if missing := set(arms or ()) - set(rows):
        known = ", ".join(dict.fromkeys(arm for arm, _, _ in runs))
        raise ValueError(f"expected arms that have runs ({known}), got {', '.join(sorted(missing))}.")
    keys = sorted(set.intersection(*(set(cases) for by_seed in rows.values() for cases in by_seed.values())))
    if not keys:
        raise ValueError(f"expected a fold that all runs have, got none for {', '.join(rows)}; select --arms.")
    classes = len({number for _, _, number in keys})
    results = {}
    for arm, by_seed in rows.items():
        table = [[by_seed[seed][key] for key in keys] for seed in sorted(by_seed)]
        values = {
            metric: np.reshape([[float(row[metric]) for row in own] for own in table], (len(table), -1, classes))
            for metric in METRICS
            if table[0][0][metric]
        }
        every = [row for by_case in by_seed.values() for row in by_case.values()]
        cost = {name: float(np.median([float(row[name] or "nan") for row in every])) for name in COST}
        results[arm] = Results(sorted(by_seed), np.array([int(fold) for fold, _, _ in keys[::classes]]), values, cost)
    return results


def reference_of(arm: str, results: Mapping[str, Results], common: str | None = None) -> str | None:
    """The arm that ``arm`` is compared with: ``common``, or else its own reference."""
    name = arm.partition("+")[0]
    if common is not None:
        reference = common
    elif name != arm:
        reference = name
    elif arm in OTHER_NETWORKS:
        return None
    else:
        reference = f"baseline_{arm}" if f"baseline_{arm}" in results else "baseline"
    found = reference != arm and reference in results and shared_seeds(results, arm, reference)
    return reference if found else None


def shared_seeds(results: Mapping[str, Results], arm: str, reference: str) -> list[int]:
    return sorted(set(results[arm].seeds) & set(results[reference].seeds))


def difference(results: Mapping[str, Results], arm: str, reference: str) -> np.ndarray:
    """Paired differences of the Dice, ``(seeds, cases)``, on the seeds that both arms have."""
    seeds = shared_seeds(results, arm, reference)
    return results[arm].dice(seeds) - results[reference].dice(seeds)


def interval(values: np.ndarray, folds: np.ndarray, draws: int = 10_000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean, with drawn seeds, drawn folds, and drawn cases of each fold.

    Args:
        values: ``(seeds, cases)``.
        folds: fold of each case.
        draws: number of draws.
    """
    random = np.random.default_rng(0)
    parts = [np.flatnonzero(folds == fold) for fold in np.unique(folds)]

    def drawn(number: int) -> np.ndarray:
        # one fewer than there are: otherwise the variance of the mean of three would be a third too small
        return random.integers(0, number, max(1, number - 1))

    means = np.empty(draws)
    for draw in range(draws):
        of_cases = values[drawn(len(values))].mean(0)
        cases = [parts[number][drawn(len(parts[number]))] for number in drawn(len(parts))]
        means[draw] = of_cases[np.concatenate(cases)].mean()
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrected p values, in the order given."""
    order = np.argsort(p_values)
    steps = np.minimum(1, np.arange(len(p_values), 0, -1) * np.asarray(p_values)[order])
    corrected = np.empty(len(p_values))
    corrected[order] = np.maximum.accumulate(steps)
    return corrected.tolist()


def report(
    results: Mapping[str, Results], common: str | None = None
) -> tuple[str, str, list[tuple[str, float, float, float]]]:
    """The main table and that of details in Markdown, and for the figure: arm and seeds, difference, interval."""
    references = {arm: reference_of(arm, results, common) for arm in results}
    differences = {arm: difference(results, arm, other) for arm, other in references.items() if other is not None}
    p_values = holm([wilcoxon(values.mean(0)).pvalue for values in differences.values()])
    corrected = dict(zip(differences, p_values, strict=True))
    main = [
        "| arm | seeds | Dice | difference [95 %] | residual Dice: segmentation | predicted |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    details = [
        "| arm | Dice (each class) | reference, Dice | improved: seeds, cases | p of cases (Holm) | HD95 (mm) | NSD "
        "| parameters (M) | multiply-adds (1e9) | training (s, peak GiB of a GPU) |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    bars = []
    for arm in in_order(references):
        own = results[arm]
        reference = paired = improved = p = "-"
        if arm in differences:
            values = differences[arm]
            low, high = interval(values, own.folds)
            reference = references[arm]
            reference = f"{reference}, {results[reference].dice(shared_seeds(results, arm, reference)).mean():.4f}"
            bars.append((f"{arm}, {len(values)}", float(values.mean()), low, high))
            paired = f"{values.mean():+.4f} [{low:+.4f}, {high:+.4f}]"
            improved = f"{(values.mean(1) > 0).sum()} of {len(values)}, {100 * (values.mean(0) > 0).mean():.0f} %"
            p = f"{corrected[arm]:.3f}"
        predicted = f"{own.mean('residual_dice_predicted'):.3f}" if "residual_dice_predicted" in own.values else "-"
        main.append(
            f"| {arm} | {len(own.seeds)} | {own.mean('dice'):.4f} | {paired} "
            f"| {own.mean('residual_dice_of_segmentation'):.3f} | {predicted} |"
        )
        classes = " / ".join(f"{value:.4f}" for value in own.values["dice"].mean((0, 1)))
        memory = f", {own.cost['memory'] / 2**30:.1f}" if own.cost["memory"] > 0 else ""
        details.append(
            f"| {arm} | {classes} | {reference} | {improved} | {p} | {own.mean('hd95'):.3f} | {own.mean('nsd'):.4f} "
            f"| {own.cost['parameters'] / 1e6:.3f} | {own.cost['multiply_adds'] / 1e9:.2f} "
            f"| {own.cost['seconds']:.0f}{memory} |"
        )
    folds = next(iter(results.values())).folds
    main += ["", f"{len(folds)} cases; folds: {', '.join(map(str, np.unique(folds)))}."]
    return "\n".join(main) + "\n", "\n".join(details) + "\n", bars


def in_order(references: Mapping[str, str | None]) -> list[str]:
    """The arms without a reference, the baseline first. Behind each arm come the arms that are compared with it."""

    def followed(arm: str) -> list[str]:
        return [arm, *(name for other in references if references[other] == arm for name in followed(other))]

    first = sorted((arm for arm in references if references[arm] is None), key=lambda arm: (arm != "baseline", arm))
    return [name for arm in first for name in followed(arm)]


def draw(bars: Sequence[tuple[str, float, float, float]]) -> Figure:
    """Mean differences with their intervals."""
    figure = Figure(figsize=(6.5, 0.32 * len(bars) + 1.2), layout="constrained")
    axes = figure.subplots()
    for row, (_, mean, low, high) in enumerate(reversed(bars)):
        color = "#0072B2" if low > 0 else "#D55E00" if high < 0 else "0.35"
        axes.plot((low, high), (row, row), color=color, linewidth=2)
        axes.plot(mean, row, "o", color=color)
    axes.axvline(0, color="0.7", linewidth=1, zorder=0)
    axes.set_yticks(range(len(bars)), [bar[0] for bar in reversed(bars)])
    text = "difference in mean Dice to the reference, 95 % interval"
    axes.set_xlabel(f"{text}\nblue: above zero, orange: below; behind each arm: seeds")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="name of the experiment")
    parser.add_argument("--folder", type=Path, default=Experiment.folder, help="folder of results and runs")
    parser.add_argument("--out", type=Path, help="folder for NAME.md and NAME.png (default: results)")
    parser.add_argument("--figure", action="store_true", help="also draw NAME.png")
    selection = parser.add_argument_group("only print the tables", "of some runs, or with one reference")
    selection.add_argument("--arms", nargs="+", metavar="ARM")
    selection.add_argument("--seeds", type=int, nargs="+")
    selection.add_argument("--reference", metavar="ARM", help="compare all other arms with this arm")
    options = parser.parse_args()
    results = collect(Experiment(options.name, options.folder).merge(), options.arms, options.seeds)
    if options.reference is not None and options.reference not in results:
        raise ValueError(f"expected a --reference among {', '.join(results)}, got {options.reference}.")
    table, details, bars = report(results, options.reference)
    print(f"{table}\n{details}")
    if options.arms or options.seeds or options.reference:
        return
    out = options.out or options.folder / "results"
    with atomic_path(out / f"{options.name}.md") as temporary:
        temporary.write_text(table)
    if options.figure:
        save_figure(draw(bars), out / f"{options.name}.png")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # the message names the remedy
        sys.exit(f"error: {error}")
