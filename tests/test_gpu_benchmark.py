"""The command that measures a GPU, tried on a CPU, and the count of what a GPU would have to do."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch.nn as nn

from monai_conres import ConResNet

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "benchmarks"))
import gpu
import operations
import speed


def test_count_is_that_of_a_network_counted_by_hand():
    network = nn.Sequential(nn.Conv3d(2, 4, 1, bias=False), nn.ReLU(inplace=True))
    found = operations.count(network, (1, 2, 4, 5, 6), autocast=False)
    image, features, weights = 2 * 120 * 4, 4 * 120 * 4, 8 * 4
    assert found.operations == 2
    assert found.moved == (image + weights + features) + 2 * features
    assert found.kept == 0
    step = operations.count(network, (1, 2, 4, 5, 6), autocast=False, step=True)
    assert step.kept == image + features  # the convolution keeps its input, the activation its output
    assert step.operations == 4  # and the two of the backward pass
    half = operations.count(network, (1, 2, 4, 5, 6))
    assert half.operations == 4  # image and weights are cast
    assert half.moved == (image + weights) * 2 + features / 2 * 3


def small_network(**kwargs) -> ConResNet:
    return ConResNet(4, 3, channels=(8, 16), strides=(2,), blocks=(1, 1, 1), **kwargs)


@pytest.fixture
def small_networks(monkeypatch):
    names = "released structure", "ConResNet", "SegResNet (32)"
    monkeypatch.setattr(speed, "NETWORKS", dict.fromkeys(names, lambda size: small_network()))


def call(monkeypatch, out: Path, *options: str) -> list[dict[str, str]]:
    sizes = "--size 8 16 16 --small 8 8 8 --volume 12 16 16 --device cpu --quick --no-tests"
    monkeypatch.setattr(sys, "argv", [gpu.__file__, "--out", str(out), *sizes.split(), *options])
    gpu.main()
    path = out / "gpu.csv"
    return list(csv.DictReader(path.open(newline=""))) if path.is_file() else []


def test_gpu_command_goes_on_where_it_stopped(monkeypatch, tmp_path, small_networks):
    names = ["released structure, bf16", "ConResNet, bf16"]
    assert not call(monkeypatch, tmp_path, "--minutes", "-1", "--networks", *names)
    assert not list(tmp_path.glob("*.json"))
    rows = call(monkeypatch, tmp_path, "--networks", *names)
    assert [row["network"] for row in rows] == names
    assert "error" not in rows[0]
    for row in rows:
        numbers = [float(row[key]) for key in row if key.endswith(("(ms)", "(s)")) and "kernels" not in key]
        assert len(numbers) == 4
        assert min(numbers) > 0
        assert row["step, share of the bandwidth"].endswith(" %")
    assert float(rows[0]["step, times as fast as released"]) == 1
    assert "Completion of one case: prediction" in (tmp_path / "gpu.md").read_text()
    assert max(path.stat().st_size for path in tmp_path.iterdir()) < 2000

    monkeypatch.setattr(gpu.Session, "seconds", lambda self, run: 1 / 0)  # nothing is measured again
    names.append("SegResNet (32), bf16")
    again = call(monkeypatch, tmp_path, "--networks", *names)
    assert [{key: row[key] for key in rows[0]} for row in again[:2]] == rows
    assert again[2]["error"].startswith("ZeroDivisionError")


def test_gpu_command_compiles_the_small_step_in_two_modes(monkeypatch, tmp_path, small_networks):
    modes = []
    monkeypatch.setattr(gpu.torch, "compile", lambda network, mode="all sizes": modes.append(mode) or network)
    rows = call(monkeypatch, tmp_path, "--networks", *gpu.MODES)
    assert modes == ["all sizes", "default", "reduce-overhead"]
    assert [row["network"] for row in rows] == list(gpu.MODES)
    assert min(float(row["small step (ms)"]) for row in rows) > 0
    assert [row["step (ms)"] == "-" for row in rows] == [False, True]
    assert "error" not in rows[0]
    assert (tmp_path / "gpu.md").read_text().count("The first small step after torch.compile(mode=") == 2


def test_networks_of_the_gpu_command_are_those_of_speed():
    for name in gpu.NETWORKS:
        plain = name.removesuffix(speed.COMPILED).removesuffix(", reduce-overhead").removesuffix(", bf16")
        assert plain in speed.NETWORKS


def test_operations_of_the_network_stay_few():
    """Of the memory of the released structure, at 4 x 80 x 160 x 160: half in bf16, and half with use_checkpoint."""
    shape = (1, 4, 80, 160, 160)
    released = operations.count(speed.ReleasedStructure(), shape, step=True)
    ours = operations.count(ConResNet(4, 3), shape, step=True)
    assert ours.operations <= 400
    assert ours.kept < 0.5 * released.kept
    with_checkpoint = operations.count(ConResNet(4, 3, use_checkpoint=True), shape, autocast=False, step=True)
    without = operations.count(speed.ReleasedStructure(), shape, autocast=False, step=True)
    assert with_checkpoint.peak < 0.5 * without.peak
