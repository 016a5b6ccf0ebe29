"""Run folders, scans on disk, and files that are complete or absent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn as nn
from monai.networks.nets import SegResNet

from monai_conres import ConResNet, attach_conres
from monai_conres.chain import ChainSettings
from monai_conres.files import (
    atomic_path,
    check_writable,
    describe_network,
    load_network,
    load_volume,
    path_text,
    plain_values,
    read_network,
    remove_left_overs,
    save_chain,
    save_network,
    write_label_map,
)
from monai_conres.scans import ScanSettings

SMALL = {"channels": (8, 16), "strides": ((2, 2, 1),), "blocks": (1, 1, 1)}
SEGRESNET = {"init_filters": 8, "in_channels": 2, "out_channels": 3, "blocks_down": [1, 1], "blocks_up": [1]}
BACKBONE = ("monai.networks.nets.SegResNet", SEGRESNET)
TRAINING = {"cases": ["a", "b"], "seed": 3}


def scan_settings(**changes) -> ScanSettings:
    settings = {
        "channels": ("T1", "T2"),
        "patch_size": (16, 16, 8),
        "classes": {"edema": (2,), "core": (4, 1)},
        "activation": "sigmoid",
        "spacing": (1.0, 1.0, 2.5),
        "normalization": ({"name": "NormalizeIntensity", "nonzero": True, "channel_wise": True},),
        "flip_axes": ((0,), (0, 1)),
    }
    return ScanSettings(**settings | changes)


def attached(**arguments) -> nn.Module:
    torch.manual_seed(1)
    return attach_conres(SegResNet(**SEGRESNET), in_channels=2, include_background=False, width=8, **arguments)


def segresnet() -> nn.Module:
    return SegResNet(**SEGRESNET)


def outputs(network: nn.Module) -> tuple[torch.Tensor, ...]:
    image = torch.randn(1, 2, 16, 16, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return network.eval()(image), *network.with_residual(image)


def assert_same(network: nn.Module, other: nn.Module) -> None:
    for expected, got in zip(outputs(network), outputs(other), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "arguments",
    [
        {"out_channels": 2, "spatial_axis": 0, "norm": ("INSTANCE", {"affine": True}), "act": "relu"},
        {"out_channels": 2, "context": "mapping", "fan_in_scaling": False, "align_corners": True},
    ],
)
def test_conresnet_comes_back_with_its_arguments(tmp_path, arguments):
    network = ConResNet(2, **arguments, **SMALL)
    scans = scan_settings(spacing=[1, 1, 2.5])
    save_network(tmp_path, network, scans, training=TRAINING)
    loaded = load_network(tmp_path)
    assert_same(network, loaded.network)
    assert not loaded.network.training
    assert loaded.scans == scans
    assert loaded.training == TRAINING
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.pt", "network.json"]


def test_attached_network_comes_back_without_tracing(tmp_path, monkeypatch):
    network = attached(spatial_axis=1)
    save_network(
        tmp_path, network, scan_settings(activation="softmax", classes={"a": [1], "b": [2]}), backbone=BACKBONE
    )
    monkeypatch.setattr("monai_conres.attach.decoder_stages", None)
    loaded = load_network(tmp_path).network
    assert loaded.stages == network.stages
    assert_same(network, loaded)


def test_distributed_network_is_unwrapped(tmp_path):
    network = ConResNet(2, 2, **SMALL)
    save_network(tmp_path, nn.DataParallel(network), scan_settings())
    assert_same(network, load_network(tmp_path).network)


def test_compiled_network_is_refused(tmp_path):
    with pytest.raises(ValueError, match="give the network that you compiled"):
        save_network(tmp_path, torch.compile(ConResNet(2, 2, **SMALL)), scan_settings())


@pytest.fixture
def without_backbone(tmp_path):
    network = attached()
    save_network(tmp_path, network, scan_settings(activation="softmax", classes={"a": [1], "b": [2]}))
    return tmp_path, network


def test_chain_settings_are_stored_with_the_network(tmp_path, without_backbone):
    folder, network = without_backbone
    assert load_network(folder, backbone=segresnet).chain is None
    chain, other = ChainSettings(tau=0.3, offset=[-1.0, -2.5]), ChainSettings(image_contrast=0)
    for settings in (chain, other):
        save_chain(folder, settings)
        loaded = load_network(folder, backbone=segresnet)
        assert loaded.chain == settings
        assert_same(network, loaded.network)
    save_network(folder, network, loaded.scans, chain=chain)
    assert read_network(folder)["chain"] == chain
    before = (folder / "network.json").read_text()
    with pytest.raises(ValueError, match="one for each of 2, got 3"):
        save_chain(folder, ChainSettings(offset=(1.0, 2.0, 3.0)))
    with pytest.raises(ValueError, match="one for each of 2, got 1"):
        save_network(folder, network, loaded.scans, chain=ChainSettings(offset=(1.0,)))
    assert (folder / "network.json").read_text() == before
    written = (folder / "model.pt").stat().st_mtime_ns
    save_network(folder, network, loaded.scans)  # what the folder holds
    assert (folder / "network.json").read_text() == before
    assert (folder / "model.pt").stat().st_mtime_ns == written
    save_network(folder, network, scan_settings(activation="softmax", classes={"b": [2], "a": [1]}))  # other settings
    assert load_network(folder, backbone=segresnet).chain is None
    save_chain(folder, other)
    with torch.no_grad():
        next(network.parameters()).flatten()[-1] += 1  # other weights
    save_network(folder, network, scan_settings(activation="softmax", classes={"b": [2], "a": [1]}))
    loaded = load_network(folder, backbone=segresnet)
    assert loaded.chain is None
    assert_same(network, loaded.network)


@pytest.mark.parametrize("call", [False, True])
def test_backbone_is_given(without_backbone, call):
    folder, network = without_backbone
    assert_same(network, load_network(folder, backbone=segresnet() if call else segresnet).network)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (None, "network.json does not have it; give backbone="),
        (nn.Conv3d(2, 3, 1), "got a Conv3d without one"),
        (SegResNet(**SEGRESNET | {"init_filters": 16}), "cannot load them"),
    ],
)
def test_wrong_backbone_is_an_error(without_backbone, backbone, message):
    with pytest.raises(ValueError, match=message):
        load_network(without_backbone[0], backbone=backbone)


def test_plain_network_is_saved_with_class_and_arguments(tmp_path):
    network = segresnet()
    with pytest.raises(ValueError, match=r"got a SegResNet; give .* backbone=\(class"):
        save_network(tmp_path, network, scan_settings())
    save_network(tmp_path, network, scan_settings(), backbone=BACKBONE)
    state = load_network(tmp_path).network.state_dict()
    assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "expected format 1, got 2; update monai_conres"),
        ({"chains": {}}, r"expected the keys .*, got \['chains'"),
        ({"chain": {"tau": -1.0}}, "weights of 0 or more"),
        ({"chain": {"temperature": 1.0}}, "unexpected keyword argument 'temperature'"),
        ({"network": {"class": "monai_conres.ConResNet"}}, r"network\.json: KeyError: 'arguments'"),
        ({"network": {"class": "monai_conres.Nothing", "arguments": {}}}, "has no attribute 'Nothing'"),
        ({"network": {"class": "nowhere.Network", "arguments": {}}}, "No module named 'nowhere'"),
        ({"network": {"class": "os.getcwd", "arguments": {}}}, "it is no torch.nn.Module"),
        ({"network": {"class": "torch.nn.Conv3d", "arguments": {"channels": 3}}}, "unexpected keyword argument"),
        ({"scans": {"channels": ["T1"]}}, "missing 3 required keyword-only arguments"),
        ({"training": {"note": "$import os"}}, r"in the file.training.note, got '\$import os'"),
        ({"training": {"rate": float("nan")}}, "got nan"),
    ],
)
def test_wrong_file_is_an_error(tmp_path, changes, message):
    save_network(tmp_path, ConResNet(2, 2, **SMALL), scan_settings())
    file = tmp_path / "network.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        load_network(tmp_path)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"folder of a trained network, found no .*network\.json; give the folder"):
        load_network(tmp_path)
    save_network(tmp_path, ConResNet(2, 2, **SMALL), scan_settings())
    with pytest.raises(ValueError, match=r"other.pt, cannot load them \(FileNotFoundError"):
        load_network(tmp_path, weights="other.pt")
    torch.save(ConResNet(2, 2, **SMALL | {"channels": (8, 32)}).state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model.pt, cannot load them .*; give the model.pt that the training writes"):
        load_network(tmp_path)
    (tmp_path / "network.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot read .*network.json: JSONDecodeError: Expecting"):
        read_network(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {"network": state, "settings": {}, "epoch": 3}, "network, settings, epoch: a checkpoint"),
        (lambda state: {"state_dict": state}, "state_dict: a checkpoint of a training, not weights"),
        (lambda state: {f"module.{name}": value for name, value in state.items()}, "save network.module of a Distr"),
    ],
)
def test_checkpoint_given_for_weights_is_named(tmp_path, change, message):
    network = ConResNet(2, 2, **SMALL)
    save_network(tmp_path, network, scan_settings())
    torch.save(change(network.state_dict()), tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=rf"in .*checkpoint\.pt, cannot load them .*{message}.*; give the model\.pt"):
        load_network(tmp_path, weights="checkpoint.pt")


def test_check_of_a_folder_to_write_to_makes_nothing(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write to .*file/below"):
        check_writable(tmp_path / "file" / "below")


def test_folder_with_files_of_the_data_is_no_folder_for_results(tmp_path):
    cases = [{"image": [tmp_path / "images" / "a_0000.nii.gz"], "label": str(tmp_path / "labels" / "a.nii.gz")}]
    cases += [{"image": tmp_path / "series" / "1"}]  # a DICOM series
    for folder in ("images", "labels", "series", "series/1", "images/../labels"):
        with pytest.raises(ValueError, match=rf"a folder for the results only, got .*{folder}, which has (a|1)"):
            check_writable(tmp_path / folder, cases)
    for folder in (".", "images/below", "out"):
        check_writable(tmp_path / folder, cases)


@pytest.mark.parametrize(
    ("typed", "read"), [("2024", 2024), ("2024_01", 202401), ("1e3", 1000.0), ("1.10", 1.1), ("a,b", ("a", "b"))]
)
@pytest.mark.parametrize("option", ["--output_dir {}", "--output_dir={}"])
def test_path_text_is_what_was_typed(monkeypatch, typed, read, option):
    """MONAI's command line reads these as numbers and lists."""
    monkeypatch.setattr("sys.argv", ["monai.bundle", "run", *option.format(typed).split()])
    assert path_text(read) == typed
    assert path_text("runs/first") == path_text(Path("runs", "first")) == "runs/first"
    monkeypatch.setattr("sys.argv", ["monai.bundle"])
    assert path_text(7) == "7"
    with pytest.raises(ValueError, match=r"a path as text, got 1\.5; put it in quotes"):
        path_text(1.5)


@pytest.mark.parametrize(
    ("network", "changes"),
    [
        ({"out_channels": 3}, {}),
        ({"out_channels": 2}, {"channels": ("T1",)}),
        ({"out_channels": 4}, {"activation": "softmax"}),
    ],
)
def test_scans_of_other_channels_are_refused(tmp_path, network, changes):
    with pytest.raises(ValueError, match=r"image channels and \d residual masks in the network"):
        save_network(tmp_path, ConResNet(2, **network, **SMALL), scan_settings(**changes))
    assert not list(tmp_path.iterdir())


def test_softmax_counts_the_values_of_classes_that_overlap(tmp_path):
    classes = {"ET": (4,), "WT": (1, 2, 4)}  # background, 4, 1, 2
    network = ConResNet(2, 4, include_background=False, **SMALL)
    save_network(tmp_path, network, scan_settings(activation="softmax", classes=classes))
    assert load_network(tmp_path).scans.out_channels == 4


@pytest.mark.parametrize("value", [float("inf"), "$code", torch.relu, {1: "a"}, {"$a": 1}, np.zeros(2)])
def test_other_than_plain_values_are_refused(value):
    with pytest.raises(ValueError, match=r"expected plain values .* in settings.here"):
        plain_values({"here": [value]})


def test_description_is_equal_after_a_trip_through_a_file(tmp_path):
    scans = scan_settings(activation="softmax", classes={"a": [1], "b": [2]})
    described = describe_network(attached(), scans, backbone=BACKBONE, training=TRAINING)
    save_network(tmp_path, attached(), scans, backbone=BACKBONE, training=TRAINING)
    assert json.loads((tmp_path / "network.json").read_text()) == described
    assert read_network(tmp_path) == {**described, "scans": scans}


class Killed(BaseException):
    """Stands for a signal that ends the process."""


@pytest.mark.parametrize(("number", "done"), [(1, False), (1, True), (2, False), (2, True)])
def test_killed_saving_leaves_no_pair_of_two_networks(tmp_path, monkeypatch, number, done):
    save_network(tmp_path, ConResNet(2, 2, dropout=0.25, **SMALL), scan_settings())
    calls = []

    def replace(*arguments) -> None:
        calls.append(arguments)
        if done or len(calls) < number:
            rename(*arguments)
        if len(calls) == number:
            raise Killed

    rename = os.rename
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(Killed):
        save_network(tmp_path, ConResNet(2, 2, dropout=0.5, **SMALL), scan_settings())
    if (number, done) == (2, True):
        assert read_network(tmp_path)["network"]["arguments"]["dropout"] == 0.5
    else:
        with pytest.raises(ValueError, match=r"found no .*network\.json"):
            load_network(tmp_path)


@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_label_map_keeps_the_geometry_of_the_scan(tmp_path, ending):
    affine = np.array([[0, -2.0, 0, 7], [1.5, 0, 0, 8], [0, 0, 3.0, 9], [0, 0, 0, 1]])
    scan = nib.Nifti1Image(np.zeros((4, 5, 6), np.float32), affine)
    scan.set_sform(affine, code=4)
    nib.save(scan, tmp_path / "scan.nii.gz")
    label = torch.arange(120).reshape(1, 4, 5, 6)
    write_label_map(tmp_path / f"mask.{ending}", label, load_volume(tmp_path / "scan.nii.gz"))
    written = nib.load(tmp_path / f"mask.{ending}")
    np.testing.assert_array_equal(np.asarray(written.dataobj), label[0].numpy())
    for same in (label.to(torch.uint16), label.bfloat16(), label.double().requires_grad_()):
        write_label_map(tmp_path / "same.nii", same, load_volume(tmp_path / "scan.nii.gz"))
        np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "same.nii").dataobj), label[0].numpy())
    for other in (label + 200, (label + 200).to(torch.uint16), label.double() + 0.5):
        with pytest.raises(ValueError, match="whole numbers from 0 to 255, got values from"):
            write_label_map(tmp_path / "other.nii", other, load_volume(tmp_path / "scan.nii.gz"))
    with pytest.raises(ValueError, match=r"shape \(1, 4, 5, 6\), got \(1, 4, 5, 5\)"):
        write_label_map(tmp_path / "other.nii", label[..., :5], load_volume(tmp_path / "scan.nii.gz"))
    assert written.get_data_dtype() == np.uint8
    np.testing.assert_allclose(written.affine, affine, atol=1e-5)
    assert (int(written.header["sform_code"]), int(written.header["qform_code"])) == (4, 0)
    assert written.header.get_xyzt_units() == scan.header.get_xyzt_units()
    with pytest.raises(TypeError, match="expected a MetaTensor"):
        write_label_map(tmp_path / "other.nii", label, label)


def test_file_is_replaced_when_complete(tmp_path):
    file = tmp_path / "a" / "table.md"
    for text in ("first", "second"):
        with atomic_path(file) as temporary:
            temporary.write_text(text)
            assert temporary.suffix == ".md"
            assert not file.exists() or file.read_text() == "first"
        assert file.read_text() == text
    assert list(file.parent.iterdir()) == [file]


def test_folder_appears_when_complete(tmp_path):
    with atomic_path(tmp_path / "data") as temporary:
        temporary.mkdir()
        (temporary / "file").write_text("x")
        assert not (tmp_path / "data").exists()
    assert (tmp_path / "data" / "file").read_text() == "x"
    with pytest.raises(OSError, match="not empty"), atomic_path(tmp_path / "data") as temporary:
        temporary.mkdir()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_interrupted_writing_leaves_nothing(tmp_path, error):
    def write() -> None:
        with atomic_path(tmp_path / "file") as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert list(tmp_path.iterdir()) == []


def test_left_overs_of_killed_writers_are_removed(tmp_path):
    """Only theirs: not those of a process that is still writing, nor a folder of somebody else."""
    for name in (".mask.nii.backup", ".monai_conres-abcdefgh", "a.monai_conres-abcdefgh"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (0, 0))
    others = set(tmp_path.iterdir())
    half = tmp_path / ".other.nii.monai_conres-ab3d_fgh"  # nobody holds its lock
    half.mkdir()
    (half / "mask.nii").write_text("half")
    with atomic_path(tmp_path / "mask.nii") as writing:
        assert half.exists()  # a writer that began this moment has no lock yet
        for folder in (half, writing.parent):
            os.utime(folder, (0, 0))
        with atomic_path(tmp_path / "mask.nii") as temporary:
            temporary.write_text("complete")
        assert not half.exists()
        writing.write_text("complete")
    assert set(tmp_path.iterdir()) == others | {tmp_path / "mask.nii"}


def test_new_folder_of_another_writer_is_not_locked(tmp_path, monkeypatch):
    """Its writer could then not lock it, and would end with an error."""
    (tmp_path / ".mask.nii.monai_conres-ab3d_fgh").mkdir()
    monkeypatch.setattr("monai_conres.files._lock", lambda folder: pytest.fail(f"locked {folder}"))
    remove_left_overs(tmp_path)
    assert (tmp_path / ".mask.nii.monai_conres-ab3d_fgh").is_dir()


@pytest.mark.parametrize(("hours", "stays"), [(23, True), (25, False)])
def test_left_overs_go_after_a_day_where_folders_have_no_locks(tmp_path, monkeypatch, hours, stays):
    half = tmp_path / ".mask.nii.monai_conres-ab3d_fgh"
    half.mkdir()
    os.utime(half, (time.time() - 3600 * hours,) * 2)
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(95, "not supported")))
    with atomic_path(tmp_path / "mask.nii") as temporary:
        temporary.write_text("complete")
    assert half.exists() == stays


def test_killed_writer_leaves_nothing_after_the_next_run(tmp_path):
    """With another process, which is killed while it writes."""
    code = f"""if True:
        import time
        from monai_conres.files import atomic_path
        with atomic_path({str(tmp_path / "case0.nii.gz")!r}) as temporary:
            temporary.write_text("half")
            print(flush=True)
            time.sleep(60)"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    (running,) = tmp_path.iterdir()
    for file in ("case1.nii.gz", "case2.nii.gz"):
        os.utime(running, (0, 0))
        with atomic_path(tmp_path / file) as temporary:
            temporary.write_text("complete")
        assert running.exists() == (file == "case1.nii.gz")
        process.kill()
        process.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["case1.nii.gz", "case2.nii.gz"]
