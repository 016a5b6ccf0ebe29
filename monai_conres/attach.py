"""A context residual decoder on any 3D encoder-decoder, without a change to the network's own code."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn as nn

from monai_conres.decoder import ConResDecoder, ConResOutput
from monai_conres.layers import DEFAULT_ACT, DEFAULT_NORM, resize_features
from monai_conres.residual import slice_dim
from monai_conres.stages import decoder_stages

__all__ = ["ConResWrapper", "attach_conres"]


def attach_conres(
    network: nn.Module,
    in_channels: int,
    out_channels: int,
    *,
    residual_channels: int | None = None,
    stages: str | Sequence[str] = "auto",
    width: int | None = 32,
    attention: bool = True,
    zero_init: bool = False,
    spatial_axis: int = -1,
    spatial_size: Sequence[int] | None = None,
    norm: str | tuple = DEFAULT_NORM,
    act: str | tuple = DEFAULT_ACT,
) -> ConResWrapper:
    """Attach a context residual decoder to a network: the network keeps its code, its parameters and its outputs.

    The features of the network's own decoder are ``F`` of Eq. 4 of Zhang et al., 2021, at each scale; context residual
    modules run beside it, and the gated features of Eq. 6 flow on inside the network.

    Args:
        network: a 3D encoder-decoder that takes one image. It is used as it is, not copied.
        in_channels: number of channels of the image.
        out_channels: number of channels of the network's output.
        residual_channels: number of residual masks, one per foreground class. ``None`` is ``out_channels``, right for
            channels with a sigmoid each; with softmax it is ``out_channels - 1``.
        stages: names of the modules whose outputs are gated; ``"auto"`` finds them. Print
            :func:`~monai_conres.decoder_stages` of a network to see its candidates.
        width: largest number of channels of the context residual path at any scale; smaller is cheaper. ``None`` is
            that of the network's features.
        attention: False leaves the network's features as they are: the residual masks are learned beside it only.
        zero_init: True attaches to a trained network: its output is exactly what it was, and the gates open in
            training.
        spatial_axis: index of the slice axis among the three spatial axes.
        spatial_size: spatial size of an image that the network takes, to find the stages with; ``None`` tries a few.
        norm: MONAI's name of a normalization layer of the added modules, or ``(name, arguments)``.
        act: MONAI's name of an activation layer of the added modules, or ``(name, arguments)``.

    Returns:
        The network with the decoder attached. In ``train()`` mode it returns a :class:`~monai_conres.ConResOutput`, in
        ``eval()`` mode what the network returns.

    Raises:
        ValueError: when the network has a context residual decoder already, is compiled or distributed, its stages
            cannot be told (the error lists the candidates), or its output has not ``out_channels`` channels.

    Note:
        The last level of MONAI's ``UNet`` is its logits, not features: the finest stage is the one below, and the
        finest residual mask has half the resolution.

    Example:
        >>> from monai.networks.nets import SegResNet
        >>> network = attach_conres(SegResNet(init_filters=8, out_channels=3), 1, 3)
        >>> network.stages
        ('up_layers.0', 'up_layers.1', 'up_layers.2')
        >>> segmentation, residuals = network(torch.randn(1, 1, 16, 24, 32))
        >>> [tuple(logits.shape) for logits in residuals]
        [(1, 3, 16, 24, 32), (1, 3, 8, 12, 16), (1, 3, 4, 6, 8)]
        >>> network.eval()(torch.randn(1, 1, 16, 24, 32)).shape
        torch.Size([1, 3, 16, 24, 32])
    """
    slice_dim(5, spatial_axis)
    if isinstance(network, ConResWrapper) or _attached_hooks(network):
        raise ValueError(
            f"expected a plain network, got a {type(network).__name__} that has a context residual decoder already; "
            "call unwrap() of the wrapper it belongs to first, or build a new network."
        )
    if type(network).__module__.startswith(f"{__package__}."):
        raise ValueError(
            f"expected another network than this package's own, got a {type(network).__name__}, which has its context "
            "residual decoder inside (mapping=True, attention=True)."
        )
    if hasattr(network, "_orig_mod"):
        raise ValueError("expected a network, got what torch.compile made of one; attach first, then compile.")
    if isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ValueError(
            f"expected a network, got one inside of {type(network).__name__}, which would not see to the gradients of "
            "the decoder; attach first, then put the result into DistributedDataParallel."
        )
    found = decoder_stages(network, in_channels, stages=stages, spatial_size=spatial_size)
    if found.out_channels != out_channels:
        raise ValueError(
            f"expected out_channels={found.out_channels}, what {type(network).__name__} gives, got {out_channels}."
        )
    decoder = ConResDecoder(
        in_channels,
        [stage.channels for stage in found.stages],
        out_channels if residual_channels is None else residual_channels,
        width=width,
        attention=attention,
        zero_init=zero_init,
        spatial_axis=spatial_axis,
        norm=norm,
        act=act,
    )
    like = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
    decoder.to(device=like.device, dtype=like.dtype).train(network.training)
    return ConResWrapper(network, decoder, [stage.name for stage in found.stages])


@dataclass
class _Pass:
    """What one forward pass has seen so far."""

    image: torch.Tensor
    residuals: list[torch.Tensor] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)


class ConResWrapper(nn.Module):
    """A network and the context residual decoder attached to it; :func:`attach_conres` makes it.

    Attributes:
        backbone: the network itself, its ``state_dict`` as it was. Called by itself it gives what it always gave.
        decoder: the :class:`~monai_conres.ConResDecoder`.
        stages: names of the backbone's modules whose outputs are gated, coarse to fine.
        eval_residual: True makes ``eval()`` return ``(segmentation, residual)``, both at the image's resolution, so
            that sliding-window inference stitches both.

    Example:
        >>> from monai.networks.nets import BasicUNet
        >>> backbone = BasicUNet(out_channels=2, features=(8, 8, 16, 32, 64, 8)).eval()
        >>> image = torch.randn(1, 1, 32, 32, 32)
        >>> before = backbone(image)
        >>> network = attach_conres(backbone, 1, 2, zero_init=True, spatial_size=(32, 32, 32))
        >>> torch.equal(network(image), before)
        True
        >>> network.unwrap() is backbone
        True
    """

    def __init__(self, backbone: nn.Module, decoder: ConResDecoder, stages: Sequence[str]) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder
        self.stages = tuple(stages)
        self.eval_residual = False
        self._attached = True
        self._passes: dict[int, _Pass] = {}  # by thread, empty between forward passes
        modules = sorted({stage.partition("#")[0] for stage in self.stages})
        self._handles = [
            backbone.get_submodule(name).register_forward_hook(partial(self._gate, name)) for name in modules
        ]
        self.training = backbone.training  # not train(): parts of the backbone may be frozen in eval mode

    @property
    def conres_settings(self) -> dict[str, Any]:
        """What the weights do not tell of the attached decoder, although it changes what they compute."""
        return {"stages": list(self.stages), **self.decoder.conres_settings}

    def forward(self, image: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Segment ``image``; further arguments go to the backbone. See :func:`attach_conres` for what is returned."""
        if self.training:
            return self.heads(image, *args, **kwargs)
        if not self.eval_residual:
            if not self.decoder.attention:  # nothing of the residual path reaches the segmentation
                self._prepare()
                return self.backbone(image, *args, **kwargs)
            return self._run(image, *args, **kwargs)[0]
        segmentation, residuals = self.heads(image, *args, **kwargs)
        if isinstance(segmentation, (list, tuple)):  # BasicUNetPlusPlus gives a list of one in eval() mode, too
            if len(segmentation) != 1:
                raise ValueError(
                    f"expected one segmentation together with eval_residual=True, got {len(segmentation)} of "
                    f"{type(self.backbone).__name__}; switch its deep supervision off for inference."
                )
            segmentation = segmentation[0]
        return segmentation, resize_features(residuals[0], image.shape[2:])

    def heads(self, image: torch.Tensor, *args: Any, **kwargs: Any) -> ConResOutput:
        """All outputs in either mode: the backbone's, and logits of the residual masks, fine to coarse."""
        segmentation, residuals = self._run(image, *args, **kwargs)
        return ConResOutput(segmentation, self.decoder.predict(residuals))

    def unwrap(self) -> nn.Module:
        """Take the decoder off and return the backbone, the plain network that it was, with the parameters it has now.

        The wrapper cannot be used afterwards.
        """
        for handle in self._handles:
            handle.remove()
        self._attached = False
        return self.backbone

    def _run(self, image: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, list[torch.Tensor]]:
        """The backbone's output and the context residual features, coarse to fine."""
        self._prepare()
        thread = _thread()
        current = self._passes[thread] = _Pass(image)
        try:
            segmentation = self.backbone(image, *args, **kwargs)
        finally:
            del self._passes[thread]
        if len(current.residuals) != len(self.stages):
            raise RuntimeError(
                f"expected every stage of {self.stages} to run in a forward pass, in this order, got "
                f"{len(current.residuals)} of them; attach with stages=[...] that always run, and compile the "
                "wrapper, not its backbone or parts of it."
            )
        return segmentation, current.residuals

    def _prepare(self) -> None:
        if not self._attached:
            raise RuntimeError("expected a wrapper with its backbone; unwrap() took the decoder off: attach it anew.")
        if getattr(self, "_is_replica", False):
            raise RuntimeError("nn.DataParallel copies a network without its hooks; use DistributedDataParallel.")
        if (deep_supervision := getattr(self.decoder, "deep_supervision", None)) is not None:
            # nnU-Net's trainer sets network.decoder's
            self.backbone.get_submodule("decoder").deep_supervision = deep_supervision

    def _gate(self, name: str, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        """Forward hook of the backbone's stages: the features that the backbone goes on with."""
        current = self._passes.get(_thread())
        if current is None:
            if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
                raise RuntimeError(
                    f"{name!r} is computed again in the backward pass, by activation checkpointing inside of the "
                    "backbone; checkpoint the whole wrapper instead: torch.utils.checkpoint.checkpoint(wrapper, image, "
                    "use_reentrant=False)."
                )
            return None  # the backbone is called by itself
        call = current.calls[name] = current.calls.get(name, -1) + 1
        stage = len(current.residuals)
        if self.stages[stage : stage + 1] != (f"{name}#{call}" if call else name,):
            return None  # another call of the same module
        previous = current.residuals[-1] if current.residuals else current.image
        features, residual = self.decoder.step(stage, output, previous)
        current.residuals.append(residual)
        if not self.decoder.attention and torch.is_grad_enabled():
            return features.clone()  # they are kept for the backward pass, and the backbone may work on them in place
        return features


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _attached_hooks(network: nn.Module) -> bool:
    hooks = (hook for module in network.modules() for hook in module._forward_hooks.values())
    return any(
        isinstance(hook, partial) and getattr(hook.func, "__func__", None) is ConResWrapper._gate for hook in hooks
    )
