"""The released configuration against outputs of the released network."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from monai_conres import ConResNet, convert_released_state_dict
from monai_conres.operations import resize_features

RELEASED = json.loads(Path(__file__).with_name("released_network.json").read_text())


def released_state_dict() -> dict[str, torch.Tensor]:
    state = {}
    for index, (name, shape) in enumerate(RELEASED["parameters"]):
        values = np.float32(0.1) * np.random.RandomState(index).standard_normal(shape).astype(np.float32)
        if len(shape) == 1 and name.endswith("weight"):
            values = values + np.float32(1)
        state[name] = torch.from_numpy(values)
    return state


@pytest.mark.parametrize(
    ("dtype", "tolerance", "prefix"), [(torch.float64, 1e-6, "module."), (torch.float32, 5e-4, "")]
)
def test_released_outputs_match_the_original_network(dtype, tolerance, prefix):
    network = ConResNet.released(4, 3)
    released = {prefix + key: value for key, value in released_state_dict().items()}
    network.load_state_dict(convert_released_state_dict(released))
    image = np.random.RandomState(10000).standard_normal((1, 4, 16, 32, 32)).astype(np.float32)
    with torch.no_grad():
        segmentation, residuals = network.to(dtype).eval().heads(torch.from_numpy(image).to(dtype))
    names = ("segmentation", "residual", "residual_x2", "residual_x4")
    for name, logits in zip(names, (segmentation, *residuals), strict=True):
        # the released network up-samples its coarse heads
        got = resize_features(logits, (16, 32, 32), align_corners=True).double().numpy()
        want = np.array(RELEASED["outputs"][name])
        assert np.abs(got[0, :, ::5, ::7, ::11] - want).max() <= tolerance * want.std(), name


def test_convert_leaves_out_unused_parameters():
    released = released_state_dict()
    converted = convert_released_state_dict(released)
    assert sum(v.numel() for v in released.values()) - sum(v.numel() for v in converted.values()) == 422_464
    assert set(converted) == set(ConResNet.released(4, 3).state_dict())


def test_convert_accepts_any_number_of_modalities():
    weight = torch.randn(32, 1, 3, 3, 3)
    assert torch.equal(convert_released_state_dict({"conv_1_32.0.weight": weight})["encoder.0.0.weight"], weight)


@pytest.mark.parametrize(
    "key", ["state_dict", "layer5.0.conv1.weight", "seg_x8.0.conv_seg.weight", "seg_x2.0.conv.weight"]
)
def test_convert_refuses_other_keys(key):
    with pytest.raises(ValueError, match=f"expected the keys of the released network.*{key}"):
        convert_released_state_dict({key: torch.zeros(1)})
