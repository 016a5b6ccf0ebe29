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
    """A notebook with the outputs that it has now; an error in a cell is an error here."""
    notebook = nbformat.read(path, as_version=4)
    # without the times of day, so that a notebook which gives the same is the same file
    client = NotebookClient(
        notebook,
        timeout=1800,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(FOLDER)}},
    )
    return client.execute()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(FOLDER.glob("*.ipynb")), metavar="NOTEBOOK")
    for path in parser.parse_args().notebooks:
        start = time.perf_counter()
        notebook = execute(path)
        with atomic_path(path) as temporary:
            nbformat.write(notebook, temporary)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s")
