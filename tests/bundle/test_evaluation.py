from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from monai.networks.nets import BasicUNet
from monai.transforms import Compose, Invertd, LoadImaged, Orientationd, SelectItemsd

from monai_conres import (
    BratsDiceMetric,
    BratsHausdorffDistanceMetric,
    BratsSurfaceDiceMetric,
    ConResNet,
    attach_conres,
)
from monai_conres.bundle import evaluation
from monai_conres.bundle.evaluation import CaseReport, MeanProbability, join_reports, load_networks, summarize
from monai_conres.bundle.structures import ProbabilityToLabeld
from monai_conres.files import check_writable


def test_mean_probability_against_each_network_by_hand():
    torch.manual_seed(0)
    networks = [torch.nn.Conv3d(2, 3, 3, padding=1) for _ in range(2)]
    image = torch.randn(1, 2, 5, 4, 6)
    for softmax, activation in ((False, torch.sigmoid), (True, lambda logits: logits.softmax(1))):
        predictor = MeanProbability(networks, softmax=softmax, flip_axes=[[0], [1, 2]])
        expected = sum(
            activation(network(image.flip(dims))).flip(dims) for network in networks for dims in ((), (2,), (3, 4))
        )
        torch.testing.assert_close(predictor(image), expected / 6)
        from_the_end = MeanProbability(networks, softmax=softmax, flip_axes=[[-3], [-2, -1]])
        torch.testing.assert_close(from_the_end(image), predictor(image), rtol=0, atol=0)
    with pytest.raises(ValueError, match="spatial_axis between -3 and 2"):
        MeanProbability(networks, flip_axes=[[3]])(image)
    with pytest.raises(ValueError, match="one network or more"):
        MeanProbability([])


def test_load_networks(tmp_path):
    network = torch.nn.Conv3d(1, 1, 1)
    paths = []
    for weight in (1.0, 2.0):
        paths.append(tmp_path / f"{weight}.pt")
        torch.save({"weight": torch.full((1, 1, 1, 1, 1), weight), "bias": torch.zeros(1)}, paths[-1])
    assert [loaded.weight.item() for loaded in load_networks(network, paths)] == [1.0, 2.0]
    with pytest.raises(ValueError, match=r"weights in .*none\.pt, found no file"):
        load_networks(network, [tmp_path / "none.pt"])
    with pytest.raises(ValueError, match=r"(?s)weights of this network in .*1\.0\.pt.*overrides"):
        load_networks(torch.nn.Conv3d(1, 2, 1), paths)


SWITCHES = {
    "strides": ((2, 2, 1),),
    "spatial_axis": 0,
    "attention": False,
    "align_corners": True,
    "fan_in_scaling": False,
    "norm": ("instance", {"eps": 1e-3}),
    "act": "leakyrelu",
    "inner_norm": False,
}


def test_one_file_of_weights_and_a_warning_where_nothing_is_known_of_its_training(tmp_path):
    network = torch.nn.Conv3d(1, 1, 1)
    torch.save(network.state_dict(), tmp_path / "model.pt")
    with pytest.warns(
        UserWarning,
        match=r"model\.pt\.json is not there, .*: whether .*model\.pt was trained with these settings cannot",
    ):
        (loaded,) = load_networks(torch.nn.Conv3d(1, 1, 1), str(tmp_path / "model.pt"))
    assert torch.equal(loaded.weight, network.weight)


def test_load_networks_compares_with_the_training(tmp_path):
    """``net.pt.json`` as the training writes it; weights without one load as they are."""
    small = {"channels": (8, 16), "strides": (2,), "blocks": (1, 1, 1), "norm": "instance"}
    network = ConResNet(1, 2, **small)
    path, settings = tmp_path / "net.pt", tmp_path / "net.pt.json"
    torch.save(network.state_dict(), path)
    others = [ConResNet(1, 2, **(small | {name: value})) for name, value in SWITCHES.items()]
    for other in others:
        load_networks(other, [path])  # nothing in the weights tells
    trained = {"training_cases": ["a", "b"], "modalities": ["t1", "t2"], "network": network.conres_settings}
    settings.write_text(json.dumps(trained))
    alike = {"spatial_axis": 2, "norm": ("INSTANCE", {}), "act": "relu"}
    load_networks(ConResNet(1, 2, **small | alike), [path], held_out=[{"name": "c"}], modalities=("t1", "t2"))
    for other, name in zip(others, SWITCHES, strict=True):
        with pytest.raises(ValueError, match=rf"expected {name} .*net\.pt was trained, got"):
            load_networks(other, [path])
    with pytest.raises(ValueError, match=r"modalities \['t1', 't2'\], with which .*, got \['t2', 't1'\]"):
        load_networks(network, [path], modalities=["t2", "t1"])
    with pytest.raises(ValueError, match=r"net\.pt was not trained with, got \['b'\], 1 of 2 in all; .*fold"):
        load_networks(network, [path], held_out=[{"name": "b"}, {"name": "c"}])
    for broken in ("{", "[]", '{"training_cases": 1}'):
        settings.write_text(broken)
        with pytest.raises(ValueError, match=r"settings of a training in .*net\.pt\.json, cannot read it"):
            load_networks(network, [path])


def test_settings_of_other_kinds_of_network():
    baseline = [ConResNet(1, 2, mapping=False, attention=False, spatial_axis=axis) for axis in (0, 1)]
    assert baseline[0].conres_settings == baseline[1].conres_settings  # it has none
    backbone = BasicUNet(out_channels=2, features=(8, 8, 16, 32, 64, 8))
    settings = attach_conres(backbone, 1, 2, spatial_axis=0, spatial_size=(32,) * 3).conres_settings
    assert settings["spatial_axis"] == 0
    assert settings["stages"] == ["upcat_4", "upcat_3", "upcat_2", "upcat_1"]


class Threshold(torch.nn.Module):
    """1 where the image's first channel is above 10: a prediction that is known."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return (image[:, :1] > 10).float()


def write_report(folder: Path, cases: list[dict[str, str]], **kwargs) -> None:
    """Of cases as they are stored."""
    structures = {"lesion": (3,)}
    SupervisedEvaluator(
        device="cpu",
        val_data_loader=DataLoader(Dataset(cases, LoadImaged("image", ensure_channel_first=True)), batch_size=1),
        network=Threshold(),
        postprocessing=ProbabilityToLabeld("pred", structures),
        val_handlers=[CaseReport(folder, cases, structures, **kwargs)],
    ).run()


@pytest.fixture
def cases(tmp_path):
    """Two cases in LPS orientation with thick slices; the second has no label."""
    affine = np.diag([-1.0, -1.0, 2.5, 1.0])
    cases = []
    for number in range(2):
        image = np.random.default_rng(number).uniform(0, 9, (9, 8, 7)).astype(np.float32)
        image[2:6, 3:7, 1:5] = 20
        label = np.zeros((9, 8, 7), np.uint8)
        label[2:6, 3:7, 1:4] = 3  # a thick slice less
        files = {"image": tmp_path / f"{number}_image.nii.gz", "label": tmp_path / f"{number}_label.nii.gz"}
        nib.save(nib.Nifti1Image(image, affine), files["image"])
        nib.save(nib.Nifti1Image(label, affine), files["label"])
        cases.append({"name": f"case{number}", **{key: str(file) for key, file in files.items()}})
    del cases[1]["label"]
    return cases


def test_case_report(tmp_path, cases):
    structures = {"lesion": (3,)}
    preparation = Compose(
        [
            SelectItemsd(["image", "name"]),
            LoadImaged("image", ensure_channel_first=True),
            Orientationd("image", axcodes="SRA", labels=None),  # every axis moves
        ]
    )
    out = tmp_path / "out"
    evaluator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=DataLoader(Dataset(cases, preparation), batch_size=1),
        network=Threshold(),
        postprocessing=Compose(
            [ProbabilityToLabeld("pred", structures), Invertd("pred", preparation, orig_keys="image")]
        ),
        val_handlers=[CaseReport(out, cases, structures)],
    )
    evaluator.run()
    assert sorted(file.name for file in out.iterdir()) == [
        "case0.nii.gz",
        "case0.png",
        "case1.nii.gz",
        "case1.png",
        "cases.csv",
        "summary.json",
    ]
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
    spacing = (1, 1, 2.5)
    assert row["case"] == "case0"
    assert float(row["Dice lesion"]) == pytest.approx(2 * 48 / (48 + 64))
    for name, metric in (("HD95", BratsHausdorffDistanceMetric()), ("NSD", BratsSurfaceDiceMetric(tolerance=1))):
        assert float(row[f"{name} lesion"]) == pytest.approx(metric(predicted, label, spacing=spacing).item())
    assert evaluator.state.metrics["mean_dice"] == pytest.approx(BratsDiceMetric()(predicted, label).item())
    assert json.loads((out / "summary.json").read_text())["Dice lesion"]["cases"] == 1


@pytest.mark.parametrize("shape", [(9, 8, 7, 2), (9, 8, 1)], ids=["two channels", "one slice"])
def test_a_report_of_unusual_scans(tmp_path, shape):
    affine = np.diag([-1.0, -1.0, 2.5, 1.0])
    image = np.random.default_rng(0).uniform(0, 9, shape).astype(np.float32)
    image[2:6, 3:7] = 20
    nib.save(nib.Nifti1Image(image, affine), tmp_path / "image.nii.gz")
    cases = [{"name": "case", "image": str(tmp_path / "image.nii.gz")}]
    write_report(tmp_path / "out", cases)
    prediction = nib.load(tmp_path / "out" / "case.nii.gz")
    expected = np.zeros(shape[:3])
    expected[2:6, 3:7] = 3
    np.testing.assert_array_equal(np.asarray(prediction.dataobj), expected)
    np.testing.assert_allclose(prediction.affine, affine)
    assert [int(prediction.header[code]) for code in ("qform_code", "sform_code")] == [2, 2]
    np.testing.assert_allclose(prediction.get_qform(), affine, atol=1e-6)
    assert prediction.header.get_xyzt_units()[0] == "mm"


@pytest.mark.parametrize("codes", [(2, 3), (0, 4), (0, 0)])
def test_the_space_of_the_scan_stays(tmp_path, codes):
    """A template's, for instance: the code of the affine that readers take, of sform before qform."""
    scan = nib.Nifti1Image(np.random.default_rng(0).uniform(0, 9, (9, 8, 7)).astype(np.float32), None)
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    scan.set_sform(affine, code=codes[0])
    scan.set_qform(affine, code=codes[1])
    scan.header.set_zooms((1, 2, 3))
    nib.save(scan, tmp_path / "scan.nii.gz")
    write_report(tmp_path / "out", [{"name": "scan", "image": str(tmp_path / "scan.nii.gz")}])
    header = nib.load(tmp_path / "out" / "scan.nii.gz").header
    expected = next((code for code in codes if code), 1)
    assert (int(header["sform_code"]), int(header["qform_code"])) == (expected, expected)


def test_no_scan_is_written_over(tmp_path, cases):
    before = {file: file.read_bytes() for file in tmp_path.glob("*.nii*")}
    named = [{**case, "name": Path(case["image"]).name.removesuffix(".nii.gz")} for case in cases]
    with pytest.raises(
        ValueError, match=r"another folder .*, where that of 0_image would take the place of .*0_image\.nii"
    ):
        write_report(tmp_path, named)
    (tmp_path / "link").symlink_to(tmp_path)
    other = [{"name": "1_LABEL", "image": cases[0]["image"]}, {"name": "c", "image": str(tmp_path / "1_label.nii")}]
    with pytest.raises(ValueError, match=r"that of 1_LABEL would take the place of .*1_label\.nii, or its name"):
        CaseReport(tmp_path / "link", other, {"lesion": (3,)})
    assert {file: file.read_bytes() for file in tmp_path.glob("*.nii*")} == before
    write_report(tmp_path, named, full=False)  # writes no prediction


def test_a_report_without_pictures(tmp_path, cases):
    write_report(tmp_path / "out", cases, pictures=False)
    files = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert files == ["case0.nii.gz", "case1.nii.gz", "cases.csv", "summary.json"]


def test_a_report_that_is_not_full_has_the_dice_alone(tmp_path, cases):
    write_report(tmp_path / "out", cases, full=False)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["cases.csv", "summary.json"]
    (row,) = csv.DictReader((tmp_path / "out" / "cases.csv").open())
    assert list(row) == ["case", "Dice lesion"]
    assert float(row["Dice lesion"]) == pytest.approx(2 * 48 / (48 + 64))


def test_a_process_without_a_case_is_an_error(tmp_path, cases):
    with pytest.raises(ValueError, match="a case for each process"):
        SupervisedEvaluator(
            device="cpu",
            val_data_loader=DataLoader(Dataset([]), batch_size=1),
            network=Threshold(),
            val_handlers=[CaseReport(tmp_path, cases, {"lesion": (3,)})],
        )


def test_interval_covers_the_mean_about_95_times_in_100():
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        rows = [{"case": str(i), "Dice": value} for i, value in enumerate(random.normal(0.8, 0.1, 30))]
        low, high = summarize(rows)["Dice"]["interval"]
        covered += low < 0.8 < high
    assert 180 <= covered <= 198


def test_join_reports(tmp_path, monkeypatch, capsys):
    for fold, dice in enumerate((0.5, 0.75)):
        (tmp_path / f"{fold}.csv").write_text(f"case,Dice ET\ncase{fold},{dice}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["evaluation", "0.csv", "1.csv", "--out", "all"])
    evaluation._main()
    assert "| Dice ET | 0.6250 | 0.5000 to 0.7500 | 0.5000 | 0.7500 |" in capsys.readouterr().out
    assert len((tmp_path / "all" / "cases.csv").read_text().splitlines()) == 3
    with pytest.raises(ValueError, match=r"'case0'.* more than once"):
        join_reports([tmp_path / "0.csv", tmp_path / "0.csv"], tmp_path / "twice")
    (tmp_path / "other.csv").write_text("case,Dice WT\na,1\n")
    with pytest.raises(ValueError, match=r"columns of .*0\.csv, got others in .*other\.csv"):
        join_reports([tmp_path / "0.csv", tmp_path / "other.csv"], tmp_path / "all")
    with pytest.raises(ValueError, match=r"cannot read .*none\.csv"):
        join_reports([tmp_path / "none.csv"], tmp_path / "all")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to .*file/out"):
        check_writable(tmp_path / "file" / "out")
    check_writable(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_the_networks_of_the_package_average(tmp_path):
    torch.manual_seed(0)
    network = ConResNet(1, 2, channels=(8, 16), strides=(2,), blocks=(1, 1, 1)).eval()
    torch.save(network.state_dict(), tmp_path / "model.pt")
    image = torch.randn(1, 1, 8, 10, 6)
    predictor = MeanProbability(load_networks(network, [tmp_path / "model.pt"] * 2)).eval()
    torch.testing.assert_close(predictor(image), network(image).sigmoid())
