"""Checkpoints of the paper's released code, renamed to the parameters of ``ConResNet.released``."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

__all__ = ["convert_released_state_dict"]

_BLOCK = {"gn1": "unit1.norm", "conv1": "unit1.conv", "gn2": "unit2.norm", "conv2": "unit2.conv"}
_STAGE = {"x4": 0, "x2": 1, "x1": 2}
_MODULE = {
    "gn_seg": "decoder.{}.norm",
    "conv_seg": "decoder.{}.conv",
    "conv_mp_first": "residual_decoder.stages.{}.entry",
    "gn_mp": "residual_decoder.stages.{}.entry.norm",
    "conv_mp": "residual_decoder.stages.{}.entry.conv",
    "conv_res": "residual_decoder.stages.{}.inner",
    "gn_res1": "residual_decoder.stages.{}.outer.norm",
    "conv_res1": "residual_decoder.stages.{}.outer.conv",
}
_HEAD = {"seg": "head", **{f"res{scale}": f"residual_decoder.heads.{i}" for i, scale in enumerate(("x4", "x2", ""))}}

# parameters that the released forward pass never uses
_UNUSED = re.compile(
    r"seg_x\d\.0\.(gn_res|gn_res2|conv_res2)\.\w+|seg_x4\.0\.(gn_mp|conv_mp)\.\w+"
    r"|seg_x2\.0\.conv_mp_first\.weight|seg_x1\.0\.(conv_mp_first|gn_mp|conv_mp)\.\w+"
)


def convert_released_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the parameters of a checkpoint of the released code to those of :meth:`ConResNet.released`.

    The released network holds 422,464 parameters that its forward pass never uses. The function leaves these out. The
    output channels of a checkpoint for BraTS are ET, WT, TC; MONAI's transform gives TC, WT, ET.

    Args:
        state_dict: ``torch.load(path, map_location="cpu")`` of the original file. The function removes a ``module.``
            prefix of ``DataParallel``.

    Returns:
        A state dict for ``ConResNet.released(in_channels, out_channels)``.

    Raises:
        ValueError: when a key does not belong to the released network.

    Example:
        >>> converted = convert_released_state_dict({"module.conv_4_32.0.weight": torch.zeros(32, 4, 3, 3, 3)})
        >>> list(converted)
        ['encoder.0.0.weight']
    """
    keys = {key: key.removeprefix("module.") for key in state_dict}
    names = {key: _rename(name) for key, name in keys.items() if not _UNUSED.fullmatch(name)}
    if unknown := [key for key, name in names.items() if name is None]:
        raise ValueError(
            f"expected the keys of the released network, such as 'conv_4_32.0.weight', got {unknown[:5]}; pass the "
            "state dict itself, not the checkpoint that contains the state dict."
        )
    return {name: state_dict[key] for key, name in names.items() if name is not None}


def _rename(key: str) -> str | None:
    """Our name of one released parameter; ``None`` for an unknown key."""
    stem, _, parameter = key.rpartition(".")
    if re.fullmatch(r"conv_\d+_32\.0", stem):
        return f"encoder.0.0.{parameter}"
    if match := re.fullmatch(r"conv_(32|64|128)_\d+\.(0|2)", stem):
        level = {"32": 1, "64": 2, "128": 3}[match[1]]
        return f"encoder.{level}.0.{'norm' if match[2] == '0' else 'conv'}.{parameter}"
    if match := re.fullmatch(r"layer([0-4])\.(\d)\.(gn1|conv1|gn2|conv2)", stem):
        # a level of our encoder starts with the down-sampling convolution; layer4 is the dilated bottleneck
        place = f"bottleneck.{match[2]}" if match[1] == "4" else f"encoder.{match[1]}.{int(match[2]) + 1}"
        return f"{place}.{_BLOCK[match[3]]}.{parameter}"
    if match := re.fullmatch(r"fusionConv\.(0|3)", stem):
        return f"bottleneck.2.{'norm' if match[1] == '0' else 'conv'}.{parameter}"
    if (match := re.fullmatch(r"seg_(x\d)\.0\.(\w+)", stem)) and match[1] in _STAGE and match[2] in _MODULE:
        return f"{_MODULE[match[2]].format(_STAGE[match[1]])}.{parameter}"
    if (match := re.fullmatch(r"(\w+)_cls\.0", stem)) and match[1] in _HEAD:
        return f"{_HEAD[match[1]]}.{parameter}"
    return None
