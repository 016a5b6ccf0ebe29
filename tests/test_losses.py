from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.losses import BoundaryLoss, DeepSupervisionLoss, DiceCELoss, DiceFocalLoss
from scipy.ndimage import distance_transform_edt
from torch.profiler import profile

from monai_conres import (
    ChainLoss,
    CompoundBoundaryLoss,
    ConResLoss,
    ConResNet,
    ConResOutput,
    ContextResidualLoss,
    DeviceBoundaryLoss,
)
from monai_conres.losses import signed_distance, squared_distance
from tests import reference

SIZE = (5, 6, 8)
HALF = (3, 3, 4)


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def smooth_mask(random: np.random.Generator, channels: int) -> np.ndarray:
    """Masks of larger pieces, so that residuals are rare."""
    coarse = random.random((2, channels, 3, 3, 4)) > 0.6
    return coarse.repeat(2, 2)[:, :, :5].repeat(2, 3).repeat(2, 4).astype(np.int64)


def heads(random: np.random.Generator, channels: int) -> list[np.ndarray]:
    return [random.normal(0, 2, (2, channels, *size)) for size in (SIZE, HALF)]


# residual loss


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("background_weight", [1.0, 0.3, None])
def test_residual_loss_is_eq_8_and_9(random, axis, background_weight):
    mask, logits = smooth_mask(random, 3), heads(random, 3)
    loss = ContextResidualLoss(spatial_axis=axis, deep_supervision_weight=0.25, background_weight=background_weight)
    got = loss([torch.from_numpy(head) for head in logits], torch.from_numpy(mask))
    expected = reference.residual_loss(logits, mask, axis + 2, 0.25, background_weight)
    assert got.dtype == torch.float64
    assert got.item() == pytest.approx(expected, rel=1e-6)  # the weights' targets are counted in float64, too


def test_residual_loss_of_the_three_kinds_of_label_is_the_same(random):
    classes = random.integers(0, 3, (2, 1, *SIZE))
    onehot = np.concatenate([classes == c for c in range(3)], axis=1).astype(np.float32)
    logits = [torch.from_numpy(head) for head in heads(random, 2)]
    expected = reference.residual_loss([head.numpy() for head in logits], onehot[:, 1:], 4, 0.5, 1.0)
    for label in [
        torch.from_numpy(onehot[:, 1:]),
        torch.from_numpy(onehot[:, 1:] > 0),
        torch.from_numpy(onehot),
        torch.from_numpy(classes),
        torch.from_numpy(classes.astype(np.float32)),
        MetaTensor(torch.from_numpy(classes.astype(np.uint8))),
    ]:
        got = ContextResidualLoss()(logits, label)
        assert type(got) is torch.Tensor
        assert got.item() == pytest.approx(expected, rel=1e-6)


def test_residual_loss_takes_one_tensor(random):
    mask, (logits, _) = smooth_mask(random, 2), heads(random, 2)
    got = ContextResidualLoss()(torch.from_numpy(logits), torch.from_numpy(mask))
    assert got.item() == pytest.approx(reference.residual_loss([logits], mask, 4, 0.5, 1.0), rel=1e-6)


def test_residual_loss_gradient(random):
    mask = torch.from_numpy(smooth_mask(random, 2))
    logits = [torch.from_numpy(head).requires_grad_() for head in heads(random, 2)]
    assert torch.autograd.gradcheck(lambda *heads: ContextResidualLoss()(heads, mask), logits)


@pytest.mark.parametrize("label", [torch.zeros(1, 1, 4, 3, 5), torch.ones(1, 1, 4, 3, 1)], ids=["empty", "one slice"])
@pytest.mark.parametrize("background_weight", [1.0, None])
def test_residual_loss_without_any_residual(label, background_weight):
    logits = torch.zeros(label.shape, requires_grad=True)
    loss = ContextResidualLoss(background_weight=background_weight)(logits, label)
    loss.backward()
    assert loss.item() == pytest.approx(0 if background_weight is None else np.log(2))
    assert logits.grad.isfinite().all()


def test_residual_loss_does_not_overflow_in_half_precision():
    logits = torch.full((1, 1, 4, 4, 4), 60000.0, dtype=torch.float16, requires_grad=True)
    loss = ContextResidualLoss()(logits, torch.zeros(1, 1, 4, 4, 4))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(logits[0, 0, 0, 0, 0].item())
    assert logits.grad.isfinite().all()


def test_residual_loss_gives_every_voxel_a_gradient():
    """For comparison the released code's: logits of the standard deviation that its network has at initialization."""
    torch.manual_seed(0)
    network = ConResNet(2, 2, channels=(8, 16, 32), strides=(2, 2), blocks=(1, 1, 1, 1), spatial_axis=-1)
    label = torch.zeros(1, 2, 16, 24, 20)
    label[:, :, 4:10, 5:12, 6:14] = 1
    _, residuals = network(torch.randn(1, 2, 16, 24, 20))
    gradients = torch.autograd.grad(ContextResidualLoss()(residuals, label), residuals)
    assert all((gradient != 0).all() for gradient in gradients)

    released = ConResNet.released(2, 2, channels=(32, 64, 128), strides=(2, 2), blocks=(1, 1, 1, 1), spatial_axis=-1)
    _, residuals = released(torch.randn(1, 2, 16, 24, 20))
    finest = residuals[0].detach().double().numpy()
    target = reference.residual_mask(label.numpy(), axis=4)
    assert (reference.released_residual_gradient(finest, target) == 0).mean() > 0.9


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_residual_loss_never_waits_for_the_device(channels):
    """A tensor on the meta device has no values: reading one raises."""
    logits = [torch.empty(1, 2, *size, device="meta", requires_grad=True) for size in (SIZE, HALF)]
    loss = ContextResidualLoss(background_weight=None)(logits, torch.empty(1, channels, *SIZE, device="meta"))
    loss.backward()
    assert loss.device.type == "meta"


def test_joint_loss_never_waits_for_the_device():
    label = torch.empty(1, 1, *SIZE, device="meta")
    output = ConResOutput(torch.empty(1, 3, *SIZE, device="meta"), (torch.empty(1, 2, *SIZE, device="meta"),))
    assert ConResLoss(softmax=True)(output, label).device.type == "meta"
    output = ConResOutput(torch.empty(1, 3, *SIZE, device="meta"), (torch.empty(1, 3, *SIZE, device="meta"),))
    label = torch.empty(1, 3, *SIZE, device="meta")
    assert ConResLoss(sigmoid=True)(output, label).device.type == "meta"


def test_residual_loss_reads_the_label_once(random):
    logits = [torch.from_numpy(head) for head in heads(random, 2)]
    label = torch.from_numpy(smooth_mask(random, 2))
    with profile() as trace:
        ContextResidualLoss()(logits, label)
    reads = {event.key: event.count for event in trace.key_averages()}.get("aten::_local_scalar_dense", 0)
    assert reads == 2  # its minimum and its maximum


def test_residual_loss_compiles_without_graph_break(random):
    """The joint loss has one, in MONAI's DiceLoss."""
    logits = tuple(torch.from_numpy(head).float() for head in heads(random, 3))
    label = torch.from_numpy(smooth_mask(random, 3)).float()
    loss = ContextResidualLoss()
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits, label), loss(logits, label))


def test_residual_loss_keeps_the_mean_of_w_1(random):
    loss, weights = ContextResidualLoss(spatial_axis=1), []
    for number in range(4):
        mask, logits = smooth_mask(random, 2), heads(random, 2)
        mask[:, 1] *= number % 2  # the second class is in two of the four batches
        loss([torch.from_numpy(head) for head in logits], torch.from_numpy(mask))
        changed = reference.residual_mask(mask, 3).mean((0, 2, 3, 4))
        weights.append(np.log(1 / np.where(changed == 0, np.nan, changed)))
    np.testing.assert_allclose(loss.mean_w_1.numpy(), np.nanmean(weights, axis=0), rtol=1e-6)
    before = loss.mean_w_1.clone()
    with torch.no_grad():  # validation
        loss([torch.from_numpy(head) for head in logits], torch.ones(2, 2, *SIZE))
    assert torch.equal(loss.mean_w_1, before)
    assert not loss.state_dict()  # weights of losses from before still load


# joint loss


def test_sigmoid_loss_is_eq_7_and_the_residual_loss(random):
    mask, logits = smooth_mask(random, 3), heads(random, 3)
    segmentation = random.normal(0, 2, (2, 3, *SIZE))
    output = ConResOutput(torch.from_numpy(segmentation), tuple(map(torch.from_numpy, logits)))
    got = ConResLoss(sigmoid=True, residual_weight=0.7, spatial_axis=1)(output, torch.from_numpy(mask))
    expected = reference.binary_segmentation_loss(segmentation, mask)
    expected += 0.7 * reference.residual_loss(logits, mask, 3, 0.5, 1.0)
    assert got.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["indices", "one-hot", "masks"])
def test_softmax_loss_is_cross_entropy_dice_and_residual_loss(random, kind):
    classes = random.integers(0, 4, (2, 1, *SIZE))
    onehot = np.concatenate([classes == c for c in range(4)], axis=1).astype(np.float32)
    segmentation, logits = random.normal(0, 2, (2, 4, *SIZE)), heads(random, 3)
    output = ConResOutput(torch.from_numpy(segmentation), tuple(map(torch.from_numpy, logits)))
    label = torch.from_numpy({"indices": classes, "one-hot": onehot, "masks": onehot[:, 1:]}[kind])
    expected = reference.multiclass_segmentation_loss(segmentation, classes)
    got = ConResLoss(softmax=True)(output.segmentation, label)
    assert got.item() == pytest.approx(expected, rel=1e-5)
    expected += reference.residual_loss(logits, onehot[:, 1:], 4, 0.5, 1.0)
    assert ConResLoss(softmax=True)(output, label).item() == pytest.approx(expected, rel=1e-5)


def test_joint_loss_of_a_plain_tensor_is_the_segmentation_loss(random):
    mask, segmentation = smooth_mask(random, 3), random.normal(0, 2, (2, 3, *SIZE))
    expected = reference.binary_segmentation_loss(segmentation, mask)
    for output in (torch.from_numpy(segmentation), ConResOutput(torch.from_numpy(segmentation), ())):
        assert ConResLoss(sigmoid=True)(output, torch.from_numpy(mask)).item() == pytest.approx(expected, rel=1e-5)


def test_joint_loss_gives_an_own_loss_output_and_label(random):
    classes = torch.from_numpy(random.integers(0, 3, (2, 1, *SIZE))).float()
    logits = tuple(torch.from_numpy(head) for head in heads(random, 2))
    deep = [torch.from_numpy(random.normal(size=(2, 3, *size))) for size in (SIZE, HALF)]
    own = DeepSupervisionLoss(DiceFocalLoss(softmax=True, to_onehot_y=True))
    got = ConResLoss(own)(ConResOutput(deep, logits), classes)
    expected = own(deep, classes) + ContextResidualLoss()(logits, classes)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("ignore_index", [None, 255])
def test_own_loss_takes_class_indices_without_a_channel(random, ignore_index):
    label = torch.from_numpy(random.integers(0, 3, (2, *SIZE)))
    if ignore_index is not None:
        label[:, :2] = ignore_index
    segmentation = torch.from_numpy(random.normal(size=(2, 3, *SIZE)))
    logits = tuple(torch.from_numpy(head) for head in heads(random, 2))
    own = torch.nn.CrossEntropyLoss(**({} if ignore_index is None else {"ignore_index": ignore_index}))
    joint = ConResLoss(own, ignore_index=ignore_index)
    expected = own(segmentation, label) + ContextResidualLoss(ignore_index=ignore_index)(logits, label[:, None])
    torch.testing.assert_close(joint(ConResOutput(segmentation, logits), label), expected)
    torch.testing.assert_close(joint(segmentation, label), own(segmentation, label))
    if ignore_index is None:
        boundary = DeviceBoundaryLoss(softmax=True)
        compound = CompoundBoundaryLoss(joint, boundary, max_steps=2, final_alpha=0.5)
        compound.step()
        expected = 0.75 * expected + 0.25 * boundary(segmentation, label[:, None])
        torch.testing.assert_close(compound(ConResOutput(segmentation, logits), label), expected)
    through_chain = ChainLoss(own, max_drawn=0, ignore_index=ignore_index)
    with_channel = ChainLoss(lambda p, y: own(p, y[:, 0]), max_drawn=0, ignore_index=ignore_index)
    output = ConResOutput(segmentation, logits)
    torch.testing.assert_close(through_chain(output, label), with_channel(output, label[:, None]))


# boundary loss


@pytest.mark.parametrize("shape", [(2, 2, 7, 9), (2, 3, 5, 8, 6), (1, 1, 1, 4, 12), (1, 2, 21, 3, 2)])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_distances_are_those_of_scipy(monkeypatch, shape, share):
    masks = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < share
    for mask, distance in zip(masks.flatten(0, 1), squared_distance(masks).flatten(0, 1), strict=True):
        if mask.all():
            assert distance.isinf().all()
        else:
            torch.testing.assert_close(distance, torch.from_numpy(distance_transform_edt(mask) ** 2).float())
    expected = BoundaryLoss().compute_distance_map(masks.float())
    torch.testing.assert_close(signed_distance(masks), expected, rtol=1e-6, atol=1e-5)
    monkeypatch.setattr("monai_conres.losses.has_scipy", False)  # as on a GPU
    torch.testing.assert_close(signed_distance(masks), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("has_scipy", [False, True])
def test_distance_of_an_empty_or_full_mask_is_zero(monkeypatch, has_scipy):
    monkeypatch.setattr("monai_conres.losses.has_scipy", has_scipy)
    masks = torch.zeros(1, 3, 4, 5, 6, dtype=torch.bool)
    masks[:, 1] = True
    masks[:, 2, 1:3, 2, 2:5] = True
    signed = signed_distance(masks)
    assert not signed[:, :2].any()
    torch.testing.assert_close(signed, BoundaryLoss().compute_distance_map(masks.float()))


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
@pytest.mark.parametrize("softmax", [False, True])
def test_device_boundary_loss_is_that_of_monai(device, softmax):
    options = {"softmax": softmax, "sigmoid": not softmax, "include_background": not softmax}
    logits, other = torch.randn(2, 2, 3, 6, 8, 5, generator=torch.Generator().manual_seed(2))
    label = other.argmax(1, keepdim=True) if softmax else (other > 0).float()
    values, gradients = [], []
    expected = BoundaryLoss(**options, to_onehot_y=softmax)
    for loss, place in ((expected, "cpu"), (DeviceBoundaryLoss(**options), device)):
        taken = logits.to(place).requires_grad_()
        values.append(loss(taken, label.to(place)))
        gradients.append(torch.autograd.grad(values[-1], taken)[0].cpu())
    torch.testing.assert_close(values[1].cpu(), values[0])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_device_boundary_loss_needs_a_channel():
    loss = DeviceBoundaryLoss(sigmoid=True, include_background=False)
    with pytest.raises(ValueError, match="2 or more channels with include_background=False, got 1"):
        loss(torch.zeros(1, 1, 3, 3, 3), torch.zeros(1, 1, 3, 3, 3))


def test_device_boundary_loss_never_waits_for_the_device():
    """Tensors without values, on which anything that waits is an error."""
    for softmax in (False, True):
        logits = torch.zeros(2, 3, 6, 8, 5, device="meta", requires_grad=True)
        label = torch.zeros(2, 1 if softmax else 3, 6, 8, 5, device="meta")
        DeviceBoundaryLoss(softmax=softmax, sigmoid=not softmax)(logits, label).backward()
        assert logits.grad.shape == logits.shape


@pytest.mark.parametrize("shape", [(2, 1, 6, 8, 5), (2, 3, 6, 8, 4), (2, 3, 6, 8)])
def test_device_boundary_loss_refuses_labels_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"of the shape \(2, 3, 6, 8, 5\) of the logits, got \(2, "):
        DeviceBoundaryLoss(sigmoid=True)(torch.zeros(2, 3, 6, 8, 5), torch.zeros(shape))
    with pytest.raises(ValueError, match="one of sigmoid and softmax"):
        DeviceBoundaryLoss()


def test_compound_loss_is_eq_14(random):
    mask = torch.from_numpy(smooth_mask(random, 2)).float()
    logits = torch.from_numpy(random.normal(size=(2, 2, *SIZE)))
    output = ConResOutput(logits, (logits,))
    joint, boundary = ConResLoss(sigmoid=True), DeviceBoundaryLoss(sigmoid=True)
    loss = CompoundBoundaryLoss(joint, boundary, max_steps=4)
    for t in range(7):
        alpha = 1 - min(t, 4) * 0.99 / 4
        expected = alpha * joint(output, mask) + (1 - alpha) * boundary(logits, mask)
        torch.testing.assert_close(loss(output, mask), expected)
        loss.step()


def test_compound_loss_goes_on_where_it_was():
    loss, resumed = (CompoundBoundaryLoss(torch.nn.MSELoss(), torch.nn.L1Loss(), max_steps=10) for _ in range(2))
    for _ in range(3):
        loss.step()
    resumed.load_state_dict(loss.state_dict())
    assert resumed.alpha.item() == pytest.approx(1 - 3 * 0.099)


# errors


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (torch.full((1, 2, *SIZE), float("nan")), "zeros and ones.*got NaN"),
        (torch.full((1, 2, *SIZE), 0.5), "zeros and ones.*got values from 0.5 to 0.5, not whole numbers"),
        (torch.full((1, 2, *SIZE), 3), "zeros and ones.*got values from 3 to 3"),
        (torch.zeros(1, 4, *SIZE), r"1 channel \(class indices\), 2 \(masks\) or 3 \(one-hot\).*got shape \(1, 4, 5"),
        (torch.zeros(2, 2, *SIZE), r"batch and channels \(2, 2\) for a label .*got shape \(1, 2, 5, 6, 8\)"),
        (torch.zeros(2), r"expected a tensor of shape \(b, c, \*spatial\)"),
    ],
)
def test_residual_loss_errors(label, message):
    with pytest.raises(ValueError, match=message):
        ContextResidualLoss()(torch.zeros(1, 2, *SIZE), label)


def test_residual_loss_refuses_other_values_and_no_logits():
    with pytest.raises(ValueError, match="class indices from 0 to 2, got values from 0 to 4"):
        ContextResidualLoss()(torch.zeros(1, 2, *SIZE), torch.arange(5).view(1, 1, 5, 1, 1))
    with pytest.raises(ValueError, match=r'got none: a network with context="none"'):
        ContextResidualLoss()((), torch.zeros(1, 2, *SIZE))
    with pytest.raises(ValueError, match="spatial_axis between -3 and 2"):
        ContextResidualLoss(spatial_axis=3)(torch.zeros(1, 2, *SIZE), torch.zeros(1, 2, *SIZE))
    with pytest.raises(ValueError, match="residual logits no larger than the label"):
        ContextResidualLoss()(torch.zeros(1, 1, *SIZE), torch.zeros(1, 1, 5, 6, 7))


@pytest.mark.parametrize(
    ("own", "flags"),
    [
        (None, {}),
        (None, {"sigmoid": True, "softmax": True}),
        (DiceCELoss(softmax=True, to_onehot_y=True), {"softmax": True}),
    ],
)
def test_joint_loss_wants_exactly_one_segmentation_loss(own, flags):
    with pytest.raises(ValueError, match="exactly one of an own segmentation_loss, sigmoid=True and softmax=True"):
        ConResLoss(own, **flags)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_softmax_loss_refuses_a_residual_mask_for_each_channel(channels):
    """The default network predicts one for each channel; its first would be the background's."""
    logits = torch.zeros(1, 3, *SIZE)
    with pytest.raises(
        ValueError, match=r"expected 2 residual masks with softmax=True for 3 .*include_background=False"
    ):
        ConResLoss(softmax=True)(ConResOutput(logits, (logits,)), torch.zeros(1, channels, *SIZE))


def test_sigmoid_loss_refuses_a_network_for_a_softmax():
    logits = torch.zeros(1, 3, *SIZE)
    with pytest.raises(
        ValueError, match=r"expected 3 residual masks with sigmoid=True for 3 .*include_background=True"
    ):
        ConResLoss(sigmoid=True)(ConResOutput(logits, (logits[:, 1:],)), logits)


def test_sigmoid_loss_of_one_class(random):
    mask, (logits, _) = smooth_mask(random, 1), heads(random, 1)
    output = ConResOutput(torch.from_numpy(logits), (torch.from_numpy(logits),))
    expected = reference.binary_segmentation_loss(logits, mask) + reference.residual_loss([logits], mask, 4, 0.5, 1.0)
    assert ConResLoss(sigmoid=True)(output, torch.from_numpy(mask)).item() == pytest.approx(expected, rel=1e-5)


def test_joint_loss_refuses_class_indices_for_sigmoids():
    logits, label = torch.zeros(1, 3, *SIZE), torch.ones(1, 1, *SIZE)
    with pytest.raises(ValueError, match="3 channels of zeros and ones with sigmoid=True, got one channel"):
        ConResLoss(sigmoid=True)(logits, label)  # a plain tensor, as in validation
    own = DiceCELoss(softmax=True, to_onehot_y=True)
    with pytest.raises(ValueError, match="class indices, build the network with include_background=False"):
        ConResLoss(own)(ConResOutput(logits, (logits,)), label)


def test_joint_loss_refuses_other_numbers_of_residual_masks():
    logits = torch.zeros(1, 4, *SIZE)
    with pytest.raises(ValueError, match=r"expected 4 residual masks \(sigmoids\) or 3 \(softmax\) for 4 .* got 2"):
        ConResLoss(DiceFocalLoss(sigmoid=True))(ConResOutput(logits, (logits[:, :2],)), logits)


def test_default_loss_refuses_labels_that_do_not_fit():
    loss = ConResLoss(softmax=True)
    segmentation, label = torch.zeros(1, 3, *SIZE), torch.zeros(1, 1, *SIZE)
    with pytest.raises(ValueError, match=r"same batch and size as the logits .*got shape \(1, 1, 5, 6, 4\)"):
        loss(segmentation, label[..., :4])
    with pytest.raises(ValueError, match=r"add the channel: label\[:, None\]"):
        loss(segmentation, label[:, 0])
    for output in (segmentation, ConResOutput(segmentation, (segmentation[:, 1:],))):
        with pytest.raises(ValueError, match="class indices from 0 to 2, got values from 7"):
            loss(output, label + 7)
        with pytest.raises(ValueError, match=r"zeros and ones, .*got .* not whole numbers"):
            loss(output, segmentation + 0.5)
    with pytest.raises(ValueError, match="masks that do not overlap, for a softmax"):
        loss(segmentation, torch.ones(1, 2, *SIZE))
    for output in (segmentation[:, :1], ConResOutput(segmentation[:, :1], (segmentation[:, :1],))):
        with pytest.raises(ValueError, match=r"one channel goes with sigmoid=True"):
            loss(output, label)
    for deep in ([segmentation, segmentation], torch.stack([segmentation, segmentation], 1)):
        with pytest.raises(TypeError, match=r"got a list of 2 tensors; for a network with deep supervision"):
            loss(ConResOutput(deep, ()), label)


def test_stacked_deep_supervision_reaches_the_loss_as_a_list(random):
    stacked = torch.from_numpy(random.normal(size=(2, 3, 3, *SIZE)))
    label = torch.from_numpy(random.integers(0, 3, (2, 1, *SIZE))).float()
    own = DeepSupervisionLoss(DiceCELoss(softmax=True, to_onehot_y=True))
    got = ConResLoss(own)(ConResOutput(stacked, ()), label)
    torch.testing.assert_close(got, own([stacked[:, 0], stacked[:, 1], stacked[:, 2]], label))


def test_stacked_deep_supervision_reaches_the_boundary_loss_as_a_list(random):
    mask = torch.from_numpy(smooth_mask(random, 2)).float()
    stacked = torch.from_numpy(random.normal(size=(2, 3, 2, *SIZE)))
    joint, boundary = (DeepSupervisionLoss(loss(sigmoid=True)) for loss in (DiceFocalLoss, DeviceBoundaryLoss))
    loss = CompoundBoundaryLoss(ConResLoss(joint), boundary, max_steps=2)
    loss.step()
    expected = 0.505 * joint(list(stacked.unbind(1)), mask) + 0.495 * boundary(list(stacked.unbind(1)), mask)
    torch.testing.assert_close(loss(ConResOutput(stacked, ()), mask), expected)


def test_boundary_loss_gets_the_first_of_deep_supervision(random):
    mask = torch.from_numpy(smooth_mask(random, 2)).float()
    stacked = torch.from_numpy(random.normal(size=(2, 3, 2, *SIZE)))
    joint, boundary = DeepSupervisionLoss(DiceFocalLoss(sigmoid=True)), DeviceBoundaryLoss(sigmoid=True)
    loss = CompoundBoundaryLoss(ConResLoss(joint), boundary, max_steps=2)
    loss.step()
    expected = 0.505 * joint(list(stacked.unbind(1)), mask) + 0.495 * boundary(stacked[:, 0], mask)
    for output in (stacked, list(stacked.unbind(1))):
        torch.testing.assert_close(loss(ConResOutput(output, ()), mask), expected)


def test_joint_loss_takes_a_function(random):
    mask = torch.from_numpy(smooth_mask(random, 2)).float()
    logits = torch.from_numpy(random.normal(size=(2, 2, *SIZE))).float()
    own = torch.nn.functional.binary_cross_entropy_with_logits
    torch.testing.assert_close(ConResLoss(own)(logits, mask), own(logits, mask))


def test_default_losses_are_computed_in_float32():
    torch.manual_seed(0)
    logits = torch.randn(1, 3, 64, 64, 16) * 8
    for flags, classes in (({"softmax": True}, (1, 3)), ({"sigmoid": True}, (3, 2))):
        label = torch.randint(0, classes[1], (1, classes[0], 64, 64, 16))
        half = logits.half()
        torch.testing.assert_close(ConResLoss(**flags)(half, label), ConResLoss(**flags)(half.float(), label))


def test_compound_loss_refuses_no_steps():
    with pytest.raises(ValueError, match="max_steps of 1 or more"):
        CompoundBoundaryLoss(torch.nn.MSELoss(), torch.nn.L1Loss(), max_steps=0)


def test_compound_loss_refuses_dictionaries_of_logits():
    label = torch.zeros(1, 1, *SIZE)
    output = ConResOutput({"out": torch.zeros(1, 1, *SIZE)}, ())
    joint = ConResLoss(lambda segmentation, label: (segmentation["out"] + 3).mean())
    assert joint(output, label) == 3
    with pytest.raises(TypeError, match=r"got a dictionary of \['out'\]"):
        CompoundBoundaryLoss(joint, DeviceBoundaryLoss(sigmoid=True), max_steps=3)(output, label)
