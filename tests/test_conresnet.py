from __future__ import annotations

import copy
import sys
import weakref

import pytest
import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from monai_conres import ConResNet, ConResOutput, ContextResidualModule
from monai_conres.layers import WeightStandardizedConv3d


def small_network(**kwargs) -> ConResNet:
    arguments = {"channels": (8, 16, 32), "strides": (2, (2, 2, 1)), "blocks": (1, 1, 1, 1), "dropout": None}
    return ConResNet(**{"in_channels": 2, "out_channels": 3, **arguments, **kwargs})


def flat(output: ConResOutput) -> list[torch.Tensor]:
    return [output.segmentation, *output.residuals]


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def multiply_adds(network: nn.Module, *size: int) -> int:
    """Of the convolutions, counted by torch on shapes alone."""
    image = torch.empty(size, device="meta")
    network.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.heads(image)
    return counter.get_total_flops() // 2


def multiply_adds_by_hand(channels, context: str, voxels: int) -> int:
    """Section III of the paper for strides of 2, kernel by kernel."""
    a, b, c, d = channels
    full, half, quarter, eighth = voxels, voxels // 8, voxels // 64, voxels // 512
    total = 27 * full * (4 * a + 2 * a * a)
    total += 27 * half * (a * b + 4 * b * b) + 27 * quarter * (b * c + 4 * c * c) + 27 * eighth * (c * d + 8 * d * d)
    total += 27 * eighth * d * c
    total += 27 * (quarter * c * b + half * b * a + full * a * a) + full * a * 3
    if context != "none":
        total += 27 * quarter * 4 * b + 27 * half * b * a  # what enters the first and the second scale
        for size, width in ((quarter, b), (half, a), (full, a)):
            total += size * width * width + 27 * size * width * width + size * width * 3
    return total


@pytest.mark.parametrize(
    ("context", "live", "billions"), [("attention", 19_018_732, 537.516), ("none", 18_783_715, 453.181)]
)
def test_network_has_the_size_of_the_paper(context, live, billions):
    inner_norms = 2 * (64 + 32 + 32) if context != "none" else 0  # the released code does not have them
    for make, more in ((ConResNet, inner_norms), (ConResNet.released, 0)):
        with torch.device("meta"):
            network = make(4, 3, context=context)
        assert parameters(network) == live + more
        counted = multiply_adds(network, 1, 4, 80, 160, 160)
        assert counted == multiply_adds_by_hand((32, 64, 128, 256), context, 80 * 160 * 160)
        assert counted / 1e9 == pytest.approx(billions, rel=1e-3)


@pytest.mark.parametrize("context", ["attention", "mapping", "none"])
def test_gradients_reach_every_parameter(context):
    torch.manual_seed(0)
    network = small_network(context=context)
    segmentation, residuals = network(torch.randn(2, 2, 9, 10, 5))
    (segmentation.square().mean() + sum(logits.square().mean() for logits in residuals)).backward()
    idle = [name for name, parameter in network.named_parameters() if not parameter.grad.abs().sum() > 0]
    assert not idle


def test_baseline_is_the_segmentation_path_of_mapping():
    torch.manual_seed(0)
    mapping, baseline = small_network(context="mapping"), small_network(context="none")
    missing, unexpected = baseline.load_state_dict(mapping.state_dict(), strict=False)
    assert not missing
    assert all(key.startswith("residual_decoder.") for key in unexpected)
    image = torch.randn(1, 2, 8, 12, 5)
    got = baseline(image)
    assert isinstance(got, ConResOutput)
    assert got.residuals == ()
    torch.testing.assert_close(got.segmentation, mapping(image).segmentation)


def test_forward_is_encoder_decoder_and_modules_written_out():
    torch.manual_seed(0)
    network = small_network(spatial_axis=1).eval()
    image = torch.randn(1, 2, 9, 10, 5)
    one = network.encoder[0](image)
    two = network.encoder[1](one)
    three = network.bottleneck(network.encoder[2](two))
    up = nn.functional.interpolate
    f0 = network.decoder[0](up(three, size=two.shape[2:], mode="trilinear") + two)
    f0, r0 = network.residual_decoder.step(0, f0, image)
    f1 = network.decoder[1](up(f0, size=one.shape[2:], mode="trilinear") + one)
    f1, r1 = network.residual_decoder.step(1, f1, r0)
    segmentation, residuals = network.heads(image)
    torch.testing.assert_close(segmentation, network.head(f1))
    torch.testing.assert_close(residuals[0], network.residual_decoder.heads[1](r1))
    torch.testing.assert_close(residuals[1], network.residual_decoder.heads[0](r0))
    torch.testing.assert_close(network(image), segmentation)


def test_network_returns_by_mode():
    torch.manual_seed(0)
    network = small_network(include_background=False)
    image = torch.randn(1, 2, 9, 10, 5)
    training = network(image)
    assert [logits.shape[1:] for logits in training.residuals] == [(2, 9, 10, 5), (2, 5, 5, 3)]
    network.eval()
    assert torch.equal(network(image), training.segmentation)
    assert torch.equal(network.heads(image).residuals[1], training.residuals[1])


def test_with_residual_returns_both_and_follows_the_mode():
    torch.manual_seed(0)
    network = small_network(dropout=0.5)
    image = torch.randn(1, 2, 9, 10, 5)
    segmentation, residual = network.eval().with_residual(image)
    expected = network.heads(image)
    assert torch.equal(segmentation, expected.segmentation)
    assert torch.equal(residual, expected.residuals[0])
    assert not network.training
    first, _ = network.train().with_residual(image)
    second, _ = network.with_residual(image)
    assert network.training
    assert not torch.equal(first, second)  # dropout


def test_with_residual_of_a_baseline_is_refused():
    with pytest.raises(ValueError, match='predicts residual masks, got context="none"'):
        small_network(context="none").with_residual(torch.zeros(1, 2, 8, 8, 8))


def test_mapping_runs_no_residual_decoder_in_eval():
    network = small_network(context="mapping").eval()
    for module in network.residual_decoder.modules():
        module.register_forward_hook(lambda *_: pytest.fail("the residual decoder ran"))
    network(torch.randn(1, 2, 8, 8, 4))
    assert parameters(network) > parameters(small_network(context="none"))


def test_network_has_the_parameters_of_version_0_1():
    """The keys as version 0.1 saved them, so that its weights load."""
    unit = ["norm.weight", "norm.bias", "conv.weight"]
    keys = {"encoder.0.0.weight", *(f"encoder.1.0.{part}" for part in unit), "head.weight", "head.bias"}
    for block in ("encoder.0.1", "encoder.1.1", "bottleneck.0"):
        keys |= {f"{block}.unit{number}.{part}" for number in (1, 2) for part in unit}
    keys |= {f"{name}.{part}" for name in ("bottleneck.1", "decoder.0") for part in unit}
    stage = "residual_decoder.stages.0"
    keys |= {f"{stage}.entry.weight", f"{stage}.inner.weight", f"{stage}.inner_norm.weight", f"{stage}.inner_norm.bias"}
    keys |= {f"{stage}.outer.{part}" for part in unit}
    keys |= {"residual_decoder.heads.0.weight", "residual_decoder.heads.0.bias"}
    assert set(ConResNet(2, 3, channels=(8, 16), strides=(2,), blocks=(1, 1, 1)).state_dict()) == keys


def test_network_keeps_its_arguments():
    arguments = {"channels": (8, 16), "strides": (2,), "blocks": (1, 1, 1), "context": "mapping", "spatial_axis": 1}
    network = ConResNet(2, 3, **arguments)
    assert network.arguments.items() >= {"in_channels": 2, "out_channels": 3, **arguments}.items()
    again = ConResNet(**network.arguments)
    assert [tuple(p.shape) for p in again.parameters()] == [tuple(p.shape) for p in network.parameters()]
    assert again.arguments == network.arguments


@pytest.mark.parametrize("size", [(4, 4, 2), (7, 9, 3), (13, 4, 5), (16, 16, 1 * 2)])
def test_network_takes_any_size_of_at_least_the_strides(size):
    segmentation, residuals = small_network()(torch.randn(1, 2, *size))
    assert segmentation.shape[2:] == residuals[0].shape[2:] == size
    assert torch.isfinite(segmentation).all()


def test_strides_leave_thick_slices_alone():
    network = small_network(strides=((2, 2, 1), (2, 2, 1)))
    segmentation, residuals = network(torch.randn(1, 2, 16, 20, 1))  # one slice has no neighbor, and a zero residual
    assert [tuple(logits.shape[2:]) for logits in residuals] == [(16, 20, 1), (8, 10, 1)]
    assert torch.isfinite(segmentation).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_network_uses_the_slice_axis(axis):
    torch.manual_seed(0)
    network = small_network(strides=(2, 2), spatial_axis=axis)
    same = small_network(strides=(2, 2), spatial_axis=axis - 3)
    same.load_state_dict(network.state_dict())
    image = torch.randn(1, 2, 8, 10, 12)
    torch.testing.assert_close(network(image), same(image))
    # the network with the axes exchanged in data and kernels alike gives exchanged outputs
    other = small_network(strides=(2, 2), spatial_axis=0)
    state = network.state_dict()
    other.load_state_dict({k: v.movedim(2 + axis, 2) if v.ndim == 5 else v for k, v in state.items()})
    got = other(image.movedim(2 + axis, 2)).segmentation.movedim(2, 2 + axis)
    torch.testing.assert_close(got, network(image).segmentation, rtol=1e-3, atol=1e-4)


def saturated(network: nn.Module, image: torch.Tensor) -> float:
    """Largest share, over the sigmoids of Eq. 4 and 6 of all scales, of values outside [0.01, 0.99]."""
    shares = []

    def record(module, inputs, outputs):
        for logits in (inputs[0], outputs[1]):
            p = logits.sigmoid()
            shares.append(((p < 0.01) | (p > 0.99)).double().mean().item())

    for module in network.modules():
        if isinstance(module, ContextResidualModule):
            module.register_forward_hook(record)
    with torch.no_grad():
        network(image)
    assert len(shares) == 6
    return max(shares)


@pytest.mark.parametrize("seed", [0, 1])
def test_sigmoids_are_not_saturated_at_initialization(seed):
    torch.manual_seed(seed)
    image = torch.randn(1, 4, 16, 20, 24)
    assert saturated(ConResNet(4, 3), image) < 0.05
    assert saturated(ConResNet.released(4, 3), image) > 0.7  # the released setting, for comparison


def test_released_setting_has_three_differences():
    network = ConResNet.released(1, 2)
    assert not any(m.gain != 1 for m in network.modules() if isinstance(m, WeightStandardizedConv3d))
    assert not any(isinstance(m.inner_norm, torch.nn.GroupNorm) for m in network.residual_decoder.stages)
    assert network.align_corners
    assert all(module.align_corners for module in network.residual_decoder.stages)
    assert network.residual_decoder.spatial_axis == 0


def test_network_refuses_images_that_do_not_fit():
    network = small_network()
    with pytest.raises(ValueError, match=r"shape \(b, 2, d, h, w\), got \(2, 8, 8, 8\); add the batch dimension"):
        network(torch.zeros(2, 8, 8, 8))
    with pytest.raises(ValueError, match=r"shape \(b, 2, d, h, w\), got \(1, 3, 8, 8, 8\)"):
        network(torch.zeros(1, 3, 8, 8, 8))
    with pytest.raises(ValueError, match=r"at least \(4, 4, 2\), the product of the strides, got \(3, 8, 8\); pad"):
        network(torch.zeros(1, 2, 3, 8, 8))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"context": None}, "expected context to be one of .*got None"),
        ({"spatial_axis": 3}, "expected spatial_axis between -3 and 2 for 3 spatial axes, got 3"),
        ({"strides": (2,)}, "n - 1 strides"),
        ({"blocks": (1, 1, 1)}, "n \\+ 1 blocks"),
        ({"strides": (2, (2, 2))}, "strides of one or three positive numbers"),
        ({"strides": (2, 0)}, "strides of one or three positive numbers"),
        ({"channels": (8, 12, 32), "norm": ("group", {"num_groups": 8})}, "does not fit 12 channels"),
        ({"out_channels": 1, "include_background": False}, "2 or more output channels with include_background=False"),
    ],
)
def test_network_refuses_arguments_that_contradict(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small_network(**kwargs)


def test_checkpoint_changes_no_gradient_and_keeps_less():
    torch.manual_seed(0)
    network = small_network(dropout=0.5).double()
    image = torch.randn(1, 2, 9, 8, 7, dtype=torch.float64)

    def run(use_checkpoint: bool) -> tuple[int, dict[str, torch.Tensor]]:
        kept = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        network.use_checkpoint = use_checkpoint
        network.zero_grad()
        torch.manual_seed(1)  # of dropout
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = network(image)
        (output.segmentation.square().sum() + sum(r.square().sum() for r in output.residuals)).backward()
        own = {p.untyped_storage().data_ptr() for p in network.parameters()}
        size = sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in own)
        return size, {name: p.grad.clone() for name, p in network.named_parameters()}

    kept, gradients = run(use_checkpoint=True)
    kept_without, expected = run(use_checkpoint=False)
    assert kept < 0.25 * kept_without
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-9)


def test_checkpoint_refuses_running_statistics():
    with pytest.raises(ValueError, match="without running statistics together with use_checkpoint=True, got 'batch'"):
        small_network(norm="batch", use_checkpoint=True)
    network = small_network(norm="batch")
    network.use_checkpoint = True
    with pytest.raises(ValueError, match="without running statistics"):
        network.train()(torch.randn(2, 2, 16, 16, 16))


def test_gradients_with_a_graph_are_those_without():
    torch.manual_seed(0)
    network = small_network().double()
    loss = sum(part.square().sum() for part in network.heads(torch.randn(1, 2, 16, 16, 16).double()).residuals)
    loss = loss + network.heads(torch.randn(1, 2, 16, 16, 16).double()).segmentation.square().sum()
    parameters = [p for p in network.parameters() if p.requires_grad]
    kept = torch.autograd.grad(loss, parameters, retain_graph=True)
    again = torch.autograd.grad(loss, parameters, create_graph=True)
    for first, second in zip(kept, again, strict=True):
        torch.testing.assert_close(second, first)


def test_network_has_forward_derivatives():
    torch.manual_seed(0)
    network = ConResNet(1, 2, channels=(8, 16), strides=(2,), blocks=(1, 1, 1)).double().eval()
    image, tangent = torch.randn(2, 1, 1, 6, 8, 7, dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        output = network.heads(torch.autograd.forward_ad.make_dual(image, tangent))
        parts = (output.segmentation, *output.residuals)
        derivatives = [torch.autograd.forward_ad.unpack_dual(part).tangent for part in parts]
    step = 1e-6
    with torch.no_grad():
        ahead, behind = (network.heads(image + sign * step * tangent) for sign in (1, -1))
    pairs = zip((ahead.segmentation, *ahead.residuals), (behind.segmentation, *behind.residuals), strict=True)
    for derivative, (a, b) in zip(derivatives, pairs, strict=True):
        torch.testing.assert_close(derivative, (a - b) / (2 * step), rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 keeps arguments until a call returns")
def test_large_features_are_freed_before_the_next_convolution():
    network = ConResNet(1, 3, include_background=False, channels=(8, 16), strides=(2,), blocks=(1, 1, 1)).eval()
    assert network.residual_decoder is not None
    block, module, last = network.encoder[0][1], network.residual_decoder.stages[-1], network.decoder[-1]
    made: dict[str, weakref.ref] = {}
    alive: dict[str, bool] = {}

    def keep(name: str, tensor: torch.Tensor) -> None:
        made[name] = weakref.ref(tensor)

    def look(name: str) -> None:
        alive[name] = made[name]() is not None

    block.unit1.conv.register_forward_hook(lambda _, arguments, output: keep("unit", output))
    block.unit2.conv.register_forward_pre_hook(lambda *_: look("unit"))
    network.encoder[0].register_forward_hook(lambda _, arguments, output: keep("skip", output))
    last.conv.register_forward_pre_hook(lambda *_: look("skip"))
    module.inner.register_forward_pre_hook(lambda _, arguments: keep("change", arguments[0]))
    module.outer.conv.register_forward_pre_hook(lambda *_: look("change"))
    with torch.no_grad():
        network.with_residual(torch.randn(1, 1, 8, 10, 6))
    assert alive == {"unit": False, "skip": False, "change": False}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("part", ["encoder.0", "encoder", "bottleneck", "decoder", "residual_decoder"])
def test_frozen_parts_leave_the_gradients_of_the_others(part, batch):
    network = small_network()
    image = torch.randn(batch, 2, 8, 8, 6)
    expected = copy.deepcopy(network).double()
    sum(output.square().mean() for output in flat(expected(image.double()))).backward()
    network.get_submodule(part).requires_grad_(False)
    sum(output.square().mean() for output in flat(network(image))).backward()
    for (name, parameter), reference in zip(network.named_parameters(), expected.parameters(), strict=True):
        assert (parameter.grad is None) == name.startswith(f"{part}."), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad.double(), reference.grad, rtol=1e-3, atol=1e-4, msg=name)
