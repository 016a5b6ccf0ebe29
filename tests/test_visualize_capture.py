"""What is captured, against the equations in numpy and against what the network makes of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.networks.nets import BasicUNet
from torch.utils.checkpoint import checkpoint

from monai_conres import ConResNet, ConResWrapper, attach_conres
from monai_conres.visualize import StageFeatures, capture_features

SIZE = (32, 16, 48)


def small_network(**kwargs) -> ConResNet:
    torch.manual_seed(0)
    return ConResNet(2, 3, channels=(8, 16, 32), strides=(2, (2, 1, 2)), blocks=(1, 1, 1, 1), **kwargs)


def wrapped_unet(**kwargs) -> ConResWrapper:
    torch.manual_seed(0)
    backbone = BasicUNet(in_channels=2, out_channels=3, features=(8, 8, 16, 32, 64, 8))
    return attach_conres(backbone, 2, 3, width=8, spatial_size=SIZE, **kwargs).eval()


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(1, 2, *SIZE, generator=torch.Generator().manual_seed(1))


def hooks(network) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules())


def sigmoid(x: torch.Tensor) -> np.ndarray:
    return 1 / (1 + np.exp(-x.numpy().astype(np.float64)))


@torch.no_grad()
def test_conresnet_against_the_equations(image):
    network = small_network().eval()
    with capture_features(network) as stages:
        logits = network(image)
    assert [tuple(stage.features.shape) for stage in stages] == [(1, 8, 16, 8, 24), (1, 8, 32, 16, 48)]
    for stage in stages:
        gate = sigmoid(stage.residual)
        np.testing.assert_allclose(stage.gate.numpy(), gate, atol=1e-6)
        np.testing.assert_allclose(stage.gated.numpy(), stage.features.numpy() * (1 + gate), atol=1e-5)
    # the last gated features are what the head gets, and the residuals what the heads get
    torch.testing.assert_close(network.head(stages[-1].gated), logits)
    expected = network.heads(image).residuals
    for got, logits in zip(network.residual_decoder.predict([s.residual for s in stages]), expected, strict=True):
        torch.testing.assert_close(got, logits)
    # the features before the gate, with the residual of the stage before, are what the module got
    again = network.residual_decoder.stages[1](stages[1].features, stages[0].residual)
    torch.testing.assert_close(again, (stages[1].gated, stages[1].residual))


@torch.no_grad()
def test_narrow_residual_and_learned_strength(image):
    network = wrapped_unet(zero_init=True)
    for number, module in enumerate(network.decoder.stages):
        module.strength.copy_(torch.randn(module.strength.shape, generator=torch.Generator().manual_seed(number)))
    with capture_features(network) as stages:
        logits = network(image)
    assert [stage.features.shape[1] for stage in stages] == [32, 16, 8, 8]
    assert [stage.residual.shape[1] for stage in stages] == [8] * 4
    for stage, module in zip(stages, network.decoder.stages, strict=True):
        residual = stage.residual
        if module.expand is not None:
            weight = module.expand.standardized_weight()[..., 0, 0, 0]
            residual = torch.einsum("oc,bcdhw->bodhw", weight, residual)
        gate = module.strength.numpy()[:, None, None, None] * sigmoid(residual)
        np.testing.assert_allclose(stage.gate.numpy(), gate, atol=1e-5)
        np.testing.assert_allclose(stage.gated.numpy(), stage.features.numpy() * (1 + gate), atol=1e-4)
    torch.testing.assert_close(network.backbone.final_conv(stages[-1].gated), logits)


@torch.no_grad()
def test_the_network_is_left_as_it_was(image):
    for network in (small_network().eval(), wrapped_unet(), small_network(mapping=False, attention=False).eval()):
        before, number = network(image), hooks(network)
        with capture_features(network) as stages:
            torch.testing.assert_close(network(image), before, rtol=0, atol=0)
            assert hooks(network) > number
        assert hooks(network) == number
        first = stages[0]
        network(image + 1)
        assert stages[0] is first
        with pytest.raises(ZeroDivisionError), capture_features(network):
            raise ZeroDivisionError
        assert hooks(network) == number
        assert not network.training


@torch.no_grad()
def test_the_last_pass_stays(image):
    network = small_network().eval()
    with capture_features(network) as stages:
        network(image + 1)
        network(image)
        with pytest.raises(ValueError, match="expected an image"):
            network(image[:, :1])
    with capture_features(network) as expected:
        network(image)
    assert len(stages) == 2
    for stage, other in zip(stages, expected, strict=True):
        torch.testing.assert_close(tuple(stage), tuple(other), rtol=0, atol=0)


@pytest.mark.parametrize("make", [small_network, wrapped_unet])
def test_training_captures_once_also_where_everything_is_computed_again(image, make):
    network = make().train()
    with capture_features(network) as stages:
        segmentation, residuals = checkpoint(network, image, use_reentrant=False)
        before = list(stages)
        (segmentation.sum() + sum(logits.sum() for logits in residuals)).backward()
    assert len(before) == len(network.residual_decoder.stages if make is small_network else network.stages)
    assert all(stage is other for stage, other in zip(stages, before, strict=True))
    assert not any(tensor.requires_grad for stage in stages for tensor in stage)


@torch.no_grad()
def test_baselines(image):
    network = small_network(mapping=False, attention=False).eval()
    with capture_features(network) as stages:
        logits = network(image)
    assert all(stage.gate is None and stage.residual is None for stage in stages)
    assert [stage.features.shape[1] for stage in stages] == [8, 8]
    torch.testing.assert_close(network.head(stages[-1].gated), logits)

    wrapped = wrapped_unet()
    names, plain = wrapped.stages, wrapped.unwrap()
    with capture_features(plain, stages=names) as stages:
        logits = plain(image)
    assert [stage.features.shape[1] for stage in stages] == [32, 16, 8, 8]
    torch.testing.assert_close(plain.final_conv(stages[-1].features), logits)


class OneUpSampling(torch.nn.Module):
    """One module for all of its scales, as weight-sharing networks have it."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv3d(1, 4, 1)
        self.up = torch.nn.Upsample(scale_factor=2)

    def forward(self, x):
        return self.up(self.up(self.conv(x)))


@torch.no_grad()
def test_calls_of_one_module():
    network, image = OneUpSampling(), torch.randn(1, 1, 3, 4, 5)
    coarse = network.up(network.conv(image))
    for names, expected in ((["up", "up#1"], [coarse, network.up(coarse)]), (["up#1"], [network.up(coarse)])):
        with capture_features(network, stages=names) as stages:
            for given in (torch.zeros_like(image), image):
                network(given)
        for stage, features in zip(stages, expected, strict=True):
            torch.testing.assert_close(stage.features, features, rtol=0, atol=0)
    assert hooks(network) == 0
    for name in ("down#1", "up#", "up#-1", "up#1#2", "up#²"):
        with pytest.raises(ValueError, match=rf"got \['{name}'\]"), capture_features(network, stages=[name]):
            pass
    with pytest.raises(RuntimeError, match="got 1 of them"), capture_features(network, stages=["up", "up#7"]):
        network(image)


@torch.no_grad()
def test_heads_begin_a_pass_too(image):
    network = small_network(mapping=False, attention=False).eval()
    with capture_features(network, stages=["decoder.0"]) as stages:
        network.heads(torch.zeros_like(image))
        network.heads(image)
    with capture_features(network) as expected:
        network(image)
    torch.testing.assert_close(stages[0].features, expected[0].features, rtol=0, atol=0)


@torch.no_grad()
def test_without_attention(image):
    network = small_network(attention=False).eval()
    with capture_features(network) as stages:
        expected = network.heads(image)
    assert all(stage.gate is None for stage in stages)
    torch.testing.assert_close(network.head(stages[-1].gated), expected.segmentation)
    with pytest.raises(RuntimeError, match=r"call network.heads\(image\)"), capture_features(network):
        network(image)


def test_errors(image):
    with pytest.raises(ValueError, match="expected stages for BasicUNet"), capture_features(BasicUNet()):
        pass
    unet = BasicUNet()
    with pytest.raises(ValueError, match=r"got \['upcat_9'\]"), capture_features(unet, stages=["upcat_1", "upcat_9"]):
        pass
    assert hooks(unet) == 0
    network = small_network()
    with pytest.raises(ValueError, match="expected no stages"), capture_features(network, stages=["decoder.0"]):
        pass
    assert StageFeatures._fields == ("features", "residual", "gate", "gated")
