"""Draw the pictures of README and documentation.

python docs/figures.py                        # those of phantoms
python docs/figures.py --hippocampus FOLDER   # and those of networks that it trains on Task04_Hippocampus, minutes
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from monai.data import CacheDataset, DataLoader
from monai.transforms import (
    Compose,
    EnsureTyped,
    LoadImaged,
    NormalizeIntensityd,
    Orientationd,
    RandSpatialCropd,
    SpatialPadd,
)
from monai.utils import set_determinism
from torch.utils.data import RandomSampler

from monai_conres import ConResLoss, ConResNet, residual_mask
from monai_conres.datasets import read_decathlon
from monai_conres.phantom import CLASSES, tumor_phantom
from monai_conres.visualize import (
    capture_features,
    plot_attention,
    plot_curves,
    plot_feature_residuals,
    plot_residuals,
    plot_slices,
    plot_stages,
    save_figure,
)

IMAGES = Path(__file__).parent / "images"
KEYS = ("image", "label")
PATCH = (40, 56, 40)
NETWORKS = {"baseline": {"mapping": False, "attention": False}, "ConResNet": {}}


def phantoms() -> None:
    image, label = tumor_phantom((96, 112, 40), spacing=(1, 1, 3), seed=6)
    figure = plot_residuals(image[2], label, slices=5, class_names=CLASSES, spacing=(1, 1, 3))
    save_figure(figure, IMAGES / "residuals.png", dpi=100)


def hippocampus(folder: Path, iterations: int) -> None:
    data = read_decathlon(folder)
    names = data.classes[1:]
    prepare = [
        LoadImaged(KEYS, ensure_channel_first=True),
        Orientationd(KEYS, axcodes="RAS", labels=None),
        NormalizeIntensityd("image", nonzero=True, channel_wise=True),
        EnsureTyped(KEYS, dtype=(torch.float32, torch.uint8), track_meta=False),
        SpatialPadd(KEYS, spatial_size=PATCH),
    ]
    training, validation = data.split()
    crop = RandSpatialCropd(KEYS, roi_size=PATCH, random_size=False)
    training_set = CacheDataset(training[:80], Compose([*prepare, crop]), progress=False)
    case = Compose(prepare)(validation[0])
    image, label = (case[key][:, : PATCH[0], : PATCH[1], : PATCH[2]] for key in KEYS)
    residual = residual_mask(label[None], num_classes=len(data.classes))[0]

    masks, stages, losses = {}, {}, {}
    for title, parts in NETWORKS.items():
        set_determinism(0)
        network = ConResNet(
            data.channels,
            len(data.classes),
            residual_channels=len(names),
            channels=(8, 16, 32),
            strides=(2, 2),
            blocks=(1, 1, 1, 1),
            **parts,
        )
        losses[title] = train(network, training_set, iterations)
        with torch.no_grad(), capture_features(network.eval()) as stages[title]:
            masks[title] = network(image[None]).argmax(1)[0]

    figures = {
        "slices": plot_slices(
            image,
            {"reference": label, **masks},
            residuals={"residual mask": residual},
            slices=2,
            surfaces=True,
            class_names=names,
            spacing=data.spacing,
        ),
        "features": plot_feature_residuals(image, stages["ConResNet"][-1], spacing=data.spacing),
        "attention": plot_attention(
            image, stages["ConResNet"][-1], residuals={"residual mask": residual}, slices=2, spacing=data.spacing
        ),
        "stages": plot_stages(image, stages, spacing=data.spacing),
        "curves": plot_curves(losses, window=min(10, iterations), name="segmentation loss"),
    }
    for name, figure in figures.items():
        save_figure(figure, IMAGES / f"hippocampus_{name}.png", dpi=100)


def train(network: ConResNet, dataset: CacheDataset, iterations: int) -> list[float]:
    """Train a network; its segmentation loss at each iteration, which baseline and ConResNet have in common."""
    loss_function = ConResLoss(softmax=True, to_onehot_y=True)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=iterations, power=0.9)
    draws = RandomSampler(dataset, replacement=True, num_samples=iterations)
    losses = []
    for batch in DataLoader(dataset, sampler=draws):
        output = network(batch["image"])
        loss = loss_function(output, batch["label"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            losses.append(loss_function(output.segmentation, batch["label"]).item())
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hippocampus", type=Path, metavar="FOLDER", help="Task04_Hippocampus of the Decathlon")
    parser.add_argument("--iterations", type=int, default=200, help="of training each network")
    arguments = parser.parse_args()
    phantoms()
    if arguments.hippocampus:
        hippocampus(arguments.hippocampus, arguments.iterations)
