"""Errors of a bundle in one line, below the trace of MONAI."""

from __future__ import annotations

import re
import sys
from types import TracebackType


def explain_errors() -> None:
    """Let a program that fails print :func:`cause_of` its error as the last line, after the trace.

    MONAI's configurations end with "Failed to evaluate ..." or "applying transform ...", a page below the error that
    says what to do.
    """
    sys.excepthook = _print_error


def _print_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.__excepthook__(kind, error, trace)
    if text := cause_of(error):
        print(f"\nerror: {text}", file=sys.stderr)


def cause_of(error: BaseException) -> str:
    """The message of the error that a ``RuntimeError`` of MONAI or of a loader's worker wraps; nothing without one.

    Example:
        >>> try:
        ...     try:
        ...         raise ValueError("expected a scan, got none.")
        ...     except ValueError as error:
        ...         raise RuntimeError("applying transform <LoadScand>") from error
        ... except RuntimeError as wrapped:
        ...     print(cause_of(wrapped))
        expected a scan, got none.
    """
    inner: BaseException | None = error
    while type(inner) is RuntimeError:
        if found := re.findall(
            r"^(?:ValueError|TypeError|OSError): (.*?)(?:\n\n|\Z)", str(inner), re.DOTALL | re.MULTILINE
        ):
            return found[-1].strip()  # the trace of a worker, as text
        inner = inner.__cause__
    return str(inner) if isinstance(inner, (ValueError, TypeError, OSError)) and inner is not error else ""
