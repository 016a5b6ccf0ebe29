"""The network's building blocks: weight-standardized convolution, pre-activation unit, residual block.

``operations.py`` computes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn as nn
from monai.networks.layers.utils import get_act_layer, get_dropout_layer, get_norm_layer

from monai_conres.operations import (
    add_into,
    convolution_dtype,
    convolve,
    filters_for_convolution,
    group_norm,
    holds_values,
    is_captured,
    is_distributed,
    is_plain_eager,
    norms_with_relu,
    standardized,
    stream_of,
)

__all__ = ["NormActConv", "PreActivationBlock", "WeightStandardizedConv3d"]

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
        return standardized(self.weight, self.gain, self.eps)

    def filters(self) -> torch.Tensor:
        """The standardized filters in the layout and precision of the convolution.

        In ``eval()`` without gradients the module computes them once and keeps them. It computes them again after a
        change of the weights, after a pass with gradients, and after ``train()`` or ``eval()``. torch does not count a
        change through ``weight.data`` or a view in numpy, by a fused optimizer or by the replay of a CUDA graph: call
        ``eval()`` after it. After ``.to()`` the call frees the old filters. A CUDA graph, and each of several processes
        of ``torch.distributed``, which can also write weights, always computes the filters.
        """
        settings = self.weight, self.gain, self.eps
        if not holds_values(self.weight) or not is_plain_eager(self.weight):
            return filters_for_convolution(*settings)
        dtype = convolution_dtype(self.weight)
        uncounted = is_captured(self.weight) or self.weight.is_inference() or is_distributed()
        if self.training or torch.is_grad_enabled() or uncounted:
            _FILTERS.pop(self, None)  # an optimizer may follow, and a fused one leaves the version as it was
            return filters_for_convolution(*settings, dtype)
        weight = self.weight.detach()  # keeps the memory, so that its address belongs to no other tensor
        state = (weight.data_ptr(), weight._version, dtype, stream_of(weight))
        kept = _FILTERS.get(self)
        if kept is None or kept[0] != state:
            kept = _FILTERS[self] = (state, weight, filters_for_convolution(*settings, dtype).to(dtype))
        return kept[2]

    def train(self, mode: bool = True) -> WeightStandardizedConv3d:
        """Set the mode, and forget the filters of :meth:`filters`."""
        _FILTERS.pop(self, None)
        return super().train(mode)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Convolve ``input`` with the standardized filters."""
        padding = (self.dilation[0] * (self.kernel_size[0] // 2),) * 3
        return convolve(input, self.filters(), self.stride, padding, self.dilation)


# of each convolution: the state of the weights, the weights, and the filters that belong to them
_FILTERS: WeakKeyDictionary[nn.Module, tuple[tuple, torch.Tensor, torch.Tensor]] = WeakKeyDictionary()


class NormActConv(nn.Sequential):
    """Normalization, activation, optional dropout, weight-standardized convolution: the network's one unit.

    On a GPU the group norm computes the ReLU after it, so hooks on ``act`` are not called. A hook on ``norm`` has to
    copy the output: the ReLU changes it in place.

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels.
        norm: MONAI's name of a normalization layer, or ``(name, arguments)``; plain ``"group"`` has 8 groups,
            fewer where 8 does not divide the channels.
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
            self.dropout = get_dropout_layer(dropout, 3)
        self.conv = WeightStandardizedConv3d(in_channels, out_channels, **kwargs)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``(b, in_channels, d, h, w)`` to the shape of the convolution's output."""
        return in_turn(self, input)


class PreActivationBlock(nn.Module):
    """Two pre-activation convolutions and a skip connection from input to output (Section III.A of the paper).

    Hooks on ``unit1`` and ``unit2`` are not called, only those on their layers, such as ``unit1.conv``. A hook on
    ``unit2.conv`` has to copy the output: without gradients the input is added to it in place.

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
    waiting = list(layers)
    while waiting:
        layer, *waiting = waiting
        if type(layer) is GroupNorm and waiting and type(waiting[0]) is nn.ReLU and norms_with_relu(features):
            features = layer(features, relu=True)
            del waiting[0]
        else:
            features = layer(features)
    return features


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` that uses all of an accelerator for a batch of one volume.

    torch's CUDA kernel starts one block of threads for each group of each volume. This class computes the same function
    with the same parameters in kernels of its own (``kernels.py``). Without Triton, and for features in float64, of
    another layout or of more than 2**30 voxels, it takes sums that torch computes with all blocks. Under autocast the
    output has the precision of the input, and the statistics are in float32. On a CPU, under ``torch.func``, in
    forward-mode differentiation, and while a graph is traced or compiled, this class is torch's own group
    normalization.

    Raises:
        ValueError: when the input has other channels, or a batch of one has only one value in each group.

    Example:
        >>> x = torch.randn(1, 8, 4, 5, 6)
        >>> torch.equal(GroupNorm(2, 8)(x), nn.GroupNorm(2, 8)(x))
        True
    """

    def forward(self, x: torch.Tensor, relu: bool = False) -> torch.Tensor:
        """``(b, c, *spatial)`` to the same shape; with ``relu`` the ReLU of the result."""
        if not torch.jit.is_tracing() and x.shape[1] != self.num_channels:
            raise ValueError(
                f"expected {self.num_channels} channels, got shape {tuple(x.shape)}; build the norm with the channels "
                "of its input."
            )
        if not torch.jit.is_tracing() and x.numel() == self.num_groups:
            raise ValueError(
                f"expected more than one value in each of {self.num_groups} groups, got shape {tuple(x.shape)}; give a "
                "larger image or fewer groups."
            )
        return group_norm(x, self.weight, self.bias, self.num_groups, self.eps, relu)


def norm_layer(norm: str | tuple | None, channels: int) -> nn.Module:
    """MONAI's normalization layer for 3D features.

    Plain ``"group"`` has 8 groups (Section III.A of the paper), fewer where 8 does not divide the channels.

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
