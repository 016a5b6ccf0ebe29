"""Labels in which only some slices are drawn: the others have the value 255 and count nowhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.losses import DeepSupervisionLoss, DiceCELoss, DiceLoss, FocalLoss, GeneralizedDiceLoss, TverskyLoss
from monai.metrics import DiceMetric

from monai_conres import (
    BratsHausdorffDistanceMetric,
    BratsSurfaceDiceMetric,
    ChainLoss,
    CompoundBoundaryLoss,
    ConResLoss,
    ConResOutput,
    ContextResidualLoss,
    DeviceBoundaryLoss,
    ResidualMask,
    ResidualMaskd,
    fit_chain,
    residual_mask,
)
from monai_conres.bundle import IgnoredToZerod, ZeroToIgnoredd
from monai_conres.chain import ChainSettings, complete_mask, log_partition
from monai_conres.visualize import plot_residuals, plot_slices
from tests import reference
from tests.test_metrics import blob, surface_distances

SIZE = (5, 6, 8)
HALF = (3, 3, 8)  # thick slices are not halved
IGNORE = 255


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def classes_of(random: np.random.Generator, number: int = 3) -> np.ndarray:
    coarse = random.integers(0, number, (2, 1, 3, 3, 8))
    return coarse.repeat(2, 2)[:, :, :5].repeat(2, 3)


def sparse(label: np.ndarray, *slices: int, axis: int = -1) -> np.ndarray:
    """The label with only some slices of the first case, and with slice 3 and 4 of the second case."""
    result = np.full_like(label, IGNORE)
    for case, drawn in enumerate((slices, (3, 4))):
        for number in drawn:
            index = [case, slice(None), slice(None), slice(None), slice(None)]
            index[2 + axis % 3] = number
            result[tuple(index)] = label[tuple(index)]
    return result


def heads(random: np.random.Generator, channels: int) -> list[torch.Tensor]:
    return [torch.from_numpy(random.normal(0, 2, (2, channels, *size))).requires_grad_() for size in (SIZE, HALF)]


def one_hot(classes: np.ndarray, number: int = 3) -> np.ndarray:
    return np.where(classes == IGNORE, IGNORE, np.concatenate([classes == c for c in range(number)], 1))


# residual masks


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_residual_is_known_between_labelled_neighbors(random, axis):
    classes = random.integers(0, 3, (2, 1, *SIZE))
    classes[random.random(classes.shape) < 0.3] = IGNORE
    got = residual_mask(torch.from_numpy(classes), num_classes=3, spatial_axis=axis, ignore_index=IGNORE).numpy()
    before = np.moveaxis(classes, 2 + axis, 0)
    for c in (1, 2):
        for s in range(SIZE[axis]):
            now, then = before[s], before[s - 1] if s else before[1]  # for the first slice, the one after counts
            changed = (now == c) != (then == c) if s else False
            expected = np.where((now == IGNORE) | (then == IGNORE), IGNORE, changed)
            np.testing.assert_array_equal(np.moveaxis(got[:, c - 1 : c], 2 + axis, 0)[s], expected)
    for label, options in ((one_hot(classes), {"include_background": False}), (one_hot(classes)[:, 1:], {})):
        masks = torch.from_numpy(label)
        np.testing.assert_array_equal(residual_mask(masks, spatial_axis=axis, ignore_index=IGNORE, **options), got)


def test_each_channel_of_masks_has_its_own_ignored_voxels():
    masks = torch.tensor([[[0, 1, 255, 1], [0, 0, 1, 1]]])
    assert residual_mask(masks, ignore_index=IGNORE).tolist() == [[[0, 1, 255, 255], [0, 0, 1, 0]]]
    one_hot = torch.tensor([[[255, 0, 1, 1], [0, 1, 0, 0]]])  # one channel is enough
    got = residual_mask(one_hot, include_background=False, ignore_index=IGNORE)
    assert got.tolist() == [[[255, 255, 1, 0]]]


def test_residual_mask_transforms_keep_what_is_not_known():
    label = torch.tensor([[0, 1, 255, 1, 2]])
    expected = [[0, 1, 255, 255, 1], [0, 0, 255, 255, 1]]
    assert ResidualMask(num_classes=3, ignore_index=IGNORE)(label).tolist() == expected
    data = ResidualMaskd("label", num_classes=3, ignore_index=IGNORE)({"label": label.numpy()})
    assert data["residual_label"].tolist() == expected


def test_single_slices_have_no_residual(random):
    """Not even in the first slice of a patch, whose residual is zero: the network would learn that nothing changes."""
    label = torch.from_numpy(sparse(classes_of(random), 0, 2, 5))
    label[1] = label[0]
    assert (residual_mask(label, num_classes=3, ignore_index=IGNORE) == IGNORE).all()
    logits = heads(random, 2)
    loss = ContextResidualLoss(ignore_index=IGNORE)(logits, label)
    loss.backward()
    assert loss == 0
    assert not logits[0].grad.any()


# residual loss


def residual_loss(logits: list[np.ndarray], classes: np.ndarray, axis: int, background_weight: float | None) -> float:
    """Eq. 8 and 9 over the voxels with a known residual, one voxel after the other."""
    total = 0.0
    for number, head in enumerate(logits):
        label = np.moveaxis(reference.nearest(classes, head.shape[2:]), 2 + axis, 0)[:, :, 0]
        head = np.moveaxis(head, 2 + axis, 0)
        terms = []
        for c in range(head.shape[2]):
            known, changed = [], []
            for s in range(len(label)):
                pairs = np.stack([label[s], label[s - 1] if s else label[1]]).reshape(2, -1).T
                for logit, (now, then) in zip(head[s, :, c].reshape(-1), pairs, strict=True):
                    if IGNORE not in (now, then):
                        known.append(logit)
                        changed.append(s > 0 and (now == c + 1) != (then == c + 1))
            v, v1 = len(known), sum(changed)
            if v == 0:
                continue
            w1 = np.log(v / max(v1, 1))
            w0 = np.log(v / (v - v1)) if background_weight is None else background_weight
            cross_entropy = reference.binary_cross_entropy(reference.sigmoid(np.array(known)), np.array(changed))
            terms += list(np.where(changed, w1, w0) * cross_entropy)
        total += (1.0 if number == 0 else 0.5) * (np.mean(terms) if terms else 0.0)
    return total


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("background_weight", [1.0, None])
def test_residual_loss_counts_known_residuals_only(random, axis, background_weight):
    classes, logits = sparse(classes_of(random), 0, 1, 2, 5), heads(random, 2)
    loss = ContextResidualLoss(spatial_axis=axis, background_weight=background_weight, ignore_index=IGNORE)
    expected = residual_loss([head.detach().numpy() for head in logits], classes, axis, background_weight)
    for label in (classes, one_hot(classes), one_hot(classes)[:, 1:]):
        for dtype in (torch.uint8, torch.float32):
            assert loss(logits, torch.from_numpy(label).to(dtype)).item() == pytest.approx(expected, rel=1e-6)
    loss(logits, torch.from_numpy(classes)).backward()
    known = residual_mask(torch.from_numpy(classes), num_classes=3, spatial_axis=axis, ignore_index=IGNORE) != IGNORE
    assert torch.equal(logits[0].grad != 0, known)


# the losses as a whole


def losses():
    own = DiceLoss(softmax=True, to_onehot_y=True, ignore_index=IGNORE)
    focal = FocalLoss(to_onehot_y=True, use_softmax=True, ignore_index=IGNORE)
    yield "sigmoid", lambda ignore: ConResLoss(sigmoid=True, ignore_index=ignore)
    yield "softmax", lambda ignore: ConResLoss(softmax=True, ignore_index=ignore)
    yield "one-hot", lambda ignore: ConResLoss(softmax=True, ignore_index=ignore, background_weight=None)
    yield "Dice", lambda ignore: ConResLoss(own, ignore_index=ignore)
    yield "focal", lambda ignore: ConResLoss(focal, ignore_index=ignore)


def case_of(kind: str, classes: np.ndarray, random: np.random.Generator) -> tuple[ConResOutput, torch.Tensor]:
    channels = 2 if kind == "sigmoid" else 3
    segmentation = torch.from_numpy(random.normal(0, 2, (2, channels, *SIZE))).float().requires_grad_()
    residuals = tuple(head.detach().float().requires_grad_() for head in heads(random, 2))
    label = {"sigmoid": one_hot(classes)[:, 1:], "one-hot": one_hot(classes)}.get(kind, classes)
    return ConResOutput(segmentation, residuals), torch.from_numpy(label.astype(np.uint8))


@pytest.mark.parametrize(("kind", "build"), losses())
def test_losses_are_the_same_bits_when_nothing_is_ignored(random, kind, build):
    output, label = case_of(kind, classes_of(random), random)
    tensors = (output.segmentation, *output.residuals)
    values = [build(ignore)(output, label) for ignore in (None, IGNORE)]
    assert torch.equal(*values)
    for dense, partly in zip(*(torch.autograd.grad(value, tensors) for value in values), strict=True):
        assert torch.equal(dense, partly)


@pytest.mark.parametrize("slices", [(1, 2, 6), (4,), ()])
@pytest.mark.parametrize(("kind", "build"), losses())
def test_losses_have_no_gradient_at_ignored_voxels(random, kind, build, slices):
    classes = sparse(classes_of(random), *slices)
    if not slices:
        classes[:] = IGNORE
    output, label = case_of(kind, classes, random)
    loss = build(IGNORE)(output, label)
    loss.backward()
    ignored = torch.from_numpy(classes == IGNORE)
    gradient = output.segmentation.grad
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert not gradient[ignored.expand_as(gradient)].any()
    assert not output.residuals[0].grad[ignored.expand(-1, 2, -1, -1, -1)].any()
    assert gradient.any() == bool(slices)
    if not slices:
        assert loss == 0


def test_softmax_loss_is_that_of_the_labelled_voxels(random):
    classes = sparse(classes_of(random), 2, 5)
    logits = random.normal(0, 2, (2, 3, *SIZE))
    got = ConResLoss(softmax=True, ignore_index=IGNORE)(torch.from_numpy(logits), torch.from_numpy(classes)).item()
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    known = classes != IGNORE
    chosen = np.take_along_axis(p, np.where(known, classes, 0), axis=1)
    dice = [
        1 - 2 * (p[b, c][known[b, 0]] * hit).sum() / (p[b, c][known[b, 0]].sum() + hit.sum())
        for b in range(2)
        for c in range(3)
        for hit in [classes[b, 0][known[b, 0]] == c]
    ]
    assert got == pytest.approx(-np.log(chosen[known]).mean() + np.mean(dice), rel=1e-5)


def test_sigmoid_loss_is_that_of_the_labelled_voxels(random):
    masks = random.integers(0, 2, (2, 2, *SIZE))
    masks[random.random(masks.shape) < 0.5] = IGNORE  # each channel has its own
    logits = random.normal(0, 2, (2, 2, *SIZE))
    got = ConResLoss(sigmoid=True, ignore_index=IGNORE)(torch.from_numpy(logits), torch.from_numpy(masks)).item()
    known, p = masks != IGNORE, reference.sigmoid(logits)
    dice = []
    for b, c in np.ndindex(2, 2):
        hit, own = masks[b, c][known[b, c]], p[b, c][known[b, c]]
        dice.append(1 - 2 * (own * hit).sum() / (own.sum() + hit.sum()))
    cross_entropy = reference.binary_cross_entropy(p[known], masks[known]).mean()
    assert got == pytest.approx(cross_entropy + np.mean(dice), rel=1e-5)


def test_own_losses_get_the_label_with_the_ignored_voxels(random):
    classes = torch.from_numpy(sparse(classes_of(random), 2, 5)).float()
    logits, residuals = torch.from_numpy(random.normal(size=(2, 3, *SIZE))), heads(random, 2)
    deep = [logits, logits[..., ::2]]
    tversky = TverskyLoss(softmax=True, to_onehot_y=True, ignore_index=IGNORE)
    for own, segmentation in ((DeepSupervisionLoss(tversky), deep), (lambda x, y: (x * (y != IGNORE)).mean(), logits)):
        got = ConResLoss(own, ignore_index=IGNORE)(ConResOutput(segmentation, tuple(residuals)), classes)
        expected = own(segmentation, classes) + ContextResidualLoss(ignore_index=IGNORE)(residuals, classes)
        torch.testing.assert_close(got, expected)


# the chain


@pytest.mark.parametrize("own", [None, ConResLoss(softmax=True, ignore_index=IGNORE)])
def test_chain_loss_is_the_same_bits_when_nothing_is_ignored(random, own):
    output, label = case_of("softmax", classes_of(random), random)
    values = []
    for ignore in (None, IGNORE):
        torch.manual_seed(0)
        values.append(ChainLoss(own, ignore_index=ignore)(output, label))
    assert torch.equal(*values)


def test_chain_loss_is_the_likelihood_of_the_labelled_voxels(random):
    classes = sparse(classes_of(random), 1, 6)
    output, label = case_of("softmax", classes, random)
    settings = ChainSettings(tau=1.0, residual_scale=1.0, offset=-1.0)
    got = ChainLoss(settings=settings, ignore_index=IGNORE)(output, label)
    unary, rho = output.segmentation, output.residuals[0] - 1
    drawn = torch.from_numpy(np.where(classes == IGNORE, -1, classes))
    expected = (log_partition(unary, rho) - log_partition(unary, rho, drawn)).sum() / (drawn >= 0).sum()
    torch.testing.assert_close(got, expected)
    assert torch.autograd.grad(got, output.residuals[0])[0].any()


def test_chain_loss_clamps_labelled_slices_and_scores_another(random):
    classes = sparse(classes_of(random), 1, 2, 6)
    output, label = case_of("softmax", classes, random)
    seen = set()

    def own(marginals, target):
        states = target.long().masked_fill(target == IGNORE, 0)
        sure = marginals.gather(1, states).abs().amax((1, 2, 3)) < 1e-6
        assert not (sure & (target == IGNORE).all((1, 2, 3))).any()
        seen.add(tuple(sure.sum(1).tolist()))
        return marginals.mean()

    for _ in range(40):
        ChainLoss(own, ignore_index=IGNORE)(output, label)
    assert seen == {(a, b) for a in (0, 1, 2) for b in (0, 1)}


@pytest.mark.parametrize("likelihood", [False, True])
@pytest.mark.parametrize("slices", [(3,), ()])
def test_chain_loss_of_few_labels_is_finite(random, slices, likelihood):
    classes = sparse(classes_of(random), *slices)
    classes[1] = IGNORE
    output, label = case_of("softmax", classes, random)
    own = None if likelihood else ConResLoss(softmax=True, ignore_index=IGNORE)
    loss = ChainLoss(own, ignore_index=IGNORE)(output, label)
    loss.backward()
    assert loss.isfinite()
    assert output.segmentation.grad.isfinite().all()
    assert bool(output.segmentation.grad.any()) == bool(slices)


def test_fit_chain_sees_labelled_slices_only():
    torch.manual_seed(0)
    label = torch.zeros(1, 1, 6, 8, 12)
    label[:, :, 1:5, 2:6, 3:9] = 1
    case = {"segmentation": 4 * label - 2 + 2 * torch.randn(label.shape), "residual": torch.randn(label.shape)}
    drawn = torch.full_like(label, IGNORE)
    drawn[..., 4:8] = label[..., 4:8]
    drawn[..., 10] = label[..., 10]
    one, other = drawn.clone(), drawn.clone()
    other[..., :4] = IGNORE
    settings = fit_chain([{**case, "label": one}], ignore_index=IGNORE)
    assert settings == fit_chain([{**case, "label": other}], ignore_index=IGNORE)
    assert settings.offset[0] < -1  # labels are alike in neighboring slices
    whole = [{**case, "label": label}]
    assert fit_chain(whole, ignore_index=IGNORE) == fit_chain(whole)
    with pytest.raises(ValueError, match="ignore_index to be none of the label's values 0 to 1, got 1"):
        fit_chain(whole, ignore_index=1)


def test_fit_chain_passes_over_cases_without_a_label():
    torch.manual_seed(0)
    label = torch.zeros(1, 1, 3, 4, 6)
    label[:, :, 1:, 2:, 2:4] = 1
    case = {"segmentation": 4 * label - 2 + torch.randn(label.shape), "label": label}
    empty = {**case, "label": torch.full_like(label, IGNORE)}
    assert fit_chain([case, empty], ignore_index=IGNORE) == fit_chain([case])
    with pytest.raises(ValueError, match="a case with foreground and labels, got none"):
        fit_chain([empty], ignore_index=IGNORE)


def test_completion_of_three_orthogonal_slices(random):
    """A voxel of a drawn plane along the slices keeps its label; the network decides far from all planes."""
    label = np.full((1, 1, *SIZE), IGNORE)
    full = random.integers(0, 2, label.shape)
    label[:, :, 2], label[:, :, :, 3], label[..., 4] = full[:, :, 2], full[:, :, :, 3], full[..., 4]
    label = torch.from_numpy(label)
    logits = torch.full((1, 1, *SIZE), -5.0)
    got = complete_mask(
        logits, torch.full_like(logits, 5.0), label, slices=range(8), ignore_index=IGNORE, settings=ChainSettings()
    )
    known = label != IGNORE
    assert torch.equal(got[known], label[known])
    assert ((got == 0) | (got == 1)).all()


# metrics


def test_distances_are_those_of_the_labelled_outlines():
    prediction, label = blob(1), blob(2)
    cut = label.clone()
    cut[..., [0, 1, 2, 3, 5, 6, 7, 8]] = IGNORE
    # the outline of one slice: the surface of a volume that goes on as the slice
    tall = [mask[..., 4:5].repeat(1, 1, 1, 1, 9) for mask in (prediction, label)]
    for metric, whole in (
        (BratsHausdorffDistanceMetric(ignore_index=IGNORE), BratsHausdorffDistanceMetric()),
        (BratsSurfaceDiceMetric(ignore_index=IGNORE), BratsSurfaceDiceMetric()),
    ):
        torch.testing.assert_close(metric(prediction, cut), whole(*(mask[..., 1:8] for mask in _open(tall))))
        assert torch.equal(metric(prediction, label), whole(prediction, label))
    there, back = surface_distances(prediction, label, (1.0, 1.0, 1.0))
    assert BratsHausdorffDistanceMetric(ignore_index=IGNORE, percentile=100)(prediction, label).item() == pytest.approx(
        max(there.max(), back.max())
    )


def _open(masks: list[torch.Tensor]) -> list[torch.Tensor]:
    """Only the side walls of tall masks, so that their first and last slice have no caps."""
    walls = []
    for mask in masks:
        inner = mask[0, 0, :, :, 0].numpy().astype(bool)
        padded = np.pad(inner, 1)
        inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        wall = torch.from_numpy(inner & ~inside).float()[None, None, :, :, None]
        walls.append(wall.expand(-1, -1, -1, -1, mask.shape[-1]).contiguous())
    return walls


def test_metrics_leave_out_masks_without_a_label():
    prediction, label = torch.cat([blob(1), blob(3)]), torch.cat([blob(2), torch.full_like(blob(1), IGNORE)])
    for kind in (BratsHausdorffDistanceMetric, BratsSurfaceDiceMetric):
        metric = kind(ignore_index=IGNORE)
        values = metric(prediction, label)
        assert values.isnan().tolist() == [[False], [True]]
        assert metric.aggregate().item() == kind()(prediction[:1], label[:1]).item()
        with pytest.raises(ValueError, match="zeros and ones, got other values"):
            kind()(prediction, label)


def test_dice_of_monai_counts_labelled_voxels_only(random):
    """As the module's text says."""
    label, prediction = (torch.from_numpy(classes_of(random)) for _ in range(2))
    cut = torch.full_like(label, IGNORE)
    cut[..., 2:4] = label[..., 2:4]
    got = DiceMetric(ignore_empty=False, num_classes=3, include_background=False, ignore_index=IGNORE)(prediction, cut)
    expected = DiceMetric(ignore_empty=False, num_classes=3, include_background=False)(
        prediction[..., 2:4], label[..., 2:4]
    )
    torch.testing.assert_close(got, expected)


# pictures


def test_pictures_do_not_show_ignored_voxels_as_a_class():
    image = np.ones((1, 12, 16, 9), dtype=np.float32)
    image[0, 0] = 0
    label = np.full((12, 16, 9), IGNORE)
    label[..., 3:5] = 0
    label[2:8, 3:12, 3] = 1
    label[3:8, 3:12, 4] = 1
    figure = plot_slices(image, {"drawn": label}, slices=[3, 6], ignore_index=IGNORE)
    drawn, ignored = (np.asarray(figure.axes[k].images[0].get_array()) for k in (1, 3))
    assert drawn[5, 10].tolist() == pytest.approx([1, 1, 1])
    assert ignored[5, 10].tolist() == pytest.approx([0.4, 0.4, 0.4])  # dark
    assert [text.get_text() for legend in figure.legends for text in legend.get_texts()] == ["class 1"]
    figure = plot_residuals(image, label, slices=[3, 4], ignore_index=IGNORE)
    unknown, known = (np.asarray(axes.images[0].get_array()) for axes in figure.axes[4:6])
    assert unknown[5, 5].tolist() == pytest.approx([0.35, 0.35, 0.35])
    assert len(np.unique(known.reshape(-1, 3), axis=0)) == 2  # black, and the color of what changes
    assert (known.max(-1) > 0).T.tolist() == ((label[..., 3] == 1) != (label[..., 4] == 1)).tolist()


# bad input


@pytest.mark.parametrize("loss", [ConResLoss(softmax=True, ignore_index=2), ChainLoss(ignore_index=2)])
def test_losses_refuse_an_ignore_value_that_is_a_class(random, loss):
    output, label = case_of("softmax", classes_of(random), random)
    with pytest.raises(ValueError, match=r"none of the label's values 0 to 2, got 2; .* such as 255"):
        loss(output, label)


def test_ignore_value_must_fit_the_label():
    for ignore, label in ((-1, torch.zeros(1, 1, 4, dtype=torch.uint8)), (255, torch.zeros(1, 1, 4).bool())):
        with pytest.raises(ValueError, match=r"expected ignore_index from 0 to .* got .*; convert the label"):
            residual_mask(label, ignore_index=ignore)
    with pytest.raises(ValueError, match="values 0 to 1, got 1"):
        residual_mask(torch.zeros(1, 1, 4), ignore_index=1)
    with pytest.raises(ValueError, match="values 0 to 1, got 0"):
        BratsSurfaceDiceMetric(ignore_index=0)(blob(1), blob(2))


def test_label_values_that_are_not_ignored_name_the_option(random):
    output, label = case_of("softmax", sparse(classes_of(random), 2), random)
    with pytest.raises(ValueError, match=r"got values from 0 to 255; .* with ignore_index"):
        ConResLoss(softmax=True)(output, label)


@pytest.mark.parametrize("around", [ConResLoss, ChainLoss])
def test_own_losses_must_ignore_the_same_voxels(random, around):
    with pytest.raises(ValueError, match=r"ignores the label value 255, got ignore_index=\{.*'CrossEntropyLoss': -100"):
        around(DiceCELoss(softmax=True, to_onehot_y=True), ignore_index=IGNORE)
    with pytest.raises(ValueError, match=r"got ignore_index=\{'GeneralizedDiceLoss': None\}; give it"):
        around(DeepSupervisionLoss(GeneralizedDiceLoss(softmax=True, to_onehot_y=True)), ignore_index=IGNORE)
    own = around(DiceLoss(sigmoid=True, ignore_index=IGNORE), ignore_index=IGNORE)
    output, label = case_of("sigmoid", classes_of(random), random)
    with pytest.raises(ValueError, match="class indices in one channel for an own loss with ignore_index"):
        own(output, label)


@pytest.mark.parametrize(
    "loss",
    [ConResLoss(sigmoid=True, ignore_index=IGNORE), DiceLoss(softmax=True, to_onehot_y=True, ignore_index=IGNORE)],
)
def test_boundary_losses_refuse_ignored_voxels(loss):
    with pytest.raises(ValueError, match="a boundary loss takes a label for each voxel"):
        CompoundBoundaryLoss(loss, DeviceBoundaryLoss(sigmoid=True), max_steps=2)


@pytest.mark.parametrize("transform", [IgnoredToZerod, ZeroToIgnoredd])
def test_mixed_labels_are_refused_where_ignored_voxels_change_their_value(transform):
    label = torch.tensor([[0.0, 255.0, 1.99999, 3.00001]])
    expected = transform("label", 255)({"label": label.round()})["label"]
    assert torch.equal(transform("label", 255)({"label": label})["label"], expected)
    with pytest.raises(ValueError, match=r"whole numbers in label.*mode='nearest'.*lazy=False"):
        transform("label", 255)({"label": label / 2})
