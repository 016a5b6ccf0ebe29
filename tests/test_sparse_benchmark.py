"""The benchmark of scans in which only some slices are drawn: which slices, and the tables."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "benchmarks"))
import sparse
import sparse_report
from experiment import Experiment


@pytest.mark.parametrize("size", [24, 35, 47])
@pytest.mark.parametrize("percent", [5, 10, 25])
def test_single_slices_and_pairs_are_as_many(size, percent):
    single, pairs = (sparse.Arm(layout, percent, "chain").slices(size) for layout in ("even", "pairs"))
    assert len(single) == len(pairs) == len(set(pairs)) == max(2, 2 * round(percent * size / 200))
    assert min(single + pairs) >= 0
    assert max(single + pairs) < size
    steps = [after - before for before, after in pairwise(single)]
    assert max(steps) - min(steps) <= 1
    assert min(steps) > 1  # no two are neighbors
    assert all(second == first + 1 for first, second in zip(pairs[::2], pairs[1::2], strict=True))


def test_arms_name_layout_percent_and_method():
    assert sparse.Arm.of("pairs10_chain") == sparse.Arm("pairs", 10, "chain")
    assert sparse.Arm.of("all100_residual").slices(4) == [0, 1, 2, 3]


def test_only_drawn_slices_keep_their_label():
    label = torch.randint(0, 3, (1, 3, 4, 20))
    drawn = sparse.DrawSlices(sparse.Arm("pairs", 10, "chain"))({"label": label})["label"]
    known = [number for number in range(20) if (drawn[..., number] != 255).all()]
    assert known == [9, 10]
    assert torch.equal(drawn[..., known], label[..., known])
    assert (drawn[..., :9] == 255).all()


def test_dice_leaves_out_drawn_slices():
    label = torch.zeros(1, 4, 4, 6)
    label[:, :2] = 1
    result = label.clone()
    result[:, :, :, 3] = 0
    assert sparse.dice(result, label, 2, drawn=[3]) == [1.0]
    assert sparse.dice(result, label, 2) == [pytest.approx(2 * 40 / (40 + 48))]


def test_report_compares_with_the_partial_loss():
    def rows(arm: str, gain: float, known: float) -> list[dict[str, str]]:
        about = {"arm": arm, "fold": "0", "seed": "0", "seconds": "30", "labelled": "0.1", "known": str(known)}
        cases = [("validation", f"v{k}", f"{0.8 + 0.01 * k + gain:.3f}", "", "") for k in range(4)]
        cases += [("training", f"t{k}", "0.800", "0.900", "0.950") for k in range(4)]
        columns = ("set", "case", "dice", "completed", "fitted")
        return [about | {"class": "1"} | dict(zip(columns, case, strict=True)) for case in cases]

    runs = {
        (arm, 0, 0): rows(arm, gain, known)
        for arm, gain, known in (
            ("even10_partial", 0.0, 0.0),
            ("even10_chain", 0.02, 0.0),
            ("pairs5_partial", 0.1, 0.05),
        )
    }
    lines = sparse_report.report(runs).splitlines()
    assert lines[2] == "| 5 % | pairs | 5 % | 0.915 | - |"
    assert lines[3] == "| 10 % | single | 0 % | 0.815 | +0.020 [+0.020, +0.020] |"
    assert "| 10 % | single | 0.800 | 0.900 | 0.950 | +0.100 [+0.100, +0.100] |" in lines
    lines = sparse_report.details(runs).splitlines()
    assert "| 5 % | pairs | partial | 10.0 % | 5.0 % | 1 | 4 | 30 | 0.915 | 0.915 |" in lines
    assert "| 10 % | single | chain | partial | +0.020 [+0.020, +0.020] |" in lines
    gains = "+0.100 [+0.100, +0.100] | +0.150 [+0.150, +0.150]"
    assert f"| 10 % | single | chain | 0.800 | 0.900 | 0.950 | {gains} |" in lines


def test_report_pairs_only_what_both_arms_have():
    one = {(0, 0, "a"): 0.5, (0, 0, "b"): 0.5, (0, 1, "c"): 0.0}  # by seed, fold and case
    other = {(0, 0, "a"): 0.25, (0, 0, "b"): 0.25, (1, 0, "a"): 0.0}
    assert sparse_report.difference(one, other) == "+0.250 [+0.250, +0.250]"


@pytest.mark.parametrize("file", sorted(Experiment.folder.glob("results/*_sparse.csv")), ids=lambda file: file.stem)
def test_tracked_tables_are_the_report_of_the_results(file):
    runs = Experiment(file.stem, columns=sparse.COLUMNS).merged_runs()
    assert {arm for arm, _, _ in runs} <= set(sparse.ARMS)
    assert sparse_report.report(runs) == file.with_suffix(".md").read_text()
    assert sparse_report.details(runs) == file.with_name(f"{file.stem}_long.md").read_text()
