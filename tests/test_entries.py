"""Every entry refuses the same scans: scripts, bundles, the command, the recipe of the documentation."""

from __future__ import annotations

import json
import re
import runpy
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow

from monai_conres import ConResNet
from monai_conres.__main__ import main
from monai_conres.bundle import CaseReport, read_folders
from monai_conres.commands.fit_chain import fit_run
from monai_conres.completion import complete_scan
from monai_conres.files import TrainedNetwork, load_network, read_network, save_network, write_label_map
from monai_conres.phantom import tumor_phantom
from monai_conres.scans import ScanSettings, spacing_range
from monai_conres.volumes import load_volume

ROOT = Path(__file__).parent.parent
SIZE = (20, 24, 18)
SPACING = (1.0, 1.5, 2.0)
SCANS = ScanSettings(
    channels=["MR"], patch_size=[16, 16, 16], classes={"Anterior": [1], "Posterior": [2]}, activation="softmax"
)
SMALL = {"channels": (8, 8), "strides": (2,), "blocks": (1, 1, 1)}


def network() -> ConResNet:
    torch.manual_seed(0)
    return ConResNet(1, 3, include_background=False, **SMALL).eval()


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four cases in the layout of the Decathlon, and a run folder that held out the last one."""
    data = tmp_path / "data"
    training = []
    for number in range(4):
        image, label = tumor_phantom(SIZE, seed=number)
        files = {key: data / f"{key}sTr" / f"case{number}.nii.gz" for key in ("image", "label")}
        for key, volume in (("image", image[0]), ("label", np.minimum(label, 2))):
            files[key].parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(volume, np.diag([*SPACING, 1])), files[key])
        training.append({key: f"./{file.relative_to(data)}" for key, file in files.items()})
    content = {"labels": {"0": "background", "1": "Anterior", "2": "Posterior"}, "modality": {"0": "MR"}}
    (data / "dataset.json").write_text(json.dumps({**content, "training": training}))
    cases = {"cases": ["case0", "case1", "case2"], "validation": ["case3"]}
    save_network(tmp_path / "run", network(), SCANS, training=cases)
    return tmp_path


def script(name: str, *more: str) -> Callable:
    def run(folder: Path, out: str = "out") -> None:
        sys.argv = [name, "--data", str(folder / "data"), "--out", str(folder / out), *more]
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")

    return run


def bundle(name: str, **more: Any) -> Callable:
    def run(folder: Path, out: str = "out") -> None:
        scans = "imagesTr" if name == "inference" else ""
        options = {"dataset_dir": str(folder / "data" / scans), "run_dir": str(folder / "run"), "num_workers": 0}
        options |= {"run_dir": str(folder / out)} if name == "train" else {"output_dir": str(folder / out)}
        options |= {"progress": False, "device": "$torch.device('cpu')"}
        options |= {"cases": "$@data.cases[-1:]"} if name == "evaluate" else more
        file = str(ROOT / "examples" / "bundles" / "hippocampus_conresnet" / "configs" / f"{name}.yaml")
        workflow = ConfigWorkflow(
            file, workflow_type="train" if name == "train" else "infer", logging_file=False, **options
        )
        try:
            workflow.initialize()
            workflow.run()
        except RuntimeError as error:
            raise (error.__cause__ or error) from error

    return run


def recipe(folder: Path) -> None:
    data = read_folders(folder / "data" / "imagesTr", folder / "data" / "labelsTr", SCANS.classes)
    data.check(channels=1, progress=False)


def command(folder: Path, out: str = "out") -> None:
    files = [folder / "data" / f"{kind}sTr" / "case3.nii.gz" for kind in ("image", "label")]
    out = folder / f"{out}.nii.gz"
    options = ["--network", folder / "run", "--image", files[0], "--drawn", files[1], "--out", out]
    main(["complete", *map(str, options)])


ENTRIES = {
    "quickstart": script("quickstart.py"),
    "attach_unet": script("attach_unet.py"),
    "train": bundle("train"),
    "evaluate": bundle("evaluate"),
    "inference": bundle("inference"),
    "recipe": recipe,
    "complete": command,
}


def store(file: Path, change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> None:
    stored = nib.load(file)
    values, affine = change(np.asarray(stored.dataobj).astype(np.float32), stored.affine)
    nib.save(nib.Nifti1Image(values, affine), file)


def with_voxel(value: float) -> Callable:
    def change(values: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values[3, 4, 5] = value
        return values, affine

    return change


def turn(values: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    c, s = np.cos(np.pi / 6), np.sin(np.pi / 6)
    return values, np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ affine


QUICK = ("NaN in the scan", "label turned")
BROKEN = {
    "NaN in the scan": (
        "image",
        with_voxel(np.nan),
        r"finite numbers in .*imagesTr/case3\.nii\.gz.*got NaN in 1 voxels",
    ),
    "no-data value": (
        "image",
        with_voxel(-1e30),
        r"finite numbers in .*case3\.nii\.gz, below 1e\+09 in size, got -1e\+30",
    ),
    "two channels": ("image", lambda v, a: (np.stack([v, v], -1), a), r"\w+ channel.*got 2|same number of channels"),
    "label 255": (
        "label",
        with_voxel(255),
        r"expected the values \[0, 1, 2\] in .*labelsTr/case3\.nii\.gz.* got \[?255",
    ),
    "label moved 50 mm": ("label", lambda v, a: (v, a + 50 * np.eye(4, k=3)), "same affine in .*imagesTr.*labelsTr"),
    "label turned": ("label", turn, "same affine in .*imagesTr/case3.*labelsTr/case3"),
    "label of another size": ("label", lambda v, a: (v[:-1], a), "same size in .*imagesTr/case3.*labelsTr/case3"),
}


@pytest.mark.parametrize(
    "broken", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in BROKEN]
)
@pytest.mark.parametrize("entry", ENTRIES)
def test_entry_refuses_what_its_siblings_refuse(folder, capsys, monkeypatch, entry, broken):
    monkeypatch.setattr(sys, "argv", sys.argv)
    key, change, message = BROKEN[broken]
    if (entry, key) == ("inference", "label"):
        return  # it reads no label
    store(folder / "data" / f"{key}sTr" / "case3.nii.gz", change)
    before = sorted(path for path in folder.rglob("*") if path.is_file())
    with pytest.raises((ValueError, SystemExit)) as caught:
        ENTRIES[entry](folder)
    text = capsys.readouterr().err if caught.value.args == (2,) else str(caught.value)
    assert re.search(message, text), text
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == before


def test_evaluation_refuses_a_label_that_it_cannot_read(folder, tmp_path):
    """Also without the check before: the label is checked where it is loaded."""
    store(folder / "data" / "labelsTr" / "case3.nii.gz", with_voxel(255))
    file = folder / "data" / "labelsTr" / "case3.nii.gz"
    report = CaseReport(tmp_path / "out", [{"name": "a", "image": str(file), "label": str(file)}], SCANS.classes)

    class Engine:
        class state:
            batch, output = [{"name": "a"}], [{"pred": load_volume(file)}]

    with pytest.raises(ValueError, match=r"the values \[0, 1, 2\] in .*case3\.nii\.gz, got \[255\.0\]"):
        report._add(Engine)


# voxels of other sizes than in the training


@pytest.mark.parametrize("entry", ["complete", "inference", "evaluate", "predict", "fit_chain"])
@pytest.mark.parametrize("size", [2.9, 3.1, *(pytest.param(size, marks=pytest.mark.slow) for size in (1.3, 2.0))])
def test_other_spacing_than_in_the_training_gives_a_warning(folder, monkeypatch, entry, size):
    """The training saw 1 x 1.5 mm in plane and 2 mm between the slices. 3.1 and 1.3 differ by more than half of it."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    seen = spacing_range(read_folders(folder / "data" / "imagesTr", folder / "data" / "labelsTr", {}).cases)
    assert seen == [(1.0, 1.0), (1.5, 1.5), (2.0, 2.0)]
    scans = replace(SCANS, seen_spacing=seen)
    cases = {"cases": ["case0", "case1", "case2"], "validation": ["case3"]}
    save_network(folder / "run", network(), scans, training=cases)
    for number in range(4):  # stored along other axes
        for key in ("image", "label"):
            file = folder / "data" / f"{key}sTr" / f"case{number}.nii.gz"
            scan = nib.Nifti1Image(np.asarray(nib.load(file).dataobj), np.diag([1, 1.5, size, 1]))
            nib.save(scan.as_reoriented(nib.orientations.axcodes2ornt("SPR")), file)
    image = folder / "data" / "imagesTr" / "case3.nii.gz"

    def predict(folder: Path) -> None:
        load_network(folder / "run").scans.preprocessing()({"image": image})

    def fit(folder: Path) -> None:
        cases = read_folders(folder / "data" / "imagesTr", folder / "data" / "labelsTr", {}).cases
        fit_run(folder / "run", {case["name"]: case for case in cases}, number=1)

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        {**ENTRIES, "predict": predict, "fit_chain": fit}[entry](folder)
    texts = [str(warning.message) for warning in found if "the network was trained with" in str(warning.message)]
    assert bool(texts) == (size in (3.1, 1.3))
    sizes = rf"voxels of 1 x 1\.5 x {size:g} mm \(RAS\), and the network was trained with 1 x 1\.5 x 2 mm"
    assert all(re.search(rf"case\d\.nii\.gz has {sizes}: the result may be poor\. Resample", text) for text in texts)


@pytest.mark.parametrize("entry", ["quickstart", "attach_unet", "train"])
def test_training_stores_the_spacings_that_it_saw(folder, monkeypatch, entry):
    """Those of its training cases, as the headers say."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    sizes = {f"case{number}": 2 + number / 10 for number in range(4)}
    for name, size in sizes.items():
        for key in ("image", "label"):
            store(folder / "data" / f"{key}sTr" / f"{name}.nii.gz", lambda v, a, s=size: (v, np.diag([1, 1.5, s, 1])))
    small = {"network_def#channels": [8, 8], "network_def#strides": [2], "network_def#blocks": [1, 1, 1]}
    run = {
        "quickstart": script("quickstart.py", "--iterations", "1", "--channels", "8", "8"),
        "attach_unet": script("attach_unet.py", "--epochs", "1"),
        "train": bundle("train", **small, iterations=1, batch_size=1, patch_size=[16, 16, 16]),
    }[entry]
    run(folder)
    stored = read_network(folder / "out" / ("ConResNet" if entry == "quickstart" else ""))
    seen = [sizes[name] for name in stored["training"]["cases"]]
    assert len(seen) == 3
    assert stored["scans"].seen_spacing == ((1.0, 1.0), (1.5, 1.5), (min(seen), max(seen)))


# output folders


@pytest.mark.parametrize("place", ["data/labelsTr", "data/imagesTr", "link"])
@pytest.mark.parametrize("entry", [name for name in ENTRIES if name not in ("recipe", "complete")])
def test_results_do_not_go_among_the_data(folder, monkeypatch, entry, place):
    monkeypatch.setattr(sys, "argv", sys.argv)
    (folder / "link").symlink_to(folder / "data" / "labelsTr")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises((ValueError, SystemExit), match=r"a folder for (the results|the predictions) only, got .*case0"):
        ENTRIES[entry](folder, place)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_completed_volume_does_not_replace_a_file_of_others(folder, capsys):
    before = {path: path.read_bytes() for path in (folder / "data").rglob("*.nii.gz")}
    for out in ("data/labelsTr/case0", "data/labelsTr/case3", "data/imagesTr/case3"):
        with pytest.raises(SystemExit):
            command(folder, out)
        assert re.search(r"expected another file for the result, got .*nii\.gz, which", capsys.readouterr().err)
    assert {path: path.read_bytes() for path in (folder / "data").rglob("*.nii.gz")} == before
    for _ in range(2):  # its own result of before is replaced
        command(folder)


@pytest.mark.parametrize("name", ["2024", "[a]"])
def test_inference_writes_to_the_folder_that_was_typed(folder, monkeypatch, name):
    """Through MONAI's command line, in this process."""
    monkeypatch.chdir(folder)
    (folder / "run").rename(folder / "7")
    file = str(ROOT / "examples" / "bundles" / "hippocampus_conresnet" / "configs" / "inference.yaml")
    options = ["--dataset_dir", "data/imagesTr", "--run_dir", "7", "--output_dir", name, "--num_workers", "0"]
    options += [
        "--progress",
        "False",
        "--report#pictures",
        "False",
        "--scans#overlap",
        "0.0",
        "--logging_file",
        "False",
    ]
    monkeypatch.setattr(sys, "argv", ["monai.bundle", "run", "--config_file", file, *options])
    runpy.run_module("monai.bundle", run_name="__main__")
    assert sorted(path.name for path in (folder / name).iterdir()) == [f"case{n}.nii.gz" for n in range(4)]
    for mask in (folder / name).iterdir():
        scan = nib.load(folder / "data" / "imagesTr" / mask.name)
        for field in ("qform_code", "sform_code", "srow_x", "qoffset_x", "xyzt_units"):
            np.testing.assert_array_equal(nib.load(mask).header[field], scan.header[field])


def test_bundle_predicts_more_classes_than_its_own(folder):
    """The run folder says how many classes there are, not the defaults of the bundle."""
    scans = ScanSettings(
        channels=["MR"],
        patch_size=[16, 16, 16],
        classes={name: [k] for k, name in enumerate("abcdefghij", 1)},
        activation="softmax",
    )
    torch.manual_seed(0)
    save_network(folder / "run", ConResNet(1, 11, include_background=False, **SMALL), scans)
    bundle("inference")(folder)
    masks = sorted((folder / "out").glob("*.nii.gz"))
    assert len(masks) == len(list((folder / "out").glob("*.png"))) == 4
    assert len({value for mask in masks for value in np.unique(nib.load(mask).dataobj)}) > 3


def test_predictions_do_not_replace_the_labels_of_other_cases(folder):
    """The reader of new scans does not know the labels."""
    labels = folder / "data" / "labelsTr"
    case = {"name": "case0", "image": str(folder / "data" / "imagesTr" / "case0.nii.gz")}
    with pytest.raises(
        ValueError, match=r"a folder for the predictions only, got .*labelsTr, whose case0\.nii\.gz is none"
    ):
        CaseReport(labels, [case], SCANS.classes)
    scan = load_volume(case["image"])
    write_label_map(folder / "completed" / "case0.nii.gz", torch.zeros(scan.shape), scan)  # from drawn slices
    with pytest.raises(ValueError, match=r"for the predictions only, got .*completed, whose case0\.nii\.gz is none"):
        CaseReport(folder / "completed", [case], SCANS.classes)
    for _ in range(2):  # its own predictions of an earlier run
        bundle("inference")(folder)


def test_distances_of_sheared_scans_are_refused_before_the_work(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    affine = np.diag([*SPACING, 1.0])
    affine[0, 2] = 0.4
    for file in (folder / "data").glob("*Tr/*.nii.gz"):
        store(file, lambda values, _: (values, affine))
    recipe(folder)  # training takes it
    for entry in ("quickstart", "evaluate"):
        with pytest.raises((ValueError, SystemExit), match=r"perpendicular axes for distances in mm.*case\d\.nii\.gz"):
            ENTRIES[entry](folder)
    assert not (folder / "out").exists()
    files = [folder / "data" / f"{key}sTr" / "case3.nii.gz" for key in ("image", "label")]
    completed = complete_scan(TrainedNetwork(network(), SCANS, {}), files[0], files[1], slices=[9])
    write_label_map(folder / "mask.nii.gz", completed.label, completed.label)
    np.testing.assert_allclose(nib.load(folder / "mask.nii.gz").affine, affine)


# the recipe


def test_recipe_of_the_documentation_takes_awkward_files(tmp_path, monkeypatch):
    """A volume of one slice, files of a Mac, a label without a scan: what docs/your_data.md runs on."""
    monkeypatch.chdir(tmp_path)
    for name, slices in (("a", 1), ("b", 1), ("c", 1)):
        for kind, value in (("images", 5.0), ("labels", 1.0)):
            (tmp_path / kind).mkdir(exist_ok=True)
            values = np.zeros((16, 20, slices), np.float32)
            values[4:9, 5:12] = value
            nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / kind / f"{name}.nii.gz")
    for name in ("._a.nii.gz", "._c.nii.gz"):
        (tmp_path / "images" / name).write_bytes(b"of a Mac")
    text = (ROOT / "docs" / "your_data.md").read_text()
    blocks = [block[1] for block in re.finditer(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)]
    names: dict[str, Any] = {}
    changes = {
        'channels=["FLAIR", "T1", "T1 with contrast", "T2"]': 'channels=["T1"]',
        '{"edema": [1], "necrosis": [2], "enhancing tumor": [3]}': '{"edema": [1]}',
        "[32, 32, 32]": "[16, 16, 1]",
        "channels=(8, 16, 32, 64)": "channels=(8, 8), strides=((2, 2, 1),), blocks=(1, 1, 1)",
        "minutes = 0.1": "minutes = 0",
        "end = time.time()": "end = 1 + time.time()",
    }
    for block in blocks[1:4]:
        for old, new in changes.items():
            block = block.replace(old, new)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found")
            exec(block, names)
    (mask,) = (tmp_path / "predictions").iterdir()
    assert nib.load(mask).shape == (16, 20, 1)
    assert load_volume(mask).shape == (1, 16, 20, 1)
