"""Inter-slice context residual learning for 3D medical image segmentation, as MONAI components."""

from typing import NoReturn

from monai_conres.attach import ConResWrapper, attach_conres
from monai_conres.chain import ChainSettings, complete_mask, next_slice, slice_marginals
from monai_conres.chain_training import ChainLoss, fit_chain
from monai_conres.completion import complete_scan, predict_with_residual
from monai_conres.conresnet import ConResNet
from monai_conres.decoder import ConResDecoder, ConResOutput, ContextResidualModule
from monai_conres.files import ScanSettings, load_network, save_network
from monai_conres.losses import CompoundBoundaryLoss, ConResLoss, ContextResidualLoss, DeviceBoundaryLoss
from monai_conres.metrics import BratsHausdorffDistanceMetric, BratsSurfaceDiceMetric
from monai_conres.released import convert_released_state_dict
from monai_conres.renamed import RENAMED, refuse_old_modules, renamed
from monai_conres.residual import inter_slice_residual, residual_mask, restore_mask
from monai_conres.stages import DecoderStages, decoder_stages
from monai_conres.transforms import (
    CompleteMaskD,
    CompleteMaskd,
    CompleteMaskDict,
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
    "BratsHausdorffDistanceMetric",
    "BratsSurfaceDiceMetric",
    "ChainLoss",
    "ChainSettings",
    "CompleteMaskD",
    "CompleteMaskDict",
    "CompleteMaskd",
    "CompoundBoundaryLoss",
    "ConResDecoder",
    "ConResLoss",
    "ConResNet",
    "ConResOutput",
    "ConResWrapper",
    "ContextResidualLoss",
    "ContextResidualModule",
    "DecoderStages",
    "DeviceBoundaryLoss",
    "InterSliceResidual",
    "InterSliceResidualD",
    "InterSliceResidualDict",
    "InterSliceResiduald",
    "ResidualMask",
    "ResidualMaskD",
    "ResidualMaskDict",
    "ResidualMaskd",
    "ScanSettings",
    "attach_conres",
    "complete_mask",
    "complete_scan",
    "convert_released_state_dict",
    "decoder_stages",
    "fit_chain",
    "inter_slice_residual",
    "load_network",
    "next_slice",
    "predict_with_residual",
    "residual_mask",
    "restore_mask",
    "save_network",
    "slice_marginals",
]

refuse_old_modules()


def __getattr__(name: str) -> NoReturn:
    """Only for names that the package does not have."""
    old = f"{__name__}.{name}"
    raise AttributeError(renamed(old) if old in RENAMED else f"module {__name__!r} has no attribute {name!r}")
