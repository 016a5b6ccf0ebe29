"""Whole volumes and scan files that are completed from a few drawn slices, and the command for it."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn as nn
from monai.data import MetaTensor
from monai.inferers import PatchInferer, SimpleInferer, SlidingWindowInferer, SlidingWindowSplitter
from monai.networks.nets import SegResNet, UNet

from monai_conres import ConResNet, attach_conres
from monai_conres.__main__ import main
from monai_conres.bundle import MeanProbability
from monai_conres.chain import ChainSettings, SliceChain, complete_mask, next_slice
from monai_conres.chain_training import fit_chain
from monai_conres.commands.complete import plot_preview
from monai_conres.completion import _predict, _propose, complete_scan, predict_with_residual
from monai_conres.files import TrainedNetwork, load_network, save_chain, save_network
from monai_conres.residual import inter_slice_residual, residual_mask
from monai_conres.scans import ScanSettings

BRATS = {"ET": (4,), "WT": (1, 2, 4), "TC": (1, 4)}
SMALL = {"channels": (8, 16), "strides": ((2, 2, 1),), "blocks": (1, 1, 1)}
PLAIN = ChainSettings(tau=1.0, residual_scale=1.0, image_contrast=0.0, offset=0.0)


class Contrast(nn.Module):
    """A network that sees each voxel and the slice before it, so windows and whole volumes give the same."""

    def __init__(self, classes: int = 2, spatial_axis: int = -1) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(-1, 1, classes).view(1, -1, 1, 1, 1))
        self.arguments = {"spatial_axis": spatial_axis}

    def with_residual(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        residual = inter_slice_residual(image[:, :1], spatial_axis=self.arguments["spatial_axis"])
        return image[:, :1] * self.scale, 5 * residual - 2 + 0 * self.scale[:, 1:]


def slices_before(image: torch.Tensor, axis: int) -> torch.Tensor:
    """All slices with a slice before them."""
    return image.narrow(2 + axis % 3, 1, image.shape[2 + axis % 3] - 1)


# whole volumes


@pytest.mark.parametrize("axis", [-1, 0, 1])
@pytest.mark.parametrize("mode", ["constant", "gaussian"])
def test_windows_equal_one_window_over_the_volume(axis, mode):
    network, image = Contrast(3, axis), torch.randn(2, 2, 10, 13, 11)
    inferer = SlidingWindowInferer((6, 6, 6), sw_batch_size=3, overlap=0.25, mode=mode)
    with torch.no_grad():
        whole = network.with_residual(image)
        blended = inferer(image, network.with_residual)[1]
        segmentation, residual = predict_with_residual(image, network, inferer)
    torch.testing.assert_close(segmentation, whole[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(slices_before(residual, axis), slices_before(whole[1], axis), rtol=1e-4, atol=1e-4)
    assert (slices_before(blended, axis) - slices_before(whole[1], axis)).abs().max() > 0.1  # without the weights
    first = residual.narrow(2 + axis % 3, 0, 1)
    assert (first == residual.amin()).all()


@pytest.mark.parametrize(
    "inferer",
    [
        SimpleInferer(),
        SlidingWindowInferer((6, 6, 6), overlap=0.5, sw_device="cpu", device="cpu", buffer_steps=1),
        SlidingWindowInferer((20, 6, 20), overlap=0.5),  # the image is smaller, so it is padded
        PatchInferer(SlidingWindowSplitter((6, 6, 6), overlap=0.5, pad_mode="constant")),
    ],
    ids=lambda inferer: type(inferer).__name__,
)
def test_any_inferer_of_monai_stitches_segmentation_and_residual(inferer):
    network, image = Contrast(2), torch.randn(1, 1, 9, 9, 9)
    with torch.no_grad():
        whole = network.with_residual(image)
    got = predict_with_residual(MetaTensor(image), network, inferer)
    torch.testing.assert_close(got[0], whole[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1][..., 1:], whole[1][..., 1:], rtol=1e-4, atol=1e-4)


def test_windows_have_to_overlap_along_the_slice_axis():
    image = torch.randn(1, 1, 8, 8, 8)
    for axis, roi in ((-1, (8, 8, 4)), (0, (4, 8, 8)), (1, (8, 1, 8))):
        with pytest.raises(ValueError, match="overlap by at least one slice along the slice axis"):
            predict_with_residual(image, Contrast(2, axis), SlidingWindowInferer(roi, overlap=0.0))
    predict_with_residual(image, Contrast(2, 0), SlidingWindowInferer((8, 4, 4), overlap=0.0))


def test_volume_of_one_slice_has_no_residual():
    _, residual = predict_with_residual(torch.randn(1, 1, 8, 8, 1), Contrast(2), SimpleInferer())
    assert not residual.any()


def test_flips_of_windows_undo_the_shift_of_the_residual():
    network, image = Contrast(2), torch.randn(1, 1, 6, 7, 9)
    inferer = SlidingWindowInferer((4, 4, 5), overlap=0.5)
    plain = predict_with_residual(image, network, inferer)
    flipped = predict_with_residual(image, network, inferer, flip_axes=[[2], [0, -1], [1]])
    torch.testing.assert_close(flipped[0].softmax(1), plain[0].softmax(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(flipped[1], plain[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("context", "activation"), itertools.product(["attention", "none"], ["softmax", "sigmoid"]))
def test_flips_average_probabilities_as_the_bundles_do(context, activation):
    scans = settings(activation=activation, patch_size=(8, 8, 8), flip_axes=((0,), (1, 2)))
    network = network_for(scans, context=context)
    image = 3 * torch.randn(1, 1, 8, 8, 8)
    with torch.no_grad():
        segmentation = _predict(TrainedNetwork(network, scans, {}), image, -1, progress=False)[0]
        views = [network(image), network(image.flip(2)).flip(2), network(image.flip(3, 4)).flip(3, 4)]
    probability = (lambda x: x.softmax(1)) if activation == "softmax" else torch.sigmoid
    expected = sum(map(probability, views)) / 3
    torch.testing.assert_close(probability(segmentation), expected, rtol=1e-4, atol=1e-5)
    mean = MeanProbability([network], softmax=activation == "softmax", flip_axes=scans.flip_axes)
    torch.testing.assert_close(mean(image), expected, rtol=1e-4, atol=1e-5)


def test_slice_axis_is_that_of_the_residual_decoder():
    network = ConResNet(1, 2, spatial_axis=1, **SMALL).eval()
    inferer = SlidingWindowInferer((8, 8, 8), overlap=(0, 0.25, 0))
    _, residual = predict_with_residual(torch.randn(1, 1, 8, 12, 16), network, inferer)
    assert (residual[:, :, :, 0] == residual.amin()).all()
    with pytest.raises(ValueError, match=r"slice axis \(spatial_axis=2\)"):
        predict_with_residual(torch.randn(1, 1, 8, 12, 16), network, inferer, spatial_axis=2)
    with pytest.raises(ValueError, match="predicts residual masks"):
        predict_with_residual(torch.randn(1, 1, 8, 8, 8), ConResNet(1, 2, context="none", **SMALL), inferer)


def test_residual_head_at_half_resolution_is_resized_in_place():
    """Its target is the label in every second slice. Resized linearly, a change lies between the two slices."""
    unet = UNet(3, in_channels=1, out_channels=2, channels=(8, 16, 32), strides=(2, 2))
    network = attach_conres(unet, in_channels=1, include_background=False).eval()
    image = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        (head,) = network.heads(image).residuals[:1]
        _, residual = network.with_residual(image)
    assert head.shape[2:] == (8, 8, 8)
    expected = nn.functional.interpolate(head, size=(16, 16, 16), mode="trilinear", align_corners=False)
    torch.testing.assert_close(residual, expected)

    def resized(label: torch.Tensor) -> torch.Tensor:
        """True residual logits, from the label at half the resolution, as the residual loss makes it."""
        size = [edge // 2 for edge in label.shape[2:]]
        target = residual_mask(nn.functional.interpolate(label, size=size, mode="nearest-exact"))
        return nn.functional.interpolate(8 * target - 4.0, size=label.shape[2:], mode="trilinear")

    label = torch.zeros(1, 1, 4, 4, 12)
    label[..., 6:] = 1  # slices 5 and 7 of the label differ
    assert resized(label)[0, 0, 0, 0].tolist() == [-4, -4, -4, -4, -4, -2, 2, 2, -2, -4, -4, -4]

    def case(seed: int) -> dict[str, torch.Tensor]:
        label = torch.zeros(1, 1, 16, 16, 20)
        for number in range(2, 18):
            label[..., (number - 2) // 2 : 8 + (number - 2) // 2, 4:12, number] = 1
        noise = torch.randn(label.shape, generator=torch.Generator().manual_seed(seed))
        return {"segmentation": 2 * label - 1 + 2 * noise, "residual": resized(label), "label": label}

    def dice(weight: float) -> float:
        """Of the slices that are not drawn."""
        training, new = ({**each, "residual": weight * each["residual"]} for each in (case(0), case(1)))
        settings = fit_chain([training], max_iterations=10)
        drawn = torch.zeros_like(new["label"], dtype=torch.uint8)
        drawn[..., 10] = new["label"][..., 10]
        mask = complete_mask(new["segmentation"], new["residual"], drawn, slices=[10], settings=settings)
        others = [number for number in range(20) if number != 10]
        found, label = mask[..., others].float(), new["label"][..., others]
        return float(2 * (found * label).sum() / (found.sum() + label.sum()))

    assert dice(1.0) > dice(0.0) + 0.05


# scan files

ROTATION = nib.eulerangles.euler2mat(0.2, -0.15, 0.3)


def stored_affine(codes: str, spacing: tuple[float, float, float], *, oblique: bool) -> np.ndarray:
    """The affine of a file whose axes run towards ``codes``, with voxels of ``spacing`` mm along R, A and S."""
    turn = nib.orientations.axcodes2ornt(codes)
    affine = np.zeros((4, 4))
    for axis, (world, sign) in enumerate(turn):
        affine[int(world), axis] = sign * spacing[int(world)]
    if oblique:
        affine[:3, :3] = ROTATION @ affine[:3, :3]
    affine[:, 3] = (11, -20, 33, 1)
    return affine


def store(volume: np.ndarray, codes: str) -> np.ndarray:
    """A volume with axes R, A, S as a file with axes ``codes`` stores it."""
    return nib.orientations.apply_orientation(
        volume,
        nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes)),
    )


def phantom(size=(13, 15, 9), values=(1,)) -> tuple[np.ndarray, np.ndarray]:
    """A noisy image, and its label map with axes R, A, S: boxes whose place changes from slice to slice."""
    label = np.zeros(size, np.uint8)
    for number, value in enumerate(values):
        for s in range(1, size[2] - 1):
            label[1 + s // 2 : 5 + s // 2, 4 * number : 4 * number + 3 + s // 4, s] = value
    return np.random.default_rng(0).normal(0, 0.1, size), label


def write(path: Path, volume: np.ndarray, affine: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(volume, affine), path)
    return path


def settings(**changes) -> ScanSettings:
    arguments = {"channels": ("T1",), "patch_size": (16, 16, 8), "classes": BRATS, "activation": "softmax"}
    return ScanSettings(**arguments | changes)


def network_for(scans: ScanSettings, axis: int = -1, *, context: str = "attention") -> ConResNet:
    torch.manual_seed(0)
    arguments = {"include_background": scans.activation == "sigmoid", "spatial_axis": axis, "context": context}
    return ConResNet(len(scans.channels), scans.out_channels, **arguments, **SMALL).eval()


def write_case(folder: Path, codes: str, *, oblique: bool, values=(1, 2, 4), spacing=(1.0, 1.5, 4.0), axis=-1):
    """A scan and a drawing of two of its slices. The last results are the whole label and the file's slice axis."""
    image, label = (store(volume, codes) for volume in phantom(values=values))
    affine = stored_affine(codes, spacing, oblique=oblique)
    (file_axis,) = (k for k in range(3) if codes[k] in ("RL", "AP", "SI")[axis])
    slices = [label.shape[file_axis] // 3, label.shape[file_axis] - 3]
    drawn = np.zeros_like(label)
    np.moveaxis(drawn, file_axis, 0)[slices] = np.moveaxis(label, file_axis, 0)[slices]
    files = [write(folder / f"{name}.nii.gz", x, affine) for name, x in (("scan", image + label), ("drawn", drawn))]
    return files, slices, label, file_axis


FILES = [("RAS", False), ("LPS", False), ("PIR", False), ("LPS", True), ("PIR", True), ("SLA", True)]


@pytest.mark.parametrize(("codes", "oblique"), FILES)
@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_residuals_of_a_label_complete_files_of_any_orientation(tmp_path, codes, oblique, axis):
    """The network knows the residual masks of the label and nothing else. One drawn slice gives the volume."""
    (image, drawn), slices, label, file_axis = write_case(tmp_path, codes, oblique=oblique, values=(1,), axis=axis)
    _, upright = phantom()
    residual = 80.0 * residual_mask(torch.from_numpy(upright)[None, None], spatial_axis=axis) - 40
    scans = settings(classes={"core": [1]}, patch_size=upright.shape)
    network = network_for(scans, axis)
    network.with_residual = lambda image: (torch.zeros(1, 2, *upright.shape), residual)
    for number in (slices, slices[:1], slices[1:]):
        completed = complete_scan(TrainedNetwork(network, scans, {}), image, drawn, slices=number, settings=PLAIN)
        assert (completed.slices, completed.spatial_axis) == (number, file_axis)
        np.testing.assert_array_equal(completed.label[0].numpy(), label)
        assert not set(completed.proposed) & set(number)


@pytest.mark.parametrize(("codes", "oblique"), FILES)
@pytest.mark.parametrize("spacing", [None, (0.7, 0.8, 4.0)])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_completed_scan_has_the_voxels_and_values_of_the_files(tmp_path, codes, oblique, spacing, activation):
    """The network reads the label from the image's values, in windows and on resampled voxels."""
    (image, drawn), slices, label, file_axis = write_case(tmp_path, codes, oblique=oblique)
    scans = settings(activation=activation, spacing=spacing, patch_size=(9, 8, 4))

    def with_residual(window):
        scores = {value: -9 * (window - value) ** 2 for value in (0, 4, 1, 2)}  # the nearest value wins

        def best(values):
            return torch.stack([scores[value] for value in values]).amax(0)

        logits = [best(values) - best(set(scores) - set(values)) for values in BRATS.values()]
        segmentation = torch.cat(list(scores.values()) if activation == "softmax" else logits, 1)
        return segmentation, torch.zeros_like(segmentation[:, :3])

    network = network_for(scans)
    network.with_residual = with_residual
    completed = complete_scan(TrainedNetwork(network, scans, {}), image, drawn, settings=PLAIN)
    assert completed.slices == slices
    found = completed.label[0].numpy()
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found.take(slices, file_axis), label.take(slices, file_axis))
    if spacing is None:
        np.testing.assert_array_equal(found, label)
    assert ((found > 0) == (label > 0)).mean() > 0.97
    np.testing.assert_array_equal(completed.label.affine, nib.load(image).affine)
    direction = {"S": "inferior to superior", "I": "superior to inferior"}[codes[file_axis]]
    assert (completed.spatial_axis, completed.direction) == (file_axis, direction)


@pytest.mark.parametrize("spacing", [(1.0, 1.5, 2.0), (1.0, 1.5, 4.05)])
def test_network_that_resamples_along_the_slice_axis_is_refused(tmp_path, spacing):
    (image, drawn), *_ = write_case(tmp_path, "LPS", oblique=False)
    scans = settings(spacing=spacing)
    with pytest.raises(ValueError, match=r"expected a scan with slices every .* mm .*got 4 mm"):
        complete_scan(TrainedNetwork(network_for(scans), scans, {}), image, drawn)
    scans = settings(spacing=(2.0, 1.5, 3.0))
    (image, drawn), *_ = write_case(tmp_path, "LPS", oblique=False, spacing=(2.0, 1.0, 3.0), axis=0)
    complete_scan(TrainedNetwork(network_for(scans, 0), scans, {}), image, drawn)


def test_values_of_one_structure_stay_in_drawn_slices(tmp_path):
    """Values 1 and 4 are one class here, so the network cannot tell them apart."""
    (image, drawn), slices, label, axis = write_case(tmp_path, "LPS", oblique=False)
    scans = settings(classes={"edema": (2,), "core": (4, 1)}, activation="sigmoid")
    completed = complete_scan(TrainedNetwork(network_for(scans), scans, {}), image, drawn)
    np.testing.assert_array_equal(completed.label[0].numpy().take(slices, axis), label.take(slices, axis))
    assert set(np.delete(completed.label[0].numpy(), slices, axis).flat) <= {0, 2, 4}


def test_flips_and_windows_of_the_settings_are_used(tmp_path):
    (image, drawn), *_ = write_case(tmp_path, "RAS", oblique=False)
    scans = settings(flip_axes=((0,), (2,)), overlap=0.0, patch_size=(16, 16, 3))
    network, seen = network_for(scans), []
    heads = network.with_residual
    network.with_residual = lambda window: (seen.append(window), heads(window))[1]
    completed = complete_scan(TrainedNetwork(network, scans, {}), image, drawn)
    assert len(seen) == 4 * 3  # windows of 3 slices overlap by one; an image and two mirror images
    torch.testing.assert_close(seen[0].flip(2), seen[1], rtol=0, atol=0)
    torch.testing.assert_close(seen[0].flip(4), seen[2], rtol=0, atol=0)
    assert completed.uses_residual


@pytest.mark.parametrize("axis", [0, 2])
@pytest.mark.parametrize("slices", [[4], [0, 5], [2, 6, 10]])
def test_proposed_slices_are_those_of_the_whole_chain(axis, slices):
    chain = {"segmentation": torch.randn(1, 3, 11, 7, 11), "residual": torch.randn(1, 2, 11, 7, 11) - 2}
    chain |= {"image": torch.randn(1, 1, 11, 7, 11), "drawn": torch.randint(0, 3, (1, 1, 11, 7, 11))}
    expected: list[int] = []
    finished = chain["drawn"]
    for _ in range(4):
        whole = {**chain, "drawn": finished, "slices": [*slices, *expected], "spatial_axis": axis}
        expected.append(next(iter(next_slice(**whole)[0])))
        finished = complete_mask(**whole)
    drawn = {number: chain["drawn"][0, 0].select(axis, number) for number in slices}
    parts = {name: volume[0] for name, volume in chain.items() if name != "drawn"}

    def slice_chain() -> SliceChain:
        return SliceChain(**parts, drawn=drawn, spatial_axis=axis)

    assert _propose(slice_chain(), 4) == expected
    assert len(_propose(slice_chain(), 99)) == 11 - len(slices)


def test_stored_settings_of_the_chain_are_used(tmp_path):
    scans = settings()
    (image, drawn), *_ = write_case(tmp_path, "LPS", oblique=False)
    save_network(tmp_path / "run", network_for(scans), scans)
    default = complete_scan(load_network(tmp_path / "run"), image, drawn)
    chain = ChainSettings(tau=3.0, residual_scale=0.0, image_contrast=0.0, offset=1.5)
    save_chain(tmp_path / "run", chain)
    trained = load_network(tmp_path / "run")
    stored = complete_scan(trained, image, drawn)
    assert not torch.equal(stored.label, default.label)
    assert torch.equal(stored.label, complete_scan(trained, image, drawn, settings=chain).label)
    assert torch.equal(default.label, complete_scan(trained, image, drawn, settings=ChainSettings()).label)


def test_command_says_whether_the_weights_are_fitted(tmp_path, capsys):
    network = run_folder(tmp_path / "run", settings())
    (image, drawn), *_ = write_case(tmp_path, "LPS", oblique=False)
    arguments = complete(network=network, image=image, drawn=drawn, out=tmp_path / "volume.nii.gz")
    main(arguments)
    assert "not fitted to this network" in capsys.readouterr().out
    save_chain(network, ChainSettings())
    main(arguments)
    assert "fitted" not in capsys.readouterr().out


# the command


def run_folder(folder: Path, scans: ScanSettings, **arguments) -> Path:
    save_network(folder, network_for(scans, **arguments), scans)
    return folder


def complete(*arguments, **files) -> list[str]:
    options = [[f"--{name}", *map(str, value if isinstance(value, list) else [value])] for name, value in files.items()]
    return ["complete", *itertools.chain(*options), *map(str, arguments)]


@pytest.mark.parametrize("codes", ["LPS", "PIR"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_command_completes_a_scan_of_several_channels(tmp_path, capsys, codes, activation):
    scans = settings(channels=("T1", "T2"), activation=activation, spacing=(0.9, 1.4, 4.0))
    network = run_folder(tmp_path / "run", scans)
    (image, drawn), slices, label, axis = write_case(tmp_path, codes, oblique=True)
    files = {"network": network, "image": [image, image], "drawn": drawn, "out": tmp_path / "new" / "volume.nii.gz"}
    main(complete("--next", 2, "--preview", tmp_path / "preview.png", **files))
    out = capsys.readouterr().out
    direction = {"S": "inferior to superior", "I": "superior to inferior"}[codes[axis]]
    ordinal = ["first", "second", "third"][axis]
    assert f"Slices count from 0 to 8 along the {ordinal} axis of the file, from {direction}." in out
    assert f"Drawn slices: {slices[0]} {slices[1]}\n" in out
    proposed = [int(number) for number in out.splitlines()[-1].rpartition(": ")[2].split()]
    assert len(set(proposed) - set(slices)) == 2
    written, scan = nib.load(files["out"]), nib.load(image)
    np.testing.assert_array_equal(written.affine, scan.affine)
    assert (written.shape, written.header.get_xyzt_units()) == (scan.shape, scan.header.get_xyzt_units())
    found = np.asarray(written.dataobj)
    np.testing.assert_array_equal(found.take(slices, axis), label.take(slices, axis))
    assert set(found.flat) <= {0, 1, 2, 4}
    assert (tmp_path / "preview.png").read_bytes().startswith(b"\x89PNG")
    expected = complete_scan(load_network(network), [image, image], drawn).label
    np.testing.assert_array_equal(found, expected[0])


def test_command_takes_an_empty_drawn_slice_and_finished_volumes(tmp_path, capsys):
    network = run_folder(tmp_path / "run", settings())
    (image, drawn), slices, label, _ = write_case(tmp_path, "RAS", oblique=False)
    files = {"network": network, "image": image, "drawn": drawn, "out": tmp_path / "volume.nii"}
    main(complete("--slices", 0, slices[0], **files))
    printed = capsys.readouterr().out
    assert f"Drawn slices: 0 {slices[0]}\n" in printed
    assert f"leave them out: {slices[1]}\n" in printed
    found = np.asarray(nib.load(files["out"]).dataobj)
    assert not found[..., 0].any()
    np.testing.assert_array_equal(found[..., slices[0]], label[..., slices[0]])
    assert not np.array_equal(found[..., slices[1]], label[..., slices[1]])
    main(complete("--slices", *range(9), **files))
    assert capsys.readouterr().out.splitlines()[-1] == "All slices are drawn."
    np.testing.assert_array_equal(np.asarray(nib.load(files["out"]).dataobj), np.asarray(nib.load(drawn).dataobj))


def test_command_works_without_a_residual_decoder(tmp_path, capsys):
    network = run_folder(tmp_path / "run", settings(), axis=1, context="none")
    (image, drawn), slices, label, axis = write_case(tmp_path, "PIR", oblique=False, axis=1)
    main(complete(network=network, image=image, drawn=drawn, out=tmp_path / "volume.nii.gz"))
    out = capsys.readouterr().out
    assert "no residual decoder. Only the contrast of the image" in out
    assert "along the first axis of the file, from anterior to posterior" in out
    found = np.asarray(nib.load(tmp_path / "volume.nii.gz").dataobj)
    np.testing.assert_array_equal(found.take(slices, axis), label.take(slices, axis))


def test_command_takes_a_backbone(tmp_path, capsys):
    scans = settings(classes={"a": (1,), "b": (2,)})
    arguments = {"init_filters": 8, "in_channels": 1, "out_channels": 3, "blocks_down": [1, 1], "blocks_up": [1]}
    network = attach_conres(SegResNet(**arguments), in_channels=1, include_background=False, width=8)
    save_network(tmp_path / "run", network, scans)
    source = f"from monai.networks.nets import SegResNet\ndef build():\n    return SegResNet(**{arguments})\n"
    (tmp_path / "nets.py").write_text(source)
    (image, drawn), *_ = write_case(tmp_path, "RAS", oblique=False, values=(1, 2))
    files = {"network": tmp_path / "run", "image": image, "drawn": drawn, "out": tmp_path / "volume.nii.gz"}
    main(complete("--backbone", f"{tmp_path / 'nets.py'}:build", **files))
    assert "Completed volume" in capsys.readouterr().out
    assert fails(complete(**files), capsys).startswith("expected the backbone")


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SLA"])
def test_preview_shows_and_marks_the_drawn_slices(tmp_path, codes):
    """The numbers are those of the file, although the slices are turned to RAS."""
    scans = settings(activation="sigmoid")
    (image, drawn), slices, _, axis = write_case(tmp_path, codes, oblique=True)
    completed = complete_scan(TrainedNetwork(network_for(scans), scans, {}), image, drawn)
    figure = plot_preview(completed, BRATS)
    rows = [figure.axes[row : row + 4] for row in range(0, len(figure.axes), 4)]
    assert [axes.get_title() for axes in rows[0]] == ["image", "drawn", "network only", "completed"]
    numbers = [int(row[0].get_ylabel().split()[1].rstrip(",")) for row in rows]
    assert set(numbers) >= {*slices, completed.proposed[0]}
    for number, row in zip(numbers, rows, strict=True):
        assert row[0].get_ylabel().endswith("drawn") == (number in slices)
        for axes, volume in zip(row[1:], (completed.drawn, completed.predicted, completed.label), strict=True):
            colored = np.ptp(np.asarray(axes.images[0].get_array()), axis=-1) > 0.01
            assert colored.sum() == np.count_nonzero(volume[0].numpy().take(number, axis))
    texts = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    assert texts == {"label 1", "label 2", "ET"}


def fails(arguments, capsys) -> str:
    """The message of a command that stops with an error of the user."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err.rpartition("error: ")[2]


def shifted(affine: np.ndarray) -> np.ndarray:
    return affine + np.array([[0, 0, 0, 0], [0, 0, 0, 0.3], [0, 0, 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image, drawn, affine: (image, 0 * drawn, affine), "a drawn slice in .*drawn.nii.gz, got none"),
        (lambda image, drawn, affine: (image, drawn[:-1], affine), "same size in .*scan.nii.gz and .*drawn.nii.gz"),
        (
            lambda image, drawn, affine: (image, drawn, shifted(affine)),
            "same affine in .* up to 0.189 voxels apart",
        ),
        (lambda image, drawn, affine: (image, 3 * drawn, affine), r"values \[0, 1, 2, 4\] in the drawn .*got 3, 6, 12"),
        (lambda image, drawn, affine: (image, 0.5 * drawn, affine), "got 0.5"),
        (lambda image, drawn, affine: (image, drawn - 1.0, affine), r"got \[-1"),
        (lambda image, drawn, affine: (image, np.nan + drawn, affine), "finite numbers in .*drawn.nii.gz"),
        (lambda image, drawn, affine: (image, np.stack([drawn] * 2, -1), affine), "one channel in .*got 2"),
        (lambda image, drawn, affine: (np.nan + image, drawn, affine), "finite numbers in .*scan.nii.gz"),
        (lambda image, drawn, affine: (1e8 * image, drawn, affine), "scan.nii.gz: .*numbers below 100000"),
        (lambda image, drawn, affine: (np.stack([image] * 2, -1), drawn, affine), "expected 1 channels, T1, got 2"),
    ],
)
def test_command_refuses_files_and_writes_nothing(tmp_path, capsys, change, message):
    network = run_folder(tmp_path / "run", settings())
    files, *_ = write_case(tmp_path, "LPS", oblique=True)
    affine = nib.load(files[0]).affine
    image, drawn, drawn_affine = change(*(nib.load(file).get_fdata() for file in files), affine)
    image, drawn = write(files[0], image, affine), write(files[1], drawn.astype(np.float32), drawn_affine)
    before = sorted(tmp_path.iterdir())
    arguments = complete(network=network, image=image, drawn=drawn, out=tmp_path / "volume.nii.gz")
    assert re.search(message, fails(arguments, capsys))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("drawn_at", [[3], [2, 5]])
def test_slices_drawn_along_another_axis_are_refused(tmp_path, drawn_at):
    """Else each slice along the network's axis would count as drawn: a line, and background."""
    trained = load_network(run_folder(tmp_path / "run", settings()))
    (image, _), _, label, _ = write_case(tmp_path, "RAS", oblique=False)
    other = np.zeros_like(label)
    other[drawn_at] = np.where(np.arange(label.shape[-1]) < 6, 1, 0)
    file = write(tmp_path / "other.nii.gz", other, nib.load(image).affine)
    with pytest.raises(ValueError, match=f"third axis of .*{drawn_at[-1]} along the first axis; draw along the third"):
        complete_scan(trained, image, file)
    named = complete_scan(trained, image, file, slices=[1, 2])
    np.testing.assert_array_equal(named.label[0, ..., 1:3], other[..., 1:3])


def test_thin_structures_in_many_drawn_slices_are_taken(tmp_path):
    trained = load_network(run_folder(tmp_path / "run", settings()))
    (image, _), _, label, _ = write_case(tmp_path, "RAS", oblique=False)
    wide, needle, landmarks, small = (np.zeros_like(label) for _ in range(4))
    wide[3:5, 4:6, :7] = needle[3, 4, :7] = small[3, 4:6, :7] = 1
    for number in (1, 4, 5, 6, 7):
        landmarks[number, number, number] = 1
    for drawn in (wide, needle, landmarks, small):
        file = write(tmp_path / "thin.nii.gz", drawn, nib.load(image).affine)
        assert complete_scan(trained, image, file).slices == np.flatnonzero(drawn.any((0, 1))).tolist()


def test_ignored_value_that_occurs_nowhere_is_refused(tmp_path):
    trained = load_network(run_folder(tmp_path / "run", settings()))
    (image, drawn), *_ = write_case(tmp_path, "LPS", oblique=False)
    with pytest.raises(ValueError, match=r"slices of 255 in .*, got none; leave out --ignore"):
        complete_scan(trained, image, drawn, ignore_index=255)


def test_command_refuses_arguments_and_writes_nothing(tmp_path, capsys):
    network = run_folder(tmp_path / "run", settings())
    (image, drawn), *_ = write_case(tmp_path, "LPS", oblique=False)
    other = write(tmp_path / "other.nii.gz", np.zeros((4, 4, 4)), np.eye(4))
    (tmp_path / "folder.nii").mkdir()
    before = sorted(tmp_path.iterdir())
    files = {"network": network, "image": image, "drawn": drawn, "out": tmp_path / "volume.nii.gz"}
    for changes, message in [
        ({"slices": [9]}, "slices from 0 to 8, got [9]; they count from 0 along the third axis"),
        ({"slices": ["-1"]}, "slices from 0 to 8, got [-1]"),
        ({"out": tmp_path / "volume.mha"}, "ends with .nii or .nii.gz"),
        ({"out": drawn}, "expected another file for the result"),
        ({"preview": tmp_path / "preview.jpg"}, "ends with .png"),
        ({"out": tmp_path / "folder.nii"}, "expected the name of a file, got the folder"),
        ({"device": "gpu9"}, "expected a device of torch"),
        ({"network": tmp_path / "no"}, "network.json"),
        ({"image": tmp_path / "no.nii.gz"}, "no.nii.gz, found none"),
        ({"image": [image, other]}, "other.nii.gz, got (13, 15, 9) and (4, 4, 4)"),
        ({"image": [image, image]}, "expected 1 channels, T1, got 2"),
        ({"drawn": tmp_path / "no.nii.gz"}, "no.nii.gz, found none"),
        ({"backbone": "no.py:build"}, "expected module:name or file.py:name"),
    ]:
        assert message in fails(complete(**files | changes), capsys)
        assert sorted(tmp_path.iterdir()) == before


def test_scan_of_one_slice_comes_back_as_drawn(tmp_path):
    scans = settings(patch_size=(16, 16, 1), classes={"core": [1]})
    network = ConResNet(1, 2, include_background=False, channels=(8, 8), strides=((2, 2, 1),), blocks=(1, 1, 1)).eval()
    label = phantom()[1][:, :, 3:4]
    image, drawn = (write(tmp_path / f"{n}.nii.gz", x, np.eye(4)) for n, x in (("scan", 1.0 * label), ("drawn", label)))
    completed = complete_scan(TrainedNetwork(network, scans, {}), image, drawn)
    np.testing.assert_array_equal(completed.label[0].numpy(), label)
    assert completed.proposed == []
