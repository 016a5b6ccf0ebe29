"""What the example bundles are made of: data sets, seeded training, trained networks and their scores."""

from monai_conres.bundle.brats import read_brats
from monai_conres.bundle.datalist import Datalist, check_voxels, read_folders, read_scans
from monai_conres.bundle.decathlon import DecathlonDatalist, read_decathlon, training_plan
from monai_conres.bundle.errors import explain_errors
from monai_conres.bundle.networks import (
    MeanProbability,
    ProbabilityInferer,
    held_out_cases,
    load_networks,
    run_folders,
    same_classes,
    save_torchscript,
    stored_network,
    stored_scans,
)
from monai_conres.bundle.pancreas import LoadPancreasCTd, read_pancreas_ct
from monai_conres.bundle.report import CaseReport, join_reports, summarize
from monai_conres.bundle.sparse import IgnoredToZerod, ZeroToIgnoredd, describe_labelled, labelled_slices
from monai_conres.bundle.structures import LabelToTargetd, ProbabilityToLabeld, foreground_or_all
from monai_conres.bundle.training import (
    Computation,
    EpochSeeds,
    LossCurve,
    SeededDataset,
    TrainingCheckpoint,
    finalize_processes,
    number_of_epochs,
    seed_everything,
    share_of_batch,
    share_of_cases,
    start_processes,
    whole_number,
)

__all__ = [
    "CaseReport",
    "Computation",
    "Datalist",
    "DecathlonDatalist",
    "EpochSeeds",
    "IgnoredToZerod",
    "LabelToTargetd",
    "LoadPancreasCTd",
    "LossCurve",
    "MeanProbability",
    "ProbabilityInferer",
    "ProbabilityToLabeld",
    "SeededDataset",
    "TrainingCheckpoint",
    "ZeroToIgnoredd",
    "check_voxels",
    "describe_labelled",
    "explain_errors",
    "finalize_processes",
    "foreground_or_all",
    "held_out_cases",
    "join_reports",
    "labelled_slices",
    "load_networks",
    "number_of_epochs",
    "read_brats",
    "read_decathlon",
    "read_folders",
    "read_pancreas_ct",
    "read_scans",
    "run_folders",
    "same_classes",
    "save_torchscript",
    "seed_everything",
    "share_of_batch",
    "share_of_cases",
    "start_processes",
    "stored_network",
    "stored_scans",
    "summarize",
    "training_plan",
    "whole_number",
]
