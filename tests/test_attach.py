from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.inferers import SlidingWindowInferer
from monai.networks import nets
from monai.networks.nets.unet import CheckpointUNet
from torch.utils.checkpoint import CheckpointError, checkpoint

from monai_conres import ConResNet, ConResOutput, ConResWrapper, attach_conres
from tests.networks import NETWORKS, dynunet

SIZE = (8, 12, 20)
# parameters that a network's own training never uses, or that have no influence on its loss
UNUSED = {
    "BasicUNetPlusPlus": "final_conv_0_",
    "UNETR": "cross_attn",
    "SegResNetVAE": "vae",
    "SwinUNETR": "relative_position",
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
    return attach_conres(dynunet((8, 16, 32)), 1, **{"spatial_size": SIZE, **kwargs})


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(1, 1, *SIZE, generator=torch.Generator().manual_seed(1))


# every network


SLOW = {"SwinUNETR": pytest.param("SwinUNETR", marks=pytest.mark.slow)}


@pytest.mark.parametrize("name", [SLOW.get(name, name) for name in NETWORKS])
def test_closed_gates_change_nothing_and_every_part_learns(name):
    family = NETWORKS[name]
    torch.manual_seed(0)
    backbone, image = family.build(), torch.randn(1, 1, *family.size)

    def run(network: Callable[[torch.Tensor], Any]) -> Any:
        torch.manual_seed(1)  # dropout
        return network(image)

    with torch.no_grad():
        plain = run(backbone)
    network = attach_conres(backbone, 1, include_background=False, zero_init=True, spatial_size=family.size)
    assert network.stages == family.stages
    with torch.no_grad():
        output = run(network)
    assert isinstance(output, ConResOutput)
    assert type(output.segmentation) is type(plain)
    torch.testing.assert_close(output.segmentation, plain, rtol=0, atol=0)
    assert all(logits.shape[:2] == (1, 2) for logits in output.residuals)
    voxels = [logits[0, 0].numel() for logits in output.residuals]
    assert voxels == sorted(voxels, reverse=True)
    for module in network.decoder.stages:
        nn.init.ones_(module.strength)  # has no gradient where the segmentation does not depend on the gate
    output = run(network)
    backward(output)
    without = [key for key, value in network.named_parameters() if value.grad is None or not value.grad.any()]
    assert all(UNUSED.get(name, "none at all") in key for key in without), without

    several = output.segmentation
    if isinstance(several, dict):
        with pytest.raises(ValueError, match=r"got 0 in the dict from FunctionalUNet; call heads\(image\)"):
            run(network.with_residual)
    else:
        segmentation, residual = run(network.with_residual)
        full = several[-1 if name == "BasicUNetPlusPlus" else 0] if isinstance(several, (list, tuple)) else several
        assert torch.equal(segmentation, full[:, 0] if full.ndim == 6 else full)
        finest = output.residuals[0]
        assert (finest.shape[2:] == family.size) == (name != "UNet")
        torch.testing.assert_close(residual, F.interpolate(finest, family.size, mode="trilinear"))
    assert network.unwrap() is backbone
    with torch.no_grad():
        torch.testing.assert_close(run(backbone), plain, rtol=0, atol=0)


# values and options


def test_include_background_and_width_size_the_decoder(image):
    wide, narrow = small(width=None), small(width=4, include_background=False)
    size = {net: sum(parameter.numel() for parameter in net.decoder.parameters()) for net in (wide, narrow)}
    assert size[narrow] < 0.2 * size[wide]
    assert [logits.shape[1] for logits in wide(image).residuals] == [3, 3]
    assert [logits.shape[1] for logits in narrow(image).residuals] == [2, 2]


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
    for double in (lambda module, args, features: features * 2, lambda module, args, features: features.mul_(2)):
        network = small(context="mapping")
        network.backbone.upsamples[1].register_forward_hook(double)
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
def test_copies_are_equal_and_independent(image, duplicate):
    network = small()
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


def test_modes_of_wrapper_and_parts(image):
    backbone = dynunet()
    backbone.input_block.eval()  # frozen statistics
    network = attach_conres(backbone, 1, spatial_size=(16, 24, 20))
    assert [m.training for m in (network, network.decoder, backbone.input_block, backbone.bottleneck)] == [1, 1, 0, 1]
    trained = attach_conres(dynunet().eval(), 1, spatial_size=(16, 24, 20))
    assert not any(module.training for module in trained.modules())
    network = small()
    for training in (True, False):
        modes = [module.training for module in network.train(training).modules()]
        segmentation, residuals = network.heads(image)
        torch.testing.assert_close(network.with_residual(image), (segmentation, residuals[0]))
        output = network(image)
        assert isinstance(output, ConResOutput) == training
        assert torch.equal(output.segmentation if training else output, segmentation)
        assert [module.training for module in network.modules()] == modes


def test_decoder_learns_next_to_a_frozen_backbone(image):
    network = small()
    network.backbone.requires_grad_(False)
    backward(network(image))
    for name, parameter in network.named_parameters():
        assert (parameter.grad is None) == name.startswith("backbone."), name


@torch.no_grad()
def test_other_precisions(image):
    network = small().eval()
    expected = network(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = network(image)
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).std() < 0.05 * expected.std()
    double = attach_conres(small().unwrap().double(), 1, spatial_size=SIZE).eval()
    assert double(image.double()).dtype == torch.float64


def test_compile_makes_one_graph(image):
    network = small()
    torch.testing.assert_close(torch.compile(network, backend="eager", fullgraph=True)(image), network(image))


def run_onnx(network: nn.Module, image: torch.Tensor, file: Path) -> torch.Tensor:
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.onnx.export(network, (image,), file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: image.numpy()})[0])


EXPORTS = {
    "torch.export": lambda network, image, _: torch.export.export(network, (image,)).module()(image),
    "jit.trace": lambda network, image, _: torch.jit.trace(network, image)(image),
    "onnx": run_onnx,
}


@pytest.mark.parametrize("export", ["torch.export", "jit.trace", pytest.param("onnx", marks=pytest.mark.slow)])
@torch.no_grad()
def test_export_gives_the_same_logits(image, tmp_path, export):
    network = small().eval()
    got = EXPORTS[export](network, image, tmp_path / "network.onnx")
    torch.testing.assert_close(got, network(image), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_sliding_windows_stitch_both_outputs(image):
    network = small(include_background=False).eval()
    long = torch.cat([image, image.flip(2)], dim=2)
    stitched = SlidingWindowInferer(SIZE, sw_batch_size=2, overlap=0)(long, network.with_residual)
    halves = [network.with_residual(half) for half in long.split(SIZE[0], dim=2)]
    for got, *parts in zip(stitched, *halves, strict=True):
        torch.testing.assert_close(got, torch.cat(parts, dim=2), rtol=1e-3, atol=1e-4)


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
    handle = network.backbone.upsamples[1].register_forward_pre_hook(lambda *args: 1 / 0)
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


def test_second_decoder_is_refused_until_unwrap(image):
    first = small(context="mapping")
    backbone = first.backbone
    for again in (first, backbone, Wrapped(first), copy.deepcopy(backbone)):
        with pytest.raises(ValueError, match=r"already has a context residual decoder; call unwrap\(\)"):
            attach_conres(again, 1, spatial_size=SIZE)
    assert first.unwrap() is first.unwrap() is backbone
    second = attach_conres(backbone, 1, spatial_size=SIZE)
    first.unwrap()  # ends only its own wrapper
    assert isinstance(second(image), ConResOutput)
    with pytest.raises(RuntimeError, match=r"got one after unwrap\(\)"):
        first.eval()(image)


def distributed() -> nn.Module:
    module = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(module)  # the real one asks for a process group
    return module


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (dynunet, {"context": "none"}, 'got "none"; use the network itself'),
        (lambda: nets.BasicUNet(3, 1, 1), {"include_background": False}, "include_background=False, got 1 from Basic"),
        (lambda: nn.Conv3d(1, 3, 3, padding=1), {}, "found no decoder stage in Conv3d"),
        (
            lambda: ConResNet(1, 3, channels=(8, 16), strides=(2,), blocks=(1, 1, 1)),
            {},
            "expected a network of another package, got a ConResNet",
        ),
        (lambda: torch.compile(dynunet(), backend="eager"), {}, "attach first, then compile"),
        (lambda: nn.DataParallel(dynunet()), {}, "inside DataParallel; attach first, then wrap"),
        (distributed, {}, "inside DistributedDataParallel; attach first, then wrap"),
    ],
)
def test_attach_refuses(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        attach_conres(build(), 1, **{"spatial_size": (32, 32, 32), **arguments})


def test_with_residual_refuses_several_outputs_of_the_same_size(image):
    network = attach_conres(Wrapped(small().unwrap()), 1, spatial_size=SIZE)
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


class Padding(nn.Module):
    """Pads the image to a multiple of 8 voxels, and crops the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.down = nn.Conv3d(1, 8, 3, padding=1), nn.Conv3d(8, 16, 3, stride=2, padding=1)
        self.decoder, self.head = nn.Conv3d(24, 8, 3, padding=1), nn.Conv3d(8, 2, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        padding = [part for size in image.shape[:1:-1] for part in (0, -size % 8)]
        first = self.encoder(nn.functional.pad(image, padding))
        second = nn.functional.interpolate(self.down(first), first.shape[2:])
        return self.head(self.decoder(torch.cat([second, first], 1)))[..., : image.shape[-1]]


def test_network_that_pads_inside_is_refused():
    network = attach_conres(Padding(), 1, spatial_size=(16, 16, 16)).eval()
    assert network(torch.zeros(1, 1, 16, 16, 8)).shape[2:] == (16, 16, 8)
    for method in (network, network.with_residual):
        with pytest.raises(ValueError, match=r"size \(16, 16, 9\), got \(16, 16, 16\) from 'decoder'.*DivisiblePadd"):
            method(torch.zeros(1, 1, 16, 16, 9))


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


# several processes


def train(rank: int, processes: int, folder: str) -> None:
    """Two passes with this process's share of a batch of two; the gradients go into a file."""
    torch.set_num_threads(1)
    network = small().double()  # so that another order of summation makes no difference
    images = torch.randn(2, 1, *SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if processes > 1:
        store = torch.distributed.FileStore(f"{folder}/store", processes)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes)
        network = nn.parallel.DistributedDataParallel(network)
        images = images[rank : rank + 1]
    for _ in range(2):  # the second pass fails where the first left a parameter unused
        network.zero_grad()
        output = network(images)
        backward(output)
    if processes > 1:
        torch.testing.assert_close(network.module.with_residual(images), (output.segmentation, output.residuals[0]))
    if rank == 0:
        gradients = {name.removeprefix("module."): p.grad for name, p in network.named_parameters()}
        torch.save(gradients, f"{folder}/gradients_{processes}.pt")
    if processes > 1:
        # without a clean-up: torch 2.13 sometimes deadlocks when the wrapper is freed while a thread of gloo still
        # frees its last piece of work
        os._exit(0)


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path):
    train(0, 1, str(tmp_path))
    torch.multiprocessing.spawn(train, (2, str(tmp_path)), nprocs=2)
    one, two = (torch.load(tmp_path / f"gradients_{processes}.pt") for processes in (1, 2))
    assert all(gradient is not None for gradient in one.values())
    torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-10)
