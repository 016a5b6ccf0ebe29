"""Draw one case of completion.py: the drawn slice, the network, the completed volume and the reference.

    python examples/benchmarks/completion_picture.py sts_completion --data STS_MR_CT_PET --fold 0 --out docs/images

It takes the network of the arm ``conres``, and of its validation cases the one with the median gain: the Dice of the
slices that are not drawn, completed from one slice, less that of the network. It writes ``completion.png``.
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
from experiment import Experiment
from matplotlib.figure import Figure
from monai.data import Dataset
from monai.transforms import Compose

from monai_conres.bundle import read_decathlon
from monai_conres.visualize import COLORS, save_figure

ROWS = ("drawn slice", "network", "completed", "reference")


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
    """Slices in columns; the column of the drawn slice has a frame."""
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
            if number == drawn:
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
    parser.add_argument("--fold", type=int, default=0)
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
    weights = experiment.run_file(("conres", options.fold, options.seed)).with_suffix(".pt")
    network.load_state_dict(torch.load(weights)["network"])
    training, validation = data.split(options.fold)
    training = training[:: max(1, len(training) // FIT_CASES)][:FIT_CASES]
    fit_set, cases = (Dataset(part, Compose(prepare)) for part in (training, validation))
    chain = fit(list(predict(network, fit_set, patch)), CHAINS["both"])
    results = []
    for case in predict(network, cases, patch):
        slices, classes = evenly_spaced(case.label, 1), len(data.classes)
        completed = Completion(case, "both", chain)(slices)
        own, new = (np.nanmean(dice(x, case.label, classes, slices)) for x in (case.predicted, completed))
        results.append((new - own, case, completed, slices[0], f"{case.name}: Dice {own:.3f}, completed {new:.3f}"))
    results.sort(key=lambda result: result[0])
    _, case, completed, drawn, text = results[len(results) // 2]
    print(f"{text}, slice {drawn} drawn")
    rows = panels(case, completed, drawn)
    inside = (case.label[0, 0] > 0).flatten(0, 1).any(0).nonzero()[:, 0]
    shown = sorted({*np.linspace(int(inside[0]), int(inside[-1]), 6).round().astype(int).tolist()[1:-1], drawn})
    save_figure(strip(case, rows, shown, drawn), options.out / "completion.png", dpi=110)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:  # the data or an argument: the message names the remedy
        sys.exit(f"error: {error}")
