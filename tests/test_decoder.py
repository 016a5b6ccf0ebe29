from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from monai_conres import ConResDecoder, ContextResidualModule, inter_slice_residual


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


def test_module_with_mapping_passes_the_features():
    torch.manual_seed(0)
    both, mapping = ContextResidualModule(8), ContextResidualModule(8, context="mapping")
    mapping.load_state_dict(both.state_dict())
    features, residual = torch.randn(2, 1, 8, 4, 5, 6)
    gated, context = both(features, residual)
    passed, same_context = mapping(features, residual)
    assert passed is features
    torch.testing.assert_close(same_context, context, rtol=0, atol=0)
    torch.testing.assert_close(gated, features * (1 + context.sigmoid()))


def test_module_with_none_does_and_holds_nothing():
    module = ContextResidualModule(8, context="none")
    features, residual = torch.randn(2, 1, 8, 4, 5, 6)
    gated, context = module(features, residual)
    assert gated is features
    assert context is residual
    assert not list(module.parameters())


def test_module_refuses_other_words():
    with pytest.raises(ValueError, match="'attention', 'mapping', 'none', got 'gate'"):
        ContextResidualModule(8, context="gate")
    with pytest.raises(ValueError, match="'attention', 'mapping', got 'none'"):
        ConResDecoder(1, (8,), 1, context="none")
    with pytest.raises(ValueError, match='context="attention" together with zero_init=True'):
        ContextResidualModule(8, context="mapping", zero_init=True)


def test_module_gradients_match_finite_differences():
    module = ContextResidualModule(8).double()
    features, residual = torch.randn(2, 1, 8, 2, 3, 3, dtype=torch.float64).unbind(0)
    assert torch.autograd.gradcheck(module, (features.requires_grad_(), residual.requires_grad_()))


def test_module_of_one_slice_has_no_change():
    module = ContextResidualModule(8)
    features, residual = torch.randn(2, 1, 8, 4, 5, 1)
    gated, context = module(features, residual)
    torch.testing.assert_close(context, module.outer(residual))
    torch.testing.assert_close(gated, features * (1 + context.sigmoid()))


def run(decoder, image, features):
    gated, residuals = [], [image]
    for stage, f in enumerate(features):
        g, residual = decoder.step(stage, f, residuals[-1])
        gated.append(g)
        residuals.append(residual)
    return gated, residuals[1:]


def test_decoder_starts_from_the_residual_of_the_image():
    decoder = ConResDecoder(2, (8,), 1, spatial_axis=1)
    image, features = torch.randn(1, 2, 6, 8, 10), torch.randn(1, 8, 3, 4, 5)
    context = F.interpolate(inter_slice_residual(image, spatial_axis=1), size=(3, 4, 5), mode="trilinear")
    expected = decoder.stages[0](features, context)
    for got, want in zip(decoder.step(0, features, image), expected, strict=True):
        torch.testing.assert_close(got, want)
    constant_along_the_slices = image[:, :, :, :1].expand_as(image)
    shifted = decoder.step(0, features, constant_along_the_slices)[1]
    torch.testing.assert_close(shifted, decoder.stages[0](features, torch.zeros(1, 2, 3, 4, 5))[1])


def test_decoder_passes_residuals_from_scale_to_scale():
    torch.manual_seed(0)
    decoder = ConResDecoder(1, (24, 16, 16), 3)
    image = torch.randn(1, 1, 9, 11, 13)
    features = [torch.randn(1, 24, 3, 3, 4), torch.randn(1, 16, 5, 6, 7), torch.randn(1, 16, 9, 11, 13)]
    gated, residuals = run(decoder, image, features)
    previous = F.interpolate(residuals[0], size=(5, 6, 7), mode="trilinear")
    expected = decoder.stages[1](features[1], previous)[1]
    torch.testing.assert_close(residuals[1], expected)
    assert decoder.stages[2].entry is None  # equal channels need no convolution
    for f, g, residual in zip(features, gated, residuals, strict=True):
        torch.testing.assert_close(g, f * (1 + residual.sigmoid()))


def test_decoder_heads_are_fine_to_coarse_and_linear():
    decoder = ConResDecoder(1, (16, 8), 2)
    coarse, fine = torch.randn(1, 16, 2, 3, 4), torch.randn(1, 8, 4, 6, 8)
    got = decoder.predict([coarse, fine])
    for logits, features, head in zip(got, (fine, coarse), (decoder.heads[1], decoder.heads[0]), strict=True):
        want = torch.einsum("bcdhw,oc->bodhw", features, head.weight[:, :, 0, 0, 0]) + head.bias.view(1, -1, 1, 1, 1)
        torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("in_channels", "channels", "out_channels", "width"),
    [(1, (), 1, None), (0, (8,), 1, None), (1, (8, 1), 1, None), (1, (8,), 0, None), (1, (8,), 1, 1)],
)
def test_decoder_refuses_too_few_channels(in_channels, channels, out_channels, width):
    with pytest.raises(ValueError, match=rf"expected at least one scale.*width of 2.*out_channels=.*, width={width}"):
        ConResDecoder(in_channels, channels, out_channels, width=width)
