"""The kernels in Triton, run by Triton's interpreter, which needs no GPU."""

from __future__ import annotations

import copy
import math
import os
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from monai_conres import ConResNet, inter_slice_residual, layers, operations

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton compiles here: test_gpu.py tests what it compiles", allow_module_level=True)

from monai_conres import kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [  # with numbers of groups
    ((1, 4, 3, 5, 7), 1),  # 12 parts in a group
    ((2, 4, 3, 4, 3), 2),
    ((3, 1, 3, 4, 3), 1),  # 9 parts of one channel
    ((3, 4, 5, 7), 2),
    ((2, 5, 1, 1, 2), 1),
    ((2, 6, 1, 1, 1), 2),
]


@pytest.fixture
def in_triton(monkeypatch):
    """Let a CPU take the path of a GPU. Small features have several parts, of several blocks."""
    monkeypatch.setattr(operations, "on_accelerator", lambda x: True)
    monkeypatch.setattr(operations, "TRITON_DEVICES", ("cpu",))
    assert operations.triton_kernels(torch.ones(1)) is kernels
    monkeypatch.setattr(kernels, "BLOCK", 64)
    monkeypatch.setattr(kernels, "PROGRAMS", 9)


@pytest.fixture
def in_small_blocks(in_triton, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 16)


def test_features_are_cut_into_parts_of_blocks(in_small_blocks):
    """Each loop of the kernels has a case with several turns, the last of which is not full."""
    parts = {shape: kernels._parts(math.prod(shape[:2]), math.prod(shape[2:])) for shape, _ in SHAPES}
    assert list(parts.values()) == [(3, 48), (2, 32), (3, 16), (1, 48), (1, 16), (1, 16)]


@pytest.mark.parametrize(("shape", "groups"), SHAPES)
@pytest.mark.parametrize(("affine", "offset"), [(True, 1000.0), (False, 0.0)])
def test_group_norm_equals_torch_in_float64(in_small_blocks, shape, groups, affine, offset):
    torch.manual_seed(0)
    norm = layers.GroupNorm(groups, shape[1], affine=affine)
    exact = torch.nn.GroupNorm(groups, shape[1], affine=affine).double()
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    exact.load_state_dict(norm.state_dict())
    x, gradient = torch.randn(shape) + offset, torch.randn(shape)
    inputs = x.requires_grad_(), x.detach().double().requires_grad_()
    outputs = norm(inputs[0]), exact(inputs[1])
    outputs[0].backward(gradient)
    outputs[1].backward(gradient.double())
    pairs = [outputs, [x.grad for x in inputs]]
    pairs += [[a.grad, b.grad] for a, b in zip(norm.parameters(), exact.parameters(), strict=True)]
    for got, want in pairs:
        assert (got - want).norm() < 1e-6 * (3 + offset) * want.norm()


@pytest.mark.parametrize("channels", [4, 16])
def test_norm_refuses_other_channels_than_its_own(in_triton, channels):
    with pytest.raises(ValueError, match=f"expected 8 channels, got shape .1, {channels}, 3, 4, 5"):
        layers.GroupNorm(2, 8)(torch.randn(1, channels, 3, 4, 5))


def test_half_precision_in_and_out(in_triton):
    torch.manual_seed(0)
    x = (torch.randn(1, 4, 3, 5, 7) + 3).half().requires_grad_()
    norm = layers.GroupNorm(2, 4)
    y = norm(x)
    (y.float() ** 3).sum().backward()
    exact = x.detach().double().requires_grad_()
    want = F.group_norm(exact, 2)
    (want**3).sum().backward()
    assert y.dtype == x.grad.dtype == torch.float16
    assert norm.weight.grad.dtype == torch.float32
    assert (y - want).norm() < 1e-3 * want.norm()
    assert (x.grad - exact.grad).norm() < 5e-3 * exact.grad.norm()


def normalize_by_hand(x, gradient, weight, bias, groups):
    """Group norm and ReLU in float64, and the gradients of all three inputs."""
    exact = [part.detach().double().requires_grad_() for part in (x, weight, bias)]
    parts = exact[0].reshape(len(x), groups, -1)
    deviation = (parts.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    normalized = ((parts - parts.mean(-1, keepdim=True)) / deviation).reshape(len(x), x.shape[1], -1)
    y = (normalized * exact[1][:, None] + exact[2][:, None]).reshape(x.shape)
    y = y * (y.detach() > 0)
    return y, *torch.autograd.grad(y, exact, gradient.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 3.0), (1e4, 2e4)])
def test_norm_with_relu_equals_its_formula(in_triton, dtype, scale, offset):
    torch.manual_seed(0)
    norm = layers.GroupNorm(2, 4)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = (scale * torch.randn(2, 4, 4, 3, 5).clamp(-3, 3) + offset).to(dtype).requires_grad_()
    gradient = torch.randn(x.shape).to(dtype)
    y = norm(x, relu=True)
    gradients = torch.autograd.grad(y, (x, norm.weight, norm.bias), gradient)
    assert [part.dtype for part in (y, *gradients)] == [dtype, dtype, torch.float32, torch.float32]
    for got, want in zip((y, *gradients), normalize_by_hand(x, gradient, norm.weight, norm.bias, 2), strict=True):
        assert (got - want).norm() < 3 * torch.finfo(got.dtype).eps * want.norm() + 1e-5 * (got.dtype == torch.float32)


def test_norm_is_exact_with_weights_and_gradients_of_other_layouts(in_triton):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5, 4).transpose(1, 4).contiguous().requires_grad_()
    weight, bias = (part.expand(4).requires_grad_() for part in torch.randn(2, 1))  # without strides
    gradient = torch.randn(2, 5, 4, 3, 4).permute(0, 4, 2, 1, 3)
    y = operations.group_norm(x, weight, bias, 2, 1e-5, relu=True)
    gradients = torch.autograd.grad(y, (x, weight, bias), gradient)
    for got, want in zip((y, *gradients), normalize_by_hand(x, gradient, weight, bias, 2), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_norm_with_relu_keeps_nan(in_triton):
    x = torch.randn(1, 4, 3, 4, 5)
    x[0, 0, 0, 0, 0] = torch.nan
    x.requires_grad_()
    y = layers.GroupNorm(2, 4)(x, relu=True)
    (of_x,) = torch.autograd.grad(y.sum(), x)
    for part in (y, of_x):
        assert part[0, :2].isnan().all()
        assert not part[0, 2:].isnan().any()


@pytest.mark.parametrize("relu", [False, True])
def test_second_derivatives_are_those_of_torch(in_triton, relu):
    torch.manual_seed(0)
    x = torch.randn(1, 4, 3, 4, 5, requires_grad=True)
    norm = layers.GroupNorm(2, 4)
    seconds = []
    for function in (partial(norm, relu=relu), lambda x: F.group_norm(x, 2).clamp(min=0 if relu else -torch.inf)):
        (first,) = torch.autograd.grad(function(x).pow(3).sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*seconds, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_filters_are_standardized_as_by_torch(in_triton, dtype):
    torch.manual_seed(0)
    convolution = layers.WeightStandardizedConv3d(3, 5)
    gradient = torch.randn(convolution.weight.shape).to(dtype)
    filters = operations.StandardizeFilters.apply(convolution.weight, convolution.gain, convolution.eps, dtype, kernels)
    (got,) = torch.autograd.grad(filters, convolution.weight, gradient)
    exact = convolution.weight.detach().double().flatten(1).requires_grad_()
    mean, deviation = exact.mean(1, keepdim=True), (exact.var(1, keepdim=True) + convolution.eps).sqrt()
    want = convolution.gain * (exact - mean) / deviation
    (of_exact,) = torch.autograd.grad(want, exact, gradient.flatten(1).double())
    assert filters.dtype == dtype
    torch.testing.assert_close(filters.flatten(1).double(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(got.flatten(1).double(), of_exact, rtol=1e-5, atol=1e-6)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def change_by_hand(x, gradient, dim):
    """Eq. 4 slice by slice in float64, and the gradient of ``x``."""
    x, gradient = (np.moveaxis(part.detach().double().numpy(), dim, 0) for part in (x, gradient))
    active = sigmoid(x)
    change, of_active = np.zeros_like(x), np.zeros_like(x)
    for k in range(1, len(x)):
        step = active[k] - active[k - 1]
        change[k] = np.abs(step)
        of_active[k] += np.sign(step) * gradient[k]
        of_active[k - 1] -= np.sign(step) * gradient[k]
    return tuple(np.moveaxis(part, 0, dim) for part in (change, of_active * active * (1 - active)))


def gate_by_hand(features, logits, gradient):
    """Eq. 6 in float64, and the gradients of features and logits."""
    features, logits, gradient = (part.detach().double().numpy() for part in (features, logits, gradient))
    gate = sigmoid(logits)
    return features * (1 + gate), gradient * (1 + gate), gradient * features * gate * (1 - gate)


def assert_equal_but_for_rounding(got, want):
    got = got.detach()
    want, eps = torch.from_numpy(want), torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=4 * eps, atol=4e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [2, 3, 4])
@pytest.mark.parametrize("slices", [1, 2, 7])
def test_change_in_triton_is_equation_4(in_triton, dtype, dim, slices):
    torch.manual_seed(0)
    size = [3, 4, 6]
    size[dim - 2] = slices
    x = (3 * torch.randn(2, 1, *size)).to(dtype)
    x.select(dim, -1).copy_(x.select(dim, max(slices - 2, 0)))  # no change, where the gradient is zero
    gradient = torch.randn(x.shape).to(dtype)
    change = operations.sigmoid_change(x.requires_grad_(), spatial_axis=dim - 2)
    (of_x,) = torch.autograd.grad(change, x, gradient)
    assert change.dtype == of_x.dtype == dtype
    for got, want in zip((change, of_x), change_by_hand(x, gradient, dim), strict=True):
        assert_equal_but_for_rounding(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 2, 3, 4, 7), (1, 2, 1, 1, 129), (5,)])
def test_gate_in_triton_is_equation_6(in_triton, dtype, shape):
    torch.manual_seed(0)
    features, logits, gradient = (3 * torch.randn(3, *shape)).to(dtype)
    inputs = features.requires_grad_(), logits.requires_grad_()
    gated = operations.gate_features(*inputs)
    gradients = torch.autograd.grad(gated, inputs, gradient)
    assert {part.dtype for part in (gated, *gradients)} == {dtype}
    for got, want in zip((gated, *gradients), gate_by_hand(*inputs, gradient), strict=True):
        assert_equal_but_for_rounding(got, want)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_equations_4_and_6_of_large_float16_values_and_of_nan(in_triton):
    torch.manual_seed(0)
    x = (1e4 * torch.randn(1, 2, 4, 5, 6).clamp(-3, 3)).half()
    x[0, 0, 1, 2, 3] = torch.nan
    logits, gradient = x.roll(1, 1).requires_grad_(), torch.randn(()).half().expand(x.shape)  # without strides
    x.requires_grad_()
    change, gated = operations.sigmoid_change(x), operations.gate_features(x, logits)
    pairs = [
        (change, *torch.autograd.grad(change, x, gradient)),
        (gated, *torch.autograd.grad(gated, (x, logits), gradient)),
    ]
    by_hand = change_by_hand(x, gradient, 4), gate_by_hand(x, logits, gradient)
    for results, expected in zip(pairs, by_hand, strict=True):
        for got, want in zip(results, expected, strict=True):
            assert_equal_but_for_rounding(got, want)
    assert change[0, 0, 1, 2].isnan().tolist() == [False, False, False, True, True, False]


def test_equations_4_and_6_in_triton_have_second_derivatives(in_triton):
    torch.manual_seed(0)
    features, logits = torch.randn(2, 1, 2, 3, 4, 5).unbind()
    inputs = features.requires_grad_(), logits.requires_grad_()
    seconds = []
    for change, gate in (
        (operations.sigmoid_change, operations.gate_features),
        (lambda f: inter_slice_residual(f.sigmoid()), lambda f, x: f * (1 + x.sigmoid())),
    ):
        result = gate(change(features), logits).pow(3).sum()
        firsts = torch.autograd.grad(result, inputs, create_graph=True)
        seconds += torch.autograd.grad(sum(first.square().sum() for first in firsts), inputs)
    for got, want in zip(seconds[:2], seconds[2:], strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", ["noncontiguous", "broadcast"])
def test_gate_of_other_logits_is_equation_6(in_triton, kind):
    torch.manual_seed(0)
    features = torch.randn(2, 3, 3, 4, 5, requires_grad=True)
    logits = torch.randn(2, 3, 5, 4, 3).transpose(2, 4) if kind == "noncontiguous" else torch.randn(2, 3, 3, 4, 1)
    gated = operations.gate_features(features, logits.requires_grad_())
    expanded, gradient = logits.expand(features.shape), torch.randn(features.shape)
    want, of_features, of_logits = gate_by_hand(features, expanded, gradient)
    if kind == "broadcast":
        of_logits = of_logits.sum(-1, keepdims=True)
    gradients = torch.autograd.grad(gated, (features, logits), gradient)
    for got, expected in zip((gated, *gradients), (want, of_features, of_logits), strict=True):
        assert_equal_but_for_rounding(got, expected)


def called(unit, x):
    """Names of the layers whose hooks a unit calls, and its output."""
    names = []
    handles = [
        layer.register_forward_hook(lambda *_, name=name: names.append(name)) for name, layer in unit.named_children()
    ]
    y = unit(x)
    for handle in handles:
        handle.remove()
    return names, y


def test_norm_computes_the_relu_only_where_kernels_run(in_triton, monkeypatch):
    torch.manual_seed(0)
    unit, x = layers.NormActConv(4, 6, dropout=0.5).eval(), torch.randn(2, 4, 3, 4, 5)
    names, y = called(copy.deepcopy(unit), x)
    assert names == ["norm", "dropout", "conv"]
    monkeypatch.setattr(operations, "triton_kernels", lambda *tensors: None)
    names, want = called(unit, x)
    assert names == ["norm", "act", "dropout", "conv"]
    torch.testing.assert_close(y, want)


def test_compiled_unit_does_not_ask_for_kernels(in_triton, monkeypatch):
    torch.manual_seed(0)
    unit, x = layers.NormActConv(4, 6), torch.randn(2, 4, 3, 4, 5)
    want = unit(x)
    monkeypatch.setattr(operations, "triton_kernels", lambda *tensors: pytest.fail("torch.compile sees a kernel"))
    compiled = torch.compile(unit, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), want)
    torch.testing.assert_close(torch.jit.trace(unit, x, check_trace=False)(x), want)


@pytest.mark.parametrize(
    "change",
    [
        lambda unit: setattr(unit, "act", torch.nn.ELU()),
        lambda unit: setattr(unit, "norm", torch.nn.GroupNorm(2, 4)),
        lambda unit: setattr(unit, "norm", torch.nn.Identity()),
        lambda unit: setattr(unit, "act", torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.ReLU())),
    ],
)
def test_changed_unit_calls_every_layer(in_triton, change):
    torch.manual_seed(0)
    unit, x = layers.NormActConv(4, 6, act=("relu", {"inplace": False})), torch.randn(2, 4, 3, 4, 5)
    change(unit)
    names, y = called(unit.eval(), x)
    assert names == [name for name, _ in unit.named_children()]
    want = x
    for layer in unit:
        want = layer(want)
    torch.testing.assert_close(y, want)


def test_norm_without_parameters_computes_the_relu(in_triton):
    torch.manual_seed(0)
    unit, x = layers.NormActConv(4, 6, norm=("group", {"affine": False})), torch.randn(2, 4, 3, 4, 5)
    names, y = called(unit, x)
    assert names == ["norm", "conv"]
    torch.testing.assert_close(y, unit.conv(F.group_norm(x, 4).relu()))


def test_network_in_triton_trains_as_with_torch(in_triton, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 2048)  # few programs: interpreting one takes milliseconds
    torch.manual_seed(0)
    norm = ("group", {"num_groups": 2})
    network = ConResNet(2, 3, channels=(2, 4), strides=(2,), blocks=(1, 0, 1), dropout=None, norm=norm)
    image = torch.randn(1, 2, 6, 8, 7)

    def run() -> torch.Tensor:
        network.zero_grad()
        output = network(image)
        (output.segmentation.square().sum() + output.residuals[0].square().sum()).backward()
        return torch.cat([output.segmentation.flatten(), *(p.grad.flatten() for p in network.parameters())])

    ours = run()
    monkeypatch.setattr(operations, "triton_kernels", lambda *tensors: None)
    torch.testing.assert_close(ours, run(), rtol=1e-3, atol=1e-3)


@pytest.fixture
def untried():
    operations._tried_kernels.cache_clear()
    yield
    operations._tried_kernels.cache_clear()


def test_kernels_are_used_after_a_trial(untried):
    assert operations._tried_kernels(torch.device("cpu")) is kernels


def test_torch_takes_images_with_too_many_voxels_for_the_kernels(in_triton, monkeypatch):
    monkeypatch.setattr(operations, "LONGEST_ROW", 60)
    fits, too_long = torch.ones(2, 3, 3, 4, 5), torch.ones(1, 1, 1, 1, 61)
    assert operations.triton_kernels(fits) is kernels
    assert operations.triton_kernels(too_long) is None
    torch.testing.assert_close(operations.sigmoid_change(too_long), torch.zeros_like(too_long))


def test_torch_normalizes_without_triton(untried, monkeypatch):
    monkeypatch.setitem(sys.modules, "monai_conres.kernels", None)  # importing it fails
    monkeypatch.delattr("monai_conres.kernels", raising=False)
    assert operations._tried_kernels(torch.device("cpu")) is None


def test_a_warning_says_why_triton_does_not_run(untried, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(kernels, "group_norm", fail)
    with pytest.warns(UserWarning, match="Triton does not run on cpu, so that the network.*RuntimeError: Failed to"):
        assert operations._tried_kernels(torch.device("cpu")) is None
