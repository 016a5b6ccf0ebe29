"""The network's building blocks: weight-standardized convolution, pre-activation unit, residual block, resizing.

What the package does for speed is in this file; ``docs/performance.md`` has the numbers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial, wraps
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.data import MetaTensor, get_track_meta
from monai.networks.layers.utils import get_act_layer, get_dropout_layer, get_norm_layer
from monai.utils import convert_to_dst_type
from torch.autograd import forward_ad
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from monai_conres.residual import inter_slice_residual, slice_dim

__all__ = ["NormActConv", "PreActivationBlock", "WeightStandardizedConv3d", "resize_features"]

DEFAULT_NORM = "group"
LONGEST_FILTER = 16384  # weights, for the kernels
DEFAULT_ACT = ("relu", {"inplace": True})


class WeightStandardizedConv3d(nn.Conv3d):
    """3D convolution, without bias and padded to keep the size, whose filters have zero mean and fixed variance.

    Weight standardization (Qiao et al., 2019): each output channel's filter is shifted and scaled before it is used,
    ``w' = gain * (w - mean(w)) / std(w)``, so that training with one or two volumes a batch stays stable.

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels.
        kernel_size: odd edge length of the kernel, in voxels.
        stride: step of the kernel, one number or one per axis.
        dilation: spacing of the kernel's taps, in voxels.
        fan_in_scaling: scales the filters by ``1 / sqrt(fan_in)``, which gives an output of variance one for inputs of
            variance one that do not depend on each other. False is the released configuration of the paper's authors:
            filters of variance one, and so outputs whose scale grows with the number of input channels.

    Shape:
        ``(b, in_channels, d, h, w)`` to ``(b, out_channels, ceil(d / stride), ceil(h / stride), ceil(w / stride))``.

    Raises:
        ValueError: when ``kernel_size`` is not odd, or a filter has one weight only.

    Example:
        >>> convolution = WeightStandardizedConv3d(8, 16, stride=(2, 2, 1))
        >>> convolution(torch.randn(1, 8, 7, 8, 5)).shape
        torch.Size([1, 16, 4, 4, 5])
        >>> filters = convolution.standardized_weight().flatten(1)
        >>> bool((filters.mean(1).abs() < 1e-6).all())
        True
    """

    eps = 1e-12  # added to the variance

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 3,
        stride: int | tuple[int, int, int] = 1,
        dilation: int = 1,
        fan_in_scaling: bool = True,
    ) -> None:
        if kernel_size % 2 == 0:
            raise ValueError(
                f"expected an odd kernel_size, got {kernel_size}; an even one cannot be centered on a voxel."
            )
        if in_channels * kernel_size < 2 or out_channels < 1:
            raise ValueError(
                "expected filters of 2 or more weights to standardize, and 1 or more of them, got "
                f"in_channels={in_channels}, kernel_size={kernel_size}, out_channels={out_channels}."
            )
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=dilation * (kernel_size // 2),
            dilation=dilation,
            bias=False,
        )
        self.gain = (in_channels * kernel_size**3) ** -0.5 if fan_in_scaling else 1.0

    def standardized_weight(self) -> torch.Tensor:
        """The filters that the convolution uses, ``(out_channels, in_channels, k, k, k)``."""
        return standardized(self.weight, self.gain, self.eps)

    def filters(self) -> torch.Tensor:
        """The same in the layout and precision of the convolution; without gradients computed once in ``eval()``.

        The filters are computed again when the weights change, and after each call of ``train()`` or ``eval()``. torch
        does not see a change through ``weight.data``: call ``eval()`` after it.
        """
        if not holds_values(self.weight) or not is_plain_eager(self.weight):
            return fast_layout(self.standardized_weight())
        dtype = torch.get_autocast_dtype(self.weight.device.type) if autocasts(self.weight) else self.weight.dtype
        if self.training or torch.is_grad_enabled():
            kernels = triton_kernels(self.weight)
            if kernels is None or self.weight.numel() > LONGEST_FILTER * len(self.weight):
                return fast_layout(self.standardized_weight())
            return StandardizeFilters.apply(self.weight, self.gain, self.eps, dtype, kernels)
        weight = self.weight.detach()  # keeps the memory, so that its address belongs to no other tensor
        state = (weight.data_ptr(), 0 if weight.is_inference() else weight._version, dtype)
        kept = _FILTERS.get(self)
        if kept is None or kept[0] != state:
            kept = _FILTERS[self] = (state, weight, fast_layout(self.standardized_weight()).to(dtype))
        return kept[2]

    def train(self, mode: bool = True) -> WeightStandardizedConv3d:
        """Set the mode, and forget the filters of :meth:`filters`."""
        _FILTERS.pop(self, None)
        return super().train(mode)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Convolve ``input`` with the standardized filters."""
        weight = self.filters()
        padding = (self.dilation[0] * (self.kernel_size[0] // 2),) * 3
        if torch_convolves_slowly(input) and is_plain_eager(input, weight):
            return ConvolveOneVolume.apply(input, weight, self.stride, padding, self.dilation)
        return F.conv3d(input, weight, None, self.stride, padding, self.dilation)


def standardized(weight: torch.Tensor, gain: float, eps: float) -> torch.Tensor:
    """``gain * (w - mean(w)) / sqrt(var(w) + eps)`` for each filter ``w``."""
    # layer_norm, one pass over the weights, divides by the deviation of the population, not of the sample
    unbiased = 1 - 1 / weight[0].numel()
    filters = F.layer_norm(weight, weight.shape[1:], eps=eps * unbiased)
    return filters * (gain * unbiased**0.5)


class StandardizeFilters(torch.autograd.Function):
    """:meth:`WeightStandardizedConv3d.standardized_weight` in one launch, in the precision of the convolution."""

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


# of each convolution: the state of the weights, the weights, and the filters that belong to them
_FILTERS: WeakKeyDictionary[nn.Module, tuple[tuple, torch.Tensor, torch.Tensor]] = WeakKeyDictionary()


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


def autocasts(tensor: torch.Tensor) -> bool:
    """Whether autocast is on where ``tensor`` is."""
    device = tensor.device.type
    return device != "meta" and torch.is_autocast_enabled(device)  # torch.compile knows no is_autocast_available


def holds_values(tensor: torch.Tensor) -> bool:
    """Whether torch computes ``tensor`` itself. False for tensors of tools, which only record shapes."""
    return type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__


@register_flop_formula(torch.ops.aten.mkldnn_convolution)
def _multiply_adds(input: list[int], weight: list[int], *args: Any, out_shape: list[int], **kwargs: Any) -> int:
    """For tools that count operations: the same number as for torch's own convolution."""
    return conv_flop_count(input, weight, out_shape)


class NormActConv(nn.Sequential):
    """Normalization, activation, optional dropout, weight-standardized convolution: the network's one unit.

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels.
        norm: MONAI's name of a normalization layer, or ``(name, arguments)``; ``"group"`` alone has 8 groups, fewer
            where 8 does not divide the channels.
        act: MONAI's name of an activation layer, or ``(name, arguments)``.
        dropout: probability of dropping a whole channel, or MONAI's ``(name, arguments)``; ``None`` or 0 for none.
        kwargs: further arguments of :class:`WeightStandardizedConv3d`.

    Raises:
        ValueError: when the number of channels cannot be divided into the groups of the normalization.

    Example:
        >>> NormActConv(8, 16, stride=2)(torch.randn(1, 8, 4, 6, 8)).shape
        torch.Size([1, 16, 2, 3, 4])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        norm: str | tuple = DEFAULT_NORM,
        act: str | tuple = DEFAULT_ACT,
        dropout: float | str | tuple | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.norm = norm_layer(norm, in_channels)
        self.act = get_act_layer(act)
        if isinstance(self.norm, nn.Identity) and getattr(self.act, "inplace", False):
            self.act.inplace = False  # it would change the unit's input
        if dropout:
            self.dropout = get_dropout_layer(("dropout", {"p": dropout}) if isinstance(dropout, float) else dropout, 3)
        self.conv = WeightStandardizedConv3d(in_channels, out_channels, **kwargs)


class PreActivationBlock(nn.Module):
    """Two pre-activation convolutions and a skip connection from input to output (Section III.A of the paper).

    Hooks on ``unit1`` and ``unit2`` are not called, only those on their layers, such as ``unit1.conv``.

    Args:
        channels: number of input and output channels.
        kwargs: further arguments of :class:`NormActConv`.

    Example:
        >>> PreActivationBlock(8, dilation=2)(torch.randn(1, 8, 4, 6, 8)).shape
        torch.Size([1, 8, 4, 6, 8])
    """

    def __init__(self, channels: int, **kwargs: Any) -> None:
        super().__init__()
        self.unit1 = NormActConv(channels, channels, **kwargs)
        self.unit2 = NormActConv(channels, channels, **kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(b, channels, d, h, w)`` to the same shape."""
        return add_into(in_turn((*self.unit1, *self.unit2), x), x)


def in_turn(layers: Iterable[Callable[[torch.Tensor], torch.Tensor]], features: torch.Tensor) -> torch.Tensor:
    """``features`` after one layer after the other. A module that calls its layers keeps its input in memory."""
    for layer in layers:
        features = layer(features)
    return features


def fast_layout(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` with its channels last on a CPU, so that convolutions return features in that layout."""
    if weight.device.type != "cpu" or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return weight
    return weight.movedim(1, -1).contiguous().movedim(-1, 1)  # torch.channels_last_3d, also under vmap


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` that uses all of an accelerator for a batch of one volume.

    torch's CUDA kernel starts one block of threads for each group of each volume. This class computes the same function
    with the same parameters in kernels of its own (``kernels.py``), or from sums that torch computes with all blocks
    where Triton does not run. Under autocast the output has the precision of the input, and the statistics are in
    float32. On a CPU, under ``torch.func``, in forward-mode differentiation, and while a graph is traced or compiled,
    this class is torch's own group normalization.

    Raises:
        ValueError: when a batch of one has only one value in each group.

    Example:
        >>> x = torch.randn(1, 8, 4, 5, 6)
        >>> torch.equal(GroupNorm(2, 8)(x), nn.GroupNorm(2, 8)(x))
        True
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(b, c, *spatial)`` to the same shape."""
        if not torch.jit.is_tracing() and x.numel() == self.num_groups:
            raise ValueError(
                f"expected more than one value in each of {self.num_groups} groups, got shape {tuple(x.shape)}; give a "
                "larger image or fewer groups."
            )
        if not on_accelerator(x) or not is_plain_eager(x, self.weight, self.bias):
            return super().forward(x)
        arguments = x, self.weight, self.bias, self.num_groups, self.eps
        kernels = triton_kernels(x)
        return NormalizeGroups.apply(*arguments) if kernels is None else NormalizeInTriton.apply(*arguments, kernels)


class NormalizeGroups(torch.autograd.Function):
    """Group normalization ``y = (x - mean) / deviation * weight + bias``; keeps ``x`` and two numbers for each group.

    Called with ``(x, weight, bias, number of groups, eps)``.

    ``x`` in half precision is read as it is, never copied to float32. Its variance is then the mean of the squares less
    the square of the mean, in float32. Relative to the variance that is exact to ``1e-6 * (mean / deviation) ** 2``.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, groups: int, eps: float
    ) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        parts = x.unflatten(1, (groups, -1))
        voxels = list(range(2, parts.ndim))
        if x.dtype == wide:
            variance, mean = torch.var_mean(parts, voxels, correction=0)
        else:
            mean = parts.mean(voxels, dtype=wide)
            square = torch.linalg.vector_norm(parts, 2, voxels, dtype=wide).square_() / math.prod(parts.shape[2:])
            variance = square.addcmul_(mean, mean, value=-1).clamp_(min=0)
        mean, reciprocal = mean[..., None], variance.add_(eps).rsqrt_()[..., None]  # (b, groups, 1)
        scale = _scale(reciprocal, weight, x)
        shift = -mean * scale if bias is None else torch.addcmul(bias.unflatten(0, (groups, -1)), mean, scale, value=-1)
        ctx.save_for_backward(x, weight, bias, mean, reciprocal)
        ctx.eps = eps
        return torch.addcmul(_of_channels(shift, x), x, _of_channels(scale, x), out=torch.empty_like(x))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, mean, reciprocal = ctx.saved_tensors
        wide, groups = mean.dtype, mean.shape[1]
        if torch.is_grad_enabled():
            return _differentiable_group_norm(grad, x, weight, bias, groups, ctx.eps)
        voxels = list(range(2, x.ndim))
        # half precision: one operation multiplies in float32
        product = x * grad if x.dtype == wide else torch.addcmul(mean.new_zeros((1,) * x.ndim), x, grad)
        of_bias = grad.sum(voxels, dtype=wide).unflatten(1, (groups, -1))  # (b, groups, channels of a group)
        of_weight = product.sum(voxels).unflatten(1, (groups, -1)).addcmul_(mean, of_bias, value=-1).mul_(reciprocal)
        # the gradient of (x - mean) / deviation has no mean, and none of its product with that
        size = math.prod(x.shape[1:]) // groups
        first, second = (
            (part if weight is None else part * weight.unflatten(0, (groups, -1))).sum(2, keepdim=True).mul_(reciprocal)
            for part in (of_bias, of_weight)
        )
        second = second.mul_(reciprocal).div_(-size)
        offset = torch.addcmul(first.div_(-size), second, mean, value=-1)
        offset, slope = (_of_channels(part.expand_as(of_bias), x) for part in (offset, second))
        of_x = torch.addcmul(offset, x, slope, out=torch.empty_like(x))
        of_x.addcmul_(grad, _of_channels(_scale(reciprocal, weight, x), x))
        return (
            of_x,
            None if weight is None else of_weight.sum(0).flatten(),
            None if bias is None else of_bias.sum(0).flatten(),
            None,
            None,
        )


def _differentiable_group_norm(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, groups: int, eps: float
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of group normalization that can be differentiated again."""
    wide = torch.promote_types(x.dtype, torch.float32)

    def normalize(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        return F.group_norm(x.to(wide), groups, weight, bias, eps).to(x.dtype)

    return *differentiable(normalize, (x, weight, bias), grad), None, None


class NormalizeInTriton(torch.autograd.Function):
    """:class:`NormalizeGroups` by the module ``kernels``, the last argument. A large mean makes it no less exact."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        groups: int,
        eps: float,
        kernels: ModuleType,
    ) -> torch.Tensor:
        y, statistics = kernels.group_norm(x, weight, bias, groups, eps)
        ctx.save_for_backward(x, weight, bias, statistics)
        ctx.settings, ctx.kernels = (groups, eps), kernels
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, statistics = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_differentiable_group_norm(grad, x, weight, bias, *ctx.settings), None
        of_x, of_weight, of_bias = ctx.kernels.group_norm_backward(grad, x, weight, statistics, ctx.settings[0])
        return of_x, None if weight is None else of_weight, None if bias is None else of_bias, None, None, None


def _scale(reciprocal: torch.Tensor, weight: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """What multiplies ``x``, ``(b, groups, channels of a group)``."""
    groups = reciprocal.shape[1]
    if weight is None:
        return reciprocal.expand(-1, -1, x.shape[1] // groups)
    return reciprocal * weight.unflatten(0, (groups, -1))


def _of_channels(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Values ``(b, groups, channels of a group)``, to be multiplied with ``x``: ``(b, c, 1, ...)``."""
    return values.reshape(*x.shape[:2], *(1,) * (x.ndim - 2))


def triton_kernels(x: torch.Tensor) -> ModuleType | None:
    """The module ``kernels``, where Triton runs and the layout and precision of ``x`` are those of its functions."""
    if not (x.is_cuda and x.is_contiguous() and x.numel() and x.dtype != torch.float64 and holds_values(x)):
        return None
    return _tried_kernels(x.device)


@lru_cache
def _tried_kernels(device: torch.device) -> ModuleType | None:
    """The module ``kernels`` after a trial on ``device``. Triton needs a C compiler, for example."""
    try:
        from monai_conres import kernels

        x = torch.ones(1, 2, 4, device=device)
        kernels.group_norm_backward(x, x, None, kernels.group_norm(x, None, None, 1, 1e-5)[1], 1)
    except Exception as error:
        if not isinstance(error, ImportError):
            warnings.warn(
                f"Triton does not run on {device}, so that group normalization is slower: {type(error).__name__}: "
                f"{str(error).strip()[:300]}",
                stacklevel=2,
            )
        return None
    return kernels


def on_accelerator(x: torch.Tensor) -> bool:
    """Whether ``x`` is not on a CPU."""
    return x.device.type != "cpu"


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


def differentiable(
    function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor | None], grad: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of ``function(*inputs)`` that can be differentiated again, for the backward pass of a function."""
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(function(*inputs), wanted, grad, create_graph=True))
    return tuple(next(found) if x is not None and x.requires_grad else None for x in inputs)


def norm_layer(norm: str | tuple | None, channels: int) -> nn.Module:
    """MONAI's normalization layer for 3D features.

    ``"group"`` alone has 8 groups (Section III.A of the paper), fewer where 8 does not divide the channels.

    ``None`` or an empty name is no normalization.

    Raises:
        ValueError: when the groups that ``norm`` asks for do not divide the channels.
    """
    if not norm:
        return nn.Identity()
    name, arguments = (norm, {}) if isinstance(norm, str) else norm
    try:
        if name.lower() == "group":
            return GroupNorm(**{"num_groups": math.gcd(8, channels), "num_channels": channels, **arguments})
        return get_norm_layer(name=(name, arguments), spatial_dims=3, channels=channels)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"norm={norm} does not fit {channels} channels ({error}); choose channels that the number of groups "
            'divides, or what the norm needs, for example ("group", {"num_groups": 4}), or plain "group".'
        ) from error


def resize_features(features: torch.Tensor, size: Sequence[int], *, align_corners: bool = False) -> torch.Tensor:
    """Trilinear resampling of ``(b, c, d, h, w)`` to the spatial size ``size``, whatever the factor along each axis.

    The result has the precision of ``features``, also under autocast, which resamples in float32.

    Example:
        >>> resize_features(torch.zeros(1, 2, 3, 4, 5), (6, 7, 5)).shape
        torch.Size([1, 2, 6, 7, 5])
    """
    resample = partial(F.interpolate, size=tuple(size), mode="trilinear", align_corners=align_corners)
    if torch.is_grad_enabled() or not autocasts(features):
        return resample(features).to(features.dtype)  # the backward pass adds up in float32
    with torch.autocast(features.device.type, enabled=False):
        return resample(features)


def add_into(fresh: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """``fresh + other``; without gradients in the memory of ``fresh``, which nobody else may need.

    New memory costs a CPU as much time as the sum.
    """
    if torch.is_grad_enabled() or fresh.dtype != other.dtype or not is_plain_eager(fresh, other):
        return fresh + other
    return fresh.add_(other)


def sigmoid_change(features: torch.Tensor, *, spatial_axis: int = -1) -> torch.Tensor:
    """``inter_slice_residual(features.sigmoid())``, Eq. 4 of the paper; autograd keeps only the features.

    Example:
        >>> sigmoid_change(torch.tensor([[[0.0, 100.0, -100.0]]]))
        tensor([[[0.0000, 0.5000, 1.0000]]])
    """
    if not is_plain_eager(features):
        return inter_slice_residual(features.sigmoid(), spatial_axis=spatial_axis)
    return SigmoidChange.apply(features, slice_dim(features.ndim, spatial_axis))


def gate_features(features: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """``features * (1 + sigmoid(logits))``, Eq. 6 of the paper; autograd keeps only the two arguments.

    Example:
        >>> gate_features(torch.tensor([2.0, 2.0]), torch.tensor([0.0, 100.0]))
        tensor([3., 4.])
    """
    if features.dtype != logits.dtype or not is_plain_eager(features, logits):
        return torch.addcmul(features, features, logits.sigmoid())
    return GateFeatures.apply(features, logits)


class SigmoidChange(torch.autograd.Function):
    """:func:`sigmoid_change`, called with the features and the tensor dimension of the slice axis."""

    @staticmethod
    def forward(ctx: Any, features: torch.Tensor, dim: int) -> torch.Tensor:
        ctx.save_for_backward(features)
        ctx.dim = dim
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
            return *differentiable(lambda f: plain(f.sigmoid()), (features,), grad), None
        active = features.sigmoid()
        later, earlier = _neighbors(active, dim)
        of_later = (later - earlier).sgn_().mul_(_neighbors(grad, dim)[0])
        of_active = torch.empty_like(active)
        of_active.narrow(dim, 0, 1).zero_()
        _neighbors(of_active, dim)[0].copy_(of_later)
        _neighbors(of_active, dim)[1].sub_(of_later)
        return torch.ops.aten.sigmoid_backward(of_active, active, grad_input=of_active), None


class GateFeatures(torch.autograd.Function):
    """:func:`gate_features`."""

    @staticmethod
    def forward(ctx: Any, features: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(features, logits)
        gate = logits.sigmoid()
        return torch.addcmul(features, features, gate, out=gate)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        features, logits = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiable(lambda f, x: f * (1 + x.sigmoid()), (features, logits), grad)
        gate, of_gate = logits.sigmoid(), grad * features
        of_logits = torch.ops.aten.sigmoid_backward(of_gate, gate, grad_input=of_gate)
        return torch.addcmul(grad, grad, gate, out=gate), of_logits


def _neighbors(volume: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All slices but the first, and the slice before each of them."""
    count = volume.shape[dim] - 1
    return volume.narrow(dim, 1, count), volume.narrow(dim, 0, count)
