"""Losses: context residual learning (Eq. 8 and 9), the joint loss, and the schedule of a boundary loss (Eq. 14)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.losses import DeepSupervisionLoss, DiceLoss
from monai.utils import convert_to_tensor, optional_import

from monai_conres.renamed import refuse_old_arguments
from monai_conres.residual import (
    class_indices,
    class_masks,
    known_residuals,
    labelled_voxels,
    residual_mask,
    slice_dim,
)

__all__ = ["CompoundBoundaryLoss", "ConResLoss", "ContextResidualLoss", "DeviceBoundaryLoss"]

scipy_distance, has_scipy = optional_import("scipy.ndimage", name="distance_transform_edt")

IGNORED = -100  # torch's value of voxels that cross entropy leaves out


class ContextResidualLoss(nn.Module):
    """Loss of the predicted residual masks: weighted binary cross entropy at every scale.

    Eq. 8 of Zhang et al., 2021, for one scale, with ``w_k = log(V / V_k)``. A residual mask has ``V`` voxels, and
    ``V_k`` of them have the value ``k``, counted for each channel over the batch. Eq. 9 adds up the scales: the finest
    scale with weight 1, the others with ``deep_supervision_weight``. The target of each scale is the residual mask of
    the label resized to that scale. The loss makes the targets on the label's device and does not wait for the device.

    Args:
        spatial_axis: index of the slice axis among the spatial axes, the same as the network's.
        deep_supervision_weight: weight of each coarser scale (the paper's lambda).
        background_weight: ``w_0``; ``None`` is the paper's ``log(V / V_0)``.
        ignore_index: value of voxels without a label. Only voxels whose residual is known count, in ``V``, in ``V_k``
            and in the mean: see :func:`~monai_conres.residual_mask`. Without such voxels the loss is zero.

    Attributes:
        mean_w_1: mean of the finest scale's ``w_1`` for each channel, ``(r)``, over the calls with gradients. It
            is a buffer that ``state_dict`` leaves out. The weights raise the predicted log-odds of a change by
            ``log(w_1 / w_0)``.

    Shape:
        ``residuals``: logits, fine to coarse, each ``(b, r, *spatial)`` at its own resolution, or one tensor.
        ``label``: zeros and ones ``(b, r, *spatial)``; one-hot ``(b, r + 1, *spatial)``, in which channel 0 is the
        background and has no residual; or class indices from 0 to ``r``, ``(b, 1, *spatial)``. The result is a scalar
        in float32 or wider.

    Raises:
        ValueError: when shapes do not fit each other, ``ignore_index`` is a class or does not fit the dtype of the
            label, or label values are not classes (checked only on the CPU).

    Note:
        The cross entropy is the mean over voxels; the paper has the sum. The paper's ``w_0`` is about 0.005 for a
        tumor: voxels outside the residual then have nearly no gradient. The released code has ``w_0 = 1``, the default
        here. The released code compares every scale with the full-resolution mask of one-slice steps.

    Example:
        >>> label = torch.zeros(1, 1, 2, 2, 4)
        >>> label[..., 2:] = 1  # 4 of 16 voxels differ from the slice before them
        >>> loss = ContextResidualLoss()([torch.zeros(1, 1, 2, 2, 4)], label)
        >>> expected = torch.tensor(2.0).log() * (4 * torch.tensor(4.0).log() + 12) / 16
        >>> bool(torch.isclose(loss, expected))
        True
    """

    mean_w_1: torch.Tensor
    batches: torch.Tensor  # how many batches with a change each channel had

    @refuse_old_arguments
    def __init__(
        self,
        *,
        spatial_axis: int = -1,
        deep_supervision_weight: float = 0.5,
        background_weight: float | None = 1.0,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        self.spatial_axis = spatial_axis
        self.deep_supervision_weight = deep_supervision_weight
        self.background_weight = background_weight
        self.ignore_index = ignore_index
        self.register_buffer("mean_w_1", torch.zeros(0), persistent=False)
        self.register_buffer("batches", torch.zeros(0), persistent=False)

    def forward(self, residuals: torch.Tensor | Sequence[torch.Tensor], label: torch.Tensor) -> torch.Tensor:
        """Loss of ``residuals`` against the residual masks of ``label``."""
        heads = [residuals] if isinstance(residuals, torch.Tensor) else list(residuals)
        if not heads:
            raise ValueError('expected logits of residual masks, got none: a network with context="none" has none.')
        slice_dim(label.ndim, self.spatial_axis)
        channels = heads[0].shape[1]
        masks = class_masks(convert_to_tensor(label, track_meta=False), channels, self.ignore_index)
        for logits in heads:
            if logits.shape[:2] != masks.shape[:2] or logits.ndim != masks.ndim:
                raise ValueError(
                    f"expected residual logits of batch and channels {tuple(masks.shape[:2])} for a label of shape "
                    f"{tuple(label.shape)}, got shape {tuple(logits.shape)}; give the label of the same images."
                )
            if any(head > full for head, full in zip(logits.shape[2:], label.shape[2:], strict=True)):
                raise ValueError(
                    f"expected residual logits no larger than the label of shape {tuple(label.shape)}, got "
                    f"{tuple(logits.shape)}; give the label of the same image."
                )
        masks, labelled = masks.bool(), None
        if self.ignore_index is not None:
            labelled = labelled_voxels(label, self.ignore_index, one_hot=label.shape[1] == channels + 1)
        losses: list[torch.Tensor] = []
        for logits in heads:
            logits = convert_to_tensor(logits, track_meta=False)
            loss, weight_1, changed = self._cross_entropy(logits, masks, labelled)
            if not losses and torch.is_grad_enabled():
                self._average(weight_1, changed)
            losses.append(loss)
        return losses[0] + self.deep_supervision_weight * sum(losses[1:])

    def _cross_entropy(
        self, logits: torch.Tensor, masks: torch.Tensor, labelled: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Eq. 8 for one scale, its ``w_1`` and ``V_1``."""
        target = residual_mask(_resized(masks, logits), spatial_axis=self.spatial_axis)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        others = [dim for dim in range(target.ndim) if dim != 1]
        voxels, share = logits.new_full((), target[:, :1].numel()), None
        if labelled is not None:
            known = known_residuals(_resized(labelled, logits), spatial_axis=self.spatial_axis).expand_as(target)
            target = target & known
            share = _share(known, logits)
            voxels = known.sum(others, keepdim=True).to(logits.dtype)
        changed = target.sum(others, keepdim=True).to(logits.dtype)
        weight_1 = (voxels / changed.clamp(min=1)).log()
        if self.background_weight is None:
            weight_0 = (voxels / (voxels - changed)).log()
        else:
            weight_0 = torch.full_like(weight_1, self.background_weight)
        weight = torch.where(target, weight_1, weight_0)
        if labelled is not None:
            weight = weight.masked_fill(~known, 0)
        loss = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), weight=weight)
        return loss if share is None else loss / share, weight_1, changed

    @torch.no_grad()
    def _average(self, weight_1: torch.Tensor, changed: torch.Tensor) -> None:
        """Add a batch to the mean of ``w_1``. A channel without any change has no ``w_1``."""
        weight_1, has_change = weight_1.flatten(), changed.flatten() > 0
        if self.batches.shape != has_change.shape or self.batches.device != has_change.device:
            self.mean_w_1, self.batches = (torch.zeros(len(weight_1), device=weight_1.device) for _ in range(2))
        try:
            self.batches += has_change
            self.mean_w_1 += torch.where(has_change, (weight_1 - self.mean_w_1) / self.batches.clamp(min=1), 0.0)
        except RuntimeError:  # torch.func does not change tensors from outside
            return


def _resized(masks: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Booleans at the resolution of ``logits``, from the nearest voxel."""
    if masks.shape[2:] == logits.shape[2:]:
        return masks
    return F.interpolate(masks.to(torch.float32), size=logits.shape[2:], mode="nearest-exact") > 0.5


def _share(counted: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The share of the voxels that count: 1 when all do, and above 0 when none does.

    A mean over all voxels, divided by the share, is the mean over those that count, and the same bits when all do.
    """
    return counted.sum().clamp(min=1).to(like.dtype) / counted.numel()


class ConResLoss(nn.Module):
    """Joint loss of segmentation and residual masks: ``segmentation loss + residual_weight * residual loss``.

    The loss takes what a network of this package returns, in training a :class:`~monai_conres.ConResOutput`. For a
    plain tensor, as in validation, and for a network without residuals, the loss is only the segmentation loss.

    The number ``c`` of segmentation channels and ``r`` of residual channels say what the channels mean:

    ===========  ==================================  ===================================================
    channels     segmentation                        label
    ===========  ==================================  ===================================================
    ``c = r``    independent sigmoids                zeros and ones, ``r`` channels
    ``c = r+1``  softmax, channel 0 is background    class indices, 1 channel; or one-hot, ``c`` channels
    ===========  ==================================  ===================================================

    With an own loss class indices may have no channel, ``(b, *spatial)``, as ``nn.CrossEntropyLoss`` takes them.

    Args:
        segmentation_loss: any loss of ``(logits, label)``, which gets the network's output and the label as plain
            tensors. ``None`` is Eq. 7 of Zhang et al., 2021: choose ``sigmoid`` or ``softmax``.
        sigmoid: True is binary cross entropy and Dice loss, a sigmoid for each channel.
        softmax: True is cross entropy and Dice loss, a softmax over the channels.
        residual_weight: weight of the residual loss.
        spatial_axis: index of the slice axis among the spatial axes, the same as the network's.
        deep_supervision_weight: see :class:`ContextResidualLoss`.
        background_weight: see :class:`ContextResidualLoss`.
        ignore_index: value of voxels without a label, such as 255. Neither the default losses nor the residual loss see
            these voxels. Your own ``segmentation_loss`` gets the label with this value and must also ignore these
            voxels.

    Shape:
        ``output``: a :class:`~monai_conres.ConResOutput` or logits ``(b, c, *spatial)``; ``label``: see above. The
        result is a scalar.

    Raises:
        ValueError: when not exactly one of ``segmentation_loss``, ``sigmoid`` and ``softmax`` is given, shapes or label
            values do not fit, or your own loss ignores other voxels.
        TypeError: when the segmentation is a deep supervision output, and ``segmentation_loss`` is ``None``.

    Note:
        The check of shapes takes the first of several deep supervision outputs as the final output.
        ``segmentation_loss`` gets a stacked tensor ``(b, n, c, *spatial)``, which MONAI's ``DynUNet`` returns, as a
        list of ``n`` tensors.

        If your own loss has a softmax, build the network with ``include_background=False``. The joint loss cannot see
        the activation of your own loss: with ``c = r`` it also trains a residual mask of the background.

        MONAI's ``DiceCELoss(sigmoid=True)`` has a softmax in its cross entropy when there are several channels. The
        default loss here has a binary cross entropy for each channel.

        MONAI's Dice, focal and Tversky losses take an ``ignore_index`` for class indices in one channel. In labels of
        several channels these losses ignore voxels of zeros instead. So only the default losses here take such labels.

    Example:
        >>> from monai_conres import ConResNet
        >>> network = ConResNet(1, 3, channels=(8, 16), strides=(2,), blocks=(1, 1, 1))
        >>> label = torch.randint(0, 2, (1, 3, 8, 12, 6))
        >>> loss = ConResLoss(sigmoid=True)(network(torch.randn(1, 1, 8, 12, 6)), label)
        >>> loss.backward()
    """

    @refuse_old_arguments
    def __init__(
        self,
        segmentation_loss: Callable[[Any, torch.Tensor], torch.Tensor] | None = None,
        *,
        sigmoid: bool = False,
        softmax: bool = False,
        residual_weight: float = 1.0,
        spatial_axis: int = -1,
        deep_supervision_weight: float = 0.5,
        background_weight: float | None = 1.0,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        if (segmentation_loss is not None) + sigmoid + softmax != 1:
            raise ValueError(
                "expected exactly one of an own segmentation_loss, sigmoid=True and softmax=True, got "
                f"segmentation_loss={segmentation_loss}, sigmoid={sigmoid} and softmax={softmax}; sigmoid and softmax "
                "only choose the default segmentation loss."
            )
        self.ignore_index = ignore_index
        self.softmax = softmax
        self._wants_indices = False
        if ignore_index is not None and segmentation_loss is not None:
            self._wants_indices = reads_ignore_index(segmentation_loss, ignore_index)
        self.residual_weight = residual_weight
        self.segmentation_loss = _DefaultLoss(softmax, ignore_index) if segmentation_loss is None else segmentation_loss
        self.residual_loss = ContextResidualLoss(
            spatial_axis=spatial_axis,
            deep_supervision_weight=deep_supervision_weight,
            background_weight=background_weight,
            ignore_index=ignore_index,
        )

    def forward(self, output: Any, label: torch.Tensor) -> torch.Tensor:
        """Loss of a network's ``output`` against ``label``."""
        residuals: Sequence[torch.Tensor] = getattr(output, "residuals", ())
        segmentation = getattr(output, "segmentation", output)
        label = convert_to_tensor(label, track_meta=False)
        segmentation = convert_to_tensor(segmentation, track_meta=False)
        is_own = not isinstance(self.segmentation_loss, _DefaultLoss)
        with_channel = label_with_channel(label, output) if is_own else label
        segmentation = _unstacked(segmentation, with_channel)
        if self._wants_indices:
            check_class_indices(with_channel)
        if len(residuals) == 0:
            return self.segmentation_loss(segmentation, label)
        self._check(segmentation, residuals[0].shape[1], with_channel)
        loss = self.segmentation_loss(segmentation, label)
        return loss + self.residual_weight * self.residual_loss(residuals, with_channel)

    def _check(self, segmentation: Any, residual_channels: int, label: torch.Tensor) -> None:
        """Raise unless segmentation channels, residual channels and label go together."""
        heads = segmentation.values() if isinstance(segmentation, Mapping) else segmentation
        final = segmentation if isinstance(segmentation, torch.Tensor) else next(iter(heads), None)
        if not isinstance(final, torch.Tensor):
            return  # only the own loss knows what this is
        channels = final.shape[1]
        is_softmax = channels == residual_channels + 1
        counts = f"for {channels} segmentation channels, got {residual_channels}"
        if not is_softmax and channels != residual_channels:
            raise ValueError(
                f"expected {channels} residual masks (sigmoids) or {channels - 1} (softmax) {counts}; build the "
                "network with include_background=True or False."
            )
        if isinstance(self.segmentation_loss, _DefaultLoss) and is_softmax != self.softmax and channels > 1:
            flags = ("softmax", "sigmoid") if self.softmax else ("sigmoid", "softmax")
            raise ValueError(
                f"expected {channels - self.softmax} residual masks with {flags[0]}=True {counts}; build the network "
                f"with include_background={not self.softmax}, or give the loss {flags[1]}=True."
            )
        if label.ndim == final.ndim and label.shape[1] == 1 < residual_channels and not is_softmax:
            raise ValueError(
                f"expected a label of {channels} channels of zeros and ones for {channels} residual masks, got one "
                "channel; if it holds class indices, build the network with include_background=False."
            )


def reads_ignore_index(loss: Callable, ignore_index: int) -> bool:
    """Whether an own loss has an ``ignore_index``, as some of MONAI's and torch's losses.

    Raises:
        ValueError: when a part of the loss has another ``ignore_index``, or a loss of MONAI has none.
    """
    while isinstance(loss, DeepSupervisionLoss):
        loss = loss.loss
    parts = list(_ignoring(loss)) if isinstance(loss, nn.Module) else []
    values = [(type(part).__name__, part.ignore_index) for part in parts]
    if not parts and type(loss).__module__.startswith("monai.losses"):
        values = [(type(loss).__name__, None)]
    if wrong := {name: value for name, value in values if value != ignore_index}:
        raise ValueError(
            f"expected an own loss that ignores the label value {ignore_index}, got ignore_index={wrong}; give it "
            f"ignore_index={ignore_index}, such as DiceLoss(..., ignore_index={ignore_index}), or choose a default "
            "loss with softmax=True or sigmoid=True."
        )
    return any(not isinstance(part, (ConResLoss, _DefaultLoss)) for part in parts)


def _ignoring(part: nn.Module) -> Iterator[Any]:
    """The outermost parts of a loss that have an ``ignore_index``."""
    if hasattr(part, "ignore_index"):
        yield part
        return
    for child in part.children():
        yield from _ignoring(child)


def check_class_indices(label: torch.Tensor) -> None:
    """Raise unless a label of an own loss with ``ignore_index`` holds class indices."""
    if label.shape[1] > 1:
        raise ValueError(
            f"expected class indices in one channel for an own loss with ignore_index, got a label of shape "
            f"{tuple(label.shape)}, where such losses ignore voxels of zeros; choose softmax=True or sigmoid=True."
        )


class CompoundBoundaryLoss(nn.Module):
    """A loss that gives way to a boundary loss over training: Eq. 14 of Zhang et al., 2021.

    ``alpha * loss + (1 - alpha) * boundary_loss`` with ``alpha = 1 - t * (1 - final_alpha) / max_steps``. Call
    :meth:`step` once after each iteration. ``t`` is part of the ``state_dict``, so that resumed training goes on with
    the same weights. With MONAI's engines: ``trainer.add_event_handler(Events.ITERATION_COMPLETED, loss.step)``.

    Args:
        loss: a loss of ``(output, label)``, such as :class:`ConResLoss`.
        boundary_loss: a loss of ``(logits, label)``, such as ``DeviceBoundaryLoss(sigmoid=True)``. This loss gets only
            the segmentation: of deep supervision outputs only the first, unless the loss is a
            ``monai.losses.DeepSupervisionLoss``.
        max_steps: number of iterations after which ``alpha`` stays at ``final_alpha``.
        final_alpha: weight of ``loss`` at the end.

    Raises:
        ValueError: when ``max_steps`` is not positive, ``final_alpha`` is outside [0, 1], or ``loss`` ignores voxels:
            the distance to a boundary needs a label for each voxel.
        TypeError: when the segmentation is a dictionary.

    Note:
        Without cupy and cucim, MONAI's ``BoundaryLoss`` copies the label from the GPU and computes distances with
        scipy, which takes seconds. :class:`DeviceBoundaryLoss` computes the distances on the GPU.

    Example:
        >>> loss = CompoundBoundaryLoss(nn.MSELoss(), nn.L1Loss(), max_steps=10)
        >>> prediction, label = torch.full((1, 1, 2, 2, 2), 3.0), torch.zeros(1, 1, 2, 2, 2)
        >>> loss(prediction, label)  # only the first loss: 9
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
        if any(getattr(part, "ignore_index", None) not in (None, IGNORED) for part in loss.modules()):
            raise ValueError(
                "expected a loss without ignore_index, because a boundary loss takes a label for each voxel, got one; "
                "complete the label first (complete_mask)."
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
        with_channel = label_with_channel(label, output)
        segmentation = _unstacked(output.segmentation if hasattr(output, "residuals") else output, with_channel)
        if isinstance(segmentation, (list, tuple)) and not isinstance(self.boundary_loss, DeepSupervisionLoss):
            segmentation = segmentation[0]
        if isinstance(segmentation, Mapping):
            raise TypeError(
                f"expected logits, or a list of them, got a dictionary of {list(segmentation)}; give "
                "a boundary_loss to a network that returns only its logits."
            )
        alpha = self.alpha
        return alpha * self.loss(output, label) + (1 - alpha) * self.boundary_loss(segmentation, with_channel)


class DeviceBoundaryLoss(nn.Module):
    """Boundary loss (Kervadec et al., MIDL 2019): the mean of probability times signed distance to the label's surface.

    The values are those of MONAI's ``BoundaryLoss``. The label's device computes exact distances. A GPU needs neither
    scipy nor cupy, and nothing waits for the GPU.

    Args:
        sigmoid: True for a sigmoid of each channel.
        softmax: True for a softmax over the channels.
        include_background: False leaves out channel 0.

    Shape:
        ``logits``: ``(b, c, *spatial)``. ``label``: zeros and ones ``(b, c, *spatial)``, or class indices
        ``(b, 1, *spatial)`` with a softmax. The result is a scalar in float32 or wider.

    Raises:
        ValueError: when not one of ``sigmoid`` and ``softmax`` is True, logits and label do not fit each other, or
            ``include_background=False`` leaves no channel.

    Example:
        >>> label = torch.zeros(1, 1, 4, 4, 4)
        >>> label[..., 2:, :, :] = 1
        >>> DeviceBoundaryLoss(sigmoid=True)(torch.zeros(1, 1, 4, 4, 4), label)  # half of the mean of 2, 1, 0, -1
        tensor(0.2500)
    """

    def __init__(self, *, sigmoid: bool = False, softmax: bool = False, include_background: bool = True) -> None:
        super().__init__()
        if sigmoid == softmax:
            raise ValueError(f"expected one of sigmoid and softmax to be True, got {sigmoid} and {softmax}.")
        self.sigmoid = sigmoid
        self.softmax = softmax
        self.include_background = include_background

    def forward(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Loss of ``logits`` against ``label``."""
        logits, label = (convert_to_tensor(volume, track_meta=False) for volume in (logits, label))
        logits, channels = logits.to(torch.promote_types(logits.dtype, torch.float32)), logits.shape[1]
        if self.softmax and label.ndim == logits.ndim and label.shape[1] == 1 < channels:
            masks = label == torch.arange(channels, device=label.device).view(1, -1, *(1,) * (label.ndim - 2))
        else:
            masks = label > 0.5
        if masks.shape != logits.shape:
            raise ValueError(
                f"expected a label of the shape {tuple(logits.shape)} of the logits, got {tuple(label.shape)}; it may "
                "have class indices in one channel only with softmax=True."
            )
        if channels == 1 and not self.include_background:
            raise ValueError("expected 2 or more channels with include_background=False, got 1; use True.")
        probability = logits.softmax(1) if self.softmax else logits.sigmoid()
        first = 0 if self.include_background else 1
        return (probability[:, first:] * signed_distance(masks[:, first:])).mean()


@torch.no_grad()
def signed_distance(masks: torch.Tensor) -> torch.Tensor:
    """Distance in voxels to the nearest voxel of a mask, negative inside: 2, 1, 0, -1, ... from outside to inside.

    Zero everywhere for a mask that is empty or full, as in MONAI's ``BoundaryLoss``. A GPU computes
    :func:`squared_distance`, a CPU takes scipy, if scipy is installed.

    Args:
        masks: booleans ``(b, c, *spatial)``.

    Example:
        >>> signed_distance(torch.tensor([[[False, False, True, True]]]))
        tensor([[[ 2.,  1.,  0., -1.]]])
    """
    both = torch.cat((masks, ~masks))
    if has_scipy and masks.device.type == "cpu":
        distances = torch.stack([torch.from_numpy(scipy_distance(mask.numpy())) for mask in both.flatten(0, 1)])
        distances = distances.float().view(both.shape)
    else:
        distances = squared_distance(both).sqrt()
    inside, outside = distances.chunk(2)
    dims = tuple(range(2, masks.ndim))
    has_surface = masks.any(dims, keepdim=True) & ~masks.all(dims, keepdim=True)
    return torch.where(masks, 1 - inside, outside).where(has_surface, 0.0)


def squared_distance(masks: torch.Tensor) -> torch.Tensor:
    """Squared Euclidean distance in voxels to the nearest voxel that is False, in float32; infinite if there is none.

    Exact, one axis after the other: ``d(i) = min over j of f(j) + (i - j)^2``, where ``f`` are the squared distances
    along the axes before. All voxels take the step ``|i - j|`` together, as suits a GPU.

    Args:
        masks: booleans ``(b, c, *spatial)``.

    Example:
        >>> squared_distance(torch.tensor([[[True, False, True, True]]]))
        tensor([[[1., 0., 1., 4.]]])
    """
    index = torch.arange(masks.shape[2], device=masks.device).view(-1, *(1,) * (masks.ndim - 3)).float()
    last = index.where(~masks, -torch.inf).cummax(2).values
    following = index.where(~masks, torch.inf).flip(2).cummin(2).values.flip(2)
    squared = torch.minimum(index - last, following - index) ** 2
    for dim in range(3, masks.ndim):
        before, size = squared, masks.shape[dim]
        squared = before.clone()
        for step in range(1, size):
            for start, end in ((0, step), (step, 0)):
                nearer = squared.narrow(dim, start, size - step)
                torch.minimum(nearer, before.narrow(dim, end, size - step) + step**2, out=nearer)
    return squared


def label_with_channel(label: torch.Tensor, output: Any) -> torch.Tensor:
    """Class indices ``(b, 1, *spatial)`` of a label that an own loss takes as ``(b, *spatial)``; others as they are."""
    residuals: Sequence[torch.Tensor] = getattr(output, "residuals", ())
    like = residuals[0] if len(residuals) else getattr(output, "segmentation", output)
    return label[:, None] if isinstance(like, torch.Tensor) and label.ndim == like.ndim - 1 < 5 else label


def _unstacked(segmentation: Any, label: torch.Tensor) -> Any:
    """A list of ``n`` for the stacked deep supervision outputs ``(b, n, c, *spatial)`` of MONAI's DynUNet."""
    stacked = isinstance(segmentation, torch.Tensor) and segmentation.ndim == label.ndim + 1 and label.ndim > 4
    return list(segmentation.unbind(1)) if stacked else segmentation


class _DefaultLoss(nn.Module):
    """Eq. 7: cross entropy and Dice loss, of a softmax over the channels or of a sigmoid for each."""

    def __init__(self, softmax: bool, ignore_index: int | None) -> None:
        super().__init__()
        self.softmax = softmax
        self.ignore_index = ignore_index
        ignored = None if ignore_index is None else IGNORED
        self.dice = DiceLoss(softmax=True, to_onehot_y=True, ignore_index=ignored) if softmax else DiceLoss()

    def forward(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        if not isinstance(logits, torch.Tensor):
            raise TypeError(
                f"expected logits of shape (b, c, *spatial), got a {type(logits).__name__} of {len(logits)} tensors; "
                "for a network with deep supervision pass the loss that it is trained with, for example "
                "ConResLoss(DeepSupervisionLoss(DiceCELoss(...)))."
            )
        batch, channels, *size = logits.shape
        if self.softmax and channels < 2:
            raise ValueError(
                f"expected 2 or more channels, the background among them, with softmax=True, got logits of shape "
                f"{tuple(logits.shape)}; one channel goes with sigmoid=True."
            )
        if not self.softmax and label.ndim == logits.ndim and label.shape[1] == 1 < channels:
            raise ValueError(
                f"expected a label of {channels} channels of zeros and ones with sigmoid=True, got one channel; for "
                "class indices use softmax=True and a network with include_background=False."
            )
        if label.ndim == logits.ndim - 1:
            raise ValueError(
                f"expected a label with batch and channel for logits of shape {tuple(logits.shape)}, got shape "
                f"{tuple(label.shape)}; add the channel: label[:, None]."
            )
        masks = class_masks(label, channels - self.softmax, self.ignore_index)
        if [len(masks), *masks.shape[2:]] != [batch, *size]:
            raise ValueError(
                f"expected a label of the same batch and size as the logits of shape {tuple(logits.shape)}, got shape "
                f"{tuple(label.shape)}; give the label of the same image."
            )
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labelled = None
        if self.ignore_index is not None:
            labelled = labelled_voxels(label, self.ignore_index, one_hot=self.softmax)
        if not self.softmax:
            return self._sigmoid_loss(logits, masks.to(logits.dtype), labelled)
        if label.shape[1] > 1:
            label = class_indices(masks)
        return self._softmax_loss(logits, label, labelled)

    def _sigmoid_loss(self, logits: torch.Tensor, masks: torch.Tensor, labelled: torch.Tensor | None) -> torch.Tensor:
        p = logits.sigmoid()
        if labelled is None:
            return F.binary_cross_entropy_with_logits(logits, masks) + self.dice(p, masks)
        weight = labelled.to(logits.dtype)
        cross_entropy = F.binary_cross_entropy_with_logits(logits, masks, weight=weight) / _share(labelled, logits)
        return cross_entropy + self.dice(p * weight, masks)

    def _softmax_loss(self, logits: torch.Tensor, classes: torch.Tensor, labelled: torch.Tensor | None) -> torch.Tensor:
        if labelled is None:
            return self.dice(logits, classes) + F.cross_entropy(logits, classes.squeeze(1).long())
        classes = classes.long().masked_fill(~labelled, IGNORED)
        cross_entropy = F.cross_entropy(logits, classes.squeeze(1), ignore_index=IGNORED, reduction="sum")
        return self.dice(logits, classes) + cross_entropy / labelled.sum().clamp(min=1)
