"""Does a variant of ConResNet segment better? Compare the arms of completion.py, defined in arms.py.

    python examples/benchmarks/completion.py sts_completion --data STS_MR_CT_PET --arms baseline conres weight_0 ...
    python examples/benchmarks/variants_report.py sts_completion hippocampus_completion chaos_completion

writes ``results/variants.md``: for each experiment a table with a row for each variant. It has the Dice of the plain
segmentation, the Dice of the slices that are not drawn after the variant's best chain has completed one drawn slice,
and paired differences with 95 % intervals (see completion_report.py). A difference is between the seeds and the best
chain that both have, so it is not the difference of two means in the table. With one seed its interval says nothing
about another training.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from arms import ARMS
from completion_report import Results, difference, mean, table, title
from experiment import Experiment

from monai_conres.files import atomic_path

# what a row is called, and the arms that it is compared with besides the baseline
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "baseline": ("baseline", ()),
    "conres": ("`ConResNet`", ()),
    "weight_0": ("weight of the residual loss 0", ("conres",)),
    "weight_01": ("weight 0.1", ("conres",)),
    "weight_03": ("weight 0.3", ("conres",)),
    "shared_gradient": ("weight by gradients", ("conres",)),
    "conres_chain": ("trained through the chain", ("conres_double",)),
    "conres_double": ("its control", ("conres",)),
    "logit_gate": ("gates from logits", ("conres",)),
    "image_difference": ("image change at the finest scale", ("conres",)),
    "in_plane": ("convolutions in plane", ("in_plane_convolution", "conres")),
    "in_plane_convolution": ("its control, one 1x1x3 convolution a scale", ("conres",)),
    "cascade": ("cascade", ("cascade_segmentation",)),
    "cascade_segmentation": ("its control, only the segmentation", ("conres",)),
    "dynunet_conres": ("DynUNet with decoder", ("dynunet",)),
    "dynunet": ("DynUNet", ("conres",)),
}
PLAIN, DRAWN = "even_0", "even_1"  # columns of completion.py
CHAINS = {"both": "residuals and image", "image": "image"}  # the best first


def chain(*arms: str) -> str:
    """The best chain that all ``arms`` have, or none."""
    return next((method for method in CHAINS if all(method in ARMS[arm].methods for arm in arms)), "")


def rows(results: Results) -> Iterator[Sequence[str]]:
    for arm, (name, references) in VARIANTS.items():
        way = arm, "network"
        seeds = results.seeds(way) if way in results.rows else []
        if not seeds:
            continue
        gained = difference(results, way, ("baseline", "network"), PLAIN) if arm != "baseline" else "-"
        found = [name, str(len(seeds)), mean(results, way, PLAIN), gained, mean(results, (arm, chain(arm)), DRAWN)]
        for reference in references or ("",):
            compared, plain, method, gain = "-", "-", "", "-"
            if reference and (reference, "network") in results.rows:
                compared = VARIANTS[reference][0].split(",")[0]
                plain = difference(results, way, (reference, "network"), PLAIN)
                if method := chain(arm, reference):
                    gain = difference(results, (arm, method), (reference, method), DRAWN)
            yield *found, compared, plain, CHAINS.get(method, "-"), gain
            found = [""] * len(found)


def report(experiments: Sequence[Results]) -> str:
    """A table for each experiment."""
    header = ["variant", "seeds", "Dice", "less baseline", "completed", "compared with", "Dice", "chain", "completed"]
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
