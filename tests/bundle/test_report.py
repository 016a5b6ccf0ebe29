from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from monai.metrics import DiceMetric
from monai.transforms import Compose, Invertd, Orientationd, SelectItemsd

from monai_conres import BratsHausdorffDistanceMetric, BratsSurfaceDiceMetric
from monai_conres.bundle import CaseReport, ProbabilityToLabeld, join_reports, summarize
from monai_conres.bundle.__main__ import main
from monai_conres.volumes import LoadScand

STRUCTURES = {"lesion": (3,)}


class Threshold(torch.nn.Module):
    """1 where the image's first channel is above 10, so that the prediction is known."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return (image[:, :1] > 10).float()


def evaluate(folder: Path, cases: list[dict[str, str]], axes: str = "SRA", **kwargs) -> SupervisedEvaluator:
    """Report cases whose every axis moves in the preprocessing."""
    preparation = Compose(
        [
            SelectItemsd(["image", "name"]),
            LoadScand("image"),
            Orientationd("image", axcodes=axes, labels=None),
        ]
    )
    inverted = [ProbabilityToLabeld("pred", STRUCTURES), Invertd("pred", preparation, orig_keys="image")]
    evaluator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=DataLoader(Dataset(cases, preparation), batch_size=1),
        network=Threshold(),
        postprocessing=Compose(inverted),
        val_handlers=[CaseReport(folder, cases, STRUCTURES, **kwargs)],
    )
    evaluator.run()
    return evaluator


@pytest.fixture
def cases(tmp_path):
    """Two cases in LPS orientation with thick slices. The second one has no label."""
    affine = np.diag([-1.0, -1.0, 2.5, 1.0])
    cases = []
    for number in range(2):
        image = np.random.default_rng(number).uniform(0, 9, (9, 8, 7)).astype(np.float32)
        image[2:6, 3:7, 1:5] = 20
        label = np.zeros((9, 8, 7), np.uint8)
        label[2:6, 3:7, 1:4] = 3  # one slice less
        files = {"image": tmp_path / f"{number}_image.nii.gz", "label": tmp_path / f"{number}_label.nii.gz"}
        nib.save(nib.Nifti1Image(image, affine), files["image"])
        nib.save(nib.Nifti1Image(label, affine), files["label"])
        cases.append({"name": f"case{number}", **{key: str(file) for key, file in files.items()}})
    del cases[1]["label"]
    return cases


def test_report_writes_and_measures_each_case(tmp_path, cases):
    out = tmp_path / "out"
    evaluator = evaluate(out, cases)
    names = ["case0.nii.gz", "case0.png", "case1.nii.gz", "case1.png", "cases.csv", "summary.json"]
    assert sorted(file.name for file in out.iterdir()) == names
    for number in range(2):
        image, prediction = nib.load(cases[number]["image"]), nib.load(out / f"case{number}.nii.gz")
        np.testing.assert_array_equal(np.asarray(prediction.dataobj), 3 * (np.asarray(image.dataobj) > 10))
        np.testing.assert_allclose(prediction.affine, image.affine)
        assert prediction.get_data_dtype() == np.uint8
        assert imread(out / f"case{number}.png")[..., :3].std() > 0.05

    (row,) = csv.DictReader((out / "cases.csv").open())
    predicted, label = (
        torch.from_numpy(np.asarray(nib.load(file).dataobj) == 3)[None, None].float()
        for file in (out / "case0.nii.gz", cases[0]["label"])
    )
    assert row["case"] == "case0"
    assert float(row["Dice lesion"]) == pytest.approx(2 * 48 / (48 + 64))
    for name, metric in (("HD95", BratsHausdorffDistanceMetric()), ("NSD", BratsSurfaceDiceMetric(tolerance=1))):
        assert float(row[f"{name} lesion"]) == pytest.approx(metric(predicted, label, spacing=(1, 1, 2.5)).item())
    dice = DiceMetric(ignore_empty=False)(predicted, label).item()
    assert evaluator.state.metrics["mean_dice"] == pytest.approx(dice)
    assert json.loads((out / "summary.json").read_text())["Dice lesion"]["cases"] == 1


@pytest.mark.parametrize(("inside", "dice"), [(0, 1.0), (20, 0.0)], ids=["both empty", "false positives"])
def test_report_counts_empty_labels(tmp_path, cases, inside, dice):
    for key in ("image", "label"):
        volume = nib.load(cases[0][key])
        array = np.zeros(volume.shape, np.float32)
        array[1, 1, 1] = inside if key == "image" else 0
        nib.save(nib.Nifti1Image(array, volume.affine), cases[0][key])
    evaluate(tmp_path / "out", cases[:1], full=False)
    (row,) = csv.DictReader((tmp_path / "out" / "cases.csv").open())
    assert float(row["Dice lesion"]) == dice


@pytest.mark.parametrize("shape", [(9, 8, 7, 2), (9, 8, 1)], ids=["two channels", "one slice"])
def test_report_of_unusual_scans(tmp_path, shape):
    affine = np.diag([-1.0, -1.0, 2.5, 1.0])
    image = np.random.default_rng(0).uniform(0, 9, shape).astype(np.float32)
    image[2:6, 3:7] = 20
    nib.save(nib.Nifti1Image(image, affine), tmp_path / "image.nii.gz")
    evaluate(tmp_path / "out", [{"name": "case", "image": str(tmp_path / "image.nii.gz")}])
    prediction = nib.load(tmp_path / "out" / "case.nii.gz")
    expected = np.zeros(shape[:3])
    expected[2:6, 3:7] = 3
    np.testing.assert_array_equal(np.asarray(prediction.dataobj), expected)
    np.testing.assert_allclose(prediction.affine, affine)


def test_predictions_do_not_replace_scans(tmp_path, cases):
    before = {file: file.read_bytes() for file in tmp_path.glob("*.nii*")}
    (tmp_path / "link").symlink_to(tmp_path)
    for folder in (tmp_path, tmp_path / "link", tmp_path / "a" / ".."):
        with pytest.raises(ValueError, match=r"a folder for the results only, got .*, which has 0_image\.nii"):
            CaseReport(folder, cases, STRUCTURES)
    (tmp_path / "others").mkdir()
    shutil.copy(cases[0]["label"], tmp_path / "others" / "z.nii.gz")
    with pytest.raises(ValueError, match=r"for the predictions only, got .*others, whose z\.nii\.gz is none"):
        CaseReport(tmp_path / "others", cases, STRUCTURES)
    assert {file: file.read_bytes() for file in tmp_path.glob("*.nii*")} == before
    evaluate(tmp_path, cases, full=False)  # writes no prediction


def test_report_leaves_out_pictures_and_distances(tmp_path, cases):
    evaluate(tmp_path / "a", cases, pictures=False)
    assert not list((tmp_path / "a").glob("*.png"))
    evaluate(tmp_path / "b", cases, full=False)
    assert sorted(file.name for file in (tmp_path / "b").iterdir()) == ["cases.csv", "summary.json"]
    (row,) = csv.DictReader((tmp_path / "b" / "cases.csv").open())
    assert list(row) == ["case", "Dice lesion"]


def test_interval_covers_the_mean_95_times_in_100():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        rows = [{"case": str(i), "Dice": value} for i, value in enumerate(generator.normal(0.8, 0.1, 30))]
        low, high = summarize(rows)["Dice"]["interval"]
        covered += low < 0.8 < high
    assert 180 <= covered <= 198


def test_command_joins_reports(tmp_path, monkeypatch, capsys):
    for fold, dice in enumerate((0.5, 0.75)):
        (tmp_path / f"{fold}.csv").write_text(f"case,Dice ET\ncase{fold},{dice}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["bundle", "0.csv", "1.csv", "--out", "all"])
    main()
    assert "| Dice ET | 0.6250 | 0.5000 to 0.7500 | 0.5000 | 0.7500 |" in capsys.readouterr().out
    assert len((tmp_path / "all" / "cases.csv").read_text().splitlines()) == 3


def test_join_reports_does_not_replace_a_table_of_a_run(tmp_path):
    table = tmp_path / "fold0" / "cases.csv"
    table.parent.mkdir()
    table.write_text("case,Dice ET\na,0.5\n")
    with pytest.raises(ValueError, match=r"a new folder for the joined table, got .*fold0, whose table would be"):
        join_reports([table], tmp_path / "all" / ".." / "fold0")
    assert table.read_text() == "case,Dice ET\na,0.5\n"


def test_join_reports_names_the_table_with_an_error(tmp_path):
    (tmp_path / "0.csv").write_text("case,Dice ET\ncase0,0.5\n")
    (tmp_path / "other.csv").write_text("case,Dice WT\na,1\n")
    for other, message in (
        ("0.csv", r"'case0'.* more than once"),
        ("other.csv", r"columns of .*0\.csv, got others in .*other\.csv"),
        ("none.csv", r"No such file .*none\.csv"),
    ):
        with pytest.raises((OSError, ValueError), match=message):
            join_reports([tmp_path / "0.csv", tmp_path / other], tmp_path / "all")


def test_distances_that_are_not_known_do_not_count():
    rows = [{"case": name, "HD95": value, "NSD": np.nan} for name, value in zip("abc", (1.0, np.nan, 3.0), strict=True)]
    summary = summarize(rows)
    assert summary.keys() == {"HD95"}
    assert [summary["HD95"][key] for key in ("mean", "min", "max", "cases")] == [2, 1, 3, 2]
    assert json.dumps(summary, allow_nan=False)
