"""The operations in the ways that a CPU can compute; ``test_kernels.py`` has those in Triton."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor

from monai_conres import inter_slice_residual, operations
from monai_conres.layers import WeightStandardizedConv3d
from monai_conres.operations import ConvolveOneVolume, NormalizeGroups, ResampleTrilinearly, torch_convolves_slowly


def test_slow_convolutions_are_found_for_subclasses_of_tensors():
    image = torch.randn(1, 8, 9, 10, 11)
    usual = torch.backends.mkldnn.is_available()
    assert [torch_convolves_slowly(x) for x in (image, MetaTensor(image), torch.nn.Parameter(image))] == [usual] * 3


def test_gradients_of_one_small_volume_are_those_of_two():
    """For one volume torch's own backward pass takes several times as long."""
    convolution, image = WeightStandardizedConv3d(4, 8), torch.randn(1, 4, 9, 10, 11, requires_grad=True)
    with torch.profiler.profile(record_shapes=True) as profile:
        convolution(image).square().sum().backward()
    shapes = [e.input_shapes for e in profile.events() if e.name == "aten::convolution_backward"]
    assert [shape[1] for shape in shapes] == [[2, 4, 9, 10, 11]]
    assert image.grad.shape == image.shape
    small = torch.randn(1, 1, 3, 4, 2, dtype=torch.float32, requires_grad=True)
    filters = torch.randn(2, 1, 3, 3, 3, requires_grad=True)
    seconds = []
    for convolve in (partial(F.conv3d, padding=1), partial(convolve_one_volume, padding=1)):
        (first,) = torch.autograd.grad(convolve(small, filters).pow(2).sum(), filters, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), (small, filters)))
    torch.testing.assert_close(*seconds, rtol=1e-4, atol=1e-2)


def convolve_one_volume(input, weight, padding):
    return ConvolveOneVolume.apply(input, weight, (1, 1, 1), (padding,) * 3, (1, 1, 1))


def test_slow_convolution_of_torch_is_avoided():
    for size in (8, 64):  # 20,480 is between
        image = torch.randn(1, 8, size, 40, 4)
        with torch.profiler.profile() as profile:
            F.conv3d(image, torch.randn(8, 8, 3, 3, 3))
        slow = any("slow_conv3d" in event.key for event in profile.key_averages())
        assert slow == torch_convolves_slowly(image)
        with torch.profiler.profile() as profile:
            WeightStandardizedConv3d(8, 8)(image)
        assert not any("slow_conv3d" in event.key for event in profile.key_averages())
    with torch.backends.mkldnn.flags(enabled=False):
        assert not torch_convolves_slowly(torch.randn(1, 8, 8, 40, 4))


def normalize(x, weight, bias, groups):
    return NormalizeGroups.apply(x, weight, bias, groups, 1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_normalize_groups_is_as_exact_as_torch(layout, offset):
    torch.manual_seed(0)
    x = (torch.randn(2, 12, 5, 6, 7) + offset * torch.randn(12, 1, 1, 1)).contiguous(memory_format=layout)
    weight, bias, gradient = torch.randn(12), torch.randn(12), torch.randn(2, 12, 5, 6, 7)

    def run(function, dtype):
        inputs = [part.detach().to(dtype).requires_grad_() for part in (x, weight, bias)]
        y = function(*inputs)
        return [y, *torch.autograd.grad(y, inputs, gradient.to(dtype))]

    exact = run(lambda x, w, b: F.group_norm(x, 4, w, b), torch.float64)
    theirs = run(lambda x, w, b: F.group_norm(x, 4, w, b), torch.float32)
    ours = run(lambda x, w, b: normalize(x, w, b, 4), torch.float32)
    for got, other, want in zip(ours, theirs, exact, strict=True):
        error, usual = ((part.double() - want).norm() / want.norm() for part in (got, other))
        assert error < 3 * usual + 1e-7
    assert ours[0].is_contiguous(memory_format=layout)


def test_normalize_groups_gradients_match_finite_differences():
    x = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(2, 4, dtype=torch.float64).unbind()
    assert torch.autograd.gradcheck(lambda *a: normalize(*a, 2), (x, weight.requires_grad_(), bias.requires_grad_()))
    assert torch.autograd.gradcheck(lambda x: normalize(x, None, None, 2), (x,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1.0, 50.0), (1e3, 3e4)])  # 3e4 squared is not a float16
def test_normalize_groups_in_half_precision_rounds_only_once(dtype, scale, offset):
    torch.manual_seed(0)
    x = (scale * torch.randn(2, 8, 9, 10, 11) + offset).to(dtype).requires_grad_()
    weight, bias, gradient = torch.randn(8), torch.randn(8), torch.randn(2, 8, 9, 10, 11).to(dtype)
    exact = x.detach().double().requires_grad_()
    got, want = normalize(x, weight, bias, 4), F.group_norm(exact, 4, weight.double(), bias.double())
    got.backward(gradient)
    want.backward(gradient.double())
    assert got.dtype == dtype
    unit = torch.finfo(dtype).eps
    for ours, theirs in ((got, want), (x.grad, exact.grad)):
        assert (ours.double() - theirs).norm() < unit * theirs.norm()


@pytest.mark.parametrize("affine", [True, False])
def test_normalize_groups_second_derivatives_match_differences(affine):
    x = torch.randn(2, 4, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    parameters = [torch.randn(4, dtype=torch.float64, requires_grad=True) if affine else None for _ in range(2)]
    function = partial(normalize, groups=2)
    if not affine:
        assert torch.autograd.gradgradcheck(lambda x: function(x, None, None), (x,))
    else:
        assert torch.autograd.gradgradcheck(function, (x, *parameters))


def test_normalize_groups_of_an_empty_batch():
    x = torch.empty(0, 8, 2, 2, 2, requires_grad=True)
    y = normalize(x, torch.ones(8), torch.zeros(8), 4)
    y.sum().backward()
    assert x.grad.shape == y.shape == x.shape


@pytest.mark.parametrize("align_corners", [False, True])
def test_resample_has_the_gradients_of_torch(align_corners):
    x = torch.randn(1, 2, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    want = F.interpolate(x, (3, 4, 5), mode="trilinear", align_corners=align_corners)

    def function(x):
        return ResampleTrilinearly.apply(x, (3, 4, 5), align_corners)

    assert torch.equal(function(x), want)
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


def test_resample_under_autocast_on_an_accelerator_rounds_only_once(monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(1, 8, 4, 5, 6).bfloat16().contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    gradient, exact = torch.randn(1, 8, 9, 10, 11).bfloat16(), x.detach().double().requires_grad_()
    plain = operations.resize_features(exact, (9, 10, 11))
    plain.backward(gradient.double())
    monkeypatch.setattr(operations, "on_accelerator", lambda x: True)
    with torch.autocast("cpu", torch.bfloat16), torch.profiler.profile() as profile:
        got = operations.resize_features(x, (9, 10, 11))
    got.backward(gradient)
    assert "aten::_to_copy" not in {event.key for event in profile.key_averages()}
    for part, want in ((got, plain), (x.grad, exact.grad)):
        assert part.dtype == torch.bfloat16
        assert (part - want).norm() < 2**-8 * want.norm()


def plain_change(features, dim):
    return inter_slice_residual(features.sigmoid(), spatial_axis=dim - 2)


def plain_gate(features, logits):
    return features * (1 + logits.sigmoid())


@pytest.mark.parametrize("dim", [2, 3, 4])
@pytest.mark.parametrize("slices", [1, 2, 5])
def test_sigmoid_change_is_equation_4(dim, slices):
    torch.manual_seed(0)
    size = [3, 4, 6]
    size[dim - 2] = slices
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    x.select(dim, -1).copy_(x.select(dim, 0))  # equal slices, where the gradient of the absolute value is zero
    x.requires_grad_()
    got, want = operations.sigmoid_change(x, spatial_axis=dim - 2), plain_change(x, dim)
    torch.testing.assert_close(got, want)
    gradient = torch.randn_like(want)
    torch.testing.assert_close(torch.autograd.grad(got, x, gradient), torch.autograd.grad(want, x, gradient))


def test_equations_4_and_6_have_second_derivatives():
    features, logits = torch.randn(2, 1, 2, 3, 2, 3, dtype=torch.float64).unbind()
    inputs = features.requires_grad_(), logits.requires_grad_()
    assert torch.autograd.gradcheck(operations.gate_features, inputs)
    assert torch.autograd.gradgradcheck(operations.gate_features, inputs)
    assert torch.autograd.gradgradcheck(operations.sigmoid_change, inputs[:1])


def test_gradients_with_a_graph_are_those_without():
    """Gradients end at each argument, also where one depends on the other."""
    x = torch.randn(1, 2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    found = []
    for gate in (operations.gate_features, plain_gate):
        loss = gate(x, (2 * x).sin()).pow(3).sum()
        (first,) = torch.autograd.grad(loss, x, retain_graph=True)
        (again,) = torch.autograd.grad(loss, x, create_graph=True)
        torch.testing.assert_close(again, first)
        found += [first, *torch.autograd.grad(again.square().sum(), x)]
    torch.testing.assert_close(found[:2], found[2:])


def kept_bytes(function, *inputs):
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function(*inputs)
    return sum(kept.values()), output


def test_equations_4_and_6_keep_only_their_arguments():
    features, logits = (torch.randn(1, 8, 6, 7, 8, requires_grad=True) for _ in range(2))
    size = features.nbytes
    assert kept_bytes(operations.sigmoid_change, features)[0] == size
    assert kept_bytes(partial(plain_change, dim=4), features)[0] >= 2 * size - size // 8
    assert kept_bytes(operations.gate_features, features, logits)[0] == 2 * size
    # the logits are alive anyway; torch's own operations keep the gate, too
    assert kept_bytes(plain_gate, features, logits)[0] >= 2 * size
