"""Which parts of context residual learning help? Train and evaluate arms x folds x seeds on one data set.

    python examples/benchmarks/ablation.py hippocampus_cpu --data Task04_Hippocampus --arms baseline conres --seeds 0 1
    python examples/benchmarks/ablation_report.py hippocampus_cpu

The first argument names the experiment. A new name starts an experiment with the settings of the command line. A known
name continues the experiment with its own settings, which come from ``results/NAME.json``.

Each run writes one file, ``runs/NAME/ARM_foldF_seedS.json``, and ablation_report.py merges the files into
``results/NAME.csv``. A run with a result is skipped: repeat the command to continue. Several commands can run at the
same time. All arms of one seed see the same patches in the same order.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from common import multiply_adds, nnunet
from experiment import Experiment
from monai.data import CacheDataset, DataLoader, Dataset
from monai.inferers import SlidingWindowInferer
from monai.metrics import DiceMetric
from monai.networks import nets, one_hot
from monai.transforms import (
    Compose,
    EnsureTyped,
    LoadImaged,
    NormalizeIntensityd,
    Orientationd,
    RandCropByLabelClassesd,
    RandScaleIntensityd,
    RandShiftIntensityd,
    Spacingd,
    SpatialPadd,
)
from resident import ResidentPatches
from torch.optim.lr_scheduler import PolynomialLR
from torch.utils.data import RandomSampler
from tqdm import tqdm

from monai_conres import (
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
from monai_conres.bundle import Computation, read_decathlon, seed_everything, training_plan

# "cpu" takes two cores and a minute or two for each run, "full" takes a GPU
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

KEYS = ("image", "label")


def preparation(spacing: Sequence[float] | None) -> list:
    """From files to standardized images; the last axis has the axial slices."""
    return [
        LoadImaged(KEYS, ensure_channel_first=True),
        Orientationd(KEYS, axcodes="RAS", labels=None),
        *([Spacingd(KEYS, pixdim=spacing, mode=("bilinear", "nearest"))] if spacing else []),
        NormalizeIntensityd("image", nonzero=True, channel_wise=True),
        EnsureTyped(KEYS, dtype=(torch.float32, torch.uint8)),
    ]


def augmentation(patch: tuple, classes: int) -> list:
    """Random patches for the small size; resident.py has those of the full size."""
    return [
        SpatialPadd(KEYS, spatial_size=patch),
        RandCropByLabelClassesd(KEYS, label_key="label", spatial_size=patch, num_classes=classes),
        RandScaleIntensityd("image", factors=0.2, prob=0.5),
        RandShiftIntensityd("image", offsets=0.2, prob=0.5),
    ]


def residual_loss(
    residuals: Sequence[torch.Tensor],
    masks: torch.Tensor,
    *,
    axes: Sequence[int] = (-1,),
    target: Callable[..., torch.Tensor] = residual_mask,
    full_resolution: bool = False,
    **weighting: bool,
) -> torch.Tensor:
    """Eq. 8 and 9 with the choices that the arms compare. The defaults compute ``ContextResidualLoss()``.

    Args:
        residuals: logits, fine to coarse; with several axes, the channels of one axis after those of another.
        masks: one mask for each foreground class, ``(b, c, d, h, w)``.
        axes: slice axes; the loss is the mean over the axes.
        target: what the logits predict, a function of ``(masks, spatial_axis=axis)``.
        full_resolution: the released code scores all scales against the residual mask of the full resolution.
        weighting: see :func:`class_weights`. ``clamped`` also takes the logits as probabilities, clamped to
            [0.001, 0.999], as the released code does.
    """
    total = torch.zeros((), device=masks.device)
    for scale, stacked in enumerate(residuals):
        stacked, own = wide(stacked), masks.float()
        if full_resolution:
            stacked = F.interpolate(stacked, size=masks.shape[2:], mode="trilinear", align_corners=True)
        elif stacked.shape[2:] != masks.shape[2:]:
            own = F.interpolate(own, size=stacked.shape[2:], mode="nearest-exact")
        for axis, logits in zip(axes, stacked.chunk(len(axes), dim=1), strict=True):
            changed = target(own, spatial_axis=axis)
            weight_1, weight_0 = class_weights(changed, **weighting)
            if weighting.get("clamped"):
                p = logits.clamp(1e-3, 1 - 1e-3)
                cross_entropy = -torch.where(changed > 0, p.log(), (1 - p).log())
            else:
                cross_entropy = F.binary_cross_entropy_with_logits(logits, changed, reduction="none")
            loss = (torch.where(changed > 0, weight_1, weight_0) * cross_entropy).mean()
            total = total + (0.5 if scale else 1.0) / len(axes) * loss
    return total


def class_weights(
    changed: torch.Tensor, *, clamped: bool = False, paper_w0: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights ``w_1`` of changed voxels and ``w_0`` of the other voxels, for each channel over the batch.

    ``w_k = log(V / V_k)`` in Eq. 8; the package has ``w_0 = 1``. With ``clamped``, ``w_1 = log(V / (V_1 + 1))`` over
    all channels, as in the released code.
    """
    if clamped:
        weight_1 = (changed.numel() / (changed.sum() + 1.0)).log()
        return weight_1, torch.ones_like(weight_1)
    voxels, number = changed[:, :1].numel(), changed.sum((0, 2, 3, 4), keepdim=True)
    weight_1 = (voxels / number.clamp(min=1)).log()
    return weight_1, (voxels / (voxels - number)).log() if paper_w0 else torch.ones_like(weight_1)


def surface(masks: torch.Tensor, *, spatial_axis: int) -> torch.Tensor:
    """The voxels that an erosion in 3D removes, whatever the slice axis is."""
    eroded = -F.max_pool3d(-F.pad(masks, (1,) * 6, mode="replicate"), kernel_size=3, stride=1)
    return masks * (eroded < 0.5)


def derived_residuals(segmentation: torch.Tensor) -> torch.Tensor:
    """Logits of how much the probability of each foreground class changes from slice to slice."""
    return inter_slice_residual(wide(segmentation).softmax(1)[:, 1:]).logit(eps=1e-6)


def wide(logits: torch.Tensor) -> torch.Tensor:
    """``logits`` in float32 or wider. In bfloat16 0.999 is 1, and the logarithm of 1 - 0.999 is infinite."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def dynunet(in_channels: int, classes: int, channels: list[int], strides: tuple) -> nn.Module:
    kernels, steps = [3] * len(channels), [1, *strides]
    return nets.DynUNet(3, in_channels, classes, kernels, steps, upsample_kernel_size=strides, filters=channels)


def segresnet(in_channels: int, classes: int, channels: list[int], strides: tuple) -> nn.Module:
    """SegResNet doubles its channels and halves every axis."""
    return nets.SegResNet(3, channels[0], in_channels, classes, blocks_down=(1, 2, 2, 4), blocks_up=(1, 1, 1))


def resenc(in_channels: int, classes: int, channels: list[int], strides: tuple) -> nn.Module:
    """nnU-Net's residual-encoder network with the blocks of its preset M."""
    blocks = [1, 3, 4, 6, 6, 6][: len(channels)]
    options = {"n_blocks_per_stage": blocks, "n_conv_per_stage_decoder": 1}
    return nnunet("ResidualEncoderUNet", in_channels, classes, channels, strides, **options)


def remove_image_residual(network: ConResNet) -> None:
    """The first input of the context residual decoder becomes zero."""
    network.residual_decoder.stages[0].entry.register_forward_hook(lambda module, args, output: output * 0)


def open_gates_from_zero(network: ConResNet) -> None:
    """Each gate gets a strength for each channel; the strengths are learned and start at zero."""
    for stage in network.residual_decoder.stages:
        stage.strength = nn.Parameter(torch.zeros(stage.inner.in_channels))


def predict_all_axes(network: ConResNet) -> None:
    """The heads predict residual masks along three axes; the channels of one axis come after those of another."""
    heads = network.residual_decoder.heads
    network.residual_decoder.heads = nn.ModuleList(
        nn.Conv3d(head.in_channels, 3 * head.out_channels, kernel_size=1) for head in heads
    )


def multiply_features(network: nn.Module) -> None:
    """The features of the decoder times 1.5, as gates of one half everywhere would make them."""
    for stage in decoder_stages(network, network.in_channels).stages:
        network.get_submodule(stage.name).register_forward_hook(lambda module, args, output: output * 1.5)


@dataclass(frozen=True)
class Arm:
    """One way to build and to train a network."""

    network: dict[str, Any] = field(default_factory=dict)  # arguments of ConResNet
    backbone: Callable[..., nn.Module] | None = None  # another network instead of ConResNet
    attached: bool = False  # the backbone has a context residual decoder
    width: float = 1.0  # of the attached decoder, times the channels of the backbone at full resolution
    wider: float = 1.0  # times the channels of the network
    change: Callable[[Any], None] | None = None  # of the built network
    loss: dict[str, Any] = field(default_factory=dict)  # arguments of residual_loss
    residual_weight: float = 1.0
    derived: bool = False  # the residual loss is computed on the residuals of the segmentation itself
    rate: float = 1.0  # times the usual learning rate

    @property
    def predicts(self) -> bool:
        """True when the network learns to predict residual masks."""
        decoder = self.attached if self.backbone is not None else self.network.get("context") != "none"
        return decoder and self.residual_weight > 0

    @property
    def axis(self) -> int:
        return self.network.get("spatial_axis", -1)


BASELINE = {"context": "none"}
RELEASED = {"fan_in_scaling": False, "inner_norm": False, "align_corners": True}
ARMS = {
    "baseline": Arm(BASELINE),
    "mapping": Arm({"context": "mapping"}),
    "conres": Arm(),
    "released": Arm(RELEASED, loss={"clamped": True, "full_resolution": True}),
    # the default with one choice of the released network or of the paper
    "no_fan_in_scaling": Arm({"fan_in_scaling": False}),
    "no_inner_norm": Arm({"inner_norm": False}),
    "align_corners": Arm({"align_corners": True}),
    "clamped_loss": Arm(loss={"clamped": True}),
    "full_resolution_targets": Arm(loss={"full_resolution": True}),
    "paper_w0": Arm(loss={"paper_w0": True}),
    # the weight of the residual loss
    "residual_weight_0.3": Arm(residual_weight=0.3),
    "residual_weight_3": Arm(residual_weight=3.0),
    "no_residual_loss": Arm(residual_weight=0.0),
    "no_image_residual": Arm(change=remove_image_residual),
    "zero_init": Arm(change=open_gates_from_zero),
    # the slice axis
    "axis_0": Arm({"spatial_axis": 0}),
    "axis_1": Arm({"spatial_axis": 1}),
    "all_axes": Arm(change=predict_all_axes, loss={"axes": (0, 1, 2)}),
    # controls
    "wider_baseline": Arm(BASELINE, wider=1.125),
    "baseline_align_corners": Arm(BASELINE | {"align_corners": True}),
    "boundary_targets": Arm(loss={"target": surface}),
    "derived_residuals": Arm(BASELINE, derived=True),
    # other networks: alone, and NAME+conres with an attached context residual decoder
    "dynunet": Arm(backbone=dynunet),
    "dynunet+conres": Arm(backbone=dynunet, attached=True),
    "dynunet+conres_half": Arm(backbone=dynunet, attached=True, width=0.5),
    "dynunet+conres_no_residual_loss": Arm(backbone=dynunet, attached=True, residual_weight=0.0),
    "dynunet+constant_gates": Arm(backbone=dynunet, change=multiply_features),
    "dynunet+wider": Arm(backbone=dynunet, wider=1.125),
    # at the usual learning rate three of four runs with SegResNet did not find the second class
    "segresnet": Arm(backbone=segresnet, rate=1 / 3),
    "segresnet+conres": Arm(backbone=segresnet, attached=True, rate=1 / 3),
    "resenc": Arm(backbone=resenc),
    "resenc+conres": Arm(backbone=resenc, attached=True),
}


def build(arm: Arm, in_channels: int, classes: int, size: dict[str, Any], strides: tuple) -> nn.Module:
    """The network of an arm. ``classes`` counts the background."""
    channels = [round(arm.wider * number) for number in size["channels"]]
    if arm.backbone is not None:
        network = arm.backbone(in_channels, classes, channels, strides)
        if arm.attached:
            width = round(arm.width * channels[0])
            network = attach_conres(network, in_channels, include_background=False, width=width)
    else:
        options = {"channels": channels, "blocks": size["blocks"], "strides": strides, **arm.network}
        network = ConResNet(in_channels, classes, include_background=False, **options)
    if arm.change is not None:
        arm.change(network)
    return network


def batches(
    training: CacheDataset | ResidentPatches, size: dict[str, Any], seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Images and labels of each iteration; all arms get the same."""
    if isinstance(training, ResidentPatches):
        yield from training.batches(size["iterations"], size["batch"], seed=seed)
    else:
        draws = RandomSampler(training, replacement=True, num_samples=size["iterations"] * size["batch"])
        for batch in DataLoader(training, batch_size=size["batch"], sampler=draws):
            yield batch["image"].as_tensor(), batch["label"].as_tensor()


def joint_loss(arm: Arm, output: torch.Tensor | ConResOutput, label: torch.Tensor) -> torch.Tensor:
    """Loss of an arm for class indices ``label``, ``(b, 1, d, h, w)``."""
    segmentation, residuals = output if isinstance(output, ConResOutput) else (output, ())
    if arm.derived:
        residuals = (derived_residuals(segmentation),)
    loss = ConResLoss(softmax=True)(segmentation, label)
    if not residuals or arm.residual_weight == 0:
        return loss
    masks = one_hot(label, num_classes=segmentation.shape[1])[:, 1:]
    function = partial(residual_loss, **arm.loss) if arm.loss else ContextResidualLoss(spatial_axis=arm.axis)
    return loss + arm.residual_weight * function(residuals, masks)


def train(
    network: nn.Module,
    arm: Arm,
    training: CacheDataset | ResidentPatches,
    size: dict[str, Any],
    seed: int,
    title: str,
) -> dict[str, Any]:
    """Train a network, and return the seconds and, on a GPU, the peak memory in bytes."""
    seed_everything(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=size["rate"] * arm.rate)
    schedule = PolynomialLR(optimizer, total_iters=size["iterations"], power=0.9)
    device = next(network.parameters()).device
    computation = Computation.on(device)
    network.train()
    before = 0
    if device.type == "cuda":
        gc.collect()  # an attached decoder and its network refer to each other
        torch.cuda.reset_peak_memory_stats(device)
        # the resident patches do not count, the weights of the network do
        before = torch.cuda.memory_allocated(device) - sum(p.nbytes for p in network.parameters())
    start = time.perf_counter()
    for image, label in tqdm(batches(training, size, seed), total=size["iterations"], desc=title, mininterval=5):
        image, label = image.to(device), label.to(device)
        with computation.autocast():
            loss = joint_loss(arm, network(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    memory: int | str = ""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        memory = torch.cuda.max_memory_allocated(device) - before
    return {"seconds": round(time.perf_counter() - start, 1), "memory": memory}


def even_odds(arm: Arm, changed: torch.Tensor) -> torch.Tensor:
    """The network's output for a voxel that has changed with a probability of one half.

    The weights of the loss decide which output that is. ``changed`` are the residual masks of the label.
    """
    weighting = {name: value for name, value in arm.loss.items() if name in ("clamped", "paper_w0")}
    weight_1, weight_0 = class_weights(changed, **weighting)
    share = weight_1 / (weight_1 + weight_0)
    return share if arm.loss.get("clamped") else share.logit()


@torch.no_grad()
def evaluate(network: nn.Module, arm: Arm, dataset: CacheDataset, classes: int, patch: tuple) -> list[dict[str, Any]]:
    """One row for each case and foreground class."""
    device = next(network.parameters()).device
    dice = DiceMetric(ignore_empty=False)
    distances = {"hd95": BratsHausdorffDistanceMetric(), "nsd": BratsSurfaceDiceMetric()}
    predict = network.eval().with_residual if arm.predicts else network.eval()
    inferer = SlidingWindowInferer(patch, sw_batch_size=4, overlap=0.5, mode="gaussian")
    rows = []
    for case in dataset:
        output = inferer(case["image"][None].as_tensor().to(device), predict)
        segmentation, residual = output if arm.predicts else (output, None)
        labels = (segmentation.argmax(1, keepdim=True).cpu(), case["label"][None].as_tensor())
        masks = [one_hot(label, num_classes=classes)[:, 1:] for label in labels]
        spacing = case["image"].pixdim.tolist()
        values = {"dice": dice(*masks)[0]}
        values |= {name: metric(*masks, spacing=spacing)[0] for name, metric in distances.items()}
        changes = [residual_mask(mask, spatial_axis=arm.axis) for mask in masks]
        values["residual_dice_of_segmentation"] = dice(*changes)[0]
        if residual is not None and "target" not in arm.loss:
            predicted = residual[:, 1 - classes :].cpu() > even_odds(arm, changes[1])  # of several axes, the last one
            values["residual_dice_predicted"] = dice(predicted.float(), changes[1])[0]
        for number in range(classes - 1):
            row = {"case": case["name"], "class": number + 1}
            rows.append(row | {name: round(value[number].item(), 5) for name, value in values.items()})
    return rows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="name of the experiment")
    parser.add_argument("--data", type=Path, required=True, help="folder with dataset.json")
    parser.add_argument("--folder", type=Path, default=Experiment.folder, help="folder of results and runs")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folds", type=int, nargs="+", default=[0])
    settings = parser.add_argument_group("settings of a new experiment")
    settings.add_argument("--size", choices=SIZES, default="cpu", help="of the networks and of the training")
    settings.add_argument("--iterations", type=int, help="default: those of the size")
    settings.add_argument("--batch", type=int, help="patches in a batch (default: those of the size)")
    settings.add_argument("--nnunet-folds", action="store_true", help="use the folds that nnU-Net makes")
    settings.add_argument("--cases", type=int, help="at most this number of cases for training and for validation")
    settings.add_argument("--spacing", type=float, nargs=3, help="voxel size for training and evaluation, in mm")
    settings.add_argument("--max-voxels", type=int, default=48 * 56 * 40, help="of a training patch, about")
    settings.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    parser.set_defaults(**(Experiment(options.name, options.folder).settings() or {}))
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    experiment = Experiment(options.name, options.folder)
    size = SIZES[options.size].copy()
    size |= {name: value for name in ("iterations", "batch") if (value := getattr(options, name))}
    data = read_decathlon(options.data, nnunet_folds=options.nnunet_folds)
    classes = len(data.classes)
    settings = {
        "data": options.data.resolve().name,
        "size": options.size,
        "device": torch.device(options.device).type,
        "iterations": size["iterations"],
        "batch": size["batch"],
        "cases": options.cases,
        "spacing": options.spacing,
        "max_voxels": options.max_voxels,
        "nnunet_folds": bool(data.folds),
    }
    experiment.check(settings, "the command line")
    prepare, spacing = preparation(options.spacing), options.spacing or data.spacing
    shape = [edge * old / new for edge, old, new in zip(data.shape, data.spacing, spacing, strict=True)]
    patch, strides = training_plan(shape, spacing, max_voxels=options.max_voxels, levels=len(size["channels"]))
    runs = [run for fold in options.folds for run in experiment.missing_runs(options.arms, fold, options.seeds)]
    print(f"training {Computation.on(options.device)}", flush=True)
    prepared_fold = None  # one fold at a time: the patches of a fold can fill the memory of the device
    for run in experiment.claimed(runs):
        name, fold, seed = run
        arm, title = ARMS[name], f"{name}, fold {fold}, seed {seed}"
        if fold != prepared_fold:
            training_set = validation_set = None
            training, validation = (cases[: options.cases] for cases in data.split(fold))
            if size.get("resident"):
                prepared = Dataset(training, Compose(prepare))
                training_set = ResidentPatches(prepared, patch, spacing, options.device)
            else:
                transforms = Compose(prepare + augmentation(patch, classes))
                training_set = CacheDataset(training, transforms, progress=False)
            validation_set = CacheDataset(validation, Compose(prepare), progress=False)
            prepared_fold = fold
        seed_everything(seed)
        network = build(arm, data.channels, classes, size, strides).to(options.device)
        about = {"arm": name, "fold": fold, "seed": seed, "parameters": sum(p.numel() for p in network.parameters())}
        about["multiply_adds"] = multiply_adds(network.train(), (1, data.channels, *patch))
        about |= train(network, arm, training_set, size, seed, title)
        rows = evaluate(network, arm, validation_set, classes, patch)
        experiment.write_run(run, settings, [about | row for row in rows])
        print(f"{title}: mean Dice {sum(row['dice'] for row in rows) / len(rows):.4f}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # the data or an argument: the message names the remedy
        sys.exit(f"error: {error}")
