from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from monai.inferers import SlidingWindowInferer

from monai_conres import ConResNet, inter_slice_residual
from monai_conres.bundle import (
    Datalist,
    MeanProbability,
    ProbabilityInferer,
    held_out_cases,
    load_networks,
    same_classes,
    save_torchscript,
    stored_network,
    stored_scans,
)
from monai_conres.files import ScanSettings, save_network

SCANS = {"channels": ["T1"], "patch_size": [8, 8, 8], "classes": {"ET": [4], "TC": [1, 4]}, "activation": "sigmoid"}
SMALL = {"in_channels": 1, "out_channels": 2, "channels": [8, 16], "strides": [2], "blocks": [1, 1, 1]}


def small(seed: int = 0, **kwargs) -> ConResNet:
    torch.manual_seed(seed)
    return ConResNet(**{**SMALL, **kwargs}).eval()


@pytest.fixture
def runs(tmp_path) -> list[str]:
    """Two run folders: folds whose training cases are a, b and b, c."""
    for fold, cases in enumerate(("ab", "bc")):
        save_network(tmp_path / str(fold), small(fold), ScanSettings(**SCANS), training={"cases": list(cases)})
    return [str(tmp_path / "0"), str(tmp_path / "1")]


@pytest.mark.parametrize("softmax", [False, True])
def test_mean_probability_equals_each_network_by_hand(softmax):
    networks = [torch.nn.Conv3d(2, 3, 3, padding=1) for _ in range(2)]
    image = torch.randn(1, 2, 5, 4, 6)
    predictor = MeanProbability(networks, softmax=softmax, flip_axes=[[0], [1, 2]])
    expected = sum(
        (logits.softmax(1) if softmax else logits.sigmoid()).flip(dims)
        for dims in ((), (2,), (3, 4))
        for logits in (network(image.flip(dims)) for network in networks)
    )
    torch.testing.assert_close(predictor(image), expected / 6)
    from_the_end = MeanProbability(networks, softmax=softmax, flip_axes=[[-3], [-2, -1]])
    torch.testing.assert_close(from_the_end(image), predictor(image), rtol=0, atol=0)
    with pytest.raises(ValueError, match="spatial_axis between -3 and 2"):
        MeanProbability(networks, flip_axes=[[3]])(image)


def test_mean_probability_needs_a_network():
    with pytest.raises(ValueError, match="one network or more"):
        MeanProbability([])


class Perfect(torch.nn.Module):
    """Knows the residual of its input: logits 9 where a voxel changes from one slice to the next, -9 elsewhere."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.residual_decoder = small(spatial_axis=axis).residual_decoder
        self.axis = axis

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image

    def with_residual(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return image, 18 * inter_slice_residual(image, spatial_axis=self.axis) - 9


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_flips_along_the_slices_shift_the_residual_back(axis):
    """A network that is right in each flip is right in the mean, except in the first slice."""
    mask = (torch.rand(2, 3, 6, 5, 4, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    network = Perfect(axis)
    predictor = MeanProbability([network, network], flip_axes=[[0], [1], [2], [0, 1, 2], [-1, 0]])
    _, residual = predictor.with_residual(mask)
    _, expected = network.with_residual(mask)
    got, expected = (volume.movedim(2 + axis % 3, 0)[1:] for volume in (residual, expected))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("softmax", [False, True])
def test_with_residual_equals_brute_force(softmax):
    networks = [small(seed, out_channels=2 + softmax, include_background=not softmax) for seed in (0, 1)]
    image = torch.randn(1, 1, 6, 8, 10)
    predictor = MeanProbability(networks, softmax=softmax, flip_axes=[[1], [0, 2]]).eval()
    probabilities, residuals = [], []
    for network in networks:
        for dims in ((), (3,), (2, 4)):
            segmentation, residual = network.with_residual(image.flip(dims))
            probabilities.append((segmentation.softmax(1) if softmax else segmentation.sigmoid()).flip(dims))
            flipped = residual.flip(dims)
            if 4 in dims:  # slice s of the result is slice s - 1 of the residual that was flipped back
                flipped = torch.cat([flipped[..., -1:], *(flipped[..., s - 1 : s] for s in range(1, 10))], -1)
            residuals.append(flipped)
    segmentation, residual = predictor.with_residual(image)
    got = segmentation.softmax(1) if softmax else segmentation.sigmoid()
    torch.testing.assert_close(got, torch.stack(probabilities).mean(0))
    torch.testing.assert_close(got, predictor(image))
    torch.testing.assert_close(residual, torch.stack(residuals).mean(0))


def test_with_residual_of_certain_networks_is_finite():
    class Certain(Perfect):
        def with_residual(self, image):
            return 200 * image, image

    image = torch.tensor([-1.0, 1.0]).reshape(1, 1, 1, 1, 2)
    segmentation, _ = MeanProbability([Certain(-1)]).with_residual(image)
    torch.testing.assert_close(segmentation, 200 * image)


def test_with_residual_goes_through_an_inferer():
    predictor = MeanProbability([small()], flip_axes=[[0]]).eval()
    image = torch.randn(1, 1, 8, 8, 12)
    with torch.no_grad():
        windows = SlidingWindowInferer((8, 8, 12))(image, predictor.with_residual)
        for got, expected in zip(windows, predictor.with_residual(image), strict=True):
            torch.testing.assert_close(got, expected)


def test_with_residual_errors():
    image = torch.randn(1, 1, 8, 8, 8)
    with pytest.raises(ValueError, match="predicts residual masks"):
        MeanProbability([small(context="none")]).with_residual(image)
    with pytest.raises(ValueError, match=r"one slice axis, got spatial_axis \[0, 2\]"):
        MeanProbability([small(), small(spatial_axis=0)]).with_residual(image)


@pytest.mark.parametrize("softmax", [False, True])
def test_probability_inferer_gives_the_mean_probability(softmax):
    network, image = small(out_channels=3), torch.randn(1, 1, 8, 8, 12)
    predictor = MeanProbability([network], softmax=softmax, flip_axes=[[0]])
    inferer = ProbabilityInferer((8, 8, 12), softmax=softmax, flip_axes=[[0]])
    for given in (network, predictor):
        torch.testing.assert_close(inferer(image, given), predictor(image))


def test_load_networks_loads_one_or_more_run_folders(runs):
    image = torch.randn(1, 1, 8, 8, 8)
    for given in (runs, runs[0]):
        for seed, network in enumerate(load_networks(given)):
            torch.testing.assert_close(network(image), small(seed)(image))
    first, second = load_networks(runs, network=(loaded := stored_network(runs[0], {})))
    assert first is loaded
    torch.testing.assert_close(second(image), small(1)(image))
    with pytest.raises(ValueError, match=r"expected .*none/network\.json"):
        load_networks("none")


def test_load_networks_refuses_training_cases(runs):
    held_out = [{"name": name} for name in "cd"]
    load_networks(runs[0], held_out=held_out)
    with pytest.raises(ValueError, match=r"1 was not trained with, got \['c'\], 1 of 2 in all"):
        load_networks(runs, held_out=held_out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": ["T2"]}, r"expected scans#channels \['T2'\], as in network\.json of .*, got \['T1'\]"),
        ({"classes": {"TC": [1, 4], "ET": [4]}}, "expected scans#classes"),
        ({"spacing": [1, 1, 2]}, r"expected scans#spacing \[1, 1, 2\].*got None"),
        ({"normalization": [{"name": "NormalizeIntensity"}]}, "expected scans#normalization"),
        ({"patch_size": [4, 4, 4], "classes": {"ET": [3], "TC": [2, 3]}, "overlap": 0.5}, None),
    ],
)
def test_load_networks_needs_the_same_scans(runs, change, message, tmp_path):
    save_network(tmp_path / "other", small(), ScanSettings(**{**SCANS, **change}))
    for given, scans in (([*runs, tmp_path / "other"], None), (tmp_path / "other", ScanSettings(**SCANS))):
        if message is None:  # these may differ
            load_networks(given, scans=scans)
        else:
            with pytest.raises(ValueError, match=message):
                load_networks(given, scans=scans)


def test_stored_network_has_the_trained_weights(runs):
    image = torch.randn(1, 1, 8, 8, 8)
    network = stored_network(runs[1], {"in_channels": 3}, channels=(8, 16), spatial_axis=-1)
    torch.testing.assert_close(network(image), small(1)(image))


def test_stored_network_without_a_run_takes_its_default(tmp_path):
    network = stored_network(tmp_path, SMALL, context="none")
    assert network.context == "none"
    assert network.arguments["strides"] == [2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"context": "none"}, r"network_def#context attention, as in network\.json of .*, got none; leave"),
        ({"channels": [8, 8]}, r"network_def#channels \[8, 16\], as in .* got \[8, 8\]"),
        ({"spatial_axis": 0}, "network_def#spatial_axis -1"),
        ({"layers": 3}, "network_def#layers None"),
    ],
)
def test_stored_network_refuses_other_arguments(runs, given, message):
    with pytest.raises(ValueError, match=message):
        stored_network(runs[0], SMALL, **given)


def test_stored_scans_may_change_windows_only(runs, tmp_path):
    scans = stored_scans(runs[0], {"channels": ["FLAIR"]}, patch_size=[4, 8, 8], overlap=0.5, channels=["T1"])
    assert scans == dataclasses.replace(ScanSettings(**SCANS), patch_size=(4, 8, 8), overlap=0.5)
    with pytest.raises(ValueError, match=r"scans#channels \['T1'\], as in network\.json of .*, got \['T2'\]"):
        stored_scans(runs[0], SCANS, channels=["T2"])
    assert stored_scans(tmp_path, SCANS, channels=["T2"]).channels == ("T2",)


def test_held_out_cases_are_those_of_the_training(runs, tmp_path):
    data = Datalist([{"name": name} for name in "abcd"], {"ET": (4,)})
    save_network(tmp_path, small(), ScanSettings(**SCANS), training={"cases": ["a"], "validation": ["d", "b"]})
    assert [case["name"] for case in held_out_cases(data, tmp_path)] == ["b", "d"]
    with pytest.raises(ValueError, match=r"found 1 of 2, missing \['d'\]; give .* --cases"):
        held_out_cases(Datalist(data.cases[:3], data.structures), tmp_path)
    with pytest.raises(ValueError, match=r"held out in the data, found 0 of 0"):
        held_out_cases(data, runs[0])


def test_same_classes_allows_other_values():
    scans = ScanSettings(**SCANS)
    assert same_classes({"ET": (3,), "TC": (2, 3)}, scans) == {"ET": (3,), "TC": (2, 3)}
    with pytest.raises(ValueError, match=r"classes \{'ET': \(4,\), 'TC': \(1, 4\)\} in the labels, got \{'TC'"):
        same_classes({"TC": (1, 4), "ET": (4,)}, scans)
    with pytest.raises(ValueError, match="the network's classes"):
        same_classes({"ET": (3,), "TC": (1, 2, 3)}, dataclasses.replace(scans, activation="softmax"))


def test_save_torchscript_writes_what_the_ensemble_computes(runs, tmp_path):
    predictor = MeanProbability(load_networks(runs), flip_axes=[[0]])
    save_torchscript(predictor, tmp_path / "model.ts", torch.zeros(1, 1, 8, 8, 8))
    image = torch.randn(2, 1, 8, 10, 12)
    got = torch.jit.load(tmp_path / "model.ts")(image)
    np.testing.assert_allclose(got.detach(), predictor.eval()(image).detach(), atol=1e-6)


class HalfPrecision(torch.nn.Module):
    """Logits as autocast gives them: just below zero."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.full_like(image, -0.002).bfloat16()


def test_probabilities_of_half_precision_do_not_round_up():
    probability = MeanProbability([HalfPrecision(), HalfPrecision()])(torch.zeros(1, 1, 2, 2, 2))
    assert probability.dtype == torch.float32
    assert probability.max() < 0.5 == torch.tensor(-0.002).bfloat16().sigmoid()
