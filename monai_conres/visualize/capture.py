"""What a network's decoder computes, taken from a forward pass by hooks that are gone afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from monai_conres.conresnet import ConResNet
from monai_conres.context import ContextResidualModule

__all__ = ["StageFeatures", "capture_features"]


class StageFeatures(NamedTuple):
    """What happened at one stage of a decoder: detached copies, ``(b, c, d, h, w)``, on the network's device.

    Attributes:
        features: ``F`` of Eq. 4 of Zhang et al., 2021, the segmentation features before the gate.
        residual: ``O_res`` of Eq. 5, the context residual features; ``None`` without a context residual module.
        gate: what the gate adds to each feature, ``O_seg = F * (1 + gate)`` (Eq. 6), from 0 to 1; ``None`` without
            attention. With ``zero_init`` it contains the learned strength, and may have any value.
        gated: ``O_seg`` of Eq. 6, what the segmentation decoder goes on with; without attention the same as
            ``features``.

    Example:
        >>> stage = StageFeatures(torch.ones(1, 8, 4, 6, 5), None, None, torch.ones(1, 8, 4, 6, 5))
        >>> stage.gate is None
        True
    """

    features: torch.Tensor
    residual: torch.Tensor | None
    gate: torch.Tensor | None
    gated: torch.Tensor


@contextmanager
def capture_features(network: nn.Module, *, stages: Sequence[str] = ()) -> Iterator[list[StageFeatures]]:
    """Capture the features of each decoder stage, coarse to fine, in the forward passes of a ``with`` block.

    The list that the block gets holds those of the last forward pass (in a sliding window: of the last window), and
    stays filled afterwards. The network is left as it was, also after an error.

    Args:
        network: a :class:`~monai_conres.ConResNet`, its baseline, a network of :func:`~monai_conres.attach_conres`, or
            any other together with ``stages``.
        stages: names of the modules whose outputs are the stages, coarse to fine, for a network without context
            residual modules: ``wrapper.stages`` of the network with them, or those that
            :func:`~monai_conres.decoder_stages` finds. ``"up#1"`` is the second call of ``"up"`` in a forward pass.

    Raises:
        ValueError: when ``stages`` is missing or superfluous, or names no module.
        RuntimeError: when not every stage ran in the block. In ``eval()`` a network with ``attention=False`` leaves its
            context residual decoder out; ``network.heads(image)`` runs it.

    Example:
        >>> network = ConResNet(1, 2, channels=(8, 16, 32), strides=(2, 2), blocks=(1, 1, 1, 1)).eval()
        >>> with torch.no_grad(), capture_features(network) as stages:
        ...     logits = network(torch.randn(1, 1, 16, 12, 8))
        >>> [tuple(stage.gate.shape) for stage in stages]
        [(1, 8, 8, 6, 4), (1, 8, 16, 12, 8)]
        >>> coarse, fine = stages
        >>> torch.allclose(fine.gated, fine.features * (1 + fine.gate))
        True
    """
    captured: list[StageFeatures] = []
    calls: Counter[int] = Counter()  # of the stages' modules, in this forward pass
    modules = _stage_modules(network, stages)
    hooks = [
        module.register_forward_hook(_note(captured, number, call, calls))
        for number, (module, call) in enumerate(modules)
    ]
    hooks.append(network.register_forward_pre_hook(lambda module, args: calls.clear()))
    try:
        yield captured
    finally:
        for hook in hooks:
            hook.remove()
    if captured and len(captured) < len(modules):
        raise RuntimeError(
            f"expected every stage of {list(stages)} to run in a forward pass, in this order, got {len(captured)} of "
            "them; leave out those that do not."
        )
    if not captured:
        raise RuntimeError(
            "expected a forward pass in the block that runs the stages, got none; capture the network itself, not its "
            "compiled form, and in eval mode without attention call network.heads(image)."
        )


def _stage_modules(network: nn.Module, stages: Sequence[str]) -> list[tuple[nn.Module, int | None]]:
    """The modules to listen to, coarse to fine, and to which of their calls; ``None`` is any."""
    modules: list[nn.Module] = [
        module for module in network.modules() if isinstance(module, ContextResidualModule) and module.mapping
    ]
    if modules and stages:
        raise ValueError(f"expected no stages for a network with context residual modules, got {list(stages)}.")
    if not modules and not stages and isinstance(network, ConResNet):
        modules = list(network.decoder)
    if modules:
        return [(module, None) for module in modules]
    if not stages:
        raise ValueError(
            f"expected stages for {type(network).__name__}, which has no context residual module: the names of the "
            "modules whose outputs to capture, such as [stage.name for stage in decoder_stages(network, c).stages]."
        )
    names = dict(network.named_modules())
    parts = {stage: stage.partition("#") for stage in stages}
    if unknown := [
        stage
        for stage, (name, mark, call) in parts.items()
        if name not in names or (mark and not (call.isascii() and call.isdigit()))
    ]:
        raise ValueError(f"expected names of modules of {type(network).__name__}, got {unknown}; see named_modules().")
    any_call = isinstance(network, ConResNet)  # there is one; its heads() begins a pass, too
    return [(names[name], None if any_call else int(call or 0)) for name, _, call in parts.values()]


def _note(
    captured: list[StageFeatures], number: int, call: int | None, calls: Counter[int]
) -> Callable[[nn.Module, Any, Any], None]:
    """A forward hook that notes stage ``number``, and forgets what a pass before has left from there on."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if torch._C._current_graph_task_id() != -1:
            return  # in the backward pass, activation checkpointing computes it again
        calls[number] += 1
        if call is not None and calls[number] != call + 1:
            return
        with torch.no_grad():
            captured[number:] = [_stage_features(module, args, output)]

    return hook


def _stage_features(module: nn.Module, args: Any, output: Any) -> StageFeatures:
    if not isinstance(module, ContextResidualModule):
        features = _copy(output)
        return StageFeatures(features, None, None, features)
    gated, residual = output
    gate = None
    if module.attention:
        # not gated / features - 1, which has no value where features are zero
        gate = _copy(module.gate(residual if module.expand is None else module.expand(residual)))
    features = _copy(args[0])
    return StageFeatures(features, _copy(residual), gate, features if gate is None else _copy(gated))


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """A network may go on to change its features in place."""
    return tensor.detach().clone()
