"""ConResNet: a residual encoder, a segmentation decoder and the context residual decoder next to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from monai_conres.decoder import ConResDecoder, ConResOutput, check_context
from monai_conres.layers import (
    DEFAULT_ACT,
    DEFAULT_NORM,
    NormActConv,
    PreActivationBlock,
    WeightStandardizedConv3d,
)
from monai_conres.operations import add_into, resize_features, without_metadata
from monai_conres.renamed import OldAttribute, refuse_old_arguments
from monai_conres.residual import slice_dim

__all__ = ["ConResNet"]


class ConResNet(nn.Module):
    """ConResNet (Zhang, Xie, Wang and Xia, IEEE TMI 2021): 3D segmentation with inter-slice context residuals.

    In ``train()`` mode the network returns a :class:`~monai_conres.ConResOutput`: the logits of the segmentation and of
    the residual masks. In ``eval()`` mode the network returns one tensor, the logits of the segmentation. So MONAI's
    inferers, evaluators and exports take the network like any other. :meth:`with_residual` returns segmentation and
    residual in either mode.

    Args:
        in_channels: number of channels (modalities) of the image.
        out_channels: number of channels of the segmentation.
        include_background: True predicts a residual mask for each output channel: independent sigmoids, such as the
            regions of BraTS. False is for a softmax, in which channel 0 is the background and has no residual mask.
        channels: number of channels at each resolution, fine to coarse.
        strides: down-sampling between the resolutions, a number or one number per axis. For thick slices, down-sample
            in plane first: ``strides=((2, 2, 1), (2, 2, 1), (2, 2, 2))``.
        blocks: number of residual blocks at each resolution, then the number of blocks with dilation 2 that follow at
            the last resolution.
        context: ``"attention"`` is ConResNet, ``"mapping"`` predicts residual masks but does not gate the features,
            ``"none"`` is the paper's baseline without a residual decoder (Table III of the paper).
        spatial_axis: index of the slice axis among the three spatial axes; -1 is the axial view after
            ``Orientationd("RAS")``, 0 the sagittal view, 1 the coronal view.
        norm: MONAI's name of a normalization layer, or ``(name, arguments)``.
        act: MONAI's name of an activation layer, or ``(name, arguments)``.
        dropout: probability of dropping a channel of the encoder's output in training.
        fan_in_scaling: see :class:`~monai_conres.layers.WeightStandardizedConv3d`.
        inner_norm: see :class:`ContextResidualModule`.
        align_corners: how features are up-sampled; True in the released code of the authors.
        use_checkpoint: True computes features again in the backward pass instead of keeping them. A training step takes
            less memory and more time. ``torch.func.grad`` does not work with True. You may change the attribute
            ``use_checkpoint`` later.

    Attributes:
        arguments: the arguments above by name, for ``network.json``.

    Shape:
        ``(b, in_channels, d, h, w)``, each size at least the product of the strides along its axis. Where a group of
        ``norm`` has one channel (8 channels at the coarsest resolution, or instance norm), the coarsest features need
        two voxels. Logits of the segmentation and of the finest residual have the size ``d, h, w`` of the image.

    Raises:
        ValueError: when the arguments do not fit each other, or an image does not fit the network.

    Note:
        As in the authors' released code, and unlike the paper's figures, normalization and activation come before
        each convolution. The default differs from the released setting in well-conditioned weights
        (``fan_in_scaling``), ``inner_norm`` and ``align_corners``. :meth:`released` is the released setting.

    Example:
        >>> network = ConResNet(4, 3, channels=(8, 16, 32), strides=(2, (2, 2, 1)), blocks=(1, 1, 1, 1))
        >>> image = torch.randn(1, 4, 17, 20, 6)
        >>> segmentation, residuals = network(image)
        >>> [tuple(logits.shape[2:]) for logits in residuals]
        [(17, 20, 6), (9, 10, 3)]
        >>> network.eval()(image).shape
        torch.Size([1, 3, 17, 20, 6])
    """

    @refuse_old_arguments
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        include_background: bool = True,
        channels: Sequence[int] = (32, 64, 128, 256),
        strides: Sequence[int | Sequence[int]] = (2, 2, 2),
        blocks: Sequence[int] = (1, 2, 2, 2, 2),
        context: str = "attention",
        spatial_axis: int = -1,
        norm: str | tuple = DEFAULT_NORM,
        act: str | tuple = DEFAULT_ACT,
        dropout: float | str | tuple | None = 0.1,
        fan_in_scaling: bool = True,
        inner_norm: bool = True,
        align_corners: bool = False,
        use_checkpoint: bool = False,
    ) -> None:
        arguments = {name: value for name, value in list(locals().items()) if name not in ("self", "__class__")}
        super().__init__()
        check_context(context, ("attention", "mapping", "none"))
        slice_dim(5, spatial_axis)
        residual_channels = out_channels - (not include_background)
        if in_channels < 1 or residual_channels < 1:
            raise ValueError(
                "expected 1 or more channels, and 2 or more output channels with include_background=False, got "
                f"in_channels={in_channels}, out_channels={out_channels}, include_background={include_background}."
            )
        self.arguments: dict[str, Any] = arguments
        self.in_channels = in_channels
        self.strides = _check_levels(channels, strides, blocks)
        self.least_size = tuple(map(math.prod, zip(*self.strides, strict=True)))
        self.context = context
        self.align_corners = align_corners
        self.use_checkpoint = use_checkpoint
        unit: dict[str, Any] = {"norm": norm, "act": act, "fan_in_scaling": fan_in_scaling}

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
        self.residual_decoder = None
        if context != "none":
            self.residual_decoder = ConResDecoder(
                in_channels,
                feature_channels,
                residual_channels,
                context=context,
                spatial_axis=spatial_axis,
                inner_norm=inner_norm,
                align_corners=align_corners,
                **unit,
            )

        self._check_checkpoint()

    eval_residual = OldAttribute("ConResNet.eval_residual")
    authors = OldAttribute("ConResNet.authors")

    @classmethod
    def released(cls, in_channels: int, out_channels: int, spatial_axis: int = 0, **kwargs: Any) -> ConResNet:
        """The network of the authors' released code, with slices on the first spatial axis.

        Checkpoints of the original code load through :func:`~monai_conres.convert_released_state_dict`.

        Example:
            >>> network = ConResNet.released(4, 3)
            >>> sum(parameter.numel() for parameter in network.parameters())
            19018732
        """
        setting: dict[str, Any] = {"fan_in_scaling": False, "inner_norm": False, "align_corners": True}
        return cls(in_channels, out_channels, spatial_axis=spatial_axis, **setting, **kwargs)

    @without_metadata
    def forward(self, image: torch.Tensor) -> ConResOutput | torch.Tensor:
        """Segment ``image``. The class says what each mode returns."""
        if self.training:
            return self.heads(image)
        # without the gate the residual path does not reach the segmentation
        features, _ = self._decode(image, self.residual_decoder if self.context == "attention" else None)
        return self.head(features)

    @without_metadata
    def with_residual(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the segmentation and of the finest residual masks, in either mode.

        Hand the method to an inferer for whole volumes: ``inferer(image, network.with_residual)``. The method does not
        change the mode: call ``network.eval()`` first to switch dropout off. A flip along the slice axis shifts the
        residual by one slice.

        Args:
            image: ``(b, in_channels, d, h, w)``.

        Returns:
            ``(b, out_channels, d, h, w)`` and ``(b, r, d, h, w)`` for ``r`` residual masks.

        Raises:
            ValueError: when the network has no residual decoder, or the image does not fit it.

        Example:
            >>> network = ConResNet(1, 3, include_background=False, channels=(8, 16), strides=(2,), blocks=(1, 1, 1))
            >>> segmentation, residual = network.eval().with_residual(torch.randn(1, 1, 8, 10, 6))
            >>> segmentation.shape[1], residual.shape[1]
            (3, 2)
        """
        segmentation, residuals = self.heads(image)
        if not residuals:
            raise ValueError(
                'expected a network that predicts residual masks, got context="none"; build it with "attention" or '
                '"mapping".'
            )
        return segmentation, residuals[0]

    @without_metadata
    def heads(self, image: torch.Tensor) -> ConResOutput:
        """All outputs in either mode: logits of the segmentation, and of the residual masks, fine to coarse."""
        features, residuals = self._decode(image, self.residual_decoder)
        predicted = self.residual_decoder.predict(residuals) if self.residual_decoder is not None else ()
        return ConResOutput(self.head(features), predicted)

    def _decode(
        self, image: torch.Tensor, residual_decoder: ConResDecoder | None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The last features of the segmentation decoder, and the context residual features, coarse to fine."""
        self._check_image(image)
        if self.training:
            self._check_checkpoint()  # the attribute may have changed
        features = image
        skips = []
        for level in self.encoder:
            features = self._run(level, features)
            skips.append(features)
        skips.pop()
        features = self._run(self.bottleneck, features)
        residuals: list[torch.Tensor] = []
        # called directly if possible: the arguments of _run keep the skip in memory
        merge = partial(self._run, self._merge) if self.use_checkpoint and self.training else self._merge
        for stage, unit in enumerate(self.decoder):
            features = merge(unit, features, skips.pop())
            if residual_decoder is not None:
                previous = residuals[-1] if residuals else image
                features, residual = residual_decoder.step(stage, features, previous, run=self._run)
                residuals.append(residual)
        return features, residuals

    def _run(self, part: Callable[..., Any], *arguments: Any) -> Any:
        """``part(*arguments)``; with ``use_checkpoint`` the backward pass computes it again."""
        if self.use_checkpoint and self.training:
            return checkpoint(part, *arguments, use_reentrant=False)
        return part(*arguments)

    def _merge(self, unit: nn.Module, features: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """Features of one scale of the segmentation decoder."""
        features = add_into(resize_features(features, skip.shape[2:], align_corners=self.align_corners), skip)
        del skip
        return unit(features)

    def _check_checkpoint(self) -> None:
        if self.use_checkpoint and any(name.endswith("running_mean") for name, _ in self.named_buffers()):
            raise ValueError(
                f"expected a norm without running statistics together with use_checkpoint=True, got "
                f"{self.arguments['norm']!r}, which would count each batch twice; use group norm."
            )

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
