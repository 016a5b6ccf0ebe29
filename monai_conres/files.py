"""Files: a trained network with its settings, scans and label maps, and files that are complete or absent."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from monai.data import MetaTensor
from monai.utils import convert_to_tensor, ensure_tuple, optional_import

from monai_conres.attach import ConResWrapper
from monai_conres.chain import ChainSettings
from monai_conres.conresnet import ConResNet
from monai_conres.decoder import ConResDecoder
from monai_conres.residual import check_values
from monai_conres.scans import ScanSettings
from monai_conres.volumes import (
    Grid,
    brief,
    check_same_grid,
    find_files,
    load_label,
    load_volume,
    read_grid,
    sheared,
    stem,
    stored_grid,
    stored_header,
    voxel_sizes,
)

fcntl, _ = optional_import("fcntl")
fire, _ = optional_import("fire", descriptor="{}; install it with: pip install 'monai-conres[bundles]'")
nib, _ = optional_import("nibabel", descriptor="{}; install it with: pip install 'monai-conres[io]'")

__all__ = [
    "ScanSettings",
    "TrainedNetwork",
    "atomic_path",
    "check_same_grid",
    "check_writable",
    "describe_network",
    "find_files",
    "load_label",
    "load_network",
    "load_volume",
    "path_text",
    "plain_values",
    "read_grid",
    "read_network",
    "remove_left_overs",
    "save_chain",
    "save_network",
    "stem",
    "voxel_sizes",
    "write_csv",
    "write_label_map",
]

FORMAT = 1  # of network.json
KEYS = {"format", "network", "scans", "training"}
WRITER = "monai_conres"  # description in the header of a label map of this package
MARK = "monai_conres-"  # in the names of temporary folders
CONRESNET, WRAPPER = "monai_conres.ConResNet", "monai_conres.ConResWrapper"
Backbone = tuple[str, Mapping[str, Any]]  # import path of a class, and its arguments


@dataclass(frozen=True)
class TrainedNetwork:
    """What :func:`load_network` returns.

    Attributes:
        network: the network in ``eval()`` mode on the CPU.
        scans: how a scan becomes the network's input, and the output a label map.
        training: what the saver noted about the training, such as the names of the training cases.
        chain: weights of the slice chain for this network; ``None`` before they are fitted.
    """

    network: nn.Module
    scans: ScanSettings
    training: dict[str, Any]
    chain: ChainSettings | None = None


def save_network(
    folder: str | os.PathLike,
    network: nn.Module,
    scans: ScanSettings,
    *,
    backbone: Backbone | None = None,
    training: Mapping[str, Any] | None = None,
    chain: ChainSettings | None = None,
) -> None:
    """Write a network's weights to ``model.pt`` and everything else to ``network.json``.

    Call the function also before the training: then wrong settings do not cost a training. A killed process leaves no
    ``network.json``, or one that belongs to ``model.pt``. Saving the network that the folder already holds writes
    nothing, so its chain stays.

    Args:
        folder: the run folder. The two new files replace older files.
        network: a :class:`~monai_conres.ConResNet`, or what :func:`~monai_conres.attach_conres` returns. Any other
            network needs ``backbone``.
        scans: how a scan becomes the network's input, and the output a label map.
        backbone: class and arguments of the network that the decoder was attached to, such as
            ``("monai.networks.nets.SegResNet", {"init_filters": 8})``. With ``None``, :func:`load_network` needs its
            argument ``backbone``.
        training: plain values about the training. ``"cases"`` are the names of the training cases.
        chain: weights of the slice chain. :func:`save_chain` adds them later.

    Raises:
        ValueError: when a value is not plain (see :func:`plain_values`), or network and scans do not fit each other.

    Example:
        >>> from monai_conres import ConResNet
        >>> scans = ScanSettings(channels=["T1"], patch_size=[16, 16, 8], classes={"core": [1]}, activation="sigmoid")
        >>> folder = tempfile.mkdtemp()
        >>> save_network(folder, ConResNet(1, 1, channels=(8, 8), strides=(2,), blocks=(1, 1, 1)), scans)
        >>> load_network(folder).scans == scans
        True
    """
    if isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        network = network.module
    content = describe_network(network, scans, backbone=backbone, training=training, chain=chain)
    description = Path(folder, "network.json")
    if chain is None and _is_saved(folder, network, content):
        return
    with atomic_path(Path(folder, "model.pt")) as temporary:
        torch.save(network.state_dict(), temporary)
        description.unlink(missing_ok=True)  # of the weights that are replaced now
    _write_json(description, content)


def _is_saved(folder: str | os.PathLike, network: nn.Module, content: Mapping[str, Any]) -> bool:
    """Whether a folder holds these weights and this description, with or without a chain."""
    with suppress(Exception):  # a file that is missing or broken is written again
        stored = {**json.loads(Path(folder, "network.json").read_text()), "chain": None}
        if json.dumps(stored) != json.dumps({**content, "chain": None}):  # as text: the order of classes counts
            return False
        state, own = torch.load(Path(folder, "model.pt"), map_location="cpu", weights_only=True), network.state_dict()
        return state.keys() == own.keys() and all(torch.equal(state[name], own[name].cpu()) for name in own)
    return False


def save_chain(folder: str | os.PathLike, chain: ChainSettings) -> None:
    """Add the weights of the slice chain to ``network.json``, or replace older weights.

    Args:
        folder: a folder that :func:`save_network` has written.
        chain: what :func:`~monai_conres.chain_training.fit_chain` returns for the network of the folder.

    Raises:
        ValueError: as :func:`read_network`, or when the network has another number of classes.
    """
    _check_chain(chain, read_network(folder)["scans"])
    description = Path(folder, "network.json")
    content = json.loads(description.read_text())
    _write_json(description, {**content, "chain": plain_values(dataclasses.asdict(chain))})


def _check_chain(chain: ChainSettings | None, scans: ScanSettings) -> None:
    """Raise unless the chain has the classes of the scans."""
    foreground = scans.out_channels - (scans.activation == "softmax")
    if chain is not None and isinstance(chain.offset, tuple) and len(chain.offset) != foreground:
        raise ValueError(
            f"expected one offset for all classes, or one for each of {foreground}, got {len(chain.offset)}; fit the "
            "chain with this network."
        )


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=1) + "\n"
    with atomic_path(file) as temporary:
        temporary.write_text(text)


def load_network(
    folder: str | os.PathLike,
    *,
    backbone: nn.Module | Callable[[], nn.Module] | None = None,
    weights: str | os.PathLike = "model.pt",
) -> TrainedNetwork:
    """Build the network of a run folder and load its weights.

    Loading imports the classes that ``network.json`` names, and importing a module runs its code. Load only folders
    of people whose code you would run. The weights are read as tensors only.

    Args:
        folder: a folder that :func:`save_network` has written.
        backbone: the backbone of an attached network, or a function that makes it; needed if ``network.json`` does not
            have the backbone.
        weights: name of the file of weights in the folder.

    Raises:
        ValueError: when a file is missing or cannot be read, a class cannot be imported or built, or the weights
            belong to another network.
    """
    content = read_network(folder)
    network = _build(content["network"], backbone)
    file = Path(folder, weights)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        if not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise TypeError(f"it holds {', '.join(map(str, list(state)[:5]))}: a checkpoint of a training, not weights")
        if all(name.startswith("module.") for name in state):
            raise TypeError("its names start with module.: save network.module of a DistributedDataParallel")
        network.load_state_dict(state)
    except Exception as error:
        raise ValueError(
            f"expected the weights of the network of {folder}/network.json in {file}, cannot load them "
            f"({brief(error)}); give the model.pt that the training writes at its end next to this network.json."
        ) from error
    return TrainedNetwork(network.cpu().eval(), content["scans"], content["training"], content.get("chain"))


def read_network(folder: str | os.PathLike) -> dict[str, Any]:
    """Read ``network.json`` only, as :func:`describe_network` returns it.

    ``"scans"`` are :class:`ScanSettings`. ``"chain"``, if it is there, is :class:`~monai_conres.chain.ChainSettings`.

    Raises:
        ValueError: when the file is missing, cannot be read, is of a newer version or has other keys or values.
    """
    file = Path(folder, "network.json")
    if not file.is_file():
        raise ValueError(
            f"expected a folder of a trained network, found no {file}; give the folder that a training wrote to, or "
            "write the file with save_network."
        )
    try:
        content = plain_values(json.loads(file.read_text()), "the file")
        if content["format"] != FORMAT:
            raise ValueError(f"expected format {FORMAT}, got {content['format']}; update monai_conres for a newer one")
        if set(content) - {"chain"} != KEYS:
            raise ValueError(f"expected the keys {sorted(KEYS)}, and chain if it was fitted, got {sorted(content)}")
        content["scans"] = ScanSettings(**content["scans"])
        if "chain" in content:
            content["chain"] = ChainSettings(**content["chain"])
            _check_chain(content["chain"], content["scans"])
        _check_fit(content["network"], content["scans"])
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"expected a network that save_network wrote, cannot read {file}: {brief(error)}") from error
    return content


def describe_network(
    network: nn.Module,
    scans: ScanSettings,
    *,
    backbone: Backbone | None,
    training: Mapping[str, Any] | None,
    chain: ChainSettings | None = None,
) -> dict[str, Any]:
    """The content of ``network.json``. Arguments and errors are those of :func:`save_network`."""
    given = None if backbone is None else {"class": backbone[0], "arguments": backbone[1]}
    entry: dict[str, Any]
    if isinstance(network, ConResWrapper):
        entry = {"class": WRAPPER, "stages": network.stages, "decoder": network.decoder.arguments, "backbone": given}
    elif type(network) is ConResNet:
        entry = {"class": CONRESNET, "arguments": network.arguments}
    elif given is not None and not type(network).__module__.startswith("torch."):
        entry = given
    else:
        raise ValueError(
            f"expected a ConResNet or what attach_conres returns, got a {type(network).__name__}; give the network "
            "that you compiled or wrapped, or the class and arguments of another one as backbone=(class, {...})."
        )
    settings = dataclasses.asdict(scans)
    content = plain_values({"format": FORMAT, "network": entry, "scans": settings, "training": training or {}})
    _check_chain(chain, scans)
    if chain is not None:
        content["chain"] = plain_values(dataclasses.asdict(chain))
    _check_fit(content["network"], scans)
    return content


def _build(entry: Mapping[str, Any], backbone: nn.Module | Callable[[], nn.Module] | None) -> nn.Module:
    """A network with new weights."""
    if entry["class"] != WRAPPER:
        return _construct(entry)
    if backbone is None:
        if entry["backbone"] is None:
            raise ValueError(
                "expected the backbone of the attached decoder, network.json does not have it; give backbone=, the "
                "network or a function that makes it."
            )
        backbone = _construct(entry["backbone"])
    elif not isinstance(backbone, nn.Module):
        backbone = backbone()
    try:
        return ConResWrapper(backbone, ConResDecoder(**entry["decoder"]), entry["stages"])
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"expected a backbone with the modules {entry.get('stages')}, got a {type(backbone).__name__} without one "
            f"({error}); give the backbone that the decoder was attached to."
        ) from error


def _construct(entry: Mapping[str, Any]) -> nn.Module:
    """Import and build a network."""
    try:
        module, _, name = entry["class"].rpartition(".")
        found = getattr(importlib.import_module(module), name)
        if not (isinstance(found, type) and issubclass(found, nn.Module)):
            raise TypeError("it is no torch.nn.Module")
        return found(**entry["arguments"])
    except Exception as error:
        raise ValueError(
            f"expected a network's class and its arguments, cannot build {dict(entry)} ({brief(error)}); install what "
            "it needs, or correct network.json."
        ) from error


def plain_values(value: Any, name: str = "settings") -> Any:
    """Numbers, text, lists, dicts, booleans and None, as a JSON file gives them back: tuples become lists.

    Raises:
        ValueError: for anything else, NaN and infinite numbers, keys that are no text, and text that starts with
            ``$``, which MONAI's configurations would run. The error names the place.

    Example:
        >>> plain_values({"strides": (2, (2, 2, 1)), "norm": None})
        {'strides': [2, [2, 2, 1]], 'norm': None}
    """
    if isinstance(value, Mapping) and all(isinstance(key, str) and not key.startswith("$") for key in value):
        return {key: plain_values(part, f"{name}.{key}") for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_values(part, name) for part in value]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str) and not value.startswith("$"):
        return str.__str__(value)  # of an enumeration
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real) and math.isfinite(value):
        return float(value)
    raise ValueError(
        f"expected plain values (finite numbers, text that does not start with $, lists, dicts, None) in {name}, got "
        f"{value!r}; convert it, for example with int(...) or str(...)."
    )


def _check_fit(entry: Mapping[str, Any], scans: ScanSettings) -> None:
    """Raise ``ValueError`` unless a network of this package has the channels of the scans."""
    if entry["class"] == WRAPPER:
        arguments, foreground = entry["decoder"], entry["decoder"]["out_channels"]
    elif entry["class"] == CONRESNET:
        arguments = entry["arguments"]
        foreground = arguments["out_channels"] - (not arguments.get("include_background", True))
    else:
        return
    expected = (len(scans.channels), scans.out_channels - (scans.activation == "softmax"))
    if (got := (arguments["in_channels"], foreground)) != expected:
        raise ValueError(
            f"expected {expected[0]} image channels and {expected[1]} residual masks in the network, for the channels "
            f"{list(scans.channels)} and the classes {list(scans.classes)} of the scans with a {scans.activation}, got "
            f"{got[0]} and {got[1]}; softmax needs include_background=False."
        )


def write_label_map(path: str | os.PathLike, label: torch.Tensor, like: MetaTensor, *, writer: str = WRITER) -> None:
    """Write a label map ``(1, *spatial)`` as 8-bit NIfTI in the geometry of a loaded image.

    On the voxels of a NIfTI scan the file gets the scan's own qform, sform, codes, unit and pixdim. So every viewer
    shows the label map on the scan. Nothing else of the scan's header is copied.

    Args:
        path: name of the file, ``.nii`` or ``.nii.gz``.
        label: whole numbers from 0 to 255, on the voxel grid of ``like``.
        like: the image as loaded, or a prediction on the image's voxels. Its affine is in mm.
        writer: description in the header, for :func:`is_written_by`.

    Raises:
        TypeError: when ``like`` has no affine.
        ValueError: when the label has another shape or other values.

    Example:
        >>> image = MetaTensor(torch.zeros(1, 4, 5, 6), affine=torch.diag(torch.tensor([2.0, 2.0, 3.0, 1.0])))
        >>> file = Path(tempfile.mkdtemp(), "mask.nii.gz")
        >>> write_label_map(file, torch.ones(1, 4, 5, 6), image)
        >>> load_volume(file).shape, load_volume(file).pixdim.tolist()
        (torch.Size([1, 4, 5, 6]), [2.0, 2.0, 3.0])
    """
    if not isinstance(like, MetaTensor):
        raise TypeError(
            f"expected a MetaTensor with the scan's affine, got a {type(like).__name__}; load the scan with "
            "load_volume, or bring a prediction back with ScanSettings.to_scan or Invertd."
        )
    values = convert_to_tensor(label, track_meta=False).cpu()
    if values.shape != (1, *like.shape[1:]):
        raise ValueError(f"expected a label map of shape {(1, *like.shape[1:])}, got {tuple(values.shape)}.")
    check_values(values, 256, "whole numbers from 0 to 255")
    header = _geometry(like)
    header["descrip"] = writer.encode()
    written = nib.Nifti1Image(values[0].detach().to(torch.uint8).numpy(), None, header)
    with atomic_path(path) as temporary:
        nib.save(written, temporary)


def is_written_by(path: str | os.PathLike, writer: str = WRITER) -> bool:
    """Whether :func:`write_label_map` wrote a NIfTI file for a writer."""
    try:
        return nib.load(path).header["descrip"].item().rstrip(b"\0") == writer.encode()
    except Exception:
        return False


def _geometry(like: MetaTensor) -> Any:
    """The NIfTI header of a label map with the geometry of an image."""
    header, affine = nib.Nifti1Header(), like.affine.cpu().numpy()
    header.set_data_dtype(np.uint8)
    stored = stored_header(like)
    if stored is not None and stored_grid(stored).agrees(Grid(Path(), tuple(like.shape[1:]), affine)):
        names = [name for name in header.keys() if name.startswith(("quatern", "qoffset", "srow"))]  # noqa: SIM118
        for name in ("qform_code", "sform_code", "xyzt_units", *names):
            header[name] = stored[name]
        header["pixdim"][:4] = stored["pixdim"][:4]
        return header
    # the code names the space of the affine: the scanner's or a template's
    code = 1 if stored is None else int(stored["sform_code"]) or int(stored["qform_code"]) or 1
    header.set_sform(affine, code=code)
    if not sheared(affine):  # a qform has no shear
        header.set_qform(affine, code=code)
    header["pixdim"][1:4] = np.linalg.norm(affine[:3, :3], axis=0)
    header.set_xyzt_units("mm")
    return header


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path for a file or folder, which is renamed to ``path`` when the block ends without an error.

    The new file replaces a file at ``path``. The function makes missing parent folders, and removes what killed writers
    left in this folder.

    Raises:
        OSError: when ``path`` is a folder with files in it.

    Example:
        >>> folder = tempfile.mkdtemp()
        >>> with atomic_path(f"{folder}/table.md") as temporary:
        ...     _ = temporary.write_text("complete")
        >>> os.listdir(folder)
        ['table.md']
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_left_overs(path.parent)
    work = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.{MARK}"))
    lock = _lock(work)
    try:
        temporary = work / path.name  # the ending tells many writers the format
        yield temporary
        if temporary.is_file():
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())  # a new name without the content would survive a power loss
        os.replace(temporary, path)
    finally:
        shutil.rmtree(work)  # before the lock ends: others remove what nobody locks
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """A descriptor that locks a folder until it is closed or its process ends; None where folders cannot be locked.

    Raises ``BlockingIOError`` when another writer holds the lock.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise
    except BlockingIOError:
        raise
    except OSError:  # a file system or Windows without such locks
        return None
    return descriptor


def remove_left_overs(folder: str | os.PathLike) -> None:
    """Remove what killed writers left in a folder. The lock of a running writer is held, that of a killed one is free.

    Where folders cannot be locked, a writer that began a day ago counts as killed.
    """
    for left_over in filter(Path.is_dir, Path(folder).glob(f".*.{MARK}*")):
        with suppress(OSError):
            age = time.time() - left_over.stat().st_mtime
            if age < 5:  # its writer is about to lock it
                continue
            lock = _lock(left_over)
            if lock is not None or age > 86400:
                shutil.rmtree(left_over)
            if lock is not None:
                os.close(lock)


def write_csv(path: str | os.PathLike, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table. A row holds values by column; a value that a row does not have stays empty.

    Example:
        >>> file = Path(tempfile.mkdtemp(), "cases.csv")
        >>> write_csv(file, [{"case": "a", "Dice": 0.5}, {"case": "b", "Dice": 0.75, "HD95": 2.0}])
        >>> file.read_text().split()
        ['case,Dice,HD95', 'a,0.5,', 'b,0.75,2.0']
    """
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def path_text(path: Any) -> str:
    """A path as it was typed. MONAI's command line makes a number of ``--output_dir 2024``, and a list of ``1,2``.

    Raises:
        ValueError: when the path is no text, and no argument of the command line says how it was typed.

    Example:
        >>> path_text(Path("runs", "first")), path_text(2024)
        ('runs/first', '2024')
    """
    if isinstance(path, (str, os.PathLike)):
        return os.fspath(path)
    for argument in sys.argv[1:]:
        text = argument.partition("=")[2] if argument.startswith("--") else argument
        if text and repr(fire.parser.DefaultParseValue(text)) == repr(path):
            return text
    if type(path) is int:
        return str(path)
    raise ValueError(f"expected a path as text, got {path!r}; put it in quotes, or write ./ in front of it.")


def check_writable(folder: str | os.PathLike, cases: Iterable[Mapping[str, Any]] = ()) -> None:
    """Try to write to a folder, or where it would be made, before hours of work end in an error.

    Nothing is left there.

    Args:
        folder: folder for results.
        cases: files of each case, ``image`` and ``label``. Results must not lie among them: a later training would read
            a prediction as a scan, or a prediction would replace a label.

    Raises:
        ValueError: when the folder cannot be written to, or has a file of a case in it.
    """
    folder = Path(path_text(folder)).absolute()
    place = folder.resolve()
    for case in cases:
        for file in (Path(file) for key in ("image", "label") for file in ensure_tuple(case.get(key, ()))):
            if place in (file.resolve(), file.parent.resolve()):
                raise ValueError(
                    f"expected a folder for the results only, got {folder}, which has {file.name} of the data; give "
                    "another folder."
                )
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ValueError(f"expected a folder to write to, cannot write to {folder} ({error}).") from error
