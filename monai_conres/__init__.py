"""Inter-slice context residual learning for 3D medical image segmentation, as MONAI components."""

from monai_conres.attach import ConResWrapper, attach_conres
from monai_conres.authors import convert_authors_state_dict
from monai_conres.conresnet import ConResNet
from monai_conres.context import ContextResidualModule
from monai_conres.decoder import ConResDecoder, ConResOutput
from monai_conres.losses import CompoundBoundaryLoss, ConResLoss, ContextResidualLoss
from monai_conres.metrics import BratsDiceMetric, BratsHausdorffDistanceMetric, BratsSurfaceDiceMetric
from monai_conres.residual import inter_slice_residual, residual_mask, restore_mask
from monai_conres.stages import DecoderStages, decoder_stages
from monai_conres.transforms import (
    InterSliceResidual,
    InterSliceResidualD,
    InterSliceResiduald,
    InterSliceResidualDict,
    ResidualMask,
    ResidualMaskD,
    ResidualMaskd,
    ResidualMaskDict,
)

__all__ = [
    "BratsDiceMetric",
    "BratsHausdorffDistanceMetric",
    "BratsSurfaceDiceMetric",
    "CompoundBoundaryLoss",
    "ConResDecoder",
    "ConResLoss",
    "ConResNet",
    "ConResOutput",
    "ConResWrapper",
    "ContextResidualLoss",
    "ContextResidualModule",
    "DecoderStages",
    "InterSliceResidual",
    "InterSliceResidualD",
    "InterSliceResidualDict",
    "InterSliceResiduald",
    "ResidualMask",
    "ResidualMaskD",
    "ResidualMaskDict",
    "ResidualMaskd",
    "attach_conres",
    "convert_authors_state_dict",
    "decoder_stages",
    "inter_slice_residual",
    "residual_mask",
    "restore_mask",
]
