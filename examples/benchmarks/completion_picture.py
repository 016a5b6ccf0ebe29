"""Draw one case of completion.py: the drawn slice, the network, the completed volume and the reference.

    python examples/benchmarks/completion_picture.py sts_completion --data STS_MR_CT_PET --out docs/images

It takes the arm ``conres``, and of all cases the one with the median gain: the Dice of the slices that are not drawn,
completed from one slice, less that of the network. It writes ``completion.png``: the drawn slice, the first and the
last slice of the object, and slices between them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from ablation import SIZES
from completion import ARMS, CHAINS, FIT_CASES, Case, Completion, build, dice, evenly_spaced, fit, plan, predict
from completion_report import Results
from experiment import Experiment
from matplotlib.figure import Figure
from monai.data import Dataset
from monai.transforms import Compose

from monai_conres.bundle import read_decathlon
from monai_conres.visualize import COLORS, save_figure

COLUMNS = 7  # slices
ROWS = ("drawn slice", "network", "completed", "reference")


def median_case(results: Results, seed: int) -> tuple[int, str]:
    """Fold and name of the case with the median gain from one drawn slice."""
    both, network = (results.values(("conres", method), "even_1", [seed])[0] for method in ("both", "network"))
    gains = both - network
    order = [number for number in np.argsort(gains) if np.isfinite(gains[number])]
    return results.cases[order[len(order) // 2]]


def slices_to_show(label: torch.Tensor, drawn: int) -> list[int]:
    """The drawn slice, the first and the last slice of the object, and slices between them, evenly spaced."""
    inside = (label[0, 0] > 0).flatten(0, 1).any(0).nonzero()[:, 0].tolist()
    shown = np.linspace(inside[0], inside[-1], COLUMNS).round().astype(int)
    shown[np.abs(shown - drawn).argmin()] = drawn
    return sorted(set(shown.tolist()))


def panels(case: Case, completed: torch.Tensor, drawn: int) -> dict[str, np.ndarray]:
    """Label maps ``(d, h, w)`` of the rows."""
    only = torch.zeros_like(case.label)
    only[..., drawn] = case.label[..., drawn]
    labels = dict(zip(ROWS, (only, case.predicted, completed, case.label), strict=True))
    return {name: label[0, 0].numpy() for name, label in labels.items()}


def show(axes, image: np.ndarray, label: np.ndarray, window: tuple[float, float], aspect: float) -> None:
    """One slice with the outline of each class."""
    axes.imshow(image.T, cmap="gray", vmin=window[0], vmax=window[1], origin="lower", aspect=aspect)
    for number in np.unique(label[label > 0]):
        axes.contour(number == label.T, levels=[0.5], colors=COLORS[(int(number) - 1) % len(COLORS)], linewidths=1.4)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)


def strip(case: Case, rows: dict[str, np.ndarray], slices: Sequence[int], drawn: int) -> Figure:
    """Slices in columns; the drawn slice has a frame."""
    image = case.image[0, 0].numpy()
    window = tuple(np.percentile(image, (1, 99.7)))
    aspect = case.spacing[1] / case.spacing[0]
    height = aspect * image.shape[1] / image.shape[0]
    figure = Figure(figsize=(8, 8 * len(rows) / len(slices) * height + 0.3), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    grid = figure.subplots(len(rows), len(slices), squeeze=False)
    for line, (name, label) in zip(grid, rows.items(), strict=True):
        for axes, number in zip(line, slices, strict=True):
            show(axes, image[..., number], label[..., number], window, aspect)
            if number == drawn and name == ROWS[0]:
                for spine in axes.spines.values():
                    spine.set(visible=True, color="#F0E442", linewidth=2)
        line[0].set_ylabel(name, fontsize=9)
    for axes, number in zip(grid[0], slices, strict=True):
        axes.set_title(f"slice {number}" + (", drawn" if number == drawn else ""), fontsize=9)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="name of the experiment")
    parser.add_argument("--data", type=Path, required=True, help="folder with dataset.json")
    parser.add_argument("--folder", type=Path, default=Experiment.folder, help="folder of results and runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder for completion.png")
    options = parser.parse_args()
    experiment = Experiment(options.name, options.folder)
    settings = experiment.settings()
    if settings is None:
        raise ValueError(f"expected runs of completion.py in {experiment.runs}, got none.")
    data = read_decathlon(options.data)
    prepare, patch, strides = plan(data, settings)
    network = build(ARMS["conres"], data.channels, len(data.classes), SIZES[settings["size"]], strides)
    fold, name = median_case(Results.read(options.name, options.folder), options.seed)
    weights = experiment.run_file(("conres", fold, options.seed)).with_suffix(".pt")
    network.load_state_dict(torch.load(weights, map_location="cpu")["network"])
    training, validation = data.split(fold)
    training = training[:: max(1, len(training) // FIT_CASES)][:FIT_CASES]
    fit_set, cases = (Dataset(part, Compose(prepare)) for part in (training, validation))
    chain = fit(list(predict(network, fit_set, patch)), CHAINS["both"])
    case = next(case for case in predict(network, cases, patch) if case.name == name)
    slices, classes = evenly_spaced(case.label, 1), len(data.classes)
    completed = Completion(case, "both", chain)(slices)
    own, new = (np.nanmean(dice(x, case.label, classes, slices)) for x in (case.predicted, completed))
    print(f"{name}, fold {fold}: Dice {own:.3f}, completed {new:.3f}, slice {slices[0]} drawn")
    rows, shown = panels(case, completed, slices[0]), slices_to_show(case.label, slices[0])
    save_figure(strip(case, rows, shown, slices[0]), options.out / "completion.png", dpi=110)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:  # the data or an argument: the message names the remedy
        sys.exit(f"error: {error}")
