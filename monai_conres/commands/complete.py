"""Complete the label map of a scan from a few drawn slices, with your own network.

python -m monai_conres complete --network run --image scan.nii.gz --drawn slices.nii.gz --out volume.nii.gz
python -m monai_conres complete --network run --image T1.nii.gz T2.nii.gz --drawn slices.nii.gz --out volume.nii.gz \\
    --slices 12 40 --preview preview.png

The drawn file has the voxels of the scan and the label values of the training. Slices that are not drawn are empty.
Slices count from 0. The command prints along which axis of the file slices count, and which slices to draw next.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monai_conres.commands import add_network, load_on_device, say_unfitted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from monai_conres.completion import CompletedScan
    from monai_conres.scans import Structures
    from monai_conres.volumes import Files

ROWS = 6  # of the preview


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_network(parser)
    parser.add_argument("--image", required=True, nargs="+", type=Path, help="the scan, or one file for each channel")
    parser.add_argument("--drawn", required=True, type=Path, help="label map with the drawn slices")
    parser.add_argument("--out", required=True, type=Path, help="file for the completed label map, .nii or .nii.gz")
    parser.add_argument("--slices", type=int, nargs="+", help="all drawn slices (default: those with any label)")
    parser.add_argument("--ignore", type=int, metavar="VALUE", help="value of slices that are not drawn (default: 0)")
    parser.add_argument("--next", type=int, default=3, metavar="N", help="how many slices to propose (default: 3)")
    parser.add_argument("--preview", type=Path, help="file for a picture of the result, .png")


def run(options: argparse.Namespace) -> None:
    complete_files(
        options.network,
        options.image,
        options.drawn,
        options.out,
        slices=options.slices,
        propose=options.next,
        ignore=options.ignore,
        backbone=options.backbone,
        preview=options.preview,
        device=options.device,
    )


def complete_files(
    network: str | os.PathLike,
    image: Files,
    drawn: str | os.PathLike,
    out: str | os.PathLike,
    *,
    slices: Sequence[int] | None = None,
    propose: int = 3,
    ignore: int | None = None,
    backbone: str | None = None,
    preview: str | os.PathLike | None = None,
    device: Any = None,
    progress: bool = True,
) -> None:
    """What the command does, which the bundles' ``configs/complete.yaml`` also does.

    Args:
        network: the run folder.
        image: the scan, or one file for each channel.
        drawn: the label map with the drawn slices.
        out: the file for the completed label map.
        slices: all drawn slices; ``None``: those with any label.
        propose: how many slices to propose for drawing next.
        ignore: value of slices that are not drawn; ``None``: 0.
        backbone: ``file.py:function`` that builds the backbone, if ``network.json`` does not have it.
        preview: the file for a picture of the result.
        device: where the network computes; ``None``: on a GPU if there is one.
        progress: True shows a progress bar.

    Raises:
        ValueError: for wrong files, names and numbers, before anything is written.
    """
    from monai.utils import ensure_tuple

    from monai_conres.completion import complete_scan
    from monai_conres.files import check_writable, path_text, write_label_map
    from monai_conres.volumes import ORDINALS

    images = [Path(path_text(file)) for file in ensure_tuple(image)]
    network, drawn, out = path_text(network), Path(path_text(drawn)), Path(path_text(out))
    preview = None if preview is None else Path(path_text(preview))
    check_outputs([drawn, *images], out, preview)
    trained = load_on_device(network, backbone, device)
    for file in filter(None, (out, preview)):
        check_writable(file.absolute().parent)
    completed = complete_scan(
        trained, images, drawn, slices=slices, propose=propose, ignore_index=ignore, progress=progress
    )
    write_label_map(out, completed.label, completed.label)
    size = completed.label.shape[1 + completed.spatial_axis]
    print(
        f"Slices count from 0 to {size - 1} along the {ORDINALS[completed.spatial_axis]} axis of the file, from "
        f"{completed.direction}."
    )
    print(f"Drawn slices: {' '.join(map(str, completed.slices))}")
    if completed.left_out:
        left_out = " ".join(map(str, completed.left_out))
        print(f"Labels that do not count, because the given slices leave them out: {left_out}")
    if not completed.uses_residual:
        print("The network has no residual decoder. Only the contrast of the image tells where the labels change.")
    say_unfitted(trained)
    print(f"Completed volume: {out}")
    if preview:
        from monai_conres.visualize import save_figure

        save_figure(plot_preview(completed, trained.scans.classes), preview)
        print(f"Preview: {preview}")
    if completed.proposed:
        print(f"Slices to draw next, the most uncertain first: {' '.join(map(str, completed.proposed))}")
    elif propose > 0:
        print("All slices are drawn.")


def check_outputs(inputs: Sequence[Path], out: Path, preview: Path | None) -> None:
    """Raise for names of output files that would cost the user a result or an input."""
    from monai_conres.files import is_written_by

    if not out.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"expected a name that ends with .nii or .nii.gz for the completed label map, got {out}.")
    if preview and preview.suffix != ".png":
        raise ValueError(f"expected a name that ends with .png for the preview, got {preview}.")
    for file in filter(None, (out, preview)):
        if file.is_dir():
            raise ValueError(f"expected the name of a file, got the folder {file}; add a name.")
    for file in inputs:
        if out.resolve() == file.resolve():
            raise ValueError(f"expected another file for the result, got {file}, which is read; give a new name.")
    if out.exists() and not is_written_by(out):
        raise ValueError(
            f"expected another file for the result, got {out}, which is no completed volume; give a new name."
        )
    if preview:
        try:
            import monai_conres.visualize  # noqa: F401
        except ImportError as error:
            raise ValueError(f"expected what draws pictures for the preview: {error}") from error


def plot_preview(completed: CompletedScan, classes: Structures) -> Figure:
    """Slices of the image, of what was drawn, of the network without it, and of the completed volume.

    The slices are turned to RAS and keep their numbers in the file. A frame marks the drawn ones.
    """
    import nibabel as nib
    import numpy as np

    from monai_conres.scans import label_values
    from monai_conres.visualize import plot_slices

    affine = completed.label.affine.numpy()
    turn = nib.io_orientation(affine)
    values = label_values(classes)

    def upright(volume: Sequence) -> np.ndarray:
        return nib.apply_orientation(np.moveaxis(np.asarray(volume), 0, -1), turn)[..., 0]

    def indices(label: Sequence) -> np.ndarray:
        return np.searchsorted([0, *sorted(values)], upright(label))

    axis, direction = (int(number) for number in turn[completed.spatial_axis])
    size = completed.label.shape[1 + completed.spatial_axis]
    shown = shown_slices(completed)
    flipped = [size - 1 - number if direction < 0 else number for number in shown]
    sizes = completed.label.pixdim.tolist()
    spacing = [sizes[number] for number in turn[:, 0].argsort()]
    figure = plot_slices(
        upright(completed.image),
        {
            "drawn": indices(completed.drawn),
            "network only": indices(completed.predicted),
            "completed": indices(completed.label),
        },
        slices=flipped,
        class_names=[value_name(value, classes) for value in sorted(values)],
        spatial_axis=axis,
        spacing=spacing,
    )
    for row, number in enumerate(shown):
        panels = figure.axes[4 * row : 4 * row + 4]
        panels[0].set_ylabel(f"slice {number}" + (", drawn" if number in completed.slices else ""), fontsize=9)
        if number in completed.slices:
            for panel in panels:
                panel.spines[:].set(color="#D55E00", linewidth=3)
    return figure


def shown_slices(completed: CompletedScan) -> list[int]:
    """Up to 6 slices: half of them drawn, the one to draw next, and others evenly spread over the labels."""
    drawn = completed.slices
    count = min(len(drawn), ROWS // 2)
    shown = {drawn[(2 * i + 1) * len(drawn) // (2 * count)] for i in range(count)} | set(completed.proposed[:1])
    filled = completed.label.as_tensor().movedim(1 + completed.spatial_axis, 0).flatten(1).any(1).nonzero()[:, 0]
    others = [number for number in filled.tolist() if number not in shown]
    count = min(len(others), ROWS - len(shown))
    return sorted(shown | {others[(2 * i + 1) * len(others) // (2 * count)] for i in range(count)})


def value_name(value: int, classes: Structures) -> str:
    """The name of the class with only this value, or the value.

    Example:
        >>> value_name(4, {"ET": (4,), "WT": (1, 2, 4)}), value_name(2, {"ET": (4,), "WT": (1, 2, 4)})
        ('ET', 'label 2')
    """
    return next((name for name, values in classes.items() if tuple(values) == (value,)), f"label {value}")
