from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import ConvertToMultiChannelBasedOnBratsClasses

from monai_conres.bundle.structures import LabelToTargetd, ProbabilityToLabeld, paint_structures, structure_masks

BRATS = {"ET": (4,), "WT": (1, 2, 4), "TC": (1, 4)}
LABEL = torch.tensor([0, 1, 2, 4])[torch.randint(4, (1, 4, 5, 6), generator=torch.Generator().manual_seed(0))]


def test_masks_are_those_of_monai_in_another_order():
    expected = ConvertToMultiChannelBasedOnBratsClasses()(LABEL)[[2, 1, 0]]
    torch.testing.assert_close(structure_masks(LABEL, BRATS), expected.to(torch.uint8))


@pytest.mark.parametrize(
    "structures",
    [BRATS, {"TC": (1, 4), "ET": (4,), "WT": (4, 2, 1)}, {"a": (4,), "b": (2,), "c": (1,)}],
)
def test_painting_is_the_inverse(structures):
    assert torch.equal(paint_structures(structure_masks(LABEL, structures), structures), LABEL.to(torch.uint8))


def test_the_smaller_structure_wins():
    masks = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]])  # ET outside of WT, TC inside, TC alone
    assert paint_structures(masks, BRATS).tolist() == [[4, 4, 1, 1]]


@pytest.mark.parametrize("structures", [BRATS, {"a": (2,), "b": (1,), "c": (4,)}])
@pytest.mark.parametrize("softmax", [False, True])
def test_target_to_probability_to_label(structures, softmax):
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
def test_arrays(softmax):
    target = LabelToTargetd("label", BRATS, softmax=softmax)({"label": LABEL.numpy()})["label"]
    assert isinstance(target, np.ndarray)
    expected = LabelToTargetd("label", BRATS, softmax=softmax)({"label": LABEL})["label"]
    np.testing.assert_array_equal(target, expected)
    probability = np.eye(4)[target[0]].transpose(3, 0, 1, 2) if softmax else target.astype(float)
    label = ProbabilityToLabeld("pred", BRATS, softmax=softmax)({"pred": probability})["pred"]
    np.testing.assert_array_equal(label, LABEL)


def test_errors():
    with pytest.raises(ValueError, match=r"3 masks, one for each of \['ET', 'WT', 'TC'\], got 2"):
        paint_structures(torch.zeros(2, 3, 3), BRATS)
    with pytest.raises(ValueError, match="a value of b that no smaller structure has"):
        paint_structures(torch.zeros(2, 3, 3), {"a": (1,), "b": (1,)})
