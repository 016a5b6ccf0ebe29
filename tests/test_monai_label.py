"""MONAI Label: what its server reads of the bundles, and examples/monai_label on a real server.

The server needs an environment of its own: examples/monai_label/README.md. MONAI_LABEL_PYTHON names its interpreter.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import requests
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.transforms import LoadImaged

from monai_conres.completion import complete_scan
from monai_conres.files import load_network
from tests.bundles import NAMES, ROOT, write_bundle

SIZE = (22, 26, 20)


def write_scan(name: str, path: Path, codes: str = "LPS") -> Path:
    """Noise with as many channels as the bundle takes."""
    channels = 4 if name == "brats_conresnet" else 1
    image = np.random.default_rng(0).normal(50, 20, (*SIZE, channels)).astype(np.float32)
    turn = nib.orientations.axcodes2ornt(codes)
    image = nib.Nifti1Image(image if channels > 1 else image[..., 0], np.diag([1.0, 1.0, 2.0, 1.0]))
    nib.save(image.as_reoriented(turn), path)
    return path


def predict(bundle: Path, scan: Path, folder: Path) -> np.ndarray:
    """The label map that ``configs/inference.yaml`` writes."""
    (folder / "in").mkdir(parents=True)
    shutil.copy(scan, folder / "in" / "scan.nii.gz")
    options = {"bundle_root": str(bundle), "dataset_dir": str(folder / "in"), "output_dir": str(folder / "out")}
    options |= {"num_workers": 0, "progress": False, "device": "$torch.device('cpu')", "report#pictures": False}
    cases = {"data": {"_target_": "read_scans", "folder": "@dataset_dir", "structures": "@structures"}}
    workflow = ConfigWorkflow(
        str(bundle / "configs" / "inference.yaml"), workflow_type="infer", logging_file=False, **options, **cases
    )
    workflow.initialize()
    workflow.run()
    return voxels(folder / "out" / "scan.nii.gz")


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


@pytest.mark.parametrize("name", NAMES)
def test_bundle_has_what_the_server_reads(name, tmp_path):
    """The server's steps, with the keys that it knows: see BundleInferTask of MONAI Label 0.8.5."""
    bundle, scan = write_bundle(name, tmp_path), write_scan(name, tmp_path / "scan.nii.gz")
    assert (bundle / "models" / "model.pt").is_file()
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    (image, entry), *_ = metadata["network_data_format"]["inputs"].items()
    (pred, output), *_ = metadata["network_data_format"]["outputs"].items()
    assert (image, pred, len(entry["spatial_shape"])) == ("image", "pred", 3)
    assert all(int(number) >= 0 and label for number, label in output["channel_def"].items())
    parser = ConfigParser()
    parser.read_config(bundle / "configs" / "inference.yaml")
    parser.config.update({"bundle_root": str(bundle), "device": torch.device("cpu")})
    network = parser.get_parsed_content("network_def", instantiate=True)
    network.load_state_dict(torch.load(bundle / "models" / "model.pt", weights_only=True))
    before = list(parser.get_parsed_content("preprocessing", instantiate=True).transforms)
    inferer = parser.get_parsed_content("inferer", instantiate=True)
    after = list(parser.get_parsed_content("postprocessing", instantiate=True).transforms)

    data: dict[str, Any] = {"image": str(scan), "image_path": str(scan), "device": torch.device("cpu"), "model": name}
    assert all(set(step.keys) <= set(data) for step in before if isinstance(step, LoadImaged))
    for step in before:
        data = step(data)
    with torch.no_grad():
        data["pred"] = inferer(data["image"][None], network.eval())[0]
    for step in after:
        data = step(data)
    assert data["pred"].shape == (1, *SIZE)
    np.testing.assert_array_equal(data["pred"][0].numpy(), predict(bundle, scan, tmp_path / "run"))


# a real server


@pytest.fixture(scope="module")
def python() -> str:
    """The interpreter of the server's environment."""
    python = os.environ.get("MONAI_LABEL_PYTHON", "")
    if not python:
        pytest.skip("MONAI Label's server: set MONAI_LABEL_PYTHON to the interpreter of an environment that has it")
    return python


def start(python: str, app: Path, studies: Path, *conf: str) -> tuple[subprocess.Popen, str]:
    """A server that answers, and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = [part for key, value in zip(conf[::2], conf[1::2], strict=True) for part in ("--conf", key, value)]
    command = [python, "-m", "monailabel.main", "start_server", "--app", str(app), "--studies", str(studies)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MONAI_LABEL_DATASTORE_AUTO_RELOAD": "false"}
    log = (studies.parent / f"{app.name}.log").open("w")
    address = ["--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen([*command, *address, *options], env=environment, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            requests.get(f"{url}/info/", timeout=60)
            return server, url
        except requests.ConnectionError:
            assert server.poll() is None, Path(log.name).read_text()[-3000:]
            time.sleep(0.5)
    server.kill()
    raise AssertionError(Path(log.name).read_text()[-3000:])


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    return {name: write_bundle(name, folder) for name in NAMES}


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    """The server's folder of scans: a made-up one for each bundle."""
    folder = tmp_path_factory.mktemp("server") / "studies"
    folder.mkdir()
    for name in NAMES:
        write_scan(name, folder / f"{name}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def server(python, bundles, scans, tmp_path_factory) -> Iterator[str]:
    """The app of the examples, with all bundles; its address."""
    app = tmp_path_factory.mktemp("app") / "monai_label"
    shutil.copytree(ROOT / "examples" / "monai_label", app)
    server, url = start(python, app, scans, "models", ",".join(map(str, bundles.values())))
    yield url
    server.terminate()
    server.wait()


def infer(url: str, model: str, image: str, params: dict[str, Any], label: Path | None = None) -> requests.Response:
    """What 3D Slicer's module sends."""
    files = {} if label is None else {"label": label.open("rb")}
    address = f"{url}/infer/{model}?image={image}&output=image"
    return requests.post(address, data={"params": json.dumps(params)}, files=files, timeout=600)


def answer(path: Path, response: requests.Response) -> np.ndarray:
    assert response.status_code == 200, response.text
    path.write_bytes(response.content)
    return voxels(path)


def write_like(path: Path, label: np.ndarray, scan: Path) -> Path:
    nib.save(nib.Nifti1Image(label.astype(np.int16), nib.load(scan).affine), path)
    return path


@pytest.mark.slow
def test_servers_own_app_segments_with_each_bundle(python, bundles, scans, tmp_path):
    prefix = subprocess.run([python, "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True, check=True)
    app = tmp_path / "monaibundle"
    shutil.copytree(Path(prefix.stdout.strip(), "monailabel", "sample-apps", "monaibundle"), app)
    for name, bundle in bundles.items():
        shutil.copytree(bundle, app / "model" / name)
    conf = ["models", ",".join(bundles), "zoo_source", "ngc", "sam2", "false"]
    server, url = start(python, app, scans, *conf)
    try:
        models = requests.get(f"{url}/info/", timeout=60).json()["models"]
        assert set(models) == set(NAMES)
        assert models["hippocampus_conresnet"]["labels"] == {"anterior": 1, "posterior": 2}
        for name, bundle in bundles.items():
            found = answer(tmp_path / f"{name}.nii.gz", infer(url, name, name, {}))
            np.testing.assert_array_equal(found, predict(bundle, scans / f"{name}.nii.gz", tmp_path / name))
            scan, written = nib.load(scans / f"{name}.nii.gz"), nib.load(tmp_path / f"{name}.nii.gz")
            np.testing.assert_allclose(written.affine, scan.affine)
    finally:
        server.terminate()
        server.wait()


@pytest.mark.slow
def test_client_script_segments_and_completes_a_real_scan(python, server, bundles, scans, real_data, tmp_path):
    """The scan is uploaded."""
    task, name = real_data / "Task04_Hippocampus", "hippocampus_001.nii.gz"
    scan, label = task / "imagesTr" / name, voxels(task / "labelsTr" / name)
    number = int((label > 0).sum((0, 1)).argmax())
    drawn = np.zeros_like(label)
    drawn[..., number] = label[..., number]
    drawn_file = write_like(tmp_path / "drawn.nii.gz", drawn, scan)
    model = "hippocampus_conresnet"
    script = [python, str(ROOT / "examples" / "monai_label" / "client.py"), "--server", server, "--model", model]
    options = ["--image", str(scan), "--drawn", str(drawn_file), "--out", str(tmp_path / "results")]
    printed = subprocess.run([*script, *options], check=True, capture_output=True, text=True).stdout
    assert f"drawn slices: [{number}], along axis 2, from inferior to superior" in printed
    found = voxels(tmp_path / "results" / f"{model}.nii.gz")
    np.testing.assert_array_equal(found, predict(bundles[model], scan, tmp_path / "run"))
    completed = complete_scan(load_network(bundles[model] / "models"), scan, drawn_file)
    np.testing.assert_array_equal(voxels(tmp_path / "results" / f"{model}_complete.nii.gz"), completed.label[0])
    assert f"slices to draw next: [{completed.proposed[0]}, " in printed


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_server_completes_what_slicer_sends(server, bundles, scans, name, tmp_path):
    """Segments have numbers of their own, and the second request also has what the first one gave."""
    scan, trained = scans / f"{name}.nii.gz", load_network(bundles[name] / "models")
    labels = requests.get(f"{server}/info/", timeout=60).json()["models"][f"{name}_complete"]["labels"]
    assert set(labels.values()) == {1, 2, 4} if name == "brats_conresnet" else set(labels.values()) <= {1, 2}
    segments = ["background", *reversed(labels), "background_scribbles", "foreground_scribbles"]
    info = [{"name": segment, "id": number} for number, segment in enumerate(segments, start=1)]
    params = {"slices": "", "roi": [], "label_info": info, "selected_label_name": segments[1]}
    number_of = {labels.get(segment, 0): number for number, segment in enumerate(segments, start=1)} | {0: 0}

    def ask(label: np.ndarray, **changes: Any) -> np.ndarray:
        sent = np.vectorize(number_of.get)(label)
        for segment, where in changes.items():
            sent[where] = segments.index(segment) + 1
        file = write_like(tmp_path / "segments.nii.gz", sent, scan)
        return answer(tmp_path / "answer.nii.gz", infer(server, f"{name}_complete", name, params, file))

    def expect(label: np.ndarray, slices: list[int]) -> np.ndarray:
        drawn = write_like(tmp_path / "drawn.nii.gz", label, scan)
        return complete_scan(trained, scan, drawn, slices=slices).label[0].numpy()

    drawn = np.zeros(SIZE, np.uint8)
    for k, value in enumerate(sorted(labels.values())):
        drawn[3:12, 4 + 6 * k : 9 + 6 * k, 7] = value
    first = ask(drawn)
    np.testing.assert_array_equal(first, expect(drawn, [7]))
    np.testing.assert_array_equal(ask(drawn), first)  # nothing new

    corrected = first.copy()
    corrected[..., 11] = drawn[..., 7]
    corrected[..., 3] = 0
    scribbled = corrected.copy()
    scribbled[0, 0, 11] = labels[segments[1]]
    foreground, background = np.s_[0, 0, 11], np.s_[1:3, 1:3, 3]
    second = ask(corrected, foreground_scribbles=foreground, background_scribbles=background)
    np.testing.assert_array_equal(second, expect(scribbled, [3, 7, 11]))


@pytest.mark.slow
def test_server_says_what_is_wrong_with_a_request(server, scans, tmp_path):
    name = "hippocampus_conresnet"
    scan = scans / f"{name}.nii.gz"
    one = np.zeros(SIZE, np.uint8)
    one[2:6, 2:6, 4] = 1
    other = tmp_path / "other.nii.gz"
    nib.save(nib.Nifti1Image(one[1:], nib.load(scan).affine), other)
    named = {"label_info": [{"name": "liver", "id": 1}]}
    for params, label, message in [
        ({}, None, "expected a label map with drawn slices"),
        ({}, write_like(tmp_path / "a.nii.gz", 0 * one, scan), "expected a drawn slice, got none"),
        ({}, write_like(tmp_path / "b.nii.gz", 7 * one, scan), "in the label map, got the value 7"),
        (named, write_like(tmp_path / "c.nii.gz", one, scan), "in the label map, got the value 1"),
        ({"slices": "4 99"}, write_like(tmp_path / "d.nii.gz", one, scan), "expected slices from 0 to 19"),
        ({"slices": "four"}, write_like(tmp_path / "e.nii.gz", one, scan), "expected numbers of slices"),
        ({}, other, "expected the same size"),
    ]:
        response = infer(server, f"{name}_complete", name, params, label)
        assert response.status_code == 400
        assert message in response.json()["detail"]
    assert infer(server, f"{name}_complete", name, {}, write_like(tmp_path / "f.nii.gz", one, scan)).ok
