from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from monai_conres import ContextResidualModule


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def module_naive(module: ContextResidualModule, features, residual, axis: int, inner_norm: bool):
    """Eq. 4-6, slice by slice in numpy; only the convolutions are torch's."""
    activated = sigmoid(features.numpy())
    context = np.zeros_like(activated)
    moved, out = np.moveaxis(activated, 2 + axis, 0), np.moveaxis(context, 2 + axis, 0)
    for s in range(moved.shape[0] - 1):
        out[s + 1] = np.abs(moved[s + 1] - moved[s])
    inner = F.conv3d(torch.from_numpy(context), module.inner.standardized_weight())
    if inner_norm:
        inner = F.group_norm(inner, 8, module.inner_norm.weight, module.inner_norm.bias)
    summed = inner + residual
    normalized = F.group_norm(summed, 8, module.outer.norm.weight, module.outer.norm.bias)
    output = F.conv3d(normalized.clamp(0), module.outer.conv.standardized_weight(), padding=1).detach().numpy()
    return features.numpy() * (1 + sigmoid(output)), output


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("inner_norm", [True, False])
def test_module_is_equations_4_to_6(axis, inner_norm):
    torch.manual_seed(axis)
    module = ContextResidualModule(8, spatial_axis=axis, inner_norm=inner_norm).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)  # norms that are not the identity
    features, residual = torch.randn(2, 2, 8, 4, 5, 6, dtype=torch.float64)
    expected = module_naive(module, features, residual, axis, inner_norm)
    for got, want in zip(module(features, residual), expected, strict=True):
        np.testing.assert_allclose(got.detach().numpy(), want, rtol=1e-9, atol=1e-9)


def test_without_attention_features_pass_and_the_residual_stays():
    torch.manual_seed(0)
    both = ContextResidualModule(8)
    mapping = ContextResidualModule(8, attention=False)
    mapping.load_state_dict(both.state_dict())
    features, residual = torch.randn(2, 1, 8, 4, 5, 6)
    gated, context = both(features, residual)
    passed, same_context = mapping(features, residual)
    assert passed is features
    torch.testing.assert_close(same_context, context, rtol=0, atol=0)
    torch.testing.assert_close(gated, features * (1 + context.sigmoid()))


def test_switched_off_it_does_nothing_and_holds_nothing():
    module = ContextResidualModule(8, mapping=False, attention=False)
    features, residual = torch.randn(2, 1, 8, 4, 5, 6)
    gated, context = module(features, residual)
    assert gated is features
    assert context is residual
    assert not list(module.parameters())


def test_attention_without_mapping_is_refused():
    with pytest.raises(ValueError, match="expected attention=False together with mapping=False"):
        ContextResidualModule(8, mapping=False)


def test_gradients_match_finite_differences():
    module = ContextResidualModule(8).double()
    features, residual = torch.randn(2, 1, 8, 2, 3, 3, dtype=torch.float64).unbind(0)
    assert torch.autograd.gradcheck(module, (features.requires_grad_(), residual.requires_grad_()))


def test_one_slice_has_no_context():
    module = ContextResidualModule(8)
    features, residual = torch.randn(2, 1, 8, 4, 5, 1)
    gated, context = module(features, residual)
    torch.testing.assert_close(context, module.outer(residual))
    torch.testing.assert_close(gated, features * (1 + context.sigmoid()))
