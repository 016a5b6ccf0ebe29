"""A trainer for nnU-Net v2, in a file of its own that nnU-Net finds; nothing else imports it.

nnU-Net looks for trainers in the folders of the environment variable ``nnUNet_extTrainer``. This prints the folder::

    python -m monai_conres nnunet-path
"""
