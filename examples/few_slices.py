"""From a few drawn slices of each scan to finished volumes.

    python examples/few_slices.py                            # on phantoms: it keeps four slices of each
    python examples/few_slices.py --data FOLDER              # Medical Segmentation Decathlon layout
    python examples/few_slices.py --data FOLDER --rounds 2   # train again on the finished volumes

In the label maps, voxels without a label have the value 255 (``--ignore``). Drawn slices may lie along any axis, and
along several. The script trains a network on what is drawn, and completes each scan from its own drawn slices.
``demo/few_slices/completed`` gets the finished label maps. ``load_network("demo/few_slices/round1")`` builds the
network again, for other scans.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from monai.data import CacheDataset, DataLoader, MetaTensor
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

from monai_conres import ConResLoss, ConResNet, complete_mask, predict_with_residual
from monai_conres.bundle import read_decathlon, seed_everything, training_plan
from monai_conres.files import ScanSettings, atomic_path, check_writable, load_volume, save_network, write_label_map
from monai_conres.phantom import write_phantom_dataset
from monai_conres.scans import spacing_range

KEYS = ("image", "label")


def keep_few_slices(folder: Path, whole: Path, ignore: int) -> None:
    """Copy phantoms, with labels in two pairs of neighboring slices of each."""
    with atomic_path(folder) as temporary:  # an interrupted run leaves no whole labels
        shutil.copytree(whole, temporary)
        for file in sorted((temporary / "labelsTr").glob("*.nii.gz")):
            label = load_volume(file)
            size = label.shape[-1]
            drawn = [number for middle in (size // 4, 3 * size // 4) for number in (middle - 1, middle)]
            sparse = torch.full_like(label, ignore)
            sparse[..., drawn] = label[..., drawn]
            write_label_map(file, sparse, label)


def augmentations(patch: tuple[int, ...], classes: int, ignore: int) -> list:
    """The random transforms: patches around labelled voxels of each class. Padding has no label."""
    return [
        SpatialPadd("image", spatial_size=patch),
        SpatialPadd("label", spatial_size=patch, value=ignore),
        RandCropByLabelClassesd(KEYS, label_key="label", spatial_size=patch, num_classes=classes, warn=False),
        RandScaleIntensityd("image", factors=0.2, prob=0.5),
        RandShiftIntensityd("image", offsets=0.2, prob=0.5),
    ]


def train(network: ConResNet, cases: Sequence[dict], patch: tuple[int, ...], options: argparse.Namespace) -> None:
    """Train a network on the labelled voxels of prepared cases."""
    classes = network.arguments["out_channels"]
    dataset = CacheDataset(cases, Compose(augmentations(patch, classes, options.ignore)), progress=False)
    draws = RandomSampler(dataset, replacement=True, num_samples=options.iterations * options.batch_size)
    loss_function = ConResLoss(softmax=True, ignore_index=options.ignore)
    optimizer = torch.optim.Adam(network.parameters(), lr=options.learning_rate)
    schedule = PolynomialLR(optimizer, total_iters=options.iterations, power=0.9)
    network.train()
    for batch in tqdm(DataLoader(dataset, batch_size=options.batch_size, sampler=draws), desc="train"):
        image, label = (batch[key].as_tensor().to(options.device) for key in KEYS)
        loss = loss_function(network(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def complete(
    network: ConResNet, scans: ScanSettings, case: dict, options: argparse.Namespace
) -> tuple[torch.Tensor, torch.Tensor]:
    """Label maps ``(1, *spatial)`` of a prepared case: of the network, and completed from what is drawn."""
    image, drawn = case["image"].as_tensor()[None], case["label"].as_tensor()[None]
    inferer = scans.inferer(sw_batch_size=2)
    segmentation, residual = predict_with_residual(image.to(options.device), network.eval(), inferer)
    completed = complete_mask(
        segmentation.cpu(),
        residual.cpu(),
        drawn,
        slices=range(drawn.shape[-1]),  # a voxel is drawn unless it is ignored, in whichever slice it lies
        image=image,
        ignore_index=options.ignore,
    )
    return segmentation.argmax(1).cpu(), completed[0]


def dice(result: torch.Tensor, label: torch.Tensor, classes: int, where: torch.Tensor) -> float:
    """Mean Dice over the classes, of the voxels ``where``."""
    masks = [one_hot(torch.where(where, volume, 0)[None].long(), num_classes=classes) for volume in (result, label)]
    return compute_dice(*masks, include_background=False, ignore_empty=False).mean().item()


def main(options: argparse.Namespace) -> None:
    """Train on what is drawn, complete each scan, and repeat."""
    seed_everything(options.seed)
    whole = None
    if options.data is None:
        whole, options.data = options.out / "Task00_Phantom", options.out / "Task00_Drawn"
        if not options.data.exists():
            if not whole.exists():
                write_phantom_dataset(whole)
            keep_few_slices(options.data, whole, options.ignore)
    data = read_decathlon(options.data)
    classes = len(data.classes)
    files = data.cases[: options.cases]
    for folder in (options.out, options.out / "completed"):
        check_writable(folder, data.cases)
    data.check(files, ignore_index=options.ignore)
    patch, strides = training_plan(
        data.shape, data.spacing, max_voxels=options.max_voxels, levels=len(options.channels)
    )
    scans = ScanSettings(
        channels=data.modalities,
        patch_size=patch,
        classes=data.structures,
        activation="softmax",
        normalization=[{"name": "NormalizeIntensity", "nonzero": True, "channel_wise": True}],
        seen_spacing=spacing_range(files),  # other scans then give a warning
    )
    cases = list(CacheDataset(files, scans.preprocessing(label=True), progress=False))
    labels = [case["label"] for case in cases]  # what the next round learns from
    for number in range(1, options.rounds + 1):
        seed_everything(options.seed)
        network = ConResNet(
            data.channels,
            classes,
            include_background=False,
            channels=options.channels,
            strides=strides,
            blocks=(1,) * (len(options.channels) + 1),
        ).to(options.device)
        train(network, [{**case, "label": own} for case, own in zip(cases, labels, strict=True)], patch, options)
        notes = {"cases": [case["name"] for case in cases], "seed": options.seed, "round": number}
        save_network(options.out / f"round{number}", network, scans, training=notes)
        results = [complete(network, scans, case, options) for case in tqdm(cases, desc="complete")]
        labels = [completed for _, completed in results]
        if whole is not None:  # phantoms: the labels of all slices are known
            compare(cases, results, whole, scans, options.ignore)
    for case, completed in zip(cases, labels, strict=True):
        on_file = scans.to_scan(completed.float(), case["image"])
        write_label_map(options.out / "completed" / f"{case['name']}.nii.gz", on_file, on_file)
    print(f"{options.out / 'completed'} has the finished label maps of {len(cases)} scans.")


def compare(cases: Sequence[dict], results: Sequence, whole: Path, scans: ScanSettings, ignore: int) -> None:
    """Print the Dice of the voxels that are not drawn, for the network and for the completed scans."""
    prepare, scores = scans.preprocessing(label=True), []
    for case, labels in zip(cases, results, strict=True):
        files = {key: str(whole / f"{key}sTr" / f"{case['name']}.nii.gz") for key in KEYS}
        label: MetaTensor = prepare(files)["label"]
        where = case["label"].as_tensor() == ignore
        scores.append([dice(own, label.as_tensor(), scans.out_channels, where) for own in labels])
    network, completed = torch.tensor(scores).mean(0).tolist()
    print(f"Dice where nothing is drawn: network {network:.3f}, completed {completed:.3f}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with dataset.json; phantoms are made without one")
    parser.add_argument("--out", type=Path, default=Path("demo/few_slices"), help="folder for everything")
    parser.add_argument("--ignore", type=int, default=255, help="value of voxels without a label (default: 255)")
    parser.add_argument("--rounds", type=int, default=1, help="2: train again on the finished volumes")
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--channels", type=int, nargs="+", default=(8, 16, 32, 64), help="of each resolution")
    parser.add_argument("--max-voxels", type=int, default=48 * 56 * 40, help="of a training patch, roughly")
    parser.add_argument("--cases", type=int, help="use at most so many cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except ValueError as error:  # the data or an argument: the message says what to do
        sys.exit(f"error: {error}")
