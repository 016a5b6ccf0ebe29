"""A context residual decoder on any 3D encoder-decoder, without a change to the network's own code."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from monai.networks.nets import BasicUNetPlusPlus

from monai_conres.decoder import ConResDecoder, ConResOutput
from monai_conres.layers import DEFAULT_ACT, DEFAULT_NORM
from monai_conres.operations import resize_features, without_metadata
from monai_conres.renamed import OldAttribute, refuse_old_arguments
from monai_conres.stages import decoder_stages

__all__ = ["ConResWrapper", "attach_conres"]

_MARK = "has_context_residual_decoder"  # attribute of a backbone that has a decoder attached


@refuse_old_arguments
def attach_conres(
    network: nn.Module,
    in_channels: int,
    *,
    include_background: bool = True,
    stages: str | Sequence[str] = "auto",
    width: int | None = 32,
    context: str = "attention",
    zero_init: bool = False,
    spatial_axis: int = -1,
    spatial_size: Sequence[int] | None = None,
    norm: str | tuple = DEFAULT_NORM,
    act: str | tuple = DEFAULT_ACT,
) -> ConResWrapper:
    """Attach a context residual decoder to a network. The network keeps its code and its parameters.

    The features of the network's own decoder are ``F`` of Eq. 4 of Zhang et al., 2021, at each scale. Context residual
    modules run next to that decoder, and the gated features of Eq. 6 flow on inside the network. The function runs the
    network once to find these features and the number of output channels.

    Args:
        network: a 3D encoder-decoder that takes one image. The wrapper holds this network, not a copy.
        in_channels: number of channels of the image.
        include_background: True predicts a residual mask for each output channel, for networks with a sigmoid for each
            channel. False predicts none for channel 0, the background, for networks with a softmax.
        stages: names of the modules whose outputs are gated. ``"auto"`` finds them; print
            :func:`~monai_conres.decoder_stages` of a network to see the candidates.
        width: largest number of channels of the context residual path at any scale; fewer are cheaper. ``None`` is
            the number of channels of the network's features.
        context: ``"attention"`` gates the network's features. ``"mapping"`` leaves them unchanged and only learns the
            residual masks.
        zero_init: True is for a trained network: its output does not change until training opens the gates.
        spatial_axis: index of the slice axis among the three spatial axes.
        spatial_size: spatial size of an image that the network takes; ``None`` tries a few sizes.
        norm: MONAI's name of a normalization layer of the decoder, or ``(name, arguments)``.
        act: MONAI's name of an activation layer of the decoder, or ``(name, arguments)``.

    Returns:
        The network with the decoder. In ``train()`` mode it returns a :class:`~monai_conres.ConResOutput`, in
        ``eval()`` mode what the plain network returns.

    Raises:
        ValueError: when the network already has a context residual decoder, is compiled or distributed, has one output
            channel with ``include_background=False``, or its stages are not found (the error lists the candidates).

    Note:
        The last level of MONAI's ``UNet`` gives its logits, not features. The finest stage is the level below, and the
        finest residual mask has half the resolution.

    Example:
        >>> from monai.networks.nets import SegResNet
        >>> network = attach_conres(SegResNet(init_filters=8, out_channels=3), in_channels=1, include_background=False)
        >>> network.stages
        ('up_layers.0', 'up_layers.1', 'up_layers.2')
        >>> image = torch.randn(1, 1, 16, 24, 32)
        >>> segmentation, residuals = network(image)
        >>> [tuple(logits.shape) for logits in residuals]
        [(1, 2, 16, 24, 32), (1, 2, 8, 12, 16), (1, 2, 4, 6, 8)]
        >>> network.eval()(image).shape
        torch.Size([1, 3, 16, 24, 32])
        >>> [tuple(logits.shape) for logits in network.with_residual(image)]
        [(1, 3, 16, 24, 32), (1, 2, 16, 24, 32)]
    """
    name = type(network).__name__
    if any(hasattr(module, _MARK) for module in network.modules()):
        raise ValueError(
            f"expected a plain network, got a {name} that already has a context residual decoder; call unwrap() of its "
            "wrapper first (for a copy: copy.deepcopy(wrapper).unwrap()), or build a new network."
        )
    if type(network).__module__.startswith(f"{__package__}."):
        raise ValueError(f"expected a network of another package, got a {name}, which has its own residual decoder.")
    if name == "OptimizedModule":
        raise ValueError("expected a plain network, got a network from torch.compile; attach first, then compile.")
    if isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ValueError(f"expected a plain network, got one inside {name}; attach first, then wrap the result.")
    if context == "none":
        raise ValueError(
            'expected context "attention" or "mapping", got "none"; use the network itself, without attach_conres.'
        )
    found = decoder_stages(network, in_channels, stages=stages, spatial_size=spatial_size)
    if found.out_channels == 1 and not include_background:
        raise ValueError(
            f"expected 2 or more output channels with include_background=False, got 1 from {name}; leave "
            "include_background=True for channels with a sigmoid each."
        )
    decoder = ConResDecoder(
        in_channels,
        [stage.channels for stage in found.stages],
        found.out_channels - (not include_background),
        width=width,
        context=context,
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

    wrapper: ConResWrapper
    image: torch.Tensor
    with_gradients: bool
    residuals: list[torch.Tensor] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)


class ConResWrapper(nn.Module):
    """A network and the context residual decoder attached to it. :func:`attach_conres` builds it.

    Args:
        backbone: the network, whose stages get forward hooks.
        decoder: a :class:`~monai_conres.ConResDecoder` with the channels of the stages.
        stages: names of the backbone's modules whose outputs are gated, coarse to fine.

    Attributes:
        backbone: the network itself, with its own ``state_dict``. A direct call returns what the plain network returns.
        decoder: the context residual decoder.
        stages: names of the gated modules, coarse to fine.

    Example:
        >>> from monai.networks.nets import BasicUNet
        >>> backbone = BasicUNet(out_channels=2, features=(8, 8, 16, 32, 64, 8)).eval()
        >>> image = torch.randn(1, 1, 32, 32, 32)
        >>> before = backbone(image)
        >>> network = attach_conres(backbone, in_channels=1, zero_init=True, spatial_size=(32, 32, 32))
        >>> torch.equal(network(image), before)
        True
        >>> network.unwrap() is backbone
        True
    """

    eval_residual = OldAttribute("ConResWrapper.eval_residual")

    def __init__(self, backbone: nn.Module, decoder: ConResDecoder, stages: Sequence[str]) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder
        self.stages = tuple(stages)
        self._passes: dict[int, _Pass] = {}  # by thread, empty between forward passes
        modules = sorted({stage.partition("#")[0] for stage in self.stages})
        self._handles = [
            backbone.get_submodule(name).register_forward_hook(partial(self._gate, name)) for name in modules
        ]
        self._attached = True
        setattr(backbone, _MARK, True)
        self.training = backbone.training  # not train(), because parts of the backbone may be frozen in eval mode

    @without_metadata
    def forward(self, image: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Segment ``image``; other arguments go to the backbone. :func:`attach_conres` says what each mode returns."""
        if self.training:
            return self.heads(image, *args, **kwargs)
        if self.decoder.context == "mapping" and self._attached:  # the residual path does not change the segmentation
            return self.backbone(image, *args, **kwargs)
        return self._run(image, *args, **kwargs)[0]

    @without_metadata
    def heads(self, image: torch.Tensor, *args: Any, **kwargs: Any) -> ConResOutput:
        """All outputs in either mode: the backbone's output, and logits of the residual masks, fine to coarse."""
        segmentation, residuals = self._run(image, *args, **kwargs)
        return ConResOutput(segmentation, self.decoder.predict(residuals))

    @without_metadata
    def with_residual(self, image: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the segmentation and of its residual mask at the resolution of the image, in either mode.

        An inferer stitches both: ``SlidingWindowInferer(roi_size)(image, network.with_residual)``. Dropout and batch
        statistics follow the mode, which does not change. With deep supervision the segmentation is the output at full
        resolution: the first of DynUNet's stack, the last of BasicUNetPlusPlus.

        Args:
            image: ``(b, in_channels, d, h, w)``; other arguments go to the backbone.

        Returns:
            Segmentation ``(b, c, d, h, w)``, and residual ``(b, r, d, h, w)`` with ``r = c``, or ``r = c - 1`` with
            ``include_background=False``.

        Raises:
            ValueError: when the backbone does not give exactly one tensor at the resolution of the image.
        """
        output, residuals = self.heads(image, *args, **kwargs)
        if isinstance(output, torch.Tensor) and output.ndim == image.ndim + 1:
            output = output[:, 0]
        outputs = list(output) if isinstance(output, (list, tuple)) else [output]
        full = [o for o in outputs if isinstance(o, torch.Tensor) and o.shape[2:] == image.shape[2:]]
        if isinstance(self.backbone, BasicUNetPlusPlus):
            full = full[-1:]
        if len(full) != 1:
            raise ValueError(
                f"expected one segmentation at the image's resolution, got {len(full)} in the {type(output).__name__} "
                f"from {type(self.backbone).__name__}; call heads(image), which returns all outputs, and choose."
            )
        return full[0], resize_features(residuals[0], image.shape[2:])

    def unwrap(self) -> nn.Module:
        """Remove the decoder and return the backbone, a plain network with its present parameters.

        Afterwards the wrapper only raises errors.
        """
        for handle in self._handles:
            handle.remove()
        if self._attached:
            delattr(self.backbone, _MARK)
        self._attached = False
        return self.backbone

    def _run(self, image: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, list[torch.Tensor]]:
        """The backbone's output and the context residual features, coarse to fine."""
        if not self._attached:
            raise RuntimeError("expected a wrapper with its decoder, got one after unwrap(); attach a decoder again.")
        thread = _thread()
        current = self._passes[thread] = _Pass(self, image, torch.is_grad_enabled())
        try:
            segmentation = self.backbone(image, *args, **kwargs)
        finally:
            del self._passes[thread]
        if len(current.residuals) != len(self.stages):
            raise RuntimeError(
                f"expected every stage of {self.stages} to run in this order, got {len(current.residuals)} of them; "
                "name stages=[...] that always run, and compile the whole wrapper, not parts of the backbone."
            )
        return segmentation, current.residuals

    def _gate(self, name: str, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        """Forward hook of the backbone's stages: the features that the backbone goes on with."""
        current = self._passes.get(_thread())
        if current is None:
            return None  # somebody calls the backbone directly
        if current.wrapper is not self and not torch.compiler.is_compiling():  # torch.export also copies it
            raise RuntimeError("expected the wrapper, got a copy of it by DataParallel; use DistributedDataParallel.")
        if current.with_gradients and not torch.is_grad_enabled():
            raise RuntimeError(
                f"expected gradients in {name!r}, got none, as with reentrant activation checkpointing inside the "
                "backbone; use torch.utils.checkpoint.checkpoint(wrapper, image, use_reentrant=False) instead."
            )
        call = current.calls[name] = current.calls.get(name, -1) + 1
        stage = len(current.residuals)
        if self.stages[stage : stage + 1] != (f"{name}#{call}" if call else name,):
            return None  # another call of the same module
        _check_size(name, output, current.image)
        previous = current.residuals[-1] if current.residuals else current.image
        features, residual = self.decoder.step(stage, output, previous)
        current.residuals.append(residual)
        # without the gate, the backward pass needs these features, and the backbone may change them in place
        return features if self.decoder.context == "attention" else features.clone()


def _check_size(name: str, features: torch.Tensor, image: torch.Tensor) -> None:
    """Raise if a stage has more voxels along an axis than the image: then its voxels are not those of the image."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    if any(size > whole for size, whole in zip(features.shape[2:], image.shape[2:], strict=True)):
        raise ValueError(
            f"expected features of at most the image's size {tuple(image.shape[2:])}, got {tuple(features.shape[2:])} "
            f"from {name!r}, as in a network that pads its image; pad the image before the network, for example with "
            "DivisiblePadd."
        )


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
