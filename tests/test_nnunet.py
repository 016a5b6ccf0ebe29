"""The trainer for nnU-Net, on nnU-Net's own class or, without nnU-Net, on a class with the same methods."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.networks import one_hot

from monai_conres import ContextResidualLoss, complete_scan
from monai_conres.__main__ import main
from monai_conres.files import load_network
from monai_conres.phantom import tumor_phantom

unet = pytest.importorskip("dynamic_network_architectures.architectures.unet", reason="nnU-Net's networks")
ROOT = Path(__file__).parent.parent
PLAIN = "nnunetv2.training.nnUNetTrainer.nnUNetTrainer"
TRAINER = "monai_conres.nnunet.nnUNetTrainerConRes"
ARCHITECTURE = {
    "n_stages": 3,
    "features_per_stage": [8, 16, 32],
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
    "n_conv_per_stage": [1, 1, 1],
    "n_conv_per_stage_decoder": [1, 1],
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}
CONFIGURATION = {
    "patch_size": [8, 16, 16],
    "spacing": [3.0, 0.5, 0.75],
    "normalization_schemes": ["ZScoreNormalization"],
    "use_mask_for_norm": [True],
    "network_arch_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "network_arch_init_kwargs": ARCHITECTURE,
    "network_arch_init_kwargs_req_import": ("conv_op", "norm_op", "dropout_op", "nonlin"),
}
CT = {"mean": 100.0, "std": 50.0, "percentile_00_5": -50.0, "percentile_99_5": 300.0}


class StandIn:
    """What the trainer takes from nnU-Net's class."""

    @staticmethod
    def build_network_architecture(plans, configuration, inputs, outputs, enable_deep_supervision=True):
        known = {"conv_op": torch.nn.Conv3d, "norm_op": torch.nn.InstanceNorm3d, "nonlin": torch.nn.LeakyReLU}
        arguments = {**configuration.network_arch_init_kwargs, **known}
        return unet.PlainConvUNet(
            input_channels=inputs, num_classes=outputs, deep_supervision=enable_deep_supervision, **arguments
        )

    def initialize(self):
        self.network = self.build_network_architecture(
            self.plans_manager, self.configuration_manager, 1, self.label_manager.num_segmentation_heads, True
        )
        self.loss = self._build_loss()

    def _build_loss(self):
        return squared

    def do_split(self):
        return ["case_1", "case_2"], ["case_3"]

    def on_train_end(self):
        self.ended = True

    def print_to_log_file(self, text):
        self.log = text


def squared(output, target):
    """Stands in for nnU-Net's loss, also with deep supervision."""
    if isinstance(output, (list, tuple)):
        return sum(squared(*pair) for pair in zip(output, target, strict=True))
    return output.square().mean() + target.float().mean()


@pytest.fixture
def module(monkeypatch) -> ModuleType:
    if importlib.util.find_spec("nnunetv2") is None:
        parts = PLAIN.split(".")
        for number in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:number]), ModuleType(parts[number - 1]))
        sys.modules[PLAIN].nnUNetTrainer = StandIn
    monkeypatch.delitem(sys.modules, TRAINER, raising=False)
    module = importlib.import_module(TRAINER)
    for name in ("initialize", "_build_loss", "do_split", "on_train_end", "print_to_log_file"):
        monkeypatch.setattr(module.nnUNetTrainer, name, getattr(StandIn, name))
    return module


class Cases:
    """Stands in for nnU-Net's data set of preprocessed cases."""

    properties = {"sitk_stuff": {"direction": (1, 0, 0, 0, 1, 0, 0, 0, 1)}}

    def __init__(self, folder, identifiers):
        pass

    def load_case(self, name):
        return None, None, None, self.properties


def trainer(module, folder=None, *, labels=None, regions=False, ignore=None, **configuration):
    """Without nnU-Net's ``__init__``, which reads files."""
    labels = labels or {"background": 0, "edema": 2, "core": 1}
    made = object.__new__(module.nnUNetTrainerConRes)
    plans = {"transpose_forward": [0, 1, 2], "foreground_intensity_properties_per_channel": {"0": CT}}
    made.plans_manager = SimpleNamespace(plans=plans, **plans)
    made.configuration_manager = SimpleNamespace(**{**CONFIGURATION, **configuration})
    heads = len(labels) - regions - ("ignore" in labels)
    made.label_manager = SimpleNamespace(has_regions=regions, ignore_label=ignore, num_segmentation_heads=heads)
    made.dataset_json = {"labels": labels, "channel_names": {"0": "CT"}}
    made.dataset_class, made.preprocessed_dataset_folder, made.output_folder = Cases, "", folder
    made.inference_allowed_mirroring_axes, made.num_input_channels, made.num_epochs = (0, 2), 1, 5
    made.local_rank, made.is_ddp = 0, False
    return made


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 1, 8, 16, 16), torch.randint(0, 3, (2, 1, 8, 16, 16), dtype=torch.int16)


def test_command_prints_the_folder_of_the_trainer(capsys):
    main(["nnunet-path"])
    folder = Path(capsys.readouterr().out.strip())
    assert (folder / "nnUNetTrainerConRes.py").is_file()


def test_trainer_adds_the_residual_loss_in_training_only(module):
    image, label = batch()
    own = trainer(module)
    own.initialize()
    assert own.network.decoder.spatial_axis == 0  # where nnU-Net puts the axis of the largest voxel edge
    targets = [label, label[..., ::2, ::2]]
    output = own.network(image)
    assert [tuple(logits.shape) for logits in output.residuals] == [(2, 2, 8, 16, 16), (2, 2, 8, 8, 8)]
    residual = ContextResidualLoss(spatial_axis=0)(output.residuals, one_hot(label.long(), num_classes=3))
    loss = own.loss(output, targets)
    torch.testing.assert_close(loss, squared(output.segmentation, targets) + residual)
    loss.backward()
    assert all(parameter.grad is not None for parameter in own.network.decoder.parameters())
    own.network.eval()
    torch.testing.assert_close(own.loss(own.network(image), targets), squared(own.network(image), targets))


@pytest.mark.parametrize("around", [lambda network: network, torch.nn.DataParallel, torch.compile])
def test_trainer_switches_deep_supervision(module, around):
    image, _ = batch()
    own = trainer(module)
    own.initialize()
    network, own.network = own.network, around(own.network)
    own.set_deep_supervision_enabled(False)
    assert network.eval()(image).shape == (2, 3, 8, 16, 16)
    assert network.with_residual(image)[1].shape == (2, 2, 8, 16, 16)
    own.set_deep_supervision_enabled(True)
    assert len(network(image)) == 2


REGIONS = {"labels": {"background": 0, "whole": [1, 2], "core": [2]}, "regions": True}


@pytest.mark.parametrize("options", [{}, REGIONS])
def test_inference_builds_the_network_of_the_training(module, options):
    image, _ = batch()
    own = trainer(module, **options)
    own.initialize()
    plans, heads = (own.plans_manager, own.configuration_manager), own.label_manager.num_segmentation_heads
    twin = own.build_network_architecture(*plans, 1, heads, False)
    twin.load_state_dict(own.network.state_dict())
    torch.testing.assert_close(twin.eval()(image), own.network.eval()(image)[0])


def test_weights_of_version_0_1_have_a_mask_for_each_output_channel(module):
    own = trainer(module)  # plans.json of version 0.1 has no entry of the trainer
    network = own.build_network_architecture(own.plans_manager, own.configuration_manager, 1, 3, False)
    assert network.decoder.heads[0].out_channels == 3


def test_regions_are_their_own_masks(module):
    own = trainer(module, **REGIONS)
    own.initialize()
    own.set_deep_supervision_enabled(False)
    image, label = batch()[0], torch.rand(2, 2, 8, 16, 16) > 0.5
    output = own.network(image)
    expected = squared(output.segmentation, label) + ContextResidualLoss(spatial_axis=0)(output.residuals, label)
    torch.testing.assert_close(own.loss(output, label), expected)


@pytest.mark.parametrize("regions", [False, True])
def test_ignored_voxels_have_no_residual_loss(module, tmp_path, regions):
    labels = {**(REGIONS["labels"] if regions else {"background": 0, "edema": 2, "core": 1}), "ignore": 3}
    own = trainer(module, tmp_path, labels=labels, regions=regions, ignore=3)
    own.initialize()
    own.set_deep_supervision_enabled(False)
    image, label = batch()
    label[:, :, [0, 1, 2, 5, 7]] = 3
    output = own.network(image)
    target, masks = label, torch.cat([label == 1, label == 2], 1)
    if regions:  # as nnU-Net makes it: the ignored voxels are the last channel
        masks = torch.cat([(label == 1) | (label == 2), label == 2], 1)
        target = torch.cat([masks, label == 3], 1)
    loss = own.loss(output, target)
    masks = masks.long().masked_fill(label == 3, 255)
    residual = ContextResidualLoss(spatial_axis=0, ignore_index=255)(output.residuals, masks)
    torch.testing.assert_close(loss, squared(output.segmentation, target) + residual)
    gradient = torch.autograd.grad(residual, output.residuals[0])[0]
    assert gradient[:, :, 4].all()  # slices 3 and 4 have labels
    assert not gradient[:, :, [0, 1, 2, 3, 5, 6, 7]].any()
    own.save_network()
    assert set(load_network(tmp_path).scans.classes) == set(labels) - {"background", "ignore"}


def test_end_of_training_writes_a_complete_network(module, tmp_path):
    image, _ = batch()
    own = trainer(module, tmp_path)
    own.initialize()
    own.on_train_end()
    assert own.ended
    loaded = load_network(tmp_path)
    own.set_deep_supervision_enabled(False)
    with torch.no_grad():
        got, want = loaded.network.with_residual(image), own.network.eval().with_residual(image)
    torch.testing.assert_close(got, want)
    scans = loaded.scans
    assert scans.classes == {"core": (1,), "edema": (2,)}
    assert (scans.activation, scans.channels, scans.orientation) == ("softmax", ("CT",), "SPL")
    assert (scans.patch_size, scans.spacing) == ((8, 16, 16), (3.0, 0.5, 0.75))
    assert scans.normalization == ({"name": "NormalizeIntensity", "nonzero": True, "channel_wise": True},)
    assert scans.flip_axes == ((0,), (2,), (0, 2))
    assert loaded.training == {"cases": ["case_1", "case_2"], "epochs": 5}


def test_network_json_of_regions_and_ct(module, tmp_path, monkeypatch):
    own = trainer(module, tmp_path, **REGIONS, normalization_schemes=["CTNormalization"])
    own.plans_manager.transpose_forward = [1, 0, 2]
    affine = np.diag([-1.0, 1.0, 3.0, 1.0])
    monkeypatch.setattr(Cases, "properties", {"nibabel_stuff": {"original_affine": affine}})
    own.initialize()
    own.save_network()
    scans = load_network(tmp_path).scans
    assert (scans.activation, scans.orientation) == ("sigmoid", "ASL")
    assert scans.classes == {"whole": (1, 2), "core": (2,)}
    hounsfield = torch.tensor([-1000.0, -50.0, 100.0, 300.0, 1000.0])[None]
    scaled = scans.normalize("image")({"image": hounsfield})["image"]
    torch.testing.assert_close(torch.as_tensor(scaled), (hounsfield.clamp(-50, 300) - 100) / 50)


def test_network_json_is_left_out_where_monai_has_no_such_preprocessing(module, tmp_path):
    own = trainer(module, tmp_path, normalization_schemes=["RGBTo01Normalization"])
    own.initialize()
    own.on_train_end()
    assert own.ended
    assert "network.json is not written" in own.log
    assert "RGBTo01Normalization" in own.log
    assert not list(tmp_path.iterdir())


def test_configurations_without_a_residual_are_refused(module):
    with pytest.raises(ValueError, match="expected a 3D configuration"):
        trainer(module, patch_size=[16, 16]).initialize()


# nnU-Net itself


def nnunet_python() -> Path | None:
    """The Python of an environment with nnU-Net: this one, or the one that MONAI_CONRES_NNUNET names."""
    if importlib.util.find_spec("nnunetv2") is not None:
        return Path(sys.executable)
    return Path(os.environ["MONAI_CONRES_NNUNET"]) if "MONAI_CONRES_NNUNET" in os.environ else None


SHORT = """
from monai_conres.nnunet.nnUNetTrainerConRes import nnUNetTrainerConRes

class ShortConRes(nnUNetTrainerConRes):
    def initialize(self):
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 2, 3, 1
        super().initialize()
"""
DATA = {"channel_names": {"0": "FLAIR", "1": "T2"}, "numTraining": 5, "file_ending": ".nii.gz"}
WHOLE_AND_CORE = {"background": 0, "whole": [1, 2, 3], "core": [2, 3]}
CLASSES = {"background": 0, "edema": 1, "necrosis": 2, "enhancing": 3}


def write_raw(folder: Path, labels: dict, *, drawn: tuple[int, ...] | None) -> None:
    """Five phantoms in nnU-Net's layout. Only the slices ``drawn`` have labels, the others have the value 4."""
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    description = {**DATA, "labels": labels}
    if any(isinstance(value, list) for value in labels.values()):
        description["regions_class_order"] = [1, 2]
    for seed in range(5):
        image, label = tumor_phantom((24, 28, 20), seed=seed)
        for channel, modality in enumerate((0, 3)):
            nib.save(
                nib.Nifti1Image(image[modality], np.diag([1.0, 1.0, 2.0, 1.0])),
                folder / "imagesTr" / f"case{seed}_000{channel}.nii.gz",
            )
        if drawn is not None:
            label[..., [number for number in range(20) if number not in drawn]] = 4
            description["labels"] = {**labels, "ignore": 4}
        nib.save(nib.Nifti1Image(label, np.diag([1.0, 1.0, 2.0, 1.0])), folder / "labelsTr" / f"case{seed}.nii.gz")
    (folder / "dataset.json").write_text(json.dumps(description))


@pytest.mark.slow
@pytest.mark.parametrize("drawn", [None, (5, 9, 10, 14)], ids=["all slices", "four slices"])
@pytest.mark.parametrize("labels", [CLASSES, WHOLE_AND_CORE], ids=["classes", "regions"])
def test_nnunet_itself_plans_trains_validates_and_predicts(tmp_path, labels, drawn):
    """The installed commands of nnU-Net, on phantoms, for 6 iterations on a CPU."""
    python = nnunet_python()
    if python is None:
        pytest.skip("no nnU-Net here; set MONAI_CONRES_NNUNET to the Python of an environment with nnunetv2 2.8")
    write_raw(tmp_path / "raw" / "Dataset001_Phantom", labels, drawn=drawn)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "ShortConRes.py").write_text(SHORT)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("nnUNet")}
    environment |= {f"nnUNet_{name}": str(tmp_path / name) for name in ("raw", "preprocessed", "results")}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "nnUNet_compile": "f",
        "nnUNet_n_proc_DA": "1",
        "nnUNet_def_n_proc": "1",
    }

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            [str(python), "-W", "ignore", *map(str, command)],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    trainers = run("-m", "monai_conres", "nnunet-path").strip()
    environment["nnUNet_extTrainer"] = os.pathsep.join([trainers, str(tmp_path / "own")])
    commands = python.parent
    run(commands / "nnUNetv2_plan_and_preprocess", "-d", 1, "-c", "3d_fullres", "-np", 1, "-npfp", 1)
    log = run(commands / "nnUNetv2_train", 1, "3d_fullres", 0, "-tr", "ShortConRes", "-device", "cpu")
    assert "Mean Validation Dice" in log
    fold = next((tmp_path / "results").glob("*/*/fold_0"))
    assert (fold / "validation" / "summary.json").is_file()
    images = tmp_path / "raw" / "Dataset001_Phantom" / "imagesTr"
    options = ("-d", 1, "-c", "3d_fullres", "-f", 0, "-tr", "ShortConRes", "-device", "cpu", "-npp", 1, "-nps", 1)
    run(commands / "nnUNetv2_predict", *options, "-i", images, "-o", tmp_path / "out", "--disable_tta")
    predictions = sorted((tmp_path / "out").glob("*.nii.gz"))
    assert len(predictions) == 5
    assert set(np.unique([np.asarray(nib.load(file).dataobj) for file in predictions])) <= {0, 1, 2, 3}

    trained = load_network(fold)  # complete by itself, without nnU-Net
    assert list(trained.scans.classes) == list(labels)[1:]
    scans = [images / f"case0_000{channel}.nii.gz" for channel in (0, 1)]
    _, label = tumor_phantom((24, 28, 20), seed=0)
    nib.save(nib.Nifti1Image(label, np.diag([1.0, 1.0, 2.0, 1.0])), tmp_path / "drawn.nii.gz")
    completed = complete_scan(trained, scans, tmp_path / "drawn.nii.gz", slices=[10], propose=1)
    np.testing.assert_array_equal(completed.label[0, :, :, 10].numpy(), label[..., 10])
