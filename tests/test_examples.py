"""The scripts of examples/, run as a user would, on small data."""

from __future__ import annotations

import csv
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import pytest
import torch
from matplotlib.image import imread
from monai.networks import nets

from monai_conres.files import load_network
from monai_conres.phantom import write_phantom_dataset

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = ("--iterations", "3", "--channels", "8", "8", "16", "--max-voxels", "8000")


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., str]:
    """Run a script and return what it prints."""

    def run_script(script: str, *arguments: str | Path) -> str:
        file = EXAMPLES / script
        monkeypatch.syspath_prepend(file.parent)
        monkeypatch.setattr(sys, "argv", [str(file), *map(str, arguments)])
        runpy.run_path(str(file), run_name="__main__")
        return capsys.readouterr().out

    return run_script


def table(text: str) -> dict[str, list[str]]:
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0].strip(): [value.strip() for value in row[1:]] for row in rows}


def check_quickstart(out: Path, printed: str, cases: int, pictures: int) -> None:
    text = (out / "table.md").read_text()
    assert text in printed
    values = table(text)
    rows = list(csv.DictReader((out / "cases.csv").open()))
    assert len(rows) == 2 * cases
    for key in [key for key in rows[0] if key.startswith(("Dice", "HD95")) and "predicted" not in key]:
        for column, network in enumerate(("baseline", "ConResNet")):
            mean = sum(float(row[key]) for row in rows if row["network"] == network) / cases
            assert float(values[key][column]) == pytest.approx(mean, abs=5e-4)
            assert mean >= 0
    parameters = [int(value.replace(",", "")) for value in values["parameters"]]
    assert 0 < parameters[0] < parameters[1]
    files = list(out.glob("*.png"))
    assert len(files) == pictures
    assert all(imread(file)[..., :3].std() > 0.05 for file in files)
    assert not list(out.glob(".*"))


def test_quickstart_on_phantoms(run, tmp_path):
    printed = run("quickstart.py", "--out", tmp_path, "--cases", "2", *SMALL)
    check_quickstart(tmp_path, printed, cases=2, pictures=2)
    for name, context in (("baseline", "none"), ("ConResNet", "attention")):
        trained = load_network(tmp_path / name)
        assert trained.network.arguments["context"] == context
        assert len(trained.training["cases"]) == 2
        assert trained.scans.classes == {"edema": (1,), "necrosis": (2,), "enhancing tumor": (3,)}
    # the row of a case, computed again from the saved network
    row = list(csv.DictReader((tmp_path / "cases.csv").open()))[-1]
    folder = tmp_path / "Task00_Phantom"
    scan = trained.scans.preprocessing()({"image": folder / "imagesTr" / f"{row['case']}.nii.gz"})["image"]
    with torch.no_grad():
        logits = trained.scans.inferer()(scan[None], trained.network)[0]
    predicted = trained.scans.to_labels(trained.scans.to_scan(logits, scan))[0].numpy()
    label = nib.load(folder / "labelsTr" / f"{row['case']}.nii.gz").get_fdata()
    for value, name in enumerate(("edema", "necrosis", "enhancing tumor"), start=1):
        sizes = (predicted == value).sum() + (label == value).sum()
        dice = 2 * ((predicted == value) & (label == value)).sum() / sizes
        assert float(row[f"Dice {name}"]) == pytest.approx(dice, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "classes"), [("Task04_Hippocampus", 2), ("CHAOS_T2SPIR", 4)])
def test_quickstart_on_real_data(run, real_data, tmp_path, task, classes):
    printed = run("quickstart.py", "--data", real_data / task, "--out", tmp_path, "--cases", "1", *SMALL)
    check_quickstart(tmp_path, printed, cases=1, pictures=1)
    assert sum(key.startswith("HD95") for key in table(printed)) == classes


def test_attach_unet(run, tmp_path):
    write_phantom_dataset(tmp_path / "data", cases=3, size=(32, 48, 32))
    options = ("--data", tmp_path / "data", "--out", tmp_path / "out", "--cases", "2", "--epochs", "1")
    dice = {}
    for name, plain in (("UNet", ["--plain"]), ("ConResWrapper", [])):
        (dice[name],) = re.findall(r"epoch 1: mean Dice (0\.\d+)", run("attach_unet.py", *options, *plain))
        trained = load_network(tmp_path / "out")
        assert type(trained.network).__name__ == name
        assert trained.network(torch.zeros(1, 4, 32, 48, 32)).shape == (1, 4, 32, 48, 32)
    assert dice["UNet"] != dice["ConResWrapper"]


def test_attach_cost(run, tmp_path):
    """The counts of one network equal the decoder's convolutions, counted by hand."""
    run("benchmarks/attach_cost.py", "--out", tmp_path, "--no-times", "--networks", "SegResNet (16)")
    (row,) = csv.DictReader((tmp_path / "attach_cost.csv").open())
    plain = sum(
        p.numel() for p in nets.SegResNet(3, 16, 4, 4, blocks_down=(1, 2, 2, 4), blocks_up=(1, 1, 1)).parameters()
    )
    assert float(row["parameters (M)"]) == pytest.approx(plain / 1e6, abs=0.005)
    # features 64, 32, 16; residual path 32, 32, 16: entries, inner, outer, gate of the first, heads
    per_voxel = [
        4 * 32 * 27 + 64 * 32 + 32 * 32 * 27 + 32 * 64 + 32 * 3,
        32 * 32 + 32 * 32 * 27 + 32 * 3,
        32 * 16 * 27 + 16 * 16 + 16 * 16 * 27 + 16 * 3,
    ]
    added = sum(macs * 128**3 / 8**scale for scale, macs in zip((2, 1, 0), per_voxel, strict=True))
    total = float(row["multiply-adds (1e9)"]) * 1e9
    assert float(row["multiply-adds, added"].removesuffix(" %")) == pytest.approx(100 * added / total, abs=0.3)


def test_quickstart_names_what_is_wrong_with_the_data(run, tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*dataset\.json"):
        run("quickstart.py", "--data", tmp_path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
