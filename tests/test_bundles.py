"""The bundles of examples/bundles, run as a user runs them, with small networks on small data."""

from __future__ import annotations

import csv
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.apps import DecathlonDataset
from monai.bundle import ConfigWorkflow, ckpt_export, init_bundle, onnx_export, verify_metadata, verify_net_in_out
from monai.bundle.properties import InferProperties, MetaProperties

from monai_conres import ConResNet
from monai_conres.bundle import MeanProbability
from monai_conres.completion import complete_scan
from monai_conres.files import load_network, load_volume
from monai_conres.phantom import write_phantom_brats, write_phantom_dataset
from tests.bundles import BUNDLES, NAMES, write_bundle
from tests.nih import write_pancreas_ct

GENERATOR = runpy.run_path(str(BUNDLES / "generate.py"))
CHANNELS = {"brats_conresnet": (4, 3), "pancreas_ct_conresnet": (1, 1), "hippocampus_conresnet": (1, 3)}
NETWORK = {"network_def#channels": [8, 16], "network_def#strides": [2], "network_def#blocks": [1, 1, 1]}
QUICK = {"num_workers": 0, "progress": False, "device": "$torch.device('cpu')"}
SMALL = {**NETWORK, "patch_size": [24, 24, 16], "iterations": 4, "batch_size": 2, "val_interval": 2}


def workflow(bundle: str, name: str, **overrides: Any) -> ConfigWorkflow:
    """One configuration of a bundle with no other file."""
    overrides = {**(SMALL if name == "train" else {}), **QUICK, **overrides}
    kind = "train" if name == "train" else "infer"
    file = str(BUNDLES / bundle / "configs" / f"{name}.yaml")
    made = ConfigWorkflow(file, workflow_type=kind, logging_file=False, **overrides)
    made.parser.parse(True)
    return made


def run(bundle: str, name: str, **overrides: Any) -> ConfigWorkflow:
    """``python -m monai.bundle run --config_file configs/NAME.yaml`` in this process."""
    made = workflow(bundle, name, **overrides)
    made.initialize()
    if name not in ("export", "fit_chain", "complete"):  # these have no engine
        assert made.check_properties() == []
    made.run()
    made.finalize()
    return made


def refused(bundle: str, name: str, **overrides: Any) -> str:
    """The error that a run ends with."""
    with pytest.raises(RuntimeError) as caught:
        run(bundle, name, **overrides)
    return str(caught.value.__cause__)


def start(bundle: str, *names: str, processes: int = 1, **overrides: Any) -> subprocess.Popen:
    """The command line, in a process of its own."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"] if processes > 1 else []
    files = [str(BUNDLES / bundle / "configs" / f"{name}.yaml") for name in names]
    overrides = {**(SMALL if "train" in names else {}), **QUICK, **overrides}
    options = [part for key, value in overrides.items() for part in (f"--{key}", str(value))]
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "monai.bundle", "run", "--config_file", str(files), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate()
    assert process.returncode == 0, output[-3000:]
    return output


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def voxels(path: Path | str) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def check_evaluation(folder: Path, labels: dict[str, Path], structures: dict[str, set[int]]) -> None:
    """Each case has its files on the grid of its label, and the table says what the files say."""
    rows = {row["case"]: row for row in table(folder / "cases.csv")}
    assert set(rows) == set(labels)
    for name, file in labels.items():
        label, predicted = voxels(file), voxels(folder / f"{name}.nii.gz")
        assert set(np.unique(predicted)) <= {0}.union(*structures.values())
        assert (folder / f"{name}.png").stat().st_size > 1000
        for structure, values in structures.items():
            a, b = np.isin(label, list(values)), np.isin(predicted, list(values))
            dice = 2 * (a & b).sum() / max(a.sum() + b.sum(), 1)
            assert float(rows[name][f"Dice {structure}"]) == pytest.approx(dice, abs=1e-6)
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary) == {f"{metric} {name}" for metric in ("Dice", "HD95", "NSD") for name in structures}


# -- what is in the tree


@pytest.mark.parametrize("bundle", NAMES)
def test_generator_writes_the_files_of_the_tree(bundle):
    generated = GENERATOR["bundle_files"](bundle)
    for path, text in generated.items():
        assert (BUNDLES / bundle / path).read_text() == text, f"{path}: run python examples/bundles/generate.py"
        assert path == "LICENSE" or "Generated by generate.py" in text.splitlines()[0]
    in_tree = {path.relative_to(BUNDLES / bundle).as_posix() for path in (BUNDLES / bundle / "configs").iterdir()}
    assert in_tree == {path for path in generated if path.startswith("configs/")}


def test_generator_leaves_no_block_unused():
    template = [file for file in (BUNDLES / "template").rglob("*") if file.is_file()]
    bundles = [BUNDLES / f"{bundle}.yaml" for bundle in NAMES]
    text = "".join(file.read_text() for file in [*template, *bundles])
    for file in [BUNDLES / "template" / "parts.yaml", *bundles]:
        unused = [name for name in GENERATOR["read_blocks"](file) if not re.search(rf"<<{name}( here=\w+)?>>", text)]
        assert unused == [], file.name


# The specification of bundles lists these as mandatory. MONAI's schema file is one for downloading.
TEXTS = ["version", "monai_version", "pytorch_version", "numpy_version", "task", "description", "authors", "copyright"]
SCHEMA = {
    "type": "object",
    "required": [*TEXTS, "changelog", "required_packages_version", "network_data_format"],
    "properties": {
        **{name: {"type": "string", "minLength": 1} for name in TEXTS},
        "changelog": {"type": "object", "additionalProperties": {"type": "string"}},
        "required_packages_version": {"type": "object", "additionalProperties": {"type": "string"}},
        "network_data_format": {
            "type": "object",
            "required": ["inputs", "outputs"],
            "additionalProperties": {
                "type": "object",
                "additionalProperties": {
                    "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"],
                    "properties": {"num_channels": {"type": "integer"}, "is_patch_data": {"type": "boolean"}},
                },
            },
        },
    },
}


@pytest.mark.parametrize("bundle", NAMES)
def test_bundle_passes_the_checks_of_the_model_zoo(bundle, tmp_path):
    """With its own files and those that a training writes: files, versions, metadata, properties, network."""
    root = write_bundle(bundle, tmp_path)
    init_bundle(tmp_path / "empty")
    template = {path.relative_to(tmp_path / "empty") for path in (tmp_path / "empty").rglob("*")}
    assert {path.with_suffix(".yaml") if path.stem == "inference" else path for path in template} <= {
        path.relative_to(root) for path in root.rglob("*")
    }
    meta_file, config_file = str(root / "configs" / "metadata.json"), str(root / "configs" / "inference.yaml")
    metadata = json.loads(Path(meta_file).read_text())
    assert metadata["version"] in metadata["changelog"]
    (root / "eval").mkdir()
    (root / "eval" / "schema.json").write_text(json.dumps(SCHEMA))  # a file that is there is not downloaded
    verify_metadata(meta_file=meta_file, filepath=str(root / "eval" / "schema.json"))
    for side, channels in zip(("inputs", "outputs"), CHANNELS[bundle], strict=True):
        (entry,) = metadata["network_data_format"][side].values()
        assert len(entry["channel_def"]) == entry["num_channels"] == channels
    write, _ = DATA[bundle]
    write(tmp_path / "data")
    logging_file = str(root / "configs" / "logging.conf")
    scans = tmp_path / "data" / ("imagesTr" if bundle == "hippocampus_conresnet" else "")
    options = {**QUICK, "bundle_root": str(root), "dataset_dir": str(scans), "output_dir": str(tmp_path / "out")}
    made = ConfigWorkflow(config_file, meta_file, logging_file, workflow_type="inference", **options)
    made.initialize()
    made.properties = {**MetaProperties, **InferProperties}
    assert made.check_properties() == []
    verify_net_in_out("network_def", meta_file, config_file, "cpu", bundle_root=str(root))


@pytest.mark.parametrize("bundle", NAMES)
def test_readme_names_files_and_options_that_exist(bundle):
    text = (BUNDLES / bundle / "docs" / "README.md").read_text()
    assert not re.search(r"--\S+ None", text), "MONAI drops an override of None; $None works"
    for name in re.findall(r"configs/(\w+\.\w+)", text):
        assert (BUNDLES / bundle / "configs" / name).is_file(), name
    names = ("train", "evaluate", "inference", "fit_chain", "complete", "export")
    files = [BUNDLES / bundle / "configs" / f"{name}.yaml" for name in names]
    config = "".join(file.read_text() for file in files)
    others = "config_file standalone nproc_per_node out layout tracking logdir filepath ckpt_file meta_file "
    others += "key_in_ckpt use_trace input_shape net_id"
    for option in set(re.findall(r"--(\w+)", text)) - set(others.split()):
        assert re.search(rf"^ *{option}:", config, re.MULTILINE), option


# -- one configuration, no other file


@pytest.mark.parametrize("bundle", NAMES)
@pytest.mark.parametrize("name", ["train", "evaluate", "inference", "export"])
def test_configuration_loads_alone_in_a_fresh_tree(bundle, name, monkeypatch):
    monkeypatch.chdir(BUNDLES / bundle)
    assert not list(Path("models").glob("*.pt"))
    config_file = f"configs/{name}.yaml"
    verify_net_in_out("network_def", meta_file="configs/metadata.json", config_file=config_file, device="cpu")


@pytest.mark.parametrize("name", ["train", "inference"])
def test_context_on_the_command_line_sets_the_network(name, capsys, monkeypatch):
    for context in ("mapping", "none"):
        file = str(BUNDLES / "brats_conresnet" / "configs" / f"{name}.yaml")
        options = ["--initialize", "[]", "--network_def#context", context]
        options += ["--run", "['$print(chr(35), sum(p.numel() for p in @network_def.parameters()))']"]
        monkeypatch.setattr(sys, "argv", ["monai.bundle", "run", "--config_file", file, *options])
        runpy.run_module("monai.bundle", run_name="__main__")
        (count,) = re.findall(r"^# (\d+)$", capsys.readouterr().out, re.MULTILINE)
        assert int(count) == sum(p.numel() for p in ConResNet(4, 3, context=context).parameters())


@pytest.mark.parametrize(("margin", "first"), [(40, "CropForegroundd"), ("$None", "SpatialPadd")])
def test_pancreas_patches_come_from_the_whole_volume_without_a_margin(margin, first):
    made = workflow("pancreas_ct_conresnet", "train", crop_margin=margin, structures={"pancreas": [1]})
    assert type(made.parser.get_parsed_content("train#augmentation")[0]).__name__ == first


@pytest.mark.parametrize(
    ("bundle", "name", "place", "source"),
    [("pancreas_ct_conresnet", "train", "train#augmentation", "label")]
    + [("brats_conresnet", name, "prepare", "image") for name in ("train", "evaluate", "inference")],
)
def test_case_without_foreground_is_not_cropped(bundle, name, place, source):
    """A label without the organ, and a scan without a value above 0."""
    options = {
        "structures": {"a": [1], "b": [2], "c": [3]},
        **({"scans#seen_spacing": "$None"} if name == "train" else {}),
    }
    made = workflow(bundle, name, **options)
    (crop,) = [part for part in made.parser.get_parsed_content(place) if type(part).__name__ == "CropForegroundd"]
    case = {"image": torch.rand(1, 80, 100, 90), "label": torch.zeros(1, 80, 100, 90)}
    case[source] = torch.zeros(1, 80, 100, 90)
    cropped = crop(case)
    for key in crop.keys:
        np.testing.assert_array_equal(cropped[key], case[key])
    case[source][0, 50, 60:62, 45] = torch.tensor([1, 2])
    margin = 40 if source == "label" else 0
    box = np.s_[:, 50 - margin : 51 + margin, 60 - margin : 62 + margin, 45 - margin : 46 + margin]
    np.testing.assert_array_equal(crop(case)["image"], case["image"][box])


def test_hippocampus_is_downloaded_once_by_one_process(tmp_path, monkeypatch):
    calls = []
    data = tmp_path / "Task04_Hippocampus"

    def download(**kwargs):
        calls.append(kwargs)
        write_phantom_dataset(data, cases=5, size=(12, 14, 10))  # what comes is read

    monkeypatch.setattr("monai.apps.DecathlonDataset", download)
    for method in ("initialize", "barrier"):
        monkeypatch.setattr(f"ignite.distributed.{method}", lambda *args, **kwargs: None)
    options = {"download": True, "dataset_dir": str(data), "check": "nothing"}
    options |= {"run_dir": str(tmp_path / "run")}
    files = [
        str(BUNDLES / "hippocampus_conresnet" / "configs" / f"{name}.yaml") for name in ("train", "multi_gpu_train")
    ]
    for number, names in enumerate((files[:1], files), start=1):
        shutil.rmtree(data, ignore_errors=True)
        for rank, item in ((1, "fetch"), (0, "initialize"), (0, "initialize")):  # the second time the data are there
            ConfigWorkflow(names, logging_file=False, rank=rank, **options).parser.get_parsed_content(item)
            assert len(calls) == (number if item == "initialize" else number - 1)
    assert (calls[1]["root_dir"], calls[1]["download"]) == (str(tmp_path), True)
    assert calls[1]["task"] in DecathlonDataset.resource


# -- the whole way, from data to predictions


def write_brats(folder: Path) -> tuple[dict[str, Any], Callable[[str], Path]]:
    write_phantom_brats(folder, cases=6, size=(30, 32, 24))
    return {"hold_out": 2, "tensorboard": True}, lambda name: next(folder.glob(f"*/{name}/*_seg.nii.gz"))


def write_pancreas(folder: Path) -> tuple[dict[str, Any], Callable[[str], Path]]:
    write_pancreas_ct(folder, [1, 2, 10, 44, 60])
    return {"crop_margin": 4}, lambda name: folder / "TCIA_pancreas_labels" / f"label{name[-4:]}.nii.gz"


def write_hippocampus(folder: Path) -> tuple[dict[str, Any], Callable[[str], Path]]:
    write_phantom_dataset(folder, cases=6, size=(20, 24, 18))  # four channels and three classes become one and two
    description = json.loads((folder / "dataset.json").read_text())
    description |= {"labels": {"0": "background", "1": "Anterior", "2": "Posterior"}, "modality": {"0": "MR"}}
    (folder / "dataset.json").write_text(json.dumps(description))
    for file in folder.glob("*Tr/*.nii.gz"):
        volume = nib.load(file)
        array = np.asarray(volume.dataobj)
        array = array[..., 0] if array.ndim == 4 else np.minimum(array, 2)
        nib.save(nib.Nifti1Image(array, volume.affine), file)
    return {"fold": 1}, lambda name: folder / "labelsTr" / f"{name}.nii.gz"


DATA = {  # a writer of data, and the label values
    "brats_conresnet": (write_brats, {"ET": {4}, "WT": {1, 2, 4}, "TC": {1, 4}}),
    "pancreas_ct_conresnet": (write_pancreas, {"pancreas": {1}}),
    "hippocampus_conresnet": (write_hippocampus, {"Anterior": {1}, "Posterior": {2}}),
}


def check_completion(bundle: str, data: Path, run_dir: int, image: Any, label: Path, folder: Path) -> None:
    """The weights of the chain are fitted; then a scan is completed from one drawn slice, as the command does it."""
    run(bundle, "fit_chain", dataset_dir=str(data), run_dir=run_dir, number=2)
    assert load_network(str(run_dir)).chain != load_network(str(run_dir + 1)).chain is None
    if bundle == "pancreas_ct_conresnet":  # the header of the label lies next to the series
        nib.save(nib.Nifti1Image(load_volume(image)[0].numpy(), nib.load(label).affine), folder / "scan.nii.gz")
        image = str(folder / "scan.nii.gz")
    reference, affine = voxels(label), nib.load(label).affine
    number = int(np.argmax((reference > 0).sum((0, 1))))
    drawn = np.zeros_like(reference)
    drawn[..., number] = reference[..., number]
    nib.save(nib.Nifti1Image(drawn, affine), folder / "drawn.nii.gz")
    files = {"image": image, "drawn": str(folder / "drawn.nii.gz"), "output": str(folder / "completed.nii.gz")}
    run(bundle, "complete", run_dir=run_dir, **files)
    completed = complete_scan(load_network(str(run_dir)), image, files["drawn"])
    assert completed.slices == [number]
    np.testing.assert_array_equal(voxels(files["output"]), completed.label[0])
    np.testing.assert_array_equal(voxels(files["output"])[..., number], reference[..., number])
    assert "slices from 0 to" in refused(bundle, "complete", run_dir=run_dir, slices=[999], **files)


@pytest.mark.parametrize("bundle", NAMES)
def test_bundle_goes_from_data_to_predictions(bundle, tmp_path, monkeypatch):
    """Training; then, with the run folders only, named by numbers: evaluation of an ensemble, inference, exports."""
    monkeypatch.chdir(tmp_path)
    data, mean, runs = tmp_path / "data", tmp_path / "mean", [2024, 2025]
    write, structures = DATA[bundle]
    options, label = write(data)
    for seed, folder in enumerate(runs):
        trainer = run(bundle, "train", dataset_dir=str(data), run_dir=folder, seed=seed, **options)
    assert trainer.trainer.state.iteration == 4
    validation = [case["name"] for case in trainer.parser.get_parsed_content("split")[1]]
    assert [row["case"] for row in table(tmp_path / "2025" / "validation" / "cases.csv")] == sorted(validation)
    assert any((tmp_path / "2025").glob("events.out.tfevents*")) == ("tensorboard" in options)

    evaluation = run(bundle, "evaluate", dataset_dir=str(data), run_dirs=runs, output_dir=str(mean))
    assert tuple(evaluation.inferer.roi_size) == (24, 24, 16)  # as trained
    check_evaluation(mean, {name: label(name) for name in validation}, structures)

    case = trainer.parser.get_parsed_content("split")[1][0]
    check_completion(bundle, data, runs[0], case["image"], label(case["name"]), tmp_path)

    scans = data / "imagesTr" if bundle == "hippocampus_conresnet" else data
    shutil.rmtree(data / "TCIA_pancreas_labels", ignore_errors=True)
    for file in data.rglob("*_seg.nii.gz"):
        file.unlink()
    options = {"dataset_dir": str(scans), "run_dirs": runs, "output_dir": str(tmp_path / "new")}
    run(bundle, "inference", **options, **{"report#pictures": False})
    assert not (tmp_path / "new" / "cases.csv").exists()
    for name in validation:
        one, two = (folder / f"{name}.nii.gz" for folder in (mean, tmp_path / "new"))
        np.testing.assert_array_equal(voxels(two), voxels(one))
        np.testing.assert_allclose(nib.load(two).affine, nib.load(one).affine)

    output = tmp_path / "exported" / "model.ts"
    run(bundle, "export", run_dirs=runs, output=str(output))
    image, softmax = torch.randn(2, CHANNELS[bundle][0], 16, 24, 20), bundle == "hippocampus_conresnet"
    networks = [load_network(str(folder)).network for folder in runs]
    with torch.no_grad():
        expected = MeanProbability(networks, softmax=softmax, flip_axes=[[0]] if softmax else [])(image)
    torch.testing.assert_close(torch.jit.load(output)(image), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def brats(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("brats") / "MICCAI_BraTS_2018_Data_Training"
    write_phantom_brats(folder, cases=6, size=(30, 32, 24))
    return folder


@pytest.fixture(scope="module")
def trained(brats, tmp_path_factory) -> dict[str, Any]:
    """Options of a finished training."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    options = {"dataset_dir": str(brats), "run_dir": str(folder), "hold_out": 2, "iterations": 1, "val_interval": 9}
    run("brats_conresnet", "train", **options)
    return options


@pytest.mark.parametrize(
    "row",
    [
        {"network_def#context": "none"},
        {"network_def#context": "mapping"},
        {"spatial_axis": 0},
        {"softmax": True},
        {"loss": "@boundary_loss"},
        {"joint_loss#deep_supervision_weight": 0.1, "split": "$@data.split(1, folds=3)"},
    ],
    ids=["baseline", "mapping", "sagittal", "multi-class", "boundary loss", "lambda and cross-validation"],
)
def test_row_of_the_papers_tables_sets_what_it_says(brats, tmp_path, row):
    options = {"dataset_dir": str(brats), "run_dir": str(tmp_path), "hold_out": 2, "iterations": 1, "check_data": False}
    made = run("brats_conresnet", "train", **options, val_interval=9, **row)
    get = made.parser.get_parsed_content
    network, joint, loss = get("network_def"), get("joint_loss"), get("loss")
    output = network.train()(torch.randn(1, 4, 16, 16, 16))
    context = row.get("network_def#context", "attention")
    assert network.arguments["context"] == context
    assert len(output.residuals) == (0 if context == "none" else 1)
    assert output.segmentation.shape[1] == (4 if row.get("softmax") else 3)
    assert joint.residual_loss.spatial_axis == network.arguments["spatial_axis"] == row.get("spatial_axis", -1)
    assert joint.residual_loss.deep_supervision_weight == row.get("joint_loss#deep_supervision_weight", 0.5)
    assert (loss is joint) == ("loss" not in row)
    assert get("lr_scheduler").total_iters == 2  # one iteration was asked for, and an epoch has two
    if "loss" in row:
        assert loss.steps == loss.max_steps == 2
    described = json.loads((tmp_path / "network.json").read_text())
    assert described["network"]["arguments"]["context"] == context
    assert described["scans"]["activation"] == ("softmax" if row.get("softmax") else "sigmoid")
    names = {case["name"] for case in get("data").cases}
    assert names == {*described["training"]["cases"], *described["training"]["validation"]}


def run_torchscript(path: str, image: torch.Tensor) -> torch.Tensor:
    return torch.jit.load(path)(image)


def run_onnx(path: str, image: torch.Tensor) -> torch.Tensor:
    session = pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: image.numpy()})[0])


@pytest.mark.parametrize("bundle", NAMES)
@pytest.mark.parametrize(
    ("export", "name", "run_exported"),
    [
        (ckpt_export, "network.ts", run_torchscript),
        pytest.param(onnx_export, "network.onnx", run_onnx, marks=pytest.mark.slow),
    ],
)
def test_export_command_of_monai_gives_the_logits(bundle, tmp_path, export, name, run_exported):
    """With the bundle's own files, and those that a training writes."""
    root, image = write_bundle(bundle, tmp_path), torch.randn(1, CHANNELS[bundle][0], 16, 24, 16)
    files = {"ckpt_file": str(root / "models" / "model.pt"), "meta_file": str(root / "configs" / "metadata.json")}
    files |= {"config_file": str(root / "configs" / "inference.yaml"), "bundle_root": str(root)}
    path = str(tmp_path / name)
    export("network_def", filepath=path, **files, key_in_ckpt="", use_trace=True, input_shape=list(image.shape))
    with torch.no_grad():
        expected = load_network(root / "models").network(image)
    torch.testing.assert_close(run_exported(path, image), expected, rtol=1e-4, atol=1e-4)


# -- what is refused


@pytest.mark.parametrize(
    ("name", "override"),
    [
        ("training.cases", {"split": "$@data.split(1, folds=3)"}),
        ("training.learning_rate", {"learning_rate": 0.1}),
        ("training.deep_supervision_weight", {"joint_loss#deep_supervision_weight": 1}),
        ("training.loss", {"loss": "@boundary_loss"}),
        ("loss.residual_weight", {"joint_loss#residual_weight": 0.3}),
        ("lr_scheduler.power", {"lr_scheduler#power": 0.5}),
        ("RandZoom.min_zoom", {"train#augmentation#4#min_zoom": 0.7}),
        ("network.arguments.dropout", {"network_def#dropout": 0.3}),
        ("network.arguments.context", {"network_def#context": "mapping"}),
        ("scans.channels", {"modalities": ["t1", "flair", "t1ce", "t2"]}),
    ],
)
def test_training_does_not_continue_a_run_of_other_settings(trained, name, override):
    """The weights fit, so the run would count as finished."""
    assert f"{name} was " in refused("brats_conresnet", "train", **{**trained, **override})


@pytest.mark.parametrize("name", ["train", "evaluate", "inference"])
def test_mixed_precision_needs_a_gpu(trained, name):
    options = trained if name == "train" else {key: trained[key] for key in ("dataset_dir", "run_dir")}
    assert "expected a GPU for mixed precision" in refused("brats_conresnet", name, **options, amp=True)


@pytest.mark.parametrize("name", ["train", "evaluate", "inference"])
@pytest.mark.parametrize(("cases", "processes"), [(0, 1), (1, 2)])
def test_fewer_cases_than_processes_are_refused_before_the_work(trained, tmp_path, name, cases, processes):
    few = f"@data.cases[:{cases}]"
    options = (
        {"split": f"$@data.cases, {few}"} if name == "train" else {"cases": f"${few}", "output_dir": str(tmp_path)}
    )
    options |= {"dataset_dir": trained["dataset_dir"], "run_dir": trained["run_dir"]}
    error = refused("brats_conresnet", name, **options, world_size=processes, check="$1 / 0")  # of the check of files
    assert f"as many cases to segment as processes, got {cases} and {processes}" in error


@pytest.mark.parametrize("option", ["iterations", "val_interval", "checkpoint_interval"])
def test_training_names_an_option_of_zero(trained, option):
    assert f"--{option} to be a whole number, 1 or more, got 0" in refused(
        "brats_conresnet", "train", **{**trained, "check": "none", option: 0}
    )


@pytest.mark.parametrize("name", ["evaluate", "inference", "export"])
def test_network_that_contradicts_network_json_is_an_error(brats, trained, tmp_path, name):
    options = {"run_dir": trained["run_dir"], "output_dir": str(tmp_path / "out"), "output": str(tmp_path / "out.ts")}
    options |= {} if name == "export" else {"dataset_dir": trained["dataset_dir"]}
    for key, value in {"context": "none", "spatial_axis": 0, "align_corners": True}.items():
        made = workflow("brats_conresnet", name, **options, **{f"network_def#{key}": value})
        with pytest.raises(RuntimeError) as caught:
            made.parser.get_parsed_content("predictor")
        assert re.search(rf"{key}.*network\.json|network\.json.*{key}", str(caught.value.__cause__), re.DOTALL)
    same = workflow("brats_conresnet", name, **options, **{"network_def#context": "attention"})
    assert tuple(same.parser.get_parsed_content("network_def").arguments["channels"]) == (8, 16)


def test_evaluation_scores_training_cases_only_on_request(trained, tmp_path):
    options = {"dataset_dir": trained["dataset_dir"], "run_dir": trained["run_dir"], "output_dir": str(tmp_path)}
    options |= {"report#full": False, "cases": "$@data.cases"}
    assert "phantom_" in refused("brats_conresnet", "evaluate", **options)
    run("brats_conresnet", "evaluate", **options, held_out=[])
    assert len(table(tmp_path / "cases.csv")) == 6


def test_broken_file_is_an_error_before_the_work(brats, trained, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(brats, data)
    (file,) = data.glob("*/phantom_002/*_t2.nii.gz")
    file.write_bytes(file.read_bytes()[:-2000])
    for name in ("train", "inference"):
        options = {"dataset_dir": str(data), "output_dir": str(tmp_path / "new")}
        own = {"run_dir": str(tmp_path / "run"), "hold_out": 2}
        options |= own if name == "train" else {"run_dir": trained["run_dir"]}
        assert re.search(r"cannot read .*phantom_002_t2\.nii\.gz", refused("brats_conresnet", name, **options))
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "new").exists()


# -- processes of their own, and real scans


@pytest.mark.slow
def test_killed_run_ends_as_an_undisturbed_one(brats, tmp_path):
    """By command line: training with dropout, boundary loss, schedule and workers; then the other configurations."""
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
    finish(undisturbed)
    assert "after epoch" in finish(again)
    assert curve.read_text() == (tmp_path / "a" / "loss.csv").read_text()
    expected, got = (torch.load(tmp_path / name / "model.pt", weights_only=True) for name in "ab")
    for name, weight in expected.items():
        assert torch.equal(got[name], weight), name
    assert (tmp_path / "a" / "network.json").read_text() == (tmp_path / "b" / "network.json").read_text()

    run_dir = {"run_dir": tmp_path / "b"}
    processes = [
        start("brats_conresnet", "evaluate", "multi_gpu_evaluate", processes=2, dataset_dir=brats, **run_dir),
        start("brats_conresnet", "inference", dataset_dir=brats, output_dir=tmp_path / "new", **run_dir),
        start("brats_conresnet", "export", **run_dir),
    ]
    for process in processes:
        finish(process)
    one_case = {"dataset_dir": brats, "cases": "$@data.cases[:1]", "output_dir": tmp_path / "one", **run_dir}
    idle = start("brats_conresnet", "inference", "multi_gpu_evaluate", processes=2, **one_case)
    assert "error: expected at least as many cases to segment as processes, got 1 and 2; " in idle.communicate()[0]
    rows = table(tmp_path / "b" / "evaluation" / "cases.csv")
    assert len(rows) == 2
    for row in rows:
        name = f"{row['case']}.nii.gz"
        np.testing.assert_array_equal(voxels(tmp_path / "new" / name), voxels(tmp_path / "b" / "evaluation" / name))
    assert (tmp_path / "b" / "model.ts").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(("context", "tolerance"), [("none", 1e-5), ("attention", 2e-3)])
def test_two_processes_train_as_one(brats, tmp_path, context, tolerance):
    """The residual loss counts its weights over the batch of one process, so ConResNet's losses differ slightly."""
    options = {"dataset_dir": str(brats), "hold_out": 3, "iterations": 4, "val_interval": 4, "check_data": False}
    options |= {"batch_size": 2, "network_def#dropout": 0.0, "network_def#context": context}
    process = start("brats_conresnet", "train", "multi_gpu_train", processes=2, run_dir=tmp_path / "two", **options)
    run("brats_conresnet", "train", run_dir=str(tmp_path / "one"), **options)
    finish(process)
    one, two = (table(tmp_path / name / "loss.csv") for name in ("one", "two"))
    assert len(one) == len(two) == 4
    for expected, got in zip(one, two, strict=True):
        assert got["iteration"] == expected["iteration"]
        assert float(got["loss"]) == pytest.approx(float(expected["loss"]), rel=tolerance)
    one, two = (table(tmp_path / name / "validation" / "cases.csv") for name in ("one", "two"))
    assert [row["case"] for row in two] == [row["case"] for row in one]  # three cases, each once
    if context == "none":
        for expected, got in zip(one, two, strict=True):
            assert float(got["Dice WT"]) == pytest.approx(float(expected["Dice WT"]), abs=1e-3)


@pytest.mark.slow
def test_brats_on_real_cases(real_data, tmp_path):
    """Two of the four sequences. (The distances of an untrained network's prediction take minutes: no evaluation.)"""
    options = {"dataset_dir": str(real_data / "BraTS_sample"), "run_dir": str(tmp_path / "run"), "check_data": False}
    made = run(
        "brats_conresnet", "train", **options, modalities=["flair", "t1ce"], hold_out=4, iterations=1, val_interval=99
    )
    assert made.parser.get_parsed_content("structures") == {"ET": (4,), "WT": (1, 2, 4), "TC": (1, 4)}
    name = made.parser.get_parsed_content("cases")[0]["name"]
    case = real_data / "BraTS_sample" / name
    shutil.copytree(case, tmp_path / "scans" / name)
    options |= {"dataset_dir": str(tmp_path / "scans"), "output_dir": str(tmp_path / "new")}
    run("brats_conresnet", "inference", **options, **{"inferer#roi_size": [160, 192, 160]})  # one window
    prediction = nib.load(tmp_path / "new" / f"{name}.nii.gz")
    assert set(np.unique(prediction.dataobj)) <= {0, 1, 2, 4}
    np.testing.assert_allclose(prediction.affine, nib.load(case / f"{name}_seg.nii.gz").affine)
