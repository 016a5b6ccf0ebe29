"""The benchmarks: the arms of the ablation, its files and its statistics, and the measurements of speed."""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from monai_conres import ConResNet, ContextResidualLoss, residual_mask
from monai_conres.bundle import training_plan
from monai_conres.phantom import write_phantom_dataset
from tests import reference

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "benchmarks"))
import ablation
import ablation_report as report
import common
import side_by_side
import speed
from experiment import Experiment

ROOT = Path(__file__).parent.parent
SMALL = {"channels": (8, 16, 32), "blocks": (1,) * 4}
STRIDES = ((2, 2, 2),) * 2


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def label_of_two_classes(*size: int) -> torch.Tensor:
    label = torch.zeros(2, 1, *size, dtype=torch.long)
    label[..., 1:7, 4:12, 2:19] = 1
    label[..., 2:7, 5:11, 5:15] = 2
    return label


@pytest.mark.parametrize("name", ablation.ARMS)
def test_arm_trains_the_heads_it_evaluates(name):
    if name.startswith("resenc"):
        pytest.importorskip("dynamic_network_architectures", reason="nnU-Net's networks are not installed")
    arm = ablation.ARMS[name]
    torch.manual_seed(0)
    network = ablation.build(arm, 1, 3, SMALL, STRIDES)
    image = torch.randn(2, 1, 16, 16, 24)
    loss = ablation.joint_loss(arm, network(image), label_of_two_classes(16, 16, 24))
    assert loss.isfinite()
    loss.backward()
    trained = [p.grad is not None and bool(p.grad.any()) for n, p in network.named_parameters() if "heads." in n]
    assert set(trained) <= {arm.predicts}
    if arm.predicts:
        assert trained
        with torch.no_grad():
            residual = network.eval().with_residual(image)[1]
        assert residual.shape == (2, 6 if name == "all_axes" else 2, 16, 16, 24)
    if arm.attached:  # the network of the reference, and a decoder
        plain = ablation.build(ablation.ARMS[name.partition("+")[0]], 1, 3, SMALL, STRIDES)
        assert network.backbone.state_dict().keys() == plain.state_dict().keys()


def test_constant_gates_equal_a_decoder_that_predicts_nothing():
    networks = []
    for name in ("dynunet+conres", "dynunet+constant_gates"):
        torch.manual_seed(0)
        networks.append(ablation.build(ablation.ARMS[name], 1, 2, SMALL, STRIDES).eval())
    attached, control = networks
    for stage in attached.decoder.stages:  # sigmoid(0) is one half everywhere
        stage.outer.conv.register_forward_hook(lambda module, args, output: output * 0)
    image = torch.randn(1, 1, 16, 16, 24)
    torch.testing.assert_close(control(image), attached(image))
    assert not torch.allclose(control(image), attached.backbone(image), atol=1e-3)


def test_gates_that_open_from_zero_start_without_effect():
    network = ablation.build(ablation.ARMS["zero_init"], 1, 3, SMALL, STRIDES).eval()
    plain = ConResNet(1, 3, include_background=False, context="mapping", strides=STRIDES, **SMALL).eval()
    weights = {key: value for key, value in network.state_dict().items() if not key.endswith("strength")}
    plain.load_state_dict(weights)
    image = torch.randn(1, 1, 16, 16, 24)
    torch.testing.assert_close(network(image), plain(image))


@pytest.mark.parametrize("weight_0", [1.0, None])
def test_residual_loss_equals_the_equations(weight_0):
    heads = [torch.randn(2, 2, 16 // step, 16 // step, 24 // step) for step in (1, 2, 4)]
    masks = torch.cat([label_of_two_classes(16, 16, 24) == k for k in (1, 2)], dim=1).float()
    got = ablation.residual_loss(heads, masks, paper_w0=weight_0 is None)
    expected = reference.residual_loss([head.numpy() for head in heads], masks.numpy(), 4, 0.5, weight_0)
    assert got.item() == pytest.approx(expected, rel=1e-5)


def test_residual_loss_scores_all_axes_and_scales_as_asked():
    logits, masks = torch.randn(1, 6, 6, 7, 8), torch.randint(0, 2, (1, 2, 6, 7, 8)).float()
    parts = [ContextResidualLoss(spatial_axis=a)([logits[:, 2 * a : 2 * a + 2]], masks) for a in range(3)]
    torch.testing.assert_close(ablation.residual_loss([logits], masks, axes=(0, 1, 2)), sum(parts) / 3)
    coarse = torch.full((1, 2, 3, 4, 4), 0.3)
    got = ablation.residual_loss([coarse], masks, full_resolution=True)
    torch.testing.assert_close(got, ContextResidualLoss()([torch.full_like(masks, 0.3)], masks))


def test_released_loss_has_the_gradient_of_the_released_code():
    logits = torch.randn(1, 1, 6, 7, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(1, 1, 6, 7, 8)
    mask[..., 2:5, 2:6, 3:6] = 1
    ablation.residual_loss([logits], mask, **ablation.ARMS["released"].loss).backward()
    target = reference.residual_mask(mask.numpy(), axis=4)
    expected = reference.released_residual_gradient(logits.detach().numpy(), target)
    np.testing.assert_allclose(logits.grad.numpy(), expected, rtol=1e-6, atol=1e-12)


def test_clamped_loss_is_finite_in_bfloat16():
    logits = torch.full((1, 1, 6, 7, 8), 2.0, dtype=torch.bfloat16, requires_grad=True)
    value = ablation.residual_loss([logits], torch.zeros(1, 1, 6, 7, 8), clamped=True)
    assert value.item() == pytest.approx(-np.log(0.001), rel=1e-4)
    value.backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", ["conres", "paper_w0", "clamped_loss"])
def test_even_odds_balance_the_gradients_of_the_loss(name):
    arm = ablation.ARMS[name]
    masks = torch.zeros(1, 2, 4, 5, 6)
    masks[0, 0, :3, 0, 3:] = 1  # 3 of 120 voxels change
    masks[0, 1, :, :, 3:] = 1  # 20 of 120 voxels change
    changes = residual_mask(masks)
    logits = ablation.even_odds(arm, changes).expand_as(masks).clone().requires_grad_()
    ablation.residual_loss([logits], masks, **arm.loss).backward()
    for channel in range(2):
        changed = changes[0, channel] == 1
        up, down = (logits.grad[0, channel][voxels].mean().item() for voxels in (~changed, changed))
        assert up == pytest.approx(-down, rel=1e-4)
        assert up > 1e-4


def test_surface_is_the_outer_layer_of_an_object():
    mask = torch.zeros(1, 1, 7, 8, 9)
    mask[..., 1:6, 2:7, 3:8] = 1  # a cube of 5 voxels: 98 on its surface
    target = ablation.surface(mask, spatial_axis=-1)
    assert target.sum() == 98
    assert (target <= mask).all()


def test_derived_residuals_are_changes_of_probabilities():
    logits = torch.tensor([0.0, 3.0, 0.5]).log().clamp(min=-20).view(1, 1, 1, 1, 3)
    segmentation = torch.cat([torch.zeros_like(logits), logits], dim=1).requires_grad_()  # 0, 3/4, 1/3
    got = ablation.derived_residuals(segmentation)
    expected = torch.tensor([1e-6, 3 / 4, 3 / 4 - 1 / 3]).logit().view(1, 1, 1, 1, 3)
    torch.testing.assert_close(got, expected)
    got.sum().backward()
    assert segmentation.grad[0, 0, 0, 0, 1].abs() > 0.1


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Run ablation.py or ablation_report.py on phantoms, with results and runs in a folder of the test."""
    write_phantom_dataset(tmp_path / "data", cases=5, size=(20, 24, 16))
    common_options = ["small", "--folder", tmp_path]
    options = {ablation: ["--data", tmp_path / "data", "--device", "cpu"], report: ["--out", tmp_path / "tables"]}

    def run(module, *arguments):
        line = [module.__file__, *common_options, *options[module], *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, line)))
        module.main()

    return run


SHORT = ("--iterations", 2, "--cases", 2, "--max-voxels", 8000)


def test_runs_are_merged_into_one_table(command, tmp_path):
    table, runs = Experiment("small", tmp_path).table, tmp_path / "runs" / "small"
    command(ablation, *SHORT, "--arms", "conres", "baseline", "--seeds", 1)
    files = {file.name: file.read_bytes() for file in runs.iterdir()}
    assert sorted(files) == ["baseline_fold0_seed1.json", "conres_fold0_seed1.json"]
    command(ablation, "--arms", "conres", "--seeds", 1)  # the settings are known, and the run has a result
    assert {file.name: file.read_bytes() for file in runs.iterdir()} == files

    command(report, "--figure")
    assert (tmp_path / "tables" / "small.png").stat().st_size > 5000
    merged, rows = table.read_bytes(), read_table(table)
    assert len(rows) == 2 * 3  # one case for validation, three classes
    assert {(row["arm"], row["seed"], row["case"], row["class"], float(row["dice"])) for row in rows} == {
        (row["arm"], str(row["seed"]), row["case"], str(row["class"]), row["dice"])
        for content in files.values()
        for row in json.loads(content)["rows"]
    }
    dice = {arm: np.mean([float(row["dice"]) for row in rows if row["arm"] == arm]) for arm in ("baseline", "conres")}
    lines = (tmp_path / "tables" / "small.md").read_text().splitlines()
    cells = {line.split("|")[1].strip(): line.split("|") for line in lines if "|" in line}
    assert all(float(cells[arm][3]) == pytest.approx(value, abs=5e-5) for arm, value in dice.items())
    assert float(cells["conres"][4].split("[")[0]) == pytest.approx(dice["conres"] - dice["baseline"], abs=1e-4)

    # without the run files the table stays, and a merged run is not repeated
    shutil.rmtree(tmp_path / "runs")
    command(report, "--arms", "baseline", "--seeds", 1)
    command(ablation, "--arms", "conres", "baseline", "--seeds", 1)
    assert table.read_bytes() == merged
    assert not (tmp_path / "runs").exists()


def test_processes_share_the_runs_of_an_experiment(tmp_path):
    one, other = Experiment("small", tmp_path), Experiment("small", tmp_path)
    runs = one.missing_runs(["conres", "baseline"], 0, [0])
    mine = one.claimed(runs)
    assert next(mine) == runs[0]
    assert list(other.claimed(runs)) == runs[1:]
    one.write_run(runs[0], {}, [])
    with other.claim(runs[0], wait_for=one.run_file(runs[0])) as is_free:  # does not wait: the file is there
        assert not is_free
    other.write_run(runs[1], {}, [])
    assert list(mine) == []
    assert list(other.claimed(runs)) == []
    assert [file for file in one.runs.iterdir() if file.suffix == ".lock"] == []


def test_processes_side_by_side_end_in_time(tmp_path, capfd):
    script = (
        "import os, sys, time; print(os.environ['OMP_NUM_THREADS']); print('half', file=sys.stderr); time.sleep({})"
    )
    assert side_by_side.run([sys.executable, "-c", script.format(60)], 2, 4.0, tmp_path / "logs") == 0
    assert capfd.readouterr().out.splitlines() == ["1", "1", "process_00 ended: half", "process_01 ended: half"]
    assert side_by_side.run([sys.executable, "-c", script.format("'no'")], 1, 60.0, tmp_path / "logs") == 1
    assert "process_00 failed with 1: TypeError" in capfd.readouterr().out


def test_experiment_refuses_what_contradicts_it(command, tmp_path):
    experiment = Experiment("small", tmp_path)
    with pytest.raises(ValueError, match="expected runs in"):
        command(report)
    settings = {"data": "data", "size": "cpu", "device": "cpu", "iterations": 2, "batch": 2, "cases": 2}
    settings |= {"spacing": None, "max_voxels": 8000, "nnunet_folds": False}
    row = {"arm": "conres", "fold": 0, "seed": 0, "case": "a", "class": 1, "dice": 0.5}
    experiment.write_run(("conres", 0, 0), settings, [row])
    for _ in range(2):  # before and after the settings are tracked
        with pytest.raises(ValueError, match=r"expected iterations=2, as in .* small, got iterations=3 from the"):
            command(ablation, "--iterations", 3, "--arms", "conres")
        experiment.merge()
    experiment.write_run(("conres", 0, 1), settings | {"batch": 4}, [row | {"seed": 1}])
    with pytest.raises(ValueError, match=r"batch=2, .* got batch=4 from .*conres_fold0_seed1"):
        experiment.merge()
    experiment.run_file(("conres", 0, 1)).unlink()
    experiment.write_run(("conres", 0, 0), settings, [row | {"dice": 0.6}])
    with pytest.raises(ValueError, match=r"expected the results of .*conres"):
        experiment.merge()
    assert "0.5" in experiment.table.read_text()


def test_full_size_trains_on_resident_patches(command, tmp_path):
    options = ("--size", "full", "--arms", "conres", "--iterations", 1, "--cases", 1, "--max-voxels", 4096)
    command(ablation, *options, "--batch", 3, "--spacing", 1, 1, 2)  # the phantoms have voxels of 1 mm
    content = json.loads((tmp_path / "runs" / "small" / "conres_fold0_seed0.json").read_text())
    assert [content["settings"][name] for name in ("iterations", "batch", "spacing")] == [1, 3, [1, 1, 2]]
    assert len(content["rows"]) == 3
    assert content["rows"][0]["parameters"] > 19_000_000
    patch, strides = training_plan((20, 24, 8), (1, 1, 2), max_voxels=4096)
    network = ablation.build(ablation.ARMS["conres"], 4, 4, ablation.SIZES["full"], strides)
    assert content["rows"][0]["multiply_adds"] == common.multiply_adds(network, (1, 4, *patch))


RESULTS = sorted(Experiment.folder.glob("results/*.csv"))
# test_sparse_benchmark.py has the others
ABLATIONS = [f for f in RESULTS if all(f.with_suffix(e).exists() for e in (".json", ".md")) and "sparse" not in f.stem]


@pytest.mark.parametrize("file", ABLATIONS, ids=lambda file: file.stem)
def test_tracked_results_are_merged_and_of_known_arms(file, tmp_path):
    shutil.copytree(file.parent, tmp_path / "results")
    runs = Experiment(file.stem, tmp_path).merge()
    assert (tmp_path / "results" / file.name).read_bytes() == file.read_bytes()
    assert {arm for arm, _, _ in runs} <= set(ablation.ARMS)
    if len(runs) < 30:  # the table is the report of the file
        assert report.report(report.collect(runs))[0] == file.with_suffix(".md").read_text()


def test_holm_multiplies_by_the_number_of_larger_values():
    assert report.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert report.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


def test_interval_covers_the_spread_of_cases_seeds_and_folds():
    one_fold = np.zeros(400, dtype=int)
    assert report.interval(np.full((2, 10), 0.3), one_fold[:10]) == pytest.approx((0.3, 0.3))
    values = np.random.default_rng(1).normal(0.2, 1, (1, 400))
    low, high = report.interval(values, one_fold)
    error = values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.2 * error)
    # the interval is wide when one of two seeds is shifted
    low, high = report.interval(np.concatenate([values, values + 1]), one_fold)
    assert high - low > 0.9
    # the interval is wide when one of two folds is shifted: a draw has one of them
    folds = (np.arange(400) >= 200).astype(int)
    low, high = report.interval(values + folds, folds)
    assert (low, high) == pytest.approx((values.mean(), values.mean() + 1), abs=4 * error)


# the standard deviation of the seeds is 0.004 in ConResNet, 0.007 in DynUNet with an attached decoder
@pytest.mark.parametrize(
    ("deviation", "seeds", "folds", "least", "most"),
    [
        (0.004, 2, 1, 0.8, 0.95),
        pytest.param(0.007, 3, 4, 0.75, 0.95, marks=pytest.mark.slow),
        pytest.param(0.007, 10, 1, 0.85, 0.97, marks=pytest.mark.slow),
        pytest.param(0.007, 6, 4, 0.88, 0.98, marks=pytest.mark.slow),
    ],
)
def test_interval_holds_the_true_difference(deviation, seeds, folds, least, most):
    rng = np.random.default_rng(0)
    fold = np.repeat(np.arange(folds), 52)
    held = 0
    for _ in range(200):
        of_seeds, of_cases = rng.normal(0, deviation, (seeds, 1)), rng.normal(0, 0.008, (1, fold.size))
        low, high = report.interval(of_seeds + of_cases + rng.normal(0, 0.012, (seeds, fold.size)), fold, draws=200)
        held += low <= 0 <= high
    assert least <= held / 200 <= most


def test_each_arm_has_its_reference():
    rng = np.random.default_rng(0)
    seeds = {"baseline": [0, 1], "conres": [1, 2], "dynunet": [0], "dynunet+conres": [0], "late": [5], "other": [0]}
    seeds |= {"segresnet": [0], "baseline_other": [0]}
    results = {
        arm: report.Results(own, np.zeros(4, dtype=int), {"dice": rng.random((len(own), 4, 2))}, {})
        for arm, own in seeds.items()
    }
    references = {arm: report.reference_of(arm, results) for arm in results}
    expected = {"conres": "baseline", "dynunet+conres": "dynunet", "other": "baseline_other"}
    expected["baseline_other"] = "baseline"
    assert references == dict.fromkeys(seeds) | expected
    compared = [arm for arm in results if report.reference_of(arm, results, "segresnet") == "segresnet"]
    assert compared == ["baseline", "dynunet", "dynunet+conres", "other", "baseline_other"]  # these have seed 0
    own_then_compared = "baseline conres baseline_other other dynunet dynunet+conres late segresnet"
    assert report.in_order(references) == own_then_compared.split()
    values = report.difference(results, "conres", "baseline")  # both have seed 1
    expected = results["conres"].values["dice"][0] - results["baseline"].values["dice"][1]
    np.testing.assert_allclose(values, expected.mean(-1)[None])


def test_released_structure_computes_the_released_network():
    torch.manual_seed(0)
    structure = speed.ReleasedStructure(dropout=0.0).double()
    image = torch.randn(1, 4, 9, 16, 17, dtype=torch.float64)
    with torch.no_grad():
        got, want = structure(image), structure.network.train()(image)
    torch.testing.assert_close(got.segmentation, want.segmentation, rtol=1e-9, atol=1e-9)
    for a, b in zip(got.residuals, want.residuals, strict=True):
        up_sampled = torch.nn.functional.interpolate(b, size=image.shape[2:], mode="trilinear", align_corners=True)
        torch.testing.assert_close(a, up_sampled, rtol=1e-9, atol=1e-9)


SPEED = ("--size", 8, 16, 16, "--repeats", 1, "--device", "cpu")


@pytest.mark.parametrize(("options", "name"), [((), "speed_cpu"), (("--volume", 8, 16, 24), "volume_cpu")])
def test_speed_writes_its_table(options, name, tmp_path, monkeypatch):
    line = [speed.__file__, "--out", tmp_path, *SPEED, *options, "--networks", "ConResNet"]
    monkeypatch.setattr(sys, "argv", list(map(str, line)))
    speed.main()
    (row,) = read_table(tmp_path / f"{name}.csv")
    lines = (tmp_path / f"{name}.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [row["network"]] == ["ConResNet"]
    seconds = [float(value) for column, value in row.items() if "(s)" in column]
    assert len(seconds) == (1 if "--volume" in options else 2)
    assert min(seconds) > 0


@pytest.mark.slow
def test_speed_measures_the_memory_of_a_step(tmp_path):
    # a process of its own: the peak memory of a child counts that of the process that starts it
    line = [sys.executable, speed.__file__, "--out", tmp_path, *SPEED, "--memory", "--networks", "ConResNet"]
    subprocess.run(list(map(str, line)), check=True)
    (row,) = read_table(tmp_path / "memory_cpu.csv")
    assert float(row["step, peak (GiB)"]) >= 0.07  # the gradients of 19 million parameters


@pytest.mark.parametrize(
    ("name", "dtype", "compiled"),
    [
        ("SegResNet (32), bf16, compiled", torch.bfloat16, True),
        ("SegResNet (32)", torch.float32, False),
    ],
)
def test_name_ends_with_the_way_to_compute(name, dtype, compiled):
    options = argparse.Namespace(device="cpu", size=(8, 16, 16), volume=None, batch_size=1)
    case = speed.Case(name, options)
    with case.autocast():
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == dtype
    assert hasattr(case.network, "_orig_mod") == compiled
    assert case.name == "SegResNet (32)"
