"""Execute the notebooks of examples/notebooks and store their outputs in place.

python examples/execute_notebooks.py [NOTEBOOK ...]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from monai_conres.files import atomic_path

FOLDER = Path(__file__).parent / "notebooks"


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with new outputs. An error in a cell is raised."""
    notebook = nbformat.read(path, as_version=4)
    return NotebookClient(
        notebook,
        timeout=1800,
        record_timing=False,  # so that the same outputs give the same file
        coalesce_streams=True,
        resources={"metadata": {"path": str(FOLDER)}},
    ).execute()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(FOLDER.glob("*.ipynb")), metavar="NOTEBOOK")
    for path in parser.parse_args().notebooks:
        start = time.perf_counter()
        notebook = execute(path)
        with atomic_path(path) as temporary:
            nbformat.write(notebook, temporary)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s")
