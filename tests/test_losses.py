from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.losses import BoundaryLoss, DeepSupervisionLoss, DiceCELoss, DiceFocalLoss, FocalLoss
from torch.profiler import profile

from monai_conres import CompoundBoundaryLoss, ConResLoss, ConResNet, ConResOutput, ContextResidualLoss
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
    for loss, label in [
        (ContextResidualLoss(), torch.from_numpy(onehot[:, 1:])),
        (ContextResidualLoss(include_background=False), torch.from_numpy(onehot)),
        (ContextResidualLoss(to_onehot_y=True), torch.from_numpy(classes)),
        (ContextResidualLoss(to_onehot_y=True), torch.from_numpy(classes.astype(np.float32))),
        (ContextResidualLoss(to_onehot_y=True), MetaTensor(torch.from_numpy(classes.astype(np.uint8)))),
        (ContextResidualLoss(), torch.from_numpy(onehot[:, 1:] > 0)),
    ]:
        got = loss(logits, label)
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
    label = torch.zeros(1, 1, 4, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ContextResidualLoss()(logits, label)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(logits[0, 0, 0, 0, 0].item())
    assert logits.grad.isfinite().all()


def test_no_voxel_of_the_residual_loss_is_without_gradient_at_initialization():
    """And beside it the released code's: logits of the standard deviation that its network has at initialization."""
    torch.manual_seed(0)
    network = ConResNet(2, 2, channels=(8, 16, 32), strides=(2, 2), blocks=(1, 1, 1, 1), spatial_axis=-1)
    label = torch.zeros(1, 2, 16, 24, 20)
    label[:, :, 4:10, 5:12, 6:14] = 1
    _, residuals = network(torch.randn(1, 2, 16, 24, 20))
    gradients = torch.autograd.grad(ContextResidualLoss()(residuals, label), residuals)
    assert all((gradient != 0).all() for gradient in gradients)

    released = ConResNet.authors(2, 2, channels=(32, 64, 128), strides=(2, 2), blocks=(1, 1, 1, 1), spatial_axis=-1)
    _, residuals = released(torch.randn(1, 2, 16, 24, 20))
    finest = residuals[0].detach().double().numpy()
    target = reference.residual_mask(label.numpy(), axis=4)
    assert (reference.released_residual_gradient(finest, target) == 0).mean() > 0.9


@pytest.mark.parametrize("flags", [{}, {"include_background": False}, {"to_onehot_y": True}])
def test_residual_loss_never_waits_for_the_device(flags):
    """A tensor on the meta device has no values: reading one raises."""
    channels = {"include_background": 3, "to_onehot_y": 1}.get(next(iter(flags), None), 2)
    logits = [torch.empty(1, 2, *size, device="meta", requires_grad=True) for size in (SIZE, HALF)]
    loss = ContextResidualLoss(background_weight=None, **flags)(logits, torch.empty(1, channels, *SIZE, device="meta"))
    loss.backward()
    assert loss.device.type == "meta"


def test_joint_loss_never_waits_for_the_device():
    label = torch.empty(1, 1, *SIZE, device="meta")
    output = ConResOutput(torch.empty(1, 3, *SIZE, device="meta"), (torch.empty(1, 2, *SIZE, device="meta"),))
    assert ConResLoss(softmax=True, to_onehot_y=True)(output, label).device.type == "meta"
    output = ConResOutput(torch.empty(1, 3, *SIZE, device="meta"), (torch.empty(1, 3, *SIZE, device="meta"),))
    label = torch.empty(1, 3, *SIZE, device="meta")
    assert ConResLoss(sigmoid=True)(output, label).device.type == "meta"


def test_the_label_is_read_once_on_the_cpu(random):
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


# joint loss


def test_sigmoid_loss_is_eq_7_and_the_residual_loss(random):
    mask, logits = smooth_mask(random, 3), heads(random, 3)
    segmentation = random.normal(0, 2, (2, 3, *SIZE))
    output = ConResOutput(torch.from_numpy(segmentation), tuple(map(torch.from_numpy, logits)))
    got = ConResLoss(sigmoid=True, residual_weight=0.7, spatial_axis=1)(output, torch.from_numpy(mask))
    expected = reference.binary_segmentation_loss(segmentation, mask)
    expected += 0.7 * reference.residual_loss(logits, mask, 3, 0.5, 1.0)
    assert got.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("to_onehot_y", [True, False])
def test_softmax_loss(random, to_onehot_y):
    classes = random.integers(0, 4, (2, 1, *SIZE))
    onehot = np.concatenate([classes == c for c in range(4)], axis=1).astype(np.float32)
    segmentation, logits = random.normal(0, 2, (2, 4, *SIZE)), heads(random, 3)
    output = ConResOutput(torch.from_numpy(segmentation), tuple(map(torch.from_numpy, logits)))
    got = ConResLoss(softmax=True, to_onehot_y=to_onehot_y)(
        output, torch.from_numpy(classes if to_onehot_y else onehot)
    )
    expected = reference.multiclass_segmentation_loss(segmentation, classes)
    expected += reference.residual_loss(logits, onehot[:, 1:], 4, 0.5, 1.0)
    assert got.item() == pytest.approx(expected, rel=1e-5)


def test_sigmoid_loss_of_class_indices(random):
    classes = random.integers(0, 3, (2, 1, *SIZE))
    onehot = np.concatenate([classes == c for c in range(3)], axis=1).astype(np.float64)
    segmentation, logits = random.normal(0, 2, (2, 3, *SIZE)), heads(random, 2)
    output = ConResOutput(torch.from_numpy(segmentation), tuple(map(torch.from_numpy, logits)))
    got = ConResLoss(sigmoid=True, to_onehot_y=True)(output, torch.from_numpy(classes))
    expected = reference.binary_segmentation_loss(segmentation, onehot)
    expected += reference.residual_loss(logits, onehot[:, 1:], 4, 0.5, 1.0)
    assert got.item() == pytest.approx(expected, rel=1e-5)


def test_a_plain_tensor_or_no_residuals_is_the_segmentation_loss_alone(random):
    mask, segmentation = smooth_mask(random, 3), random.normal(0, 2, (2, 3, *SIZE))
    expected = reference.binary_segmentation_loss(segmentation, mask)
    for output in (torch.from_numpy(segmentation), ConResOutput(torch.from_numpy(segmentation), ())):
        assert ConResLoss(sigmoid=True)(output, torch.from_numpy(mask)).item() == pytest.approx(expected, rel=1e-5)


def test_any_segmentation_loss_gets_segmentation_and_label_as_they_are(random):
    classes = torch.from_numpy(random.integers(0, 3, (2, 1, *SIZE))).float()
    logits = tuple(torch.from_numpy(head) for head in heads(random, 2))
    deep = [torch.from_numpy(random.normal(size=(2, 3, *size))) for size in (SIZE, HALF)]
    own = DeepSupervisionLoss(DiceFocalLoss(softmax=True, to_onehot_y=True))
    got = ConResLoss(own, softmax=True, to_onehot_y=True)(ConResOutput(deep, logits), classes)
    expected = own(deep, classes) + ContextResidualLoss(to_onehot_y=True)(logits, classes)
    torch.testing.assert_close(got, expected)


# boundary loss


def test_compound_loss_is_eq_14(random):
    mask = torch.from_numpy(smooth_mask(random, 2)).float()
    logits = torch.from_numpy(random.normal(size=(2, 2, *SIZE)))
    output = ConResOutput(logits, (logits,))
    joint, boundary = ConResLoss(sigmoid=True), BoundaryLoss(sigmoid=True)
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
        (torch.zeros(1, 3, *SIZE), r"batch and channels \(1, 3\).*got shape \(1, 2, 5, 6, 8\).*residual_channels"),
        (torch.zeros(2), r"expected a tensor of shape \(b, c, \*spatial\)"),
    ],
)
def test_residual_loss_errors(label, message):
    with pytest.raises(ValueError, match=message):
        ContextResidualLoss()(torch.zeros(1, 2, *SIZE), label)


def test_residual_loss_errors_of_class_indices():
    with pytest.raises(ValueError, match="class indices from 0 to 2, got values from 0 to 4"):
        ContextResidualLoss(to_onehot_y=True)(torch.zeros(1, 2, *SIZE), torch.arange(5).view(1, 1, 5, 1, 1))
    with pytest.raises(ValueError, match="one of to_onehot_y=True and include_background=False"):
        ContextResidualLoss(to_onehot_y=True, include_background=False)
    with pytest.raises(ValueError, match=r"got none.*mapping=False"):
        ContextResidualLoss()((), torch.zeros(1, 2, *SIZE))
    with pytest.raises(ValueError, match="spatial_axis between -3 and 2"):
        ContextResidualLoss(spatial_axis=3)(torch.zeros(1, 2, *SIZE), torch.zeros(1, 2, *SIZE))


@pytest.mark.parametrize("flags", [{}, {"sigmoid": True, "softmax": True}])
def test_exactly_one_activation(flags):
    with pytest.raises(ValueError, match="exactly one of sigmoid=True"):
        ConResLoss(**flags)


def test_joint_loss_errors():
    loss = ConResLoss(softmax=True, to_onehot_y=True)
    label = torch.zeros(1, 1, *SIZE)
    segmentation = torch.zeros(1, 3, *SIZE)
    with pytest.raises(
        ValueError, match=r"expected 2 residual channels.*got 3.*residual_channels=2 \(out_channels - 1"
    ):
        loss(ConResOutput(segmentation, (segmentation,)), label)
    with pytest.raises(ValueError, match=r"expected a label of shape \(1, 1, 5, 6, 8\).*got \(1, 1, 5, 6, 4\)"):
        loss(segmentation, label[..., :4])
    with pytest.raises(ValueError, match="need to_onehot_y=True"):
        ConResLoss(softmax=True)(segmentation, label)
    with pytest.raises(ValueError, match="a one-hot label goes without to_onehot_y"):
        loss(segmentation, segmentation)
    residuals = (segmentation[:, 1:],)
    for output in (segmentation, ConResOutput(segmentation, residuals)):
        with pytest.raises(ValueError, match="class indices from 0 to 2, got values from 7"):
            loss(output, label + 7)
        with pytest.raises(ValueError, match=r"zeros and ones, got .* not whole numbers"):
            ConResLoss(softmax=True)(output, segmentation + 0.5)
    with pytest.raises(
        TypeError, match=r"got a list of 2 tensors; for a network with deep supervision.*DeepSupervisionLoss"
    ):
        loss(ConResOutput([segmentation, segmentation], ()), label)
    with pytest.raises(TypeError, match=r"got a list of 2 tensors; for a"):
        loss(ConResOutput(torch.stack([segmentation, segmentation], 1), ()), label)


def test_one_channel_is_for_the_sigmoid():
    logits, label = torch.zeros(1, 1, *SIZE), torch.zeros(1, 1, *SIZE)
    for flags in ({"softmax": True}, {"sigmoid": True, "to_onehot_y": True}):
        with pytest.raises(ValueError, match="one channel goes with sigmoid=True and a label of zeros and ones"):
            ConResLoss(**flags)(logits, label)


def test_label_of_another_image_or_without_a_channel():
    deep = [torch.zeros(1, 3, *SIZE)]
    own = ConResLoss(DeepSupervisionLoss(DiceCELoss(softmax=True, to_onehot_y=True)), softmax=True, to_onehot_y=True)
    for label, remedy in ((torch.zeros(1, 1, 4, 6, 8), "the same image"), (torch.zeros(1, *SIZE), r"label\[:, None\]")):
        with pytest.raises(ValueError, match=rf"expected a label of shape \(1, 1, 5, 6, 8\).*{remedy}"):
            own(ConResOutput(deep, ()), label)
    with pytest.raises(ValueError, match="residual logits no larger than the label"):
        ContextResidualLoss()(torch.zeros(1, 1, *SIZE), torch.zeros(1, 1, 5, 6, 7))


def test_stacked_deep_supervision_reaches_the_loss_as_a_list(random):
    stacked = torch.from_numpy(random.normal(size=(2, 3, 3, *SIZE)))
    label = torch.from_numpy(random.integers(0, 3, (2, 1, *SIZE))).float()
    own = DeepSupervisionLoss(DiceCELoss(softmax=True, to_onehot_y=True))
    got = ConResLoss(own, softmax=True, to_onehot_y=True)(ConResOutput(stacked, ()), label)
    torch.testing.assert_close(got, own([stacked[:, 0], stacked[:, 1], stacked[:, 2]], label))


def test_stacked_deep_supervision_reaches_the_boundary_loss_as_a_list(random):
    mask = torch.from_numpy(smooth_mask(random, 2)).float()
    stacked = torch.from_numpy(random.normal(size=(2, 3, 2, *SIZE)))
    joint, boundary = (DeepSupervisionLoss(loss(sigmoid=True)) for loss in (DiceFocalLoss, BoundaryLoss))
    loss = CompoundBoundaryLoss(ConResLoss(joint, sigmoid=True), boundary, max_steps=2)
    loss.step()
    expected = 0.505 * joint(list(stacked.unbind(1)), mask) + 0.495 * boundary(list(stacked.unbind(1)), mask)
    torch.testing.assert_close(loss(ConResOutput(stacked, ()), mask), expected)


def test_a_plain_boundary_loss_sees_the_final_one_of_deep_supervision(random):
    mask = torch.from_numpy(smooth_mask(random, 2)).float()
    stacked = torch.from_numpy(random.normal(size=(2, 3, 2, *SIZE)))
    joint, boundary = DeepSupervisionLoss(DiceFocalLoss(sigmoid=True)), BoundaryLoss(sigmoid=True)
    loss = CompoundBoundaryLoss(ConResLoss(joint, sigmoid=True), boundary, max_steps=2)
    loss.step()
    expected = 0.505 * joint(list(stacked.unbind(1)), mask) + 0.495 * boundary(stacked[:, 0], mask)
    for output in (stacked, list(stacked.unbind(1))):
        torch.testing.assert_close(loss(ConResOutput(output, ()), mask), expected)


def test_a_function_is_a_segmentation_loss_too(random):
    mask = torch.from_numpy(smooth_mask(random, 2)).float()
    logits = torch.from_numpy(random.normal(size=(2, 2, *SIZE))).float()
    own = torch.nn.functional.binary_cross_entropy_with_logits
    torch.testing.assert_close(ConResLoss(own, sigmoid=True)(logits, mask), own(logits, mask))


def test_segmentation_and_residual_of_eval_mode_are_no_deep_supervision():
    network = ConResNet(1, 2, channels=(8, 16), strides=(2,), blocks=(1, 1, 1), eval_residual=True).eval()
    output = network(torch.randn(1, 1, 6, 8, 10))
    own = DeepSupervisionLoss(DiceFocalLoss(sigmoid=True))
    for loss in (ConResLoss(sigmoid=True), ConResLoss(own, sigmoid=True)):
        with pytest.raises(TypeError, match="eval_residual=True; give the first of them alone"):
            loss(output, torch.zeros(1, 2, 6, 8, 10))


def test_default_losses_are_computed_in_float32():
    torch.manual_seed(0)
    logits, label = torch.randn(1, 3, 64, 64, 16) * 8, torch.randint(0, 3, (1, 1, 64, 64, 16))
    for flags in ({"softmax": True}, {"sigmoid": True}):
        loss = ConResLoss(to_onehot_y=True, **flags)
        half = logits.half()
        torch.testing.assert_close(loss(half, label), loss(half.float(), label))


def test_losses_of_the_other_activation():
    for loss in (torch.nn.CrossEntropyLoss(), FocalLoss(use_softmax=True)):
        with pytest.raises(ValueError, match="sigmoid=True, as the flags here"):
            ConResLoss(loss, sigmoid=True)


@pytest.mark.parametrize("wrap", [lambda loss: loss, DeepSupervisionLoss])
def test_contradicting_activations(wrap):
    with pytest.raises(ValueError, match=r"sigmoid=True, as the flags here, got .* with softmax=True"):
        ConResLoss(wrap(DiceCELoss(softmax=True)), sigmoid=True)
    with pytest.raises(ValueError, match=r"softmax=True, as the flags here, got .* with sigmoid=True"):
        ConResLoss(wrap(DiceCELoss(sigmoid=True)), softmax=True)


def test_compound_loss_errors():
    with pytest.raises(ValueError, match="max_steps of 1 or more"):
        CompoundBoundaryLoss(torch.nn.MSELoss(), torch.nn.L1Loss(), max_steps=0)


def test_what_checkpointing_makes_of_an_output_is_refused():
    label = torch.zeros(1, 1, *SIZE)
    logits = torch.zeros(1, 1, *SIZE)
    with pytest.raises(TypeError, match=r"plain tuple .* use_reentrant=False"):
        ConResLoss(sigmoid=True)((logits, (logits,)), label)
    own = ConResLoss(lambda output, label: output[1][0].sum(), sigmoid=True)  # of a network with such an output
    assert own((logits, (torch.ones(2, requires_grad=True),)), label) == 2
    with torch.no_grad():
        assert own((logits, (torch.ones(2),)), label) == 2


def test_dictionaries_of_logits():
    label = torch.zeros(1, 1, *SIZE)
    output = ConResOutput({"out": torch.zeros(1, 1, *SIZE)}, ())
    joint = ConResLoss(lambda segmentation, label: (segmentation["out"] + 3).mean(), sigmoid=True)
    assert joint(output, label) == 3
    with pytest.raises(ValueError, match="expected a label of shape"):
        joint(output, label[..., :-1])
    with pytest.raises(TypeError, match=r"got a dictionary of \['out'\]"):
        CompoundBoundaryLoss(joint, BoundaryLoss(sigmoid=True), max_steps=3)(output, label)
