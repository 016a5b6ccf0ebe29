from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn as nn
from monai.networks import nets

import monai_conres.stages
from monai_conres import decoder_stages
from tests.networks import FAMILIES, NETWORKS, SqueezeUNet, conv, dynunet

# The search by the graph finds the finest features of UNet inside its last level, and another equally good place in
# AttentionUnet. SwinUNETR has channel-last features in its encoder.
BY_NAME_ONLY = {"UNet", "AttentionUnet", "SwinUNETR"}
# The skips of UNETR are up-sampled from the coarsest features, so that the graph has only the two finest stages.
FEWER = {"UNETR": 2}


@pytest.mark.parametrize("name", NETWORKS)
def test_stages_by_name_and_by_graph(name, monkeypatch):
    family = NETWORKS[name]
    network = family.build()
    found = decoder_stages(network, 1, spatial_size=family.size)
    assert tuple(stage.name for stage in found.stages) == family.stages
    assert tuple(stage.channels for stage in found.stages) == family.channels
    assert found.out_channels == 3
    assert found.image_size == family.size
    sizes = [stage.size for stage in found.stages]
    assert sizes == sorted(sizes)
    assert name == "UNet" or sizes[-1] == family.size
    if name in FAMILIES.keys() - BY_NAME_ONLY:
        monkeypatch.setattr(monai_conres.stages, "_FAMILIES", {})
        by_graph = decoder_stages(network, 1, spatial_size=family.size)
        assert [stage.size for stage in by_graph.stages] == sizes[len(sizes) - FEWER.get(name, len(sizes)) :]


def test_search_leaves_the_network_unchanged():
    network = dynunet()
    network.eval()
    network.upsamples[0].train()  # a frozen network with a part in training
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    random_numbers = torch.get_rng_state()
    decoder_stages(network, 1, spatial_size=(16, 16, 16))
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert modes == [module.training for module in network.modules()]
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    pickle.dumps(network)  # fails while a hook of the search is there


def test_search_tries_sizes_until_one_fits():
    class Divisible(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = nets.BasicUNet(3, 1, 3, (8, 8, 16, 32, 64, 8))

        def forward(self, x):
            if x.shape[2] % 96:
                raise ValueError("give me a multiple of 96")
            return self.network(x[..., :32, :32, :32])

    assert decoder_stages(Divisible(), 1).image_size == (96, 96, 96)


def test_stages_keep_no_activations():
    network = nets.BasicUNet(features=(4, 4, 8, 8, 16, 4))
    shapes = []

    def pack(tensor):
        shapes.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        stages = decoder_stages(network, 1, spatial_size=(32, 32, 32))
    assert stages.features
    assert not shapes  # the search has hooks of its own, which keep nothing


def test_stages_need_gradients():
    with torch.inference_mode(), pytest.raises(ValueError, match=r"got torch.inference_mode"):
        decoder_stages(nets.BasicUNet(features=(4, 4, 8, 8, 16, 4)), 1)


def test_given_stages_are_ordered_and_marked_in_the_table():
    found = decoder_stages(dynunet(), 1, stages=["upsamples.2", "upsamples.0"], spatial_size=(16, 24, 20))
    lines = str(found).splitlines()
    assert "channels  size (of an image of 16x24x20)" in lines[0]
    marked = [line.split() for line in lines if line.startswith("*")]
    assert marked == [["*", "upsamples.0", "32", "4x6x5"], ["*", "upsamples.2", "8", "16x24x20"]]


class UNet(SqueezeUNet):
    """A user's own network has the name of a known one."""


class SubclassOfUNet(nets.UNet):
    """Not built as its base class is."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.model = SqueezeUNet()

    def forward(self, x):
        return self.model(x)


def test_names_are_only_used_for_published_classes():
    size = (16, 16, 16)
    assert [stage.name for stage in decoder_stages(UNet(), 1, spatial_size=size).stages] == ["dec2", "dec1"]
    subclass = decoder_stages(SubclassOfUNet(), 1, spatial_size=size)
    assert [stage.name for stage in subclass.stages] == ["model.dec2", "model.dec1"]


def classifier() -> nn.Module:
    return nn.Sequential(conv(1, 8), conv(8, 8, 2), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 2))


class TwoWays(nn.Module):
    """Two up-sampling paths that only meet in the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = conv(1, 8), conv(8, 8, 2)
        self.left, self.right = (nn.Sequential(nn.Upsample(scale_factor=2), conv(8, 8)) for _ in range(2))

    def forward(self, x):
        y = self.down(self.stem(x))
        return self.left(y) + self.right(y)


SIXTEEN = {"spatial_size": (16, 16, 16)}


@pytest.mark.parametrize(
    ("network", "channels", "arguments", "message"),
    [
        (
            dynunet(),
            1,
            {"stages": ["upsamples.9"], **SIXTEEN},
            r"(?s)\['upsamples.9'\]; choose from:.*upsamples\.0 +32  4x",
        ),
        (nn.Sequential(conv(1, 8), conv(8, 3)), 1, SIXTEEN, r"(?s)found no decoder stage in Sequential.*8  16x16x16"),
        (
            TwoWays(),
            1,
            {"stages": ["left", "right"], **SIXTEEN},
            "'left' to reach the output only through 'right', got",
        ),
        (classifier(), 1, SIXTEEN, r"Sequential to give a tensor of shape \(b, c, d, h, w\)"),
        (dynunet(), 2, {}, r"image of 2 channels, got an error at each size \(64x64x64: .*in_channels"),
        (dynunet(), 1, {"spatial_size": (16, 16)}, r"spatial_size of three numbers.*\(16, 16\)"),
        (dynunet().to("meta"), 1, {}, "DynUNet with weights, got one on the meta device"),
    ],
)
def test_stages_that_are_not_found_are_an_error(network, channels, arguments, message):
    with pytest.raises(ValueError, match=message):
        decoder_stages(network, channels, **arguments)
