"""Which parts of context residual learning help? Train and evaluate arms x folds x seeds on one data set.

    python examples/benchmarks/ablation.py --data Task04_Hippocampus --out runs --arms baseline conres --seeds 0 1 2
    python examples/benchmarks/ablation_report.py runs --out docs/tables

Each run is one file, ``OUT/ARM_foldF_seedS.csv``, with a row for each case and class; it is there complete or not, and
a run that is there is not done again: start the same command as often as it takes. One folder has one setting. All
arms of a seed see the same patches in the same order.

``dynunet``, ``segresnet`` and ``resenc`` are other people's networks; with ``+conres`` the same one with a context
residual decoder attached.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.data import CacheDataset, DataLoader, Dataset
from monai.inferers import SlidingWindowInferer
from monai.networks import nets, one_hot
from monai.transforms import Compose, Spacingd
from monai.utils import optional_import
from torch.optim.lr_scheduler import PolynomialLR
from torch.utils.data import RandomSampler
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from monai_conres import (
    BratsDiceMetric,
    BratsHausdorffDistanceMetric,
    BratsSurfaceDiceMetric,
    ConResLoss,
    ConResNet,
    ConResOutput,
    ContextResidualLoss,
    attach_conres,
    decoder_stages,
    inter_slice_residual,
    residual_mask,
)
from monai_conres.datasets import DecathlonDatalist, read_decathlon, training_plan
from monai_conres.files import atomic_path, write_csv
from monai_conres.training import seed_everything

sys.path.insert(0, str(Path(__file__).parents[1]))
from quickstart import KEYS, PREPARE, augmentations

sys.path.insert(0, str(Path(__file__).parent))
from resident import ResidentPatches

unet, _ = optional_import("dynamic_network_architectures.architectures.unet")

# "cpu" is meant for two cores and a minute or two for each run, "full" for a GPU
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"channels": (8, 16, 32, 64), "blocks": (1, 1, 1, 1, 1), "iterations": 300, "batch": 2, "rate": 3e-3},
    "full": {
        "channels": (32, 64, 128, 256),
        "blocks": (1, 2, 2, 2, 2),
        "iterations": 12000,
        "batch": 8,
        "rate": 1e-3,
        "resident": True,
    },
}


class ClampedLoss(ContextResidualLoss):
    """The released code's: logits clamped to [0.001, 0.999] and taken as the probability, w_1 = log(V / (V_1 + 1))."""

    def _cross_entropy(self, logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        logits = wide(logits)
        logits, masks = at_full_resolution(logits, masks) if self.full_resolution else (logits, masks)
        if masks.shape[2:] != logits.shape[2:]:
            masks = F.interpolate(masks.float(), size=logits.shape[2:], mode="nearest-exact") > 0.5
        target = self._target(masks)
        weight_1 = (target.numel() / (target.sum() + 1.0)).log()
        p = logits.clamp(1e-3, 1 - 1e-3)
        return -torch.where(target, weight_1 * p.log(), (1 - p).log()).mean()

    full_resolution = False


class FullResolutionLoss(ContextResidualLoss):
    """The released code's targets: every head is scored against the residual mask of the full resolution."""

    def _cross_entropy(self, logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        return super()._cross_entropy(*at_full_resolution(logits, masks))


class BoundaryTargetLoss(ContextResidualLoss):
    """A control: the same second decoder learns the objects' boundaries in 3D, the voxels that an erosion takes off."""

    def _target(self, masks: torch.Tensor) -> torch.Tensor:
        eroded = -F.max_pool3d(-F.pad(masks.float(), (1,) * 6, mode="replicate"), kernel_size=3, stride=1)
        return masks & (eroded < 0.5)


class ReleasedLoss(ClampedLoss):
    """Both, as released."""

    full_resolution = True


class AllAxesLoss(nn.Module):
    """Residual masks of sagittal, coronal and axial slices at once; the channels of one after those of the other."""

    def __init__(self, *, spatial_axis: int, **kwargs: Any) -> None:
        super().__init__()
        self.axes = nn.ModuleList(ContextResidualLoss(spatial_axis=axis, **kwargs) for axis in range(3))

    def forward(self, residuals: Sequence[torch.Tensor], label: torch.Tensor) -> torch.Tensor:
        parts = zip(*(logits.chunk(3, dim=1) for logits in residuals), strict=True)
        return sum(loss(part, label) for loss, part in zip(self.axes, parts, strict=True)) / 3


def wide(logits: torch.Tensor) -> torch.Tensor:
    """In float32 or wider: in bfloat16 0.999 is 1, and the logarithm of the rest infinite."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def at_full_resolution(logits: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return F.interpolate(logits, size=masks.shape[2:], mode="trilinear", align_corners=True), masks


def dynunet(in_channels: int, classes: int, channels: list[int], strides: tuple) -> nn.Module:
    return nets.DynUNet(
        3,
        in_channels,
        classes,
        kernel_size=[3] * len(channels),
        strides=[1, *strides],
        upsample_kernel_size=strides,
        filters=channels,
    )


def segresnet(in_channels: int, classes: int, channels: list[int], strides: tuple) -> nn.Module:
    """SegResNet doubles its channels and halves every axis."""
    return nets.SegResNet(3, channels[0], in_channels, classes, blocks_down=(1, 2, 2, 4), blocks_up=(1, 1, 1))


def resenc(in_channels: int, classes: int, channels: list[int], strides: tuple) -> nn.Module:
    """nnU-Net's residual-encoder network, of the blocks of its preset M."""
    return unet.ResidualEncoderUNet(
        in_channels,
        n_stages=len(channels),
        features_per_stage=channels,
        conv_op=nn.Conv3d,
        kernel_sizes=3,
        strides=[1, *strides],
        n_blocks_per_stage=[1, 3, 4, 6, 6, 6][: len(channels)],
        num_classes=classes,
        n_conv_per_stage_decoder=1,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )


@dataclass(frozen=True)
class Arm:
    """One way to build and to train a network."""

    network: dict[str, Any] = field(default_factory=dict)  # arguments of ConResNet
    backbone: Callable[..., nn.Module] | None = None  # another network than ConResNet
    attached: bool = False  # the backbone with a context residual decoder
    width: float = 1.0  # of the attached decoder, times the backbone's channels at full resolution
    gain: float = 1.0  # of the features of the backbone's decoder; 1.5 is what gates of one half everywhere do
    loss: Callable[..., nn.Module] = ContextResidualLoss
    loss_arguments: dict[str, Any] = field(default_factory=dict)
    residual_weight: float = 1.0
    spatial_axis: int = -1
    masks: int = 1  # residual masks of each foreground class
    channels: Callable[[int], int] = int  # from the usual number of channels to this arm's
    image_residual: bool = True
    zero_init: bool = False  # gates that open from zero
    derived: bool = False  # the residual loss is that of the segmentation's own residuals
    rate: float = 1.0  # times the usual learning rate

    @property
    def residual(self) -> bool:
        """Whether the network learns to predict residual masks."""
        path = self.attached if self.backbone is not None else self.network.get("mapping", True)
        return path and self.residual_weight > 0


RELEASED = {"fan_in_scaling": False, "inner_norm": False, "align_corners": True}
BASELINE = {"mapping": False, "attention": False}
ARMS = {
    "baseline": Arm(BASELINE),
    "mapping": Arm({"attention": False}),
    "conres": Arm(),
    "authors": Arm(RELEASED, loss=ReleasedLoss),
    # one difference between the authors' setting and the default at a time
    "no_fan_in_scaling": Arm({"fan_in_scaling": False}),
    "no_inner_norm": Arm({"inner_norm": False}),
    "align_corners": Arm({"align_corners": True}),
    "clamped_loss": Arm(loss=ClampedLoss),
    "full_resolution_targets": Arm(loss=FullResolutionLoss),
    "paper_w0": Arm(loss_arguments={"background_weight": None}),
    # the weight of the residual loss
    "residual_weight_0.3": Arm(residual_weight=0.3),
    "residual_weight_3": Arm(residual_weight=3.0),
    "no_residual_loss": Arm(residual_weight=0.0),
    "no_image_residual": Arm(image_residual=False),
    "zero_init": Arm(zero_init=True),
    # the slice axis
    "axis_0": Arm(spatial_axis=0),
    "axis_1": Arm(spatial_axis=1),
    "all_axes": Arm(loss=AllAxesLoss, masks=3),
    # controls
    "wider_baseline": Arm(BASELINE, channels=lambda channels: round(channels * 1.125)),
    "baseline_align_corners": Arm(BASELINE | {"align_corners": True}),
    "boundary_targets": Arm(loss=BoundaryTargetLoss),
    "derived_residuals": Arm(BASELINE, derived=True),
    # other people's networks
    "dynunet": Arm(backbone=dynunet),
    "dynunet+conres": Arm(backbone=dynunet, attached=True),
    "dynunet+conres_half": Arm(backbone=dynunet, attached=True, width=0.5),
    "dynunet+conres_no_residual_loss": Arm(backbone=dynunet, attached=True, residual_weight=0.0),
    "dynunet+constant_gates": Arm(backbone=dynunet, gain=1.5),
    "dynunet+wider": Arm(backbone=dynunet, channels=lambda channels: round(channels * 1.125)),
    # at the usual learning rate three of four runs with SegResNet did not find the second class
    "segresnet": Arm(backbone=segresnet, rate=1 / 3),
    "segresnet+conres": Arm(backbone=segresnet, attached=True, rate=1 / 3),
    "resenc": Arm(backbone=resenc),
    "resenc+conres": Arm(backbone=resenc, attached=True),
}


def build(arm: Arm, data: DecathlonDatalist, size: dict[str, Any], strides: tuple) -> nn.Module:
    channels = [arm.channels(channels) for channels in size["channels"]]
    if arm.backbone is not None:
        network = arm.backbone(data.channels, len(data.classes), channels, strides)
        if arm.attached:
            network = attach_conres(
                network,
                data.channels,
                len(data.classes),
                residual_channels=len(data.classes) - 1,
                width=round(arm.width * channels[0]),
            )
        elif arm.gain != 1:
            for stage in decoder_stages(network, data.channels).stages:
                stage_module = network.get_submodule(stage.name)
                stage_module.register_forward_hook(lambda module, args, output: output * arm.gain)
        return network
    network = ConResNet(
        data.channels,
        len(data.classes),
        residual_channels=arm.masks * (len(data.classes) - 1),
        channels=channels,
        blocks=size["blocks"],
        strides=strides,
        spatial_axis=arm.spatial_axis,
        **arm.network,
    )
    if not arm.image_residual:
        network.residual_decoder.stages[0].entry.register_forward_hook(lambda module, args, output: output * 0)
    if arm.zero_init:
        for stage in network.residual_decoder.stages:
            stage.strength = nn.Parameter(torch.zeros(stage.inner.in_channels))
    return network


def batches(
    training: CacheDataset | ResidentPatches, size: dict[str, Any], seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Images and labels of each iteration; the same for every arm."""
    if isinstance(training, ResidentPatches):
        yield from training.batches(size["iterations"], size["batch"], seed=seed)
    else:
        draws = RandomSampler(training, replacement=True, num_samples=size["iterations"] * size["batch"])
        for batch in DataLoader(training, batch_size=size["batch"], sampler=draws):
            yield batch["image"].as_tensor(), batch["label"].as_tensor()


def train(
    network: nn.Module,
    arm: Arm,
    training: CacheDataset | ResidentPatches,
    size: dict[str, Any],
    seed: int,
    title: str,
) -> dict[str, Any]:
    """Train, and say how many seconds it took and, on a GPU, how many bytes at most."""
    seed_everything(seed)
    segmentation_loss = ConResLoss(softmax=True, to_onehot_y=True)
    residual_loss = arm.loss(spatial_axis=arm.spatial_axis, to_onehot_y=True, **arm.loss_arguments)
    optimizer = torch.optim.Adam(network.parameters(), lr=size["rate"] * arm.rate)
    schedule = PolynomialLR(optimizer, total_iters=size["iterations"], power=0.9)
    device = next(network.parameters()).device
    network.train()
    before = 0
    if device.type == "cuda":
        gc.collect()  # an attached decoder and its network refer to each other
        torch.cuda.reset_peak_memory_stats(device)
        # of the patches that are there; the network's own weights count
        before = torch.cuda.memory_allocated(device) - sum(p.nbytes for p in network.parameters())
    start = time.perf_counter()
    progress = tqdm(batches(training, size, seed), total=size["iterations"], desc=title, mininterval=5)
    for image, label in progress:
        image, label = image.to(device), label.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
            output = network(image)
        segmentation, residuals = output if isinstance(output, ConResOutput) else (output, ())
        if arm.derived:
            residuals = (derived_residuals(segmentation, arm.spatial_axis),)
        loss = segmentation_loss(segmentation, label)
        if residuals and arm.residual_weight:
            loss = loss + arm.residual_weight * residual_loss(residuals, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    memory: int | str = ""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        memory = torch.cuda.max_memory_allocated(device) - before
    return {"seconds": round(time.perf_counter() - start, 1), "memory": memory}


def derived_residuals(segmentation: torch.Tensor, spatial_axis: int) -> torch.Tensor:
    """Logits of how much the probability of each class but the first changes from slice to slice."""
    probabilities = wide(segmentation).softmax(1)[:, 1:]
    return inter_slice_residual(probabilities, spatial_axis=spatial_axis).logit(eps=1e-6)


def multiply_adds(network: nn.Module, channels: int, patch: tuple) -> int:
    """Of one training patch."""
    twin = copy.deepcopy(network).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin.train()(torch.empty(1, channels, *patch, device="meta"))
    return counter.get_total_flops() // 2


def even_odds(arm: Arm, masks: torch.Tensor) -> torch.Tensor:
    """The output at which a voxel has changed as likely as not: the weights of the loss decide where that is.

    They depend on how many voxels of ``masks``, the residual masks of the label, have changed.
    """
    if issubclass(arm.loss, ClampedLoss):  # one weight for all masks
        weight_1 = (masks.numel() / (masks.sum() + 1.0)).log()
        return weight_1 / (weight_1 + 1)
    voxels = masks[0, 0].numel()
    changed = masks.flatten(2).sum(-1)[..., None, None, None].clamp(min=1)
    weight_1 = (voxels / changed).log()
    weight_0 = (voxels / (voxels - changed)).log() if "background_weight" in arm.loss_arguments else 1.0
    return (weight_1 / (weight_1 + weight_0)).logit()


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raise unless earlier runs in a folder, if there are any, have the same settings."""
    file = folder / "settings.json"
    if not file.exists():
        with atomic_path(file) as temporary:
            temporary.write_text(json.dumps(settings, indent=1) + "\n")
    elif (earlier := json.loads(file.read_text())) != settings:
        raise SystemExit(
            f"error: expected the settings of the runs in {folder}, {earlier}, got {settings}; give another --out."
        )


@torch.no_grad()
def evaluate(network: nn.Module, arm: Arm, dataset: CacheDataset, classes: int, patch: tuple) -> list[dict[str, Any]]:
    """A row for each case and class."""
    device = next(network.parameters()).device
    metrics = {"dice": BratsDiceMetric(), "hd95": BratsHausdorffDistanceMetric(), "nsd": BratsSurfaceDiceMetric()}
    dice = metrics["dice"]
    network.eval()
    if arm.residual:
        network.eval_residual = True
    inferer = SlidingWindowInferer(patch, sw_batch_size=4, overlap=0.5, mode="gaussian")
    rows = []
    for case in dataset:
        output = inferer(case["image"][None].as_tensor().to(device), network)
        segmentation, residual = output if isinstance(output, tuple) else (output, None)
        labels = (segmentation.argmax(1, keepdim=True).cpu(), case["label"][None].as_tensor())
        masks = [one_hot(label, num_classes=classes)[:, 1:] for label in labels]
        spacing = case["image"].pixdim.tolist()
        values = {name: metric(*masks, spacing=spacing)[0] for name, metric in metrics.items()}
        changes = [residual_mask(mask, spatial_axis=arm.spatial_axis) for mask in masks]
        values["residual_dice_of_segmentation"] = dice(*changes)[0]
        if residual is not None and arm.loss is not BoundaryTargetLoss:
            predicted = residual[:, 1 - classes :].cpu() > even_odds(arm, changes[1])  # of several axes, the last
            values["residual_dice_predicted"] = dice(predicted.float(), changes[1])[0]
        for number in range(classes - 1):
            row = {"case": case["name"], "class": number + 1}
            rows.append(row | {name: round(value[number].item(), 5) for name, value in values.items()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with dataset.json")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folds", type=int, nargs="+", default=[0])
    parser.add_argument("--nnunet-folds", action="store_true", help="the folds that nnU-Net makes")
    parser.add_argument("--iterations", type=int, help="other than the size's")
    parser.add_argument("--batch", type=int, help="patches in a batch, other than the size's")
    parser.add_argument("--cases", type=int, help="use at most so many cases for training and for validation")
    parser.add_argument(
        "--spacing", type=float, nargs=3, help="of the voxels to train and evaluate at, in mm (default: as they are)"
    )
    parser.add_argument("--max-voxels", type=int, default=48 * 56 * 40, help="of a training patch, roughly")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    changed = {"iterations": options.iterations, "batch": options.batch}
    size = SIZES[options.size] | {name: value for name, value in changed.items() if value}
    data = read_decathlon(options.data, nnunet_folds=options.nnunet_folds)
    check_settings(
        options.out,
        {
            "data": options.data.resolve().name,
            "size": options.size,
            "device": torch.device(options.device).type,
            "iterations": size["iterations"],
            "batch": size["batch"],
            "cases": options.cases,
            "spacing": options.spacing,
            "max_voxels": options.max_voxels,
            "nnunet_folds": bool(data.folds),
        },
    )
    prepare, spacing, shape = PREPARE, data.spacing, data.shape
    if options.spacing:
        spacing = options.spacing
        shape = [size * old / new for size, old, new in zip(data.shape, data.spacing, spacing, strict=True)]
        # to the axes of RAS first, then to the spacing
        prepare = [*PREPARE[:2], Spacingd(KEYS, pixdim=spacing, mode=("bilinear", "nearest")), *PREPARE[2:]]
    patch, strides = training_plan(shape, spacing, max_voxels=options.max_voxels, levels=len(size["channels"]))
    runs = [(fold, seed, name) for fold in options.folds for seed in options.seeds for name in options.arms]
    prepared_fold = None  # one at a time: its patches may take the memory of the device
    for fold, seed, name in runs:
        file = options.out / f"{name}_fold{fold}_seed{seed}.csv"
        if file.exists():
            continue
        if fold != prepared_fold:
            training_set = validation_set = None
            training, validation = (cases[: options.cases] for cases in data.split(fold))
            if size.get("resident"):
                prepared = Dataset(training, Compose(prepare))
                training_set = ResidentPatches(prepared, patch, spacing, options.device)
            else:
                training_set = CacheDataset(
                    training, Compose(prepare + augmentations(patch, len(data.classes))), progress=False
                )
            validation_set = CacheDataset(validation, Compose(prepare), progress=False)
            prepared_fold = fold
        seed_everything(seed)
        network = build(ARMS[name], data, size, strides).to(options.device)
        cost = train(network, ARMS[name], training_set, size, seed, file.stem)
        rows = evaluate(network, ARMS[name], validation_set, len(data.classes), patch)
        run = {
            "arm": name,
            "fold": fold,
            "seed": seed,
            "parameters": sum(p.numel() for p in network.parameters()),
            "multiply_adds": multiply_adds(network, data.channels, patch),
            **cost,
        }
        write_csv(file, [run | row for row in rows])
        print(f"{file.stem}: mean Dice {sum(row['dice'] for row in rows) / len(rows):.4f}", flush=True)


if __name__ == "__main__":
    main()
