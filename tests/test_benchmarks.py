from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from monai_conres import ContextResidualLoss, residual_mask
from monai_conres.datasets import training_plan
from monai_conres.phantom import write_phantom_dataset
from tests import reference

BENCHMARKS = Path(__file__).parent.parent / "examples" / "benchmarks"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


ablation, report, speed = load("ablation"), load("ablation_report"), load("speed")


@pytest.mark.parametrize("name", ablation.ARMS)
def test_every_arm_trains(name):
    if name.startswith("resenc"):
        pytest.importorskip("dynamic_network_architectures", reason="nnU-Net's networks are not installed")
    arm = ablation.ARMS[name]
    torch.manual_seed(0)
    data = SimpleNamespace(channels=1, classes=("background", "inner", "outer"))
    size = {"channels": (8, 16, 32, 64), "blocks": (1,) * 5}
    strides = ((2, 2, 2),) * 3
    network = ablation.build(arm, data, size, strides)
    mask = torch.zeros(2, 2, 16, 16, 24, dtype=torch.bool)
    mask[..., 3:6, 4:8, 2:9] = True
    output = network(torch.randn(2, 1, 16, 16, 24))
    assert isinstance(output, torch.Tensor) == (arm.backbone is not None and not arm.attached)
    if arm.residual:
        arm.loss(spatial_axis=arm.spatial_axis, **arm.loss_arguments)(output.residuals, mask).backward()
        gradients = {name: p.grad for name, p in network.named_parameters() if "heads." in name and p.grad is not None}
        assert any(gradient.any() for gradient in gradients.values())
    else:
        assert arm.residual_weight == 0 or not getattr(output, "residuals", ())
    # "+conres" is the very network and something beside it
    if arm.attached:
        plain = ablation.build(ablation.ARMS[name.partition("+")[0]], data, size, strides)
        assert network.backbone.state_dict().keys() == plain.state_dict().keys()


def test_constant_gates_are_those_of_an_attached_decoder_that_predicts_nothing():
    data = SimpleNamespace(channels=1, classes=("background", "inner"))
    size, strides = {"channels": (8, 16, 32), "blocks": (1,) * 4}, ((2, 2, 2),) * 2
    torch.manual_seed(0)
    attached = ablation.build(ablation.ARMS["dynunet+conres"], data, size, strides).eval()
    torch.manual_seed(0)
    control = ablation.build(ablation.ARMS["dynunet+constant_gates"], data, size, strides).eval()
    for stage in attached.decoder.stages:  # sigmoid(0) is one half everywhere
        stage.outer.register_forward_hook(lambda module, args, output: output * 0)
    image = torch.randn(1, 1, 16, 16, 24)
    torch.testing.assert_close(control(image), attached(image))
    assert not torch.allclose(control(image), attached.backbone(image), atol=1e-3)


def test_multiply_adds_are_counted_by_hand():
    network = torch.nn.Conv3d(2, 3, kernel_size=3, padding=1)
    assert ablation.multiply_adds(network, 2, (4, 5, 6)) == 3 * 2 * 27 * 4 * 5 * 6


def test_the_released_loss_has_the_gradient_of_the_released_code():
    logits = torch.randn(1, 1, 6, 7, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(1, 1, 6, 7, 8)
    mask[..., 2:5, 2:6, 3:6] = 1
    ablation.ReleasedLoss()(logits, mask).backward()
    target = reference.residual_mask(mask.numpy(), axis=4)
    expected = reference.released_residual_gradient(logits.detach().numpy(), target)
    np.testing.assert_allclose(logits.grad.numpy(), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("loss", [ablation.ClampedLoss, ablation.ReleasedLoss])
def test_the_released_loss_is_finite_in_bfloat16(loss):
    logits = torch.full((1, 1, 6, 7, 8), 2.0, dtype=torch.bfloat16, requires_grad=True)
    value = loss()(logits, torch.zeros(1, 1, 6, 7, 8))
    assert value.item() == pytest.approx(-np.log(0.001), rel=1e-4)
    value.backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", ["conres", "paper_w0", "clamped_loss"])
def test_even_odds_are_where_the_loss_of_a_voxel_that_may_have_changed_is_least(name):
    arm = ablation.ARMS[name]
    label = torch.zeros(1, 2, 4, 5, 6)
    label[0, 0, :3, 0, 3:] = 1  # 3 of 120 voxels change
    label[0, 1, :, :, 3:] = 1  # 20
    masks = residual_mask(label)
    logits = ablation.even_odds(arm, masks).expand_as(masks).clone().requires_grad_()
    arm.loss(**arm.loss_arguments)([logits], label).backward()
    for channel in range(2):
        changed = masks[0, channel] == 1
        up, down = (logits.grad[0, channel][voxels].mean().item() for voxels in (~changed, changed))
        assert up == pytest.approx(-down, rel=1e-4)
        assert up > 1e-4


def test_the_boundary_control_learns_the_surface_of_the_object():
    mask = torch.zeros(1, 1, 7, 8, 9, dtype=torch.bool)
    mask[..., 1:6, 2:7, 3:8] = True  # a cube of 5 voxels: 98 on its surface
    target = ablation.BoundaryTargetLoss()._target(mask)
    assert int(target.sum()) == 98
    assert not (target & ~mask).any()


def test_derived_residuals_are_the_changes_of_the_probabilities():
    logits = torch.tensor([0.0, 3.0, 0.5]).log().clamp(min=-20).view(1, 1, 1, 1, 3)
    segmentation = torch.cat([torch.zeros_like(logits), logits], dim=1).requires_grad_()  # 0, 3/4, 1/3
    got = ablation.derived_residuals(segmentation, -1)
    expected = torch.tensor([1e-6, 3 / 4, 3 / 4 - 1 / 3]).logit().view(1, 1, 1, 1, 3)
    torch.testing.assert_close(got, expected)
    got.sum().backward()
    assert segmentation.grad[0, 0, 0, 0, 1].abs() > 0.1


def test_the_masks_of_all_axes_are_the_mean_of_three_losses():
    logits, label = torch.randn(1, 6, 6, 7, 8), torch.randint(0, 3, (1, 1, 6, 7, 8))
    expected = [
        ContextResidualLoss(spatial_axis=axis, to_onehot_y=True)(logits[:, 2 * axis : 2 * axis + 2], label)
        for axis in range(3)
    ]
    got = ablation.AllAxesLoss(spatial_axis=-1, to_onehot_y=True)([logits], label)
    torch.testing.assert_close(got, torch.stack(expected).mean())


def test_full_resolution_targets_equal_the_default_at_full_resolution():
    logits, mask = torch.randn(1, 2, 6, 7, 8), torch.randint(0, 2, (1, 2, 6, 7, 8))
    torch.testing.assert_close(ablation.FullResolutionLoss()(logits, mask), ContextResidualLoss()(logits, mask))


def test_a_run_is_done_once_and_the_report_is_its_mean(tmp_path):
    write_phantom_dataset(tmp_path / "data", cases=5, size=(20, 24, 16))
    command = [sys.executable, BENCHMARKS / "ablation.py", "--data", tmp_path / "data", "--out", tmp_path / "runs"]
    command += ["--arms", "baseline", "conres", "--iterations", "2", "--cases", "2", "--max-voxels", "8000"]

    def run(*seeds: str) -> dict[str, bytes]:
        subprocess.run([*map(str, command), "--seeds", *seeds], check=True, capture_output=True)
        return {file.name: file.read_bytes() for file in (tmp_path / "runs").glob("*.csv")}

    once = run("0")
    assert sorted(once) == ["baseline_fold0_seed0.csv", "conres_fold0_seed0.csv"]
    second = run("0", "1")
    assert len(second) == 4
    command[-1] = "9000"
    with pytest.raises(subprocess.CalledProcessError) as stop:
        run("2")
    assert "'max_voxels': 8000}, got" in stop.value.stderr.decode().replace(", 'nnunet_folds': False", "")
    assert all(second[name] == content for name, content in once.items())

    output = subprocess.run(
        [sys.executable, BENCHMARKS / "ablation_report.py", tmp_path / "runs", "--out", tmp_path / "out"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert (tmp_path / "out" / "ablation.png").stat().st_size > 5000
    first, further = (
        {line.split("|")[1].strip(): line.split("|") for line in part.splitlines() if "|" in line}
        for part in output.split("cases, folds")
    )
    for arm in ("baseline", "conres"):
        rows = [
            row for name in second if name.startswith(arm) for row in csv.DictReader(second[name].decode().splitlines())
        ]
        assert float(first[arm][4]) == pytest.approx(np.mean([float(row["dice"]) for row in rows]), abs=5e-5)
        assert int(first[arm][2]) == 2
        assert float(further[arm][2]) == pytest.approx(int(rows[0]["parameters"]) / 1e6, abs=5e-4)


def test_full_size_trains_on_patches_that_stay_on_the_device(tmp_path):
    write_phantom_dataset(tmp_path / "data", cases=5, size=(20, 24, 16))
    command = [sys.executable, BENCHMARKS / "ablation.py", "--data", tmp_path / "data", "--out", tmp_path / "runs"]
    command += ["--size", "full", "--arms", "conres", "--iterations", "2", "--cases", "1", "--max-voxels", "4096"]
    command += ["--batch", "3"]
    command += ["--device", "cpu", "--spacing", "1", "1", "2"]  # of phantoms with voxels of 1 mm
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    settings = json.loads((tmp_path / "runs" / "settings.json").read_text())
    assert (settings["iterations"], settings["batch"]) == (2, 3)
    with (tmp_path / "runs" / "conres_fold0_seed0.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    assert int(rows[0]["parameters"]) > 19_000_000
    patch, strides = training_plan((20, 24, 8), (1, 1, 2), max_voxels=4096)
    data = SimpleNamespace(channels=4, classes=range(4))
    network = ablation.build(ablation.ARMS["conres"], data, ablation.SIZES["full"], strides)
    assert int(rows[0]["multiply_adds"]) == ablation.multiply_adds(network, 4, patch)


def test_statistics():
    assert report.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert report.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    constant = np.full((2, 10), 0.3)
    one_fold = np.zeros(400, dtype=int)
    assert report.interval(constant, one_fold[:10]) == pytest.approx((0.3, 0.3))
    values = np.random.default_rng(1).normal(0.2, 1, (1, 400))
    low, high = report.interval(values, one_fold)
    error = values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.2 * error)
    # a shift of one seed widens the interval: seeds are drawn, too
    shifted = np.concatenate([values, values + 1])
    low, high = report.interval(shifted, one_fold)
    assert high - low > 0.9
    # and so does a shift of a fold: a draw has one of the two
    shifted = values + (np.arange(400) >= 200)
    low, high = report.interval(shifted, (np.arange(400) >= 200).astype(int))
    assert (low, high) == pytest.approx((values.mean(), values.mean() + 1), abs=4 * error)


@pytest.mark.parametrize(
    ("deviation", "seeds", "folds", "least", "most"),
    [
        (0.004, 2, 1, 0.8, 0.95),
        (0.004, 3, 1, 0.85, 0.98),
        (0.004, 3, 4, 0.85, 0.98),
        (0.004, 6, 4, 0.9, 0.98),
        (0.004, 10, 1, 0.9, 1.0),
        # the seeds of an attached DynUNet differ by more
        (0.007, 2, 1, 0.7, 0.85),
        (0.007, 3, 1, 0.83, 0.95),
        (0.007, 3, 4, 0.75, 0.95),
        (0.007, 6, 4, 0.88, 0.98),
        (0.007, 10, 1, 0.85, 0.97),
    ],
)
def test_an_interval_holds_the_true_difference(deviation, seeds, folds, least, most):
    rng = np.random.default_rng(0)
    fold = np.repeat(np.arange(folds), 52)
    held = 0
    for _ in range(200):
        of_seeds, of_cases = rng.normal(0, deviation, (seeds, 1)), rng.normal(0, 0.008, (1, fold.size))
        low, high = report.interval(of_seeds + of_cases + rng.normal(0, 0.012, (seeds, fold.size)), fold, draws=200)
        held += low <= 0 <= high
    assert least <= held / 200 <= most


def test_what_is_compared_with_what():
    rng = np.random.default_rng(0)
    results = {
        arm: report.Results(seeds, np.zeros(4, dtype=int), {"dice": rng.random((len(seeds), 4, 2))}, {})
        for arm, seeds in {
            "baseline": [0, 1],
            "conres": [1, 2],
            "dynunet": [0],
            "dynunet+conres": [0],
            "late": [5],
            "other": [0],
            "segresnet": [0],
            "baseline_other": [0],
        }.items()
    }
    references = {arm: report.reference_of(arm, results) for arm in results}
    assert references == {
        "baseline": None,
        "conres": "baseline",
        "dynunet": None,
        "dynunet+conres": "dynunet",
        "late": None,
        "other": "baseline_other",
        "segresnet": None,
        "baseline_other": "baseline",
    }
    assert {arm: report.reference_of(arm, results, "segresnet") for arm in results} == {
        arm: None if arm in ("segresnet", "late", "conres") else "segresnet" for arm in results
    }
    order = report._ordered(references)
    assert sorted(order) == sorted(results)
    assert order.index("other") == order.index("baseline_other") + 1
    values = report.difference(results, "conres", "baseline")  # seed 1 is the one that both have
    np.testing.assert_allclose(
        values, (results["conres"].values["dice"][0] - results["baseline"].values["dice"][1]).mean(-1)[None]
    )


@pytest.mark.parametrize("mapping", [True, False])
def test_the_released_structure_computes_the_released_network(mapping):
    torch.manual_seed(0)
    structure = speed.ReleasedStructure(mapping=mapping).double().eval()
    image = torch.randn(1, 4, 9, 16, 17, dtype=torch.float64)
    with torch.no_grad():
        got, want = structure(image), structure.network.heads(image)
    torch.testing.assert_close(got.segmentation, want.segmentation, rtol=1e-9, atol=1e-9)
    assert len(got.residuals) == len(want.residuals)
    for a, b in zip(got.residuals, want.residuals, strict=True):
        up_sampled = torch.nn.functional.interpolate(b, size=image.shape[2:], mode="trilinear", align_corners=True)
        torch.testing.assert_close(a, up_sampled, rtol=1e-9, atol=1e-9)


def test_speed_makes_its_tables(tmp_path):
    command = [sys.executable, BENCHMARKS / "speed.py", "--out", tmp_path, "--size", 8, 16, 16, "--repeats", 1]
    command = [*map(str, command), "--networks", "released structure", "ConResNet"]
    volume = ("--volume", 16, 16, 24)
    for options, name in ((volume, "volume_cpu"), ((), "speed_cpu"), (("--memory",), "memory_cpu")):
        subprocess.run([*command, "--device", "cpu", *map(str, options)], check=True, capture_output=True)
        with (tmp_path / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["network"] for row in rows] == ["released structure", "ConResNet"]
    assert all(float(row["step, peak (GiB)"]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("name", "dtype", "compiled"),
    [
        ("SegResNet (32), bf16, compiled", torch.bfloat16, True),
        ("SegResNet (32), fp16", torch.float16, False),
        ("SegResNet (32)", torch.float32, False),
    ],
)
def test_the_end_of_a_name_says_how_it_is_computed(name, dtype, compiled):
    options = argparse.Namespace(device="cpu", size=(8, 16, 16), volume=None, batch_size=1)
    case = speed.Case(name, options)
    with case.autocast():
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == dtype
    assert hasattr(case.network, "_orig_mod") == compiled
    assert case.name == "SegResNet (32)"
    assert speed.multiply_adds_of(case) > 0


def test_a_case_is_segmented_in_windows(monkeypatch):
    options = argparse.Namespace(device="cpu", size=(8, 16, 16), volume=(16, 16, 24), batch_size=2)
    case = speed.Case("ConResNet", options)
    seen = []
    monkeypatch.setattr(case.network, "forward", lambda x: seen.append(tuple(x.shape)) or x[:, :3])
    case.seconds("volume")
    # steps of two thirds of a window: at 0, 5 and 8 of 16, at 0 of 16, at 0 and 8 of 24
    assert sum(shape[0] for shape in seen) == 6
    assert {shape[1:] for shape in seen} == {(4, 8, 16, 16)}
