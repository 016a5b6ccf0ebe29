"""The trainer for nnU-Net, on nnU-Net's own class or, without nnU-Net, on a class with the same methods."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from monai.networks import one_hot

from monai_conres import ContextResidualLoss
from monai_conres.files import load_network

unet = pytest.importorskip("dynamic_network_architectures.architectures.unet", reason="nnU-Net's networks")
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


def trainer(module, folder=None, *, labels=None, regions=False, ignore=False, **configuration):
    """Without nnU-Net's ``__init__``, which reads files."""
    labels = labels or {"background": 0, "edema": 2, "core": 1}
    made = object.__new__(module.nnUNetTrainerConRes)
    plans = {"transpose_forward": [0, 1, 2], "foreground_intensity_properties_per_channel": {"0": CT}}
    made.plans_manager = SimpleNamespace(plans=plans, **plans)
    made.configuration_manager = SimpleNamespace(**{**CONFIGURATION, **configuration})
    heads = len(labels) - regions
    made.label_manager = SimpleNamespace(has_regions=regions, has_ignore_label=ignore, num_segmentation_heads=heads)
    made.dataset_json = {"labels": labels, "channel_names": {"0": "CT"}}
    made.dataset_class, made.preprocessed_dataset_folder, made.output_folder = Cases, "", folder
    made.inference_allowed_mirroring_axes, made.num_input_channels, made.num_epochs = (0, 2), 1, 5
    made.local_rank, made.is_ddp = 0, False
    return made


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 1, 8, 16, 16), torch.randint(0, 3, (2, 1, 8, 16, 16), dtype=torch.int16)


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
    with pytest.raises(ValueError, match="got an ignore label"):
        trainer(module, ignore=True).initialize()
