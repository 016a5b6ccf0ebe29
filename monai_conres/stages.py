"""Find the features of a network's decoder with one forward pass and its autograd graph.

A mark in that graph stands for the output of each module. A walk from the network's output shows which marks reach the
output, and whether anything from coarser scales gets past a mark. Everything from coarser scales must pass through the
gated feature.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn as nn
from monai.utils import ensure_tuple
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["DecoderStages", "Feature", "decoder_stages"]

_SIZES = (64, 96, 128, 32)  # edge lengths to try; at 64 the coarsest features of most networks have 2 to 8 voxels
# Known families: the names of their stages, for any number of levels. The last level of MONAI's UNet gives the logits,
# so its features end one level below.
_FAMILIES = {
    "UNet": r"model(\.1\.submodule)+\.2",
    "AttentionUnet": r"model(\.1\.submodule)*\.1\.merge",
    "BasicUNet": r"upcat_[1-4]",
    "BasicUNetPlusPlus": r"upcat_(3_1|2_2|1_3|0_4)",
    "DynUNet": r"upsamples\.\d+",
    "SegResNet": r"up_layers\.\d+",
    "SegResNetDS": r"up_layers\.\d+\.blocks",
    "VNet": r"up_tr\d+",
    "UNETR": r"decoder[2-5]",
    "SwinUNETR": r"decoder[1-5]",
    "FlexibleUNet": r"decoder\.blocks\.\d+",
    "MedNeXt": r"dec_stages\.\d+",
    "PlainConvUNet": r"decoder\.stages\.\d+",
    "ResidualEncoderUNet": r"decoder\.stages\.\d+",
}
_PUBLISHERS = ("monai.networks.nets", "dynamic_network_architectures")


@dataclass(frozen=True)
class Feature:
    """The output of one module call in a forward pass.

    Attributes:
        name: name of the module as in ``network.named_modules()``. ``"name#1"`` is the second call of a module that
            runs several times, ``"name#2"`` the third.
        channels: number of channels.
        size: spatial size.
        has_parameters: whether the module itself, not a module inside it, holds parameters.
        node: the mark in the graph.
    """

    name: str
    channels: int
    size: tuple[int, ...]
    has_parameters: bool
    node: Any = field(repr=False)

    def is_coarser(self, other: Feature) -> bool:
        """Whether up-sampling lies between the two features. A border that a convolution cuts off does not count."""
        return any(3 * a <= 2 * b for a, b in zip(self.size, other.size, strict=True))


@dataclass(frozen=True)
class DecoderStages:
    """Decoder stages of a network, and all the features that they were chosen from. Print it to see them as a table.

    Attributes:
        stages: features of the chosen stages, coarse to fine.
        features: every feature that reaches the output, in the order of the forward pass.
        image_size: spatial size of the image in that forward pass.
        out_channels: number of channels of the network's output.
    """

    stages: tuple[Feature, ...]
    features: tuple[Feature, ...]
    image_size: tuple[int, ...]
    out_channels: int

    def __str__(self) -> str:
        width = max((len(feature.name) for feature in self.features), default=6)
        lines = [f"  {'module':{width}}  channels  size (of an image of {_format_size(self.image_size)})"]
        for feature in self.features:
            mark = "*" if feature in self.stages else " "
            lines.append(f"{mark} {feature.name:{width}}  {feature.channels:8}  {_format_size(feature.size)}")
        if self.stages:
            lines.append(f"stages={[feature.name for feature in self.stages]}")
        return "\n".join(lines)


def decoder_stages(
    network: nn.Module,
    in_channels: int,
    *,
    stages: str | Sequence[str] = "auto",
    spatial_size: Sequence[int] | None = None,
) -> DecoderStages:
    """Find the features of a network's decoder, one for each resolution on the way up.

    Networks of MONAI and nnU-Net are known by the names of their modules. For any other network the graph decides. The
    finest stage is the last feature that everything from coarser scales passes through and that a layer with parameters
    follows. Each coarser stage is the last feature of a smaller size before the finer stage. The coarsest feature of
    all belongs to the encoder.

    Args:
        network: any 3D encoder-decoder that takes one image. The function runs the network once in eval mode and
            changes nothing in it.
        in_channels: number of channels of the image.
        stages: ``"auto"``, or names of modules whose outputs are the stages.
        spatial_size: spatial size of an image that the network takes. ``None`` tries a few sizes.

    Returns:
        The stages, coarse to fine, together with every candidate.

    Raises:
        ValueError: when the network cannot run, no stages are found, a given stage does not reach the output, or
            coarser features reach the output past a given stage. The error lists the candidates.

    Example:
        >>> from monai.networks.nets import BasicUNet
        >>> found = decoder_stages(BasicUNet(features=(8, 8, 16, 32, 64, 8)), 1, spatial_size=(32, 32, 32))
        >>> [(stage.name, stage.channels, stage.size) for stage in found.stages][-2:]
        [('upcat_2', 8, (16, 16, 16)), ('upcat_1', 8, (32, 32, 32))]
    """
    if spatial_size is not None and len(ensure_tuple(spatial_size)) != 3:
        raise ValueError(f"expected a spatial_size of three numbers, for a 3D network, got {spatial_size}.")
    table, output = _trace(network, in_channels, spatial_size)
    features = table.features
    if stages == "auto":
        chosen = _known(network, features) or _search(features, output)
        if not chosen:
            raise ValueError(
                f"expected a 3D encoder-decoder, found no decoder stage in {type(network).__name__}; name them with "
                f"stages=[...], out of the features that reach the output:\n{table}"
            )
    else:
        names = ensure_tuple(stages)
        chosen = [feature for feature in features if feature.name in names]
        if missing := sorted(set(names) - {feature.name for feature in chosen}):
            raise ValueError(
                f"expected names of modules whose output, (b, c, d, h, w), reaches the output of the network, got "
                f"{missing}; choose from:\n{table}"
            )
    for coarse, fine in itertools.pairwise(chosen):
        if coarse.node in _ancestors(output, blocked=fine.node):
            raise ValueError(
                f"expected the features of {coarse.name!r} to reach the output only through {fine.name!r}, got a way "
                f"past it; leave one of them out of stages=[...]. The features that reach the output:\n{table}"
            )
    return replace(table, stages=tuple(chosen))


def _known(network: nn.Module, features: Sequence[Feature]) -> list[Feature]:
    """Stages of a known family, also of its subclasses; none of another network that only has the class's name."""
    for family in type(network).__mro__:
        if family.__module__.startswith(_PUBLISHERS) and (pattern := _FAMILIES.get(family.__name__)):
            return [feature for feature in features if re.fullmatch(pattern, feature.name)]
    return []


def _search(features: Sequence[Feature], output: Any) -> list[Feature]:
    """Stages by the graph only, coarse to fine."""
    candidates = [feature for feature in features if math.prod(feature.size) > 1]  # squeeze-and-excitation has 1 voxel
    if not candidates:
        return []
    bottleneck = min(reversed(candidates), key=lambda feature: math.prod(feature.size))  # the last of the smallest
    chain: list[Feature] = []
    # the finest: everything coarser passes through it, and a layer with parameters makes the logits out of it
    for index, feature in reversed(list(enumerate(candidates))):
        past = _ancestors(output, blocked=feature.node)
        coarser = [earlier for earlier in candidates[:index] if earlier.is_coarser(feature)]
        later = [later for later in candidates[index + 1 :] if later.has_parameters]
        if (
            coarser
            and not any(earlier.node in past for earlier in coarser)
            and any(feature.node in _ancestors(layer.node) for layer in later)
        ):
            chain, candidates = [feature], candidates[:index]
            break
    # each coarser one: the last feature of a smaller size, preferably one that the bottleneck cannot get past
    while chain:
        past = _ancestors(output, blocked=chain[-1].node)
        coarser = [f for f in reversed(candidates) if f.is_coarser(chain[-1]) and f.node not in past]
        if not coarser:
            break
        separating = (
            f for f in coarser if f is bottleneck or bottleneck.node not in _ancestors(output, blocked=f.node)
        )
        chain.append(next(separating, coarser[0]))
        candidates = candidates[: candidates.index(chain[-1])]
    return chain[-2::-1] if chain else []  # without the last, which is the encoder's


def _trace(network: nn.Module, in_channels: int, spatial_size: Sequence[int] | None) -> tuple[DecoderStages, Any]:
    """The features of one forward pass that reach the output, and the node of the output in the graph."""
    name = type(network).__name__
    parameter = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
    if parameter.is_meta:
        raise ValueError(f"expected a {name} with weights, got one on the meta device; attach before to('meta').")
    if torch.is_inference_mode_enabled():
        raise ValueError("expected gradients to be possible, got torch.inference_mode(); find stages outside of it.")
    errors = []
    structure_only = saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing)  # keeps no activations
    for size in [(edge,) * 3 for edge in _SIZES] if spatial_size is None else [tuple(spatial_size)]:
        image = torch.zeros(1, in_channels, *size, device=parameter.device, dtype=parameter.dtype, requires_grad=True)
        try:
            with _marked(network) as features, _evaluating(network), torch.enable_grad(), structure_only:
                output = network(image)
        except (RuntimeError, ValueError, AssertionError, IndexError) as error:
            errors.append(f"{_format_size(size)}: {next(iter(str(error).splitlines()), type(error).__name__)}")
            continue
        tensors = [tensor for tensor in _tensors(output) if tensor.ndim == 5 and tensor.grad_fn is not None]
        if not tensors:
            raise ValueError(
                f"expected {name} to give a tensor of shape (b, c, d, h, w) that depends on the image, got "
                f"{type(output).__name__}; attach to the part of it that does."
            )
        final = max(tensors, key=lambda tensor: len(_ancestors(tensor.grad_fn)))  # the one with the most behind it
        reaching = _ancestors(final.grad_fn)
        reached = tuple(feature for feature in features if feature.node in reaching)
        return DecoderStages((), reached, size, final.shape[1]), final.grad_fn
    raise ValueError(
        f"expected {name} to run on a 3D image of {in_channels} channels, got an error at each size "
        f"({'; '.join(errors)}); give a spatial_size that it takes, and the in_channels that it was built with."
    )


@contextmanager
def _marked(network: nn.Module) -> Iterator[list[Feature]]:
    """Mark the output of every module call in the graph, and list these outputs."""
    features: list[Feature] = []
    calls: dict[str, int] = {}
    names = {module: name for name, module in network.named_modules()}

    def mark(module: nn.Module, args: Any, output: Any) -> torch.Tensor | None:
        name = names[module]
        call = calls[name] = calls.get(name, -1) + 1
        if not (isinstance(output, torch.Tensor) and output.ndim == 5 and output.requires_grad):
            return None
        marked = output.clone()
        own_parameters = any(True for _ in module.parameters(recurse=False))
        name = f"{name}#{call}" if call else name
        features.append(Feature(name, output.shape[1], tuple(output.shape[2:]), own_parameters, marked.grad_fn))
        return marked

    handles = [module.register_forward_hook(mark) for module, name in names.items() if name]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and afterwards in its own mode (also a frozen part of a network in training)."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _ancestors(node: Any, blocked: Any = None) -> set[Any]:
    """All nodes of the graph that ``node`` depends on, itself included, without passing ``blocked``."""
    found = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current is None or current in found or current is blocked:
            continue
        found.add(current)
        stack.extend(following for following, _ in current.next_functions)
    return found


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested dictionaries, lists and tuples."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, (Mapping, list, tuple)):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(value)


def _format_size(size: Sequence[int]) -> str:
    return "x".join(map(str, size))
