"""The bundles of examples/bundles, with small networks."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from monai_conres import ConResNet
from monai_conres.files import save_network

ROOT = Path(__file__).parent.parent
BUNDLES = ROOT / "examples" / "bundles"
NAMES = ("brats_conresnet", "pancreas_ct_conresnet", "hippocampus_conresnet")
SMALL: dict[str, Any] = {"channels": (8, 16), "strides": (2,), "blocks": (1, 1, 1)}


def write_bundle(name: str, folder: Path) -> Path:
    """A copy of a bundle with a small network, as a training leaves it, in ``models``."""
    shutil.copytree(BUNDLES / name, folder / name)
    parser = ConfigParser()
    parser.read_config(folder / name / "configs" / "inference.yaml")
    scans = replace(parser.get_parsed_content("scans"), patch_size=(16, 16, 16))
    torch.manual_seed(0)
    include_background = scans.activation == "sigmoid"
    network = ConResNet(len(scans.channels), scans.out_channels, include_background=include_background, **SMALL)
    save_network(folder / name / "models", network, scans)
    return folder / name
