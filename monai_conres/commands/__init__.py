"""Commands of ``python -m monai_conres``, one file for each command. The file's docstring is the command's help.

Each file defines ``add_arguments(parser)`` and ``run(options)``. ``run`` imports what only this command needs, and
raises ``ValueError`` for a mistake of the user.
"""

from __future__ import annotations

import argparse
import importlib
import os
import runpy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from monai_conres.files import TrainedNetwork

__all__ = ["add_network", "find_callable", "load_on_device", "say_unfitted"]


def find_callable(place: str) -> Callable[..., Any]:
    """The class or function at ``module:name`` or ``file.py:name``.

    Args:
        place: name of an installed module, or path of a Python file, then a colon and the name inside.

    Raises:
        ValueError: when there is no such module, file or name.

    Example:
        >>> find_callable("monai.networks.nets:SegResNet").__name__
        'SegResNet'
    """
    source, _, name = place.rpartition(":")
    try:
        names = runpy.run_path(source) if source.endswith(".py") else vars(importlib.import_module(source))
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(
            f"expected module:name or file.py:name, such as monai.networks.nets:SegResNet, got {place} ({error})."
        ) from error
    if not callable(names.get(name)):
        raise ValueError(f"expected a class or function in {source}, found no {name!r}; check the spelling.")
    return names[name]


def add_network(parser: argparse.ArgumentParser) -> None:
    """The arguments of :func:`load_on_device`."""
    parser.add_argument("--network", required=True, metavar="FOLDER", help="run folder with network.json and model.pt")
    parser.add_argument(
        "--backbone", metavar="PLACE", help="file.py:function that builds the backbone, if it is asked for"
    )
    parser.add_argument("--device", help="where the network computes (default: cuda if there is one)")


def load_on_device(folder: str | os.PathLike, backbone: str | None = None, device: Any = None) -> TrainedNetwork:
    """The network of a run folder on a device of torch; ``None``: on a GPU if there is one.

    Raises:
        ValueError: as :func:`~monai_conres.files.load_network`, and when there is no such device.
    """
    import torch

    from monai_conres.files import load_network

    trained = load_network(folder, backbone=find_callable(backbone) if backbone else None)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        trained.network.to(device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"expected a device of torch, such as cpu or cuda, got {device} ({error}).") from error
    return trained


def say_unfitted(trained: TrainedNetwork) -> None:
    """Print what to do for a network without weights of the completion."""
    if trained.chain is None:
        print(
            "The weights of the completion are not fitted to this network, which may cost accuracy. Once, with its "
            "training cases: python -m monai_conres fit-chain"
        )
