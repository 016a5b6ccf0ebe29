"""Does a variant of ConResNet segment better? Compare the arms of completion.py, defined in arms.py.

    python examples/benchmarks/completion.py sts_completion --data STS_MR_CT_PET --arms baseline conres weight_0 ...
    python examples/benchmarks/variants_report.py sts_completion

writes ``results/variants.md``: for each experiment a table with a row for each variant. It has the Dice of the plain
segmentation, the Dice of the slices that are not drawn after one drawn slice is completed, and paired differences with
95 % intervals (see completion_report.py). A difference is between the same seeds. With one seed its interval says
nothing about another training.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from arms import ARMS
from completion_report import Results, Way, difference, mean, table, title
from experiment import Experiment

from monai_conres.files import atomic_path

# what a row is called, and the arm that it is compared with besides the baseline
VARIANTS = {
    "baseline": ("baseline", ""),
    "conres": ("`ConResNet`", ""),
    "weight_0": ("weight of the residual loss 0", "conres"),
    "weight_01": ("weight 0.1", "conres"),
    "weight_03": ("weight 0.3", "conres"),
    "shared_gradient": ("weight by gradients", "conres"),
    "conres_chain": ("trained through the chain", "conres_double"),
    "conres_double": ("its control", "conres"),
    "logit_gate": ("gates from logits", "conres"),
    "image_difference": ("image change at the finest scale", "conres"),
    "in_plane": ("convolutions in plane", "in_plane_convolution"),
    "in_plane_convolution": ("its control, one 1x1x3 convolution a scale", "conres"),
    "cascade": ("cascade", "cascade_segmentation"),
    "cascade_segmentation": ("its control, only the segmentation", "conres"),
    "dynunet_conres": ("DynUNet with decoder", "dynunet"),
    "dynunet": ("DynUNet", "conres"),
}
PLAIN, DRAWN = "even_0", "even_1"  # columns of completion.py


def completed(arm: str) -> Way:
    """What completes a volume best with the network of an arm."""
    methods = ARMS[arm].methods
    return arm, "both" if "both" in methods else "image" if "image" in methods else ""


def rows(results: Results) -> Iterator[Sequence[str]]:
    for arm, (name, reference) in VARIANTS.items():
        way = arm, "network"
        seeds = results.seeds(way) if way in results.rows else []
        if not seeds:
            continue
        others = ["baseline" if arm != "baseline" else "", reference]
        plain = [difference(results, way, (other, "network"), PLAIN) if other else "-" for other in others]
        drawn = mean(results, completed(arm), DRAWN)
        gain = difference(results, completed(arm), completed(reference), DRAWN) if reference and drawn != "-" else "-"
        compared = VARIANTS[reference][0].split(",")[0] if reference else "-"
        yield name, str(len(seeds)), mean(results, way, PLAIN), plain[0], compared, plain[1], drawn, gain


def report(experiments: Sequence[Results]) -> str:
    """A table for each experiment."""
    header = ["variant", "seeds", "Dice", "less baseline", "reference", "less reference", "completed", "less reference"]
    parts = []
    for results in experiments:
        parts += [f"{title(results.name)}, {len(results.cases)} cases:\n", table(header, rows(results))]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="names of the experiments")
    parser.add_argument("--folder", type=Path, default=Experiment.folder, help="folder of results and runs")
    options = parser.parse_args()
    text = report([Results.read(name, options.folder) for name in options.names])
    print(text)
    with atomic_path(options.folder / "results" / "variants.md") as temporary:
        temporary.write_text(text)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # the message names the remedy
        sys.exit(f"error: {error}")
