"""What people do with a network: export, compile, copy, train in MONAI's engines, infer by sliding window."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.inferers import SimpleInferer, SlidingWindowInferer
from monai.networks.nets import DynUNet
from monai.utils import pytorch_after, set_determinism
from torch._subclasses.fake_tensor import FakeTensorMode

from monai_conres import ConResLoss, ConResNet, ConResOutput, ContextResidualLoss, attach_conres

SIZE = (20, 13, 17)


def small_network(**kwargs) -> ConResNet:
    torch.manual_seed(0)
    return ConResNet(2, 3, channels=(8, 16, 32), strides=(2, (2, 1, 2)), blocks=(1, 1, 1, 1), **kwargs)


@pytest.fixture
def network() -> ConResNet:
    return small_network().eval()


# torch 2.8 finds named sizes to be in the way of its own guards
ANY_SIZE = {axis: torch.export.Dim.AUTO(min=9, max=64) for axis in (2, 3, 4)}


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(1, 2, *SIZE, generator=torch.Generator().manual_seed(1))


def test_torch_export_gives_the_same_logits_at_another_size(network, image):
    program = torch.export.export(network, (image,), dynamic_shapes=(ANY_SIZE,))
    other = torch.randn(1, 2, 9, 16, 22)
    for volume in (image, other):
        torch.testing.assert_close(program.module()(volume), network(volume), rtol=1e-5, atol=1e-5)


def test_onnx_runtime_gives_the_same_logits_at_another_size(network, image, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "network.onnx"
    torch.onnx.export(network, (image,), path, dynamo=True, dynamic_shapes=(ANY_SIZE,), verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for volume in (image, torch.randn(1, 2, 9, 16, 22)):
        (got,) = session.run(None, {session.get_inputs()[0].name: volume.numpy()})
        np.testing.assert_allclose(got, network(volume).detach().numpy(), atol=1e-4)


def test_jit_trace_gives_the_same_logits_at_another_size(network, image):
    traced = torch.jit.trace(network, image)
    other = torch.randn(1, 2, 9, 16, 22)
    for volume in (image, other):
        torch.testing.assert_close(traced(volume), network(volume), rtol=1e-5, atol=1e-5)


def test_compile_of_the_training_forward_has_no_graph_break(image):
    network = small_network(dropout=None)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    expected, got = network(image), compiled(image)
    assert isinstance(got, ConResOutput)
    torch.testing.assert_close(got.segmentation, expected.segmentation)
    for a, b in zip(got.residuals, expected.residuals, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_inductor_gives_the_same_logits(network, image):
    compiled = torch.compile(network)
    with torch.no_grad():
        torch.testing.assert_close(compiled(image), network(image), rtol=1e-4, atol=1e-4)


def test_torch_func(image):
    network = small_network(dropout=None).double()
    image = image.double()
    parameters = dict(network.named_parameters())

    def loss(parameters: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(network, parameters, (image,)).segmentation.square().sum()

    expected = torch.autograd.grad(loss(parameters, image), list(parameters.values()), allow_unused=True)
    got = torch.func.grad(loss)(parameters, image)
    for gradient, (name, value) in zip(expected, got.items(), strict=True):
        torch.testing.assert_close(value, torch.zeros_like(value) if gradient is None else gradient, msg=name)
    images = torch.stack([image, 2 * image])
    with torch.no_grad():
        each = torch.func.vmap(lambda image: network(image).segmentation)(images)
        torch.testing.assert_close(each, torch.stack([network(one).segmentation for one in images]))


@pytest.mark.skipif(not pytorch_after(2, 10), reason="MONAI's Dice loss fails under vmap before torch 2.10")
def test_gradients_of_each_case(image):
    """``vmap`` over the gradient of the joint loss, as differentially private training has them."""
    network = small_network(dropout=None).double()
    image = image.double()
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
    images = torch.cat([image, 2 * image])
    labels = torch.randint(0, 2, (2, 3, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    loss = ConResLoss(sigmoid=True)

    def loss_of_one(parameters, image, label):
        return loss(torch.func.functional_call(network, parameters, (image[None],)), label[None])

    got = torch.func.vmap(torch.func.grad(loss_of_one), in_dims=(None, 0, 0))(parameters, images, labels)
    for number in range(2):
        network.zero_grad()
        loss(network(images[number : number + 1]), labels[number : number + 1]).backward()
        for name, parameter in network.named_parameters():
            torch.testing.assert_close(got[name][number], parameter.grad, msg=name)


@pytest.mark.parametrize("batch", [1, 2])
def test_ensemble_under_vmap_gives_the_logits_of_each_network(image, batch):
    image = torch.cat([image, -image])[:batch]
    networks = [small_network(dropout=None) for _ in range(2)]
    with torch.no_grad():
        for parameter in networks[1].parameters():
            parameter.mul_(1.1)
        parameters, buffers = torch.func.stack_module_state(networks)
        got = torch.func.vmap(lambda p, b: torch.func.functional_call(networks[0], (p, b), (image,)).segmentation)(
            parameters, buffers
        )
        expected = torch.stack([network(image).segmentation for network in networks])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_tensors_without_values():
    """As tools have them that find out how much memory a network takes."""
    with FakeTensorMode():
        network = small_network()
        image = torch.empty(1, 2, *SIZE)
        output = network(image)
        assert output.segmentation.shape == (1, 3, *SIZE)
        assert output.residuals[0].shape[2:] == SIZE
        ContextResidualLoss()(output.residuals, torch.empty(1, 3, *SIZE)).backward()
        assert network.head.weight.grad is None
        assert network.encoder[0][0].weight.grad.shape == network.encoder[0][0].weight.shape
    assert network.eval()(image).shape == (1, 3, *SIZE)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
def test_copies_are_equal_and_independent(network, image, duplicate):
    twin = duplicate(network)
    before = network(image)
    torch.testing.assert_close(twin(image), before, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    torch.testing.assert_close(network(image), before, rtol=0, atol=0)


def test_state_dict_round_trip_by_value(network, image):
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    twin = small_network()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(twin.eval()(image), network(image), rtol=0, atol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: small_network(),
        lambda: small_network(use_checkpoint=True),
        lambda: small_network(norm="batch", align_corners=True),
        lambda: attach_conres(DynUNet(3, 2, 3, [3] * 3, [1, 2, 2], [2, 2], filters=[8, 16, 32]), 2),
    ],
    ids=["default", "checkpoint", "batch norm", "attached"],
)
def test_training_step_stays_on_its_device_and_never_waits_for_it(make):
    """Torch's meta device has no values: one that is asked for raises, and so does a tensor of another device."""
    network = make().to("meta")
    image, label = torch.empty(2, 2, 20, 24, 16, device="meta"), torch.empty(2, 3, 20, 24, 16, device="meta")
    loss = ConResLoss(sigmoid=True)(network(image), label)
    loss.backward()
    assert loss.is_meta
    assert all(parameter.grad.is_meta for parameter in network.parameters())


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.mark.parametrize(
    ("device", "dtype", "tolerance"),
    [
        ("cpu", torch.float32, 1e-5),
        ("cpu", torch.bfloat16, 0.05),  # 8 bits of mantissa
        ("cpu", torch.float16, 1e-2),
        pytest.param("cuda", torch.float32, 5e-3, marks=gpu),  # TF32
        pytest.param("cuda", torch.bfloat16, 0.05, marks=gpu),
        pytest.param("cuda", torch.float16, 1e-2, marks=gpu),
    ],
)
def test_every_precision_is_close_to_float64(image, device, dtype, tolerance, monkeypatch):
    """Logits, loss and the gradient of a training step, each relative to its size.

    All gradients together are one vector, because a gradient near zero has no relative error. The gradient of Eq. 4
    jumps where a difference of slices is near zero. So its bound is ten times the error of the baseline and 1 %.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    label = (image[:, :1] > 0).to(torch.uint8).repeat(1, 3, 1, 1, 1)
    loss_function = ConResLoss(sigmoid=True)

    def step(network: ConResNet, image: torch.Tensor, low: bool) -> dict[str, torch.Tensor]:
        with torch.autocast(device, dtype, enabled=low and dtype != torch.float32):
            output = network(image.to(device))
        loss = loss_function(output, label.to(device))
        loss.backward()
        parts = {"segmentation": output.segmentation, "loss": loss}
        parts |= {f"residual {i}": logits for i, logits in enumerate(output.residuals)}
        parts["gradient"] = torch.cat([p.grad.flatten() for p in network.parameters()])
        return {name: part.detach().double().cpu() for name, part in parts.items()}

    def errors(context: str) -> dict[str, float]:
        low, exact = (small_network(dropout=None, context=context).to(device) for _ in range(2))
        got, want = step(low, image, low=True), step(exact.double(), image.double(), low=False)
        return {name: ((got[name] - want[name]).norm() / want[name].norm()).item() for name in want}

    found, usual = errors("attention"), errors("none")
    assert found.pop("gradient") < 10 * usual["gradient"] + 0.01
    assert usual["gradient"] < 5 * tolerance
    assert all(error < tolerance for error in found.values()), found


def test_sliding_window_stitches_segmentation_and_residual(image):
    network = small_network().eval()
    inferer = SlidingWindowInferer(roi_size=SIZE, sw_batch_size=2, overlap=0.25)
    with torch.no_grad():
        for got, expected in zip(inferer(image, network.with_residual), network.with_residual(image), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        long = torch.randn(1, 2, SIZE[0], SIZE[1], 2 * SIZE[2])
        halves = [network.with_residual(half) for half in long.split(SIZE[2], dim=-1)]
        tiled = SlidingWindowInferer(roi_size=SIZE, overlap=0)(long, network.with_residual)
    for got, expected in zip(tiled, zip(*halves, strict=True), strict=True):
        torch.testing.assert_close(got, torch.cat(expected, dim=-1), rtol=1e-5, atol=1e-5)


def test_compile_of_with_residual_gives_the_same(network, image):
    compiled = torch.compile(network.with_residual, backend="eager", fullgraph=True)
    with torch.no_grad():
        for got, expected in zip(compiled(image), network.with_residual(image), strict=True):
            torch.testing.assert_close(got, expected)


def test_evaluator_gets_segmentation_and_residual_from_its_inferer(network, image):
    class WithResidual(SlidingWindowInferer):
        def __call__(self, inputs, network, *args, **kwargs):
            return torch.cat(super().__call__(inputs, network.with_residual, *args, **kwargs), dim=1)

    loader = DataLoader(Dataset([{"image": image[0], "label": image[0]}]), batch_size=1)
    evaluator = SupervisedEvaluator(
        device="cpu", val_data_loader=loader, network=network, inferer=WithResidual(SIZE), decollate=False
    )
    evaluator.run()
    with torch.no_grad():
        expected = torch.cat(network.with_residual(image), dim=1)
    torch.testing.assert_close(evaluator.state.output["pred"], expected, rtol=1e-4, atol=1e-4)


def test_supervised_trainer_and_evaluator_run_unmodified(image):
    set_determinism(0)
    label = (image[:, :1] > 0).long() + (image[:, 1:] > 0).long()  # three classes that the image decides
    data = Dataset([{"image": MetaTensor(image[0]), "label": MetaTensor(label[0])}] * 4)
    loader = DataLoader(data, batch_size=2)
    network = ConResNet(2, 3, include_background=False, channels=(8, 16), strides=(2,), blocks=(1, 1, 1), dropout=None)
    loss = ConResLoss(softmax=True)
    losses = []
    trainer = SupervisedTrainer(
        device="cpu",
        max_epochs=6,
        train_data_loader=loader,
        network=network,
        optimizer=torch.optim.Adam(network.parameters(), 1e-2),
        loss_function=loss,
        inferer=SimpleInferer(),
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: losses.append(engine.state.output[0]["loss"]))
    trainer.run()
    assert len(losses) == 12
    assert losses[-1] < 0.8 * losses[0]

    evaluator = SupervisedEvaluator(
        device="cpu", val_data_loader=loader, network=network, inferer=SlidingWindowInferer(SIZE)
    )
    evaluator.run()
    predicted = evaluator.state.output[0]["pred"]
    with torch.no_grad():
        torch.testing.assert_close(predicted.as_tensor(), network.eval()(image)[0], rtol=1e-4, atol=1e-4)
