"""The context residual module: where the segmentation decoder and the context residual decoder meet."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

from monai_conres.layers import (
    DEFAULT_ACT,
    DEFAULT_NORM,
    NormActConv,
    WeightStandardizedConv3d,
    fast_layout,
    norm_layer,
    recompute,
    resize_features,
)
from monai_conres.residual import inter_slice_residual

__all__ = ["ContextResidualModule"]


class ContextResidualModule(nn.Module):
    """Context residual mapping and context attention mapping at one scale (Fig. 2b, Eq. 4-6 of Zhang et al., 2021).

    With the features ``F`` of a segmentation decoder and the incoming context residual ``I_res``::

        G[s + 1] = |sigmoid(F[s + 1]) - sigmoid(F[s])|        Eq. 4, zero for the first slice
        O_res    = Conv(Conv(G) + I_res)                      Eq. 5, context residual mapping
        O_seg    = F * (1 + sigmoid(O_res))                   Eq. 6, context attention mapping

    Args:
        channels: number of channels of ``F``.
        width: number of channels of the incoming and the outgoing context residual; ``None`` is ``channels``, as in
            the paper. A narrower one is brought back to ``channels`` by a 1x1x1 convolution in front of the gate.
        entry: what brings the incoming residual to ``width`` channels, where it has another number of them.
        mapping: False switches the whole module off: features pass as they are and there is no residual.
        attention: False switches the gate of Eq. 6 off: features pass as they are, the residual is still computed.
        zero_init: True multiplies the gate by a learned strength for each channel, ``F * (1 + strength *
            sigmoid(O_res))``, that starts at zero: at first ``O_seg`` is exactly ``F``.
        spatial_axis: index of the slice axis among the three spatial axes.
        norm: MONAI's name of a normalization layer, or ``(name, arguments)``.
        act: MONAI's name of an activation layer, or ``(name, arguments)``.
        fan_in_scaling: see :class:`~monai_conres.layers.WeightStandardizedConv3d`.
        inner_norm: False leaves out the normalization after the inner convolution of Eq. 5, as the released code does.
        align_corners: how the incoming residual is resampled; True in the released code.

    Shape:
        ``features`` ``(b, channels, d, h, w)`` in and out, ``residual`` ``(b, width, d, h, w)`` out. The incoming one
        may be of another resolution, and is resampled to that of the features.

    Raises:
        ValueError: when ``attention`` is asked for without ``mapping``: the gate is made from the mapping's output.

    Note:
        The paper's "Conv" is convolution, normalization, activation. As in its released code the outer one of Eq. 5 is
        preceded by normalization and activation, so that the gate sees values of both signs, and the inner one is
        1x1x1; that code leaves out its normalization, and then ``G``, a difference of sigmoids, is small beside
        ``I_res``.

    Example:
        >>> module = ContextResidualModule(8)
        >>> features, residual = torch.randn(2, 1, 8, 4, 6, 5)
        >>> gated, residual = module(features, residual)
        >>> bool((gated / features).min() >= 1) and bool((gated / features).max() <= 2)
        True
    """

    def __init__(
        self,
        channels: int,
        *,
        width: int | None = None,
        entry: nn.Module | None = None,
        mapping: bool = True,
        attention: bool = True,
        zero_init: bool = False,
        spatial_axis: int = -1,
        norm: str | tuple = DEFAULT_NORM,
        act: str | tuple = DEFAULT_ACT,
        fan_in_scaling: bool = True,
        inner_norm: bool = True,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        check_switches(mapping, attention)
        if zero_init and not attention:
            raise ValueError("expected attention=True together with zero_init=True: there is no gate to open.")
        self.mapping = mapping
        self.attention = attention
        self.spatial_axis = spatial_axis
        self.align_corners = align_corners
        width = channels if width is None else width
        pointwise: dict[str, Any] = {"kernel_size": 1, "fan_in_scaling": fan_in_scaling}
        if mapping:
            self.entry = entry
            self.inner = WeightStandardizedConv3d(channels, width, **pointwise)
            self.inner_norm = norm_layer(norm, width) if inner_norm else nn.Identity()
            self.outer = NormActConv(width, width, norm=norm, act=act, fan_in_scaling=fan_in_scaling)
        self.expand = (
            WeightStandardizedConv3d(width, channels, **pointwise) if attention and width != channels else None
        )
        self.strength = nn.Parameter(torch.zeros(channels)) if attention and zero_init else None

    def forward(self, features: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gated features ``O_seg`` and the context residual features ``O_res``."""
        if not self.mapping:
            return features, residual
        residual = recompute(self, self._map, features, residual)
        if self.attention:
            expanded = residual if self.expand is None else self.expand(residual)
            features = recompute(self, self._attend, features, expanded)
        return features, residual

    def gate(self, residual: torch.Tensor) -> torch.Tensor:
        """What the features are multiplied with in Eq. 6, less one; ``residual`` has their number of channels."""
        gate = residual.sigmoid()
        return gate if self.strength is None else self.strength.view(-1, 1, 1, 1) * gate

    def _map(self, features: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Eq. 4 and 5."""
        # of this one tensor is left when the incoming residual, resized, takes as much memory again
        mapped = self.inner_norm(
            self.inner(inter_slice_residual(fast_layout(features).sigmoid(), spatial_axis=self.spatial_axis))
        )
        residual = resize_features(fast_layout(residual), features.shape[2:], align_corners=self.align_corners)
        if self.entry is not None:
            residual = self.entry(residual)
        mapped += residual
        return self.outer(mapped)

    def _attend(self, features: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Eq. 6."""
        return torch.addcmul(features, features, self.gate(residual))


def check_switches(mapping: bool, attention: bool) -> None:
    """Raise where attention is on and mapping is off."""
    if attention and not mapping:
        raise ValueError(
            "expected attention=False together with mapping=False, got attention=True: the attention is made from the "
            "output of the mapping. Both False is the baseline of the paper."
        )
