"""A trainer for nnU-Net v2, in a separate file that nnU-Net finds. No other module imports this file.

nnU-Net looks for trainers in the folders of the environment variable ``nnUNet_extTrainer``. This command prints the
folder::

    python -m monai_conres nnunet-path
"""
