"""The network's building blocks: weight-standardized convolution, pre-activation unit, residual block, resizing.

What the package does for speed is in this file; ``docs/performance.md`` has the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.networks.layers.utils import get_act_layer, get_dropout_layer, get_norm_layer
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

__all__ = ["NormActConv", "PreActivationBlock", "WeightStandardizedConv3d", "resize_features"]

DEFAULT_NORM = "group"
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
        # layer_norm, one pass over the weights, divides by the deviation of the population, not of the sample
        unbiased = 1 - 1 / self.weight[0].numel()
        filters = F.layer_norm(self.weight, self.weight.shape[1:], eps=self.eps * unbiased)
        return filters * (self.gain * unbiased**0.5)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Convolve ``input`` with the standardized filters."""
        weight = fast_layout(self.standardized_weight())
        padding = self.dilation[0] * (self.kernel_size[0] // 2)
        if torch_convolves_slowly(input):
            try:
                return torch.mkldnn_convolution(input, weight, None, (padding,) * 3, self.stride, self.dilation, 1)
            except NotImplementedError:  # in forward-mode differentiation
                pass
        return F.conv3d(input, weight, None, self.stride, padding, self.dilation)


def torch_convolves_slowly(input: torch.Tensor) -> bool:
    """Whether torch does not use oneDNN, which is 1.5 to 10 times as fast: for one small volume on a CPU."""
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return False
    return (
        input.device.type == "cpu"
        and input.dtype == torch.float32
        and input.shape[0] == 1
        and math.prod(input.shape[:4]) <= 20480
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and type(input).__torch_dispatch__ is torch.Tensor.__torch_dispatch__  # the tensor holds values
    )


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
        return x + self.unit2(self.unit1(x))


def fast_layout(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` with its channels last on a CPU, so that convolutions return features in that layout."""
    if weight.device.type != "cpu" or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return weight
    return weight.movedim(1, -1).contiguous().movedim(-1, 1)  # torch.channels_last_3d, also under vmap


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` that uses all of an accelerator for a batch of one volume.

    torch's CUDA kernel starts one block of threads for each group of each volume. This class computes the same function
    with the same parameters from statistics of each channel, which torch reduces with all blocks. Under autocast the
    output has the precision of the input, and the statistics are in float32. On a CPU, and while a graph is traced or
    compiled, this class is torch's own group normalization. On an accelerator there are only first derivatives in
    reverse mode: no forward-mode differentiation and no second derivatives.

    Raises:
        ValueError: when a batch of one has only one value in each group.

    Example:
        >>> x = torch.randn(1, 8, 4, 5, 6)
        >>> torch.equal(GroupNorm(2, 8)(x), nn.GroupNorm(2, 8)(x))
        True
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(b, c, *spatial)`` to the same shape."""
        if x.device.type == "cpu" or torch.jit.is_tracing() or torch.compiler.is_compiling():
            return super().forward(x)
        if x.numel() == self.num_groups:
            raise ValueError(
                f"expected more than one value in each of {self.num_groups} groups, got shape {tuple(x.shape)}; give a "
                "larger image or fewer groups."
            )
        return NormalizeGroups.apply(x, self.weight, self.bias, self.num_groups, self.eps)[0]


class NormalizeGroups(torch.autograd.Function):
    """Group normalization ``y = (x - mean) / deviation * weight + bias``; keeps ``x`` and two numbers for each group.

    Called with ``(x, weight, bias, number of groups, eps)``. Returns ``y``, mean and reciprocal deviation.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, groups: int, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        variances, means = torch.var_mean(x.to(wide), dim=list(range(2, x.ndim)), correction=0)
        variances, means = (part.unflatten(1, (groups, -1)) for part in (variances, means))
        mean = means.mean(2)
        # variance in a group: the mean of the channels' variances plus the variance of their means
        reciprocal = (variances.mean(2) + means.var(2, correction=0) + eps).rsqrt()
        scale = _of_channels(reciprocal, x) * (1 if weight is None else _of_channels(weight, x))
        shift = (0 if bias is None else _of_channels(bias, x)) - _of_channels(mean, x) * scale
        return torch.addcmul(shift, x, scale).to(x.dtype), mean, reciprocal

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, weight, bias, _, _ = inputs
        _, mean, reciprocal = output
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, weight, mean, reciprocal)
        ctx.mark_non_differentiable(mean, reciprocal)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, reciprocal = ctx.saved_tensors
        wide, groups = mean.dtype, mean.shape[1]
        voxels = list(range(2, x.ndim))
        of_bias = grad.sum(voxels, dtype=wide)
        of_weight = (x.to(wide) * grad).sum(voxels)
        of_weight = _repeat(reciprocal, x) * (of_weight - _repeat(mean, x) * of_bias)
        # means over a group of the gradient of (x - mean) / deviation, and of its product with that
        first, second = (
            (part if weight is None else weight * part).unflatten(1, (groups, -1)).sum(2) * groups / x.shape[1:].numel()
            for part in (of_bias, of_weight)
        )
        of_x = torch.addcmul(
            _of_channels(reciprocal * (reciprocal * second * mean - first), x),
            x,
            _of_channels(-(reciprocal**2) * second, x),
        )
        scale = _of_channels(reciprocal, x) * (1 if weight is None else _of_channels(weight, x))
        of_x = torch.addcmul(of_x, grad, scale).to(x.dtype)
        return of_x, None if weight is None else of_weight.sum(0), of_bias.sum(0) if ctx.has_bias else None, None, None


def _repeat(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Values of groups ``(b, groups)`` for each channel of ``x``, ``(b, c)``."""
    return values.repeat_interleave(x.shape[1] // values.shape[1], dim=1)


def _of_channels(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Values of channels ``(c)`` or of groups ``(b, groups)``, to be multiplied with ``x``: ``(b or 1, c, 1, ...)``."""
    values = values[None] if values.ndim == 1 else _repeat(values, x)
    return values.reshape(*values.shape, *(1,) * (x.ndim - 2))


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

    Example:
        >>> resize_features(torch.zeros(1, 2, 3, 4, 5), (6, 7, 5)).shape
        torch.Size([1, 2, 6, 7, 5])
    """
    return F.interpolate(features, size=tuple(size), mode="trilinear", align_corners=align_corners)
