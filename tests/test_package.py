from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import monai.bundle
import pytest

import monai_conres

ROOT = Path(monai_conres.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


def test_public_names_are_documented_with_an_example():
    for name in monai_conres.__all__:
        thing = getattr(monai_conres, name)
        assert inspect.getdoc(thing), name
        # decoder_stages returns the first; pages of the docs, which are tests too, show the others with files
        if name not in ("DecoderStages", "complete_scan", "load_network"):
            assert ">>>" in thing.__doc__, name


def test_public_names_are_not_names_of_monai():
    """MONAI's bundle parser looks through every loaded module whose name starts with "monai". A name that is there
    twice is ambiguous in a configuration."""
    modules = [
        importlib.import_module(f"monai_conres.{module.name}")
        for module in pkgutil.iter_modules(monai_conres.__path__)
        if module.name != "__main__"
    ]
    locator = monai.bundle.ComponentLocator()
    for module in modules:
        for name in getattr(module, "__all__", []):
            if inspect.isclass(getattr(module, name)) or inspect.isfunction(getattr(module, name)):
                found = locator.get_component_module_name(name)
                places = [found] if isinstance(found, str) else found
                assert all(place.startswith("monai_conres") for place in places), (name, places)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_file_uses_no_private_names_of_torch_or_monai(file):
    private = (
        r"\b(torch|monai)(\.\w+)*\._[a-z]|from (torch|monai)\b.* import .*\b_[a-z]"
        r"|_orig_mod|_forward_hooks|_is_replica|_NormBase"
    )
    assert not (found := re.search(private, file.read_text())), found


def imports(file: Path) -> set[str]:
    """Modules of this package that a file imports."""
    nodes = ast.walk(ast.parse(file.read_text()))
    names = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {name for name in names if name.startswith("monai_conres")}


@pytest.mark.parametrize(
    ("room", "users"),
    [
        ("bundle", {"commands"}),
        ("draw", {"commands"}),
        ("commands", {"__main__.py"}),
        ("nnunet", {"commands"}),
        ("visualize", {"bundle", "commands"}),
    ],
)
def test_room_is_imported_only_from_below(room, users):
    for file in FILES:
        if not {room, *users} & set(file.relative_to(ROOT).parts):
            assert not [name for name in imports(file) if name.startswith(f"monai_conres.{room}")], file


def test_import_needs_no_optional_package():
    """Only torch, MONAI and numpy are required."""
    optional = ["nibabel", "matplotlib", "skimage", "ignite", "pydicom", "yaml", "nnunetv2", "tqdm"]
    code = f"import sys; sys.modules.update(dict.fromkeys({optional})); import monai_conres, monai_conres.nnunet"
    subprocess.run([sys.executable, "-c", code], check=True)
