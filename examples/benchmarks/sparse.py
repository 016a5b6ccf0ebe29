"""How many slices must be drawn? Train on scans in which only some slices have labels, evaluate on whole scans.

    python examples/benchmarks/sparse.py hippocampus_sparse --data Task04_Hippocampus --arms even10_chain pairs10_chain
    python examples/benchmarks/sparse_report.py hippocampus_sparse

The first argument names the experiment, as in ablation.py: runs that have a result are skipped, several commands can
run at the same time, and all arms of one seed draw their patches with the same random numbers. The weights of a run
stay next to its result.

An arm is LAYOUT, PERCENT and METHOD, such as pairs10_chain. Definitions, which were written before the first run:

- ``even``: single slices, evenly spaced over the scan. ``pairs``: as many slices, in evenly spaced pairs of neighbors.
  PERCENT of the slices are drawn, rounded to an even number, at least two. ``all100``: each slice.
- Voxels that are not drawn, and those that padding brings in, have no label. Patches lie around labelled voxels.
- ``partial``: cross entropy and Dice loss of the labelled voxels. ``residual``: and the residual loss. ``chain``: in
  the second half of the training also that loss for the marginals of the slice chain.
- ``second``: the network of ``chain`` completes each training scan from its own drawn slices, with the
  settings CHAIN, which are not fitted. A new network is trained on the completed scans as if they were drawn. ``long``
  is its control: ``chain`` with twice as many iterations.
- Dice of a case: for each class, of the plain prediction of a validation scan, all slices. Of a training scan: without
  its drawn slices.
- Primary endpoint: the Dice of the validation scans of ``residual``, ``chain`` and ``second`` less that of ``partial``.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ablation import batches
from completion import make_parser, plan, start
from monai.data import CacheDataset
from monai.inferers import SlidingWindowInferer
from monai.metrics import compute_dice
from monai.networks import one_hot
from monai.transforms import (
    Compose,
    RandCropByLabelClassesd,
    RandScaleIntensityd,
    RandShiftIntensityd,
    SpatialPadd,
    Transform,
)
from torch.optim.lr_scheduler import PolynomialLR
from tqdm import tqdm

from monai_conres import (
    ChainLoss,
    ChainSettings,
    ConResLoss,
    ConResNet,
    complete_mask,
    fit_chain,
    predict_with_residual,
    residual_mask,
)
from monai_conres.bundle import Computation, seed_everything
from monai_conres.files import atomic_path

IGNORE = 255
CHAIN = ChainSettings(tau=0.5)
KEYS = ("image", "label")
COLUMNS = (
    *("arm", "fold", "seed", "seconds", "labelled", "known", "set", "case", "class", "dice", "completed", "fitted"),
)
METHODS = ("partial", "residual", "chain", "second", "long")
ARMS = [f"{layout}{percent}_{m}" for percent in (5, 10, 25) for layout in ("even", "pairs") for m in METHODS]
ARMS += [f"all100_{method}" for method in METHODS[:3]]
FIT_CASES = 10
TRAINING_CASES = 40  # training scans whose completion is scored


@dataclass(frozen=True)
class Arm:
    """Which slices are drawn, and how a network learns from them."""

    layout: str
    percent: int
    method: str

    @classmethod
    def of(cls, name: str) -> Arm:
        layout, percent, method = re.fullmatch(r"([a-z]+)(\d+)_(\w+)", name).groups()  # type: ignore[union-attr]
        return cls(layout, int(percent), method)

    def slices(self, size: int) -> list[int]:
        """The drawn ones of ``size`` slices."""
        if self.layout == "all":
            return list(range(size))
        pairs = max(1, round(self.percent * size / 200))
        number = 2 * pairs if self.layout == "even" else pairs
        middles = [(2 * i + 1) * size // (2 * number) for i in range(number)]
        return middles if self.layout == "even" else [part for middle in middles for part in (middle - 1, middle)]


class DrawSlices(Transform):
    """Labels stay in the drawn slices of the last axis. The others have the value IGNORE."""

    def __init__(self, arm: Arm) -> None:
        self.arm = arm

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        label = torch.full_like(data["label"], IGNORE)
        slices = self.arm.slices(label.shape[-1])
        label[..., slices] = data["label"][..., slices]
        return {**data, "label": label}


def augmentation(patch: tuple, classes: int) -> list:
    """That of ablation.py, with padding that has no label."""
    return [
        SpatialPadd("image", spatial_size=patch),
        SpatialPadd("label", spatial_size=patch, value=IGNORE),
        RandCropByLabelClassesd(KEYS, label_key="label", spatial_size=patch, num_classes=classes, warn=False),
        RandScaleIntensityd("image", factors=0.2, prob=0.5),
        RandShiftIntensityd("image", offsets=0.2, prob=0.5),
    ]


def train(
    network: ConResNet, method: str, training: CacheDataset, size: dict[str, Any], seed: int, title: str
) -> float:
    """Train a network, and return the seconds."""
    seed_everything(seed)
    size = size | {"iterations": size["iterations"] * (2 if method == "long" else 1)}
    joint = ConResLoss(softmax=True, ignore_index=IGNORE, residual_weight=float(method != "partial"))
    through_chain = ChainLoss(joint.segmentation_loss, settings=CHAIN, ignore_index=IGNORE)
    optimizer = torch.optim.Adam(network.parameters(), lr=size["rate"])
    schedule = PolynomialLR(optimizer, total_iters=size["iterations"], power=0.9)
    device = next(network.parameters()).device
    computation = Computation.on(device)
    network.train()
    start = time.perf_counter()
    progress = tqdm(batches(training, size, seed), total=size["iterations"], desc=title, mininterval=10)
    for iteration, (image, label) in enumerate(progress):
        image, label = image.to(device), label.to(device)
        with computation.autocast():
            output = network(image)
            loss = joint(output, label)
            if method in ("chain", "long") and iteration >= size["iterations"] // 2:
                loss = loss + through_chain(output, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return round(time.perf_counter() - start, 1)


@torch.no_grad()
def predict(network: ConResNet, image: torch.Tensor, patch: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """Segmentation and residual ``(1, c, d, h, w)`` of a whole scan, on the CPU as in completion.py."""
    inferer = SlidingWindowInferer(patch, sw_batch_size=4, overlap=0.5, mode="gaussian")
    device = next(network.parameters()).device
    segmentation, residual = predict_with_residual(image[None].to(device), network.eval(), inferer)
    return segmentation.float().cpu(), residual.float().cpu()


def complete(
    outputs: tuple[torch.Tensor, torch.Tensor],
    image: torch.Tensor,
    label: torch.Tensor,
    slices: Sequence[int],
    settings: ChainSettings,
) -> torch.Tensor:
    """The label map ``(1, d, h, w)`` of a scan from its drawn slices."""
    return complete_mask(*outputs, label[None], slices=slices, image=image[None], settings=settings)[0]


def dice(result: torch.Tensor, label: torch.Tensor, classes: int, drawn: Sequence[int] = ()) -> list[float]:
    """Dice of each foreground class over all slices but the drawn ones; NaN for a class that is not there."""
    rest = [number for number in range(label.shape[-1]) if number not in set(drawn)]
    masks = [one_hot(volume[None][..., rest].long(), num_classes=classes)[:, 1:] for volume in (result, label)]
    return compute_dice(*masks)[0].tolist()


def evaluate(
    network: ConResNet, arm: Arm, training: CacheDataset, validation: CacheDataset, classes: int, patch: tuple
) -> list[dict[str, Any]]:
    """One row for each class of each validation scan, and of some training scans."""
    rows: list[dict[str, Any]] = []

    def add(group: str, name: str, **values: list[float]) -> None:
        for number in range(classes - 1):
            row = {"set": group, "case": name, "class": number + 1}
            rows.append(row | {key: round(value[number], 5) for key, value in values.items()})

    for case in validation:
        segmentation, _ = predict(network, case["image"].as_tensor(), patch)
        add("validation", case["name"], dice=dice(segmentation[0].argmax(0, keepdim=True), case["label"], classes))
    if arm.layout == "all":
        return rows
    fitted = fit(network, arm, training, patch)
    for case in list(training)[:TRAINING_CASES]:
        image, label = (case[key].as_tensor() for key in KEYS)
        slices, outputs = arm.slices(label.shape[-1]), predict(network, image, patch)
        results = {
            "dice": outputs[0][0].argmax(0, keepdim=True),
            "completed": complete(outputs, image, label, slices, CHAIN),
            "fitted": complete(outputs, image, label, slices, fitted),
        }
        add("training", case["name"], **{key: dice(own, label, classes, slices) for key, own in results.items()})
    return rows


def fit(network: ConResNet, arm: Arm, training: CacheDataset, patch: tuple) -> ChainSettings:
    """The weights of the chain, from the drawn slices of some training scans."""
    cases = []
    for case in list(training)[TRAINING_CASES:][:FIT_CASES] or list(training):
        image, drawn = case["image"].as_tensor(), DrawSlices(arm)(case)["label"].as_tensor()
        segmentation, residual = predict(network, image, patch)
        cases.append({"segmentation": segmentation, "residual": residual, "image": image[None], "label": drawn[None]})
    return fit_chain(cases, positions=256, ignore_index=IGNORE)


def shares(arm: Arm, dataset: CacheDataset) -> dict[str, float]:
    """The share of voxels that have a label, and of those with a known residual, without the first slices."""
    labels = [DrawSlices(arm)(case)["label"].as_tensor()[None] for case in list(dataset)[:TRAINING_CASES]]
    labelled = [(label != IGNORE).float().mean() for label in labels]
    known = [(residual_mask((label > 0).long().masked_fill(label == IGNORE, IGNORE), ignore_index=IGNORE) != IGNORE)
             [..., 1:].float().mean() for label in labels]  # fmt: skip
    return {
        "labelled": round(float(sum(labelled)) / len(labels), 4),
        "known": round(float(sum(known)) / len(labels), 4),
    }


def main() -> None:
    options, experiment, settings, size, data = start(make_parser(__doc__, ARMS, [0]), COLUMNS)
    classes = len(data.classes)
    prepare, patch, strides = plan(data, settings)

    def trained(name: str, fold: int, seed: int, whole: CacheDataset) -> dict[str, Any]:
        """Weights and seconds of a run, from its file or by training; ``whole`` are the training scans."""
        arm, file = Arm.of(name), experiment.run_file((name, fold, seed)).with_suffix(".pt")
        if file.exists():
            return torch.load(file, map_location=options.device)
        if arm.method == "second":
            first, run = build(seed), (name.replace("second", "chain"), fold, seed)
            with experiment.claim(run, wait_for=experiment.run_file(run).with_suffix(".pt")):
                first.load_state_dict(trained(*run, whole)["network"])
            drawn = [second_label(first, arm, case, patch) for case in tqdm(whole, desc=f"complete for {name}")]
        else:
            drawn = [DrawSlices(arm)(case) for case in whole]
        training = CacheDataset(drawn, Compose(augmentation(patch, classes)), progress=False)
        network = build(seed)
        seconds = train(network, arm.method, training, size, seed, f"{name}, fold {fold}, seed {seed}")
        saved = {"network": network.state_dict(), "seconds": seconds}
        with atomic_path(file) as temporary:
            torch.save(saved, temporary)
        return saved

    def build(seed: int) -> ConResNet:
        seed_everything(seed)
        structure = {"channels": size["channels"], "blocks": size["blocks"], "strides": strides}
        return ConResNet(data.channels, classes, include_background=False, **structure).to(options.device)

    for fold in options.folds:
        runs = experiment.missing_runs(options.arms, fold, options.seeds)
        if not runs:
            continue
        sets = [CacheDataset(cases[: options.cases], Compose(prepare), progress=False) for cases in data.split(fold)]
        for name, _, seed in experiment.claimed(runs):
            saved, arm = trained(name, fold, seed, sets[0]), Arm.of(name)
            network = build(seed)
            network.load_state_dict(saved["network"])
            rows = evaluate(network, arm, *sets, classes, patch)
            about = {"arm": name, "fold": fold, "seed": seed, "seconds": saved["seconds"], **shares(arm, sets[0])}
            experiment.write_run((name, fold, seed), settings, [about | row for row in rows])
            scores = [row["dice"] for row in rows if row["set"] == "validation" and row["dice"] == row["dice"]]
            print(f"{name}, fold {fold}, seed {seed}: mean Dice {sum(scores) / len(scores):.4f}", flush=True)


def second_label(network: ConResNet, arm: Arm, case: Mapping[str, Any], patch: tuple) -> dict[Hashable, Any]:
    """A training scan with the label that the network completes from its drawn slices."""
    image, label = (case[key].as_tensor() for key in KEYS)
    slices = arm.slices(label.shape[-1])
    finished = complete(predict(network, image, patch), image, label, slices, CHAIN)
    return {**case, "label": finished.to(label.dtype)}


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # the data or an argument: the message names the remedy
        sys.exit(f"error: {error}")
