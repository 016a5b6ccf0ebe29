"""Captured features against the equations in numpy and against the network's own heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.networks.nets import SegResNet

from monai_conres import ConResNet, ConResWrapper, attach_conres
from monai_conres.visualize import capture_features

SIZE = (16, 8, 24)


def small_network(context: str = "attention", **kwargs) -> ConResNet:
    torch.manual_seed(0)
    settings = {"channels": (8, 16, 32), "strides": (2, (2, 1, 2)), "blocks": (1, 1, 1, 1)}
    return ConResNet(2, 3, context=context, **settings, **kwargs).eval()


def wrapped_network(**kwargs) -> ConResWrapper:
    torch.manual_seed(0)
    backbone = SegResNet(init_filters=8, in_channels=2, out_channels=3)
    return attach_conres(backbone, in_channels=2, width=8, spatial_size=SIZE, **kwargs).eval()


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(1, 2, *SIZE, generator=torch.Generator().manual_seed(1))


def sigmoid(x: torch.Tensor) -> np.ndarray:
    return 1 / (1 + np.exp(-x.numpy().astype(np.float64)))


@torch.no_grad()
def test_capture_matches_the_equations_and_the_heads(image):
    network = small_network()
    with capture_features(network) as stages:
        logits = network(image)
    assert [tuple(stage.features.shape) for stage in stages] == [(1, 8, 8, 4, 12), (1, 8, 16, 8, 24)]
    for stage in stages:
        gate = sigmoid(stage.residual)
        np.testing.assert_allclose(stage.gate.numpy(), gate, atol=1e-6)
        np.testing.assert_allclose(stage.gated.numpy(), stage.features.numpy() * (1 + gate), atol=1e-5)
    torch.testing.assert_close(network.head(stages[-1].gated), logits)
    expected = network.heads(image).residuals
    for got, residual in zip(network.residual_decoder.predict([s.residual for s in stages]), expected, strict=True):
        torch.testing.assert_close(got, residual)
    # the features before the gate and the residual of the stage before are the inputs of the module
    coarse, fine = stages
    outputs = network.residual_decoder.stages[1](fine.features, coarse.residual)
    torch.testing.assert_close(outputs, (fine.gated, fine.residual))


@torch.no_grad()
def test_gate_contains_expansion_and_learned_strength(image):
    network = wrapped_network(zero_init=True)
    for number, module in enumerate(network.decoder.stages):
        module.strength.copy_(torch.randn(module.strength.shape, generator=torch.Generator().manual_seed(number)))
    with capture_features(network) as stages:
        logits = network(image)
    assert [stage.features.shape[1] for stage in stages] == [32, 16, 8]
    assert [stage.residual.shape[1] for stage in stages] == [8] * 3
    for stage, module in zip(stages, network.decoder.stages, strict=True):
        residual = stage.residual
        if module.expand is not None:
            weight = module.expand.standardized_weight()[..., 0, 0, 0]
            residual = torch.einsum("oc,bcdhw->bodhw", weight, residual)
        gate = module.strength.numpy()[:, None, None, None] * sigmoid(residual)
        np.testing.assert_allclose(stage.gate.numpy(), gate, atol=1e-5)
        np.testing.assert_allclose(stage.gated.numpy(), stage.features.numpy() * (1 + gate), atol=1e-4)
    torch.testing.assert_close(network.backbone.conv_final(stages[-1].gated), logits)


@pytest.mark.parametrize("make", [small_network, wrapped_network, lambda: small_network("none")])
@torch.no_grad()
def test_capture_keeps_the_last_pass_of_the_block(image, make):
    network = make()
    with capture_features(network) as expected:
        before = network(image)
    with capture_features(network) as stages:
        network(image + 1)
        torch.testing.assert_close(network(image), before, rtol=0, atol=0)
    network(image + 1)
    for stage, other in zip(stages, expected, strict=True):
        torch.testing.assert_close(tuple(stage), tuple(other), rtol=0, atol=0)
    with pytest.raises(ZeroDivisionError), capture_features(network) as stages:
        raise ZeroDivisionError
    network(image)
    assert stages == []


@torch.no_grad()
def test_capture_of_networks_without_residuals(image):
    network = small_network("none")
    with capture_features(network) as stages:
        logits = network(image)
    assert all(stage.gate is None and stage.residual is None for stage in stages)
    torch.testing.assert_close(network.head(stages[-1].gated), logits)
    wrapped = wrapped_network()
    names, plain = wrapped.stages, wrapped.unwrap()
    with capture_features(plain, stages=names) as stages:
        logits = plain(image)
    assert [stage.features.shape[1] for stage in stages] == [32, 16, 8]
    torch.testing.assert_close(plain.conv_final(stages[-1].features), logits)


@pytest.mark.parametrize("make", [small_network, wrapped_network])
@torch.no_grad()
def test_capture_without_gate_needs_with_residual(image, make):
    network = make(context="mapping")
    with capture_features(network) as stages:
        network.with_residual(image)
    assert all(stage.gate is None and stage.residual is not None for stage in stages)
    assert torch.equal(stages[-1].gated, stages[-1].features)
    with pytest.raises(ValueError, match=r"got 0 of them; .*network.with_residual\(image\)"), capture_features(network):
        network(image)


def test_stage_names_count_the_calls_of_a_module():
    up, image = torch.nn.Upsample(scale_factor=2), torch.randn(1, 1, 3, 4, 5)
    network = torch.nn.Sequential(up, up)
    with capture_features(network, stages=["0", "0#1"]) as stages:
        network(torch.zeros_like(image))
        network(image)
    for stage, factor in zip(stages, (2, 4), strict=True):
        expected = image[0, 0].numpy().repeat(factor, 0).repeat(factor, 1).repeat(factor, 2)
        np.testing.assert_array_equal(stage.features[0, 0], expected)
    with (
        pytest.raises(ValueError, match="runs 2 stages, got 1 of them"),
        capture_features(network, stages=["0", "0#7"]),
    ):
        network(image)


def test_errors_name_the_remedy():
    unet = SegResNet()
    for stages in ([], ["up_layers.0", "up_layers.9"]):
        with pytest.raises(ValueError, match="names of modules of SegResNet"), capture_features(unet, stages=stages):
            pass
    with pytest.raises(ValueError, match="leave them out"), capture_features(small_network(), stages=["decoder.0"]):
        pass
