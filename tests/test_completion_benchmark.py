"""The benchmark of completion: its definitions against hand-computed values, its arms, its files and its report."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from monai_conres.phantom import write_phantom_dataset
from tests.test_benchmarks import ROOT, SMALL, STRIDES, read_table

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "benchmarks"))
import completion
import completion_picture
import completion_report as report
import why


def cone(slices: int = 9) -> torch.Tensor:
    """Squares of one class that grow by two voxels from slice to slice, ``(1, 1, 24, 24, slices)``."""
    label = torch.zeros(1, 1, 24, 24, slices, dtype=torch.uint8)
    for number in range(1, slices - 1):
        label[..., 11 - number : 13 + number, 11 - number : 13 + number, number] = 1
    return label


def case_of(label: torch.Tensor, classes: int = 2, certainty: float = 6.0) -> completion.Case:
    """A network that segments perfectly, and an image that shows the label."""
    masks = completion.one_hot(label, num_classes=classes)
    residual = torch.zeros_like(masks[:, 1:]).float()
    segmentation = certainty * (2 * masks.float() - 1)
    return completion.Case("case", label.float(), label, segmentation, residual, [1.0, 1.0, 3.0])


@pytest.mark.parametrize(("number", "expected"), [(1, [4]), (2, [2, 6]), (3, [2, 4, 6]), (9, [1, 2, 3, 4, 5, 6, 7])])
def test_evenly_spaced_slices_lie_within_the_foreground(number, expected):
    assert completion.evenly_spaced(cone(), number) == expected


def test_dice_leaves_out_drawn_slices_and_absent_classes():
    reference = torch.zeros(1, 1, 4, 4, 3, dtype=torch.long)
    reference[..., :2, :, 0], reference[..., :2, :, 1], reference[..., 3, :, 1] = 1, 1, 2
    result = torch.zeros_like(reference)
    result[..., :1, :, 0] = 1
    np.testing.assert_allclose(completion.dice(result, reference, 3, [1]), [2 * 4 / 12, np.nan])
    np.testing.assert_allclose(completion.dice(result, reference, 3), [2 * 4 / 20, 0.0])


def test_interpolation_of_signed_distances_restores_a_cone():
    label = cone()
    restored = completion.interpolate(case_of(label, certainty=0.0), [1, 7])  # the network knows nothing
    assert completion.dice(restored, label, 2, [1, 7])[0] > 0.97  # corners of squares are not distances


def test_interpolation_shrinks_a_class_that_is_absent_in_the_next_drawn_slice():
    label = torch.zeros(1, 1, 24, 24, 5, dtype=torch.uint8)
    label[..., 4:20, 4:20, 0] = 1
    areas = (completion.interpolate(case_of(label), [0, 4]) > 0).sum((0, 1, 2, 3)).tolist()
    assert areas[0] == 256
    assert areas == sorted(areas, reverse=True)
    assert areas[-1] == 0


def test_contour_interpolation_of_itk_restores_a_cone():
    if not completion.has_itk:
        pytest.skip("itk-morphologicalcontourinterpolation is not installed")
    label = cone()
    restored = completion.interpolate_contours(case_of(label, certainty=0.0), [1, 7])
    assert completion.dice(restored, label, 2, [1, 7])[0] > 0.85


def test_random_walker_fills_what_the_image_shows():
    pytest.importorskip("skimage")
    label = cone()
    walked = completion.walk(case_of(label), [1, 4, 7])
    assert completion.dice(walked, label, 2, [1, 4, 7])[0] > 0.8


@pytest.mark.parametrize(("how", "area"), [("eroded", 6 * 6), ("dilated", 8 * 8 + 4 * 8), ("shifted", 8 * 8)])
def test_bad_drawings_change_the_area_by_one_voxel(how, area):
    label = torch.zeros(1, 1, 16, 16, 2, dtype=torch.uint8)
    label[..., 4:12, 4:12, 0] = 1
    drawn = completion.changed(label, how, 2)
    assert int(drawn[..., 0].sum()) == area
    assert int(drawn[..., 1].sum()) == 0


def test_slices_are_drawn_until_each_target():
    label = cone(slices=10)
    case = case_of(label)
    perfect = completion.draw_slices(completion.Completion(case, "network", None), case)
    assert (perfect["until_90"], perfect["until_95"], perfect["next_1"]) == ("1", "1", "1.0000")
    blind = completion.Case("case", case.image, label, torch.zeros_like(case.segmentation), case.residual, [1, 1, 3])
    never = completion.draw_slices(completion.Completion(blind, "network", None), blind)
    assert (never["until_90"], never["until_95"]) == ("10", "10")  # all slices


def test_chain_methods_agree_with_a_perfect_network():
    case = case_of(cone())
    for name in completion.CHAINS:
        complete = completion.Completion(case, name, completion.ChainSettings(tau=1.0, offset=-1.0))
        assert completion.dice(complete([4]), case.label, 2, [4])[0] == 1.0
        assert completion.dice(complete.without_slices(), case.label, 2)[0] == 1.0
        assert complete.next([4]) != 4


def test_report_compares_ways_by_case_fold_and_seed(tmp_path):
    experiment = completion.Experiment("toy_completion", tmp_path, completion.COLUMNS)
    for seed in (0, 1):
        for fold in (0, 1):
            rows = [
                {"arm": "conres", "fold": fold, "seed": seed, "case": f"c{fold}{n}", "method": method, "slices": 9}
                | {f"even_{k}": f"{0.5 + gain + 0.1 * n:.4f} nan" for k in (0, 1, 2, 3, 5)}
                for n in range(3)
                for method, gain in (("network", 0.0), ("both", 0.125))
            ]
            if (seed, fold) != (1, 1):  # the second seed is not complete
                experiment.write_run(("conres", fold, seed), {"iterations": 1}, rows)
    results = report.Results.read("toy_completion", tmp_path)
    assert results.seeds(("conres", "both"), ("conres", "network")) == [0]
    assert report.mean(results, ("conres", "network"), "even_1") == "0.600"
    assert report.difference(results, ("conres", "both"), ("conres", "network"), "even_1") == "+0.125 [+0.125, +0.125]"
    assert report.Results.read("toy_completion", tmp_path, folds=[0]).seeds(("conres", "both")) == [0, 1]
    text = report.report([results])
    assert "| ConResNet: chain, both | 0.725 | 0.725 | 0.725 |" in text
    assert "| ConResNet: chain, both | 0.725 | 0.725 | 0.725 | 0.725 | 0.725 |" in report.details([results])
    assert "| ConResNet: chain, both, less ConResNet: network | +0.125 [+0.125, +0.125] | +0.125" in text
    report.draw([results])


def test_short_measurement_is_only_the_dice_of_evenly_spaced_slices():
    case = case_of(cone())
    row = completion.measure(completion.Completion(case, "both", None), case, draw=False, short=True)
    assert {name for name in row if name != "completion_seconds"} == {f"even_{number}" for number in (0, 1, 2, 3, 5)}
    assert report.title("hippocampus_full_completion") == "Hippocampus, full width"


@pytest.mark.slow
def test_completion_benchmark_runs_and_continues(tmp_path):
    write_phantom_dataset(tmp_path / "Task00_Phantom", cases=5, size=(24, 24, 20))
    command = [sys.executable, str(ROOT / "examples/benchmarks/completion.py"), "toy_completion", "--folds", "0"]
    command += ["--data", str(tmp_path / "Task00_Phantom"), "--iterations", "2", "--folder", str(tmp_path)]
    arms = ["baseline", "conres", "conres_chain", "plain_head"]
    subprocess.run([*command, "--arms", *arms], check=True, cwd=tmp_path)
    files = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "runs/toy_completion").glob("*.json")}
    assert set(files) == {f"{arm}_fold0_seed0.json" for arm in arms}
    subprocess.run([*command, "--arms", *arms], check=True, cwd=tmp_path)  # nothing left to do
    assert files == {file.name: file.stat().st_mtime_ns for file in (tmp_path / "runs/toy_completion").glob("*.json")}
    merge = [sys.executable, str(ROOT / "examples/benchmarks/completion_report.py"), "toy_completion"]
    subprocess.run([*merge, "--folder", str(tmp_path), "--out", str(tmp_path)], check=True, cwd=tmp_path)
    assert (tmp_path / "completion.png").exists()
    rows = read_table(tmp_path / "results/toy_completion.csv")
    assert {(row["arm"], row["method"]) for row in rows} >= {("conres", "both"), ("baseline", "interpolation")}


@pytest.mark.slow
def test_cascade_takes_the_predictions_of_all_folds(tmp_path):
    write_phantom_dataset(tmp_path / "Task00_Phantom", cases=5, size=(24, 24, 20))
    command = [sys.executable, str(ROOT / "examples/benchmarks/completion.py"), "toy_completion", "--short"]
    command += ["--data", str(tmp_path / "Task00_Phantom"), "--iterations", "1", "--folder", str(tmp_path)]
    cascade = [*command, "--folds", "0", "--arms", "cascade", "cascade_segmentation"]
    failed = subprocess.run(cascade, cwd=tmp_path, capture_output=True, text=True)
    assert failed.returncode == 1
    assert "run the arm conres of all folds first" in failed.stderr
    subprocess.run([*command, "--arms", "conres"], check=True, cwd=tmp_path)
    subprocess.run(cascade, check=True, cwd=tmp_path)
    runs = tmp_path / "runs/toy_completion"
    assert {file.name for file in runs.glob("cascade*.json")} == {
        "cascade_fold0_seed0.json",
        "cascade_segmentation_fold0_seed0.json",
    }
    predicted = [name for fold in range(5) for name in torch.load(runs / f"first_fold{fold}_seed0.pt")]
    assert len(predicted) == len(set(predicted)) == 5  # each scan once


def test_picture_shows_the_median_case_and_the_ends_of_the_object(tmp_path):
    experiment = completion.Experiment("toy_completion", tmp_path, completion.COLUMNS)
    gains = {0: {"a": 0.5, "b": 0.0}, 1: {"c": 0.25, "d": 0.125, "e": 0.75}}
    for fold, own in gains.items():
        rows = [
            {"arm": "conres", "fold": fold, "seed": 0, "case": case, "method": method, "slices": 9, "even_1": dice}
            for case, gain in own.items()
            for method, dice in (("network", 0.125), ("both", 0.125 + gain))
        ]
        experiment.write_run(("conres", fold, 0), {"iterations": 1}, rows)
    assert completion_picture.median_case(report.Results.read("toy_completion", tmp_path), 0) == (1, "c")
    label = torch.zeros(1, 1, 4, 4, 40)
    label[..., 1, 1, 5:30] = 1
    assert completion_picture.slices_to_show(label, 16) == [5, 9, 13, 16, 21, 25, 29]


def test_auroc_counts_ordered_pairs():
    random = np.random.default_rng(0)
    score, truth = torch.as_tensor(random.normal(size=(5, 6))), torch.as_tensor(random.integers(0, 2, (5, 6)))
    pairs = [a > b for a in score[truth > 0].tolist() for b in score[truth == 0].tolist()]
    assert why.auroc(score, truth) == pytest.approx(np.mean(pairs))


def test_average_precision_is_the_mean_of_the_precision_at_each_hit():
    random = np.random.default_rng(0)
    score, truth = torch.as_tensor(random.normal(size=(5, 6))), torch.as_tensor(random.integers(0, 2, (5, 6)))
    precisions = [(truth[score >= least] > 0).double().mean().item() for least in score[truth > 0]]
    assert why.average_precision(score, truth) == pytest.approx(np.mean(precisions))
    assert np.isnan(why.average_precision(score, truth * 0))


def test_mean_gates_change_only_gates_that_vary():
    torch.manual_seed(0)
    network = completion.build(completion.ARMS["conres"], 1, 2, SMALL, STRIDES).eval()
    image = torch.randn(1, 1, 16, 16, 24)
    with torch.no_grad():
        before = network(image)
        with why.mean_gates(network):
            assert not torch.allclose(network(image), before, atol=1e-3)
        torch.testing.assert_close(network(image), before, rtol=0, atol=0)
        for stage in network.residual_decoder.stages:  # sigmoid(0) is one half everywhere
            stage.outer.conv.register_forward_hook(lambda module, args, output: output * 0)
        before = network(image)
        with why.mean_gates(network):
            torch.testing.assert_close(network(image), before)
    assert why.finest_gate(network, image).unique().tolist() == [0.5]


def test_true_residuals_give_the_label_where_one_slice_is_certain():
    label = cone()
    case = case_of(label, certainty=0.0)
    case.segmentation[..., 4] = 3 * (2 * completion.one_hot(label, num_classes=2)[..., 4].float() - 1)
    np.testing.assert_array_equal(why.with_true_residuals(case), label)


def test_figure_of_the_networks_shows_the_means_of_the_table():
    names = ("hippocampus_completion", "chaos_completion", "sts_completion")
    rows = {name: read_table(why.table_file(completion.Experiment.folder, name)) for name in names}
    gradients, gates, _, masks = why.draw(rows).axes
    table = (completion.Experiment.folder / "results/why.md").read_text().splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")] for line in table]
    cosine = [line.get_ydata()[-1] for line in gradients.lines[:6:2]]
    assert [f"{value:.3f}" for value in cosine] == [row[3] for row in cells]
    heights = [bar.get_height() for bar in gates.patches]
    assert [f"{value:.3f}" for value in heights] == [cell for row in cells for cell in row[5:8]]
    heights = [bar.get_height() for bar in masks.patches]
    assert [f"{value:.3f}" for value in heights] == [cell for row in cells for cell in row[11:13]]


@pytest.mark.slow
def test_tables_of_completion_are_the_report_of_the_results(tmp_path):
    shutil.copytree(completion.Experiment.folder / "results", tmp_path / "results")
    names = ("hippocampus_completion", "chaos_completion", "sts_completion")
    experiments = [report.Results.read(name, tmp_path) for name in names]
    for name in names:
        tracked = completion.Experiment.folder / "results" / f"{name}.csv"
        assert (tmp_path / "results" / f"{name}.csv").read_bytes() == tracked.read_bytes()
    assert report.report(experiments) == (ROOT / "docs/tables/completion.md").read_text()
    assert report.details(experiments) == (tmp_path / "results/completion.md").read_text()
