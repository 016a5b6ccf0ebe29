"""Fit the weights of the slice chain for a trained network, on its training cases, and store them with the network.

python -m monai_conres fit-chain --network run --images images --labels labels

For each label NAME.nii.gz in --labels, the image in --images is NAME.nii.gz, or NAME_0000.nii.gz, NAME_0001.nii.gz, ...
with one file for each channel. network.json names the training cases. Then complete and draw use the weights.
"""

from __future__ import annotations

import argparse
import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from monai_conres.commands import add_network, load_on_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_network(parser)
    parser.add_argument("--images", required=True, type=Path, metavar="FOLDER", help="NIfTI files of the scans")
    parser.add_argument("--labels", required=True, type=Path, metavar="FOLDER", help="their label maps")
    parser.add_argument("--cases", type=int, default=12, metavar="N", help="how many cases to use (default: 12)")


def run(options: argparse.Namespace) -> None:
    from monai_conres.completion import fit_completion
    from monai_conres.files import check_writable, save_chain

    if options.cases < 1:
        raise ValueError(f"expected 1 or more for --cases, got {options.cases}.")
    trained = load_on_device(options.network, options.backbone, options.device)
    check_writable(options.network)
    cases = find_cases(options.images, options.labels, trained.training.get("cases"))
    if "cases" not in trained.training:
        print("network.json does not name its training cases, so all cases count. Do not score with these cases.")
    chosen = [cases[number * len(cases) // options.cases] for number in range(options.cases)]
    settings = fit_completion(trained, announce(dict(chosen)))
    save_chain(options.network, settings)
    print("\n".join(f"{name}: {value}" for name, value in asdict(settings).items()))
    print(f"Written to {Path(options.network, 'network.json')}")


def find_cases(images: Path, labels: Path, names: Sequence[str] | None) -> list[tuple[str, dict[str, Any]]]:
    """Names and files of the training cases.

    Args:
        images: folder with the images.
        labels: folder with the labels.
        names: the training cases, with or without the ending of the file; ``None`` takes all.

    Raises:
        ValueError: when there is no training case, or a case has no image.
    """
    from monai_conres.files import stem

    found = {stem(file): file for file in sorted(labels.glob("*.nii*")) if not file.name.startswith(".")}
    training = found if names is None else {stem(Path(name)) for name in names}
    cases = []
    for name in (name for name in found if name in training):
        files = [file for ending in (".nii.gz", ".nii") if (file := images / f"{name}{ending}").is_file()][:1]
        files = files or sorted(images.glob(f"{glob.escape(name)}_[0-9][0-9][0-9][0-9].nii*"))
        if not files:
            raise ValueError(
                f"expected the image of {found[name]} as {images}/{name}.nii.gz or {images}/{name}_0000.nii.gz, found "
                "none; rename the image, or take the label out."
            )
        cases.append((name, {"image": [str(file) for file in files], "label": str(found[name])}))
    if not cases:
        wanted = f", of the {len(training)} training cases in network.json, such as {min(training)}" if names else ""
        raise ValueError(f"expected label maps in {labels}{wanted}, found none; give the folder of the training.")
    return cases


def announce(cases: Mapping[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The cases, each one printed when it is taken."""
    for number, (name, files) in enumerate(cases.items(), start=1):
        print(f"case {number} of {len(cases)}: {name}", flush=True)
        yield files
