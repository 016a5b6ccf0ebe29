"""The bundles of examples/bundles, run as a user would, with little networks on little data."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.apps import DecathlonDataset
from monai.bundle import ConfigWorkflow, ckpt_export, onnx_export, verify_net_in_out

from monai_conres.phantom import write_phantom_brats, write_phantom_dataset
from tests.nih import write_pancreas_ct

BUNDLES = Path(__file__).parent.parent / "examples" / "bundles"
NETWORK = {
    "network_def#channels": [8, 16, 16],
    "network_def#strides": [2, 2],
    "network_def#blocks": [1, 1, 1, 1],
}
SMALL = {
    **NETWORK,
    "patch_size": [24, 24, 16],
    "iterations": 4,
    "batch_size": 2,
    "val_interval": 2,
    "num_workers": 0,
    "progress": False,
    "device": "$torch.device('cpu')",
}
NAMES = ("brats_conresnet", "pancreas_ct_conresnet", "hippocampus_conresnet")
CHANNELS = {"brats_conresnet": (4, 3), "pancreas_ct_conresnet": (1, 1), "hippocampus_conresnet": (1, 3)}


def files(bundle: str, *names: str) -> list[str]:
    return [str(BUNDLES / bundle / "configs" / f"{name}.yaml") for name in names]


def run(bundle: str, *names: str, **overrides: Any) -> ConfigWorkflow:
    """``python -m monai.bundle run --config_file ...`` in this process; every workflow has all required properties."""
    kind = "infer" if "inference" in names else "train"
    workflow = ConfigWorkflow(files(bundle, *names), workflow_type=kind, logging_file=False, **{**SMALL, **overrides})
    workflow.initialize()
    assert workflow.check_properties() == []
    workflow.run()
    workflow.finalize()
    return workflow


def command(bundle: str, *names: str, processes: int = 1, **overrides: Any) -> list[str]:
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"] if processes > 1 else []
    options = [part for key, value in {**SMALL, **overrides}.items() for part in (f"--{key}", str(value))]
    return [
        sys.executable,
        "-m",
        *launcher,
        "monai.bundle",
        "run",
        "--config_file",
        str(files(bundle, *names)),
        *options,
    ]


def start(*args: Any, **kwargs: Any) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command(*args, **kwargs), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def voxels(path: Path | str) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def check_evaluation(folder: Path, labels: dict[str, Path | str], structures: dict[str, set[int]]) -> None:
    """Each case has its files, in the geometry of its label, and the table says what the files say."""
    rows = {row["case"]: row for row in table(folder / "cases.csv")}
    assert set(rows) == set(labels)
    for name, label in labels.items():
        prediction = nib.load(folder / f"{name}.nii.gz")
        assert prediction.shape == nib.load(label).shape
        assert set(np.unique(prediction.dataobj)) <= {0}.union(*structures.values())
        assert (folder / f"{name}.png").stat().st_size > 1000
        for structure, values in structures.items():
            got, expected = (np.isin(voxels(path), list(values)) for path in (folder / f"{name}.nii.gz", label))
            dice = 2 * (got & expected).sum() / max(got.sum() + expected.sum(), 1)
            assert float(rows[name][f"Dice {structure}"]) == pytest.approx(dice, abs=1e-6)
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary) == {f"{metric} {name}" for metric in ("Dice", "HD95", "NSD") for name in structures}


@pytest.mark.parametrize("bundle", NAMES)
def test_conventions_of_the_model_zoo(bundle):
    folder = BUNDLES / bundle
    expected = ["LICENSE", "docs/README.md", "docs/data_license.txt", "configs/metadata.json", "configs/logging.conf"]
    expected += [f"configs/{name}.yaml" for name in ("train", "evaluate", "inference", "multi_gpu_train")]
    assert [name for name in expected if not (folder / name).is_file()] == []
    assert (folder / "models").is_dir()
    metadata = json.loads((folder / "configs" / "metadata.json").read_text())
    required = "version changelog monai_version pytorch_version numpy_version required_packages_version task "
    required += "description authors copyright network_data_format"
    assert set(required.split()) <= set(metadata)
    assert metadata["version"] in metadata["changelog"]
    pinned = dict(line.split(" ;")[0].split("==") for line in _constraints() if "==" in line)
    assert metadata["monai_version"] == pinned["monai"]
    assert metadata["pytorch_version"] == pinned["torch"]
    for package, version in metadata["required_packages_version"].items():
        assert package == "monai-conres" or version == pinned[package]


def _constraints() -> list[str]:
    return (BUNDLES.parent.parent / "constraints.txt").read_text().splitlines()


@pytest.mark.parametrize("bundle", NAMES)
def test_networks_export(bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # inference has its output folder there
    channels, outputs = CHANNELS[bundle]
    meta_file = str(BUNDLES / bundle / "configs" / "metadata.json")
    config_file = files(bundle, "train", "inference")
    verify_net_in_out("network_def", meta_file=meta_file, config_file=config_file, device="cpu", n=2, **NETWORK)
    workflow = ConfigWorkflow(config_file, workflow_type="infer", logging_file=False, **NETWORK)
    workflow.initialize()
    network = workflow.network_def.eval()
    torch.save(network.state_dict(), tmp_path / "model.pt")
    image = torch.randn(1, channels, 16, 24, 16)
    with torch.no_grad():
        expected = network(image)
    assert expected.shape[1] == outputs
    arguments = {
        "ckpt_file": str(tmp_path / "model.pt"),
        "meta_file": meta_file,
        "config_file": config_file,
        "key_in_ckpt": "",
        "use_trace": True,
        "input_shape": list(image.shape),
    }
    ckpt_export("network_def", filepath=str(tmp_path / "model.ts"), **arguments, **NETWORK)
    torch.testing.assert_close(torch.jit.load(tmp_path / "model.ts")(image), expected)
    if bundle == "hippocampus_conresnet":  # the softmax one; ONNX of the network itself is in test_deploy.py
        onnxruntime = pytest.importorskip("onnxruntime")
        onnx_export("network_def", filepath=str(tmp_path / "model.onnx"), **arguments, **NETWORK)
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
        (got,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
        np.testing.assert_allclose(got, expected.numpy(), atol=1e-4)


@pytest.mark.parametrize("bundle", NAMES)
def test_the_exported_file_gives_the_probabilities_of_inference(bundle, tmp_path, monkeypatch):
    """Of an ensemble; settings that are not those of the training are refused."""
    monkeypatch.chdir(tmp_path)
    channels, _ = CHANNELS[bundle]
    setup = ConfigWorkflow(files(bundle, "train"), workflow_type="train", logging_file=False, **SMALL)
    networks = []
    for name in ("a.pt", "b.pt"):
        torch.manual_seed(len(networks))
        setup.parser.parse(True)
        networks.append(setup.parser.get_parsed_content("network_def", instantiate=True).eval())
        torch.save(networks[-1].state_dict(), tmp_path / name)
        (tmp_path / f"{name}.json").write_text(json.dumps({"network": networks[-1].conres_settings}))
    options = {**SMALL, "checkpoints": ["a.pt", "b.pt"], "output": "exported/model.ts"}
    export = ConfigWorkflow(files(bundle, "train", "export"), workflow_type="infer", logging_file=False, **options)
    export.initialize()
    export.run()
    image = torch.randn(2, channels, 16, 24, 20)
    got = torch.jit.load(tmp_path / "exported" / "model.ts")(image)
    activation = (lambda logits: logits.softmax(1)) if bundle == "hippocampus_conresnet" else torch.sigmoid
    flips = [[], [2]] if bundle == "hippocampus_conresnet" else [[]]
    with torch.no_grad():
        expected = [activation(network(image.flip(dims))).flip(dims) for network in networks for dims in flips]
    assert (expected[0] - expected[-1]).abs().max() > 0.01
    torch.testing.assert_close(got, torch.stack(expected).mean(0), rtol=1e-4, atol=1e-5)

    options |= {"spatial_axis": 0, "output": "other.ts"}
    other = ConfigWorkflow(files(bundle, "train", "export"), workflow_type="infer", logging_file=False, **options)
    other.initialize()
    with pytest.raises(RuntimeError, match="load_networks") as stop:
        other.run()
    assert "expected spatial_axis 2, with which a.pt was trained, got 0" in str(stop.value.__cause__)
    assert not (tmp_path / "other.ts").exists()


@pytest.fixture(scope="module")
def brats(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("brats") / "MICCAI_BraTS_2018_Data_Training"
    write_phantom_brats(folder, cases=6, size=(30, 32, 24))
    return folder


def test_brats(brats, tmp_path):
    """Training, evaluation of an ensemble, and inference on new scans."""
    options = {"dataset_dir": str(brats), "run_dir": str(tmp_path / "run"), "hold_out": 2}
    trainer = run("brats_conresnet", "train", **options, tensorboard=True)
    assert trainer.trainer.state.iteration == 4
    held_out = [case["name"] for case in trainer.parser.get_parsed_content("split")[1]]
    assert [row["case"] for row in table(tmp_path / "run" / "validation" / "cases.csv")] == sorted(held_out)
    assert list((tmp_path / "run").glob("events.out.tfevents*"))
    labels = {name: next(brats.glob(f"*/{name}/*_seg.nii.gz")) for name in held_out}
    structures = {"ET": {4}, "WT": {1, 2, 4}, "TC": {1, 4}}

    checkpoints = [str(tmp_path / "run" / "model.pt")] * 3
    run("brats_conresnet", "train", "evaluate", **options, checkpoints=checkpoints, output_dir=str(tmp_path / "three"))
    check_evaluation(tmp_path / "three", labels, structures)

    scans = tmp_path / "scans"
    for name, label in labels.items():
        shutil.copytree(label.parent, scans / name, ignore=shutil.ignore_patterns("*seg*"))
    del options["hold_out"]
    options |= {"dataset_dir": str(scans), "output_dir": str(tmp_path / "new")}
    run("brats_conresnet", "train", "inference", **options)
    for name, label in labels.items():
        np.testing.assert_array_equal(
            voxels(tmp_path / "new" / f"{name}.nii.gz"), voxels(tmp_path / "three" / f"{name}.nii.gz")
        )
        np.testing.assert_allclose(nib.load(tmp_path / "new" / f"{name}.nii.gz").affine, nib.load(label).affine)
    assert not (tmp_path / "new" / "cases.csv").exists()


@pytest.mark.parametrize(
    "row",
    [
        {"network_def#mapping": False, "network_def#attention": False},
        {"network_def#attention": False},
        {"spatial_axis": 0},
        {"softmax": True},
        {"loss": "@boundary_loss"},
        {"joint_loss#deep_supervision_weight": 0.1, "split": "$@data.split(1, folds=3)"},
    ],
    ids=["baseline", "mapping only", "sagittal", "multi-class", "boundary loss", "lambda, cross-validation"],
)
def test_rows_of_the_papers_tables(brats, tmp_path, row):
    """Each sets what it is to set, and trains."""
    options = {"dataset_dir": str(brats), "run_dir": str(tmp_path), "hold_out": 2, "iterations": 1, "val_interval": 1}
    workflow = run("brats_conresnet", "train", **options, **row)
    network, loss = workflow.network_def, workflow.parser.get_parsed_content("loss")
    joint = workflow.parser.get_parsed_content("joint_loss")
    output = network.train()(torch.randn(1, 4, 16, 16, 16))
    assert len(output.residuals) == (0 if row.get("network_def#mapping") is False else 2)
    assert network.attention == row.get("network_def#attention", True)
    assert joint.residual_loss.spatial_axis == row.get("spatial_axis", -1)
    assert joint.residual_loss.deep_supervision_weight == row.get("joint_loss#deep_supervision_weight", 0.5)
    assert output.segmentation.shape[1] == (4 if row.get("softmax") else 3)
    assert (loss is joint) == ("loss" not in row)
    # one iteration was asked for, and an epoch has two: the schedules are over both
    assert workflow.parser.get_parsed_content("lr_scheduler").total_iters == 2
    if "loss" in row:
        assert loss.steps == loss.max_steps == 2
    assert len(table(tmp_path / "validation" / "cases.csv")) == 2


def test_brats_on_real_cases(real_data, tmp_path):
    """Two of the four sequences. (The distances of an untrained network's prediction take minutes: no evaluation.)"""
    options = {
        "dataset_dir": str(real_data / "BraTS_sample"),
        "modalities": ["flair", "t1ce"],
        "run_dir": str(tmp_path),
    }
    options["check_data"] = False
    workflow = run("brats_conresnet", "train", **options, hold_out=4, iterations=1, val_interval=99)
    assert workflow.parser.get_parsed_content("structures") == {"ET": (4,), "WT": (1, 2, 4), "TC": (1, 4)}
    name = workflow.parser.get_parsed_content("split")[1][0]["name"]
    case = real_data / "BraTS_sample" / name
    shutil.copytree(case, tmp_path / "scans" / name)
    options |= {"dataset_dir": str(tmp_path / "scans"), "output_dir": str(tmp_path / "new")}
    run("brats_conresnet", "train", "inference", **options, patch_size=[160, 192, 160])  # one window
    prediction = nib.load(tmp_path / "new" / f"{name}.nii.gz")
    assert set(np.unique(prediction.dataobj)) <= {0, 1, 2, 4}
    np.testing.assert_allclose(prediction.affine, nib.load(case / f"{name}_seg.nii.gz").affine)


def test_pancreas(tmp_path):
    data = tmp_path / "Pancreas-CT"
    write_pancreas_ct(data, [1, 2, 10, 44, 60])
    options = {"dataset_dir": str(data), "run_dir": str(tmp_path / "run"), "crop_margin": 4, "progress": True}
    run("pancreas_ct_conresnet", "train", **options)
    run("pancreas_ct_conresnet", "train", "evaluate", **options)
    labels = {f"PANCREAS_{n:04d}": data / "TCIA_pancreas_labels" / f"label{n:04d}.nii.gz" for n in (10, 44)}
    check_evaluation(tmp_path / "run" / "evaluation", labels, {"pancreas": {1}})

    shutil.rmtree(data / "TCIA_pancreas_labels")
    options |= {"output_dir": str(tmp_path / "new")}
    run("pancreas_ct_conresnet", "train", "inference", **options)
    assert len(list((tmp_path / "new").glob("*.nii.gz"))) == 5
    np.testing.assert_array_equal(
        voxels(tmp_path / "new" / "PANCREAS_0010.nii.gz"),
        voxels(tmp_path / "run" / "evaluation" / "PANCREAS_0010.nii.gz"),
    )


def test_hippocampus(tmp_path):
    data = tmp_path / "Task04_Hippocampus"
    write_phantom_dataset(data, cases=6, size=(20, 24, 18))  # four channels and three classes: made one and two
    description = json.loads((data / "dataset.json").read_text())
    description["labels"] = {"0": "background", "1": "Anterior", "2": "Posterior"}
    (data / "dataset.json").write_text(json.dumps(description))
    for entry in description["training"]:
        for key in ("image", "label"):
            volume = nib.load(data / entry[key])
            array = np.asarray(volume.dataobj)
            array = array[..., 0] if key == "image" else np.minimum(array, 2)
            nib.save(nib.Nifti1Image(array, volume.affine), data / entry[key])
    options = {"dataset_dir": str(data), "run_dir": str(tmp_path / "run"), "fold": 1}
    run("hippocampus_conresnet", "train", **options)
    run("hippocampus_conresnet", "train", "evaluate", **options)
    names = [row["case"] for row in table(tmp_path / "run" / "evaluation" / "cases.csv")]
    labels = {name: data / "labelsTr" / f"{name}.nii.gz" for name in names}
    check_evaluation(tmp_path / "run" / "evaluation", labels, {"Anterior": {1}, "Posterior": {2}})

    options |= {"dataset_dir": str(data / "imagesTr"), "output_dir": str(tmp_path / "new")}
    run("hippocampus_conresnet", "train", "inference", **options)
    assert len(list((tmp_path / "new").glob("*.nii.gz"))) == 6
    name = f"{names[0]}.nii.gz"
    np.testing.assert_array_equal(voxels(tmp_path / "new" / name), voxels(tmp_path / "run" / "evaluation" / name))


def test_monai_downloads_the_hippocampus_in_one_process(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("monai.apps.DecathlonDataset", lambda *args, **kwargs: calls.append((args, kwargs)))
    monkeypatch.setattr("ignite.distributed.initialize", lambda *args: None)
    for names, rank in ((["train"], 0), (["train", "multi_gpu_train"], 1), (["train", "multi_gpu_train"], 0)):
        calls.clear()
        options = {"download": True, "rank": rank, "dataset_dir": str(tmp_path / "Task04_Hippocampus")}
        options |= {"run_dir": str(tmp_path / "run"), "check": "nothing"}
        workflow = ConfigWorkflow(files("hippocampus_conresnet", *names), logging_file=False, **options)
        workflow.parser.get_parsed_content("initialize")
        assert len(calls) == (rank == 0)
    ((args, kwargs),) = calls
    assert args == (str(tmp_path), "Task04_Hippocampus", "training")
    assert kwargs["download"]
    assert args[1] in DecathlonDataset.resource


def test_folds_of_the_hippocampus_without_their_file(real_data, tmp_path):
    """nnU-Net's folds can be made again: those of the file that it wrote."""
    from monai_conres.datasets import read_decathlon

    data = real_data / "Task04_Hippocampus"
    expected = read_decathlon(data).folds
    for name in ("dataset.json", "imagesTr", "labelsTr"):
        (tmp_path / name).symlink_to(data / name)
    assert read_decathlon(tmp_path, nnunet_folds=True).folds == expected
    assert read_decathlon(tmp_path).folds == []


def test_killed_and_started_again_it_ends_as_if_undisturbed(brats, tmp_path):
    """With dropout, a boundary loss that counts iterations, a schedule, and workers that outlive an epoch."""
    options = {"dataset_dir": brats, "hold_out": 2, "iterations": 12, "val_interval": 99, "loss": "@boundary_loss"}
    options |= {"check_data": False, "num_workers": 1}
    undisturbed = start("brats_conresnet", "train", run_dir=tmp_path / "a", **options)
    killed = start("brats_conresnet", "train", run_dir=tmp_path / "b", **options)
    curve = tmp_path / "b" / "loss.csv"
    while not (curve.is_file() and len(table(curve)) >= 2):  # of 6 epochs
        assert killed.poll() is None, killed.stdout.read()
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "b" / "model.pt").exists()
    again = start("brats_conresnet", "train", run_dir=tmp_path / "b", **options)
    for process in (undisturbed, again):
        output, _ = process.communicate()
        assert process.returncode == 0, output[-3000:]
    assert "going on after epoch" in output
    assert curve.read_text() == (tmp_path / "a" / "loss.csv").read_text()
    expected, got = (torch.load(tmp_path / name / "model.pt", weights_only=True) for name in "ab")
    for name, weight in expected.items():
        assert torch.equal(got[name], weight), name


@pytest.mark.parametrize(
    ("row", "tolerance"),
    [
        ({"network_def#mapping": False, "network_def#attention": False}, 1e-5),
        # the residual loss counts its weights over the batch of one process
        ({}, 2e-3),
    ],
    ids=["baseline", "ConResNet"],
)
def test_two_processes_train_as_one(brats, tmp_path, row, tolerance):
    options = {"dataset_dir": str(brats), "hold_out": 3, "iterations": 4, "val_interval": 4, "check_data": False}
    options |= {"batch_size": 2, "network_def#dropout": 0.0, **row}
    process = start("brats_conresnet", "train", "multi_gpu_train", processes=2, run_dir=tmp_path / "two", **options)
    run("brats_conresnet", "train", run_dir=str(tmp_path / "one"), **options)
    output, _ = process.communicate()
    assert process.returncode == 0, output[-3000:]
    one, two = (table(tmp_path / name / "loss.csv") for name in ("one", "two"))
    assert len(one) == len(two) == 4
    for expected, got in zip(one, two, strict=True):
        assert got["iteration"] == expected["iteration"]
        assert float(got["loss"]) == pytest.approx(float(expected["loss"]), rel=tolerance)
    one, two = (table(tmp_path / name / "validation" / "cases.csv") for name in ("one", "two"))
    assert [row["case"] for row in two] == [row["case"] for row in one]  # three cases, each once
    if row:
        for expected, got in zip(one, two, strict=True):
            assert float(got["Dice WT"]) == pytest.approx(float(expected["Dice WT"]), abs=1e-3)


def test_a_broken_scan_is_an_error_before_inference(brats, tmp_path):
    scans = tmp_path / "scans"
    shutil.copytree(brats / "HGG", scans)
    (file,) = scans.glob("phantom_002/*_t2.nii.gz")
    file.write_bytes(file.read_bytes()[:-2000])
    options = {"dataset_dir": str(scans), "output_dir": str(tmp_path / "new"), "predictor#networks": ["@network_def"]}
    with pytest.raises(RuntimeError) as caught:
        run("brats_conresnet", "train", "inference", **options)
    assert re.search(r"cannot read .*phantom_002_t2\.nii\.gz", str(caught.value.__cause__))
    assert list((tmp_path / "new").iterdir()) == []


@pytest.fixture(scope="module")
def first_run(brats, tmp_path_factory) -> dict[str, Any]:
    """Options of a run that is there."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    options = {"dataset_dir": str(brats), "run_dir": str(folder), "hold_out": 2, "iterations": 1, "val_interval": 9}
    run("brats_conresnet", "train", **options)
    return options


@pytest.mark.parametrize(
    ("name", "override"),
    [
        ("training_cases", {"split": "$@data.split(1, folds=3)"}),
        ("spatial_axis", {"spatial_axis": 0}),
        ("network", {"network_def#attention": False}),
        ("network", {"network_def#strides": [2, [2, 2, 1]]}),
        ("amp", {"amp": True}),
        ("learning_rate", {"learning_rate": 0.1}),
        ("deep_supervision_weight", {"joint_loss#deep_supervision_weight": 1}),
        ("loss", {"loss": "@boundary_loss"}),
        ("modalities", {"modalities": ["t1", "flair", "t1ce", "t2"]}),
    ],
)
def test_another_configuration_does_not_go_on_from_the_first(first_run, name, override):
    """Its weights would load: the run would be taken for finished."""
    with pytest.raises(RuntimeError) as caught:
        run("brats_conresnet", "train", **first_run, **override)
    assert f"not the same {name}: " in str(caught.value.__cause__)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"split_seed": 1}, r"not trained with, got \['phantom_.* give the overrides"),
        ({"spatial_axis": 0}, "expected spatial_axis 2, with which .*, got 0; give the overrides"),
        ({"network_def#attention": False}, "expected attention True, with which .*, got False"),
        ({"network_def#align_corners": True}, "expected align_corners False"),
        ({"modalities": ["t1", "flair", "t1ce", "t2"]}, r"expected modalities \['flair', .*, got \['t1', 'flair'"),
    ],
)
def test_the_overrides_of_the_training_cannot_be_forgotten(first_run, tmp_path, override, message):
    """The weights would load, and the scores or the masks be wrong without a word."""
    options = {**first_run, **override, "output_dir": str(tmp_path / "out")}
    for name in ["evaluate"] if "split_seed" in override else ["evaluate", "inference"]:
        with pytest.raises(RuntimeError) as caught:
            run("brats_conresnet", "train", name, **options)
        assert re.search(message, str(caught.value.__cause__))
    assert not list(tmp_path.glob("out/*"))


def test_cases_of_the_training_are_scored_where_that_is_asked_for(first_run, tmp_path):
    """And the same axis by another number is no other setting."""
    options = {**first_run, "split_seed": 1, "spatial_axis": 2, "held_out": [], "output_dir": str(tmp_path)}
    run("brats_conresnet", "train", "evaluate", **options, **{"validate#report#full": False})
    assert len(table(tmp_path / "cases.csv")) == 2
    run("brats_conresnet", "train", **first_run, spatial_axis=2)  # nothing left to do


def test_crops_of_the_whole_volume():
    """MONAI passes over an override that is None: the documentation says ``$None``."""
    for margin, first in ((40, "CropForegroundd"), ("$None", "SpatialPadd")):
        options = {"crop_margin": margin, "structures": {"pancreas": [1]}}
        workflow = ConfigWorkflow(files("pancreas_ct_conresnet", "train"), logging_file=False, **options)
        assert type(workflow.parser.get_parsed_content("train#augmentation")[0]).__name__ == first


def test_bad_input_is_an_error_before_training(brats, tmp_path):
    """What the readers find is in their own tests; here that it is found, and found first."""
    data = tmp_path / "data"
    shutil.copytree(brats, data)
    (file,) = data.glob("*/phantom_001/*_t1ce.nii.gz")
    file.write_bytes(file.read_bytes()[:-2000])
    process = subprocess.run(
        command("brats_conresnet", "train", dataset_dir=data, run_dir=tmp_path / "run", hold_out=2),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode != 0
    assert re.search(r"ValueError: expected an image, cannot read .*phantom_001_t1ce\.nii\.gz", process.stderr)
    assert list((tmp_path / "run").iterdir()) == []


def test_the_documentation_lists_files_and_options_that_exist():
    for bundle in NAMES:
        text = (BUNDLES / bundle / "docs" / "README.md").read_text()
        assert not re.search(r"--\S+ None", text), "MONAI passes over it; $None is what it takes"
        for name in re.findall(r"configs/(\w+\.yaml)", text):
            assert (BUNDLES / bundle / "configs" / name).is_file(), name
        config = "".join(Path(file).read_text() for file in files(bundle, "train", "evaluate", "inference", "export"))
        others = (
            "config_file standalone nproc_per_node out layout tracking logdir filepath ckpt_file meta_file key_in_ckpt "
        )
        others += "use_trace input_shape"
        for option in set(re.findall(r"--(\w+)", text)) - set(others.split()):
            assert re.search(rf"^ *{option}:", config, re.MULTILINE), (bundle, option)
