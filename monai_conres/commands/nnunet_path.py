"""Print the folder of the trainer for nnU-Net, for the environment variable nnUNet_extTrainer.

export nnUNet_extTrainer=$(python -m monai_conres nnunet-path)
nnUNetv2_train DATASET 3d_fullres 0 -tr nnUNetTrainerConRes
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no options."""


def run(options: argparse.Namespace) -> None:
    import monai_conres.nnunet

    print(*monai_conres.nnunet.__path__)
