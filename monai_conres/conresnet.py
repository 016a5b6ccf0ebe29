"""ConResNet: a residual encoder, a segmentation decoder and the context residual decoder beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn

from monai_conres.context import check_switches
from monai_conres.decoder import ConResDecoder, ConResOutput
from monai_conres.layers import (
    DEFAULT_ACT,
    DEFAULT_NORM,
    NormActConv,
    PreActivationBlock,
    WeightStandardizedConv3d,
    fast_layout,
    recompute,
    resize_features,
    unit_settings,
)
from monai_conres.residual import slice_dim

__all__ = ["ConResNet"]


class ConResNet(nn.Module):
    """ConResNet (Zhang, Xie, Wang and Xia, IEEE TMI 2021): 3D segmentation with inter-slice context residuals.

    In ``train()`` mode it returns a :class:`~monai_conres.ConResOutput`, the logits of the segmentation and of the
    residual masks; in ``eval()`` mode the logits of the segmentation alone, one tensor, so that MONAI's inferers,
    evaluators and exports take it as any other network.

    Args:
        in_channels: number of channels (modalities) of the image.
        out_channels: number of channels of the segmentation.
        residual_channels: number of residual masks, one per foreground class. ``None`` is ``out_channels``, right for
            channels with a sigmoid each; with softmax it is ``out_channels - 1``: the background has no residual.
        channels: number of channels at each resolution, fine to coarse.
        strides: down-sampling between the resolutions, a number or one number per axis. A volume of thick slices is
            best down-sampled in plane first: ``strides=((2, 2, 1), (2, 2, 1), (2, 2, 2))``.
        blocks: number of residual blocks at each resolution, and of those with dilation 2 that follow at the last.
        mapping: False switches the context residual decoder off (Table III of the paper).
        attention: False switches the attention gate off. Both False is the paper's baseline.
        spatial_axis: index of the slice axis among the three spatial axes; -1 is the axial view after
            ``Orientationd("RAS")``, 0 the sagittal and 1 the coronal one.
        norm: MONAI's name of a normalization layer, or ``(name, arguments)``.
        act: MONAI's name of an activation layer, or ``(name, arguments)``.
        dropout: probability of dropping a channel of the encoder's output while training.
        fan_in_scaling: see :class:`~monai_conres.layers.WeightStandardizedConv3d`.
        inner_norm: see :class:`ContextResidualModule`.
        align_corners: how features are up-sampled; True in the released code of the authors.
        eval_residual: True makes ``eval()`` return ``(segmentation, residual)``, both logits at full resolution, so
            that sliding-window inference stitches both. An attribute, to be changed at any time.
        use_checkpoint: True computes the encoder's features again in the backward pass instead of keeping them, which
            takes less memory and more time. An attribute, too. Without effect where ``norm`` has running statistics,
            which would count a batch twice, and under ``torch.compile``, which decides on its own what to keep.

    Shape:
        ``(b, in_channels, d, h, w)`` with any size of at least one coarsest voxel, that is the product of the strides
        along each axis, or of two such voxels where a group of ``norm`` has one channel (8 at the coarsest resolution,
        or instances). Logits of the segmentation and of the finest residual have the same ``d, h, w``.

    Raises:
        ValueError: when the arguments do not fit each other, or an image does not fit the network.

    Note:
        As in the authors' released code, and unlike the paper's figures, normalization and activation come before
        each convolution. The default setting differs from the released one in well-conditioned weights
        (``fan_in_scaling``), ``inner_norm`` and ``align_corners``; :meth:`authors` is the released one.

    Example:
        >>> network = ConResNet(4, 3, channels=(8, 16, 32), strides=(2, (2, 2, 1)), blocks=(1, 1, 1, 1))
        >>> image = torch.randn(1, 4, 17, 20, 6)
        >>> segmentation, residuals = network(image)
        >>> [tuple(logits.shape[2:]) for logits in residuals]
        [(17, 20, 6), (9, 10, 3)]
        >>> network.eval()(image).shape
        torch.Size([1, 3, 17, 20, 6])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        residual_channels: int | None = None,
        channels: Sequence[int] = (32, 64, 128, 256),
        strides: Sequence[int | Sequence[int]] = (2, 2, 2),
        blocks: Sequence[int] = (1, 2, 2, 2, 2),
        mapping: bool = True,
        attention: bool = True,
        spatial_axis: int = -1,
        norm: str | tuple = DEFAULT_NORM,
        act: str | tuple = DEFAULT_ACT,
        dropout: float | str | tuple | None = 0.1,
        fan_in_scaling: bool = True,
        inner_norm: bool = True,
        align_corners: bool = False,
        eval_residual: bool = False,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        check_switches(mapping, attention)
        if min(in_channels, out_channels) < 1:
            raise ValueError(
                f"expected 1 or more channels, got in_channels={in_channels}, out_channels={out_channels}."
            )
        slice_dim(5, spatial_axis)
        self.in_channels = in_channels
        self.strides = _check_levels(channels, strides, blocks)
        self.least_size = tuple(map(math.prod, zip(*self.strides, strict=True)))
        self.attention = attention
        self.align_corners = align_corners
        self.eval_residual = eval_residual
        self.use_checkpoint = use_checkpoint
        unit: dict[str, Any] = {"norm": norm, "act": act, "fan_in_scaling": fan_in_scaling}
        strides_of_axes = [[int(step) for step in stride] for stride in self.strides]
        self._settings = {"strides": strides_of_axes, "align_corners": align_corners, **unit_settings(**unit)}

        # one entry per resolution: down-sampling convolution and residual blocks
        self.encoder = nn.ModuleList()
        for level, width in enumerate(channels):
            if level == 0:
                down: nn.Module = WeightStandardizedConv3d(in_channels, width, fan_in_scaling=fan_in_scaling)
            else:
                down = NormActConv(channels[level - 1], width, stride=self.strides[level - 1], **unit)
            self.encoder.append(nn.Sequential(down, *(PreActivationBlock(width, **unit) for _ in range(blocks[level]))))
        self.bottleneck = nn.Sequential(
            *(PreActivationBlock(channels[-1], dilation=2, **unit) for _ in range(blocks[-1])),
            NormActConv(channels[-1], channels[-2], dropout=dropout, **unit),
        )

        # skips are summed, so features arrive at each scale with the channels of the skip and leave with the next one's
        skip_channels = tuple(channels[-2::-1])
        feature_channels = (*skip_channels[1:], channels[0])
        self.decoder = nn.ModuleList(
            NormActConv(skip, width, **unit) for skip, width in zip(skip_channels, feature_channels, strict=True)
        )
        self.head = nn.Conv3d(feature_channels[-1], out_channels, kernel_size=1)
        self.residual_decoder = (
            ConResDecoder(
                in_channels,
                feature_channels,
                out_channels if residual_channels is None else residual_channels,
                attention=attention,
                spatial_axis=spatial_axis,
                inner_norm=inner_norm,
                align_corners=align_corners,
                **unit,
            )
            if mapping
            else None
        )

    @classmethod
    def authors(cls, in_channels: int, out_channels: int, spatial_axis: int = 0, **kwargs: Any) -> ConResNet:
        """The network as its authors released it, number for number; slices on the first spatial axis.

        Checkpoints of the original code load through :func:`~monai_conres.convert_authors_state_dict`.

        Example:
            >>> network = ConResNet.authors(4, 3)
            >>> sum(parameter.numel() for parameter in network.parameters())
            19018732
        """
        released: dict[str, Any] = {"fan_in_scaling": False, "inner_norm": False, "align_corners": True}
        return cls(in_channels, out_channels, spatial_axis=spatial_axis, **released, **kwargs)

    @property
    def conres_settings(self) -> dict[str, Any]:
        """What its weights do not tell, although it changes what they compute, such as the slice axis."""
        if self.residual_decoder is None:
            return self._settings
        return {**self._settings, **self.residual_decoder.conres_settings, "attention": self.attention}

    def forward(self, image: torch.Tensor) -> ConResOutput | torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Segment ``image``; see the class for what is returned in which mode."""
        if self.training:
            return self.heads(image)
        if not self.eval_residual:
            # without the gate nothing of the residual path reaches the segmentation
            features, _ = self._decode(image, self.residual_decoder if self.attention else None)
            return self.head(features)
        segmentation, residuals = self.heads(image)
        if not residuals:
            raise ValueError("expected mapping=True together with eval_residual=True: a baseline predicts no residual.")
        return segmentation, residuals[0]

    def heads(self, image: torch.Tensor) -> ConResOutput:
        """All outputs, logits of the segmentation and of the residuals fine to coarse, in either mode."""
        features, residuals = self._decode(image, self.residual_decoder)
        predicted = self.residual_decoder.predict(residuals) if self.residual_decoder is not None else ()
        return ConResOutput(self.head(features), predicted)

    def _decode(
        self, image: torch.Tensor, residual_decoder: ConResDecoder | None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The last features of the segmentation decoder, and the context residual features, coarse to fine."""
        self._check_image(image)
        features = image = fast_layout(image)
        skips = []
        for level in self.encoder:
            features = recompute(level, level, features, least=0) if self.use_checkpoint else level(features)
            skips.append(features)
        features = skips.pop()
        bottleneck = self.bottleneck
        features = recompute(bottleneck, bottleneck, features, least=0) if self.use_checkpoint else bottleneck(features)
        residuals: list[torch.Tensor] = []
        for stage, unit in enumerate(self.decoder):
            features = recompute(self, self._merge, unit, features, skips.pop())
            if residual_decoder is not None:
                previous = residuals[-1] if residuals else image
                features, residual = residual_decoder.step(stage, features, previous)
                residuals.append(residual)
        return features, residuals

    def _merge(self, unit: nn.Module, features: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """Features of one scale of the segmentation decoder."""
        merged = resize_features(features, skip.shape[2:], align_corners=self.align_corners)
        merged += skip
        return unit(merged)

    def _check_image(self, image: torch.Tensor) -> None:
        if torch.jit.is_tracing():  # a traced size is a tensor, and comparing it would fix it
            return
        if image.ndim != 5 or image.shape[1] != self.in_channels:
            raise ValueError(
                f"expected an image of shape (b, {self.in_channels}, d, h, w), got {tuple(image.shape)}; "
                "add the batch dimension with image[None], or build the network with the image's in_channels."
            )
        if any(size < least for size, least in zip(image.shape[2:], self.least_size, strict=True)):
            raise ValueError(
                f"expected a spatial size of at least {self.least_size}, the product of the strides, got "
                f"{tuple(image.shape[2:])}; pad the image (SpatialPadd) or give smaller strides along that axis."
            )


def _check_levels(
    channels: Sequence[int], strides: Sequence[int | Sequence[int]], blocks: Sequence[int]
) -> list[tuple[int, ...]]:
    """Raise unless the arguments describe the same number of resolutions; the strides as one number per axis."""
    if len(channels) < 2 or len(strides) != len(channels) - 1 or len(blocks) != len(channels) + 1:
        raise ValueError(
            "expected n >= 2 channels, n - 1 strides and n + 1 blocks (the last with dilation), got "
            f"channels={tuple(channels)}, strides={tuple(strides)}, blocks={tuple(blocks)}."
        )
    per_axis = [(stride,) * 3 if isinstance(stride, int) else tuple(stride) for stride in strides]
    if any(len(stride) != 3 or min(stride) < 1 for stride in per_axis) or min(channels) < 1 or min(blocks) < 0:
        raise ValueError(
            "expected positive channels, strides of one or three positive numbers, and blocks of 0 or more, got "
            f"channels={tuple(channels)}, strides={tuple(strides)}, blocks={tuple(blocks)}."
        )
    return per_axis
