"""From a few drawn slices of each scan to finished volumes: the example, and what the bundles need for such labels."""

from __future__ import annotations

import csv
import runpy
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor

from monai_conres import ConResNet, ConResOutput, complete_scan
from monai_conres.__main__ import main
from monai_conres.bundle import CaseReport, labelled_slices, read_decathlon
from monai_conres.completion import fit_completion
from monai_conres.files import ScanSettings, load_network, save_network
from monai_conres.phantom import write_phantom_brats, write_phantom_dataset

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = ("--iterations", "2", "--channels", "8", "8", "16", "--max-voxels", "8000", "--device", "cpu")


@pytest.fixture
def run(monkeypatch, capsys):
    def run_script(*arguments: str | Path, script: str = "few_slices.py") -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    return run_script


def voxels(file: Path) -> np.ndarray:
    return np.asarray(nib.load(file).dataobj)


def test_few_slices_gives_finished_volumes_that_keep_what_is_drawn(run, tmp_path):
    write_phantom_dataset(tmp_path / "Task00_Phantom", cases=2, size=(16, 20, 14))
    printed = run("--out", tmp_path, "--rounds", "2", *SMALL)
    assert "4 of 14 slices along the third axis have labels: " in printed
    assert printed.count("Dice where nothing is drawn: network ") == 2  # of two rounds
    files = sorted((tmp_path / "completed").glob("*.nii.gz"))
    assert len(files) == 2
    for file in files:
        completed = voxels(file)
        drawn, whole = (
            voxels(tmp_path / folder / "labelsTr" / file.name) for folder in ("Task00_Drawn", "Task00_Phantom")
        )
        known = drawn != 255
        assert sorted({number for number in range(14) if known[..., number].any()}) == [2, 3, 9, 10]
        np.testing.assert_array_equal(drawn[known], whole[known])
        np.testing.assert_array_equal(completed[known], drawn[known])
        assert completed.max() <= 3
    assert load_network(tmp_path / "round2").training["round"] == 2


def test_few_slices_takes_slices_along_any_axis(run, tmp_path):
    """Three orthogonal slices of each scan, in files that are not stored in RAS."""
    data = tmp_path / "Task01_Planes"
    write_phantom_dataset(data, cases=2, size=(16, 20, 14))
    for file in data.glob("*Tr/*.nii.gz"):
        image = nib.load(file)
        values = voxels(file)
        if "labels" in str(file):
            planes = np.full_like(values, 255)
            planes[7], planes[:, 9], planes[..., 6] = values[7], values[:, 9], values[..., 6]
            values = planes
        turned = nib.Nifti1Image(
            np.swapaxes(values, 0, 2)[::-1], image.affine[:, [2, 1, 0, 3]] @ np.diag([-1, 1, 1, 1])
        )
        nib.save(turned, file)
    printed = run("--data", data, "--out", tmp_path / "out", *SMALL)
    planes = " and ".join(f"1 of {n} slices along the {axis} axis" for n, axis in ((14, "first"), (20, "second")))
    assert f"{planes} and 1 of 16 slices along the third axis have labels: " in printed
    for file in (tmp_path / "out" / "completed").glob("*.nii.gz"):
        drawn, completed = voxels(data / "labelsTr" / file.name), voxels(file)
        assert completed.shape == (14, 20, 16)
        np.testing.assert_array_equal(completed[drawn != 255], drawn[drawn != 255])
        assert completed.max() <= 3


def test_few_slices_refuses_scans_without_a_label(run, tmp_path):
    data = tmp_path / "Task01_Empty"
    write_phantom_dataset(data, cases=2, size=(12, 14, 10))
    for file in data.glob("labelsTr/*.nii.gz"):
        label = nib.load(file)
        nib.save(nib.Nifti1Image(np.full(label.shape, 255, np.uint8), label.affine), file)
    with pytest.raises(SystemExit, match=r"expected a voxel with a label in .*labelsTr.*, got only 255"):
        run("--data", data, "--out", tmp_path, *SMALL)


@pytest.mark.parametrize("value", [1, -1, 300])
def test_data_check_refuses_ignore_values_of_classes_or_no_label_file(tmp_path, value):
    write_phantom_dataset(tmp_path / "data", cases=2, size=(12, 14, 10))
    once = rf"^expected ignore_index up to 255 that is none of \[0, 1, 2, 3\], got {value}; give [^;]*, such as 255\.$"
    with pytest.raises(ValueError, match=once):  # not for each case
        read_decathlon(tmp_path / "data").check(ignore_index=value, progress=False)


def test_labelled_slices_counts_drawn_slices_along_each_axis():
    label = torch.full((1, 4, 5, 8), 255)
    label[:, 1:3, 2] = 0  # parts of one slice
    assert labelled_slices(label, 255) == "1 of 5 slices along the second axis, 10.0 % of the voxels"
    label[:, :, 2] = 0
    label[..., 3:5] = 1
    expected = "1 of 5 slices along the second axis and 2 of 8 slices along the third axis, 40.0 % of the voxels"
    assert labelled_slices(label, 255) == expected
    assert labelled_slices(label.clamp(max=1), 255) == "4 of 4 slices along the first axis, 100.0 % of the voxels"


# bundles and quick start


def keep_slices(folder: Path, *numbers: int) -> None:
    """Only some slices of each label keep their values; the others have the value 255."""
    for file in [*folder.rglob("labelsTr/*.nii.gz"), *folder.rglob("*_seg.nii.gz")]:
        label = nib.load(file)
        values = np.full(label.shape, 255, np.uint8)
        values[..., list(numbers)] = np.asarray(label.dataobj)[..., list(numbers)]
        nib.save(nib.Nifti1Image(values, label.affine), file)


def training_data(bundle: str, folder: Path, **options) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config(EXAMPLES / "bundles" / bundle / "configs" / "train.yaml")
    options |= {"dataset_dir": str(folder), "device": "cpu", "rank": 0, "world_size": 1, "network_def#in_channels": 4}
    parser.update({**options, "ignore": 255, "progress": False})
    return parser


@pytest.mark.parametrize("bundle", ["brats_conresnet", "hippocampus_conresnet"])
def test_bundles_ignore_what_is_not_drawn_and_what_padding_brings_in(bundle, tmp_path, capsys):
    data = tmp_path / "data"
    if bundle == "brats_conresnet":
        write_phantom_brats(data, cases=3, size=(16, 20, 14))
        options = {"hold_out": 1}
    else:
        write_phantom_dataset(data, cases=6, size=(16, 20, 14))
        options = {"network_def#out_channels": 4}
    keep_slices(data, 5, 6, 9)
    parser = training_data(bundle, data, patch_size=[24, 24, 16], cache_rate=0.0, **options)
    parser.get_parsed_content("check")
    assert "3 of 14 slices along the third axis have labels: " in capsys.readouterr().out
    dataset = parser.get_parsed_content("train#dataset")
    loss = parser.get_parsed_content("joint_loss")
    for epoch in range(2):
        dataset.set_epoch(epoch)
        (sample,) = dataset[0]
        label = sample["label"]
        labelled = label != 255
        assert (labelled == labelled[:1]).all()  # the same voxels in each channel
        share = labelled[0].flatten(0, 1).any(0)
        assert 0 < int(share.sum()) <= 8  # three slices, which zoom and rotation spread
        assert set(label.unique().tolist()) <= {0, 1, 2, 3, 255}
        assert labelled.float().mean() < 0.35
        channels = 4 if len(label) == 1 else 3
        residual = torch.randn(1, 3, *label.shape[1:], requires_grad=True)
        output = ConResOutput(torch.randn(1, channels, *label.shape[1:], requires_grad=True), (residual,))
        loss(output, label[None]).backward()
        ignored = ~labelled[:1].expand(channels, -1, -1, -1)[None]
        assert not output.segmentation.grad[ignored].any()
        assert output.segmentation.grad.any()


def test_report_of_drawn_slices_counts_them_only(tmp_path):
    label = torch.full((1, 10, 12, 8), 255.0)
    label[..., 3:5] = 0
    label[:, 2:6, 3:9, 3:5] = 1
    prediction = torch.ones(1, 10, 12, 8)  # wrong in every slice that is not drawn
    prediction[..., 3:5] = label[..., 3:5]
    report = CaseReport(tmp_path, [], {"tumor": (1,)}, ignore_index=255)
    row = report._measure(MetaTensor(prediction), label)
    assert row == {"Dice tumor": 1, "HD95 tumor": 0, "NSD tumor": 1}
    prediction[:, 2, 3:9, 3:5] = 0  # of 4 x 6 pixels in two slices
    row = report._measure(MetaTensor(prediction), label)
    assert row["Dice tumor"] == pytest.approx(2 * 36 / (36 + 48))
    assert row["HD95 tumor"] == 1


@pytest.mark.slow
def test_quickstart_scores_labelled_voxels_only(run, tmp_path):
    data = tmp_path / "Task01_Drawn"
    write_phantom_dataset(data, cases=4, size=(16, 20, 14))
    keep_slices(data, 5, 6, 9)
    out = tmp_path / "out"
    printed = run("--data", data, "--out", out, "--ignore", "255", "--cases", "2", *SMALL, script="quickstart.py")
    assert "3 of 14 slices along the third axis have labels: " in printed
    rows = list(csv.DictReader((out / "cases.csv").open()))
    row = rows[-1]
    trained = load_network(out / row["network"])
    assert all(np.isfinite(float(value)) for key, value in row.items() if key.startswith(("Dice", "HD95")) and value)
    # the Dice of a class, computed again from the files
    scan = trained.scans.preprocessing()({"image": data / "imagesTr" / f"{row['case']}.nii.gz"})["image"]
    with torch.no_grad():
        logits = trained.scans.inferer()(scan[None], trained.network)[0]
    predicted = trained.scans.to_labels(trained.scans.to_scan(logits, scan))[0].numpy()
    label = voxels(data / "labelsTr" / f"{row['case']}.nii.gz")
    one, other = ((part == 1)[label != 255] for part in (predicted, label))
    assert float(row["Dice edema"]) == pytest.approx(2 * (one & other).sum() / (one.sum() + other.sum()), abs=2e-3)


def test_quickstart_has_no_score_where_no_voxel_counts():
    script = runpy.run_path(str(EXAMPLES / "quickstart.py"), run_name="quickstart")
    empty = torch.zeros(1, 2, 3, 4, 5)
    counted = torch.zeros(1, 3, 4, 5, dtype=torch.bool)
    rows = [{"network": "a", "case": "1", "Dice": script["mean_dice"](empty, empty, counted)}]
    assert "| Dice | - |" in script["table"](rows, {"a": {}})
    rows.append({"network": "a", "case": "2", "Dice": script["mean_dice"](empty, empty, ~counted)})
    assert "| Dice | 1.000 |" in script["table"](rows, {"a": {}})


def test_completion_reads_labels_with_ignored_slices(tmp_path):
    """A drawn slice may be empty, and slices with 255 are not drawn."""
    data = tmp_path / "data"
    write_phantom_dataset(data, cases=1, size=(16, 20, 14))
    image, drawn = (next((data / folder).glob("*.nii.gz")) for folder in ("imagesTr", "labelsTr"))
    whole = voxels(drawn).copy()
    keep_slices(data, 0, 6)
    assert not whole[..., 0].any()  # above the tumor
    network = ConResNet(4, 4, include_background=False, channels=(8, 8), strides=(2,), blocks=(1, 1, 1))
    classes = {"edema": [1], "necrosis": [2], "enhancing tumor": [3]}
    scans = ScanSettings(channels=list("abcd"), patch_size=(16, 16, 8), classes=classes, activation="softmax")
    save_network(tmp_path / "run", network, scans)
    files = ["--network", tmp_path / "run", "--image", image, "--drawn", drawn, "--out", tmp_path / "out.nii.gz"]
    main(["complete", *map(str, files), "--ignore", "255", "--device", "cpu"])
    completed = voxels(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(completed[..., [0, 6]], whole[..., [0, 6]])
    trained = load_network(tmp_path / "run")
    assert complete_scan(trained, image, drawn, ignore_index=255).slices == [0, 6]
    settings = fit_completion(trained, [{"image": image, "label": drawn}], ignore_index=255)
    assert np.isfinite([settings.tau, *settings.offset]).all()
    with pytest.raises(ValueError, match="expected ignore_index up to 255 that is none of"):
        complete_scan(trained, image, drawn, ignore_index=2)
    half = nib.load(drawn)
    values = np.asarray(half.dataobj).copy()
    values[:8, :, 6] = 255
    nib.save(nib.Nifti1Image(values, half.affine), tmp_path / "half.nii.gz")
    with pytest.raises(ValueError, match=r"slices to be drawn along the third .* got 255 in some voxels of \[6\]; "):
        complete_scan(trained, image, tmp_path / "half.nii.gz", ignore_index=255)


def test_interrupted_phantoms_leave_no_whole_labels(tmp_path, monkeypatch):
    write_phantom_dataset(tmp_path / "whole", cases=2, size=(12, 14, 10))
    script = runpy.run_path(str(EXAMPLES / "few_slices.py"))

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setitem(script["keep_few_slices"].__globals__, "write_label_map", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script["keep_few_slices"](tmp_path / "drawn", tmp_path / "whole", 255)
    assert not (tmp_path / "drawn").exists()
