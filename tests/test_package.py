from __future__ import annotations

import importlib
import inspect
import pkgutil

import monai.bundle

import monai_conres


def test_every_public_name_is_there_and_documented_with_an_example():
    for name in monai_conres.__all__:
        thing = getattr(monai_conres, name)
        assert inspect.getdoc(thing), name
        if name != "DecoderStages":  # what decoder_stages returns
            assert ">>>" in thing.__doc__, name


def test_no_name_belongs_to_monai():
    """MONAI's bundle parser looks through every module whose name starts with "monai": a name that is there twice is
    ambiguous in a configuration."""
    modules = [
        importlib.import_module(f"monai_conres.{module.name}") for module in pkgutil.iter_modules(monai_conres.__path__)
    ]
    locator = monai.bundle.ComponentLocator()
    for module in modules:
        for name in getattr(module, "__all__", []):
            if inspect.isclass(getattr(module, name)) or inspect.isfunction(getattr(module, name)):
                found = locator.get_component_module_name(name)
                places = [found] if isinstance(found, str) else found
                assert all(place.startswith("monai_conres") for place in places), (name, places)
