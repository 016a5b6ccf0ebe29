"""Names that the examples in docstrings take for granted, and where the tests find real data."""

from __future__ import annotations

import os

# the tests run in one process for each core (pytest-xdist), and so do the programs that they start
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import numpy as np
import pytest
import torch

from monai_conres import layers


@pytest.fixture(autouse=True)
def _small_features_are_computed_again_as_large_ones(monkeypatch, request):
    """Tests take small images, and see what happens with large ones; those marked ``as_shipped`` do not."""
    if request.node.get_closest_marker("as_shipped") is None:
        monkeypatch.setattr(layers, "SMALL", 0)


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
