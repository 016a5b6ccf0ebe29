"""Fit the weights of the slice chain for a trained network, on its training cases, and store them with the network.

python -m monai_conres fit-chain --network run --images images --labels labels

For each label NAME.nii.gz in --labels, the image in --images is NAME.nii.gz, or NAME_0000.nii.gz, NAME_0001.nii.gz, ...
with one file for each channel. network.json names the training cases. Then complete and draw use the weights.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from monai_conres.commands import add_network, load_on_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_network(parser)
    parser.add_argument("--images", required=True, type=Path, metavar="FOLDER", help="NIfTI files of the scans")
    parser.add_argument("--labels", required=True, type=Path, metavar="FOLDER", help="their label maps")
    parser.add_argument("--ignore", type=int, metavar="VALUE", help="value of voxels without a label (default: none)")
    parser.add_argument("--cases", type=int, default=12, metavar="N", help="how many cases to use (default: 12)")


def run(options: argparse.Namespace) -> None:
    from monai_conres.bundle import read_folders

    fit_run(
        options.network,
        {case["name"]: case for case in read_folders(options.images, options.labels, {}).cases},
        number=options.cases,
        ignore=options.ignore,
        backbone=options.backbone,
        device=options.device,
    )


def fit_run(
    network: str | os.PathLike,
    cases: Mapping[str, Mapping[str, Any]],
    *,
    number: int = 12,
    ignore: int | None = None,
    backbone: str | None = None,
    device: Any = None,
) -> None:
    """What the command does, which the bundles' ``configs/fit_chain.yaml`` also does.

    Args:
        network: the run folder.
        cases: files of each case, ``image`` and ``label``, by its name, with or without the ending of a file. Only
            those count that ``network.json`` names as training cases; all, if it names none.
        number: how many of them to use, evenly spread.
        ignore: value of voxels without a label, where only some slices are drawn.
        backbone: ``file.py:function`` that builds the backbone, if ``network.json`` does not have it.
        device: where the network computes; ``None``: on a GPU if there is one.

    Raises:
        ValueError: when there is no training case, or a file of one is missing or wrong.
    """
    from monai_conres.completion import fit_completion
    from monai_conres.files import check_writable, path_text, save_chain, stem

    if number < 1:
        raise ValueError(f"expected 1 or more cases to use, got {number}.")
    network = path_text(network)
    trained = load_on_device(network, backbone, device)
    check_writable(network)
    names = trained.training.get("cases")
    training = {stem(Path(name)) for name in (cases if names is None else names)}
    chosen = [(name, case) for name, case in cases.items() if stem(Path(name)) in training]
    if not chosen:
        raise ValueError(
            f"expected files of the training cases in network.json, such as {sorted(training)[:3]}, got {len(cases)} "
            "others; give the folders of the training."
        )
    if names is None:
        print("network.json does not name its training cases, so all cases count. Do not score with these cases.")
    number = min(number, len(chosen))
    used = _announce([chosen[i * len(chosen) // number] for i in range(number)])
    settings = fit_completion(trained, used, ignore_index=ignore)
    save_chain(network, settings)
    print("\n".join(f"{name}: {value}" for name, value in asdict(settings).items()))
    print(f"Written to {Path(network, 'network.json')}")


def _announce(cases: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[Mapping[str, Any]]:
    """The cases, each one printed when it is taken."""
    for number, (name, case) in enumerate(cases, start=1):
        print(f"case {number} of {len(cases)}: {name}", flush=True)
        yield case
