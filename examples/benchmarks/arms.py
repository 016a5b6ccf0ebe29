"""The networks and losses that completion.py compares: ConResNet, its controls and its variants.

A variant of ConResNet was written together with what would show that it is not worth having:

- ``weight_0``, ``weight_01``, ``weight_03``: the residual loss has the weight 0, 0.1 or 0.3 instead of 1. If another
  weight is better, the weight of Eq. 9 is wrong.
- ``shared_gradient``: that weight changes with the training, so that the gradient of the residual loss at the encoder
  is 0.3 of that of the segmentation loss. It must be better than each constant weight.
- ``logit_gate``: the gate comes from the supervised logits: ``F * (1 + gamma * W * sigmoid(logit - offset))``, with
  ``gamma`` learned from zero. If gates were good for where they open, it would be better than Eq. 6.
- ``image_difference``: the finest scale also gets the change of the image from slice to slice. If the path missed the
  image's detail, it would be better than ConResNet.
- ``in_plane``: encoder and decoder do not look across slices, so the residual path is the only way. Its control
  ``in_plane_convolution`` has one 1x1x3 convolution for each scale instead of the residual path. If residuals were a
  good way across, it would be better than the control, and near ConResNet.
- ``cascade``: a second ConResNet also gets the segmentation and the residual masks of a first one, as probabilities.
  Its control ``cascade_segmentation`` gets only the segmentation. If residuals added something, it would be better.
- ``dynunet_conres`` is MONAI's DynUNet with the decoder attached, ``dynunet`` without.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from ablation import dynunet
from monai.utils import ensure_tuple_rep

from monai_conres import ChainLoss, ChainSettings, ConResDecoder, ConResLoss, ConResNet, ConResOutput, attach_conres
from monai_conres import inter_slice_residual as difference
from monai_conres.layers import WeightStandardizedConv3d
from monai_conres.operations import resize_features


@dataclass(frozen=True)
class Arm:
    """One way to build and to train a network."""

    methods: tuple[str, ...]  # what completes a case, see CHAINS of completion.py
    context: str = "attention"
    variant: str = ""  # of the network
    second_half: str = ""  # what is added to the loss there: "chain" or "segmentation"
    residual_weight: float = 1.0
    gradient_share: float | None = None  # instead of a constant weight
    cascade: tuple[str, ...] = ()  # what a first network predicted, as further channels of the image


CHAIN = ChainSettings(tau=0.5)  # of networks that are trained through the chain

# other: neither a network's residual nor the slice chain
OTHER = ("interpolation", "contours", "random_walker")
FULL = ("network", "image", "both")  # measured in every way
ARMS = {
    "baseline": Arm(("network", "constant", "image", "derived", *OTHER), "none"),
    "conres": Arm(("network", "constant", "image", "residual", "both")),
    # the second half of the training adds the segmentation loss of the chain's marginals
    "conres_chain": Arm(FULL, second_half="chain"),
    # its control: the second half adds the segmentation loss once more
    "conres_double": Arm(FULL, second_half="segmentation"),
    "plain_head": Arm(("network", "image", "residual", "both"), "none", "plain_head"),
    "plain_head_chain": Arm(FULL, "none", "plain_head", second_half="chain"),
    "dynunet": Arm(("network", "image"), "none", "dynunet"),
    "dynunet_conres": Arm(FULL, variant="dynunet"),
    "weight_0": Arm(FULL, residual_weight=0.0),
    "weight_01": Arm(FULL, residual_weight=0.1),
    "weight_03": Arm(FULL, residual_weight=0.3),
    "shared_gradient": Arm(FULL, gradient_share=0.3),
    "logit_gate": Arm(FULL, variant="logit_gate"),
    "image_difference": Arm(FULL, variant="image_difference"),
    "in_plane": Arm(FULL, variant="in_plane"),
    "in_plane_convolution": Arm(("network", "image"), "none", "in_plane"),
    "cascade": Arm(("network",), cascade=("segmentation", "residual")),
    "cascade_segmentation": Arm(("network",), cascade=("segmentation",)),
}


def first_half(arm: Arm) -> str:
    """The arm whose first half of the training is that of ``arm``."""
    plain = replace(arm, methods=(), second_half="")
    return next(name for name, other in ARMS.items() if replace(other, methods=()) == plain)


def build(arm: Arm, in_channels: int, classes: int, size: dict[str, Any], strides: tuple) -> nn.Module:
    """The network of an arm. ``in_channels`` counts those of the image, ``classes`` the background, too."""
    in_channels += len(arm.cascade) * (classes - 1)
    if arm.variant == "dynunet":
        network = dynunet(in_channels, classes, list(size["channels"]), strides)
        return network if arm.context == "none" else attach_conres(network, in_channels, include_background=False)
    options = {"channels": size["channels"], "blocks": size["blocks"], "context": arm.context}
    if arm.variant == "in_plane":
        strides = tuple((*ensure_tuple_rep(stride, 3)[:2], 1) for stride in strides)
    network = ConResNet(in_channels, classes, include_background=False, strides=strides, **options)
    if arm.variant == "plain_head":
        return PlainHead(network)
    if arm.variant == "in_plane":
        restrict_to_planes(network)
    elif arm.variant:
        decoders = {"logit_gate": LogitGate, "image_difference": ImageDifference}
        network.residual_decoder = decoders[arm.variant](**network.residual_decoder.arguments)
    return network


def has_residuals(network: nn.Module) -> bool:
    """Whether a network of an arm predicts residual masks."""
    return hasattr(network, "with_residual") and getattr(network, "context", "") != "none"


class PlainHead(nn.Module):
    """A control without residual decoder: the baseline, and a 1x1x1 convolution on its last features."""

    def __init__(self, network: ConResNet) -> None:
        super().__init__()
        self.network = network
        self.residual_head = nn.Conv3d(network.head.in_channels, network.head.out_channels - 1, kernel_size=1)
        self.residual: torch.Tensor | None = None
        network.head.register_forward_pre_hook(self._predict)

    def _predict(self, module: nn.Module, features: tuple[torch.Tensor]) -> None:
        self.residual = self.residual_head(features[0])

    def forward(self, image: torch.Tensor) -> ConResOutput | torch.Tensor:
        output = self.with_residual(image)
        return ConResOutput(output[0], output[1:]) if self.training else output[0]

    def with_residual(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        segmentation = self.network.heads(image).segmentation
        residual, self.residual = self.residual, None
        assert residual is not None
        return segmentation, residual


class LogitGate(ConResDecoder):
    """Gates from the logits of the residual masks."""

    def __init__(self, *arguments: Any, channels: Any, out_channels: int, **options: Any) -> None:
        options["context"] = "mapping"  # the modules do not gate
        super().__init__(*arguments, channels=channels, out_channels=out_channels, **options)
        # w_1 of Eq. 8 is the odds that the loss puts on a change; a change in 2 % of the voxels
        self.offsets = nn.ParameterList(torch.full((out_channels, 1, 1, 1), 4.0) for _ in channels)
        self.mix = nn.ModuleList(nn.Conv3d(out_channels, width, kernel_size=1, bias=False) for width in channels)
        self.strengths = nn.ParameterList(torch.zeros(()) for _ in channels)

    def step(self, stage: int, *arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        features, residual = super().step(stage, *arguments, **options)
        probability = (self.heads[stage](residual) - self.offsets[stage]).sigmoid()
        return features * (1 + self.strengths[stage] * self.mix[stage](probability)), residual


class ImageDifference(ConResDecoder):
    """The finest scale also gets the inter-slice residual of the image."""

    def __init__(self, *arguments: Any, in_channels: int, channels: Any, **options: Any) -> None:
        super().__init__(*arguments, in_channels=in_channels, channels=channels, **options)
        self.entry = nn.Conv3d(in_channels, channels[-2], kernel_size=3, padding=1)
        self.image: torch.Tensor | None = None

    def step(
        self, stage: int, features: torch.Tensor, previous: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if stage == 0:
            self.image = previous
        if stage == len(self.stages) - 1:
            assert self.image is not None
            change, self.image = self.entry(difference(self.image, spatial_axis=self.spatial_axis)), None
            previous = resize_features(previous, features.shape[2:]) + change
        return super().step(stage, features, previous, **options)


class InPlaneConvolution(WeightStandardizedConv3d):
    """A convolution of one slice, with a kernel of ``k x k x 1``."""

    def __init__(self, other: WeightStandardizedConv3d) -> None:
        size, dilation = other.kernel_size[0], other.dilation[0]
        super().__init__(
            other.in_channels, other.out_channels, kernel_size=size, stride=other.stride, dilation=dilation
        )
        self.weight = nn.Parameter(self.weight.data[..., size // 2, None].clone())
        self.gain = (other.in_channels * size**2) ** -0.5
        self.padding = (dilation * (size // 2),) * 2 + (0,)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.conv3d(input, self.filters(), None, self.stride, self.padding, self.dilation)


def restrict_to_planes(network: ConResNet) -> None:
    """Encoder and decoder convolve within slices; a baseline gets one 1x1x3 convolution for each scale."""
    for part in (network.encoder, network.bottleneck, network.decoder):
        for parent in list(part.modules()):
            for name, child in parent.named_children():
                if isinstance(child, WeightStandardizedConv3d):
                    setattr(parent, name, InPlaneConvolution(child))
    if network.context == "none":
        for number, unit in enumerate(network.decoder):
            width = unit.conv.out_channels
            across = nn.Conv3d(width, width, kernel_size=(1, 1, 3), padding=(0, 0, 1))
            network.decoder[number] = nn.Sequential(unit, across)


class Losses:
    """The loss of an arm for its network, and what its second half adds."""

    def __init__(self, arm: Arm, network: nn.Module) -> None:
        self.joint = ConResLoss(softmax=True, residual_weight=arm.residual_weight)
        self.chain = ChainLoss(self.joint.segmentation_loss, settings=CHAIN)
        self.arm, self.network = arm, network
        self.calls = 0

    def __call__(self, output: ConResOutput | torch.Tensor, label: torch.Tensor, is_second: bool) -> torch.Tensor:
        if isinstance(output, torch.Tensor):
            return self.joint.segmentation_loss(output, label)
        if self.arm.gradient_share is not None and self.calls % 10 == 0:
            self.joint.residual_weight = self.shared_weight(output, label, self.arm.gradient_share)
        self.calls += 1
        loss = self.joint(output, label)
        if is_second and self.arm.second_half == "chain":
            loss = loss + self.chain(output, label)
        elif is_second and self.arm.second_half == "segmentation":
            loss = loss + self.joint.segmentation_loss(output.segmentation, label)
        return loss

    def shared_weight(self, output: ConResOutput, label: torch.Tensor, share: float) -> float:
        """The weight with which the gradient of the residual loss at the encoder is ``share`` of the other."""
        parts = (
            self.joint.segmentation_loss(output.segmentation, label),
            self.joint.residual_loss(output.residuals, label),
        )
        weights = list(self.network.encoder.parameters())
        own, other = (
            torch.stack([g.norm() for g in torch.autograd.grad(part, weights, retain_graph=True)]).norm()
            for part in parts
        )
        return float(share * own / other)
