"""What the example bundles are made of: data sets, structures of a label, seeded training, evaluation."""

from monai_conres.bundle.brats import read_brats
from monai_conres.bundle.datalist import Datalist, check_voxels, load_volume, read_scans
from monai_conres.bundle.decathlon import DecathlonDatalist, read_decathlon, training_plan
from monai_conres.bundle.evaluation import (
    CaseReport,
    MeanProbability,
    join_reports,
    load_networks,
    save_torchscript,
    summarize,
)
from monai_conres.bundle.pancreas import LoadPancreasCTd, read_pancreas_ct
from monai_conres.bundle.structures import (
    LabelToTargetd,
    ProbabilityToLabeld,
    label_values,
    paint_structures,
    structure_masks,
)
from monai_conres.bundle.training import (
    EpochSeeds,
    LossCurve,
    SeededDataset,
    TrainingCheckpoint,
    finalize_processes,
    number_of_epochs,
    seed_everything,
    share_of_batch,
)

__all__ = [
    "CaseReport",
    "Datalist",
    "DecathlonDatalist",
    "EpochSeeds",
    "LabelToTargetd",
    "LoadPancreasCTd",
    "LossCurve",
    "MeanProbability",
    "ProbabilityToLabeld",
    "SeededDataset",
    "TrainingCheckpoint",
    "check_voxels",
    "finalize_processes",
    "join_reports",
    "label_values",
    "load_networks",
    "load_volume",
    "number_of_epochs",
    "paint_structures",
    "read_brats",
    "read_decathlon",
    "read_pancreas_ct",
    "read_scans",
    "save_torchscript",
    "seed_everything",
    "share_of_batch",
    "structure_masks",
    "summarize",
    "training_plan",
]
