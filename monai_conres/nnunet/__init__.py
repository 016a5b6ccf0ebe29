"""A trainer for nnU-Net v2, in a file of its own that nnU-Net finds; nothing else imports it.

nnU-Net looks for trainers in the folders of the environment variable ``nnUNet_extTrainer``. This prints the folder::

    python -c "import monai_conres.nnunet as n; print(n.__path__[0])"
"""
