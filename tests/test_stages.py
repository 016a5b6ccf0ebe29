from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn as nn
from monai.networks import nets

import monai_conres.stages
from monai_conres import __main__ as command_line
from monai_conres import decoder_stages
from tests.networks import FAMILIES, FOREIGN, Family, SqueezeUNet, conv, dynunet


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_known_families(family):
    found = decoder_stages(family.build(), 1, spatial_size=family.size)
    assert tuple(stage.name for stage in found.stages) == family.stages
    assert tuple(stage.channels for stage in found.stages) == family.channels
    assert found.out_channels == 3
    assert found.image_size == family.size


@pytest.mark.parametrize("family", FOREIGN.values(), ids=FOREIGN)
def test_networks_found_by_their_graph(family):
    found = decoder_stages(family.build(), 1, spatial_size=family.size)
    assert tuple(stage.name for stage in found.stages) == family.stages
    assert tuple(stage.channels for stage in found.stages) == family.channels
    sizes = [stage.size for stage in found.stages]
    assert sizes[-1] == family.size
    assert sizes == sorted(sizes)


# The finest features of UNet are found within its last level, another place of AttentionUnet is as good as the one by
# name, and SwinUNETR has channel-last features in its encoder
BY_NAME_ONLY = {"UNet", "AttentionUnet", "SwinUNETR"}
# its skips are up-sampled from the coarsest features, so that the graph has the two finest stages alone
FEWER = {"UNETR": 2}


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - BY_NAME_ONLY))
def test_the_graph_alone_finds_the_same_sizes_in_known_families(name, monkeypatch):
    family: Family = FAMILIES[name]
    network = family.build()
    known = decoder_stages(network, 1, spatial_size=family.size)
    monkeypatch.setattr(monai_conres.stages, "_FAMILIES", {})
    found = decoder_stages(network, 1, spatial_size=family.size)
    sizes = [stage.size for stage in known.stages]
    assert [stage.size for stage in found.stages] == sizes[len(sizes) - FEWER.get(name, len(sizes)) :]


def test_nothing_in_the_network_changes():
    network = dynunet()
    network.eval()
    network.upsamples[0].train()  # a frozen network with a part in training
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    decoder_stages(network, 1)
    assert modes == [module.training for module in network.modules()]
    assert not any(module._forward_hooks for module in network.modules())
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_size_that_fits_is_found():
    class Divisible(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = nets.BasicUNet(3, 1, 3, (8, 8, 16, 32, 64, 8))

        def forward(self, x):
            if x.shape[2] % 96:
                raise ValueError("give me a multiple of 96")
            return self.network(x[..., :32, :32, :32])

    assert decoder_stages(Divisible(), 1).image_size == (96, 96, 96)


def test_given_stages_are_put_in_order():
    found = decoder_stages(dynunet(), 1, stages=["upsamples.2", "upsamples.0"], spatial_size=(16, 16, 16))
    assert [stage.name for stage in found.stages] == ["upsamples.0", "upsamples.2"]
    one = decoder_stages(dynunet(), 1, stages="upsamples.1", spatial_size=(16, 16, 16))
    assert [stage.name for stage in one.stages] == ["upsamples.1"]


def test_the_table_marks_what_is_chosen():
    lines = str(decoder_stages(dynunet(), 1, spatial_size=(16, 24, 20))).splitlines()
    assert "channels  size (of an image of 16x24x20)" in lines[0]
    marked = [line.split() for line in lines if line.startswith("*")]
    assert marked == [
        ["*", "upsamples.0", "32", "4x6x5"],
        ["*", "upsamples.1", "16", "8x12x10"],
        ["*", "upsamples.2", "8", "16x24x20"],
    ]


class UNet(SqueezeUNet):
    """A user's own network has the name of a known one."""


class SubclassOfUNet(nets.UNet):
    """Not built as its base class is."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.model = SqueezeUNet()

    def forward(self, x):
        return self.model(x)


def test_only_the_published_classes_are_known_by_name():
    assert [stage.name for stage in decoder_stages(UNet(), 1).stages] == ["dec2", "dec1"]
    assert [stage.name for stage in decoder_stages(SubclassOfUNet(), 1).stages] == ["model.dec2", "model.dec1"]


@pytest.mark.parametrize(
    "expression",
    [
        "UNet()",
        "monai.networks.nets.UNet",
        "monai.networks.nets.NoNet()",
        "no.Net()",
        "monai.networks.nets.VNet(act=ReLU)",
        "monai.networks.nets.VNet(",
    ],
)
def test_command_errors(expression, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["monai_conres", expression])
    with pytest.raises(SystemExit) as stop:
        command_line.main()
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_command():
    expression = "monai.networks.nets.SegResNet(init_filters=8, in_channels=2, out_channels=3)"
    command = [sys.executable, "-m", "monai_conres", expression, "--in-channels", "2", "--size", "16", "24", "32"]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = result.stdout.splitlines()
    names = [f"up_layers.{i}" for i in range(3)]
    assert [line.split()[1] for line in lines if line.startswith("*")] == names
    assert lines[-1] == f"stages={names}"
    assert "RuntimeWarning" not in result.stderr


class Classifier(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(conv(1, 8), conv(8, 8, 2), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 2))


class SingleScale(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(conv(1, 8), conv(8, 8), nn.Conv3d(8, 3, 1))


class TwoWays(nn.Module):
    """Two up-sampling paths that meet in the logits only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = conv(1, 8), conv(8, 8, 2)
        self.left, self.right = (nn.Sequential(nn.Upsample(scale_factor=2), conv(8, 8)) for _ in range(2))

    def forward(self, x):
        y = self.down(self.stem(x))
        return self.left(y) + self.right(y)


def test_errors_list_the_candidates():
    with pytest.raises(ValueError, match=r"(?s)\['upsamples.9'\]; choose from:.*upsamples\.0 +32  4x4x4"):
        decoder_stages(dynunet(), 1, stages=["upsamples.9"], spatial_size=(16, 16, 16))
    with pytest.raises(
        ValueError, match=r"found no decoder stage in SingleScale.*stages=\[\.\.\.\](.*\n)*.*8  16x16x16"
    ):
        decoder_stages(SingleScale(), 1, spatial_size=(16, 16, 16))
    with pytest.raises(ValueError, match=r"'left' to reach the output through 'right' alone, got a way"):
        decoder_stages(TwoWays(), 1, stages=["left", "right"], spatial_size=(8, 8, 8))


def test_errors_of_networks_that_do_not_run():
    with pytest.raises(ValueError, match=r"Classifier to give a tensor of shape \(b, c, d, h, w\)"):
        decoder_stages(Classifier(), 1)
    with pytest.raises(ValueError, match=r"image of 2 channels, got an error at each size \(64x64x64: .*in_channels"):
        decoder_stages(dynunet(), 2)
    with pytest.raises(ValueError, match=r"spatial_size of three numbers.*\(16, 16\)"):
        decoder_stages(dynunet(), 1, spatial_size=(16, 16))
    with pytest.raises(ValueError, match="DynUNet with weights, got one on meta"):
        decoder_stages(dynunet().to("meta"), 1)
