"""Small networks that a decoder is attached to, with the stages and channels that are in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.networks import nets


class Family(NamedTuple):
    build: Callable[[], nn.Module]
    stages: tuple[str, ...]
    channels: tuple[int, ...]
    size: tuple[int, ...] = (32, 32, 32)  # of an image that it takes


def nnunet(name: str) -> nn.Module:
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    return getattr(unet, name)(
        input_channels=1,
        n_stages=4,
        features_per_stage=[8, 16, 32, 64],
        conv_op=nn.Conv3d,
        kernel_sizes=3,
        strides=[1, 2, 2, (2, 2, 1)],
        num_classes=3,
        n_conv_per_stage_decoder=1,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
        **{"n_conv_per_stage" if name == "PlainConvUNet" else "n_blocks_per_stage": 2},
    )


def dynunet(filters: tuple[int, ...] = (8, 16, 32, 64), **kwargs) -> nn.Module:
    strides = [1, 2, 2, (2, 2, 1)][: len(filters)]
    return nets.DynUNet(3, 1, 3, [3] * len(filters), strides, strides[1:], filters=filters, **kwargs)


def mednext() -> nn.Module:
    ratios = {f"{part}_expansion_ratio": 2 for part in ("encoder", "decoder", "bottleneck")}
    blocks = {"blocks_down": (1, 1, 1, 1), "blocks_bottleneck": 1, "blocks_up": (1, 1, 1, 1)}
    return nets.MedNeXt(3, 8, 1, 3, kernel_size=3, deep_supervision=True, **ratios, **blocks)


UPSAMPLES = tuple(f"upsamples.{i}" for i in range(3))
UP_LAYERS = tuple(f"up_layers.{i}" for i in range(3))
UPCATS = ("upcat_4", "upcat_3", "upcat_2", "upcat_1")
NESTED = ("upcat_3_1", "upcat_2_2", "upcat_1_3", "upcat_0_4")
DECODERS = ("decoder5", "decoder4", "decoder3", "decoder2")
NNUNET = tuple(f"decoder.stages.{i}" for i in range(3))
UNET = ("model.1.submodule.1.submodule.2", "model.1.submodule.2")  # without model.2, the logits
MERGES = ("model.1.submodule.1.submodule.1.merge", "model.1.submodule.1.merge", "model.1.merge")
BLOCKS = tuple(f"decoder.blocks.{i}" for i in range(5))
FEATURES = (8, 8, 16, 32, 64, 8)
ODD = (28, 36, 20)  # all different

FAMILIES = {
    "UNet": Family(
        lambda: nets.UNet(3, 1, 3, (8, 16, 32, 64), (2, 2, 2), num_res_units=2), UNET, (16, 8), (16, 24, 32)
    ),
    "BasicUNet": Family(lambda: nets.BasicUNet(3, 1, 3, FEATURES), UPCATS, (32, 16, 8, 8), (35, 18, 17)),
    "BasicUNetPlusPlus": Family(
        lambda: nets.BasicUNetPlusPlus(3, 1, 3, FEATURES, deep_supervision=True),
        NESTED,
        (32, 16, 8, 8),
        (32, 16, 16),
    ),
    "DynUNet": Family(dynunet, UPSAMPLES, (32, 16, 8), (16, 24, 20)),
    "DynUNet, deep supervision": Family(
        lambda: dynunet(deep_supervision=True, deep_supr_num=2), UPSAMPLES, (32, 16, 8), (16, 24, 20)
    ),
    "SegResNet": Family(lambda: nets.SegResNet(3, 8, 1, 3), UP_LAYERS, (32, 16, 8), (16, 24, 32)),
    "SegResNetVAE": Family(
        lambda: nets.SegResNetVAE((16, 16, 32), init_filters=8, out_channels=3, in_channels=1),
        UP_LAYERS,
        (32, 16, 8),
        (16, 16, 32),
    ),
    "SegResNetDS": Family(
        lambda: nets.SegResNetDS(3, 8, 1, 3, dsdepth=2),
        tuple(f"{name}.blocks" for name in UP_LAYERS),
        (32, 16, 8),
        (16, 24, 32),
    ),
    "AttentionUnet": Family(
        lambda: nets.AttentionUnet(3, 1, 3, (8, 16, 32, 64), (2, 2, 2)), MERGES, (32, 16, 8), (16, 24, 32)
    ),
    "VNet": Family(
        lambda: nets.VNet(3, 1, 3), ("up_tr256", "up_tr128", "up_tr64", "up_tr32"), (256, 128, 64, 32), (32, 16, 16)
    ),
    "UNETR": Family(
        lambda: nets.UNETR(1, 3, (32, 32, 32), feature_size=8, hidden_size=48, mlp_dim=64, num_heads=4),
        DECODERS,
        (64, 32, 16, 8),
    ),
    "SwinUNETR": Family(
        lambda: nets.SwinUNETR(1, 3, feature_size=12), (*DECODERS, "decoder1"), (96, 48, 24, 12, 12), (64, 32, 32)
    ),
    "FlexibleUNet": Family(
        lambda: nets.FlexibleUNet(1, 3, "resnet10", spatial_dims=3, decoder_channels=(64, 32, 16, 8, 8)),
        BLOCKS,
        (64, 32, 16, 8, 8),
        (64, 32, 32),
    ),
    "MedNeXt": Family(mednext, tuple(f"dec_stages.{i}" for i in range(4)), (64, 32, 16, 8)),
    "PlainConvUNet": Family(lambda: nnunet("PlainConvUNet"), NNUNET, (32, 16, 8), (16, 24, 20)),
    "ResidualEncoderUNet": Family(lambda: nnunet("ResidualEncoderUNet"), NNUNET, (32, 16, 8), (16, 24, 20)),
}


# Networks in other styles, found only by their graphs


def conv(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(in_channels, out_channels, 3, stride, 1), nn.InstanceNorm3d(out_channels), nn.LeakyReLU()
    )


class FunctionalUNet(nn.Module):
    """Up-sampling by ``F.interpolate`` in ``forward``, nested ``Sequential``, a dictionary as output."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleDict({"a": conv(1, 8), "b": conv(8, 16, 2), "c": conv(16, 32, 2)})
        self.up = nn.Sequential(nn.Sequential(conv(48, 16), conv(16, 16)), nn.Sequential(conv(24, 8), conv(8, 8)))
        self.logits = nn.Conv3d(8, 3, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        a = self.down["a"](x)
        b = self.down["b"](a)
        y = self.down["c"](b)
        for block, skip in zip(self.up, (b, a), strict=True):
            y = block(torch.cat([F.interpolate(y, skip.shape[2:], mode="trilinear"), skip], 1))
        return {"logits": self.logits(y)}


class SharedUNet(nn.Module):
    """One block with the same weights at every scale of the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([conv(1, 8), conv(8, 8, 2), conv(8, 8, 2), conv(8, 8, 2)])
        self.block = conv(16, 8)
        self.logits = nn.Conv3d(8, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = [x]
        for level in self.encoder:
            skips.append(level(skips[-1]))
        y = skips.pop()
        for skip in skips[:0:-1]:
            y = self.block(torch.cat([F.interpolate(y, skip.shape[2:]), skip], 1))
        return self.logits(y)


class Squeeze(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers = nn.Conv3d(channels, 4, 1), nn.ReLU(), nn.Conv3d(4, channels, 1), nn.Sigmoid()
        self.scale = nn.Sequential(nn.AdaptiveAvgPool3d(1), *layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale(x)


class SqueezeUNet(nn.Module):
    """Squeeze and excitation in the decoder, transposed convolutions, additive skips, a final activation."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1, self.enc2, self.enc3 = conv(1, 8), conv(8, 16, 2), conv(16, 32, 2)
        self.up2, self.up1 = nn.ConvTranspose3d(32, 16, 2, 2), nn.ConvTranspose3d(16, 8, 2, 2)
        self.dec2, self.dec1 = nn.Sequential(conv(16, 16), Squeeze(16)), nn.Sequential(conv(8, 8), Squeeze(8))
        self.final = nn.Sequential(nn.Conv3d(8, 3, 1), nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.enc1(x)
        b = self.enc2(a)
        y = self.dec2(self.up2(self.enc3(b)) + b)
        return self.final(self.dec1(self.up1(y) + a))


FOREIGN = {
    "functional up-sampling, dictionary": Family(FunctionalUNet, ("up.0", "up.1"), (16, 8), ODD),
    "shared weights": Family(SharedUNet, ("block", "block#1", "block#2"), (8, 8, 8), ODD),
    "squeeze and excitation": Family(SqueezeUNet, ("dec2", "dec1"), (16, 8), ODD),
}
NETWORKS = FAMILIES | FOREIGN
