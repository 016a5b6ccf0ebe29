"""Draw the pictures of README and documentation.

python docs/figures.py                        # the picture of a phantom
python docs/figures.py --sarcoma FOLDER       # also the picture of a real scan, of STS_MR_CT_PET
python docs/figures.py --hippocampus FOLDER   # also pictures of two networks that it trains; 12 minutes of CPU time

STS_MR_CT_PET is in the layout of the Medical Segmentation Decathlon and has the channels T1 MR, CT and PET. It is made
from the validation data of the Image Biomarker Standardisation Initiative. Those come from the collection
Soft-tissue-Sarcoma of The Cancer Imaging Archive (https://doi.org/10.7937/K9/TCIA.2015.7GO2GSKS, CC BY 3.0).
Task04_Hippocampus is part of the Medical Segmentation Decathlon (http://medicaldecathlon.com, CC BY-SA 4.0).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from matplotlib.figure import Figure
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
from monai_conres.bundle import read_decathlon
from monai_conres.phantom import CLASSES, tumor_phantom
from monai_conres.visualize import (
    COLORS,
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
NETWORKS = {"baseline": "none", "ConResNet": "attention"}


def phantoms() -> None:
    image, label = tumor_phantom((96, 112, 40), spacing=(1, 1, 3), seed=6)
    figure = plot_residuals(image[2], label, slices=5, class_names=CLASSES, spacing=(1, 1, 3))
    save_figure(figure, IMAGES / "residuals.png", dpi=100)


def sarcoma(folder: Path, case: str = "sts_001", slices: range = range(37, 42)) -> None:
    """Adjacent slices of one case: each channel with the outline of the tumor, and the residual mask."""
    scan = nib.load(folder / "imagesTr" / f"{case}.nii.gz")
    image = scan.get_fdata(dtype=np.float32)
    label = np.asarray(nib.load(folder / "labelsTr" / f"{case}.nii.gz").dataobj)
    residual = residual_mask(torch.from_numpy(label)[None, None])[0, 0].numpy()
    brightest_uptake = float(np.percentile(image[..., 2], 99.7))
    rows = {
        "T1 MR": (image[..., 0], (0, 900)),  # 1000 is the 99.9th percentile of the scan
        "CT": (image[..., 1], (-150, 200)),  # HU, soft tissue
        "PET": (image[..., 2], (0, brightest_uptake)),
        "residual mask": (residual, (0, 1)),
    }
    width, height, _ = np.multiply(scan.shape[:3], scan.header.get_zooms()[:3])  # mm
    place = {"extent": (0, width, 0, height), "origin": "lower"}
    figure = Figure(figsize=(8, 8 * len(rows) / len(slices) * height / width + 0.3), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    grid = figure.subplots(len(rows), len(slices))
    for axes, (name, (volume, (low, high))) in zip(grid, rows.items(), strict=True):
        axes[0].set_ylabel(name, fontsize=11)
        for panel, number in zip(axes, slices, strict=True):
            panel.imshow(volume[..., number].T, cmap="gray", vmin=low, vmax=high, interpolation="nearest", **place)
            if name != "residual mask":
                panel.contour(label[..., number].T, levels=[0.5], colors=COLORS[0], linewidths=1.5, **place)
            panel.set(xticks=[], yticks=[])
    for panel, number in zip(grid[0], slices, strict=True):
        panel.set_title(f"slice {number}", fontsize=11)
    save_figure(figure, IMAGES / "sarcoma.png", dpi=100)


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
    for title, context in NETWORKS.items():
        set_determinism(0)
        network = ConResNet(
            data.channels,
            len(data.classes),
            include_background=False,
            channels=(8, 16, 32),
            strides=(2, 2),
            blocks=(1, 1, 1, 1),
            context=context,
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
    """Train a network; return the segmentation loss of each iteration, which both networks have."""
    loss_function = ConResLoss(softmax=True)
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
    parser.add_argument("--sarcoma", type=Path, metavar="FOLDER", help="STS_MR_CT_PET, in the Decathlon's layout")
    parser.add_argument("--hippocampus", type=Path, metavar="FOLDER", help="Task04_Hippocampus of the Decathlon")
    parser.add_argument("--iterations", type=int, default=200, help="of training each network")
    arguments = parser.parse_args()
    phantoms()
    if arguments.sarcoma:
        sarcoma(arguments.sarcoma)
    if arguments.hippocampus:
        hippocampus(arguments.hippocampus, arguments.iterations)
