from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from monai_conres import ConResDecoder, inter_slice_residual


def run(decoder, image, features):
    gated, residuals = [], [image]
    for stage, f in enumerate(features):
        g, residual = decoder.step(stage, f, residuals[-1])
        gated.append(g)
        residuals.append(residual)
    return gated, residuals[1:]


def test_first_input_is_the_residual_of_the_image():
    decoder = ConResDecoder(2, (8,), 1, spatial_axis=1)
    image, features = torch.randn(1, 2, 6, 8, 10), torch.randn(1, 8, 3, 4, 5)
    context = F.interpolate(inter_slice_residual(image, spatial_axis=1), size=(3, 4, 5), mode="trilinear")
    expected = decoder.stages[0](features, context)
    for got, want in zip(decoder.step(0, features, image), expected, strict=True):
        torch.testing.assert_close(got, want)
    constant_along_the_slices = image[:, :, :, :1].expand_as(image)
    shifted = decoder.step(0, features, constant_along_the_slices)[1]
    torch.testing.assert_close(shifted, decoder.stages[0](features, torch.zeros(1, 2, 3, 4, 5))[1])


def test_each_scale_goes_on_from_the_one_before():
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


def test_heads_are_fine_to_coarse_and_linear():
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
def test_too_few_channels(in_channels, channels, out_channels, width):
    with pytest.raises(ValueError, match=rf"expected at least one scale.*width of 2.*out_channels=.*, width={width}"):
        ConResDecoder(in_channels, channels, out_channels, width=width)
