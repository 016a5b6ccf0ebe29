"""The context residual decoder: Eq. 4 to 6 at each scale, and the heads that predict residual masks.

The decoder knows the channels of a segmentation decoder's features, never the network that they come from.
``ConResNet`` and ``attach_conres`` use the same decoder.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from monai_conres.layers import (
    DEFAULT_ACT,
    DEFAULT_NORM,
    NormActConv,
    WeightStandardizedConv3d,
    in_turn,
    norm_layer,
)
from monai_conres.operations import add_into, gate_features, resize_features, sigmoid_change
from monai_conres.renamed import refuse_old_arguments
from monai_conres.residual import inter_slice_residual, slice_dim

__all__ = ["ConResDecoder", "ConResOutput", "ContextResidualModule"]


class ConResOutput(NamedTuple):
    """What a network with a context residual decoder returns in training.

    Attributes:
        segmentation: what the plain network returns in training: a tensor of logits ``(b, c, d, h, w)``, or the deep
            supervision output of the network that the decoder is attached to.
        residuals: logits of the residual masks, fine to coarse, each at its own resolution. Empty with
            ``context="none"``.

    Example:
        >>> segmentation, residuals = ConResOutput(torch.zeros(1, 3, 8, 8, 8), ())
        >>> residuals
        ()
    """

    segmentation: Any
    residuals: tuple[torch.Tensor, ...]


def _run(part: Callable[..., torch.Tensor], *arguments: torch.Tensor) -> torch.Tensor:
    return part(*arguments)


class ContextResidualModule(nn.Module):
    """Context residual mapping and context attention mapping at one scale (Fig. 2b, Eq. 4-6 of Zhang et al., 2021).

    With the features ``F`` of a segmentation decoder and the incoming context residual ``I_res``::

        G[s + 1] = |sigmoid(F[s + 1]) - sigmoid(F[s])|        Eq. 4, zero for the first slice
        O_res    = Conv(Conv(G) + I_res)                      Eq. 5, context residual mapping
        O_seg    = F * (1 + sigmoid(O_res))                   Eq. 6, context attention mapping

    Args:
        channels: number of channels of ``F``.
        width: number of channels of the incoming and the outgoing context residual; ``None`` is ``channels``, as in
            the paper. A 1x1x1 convolution brings a narrower residual back to ``channels`` in front of the gate.
        entry: layer that brings the incoming residual to ``width`` channels; ``None`` if the residual has ``width``
            channels already.
        context: ``"attention"`` computes Eq. 4 to 6, ``"mapping"`` leaves out Eq. 6, so that features pass unchanged.
            With ``"none"`` features and residual both pass unchanged.
        zero_init: True multiplies the gate by a learned strength for each channel, ``F * (1 + strength *
            sigmoid(O_res))``. The strength starts at zero, so that ``O_seg`` is exactly ``F`` at first.
        spatial_axis: index of the slice axis among the three spatial axes.
        norm: MONAI's name of a normalization layer, or ``(name, arguments)``.
        act: MONAI's name of an activation layer, or ``(name, arguments)``.
        fan_in_scaling: see :class:`~monai_conres.layers.WeightStandardizedConv3d`.
        inner_norm: False leaves out the normalization after the inner convolution of Eq. 5, as the released code does.
        align_corners: how the incoming residual is resampled; True in the released code.

    Shape:
        ``features`` ``(b, channels, d, h, w)`` in and out, ``residual`` ``(b, width, d, h, w)`` out. The module
        resamples an incoming residual to the resolution of the features.

    Raises:
        ValueError: when ``context`` has another value, or ``zero_init`` is True without the gate.

    Note:
        The paper's "Conv" is convolution, normalization, activation. As in the released code, the outer "Conv" of Eq. 5
        is normalization, activation, convolution, so that the gate sees values of both signs. The inner "Conv" is
        1x1x1. The released code leaves out the inner normalization. ``G``, a difference of sigmoids, is then small
        compared with ``I_res``.

        Hooks on ``outer`` are not called. Put hooks on its layers, such as ``outer.conv``. Hooks on ``inner`` and
        ``inner_norm`` have to copy the output: without gradients a sum is written into it.

    Example:
        >>> module = ContextResidualModule(8)
        >>> features, residual = torch.randn(2, 1, 8, 4, 6, 5)
        >>> gated, residual = module(features, residual)
        >>> bool((gated / features).min() >= 1) and bool((gated / features).max() <= 2)
        True
    """

    @refuse_old_arguments
    def __init__(
        self,
        channels: int,
        *,
        width: int | None = None,
        entry: nn.Module | None = None,
        context: str = "attention",
        zero_init: bool = False,
        spatial_axis: int = -1,
        norm: str | tuple = DEFAULT_NORM,
        act: str | tuple = DEFAULT_ACT,
        fan_in_scaling: bool = True,
        inner_norm: bool = True,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        check_context(context, ("attention", "mapping", "none"))
        if zero_init and context != "attention":
            raise ValueError(f'expected context="attention" together with zero_init=True, got {context!r} (no gate).')
        self.context = context
        self.spatial_axis = spatial_axis
        self.align_corners = align_corners
        self.expand = self.strength = None
        if context == "none":
            return
        width = channels if width is None else width
        self.entry = entry
        self.inner = WeightStandardizedConv3d(channels, width, kernel_size=1, fan_in_scaling=fan_in_scaling)
        self.inner_norm = norm_layer(norm, width) if inner_norm else nn.Identity()
        self.outer = NormActConv(width, width, norm=norm, act=act, fan_in_scaling=fan_in_scaling)
        if context == "attention" and width != channels:
            self.expand = WeightStandardizedConv3d(width, channels, kernel_size=1, fan_in_scaling=fan_in_scaling)
        if zero_init:
            self.strength = nn.Parameter(torch.zeros(channels))

    def forward(
        self, features: torch.Tensor, residual: torch.Tensor, *, run: Callable[..., torch.Tensor] = _run
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gated features ``O_seg`` and the context residual features ``O_res``.

        ``run(part, *arguments)`` computes Eq. 4 and 5. A network with ``use_checkpoint`` gives its own ``run``.
        """
        if self.context == "none":
            return features, residual
        residual = run(self.map_context, features, residual)
        return self.attend(features, residual), residual

    def map_context(self, features: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Context residual mapping: ``O_res`` from the features and the incoming context residual."""
        eq4 = partial(sigmoid_change, spatial_axis=self.spatial_axis)
        # Eq. 5, without names for what it adds: they would keep features in memory
        return in_turn(
            self.outer,
            add_into(in_turn((eq4, self.inner, self.inner_norm), features), self._incoming(features, residual)),
        )

    def attend(self, features: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Context attention mapping: ``O_seg`` from the features and ``O_res``."""
        if self.context != "attention":
            return features
        if self.strength is not None:
            return torch.addcmul(features, features, self.gate(residual))  # F + F * gate
        return gate_features(features, self._gate_logits(residual))  # Eq. 6

    def gate(self, residual: torch.Tensor) -> torch.Tensor:
        """``sigmoid(O_res)`` of Eq. 6, ``(b, channels, d, h, w)``, from the context residual features ``O_res``."""
        gate = self._gate_logits(residual).sigmoid()
        return gate if self.strength is None else self.strength.view(-1, 1, 1, 1).to(gate.dtype) * gate

    def _gate_logits(self, residual: torch.Tensor) -> torch.Tensor:
        """``O_res`` of Eq. 6 with the channels of the features."""
        return residual if self.expand is None else self.expand(residual)

    def _incoming(self, features: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """``I_res`` of Eq. 5 with the spatial size of the features and ``width`` channels."""
        residual = resize_features(residual, features.shape[2:], align_corners=self.align_corners)
        return residual if self.entry is None else self.entry(residual)


class ConResDecoder(nn.Module):
    """Context residual decoder next to any segmentation decoder (Fig. 2a of Zhang et al., 2021, in green).

    A segmentation decoder calls :meth:`step` once at each scale, coarse to fine, and goes on with the features that
    come back. :meth:`predict` turns the collected context residual features into logits of residual masks. The first
    input of the path is the inter-slice residual of the image itself.

    Args:
        in_channels: number of channels of the image.
        channels: number of channels of the segmentation decoder's features, coarse to fine.
        out_channels: number of residual masks to predict.
        width: largest number of channels of the context residual path at any scale; ``None`` is the number of channels
            of the features, as in the paper.
        context: ``"attention"``, or ``"mapping"`` without the gate of Eq. 6.
        zero_init: True starts with closed gates, which training opens, see :class:`ContextResidualModule`.
        spatial_axis: index of the slice axis among the three spatial axes.
        norm: MONAI's name of a normalization layer, or ``(name, arguments)``.
        act: MONAI's name of an activation layer, or ``(name, arguments)``.
        fan_in_scaling: see :class:`~monai_conres.layers.WeightStandardizedConv3d`.
        inner_norm: see :class:`ContextResidualModule`.
        align_corners: how features are resampled from scale to scale; True in the released code of the authors.

    Attributes:
        arguments: the arguments above by name, for ``network.json``.

    Raises:
        ValueError: when ``channels`` is empty, a number of channels is too small, ``norm`` does not fit the channels,
            or ``context`` has another value.

    Example:
        >>> decoder = ConResDecoder(1, (16, 8), 2)
        >>> image = torch.randn(1, 1, 8, 12, 16)
        >>> features, first = decoder.step(0, torch.randn(1, 16, 4, 6, 8), image)
        >>> features, second = decoder.step(1, torch.randn(1, 8, 8, 12, 16), first)
        >>> [tuple(logits.shape) for logits in decoder.predict([first, second])]
        [(1, 2, 8, 12, 16), (1, 2, 4, 6, 8)]
    """

    @refuse_old_arguments
    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        out_channels: int,
        *,
        width: int | None = None,
        context: str = "attention",
        zero_init: bool = False,
        spatial_axis: int = -1,
        norm: str | tuple = DEFAULT_NORM,
        act: str | tuple = DEFAULT_ACT,
        fan_in_scaling: bool = True,
        inner_norm: bool = True,
        align_corners: bool = False,
    ) -> None:
        arguments = {name: value for name, value in list(locals().items()) if name not in ("self", "__class__")}
        super().__init__()
        check_context(context, ("attention", "mapping"))
        slice_dim(5, spatial_axis)
        if (
            not channels
            or min(in_channels, out_channels) < 1
            or min((*channels, *(() if width is None else (width,)))) < 2  # one weight cannot be standardized
        ):
            raise ValueError(
                "expected at least one scale, each of 2 or more channels, a width of 2 or more, and 1 or more image "
                f"channels and masks, got in_channels={in_channels}, channels={tuple(channels)}, "
                f"out_channels={out_channels}, width={width}."
            )
        self.arguments: dict[str, Any] = arguments
        self.context = context
        self.spatial_axis = spatial_axis
        unit: dict[str, Any] = {"norm": norm, "act": act, "fan_in_scaling": fan_in_scaling}
        module: dict[str, Any] = {
            "context": context,
            "zero_init": zero_init,
            "spatial_axis": spatial_axis,
            "inner_norm": inner_norm,
            "align_corners": align_corners,
            **unit,
        }
        widths = tuple(c if width is None else min(c, width) for c in channels)
        entries: list[nn.Module | None] = [
            WeightStandardizedConv3d(in_channels, widths[0], fan_in_scaling=fan_in_scaling)
        ]
        for coarse, fine in itertools.pairwise(widths):
            entries.append(None if coarse == fine else NormActConv(coarse, fine, **unit))
        self.stages = nn.ModuleList(
            ContextResidualModule(c, width=w, entry=entry, **module)
            for c, w, entry in zip(channels, widths, entries, strict=True)
        )
        self.heads = nn.ModuleList(nn.Conv3d(w, out_channels, kernel_size=1) for w in widths)

    def step(
        self,
        stage: int,
        features: torch.Tensor,
        previous: torch.Tensor,
        *,
        run: Callable[..., torch.Tensor] = _run,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pass one scale.

        Args:
            stage: number of the scale, 0 for the coarsest.
            features: features of the segmentation decoder at this scale, ``(b, channels[stage], d, h, w)``.
            previous: context residual features of the scale before; the image for the coarsest.
            run: see :meth:`ContextResidualModule.forward`.

        Returns:
            The features that the segmentation decoder goes on with (``O_seg`` of Eq. 6), and the context residual
            features of this scale (``O_res`` of Eq. 5), both of the size of ``features``.
        """
        if stage == 0:
            previous = inter_slice_residual(previous, spatial_axis=self.spatial_axis)
        return self.stages[stage](features, previous, run=run)

    def predict(self, residuals: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Logits of the residual masks, fine to coarse, from the features of all scales, coarse to fine."""
        return tuple(head(features) for head, features in zip(self.heads, residuals, strict=True))[::-1]


def check_context(context: str, expected: Sequence[str]) -> None:
    """Raise unless ``context`` is one of the expected words.

    Raises:
        ValueError: with the words that are expected.
    """
    if context not in expected:
        raise ValueError(f"expected context to be one of {', '.join(map(repr, expected))}, got {context!r}.")
