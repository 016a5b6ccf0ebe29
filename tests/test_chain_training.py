"""Fitting the weights of the chain, and training through the chain."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.losses import DeepSupervisionLoss, DiceCELoss, FocalLoss
from monai.networks.nets import DynUNet, UNet

from monai_conres import ConResLoss, ConResNet, attach_conres, residual_mask
from monai_conres.chain import slice_marginals
from monai_conres.chain_training import ChainLoss, fit_chain
from monai_conres.decoder import ConResOutput
from tests.test_chain import CHANNELS, PLAIN, enumerate_volume, random_chain, random_label


def sample_label(unary: torch.Tensor, rho: torch.Tensor) -> torch.Tensor:
    """A label drawn from the chain, slice by slice."""
    drawn = torch.full_like(unary[:, :1], -1, dtype=torch.int64)
    for s in range(unary.shape[-1]):
        p = slice_marginals(unary, rho, drawn)[..., s].exp().movedim(1, -1)
        drawn[:, 0, ..., s] = torch.multinomial(p.flatten(0, -2), 1).view(p.shape[:-1])
    return drawn


def test_fit_chain_finds_the_weights_that_made_the_label():
    torch.manual_seed(0)
    segmentation, residual = 2 * torch.randn(1, 3, 500, 8), 2 * torch.randn(1, 2, 500, 8)
    image = torch.randn(1, 1, 500, 8)
    contrast = torch.nn.functional.pad(image.diff(dim=-1).abs(), (1, 0))
    rho = 0.6 * residual + 0.8 * contrast + torch.tensor([-2.0, -1.0]).view(1, 2, 1, 1)
    case = {"segmentation": segmentation, "residual": residual, "image": image}
    case["label"] = sample_label(0.5 * segmentation, rho)
    settings = fit_chain([case])
    assert settings == fit_chain([case])
    assert settings.tau == pytest.approx(0.5, abs=0.05)
    assert settings.residual_scale == pytest.approx(0.6, abs=0.07)
    assert settings.image_contrast == pytest.approx(0.8, abs=0.15)
    assert settings.offset == pytest.approx((-2.0, -1.0), abs=0.25)


def case_of_batch(size: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Labels whose foreground is in other slices in each volume of the batch."""
    torch.manual_seed(seed)
    label = torch.zeros(size, 1, 3, 4, 20)
    for number in range(size):
        label[number, :, 1:, 2:, 16 * number % 20 :][..., :4] = 1
    return {"segmentation": 4 * label - 2 + torch.randn(label.shape), "label": label}


def test_fit_chain_takes_each_case_of_a_batch_for_itself():
    batch = case_of_batch(2)
    cases = [{name: volume[number, None] for name, volume in batch.items()} for number in range(2)]
    assert fit_chain([batch]) == fit_chain(cases)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_fit_chain_takes_logits_as_the_network_gives_them(mode):
    case = case_of_batch(1)
    expected = fit_chain([case])
    scale = torch.ones((), requires_grad=True)
    with mode():
        assert fit_chain([case | {"segmentation": case["segmentation"] * scale}]) == expected


def test_fit_chain_refuses_what_does_not_fit():
    case = case_of_batch(1)
    for label in (255 * case["label"], 2 * case["label"]):
        with pytest.raises(ValueError, match="expected a label of classes of the network, got values from 0"):
            fit_chain([case | {"label": label}])
    with pytest.raises(ValueError, match="expected volumes of one batch and size"):
        fit_chain([case | {"image": torch.zeros(1, 1, 3, 4, 19)}])
    more = case | {name: torch.zeros_like(case["label"], dtype=torch.float32) for name in ("residual", "image")}
    for name in ("segmentation", "residual", "image"):
        for number in (float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"case 2: expected finite numbers in {name}"):
                fit_chain([more, more | {name: torch.full_like(more[name], number)}])
    with pytest.raises(ValueError, match="expected the same keys in all cases, got "):
        fit_chain([more, {name: volume for name, volume in more.items() if name != "residual"}])
    for drawn in ([], 0, [1, -2]):
        with pytest.raises(ValueError, match="one or more numbers of drawn slices"):
            fit_chain([case], drawn=drawn)


def test_fit_chain_takes_labels_of_any_dtype_and_one_number_of_slices():
    case = case_of_batch(1)
    expected = fit_chain([case], drawn=[2])
    for dtype in (torch.uint8, torch.int16, torch.uint16, torch.int64, torch.float32):
        assert fit_chain([case | {"label": case["label"].to(dtype)}], drawn=2) == expected


def test_chain_loss_refuses_masks_that_overlap():
    output = ConResOutput(torch.randn(1, 3, 4, 4, 5), (torch.randn(1, 2, 4, 4, 5),))
    with pytest.raises(ValueError, match="masks that do not overlap"):
        ChainLoss()(output, torch.ones(1, 2, 4, 4, 5))


def test_fit_chain_switches_a_useless_residual_decoder_off():
    torch.manual_seed(0)
    segmentation, rho = torch.randn(1, 1, 300, 6), torch.full((1, 1, 300, 6), -1.5)
    two_classes = torch.cat([torch.zeros_like(segmentation), segmentation], 1)
    label = sample_label(two_classes, rho)
    wrong = torch.randn(segmentation.shape) - residual_mask(label)
    settings = fit_chain([{"segmentation": segmentation, "residual": wrong, "label": label}])
    assert settings.residual_scale < 0.1
    without = fit_chain([{"segmentation": segmentation, "label": label}])
    assert (without.residual_scale, without.image_contrast) == (0.0, 0.0)


def test_fit_chain_passes_over_a_case_without_foreground():
    torch.manual_seed(0)
    label = torch.zeros(1, 1, 3, 4, 6)
    label[:, :, 1:, 2:, 2:4] = 1
    residual = torch.randn(label.shape)
    full = {"segmentation": 4 * label - 2 + torch.randn(label.shape), "residual": residual, "label": label}
    empty = {"segmentation": torch.full(label.shape, -20.0), "residual": residual, "label": torch.zeros_like(label)}
    assert fit_chain([empty, full]) == fit_chain([full])


def test_fit_chain_refuses_missing_cases_and_keys():
    with pytest.raises(ValueError, match="a case with foreground"):
        fit_chain([])
    empty = {"segmentation": torch.full((1, 1, 2, 3, 4), -20.0), "label": torch.zeros(1, 1, 2, 3, 4)}
    with pytest.raises(ValueError, match="a case with foreground"):
        fit_chain([empty])
    with pytest.raises(ValueError, match="segmentation and label"):
        fit_chain([{"segmentation": torch.zeros(1, 1, 2, 3)}])


@pytest.mark.parametrize("channels", CHANNELS)
def test_chain_loss_is_the_likelihood_of_the_label(channels):
    unary, rho, _ = random_chain(channels)
    label = random_label(channels, (3, 5))
    loss = ChainLoss(settings=PLAIN)(ConResOutput(unary, (rho,)), label)
    free, all_drawn = (enumerate_volume(unary, rho, d, -1) for d in (torch.full_like(label, -1), label))
    expected = [a.log_z - b.log_z for (*_, a), (*_, b) in zip(free, all_drawn, strict=True)]
    assert loss.item() == pytest.approx(np.mean(expected) / 5, abs=1e-10)


@pytest.mark.parametrize(
    "own",
    [
        FocalLoss(use_softmax=True, to_onehot_y=True, gamma=0.5),
        DiceCELoss(softmax=True, to_onehot_y=True, label_smoothing=0.1),
    ],
)
def test_chain_loss_gives_own_losses_numbers_that_they_can_take(own):
    """A clamped voxel is certain: an infinite logit would be a NaN in the gradient, or a loss of thousands."""
    torch.manual_seed(0)
    output = ConResOutput(torch.randn(1, 3, 8, 8, 6, requires_grad=True), (torch.randn(1, 2, 8, 8, 6),))
    label = torch.randint(0, 3, (1, 1, 8, 8, 6))
    for _ in range(5):  # other slices each time
        loss = ChainLoss(own)(output, label)
        (gradient,) = torch.autograd.grad(loss, output.segmentation)
        assert loss < 5
        assert gradient.isfinite().all()
        assert gradient.any()


def test_chain_loss_clamps_random_slices_of_the_label():
    unary, rho, _ = random_chain((3, 2))
    label = random_label((3, 2), (3, 5))
    seen = []

    def loss(marginals, target):
        right = marginals.gather(1, target)
        seen.append((right.abs() < 1e-12).all(2)[:, 0].sum(1))  # slices with probability one for the label
        return marginals.mean()

    for _ in range(40):
        ChainLoss(loss, settings=PLAIN, max_drawn=2)(ConResOutput(unary, (rho,)), label)
    assert torch.cat(seen).unique().tolist() == [0, 1, 2]
    one_hot = torch.cat([label == c for c in range(3)], 1)
    for target in (label, one_hot):  # nothing drawn: the marginals
        got = ChainLoss(lambda m, _: m.sum(), settings=PLAIN, max_drawn=0)(ConResOutput(unary, (rho,)), target)
        assert got == slice_marginals(unary, rho).sum()


def networks():
    yield ConResNet(1, 3, include_background=False, channels=(8, 16), strides=(2,), blocks=(1, 1, 1)), None
    kernels = {"kernel_size": (3, 3, 3), "strides": (1, 2, 2), "upsample_kernel_size": (2, 2), "filters": (8, 8, 16)}
    deep = DynUNet(3, 1, 3, **kernels, deep_supervision=True, deep_supr_num=1)
    own = DeepSupervisionLoss(DiceCELoss(softmax=True, to_onehot_y=True))
    yield attach_conres(deep, in_channels=1, include_background=False), own
    unet = UNet(3, 1, 3, channels=(8, 8, 16), strides=(2, 2))  # its residuals have half the resolution
    yield attach_conres(unet, in_channels=1, include_background=False), DiceCELoss(softmax=True, to_onehot_y=True)


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("likelihood", [False, True])
def test_chain_loss_trains_networks(number, likelihood):
    torch.manual_seed(0)
    network, own = list(networks())[number]
    label = torch.randint(0, 3, (2, 1, 8, 8, 8))
    joint = ConResLoss(own, softmax=own is None)
    chain = ChainLoss(None if likelihood else joint, spatial_axis=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = network.train()(torch.randn(2, 1, 8, 8, 8))
        loss = joint(output, label) + 0.5 * chain(output, label)
    assert loss.dtype == torch.float32
    loss.backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    residuals = [r.detach().requires_grad_() for r in output.residuals]
    (gradient, *_) = torch.autograd.grad(
        chain(ConResOutput(output.segmentation, tuple(residuals)), label), residuals, allow_unused=True
    )
    assert gradient.any()  # the residual decoder learns through the chain


def test_chain_loss_refuses_outputs_without_residuals():
    for output in (torch.zeros(1, 1, 4, 4), ConResOutput(torch.zeros(1, 1, 4, 4), ())):
        with pytest.raises(ValueError, match="ConResOutput with residuals"):
            ChainLoss()(output, torch.zeros(1, 1, 4, 4))
