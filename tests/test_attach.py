from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from monai.inferers import SlidingWindowInferer
from monai.losses import DeepSupervisionLoss, DiceCELoss
from monai.networks import nets
from monai.networks.nets.unet import CheckpointUNet
from monai.networks.utils import copy_model_state
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import CheckpointError, checkpoint

from monai_conres import ConResLoss, ConResNet, ConResOutput, ConResWrapper, attach_conres
from tests.networks import FAMILIES, NETWORKS, Family, dynunet

SIZE = (16, 24, 20)
# parameters that a network's own training never uses, or that have no influence on its loss
UNUSED = {
    "BasicUNetPlusPlus": "final_conv_0_",
    "UNETR": "cross_attn",
    "SegResNetVAE": "vae",
    "SwinUNETR": "relative_position",
}
# where the segmentation at full resolution is among the outputs in training; elsewhere it is the only output
FIRST = ("SegResNetVAE", "SegResNetDS", "MedNeXt", "PlainConvUNet", "ResidualEncoderUNet")
FULL_RESOLUTION: dict[str, Callable[[Any], torch.Tensor]] = {
    "BasicUNetPlusPlus": lambda outputs: outputs[-1],
    "DynUNet, deep supervision": lambda stacked: stacked[:, 0],
    **dict.fromkeys(FIRST, lambda outputs: outputs[0]),
}


def tensors(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output or ()
    return [tensor for value in values for tensor in tensors(value)]


def backward(output: Any) -> None:
    sum(tensor.square().mean() for tensor in tensors(output)).backward()


def small(**kwargs) -> ConResWrapper:
    torch.manual_seed(0)
    return attach_conres(dynunet(), 1, spatial_size=SIZE, **kwargs)


def attached(family: Family) -> tuple[ConResWrapper, torch.Tensor]:
    torch.manual_seed(0)
    network = attach_conres(family.build(), 1, include_background=False, spatial_size=family.size)
    return network, torch.randn(2, 1, *family.size)


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(1, 1, *SIZE, generator=torch.Generator().manual_seed(1))


SLOW = {"SwinUNETR": pytest.param("SwinUNETR", marks=pytest.mark.slow)}


@pytest.fixture(params=[SLOW.get(name, name) for name in NETWORKS], scope="module")
def named(request) -> tuple[str, Family]:
    return request.param, NETWORKS[request.param]


# every network


def test_closed_gates_change_nothing_and_each_open_gate_does(named):
    _, family = named
    torch.manual_seed(0)
    backbone = family.build().eval()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    image = torch.randn(1, 1, *family.size)

    def run(network: nn.Module) -> list[torch.Tensor]:
        with torch.no_grad():
            return tensors(network(image))

    expected = run(backbone)
    network = attach_conres(backbone, 1, zero_init=True, spatial_size=family.size)
    assert network.stages == family.stages
    torch.testing.assert_close(run(network), expected, rtol=0, atol=0)
    for number, module in enumerate(network.decoder.stages):
        nn.init.constant_(module.strength, 50)  # only this gate opens, and wide
        changed = run(network)
        assert any((a - b).std() > 1e-6 * b.std() for a, b in zip(changed, expected, strict=True)), number
        nn.init.zeros_(module.strength)
    assert network.backbone is backbone
    assert backbone.state_dict().keys() == before.keys()
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())
    torch.testing.assert_close(run(backbone), expected, rtol=0, atol=0)
    assert network.unwrap() is backbone
    torch.testing.assert_close(run(backbone), expected, rtol=0, atol=0)


def test_training_keeps_output_forms_and_reaches_all_parameters(named):
    name, family = named
    network, image = attached(family)
    plain = network.backbone(image)
    output = network(image)
    assert isinstance(output, ConResOutput)
    assert type(output.segmentation) is type(plain)
    assert [tensor.shape for tensor in tensors(output.segmentation)] == [tensor.shape for tensor in tensors(plain)]
    assert all(logits.shape[:2] == (2, 2) for logits in output.residuals)
    voxels = [logits[0, 0].numel() for logits in output.residuals]
    assert voxels == sorted(voxels, reverse=True)
    backward(output)
    without = [key for key, value in network.named_parameters() if value.grad is None or not value.grad.any()]
    assert all(UNUSED.get(name, "none at all") in key for key in without), without


@torch.no_grad()
def test_with_residual_gives_the_full_resolution_in_either_mode(named):
    name, family = named
    network, image = attached(family)
    image = image[:1]
    for training in (True, False):
        modes = [module.training for module in network.train(training).modules()]
        torch.manual_seed(1)  # dropout
        want = network.heads(image)
        torch.manual_seed(1)
        if isinstance(want.segmentation, dict):
            with pytest.raises(ValueError, match=r"got 0 in the dict from FunctionalUNet; call heads\(image\)"):
                network.with_residual(image)
            continue
        segmentation, residual = network.with_residual(image)
        several = not isinstance(want.segmentation, torch.Tensor) or want.segmentation.ndim == 6
        assert torch.equal(segmentation, FULL_RESOLUTION[name](want.segmentation) if several else want.segmentation)
        finest = (
            F.interpolate(want.residuals[0], family.size, mode="trilinear") if name == "UNet" else want.residuals[0]
        )
        torch.testing.assert_close(residual, finest)
        assert segmentation.shape == (1, 3, *family.size)
        assert [module.training for module in network.modules()] == modes


# values and options


def test_gates_are_equation_6_of_the_network_s_own_features(image):
    network = small().eval()
    features, gated = [], []
    for name in network.stages:
        stage = network.backbone.get_submodule(name)
        stage.register_forward_hook(lambda module, args, output: features.append(output.clone()), prepend=True)
        stage.register_forward_hook(lambda module, args, output: gated.append(output))
    with torch.no_grad():
        network(image)
        previous = image
        for number in range(3):
            expected, previous = network.decoder.step(number, features[number], previous)
            assert torch.equal(gated[number], expected)
            share = gated[number] / features[number]
            assert share.min() >= 1
            assert share.max() <= 2


def test_loss_around_the_network_s_own_deep_supervision_loss():
    torch.manual_seed(0)
    network = attach_conres(nets.SegResNetDS(3, 8, 1, 3, dsdepth=2), 1, include_background=False)
    own = DeepSupervisionLoss(DiceCELoss(softmax=True, to_onehot_y=True))
    loss = ConResLoss(own)
    image, label = torch.randn(1, 1, 16, 24, 32), torch.randint(0, 3, (1, 1, 16, 24, 32)).float()
    output = network(image)
    expected = own(list(output.segmentation), label) + loss.residual_loss(output.residuals, label)
    torch.testing.assert_close(loss(output, label), expected)


def test_include_background_and_width_size_the_decoder(image):
    wide, narrow = small(width=None), small(width=4, include_background=False)
    size = {net: sum(parameter.numel() for parameter in net.decoder.parameters()) for net in (wide, narrow)}
    assert size[narrow] < 0.2 * size[wide]
    assert [logits.shape[1] for logits in wide(image).residuals] == [3, 3, 3]
    assert [logits.shape[1] for logits in narrow(image).residuals] == [2, 2, 2]


class InPlaceUNet(nn.Module):
    """Works in place on the features of its stage ``up``."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace
        self.down, self.up = nn.Conv3d(1, 8, 3, stride=2, padding=1), nn.ConvTranspose3d(8, 8, 2, stride=2)
        self.head = nn.Conv3d(8, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.up(self.down(x))
        features = features.mul_(2) if self.inplace else features * 2
        return self.head(F.leaky_relu(features, inplace=self.inplace))


def test_mapping_leaves_the_segmentation_unchanged(image):
    network = small(context="mapping").eval()
    with torch.no_grad():
        expected = network.backbone(image)
        assert torch.equal(network(image), expected)
        segmentation, residual = network.with_residual(image)
    assert torch.equal(segmentation, expected)
    assert residual.shape == (1, 3, *SIZE)


def test_mapping_allows_a_backbone_that_works_in_place(image):
    gradients = []
    for inplace in (False, True):
        torch.manual_seed(0)
        network = attach_conres(InPlaceUNet(inplace), 1, stages=["up"], context="mapping", spatial_size=SIZE)
        backward(network(image))
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert all(gradient.any() for gradient in gradients[0])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_weights_of_version_0_1_keep_their_names():
    norms = ("entry.norm", "inner_norm", "outer.norm")
    stage = {"strength", "entry.conv.weight", "inner.weight", "outer.conv.weight"}
    stage |= {f"{norm}.{kind}" for norm in norms for kind in ("weight", "bias")}
    names = {f"stages.1.{name}" for name in stage} | {"heads.1.weight", "heads.1.bias"}
    assert names == {name for name in small(zero_init=True).decoder.state_dict() if ".1." in name}


# what people do with networks


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
@pytest.mark.parametrize("after_training", [False, True])
def test_copies_are_equal_and_independent(image, duplicate, after_training):
    network = small()
    if after_training:
        backward(network(image))
    twin = duplicate(network).eval()
    network.eval()
    before = network(image)
    assert torch.equal(twin(image), before)
    with torch.no_grad():
        for parameter in network.decoder.parameters():
            parameter.normal_()
    assert torch.equal(twin(image), before)  # its hooks use its own decoder
    assert not torch.equal(network(image), before)


@torch.no_grad()
def test_moving_average(image):
    network, expected = small().eval(), small().eval()
    average = AveragedModel(network, avg_fn=lambda old, new, n: 0.5 * old + 0.5 * new)
    average.update_parameters(network)
    assert torch.equal(average(image), network(image))
    for parameter in network.parameters():
        parameter.mul_(3)
    average.update_parameters(network)
    for parameter in expected.parameters():
        parameter.mul_(2)
    torch.testing.assert_close(average(image), expected(image))


def test_modes_of_wrapper_and_parts(image):
    backbone = dynunet()
    backbone.input_block.eval()  # frozen statistics
    network = attach_conres(backbone, 1, spatial_size=SIZE)
    assert [m.training for m in (network, network.decoder, backbone.input_block, backbone.bottleneck)] == [1, 1, 0, 1]
    assert isinstance(network(image), ConResOutput)
    segmentation = network.eval()(image)
    assert torch.equal(network.heads(image).segmentation, segmentation)
    assert isinstance(network.train()(image), ConResOutput)
    assert not attach_conres(dynunet().eval(), 1, spatial_size=SIZE).training


def test_decoder_learns_next_to_a_frozen_backbone(image):
    network = small()
    network.backbone.requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.1)
    backward(network(image))
    optimizer.step()
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("backbone."), name


def test_weights_of_plain_and_attached_networks_load(image):
    torch.manual_seed(5)
    trained = dynunet().eval()
    by_hand, by_monai, again = (small(zero_init=True).eval() for _ in range(3))
    by_hand.backbone.load_state_dict(trained.state_dict())
    copy_model_state(by_monai, trained.state_dict(), dst_prefix="backbone.")
    again.load_state_dict(by_hand.state_dict())
    for network in (by_hand, by_monai, again):
        assert torch.equal(network(image), trained(image))


@torch.no_grad()
def test_other_precisions(image):
    network = small().eval()
    expected = network(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = network(image)
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).std() < 0.05 * expected.std()
    double = attach_conres(dynunet().double(), 1, spatial_size=SIZE).eval()
    assert double(image.double()).dtype == torch.float64


def test_compile_makes_one_graph(image):
    network = small()
    for method in (network, network.with_residual):
        compiled = torch.compile(method, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(image), method(image))


def test_exports_give_the_same_logits(image, tmp_path):
    network = small().eval()
    expected = network(image)
    for exported in (torch.export.export(network, (image,)).module(), torch.jit.trace(network, image)):
        torch.testing.assert_close(exported(image), expected, rtol=1e-5, atol=1e-5)
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.onnx.export(network, (image,), tmp_path / "network.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    np.testing.assert_allclose(got, expected.detach().numpy(), atol=1e-4)


@torch.no_grad()
def test_sliding_windows_stitch_both_outputs(image):
    network = small(include_background=False).eval()
    one = SlidingWindowInferer(SIZE)(image, network.with_residual)
    torch.testing.assert_close(one, network.with_residual(image))
    long = torch.cat([image, image.flip(2)], dim=2)
    two = SlidingWindowInferer(SIZE, sw_batch_size=2, overlap=0)(long, network.with_residual)
    halves = [network.with_residual(half) for half in long.split(SIZE[0], dim=2)]
    for stitched, *parts in zip(two, *halves, strict=True):
        torch.testing.assert_close(stitched, torch.cat(parts, dim=2), rtol=1e-3, atol=1e-4)


class ResidualInferer(SlidingWindowInferer):
    def __call__(self, inputs, network, *args, **kwargs):
        return super().__call__(inputs, network.with_residual, *args, **kwargs)


def test_monai_evaluator_predicts_both_outputs(image):
    network = small(include_background=False)
    data = DataLoader(Dataset([{"image": image[0], "label": image[0]}]), batch_size=1)
    evaluator = SupervisedEvaluator(
        device="cpu", val_data_loader=data, network=network, inferer=ResidualInferer(SIZE), decollate=False
    )
    evaluator.run()
    got = evaluator.state.output["pred"]
    with torch.no_grad():
        torch.testing.assert_close(got, network.eval().with_residual(image))
    assert [output.shape[1] for output in got] == [3, 2]


@torch.no_grad()
def test_ensemble_averages_both_outputs(image):
    networks = [small().eval(), attach_conres(dynunet(), 1, spatial_size=SIZE).eval()]

    def mean(image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = zip(*(network.with_residual(image) for network in networks), strict=True)
        return tuple(sum(output) / len(networks) for output in outputs)

    torch.testing.assert_close(SlidingWindowInferer(SIZE)(image, mean), mean(image))


def test_several_networks_do_not_disturb_each_other(image):
    first, second = small().eval(), attach_conres(FAMILIES["SegResNet"].build().eval(), 1)
    larger = torch.randn(1, 1, 16, 24, 32)
    a, b = first(image), second(larger)
    assert torch.equal(first(image), a)
    assert torch.equal(second(larger), b)


def test_threads_do_not_disturb_each_other():
    network = small().eval()
    images = [torch.randn(1, 1, *SIZE) for _ in range(4)]
    with torch.no_grad():
        expected = [network(image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(torch.no_grad()(network), images * 3))
    torch.testing.assert_close(got, expected * 3)


def test_exception_in_a_forward_pass_leaves_nothing_behind(image):
    network = small().eval()
    expected = network(image)
    handle = network.backbone.upsamples[2].register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        network(image)
    handle.remove()
    assert torch.equal(copy.deepcopy(network)(image), expected)
    assert torch.equal(network(image), expected)


def test_checkpointing_the_wrapper_keeps_the_gradients(image):
    network, twin = small(), small()
    backward(network(image))
    backward(checkpoint(twin, image, use_reentrant=False))
    for a, b in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


# errors


class Wrapped(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)


def test_unwrap_ends_only_its_own_wrapper():
    backbone = nets.SegResNet(init_filters=8, out_channels=2).eval()
    first = attach_conres(backbone, 1, context="mapping")
    assert first.unwrap() is first.unwrap() is backbone
    second = attach_conres(backbone, 1)
    first.unwrap()
    image = torch.randn(1, 1, 16, 24, 24)
    assert second(image).shape == (1, 2, 16, 24, 24)
    with pytest.raises(RuntimeError, match=r"got one after unwrap\(\)"):
        first(image)


@pytest.mark.parametrize(
    "again", [lambda network: network, lambda network: network.backbone, Wrapped, lambda n: copy.deepcopy(n.backbone)]
)
def test_second_decoder_is_refused_until_unwrap(again):
    network = small()
    with pytest.raises(ValueError, match=r"already has a context residual decoder; call unwrap\(\)"):
        attach_conres(again(network), 1, spatial_size=SIZE)
    attach_conres(network.unwrap(), 1, spatial_size=SIZE)


def distributed() -> nn.Module:
    module = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(module)  # the real one asks for a process group
    return module


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (dynunet, {"spatial_axis": 3}, "spatial_axis between -3 and 2"),
        (dynunet, {"width": 0}, "width=0"),
        (dynunet, {"context": "mapping", "zero_init": True}, 'context="attention" together with zero_init=True'),
        (dynunet, {"context": "none"}, 'got "none"; use the network itself'),
        (dynunet, {"context": "gate"}, "expected context to be one of 'attention', 'mapping', got 'gate'"),
        (dynunet, {"spatial_size": 32}, "expected a spatial_size of three numbers, for a 3D network, got 32"),
        (lambda: nets.BasicUNet(3, 1, 1), {"include_background": False}, "include_background=False, got 1 from Basic"),
        (lambda: nn.Conv3d(1, 3, 3, padding=1), {}, "found no decoder stage in Conv3d"),
        (lambda: ConResNet(1, 3), {}, "expected a network of another package, got a ConResNet"),
        (lambda: torch.compile(dynunet(), backend="eager"), {}, "attach first, then compile"),
        (lambda: nn.DataParallel(dynunet()), {}, "inside DataParallel; attach first, then wrap"),
        (distributed, {}, "inside DistributedDataParallel; attach first, then wrap"),
    ],
)
def test_attach_refuses(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        attach_conres(build(), 1, **{"spatial_size": (32, 32, 32), **arguments})


def test_with_residual_refuses_several_outputs_of_the_same_size(image):
    network = attach_conres(Wrapped(dynunet()), 1, spatial_size=SIZE)
    network.backbone.forward = lambda x: [network.backbone.network(x)] * 2
    with pytest.raises(ValueError, match="got 2 in the list from Wrapped"):
        network.with_residual(image)


def test_checkpointing_around_a_stage_works_and_inside_is_refused():
    backbone = CheckpointUNet(3, 1, 3, (8, 16, 32), (2, 2))
    outside = attach_conres(backbone, 1, spatial_size=(16, 16, 16))
    assert outside.stages == ("model.1",)
    image = torch.randn(1, 1, 16, 16, 16)
    backward(outside(image))
    assert all(parameter.grad.any() for parameter in outside.parameters())
    inside = attach_conres(outside.unwrap(), 1, stages=["model.1.submodule.module.2"], spatial_size=(16, 16, 16))
    output = inside(image)
    with pytest.raises(CheckpointError):
        backward(output)


def test_reentrant_checkpointing_inside_the_backbone_is_refused(image):
    network = small()
    own = network.backbone.skip_layers.forward
    network.backbone.skip_layers.forward = lambda x: checkpoint(own, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"expected gradients in 'upsamples.0'.*use_reentrant=False"):
        network(image.requires_grad_())


def compile_backbone(network: ConResWrapper) -> None:
    network.backbone = torch.compile(network.backbone, backend="eager")


def skip_stages(network: ConResWrapper) -> None:
    network.backbone.skip_layers.forward = lambda x: torch.zeros(1, 8, *SIZE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (compile_backbone, "got 0 of them; .* compile the whole wrapper"),
        (skip_stages, "expected every stage of .* to run in this order, got 0"),
        (ConResWrapper.unwrap, r"got one after unwrap\(\); attach a decoder again"),
        (copy.copy, "got a copy of it by DataParallel; use DistributedDataParallel"),  # it copies like this
    ],
)
@torch.no_grad()
def test_forward_refuses(change, message, image):
    network = small().eval()
    changed = change(network)
    with pytest.raises(RuntimeError, match=message):
        (changed if isinstance(changed, ConResWrapper) else network)(image)


def test_spellings_of_version_0_1_are_refused():
    network = small()
    with pytest.raises(AttributeError, match=r"network\.with_residual\(image\)"):
        network.eval_residual = True
    with pytest.raises(TypeError, match="finds the number of output channels"):
        attach_conres(dynunet(), 1, 3)
    with pytest.raises(TypeError, match="include_background=False"):
        attach_conres(dynunet(), 1, residual_channels=2)


# several processes


BUILDS: dict[str, Callable[[], nn.Module]] = {
    "attached": lambda: attach_conres(dynunet(), 1, spatial_size=SIZE),
    "conresnet": lambda: ConResNet(1, 3, channels=(8, 16), strides=(2,), blocks=(1, 1, 1), dropout=None),
}


def train_one_step(rank: int, processes: int, folder: str) -> None:
    """One step of each network on this process's share of a batch of two; the gradients go into a file."""
    torch.set_num_threads(1)
    if processes > 1:
        store = torch.distributed.FileStore(f"{folder}/store", processes)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    gradients = {}
    for key, build in BUILDS.items():
        torch.manual_seed(0)
        network = build().double()  # so that another order of summation makes no difference
        images = torch.randn(2, 1, *SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        if processes > 1:
            network = nn.parallel.DistributedDataParallel(network)
            images = images[rank : rank + 1]
        for _ in range(2):  # the second pass fails where the first left a parameter unused
            network.zero_grad()
            output = network(images)
            assert isinstance(output, ConResOutput)
            backward(output)
        if processes > 1:
            segmentation, residual = network.module.with_residual(images)
            torch.testing.assert_close(segmentation, output.segmentation)
            torch.testing.assert_close(residual, output.residuals[0])
        gradients |= {f"{key} {name.removeprefix('module.')}": p.grad for name, p in network.named_parameters()}
    if rank == 0:
        torch.save(gradients, f"{folder}/gradients_{processes}.pt")
    if processes > 1:
        # without a clean-up: torch 2.13 sometimes deadlocks when the wrapper is freed while a thread of gloo still
        # frees its last piece of work
        os._exit(0)


def test_two_processes_have_the_gradients_of_one(tmp_path):
    train_one_step(0, 1, str(tmp_path))
    torch.multiprocessing.spawn(train_one_step, (2, str(tmp_path)), nprocs=2)
    one, two = (torch.load(tmp_path / f"gradients_{processes}.pt") for processes in (1, 2))
    assert one.keys() == two.keys()
    for name, gradient in one.items():
        assert gradient is not None, name
        torch.testing.assert_close(two[name], gradient, rtol=1e-6, atol=1e-10)
