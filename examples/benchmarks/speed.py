"""Seconds and memory of ConResNet, its released structure, and networks of MONAI.

    python examples/benchmarks/speed.py --out docs/tables                                # time
    python examples/benchmarks/speed.py --out docs/tables --memory --size 80 160 160     # peak memory, forward and step
    python examples/benchmarks/speed.py --out docs/tables --volume 155 240 240 --size 80 160 160  # one case, in windows
    python examples/benchmarks/speed.py --out docs/tables --operations --size 80 160 160  # what a GPU would have to do

Times are medians. The runs of all networks alternate, so that other work on the machine slows all networks alike.

"share of the convolution rate" compares a forward pass with the network's own convolutions, run without the rest, each
in the fastest way. At 100 % a network would spend no time on anything else.

A name can end in ", bf16" or ", fp16" (autocast), in ", compiled" (torch.compile), or in both in this order. So one run
compares them. Peak memory is measured in one process for each network: on a CPU the growth of the resident set, on a
GPU what torch allocated. On a GPU, convolutions and matrix products in float32 use TF32. ``gpu.py`` measures all this
on a GPU with one command.

"--operations" needs no GPU: operations.py says how it counts. A name without ", bf16" is float32.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from unittest import mock

import operations
import torch
import torch.nn as nn
import torch.nn.functional as F
from common import multiply_adds, write_table
from monai.inferers import SlidingWindowInferer
from monai.losses import DiceCELoss
from monai.networks import nets

from monai_conres import ConResLoss, ConResNet, ConResOutput, attach_conres
from monai_conres.layers import NormActConv, PreActivationBlock, WeightStandardizedConv3d

CHANNELS, CLASSES = 4, 3


class ReleasedStructure(nn.Module):
    """The released network, computed with the operations of the released code.

    Each forward pass standardizes every filter in three steps, computes every head in either mode, and up-samples the
    output of every head to full resolution. The weights are those of :meth:`ConResNet.released`.
    """

    def __init__(self, **kwargs: str) -> None:
        super().__init__()
        self.network = ConResNet.released(CHANNELS, CLASSES, **kwargs)

    def convolve(self, layer: WeightStandardizedConv3d, x: torch.Tensor) -> torch.Tensor:
        weight = layer.weight
        mean = weight
        for dim in (1, 2, 3, 4):
            mean = mean.mean(dim, keepdim=True)
        weight = weight - mean
        deviation = torch.sqrt(torch.var(weight.flatten(1), dim=1) + 1e-12).view(-1, 1, 1, 1, 1)
        weight = weight / deviation.expand_as(weight)
        return F.conv3d(x, weight, None, layer.stride, layer.padding, layer.dilation)

    def unit(self, unit: NormActConv, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(F.group_norm(x, unit.norm.num_groups, unit.norm.weight, unit.norm.bias), inplace=True)
        return self.convolve(unit.conv, unit.dropout(x) if hasattr(unit, "dropout") else x)

    def run(self, layers: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            if isinstance(layer, PreActivationBlock):
                x = x + self.unit(layer.unit2, self.unit(layer.unit1, x))
            elif isinstance(layer, NormActConv):
                x = self.unit(layer, x)
            else:
                x = self.convolve(layer, x)
        return x

    def resize(self, x: torch.Tensor, size: torch.Size) -> torch.Tensor:
        return F.interpolate(x, size=size, mode="trilinear", align_corners=True)

    def difference(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros_like(x[:, :, :1]), (x[:, :, 1:] - x[:, :, :-1]).abs()], dim=2)

    def forward(self, image: torch.Tensor) -> ConResOutput:
        network, decoder = self.network, self.network.residual_decoder
        skips, x = [], image
        for level in network.encoder:
            x = self.run(level, x)
            skips.append(x)
        x = self.run(network.bottleneck, skips.pop())
        residuals, previous = [], self.difference(image)
        for stage, unit in enumerate(network.decoder):
            skip = skips.pop()
            x = self.unit(unit, self.resize(x, skip.shape[2:]) + skip)
            if decoder is not None:
                module = decoder.stages[stage]
                previous = self.resize(previous, skip.shape[2:])
                if isinstance(module.entry, NormActConv):
                    previous = self.unit(module.entry, previous)
                elif isinstance(module.entry, WeightStandardizedConv3d):
                    previous = self.convolve(module.entry, previous)
                inner = self.convolve(module.inner, self.difference(torch.sigmoid(x)))
                previous = self.unit(module.outer, inner + previous)
                residuals.append(self.resize(decoder.heads[stage](previous), image.shape[2:]))
                x = x * (1 + torch.sigmoid(previous))
        return ConResOutput(network.head(x), tuple(residuals[::-1]))


class Without(nn.Module):
    """ConResNet with another function in the place of one of ``operations.py``, to see what that one brings."""

    def __init__(self, name: str, function: Callable) -> None:
        super().__init__()
        self.network = ConResNet(CHANNELS, CLASSES)
        self.name, self.function = name, function

    def forward(self, image: torch.Tensor) -> ConResOutput | torch.Tensor:
        with mock.patch(f"monai_conres.operations.{self.name}", self.function):
            return self.network(image)


def channels_last(weight: torch.Tensor) -> torch.Tensor:
    return weight.contiguous(memory_format=torch.channels_last_3d)


NETWORKS: dict[str, Callable[[tuple], nn.Module]] = {
    "released structure": lambda size: ReleasedStructure(),
    "ConResNet": lambda size: ConResNet(CHANNELS, CLASSES),
    "ConResNet, torch's layout": lambda size: Without("fast_layout", lambda weight: weight),
    "ConResNet, torch's convolution": lambda size: Without("torch_convolves_slowly", lambda x: False),
    "ConResNet, torch's group norm": lambda size: Without("on_accelerator", lambda x: False),
    "ConResNet, channels last": lambda size: Without("fast_layout", channels_last),
    "ConResNet, without Triton": lambda size: Without("triton_kernels", lambda *tensors: None),
    "ConResNet, use_checkpoint": lambda size: ConResNet(CHANNELS, CLASSES, use_checkpoint=True),
    "released structure, baseline": lambda size: ReleasedStructure(context="none"),
    "ConResNet, baseline": lambda size: ConResNet(CHANNELS, CLASSES, context="none"),
    "SegResNet (32)": lambda size: nets.SegResNet(
        3, 32, CHANNELS, CLASSES, blocks_down=(1, 2, 2, 4), blocks_up=(1, 1, 1), dropout_prob=0.1
    ),
    "SegResNetVAE (32)": lambda size: nets.SegResNetVAE(
        size,
        init_filters=32,
        in_channels=CHANNELS,
        out_channels=CLASSES,
        blocks_down=(1, 2, 2, 4),
        blocks_up=(1, 1, 1),
        dropout_prob=0.1,
    ),
    "DynUNet (nnU-Net, 32-320)": lambda size: nets.DynUNet(
        3,
        CHANNELS,
        CLASSES,
        kernel_size=[3] * 5,
        strides=[1, 2, 2, 2, (1, 2, 2)],
        upsample_kernel_size=[2, 2, 2, (1, 2, 2)],
        filters=[32, 64, 128, 256, 320],
    ),
    "AttentionUnet (32-512)": lambda size: nets.AttentionUnet(
        3, CHANNELS, CLASSES, channels=(32, 64, 128, 256, 512), strides=(2, 2, 2, 2)
    ),
    "SwinUNETR (48)": lambda size: nets.SwinUNETR(CHANNELS, CLASSES, feature_size=48),
}
for name in ("SegResNet (32)", "DynUNet (nnU-Net, 32-320)"):
    NETWORKS[f"{name} with decoder"] = lambda size, build=NETWORKS[name]: attach_conres(build(size), CHANNELS)
# what only shows what one trick brings
TRICKS = ("torch's", "channels last", "without Triton")
# endings of a network's name
AUTOCAST = {", bf16": torch.bfloat16, ", fp16": torch.float16}
COMPILED = ", compiled"
# these networks only take sizes that this number divides
MULTIPLES = {"SegResNetVAE (32)": 16, "AttentionUnet (32-512)": 16, "SwinUNETR (48)": 32}


class Case:
    """A network, an image and a label on a device."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.device = options.device
        self.compiled = name.endswith(COMPILED)
        name = name.removesuffix(COMPILED)
        ending = next((ending for ending in AUTOCAST if name.endswith(ending)), "")
        self.dtype = AUTOCAST.get(ending)
        self.name = name = name.removesuffix(ending)
        multiple = MULTIPLES.get(name, 1)
        self.size = tuple(-(-edge // multiple) * multiple for edge in options.size)
        self.network = NETWORKS[name](self.size).to(self.device)
        if self.compiled:
            self.network = torch.compile(self.network)
        self.image = torch.randn(options.batch_size, CHANNELS, *self.size, device=self.device)
        self.label = (torch.rand(options.batch_size, CLASSES, *self.size, device=self.device) > 0.5).float()
        if options.volume:
            self.scan = torch.randn(1, CHANNELS, *options.volume, device=self.device)
            self.inferer = SlidingWindowInferer(self.size, options.batch_size, overlap=1 / 3, mode="gaussian")
        self.loss = ConResLoss(DiceCELoss(sigmoid=True), spatial_axis=0)

    def mode(self, training: bool) -> None:
        """Change the mode only where it differs: a network may keep what it computes once in ``eval()``."""
        if self.network.training != training:
            self.network.train(training)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.split(":")[0], self.dtype, enabled=self.dtype is not None)

    def forward(self) -> None:
        self.mode(training=False)
        with torch.no_grad(), self.autocast():
            self.network(self.image)

    def step(self) -> None:
        self.mode(training=True)
        self.network.zero_grad()
        with self.autocast():
            output = self.network(self.image)
            if isinstance(output, ConResOutput | torch.Tensor):
                loss = self.loss(output, self.label)
            else:  # SegResNetVAE adds its own loss
                loss = self.loss(output[0], self.label) + 0.1 * output[1]
        loss.backward()

    def volume(self) -> None:
        """Segment one case in windows."""
        self.mode(training=False)
        with torch.no_grad(), self.autocast():
            self.inferer(self.scan, self.segment)

    def segment(self, windows: torch.Tensor) -> torch.Tensor:
        """The segmentation, which is the first output of every network."""
        output = self.network(windows)
        return output if isinstance(output, torch.Tensor) else output[0]

    def seconds(self, run: str) -> float:
        start = time.perf_counter()
        getattr(self, run)()
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def convolutions(self) -> float:
        """Seconds of the convolutions of a forward pass without the rest, each in the fastest way."""
        calls: dict[tuple, int] = {}

        def note(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            key = (type(module), tuple(args[0].shape), module.out_channels, module.kernel_size, module.stride)
            key += (module.padding, module.dilation, module.groups)
            calls[key] = calls.get(key, 0) + 1

        layers = [m for m in self.network.modules() if isinstance(m, (nn.Conv3d, nn.ConvTranspose3d))]
        hooks = [module.register_forward_hook(note) for module in layers]
        with torch.no_grad():
            self.network.eval()(self.image)
        for hook in hooks:
            hook.remove()
        total = 0.0
        for (kind, shape, out_channels, kernel, stride, padding, dilation, groups), number in calls.items():
            plain = nn.ConvTranspose3d if issubclass(kind, nn.ConvTranspose3d) else nn.Conv3d
            options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "bias": False}
            layer = plain(shape[1], out_channels, kernel, **options).to(self.device)
            best = float("inf")
            for memory_format in (torch.contiguous_format, torch.channels_last_3d):
                layer = layer.to(memory_format=memory_format)
                x = torch.randn(shape, device=self.device, dtype=self.dtype).contiguous(memory_format=memory_format)
                ways: list[Callable[[], torch.Tensor]] = [partial(layer, x)]
                if self.device == "cpu" and self.dtype is None and plain is nn.Conv3d:
                    # torch itself does not give every shape to oneDNN
                    settings = (layer.padding, layer.stride, layer.dilation, groups)
                    ways.append(partial(torch.mkldnn_convolution, x, layer.weight, None, *settings))
                for way in ways:
                    times = []
                    for _ in range(4):
                        with torch.no_grad(), self.autocast():
                            start = time.perf_counter()
                            way()
                            if self.device != "cpu":
                                torch.cuda.synchronize(self.device)
                        times.append(time.perf_counter() - start)
                    best = min(best, statistics.median(times[1:]))
            total += number * best
        return total


def interleaved(cases: dict[str, Case], runs: Sequence[str], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each network and run. Each repeat runs one network after another."""
    seconds = {name: {run: [] for run in runs} for name in cases}
    for run in runs:
        for repeat in range(repeats + 1):
            for name, case in cases.items():
                value = case.seconds(run)
                if repeat:  # the first repeat warms up
                    seconds[name][run].append(value)
    return seconds


def faster(first: list[float], seconds: list[float]) -> str:
    """How many times as fast as the first network: the median of the ratios of neighboring runs."""
    return f"{statistics.median(a / b for a, b in zip(first, seconds, strict=True)):.2f}"


def digits(seconds: float) -> str:
    """``seconds`` with three digits."""
    return f"{seconds:#.3g}" if seconds < 100 else f"{seconds:.0f}"


def times(options: argparse.Namespace) -> list[dict[str, str]]:
    """Rows of the table of times."""
    cases = {name: Case(name, options) for name in options.networks}
    first = options.networks[0]
    seconds = interleaved(cases, ("forward", "step"), options.repeats)
    rows = []
    for name, case in cases.items():
        counted = multiply_adds(NETWORKS[case.name](case.size).eval(), case.image.shape)
        forward, step = (statistics.median(seconds[name][run]) for run in ("forward", "step"))
        ratios = {"forward": "-", "step": "-"}
        if case.size == cases[first].size:
            ratios = {run: faster(seconds[first][run], seconds[name][run]) for run in ratios}
        row = {
            "network": name,
            "multiply-adds (1e9)": f"{counted / 1e9:.1f}",
            "forward (s)": digits(forward),
            f"forward, times as fast as {first}": ratios["forward"],
            "training step (s)": digits(step),
            f"step, times as fast as {first}": ratios["step"],
            "1e9 multiply-adds / s, forward": f"{counted / forward / 1e9:.0f}",
        }
        # hooks do not see the convolutions of the released structure, nor those of a compiled network
        listed = not isinstance(case.network, ReleasedStructure) and not case.compiled
        row["share of the convolution rate"] = f"{100 * case.convolutions() / forward:.0f} %" if listed else "-"
        rows.append(row)
    return rows


def volume_times(options: argparse.Namespace) -> list[dict[str, str]]:
    """Rows of the table of whole cases."""
    cases = {name: Case(name, options) for name in options.networks}
    first = options.networks[0]
    seconds = {name: own["volume"] for name, own in interleaved(cases, ("volume",), options.repeats).items()}
    return [
        {
            "network": name,
            "one case (s)": digits(statistics.median(own)),
            f"times as fast as {first}": faster(seconds[first], own),
        }
        for name, own in seconds.items()
    ]


def peak_memory(options: argparse.Namespace) -> list[dict[str, str]]:
    """Rows of the table of memory, from one process for each network."""
    rows = []
    for name in options.networks:
        row = {"network": name}
        for run in ("forward", "step"):
            command = [sys.executable, __file__, "--child", run, "--networks", name, "--device", options.device]
            command += ["--batch-size", str(options.batch_size), "--size", *map(str, options.size), "--repeats", "1"]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            row[f"{run}, peak (GiB)"] = f"{int(printed) / 2**30:.2f}"
        rows.append(row)
    return rows


def operation_counts(options: argparse.Namespace) -> list[dict[str, str]]:
    """Rows of the table of what a GPU would have to do."""
    rows = []
    for name in options.networks:
        autocast = name.endswith(", bf16")
        row = {"network": name}
        for run in ("forward", "step"):
            network = NETWORKS[name.removesuffix(", bf16")](options.size)
            shape = (options.batch_size, CHANNELS, *options.size)
            found = operations.count(network, shape, autocast=autocast, step=run == "step")
            row[f"{run}, operations"] = f"{found.operations}"
            row[f"{run}, memory traffic (GB)"] = f"{found.moved / 1e9:.1f}"
        row["kept for the backward pass (GiB)"] = f"{found.kept / 2**30:.2f}"
        rows.append(row)
    return rows


def child(options: argparse.Namespace) -> None:
    """Print the peak bytes of one run in this process."""
    case = Case(options.networks[0], options)
    if case.device == "cpu":

        def peak() -> int:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

        before = peak()
    else:
        case.seconds(options.child)
        case.network.zero_grad()  # the memory of the gradients belongs to the step
        torch.cuda.reset_peak_memory_stats(case.device)
        before, peak = torch.cuda.memory_allocated(case.device), partial(torch.cuda.max_memory_allocated, case.device)
    case.seconds(options.child)
    print(peak() - before)


def machine(device: str) -> str:
    """The line under the table that names the GPU. A CPU does not tell how many cores we get."""
    if not device.startswith("cuda"):
        return ""
    cudnn = torch.backends.cudnn.version()
    return f"\n{torch.cuda.get_device_name(device)}, torch {torch.__version__}, cuDNN {cudnn}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/tables"), help="folder for the table (.csv and .md)")
    parser.add_argument("--name", help="name of the files (default: what is measured, and the device)")
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=[name + dtype + way for name in NETWORKS for dtype in ("", *AUTOCAST) for way in ("", COMPILED)],
        default=[name for name in NETWORKS if not any(trick in name for trick in TRICKS)],
        metavar="NAME",
        help=f"{', '.join(NETWORKS)}; with the endings ', bf16' or ', fp16' and ', compiled'",
    )
    parser.add_argument("--size", type=int, nargs=3, default=(40, 80, 80), help="size of the image in voxels")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--volume", type=int, nargs=3, help="time of one case of this size, in windows of --size")
    parser.add_argument("--batch-size", type=int, default=1, help="images or windows at a time")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    kinds.add_argument("--memory", action="store_true", help="peak memory instead of time")
    kinds.add_argument(
        "--operations", action="store_true", help="number of operations and their memory traffic on a GPU"
    )
    parser.add_argument("--child", choices=("forward", "step"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True  # as torch's convolutions do
    if options.child:
        return child(options)
    kind, measure = "speed", times
    if options.memory:
        kind, measure = "memory", peak_memory
    elif options.operations:
        kind, measure, options.device = "operations", operation_counts, "meta"
    elif options.volume:
        kind, measure = "volume", volume_times
    name = options.name or (kind if options.operations else f"{kind}_{options.device}")
    print(write_table(options.out, name, measure(options), machine(options.device)))


if __name__ == "__main__":
    main()
