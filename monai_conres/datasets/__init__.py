"""Data sets read from their folders: what cases there are, checked, and split into training and validation."""

from monai_conres.datasets.brats import read_brats
from monai_conres.datasets.datalist import Datalist, check_voxels, load_volume, read_scans
from monai_conres.datasets.decathlon import DecathlonDatalist, read_decathlon, training_plan
from monai_conres.datasets.pancreas import LoadPancreasCTd, read_pancreas_ct

__all__ = [
    "Datalist",
    "DecathlonDatalist",
    "LoadPancreasCTd",
    "check_voxels",
    "load_volume",
    "read_brats",
    "read_decathlon",
    "read_pancreas_ct",
    "read_scans",
    "training_plan",
]
