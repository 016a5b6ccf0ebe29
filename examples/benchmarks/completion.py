"""Does the residual decoder help to complete a volume from a few drawn slices? Train, fit the chain, and measure.

    python examples/benchmarks/completion.py hippocampus_completion --data Task04_Hippocampus --arms baseline conres
    python examples/benchmarks/completion_report.py hippocampus_completion chaos_completion sts_completion

The first argument names the experiment, as in ablation.py: runs that have a result are skipped, several commands can
run at the same time, and all arms of one seed see the same patches. The weights of a run stay next to its result. The
arms are in arms.py.

Definitions, which were written before the first run:

- Drawn slices are slices of the reference. Evenly spaced ones lie within the extent of the reference's foreground.
  All methods get the same ones.
- Dice of a case: for each class, over all slices that are not drawn, pooled; classes absent there are left out. Then
  the mean over the classes, then over the cases. HD95 and NSD are of the finished volume, with its drawn slices.
- "Slices until 0.90": the Dice of the finished volume, with its drawn slices, reaches 0.90. The first drawn slice has
  the largest predicted foreground, ``next_slice`` of the method picks the others. A case that does not reach it with
  half of its slices counts as all slices.
- The settings of the chain are fitted on training cases, one fit for each trained network and method, for all numbers
  of drawn slices.
- A cascade gets what the networks ``conres`` of the same seed predict, each scan by the network that was not trained
  on it. Those of training scans were trained on the validation scans, so a cascade may look better than it is.
- Primary endpoint: 1, 2 and 3 evenly spaced slices, ``both`` of the arm ``conres`` against methods without a residual
  decoder.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from ablation import SIZES, augmentation, batches, preparation
from arms import ARMS, FULL, Arm, Losses, build, first_half, has_residuals
from experiment import Experiment
from monai.data import CacheDataset, Dataset
from monai.inferers import SlidingWindowInferer
from monai.networks import one_hot
from monai.transforms import Compose, Transform
from monai.utils import convert_to_dst_type, optional_import
from scipy.ndimage import binary_dilation, binary_erosion, distance_transform_edt, shift
from torch.optim.lr_scheduler import PolynomialLR
from tqdm import tqdm

from monai_conres import (
    BratsHausdorffDistanceMetric,
    BratsSurfaceDiceMetric,
    ChainSettings,
    complete_mask,
    fit_chain,
    inter_slice_residual,
    next_slice,
    predict_with_residual,
    slice_marginals,
)
from monai_conres.bundle import Computation, DecathlonDatalist, read_decathlon, seed_everything, training_plan
from monai_conres.chain import potentials
from monai_conres.files import atomic_path

itk, has_itk = optional_import("itk")  # and itk-morphologicalcontourinterpolation
NUMBERS = (1, 2, 3, 5)  # of drawn slices
TARGETS = (0.90, 0.95)
FIT_CASES = 10
FOLDS = 5
COLUMNS = (
    *("arm", "fold", "seed", "seconds", "case", "method", "settings", "even_0"),
    *(f"{kind}_{number}" for kind in ("even", "next") for number in NUMBERS),
    *(f"{metric}_{number}" for metric in ("hd95", "nsd") for number in (1, 3)),
    *(f"until_{round(100 * target)}" for target in TARGETS),
    *("eroded_3", "dilated_3", "shifted_3", "slices", "completion_seconds"),
)


def train(
    network: nn.Module, arm: Arm, training: CacheDataset, size: dict[str, Any], seed: int, half: Path, title: str
) -> float:
    """Train a network, and return the seconds. A training with the state after the first half, ``half``, goes on."""
    seed_everything(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=size["rate"])
    schedule = PolynomialLR(optimizer, total_iters=size["iterations"], power=0.9)
    states = {"network": network, "optimizer": optimizer, "schedule": schedule}
    middle, losses = size["iterations"] // 2, Losses(arm, network)
    device = next(network.parameters()).device
    computation = Computation.on(device)
    begin = 0
    if half.exists():
        for name, state in torch.load(half, map_location=device).items():
            states[name].load_state_dict(state)
        begin = middle
    network.train()
    start = time.perf_counter()
    progress = tqdm(batches(training, size, seed), total=size["iterations"], desc=title, mininterval=10)
    for iteration, (image, label) in enumerate(progress):
        if iteration < begin:  # the patches of the first half were seen
            continue
        if iteration == middle and begin == 0 and not arm.second_half:
            with atomic_path(half) as temporary:
                torch.save({name: part.state_dict() for name, part in states.items()}, temporary)
        image, label = image.to(device), label.to(device)
        with computation.autocast():
            loss = losses(network(image), label, iteration >= middle)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return round(time.perf_counter() - start, 1)


# What completes a case. "residual" is the network's own head; "derived" is computed from its segmentation.
@dataclass(frozen=True)
class Method:
    """One way to complete a volume: the slice chain with some knowledge of where the mask changes."""

    residual: str = ""  # "own", "derived", or none
    image: bool = False


CHAINS = {
    "constant": Method(),
    "image": Method(image=True),
    "derived": Method("derived"),
    "residual": Method("own"),
    "both": Method("own", image=True),
}
INDEPENDENT = ChainSettings(tau=1.0, residual_scale=0.0, image_contrast=0.0, offset=0.0)  # no slice knows another one
LARGE = 400_000  # voxels that are too many for the random walker
# drawing slice by slice takes a completion for each slice: only with seed 0
DRAWN_ARMS = ("baseline", "conres")
UNTIL_CASES = 12  # of a fold, at most


@dataclass(frozen=True)
class Case:
    """A scan and what a network predicts for it: tensors ``(1, c, d, h, w)``, slices on the last axis."""

    name: str
    image: torch.Tensor
    label: torch.Tensor
    segmentation: torch.Tensor
    residual: torch.Tensor | None
    spacing: list[float]

    @property
    def slices(self) -> int:
        return self.label.shape[-1]

    @cached_property
    def predicted(self) -> torch.Tensor:
        """The label map of the network."""
        return self.segmentation.argmax(1, keepdim=True).to(self.label.dtype)

    def residual_for(self, method: Method) -> torch.Tensor:
        if method.residual == "own":
            assert self.residual is not None
            return self.residual
        p = self.segmentation.softmax(1)[:, 1:]
        return inter_slice_residual(p).logit(eps=1e-4) if method.residual else torch.zeros_like(p)


@torch.no_grad()
def predict(network: nn.Module, dataset: Dataset, patch: tuple) -> Iterator[Case]:
    """Segmentation and residual of whole scans, on the CPU: the chain of a small scan is many short steps."""
    device = next(network.parameters()).device
    inferer = SlidingWindowInferer(patch, sw_batch_size=4, overlap=0.5, mode="gaussian")
    network.eval()
    for case in dataset:
        image = case["image"][None].as_tensor()
        if not has_residuals(network):
            segmentation, residual = inferer(image.to(device), network).cpu(), None
        else:
            outputs = predict_with_residual(image.to(device), network, inferer, spatial_axis=-1)
            segmentation, residual = (output.float().cpu() for output in outputs)
        label = case["label"][None].as_tensor()
        yield Case(case["name"], image, label, segmentation.float(), residual, case["image"].pixdim.tolist())


def fit(cases: Sequence[Case], method: Method) -> ChainSettings:
    """Weights of the chain for a method, on training cases."""
    mappings = []
    for case in cases:
        mapping = {"segmentation": case.segmentation, "label": case.label}
        mapping |= {"residual": case.residual_for(method)} if method.residual else {}
        mapping |= {"image": case.image} if method.image else {}
        mappings.append(mapping)
    return fit_chain(mappings, positions=256)


def evenly_spaced(label: torch.Tensor, number: int) -> list[int]:
    """Slices within the extent of the foreground, ``number`` or as many as it has."""
    inside = (label > 0).flatten(0, -2).any(0).nonzero()[:, 0]
    low, size = int(inside[0]), int(inside[-1] - inside[0]) + 1
    return sorted({low + (2 * i + 1) * size // (2 * number) for i in range(number)})


def dice(result: torch.Tensor, reference: torch.Tensor, classes: int, drawn: Sequence[int] = ()) -> np.ndarray:
    """Dice of each foreground class over all slices but the drawn ones, NaN for a class that is absent there."""
    rest = [number for number in range(reference.shape[-1]) if number not in set(drawn)]
    masks = [one_hot(label[..., rest], num_classes=classes)[0, 1:].flatten(1).double() for label in (result, reference)]
    both, sizes = (masks[0] * masks[1]).sum(1), masks[0].sum(1) + masks[1].sum(1)
    return torch.where(masks[1].sum(1) > 0, 2 * both / sizes, torch.nan).numpy()


def paste(result: torch.Tensor, drawn: torch.Tensor, slices: Sequence[int]) -> torch.Tensor:
    finished = result.clone()
    finished[..., slices] = drawn[..., slices]
    return finished


def interpolate(case: Case, slices: Sequence[int]) -> torch.Tensor:
    """Signed distances, linear from one drawn slice to the next; the network before the first and after the last.

    A class that only one of two drawn slices has shrinks to nothing at the other one.
    """
    result, classes = case.predicted.clone(), case.segmentation.shape[1]
    masks = one_hot(case.label, num_classes=classes)[0, 1:].numpy() > 0
    for low, high in pairwise(slices):
        distances = []
        for mask in masks:
            pair = [_signed_distance(mask[..., number], case.spacing[:2]) for number in (low, high)]
            inside = [plane.max() for plane in pair if np.isfinite(plane).all()]
            distances.append([np.where(np.isfinite(plane), plane, -max(inside, default=1.0)) for plane in pair])
        for number in range(low + 1, high):
            share = (number - low) / (high - low)
            stack = np.stack([(1 - share) * first + share * second for first, second in distances])
            labels = np.where(stack.max(0) > 0, stack.argmax(0) + 1, 0)
            result[0, 0, ..., number] = torch.as_tensor(labels).to(result.dtype)
    return paste(result, case.label, slices)


def _signed_distance(mask: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Positive inside, in mm; infinite where the mask is empty."""
    if not mask.any():
        return np.full(mask.shape, -np.inf)
    outside = distance_transform_edt(~mask, sampling=spacing)
    return distance_transform_edt(mask, sampling=spacing) - outside


def interpolate_contours(case: Case, slices: Sequence[int]) -> torch.Tensor:
    """ITK's morphological contour interpolation; the network before the first drawn slice and after the last."""
    drawn = np.zeros(case.label.shape[2:], dtype=np.uint8)
    drawn[..., slices] = case.label[0, 0].numpy()[..., slices]
    result, inside = case.predicted.clone(), slice(slices[0], slices[-1] + 1)
    if len(slices) > 1:
        filled = itk.morphological_contour_interpolator(itk.image_from_array(drawn), axis=0)  # ITK counts from the last
        result[0, 0, ..., inside] = torch.as_tensor(itk.array_from_image(filled)[..., inside]).to(result.dtype)
    return paste(result, case.label, slices)


def walk(case: Case, slices: Sequence[int]) -> torch.Tensor:
    """scikit-image's random walker on the image, from the drawn slices as seeds, also beyond the outer ones."""
    from skimage.segmentation import random_walker

    seeds = np.zeros(case.label.shape[2:], dtype=np.int32)
    drawn = case.label[0, 0].numpy()
    seeds[..., slices] = drawn[..., slices] + 1
    image = np.moveaxis(case.image[0].numpy(), 0, -1).astype(np.float64)
    image = (image - image.min()) / (image.max() - image.min())
    labels = random_walker(image, seeds, mode="cg_j", spacing=case.spacing, channel_axis=-1) - 1
    return torch.as_tensor(labels)[None, None].to(case.label.dtype)


def changed(drawn: torch.Tensor, how: str, classes: int) -> torch.Tensor:
    """Slices that are drawn badly: each class eroded, dilated into the background, or shifted by a voxel in plane."""
    cross = np.zeros((3, 3, 1), dtype=bool)
    cross[1], cross[:, 1] = True, True
    label = drawn[0, 0].numpy()
    if how == "shifted":
        result = shift(label, (1, 0, 0), order=0)
    else:
        result = np.zeros_like(label)
        for number in range(1, classes):
            mask = label == number
            if how == "eroded":
                result[binary_erosion(mask, cross)] = number
            else:
                result[(binary_dilation(mask, cross) & (label == 0)) | mask] = number
    return torch.as_tensor(result)[None, None]


class Completion:
    """A method for one case."""

    def __init__(self, case: Case, name: str, settings: ChainSettings | None) -> None:
        self.case, self.name = case, name
        method = CHAINS.get(name, Method())
        self.chain: dict[str, Any] = {
            "segmentation": case.segmentation,
            "residual": case.residual_for(method),
            "image": case.image if method.image else None,
            "settings": settings or INDEPENDENT,
        }

    def __call__(self, slices: Sequence[int], drawn: torch.Tensor | None = None) -> torch.Tensor:
        """The finished volume, from slices of the reference or of another drawing."""
        drawn = self.case.label if drawn is None else drawn
        if self.name == "network":
            return paste(self.case.predicted, drawn, slices)
        if self.name == "interpolation":
            return interpolate(self.case, slices)
        if self.name == "contours":
            return interpolate_contours(self.case, slices)
        if self.name == "random_walker":
            return walk(self.case, slices)
        return complete_mask(drawn=drawn, slices=slices, **self.chain)

    def without_slices(self) -> torch.Tensor:
        """The chain as a decoder."""
        if self.name not in CHAINS:
            return self.case.predicted
        settings = vars(self.chain["settings"])
        unary, rho = potentials(self.case.segmentation, self.chain["residual"], self.chain["image"], -1, **settings)
        return slice_marginals(unary, rho).argmax(1, keepdim=True)

    def next(self, slices: Sequence[int]) -> int:
        """The slice that the method wants to be drawn next."""
        return next(iter(next_slice(drawn=self.case.label, slices=slices, **self.chain)[0]))


def text(values: np.ndarray | float) -> str:
    """The values of each class, in one cell of the table."""
    return " ".join(f"{value:.4f}" for value in np.atleast_1d(values))


def evaluate(
    network: nn.Module,
    methods: Sequence[str],
    fit_set: Dataset,
    cases: Dataset,
    patch: tuple,
    *,
    draw: bool,
    short: bool,
) -> list[dict[str, Any]]:
    """One row for each case and method; ``draw`` and ``short`` are those of :func:`measure`."""
    training = list(predict(network, fit_set, patch))
    methods = [name for name in methods if name != "contours" or has_itk]
    settings = {name: fit(training, CHAINS[name]) if name in CHAINS else None for name in methods}
    rows = []
    for number, case in enumerate(predict(network, cases, patch)):
        for name, weights in settings.items():
            if name == "random_walker" and (number >= UNTIL_CASES or case.label.numel() > LARGE):
                continue
            draws = draw and name in FULL and number < UNTIL_CASES
            row = measure(Completion(case, name, weights), case, draw=draws, short=short)
            if weights is not None:
                numbers = [weights.tau, weights.residual_scale, weights.image_contrast, *weights.offset]
                row["settings"] = " ".join(f"{value:.3f}" for value in numbers)
            rows.append({"case": case.name, "method": name, "slices": case.slices, **row})
    return rows


def measure(complete: Completion, case: Case, *, draw: bool, short: bool = False) -> dict[str, str]:
    """Everything about one case and method; ``draw`` also draws slice by slice, ``short`` is only the Dice."""
    classes = case.segmentation.shape[1]
    row = {}
    if complete.name in CHAINS or complete.name == "network":
        row["even_0"] = text(dice(complete.without_slices(), case.label, classes))
    for number in NUMBERS:
        slices = evenly_spaced(case.label, number)
        start = time.perf_counter()
        finished = complete(slices)
        if number == 1:
            row["completion_seconds"] = f"{time.perf_counter() - start:.3f}"
        row[f"even_{number}"] = text(dice(finished, case.label, classes, slices))
        if short:
            continue
        if number in (1, 3) and complete.name in FULL:
            masks = [one_hot(label, num_classes=classes)[:, 1:] for label in (finished, case.label)]
            for key, metric in (("hd95", BratsHausdorffDistanceMetric()), ("nsd", BratsSurfaceDiceMetric())):
                row[f"{key}_{number}"] = text(metric(*masks, spacing=case.spacing)[0].numpy())
        if number == 3 and complete.name in FULL:
            for how in ("eroded", "dilated", "shifted"):
                finished = complete(slices, changed(case.label, how, classes))
                row[f"{how}_3"] = text(dice(finished, case.label, classes, slices))
    if draw:
        row |= draw_slices(complete, case)
    return row


def draw_slices(complete: Completion, case: Case) -> dict[str, str]:
    """Draw slice by slice until the Dice of the finished volume reaches all targets, or half of the slices."""
    classes, row = case.segmentation.shape[1], {}
    slices = [int((case.predicted > 0).flatten(0, -2).sum(0).argmax())]
    targets = list(TARGETS)
    while True:
        finished = complete(sorted(slices))
        if len(slices) in NUMBERS:
            row[f"next_{len(slices)}"] = text(dice(finished, case.label, classes, slices))
        while targets and np.nanmean(dice(finished, case.label, classes)) >= targets[0]:
            row[f"until_{round(100 * targets.pop(0))}"] = str(len(slices))
        if (not targets and len(slices) >= max(NUMBERS)) or len(slices) >= case.slices // 2:
            break
        slices.append(complete.next(sorted(slices)))
    row |= {f"until_{round(100 * target)}": str(case.slices) for target in targets}
    return row


def make_parser(description: str | None, arms: Sequence[str], folds: Sequence[int]) -> argparse.ArgumentParser:
    """The command line of completion.py and sparse.py, with their arms and default folds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="name of the experiment")
    parser.add_argument("--data", type=Path, required=True, help="folder with dataset.json")
    parser.add_argument("--folder", type=Path, default=Experiment.folder, help="folder of results and runs")
    parser.add_argument("--arms", nargs="+", choices=arms, default=arms, metavar="ARM", help=", ".join(arms))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folds", type=int, nargs="+", default=folds)
    settings = parser.add_argument_group("settings of a new experiment")
    settings.add_argument("--size", choices=SIZES, default="cpu", help="of the networks")
    settings.add_argument("--iterations", type=int, help="default: those of the size")
    settings.add_argument("--batch", type=int, help="patches in a batch (default: those of the size)")
    settings.add_argument("--cases", type=int, help="at most this number of cases for training and for validation")
    settings.add_argument("--pixel", type=float, help="size of a pixel in mm; the slices stay the scan's own")
    settings.add_argument("--max-voxels", type=int, default=77000, help="of a training patch, about")
    settings.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def start(
    parser: argparse.ArgumentParser, columns: Sequence[str]
) -> tuple[argparse.Namespace, Experiment, dict[str, Any], dict[str, Any], DecathlonDatalist]:
    """Options, the experiment, its settings, the size of its networks and its data; settings of earlier runs stay."""
    options = parser.parse_args()
    parser.set_defaults(**(Experiment(options.name, options.folder).settings() or {}))
    options = parser.parse_args()
    experiment = Experiment(options.name, options.folder, columns)
    size = SIZES[options.size].copy()
    size |= {name: value for name in ("iterations", "batch") if (value := getattr(options, name))}
    data = read_decathlon(options.data)
    settings = {
        "data": options.data.resolve().name,
        "size": options.size,
        "device": torch.device(options.device).type,
        "iterations": size["iterations"],
        "batch": size["batch"],
        "cases": options.cases,
        "pixel": options.pixel,
        "max_voxels": options.max_voxels,
    }
    if getattr(options, "short", False):
        settings["short"] = True
    experiment.check(settings, "the command line")
    print(f"training {Computation.on(options.device)}", flush=True)
    return options, experiment, settings, size, data


def plan(data: DecathlonDatalist, settings: Mapping[str, Any]) -> tuple[list, tuple, tuple]:
    """Transforms that prepare a case, size of a patch, and strides of the networks of an experiment."""
    pixel, levels = settings["pixel"], len(SIZES[settings["size"]]["channels"])
    spacing = [pixel or data.spacing[0], pixel or data.spacing[1], data.spacing[2]]
    shape = [edge * old / new for edge, old, new in zip(data.shape, data.spacing, spacing, strict=True)]
    prepare = preparation((pixel, pixel, -1) if pixel else None)
    return prepare, *training_plan(shape, spacing, max_voxels=settings["max_voxels"], levels=levels)


class AddPredictions(Transform):
    """What the first network of a cascade predicted becomes further channels of the image: probabilities.

    Args:
        predictions: for each case of all folds, logits of ``segmentation`` and ``residual``.
        parts: the names of those that are wanted.
    """

    def __init__(self, predictions: Mapping[str, Mapping[str, torch.Tensor]], parts: Sequence[str]) -> None:
        self.predictions, self.parts = predictions, parts

    def __call__(self, case: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        logits = self.predictions[case["name"]]
        probabilities = {
            "segmentation": logits["segmentation"].softmax(0)[1:],
            "residual": logits["residual"].sigmoid(),
        }
        image = torch.cat([case["image"].as_tensor(), *(probabilities[part] for part in self.parts)])
        return {**case, "image": convert_to_dst_type(image, case["image"])[0]}


def first_predictions(
    experiment: Experiment, data: DecathlonDatalist, prepare: list, patch: tuple, build_first: Callable, seed: int
) -> dict[str, dict[str, torch.Tensor]]:
    """Logits of each scan, by the network ``conres`` of the fold that has the scan for validation."""
    predictions: dict[str, dict[str, torch.Tensor]] = {}
    for fold in range(FOLDS):
        file = experiment.run_file(("first", fold, seed)).with_suffix(".pt")
        weights = experiment.run_file(("conres", fold, seed)).with_suffix(".pt")
        with experiment.claim(("first", fold, seed), wait_for=file):
            if not file.exists():
                if not weights.exists():
                    raise ValueError(f"expected {weights}, for the cascade; run the arm conres of all folds first.")
                network = build_first()
                network.load_state_dict(torch.load(weights, map_location=next(network.parameters()).device)["network"])
                cases = predict(network, Dataset(data.split(fold)[1], Compose(prepare)), patch)
                logits = {
                    case.name: {"segmentation": case.segmentation[0].half(), "residual": case.residual[0].half()}
                    for case in cases
                }
                with atomic_path(file) as temporary:
                    torch.save(logits, temporary)
        for name, parts in torch.load(file).items():
            predictions[name] = {part: value.float() for part, value in parts.items()}
    return predictions


def main() -> None:
    parser = make_parser(__doc__, list(ARMS), range(FOLDS))
    parser.add_argument("--short", action="store_true", help=f"only Dice of evenly spaced slices, of {', '.join(FULL)}")
    options, experiment, settings, size, data = start(parser, COLUMNS)
    classes = len(data.classes)
    prepare, patch, strides = plan(data, settings)
    for fold in options.folds:
        runs = experiment.missing_runs(options.arms, fold, options.seeds)
        if not runs:
            continue
        training, validation = (cases[: options.cases] for cases in data.split(fold))
        fit_cases = training[:: max(1, len(training) // FIT_CASES)][:FIT_CASES]
        cached: tuple | None = None
        for name, _, seed in experiment.claimed(runs):
            arm, title = ARMS[name], f"{name}, fold {fold}, seed {seed}"

            def make(arm: Arm, seed: int = seed) -> nn.Module:
                seed_everything(seed)
                return build(arm, data.channels, classes, size, strides).to(options.device)

            read = list(prepare)
            if arm.cascade:
                first = first_predictions(experiment, data, prepare, patch, partial(make, ARMS["conres"]), seed)
                read.append(AddPredictions(first, arm.cascade))
            if cached != (key := (arm.cascade, seed) if arm.cascade else ()):
                training_set = CacheDataset(training, Compose(read + augmentation(patch, classes)), progress=False)
                cached = key
            fit_set, validation_set = (Dataset(cases, Compose(read)) for cases in (fit_cases, validation))
            network = make(arm)
            weights = experiment.run_file((name, fold, seed)).with_suffix(".pt")
            if weights.exists():
                saved = torch.load(weights, map_location=options.device)
                network.load_state_dict(saved["network"])
            else:
                half = experiment.run_file((first_half(arm), fold, seed)).with_suffix(".half.pt")
                seconds = train(network, arm, training_set, size, seed, half, title)
                saved = {"network": network.state_dict(), "seconds": seconds}
                with atomic_path(weights) as temporary:
                    torch.save(saved, temporary)
            draw = seed == 0 and name in DRAWN_ARMS and not options.short
            methods = [method for method in arm.methods if method in FULL or not options.short]
            rows = evaluate(network, methods, fit_set, validation_set, patch, draw=draw, short=options.short)
            about = {"arm": name, "fold": fold, "seed": seed, "seconds": saved["seconds"]}
            experiment.write_run((name, fold, seed), settings, [about | row for row in rows])
            scores = [float(value) for row in rows if row["method"] == "network" for value in row["even_0"].split()]
            print(f"{title}: mean Dice {np.nanmean(scores):.4f}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # the data or an argument: the message names the remedy
        sys.exit(f"error: {error}")
