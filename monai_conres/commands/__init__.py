"""Commands of ``python -m monai_conres``, one file each. The file's docstring is the command's help.

Each file defines ``add_arguments(parser)`` and ``run(options)``. ``run`` imports what only this command needs, and
raises ``ValueError`` for what the user got wrong.
"""

from __future__ import annotations

import importlib
import runpy
from collections.abc import Callable
from typing import Any

__all__ = ["find_callable"]


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
