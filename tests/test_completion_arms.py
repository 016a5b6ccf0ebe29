"""The arms of the benchmark of completion: what each network and loss computes, against the formulas written out."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor

from monai_conres import ConResLoss
from monai_conres.layers import WeightStandardizedConv3d
from tests.test_benchmarks import SMALL, STRIDES, label_of_two_classes

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "benchmarks"))
import arms
import completion
import variants_report


def build(name: str, channels: int = 1):
    torch.manual_seed(0)
    return arms.build(arms.ARMS[name], channels, 3, SMALL, STRIDES)


@pytest.mark.parametrize("name", arms.ARMS)
def test_completion_arm_predicts_what_its_methods_need(name):
    arm = arms.ARMS[name]
    network = build(name)
    image = torch.randn(2, 1 + 2 * len(arm.cascade), 16, 16, 24)
    output = network(image)
    arms.Losses(arm, network)(output, label_of_two_classes(16, 16, 24), True).backward()
    assert all(p.grad is not None for n, p in network.named_parameters())
    if any(completion.CHAINS.get(method, completion.Method()).residual == "own" for method in arm.methods):
        assert arms.has_residuals(network)
    if arms.has_residuals(network):
        segmentation, residual = network.eval().with_residual(image[:1])
        assert (segmentation.shape[1], residual.shape[1]) == (3, 2)
    else:
        assert network.eval()(image[:1]).shape[1] == 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [("conres", "conres"), ("conres_chain", "conres"), ("plain_head_chain", "plain_head"), ("weight_0", "weight_0")],
)
def test_half_of_a_training_belongs_to_an_arm_of_the_same_loss(name, expected):
    assert arms.first_half(arms.ARMS[name]) == expected


def test_second_half_adds_its_loss():
    label = label_of_two_classes(16, 16, 24)
    network = build("conres")
    output = network(torch.randn(2, 1, 16, 16, 24))
    joint = ConResLoss(softmax=True)
    added = joint.segmentation_loss(output.segmentation, label)
    for second, weight in ((False, 0), (True, 1)):
        got = arms.Losses(arms.ARMS["conres_double"], network)(output, label, second)
        torch.testing.assert_close(got, joint(output, label) + weight * added)


@pytest.mark.parametrize(("name", "weight"), [("weight_0", 0.0), ("weight_01", 0.1), ("weight_03", 0.3), ("conres", 1)])
def test_weight_multiplies_the_residual_loss(name, weight):
    label, network = label_of_two_classes(16, 16, 24), build(name)
    output, joint = network(torch.randn(2, 1, 16, 16, 24)), ConResLoss(softmax=True)
    expected = joint.segmentation_loss(output.segmentation, label) + weight * joint.residual_loss(
        output.residuals, label
    )
    torch.testing.assert_close(arms.Losses(arms.ARMS[name], network)(output, label, False), expected)


def test_shared_gradient_is_three_tenths_of_the_other():
    label, network = label_of_two_classes(16, 16, 24), build("shared_gradient")
    losses = arms.Losses(arms.ARMS["shared_gradient"], network)
    output = network(torch.randn(2, 1, 16, 16, 24))
    together = losses(output, label, False)
    weights = list(network.encoder.parameters())
    parts = losses.joint.segmentation_loss(output.segmentation, label), together
    own, joint = (
        torch.cat([g.flatten() for g in torch.autograd.grad(part, weights, retain_graph=True)]) for part in parts
    )
    assert ((joint - own).norm() / own.norm()).item() == pytest.approx(0.3, rel=1e-3)


def test_logit_gate_is_its_formula():
    network = build("logit_gate")
    decoder = network.residual_decoder
    features, previous = torch.randn(1, decoder.mix[0].out_channels, 4, 4, 6), torch.randn(1, 1, 8, 8, 12)
    same, residual = decoder.step(0, features, previous)
    torch.testing.assert_close(same, features, rtol=0, atol=0)  # closed at first
    with torch.no_grad():
        decoder.strengths[0].fill_(0.7)
        gated, _ = decoder.step(0, features, previous)
        logit = decoder.heads[0](residual)[0].numpy()
    probability = 1 / (1 + np.exp(-(logit - 4)))
    mixed = np.einsum("or,rxyz->oxyz", decoder.mix[0].weight.detach().numpy()[:, :, 0, 0, 0], probability)
    np.testing.assert_allclose(gated[0], features[0].numpy() * (1 + 0.7 * mixed), rtol=1e-4, atol=1e-5)


def test_image_difference_enters_only_the_finest_scale():
    plain, variant = build("conres").eval(), build("image_difference").eval()
    state = variant.state_dict() | plain.state_dict()
    variant.load_state_dict(state)
    image = torch.randn(1, 1, 16, 16, 24)
    with torch.no_grad():
        variant.residual_decoder.entry.weight.zero_()
        variant.residual_decoder.entry.bias.zero_()
        for got, expected in zip(variant.heads(image).residuals, plain.heads(image).residuals, strict=True):
            torch.testing.assert_close(got, expected)
        variant.residual_decoder.entry.weight.fill_(1.0)
        got, expected = variant.heads(image).residuals, plain.heads(image).residuals
    assert not torch.allclose(got[0], expected[0], atol=1e-3)
    torch.testing.assert_close(got[1], expected[1])


def test_in_plane_convolution_is_a_convolution_of_each_slice():
    convolution = arms.InPlaneConvolution(WeightStandardizedConv3d(3, 5, stride=(2, 2, 1), dilation=2))
    image = torch.randn(2, 3, 9, 8, 4)
    filters = convolution.weight.detach()[..., 0].double()
    mean, deviation = filters.mean((1, 2, 3), keepdim=True), filters.std((1, 2, 3), keepdim=True)
    filters = (filters - mean) / deviation / 27**0.5
    expected = [F.conv2d(image[..., n].double(), filters, stride=2, padding=2, dilation=2) for n in range(4)]
    torch.testing.assert_close(convolution(image).double(), torch.stack(expected, -1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "across"), [("in_plane", 0), ("in_plane_convolution", len(STRIDES))])
def test_in_plane_networks_look_across_slices_where_they_say(name, across):
    network = build(name)
    convolutions = [
        module
        for part in (network.encoder, network.bottleneck, network.decoder)
        for module in part.modules()
        if isinstance(module, torch.nn.Conv3d)
    ]
    assert all(convolution.stride[2] == 1 for convolution in convolutions)
    assert sum(convolution.weight.shape[4] == 3 for convolution in convolutions) == across
    assert {convolution.weight.shape[4] for convolution in convolutions} <= {1, 3}


def test_predictions_become_channels_of_the_image():
    logits = {"segmentation": torch.randn(3, 4, 5, 6), "residual": torch.randn(2, 4, 5, 6)}
    image = MetaTensor(torch.randn(1, 4, 5, 6), affine=torch.diag(torch.tensor([2.0, 2, 5, 1])))
    case = {"name": "a", "image": image, "label": torch.zeros(1, 4, 5, 6)}
    both = completion.AddPredictions({"a": logits}, ("segmentation", "residual"))(case)["image"]
    softmax = np.exp(logits["segmentation"].numpy())
    np.testing.assert_allclose(both[1:3], (softmax / softmax.sum(0))[1:], rtol=1e-5)
    np.testing.assert_allclose(both[3:], 1 / (1 + np.exp(-logits["residual"].numpy())), rtol=1e-5)
    assert both.pixdim.tolist() == [2, 2, 5]
    assert completion.AddPredictions({"a": logits}, ("segmentation",))(case)["image"].shape[0] == 3
    assert image.shape[0] == 1


def test_variants_are_compared_with_their_references(tmp_path):
    experiment = completion.Experiment("sts_completion", tmp_path, completion.COLUMNS)
    plain = {"baseline": 0.5, "conres": 0.75, "weight_0": 0.625, "cascade": 0.875}
    plain |= {"in_plane": 0.625, "in_plane_convolution": 0.5}
    completed = {"network": 0.0, "image": 0.125, "both": 0.25}  # more than the network
    for arm, value in plain.items():
        for seed in (0, 1) if arm == "conres" else (0,):
            for fold in range(2):
                key = {"arm": arm, "fold": fold, "seed": seed, "case": f"c{fold}", "slices": 9, "even_0": value}
                methods = [method for method in arms.ARMS[arm].methods if method in completed]
                rows = [key | {"method": method, "even_1": value + completed[method]} for method in methods]
                experiment.write_run((arm, fold, seed), {"iterations": 1}, rows)
    text = variants_report.report([variants_report.Results.read("sts_completion", tmp_path)])
    for row in (
        "weight of the residual loss 0 | 1 | 0.625 | +0.125 [+0.125, +0.125] | 0.875 | `ConResNet` | "
        "-0.125 [-0.125, -0.125] | residuals and image | -0.125 [-0.125, -0.125]",
        "`ConResNet` | 2 | 0.750 | +0.250 [+0.250, +0.250] | 1.000 | - | - | - | -",
        "cascade | 1 | 0.875 | +0.375 [+0.375, +0.375] | - | - | - | - | -",
        # the best chain of its control is that with image contrast: 0.750 less 0.625
        "convolutions in plane | 1 | 0.625 | +0.125 [+0.125, +0.125] | 0.875 | its control | "
        "+0.125 [+0.125, +0.125] | image | +0.125 [+0.125, +0.125]",
        " |  |  |  |  | `ConResNet` | -0.125 [-0.125, -0.125] | residuals and image | -0.125 [-0.125, -0.125]",
    ):
        assert f"| {row} |\n" in text
    assert set(variants_report.VARIANTS) <= set(arms.ARMS)
