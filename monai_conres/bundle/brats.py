"""The data of the BraTS challenges 2018 to 2023, as downloaded, and the Decathlon's Task01."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai_conres.bundle.datalist import Datalist, for_each, read_scans
from monai_conres.bundle.decathlon import read_decathlon
from monai_conres.files import path_text
from monai_conres.volumes import check_same_grid, find_files, say_left_out

MODALITIES = ("flair", "t1", "t1ce", "t2")
# The names of 2023. In 2020 the label of one case is called W39_1998.09.19_Segm.nii.
_ALIASES = {"t2f": "flair", "t1n": "t1", "t1c": "t1ce", "t2w": "t2", "segm": "seg"}
# Scans of one patient: BraTS-GLI-00005-100 and -101 of 2023 and later, Brats18_TCIA02_135_1 of 2017 and 2018
_PATIENT = re.compile(r"(.*-\d{5})-\d{3}|((?:brats1[78]|brats_(?:2013|tcia))_.*)_\d+", re.IGNORECASE)
_FILE = re.compile(r".*[_-](flair|t1ce|t1|t2|t2f|t1n|t1c|t2w|seg|segm)\.nii(\.gz)?$", re.IGNORECASE)


def read_brats(folder: str | os.PathLike, modalities: Sequence[str] = MODALITIES, *, labels: bool = True) -> Datalist:
    """Read the cases of a BraTS folder: one folder with the files of each case, at any depth.

    ==================  =====================================================  ==========================
    source              files of a case                                        necrosis, edema, enhancing
    ==================  =====================================================  ==========================
    BraTS 2018 to 2021  ``CASE_flair.nii.gz``, ``_t1``, ``_t1ce``, ``_t2``,    1, 2, 4
                        ``_seg``
    BraTS 2023          ``CASE-t2f.nii.gz``, ``-t1n``, ``-t1c``, ``-t2w``,     1, 2, 3
                        ``-seg``
    Decathlon Task01    ``dataset.json``, ``imagesTr``, ``labelsTr``           2, 1, 3
    ==================  =====================================================  ==========================

    The structures are the challenge's: ET is the enhancing tumor, WT the whole tumor, and TC the core, which is
    everything except the edema. Scans of one patient (``-100`` and ``-101`` of 2023) stay together in a split. The
    function reads headers, and :meth:`Datalist.check` reads voxels.

    Args:
        folder: the folder as downloaded, for example ``MICCAI_BraTS_2018_Data_Training``.
        modalities: the sequences that become the channels of the image, in this order, by their names of 2018. Other
            sequences may be missing.
        labels: False for scans without labels. In Task01 these are the scans of ``imagesTs``.

    Raises:
        ValueError: when there are no cases or cases of two challenges, a sequence or label is missing or there twice,
            a header cannot be read, or the files of a case are on different grids. One line names case and file of
            each error.

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
    folder = Path(path_text(folder))
    if not modalities or set(modalities) - set(MODALITIES) or len(set(modalities)) < len(modalities):
        raise ValueError(f"expected modalities among {list(MODALITIES)}, each once, got {list(modalities)}.")
    if (folder / "dataset.json").is_file():
        return _read_task01(folder, modalities, labels)

    files: dict[Path, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    names_of_2023: set[bool] = set()
    others: dict[Path, str] = {}
    for file in find_files(folder, "*.nii*"):
        if match := _FILE.match(file.name):
            kind = match[1].lower()
            if kind != "seg":
                names_of_2023.add(kind in ("t2f", "t1n", "t1c", "t2w"))
            files[file.parent][_ALIASES.get(kind, kind)].append(str(file))
        else:
            others[file.relative_to(folder)] = "no name of a sequence"
    if not files:
        raise ValueError(
            f"expected a folder for each case with files such as CASE_flair.nii.gz or CASE-t2f.nii.gz in {folder}, "
            f"found {', '.join(map(str, list(others)[:5])) or 'none'}; give the folder that the challenge's archive "
            "unpacks to."
        )
    if len(names_of_2023) > 1:
        raise ValueError(
            f"expected the cases of one challenge in {folder}, got files with names of 2018 (_t1ce) and of 2023 "
            "(-t1c), whose labels have different values; read them from different folders."
        )
    kinds = [*modalities, "seg"] if labels else list(modalities)
    cases = for_each(lambda parent: _case(parent, files[parent], kinds), files)
    say_left_out(f"Found {len(cases)} cases in {folder}", others)
    return Datalist(cases, _structures(1, 2, 3 if names_of_2023 == {True} else 4))


def _case(folder: Path, files: dict[str, list[str]], kinds: Sequence[str]) -> dict[str, Any]:
    """One case, from the files in its folder."""
    for kind in kinds:
        found = files.get(kind, [])
        if len(found) != 1:
            what = "label (_seg)" if kind == "seg" else f"sequence {kind}"
            raise ValueError(
                f"expected one file for the {what} of case {folder.name} in {folder}, found "
                f"{[Path(file).name for file in found] or 'none'} among "
                f"{sorted(Path(file).name for other in files.values() for file in other)}; fetch it again, or leave "
                "out the case or the modality."
            )
    chosen = {kind: files[kind][0] for kind in kinds}
    check_same_grid(list(chosen.values()))
    label = {"label": chosen.pop("seg")} if "seg" in chosen else {}
    match = _PATIENT.fullmatch(folder.name)
    patient = (match[1] or match[2]) if match else folder.name
    return {"name": folder.name, "patient": patient, "image": list(chosen.values()), **label}


def _read_task01(folder: Path, modalities: Sequence[str], labels: bool) -> Datalist:
    """The Decathlon's Task01, where one file holds all four sequences."""
    if tuple(modalities) != MODALITIES:
        raise ValueError(
            f"expected the modalities {list(MODALITIES)} for Task01 of the Decathlon, whose files hold all of them in "
            f"this order, got {list(modalities)}."
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
    """The challenge's structures in the order of its tables. The order of the values is that of softmax classes."""
    return {"ET": (enhancing,), "WT": (necrosis, edema, enhancing), "TC": (necrosis, enhancing)}
