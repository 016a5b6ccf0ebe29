from __future__ import annotations

import copy
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.networks.nets import SegResNet
from torch.utils.flop_counter import FlopCounterMode

from monai_conres import ConResNet, attach_conres, operations
from monai_conres.layers import (
    GroupNorm,
    NormActConv,
    PreActivationBlock,
    WeightStandardizedConv3d,
)


def attached():
    return attach_conres(SegResNet(init_filters=8, in_channels=1, out_channels=3), in_channels=1)


def standardize_naive(weight: np.ndarray, fan_in_scaling: bool) -> np.ndarray:
    """Filter by filter, from the definition."""
    standardized = np.empty_like(weight)
    for index, kernel in enumerate(weight):
        standardized[index] = (kernel - kernel.mean()) / kernel.std(ddof=1)
        if fan_in_scaling:
            standardized[index] /= np.sqrt(kernel.size)
    return standardized


@pytest.mark.parametrize("fan_in_scaling", [True, False])
@pytest.mark.parametrize(("kernel_size", "stride", "dilation"), [(3, 1, 1), (3, (2, 1, 2), 1), (3, 1, 2), (1, 1, 1)])
def test_convolution_uses_the_standardized_filters(fan_in_scaling, kernel_size, stride, dilation):
    layer = WeightStandardizedConv3d(
        3, 5, kernel_size=kernel_size, stride=stride, dilation=dilation, fan_in_scaling=fan_in_scaling
    ).double()
    image = torch.randn(2, 3, 7, 8, 9, dtype=torch.float64)
    weight = torch.from_numpy(standardize_naive(layer.weight.detach().numpy(), fan_in_scaling))
    expected = F.conv3d(image, weight, stride=stride, padding=dilation * (kernel_size // 2), dilation=dilation)
    torch.testing.assert_close(layer(image), expected, rtol=1e-9, atol=1e-9)


def test_fan_in_scaling_gives_unit_variance():
    layer = WeightStandardizedConv3d(64, 48)
    output = layer(torch.randn(1, 64, 12, 13, 14))[..., 1:-1, 1:-1, 1:-1]
    assert output.var().item() == pytest.approx(1, abs=0.05)


def test_convolution_weight_gradient_matches_differences():
    layer = WeightStandardizedConv3d(2, 3).double()
    image = torch.randn(1, 2, 3, 4, 3, dtype=torch.float64)

    def convolve(weight):
        return torch.func.functional_call(layer, {"weight": weight}, image)

    assert torch.autograd.gradcheck(convolve, layer.weight.detach().requires_grad_())


def test_convolution_ignores_scale_and_shift_of_its_weight():
    layer = WeightStandardizedConv3d(3, 4)
    before = layer.standardized_weight()
    with torch.no_grad():
        layer.weight.mul_(7).add_(2)
    torch.testing.assert_close(layer.standardized_weight(), before, rtol=1e-4, atol=1e-5)


def test_convolution_refuses_an_even_kernel():
    with pytest.raises(ValueError, match="odd kernel_size, got 2"):
        WeightStandardizedConv3d(1, 1, kernel_size=2)


def test_unit_is_norm_then_activation_then_convolution():
    unit = NormActConv(4, 6, norm=("group", {"num_groups": 2}), act="relu")
    with torch.no_grad():
        unit.norm.weight.uniform_(0.5, 2)
        unit.norm.bias.uniform_(-1, 1)
    image = torch.randn(2, 4, 5, 6, 7)
    groups = image.reshape(2, 2, -1)
    normalized = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    shape = (1, 4, 1, 1, 1)
    activated = (normalized.reshape(image.shape) * unit.norm.weight.view(shape) + unit.norm.bias.view(shape)).clamp(0)
    expected = F.conv3d(activated, unit.conv.standardized_weight(), padding=1)
    torch.testing.assert_close(unit(image), expected, rtol=1e-4, atol=1e-5)


def test_dropout_drops_whole_channels_in_training_only():
    unit = NormActConv(8, 4, dropout=0.5)
    dropped = unit.dropout.train()(torch.ones(4, 8, 2, 3, 4)).flatten(2)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert (dropped == dropped[..., :1]).all()
    image = torch.randn(1, 8, 2, 3, 4)
    torch.testing.assert_close(unit.eval()(image), unit.conv(unit.act(unit.norm(image))))
    assert not hasattr(NormActConv(8, 4, dropout=0.0), "dropout")


def test_unit_refuses_groups_that_do_not_divide_the_channels():
    with pytest.raises(ValueError, match=r"does not fit 12 channels .*num_groups.: 4"):
        NormActConv(12, 4, norm=("group", {"num_groups": 8}))


@pytest.mark.parametrize(("channels", "groups"), [(32, 8), (8, 8), (12, 4), (20, 4), (6, 2), (3, 1)])
def test_group_norm_takes_as_many_groups_as_fit(channels, groups):
    assert NormActConv(channels, 4).norm.num_groups == groups


def test_residual_block_adds_its_input():
    block = PreActivationBlock(8)
    image = torch.randn(1, 8, 3, 4, 5)
    torch.testing.assert_close(block(image), image + block.unit2(block.unit1(image)))
    assert not torch.equal(block(image), image)


@pytest.mark.parametrize("align_corners", [True, False])
def test_resize_interpolates_linearly(align_corners):
    ramp = torch.arange(4.0).view(1, 1, 1, 1, 4).expand(1, 1, 2, 3, 4)
    got = operations.resize_features(ramp, (2, 3, 8), align_corners=align_corners)[0, 0, 0, 0]
    position = np.linspace(0, 3, 8) if align_corners else (np.arange(8) + 0.5) / 2 - 0.5
    np.testing.assert_allclose(got, np.interp(position, np.arange(4), np.arange(4)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("norm", ["", None])
@pytest.mark.parametrize("act", ["relu", ("relu", {"inplace": True})])
def test_block_without_norm_does_not_change_its_input(norm, act):
    block = PreActivationBlock(4, norm=norm, act=act)
    x = torch.randn(1, 4, 3, 4, 5)
    before = x.clone()
    block(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("norm", ["group", "GROUP", ("Group", {}), ("group", {"affine": True})])
def test_default_norm_has_several_spellings(norm):
    assert NormActConv(12, 4, norm=norm).norm.num_groups == 4


def test_convolution_refuses_filters_of_one_weight():
    with pytest.raises(ValueError, match=r"filters of 2 or more weights to standardize.*in_channels=1, kernel_size=1"):
        WeightStandardizedConv3d(1, 4, kernel_size=1)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("options", [{}, {"stride": (2, 1, 2)}, {"dilation": 2}, {"kernel_size": 1}])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_convolution_on_a_cpu_equals_float64(batch, options, memory_format):
    torch.manual_seed(0)
    layer = WeightStandardizedConv3d(8, 16, **options)
    image = torch.randn(batch, 8, 9, 10, 11).contiguous(memory_format=memory_format).requires_grad_()
    assert operations.torch_convolves_slowly(image) == (batch == 1 and torch.backends.mkldnn.is_available())
    twin = copy.deepcopy(layer).double()
    exact = image.detach().double().requires_grad_()
    got, want = layer(image), twin(exact)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    got.square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(image.grad.double(), exact.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(layer.weight.grad.double(), twin.weight.grad, rtol=1e-3, atol=1e-2)


def test_multiply_adds_are_counted_for_any_batch():
    convolution = WeightStandardizedConv3d(3, 5, stride=(2, 1, 1))
    for batch in (1, 2):
        with FlopCounterMode(display=False) as counter:
            convolution(torch.randn(batch, 3, 6, 7, 8))
        assert counter.get_total_flops() == batch * 2 * 5 * 3 * 27 * 3 * 7 * 8


def test_convolution_of_one_small_volume_under_torch_func():
    torch.manual_seed(0)
    convolution = WeightStandardizedConv3d(2, 3)
    x, tangent = torch.randn(2, 1, 2, 5, 6, 7)
    assert operations.torch_convolves_slowly(x) == torch.backends.mkldnn.is_available()
    _, derivative = torch.func.jvp(convolution, (x,), (tangent,))
    torch.testing.assert_close(derivative, convolution(tangent))  # it is linear
    both = torch.stack([x, tangent])
    torch.testing.assert_close(torch.func.vmap(convolution)(both), torch.stack([convolution(v) for v in both]))


def on_an_accelerator(monkeypatch):
    """Let a CPU take the path of an accelerator."""
    monkeypatch.setattr(operations, "on_accelerator", lambda x: True)


def test_group_norm_under_torch_func(monkeypatch):
    on_an_accelerator(monkeypatch)
    torch.manual_seed(0)
    x, tangent = torch.randn(2, 3, 1, 4, 3, 3, 3)
    ours, theirs = GroupNorm(2, 4), torch.nn.GroupNorm(2, 4)
    torch.nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    gradients = [
        torch.func.vmap(torch.func.grad(lambda x, norm=norm: norm(x).pow(3).sum()))(x) for norm in (ours, theirs)
    ]
    torch.testing.assert_close(*gradients)
    for got, want in zip(*(torch.func.jvp(norm, (x[0],), (tangent[0],)) for norm in (ours, theirs)), strict=True):
        torch.testing.assert_close(got, want)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x[0], tangent[0])
        got = torch.autograd.forward_ad.unpack_dual(ours(dual)).tangent
    torch.testing.assert_close(got, torch.func.jvp(theirs, (x[0],), (tangent[0],))[1])

    def loss(weight):  # x itself is not transformed
        return torch.func.functional_call(ours, {"weight": weight}, (x[0],)).pow(3).sum()

    got = torch.func.grad(loss)(ours.weight.detach())
    torch.testing.assert_close(got, torch.autograd.grad(theirs(x[0]).pow(3).sum(), theirs.weight)[0])


def test_network_on_an_accelerator_gives_the_same(monkeypatch):
    torch.manual_seed(0)
    network = ConResNet(2, 3, channels=(8, 16), strides=(2,), blocks=(1, 1, 1), dropout=None).double()
    image = torch.randn(2, 2, 6, 8, 7, dtype=torch.float64)

    def run():
        network.zero_grad()
        output = network(image)
        (output.segmentation.square().sum() + output.residuals[0].square().sum()).backward()
        return [output.segmentation, *output.residuals, *(p.grad.clone() for p in network.parameters())]

    expected = run()
    on_an_accelerator(monkeypatch)
    for got, want in zip(run(), expected, strict=True):
        torch.testing.assert_close(got, want)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = network.float().eval()(image.float())
    assert (low - expected[0]).norm() < 0.05 * expected[0].norm()


def test_convolution_on_a_cpu_returns_channels_last():
    x = torch.randn(2, 8, 5, 6, 7)
    assert WeightStandardizedConv3d(8, 16)(x).is_contiguous(memory_format=torch.channels_last_3d)


def test_group_norm_has_the_parameters_of_torch():
    ours, theirs = GroupNorm(2, 8), torch.nn.GroupNorm(2, 8)
    ours.load_state_dict(theirs.state_dict())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert isinstance(NormActConv(8, 4).norm, GroupNorm)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_group_norm_refuses_one_value_in_each_group(device):
    with pytest.raises(ValueError, match=r"more than one value in each of 8 groups, got shape \(1, 8, 1, 1, 1\)"):
        GroupNorm(8, 8).to(device)(torch.empty(1, 8, 1, 1, 1, device=device))


def test_group_norm_of_one_value_in_each_group_of_two_volumes(monkeypatch):
    """A value is its own mean, so that only the bias is left."""
    norm = GroupNorm(8, 8)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, 8, 1, 1, 1)
    expected = norm.bias.expand(2, 8)
    torch.testing.assert_close(norm(x).flatten(1), expected, rtol=0, atol=1e-4)
    on_an_accelerator(monkeypatch)
    torch.testing.assert_close(norm(x).flatten(1), expected, rtol=0, atol=1e-4)


def test_group_norm_of_large_half_precision_values_on_a_cpu():
    x = 3e4 + 1e3 * torch.randn(1, 8, 9, 10, 11)
    got = GroupNorm(4, 8)(x.half())
    torch.testing.assert_close(got.double(), F.group_norm(x.half().double(), 4), rtol=1e-2, atol=1e-2)


def test_group_norm_launches_few_operations_on_an_accelerator():
    """The meta device takes the accelerator's path; torch's own kernel is not among its operations."""
    x = torch.empty(1, 32, 8, 9, 10, device="meta", requires_grad=True)
    norm = GroupNorm(8, 32).to("meta")
    with torch.profiler.profile() as profile:
        norm(x).sum().backward()
    calls = {event.key: event.count for event in profile.key_averages()}
    assert not [name for name in calls if "group_norm" in name]
    assert calls["aten::var_mean"] == 1
    assert "aten::_to_copy" not in calls


def standardizations(network, image):
    """How often the network standardizes a filter in a forward pass."""
    with mock.patch.object(F, "layer_norm", wraps=F.layer_norm) as calls:
        network(image)
    return calls.call_count


@torch.no_grad()
def test_filters_are_standardized_once_until_the_weights_change():
    network = torch.nn.Sequential(WeightStandardizedConv3d(2, 4), WeightStandardizedConv3d(4, 3)).eval()
    image = torch.randn(2, 2, 5, 6, 7)

    def expected():
        with torch.enable_grad():
            return copy.deepcopy(network)(image).detach()

    def check(count):
        assert standardizations(network, image) == count
        torch.testing.assert_close(network(image), expected(), rtol=0, atol=0)

    check(2)
    check(0)
    network[1].weight.uniform_(-1, 1)
    check(1)
    network.load_state_dict({name: torch.randn_like(value) for name, value in network.state_dict().items()})
    check(2)
    network[0].weight.data = torch.randn_like(network[0].weight)
    check(1)
    network[0].weight.data.normal_()  # torch does not see it
    network.eval()
    check(2)
    twin = copy.deepcopy(network)
    twin[0].weight.normal_()
    assert standardizations(twin, image) == 2
    check(0)
    network, image = network.double(), image.double()
    check(2)
    network.train()
    check(2)
    check(2)


@torch.no_grad()
def test_filters_kept_by_the_network_enter_no_cuda_graph(monkeypatch):
    """A graph goes on reading their memory, which the network frees when its weights change."""
    network, image = torch.nn.Sequential(WeightStandardizedConv3d(2, 4)).eval(), torch.randn(1, 2, 5, 6, 7)
    assert standardizations(network, image) == 1
    monkeypatch.setattr("monai_conres.layers.is_captured", lambda weight: True)
    assert standardizations(network, image) == 1


@pytest.mark.parametrize("fused", [False, True])
def test_filters_follow_every_optimizer(fused):
    network, image = torch.nn.Sequential(WeightStandardizedConv3d(2, 4)).eval(), torch.randn(1, 2, 5, 6, 7)
    optimizer = torch.optim.SGD(network.parameters(), lr=100.0, fused=fused)
    with torch.no_grad():
        before = network(image)
    network(image).square().sum().backward()
    optimizer.step()
    expected = network(image)
    with torch.no_grad():
        assert not torch.allclose(expected, before)
        torch.testing.assert_close(network(image), expected)


@torch.no_grad()
def test_filters_follow_what_other_processes_write(tmp_path):
    """``torch.distributed`` writes weights as ``weight.data`` does, which torch does not count as a change."""
    network, image = torch.nn.Sequential(WeightStandardizedConv3d(2, 4)).eval(), torch.randn(1, 2, 5, 6, 7)
    other = torch.nn.Sequential(WeightStandardizedConv3d(2, 4)).eval()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        before = network(image)
        network[0].weight.data.copy_(other[0].weight)
        torch.testing.assert_close(network(image), other(image))
        assert not torch.allclose(network(image), before)
    finally:
        torch.distributed.destroy_process_group()


@torch.inference_mode()
def test_filters_of_inference_tensors_follow_the_weights():
    network, image = torch.nn.Sequential(WeightStandardizedConv3d(2, 4)).eval(), torch.randn(1, 2, 5, 6, 7)
    before = network(image)
    other = torch.nn.Sequential(WeightStandardizedConv3d(2, 4))
    network.load_state_dict(other.state_dict())
    torch.testing.assert_close(network(image), other(image))
    assert not torch.allclose(network(image), before)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_convolution_refuses_weights_of_another_dtype(batch, dtype):
    convolution = WeightStandardizedConv3d(2, 4).to(dtype)
    with pytest.raises(RuntimeError, match=r"type|dtype"):
        convolution(torch.randn(batch, 2, 5, 6, 7))


@pytest.mark.parametrize("mode", [True, False])
def test_float64_stays_under_autocast(mode):
    convolution, image = WeightStandardizedConv3d(2, 4).double().train(mode), torch.randn(1, 2, 5, 6, 7).double()
    with torch.no_grad():
        exact = convolution(image)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(convolution(image), exact, rtol=0, atol=0)


@torch.no_grad()
def test_filters_are_not_read_before_another_stream_has_written_them(monkeypatch):
    network, image = torch.nn.Sequential(WeightStandardizedConv3d(2, 4)).eval(), torch.randn(1, 2, 5, 6, 7)
    for stream, count in ((0, 1), (7, 1), (7, 0), (0, 1)):
        monkeypatch.setattr("monai_conres.layers.stream_of", lambda weight, stream=stream: stream)
        assert standardizations(network, image) == count


def test_filters_follow_autocast_and_gradients():
    convolution, image = WeightStandardizedConv3d(2, 4).eval(), torch.randn(2, 2, 5, 6, 7)
    with torch.no_grad():
        exact = convolution(image)
        with torch.autocast("cpu", torch.bfloat16):
            assert convolution(image).dtype == torch.bfloat16
        assert torch.equal(convolution(image), exact)
    convolution(image).sum().backward()
    assert convolution.weight.grad is not None
    with torch.inference_mode():
        assert torch.equal(convolution(image), exact)
    assert torch.equal(convolution(image), exact)


@pytest.mark.parametrize("wrap", [lambda: ConResNet(1, 3, channels=(8, 16), strides=(2,), blocks=(1, 1, 1)), attached])
@pytest.mark.parametrize("mode", [True, False])
def test_network_gives_the_metadata_of_its_image_to_its_results(wrap, mode):
    torch.manual_seed(0)
    network = wrap().train(mode)
    image = MetaTensor(torch.randn(1, 1, 8, 16, 8), affine=torch.diag(torch.tensor([2.0, 3, 4, 1])), meta={"key": "a"})
    seen = []
    for convolution in network.modules():
        if isinstance(convolution, torch.nn.Conv3d):
            convolution.register_forward_hook(lambda module, args, output: seen.append(type(output)))
    with torch.no_grad():
        results = [network(image), network.with_residual(image)]
    assert set(seen) == {torch.Tensor}
    tensors = [x for result in results for x in ([result] if isinstance(result, torch.Tensor) else _flat(result))]
    for tensor in tensors:
        assert isinstance(tensor, MetaTensor)
        assert tensor.meta["key"] == "a"
        assert torch.equal(tensor.affine, image.affine)


def _flat(nested):
    return [x for part in nested for x in ([part] if isinstance(part, torch.Tensor) else part)]


def test_block_adds_in_place_only_without_gradients():
    block, x = PreActivationBlock(8), torch.randn(1, 8, 4, 5, 6)
    with torch.no_grad():
        without = block(x)
    torch.testing.assert_close(without, block(x))
    assert block(x).grad_fn is not None
