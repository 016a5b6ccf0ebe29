"""nnU-Net's architectures as ``network.json`` stores them: layers are given by their import paths.

They need ``dynamic-network-architectures``, but not nnU-Net.
"""

from __future__ import annotations

import pydoc
from typing import Any

from dynamic_network_architectures.architectures import unet

__all__ = ["PlainConvUNet", "ResidualEncoderUNet"]

_LAYERS = ("conv_op", "norm_op", "dropout_op", "nonlin")


def _imported(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with ``"torch.nn.Conv3d"`` replaced by that class."""
    return {
        name: pydoc.locate(value) if name in _LAYERS and isinstance(value, str) else value
        for name, value in arguments.items()
    }


class PlainConvUNet(unet.PlainConvUNet):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**_imported(arguments))


class ResidualEncoderUNet(unet.ResidualEncoderUNet):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**_imported(arguments))
