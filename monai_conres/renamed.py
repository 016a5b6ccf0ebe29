"""The names that version 0.2.0 changed, and the errors that tell their new spellings.

``RENAMED`` is the one table of old and new spellings. The changelog shows it, and a test compares both.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from typing import Any, NoReturn, TypeVar

__all__ = ["RENAMED"]

_RESIDUAL_CHANNELS = "include_background=False (out_channels - 1 residual masks) or True (out_channels)"
_CONTEXT = 'context="attention", "mapping" or "none"'
_WITH_RESIDUAL = "network.with_residual(image), to hand to an inferer: inferer(image, network.with_residual)"
_LABEL = "leave it out: the channels of output and label decide how the label is read"
_TRACED = "leave it out: attach_conres finds the number of output channels"
_BUNDLE = "monai_conres.bundle"

RENAMED = {
    "ConResNet(residual_channels=)": _RESIDUAL_CHANNELS,
    "ConResNet(mapping=)": _CONTEXT,
    "ConResNet(attention=)": _CONTEXT,
    "ConResNet(eval_residual=)": _WITH_RESIDUAL,
    "ConResNet.eval_residual": _WITH_RESIDUAL,
    "ConResNet.authors": "ConResNet.released",
    "ContextResidualModule(mapping=)": _CONTEXT,
    "ContextResidualModule(attention=)": _CONTEXT,
    "ConResDecoder(attention=)": 'context="attention" or "mapping"',
    "attach_conres(out_channels)": _TRACED,
    "attach_conres(out_channels=)": _TRACED,
    "attach_conres(residual_channels=)": _RESIDUAL_CHANNELS,
    "attach_conres(attention=)": 'context="attention" or "mapping"',
    "ConResWrapper.eval_residual": _WITH_RESIDUAL,
    "ConResLoss(to_onehot_y=)": _LABEL,
    "ContextResidualLoss(to_onehot_y=)": _LABEL,
    "ContextResidualLoss(include_background=)": _LABEL,
    "monai_conres.BratsDiceMetric": "monai.metrics.DiceMetric(ignore_empty=False)",
    "monai_conres.convert_authors_state_dict": "monai_conres.convert_released_state_dict",
    "monai_conres.authors": "monai_conres.released",
    "monai_conres.context": "monai_conres.decoder",
    "monai_conres.datasets": _BUNDLE,
    "monai_conres.evaluation": _BUNDLE,
    "monai_conres.structures": "monai_conres.scans and monai_conres.bundle",
    "monai_conres.training": _BUNDLE,
}

_Function = TypeVar("_Function", bound=Callable[..., Any])


def renamed(old: str) -> str:
    """The error message for an old spelling.

    Example:
        >>> renamed("ConResNet.authors")
        'ConResNet.authors is the spelling of version 0.1; use ConResNet.released.'
    """
    new = RENAMED[old]
    return f"{old} is the spelling of version 0.1; {new if new.startswith('leave') else f'use {new}'}."


def refuse_old_arguments(function: _Function) -> _Function:
    """Make a function or an ``__init__`` raise ``TypeError`` with the new spelling on an argument of version 0.1."""
    owner = function.__qualname__.removesuffix(".__init__")
    prefix = f"{owner}("
    keywords = {old: old[len(prefix) : -2] for old in RENAMED if old.startswith(prefix) and old.endswith("=)")}
    positional = sum(
        parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        for parameter in inspect.signature(function).parameters.values()
    )

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for old, name in keywords.items():
            if name in kwargs:
                raise TypeError(renamed(old))
        if len(args) > positional and f"{owner}(out_channels)" in RENAMED:
            raise TypeError(renamed(f"{owner}(out_channels)"))
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]


class OldAttribute:
    """An attribute of version 0.1: reading it from the class and setting it raise with the new spelling."""

    def __init__(self, old: str) -> None:
        self.old = old

    def __get__(self, instance: Any, owner: type) -> NoReturn:
        raise AttributeError(renamed(self.old))

    def __set__(self, instance: Any, value: Any) -> None:
        raise AttributeError(renamed(self.old))


class _OldModules(MetaPathFinder):
    """Asked last for a module or a name of the package that does not exist."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname in RENAMED:
            raise ImportError(renamed(fullname), name=fullname)


def refuse_old_modules() -> None:
    """Make imports of names and modules of version 0.1 raise ``ImportError`` with the new spelling."""
    if not any(isinstance(finder, _OldModules) for finder in sys.meta_path):
        sys.meta_path.append(_OldModules())
