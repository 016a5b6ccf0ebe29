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
    """The message of the error that others wrap, such as a ``RuntimeError`` of MONAI; nothing where none is wrapped.

    That is the first ``ValueError``, ``TypeError`` or ``OSError`` of the chain, also in the text of a loader's worker.
    Without one it is the innermost error, with its class.

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
    inner = error
    while not isinstance(inner, (ValueError, TypeError, OSError)):
        if type(inner) is RuntimeError and (
            found := re.findall(
                r"^(?:ValueError|TypeError|OSError): (.*?)(?:\n\n|\Z)", str(inner), re.DOTALL | re.MULTILINE
            )
        ):
            return found[-1].strip()  # the trace of a worker, as text
        if inner.__cause__ is None:
            return "" if inner is error else f"{type(inner).__name__}: {inner}"
        inner = inner.__cause__
    return "" if inner is error else str(inner)
