"""The data of the BraTS challenges, as downloaded: 2018 to 2023, and the Decathlon's Task01."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai_conres.bundle.datalist import Datalist, check_same_grid, for_each, read_scans, repeated
from monai_conres.bundle.decathlon import read_decathlon
from monai_conres.files import find_files

__all__ = ["read_brats"]

MODALITIES = ("flair", "t1", "t1ce", "t2")
# the names of 2023; in 2020 the label of one case is called W39_1998.09.19_Segm.nii
_ALIASES = {"t2f": "flair", "t1n": "t1", "t1c": "t1ce", "t2w": "t2", "segm": "seg"}
_FILE = re.compile(r".*[_-](flair|t1ce|t1|t2|t2f|t1n|t1c|t2w|seg|segm)\.nii(\.gz)?$", re.IGNORECASE)


def read_brats(folder: str | os.PathLike, modalities: Sequence[str] = MODALITIES, *, labels: bool = True) -> Datalist:
    """Read the list of cases of a BraTS folder: one folder with the files of each case, at any depth.

    ======================  =====================================  =============================================
    source                  files of a case                        values of necrosis, edema, enhancing tumor
    ======================  =====================================  =============================================
    BraTS 2018 to 2021      ``CASE_flair.nii.gz``, ``_t1``,        1, 2, 4
                            ``_t1ce``, ``_t2``, ``_seg``
    BraTS 2023              ``CASE-t2f.nii.gz``, ``-t1n``,         1, 2, 3
                            ``-t1c``, ``-t2w``, ``-seg``
    Decathlon Task01        ``dataset.json``, ``imagesTr`` ...     2, 1, 3
    ======================  =====================================  =============================================

    The structures are those of the challenge: ET, the enhancing tumor; WT, the whole tumor; TC, its core, which is all
    but the edema. The headers of all files are looked at; :meth:`Datalist.check` looks at the rest.

    Args:
        folder: the folder as downloaded, for example ``MICCAI_BraTS_2018_Data_Training``.
        modalities: the sequences that make the channels of the image, in this order, by their names of 2018. Sequences
            that are not named need not be there.
        labels: False for scans without a label; of the Decathlon's Task01 those in ``imagesTs``.

    Raises:
        ValueError: when there are no cases, or those of two challenges, a sequence or label is missing or there twice,
            a header cannot be read, or the files of a case are on different grids. It names case and file, a line for
            each case.

    Example:
        >>> import tempfile
        >>> from monai_conres.phantom import write_phantom_brats
        >>> folder = Path(tempfile.mkdtemp(), "Training")
        >>> write_phantom_brats(folder, cases=2, size=(12, 14, 10))
        >>> data = read_brats(folder, ["flair", "t1ce"])
        >>> [Path(file).name for file in data.cases[0]["image"]]
        ['phantom_000_flair.nii.gz', 'phantom_000_t1ce.nii.gz']
        >>> data.structures
        {'ET': (4,), 'WT': (1, 2, 4), 'TC': (1, 4)}
    """
    folder = Path(folder)
    unknown = sorted(set(modalities) - set(MODALITIES))
    if unknown or not modalities or len(set(modalities)) < len(modalities):
        raise ValueError(f"expected modalities among {list(MODALITIES)}, each once, got {list(modalities)}.")
    if (folder / "dataset.json").is_file():
        return _read_task01(folder, modalities, labels)

    files: dict[Path, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    newer: set[bool] = set()
    for file in find_files(folder, "*.nii*"):
        if match := _FILE.match(file.name):
            kind = match[1].lower()
            if kind != "seg":
                newer.add(kind in ("t2f", "t1n", "t1c", "t2w"))
            files[file.parent][_ALIASES.get(kind, kind)].append(str(file))
    if not files:
        raise ValueError(
            f"expected a folder for each case with files such as CASE_flair.nii.gz or CASE-t2f.nii.gz in {folder}, "
            "found none; give the folder that the challenge's archive unpacks to."
        )
    if len(newer) > 1:
        raise ValueError(
            f"expected the cases of one challenge in {folder}, got files of 2018's names (_t1ce) and of 2023's (-t1c), "
            "whose labels have other values; read each in a folder of its own."
        )
    kinds = [*modalities, "seg"] if labels else list(modalities)
    cases = for_each(lambda parent: _case(parent, files[parent], kinds), files)
    if (twice := repeated([case["name"] for case in cases])) is not None:
        raise ValueError(f"expected each case once in {folder}, got {twice} in two folders; keep one of them.")
    necrosis, edema, enhancing = (1, 2, 3) if newer == {True} else (1, 2, 4)
    return Datalist(cases, _structures(necrosis, edema, enhancing))


def _case(folder: Path, files: dict[str, list[str]], kinds: Sequence[str]) -> dict[str, Any]:
    """One case, from the files in its folder."""
    for kind in kinds:
        found = files.get(kind, [])
        if len(found) != 1:
            what = "label (_seg)" if kind == "seg" else f"sequence {kind}"
            raise ValueError(
                f"expected one file for the {what} of case {folder.name} in {folder}, found "
                f"{[Path(file).name for file in found] or 'none'} beside "
                f"{sorted(Path(file).name for other in files.values() for file in other)}; fetch it again, or leave "
                + ("the case out of training." if kind == "seg" else f"{kind} out of the modalities.")
            )
    chosen = [files[kind][0] for kind in kinds]
    check_same_grid(folder.name, chosen)
    case: dict[str, Any] = {"name": folder.name, "image": [files[kind][0] for kind in kinds if kind != "seg"]}
    return {**case, "label": files["seg"][0]} if "seg" in kinds else case


def _read_task01(folder: Path, modalities: Sequence[str], labels: bool) -> Datalist:
    """The Decathlon's Task01: all four sequences in one file."""
    if tuple(modalities) != MODALITIES:
        raise ValueError(
            f"expected the modalities {list(MODALITIES)} for data in the Decathlon's layout, which has all of them in "
            f"one file in this order, got {list(modalities)}."
        )
    structures = _structures(necrosis=2, edema=1, enhancing=3)
    if not labels:
        return read_scans(folder / "imagesTs", structures)
    data = read_decathlon(folder)
    if data.channels != 4 or len(data.classes) != 4:
        raise ValueError(
            f"expected 4 sequences and 4 classes in {folder}, as in Task01_BrainTumour, got {data.channels} and "
            f"{len(data.classes)}."
        )
    return Datalist(data.cases, structures, data.folds)


def _structures(necrosis: int, edema: int, enhancing: int) -> dict[str, tuple[int, ...]]:
    """The challenge's regions, in the order of its tables, with their values in one order: that of softmax classes."""
    return {
        "ET": (enhancing,),
        "WT": (necrosis, edema, enhancing),
        "TC": (necrosis, enhancing),
    }
