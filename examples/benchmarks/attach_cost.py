"""What a context residual decoder adds to other networks: parameters, multiply-adds and seconds.

    python examples/benchmarks/attach_cost.py --out examples/benchmarks/results            # counts and times
    python examples/benchmarks/attach_cost.py --out examples/benchmarks/results --no-times # only counts, in a minute

The networks have their usual configuration. Parameters and multiply-adds belong to one image of 128 x 128 x 128 in
training; multiply-adds are those of convolutions and matrix products. Seconds belong to one image of 64 x 64 x 64: a
forward pass in eval, and a training step, as medians of alternating runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
from common import has_nnunet, multiply_adds, nnunet, write_table
from monai.losses import DiceCELoss
from monai.networks import nets

from monai_conres import ConResLoss, attach_conres

CHANNELS, CLASSES = 4, 4
COUNT_SIZE, TIME_SIZE = (128, 128, 128), (64, 64, 64)
FILTERS = [32, 64, 128, 256, 320, 320]

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "UNet (16-256)": lambda: nets.UNet(
        3, CHANNELS, CLASSES, channels=(16, 32, 64, 128, 256), strides=(2, 2, 2, 2), num_res_units=2
    ),
    "BasicUNet (32-256)": lambda: nets.BasicUNet(3, CHANNELS, CLASSES),
    "BasicUNetPlusPlus (32-256)": lambda: nets.BasicUNetPlusPlus(3, CHANNELS, CLASSES),
    "DynUNet (nnU-Net, 32-320)": lambda: nets.DynUNet(
        3, CHANNELS, CLASSES, kernel_size=[3] * 6, strides=[1, *[2] * 5], upsample_kernel_size=[2] * 5, filters=FILTERS
    ),
    "SegResNet (16)": lambda: nets.SegResNet(3, 16, CHANNELS, CLASSES, blocks_down=(1, 2, 2, 4), blocks_up=(1, 1, 1)),
    "SegResNet (32)": lambda: nets.SegResNet(3, 32, CHANNELS, CLASSES, blocks_down=(1, 2, 2, 4), blocks_up=(1, 1, 1)),
    "SegResNetDS (32)": lambda: nets.SegResNetDS(3, 32, CHANNELS, CLASSES, blocks_down=(1, 2, 2, 4, 4)),
    "AttentionUnet (32-512)": lambda: nets.AttentionUnet(
        3, CHANNELS, CLASSES, channels=(32, 64, 128, 256, 512), strides=(2, 2, 2, 2)
    ),
    "VNet": lambda: nets.VNet(3, CHANNELS, CLASSES),
    "UNETR (16)": lambda: nets.UNETR(CHANNELS, CLASSES, COUNT_SIZE),
    "SwinUNETR (48)": lambda: nets.SwinUNETR(CHANNELS, CLASSES, feature_size=48),
    "FlexibleUNet (resnet34)": lambda: nets.FlexibleUNet(CHANNELS, CLASSES, "resnet34", spatial_dims=3),
    "MedNeXt (32)": lambda: nets.MedNeXt(3, 32, CHANNELS, CLASSES),
}
if has_nnunet:  # the configuration 3d_fullres for patches of 128 x 128 x 128
    SIZE = (CHANNELS, CLASSES, FILTERS, [2] * 5)
    NETWORKS["nnU-Net PlainConvUNet"] = lambda: nnunet(
        "PlainConvUNet", *SIZE, n_conv_per_stage=2, n_conv_per_stage_decoder=2
    )
    NETWORKS["nnU-Net ResidualEncoderUNet (M)"] = lambda: nnunet(
        "ResidualEncoderUNet", *SIZE, n_blocks_per_stage=[1, 3, 4, 6, 6, 6], n_conv_per_stage_decoder=1
    )


def attach(network: nn.Module, width: int | None) -> nn.Module:
    return attach_conres(network, CHANNELS, include_background=False, width=width)


def count(network: nn.Module) -> tuple[int, int]:
    """Parameters, and multiply-adds for one image in training, where all heads are computed."""
    counted = multiply_adds(network.train(), (1, CHANNELS, *COUNT_SIZE))
    return sum(p.numel() for p in network.parameters()), counted


def forward(network: nn.Module, image: torch.Tensor, label: torch.Tensor) -> None:
    with torch.no_grad():
        network.eval()(image)


def segmentation_of(output: torch.Tensor | list | tuple) -> torch.Tensor:
    """The segmentation of a network's output. BasicUNetPlusPlus always returns a list."""
    return output if isinstance(output, torch.Tensor) else output[0]


def step(network: nn.Module, image: torch.Tensor, label: torch.Tensor) -> None:
    loss = ConResLoss(DiceCELoss(softmax=True, to_onehot_y=True))
    output = network.train()(image)
    if hasattr(output, "residuals"):
        output = output._replace(segmentation=segmentation_of(output.segmentation))
    else:
        output = segmentation_of(output)
    network.zero_grad()
    loss(output, label).backward()


def seconds(networks: list[nn.Module], run: Callable, repeats: int, device: str) -> list[float]:
    """Median seconds of each network. Each repeat runs one network after another."""
    image = torch.randn(1, CHANNELS, *TIME_SIZE, device=device)
    label = torch.randint(0, CLASSES, (1, 1, *TIME_SIZE), device=device)
    times: list[list[float]] = [[] for _ in networks]
    for repeat in range(repeats + 1):
        for network, own in zip(networks, times, strict=True):
            start = time.perf_counter()
            run(network, image, label)
            if device != "cpu":
                torch.cuda.synchronize(device)
            if repeat:  # the first repeat warms up
                own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in times]


def measure(name: str, options: argparse.Namespace) -> dict[str, str]:
    """One row of the table."""
    build = NETWORKS[name]
    plain, attached = count(build()), count(attach(build(), options.width))
    row = {
        "network": name,
        "parameters (M)": f"{plain[0] / 1e6:.2f}",
        "parameters, added": f"{100 * (attached[0] / plain[0] - 1):+.1f} %",
        "multiply-adds (1e9)": f"{plain[1] / 1e9:.0f}",
        "multiply-adds, added": f"{100 * (attached[1] / plain[1] - 1):+.1f} %",
    }
    # UNETR only takes images of one size; the seconds of MedNeXt double from one run to another
    if options.times and not name.startswith(("UNETR", "MedNeXt")):
        networks = [network.to(options.device) for network in (build(), attach(build(), options.width))]
        for title, run in (("forward", forward), ("training step", step)):
            without, with_it = seconds(networks, run, options.repeats, options.device)
            row[f"{title} (s)"] = f"{without:.2f}"
            row[f"{title}, added"] = f"{100 * (with_it / without - 1):+.0f} %"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for attach_cost.csv and attach_cost.md")
    parser.add_argument(
        "--width", type=int, default=32, help="channels of the residual path (default: 32; 0: those of the network)"
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NAME")
    parser.add_argument("--no-times", dest="times", action="store_false")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    options.width = options.width or None
    rows = []
    for name in options.networks:
        rows.append(measure(name, options))
        print("  ".join(rows[-1].values()), flush=True)
        write_table(options.out, "attach_cost", rows)


if __name__ == "__main__":
    main()
