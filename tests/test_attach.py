from __future__ import annotations

import copy
import os
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn
from monai.inferers import SlidingWindowInferer
from monai.losses import DeepSupervisionLoss, DiceCELoss
from monai.networks import nets
from monai.networks.nets.unet import CheckpointUNet
from monai.networks.utils import copy_model_state
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from monai_conres import ConResLoss, ConResNet, ConResOutput, ConResWrapper, attach_conres, decoder_stages
from tests.networks import FAMILIES, NETWORKS, Family, dynunet

SIZE = (16, 24, 20)
# parameters that a network's own training never uses, or without an influence on its loss
UNUSED = {
    "BasicUNetPlusPlus": "final_conv_0_",
    "UNETR": "cross_attn",
    "SegResNetVAE": "vae",
    "SwinUNETR": "relative_position",
}


def main_output(output: Any) -> torch.Tensor:
    """The segmentation at full resolution among a network's outputs."""
    if isinstance(output, torch.Tensor):
        return output
    values = list(output.values()) if isinstance(output, dict) else list(output)
    return max((value for value in values if value is not None and value.ndim == 5), key=lambda value: value.numel())


def every_output(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    return [
        tensor for value in (output.values() if isinstance(output, dict) else output) for tensor in every_output(value)
    ]


def small(**kwargs) -> ConResWrapper:
    torch.manual_seed(0)
    return attach_conres(dynunet(), 1, 3, spatial_size=SIZE, **kwargs)


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(1, 1, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=NETWORKS, scope="module")
def named(request) -> tuple[str, Family]:
    return request.param, NETWORKS[request.param]


# every network


def test_a_closed_gate_is_the_network_itself_and_an_open_one_is_not(named):
    _, family = named
    torch.manual_seed(0)
    backbone = family.build().eval()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    image = torch.randn(1, 1, *family.size)
    with torch.no_grad():
        expected = main_output(backbone(image))
    network = attach_conres(backbone, 1, 3, zero_init=True, spatial_size=family.size)
    assert network.stages == family.stages
    with torch.no_grad():
        assert torch.equal(main_output(network(image)), expected)
        for number, module in enumerate(network.decoder.stages):
            module.strength.fill_(50)  # open the gate of this stage alone, and wide
            changed = main_output(network(image))
            assert (changed - expected).std() > 1e-6 * expected.std(), f"stage {number} has no influence"
            module.strength.fill_(0)
        assert torch.equal(main_output(backbone(image)), expected)
    assert network.backbone is backbone
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())
    assert backbone.state_dict().keys() == before.keys()
    assert network.unwrap() is backbone
    assert not any(module._forward_hooks for module in backbone.modules())
    with torch.no_grad():
        assert torch.equal(main_output(backbone(image)), expected)


def test_training_output_and_gradients(named):
    name, family = named
    torch.manual_seed(0)
    backbone = family.build().train()
    image = torch.randn(2, 1, *family.size)
    own = [tensor.shape for tensor in every_output(backbone(image))]
    plain_type = type(backbone(image))
    network = attach_conres(backbone, 1, 3, residual_channels=2, spatial_size=family.size)
    output = network(image)
    assert isinstance(output, ConResOutput)
    assert type(output.segmentation) is plain_type
    assert [tensor.shape for tensor in every_output(output.segmentation)] == own
    assert all(logits.shape[:2] == (2, 2) for logits in output.residuals)
    assert [logits[0, 0].numel() for logits in output.residuals] == sorted(
        (logits[0, 0].numel() for logits in output.residuals), reverse=True
    )
    sum(tensor.square().mean() for tensor in every_output(output)).backward()
    without = [key for key, value in network.named_parameters() if value.grad is None or not value.grad.any()]
    assert all(UNUSED.get(name, "none at all") in key for key in without), without


def test_the_gate_is_equation_6(image):
    """Recomputed from the features that the network's own stage gives."""
    network = small().eval()
    features, gated = {}, {}
    stages = [network.backbone.get_submodule(name) for name in network.stages]
    handles = [
        stage.register_forward_hook(lambda m, i, o, n=n: features.__setitem__(n, o.clone()), prepend=True)
        for n, stage in enumerate(stages)
    ]
    handles += [
        stage.register_forward_hook(lambda m, i, o, n=n: gated.__setitem__(n, o)) for n, stage in enumerate(stages)
    ]
    with torch.no_grad():
        network(image)
        previous = image
        for number in range(3):
            expected, previous = network.decoder.step(number, features[number], previous)
            assert torch.equal(gated[number], expected)
            share = gated[number] / features[number]
            assert share.min() >= 1
            assert share.max() <= 2
    for handle in handles:
        handle.remove()


def test_odd_sizes_and_anisotropic_strides():
    """DynUNet above has a stride of (2, 2, 1); BasicUNet pads odd sizes."""
    torch.manual_seed(0)
    network = attach_conres(FAMILIES["BasicUNet"].build(), 1, 3, spatial_size=(32, 32, 32))
    segmentation, residuals = network(torch.randn(1, 1, 35, 33, 34))
    assert segmentation.shape == (1, 3, 35, 33, 34)
    assert [tuple(logits.shape[2:]) for logits in residuals[:2]] == [(35, 33, 34), (17, 16, 17)]
    network.eval_residual = True
    segmentation, residual = network.eval()(torch.randn(1, 1, 35, 33, 34))
    assert segmentation.shape == residual.shape == (1, 3, 35, 33, 34)


def test_sliding_window_over_a_network_that_gives_a_list_in_eval_mode():
    torch.manual_seed(0)
    backbone = nets.BasicUNetPlusPlus(3, 1, 3, features=(8, 8, 16, 32, 64, 8))
    network = attach_conres(backbone, 1, 3, residual_channels=2).eval()
    network.eval_residual = True
    image = torch.randn(1, 1, 32, 32, 32)
    segmentation, residual = SlidingWindowInferer((32, 32, 32))(image, network)
    want = network.heads(image)
    torch.testing.assert_close(segmentation, want.segmentation[0])
    torch.testing.assert_close(residual, want.residuals[0])
    backbone.deep_supervision = True  # four outputs, the final one at the end
    with pytest.raises(ValueError, match=r"expected one segmentation .* got 4 of BasicUNetPlusPlus; switch"):
        network(image)


def test_training_with_the_network_s_own_deep_supervision_loss(image):
    torch.manual_seed(0)
    network = attach_conres(nets.SegResNetDS(3, 8, 1, 3, dsdepth=2), 1, 3, residual_channels=2)
    own = DeepSupervisionLoss(DiceCELoss(softmax=True, to_onehot_y=True))
    loss = ConResLoss(own, softmax=True, to_onehot_y=True)
    image, label = torch.randn(1, 1, 16, 24, 32), torch.randint(0, 3, (1, 1, 16, 24, 32)).float()
    output = network(image)
    got = loss(output, label)
    expected = own(list(output.segmentation), label) + loss.residual_loss(output.residuals, label)
    torch.testing.assert_close(got, expected)


def test_width_and_attention(image):
    def size(network: nn.Module) -> int:
        return sum(parameter.numel() for parameter in network.parameters())

    wide, narrow = small(width=None), small(width=4)
    assert size(narrow.decoder) < 0.2 * size(wide.decoder)
    assert [logits.shape for logits in narrow(image).residuals] == [logits.shape for logits in wide(image).residuals]
    blind = small(attention=False).eval()
    with torch.no_grad():
        assert torch.equal(blind(image), blind.backbone(image))


# what people do with networks


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
@pytest.mark.parametrize("after_training", [False, True])
def test_copies_are_equal_and_independent(image, duplicate, after_training):
    network = small()
    if after_training:
        sum(tensor.mean() for tensor in every_output(network(image))).backward()
    twin = duplicate(network).eval()
    network.eval()
    before = network(image)
    assert torch.equal(twin(image), before)
    with torch.no_grad():
        for parameter in network.decoder.parameters():
            parameter.normal_()
    assert torch.equal(twin(image), before)  # its hooks use its own decoder
    assert not torch.equal(network(image), before)


def test_moving_average(image):
    network = small().eval()
    average = AveragedModel(network, avg_fn=lambda old, new, n: 0.5 * old + 0.5 * new)
    average.update_parameters(network)
    assert torch.equal(average(image), network(image))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)
    average.update_parameters(network)
    expected = small().eval()
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(average(image), expected(image))


def test_modes_in_turn(image):
    network = small()
    assert isinstance(network(image), ConResOutput)
    segmentation = network.eval()(image)
    heads = network.heads(image)
    assert torch.equal(heads.segmentation, segmentation)
    assert isinstance(network.train()(image), ConResOutput)
    assert small().eval().backbone.training is False
    assert attach_conres(dynunet().eval(), 1, 3, spatial_size=SIZE).training is False
    partly = dynunet()
    partly.input_block.eval()  # frozen statistics
    network = attach_conres(partly, 1, 3, spatial_size=SIZE)
    assert network.training
    assert network.decoder.training
    assert not partly.input_block.training
    assert partly.bottleneck.training


def test_a_frozen_backbone_stays_and_the_decoder_learns(image):
    network = small()
    network.backbone.requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.1)
    sum(tensor.square().mean() for tensor in every_output(network(image))).backward()
    optimizer.step()
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("backbone."), name


def test_checkpoints_of_the_backbone(image):
    torch.manual_seed(5)
    trained = dynunet().eval()
    by_hand, by_monai = small(zero_init=True).eval(), small(zero_init=True).eval()
    by_hand.backbone.load_state_dict(trained.state_dict())
    copy_model_state(by_monai, trained.state_dict(), dst_prefix="backbone.")
    for network in (by_hand, by_monai):
        assert torch.equal(network(image), trained(image))
    twin = small(zero_init=True).eval()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict(by_hand.state_dict())
    assert torch.equal(twin(image), trained(image))


def test_autocast(image):
    network = small().eval()
    with torch.no_grad():
        expected = network(image)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = network(image)
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).std() < 0.05 * expected.std()


def test_double_precision_backbone(image):
    network = attach_conres(dynunet().double(), 1, 3, spatial_size=SIZE).eval()
    assert network(image.double()).dtype == torch.float64


def test_compile_has_no_graph_break(image):
    network = small()
    expected = network(image)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    got = compiled(image)
    torch.testing.assert_close(got.segmentation, expected.segmentation)
    torch.testing.assert_close(got.residuals, expected.residuals)


def test_export_and_onnx(image, tmp_path):
    network = small().eval()
    program = torch.export.export(network, (image,))
    torch.testing.assert_close(program.module()(image), network(image), rtol=1e-5, atol=1e-5)
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.onnx.export(network, (image,), tmp_path / "network.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    np.testing.assert_allclose(got, network(image).detach().numpy(), atol=1e-4)


def test_jit_trace(image):
    network = small().eval()
    traced = torch.jit.trace(network, image)
    torch.testing.assert_close(traced(image), network(image), rtol=1e-5, atol=1e-5)


def test_sliding_window(image):
    network = small().eval()
    network.eval_residual = True
    with torch.no_grad():
        got = SlidingWindowInferer(SIZE, sw_batch_size=2)(image, network)
        for stitched, expected in zip(got, network(image), strict=True):
            torch.testing.assert_close(stitched, expected, rtol=1e-5, atol=1e-5)


def test_several_networks_do_not_disturb_each_other(image):
    first, second = small().eval(), attach_conres(FAMILIES["SegResNet"].build().eval(), 1, 3)
    larger = torch.randn(1, 1, 16, 24, 32)
    a, b = first(image), second(larger)
    assert torch.equal(first(image), a)
    assert torch.equal(second(larger), b)


def test_threads(image):
    network = small().eval()
    images = [torch.randn(1, 1, *SIZE) for _ in range(4)]
    with torch.no_grad():
        expected = [network(image) for image in images]
    got: dict[int, torch.Tensor] = {}

    def work(number: int) -> None:
        with torch.no_grad():
            for _ in range(3):
                got[number] = network(images[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, value in enumerate(expected):
        torch.testing.assert_close(got[number], value)


def test_an_exception_in_the_middle_leaves_nothing_behind(image):
    network = small().eval()
    expected = network(image)
    handle = network.backbone.upsamples[2].register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        network(image)
    handle.remove()
    assert torch.equal(copy.deepcopy(network)(image), expected)
    assert torch.equal(network(image), expected)


def test_checkpointing_of_the_whole_wrapper(image):
    network, twin = small(), small()
    sum(tensor.square().mean() for tensor in every_output(network(image))).backward()
    output = checkpoint(twin, image, use_reentrant=False)
    sum(tensor.square().mean() for tensor in every_output(output)).backward()
    for a, b in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_channels_last_weights(image):
    network = small(zero_init=True)
    with torch.no_grad():
        for module in network.decoder.stages:
            module.strength.uniform_(0.5, 1)
    expected = network(image)
    got = copy.deepcopy(network).to(memory_format=torch.channels_last_3d)(image)
    torch.testing.assert_close(got.segmentation, expected.segmentation, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got.residuals, expected.residuals, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_part_that_is_compiled_is_refused(image):
    network = small().eval()
    network.backbone = torch.compile(network.backbone, backend="eager")
    with pytest.raises(RuntimeError, match=r"got 0 of them; .* compile the wrapper, not its backbone"):
        network(image)


class InPlaceUNet(nn.Module):
    """It works in place on the features that a stage gives."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace
        self.down = nn.Conv3d(1, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose3d(8, 8, 2, stride=2)
        self.head = nn.Conv3d(8, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.up(self.down(x))
        features = features.mul_(2) if self.inplace else features * 2
        return self.head(nn.functional.leaky_relu(features, inplace=self.inplace))


def test_without_attention_the_backbone_may_work_in_place(image):
    gradients = []
    for inplace in (False, True):
        torch.manual_seed(0)
        network = attach_conres(InPlaceUNet(inplace), 1, 3, stages=["up"], attention=False, spatial_size=SIZE)
        sum(tensor.square().mean() for tensor in every_output(network(image))).backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert all(gradient.any() for gradient in gradients[0])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_the_switch_of_nnunet_s_trainer():
    network = attach_conres(FAMILIES["PlainConvUNet"].build(), 1, 3, spatial_size=SIZE)
    image = torch.randn(1, 1, *SIZE)
    assert isinstance(network(image).segmentation, list)
    network.decoder.deep_supervision = False
    assert network(image).segmentation.shape == (1, 3, *SIZE)
    assert network.eval()(image).shape == (1, 3, *SIZE)
    blind = attach_conres(FAMILIES["PlainConvUNet"].build(), 1, 3, attention=False, spatial_size=SIZE).eval()
    assert isinstance(blind(image), list)
    blind.decoder.deep_supervision = False
    assert blind(image).shape == (1, 3, *SIZE)


def test_the_user_s_random_numbers_stay_as_they_are():
    network = dynunet()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    decoder_stages(network, 1, spatial_size=SIZE)
    assert torch.equal(torch.rand(3), expected)


# what is refused


class Wrapped(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)


@pytest.mark.parametrize("again", [lambda network: network, lambda network: network.backbone, Wrapped])
def test_attached_twice(again: Callable):
    network = small()
    with pytest.raises(ValueError, match=r"has a context residual decoder already; call unwrap\(\)"):
        attach_conres(again(network), 1, 3, spatial_size=SIZE)
    attach_conres(network.unwrap(), 1, 3, spatial_size=SIZE)


def test_refused():
    with pytest.raises(ValueError, match="expected out_channels=3, what DynUNet gives, got 4"):
        attach_conres(dynunet(), 1, 4, spatial_size=SIZE)
    with pytest.raises(ValueError, match="spatial_axis between -3 and 2"):
        attach_conres(dynunet(), 1, 3, spatial_axis=3)
    with pytest.raises(ValueError, match="width=0"):
        attach_conres(dynunet(), 1, 3, spatial_size=SIZE, width=0)
    with pytest.raises(ValueError, match="expected attention=True together with zero_init=True"):
        attach_conres(dynunet(), 1, 3, spatial_size=SIZE, attention=False, zero_init=True)
    with pytest.raises(ValueError, match="expected a spatial_size of three numbers, for a 3D network, got 32"):
        attach_conres(dynunet(), 1, 3, spatial_size=32)
    with pytest.raises(ValueError, match="no decoder stage in Conv3d"):
        attach_conres(nn.Conv3d(1, 3, 3, padding=1), 1, 3)
    with pytest.raises(ValueError, match="another network than this package's own, got a ConResNet"):
        attach_conres(ConResNet(1, 3, mapping=False, attention=False), 1, 3)
    with pytest.raises(ValueError, match="attach first, then compile"):
        attach_conres(torch.compile(dynunet(), backend="eager"), 1, 3)
    distributed = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(distributed)  # it would ask for a process group
    for wrapped in (nn.DataParallel(dynunet()), distributed):
        with pytest.raises(ValueError, match=rf"inside of {type(wrapped).__name__}, .*attach first, then put"):
            attach_conres(wrapped, 1, 3)
    with pytest.raises(ValueError, match="found no decoder stage"):
        attach_conres(nn.Sequential(nn.Conv3d(1, 3, 3, padding=1)), 1, 3)


def test_checkpointing_inside_of_the_backbone():
    """A stage around the checkpointed part works, one within it is refused when it is computed again."""
    backbone = CheckpointUNet(3, 1, 3, (8, 16, 32), (2, 2))
    outside = attach_conres(backbone, 1, 3, spatial_size=(16, 16, 16))
    assert outside.stages == ("model.1",)
    image = torch.randn(1, 1, 16, 16, 16)
    sum(tensor.square().mean() for tensor in every_output(outside(image))).backward()
    assert all(parameter.grad.any() for parameter in outside.parameters())

    inside = attach_conres(outside.unwrap(), 1, 3, stages=["model.1.submodule.module.2"], spatial_size=(16, 16, 16))
    output = inside(image)
    with pytest.raises(RuntimeError, match=r"computed again in the backward pass.*checkpoint the whole wrapper"):
        sum(tensor.square().mean() for tensor in every_output(output)).backward()


def test_data_parallel_is_refused(image):
    replica = copy.copy(small())
    replica._is_replica = True  # as torch marks it, on several GPUs
    with pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        replica(image)


def test_an_unwrapped_wrapper_says_so(image):
    network = small()
    network.unwrap()
    with pytest.raises(RuntimeError, match=r"unwrap\(\) took the decoder off"):
        network(image)


def test_a_stage_that_does_not_run(image):
    network = small()
    network.backbone.skip_layers.forward = lambda x: torch.zeros(1, 8, *SIZE)
    with pytest.raises(RuntimeError, match=r"expected every stage of .* to run in a forward pass"):
        network(image)


# two processes


def train_one_step(rank: int, processes: int, folder: str, conresnet: bool) -> None:
    """One step on this process's share of a batch of two; the gradients go into a file."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if conresnet:
        network: nn.Module = ConResNet(1, 3, channels=(8, 16), strides=(2,), blocks=(1, 1, 1), dropout=None)
    else:
        network = attach_conres(dynunet(), 1, 3, spatial_size=SIZE)
    network.double()  # so that another order of summation makes no difference
    images = torch.randn(2, 1, *SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if processes > 1:
        store = torch.distributed.FileStore(f"{folder}/store", processes)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes)
        network = nn.parallel.DistributedDataParallel(network)
        images = images[rank : rank + 1]
    for _ in range(2):  # the second pass fails where the first left a parameter unused
        network.zero_grad()
        output = network(images)
        assert isinstance(output, ConResOutput)
        sum(tensor.square().mean() for tensor in every_output(output)).backward()
    if rank == 0:
        gradients = {name.removeprefix("module."): p.grad for name, p in network.named_parameters()}
        torch.save(gradients, f"{folder}/gradients_{processes}.pt")
    if processes > 1:
        # without a clean-up: torch 2.13 deadlocks now and then where the wrapper is freed while a thread of gloo still
        # frees its last piece of work
        os._exit(0)


@pytest.mark.parametrize("conresnet", [True, False], ids=["ConResNet", "attached"])
def test_two_processes_have_the_gradients_of_one(tmp_path, conresnet):
    train_one_step(0, 1, str(tmp_path), conresnet)
    torch.multiprocessing.spawn(train_one_step, (2, str(tmp_path), conresnet), nprocs=2)
    one, two = (torch.load(tmp_path / f"gradients_{processes}.pt") for processes in (1, 2))
    assert one.keys() == two.keys()
    for name, gradient in one.items():
        assert gradient is not None, name
        torch.testing.assert_close(two[name], gradient, rtol=1e-6, atol=1e-10)


def test_a_training_step_never_waits_for_the_device(image):
    """A tensor on the meta device has no values, and none of another device goes with it."""
    network = small(residual_channels=2).to("meta")
    loss = ConResLoss(DiceCELoss(softmax=True, to_onehot_y=True), softmax=True, to_onehot_y=True)
    image = image.to("meta")
    loss(network(image), torch.empty_like(image)).backward()
    assert {parameter.grad.device.type for parameter in network.parameters()} == {"meta"}
    assert network.eval()(image).device.type == "meta"
