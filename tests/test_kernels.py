"""The group normalization in Triton, run by Triton's interpreter, which needs no GPU."""

from __future__ import annotations

import os
import sys

import pytest
import torch
import torch.nn.functional as F

from monai_conres import ConResNet, layers, operations

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton compiles here: test_gpu.py tests what it compiles", allow_module_level=True)

from monai_conres import kernels


@pytest.fixture
def norm_in_triton(monkeypatch):
    """Let a CPU take the path of a GPU. Small features have several parts, of several blocks."""
    monkeypatch.setattr(kernels, "BLOCK", 64)
    monkeypatch.setattr(kernels, "PROGRAMS", 50)
    monkeypatch.setattr(operations, "on_accelerator", lambda x: True)
    monkeypatch.setattr(operations, "triton_kernels", lambda x: kernels)


@pytest.mark.parametrize(
    ("shape", "groups"),
    [((1, 8, 4, 5, 6), 4), ((2, 6, 5, 6, 7), 3), ((3, 4, 10, 15), 2), ((2, 5, 1, 1, 2), 1), ((1, 4, 4, 8, 4), 4)],
)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_group_norm_equals_torch_in_float64(norm_in_triton, shape, groups, affine, offset):
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


def test_half_precision_in_and_out(norm_in_triton):
    torch.manual_seed(0)
    x = (torch.randn(2, 4, 7, 8, 9) + 3).half().requires_grad_()
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


def test_second_derivatives_are_those_of_torch(norm_in_triton):
    torch.manual_seed(0)
    x = torch.randn(1, 4, 3, 4, 5, requires_grad=True)
    norm = layers.GroupNorm(2, 4)
    seconds = []
    for function in (norm, lambda x: F.group_norm(x, 2)):
        (first,) = torch.autograd.grad(function(x).pow(3).sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*seconds, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_filters_are_standardized_as_by_torch(norm_in_triton, dtype):
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


def test_network_in_triton_trains_as_with_torch(norm_in_triton, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 2048)  # few programs: interpreting one takes milliseconds
    torch.manual_seed(0)
    network = ConResNet(2, 3, channels=(8, 16), strides=(2,), blocks=(1, 1, 1), dropout=None)
    image = torch.randn(2, 2, 6, 8, 7)

    def run() -> torch.Tensor:
        network.zero_grad()
        output = network(image)
        (output.segmentation.square().sum() + output.residuals[0].square().sum()).backward()
        return torch.cat([output.segmentation.flatten(), *(p.grad.flatten() for p in network.parameters())])

    ours = run()
    monkeypatch.setattr(operations, "triton_kernels", lambda x: None)
    torch.testing.assert_close(ours, run(), rtol=1e-3, atol=1e-3)


@pytest.fixture
def untried():
    operations._tried_kernels.cache_clear()
    yield
    operations._tried_kernels.cache_clear()


def test_kernels_are_used_after_a_trial(untried):
    assert operations._tried_kernels(torch.device("cpu")) is kernels


def test_torch_normalizes_without_triton(untried, monkeypatch):
    monkeypatch.setitem(sys.modules, "monai_conres.kernels", None)  # importing it fails
    monkeypatch.delattr("monai_conres.kernels", raising=False)
    assert operations._tried_kernels(torch.device("cpu")) is None


def test_a_warning_says_why_triton_does_not_run(untried, monkeypatch):
    def fail(*args):
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(kernels, "group_norm", fail)
    with pytest.warns(UserWarning, match="Triton does not run on cpu, so that group norm.*RuntimeError: Failed to"):
        assert operations._tried_kernels(torch.device("cpu")) is None
