"""The slice chain against enumeration of all labellings, and against dense forward-backward in float64."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from typing import NamedTuple

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from monai_conres import residual_mask, restore_mask
from monai_conres.chain import (
    BLOCK,
    ChainSettings,
    SliceChain,
    best_labelling,
    complete_mask,
    log_partition,
    next_slice,
    slice_marginals,
)

PLAIN = ChainSettings(tau=1.0, residual_scale=1.0, offset=0.0)
CHANNELS = [(2, 1), (3, 2), (4, 3), (1, 1), (2, 2)]  # segmentation, residual: softmaxes, then sigmoids


class Enumerated(NamedTuple):
    marginals: np.ndarray  # (slices, states)
    log_z: float
    best: tuple[int, ...]


def enumerate_labellings(u: np.ndarray, rho: np.ndarray, drawn: np.ndarray) -> Enumerated:
    """One chain, from its definition. ``u`` (slices, states), ``rho`` (slices, states - 1), ``drawn`` (slices)."""
    slices, states = u.shape
    labellings, scores = [], []
    for y in itertools.product(range(states), repeat=slices):
        if any(d >= 0 and d != c for d, c in zip(drawn, y, strict=True)):
            continue
        score = sum(u[s, c] for s, c in enumerate(y))
        for s in range(1, slices):
            score += sum(rho[s, k - 1] for k in range(1, states) if (y[s] == k) != (y[s - 1] == k))
        labellings.append(y)
        scores.append(score)
    log_z = np.logaddexp.reduce(scores)
    marginals = np.zeros((slices, states))
    for y, score in zip(labellings, scores, strict=True):
        marginals[range(slices), y] += np.exp(score - log_z)
    return Enumerated(marginals, log_z, labellings[int(np.argmax(scores))])


def enumerate_volume(unary, residual, drawn, axis: int) -> list[tuple[tuple[int, ...], int, Enumerated]]:
    """All chains of a volume: in-plane position with the case in front, channel, result."""
    dim = 2 + axis % 2
    u, rho, d = (x.movedim(dim, -1).numpy() for x in (unary, residual, drawn))
    results = []
    for b, i in itertools.product(range(u.shape[0]), range(u.shape[2])):
        if u.shape[1] > rho.shape[1]:
            results.append(((b, i), 0, enumerate_labellings(u[b, :, i].T, rho[b, :, i].T, d[b, 0, i])))
            continue
        for k in range(u.shape[1]):
            states = np.stack([np.zeros_like(u[b, k, i]), u[b, k, i]], axis=1)
            results.append(((b, i), k, enumerate_labellings(states, rho[b, k : k + 1, i].T, d[b, k, i])))
    return results


def random_chain(channels, axis=-1, *, sign=0, scale=3.0, drawn="no", seed=0):
    """Potentials of two cases with 3 positions and 5 slices, and clamped voxels."""
    generator = torch.Generator().manual_seed(seed)
    classes, foreground = channels
    size = (3, 5) if axis % 2 == 1 else (5, 3)
    unary = scale * torch.randn(2, classes, *size, generator=generator, dtype=torch.float64)
    rho = scale * torch.randn(2, foreground, *size, generator=generator, dtype=torch.float64)
    rho = rho if sign == 0 else sign * rho.abs()
    states = classes if classes > foreground else 2
    shape = (2, 1 if classes > foreground else classes, *size)
    label = torch.randint(0, states, shape, generator=generator)
    is_drawn = torch.zeros(shape, dtype=torch.bool)
    is_drawn.select(2 + axis % 2, 1)[:] = drawn != "no"
    if drawn == "partly":
        is_drawn = (torch.rand(shape, generator=generator) < 0.4) | is_drawn
    return unary, rho, torch.where(is_drawn, label, -1)


@pytest.mark.parametrize("drawn", ["no", "slice", "partly"])
@pytest.mark.parametrize("sign", [0, -1, 1])
@pytest.mark.parametrize(("channels", "axis"), zip(CHANNELS, [-1, 0, 1, -2, -1], strict=True))
def test_chain_equals_enumeration(channels, axis, sign, drawn):
    unary, rho, clamped = random_chain(channels, axis, sign=sign, drawn=drawn)
    arguments = (unary, rho, clamped if drawn != "no" else None)
    marginals = slice_marginals(*arguments, spatial_axis=axis)
    assert marginals.shape == unary.shape
    p = marginals.exp() if channels[0] > channels[1] else marginals.sigmoid()
    log_z = log_partition(*arguments, spatial_axis=axis)
    best = best_labelling(*arguments, spatial_axis=axis)
    assert best.shape == clamped.shape
    p, log_z, best = (x.movedim(2 + axis % 2, -1) for x in (p, log_z, best))
    for (b, i), k, expected in enumerate_volume(unary, rho, clamped, axis):
        got = p[b, :, i].T if channels[0] > channels[1] else torch.stack([1 - p[b, k, i], p[b, k, i]], 1)
        np.testing.assert_allclose(got.numpy(), expected.marginals, rtol=0, atol=1e-10)
        np.testing.assert_allclose(log_z[b, k, i].item(), expected.log_z, rtol=0, atol=1e-10)
        assert tuple(best[b, k, i].tolist()) == expected.best


def dense_log_marginals(u: np.ndarray, rho: np.ndarray) -> np.ndarray:
    """Forward-backward with whole transition matrices. ``u`` (slices, states, positions), ``rho`` one state less."""

    def normalised(x: np.ndarray, axis: int) -> np.ndarray:
        return x - np.logaddexp.reduce(x, axis=axis, keepdims=True)

    slices, states, positions = u.shape
    e = np.concatenate([np.zeros((slices, 1, positions)), rho], axis=1)
    transition = e[:, :, None] + e[:, None]
    transition[:, range(states), range(states)] = 0
    forward, backward = [normalised(u[0], 0)], [np.zeros_like(u[0])]
    for s in range(1, slices):
        forward.append(normalised(u[s] + np.logaddexp.reduce(forward[-1][:, None] + transition[s], axis=0), 0))
    for s in range(slices - 1, 0, -1):
        backward.append(normalised(np.logaddexp.reduce((backward[-1] + u[s])[:, None] + transition[s], axis=0), 0))
    return normalised(np.stack(forward) + np.stack(backward[::-1]), 1)


@pytest.mark.parametrize("scale", [1, 20, 80])
@pytest.mark.parametrize("states", [2, 4])
def test_chain_of_500_slices_equals_dense_forward_backward(states, scale):
    rng = np.random.default_rng(0)
    u = -scale * rng.integers(0, 2, (500, states, 24)).astype(np.float64)  # log p of 0 and of -scale
    rho = scale * rng.choice([-1.0, 1.0], (500, states - 1, 24))
    u[..., 12:] *= rng.random((500, states, 12))
    rho[..., 12:] *= rng.random((500, states - 1, 12))
    u, rho = u.astype(np.float32).astype(np.float64), rho.astype(np.float32).astype(np.float64)
    expected = dense_log_marginals(u, rho)
    unary, residual = (torch.from_numpy(x.transpose(2, 1, 0)) for x in (u, rho))
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        got = slice_marginals(unary.to(dtype), residual.to(dtype)).double().numpy().transpose(2, 1, 0)
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("channels", [(3, 2), (2, 2)])
@pytest.mark.parametrize("drawn", ["no", "partly"])
def test_chain_gradients(channels, drawn):
    unary, rho, clamped = random_chain(channels, drawn=drawn, scale=1.0)
    unary, rho = unary[:1, :, :2, :4].requires_grad_(), rho[:1, :, :2, :4].requires_grad_()
    clamped = clamped[:1, :, :2, :4]

    def possible(u, r):  # excluded states are constants near -1e6, where finite differences are coarse
        marginals = slice_marginals(u, r, clamped)
        return marginals[marginals.abs() < 1e5]

    assert torch.autograd.gradcheck(possible, (unary, rho))
    assert torch.autograd.gradcheck(lambda u, r: log_partition(u, r, clamped), (unary, rho))


def test_chain_gradients_are_finite_with_clamped_slices():
    unary, rho, clamped = random_chain((4, 3), drawn="slice", scale=80.0)
    unary, rho = unary.float().requires_grad_(), rho.float().requires_grad_()
    label = torch.where(clamped < 0, 1, clamped)
    loss = torch.nn.functional.nll_loss(slice_marginals(unary, rho, clamped), label[:, 0])
    assert loss.isfinite()
    for gradient in torch.autograd.grad(loss, (unary, rho)):
        assert gradient.isfinite().all()
        assert gradient.any()


def test_chain_computes_in_float32_under_autocast():
    unary, rho, clamped = random_chain((3, 2), drawn="slice")
    unary, rho = unary.bfloat16(), rho.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = slice_marginals(unary, rho, clamped)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, slice_marginals(unary.float(), rho.float(), clamped))


def test_chain_is_cut_by_a_clamped_slice():
    unary, rho, clamped = random_chain((4, 3), drawn="slice")
    whole = slice_marginals(unary, rho, clamped)
    for stretch in (slice(None, 2), slice(1, None)):  # slice 1 is drawn
        got = slice_marginals(unary[..., stretch], rho[..., stretch], clamped[..., stretch])
        torch.testing.assert_close(got.exp(), whole[..., stretch].exp(), rtol=0, atol=1e-12)


def test_chain_never_uses_rho_of_the_first_slice():
    unary, rho, _ = random_chain((3, 2))
    other = rho.clone()
    other[..., 0] = float("nan")
    torch.testing.assert_close(slice_marginals(unary, other), slice_marginals(unary, rho), rtol=0, atol=0)


def random_label(channels, size, seed=0) -> torch.Tensor:
    classes, foreground = channels
    generator = torch.Generator().manual_seed(seed)
    if classes > foreground:
        return torch.randint(0, classes, (2, 1, *size), generator=generator)
    return torch.randint(0, 2, (2, classes, *size), generator=generator)


def masks_of(label: torch.Tensor, channels) -> torch.Tensor:
    classes, foreground = channels
    return torch.cat([label == k for k in range(1, classes)], 1).long() if classes > foreground else label


@pytest.mark.parametrize("axis", [-1, 0, 1])
@pytest.mark.parametrize("channels", CHANNELS)
def test_complete_mask_equals_restore_mask_for_certain_residuals(channels, axis):
    label = random_label(channels, (4, 5, 6))
    masks = masks_of(label, channels)
    residual = residual_mask(masks, spatial_axis=axis)
    expected = restore_mask(masks.narrow(2 + axis % 3, 0, 1), residual, spatial_axis=axis)
    flat = torch.zeros(2, channels[0], 4, 5, 6)
    for drawn in (0, 2):
        only = torch.zeros_like(label)
        only.narrow(2 + axis % 3, drawn, 1).copy_(label.narrow(2 + axis % 3, drawn, 1))
        got = complete_mask(flat, 80.0 * residual - 40, only, slices=[drawn], settings=PLAIN, spatial_axis=axis)
        assert torch.equal(masks_of(got, channels), expected)


@pytest.mark.parametrize("channels", [(4, 3), (2, 2)])
@pytest.mark.parametrize("certainty", [0.0, 3.0, 6.0, 20.0])
def test_complete_mask_is_the_argmax_of_the_marginals(channels, certainty):
    """Positions that are certainly background are skipped, and change nothing."""
    generator = torch.Generator().manual_seed(0)
    segmentation = 2 * torch.randn(2, channels[0], 30, 30, 8, generator=generator)
    rho = 4 * torch.randn(2, channels[1], 30, 30, 8, generator=generator) - certainty
    is_softmax = channels[0] > channels[1]
    segmentation[:, : 1 if is_softmax else None] += certainty * (1 if is_softmax else -1)
    drawn = random_label(channels, (30, 30, 8)).to(torch.uint8)
    drawn[:, :, 5:] = 0
    clamped = torch.full(drawn.shape, -1)
    clamped[..., 3] = drawn[..., 3]
    marginals = slice_marginals(segmentation, rho, clamped)
    expected = marginals.argmax(1, keepdim=True) if is_softmax else marginals > 0
    got = complete_mask(segmentation, rho, drawn, slices=[3], settings=PLAIN)
    assert torch.equal(got, expected.to(torch.uint8))
    p = marginals.exp() if is_softmax else torch.stack([marginals.sigmoid(), (-marginals).sigmoid()])
    error = 1 - (p.amax(1, keepdim=True) if is_softmax else p.amax(0))
    error = (error * (error > 0.05)).sum(1)
    for ranking, case in zip(next_slice(segmentation, rho, drawn, slices=[3], settings=PLAIN), error, strict=True):
        assert 3 not in ranking
        assert list(ranking.values()) == sorted(ranking.values(), reverse=True)
        for index, value in ranking.items():
            assert value == pytest.approx(case[..., index].sum().item(), rel=1e-4, abs=1e-2)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.float32, torch.float64], ids=str)
def test_complete_mask_keeps_what_was_drawn(dtype):
    label = random_label((4, 3), (4, 5, 6)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    segmentation, residual = (9 * torch.randn(2, c, 4, 5, 6, generator=generator) for c in (4, 3))
    got = complete_mask(segmentation, residual, label, slices=[[1], [0, 4]])
    assert got.dtype == dtype
    assert got.shape == label.shape
    assert torch.equal(got[0, ..., 1], label[0, ..., 1])
    assert torch.equal(got[1, ..., [0, 4]], label[1, ..., [0, 4]])
    assert not torch.equal(got[0, ..., 0], label[0, ..., 0])


def test_complete_mask_keeps_booleans_and_metadata():
    drawn = MetaTensor(torch.zeros(1, 2, 3, 3, 4, dtype=torch.bool), affine=2 * torch.eye(4))
    drawn[0, 0, 1, 1, 2] = True
    logits = torch.full((1, 2, 3, 3, 4), -3.0)
    got = complete_mask(logits, logits, drawn)
    assert isinstance(got, MetaTensor)
    assert got.dtype == torch.bool
    assert torch.equal(got.affine, drawn.affine)
    assert torch.equal(got[..., 2], drawn[..., 2])


def test_complete_mask_takes_slices_with_any_label():
    label = torch.zeros(2, 1, 3, 6, dtype=torch.int64)
    label[0, 0, 1, 2] = label[1, 0, 2, 4] = 1
    logits = torch.randn(2, 2, 3, 6), torch.randn(2, 1, 3, 6)
    assert torch.equal(complete_mask(*logits, label), complete_mask(*logits, label, slices=[[2], [4]]))
    both = complete_mask(*logits, label, slices=[[2], [2]])
    for slices in ([2], torch.tensor([2]), torch.tensor([[2], [2]]), [range(2, 3), torch.tensor([2])]):
        assert torch.equal(complete_mask(*logits, label, slices=slices), both)


def test_complete_mask_counts_an_empty_drawn_slice():
    segmentation, residual = torch.full((1, 1, 1, 5), 2.0), torch.full((1, 1, 1, 5), -9.0)
    drawn = torch.zeros(1, 1, 1, 5, dtype=torch.uint8)
    drawn[..., 0] = 1
    assert complete_mask(segmentation, residual, drawn).tolist() == [[[[1, 1, 1, 1, 1]]]]
    assert complete_mask(segmentation, residual, drawn, slices=[0, 2]).tolist() == [[[[1, 1, 0, 0, 0]]]]
    assert complete_mask(segmentation, residual, drawn, slices=[3]).tolist() == [[[[0, 0, 0, 0, 0]]]]


def test_complete_mask_fills_voxels_of_ignore_index():
    unary, rho, clamped = random_chain((3, 2), drawn="slice")
    drawn = torch.where(clamped < 0, 0, clamped)
    drawn[:, :, 1, 1] = 255
    got = complete_mask(unary, rho, drawn, slices=[1], settings=PLAIN, ignore_index=255)
    clamped[:, :, 1] = -1
    for (b, i), _, expected in enumerate_volume(unary, rho, clamped, -1):
        assert got[b, 0, i].tolist() == expected.marginals.argmax(1).tolist()


def test_complete_mask_takes_labelled_slices_with_ignore_index():
    """All voxels that do not hold ``ignore_index`` are drawn, background too."""
    logits = torch.randn(1, 3, 4, 5), torch.randn(1, 2, 4, 5)
    drawn = torch.full((1, 1, 4, 5), 255)
    drawn[:, :, 1:3, 1] = 2  # drawn partly
    drawn[:, :, :2, 3] = 0
    got = complete_mask(*logits, drawn, ignore_index=255)
    assert torch.equal(got, complete_mask(*logits, drawn, slices=[1, 3], ignore_index=255))
    assert not torch.equal(got, complete_mask(*logits, drawn, slices=[1], ignore_index=255))
    assert torch.equal(got, complete_mask(*logits, drawn, slices=range(5), ignore_index=255))
    assert got.max() <= 2
    assert (got[:, :, 1:3, 1] == 2).all()
    assert not got[:, :, :2, 3].any()
    (ranking,) = next_slice(*logits, drawn, ignore_index=255)
    assert sorted(ranking) == [0, 2, 4]


def test_complete_mask_follows_the_image_without_a_residual_decoder():
    image = torch.tensor([0.0, 0, 0, 5, 5, 5]).expand(1, 2, 2, 6)
    drawn = torch.zeros(1, 1, 2, 6, dtype=torch.int64)
    drawn[..., 1] = 2
    flat = torch.tensor([0.1, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 2, 6)
    settings = ChainSettings(image_contrast=1.8, offset=-9.0)
    got = complete_mask(flat, None, drawn, image=image, settings=settings, softmax=True)
    assert got.tolist() == [[[[2, 2, 2, 0, 0, 0]] * 2]]
    masks = torch.cat([drawn == 1, drawn == 2], 1)
    got = complete_mask(flat[:, :2] - 0.2, None, masks, image=image, settings=settings, sigmoid=True, slices=[1])
    assert got[:, 1].tolist() == [[[True, True, True, False, False, False]] * 2]
    assert not got[:, 0].any()


def test_complete_mask_uses_all_settings():
    unary, rho, clamped = random_chain((3, 2), drawn="slice")
    image = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    settings = ChainSettings(tau=0.7, residual_scale=0.5, image_contrast=1.5, offset=(-1.0, 2.0))
    total = 0.5 * rho + torch.tensor([-1.0, 2.0]).view(1, 2, 1, 1)
    total[..., 1:] += 1.5 * (image[..., 1:] - image[..., :-1]).abs().mean(1, keepdim=True)
    got = complete_mask(unary, rho, clamped.clamp(min=0), slices=[1], image=image, settings=settings)
    for (b, i), _, expected in enumerate_volume(0.7 * unary, total, clamped, -1):
        assert got[b, 0, i].tolist() == expected.marginals.argmax(1).tolist()


def test_complete_mask_of_finished_volumes_returns_them():
    label = random_label((3, 2), (4, 5))
    logits = torch.randn(2, 3, 4, 5), torch.randn(2, 2, 4, 5)
    assert torch.equal(complete_mask(*logits, label, slices=range(5)), label)
    assert next_slice(*logits, label, slices=range(5)) == [{}, {}]
    one = [x[..., :1] for x in (*logits, label)]
    assert torch.equal(complete_mask(*one, slices=[0]), one[2])


def test_next_slice_does_not_add_up_nearly_certain_background():
    """5000 voxels with a probability of 0.01 hold more entropy and more errors than 40 of 0.4."""
    p = torch.full((1, 1, 5000, 3), 1e-4)
    p[..., 0] = 0.01
    p[..., 1][..., :40] = 0.4
    assert torch.special.entr(p).sum((0, 1, 2)).argmax() == 0
    (ranking,) = next_slice(p.logit(), torch.zeros_like(p), torch.zeros_like(p), slices=[2], settings=PLAIN)
    assert list(ranking) == [1, 0]
    assert list(ranking.values()) == pytest.approx([40 * 0.4, 0.0], rel=1e-4)


def test_next_slice_never_proposes_a_drawn_slice():
    unary, rho, clamped = random_chain((4, 3), drawn="slice", scale=0.1)
    drawn = clamped.clamp(min=0)
    for slices in ([1], [0, 1, 4], [[1, 3], [2]]):
        for case, ranking in enumerate(next_slice(unary, rho, drawn, slices=slices)):
            known = slices[case] if isinstance(slices[0], list) else slices
            assert sorted([*ranking, *known]) == [0, 1, 2, 3, 4]
    # a partly drawn slice is drawn, although it is uncertain
    drawn[..., 1] = 9
    drawn[:, :, 0, 1] = 2
    assert all(1 not in ranking for ranking in next_slice(unary, rho, drawn, slices=[1], ignore_index=9))


def bad_input(**changes):
    arguments = {
        "segmentation": torch.zeros(1, 3, 4, 5),
        "residual": torch.zeros(1, 2, 4, 5),
        "drawn": torch.ones(1, 1, 4, 5, dtype=torch.int64),
        "slices": [1],
    }
    return {**arguments, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drawn": torch.zeros(1, 1, 4, 5), "slices": None}, "at least one drawn slice"),
        ({"slices": []}, "at least one drawn slice"),
        ({"slices": [5]}, "slices from 0 to 4"),
        ({"slices": [-1]}, "slices from 0 to 4"),
        ({"slices": [[1], [2]]}, "one list of slices for each of 1 cases"),
        ({"drawn": torch.ones(1, 1, 4, 6)}, "expected drawn of shape"),
        ({"drawn": torch.ones(1, 3, 4, 5)}, "expected drawn of shape"),
        ({"residual": torch.zeros(1, 2, 4, 4)}, "expected residual of shape"),
        ({"residual": torch.zeros(1, 1, 4, 5)}, "as many residual channels"),
        ({"drawn": torch.full((1, 1, 4, 5), 3)}, "class indices from 0 to 2 in the drawn slices"),
        ({"drawn": torch.full((1, 1, 4, 5), -1)}, "class indices from 0 to 2 in the drawn slices"),
        ({"drawn": torch.full((1, 1, 4, 5), 0.5)}, "not whole numbers"),
        ({"drawn": torch.full((1, 1, 4, 5), float("nan"))}, "NaN"),
        ({"segmentation": torch.full((1, 3, 4, 5), float("nan"))}, "finite logits"),
        ({"residual": torch.full((1, 2, 4, 5), float("inf"))}, "finite logits"),
        ({"image": torch.full((1, 1, 4, 5), float("nan"))}, "finite image"),
        ({"residual": None, "softmax": True}, "expected image"),
        ({"residual": None, "image": torch.zeros(1, 1, 4, 5)}, "one of sigmoid=True and softmax=True"),
        ({"sigmoid": True}, "expected softmax"),
        ({"image": torch.zeros(1, 1, 4, 4)}, "image of the segmentation's size"),
        ({"settings": ChainSettings(offset=(1.0, 2.0, 3.0))}, "one offset"),
        ({"spatial_axis": 2}, "spatial_axis"),
        ({"slices": torch.arange(5) == 3}, "numbers of slices"),
        ({"drawn": torch.ones(1, 1, 4, 5, dtype=torch.bool)}, "from 0 to 2, got booleans"),
        ({"ignore_index": 1}, "none of the label's values 0 to 2"),
        ({"drawn": torch.ones(1, 1, 4, 5, dtype=torch.uint8), "ignore_index": -1}, "from 0 to 255"),
    ],
)
def test_complete_mask_refuses_bad_input(changes, message):
    for function in (complete_mask, next_slice):
        with pytest.raises(ValueError, match=message):
            function(**bad_input(**changes))


def test_complete_mask_takes_the_number_of_one_slice():
    expected = complete_mask(**bad_input(slices=[3]))
    tensor, array = torch.tensor([3]), np.array([3])
    for slices in (3, tensor, tensor[0], list(tensor), array, list(array), tensor[None], [tensor]):
        assert torch.equal(complete_mask(**bad_input(slices=slices)), expected)


def test_complete_mask_refuses_slices_that_are_no_integers():
    with pytest.raises(TypeError, match="integer"):
        complete_mask(**bad_input(slices=[1.5]))


STEPS = [([3], []), ([1, 5], []), ([0], [3]), ([2, 6], []), ([], [0, 5]), ([4], [6]), ([], [1, 2, 4])]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("channels", "axis"), zip(CHANNELS, [-1, 0, 1, -2, -1], strict=True))
def test_slice_chain_has_the_bits_of_the_whole_volume(channels, axis, threads, monkeypatch):
    """Slices are drawn and taken back in any order."""
    monkeypatch.setitem(BLOCK, "cpu", 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    (classes, foreground), dim = channels, 1 + axis % 3
    generator = torch.Generator().manual_seed(0)
    segmentation, residual, image = (3 * torch.randn(c, 11, 7, 12, generator=generator) for c in (*channels, 1))
    segmentation[0] += 4 if classes > foreground else -4  # much is background for certain
    shape = (1 if classes > foreground else classes, *image.shape[1:])
    label = torch.randint(0, classes if classes > foreground else 2, shape, generator=generator, dtype=torch.int16)
    planes = label.movedim(dim, 0).squeeze(1) if classes > foreground else label.movedim(dim, 0)
    volumes = {"segmentation": segmentation, "residual": residual, "image": image}
    chain = SliceChain(**volumes, spatial_axis=axis)
    for drawn, back in STEPS:
        before = chain.mask.movedim(dim, 0).clone()
        changed = chain.draw({number: planes[number] for number in drawn} | dict.fromkeys(back))
        after = chain.mask.movedim(dim, 0)
        others = [number for number in range(len(planes)) if number not in changed]
        assert torch.equal(after[others], before[others])
        if not chain.drawn:
            break
        whole = {name: volume[None] for name, volume in volumes.items()}
        whole |= {"drawn": label[None], "slices": chain.drawn, "spatial_axis": axis}
        assert torch.equal(chain.mask, complete_mask(**whole)[0])
        (ranking,) = next_slice(**whole)
        assert chain.ranking() == pytest.approx(ranking, rel=1e-3, abs=1e-4)
        sums = chain.error.movedim(dim, 0).flatten(1).sum(1) / 255
        assert {number: sums[number].item() for number in ranking} == pytest.approx(ranking, rel=1e-2, abs=1e-2)
    assert (chain.drawn, changed) == ([], range(len(planes)))
    assert torch.equal(chain.mask, SliceChain(**volumes, spatial_axis=axis).mask)


def test_slice_chain_without_drawn_slices_is_the_argmax_of_the_marginals():
    segmentation, residual = torch.randn(3, 9, 8, 7), torch.randn(2, 9, 8, 7)
    expected = slice_marginals(segmentation[None], residual[None])[0].argmax(0, keepdim=True)
    assert torch.equal(SliceChain(segmentation, residual, settings=PLAIN).mask.long(), expected)


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ({5: torch.zeros(3, 4)}, "slices from 0 to 4, got 5"),
        ({-1: torch.zeros(3, 4)}, "slices from 0 to 4, got -1"),
        ({0: torch.zeros(4, 3)}, r"shape \(3, 4\), got \(4, 3\)"),
        ({0: torch.full((3, 4), 3)}, "class indices from 0 to 2 in the drawn slices"),
    ],
)
def test_slice_chain_refuses_bad_slices_and_keeps_the_others(slices, message):
    chain = SliceChain(torch.randn(3, 3, 4, 5), torch.randn(2, 3, 4, 5), drawn={1: torch.ones(3, 4)})
    with pytest.raises(ValueError, match=message):
        chain.draw({2: torch.ones(3, 4), **slices})
    assert chain.drawn == [1]


def test_chain_settings_are_plain_values():
    settings = ChainSettings(tau=0.5, offset=[-1.0, -2.0])
    assert ChainSettings(**json.loads(json.dumps(asdict(settings)))) == settings
    for wrong in ({"tau": -1.0}, {"image_contrast": -0.1}, {"offset": float("nan")}, {"residual_scale": float("inf")}):
        with pytest.raises(ValueError, match="finite numbers"):
            ChainSettings(**wrong)


def test_drawn_voxels_win_or_the_image_is_refused():
    image = torch.tensor([[[0, 1.5e6, 0, 0]]])
    drawn = torch.tensor([[[1, 1, 1, 0]]])
    arguments = {"segmentation": torch.zeros(1, 1, 4), "residual": torch.zeros(1, 1, 4), "drawn": drawn}
    arguments["slices"] = [0, 1, 2, 3]
    with pytest.raises(ValueError, match="with numbers below 100000 in the chain"):
        complete_mask(**arguments, image=image)
    assert torch.equal(complete_mask(**arguments, image=image / 10), drawn)


def test_slice_chain_made_in_inference_mode_can_be_drawn_on():
    segmentation, residual = torch.zeros(1, 5), torch.tensor([[-9.0, -9.0, 9.0, -9.0, 9.0]])
    with torch.inference_mode():
        chain = SliceChain(segmentation * 1, residual * 1)
    chain.draw({1: torch.tensor([1])})
    assert chain.mask.tolist() == [[1, 1, 0, 0, 1]]


def test_settings_take_numbers_of_numpy():
    settings = ChainSettings(tau=np.float32(0.25), offset=np.float32(-2))
    assert json.loads(json.dumps(asdict(settings))) == asdict(ChainSettings(tau=0.25, offset=-2.0))
    assert json.dumps(asdict(ChainSettings(offset=np.array([-2, -1]))))
