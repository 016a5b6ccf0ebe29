from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from monai_conres import ConResLoss, ConResNet, ConResOutput, ContextResidualModule, conresnet, context, layers
from monai_conres.layers import WeightStandardizedConv3d


def small_network(**kwargs) -> ConResNet:
    arguments = {"channels": (8, 16, 32), "strides": (2, (2, 2, 1)), "blocks": (1, 1, 1, 1), "dropout": None}
    return ConResNet(2, 3, **{**arguments, **kwargs})


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def multiply_adds(network: nn.Module, *size: int) -> int:
    """Of the convolutions, counted by torch on shapes alone."""
    with torch.device("meta"):
        image = torch.empty(size)
    network = network.to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.heads(image)
    return counter.get_total_flops() // 2


def multiply_adds_by_hand(channels, mapping: bool, voxels: int) -> int:
    """Section III of the paper for strides of 2, kernel by kernel."""
    a, b, c, d = channels
    full, half, quarter, eighth = voxels, voxels // 8, voxels // 64, voxels // 512
    total = 27 * full * (4 * a + 2 * a * a)
    total += 27 * half * (a * b + 4 * b * b) + 27 * quarter * (b * c + 4 * c * c) + 27 * eighth * (c * d + 8 * d * d)
    total += 27 * eighth * d * c
    total += 27 * (quarter * c * b + half * b * a + full * a * a) + full * a * 3
    if mapping:
        total += 27 * quarter * 4 * b + 27 * half * b * a  # what enters the first and the second scale
        for size, width in ((quarter, b), (half, a), (full, a)):
            total += size * width * width + 27 * size * width * width + size * width * 3
    return total


@pytest.mark.parametrize(
    ("mapping", "live", "billions"),
    [(True, 19_018_732, 537.516), (False, 18_783_715, 453.181)],
    ids=["ConResNet", "baseline"],
)
def test_size_is_the_paper_s(mapping, live, billions):
    inner_norms = 2 * (64 + 32 + 32) if mapping else 0  # which the released code has not
    for network, more in (
        (ConResNet(4, 3, mapping=mapping, attention=mapping), inner_norms),
        (ConResNet.authors(4, 3, mapping=mapping, attention=mapping), 0),
    ):
        assert parameters(network) == live + more
        counted = multiply_adds(network, 1, 4, 80, 160, 160)
        assert counted == multiply_adds_by_hand((32, 64, 128, 256), mapping, 80 * 160 * 160)
        assert counted / 1e9 == pytest.approx(billions, rel=1e-3)


@pytest.mark.parametrize("kwargs", [{}, {"attention": False}, {"mapping": False, "attention": False}])
def test_gradients_reach_every_parameter(kwargs):
    torch.manual_seed(0)
    network = small_network(**kwargs)
    segmentation, residuals = network(torch.randn(2, 2, 9, 10, 5))
    (segmentation.square().mean() + sum(logits.square().mean() for logits in residuals)).backward()
    idle = [name for name, parameter in network.named_parameters() if not parameter.grad.abs().sum() > 0]
    assert not idle


def test_baseline_is_the_segmentation_path_of_the_network_without_attention():
    torch.manual_seed(0)
    mapping, baseline = small_network(attention=False), small_network(mapping=False, attention=False)
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


def test_modes():
    torch.manual_seed(0)
    network = small_network(residual_channels=2)
    image = torch.randn(1, 2, 9, 10, 5)
    training = network(image)
    assert [logits.shape[1:] for logits in training.residuals] == [(2, 9, 10, 5), (2, 5, 5, 3)]
    network.eval()
    assert torch.equal(network(image), training.segmentation)
    assert torch.equal(network.heads(image).residuals[1], training.residuals[1])
    network.eval_residual = True
    segmentation, residual = network(image)
    assert torch.equal(segmentation, training.segmentation)
    assert torch.equal(residual, training.residuals[0])


def test_without_attention_eval_computes_the_baseline_only():
    network = small_network(attention=False)
    baseline = small_network(mapping=False, attention=False)
    network.eval()
    for module in network.residual_decoder.modules():
        module.register_forward_hook(lambda *_: pytest.fail("the residual decoder ran"))
    network(torch.randn(1, 2, 8, 8, 4))
    assert parameters(network) > parameters(baseline)


@pytest.mark.parametrize("size", [(4, 4, 2), (7, 9, 3), (13, 4, 5), (16, 16, 1 * 2)])
def test_any_size_of_at_least_the_strides(size):
    segmentation, residuals = small_network()(torch.randn(1, 2, *size))
    assert segmentation.shape[2:] == residuals[0].shape[2:] == size
    assert torch.isfinite(segmentation).all()


def test_thick_slices_are_not_down_sampled():
    network = small_network(strides=((2, 2, 1), (2, 2, 1)))
    segmentation, residuals = network(torch.randn(1, 2, 16, 20, 1))  # one slice has no neighbor, and a zero residual
    assert [tuple(logits.shape[2:]) for logits in residuals] == [(16, 20, 1), (8, 10, 1)]
    assert torch.isfinite(segmentation).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slice_axis_decides_and_negative_counts_from_the_end(axis):
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
    assert saturated(ConResNet.authors(4, 3), image) > 0.7  # the released setting, for comparison


def test_authors_setting_is_the_default_but_for_its_three_differences():
    network = ConResNet.authors(1, 2)
    assert not any(m.gain != 1 for m in network.modules() if isinstance(m, WeightStandardizedConv3d))
    assert not any(isinstance(m.inner_norm, torch.nn.GroupNorm) for m in network.residual_decoder.stages)
    assert network.align_corners
    assert all(module.align_corners for module in network.residual_decoder.stages)
    assert network.residual_decoder.spatial_axis == 0


def test_image_that_does_not_fit_is_refused():
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
        ({"mapping": False}, "expected attention=False together with mapping=False"),
        ({"spatial_axis": 3}, "expected spatial_axis between -3 and 2 for 3 spatial axes, got 3"),
        ({"strides": (2,)}, "n - 1 strides"),
        ({"blocks": (1, 1, 1)}, "n \\+ 1 blocks"),
        ({"strides": (2, (2, 2))}, "strides of one or three positive numbers"),
        ({"strides": (2, 0)}, "strides of one or three positive numbers"),
        ({"channels": (8, 12, 32), "norm": ("group", {"num_groups": 8})}, "does not fit 12 channels"),
        ({"residual_channels": 0}, "out_channels=0"),
    ],
)
def test_arguments_that_contradict_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small_network(**kwargs)


def test_eval_residual_of_a_baseline_is_refused():
    network = small_network(mapping=False, attention=False, eval_residual=True).eval()
    with pytest.raises(ValueError, match="expected mapping=True together with eval_residual=True"):
        network(torch.zeros(1, 2, 8, 8, 8))


@pytest.mark.parametrize("options", [{}, {"use_checkpoint": True}])
def test_computing_again_changes_no_gradient_and_keeps_less(options, monkeypatch):
    torch.manual_seed(0)
    network = small_network(dropout=0.5, **options).double()
    image = torch.randn(1, 2, 9, 8, 7, dtype=torch.float64)
    features = 16 * 5 * 4 * 4 * 8  # bytes of those at the second resolution

    def run() -> tuple[int, dict[str, torch.Tensor]]:
        kept = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        network.zero_grad()
        torch.manual_seed(1)  # of dropout
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = network(image)
        (output.segmentation.square().sum() + sum(r.square().sum() for r in output.residuals)).backward()
        own = {p.untyped_storage().data_ptr() for p in network.parameters()}
        size = sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in own)
        return size, {name: p.grad.clone() for name, p in network.named_parameters()}

    kept, gradients = run()
    monkeypatch.setattr(layers, "SMALL", features + 1)
    kept_but_small, further_gradients = run()
    for module in (layers, context, conresnet):
        monkeypatch.setattr(module, "recompute", lambda module, function, *arguments, least=0: function(*arguments))
    kept_without, expected = run()
    assert kept < (0.35 if options else 0.6) * kept_without
    assert kept < kept_but_small < (0.45 if options else 0.8) * kept_without
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(further_gradients[name], gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.as_shipped
def test_of_large_features_alone_anything_is_computed_again(monkeypatch):
    computed_again = []

    def note(function, *arguments, **kwargs):
        computed_again.append(max(a.nbytes for a in arguments if isinstance(a, torch.Tensor)) / 2**20)
        return checkpoint(function, *arguments, **kwargs)

    monkeypatch.setattr(layers, "checkpoint", note)
    network = ConResNet(4, 3).to("meta")

    def run(*size: int) -> list[float]:
        computed_again.clear()
        network(torch.empty(1, 4, *size, device="meta"))
        return sorted(computed_again)

    assert run(32, 32, 32) == []
    found = run(80, 160, 160)
    assert min(found) == 15.625  # 128 channels at a quarter of the resolution; 64 there are less than 8 MiB
    assert max(found) == 250  # 32 channels at the full one
    assert found.count(250) == 8  # three in the encoder; merge and mapping, a unit in each, and the gate
    network.use_checkpoint = True
    assert len(run(32, 32, 32)) == 5  # the encoder's four resolutions and the bottleneck, at any size


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_running_statistics_see_each_batch_once(use_checkpoint):
    torch.manual_seed(0)
    network = small_network(norm="batch", use_checkpoint=use_checkpoint)
    image = torch.randn(2, 2, 8, 8, 8)
    first = network.encoder[1][0].norm
    features = network.encoder[0](image)
    with torch.no_grad():
        mean = features.mean((0, 2, 3, 4)) * first.momentum
    for batch_norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm3d)):
        batch_norm.reset_running_stats()
    network(image).segmentation.sum().backward()
    assert int(first.num_batches_tracked) == 1
    torch.testing.assert_close(first.running_mean, mean, rtol=1e-4, atol=1e-5)


def test_forward_derivatives():
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


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_a_training_step_and_a_prediction_never_wait_for_the_device(use_checkpoint):
    """A tensor on the meta device has no values, and none of another device goes with it."""
    network = small_network(use_checkpoint=use_checkpoint).to("meta")
    image, label = (torch.empty(1, channels, 16, 12, 10, device="meta") for channels in (2, 3))
    ConResLoss(sigmoid=True)(network(image), label).backward()
    assert {parameter.grad.device.type for parameter in network.parameters()} == {"meta"}
    network.eval().eval_residual = True
    assert {logits.device.type for logits in network(image)} == {"meta"}
