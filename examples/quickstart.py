"""Train the paper's baseline and ConResNet on the same data, compare them, and draw what they see.

    python examples/quickstart.py                    # on phantoms, which it makes itself
    python examples/quickstart.py --data FOLDER      # on any data set in Medical Segmentation Decathlon layout
    python examples/quickstart.py --data FOLDER --ignore 255    # voxels without a label have the value 255

The networks differ only in their argument ``context``. Both also complete a volume from one slice, taken from the
reference as if somebody had drawn it. For the baseline only the image tells where labels change. Each network is saved
with everything that prediction needs: ``load_network("demo/ConResNet")`` builds it again.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from monai.data import CacheDataset, DataLoader
from monai.metrics import compute_dice
from monai.networks import one_hot
from monai.transforms import (
    Compose,
    RandCropByLabelClassesd,
    RandScaleIntensityd,
    RandShiftIntensityd,
    SpatialPadd,
)
from torch.optim.lr_scheduler import PolynomialLR
from torch.utils.data import RandomSampler
from tqdm import tqdm

from monai_conres import (
    BratsHausdorffDistanceMetric,
    ConResLoss,
    ConResNet,
    complete_mask,
    predict_with_residual,
    residual_mask,
)
from monai_conres.bundle import Computation, read_decathlon, seed_everything, training_plan
from monai_conres.files import (
    ScanSettings,
    TrainedNetwork,
    atomic_path,
    check_writable,
    load_network,
    save_network,
    write_csv,
)
from monai_conres.phantom import write_phantom_dataset
from monai_conres.residual import known_residuals
from monai_conres.scans import spacing_range
from monai_conres.visualize import plot_slices, save_figure
from monai_conres.volumes import read_grid, voxel_sizes

CONTEXTS = {"baseline": "none", "ConResNet": "attention"}
KEYS = ("image", "label")


def augmentations(patch: tuple[int, ...], classes: int, ignore: int | None) -> list:
    """The random transforms of a training case. Patches lie around labelled voxels."""
    return [
        SpatialPadd("image", spatial_size=patch),
        SpatialPadd("label", spatial_size=patch, value=0 if ignore is None else ignore),
        RandCropByLabelClassesd(KEYS, label_key="label", spatial_size=patch, num_classes=classes),
        RandScaleIntensityd("image", factors=0.2, prob=0.5),
        RandShiftIntensityd("image", offsets=0.2, prob=0.5),
    ]


def train(network: ConResNet, dataset: CacheDataset, options: argparse.Namespace, title: str) -> float:
    """Train a network. Return the seconds that it took."""
    seed_everything(options.seed)  # every network sees the same patches in the same order
    draws = RandomSampler(dataset, replacement=True, num_samples=options.iterations * options.batch_size)
    loader = DataLoader(dataset, batch_size=options.batch_size, sampler=draws)
    loss_function = ConResLoss(softmax=True, ignore_index=options.ignore)
    optimizer = torch.optim.Adam(network.parameters(), lr=options.learning_rate)
    schedule = PolynomialLR(optimizer, total_iters=options.iterations, power=0.9)
    network.train()
    start = time.perf_counter()
    with tqdm(loader, desc=f"train {title}") as progress:
        for batch in progress:
            image, label = (batch[key].to(options.device) for key in KEYS)
            with Computation.on(options.device).autocast():
                loss = loss_function(network(image), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.set_postfix(loss=f"{loss.item():.3f}")
    return time.perf_counter() - start


@torch.no_grad()
def predict(trained: TrainedNetwork, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits of the segmentation of one case, and of its residual masks; the baseline predicts none."""
    network, inferer = trained.network, trained.scans.inferer(sw_batch_size=2)
    if network.arguments["context"] == "none":
        return inferer(image[None], network)[0].cpu(), None
    segmentation, residual = predict_with_residual(image[None], network, inferer)
    return segmentation[0].cpu(), residual[0].cpu()


def is_labelled(label: torch.Tensor, ignore: int | None) -> torch.Tensor:
    return torch.ones_like(label, dtype=torch.bool) if ignore is None else label != ignore


def complete(
    logits: tuple[torch.Tensor, torch.Tensor | None], image: torch.Tensor, label: torch.Tensor, ignore: int | None
) -> tuple[torch.Tensor, int]:
    """The label map that one drawn slice gives, and the number of that slice: the one with the largest structures."""
    number = int(((label > 0) & is_labelled(label, ignore)).flatten(0, -2).sum(0).argmax())
    drawn = torch.zeros_like(label)
    drawn[..., number] = label[..., number]
    segmentation, residual = (None if part is None else part[None] for part in logits)
    completed = complete_mask(
        segmentation, residual, drawn[None], slices=[number], image=image[None], softmax=True, ignore_index=ignore
    )
    return completed[0], number


def mean_dice(one: torch.Tensor, other: torch.Tensor, counted: torch.Tensor) -> float:
    """Mean Dice over the channels. It is NaN where no voxel counts."""
    return compute_dice(one, other, ignore_empty=False).mean().item() if counted.any() else float("nan")


def evaluate(trained: TrainedNetwork, dataset: CacheDataset, title: str, device: str, ignore: int | None) -> list[dict]:
    """One row of values for each case. Voxels without a label do not count."""
    names = list(trained.scans.classes)

    def channels(labels: torch.Tensor) -> torch.Tensor:
        return one_hot(labels[None], num_classes=len(names) + 1)[:, 1:]

    distance = BratsHausdorffDistanceMetric(ignore_index=ignore)
    rows = []
    for case in tqdm(dataset, desc=f"evaluate {title}"):
        image = case["image"].as_tensor().to(device)
        start = time.perf_counter()
        logits = predict(trained, image)
        row = {"network": title, "case": case["name"], "inference (s)": time.perf_counter() - start}
        predicted, residual = trained.scans.to_labels(logits[0]), logits[1]
        label = case["label"].as_tensor()
        labelled = is_labelled(label, ignore)
        masks = [channels(part.where(labelled, 0)) for part in (predicted, label)]
        reference = masks[1] if ignore is None else masks[1].masked_fill(~labelled, ignore)
        for name, value in zip(names, compute_dice(*masks, ignore_empty=False)[0], strict=True):
            row[f"Dice {name}"] = value.item()
        spacing = voxel_sizes(case["image"])
        for name, value in zip(names, distance(masks[0], reference, spacing=spacing)[0], strict=True):
            row[f"HD95 {name} (mm)"] = value.item()
        # how well the changes from slice to slice are known, from the segmentation and from the residual decoder
        is_known = known_residuals(labelled[None])
        changes = [residual_mask(mask) * is_known for mask in masks]
        row["Dice of residual masks (of the segmentation)"] = mean_dice(*changes, is_known)
        if residual is not None:
            # the loss gives a changed voxel about 4 times the weight of another: at 4 / (4 + 1) the odds are even
            found = (residual[None].sigmoid() > 0.8).float() * is_known
            row["Dice of residual masks (predicted)"] = mean_dice(found, changes[1], is_known)
        completed, number = complete(logits, image.cpu(), label, ignore)
        others = torch.arange(label.shape[-1]) != number
        for name, labels in (("network", predicted), ("completed from it", completed)):
            pair = [channels(part.where(labelled, 0)[..., others]) for part in (labels, label)]
            row[f"Dice outside of one drawn slice ({name})"] = mean_dice(*pair, labelled[..., others])
        rows.append(row)
    return rows


def table(rows: list[dict], totals: dict[str, dict]) -> str:
    """Means over the cases in Markdown, one column for each network."""
    values = {name: dict(totals[name]) for name in totals}
    for name in totals:
        own = [row for row in rows if row["network"] == name]
        for key in [key for key in own[0] if key not in ("network", "case")]:
            known = [row[key] for row in own if row[key] == row[key]]  # leaves out NaN
            values[name][key] = f"{sum(known) / len(known):.3f}" if known else "-"
    names = list(totals)
    keys = sorted({key for name in names for key in values[name]}, key=list(values[names[-1]]).index)
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    lines += [f"| {key} | {' | '.join(str(values[name].get(key, '-')) for name in names)} |" for key in keys]
    return "\n".join(lines) + "\n"


def main(options: argparse.Namespace) -> None:
    """Read the data, train and evaluate each network, write everything."""
    if options.data is None:
        options.data = options.out / "Task00_Phantom"
        if not options.data.exists():
            write_phantom_dataset(options.data)
    data = read_decathlon(options.data)
    training, validation = (cases[: options.cases] for cases in data.split(seed=options.seed))
    check_writable(options.out, data.cases)
    data.check(training + validation, ignore_index=options.ignore)
    for case in validation:  # distances of a sheared scan are an error, which comes before the training here
        voxel_sizes(read_grid(case["image"]))
    patch, strides = training_plan(
        data.shape, data.spacing, max_voxels=options.max_voxels, levels=len(options.channels)
    )
    print(f"{len(training)} training and {len(validation)} validation cases, patch {patch}, strides {strides}")
    print(f"training {Computation.on(options.device)}")
    scans = ScanSettings(
        channels=data.modalities,
        patch_size=patch,
        classes=data.structures,
        activation="softmax",
        orientation="RAS",  # the last axis then counts axial slices: spatial_axis=-1
        normalization=[{"name": "NormalizeIntensity", "nonzero": True, "channel_wise": True}],
        seen_spacing=spacing_range(training),  # other scans then give a warning
    )
    prepare = scans.preprocessing(label=True)
    augmented = Compose([*prepare.transforms, *augmentations(patch, len(data.classes), options.ignore)])
    training_set = CacheDataset(training, augmented, progress=False)
    validation_set = CacheDataset(validation, prepare, progress=False)

    networks, rows, totals = {}, [], {}
    for title, context in CONTEXTS.items():
        seed_everything(options.seed)
        network = ConResNet(
            data.channels,
            len(data.classes),
            include_background=False,  # the background has no residual
            channels=options.channels,
            strides=strides,
            blocks=(1,) * (len(options.channels) + 1),
            context=context,
        ).to(options.device)
        seconds = train(network, training_set, options, title)
        notes = {"cases": [case["name"] for case in training], "seed": options.seed, "iterations": options.iterations}
        save_network(options.out / title, network, scans, training=notes)
        networks[title] = load_network(options.out / title)
        networks[title].network.to(options.device)
        rows += evaluate(networks[title], validation_set, title, options.device, options.ignore)
        totals[title] = {
            "parameters": f"{sum(parameter.numel() for parameter in network.parameters()):,}",
            "training (s)": f"{seconds:.0f}",
        }

    write_csv(options.out / "cases.csv", rows)
    with atomic_path(options.out / "table.md") as temporary:
        temporary.write_text(table(rows, totals))
    for case in list(validation_set)[:2]:
        image, label = case["image"].as_tensor(), case["label"].as_tensor()
        logits = {title: predict(trained, image.to(options.device)) for title, trained in networks.items()}
        completed, number = complete(logits["ConResNet"], image, label, options.ignore)
        changed = residual_mask(label[None], num_classes=len(data.classes), ignore_index=options.ignore)[0]
        figure = plot_slices(
            case["image"],
            {"reference": label}
            | {title: scans.to_labels(segmentation) for title, (segmentation, _) in logits.items()}
            | {f"slice {number} drawn": completed},
            residuals={
                "residual": changed == 1,
                "residual, predicted": logits["ConResNet"][1].sigmoid(),
            },
            class_names=data.classes[1:],
            spacing=case["image"].pixdim.tolist(),
            ignore_index=options.ignore,
        )
        save_figure(figure, options.out / f"{case['name']}.png")
    print((options.out / "table.md").read_text())
    print(f"Pictures, networks and the table are in {options.out}")
    print("One seed and a short training: this shows that both networks learn, not which one is better.")
    case = validation[0]
    print(
        "Draw slices of a validation case yourself, in the browser:\n"
        f'  "{sys.executable}" -m monai_conres draw --network "{options.out / "ConResNet"}" "{case["image"]}" '
        f'--out "{options.out / "drawn" / case["name"]}.nii.gz"'
    )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with dataset.json; phantoms are made without one")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the results (default: demo)")
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--channels", type=int, nargs="+", default=(8, 16, 32, 64), help="of each resolution")
    parser.add_argument("--max-voxels", type=int, default=48 * 56 * 40, help="of a training patch, roughly")
    parser.add_argument("--cases", type=int, help="use at most so many cases for training and for validation")
    parser.add_argument("--ignore", type=int, help="value of voxels without a label, where only some slices are drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except ValueError as error:  # the data or an argument: the message says what to do
        sys.exit(f"error: {error}")
