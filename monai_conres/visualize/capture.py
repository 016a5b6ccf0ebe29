"""The features of a network's decoder, taken from a forward pass by hooks that are removed afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from monai_conres.conresnet import ConResNet
from monai_conres.decoder import ContextResidualModule

__all__ = ["StageFeatures", "capture_features"]


class StageFeatures(NamedTuple):
    """The features at one stage of a decoder: detached copies, ``(b, c, d, h, w)``, on the network's device.

    Attributes:
        features: ``F`` of Eq. 4 of Zhang et al., 2021, the segmentation features before the gate.
        residual: ``O_res`` of Eq. 5, the context residual features; ``None`` without a context residual module.
        gate: ``sigmoid(O_res)`` of Eq. 6, from 0 to 1, so that ``O_seg = F * (1 + gate)``; ``None`` without a gate.
            With ``zero_init`` the gate contains the learned strength and may have any value.
        gated: ``O_seg`` of Eq. 6, what the segmentation decoder goes on with; ``features`` without a gate.

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

    The block gets a list with the features of the last forward pass (of the last window in a sliding window). The list
    stays filled after the block, and the network is unchanged.

    Args:
        network: a :class:`~monai_conres.ConResNet`, a network from :func:`~monai_conres.attach_conres`, or any other
            network together with ``stages``.
        stages: names of the modules whose outputs are the stages, coarse to fine, for a network without context
            residual modules: ``wrapper.stages``, or the stages from :func:`~monai_conres.decoder_stages`. ``"up#1"``
            is the second call of ``"up"`` in a forward pass.

    Raises:
        ValueError: when ``stages`` is missing, not needed or unknown, or when not every stage ran in the block.

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
    found: dict[int, StageFeatures] = {}
    captured: list[StageFeatures] = []
    calls: Counter[int] = Counter()  # of each stage's module in this forward pass

    def hook(number: int, call: int | None) -> Callable[[nn.Module, Any, Any], None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            calls[number] += 1
            if call is None or calls[number] == call + 1:
                with torch.no_grad():
                    found[number] = _stage_features(module, args, output)
                captured[:] = [found[key] for key in sorted(found)]

        return note

    modules = _stage_modules(network, stages)
    handles = [module.register_forward_hook(hook(number, call)) for number, (module, call) in enumerate(modules)]
    handles.append(network.register_forward_pre_hook(lambda module, args: calls.clear()))
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()
    if len(captured) < len(modules):
        raise ValueError(
            f"expected a forward pass in the block that runs {len(modules)} stages, got {len(captured)} of them; call "
            'the network itself, not its compiled form, and network.with_residual(image) for context="mapping".'
        )


def _stage_modules(network: nn.Module, stages: Sequence[str]) -> list[tuple[nn.Module, int | None]]:
    """The module of each stage, coarse to fine, and the number of its call that counts; ``None`` is every call."""
    own: list[nn.Module] = [module for module in network.modules() if isinstance(module, ContextResidualModule)]
    if not own and isinstance(network, ConResNet):
        own = list(network.decoder)
    if own and stages:
        raise ValueError(f"expected no stages for a network of this package, got {list(stages)}; leave them out.")
    if own:
        return [(module, None) for module in own]
    names = dict(network.named_modules())
    parts = [stage.partition("#") for stage in stages]
    if not stages or not all(name in names for name, _, _ in parts):
        raise ValueError(
            f"expected names of modules of {type(network).__name__} as stages, got {list(stages)}; "
            "decoder_stages(network, in_channels) shows them."
        )
    return [(names[name], int(call or 0)) for name, _, call in parts]


def _stage_features(module: nn.Module, args: Any, output: Any) -> StageFeatures:
    """Copies, because the network may change its features in place afterwards."""
    if not isinstance(module, ContextResidualModule):
        features = output.detach().clone()
        return StageFeatures(features, None, None, features)
    features, (gated, residual) = args[0].detach().clone(), output
    if module.context != "attention":
        return StageFeatures(features, residual.detach().clone(), None, features)
    # gated / features - 1 has no value where a feature is zero
    return StageFeatures(features, residual.detach().clone(), module.gate(residual), gated.detach().clone())
