"""The context residual decoder: context residual modules of all scales and the heads that predict residual masks.

It knows the channels of a segmentation decoder's features, never the network they come from: ``ConResNet`` and
``attach_conres`` use the same one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from monai_conres.context import ContextResidualModule
from monai_conres.layers import (
    DEFAULT_ACT,
    DEFAULT_NORM,
    NormActConv,
    WeightStandardizedConv3d,
    unit_settings,
)
from monai_conres.residual import inter_slice_residual, slice_dim

__all__ = ["ConResDecoder", "ConResOutput"]


class ConResOutput(NamedTuple):
    """What a network with a context residual decoder returns in training.

    Attributes:
        segmentation: what the plain network returns in training: a tensor of logits ``(b, c, d, h, w)``, or the deep
            supervision output of the network that the decoder is attached to.
        residuals: logits of the residual masks, fine to coarse, each at its own resolution. Empty where the context
            residual mapping is switched off.

    Example:
        >>> segmentation, residuals = ConResOutput(torch.zeros(1, 3, 8, 8, 8), ())
        >>> residuals
        ()
    """

    segmentation: Any
    residuals: tuple[torch.Tensor, ...]


class ConResDecoder(nn.Module):
    """Context residual decoder beside any segmentation decoder (Fig. 2a of Zhang et al., 2021, in green).

    A segmentation decoder calls :meth:`step` once at each scale, coarse to fine, and goes on with the features that
    come back; :meth:`predict` turns the collected context residual features into logits of residual masks. The first
    input of the path is the inter-slice residual of the image itself.

    Args:
        in_channels: number of channels of the image.
        channels: number of channels of the segmentation decoder's features, coarse to fine.
        out_channels: number of residual masks to predict.
        width: largest number of channels of the context residual path at any scale; ``None`` is that of the features,
            as in the paper.
        attention: False switches the attention gate of Eq. 6 off.
        zero_init: True opens the gates from zero in training, see :class:`ContextResidualModule`.
        spatial_axis: index of the slice axis among the three spatial axes.
        norm: MONAI's name of a normalization layer, or ``(name, arguments)``.
        act: MONAI's name of an activation layer, or ``(name, arguments)``.
        fan_in_scaling: see :class:`~monai_conres.layers.WeightStandardizedConv3d`.
        inner_norm: see :class:`ContextResidualModule`.
        align_corners: how features are resampled from scale to scale; True in the released code of the authors.

    Raises:
        ValueError: when ``channels`` is empty, a number of channels is too small, or ``norm`` does not fit them.

    Example:
        >>> decoder = ConResDecoder(1, (16, 8), 2)
        >>> image = torch.randn(1, 1, 8, 12, 16)
        >>> features, first = decoder.step(0, torch.randn(1, 16, 4, 6, 8), image)
        >>> features, second = decoder.step(1, torch.randn(1, 8, 8, 12, 16), first)
        >>> [tuple(logits.shape) for logits in decoder.predict([first, second])]
        [(1, 2, 8, 12, 16), (1, 2, 4, 6, 8)]
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        out_channels: int,
        *,
        width: int | None = None,
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
        self.spatial_axis = spatial_axis
        self.attention = attention
        unit: dict[str, Any] = {"norm": norm, "act": act, "fan_in_scaling": fan_in_scaling}
        self._settings = {"inner_norm": inner_norm, "align_corners": align_corners, **unit_settings(**unit)}
        module: dict[str, Any] = {
            "attention": attention,
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

    @property
    def conres_settings(self) -> dict[str, Any]:
        """What its weights do not tell, although it changes what they compute."""
        axis = int(slice_dim(5, self.spatial_axis)) - 2
        return {"spatial_axis": axis, "attention": self.attention, **self._settings}

    def step(self, stage: int, features: torch.Tensor, previous: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pass one scale.

        Args:
            stage: number of the scale, 0 for the coarsest.
            features: features of the segmentation decoder at this scale, ``(b, channels[stage], d, h, w)``.
            previous: context residual features of the scale before; the image for the coarsest.

        Returns:
            The features that the segmentation decoder goes on with (``O_seg`` of Eq. 6), and the context residual
            features of this scale (``O_res`` of Eq. 5), both of the size of ``features``.
        """
        if stage == 0:
            previous = inter_slice_residual(previous, spatial_axis=self.spatial_axis)
        return self.stages[stage](features, previous)

    def predict(self, residuals: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Logits of the residual masks, fine to coarse, from the features of all scales, coarse to fine."""
        return tuple(head(features) for head, features in zip(self.heads, residuals, strict=True))[::-1]
