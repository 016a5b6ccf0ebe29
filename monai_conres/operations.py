"""The network's operations, each in the fastest way that its device has.

What the package does for speed is in this file and in ``kernels.py``; ``docs/performance.md`` has the numbers. While a
graph is traced or compiled, under ``torch.func``, and for higher derivatives, torch sees the plain definitions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache, partial, wraps
from types import ModuleType
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.data import MetaTensor, get_track_meta
from monai.utils import convert_to_dst_type
from torch.autograd import forward_ad
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from monai_conres.residual import inter_slice_residual, slice_dim

__all__ = [
    "add_into",
    "convolution_dtype",
    "convolve",
    "filters_for_convolution",
    "gate_features",
    "group_norm",
    "holds_values",
    "is_captured",
    "is_distributed",
    "is_plain_eager",
    "norms_with_relu",
    "resize_features",
    "sigmoid_change",
    "standardized",
    "stream_of",
    "without_metadata",
]

LONGEST_FILTER = 16384  # weights, for the kernels
LONGEST_ROW = 2**30  # voxels, which the kernels count in 32 bits
TRITON_DEVICES = ("cuda",)


def standardized(weight: torch.Tensor, gain: float, eps: float) -> torch.Tensor:
    """``gain * (w - mean(w)) / sqrt(var(w) + eps)`` for each filter ``w``."""
    # layer_norm, one pass over the weights, divides by the deviation of the population, not of the sample
    unbiased = 1 - 1 / weight[0].numel()
    filters = F.layer_norm(weight, weight.shape[1:], eps=eps * unbiased)
    return filters * (gain * unbiased**0.5)


def filters_for_convolution(
    weight: torch.Tensor, gain: float, eps: float, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The filters :func:`standardized` in the layout of the convolution; on a GPU also in its precision ``dtype``."""
    kernels = None if dtype is None else triton_kernels(weight)
    if dtype is None or kernels is None or weight.numel() > LONGEST_FILTER * len(weight):
        return fast_layout(standardized(weight, gain, eps))
    return StandardizeFilters.apply(weight, gain, eps, dtype, kernels)


class StandardizeFilters(torch.autograd.Function):
    """:func:`standardized` in one launch, in the precision of the convolution."""

    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, gain: float, eps: float, dtype: torch.dtype, kernels: ModuleType
    ) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.settings, ctx.kernels = (gain, eps), kernels
        return kernels.standardize(weight, gain, eps, dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *differentiable(lambda w: standardized(w, *ctx.settings), (weight,), grad), *(None,) * 4
        return ctx.kernels.standardize_backward(grad, weight, *ctx.settings), *(None,) * 4


def convolution_dtype(weight: torch.Tensor) -> torch.dtype:
    """The precision of a convolution with the filters ``weight``."""
    casts = autocasts(weight) and weight.dtype != torch.float64  # which autocast leaves as it is
    return torch.get_autocast_dtype(weight.device.type) if casts else weight.dtype


def fast_layout(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` with its channels last on a CPU, so that convolutions return features in that layout."""
    if weight.device.type != "cpu" or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return weight
    return weight.movedim(1, -1).contiguous().movedim(-1, 1)  # torch.channels_last_3d, also under vmap


def convolve(
    input: torch.Tensor,
    weight: torch.Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> torch.Tensor:
    """``F.conv3d`` without bias.

    Example:
        >>> x, weight = torch.randn(1, 2, 5, 6, 7), torch.randn(3, 2, 1, 1, 1)
        >>> convolve(x, weight, (2, 1, 1), (0, 0, 0), (1, 1, 1)).shape
        torch.Size([1, 3, 3, 6, 7])
    """
    if input.dtype == weight.dtype and torch_convolves_slowly(input) and is_plain_eager(input, weight):
        return ConvolveOneVolume.apply(input, weight, stride, padding, dilation)
    return F.conv3d(input, weight, None, stride, padding, dilation)


class ConvolveOneVolume(torch.autograd.Function):
    """Convolution by oneDNN where :func:`torch_convolves_slowly`; takes input, filters, stride, padding, dilation.

    For gradients torch takes oneDNN only with two volumes, large volumes or dilated filters. So a second volume of
    zeros goes along with a small one, which is 1.5 to 10 times as fast for 3x3x3 filters of 64 channels or fewer.
    """

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor, *settings: tuple[int, ...]) -> torch.Tensor:
        ctx.save_for_backward(input, weight)
        ctx.settings = stride, padding, dilation = settings
        return torch.mkldnn_convolution(input, weight, None, padding, stride, dilation, 1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs = input, weight
            return *differentiable(lambda x, w: F.conv3d(x, w, None, *ctx.settings), inputs, grad), None, None, None
        if is_small(input) and input.shape[1] <= 64 and weight.shape[2] > 1 and max(ctx.settings[2]) == 1:
            grad, input = (torch.cat([part, torch.zeros_like(part)]) for part in (grad, input))
        wanted = (*ctx.needs_input_grad[:2], False)
        of_input, of_weight, _ = torch.ops.aten.convolution_backward(
            grad, input, weight, None, *ctx.settings, False, (0, 0, 0), 1, wanted
        )
        return None if of_input is None else of_input[:1], of_weight, None, None, None


def torch_convolves_slowly(input: torch.Tensor) -> bool:
    """Whether torch does not use oneDNN, which is 1.5 to 10 times as fast: for one small volume on a CPU.

    With one thread torch also convolves one large volume by a matrix product where the kernel is 1x1x1. That takes more
    memory, and changes the layout.
    """
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return False
    return (
        input.device.type == "cpu"
        and input.dtype == torch.float32
        and input.shape[0] == 1
        and (is_small(input) or torch.get_num_threads() == 1)
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and holds_values(input)
    )


def is_small(input: torch.Tensor) -> bool:
    """Whether an input is so small that torch does not use oneDNN for one volume."""
    return math.prod(input.shape[:4]) <= 20480


@register_flop_formula(torch.ops.aten.mkldnn_convolution)
def _multiply_adds(input: list[int], weight: list[int], *args: Any, out_shape: list[int], **kwargs: Any) -> int:
    """For tools that count operations: the same number as for torch's own convolution."""
    return conv_flop_count(input, weight, out_shape)


def group_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    groups: int,
    eps: float,
    relu: bool = False,
) -> torch.Tensor:
    """``F.group_norm``, with ``relu`` its ReLU; it uses all of an accelerator for a batch of one volume.

    Example:
        >>> x = torch.randn(1, 8, 4, 5, 6)
        >>> torch.equal(group_norm(x, None, None, 2, 1e-5), nn.functional.group_norm(x, 2))
        True
    """
    if not on_accelerator(x) or not is_plain_eager(x, weight, bias):
        y = F.group_norm(x.contiguous() if needs_contiguous(x, weight, bias) else x, groups, weight, bias, eps)
    elif (kernels := triton_kernels(x, weight, bias)) is not None:
        return NormalizeInTriton.apply(x, weight, bias, groups, eps, relu, kernels)
    else:
        y = NormalizeGroups.apply(x, weight, bias, groups, eps)
    return F.relu(y) if relu else y


def needs_contiguous(x: torch.Tensor, *parameters: torch.Tensor | None) -> bool:
    """Whether torch's group normalization fails for features ``x`` that are stored channels last.

    Where only its parameters have gradients, the backward pass on a CPU ends the process (torch 2.13). ``torch.vmap``
    does not know the layout.
    """
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return False
    only_parameters = not x.requires_grad and any(part is not None and part.requires_grad for part in parameters)
    return torch.func.debug_unwrap(x) is not x or (only_parameters and torch.is_grad_enabled())


def norms_with_relu(x: torch.Tensor) -> bool:
    """Whether the kernel of :func:`group_norm` also computes the ReLU of ``x``."""
    return on_accelerator(x) and is_plain_eager(x) and triton_kernels(x) is not None


class NormalizeGroups(torch.autograd.Function):
    """Group normalization ``y = (x - mean) * rstd * weight + bias``; keeps ``x`` and two numbers for each group.

    Called with ``(x, weight, bias, number of groups, eps)``.

    ``x`` in half precision is read as it is, never copied to float32. Its variance is then the mean of the squares less
    the square of the mean, in float32. Relative to the variance that is exact to ``1e-6 * (mean * rstd) ** 2``.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, groups: int, eps: float
    ) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        grouped = x.unflatten(1, (groups, -1))
        dims = list(range(2, grouped.ndim))
        if x.dtype == wide:
            variance, mean = torch.var_mean(grouped, dims, correction=0)
        else:
            mean = grouped.mean(dims, dtype=wide)
            square = torch.linalg.vector_norm(grouped, 2, dims, dtype=wide).square_() / math.prod(grouped.shape[2:])
            variance = square.addcmul_(mean, mean, value=-1).clamp_(min=0)
        mean, rstd = mean[..., None], variance.add_(eps).rsqrt_()[..., None]  # (b, groups, 1)
        scale = _scale(rstd, weight, x)
        shift = -mean * scale if bias is None else torch.addcmul(bias.unflatten(0, (groups, -1)), mean, scale, value=-1)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.eps = eps
        return torch.addcmul(_of_channels(shift, x), x, _of_channels(scale, x), out=torch.empty_like(x))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        wide, groups = mean.dtype, mean.shape[1]
        if torch.is_grad_enabled():
            return _differentiable_group_norm(grad, x, weight, bias, groups, ctx.eps)
        dims = list(range(2, x.ndim))
        # half precision: one operation multiplies in float32
        product = x * grad if x.dtype == wide else torch.addcmul(mean.new_zeros((1,) * x.ndim), x, grad)
        of_bias = grad.sum(dims, dtype=wide).unflatten(1, (groups, -1))  # (b, groups, channels of a group)
        of_weight = product.sum(dims).unflatten(1, (groups, -1)).addcmul_(mean, of_bias, value=-1).mul_(rstd)
        # the gradient of (x - mean) * rstd has no mean, and none of its product with that
        size = math.prod(x.shape[1:]) // groups
        first, second = (
            (part if weight is None else part * weight.unflatten(0, (groups, -1))).sum(2, keepdim=True).mul_(rstd)
            for part in (of_bias, of_weight)
        )
        second = second.mul_(rstd).div_(-size)
        offset = torch.addcmul(first.div_(-size), second, mean, value=-1)
        offset, slope = (_of_channels(part.expand_as(of_bias), x) for part in (offset, second))
        of_x = torch.addcmul(offset, x, slope, out=torch.empty_like(x))
        of_x.addcmul_(grad, _of_channels(_scale(rstd, weight, x), x))
        return (
            of_x,
            None if weight is None else of_weight.sum(0).flatten(),
            None if bias is None else of_bias.sum(0).flatten(),
            None,
            None,
        )


def _differentiable_group_norm(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    groups: int,
    eps: float,
    relu: bool = False,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of :func:`group_norm` that can be differentiated again."""
    wide = torch.promote_types(x.dtype, torch.float32)

    def normalize(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        y = F.group_norm(x.to(wide), groups, weight, bias, eps)
        return (F.relu(y) if relu else y).to(x.dtype)

    return *differentiable(normalize, (x, weight, bias), grad), None, None


class NormalizeInTriton(torch.autograd.Function):
    """Group normalization in Triton, with ``relu`` followed by the ReLU.

    Unlike :class:`NormalizeGroups` it stays exact for a large mean.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        groups: int,
        eps: float,
        relu: bool,
        kernels: ModuleType,
    ) -> torch.Tensor:
        y, statistics = kernels.group_norm(x, weight, bias, groups, eps, relu)
        ctx.save_for_backward(x, weight, bias, statistics)
        ctx.settings, ctx.kernels = (groups, eps, relu), kernels
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, statistics = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_differentiable_group_norm(grad, x, weight, bias, *ctx.settings), None, None
        groups, _, relu = ctx.settings
        of_x, of_weight, of_bias = ctx.kernels.group_norm_backward(grad, x, weight, bias, statistics, groups, relu)
        return of_x, None if weight is None else of_weight, None if bias is None else of_bias, *(None,) * 4


def _scale(rstd: torch.Tensor, weight: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """What multiplies ``x``, ``(b, groups, channels of a group)``."""
    groups = rstd.shape[1]
    if weight is None:
        return rstd.expand(-1, -1, x.shape[1] // groups)
    return rstd * weight.unflatten(0, (groups, -1))


def _of_channels(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Values ``(b, groups, channels of a group)``, to be multiplied with ``x``: ``(b, c, 1, ...)``."""
    return values.reshape(*x.shape[:2], *(1,) * (x.ndim - 2))


def sigmoid_change(features: torch.Tensor, *, spatial_axis: int = -1) -> torch.Tensor:
    """``inter_slice_residual(features.sigmoid())``, Eq. 4 of the paper; autograd keeps only the features.

    Example:
        >>> sigmoid_change(torch.tensor([[[0.0, 100.0, -100.0]]]))
        tensor([[[0.0000, 0.5000, 1.0000]]])
    """
    if not is_plain_eager(features):
        return inter_slice_residual(features.sigmoid(), spatial_axis=spatial_axis)
    return SigmoidChange.apply(features, slice_dim(features.ndim, spatial_axis), triton_kernels(features))


class SigmoidChange(torch.autograd.Function):
    """:func:`sigmoid_change`, called with features, tensor dimension of the slice axis, and the module ``kernels``."""

    @staticmethod
    def forward(ctx: Any, features: torch.Tensor, dim: int, kernels: ModuleType | None) -> torch.Tensor:
        ctx.save_for_backward(features)
        ctx.dim, ctx.kernels = dim, kernels
        if kernels is not None:
            return kernels.sigmoid_change(features, dim)
        active = features.sigmoid()
        change = torch.empty_like(active)
        change.narrow(dim, 0, 1).zero_()
        torch.sub(*_neighbors(active, dim), out=change.narrow(dim, 1, change.shape[dim] - 1)).abs_()
        return change

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (features,), dim = ctx.saved_tensors, ctx.dim
        if torch.is_grad_enabled():
            plain = partial(inter_slice_residual, spatial_axis=dim - 2)
            return *differentiable(lambda f: plain(f.sigmoid()), (features,), grad), None, None
        if ctx.kernels is not None:
            return ctx.kernels.sigmoid_change_backward(grad, features, dim), None, None
        active = features.sigmoid()
        later, earlier = _neighbors(active, dim)
        of_later = (later - earlier).sgn_().mul_(_neighbors(grad, dim)[0])
        of_active = torch.empty_like(active)
        of_active.narrow(dim, 0, 1).zero_()
        _neighbors(of_active, dim)[0].copy_(of_later)
        _neighbors(of_active, dim)[1].sub_(of_later)
        return torch.ops.aten.sigmoid_backward(of_active, active, grad_input=of_active), None, None


def gate_features(features: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """``features * (1 + sigmoid(logits))``, Eq. 6 of the paper; autograd keeps only the two arguments.

    Example:
        >>> gate_features(torch.tensor([2.0, 2.0]), torch.tensor([0.0, 100.0]))
        tensor([3., 4.])
    """
    same = features.dtype == logits.dtype and features.shape == logits.shape
    if not same or not is_plain_eager(features, logits):
        return torch.addcmul(features, features, logits.sigmoid())
    return GateFeatures.apply(features, logits, triton_kernels(features, logits))


class GateFeatures(torch.autograd.Function):
    """:func:`gate_features`, called with features, logits, and the module ``kernels``."""

    @staticmethod
    def forward(ctx: Any, features: torch.Tensor, logits: torch.Tensor, kernels: ModuleType | None) -> torch.Tensor:
        ctx.save_for_backward(features, logits)
        ctx.kernels = kernels
        if kernels is not None:
            return kernels.gate_features(features, logits)
        gate = logits.sigmoid()
        return torch.addcmul(features, features, gate, out=gate)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        features, logits = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *differentiable(lambda f, x: f * (1 + x.sigmoid()), (features, logits), grad), None
        if ctx.kernels is not None:
            return *ctx.kernels.gate_features_backward(grad, features, logits), None
        gate, of_gate = logits.sigmoid(), grad * features
        of_logits = torch.ops.aten.sigmoid_backward(of_gate, gate, grad_input=of_gate)
        return torch.addcmul(grad, grad, gate, out=gate), of_logits, None


def _neighbors(volume: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All slices but the first, and the slice before each of them."""
    count = volume.shape[dim] - 1
    return volume.narrow(dim, 1, count), volume.narrow(dim, 0, count)


def resize_features(features: torch.Tensor, size: Sequence[int], *, align_corners: bool = False) -> torch.Tensor:
    """Trilinear resampling of ``(b, c, d, h, w)`` to the spatial size ``size``, whatever the factor along each axis.

    The result has the precision of ``features``, also under autocast, where torch's own is in float32.

    Example:
        >>> resize_features(torch.zeros(1, 2, 3, 4, 5), (6, 7, 5)).shape
        torch.Size([1, 2, 6, 7, 5])
    """
    size = tuple(size)
    if resizes_at_once(features):
        return ResampleTrilinearly.apply(features, size, align_corners)
    return F.interpolate(features, size=size, mode="trilinear", align_corners=align_corners).to(features.dtype)


def resizes_at_once(features: torch.Tensor) -> bool:
    """Whether autocast would copy ``features`` to float32 and back, and one operation does as well."""
    rounds_twice = torch.is_grad_enabled() and not on_accelerator(features)  # gradients of some layouts on a CPU
    return autocasts(features) and is_plain_eager(features) and not rounds_twice


class ResampleTrilinearly(torch.autograd.Function):
    """:func:`resize_features`, whose gradients are added up in float32."""

    @staticmethod
    def forward(ctx: Any, features: torch.Tensor, size: tuple[int, ...], align_corners: bool) -> torch.Tensor:
        ctx.settings = size, features.shape, align_corners
        with torch.autocast(features.device.type, enabled=False) if autocasts(features) else nullcontext():
            return torch.ops.aten.upsample_trilinear3d(features, size, align_corners)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        return torch.ops.aten.upsample_trilinear3d_backward(wide, *ctx.settings).to(grad.dtype), None, None


def add_into(fresh: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """``fresh + other``; without gradients in the memory of ``fresh``, which nobody else may need.

    New memory costs a CPU as much time as the sum.
    """
    if torch.is_grad_enabled() or fresh.dtype != other.dtype or not is_plain_eager(fresh, other):
        return fresh + other
    return fresh.add_(other)


def without_metadata(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of ``(network, image, ...)`` that gives the results of a ``MetaTensor`` its metadata only at the end.

    MONAI copies the metadata in each operation, which takes longer than the operation on a small image.
    """

    @wraps(method)
    def run(network: nn.Module, image: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(image, MetaTensor):
            return method(network, image, *args, **kwargs)
        return _with_metadata(method(network, image.as_tensor(), *args, **kwargs), image)

    return run


def _with_metadata(output: Any, image: MetaTensor) -> Any:
    """The tensors in ``output`` with the metadata of ``image``."""
    if isinstance(output, torch.Tensor):
        return convert_to_dst_type(output, image)[0] if get_track_meta() else output
    if isinstance(output, Mapping):
        return {key: _with_metadata(part, image) for key, part in output.items()}
    if isinstance(output, (list, tuple)):
        parts = [_with_metadata(part, image) for part in output]
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
    return output


def triton_kernels(x: torch.Tensor, *others: torch.Tensor | None) -> ModuleType | None:
    """The module ``kernels``, where Triton runs and layout and precision of the tensors are those of its functions."""
    if x.device.type not in TRITON_DEVICES:
        return None
    for part in (x, *others):
        if part is not None and not (
            part.is_contiguous() and part.numel() and part.dtype != torch.float64 and holds_values(part)
        ):
            return None
    if math.prod(x.shape[2:]) > LONGEST_ROW:
        return None
    return _tried_kernels(x.device)


@lru_cache
def _tried_kernels(device: torch.device) -> ModuleType | None:
    """The module ``kernels`` after a trial on ``device``. Triton needs a C compiler, for example."""
    try:
        from monai_conres import kernels

        x = torch.ones(1, 2, 4, device=device)
        statistics = kernels.group_norm(x, None, None, 1, 1e-5, relu=True)[1]
        kernels.group_norm_backward(x, x, None, None, statistics, 1, relu=True)
    except Exception as error:
        if not isinstance(error, ImportError):
            warnings.warn(
                f"Triton does not run on {device}, so that the network is slower: {type(error).__name__}: "
                f"{str(error).strip()[:300]}",
                stacklevel=2,
            )
        return None
    return kernels


def on_accelerator(x: torch.Tensor) -> bool:
    """Whether ``x`` is not on a CPU."""
    return x.device.type != "cpu"


def is_captured(x: torch.Tensor) -> bool:
    """Whether a CUDA graph records what is computed from ``x`` now, to compute it again later in the same memory."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def is_distributed() -> bool:
    """Whether other processes work together with this one."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def stream_of(x: torch.Tensor) -> int:
    """The CUDA stream that computes with ``x`` now, 0 on other devices. One stream does not wait for another."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def autocasts(tensor: torch.Tensor) -> bool:
    """Whether autocast is on where ``tensor`` is."""
    device = tensor.device.type
    return device != "meta" and torch.is_autocast_enabled(device)  # torch.compile knows no is_autocast_available


def holds_values(tensor: torch.Tensor) -> bool:
    """Whether torch computes ``tensor`` itself. False for tensors of tools, which only record shapes."""
    return type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__


def is_plain_eager(*tensors: torch.Tensor | None) -> bool:
    """Whether torch computes ``tensors`` one operation after another, with reverse-mode gradients at most.

    False while a graph is traced, exported or compiled, under ``torch.func``, in forward-mode differentiation, and for
    MONAI's ``MetaTensor``, whose results are views. These need operations that torch knows.
    """
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return False
    return all(
        x is None
        or (
            not isinstance(x, MetaTensor)
            and torch.func.debug_unwrap(x) is x
            and forward_ad.unpack_dual(x).tangent is None
        )
        for x in tensors
    )


def differentiable(
    function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor | None], grad: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of ``function(*inputs)`` that can be differentiated again, for the backward pass of a function."""
    # views, because one input may depend on another: gradients end at each input
    inputs = [None if x is None else x.view_as(x) for x in inputs]
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(function(*inputs), wanted, grad, create_graph=True))
    return tuple(next(found) if x is not None and x.requires_grad else None for x in inputs)
