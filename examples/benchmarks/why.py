"""Why does the residual decoder not improve the plain segmentation? Look inside the networks of completion.py.

    python examples/benchmarks/why.py hippocampus_completion --data Task04_Hippocampus
    python examples/benchmarks/why.py hippocampus_completion chaos_completion sts_completion

The first command looks into the networks of one experiment: the weights of the arm ``conres`` that completion.py left
in ``runs/NAME``, before, in the middle of and after the training. It writes one row for each network into
``results/NAME_why.csv``. The second command writes a table into ``results/why.md`` and a figure into
``docs/images/why.png``.

- Gradients at the encoder, means over training patches: the size of the residual loss's gradient over that of the
  segmentation loss's, and their cosine.
- Gates of the finest scale, on whole validation scans: their standard deviation over voxels (mean over channels) and
  between channels (of the means over voxels); the area under the ROC curve of the channels' mean gate for the residual
  mask of the label.
- Dice: of the network; with the mean of each gate in its place; of the chain with the residual masks of the label and
  no drawn slice, which is what perfect residuals would allow.
- Average precision for the residual masks of the label: of the residual decoder's logits, and of the change of the
  segmentation's probabilities from slice to slice. A score that says nothing has the share of changed voxels.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ablation import SIZES, augmentation
from common import write_table
from completion import ARMS, Case, build, dice, plan, predict
from completion_report import title
from experiment import Experiment
from matplotlib.figure import Figure
from monai.data import CacheDataset, Dataset
from monai.networks import one_hot
from monai.transforms import Compose

from monai_conres import ConResLoss, ConResNet, inter_slice_residual, residual_mask
from monai_conres.bundle import read_decathlon, seed_everything
from monai_conres.chain import best_labelling
from monai_conres.files import write_csv
from monai_conres.visualize import COLORS, save_figure

PATCHES = 8
CASES = 8  # of a fold, at most
# of the table; the rows also have the gradients at the start and in the middle of the training
COLUMNS = {
    "cosine_end": "gradients: cosine",
    "ratio_end": "size",
    "gate_voxels": "gates: spread over voxels",
    "gate_channels": "over channels",
    "gate_auroc": "AUROC",
    "dice": "Dice: network",
    "dice_mean_gates": "mean gates",
    "dice_true_residuals": "true residuals",
    "precision_decoder": "average precision for residual masks: decoder",
    "precision_segmentation": "segmentation",
    "changed": "share of changed voxels",
}


def gradients(network: ConResNet, patches: CacheDataset, seed: int) -> tuple[float, float]:
    """Cosine of the gradients of both losses at the encoder, and the size of the residual loss's over the other's."""
    seed_everything(seed)
    patches.transform.set_random_state(seed)
    loss = ConResLoss(softmax=True)
    network.train()
    weights = [*network.encoder.parameters(), *network.bottleneck.parameters()]
    cosines, ratios = [], []
    for number in range(PATCHES):
        patch = patches[number % len(patches)][0]
        label = patch["label"][None].as_tensor()
        output = network(patch["image"][None].as_tensor())
        parts = (loss.segmentation_loss(output.segmentation, label), loss.residual_loss(output.residuals, label))
        own, other = (
            torch.cat([g.flatten() for g in torch.autograd.grad(part, weights, retain_graph=True)]) for part in parts
        )
        cosines.append(torch.cosine_similarity(own, other, dim=0).item())
        ratios.append((other.norm() / own.norm()).item())
    return float(np.mean(cosines)), float(np.mean(ratios))


@contextmanager
def mean_gates(network: ConResNet) -> Iterator[None]:
    """Each gate of Eq. 6 becomes its mean over the voxels of its channel."""

    def attend(stage: Any) -> Any:
        return lambda features, residual: features * (1 + stage.gate(residual).mean((2, 3, 4), keepdim=True))

    stages = network.residual_decoder.stages
    for stage in stages:
        stage.attend = attend(stage)
    try:
        yield
    finally:
        for stage in stages:
            del stage.attend


@torch.no_grad()
def finest_gate(network: ConResNet, image: torch.Tensor) -> torch.Tensor:
    """The gate of Eq. 6 at full resolution, ``(channels, d, h, w)``, for a whole scan."""
    stage = network.eval().residual_decoder.stages[-1]
    gates: list[torch.Tensor] = []
    original = stage.attend
    stage.attend = lambda features, residual: (gates.append(stage.gate(residual)), original(features, residual))[1]
    try:
        network(image)
    finally:
        del stage.attend
    return gates[0][0]


def auroc(score: torch.Tensor, truth: torch.Tensor) -> float:
    """Area under the ROC curve: how often a voxel of ``truth`` has a larger score than another voxel."""
    ranks = torch.empty(score.numel(), dtype=torch.float64)
    ranks[score.flatten().argsort()] = torch.arange(1, score.numel() + 1, dtype=torch.float64)
    positive = truth.flatten() > 0
    number, rest = int(positive.sum()), int((~positive).sum())
    return float((ranks[positive].sum() - number * (number + 1) / 2) / (number * rest))


def average_precision(score: torch.Tensor, truth: torch.Tensor) -> float:
    """The mean precision at each voxel of ``truth``, from the largest score down. NaN without such a voxel."""
    positive = truth.flatten()[score.flatten().double().argsort(descending=True, stable=True)] > 0
    precision = positive.cumsum(0) / torch.arange(1, len(positive) + 1)
    return float(precision[positive].mean())


def with_true_residuals(case: Case, certainty: float = 20.0) -> torch.Tensor:
    """The most probable labelling of the chain whose residuals are those of the label."""
    masks = one_hot(case.label, num_classes=case.segmentation.shape[1])[:, 1:].float()
    return best_labelling(case.segmentation, certainty * (2 * residual_mask(masks) - 1))


def look_inside(network: ConResNet, cases: Dataset, patch: tuple) -> dict[str, float]:
    """Gates, Dice and residual masks of a trained network on validation cases, means over the cases."""
    values: dict[str, list[float]] = {name: [] for name in list(COLUMNS)[2:]}
    scans = list(predict(network, cases, patch))
    with mean_gates(network):
        constant = list(predict(network, cases, patch))
    for case, other in zip(scans, constant, strict=True):
        classes = case.segmentation.shape[1]
        gate = finest_gate(network, case.image)
        change = residual_mask(one_hot(case.label, num_classes=classes)[:, 1:].float())
        values["gate_voxels"].append(gate.flatten(1).std(1).mean().item())
        values["gate_channels"].append(gate.flatten(1).mean(1).std().item())
        values["gate_auroc"].append(auroc(gate.mean(0), change.amax((0, 1))))
        values["dice"].append(np.nanmean(dice(case.predicted, case.label, classes)))
        values["dice_mean_gates"].append(np.nanmean(dice(other.predicted, case.label, classes)))
        values["dice_true_residuals"].append(np.nanmean(dice(with_true_residuals(case), case.label, classes)))
        soft = inter_slice_residual(case.segmentation.softmax(1)[:, 1:])
        for name, scores in (("decoder", case.residual), ("segmentation", soft)):
            pairs = zip(scores[0], change[0], strict=True)  # of each class
            values[f"precision_{name}"].append(np.nanmean([average_precision(*pair) for pair in pairs]))
        values["changed"].append(change.mean().item())
    return {name: float(np.mean(numbers)) for name, numbers in values.items()}


def draw(networks: Mapping[str, Sequence[Mapping[str, str]]]) -> Figure:
    """Gradients over the training, gates, Dice and residual masks: means over the networks of each data set."""
    means = {
        title(name): {key: float(np.mean([float(row[key]) for row in rows])) for key in rows[0]}
        for name, rows in networks.items()
    }
    figure = Figure(figsize=(10, 3.1), layout="constrained")
    gradients, gates, dice, masks = figure.subplots(1, 4, width_ratios=(1.1, 1.1, 1, 0.8))
    for (name, values), color in zip(means.items(), COLORS, strict=False):
        for key, style in (("cosine", "o-"), ("ratio", "s:")):
            points = [values[f"{key}_{when}"] for when in ("start", "half", "end")]
            gradients.plot(
                ("start", "half", "end"), points, style, color=color, label=name if key == "cosine" else None
            )
    gradients.plot([], [], "o-", color="0.4", label="cosine")
    gradients.plot([], [], "s:", color="0.4", label="size: residual loss / segmentation loss")
    gradients.plot([], [], "k.", markersize=3, label="one network")
    gradients.set_title("gradients at the encoder", fontsize=9)
    gradients.set_ylabel("cosine, ratio of sizes", fontsize=8)
    gradients.set_ylim(-0.1, None)
    bars = {
        gates: ("gates at the finest scale", ("gate_voxels", "gate_channels", "gate_auroc")),
        dice: ("Dice, no drawn slice", ("dice_mean_gates", "dice", "dice_true_residuals")),
        masks: ("average precision, residual masks", ("precision_decoder", "precision_segmentation")),
    }
    words = {
        "gate_voxels": "spread over\nvoxels",
        "gate_channels": "spread over\nchannels",
        "gate_auroc": "AUROC for\ntrue mask",
        "dice_mean_gates": "mean\ngates",
        "dice": "network",
        "dice_true_residuals": "true\nresiduals",
        "precision_decoder": "decoder",
        "precision_segmentation": "change of\nsegmentation",
    }
    for axes, (text, keys) in bars.items():
        for number, ((name, rows), color) in enumerate(zip(networks.items(), COLORS, strict=False)):
            offsets = np.arange(len(keys)) + 0.26 * (number - (len(means) - 1) / 2)
            axes.bar(offsets, [means[title(name)][key] for key in keys], width=0.24, color=color)
            for offset, key in zip(offsets, keys, strict=True):
                axes.plot([offset] * len(rows), [float(row[key]) for row in rows], "k.", markersize=2)
        axes.set_title(text, fontsize=9)
        axes.set_xticks(range(len(keys)), [words[key] for key in keys])
    gates.plot((1.55, 2.45), (0.5, 0.5), color="0.4", linewidth=0.8, linestyle="--")
    gates.text(2.45, 0.51, "chance", fontsize=7, color="0.4", ha="right")
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=7.5)
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="names of the experiments of completion.py")
    parser.add_argument("--data", type=Path, help="folder with dataset.json, of one experiment")
    parser.add_argument("--folder", type=Path, default=Experiment.folder, help="folder of results and runs")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder for the figure")
    options = parser.parse_args()
    if options.data is not None:
        if len(options.names) > 1:
            raise ValueError(f"expected one experiment with --data, got {', '.join(options.names)}; call it for each.")
        measure(Experiment(options.names[0], options.folder), options.data)
        return
    rows, networks = [], {}
    for name in options.names:
        if not (file := table_file(options.folder, name)).is_file():
            raise ValueError(f"expected {file}; look into its networks first: why.py {name} --data FOLDER.")
        with file.open(newline="") as lines:
            networks[name] = list(csv.DictReader(lines))
        means = {text: f"{np.mean([float(row[key]) for row in networks[name]]):.3f}" for key, text in COLUMNS.items()}
        rows.append({"data": title(name), "networks": str(len(networks[name])), **means})
    print(write_table(options.folder / "results", "why", rows))
    save_figure(draw(networks), options.out / "why.png")


def table_file(folder: Path, name: str) -> Path:
    return folder / "results" / f"{name}_why.csv"


def measure(experiment: Experiment, folder: Path) -> None:
    """Write the rows of all networks of an experiment that do not have one yet."""
    settings = experiment.settings()
    if settings is None:
        raise ValueError(f"expected runs of completion.py in {experiment.runs}, got none.")
    data = read_decathlon(folder)
    prepare, patch, strides = plan(data, settings)
    file = table_file(experiment.folder, experiment.name)
    rows: list[dict[str, Any]] = []
    if file.exists():
        with file.open(newline="") as lines:
            rows = list(csv.DictReader(lines))
    known = {(int(row["fold"]), int(row["seed"])) for row in rows}
    for weights in sorted(experiment.runs.glob("conres_fold*.pt")):
        found = re.fullmatch(r"conres_fold(\d+)_seed(\d+)", weights.stem)
        if found is None or (key := (int(found[1]), int(found[2]))) in known:
            continue
        fold, seed = key
        training, validation = data.split(fold)
        patches = CacheDataset(
            training[:PATCHES], Compose(prepare + augmentation(patch, len(data.classes))), progress=False
        )
        seed_everything(seed)
        network = build(ARMS["conres"], data.channels, len(data.classes), SIZES[settings["size"]], strides)
        row: dict[str, Any] = {"fold": fold, "seed": seed}
        for when, states in (("start", None), ("half", weights.with_suffix(".half.pt")), ("end", weights)):
            if states is not None:
                network.load_state_dict(torch.load(states, map_location="cpu")["network"])
            cosine, ratio = gradients(network, patches, seed)
            row |= {f"cosine_{when}": cosine, f"ratio_{when}": ratio}
        row |= look_inside(network, Dataset(validation[:CASES], Compose(prepare)), patch)
        rows.append({name: f"{value:.4f}" if isinstance(value, float) else value for name, value in row.items()})
        write_csv(file, rows)
        print(rows[-1], flush=True)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # the data or an argument: the message names the remedy
        sys.exit(f"error: {error}")
