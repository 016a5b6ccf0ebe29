"""Where a network's decoder features live: one traced forward pass, and the graph that autograd makes of it.

Every module's output is marked in that graph. Walking it from the network's output shows which outputs reach it, and
whether anything from coarser scales gets past them: what is gated must be the only way onward.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn as nn
from monai.utils import ensure_tuple

__all__ = ["DecoderStages", "Feature", "decoder_stages"]

_SIZES = (64, 96, 128, 32)  # edge lengths tried in turn; at 64 the coarsest features of most networks have 2-8 voxels


@dataclass(frozen=True)
class Feature:
    """The output of one module call in a traced forward pass.

    Attributes:
        name: name of the module as in ``network.named_modules()``; ``"name#1"`` is the second call of a module that
            runs several times in one forward pass, ``"name#2"`` the third.
        channels: number of channels.
        size: spatial size, at the spatial size of the traced image.
        has_parameters: whether the module itself, not one inside it, holds parameters.
        node: the mark in the graph.
    """

    name: str
    channels: int
    size: tuple[int, ...]
    has_parameters: bool
    node: Any = field(repr=False)

    @property
    def voxels(self) -> int:
        return math.prod(self.size)


@dataclass(frozen=True)
class DecoderStages:
    """Decoder stages of a network, and all the features they were chosen from.

    Attributes:
        stages: features of the chosen stages, coarse to fine.
        features: every feature that reaches the output, in the order of the forward pass.
        image_size: spatial size of the traced image.
        out_channels: number of channels of the network's output.

    Printing it shows the table of features with the chosen ones marked.
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

    Networks of MONAI and nnU-Net are known by their names. Of any other the graph decides: the finest stage
    is the last feature that everything from coarser scales passes through and that a layer with parameters follows;
    each coarser one is the last feature, before that, of a smaller size. The coarsest of all is the encoder's.

    Args:
        network: any 3D encoder-decoder that takes one image. It is run once, in eval mode; nothing in it changes.
        in_channels: number of channels of the image.
        stages: ``"auto"``, or names of modules whose outputs are the stages.
        spatial_size: spatial size of the image to trace with. ``None`` tries a few.

    Returns:
        The stages, coarse to fine, together with every candidate; printing it shows them as a table.

    Raises:
        ValueError: when the network cannot run, or no stages are found, or what is gated at the given ones would not
            reach the output or would be passed by. The error lists the candidates.

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
        known = set(_known_stages(network))
        if known and known <= {feature.name for feature in features}:
            chosen = _named(features, sorted(known), table)
        else:
            chosen = _search(features, output)
        if not chosen:
            raise ValueError(
                f"expected a 3D encoder-decoder, found no decoder stage in {type(network).__name__}; name them with "
                f"stages=[...], coarse to fine, out of the features that reach the output:\n{table}"
            )
    else:
        chosen = _named(features, [stages] if isinstance(stages, str) else list(stages), table)
    for coarse, fine in itertools.pairwise(chosen):
        if coarse.node in _ancestors(output, blocked=fine.node):
            raise ValueError(
                f"expected the features of {coarse.name!r} to reach the output through {fine.name!r} alone, got a way "
                f"past it; leave one of the two out of stages=[...]. The features that reach the output:\n{table}"
            )
    return replace(table, stages=tuple(chosen))


def _search(features: Sequence[Feature], output: Any) -> list[Feature]:
    """Stages by the graph alone, coarse to fine."""
    candidates = [feature for feature in features if feature.voxels > 1]  # one voxel is squeeze-and-excitation's
    if not candidates:
        return []
    smallest = min(feature.voxels for feature in candidates)
    bottleneck = [feature for feature in candidates if feature.voxels == smallest][-1]

    def separates(feature: Feature) -> bool:
        return feature is bottleneck or bottleneck.node not in _ancestors(output, blocked=feature.node)

    # the finest: everything coarser passes it, and a layer with parameters makes the logits out of it
    chain: list[Feature] = []
    for index in reversed(range(len(candidates))):
        feature = candidates[index]
        followed = any(
            later.has_parameters and feature.node in _ancestors(later.node) for later in candidates[index + 1 :]
        )
        coarser = [earlier for earlier in candidates[:index] if _is_coarser(earlier, feature)]
        past = _ancestors(output, blocked=feature.node)
        if followed and coarser and not any(earlier.node in past for earlier in coarser):
            chain, candidates = [feature], candidates[:index]
            break
    # each coarser one: the last feature of a smaller size, rather one that cuts the coarsest features off
    while chain:
        passed = _ancestors(output, blocked=chain[-1].node)
        coarser = [feature for feature in candidates if _is_coarser(feature, chain[-1]) and feature.node not in passed]
        if not coarser:
            break
        chosen = next((feature for feature in reversed(coarser) if separates(feature)), coarser[-1])
        chain.append(chosen)
        candidates = candidates[: candidates.index(chosen)]
    return chain[-2::-1] if chain else []  # without the last, which is the encoder's


def _is_coarser(feature: Feature, other: Feature) -> bool:
    """Whether there is an up-sampling between the two; the border that some convolutions cut off is none."""
    return any(3 * a <= 2 * b for a, b in zip(feature.size, other.size, strict=True))


def _known_stages(network: nn.Module) -> list[str]:
    """Names of the stages of a known family; none for any other network, also one that has only the class's name."""
    for family in type(network).__mro__:
        if family.__module__.startswith(_PUBLISHERS) and (finder := _FAMILIES.get(family.__name__)):
            try:
                return finder(network)
            except AttributeError:  # a subclass that has changed its parts
                return []
    return []


def _numbered(name: str) -> Callable[[nn.Module], list[str]]:
    """The children of a ``ModuleList``, in its order."""

    def find(network: nn.Module) -> list[str]:
        before, _, after = name.partition("[i]")
        return [f"{before}.{index}{after}" for index, _ in enumerate(network.get_submodule(before).children())]

    return find


def _listed(*names: str) -> Callable[[nn.Module], list[str]]:
    return lambda network: list(names)


def _nested(stage: str) -> Callable[[nn.Module], list[str]]:
    """Stages of a network of nested skip connections: ``model.1.submodule`` holds the next level's ``0, 1, 2``."""

    def find(network: nn.Module) -> list[str]:
        names = []
        level = "model"
        modules = dict(network.named_modules())
        while f"{level}.1.submodule" in modules:
            names.append(stage.format(level=level))
            level = f"{level}.1.submodule"
        return names[::-1]

    return find


_PUBLISHERS = ("monai.networks.nets", "dynamic_network_architectures")
# Names hold for any strides; the graph tells stages apart by their sizes.
# The last level of MONAI's UNet gives the logits themselves, so its features end one level below
_FAMILIES: dict[str, Callable[[nn.Module], list[str]]] = {
    "UNet": lambda network: _nested("{level}.2")(network)[:-1],
    "AttentionUnet": _nested("{level}.1.merge"),
    "BasicUNet": _listed("upcat_4", "upcat_3", "upcat_2", "upcat_1"),
    "BasicUNetPlusPlus": _listed("upcat_3_1", "upcat_2_2", "upcat_1_3", "upcat_0_4"),
    "DynUNet": _numbered("upsamples[i]"),
    "SegResNet": _numbered("up_layers[i]"),
    "SegResNetDS": _numbered("up_layers[i].blocks"),
    "VNet": _listed("up_tr256", "up_tr128", "up_tr64", "up_tr32"),
    "UNETR": _listed("decoder5", "decoder4", "decoder3", "decoder2"),
    "SwinUNETR": _listed("decoder5", "decoder4", "decoder3", "decoder2", "decoder1"),
    "FlexibleUNet": _numbered("decoder.blocks[i]"),
    "MedNeXt": _numbered("dec_stages[i]"),
    "PlainConvUNet": _numbered("decoder.stages[i]"),
    "ResidualEncoderUNet": _numbered("decoder.stages[i]"),
}


def _named(features: Sequence[Feature], names: Sequence[str], table: DecoderStages) -> list[Feature]:
    """The features of the given names, in the order of the forward pass."""
    by_name = {feature.name: feature for feature in features}
    if missing := [name for name in names if name not in by_name]:
        raise ValueError(
            f"expected names of modules whose output, (b, c, d, h, w), reaches the output of the network, got "
            f"{missing}; choose from:\n{table}"
        )
    return sorted({by_name[name] for name in names}, key=features.index)


def _trace(network: nn.Module, in_channels: int, spatial_size: Sequence[int] | None) -> tuple[DecoderStages, Any]:
    """The features of one forward pass that reach the output, and the node of the output in the graph."""
    sizes = [(edge,) * 3 for edge in _SIZES] if spatial_size is None else [tuple(spatial_size)]
    parameter = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
    if parameter.device.type == "meta":
        raise ValueError(
            f"expected a {type(network).__name__} with weights, got one on meta; attach before to('meta')."
        )
    errors = []
    for size in sizes:
        generator = torch.Generator(parameter.device).manual_seed(0)  # the user's random numbers stay as they are
        kind: dict[str, Any] = {"device": parameter.device, "dtype": parameter.dtype}
        image = torch.rand(1, in_channels, *size, generator=generator, **kind).requires_grad_()
        features: list[Feature] = []
        try:
            with _marked(network, features), _evaluating(network), torch.enable_grad():
                output = network(image)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, AssertionError, IndexError) as error:
            errors.append(f"{_format_size(size)}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
            continue
        tensors = [tensor for tensor in _tensors(output) if tensor.ndim == 5 and tensor.grad_fn is not None]
        if not tensors:
            raise ValueError(
                f"expected {type(network).__name__} to give a tensor of shape (b, c, d, h, w) that depends on the "
                f"image, got {type(output).__name__}; attach to the part of it that does."
            )
        final = max(tensors, key=lambda tensor: len(_ancestors(tensor.grad_fn)))  # the one with the most behind it
        reaching = _ancestors(final.grad_fn)
        reached = tuple(feature for feature in features if feature.node in reaching)
        return DecoderStages((), reached, size, final.shape[1]), final.grad_fn
    raise ValueError(
        f"expected {type(network).__name__} to run on a 3D image of {in_channels} channels, got an error at each size "
        f"({'; '.join(errors)}); give a spatial_size that it takes, and the in_channels it was built with."
    )


@contextmanager
def _marked(network: nn.Module, features: list[Feature]) -> Iterator[None]:
    """Mark the output of every module call in the graph, and note it in ``features``."""
    calls: dict[str, int] = {}

    def hook_for(name: str) -> Callable[..., torch.Tensor | None]:
        def mark(module: nn.Module, args: Any, output: Any) -> torch.Tensor | None:
            call = calls[name] = calls.get(name, -1) + 1
            if not (isinstance(output, torch.Tensor) and output.ndim == 5 and output.requires_grad):
                return None
            marked = output.clone()
            features.append(
                Feature(
                    name=f"{name}#{call}" if call else name,
                    channels=output.shape[1],
                    size=tuple(output.shape[2:]),
                    has_parameters=any(True for _ in module.parameters(recurse=False)),
                    node=marked.grad_fn,
                )
            )
            return marked

        return mark

    handles = [module.register_forward_hook(hook_for(name)) for name, module in network.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and afterwards as it was (a frozen one in a network in training, too)."""
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
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)


def _format_size(size: Sequence[int]) -> str:
    return "x".join(map(str, size))
