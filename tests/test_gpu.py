"""What only a GPU can show. ``examples/benchmarks/gpu.py`` runs these tests, and those of ``test_deploy.py``."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedTrainer
from monai.inferers import SimpleInferer, SlidingWindowInferer

from monai_conres import ConResLoss, ConResNet, inter_slice_residual, layers, operations
from monai_conres.bundle import Computation

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
BF16 = torch.bfloat16


def small_network(**kwargs) -> ConResNet:
    torch.manual_seed(0)
    return ConResNet(2, 3, channels=(8, 16, 32), strides=2 * (2,), blocks=(1,) * 4, dropout=None, **kwargs).to(DEVICE)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1.0, 30.0), (1e3, 3e4)])
@pytest.mark.parametrize("with_triton", [True, False])
def test_group_norm_is_close_to_float64(dtype, layout, scale, offset, with_triton, monkeypatch):
    torch.manual_seed(0)
    if not with_triton:
        monkeypatch.setattr(operations, "triton_kernels", lambda *tensors: None)
    elif layout == torch.channels_last_3d:
        pytest.skip("Triton's kernels read contiguous features")
    norm = layers.GroupNorm(8, 32).to(DEVICE)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = (scale * torch.randn(2, 32, 23, 40, 37, device=DEVICE) + offset).to(dtype).contiguous(memory_format=layout)
    exact, twin = x.double().requires_grad_(), torch.nn.GroupNorm(8, 32).to(DEVICE).double()
    twin.load_state_dict(norm.state_dict())
    got, want = norm(x.requires_grad_()), twin(exact)
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=layout)
    gradient = torch.randn_like(x)
    got.backward(gradient)
    want.backward(gradient.double())
    bound = 1e-4 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    bound += 0 if with_triton else 2e-6 * (offset / scale) ** 2
    assert relative_error(got, want) < bound
    assert relative_error(x.grad, exact.grad) < bound
    for parameter, reference in zip(norm.parameters(), twin.parameters(), strict=True):
        assert relative_error(parameter.grad, reference.grad) < 0.02


@pytest.mark.parametrize("shape", [(1, 8, 80, 160, 161), (3, 6, 1, 2, 1), (1, 512, 4, 4, 4), (2, 24, 100, 33)])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_triton_normalizes_every_size(shape, affine, relu):
    torch.manual_seed(0)
    x = torch.randn(shape, device=DEVICE) + 2
    assert operations.triton_kernels(x) is not None
    norm = layers.GroupNorm(2, shape[1], affine=affine).to(DEVICE)
    exact = x.double().requires_grad_()
    got, want = norm(x.requires_grad_(), relu=relu), F.group_norm(exact, 2)
    gradient = torch.randn_like(x)
    of_want = gradient.double() * (want > 0) if relu else gradient.double()
    got.backward(gradient)
    want.backward(of_want)
    bound = 1e-3 if relu else 1e-5  # rounding changes the sign of a few values of 16 million, and so their gradients
    assert relative_error(got, want.clamp(0) if relu else want) < 1e-5
    assert relative_error(x.grad, exact.grad) < bound
    if affine:
        assert relative_error(norm.bias.grad, of_want.transpose(0, 1).flatten(1).sum(1)) < bound
        hat = (F.group_norm(exact, 2) * of_want).transpose(0, 1).flatten(1).sum(1)
        assert relative_error(norm.weight.grad, hat) < bound


def test_network_gives_the_same_with_kernels_and_without(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    image, network = torch.randn(1, 2, 20, 24, 16, device=DEVICE), small_network()

    def run() -> torch.Tensor:
        network.zero_grad()
        output = network(image)
        sum(logits.square().sum() for logits in (output.segmentation, *output.residuals)).backward()
        return torch.cat([output.segmentation.flatten(), *(p.grad.flatten() for p in network.parameters())])

    ours = run()
    monkeypatch.setattr(operations, "triton_kernels", lambda *tensors: None)
    assert relative_error(ours, run()) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spatial_axis", [0, 1, 2])
@pytest.mark.parametrize("with_triton", [True, False])
def test_equations_4_and_6_equal_their_definitions(dtype, spatial_axis, with_triton, monkeypatch):
    torch.manual_seed(0)
    # of multiples of 1/16 rounding does not change which of two slices has the larger sigmoid
    features, logits = (torch.randn(2, 2, 8, 29, 40, 31, device=DEVICE) * 16).round().div(16).to(dtype)
    assert operations.triton_kernels(features) is not None
    if not with_triton:
        monkeypatch.setattr(operations, "triton_kernels", lambda *tensors: None)
    exact = torch.float64 if with_triton else dtype  # torch rounds the sigmoid: in half precision more slices are equal
    inputs = features.requires_grad_(), logits.requires_grad_()
    references = [x.detach().to(exact).requires_grad_() for x in inputs]
    change = partial(operations.sigmoid_change, spatial_axis=spatial_axis)
    residual = partial(inter_slice_residual, spatial_axis=spatial_axis)
    pairs = (
        (lambda f, x: change(f) + x, lambda f, x: residual(f.sigmoid()) + x),
        (operations.gate_features, lambda f, x: f * (1 + x.sigmoid())),
    )
    for ours, definition in pairs:
        got, want = ours(*inputs), definition(*references)
        assert got.dtype == dtype
        assert relative_error(got, want) < 4 * torch.finfo(dtype).eps
        gradient = torch.randn_like(got)
        gradients = torch.autograd.grad(want, references, gradient.to(exact))
        for a, b in zip(torch.autograd.grad(got, inputs, gradient), gradients, strict=True):
            assert relative_error(a, b) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_resampling_under_autocast_rounds_only_once(align_corners, layout):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 9, 10, 11, device=DEVICE, dtype=BF16).contiguous(memory_format=layout).requires_grad_()
    exact, gradient = x.detach().double().requires_grad_(), torch.randn(2, 8, 18, 21, 15, device=DEVICE, dtype=BF16)
    with torch.autocast(DEVICE, BF16):
        got = operations.resize_features(x, (18, 21, 15), align_corners=align_corners)
    want = F.interpolate(exact, (18, 21, 15), mode="trilinear", align_corners=align_corners)
    got.backward(gradient)
    want.backward(gradient.double())
    for part, reference in ((got, want), (x.grad, exact.grad)):
        assert part.dtype == BF16
        assert relative_error(part, reference) < 2**-8


def test_use_checkpoint_under_autocast_gives_the_same_gradients():
    image = torch.randn(1, 2, 20, 24, 16, device=DEVICE)
    gradients = []
    for use_checkpoint in (False, True):
        network = small_network(use_checkpoint=use_checkpoint)
        with torch.autocast(DEVICE, BF16):
            output = network(image)
        sum(logits.float().square().sum() for logits in (output.segmentation, *output.residuals)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert relative_error(*gradients) < 0.01


def test_filters_kept_in_eval_are_those_of_autocast():
    network, image = small_network().eval(), torch.randn(2, 2, 16, 16, 16, device=DEVICE)
    with torch.no_grad():
        exact = network(image)
        with torch.autocast(DEVICE, BF16):
            low = [network(image) for _ in range(2)]
            inferer = SlidingWindowInferer((16, 16, 16), 2, overlap=0.5)
            stitched = inferer(torch.randn(1, 2, 24, 24, 24, device=DEVICE), network)
        again = network(image)
    assert low[0].dtype == BF16
    assert relative_error(low[1], low[0]) < 0.01
    assert relative_error(low[0], exact) < 0.05
    assert relative_error(again, exact) < 5e-3
    assert stitched.shape == (1, 3, 24, 24, 24)


def test_cuda_graph_keeps_its_filters():
    network, image = small_network().eval(), torch.randn(1, 2, 16, 16, 16, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        want = network(image)
        with torch.cuda.graph(graph):
            got = network(image)
        network.train()  # forgets the filters that the network keeps
        others = [torch.full((n,), torch.nan, device=DEVICE) for n in range(1, 20000, 100)]  # noqa: F841
        graph.replay()
    assert relative_error(got, want) < 5e-3


def test_monai_trains_in_mixed_precision_on_images_with_metadata():
    computation = Computation.on(DEVICE)
    image = torch.randn(2, 16, 16, 16)
    data = Dataset(
        [{"image": MetaTensor(image), "label": MetaTensor((image[:1] > 0).float().expand(3, -1, -1, -1))}] * 2
    )
    network = small_network()
    losses = []
    trainer = SupervisedTrainer(
        device=torch.device(DEVICE),
        max_epochs=12,
        train_data_loader=DataLoader(data, batch_size=2),
        network=network,
        optimizer=torch.optim.Adam(network.parameters(), 1e-2),
        loss_function=ConResLoss(sigmoid=True),
        inferer=SimpleInferer(),
        amp=computation.dtype is not None,
        amp_kwargs={"dtype": computation.dtype},
        decollate=False,
    )
    trainer.add_event_handler("ITERATION_COMPLETED", lambda engine: losses.append(float(engine.state.output["loss"])))
    trainer.run()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.slow
def test_compiled_network_gives_the_same_in_training_and_in_windows():
    network = small_network()
    twin = torch.compile(copy.deepcopy(network))
    image = torch.randn(1, 2, 16, 24, 16, device=DEVICE)
    for one, other in zip(network(image).residuals, twin(image).residuals, strict=True):
        assert relative_error(other, one) < 5e-3
    inferer = SlidingWindowInferer((16, 16, 16), 4, overlap=0.5)
    scan = torch.randn(1, 2, 40, 24, 24, device=DEVICE)
    with torch.no_grad():
        assert relative_error(inferer(scan, twin.eval()), inferer(scan, network.eval())) < 5e-3


def test_training_step_needs_no_more_memory_than_torchs_own_norm(monkeypatch):
    image = torch.randn(1, 2, 48, 64, 64, device=DEVICE)

    def peak() -> int:
        network = small_network()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast(DEVICE, BF16):
            output = network(image)
        (output.segmentation.float().sum() + output.residuals[0].float().sum()).backward()
        return torch.cuda.max_memory_allocated() - before

    peak()  # the workspace of cuDNN
    ours = peak()
    monkeypatch.setattr(operations, "on_accelerator", lambda x: False)
    assert ours <= peak()


def test_float32_group_norm_of_torch_is_the_reference():
    """The error of torch's own kernel against float64 bounds that of this package."""
    torch.manual_seed(0)
    x = torch.randn(1, 32, 40, 64, 64, device=DEVICE) + 3
    exact = F.group_norm(x.double(), 8)
    ours = layers.GroupNorm(8, 32).to(DEVICE)(x)
    assert relative_error(ours, exact) < 3 * relative_error(F.group_norm(x, 8), exact) + 1e-7
