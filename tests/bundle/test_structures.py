from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import ConvertToMultiChannelBasedOnBratsClasses

from monai_conres.bundle import LabelToTargetd, ProbabilityToLabeld

BRATS = {"ET": (4,), "WT": (1, 2, 4), "TC": (1, 4)}
LABEL = torch.tensor([0, 1, 2, 4])[torch.randint(4, (1, 4, 5, 6), generator=torch.Generator().manual_seed(0))]


def test_targets_are_the_masks_of_monai_in_another_order():
    expected = ConvertToMultiChannelBasedOnBratsClasses()(LABEL)[[2, 1, 0]]
    target = LabelToTargetd("label", BRATS)({"label": LABEL})["label"]
    torch.testing.assert_close(target, expected.to(torch.uint8))


@pytest.mark.parametrize("structures", [BRATS, {"a": (2,), "b": (1,), "c": (4,)}])
@pytest.mark.parametrize("softmax", [False, True])
def test_probability_of_a_target_gives_the_label_back(structures, softmax):
    label = MetaTensor(LABEL, affine=torch.diag(torch.tensor([1.0, 2, 3, 1])))
    target = LabelToTargetd("label", structures, softmax=softmax)({"label": label})["label"]
    assert torch.equal(target.affine, label.affine)
    if softmax:
        assert target.unique().tolist() == [0, 1, 2, 3]
        probability = torch.cat([0.6 * (target == index) + 0.1 for index in range(4)])
    else:
        probability = 0.4 + 0.2 * target
    result = ProbabilityToLabeld("pred", structures, softmax=softmax)({"pred": probability})["pred"]
    assert result.dtype == torch.uint8
    assert torch.equal(result.as_tensor(), LABEL.to(torch.uint8))


@pytest.mark.parametrize("softmax", [False, True])
def test_arrays_stay_arrays(softmax):
    target = LabelToTargetd("label", BRATS, softmax=softmax)({"label": LABEL.numpy()})["label"]
    assert isinstance(target, np.ndarray)
    probability = np.eye(4)[target[0]].transpose(3, 0, 1, 2) if softmax else target.astype(float)
    label = ProbabilityToLabeld("pred", BRATS, softmax=softmax)({"pred": probability})["pred"]
    np.testing.assert_array_equal(label, LABEL)
