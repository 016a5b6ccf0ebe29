"""Checkpoints of the authors' released code, renamed to the parameters of ``ConResNet.authors``."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

__all__ = ["convert_authors_state_dict"]

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
_HEAD = {"seg": "head", "resx4": "residual_decoder.heads.0", "resx2": "residual_decoder.heads.1"}
_HEAD["res"] = "residual_decoder.heads.2"

# parameters that the released forward pass never uses
_UNUSED = re.compile(
    r"seg_x\d\.0\.(gn_res|gn_res2|conv_res2)\.\w+|seg_x4\.0\.(gn_mp|conv_mp)\.\w+"
    r"|seg_x2\.0\.conv_mp_first\.weight|seg_x1\.0\.(conv_mp_first|gn_mp|conv_mp)\.\w+"
)


def convert_authors_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the parameters of a checkpoint of the authors' code to those of :meth:`ConResNet.authors`.

    The released network holds 422,464 parameters that its forward pass never uses; they are left out. Its output
    channels for BraTS are ET, WT, TC, where MONAI's transform gives TC, WT, ET.

    Args:
        state_dict: ``torch.load(path, map_location="cpu")`` of the original code; a ``module.`` prefix of
            ``DataParallel`` is removed.

    Returns:
        A state dict for ``ConResNet.authors(in_channels, out_channels)``.

    Raises:
        ValueError: when a key is not one of the released network's.

    Example:
        >>> converted = convert_authors_state_dict({"module.conv_4_32.0.weight": torch.zeros(32, 4, 3, 3, 3)})
        >>> list(converted)
        ['encoder.0.0.weight']
    """
    converted = {}
    unknown = []
    for key, value in state_dict.items():
        key = key.removeprefix("module.")
        if _UNUSED.fullmatch(key):
            continue
        name = _rename(key)
        if name is None:
            unknown.append(key)
        else:
            converted[name] = value
    if unknown:
        raise ValueError(
            f"expected the keys of the authors' network, such as 'conv_4_32.0.weight', got {unknown[:5]}; "
            "pass the state dict itself, not a checkpoint that holds it, of the released network, unchanged."
        )
    return converted


def _rename(key: str) -> str | None:
    """Our name of one released parameter, None where there is none."""
    stem, _, parameter = key.rpartition(".")
    if re.fullmatch(r"conv_\d+_32\.0", stem):
        return f"encoder.0.0.{parameter}"
    if match := re.fullmatch(r"conv_(32|64|128)_\d+\.(0|2)", stem):
        level = {"32": 1, "64": 2, "128": 3}[match[1]]
        return f"encoder.{level}.0.{'norm' if match[2] == '0' else 'conv'}.{parameter}"
    if match := re.fullmatch(r"layer([0-4])\.(\d)\.(gn1|conv1|gn2|conv2)", stem):
        # in a level of the encoder the down-sampling convolution comes first; layer4 is the dilated one
        place = f"bottleneck.{match[2]}" if match[1] == "4" else f"encoder.{match[1]}.{int(match[2]) + 1}"
        return f"{place}.{_BLOCK[match[3]]}.{parameter}"
    if match := re.fullmatch(r"fusionConv\.(0|3)", stem):
        return f"bottleneck.2.{'norm' if match[1] == '0' else 'conv'}.{parameter}"
    if (match := re.fullmatch(r"seg_(x\d)\.0\.(\w+)", stem)) and match[1] in _STAGE and match[2] in _MODULE:
        return f"{_MODULE[match[2]].format(_STAGE[match[1]])}.{parameter}"
    if (match := re.fullmatch(r"(\w+)_cls\.0", stem)) and match[1] in _HEAD:
        return f"{_HEAD[match[1]]}.{parameter}"
    return None
