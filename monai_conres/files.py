"""Files and folders that are there complete, or not at all."""

from __future__ import annotations

import csv
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

__all__ = ["atomic_path", "check_writable", "find_files", "write_csv"]


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path to write a file or make a folder at; it gets its name when the block ends without an error.

    A file of that name is replaced, a folder of that name is an error. Folders on the way are made.

    Args:
        path: name of the file or folder.

    Raises:
        OSError: when ``path`` is a folder already and has something in it.

    Example:
        >>> folder = tempfile.mkdtemp()
        >>> with atomic_path(f"{folder}/table.md") as temporary:
        ...     _ = temporary.write_text("complete")
        >>> os.listdir(folder)
        ['table.md']
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        temporary = work / path.name  # the ending tells many writers the format
        yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(work)


def write_csv(path: str | os.PathLike, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows by the names of their columns, in the order in which they come; what a row lacks stays empty.

    Args:
        path: name of the file.
        rows: values by column.

    Example:
        >>> file = Path(tempfile.mkdtemp(), "cases.csv")
        >>> write_csv(file, [{"case": "a", "Dice": 0.5}, {"case": "b", "Dice": 0.75, "HD95": 2.0}])
        >>> file.read_text().split()
        ['case,Dice,HD95', 'a,0.5,', 'b,0.75,2.0']
    """
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def check_writable(folder: str | os.PathLike) -> None:
    """Make a folder, and see that files can be written to it, before hours of work end in an error.

    Args:
        folder: name of the folder.

    Raises:
        ValueError: when that is not possible.

    Example:
        >>> check_writable(tempfile.mkdtemp())
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=os.fspath(folder)) as file:
            file.write(b"1")
    except OSError as error:
        raise ValueError(f"expected a folder to write to, cannot write to {folder} ({error}).") from error


def find_files(folder: str | os.PathLike, pattern: str) -> list[Path]:
    """Files at any depth whose names match a pattern in lower case, sorted; the case of the names does not matter.

    Hidden files and folders, as some systems leave beside others, are passed over. Folders that are links are looked
    into, too, each folder once.

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "case").mkdir()
        >>> (folder / "case" / "scan.nii").touch()
        >>> [file.name for file in find_files(folder, "*.nii*")]
        ['scan.nii']
    """
    found: list[Path] = []
    seen: set[str] = set()
    for here, folders, names in os.walk(Path(folder), followlinks=True):
        if (real := os.path.realpath(here)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(here, name) for name in names if is_named(name, pattern)]
    return sorted(found)


def is_named(name: str, pattern: str) -> bool:
    """Whether the name of a file, which is not hidden, matches a pattern in lower case; its own case does not matter.

    Example:
        >>> is_named("SCAN.NII.GZ", "*.nii*"), is_named(".scan.nii", "*.nii*")
        (True, False)
    """
    return fnmatch(name.lower(), pattern) and not name.startswith(".")
