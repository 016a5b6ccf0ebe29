"""nnU-Net's trainer with a context residual decoder attached to the network that it plans, for nnU-Net 2.8.

    export nnUNet_extTrainer=examples/nnunet
    nnUNetv2_train DATASET 3d_fullres 0 -tr nnUNetTrainerConRes
    nnUNetv2_predict -d DATASET -c 3d_fullres -f 0 -tr nnUNetTrainerConRes -i SCANS -o PREDICTIONS

Data, plans, augmentation, loss and inference are nnU-Net's; what is added is a residual mask for each channel of its
output, the background's among them, and their loss. The training loss that nnU-Net notes has both parts, the validation
loss its own alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from monai.networks import one_hot
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from monai_conres import ConResOutput, ContextResidualLoss, attach_conres

# nnU-Net's arrays have the axis of the thickest slices first
SPATIAL_AXIS = 0


class nnUNetTrainerConRes(nnUNetTrainer):
    """Trains what :func:`~monai_conres.attach_conres` makes of nnU-Net's network."""

    @staticmethod
    def build_network_architecture(
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Also called for inference, where of the labels no more than their number is known."""
        if len(configuration_manager.patch_size) != 3:
            raise ValueError("expected a 3D configuration, such as 3d_fullres, got 2D, which has no slices to compare.")
        network = nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )
        return attach_conres(network, num_input_channels, num_output_channels, spatial_axis=SPATIAL_AXIS)

    def _build_loss(self) -> nn.Module:
        if self.label_manager.has_ignore_label:
            raise ValueError("expected labels of all voxels, got some to be ignored, whose residual is not known.")
        return JointLoss(super()._build_loss(), to_onehot=not self.label_manager.has_regions)


class JointLoss(nn.Module):
    """nnU-Net's loss, and in training that of the residual masks."""

    def __init__(self, segmentation_loss: nn.Module, to_onehot: bool) -> None:
        super().__init__()
        self.segmentation_loss = segmentation_loss
        self.residual_loss = ContextResidualLoss(spatial_axis=SPATIAL_AXIS)
        self.to_onehot = to_onehot

    def forward(self, output: Any, target: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        if not isinstance(output, ConResOutput):  # in validation
            return self.segmentation_loss(output, target)
        label = target[0] if isinstance(target, list) else target  # of the full resolution
        if self.to_onehot:
            label = one_hot(label, num_classes=output.residuals[0].shape[1], dtype=torch.uint8)
        return self.segmentation_loss(output.segmentation, target) + self.residual_loss(output.residuals, label)
