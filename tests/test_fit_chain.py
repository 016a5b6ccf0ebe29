"""Fitting the weights of the slice chain for a run folder, and the command for it."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_conres import ConResNet
from monai_conres.__main__ import main
from monai_conres.chain_training import fit_chain
from monai_conres.completion import complete_scan, fit_completion
from monai_conres.files import load_network, save_network
from monai_conres.scans import ScanSettings

SMALL = {"channels": (8, 16), "strides": ((2, 2, 1),), "blocks": (1, 1, 1)}
SIZE = (12, 14, 9)
FLIPPED = np.diag([-1.0, -1, -1, 1])


def write_cases(folder: Path, count: int = 3, *, codes: str = "RAS") -> None:
    """``images/NAME.nii.gz`` and ``labels/NAME.nii.gz``: noise in which a box moves from slice to slice."""
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    turn = nib.orientations.axcodes2ornt(codes)
    for number in range(count):
        random, label = np.random.default_rng(number), np.zeros(SIZE, np.uint8)
        for s in range(1, SIZE[2] - 1):
            label[1 + s // 2 : 6 + s // 2, 2 : 7 + number, s] = 1
            label[1 + s // 2 : 6 + s // 2, 10:13, s] = 4
        image = label + random.normal(0, 0.5, SIZE)
        for name, volume in (("images", image), ("labels", label)):
            upright = nib.Nifti1Image(volume, np.diag([1.0, 1.0, 3.0, 1.0]))
            nib.save(upright.as_reoriented(turn), folder / name / f"case{number}.nii.gz")


def write_run(folder: Path, activation: str = "softmax", **training) -> Path:
    scans = ScanSettings(
        channels=["T1"], patch_size=(12, 14, 9), classes={"a": [4], "b": [1]}, activation=activation, overlap=0.0
    )
    torch.manual_seed(0)
    network = ConResNet(1, scans.out_channels, include_background=activation == "sigmoid", **SMALL)
    save_network(folder, network, scans, training=training)
    return folder


def command(folder: Path, *options: str) -> list[str]:
    return ["fit-chain", "--network", str(folder / "run"), "--images", str(folder / "images"), *options]


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_fit_takes_the_networks_outputs_on_the_voxels_of_the_scan(tmp_path, activation):
    """The settings are those of the outputs by hand, and do not depend on how the files are stored."""
    trained = load_network(write_run(tmp_path / "run", activation))
    by_hand, fitted = [], []
    for codes in ("RAS", "LPS", "SLA"):
        write_cases(tmp_path / codes, codes=codes)
        files = [
            {key: tmp_path / codes / f"{key}s" / f"case{number}.nii.gz" for key in ("image", "label")}
            for number in range(3)
        ]
        fitted.append(fit_completion(trained, files))
    for number in range(3):
        image, label = (
            torch.from_numpy(nib.load(tmp_path / "RAS" / name / f"case{number}.nii.gz").get_fdata())[None, None].float()
            for name in ("images", "labels")
        )
        with torch.no_grad():
            segmentation, residual = trained.network.with_residual(image)
        masks = [label == 4, label == 1]
        target = torch.cat(masks, 1) if activation == "sigmoid" else masks[0] + 2 * masks[1].int()
        by_hand.append({"segmentation": segmentation, "residual": residual, "image": image, "label": target})
    expected = fit_chain(by_hand)
    for settings in fitted:
        assert settings.tau == pytest.approx(expected.tau, rel=1e-2)
        assert settings.image_contrast == pytest.approx(expected.image_contrast, abs=1e-2)
        assert settings.offset == pytest.approx(expected.offset, rel=1e-2)


def test_command_fits_training_cases_and_stores_the_weights(tmp_path, capsys):
    write_cases(tmp_path)
    run = write_run(tmp_path / "run", cases=["case0.nii.gz", "case2.nii.gz"])
    before = json.loads((run / "network.json").read_text())
    main([*command(tmp_path), "--labels", str(tmp_path / "labels")])
    printed = capsys.readouterr().out
    assert "case 1 of 2: case0\ncase 2 of 2: case2\n" in printed
    trained = load_network(run)
    assert {**before, "chain": json.loads((run / "network.json").read_text())["chain"]} == json.loads(
        (run / "network.json").read_text()
    )
    files = [
        {key: tmp_path / f"{key}s" / f"{name}.nii.gz" for key in ("image", "label")} for name in ("case0", "case2")
    ]
    assert asdict(trained.chain) == asdict(fit_completion(trained, files))
    assert f"tau: {trained.chain.tau}" in printed
    drawn = nib.load(tmp_path / "labels" / "case1.nii.gz")
    one = np.zeros(SIZE, np.uint8)
    one[..., 4] = np.asarray(drawn.dataobj)[..., 4]
    nib.save(nib.Nifti1Image(one, drawn.affine), tmp_path / "drawn.nii.gz")
    assert complete_scan(trained, tmp_path / "images" / "case1.nii.gz", tmp_path / "drawn.nii.gz").slices == [4]


def test_command_takes_any_cases_where_none_are_named_and_a_file_a_channel(tmp_path, capsys):
    write_cases(tmp_path)
    write_run(tmp_path / "run")
    for number in range(3):
        image = tmp_path / "images" / f"case{number}.nii.gz"
        image.rename(image.with_name(f"case{number}_0000.nii.gz"))
    main([*command(tmp_path), "--labels", str(tmp_path / "labels"), "--cases", "2"])
    printed = capsys.readouterr().out
    assert "does not name its training cases" in printed
    assert "case 1 of 2: case0\ncase 2 of 2: case1\n" in printed


def test_command_refuses_what_it_cannot_use_and_leaves_network_json(tmp_path, capsys):
    write_cases(tmp_path)
    run = write_run(tmp_path / "run", cases=["case0", "case1"])
    stored = (run / "network.json").read_bytes()
    labels = tmp_path / "labels"
    shutil.copytree(labels, tmp_path / "wrong")
    for file in (tmp_path / "wrong").iterdir():
        nib.save(nib.Nifti1Image(3 * np.asarray(nib.load(file).dataobj), nib.load(file).affine), file)
    (tmp_path / "others").mkdir()
    shutil.copy(labels / "case2.nii.gz", tmp_path / "others")
    (tmp_path / "shifted").mkdir()
    nib.save(nib.Nifti1Image(np.zeros(SIZE, np.uint8), np.eye(4)), tmp_path / "shifted" / "case0.nii.gz")
    for options, message in [
        (["--labels", "no folder"], "expected NIfTI files (*.nii.gz) in no folder, found none"),
        (["--labels", str(tmp_path / "others")], "such as ['case0', 'case1'], got 1 others"),
        (["--labels", str(tmp_path / "wrong")], "expected the values [0, 1, 4]"),
        (["--labels", str(tmp_path / "shifted")], "expected the same affine"),
        (["--labels", str(labels), "--cases", "0"], "expected 1 or more cases to use, got 0"),
        (["--labels", str(labels), "--images", str(labels / "no")], "found none"),
        (["--labels", str(labels), "--network", str(tmp_path)], "expected a folder of a trained network"),
    ]:
        with pytest.raises(SystemExit) as stop:
            main([*command(tmp_path), *options])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
        assert (run / "network.json").read_bytes() == stored
