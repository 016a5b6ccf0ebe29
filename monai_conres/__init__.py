"""Inter-slice context residual learning for 3D medical image segmentation, as MONAI components."""

from monai_conres.authors import convert_authors_state_dict
from monai_conres.conresnet import ConResNet
from monai_conres.context import ContextResidualModule
from monai_conres.decoder import ConResDecoder, ConResOutput
from monai_conres.residual import inter_slice_residual, residual_mask, restore_mask

__all__ = [
    "ConResDecoder",
    "ConResNet",
    "ConResOutput",
    "ContextResidualModule",
    "convert_authors_state_dict",
    "inter_slice_residual",
    "residual_mask",
    "restore_mask",
]
