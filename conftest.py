"""Names that the examples in docstrings use without importing them, and the folder with real data."""

from __future__ import annotations

import os

# pytest-xdist starts one process for each core: one thread for each of them and for the programs that they start
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import numpy as np
import pytest
import torch

# importing these takes nnU-Net and Triton
collect_ignore_glob = ["monai_conres/nnunet/*.py", "monai_conres/kernels.py"]
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # tests/test_kernels.py


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    torch.manual_seed(0)
    doctest_namespace.update(np=np, torch=torch, nn=torch.nn)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """A folder with Decathlon data sets: the environment variable MONAI_CONRES_DATA, or ``../shared/data``."""
    folder = Path(os.environ.get("MONAI_CONRES_DATA", Path(__file__).parent.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real data here; set MONAI_CONRES_DATA to a folder with Task04_Hippocampus")
    return folder
