"""nnU-Net's trainer with a context residual decoder attached to the network that nnU-Net plans, for nnU-Net 2.8.

    export nnUNet_extTrainer=$(python -m monai_conres nnunet-path)
    nnUNetv2_train DATASET 3d_fullres 0 -tr nnUNetTrainerConRes
    nnUNetv2_predict -d DATASET -c 3d_fullres -f 0 -tr nnUNetTrainerConRes -i SCANS -o PREDICTIONS

Data, plans, augmentation, segmentation loss and inference are nnU-Net's. The trainer adds a residual mask for each
foreground class or region, and the residual loss. nnU-Net logs the joint loss in training and only the segmentation
loss in validation. Voxels with nnU-Net's ignore label count in neither loss.

At the end of the training the folder of the fold also holds ``model.pt`` and ``network.json`` for
``monai_conres.files.load_network``. ``network.json`` describes nnU-Net's preprocessing with MONAI's transforms, which
do not crop, and resample linearly.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from nibabel.orientations import aff2axcodes
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from monai_conres import ConResOutput, ConResWrapper, ContextResidualLoss, attach_conres
from monai_conres.files import ScanSettings, save_network

SPATIAL_AXIS = 0  # nnU-Net puts the axis with the largest distance between voxels first
PLAN = "conres_include_background"  # key in plans.json, because inference does not know whether labels are regions
BACKBONES = ("PlainConvUNet", "ResidualEncoderUNet")


class nnUNetTrainerConRes(nnUNetTrainer):
    """Trains nnU-Net's network with a context residual decoder from :func:`~monai_conres.attach_conres`."""

    def initialize(self) -> None:
        self.plans_manager.plans[PLAN] = self.label_manager.has_regions  # regions have a sigmoid each
        super().initialize()

    @staticmethod
    def build_network_architecture(
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        if len(configuration_manager.patch_size) != 3:
            raise ValueError("expected a 3D configuration, such as 3d_fullres, got 2D, which has no slices to compare.")
        network = nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )
        include_background = plans_manager.plans.get(PLAN, True)  # version 0.1 had a mask for each output channel
        return attach_conres(
            network, num_input_channels, include_background=include_background, spatial_axis=SPATIAL_AXIS
        )

    def _build_loss(self) -> nn.Module:
        labels = self.label_manager
        return JointLoss(super()._build_loss(), ignore_label=labels.ignore_label, regions=labels.has_regions)

    @property
    def wrapper(self) -> ConResWrapper:
        """The network without what torch puts around it for compilation or several processes."""
        return next(module for module in self.network.modules() if isinstance(module, ConResWrapper))

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        decoder: Any = self.wrapper.backbone.get_submodule("decoder")
        decoder.deep_supervision = enabled

    def on_train_end(self) -> None:
        super().on_train_end()
        if self.local_rank == 0:
            try:
                self.save_network()
            except Exception as error:  # nnU-Net validates next
                self.print_to_log_file(f"nnU-Net has all its files, but network.json is not written: {error!r}")

    def save_network(self) -> None:
        """Write ``model.pt`` and ``network.json`` into the folder of the fold.

        Raises:
            ValueError: when MONAI's transforms cannot do this preprocessing.
        """
        configuration, labels = self.configuration_manager, self.label_manager
        cases = self.do_split()[0]
        values = {
            name: np.atleast_1d(value).tolist()
            for name, value in self.dataset_json["labels"].items()
            if value not in (0, [0]) and name != "ignore"
        }
        if not labels.has_regions:
            values = dict(sorted(values.items(), key=lambda item: item[1]))
        mirrored = self.inference_allowed_mirroring_axes or ()
        scans = ScanSettings(
            channels=tuple((self.dataset_json.get("channel_names") or self.dataset_json["modality"]).values()),
            patch_size=tuple(configuration.patch_size),
            classes=values,
            activation="sigmoid" if labels.has_regions else "softmax",
            orientation=self._orientation(cases[0]),
            spacing=tuple(configuration.spacing),
            normalization=(self._normalization(),),
            overlap=0.5,
            flip_axes=tuple(f for n in range(len(mirrored)) for f in itertools.combinations(mirrored, n + 1)),
        )
        name = configuration.network_arch_class_name.rpartition(".")[2]
        arguments = {
            **configuration.network_arch_init_kwargs,
            "input_channels": self.num_input_channels,
            "num_classes": labels.num_segmentation_heads,
            "deep_supervision": False,
        }
        save_network(
            self.output_folder,
            self.wrapper,
            scans,
            backbone=(f"monai_conres.nnunet.backbones.{name}", arguments) if name in BACKBONES else None,
            training={"cases": list(cases), "epochs": self.num_epochs},
        )

    def _orientation(self, case: str) -> str:
        """Directions of nnU-Net's array axes, as MONAI's ``Orientation`` names them, from one preprocessed case."""
        properties = self.dataset_class(self.preprocessed_dataset_folder, [case]).load_case(case)[-1]
        if "sitk_stuff" in properties:  # directions in LPS, row by row
            affine = np.eye(4)
            affine[:3, :3] = np.diag([-1, -1, 1]) @ np.reshape(properties["sitk_stuff"]["direction"], (3, 3))
        elif "nibabel_stuff" in properties:
            stuff = properties["nibabel_stuff"]
            affine = stuff.get("reoriented_affine", stuff["original_affine"])
        else:
            raise ValueError("expected medical images with a direction of each axis, got another file format.")
        codes = aff2axcodes(affine)[::-1]  # nnU-Net's arrays are (z, y, x)
        return "".join(codes[axis] for axis in self.plans_manager.transpose_forward)

    def _normalization(self) -> dict[str, Any]:
        """MONAI's transform for nnU-Net's normalization."""
        schemes = set(self.configuration_manager.normalization_schemes)
        masks = set(self.configuration_manager.use_mask_for_norm)
        if schemes == {"ZScoreNormalization"} and len(masks) == 1:
            return {"name": "NormalizeIntensity", "nonzero": masks.pop(), "channel_wise": True}
        if schemes == {"CTNormalization"} and self.num_input_channels == 1:
            ct = self.plans_manager.foreground_intensity_properties_per_channel["0"]
            low, high = ct["percentile_00_5"], ct["percentile_99_5"]
            scaled = {"b_min": (low - ct["mean"]) / ct["std"], "b_max": (high - ct["mean"]) / ct["std"]}
            return {"name": "ScaleIntensityRange", "a_min": low, "a_max": high, "clip": True, **scaled}
        raise ValueError(f"expected z-scores, or one CT channel, got {sorted(schemes)} with masks {sorted(masks)}.")


class JointLoss(nn.Module):
    """nnU-Net's loss, and in training the loss of the residual masks."""

    def __init__(self, segmentation_loss: nn.Module, *, ignore_label: int | None = None, regions: bool = False) -> None:
        super().__init__()
        self.segmentation_loss = segmentation_loss
        self.residual_loss = ContextResidualLoss(spatial_axis=SPATIAL_AXIS, ignore_index=ignore_label)
        self.ignore_label = ignore_label
        self.regions = regions

    def forward(self, output: Any, target: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        if not isinstance(output, ConResOutput):  # in validation
            return self.segmentation_loss(output, target)
        label = target[0] if isinstance(target, list) else target  # at full resolution
        if self.ignore_label is not None and self.regions:  # nnU-Net's last channel tells which voxels to ignore
            ignored = label[:, -1:] > 0
            label = label[:, :-1].to(torch.int16).masked_fill(ignored, self.ignore_label)
        return self.segmentation_loss(output.segmentation, target) + self.residual_loss(output.residuals, label)
