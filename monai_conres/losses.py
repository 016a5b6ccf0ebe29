"""Losses: context residual learning (Eq. 8 and 9), the joint loss, and the schedule of a boundary loss (Eq. 14)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.losses import DeepSupervisionLoss, DiceCELoss, DiceLoss
from monai.networks import one_hot
from monai.utils import convert_to_tensor

from monai_conres.residual import check_values, foreground_masks, residual_mask, slice_dim

__all__ = ["CompoundBoundaryLoss", "ConResLoss", "ContextResidualLoss"]


class ContextResidualLoss(nn.Module):
    """Loss of the predicted residual masks: weighted binary cross entropy at every scale.

    Eq. 8 of Zhang et al., 2021, for one scale, with ``w_k = log(V / V_k)`` for a residual mask of ``V`` voxels of which
    ``V_k`` have the value ``k``, counted for each channel over the batch; Eq. 9 adds the scales up: the finest with
    weight 1, the others with ``deep_supervision_weight``. The targets are made from the label, on its device and
    without waiting for it: for each scale, the residual mask of the label resized to that scale.

    Args:
        spatial_axis: index of the slice axis among the spatial axes, the same as the network's.
        include_background: False leaves out channel 0 of a one-hot label.
        to_onehot_y: True for a label of class indices ``(b, 1, *spatial)``; class 0 is the background and has no
            residual.
        deep_supervision_weight: weight of each coarser scale (the paper's lambda).
        background_weight: ``w_0``; ``None`` is the paper's ``log(V / V_0)``.

    Shape:
        ``residuals``: logits, fine to coarse, each ``(b, r, *spatial)`` at its own resolution, or one tensor.
        ``label``: ``(b, r, *spatial)`` of zeros and ones, ``(b, r + 1, *spatial)`` without ``include_background``, or
        ``(b, 1, *spatial)`` with ``to_onehot_y``. The result is a scalar in float32 or wider.

    Raises:
        ValueError: when shapes do not fit each other, or on label values that are no classes (on the CPU only).

    Note:
        The cross entropy is the mean over voxels where the paper has the sum. The paper's ``w_0`` is about 0.005 for
        a tumor, which leaves voxels outside the residual nearly without gradient; its released code has 1, the
        default here. That code scores every scale against the full-resolution mask of one-slice steps; here the target
        of each scale is the residual at that scale.

    Example:
        >>> label = torch.zeros(1, 1, 2, 2, 4)
        >>> label[..., 2:] = 1  # 4 of 16 voxels differ from the slice before them
        >>> loss = ContextResidualLoss()([torch.zeros(1, 1, 2, 2, 4)], label)
        >>> expected = torch.tensor(2.0).log() * (4 * torch.tensor(4.0).log() + 12) / 16
        >>> bool(torch.isclose(loss, expected))
        True
    """

    def __init__(
        self,
        *,
        spatial_axis: int = -1,
        include_background: bool = True,
        to_onehot_y: bool = False,
        deep_supervision_weight: float = 0.5,
        background_weight: float | None = 1.0,
    ) -> None:
        super().__init__()
        if to_onehot_y and not include_background:
            raise ValueError(
                "expected one of to_onehot_y=True and include_background=False, got both: class indices always leave "
                "the background out."
            )
        self.spatial_axis = spatial_axis
        self.include_background = include_background
        self.to_onehot_y = to_onehot_y
        self.deep_supervision_weight = deep_supervision_weight
        self.background_weight = background_weight

    def forward(self, residuals: torch.Tensor | Sequence[torch.Tensor], label: torch.Tensor) -> torch.Tensor:
        """Loss of ``residuals`` against the residual masks of ``label``."""
        heads = [residuals] if isinstance(residuals, torch.Tensor) else list(residuals)
        if not heads:
            raise ValueError(
                "expected logits of residual masks, got none: this network predicts no residual (mapping=False)."
            )
        label = convert_to_tensor(label, track_meta=False)
        slice_dim(label.ndim, self.spatial_axis)
        num_classes = heads[0].shape[1] + 1 if self.to_onehot_y else None
        masks = foreground_masks(label, num_classes=num_classes, include_background=self.include_background)
        for logits in heads:
            if logits.ndim != masks.ndim or logits.shape[:2] != masks.shape[:2]:
                raise ValueError(
                    f"expected residual logits of batch and channels {tuple(masks.shape[:2])}, one channel for each "
                    f"foreground class of the label of shape {tuple(label.shape)}, got shape {tuple(logits.shape)}; "
                    "build the network with residual_channels equal to the number of foreground classes."
                )
            if any(head > full for head, full in zip(logits.shape[2:], label.shape[2:], strict=True)):
                raise ValueError(
                    f"expected residual logits no larger than the label of shape {tuple(label.shape)}, got "
                    f"{tuple(logits.shape)}; give the label of the same image."
                )
        masks = masks.bool()
        losses = [self._cross_entropy(convert_to_tensor(logits, track_meta=False), masks) for logits in heads]
        return losses[0] + self.deep_supervision_weight * sum(losses[1:])

    def _cross_entropy(self, logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Eq. 8 for one scale."""
        if masks.shape[2:] != logits.shape[2:]:
            masks = F.interpolate(masks.to(torch.float32), size=logits.shape[2:], mode="nearest-exact") > 0.5
        target = self._target(masks)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        voxels = target[:, :1].numel()
        others = [dim for dim in range(target.ndim) if dim != 1]
        changed = target.sum(others, keepdim=True).to(logits.dtype)
        weight_1 = (voxels / changed.clamp(min=1)).log()
        if self.background_weight is None:
            weight_0 = (voxels / (voxels - changed)).log()
        else:
            weight_0 = torch.full_like(weight_1, self.background_weight)
        return F.binary_cross_entropy_with_logits(
            logits, target.to(logits.dtype), weight=torch.where(target, weight_1, weight_0)
        )

    def _target(self, masks: torch.Tensor) -> torch.Tensor:
        """What the logits of one scale are to predict: booleans of the shape of ``masks``."""
        return residual_mask(masks, spatial_axis=self.spatial_axis)


class ConResLoss(nn.Module):
    """Joint loss of segmentation and residual masks: ``segmentation loss + residual_weight * residual loss``.

    It takes what a network of this package returns: in training a :class:`~monai_conres.ConResOutput`; of a plain
    tensor, as in validation, or of a network without residuals it is the segmentation loss alone.

    ================================  ================================  ======================  ===================
    flags                             label                             segmentation            residuals
    ================================  ================================  ======================  ===================
    ``sigmoid``                       zeros and ones, ``c`` channels    ``c`` channels          ``c`` channels
    ``softmax``                       one-hot, ``c`` channels           ``c``, background is 0  ``c - 1`` channels
    ``sigmoid, to_onehot_y``          class indices, 1 channel          ``c``, background is 0  ``c - 1`` channels
    ``softmax, to_onehot_y``          class indices, 1 channel          ``c``, background is 0  ``c - 1`` channels
    ================================  ================================  ======================  ===================

    Args:
        segmentation_loss: any loss of ``(logits, label)``. ``None`` is Eq. 7 of Zhang et al., 2021: binary cross
            entropy and Dice loss (cross entropy with ``softmax``).
        sigmoid: True for channels with a sigmoid each.
        softmax: True for channels that share a softmax.
        to_onehot_y: True for a label of class indices.
        residual_weight: weight of the residual loss.
        spatial_axis: index of the slice axis among the spatial axes, the same as the network's.
        deep_supervision_weight: see :class:`ContextResidualLoss`.
        background_weight: see :class:`ContextResidualLoss`.

    Shape:
        ``output``: a :class:`~monai_conres.ConResOutput` or logits ``(b, c, *spatial)``; ``label``: see above. The
        result is a scalar.

    Raises:
        ValueError: when the flags contradict each other, or shapes or label values do not fit them.
        TypeError: when the segmentation is a network's deep supervision output, and ``segmentation_loss`` is ``None``.

    Note:
        Of deep supervision outputs the first is taken to be the final one when shapes are checked. A stacked tensor
        ``(b, n, c, *spatial)``, as of MONAI's ``DynUNet``, is given to ``segmentation_loss`` as a list of ``n``.

        MONAI's ``DiceCELoss(sigmoid=True)`` has a softmax in its cross entropy when there are several channels; the
        default here has a binary cross entropy for each.

    Example:
        >>> from monai_conres import ConResNet
        >>> network = ConResNet(1, 3, channels=(8, 16), strides=(2,), blocks=(1, 1, 1))
        >>> label = torch.randint(0, 2, (1, 3, 8, 12, 6))
        >>> loss = ConResLoss(sigmoid=True)(network(torch.randn(1, 1, 8, 12, 6)), label)
        >>> loss.backward()
    """

    def __init__(
        self,
        segmentation_loss: Callable[[Any, torch.Tensor], torch.Tensor] | None = None,
        *,
        sigmoid: bool = False,
        softmax: bool = False,
        to_onehot_y: bool = False,
        residual_weight: float = 1.0,
        spatial_axis: int = -1,
        deep_supervision_weight: float = 0.5,
        background_weight: float | None = 1.0,
    ) -> None:
        super().__init__()
        if sigmoid == softmax:
            raise ValueError(
                f"expected exactly one of sigmoid=True (a sigmoid for each channel) and softmax=True (channel 0 is the "
                f"background), got sigmoid={sigmoid} and softmax={softmax}."
            )
        if isinstance(segmentation_loss, nn.Module):
            other = "softmax" if sigmoid else "sigmoid"
            softmax_only = isinstance(segmentation_loss, nn.CrossEntropyLoss)
            if (sigmoid and softmax_only) or any(
                getattr(module, name, False) is True
                for module in segmentation_loss.modules()
                for name in (other, f"use_{other}")
            ):
                raise ValueError(
                    f"expected a segmentation loss with {'sigmoid' if sigmoid else 'softmax'}=True, as the flags here, "
                    f"got {type(segmentation_loss).__name__} with {other}=True; give both the same."
                )
        self.softmax = softmax
        self.to_onehot_y = to_onehot_y
        self.residual_weight = residual_weight
        self.is_default = segmentation_loss is None
        if segmentation_loss is None:
            softmax_loss = DiceCELoss(softmax=True, to_onehot_y=to_onehot_y)
            segmentation_loss = softmax_loss if softmax else _BinaryDiceCELoss(to_onehot_y)
        self.segmentation_loss = segmentation_loss
        self.residual_loss = ContextResidualLoss(
            spatial_axis=spatial_axis,
            include_background=not softmax or to_onehot_y,
            to_onehot_y=to_onehot_y,
            deep_supervision_weight=deep_supervision_weight,
            background_weight=background_weight,
        )

    def forward(self, output: Any, label: torch.Tensor) -> torch.Tensor:
        """Loss of a network's ``output`` against ``label``."""
        nested = output[1] if type(output) is tuple and len(output) == 2 and type(output[1]) is tuple else ()
        if nested and torch.is_grad_enabled() and not any(getattr(part, "requires_grad", True) for part in nested):
            raise TypeError(
                "expected a ConResOutput, got a plain tuple of a segmentation and residuals without gradients; "
                "torch.utils.checkpoint makes one unless it is called with use_reentrant=False."
            )
        segmentation, residuals = output if hasattr(output, "residuals") else (output, ())
        label = convert_to_tensor(label, track_meta=False)
        segmentation = _unstacked(convert_to_tensor(segmentation, track_meta=False), label)
        if type(output) is tuple and [getattr(part, "shape", ())[2:] for part in output] == [label.shape[2:]] * 2:
            raise TypeError(
                "expected logits or a ConResOutput, got two tensors of the label's size, as a network gives in eval() "
                "mode with eval_residual=True; give the first of them alone."
            )
        final = segmentation
        if not isinstance(segmentation, torch.Tensor):
            heads = segmentation.values() if isinstance(segmentation, Mapping) else segmentation
            final = next(iter(heads), None)
        if isinstance(final, torch.Tensor):
            self._check(final, residuals, label)
        if self.is_default:
            if not isinstance(segmentation, torch.Tensor):
                raise TypeError(
                    f"expected logits of shape (b, c, *spatial), got a {type(segmentation).__name__} of "
                    f"{len(segmentation)} tensors; for a network with deep supervision pass the loss that it is "
                    "trained with, for example ConResLoss(DeepSupervisionLoss(DiceCELoss(...)), ...)."
                )
            segmentation = segmentation.to(torch.promote_types(segmentation.dtype, torch.float32))
        loss = self.segmentation_loss(segmentation, label)
        if len(residuals) == 0:
            return loss
        return loss + self.residual_weight * self.residual_loss(residuals, label)

    def _check(self, segmentation: torch.Tensor, residuals: Sequence[torch.Tensor], label: torch.Tensor) -> None:
        """Raise unless segmentation, residuals and label belong together, and the label's values fit them."""
        batch, classes, *size = segmentation.shape
        if classes < 2 and (self.softmax or self.to_onehot_y):
            raise ValueError(
                f"expected 2 or more channels, the background among them, with softmax or to_onehot_y, got logits of "
                f"shape {tuple(segmentation.shape)}; one channel goes with sigmoid=True and a label of zeros and ones."
            )
        expected = (batch, 1 if self.to_onehot_y else classes, *size)
        if tuple(label.shape) != expected:
            if label.ndim == segmentation.ndim - 1:
                remedy = "a label without a channel needs one: label[:, None]"
            elif label.ndim == segmentation.ndim and label.shape[1] == 1 < classes and not self.to_onehot_y:
                remedy = "class indices in one channel need to_onehot_y=True"
            elif label.ndim == segmentation.ndim and label.shape[1] == classes > 1 and self.to_onehot_y:
                remedy = "a one-hot label goes without to_onehot_y"
            else:
                remedy = "give the label of the same image, and build the network with as many channels"
            raise ValueError(
                f"expected a label of shape {expected} for logits of shape {tuple(segmentation.shape)}, got "
                f"{tuple(label.shape)}; {remedy}."
            )
        foreground = classes - 1 if self.softmax or self.to_onehot_y else classes
        if len(residuals) and residuals[0].shape[1] != foreground:
            raise ValueError(
                f"expected {foreground} residual channels for {classes} segmentation channels, got "
                f"{residuals[0].shape[1]}; build the network with residual_channels={foreground}"
                f"{' (out_channels - 1: the background has no residual).' if foreground < classes else '.'}"
            )
        if self.to_onehot_y:
            check_values(label, classes, f"class indices from 0 to {classes - 1}")
        else:
            check_values(label, 2, "zeros and ones")


class CompoundBoundaryLoss(nn.Module):
    """A loss and a boundary loss, from the one towards the other over training: Eq. 14 of Zhang et al., 2021.

    ``alpha * loss + (1 - alpha) * boundary_loss`` with ``alpha = 1 - t * (1 - final_alpha) / max_steps``. Call
    :meth:`step` once after each iteration; ``t`` is part of the ``state_dict``, so that resumed training goes on
    where it was. With MONAI's engines: ``trainer.add_event_handler(Events.ITERATION_COMPLETED,
    loss.step)``.

    Args:
        loss: a loss of ``(output, label)``, such as :class:`ConResLoss`.
        boundary_loss: a loss of ``(logits, label)``, such as ``monai.losses.BoundaryLoss(sigmoid=True)`` with the same
            flags; it sees the segmentation alone. Of deep supervision outputs it sees the first, unless it is a
            ``monai.losses.DeepSupervisionLoss``.
        max_steps: number of iterations after which ``alpha`` stays at ``final_alpha``.
        final_alpha: weight of ``loss`` at the end.

    Raises:
        ValueError: when ``max_steps`` is not positive or ``final_alpha`` is outside [0, 1].
        TypeError: when the segmentation is a dictionary.

    Note:
        MONAI's ``BoundaryLoss`` computes distance maps of the label with scipy, or on a GPU with cupy and cucim, where
        both are installed. It waits for the device at every call, and with scipy for some seconds.

    Example:
        >>> loss = CompoundBoundaryLoss(nn.MSELoss(), nn.L1Loss(), max_steps=10)
        >>> prediction, label = torch.full((1, 1, 2, 2, 2), 3.0), torch.zeros(1, 1, 2, 2, 2)
        >>> loss(prediction, label)  # 9 alone
        tensor(9.)
        >>> for _ in range(10):
        ...     loss.step()
        >>> loss(prediction, label)  # 0.01 * 9 + 0.99 * 3
        tensor(3.0600)
    """

    steps: torch.Tensor

    def __init__(self, loss: nn.Module, boundary_loss: nn.Module, *, max_steps: int, final_alpha: float = 0.01) -> None:
        super().__init__()
        if max_steps < 1 or not 0 <= final_alpha <= 1:
            raise ValueError(
                f"expected max_steps of 1 or more and final_alpha in [0, 1], got {max_steps} and {final_alpha}."
            )
        self.loss = loss
        self.boundary_loss = boundary_loss
        self.max_steps = max_steps
        self.final_alpha = final_alpha
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @property
    def alpha(self) -> torch.Tensor:
        """Present weight of ``loss``, a scalar tensor."""
        return 1 - self.steps.clamp(max=self.max_steps) * ((1 - self.final_alpha) / self.max_steps)

    def step(self) -> None:
        """Count one iteration."""
        self.steps += 1

    def forward(self, output: Any, label: torch.Tensor) -> torch.Tensor:
        """Compound loss of a network's ``output`` against ``label``."""
        segmentation = _unstacked(output.segmentation if hasattr(output, "residuals") else output, label)
        if isinstance(segmentation, (list, tuple)) and not isinstance(self.boundary_loss, DeepSupervisionLoss):
            segmentation = segmentation[0]
        if isinstance(segmentation, Mapping):
            raise TypeError(
                f"expected logits, or a list of them, got a dictionary of {list(segmentation)}; give "
                "a boundary_loss to a network that returns its logits alone."
            )
        alpha = self.alpha
        return alpha * self.loss(output, label) + (1 - alpha) * self.boundary_loss(segmentation, label)


def _unstacked(segmentation: Any, label: torch.Tensor) -> Any:
    """MONAI's DynUNet stacks its deep supervision outputs, ``(b, n, c, *spatial)``: as a list of ``n``."""
    stacked = isinstance(segmentation, torch.Tensor) and segmentation.ndim == label.ndim + 1 and label.ndim > 4
    return list(segmentation.unbind(1)) if stacked else segmentation


class _BinaryDiceCELoss(nn.Module):
    """Eq. 7: binary cross entropy and Dice loss, a sigmoid for each channel."""

    def __init__(self, to_onehot_y: bool) -> None:
        super().__init__()
        self.to_onehot_y = to_onehot_y
        self.dice = DiceLoss(sigmoid=True)

    def forward(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        if self.to_onehot_y:
            label = one_hot(label, num_classes=logits.shape[1])
        label = label.to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, label) + self.dice(logits, label)
