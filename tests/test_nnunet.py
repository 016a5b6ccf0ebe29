"""The trainer of examples/nnunet, on nnU-Net's own class or, where that is not installed, one that stands in for it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from monai.networks import one_hot

from monai_conres import ContextResidualLoss

unet = pytest.importorskip("dynamic_network_architectures.architectures.unet", reason="nnU-Net's networks")
FILE = Path(__file__).parent.parent / "examples" / "nnunet" / "nnUNetTrainerConRes.py"
PLAIN = "nnunetv2.training.nnUNetTrainer.nnUNetTrainer"
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
CONFIGURATION = SimpleNamespace(
    patch_size=[8, 16, 16],
    network_arch_class_name="dynamic_network_architectures.architectures.unet.PlainConvUNet",
    network_arch_init_kwargs=ARCHITECTURE,
    network_arch_init_kwargs_req_import=("conv_op", "norm_op", "dropout_op", "nonlin"),
)


class StandIn:
    """What the example takes from nnU-Net's class."""

    @staticmethod
    def build_network_architecture(plans, configuration, inputs, outputs, enable_deep_supervision=True):
        known = {"conv_op": torch.nn.Conv3d, "norm_op": torch.nn.InstanceNorm3d, "nonlin": torch.nn.LeakyReLU}
        arguments = {**configuration.network_arch_init_kwargs, **known}
        return unet.PlainConvUNet(
            input_channels=inputs, num_classes=outputs, deep_supervision=enable_deep_supervision, **arguments
        )

    def set_deep_supervision_enabled(self, enabled):
        self.network.decoder.deep_supervision = enabled

    def _build_loss(self):
        return squared


def squared(output, target):
    """Stands in for nnU-Net's loss; of deep supervision, too."""
    if isinstance(output, (list, tuple)):
        return sum(squared(*pair) for pair in zip(output, target, strict=True))
    return output.square().mean() + target.float().mean()


@pytest.fixture
def example(monkeypatch) -> ModuleType:
    if importlib.util.find_spec("nnunetv2") is None:
        parts = PLAIN.split(".")
        for number in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:number]), ModuleType(parts[number - 1]))
        sys.modules[PLAIN].nnUNetTrainer = StandIn
    spec = importlib.util.spec_from_file_location(FILE.stem, FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.nnUNetTrainer, "_build_loss", StandIn._build_loss)
    return module


def trainer(example: ModuleType, *, regions: bool = False, ignore: bool = False, ddp: bool = False):
    """Without nnU-Net's ``__init__``, which reads files."""
    made = object.__new__(example.nnUNetTrainerConRes)
    made.label_manager = SimpleNamespace(has_regions=regions, has_ignore_label=ignore)
    made.is_ddp = ddp
    return made


def test_training_and_validation(example):
    torch.manual_seed(0)
    own = trainer(example)
    network = own.build_network_architecture(None, CONFIGURATION, 1, 3, True)
    loss = own._build_loss()
    image, label = torch.randn(2, 1, 8, 16, 16), torch.randint(0, 3, (2, 1, 8, 16, 16), dtype=torch.int16)
    targets = [label, label[..., ::2, ::2]]
    output = network(image)
    assert [tuple(logits.shape) for logits in output.residuals] == [(2, 3, 8, 16, 16), (2, 3, 8, 8, 8)]
    residual = ContextResidualLoss(spatial_axis=0)(output.residuals, one_hot(label.long(), num_classes=3))
    expected = squared(output.segmentation, targets) + residual
    torch.testing.assert_close(loss(output, targets), expected)
    loss(output, targets).backward()
    assert all(parameter.grad is not None for parameter in network.decoder.parameters())

    network.eval()
    torch.testing.assert_close(loss(network(image), targets), squared(network(image), targets))
    own.network = network
    own.set_deep_supervision_enabled(False)
    assert network(image).shape == (2, 3, 8, 16, 16)
    output = network.train()(image)
    residual = ContextResidualLoss(spatial_axis=0)(output.residuals, one_hot(label.long(), num_classes=3))
    torch.testing.assert_close(loss(output, label), squared(output.segmentation, label) + residual)
    own.set_deep_supervision_enabled(True)
    assert len(network.eval()(image)) == 2
    # as in inference, in another process
    twin = own.build_network_architecture(None, CONFIGURATION, 1, 3, False)
    twin.load_state_dict(network.state_dict())
    torch.testing.assert_close(twin.eval()(image), network(image)[0])


def test_regions_are_their_own_masks(example):
    own = trainer(example, regions=True)
    network = own.build_network_architecture(None, CONFIGURATION, 1, 2, False)
    image, label = torch.randn(1, 1, 8, 16, 16), torch.rand(1, 2, 8, 16, 16) > 0.5
    output = network(image)
    expected = squared(output.segmentation, label) + ContextResidualLoss(spatial_axis=0)(output.residuals, label)
    torch.testing.assert_close(own._build_loss()(output, label), expected)


def test_the_slices_are_along_the_first_axis(example):
    """Where nnU-Net puts the axis of the largest voxel edge."""
    network = trainer(example).build_network_architecture(None, CONFIGURATION, 1, 3, False)
    assert network.decoder.spatial_axis == example.SPATIAL_AXIS == 0


def test_what_has_no_residual_is_refused(example):
    flat = SimpleNamespace(**{**vars(CONFIGURATION), "patch_size": [16, 16]})
    with pytest.raises(ValueError, match="expected a 3D configuration"):
        example.nnUNetTrainerConRes.build_network_architecture(None, flat, 1, 3)
    with pytest.raises(ValueError, match="to be ignored"):
        trainer(example, ignore=True)._build_loss()
