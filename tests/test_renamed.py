"""Every spelling of version 0.1 raises an error with the new one, and the changelog shows the same table."""

from __future__ import annotations

import copy
import importlib
import re
from pathlib import Path

import pytest
import torch.nn as nn

import monai_conres
from monai_conres import ConResDecoder, ConResLoss, ConResNet, ContextResidualLoss, ContextResidualModule, attach_conres
from monai_conres.renamed import RENAMED, renamed

CALLS = {
    "ConResNet": lambda **kwargs: ConResNet(1, 1, **kwargs),
    "ContextResidualModule": lambda **kwargs: ContextResidualModule(8, **kwargs),
    "ConResDecoder": lambda **kwargs: ConResDecoder(1, (8,), 1, **kwargs),
    "attach_conres": lambda **kwargs: attach_conres(nn.Identity(), 1, **kwargs),
    "ConResLoss": lambda **kwargs: ConResLoss(sigmoid=True, **kwargs),
    "ContextResidualLoss": lambda **kwargs: ContextResidualLoss(**kwargs),
}
KEYWORDS = [key for key in RENAMED if key.endswith("=)")]
NAMES = [key for key in RENAMED if key.startswith("monai_conres.")]


@pytest.mark.parametrize("old", KEYWORDS)
def test_old_keyword_raises_with_the_new_spelling(old):
    owner, keyword = re.fullmatch(r"(\w+)\((\w+)=\)", old).groups()
    with pytest.raises(TypeError, match=re.escape(RENAMED[old])):
        CALLS[owner](**{keyword: None})


def test_old_positional_argument_raises_with_the_new_spelling():
    with pytest.raises(TypeError, match="finds the number of output channels"):
        attach_conres(nn.Identity(), 1, 1)


@pytest.mark.parametrize("name", ["eval_residual", "authors"])
def test_old_attribute_of_the_network_raises_with_the_new_spelling(name):
    with pytest.raises(AttributeError, match=re.escape(RENAMED[f"ConResNet.{name}"])):
        getattr(ConResNet, name)
    network = ConResNet(1, 1, channels=(8, 16), strides=(2,), blocks=(1, 1, 1))
    with pytest.raises(AttributeError, match=re.escape(RENAMED[f"ConResNet.{name}"])):
        setattr(network, name, True)
    assert not hasattr(network, name)
    copy.deepcopy(network)


def test_old_attribute_of_the_wrapper_raises_with_the_new_spelling():
    with pytest.raises(AttributeError, match=re.escape(RENAMED["ConResWrapper.eval_residual"])):
        monai_conres.ConResWrapper.eval_residual  # noqa: B018


@pytest.mark.parametrize("old", NAMES)
def test_old_name_raises_with_the_new_spelling(old):
    name = old.removeprefix("monai_conres.")
    with pytest.raises(ImportError, match=re.escape(RENAMED[old])):
        exec(f"from monai_conres import {name}", {})
    with pytest.raises(AttributeError, match=re.escape(RENAMED[old])):
        getattr(monai_conres, name)
    with pytest.raises(ImportError, match=re.escape(RENAMED[old])):
        importlib.import_module(old)


def test_other_names_are_missing_as_usual():
    with pytest.raises(AttributeError, match=r"module 'monai_conres' has no attribute 'ConResNext'"):
        monai_conres.ConResNext  # noqa: B018
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("monai_conres.trainings")


@pytest.mark.parametrize("old", RENAMED)
def test_changelog_has_the_table(old):
    changelog = (Path(__file__).parent.parent / "CHANGELOG.md").read_text()
    assert f"| `{old}` | {RENAMED[old]} |" in changelog
    assert old in renamed(old)
    assert RENAMED[old] in renamed(old)
