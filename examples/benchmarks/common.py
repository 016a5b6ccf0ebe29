"""What several benchmarks need: nnU-Net's networks, the count of multiply-adds, and tables."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn as nn
from monai.utils import optional_import
from torch.utils.flop_counter import FlopCounterMode

from monai_conres.files import atomic_path, write_csv

unet, has_nnunet = optional_import("dynamic_network_architectures.architectures.unet")


def nnunet(
    name: str, in_channels: int, classes: int, features: Sequence[int], strides: Sequence, **blocks: int | list[int]
) -> nn.Module:
    """A network of nnU-Net: ``PlainConvUNet`` or ``ResidualEncoderUNet``.

    ``features`` are the channels of each resolution, and ``strides`` the steps between the resolutions.
    """
    return getattr(unet, name)(
        in_channels,
        n_stages=len(features),
        features_per_stage=list(features),
        conv_op=nn.Conv3d,
        kernel_sizes=3,
        strides=[1, *strides],
        num_classes=classes,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=False,
        **blocks,
    )


def multiply_adds(network: nn.Module, shape: Sequence[int]) -> int:
    """Multiply-adds of convolutions and matrix products for one image of ``shape``, counted without computing it."""
    network = copy.deepcopy(network).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(shape, device="meta"))
    return counter.get_total_flops() // 2


def write_table(folder: Path, name: str, rows: Sequence[dict[str, str]], remark: str = "") -> str:
    """Write ``NAME.csv`` and the same table in Markdown, ``NAME.md``, with a remark below; return the Markdown."""
    fields = list(max(rows, key=len))
    lines = [fields, ["---"] + ["---:"] * (len(fields) - 1)]
    lines += [[row.get(field, "-") for field in fields] for row in rows]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines) + remark
    write_csv(folder / f"{name}.csv", rows)
    with atomic_path(folder / f"{name}.md") as temporary:
        temporary.write_text(text)
    return text
