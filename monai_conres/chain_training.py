"""Learning with the slice chain: the weights of the chain, and networks that are trained through the chain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.utils import convert_to_tensor

from monai_conres.chain import ChainSettings, broadcast_slices, log_partition, potentials, slice_marginals
from monai_conres.layers import resize_features
from monai_conres.residual import class_masks, slice_dim

__all__ = ["ChainLoss", "fit_chain"]


def _evenly_spaced(extent: torch.Tensor, number: int) -> list[int]:
    """``number`` slices, evenly spaced from the first to the last slice that ``extent``, ``(slices)``, has."""
    inside = extent.nonzero()[:, 0].tolist() or [0, len(extent) - 1]
    low, size = inside[0], inside[-1] - inside[0] + 1
    return [low + (2 * i + 1) * size // (2 * number) for i in range(number)]


def _sample(
    case: Mapping[str, Any], drawn: Sequence[int], positions: int, spatial_axis: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """The chains of a case where something can change, ``(1, c, positions, slices)`` in float64.

    These are segmentation, residual, image, label, and the label with -1 where it is not drawn, one for each number
    of drawn slices. Chains that are background in label and segmentation add next to nothing to the likelihood.
    """
    if not {"segmentation", "label"} <= set(case):
        raise ValueError(f"expected cases with the keys segmentation and label, got {sorted(case)}.")
    volumes = {name: convert_to_tensor(value, track_meta=False) for name, value in case.items() if value is not None}
    logits, label = volumes["segmentation"].float(), volumes["label"]
    is_sigmoid = label.shape[1] == logits.shape[1]
    foreground = logits.shape[1] - (not is_sigmoid)
    if "residual" not in volumes:
        volumes["residual"] = logits.new_zeros(()).expand(len(logits), foreground, *logits.shape[2:])
    p = logits.sigmoid() if is_sigmoid else logits.softmax(1)[:, 1:]
    dim = slice_dim(logits.ndim, spatial_axis)
    changing = ((p > 1e-3).any(1) | (label > 0).any(1)).movedim(dim - 1, -1).any(-1)
    chosen = torch.randperm(int(changing.sum()), generator=torch.Generator().manual_seed(0))[:positions]

    def chains(volume: torch.Tensor) -> torch.Tensor:
        return volume.movedim((dim, 1), (-1, -2))[changing][chosen].cpu().double().movedim(0, 1)[None]

    states = chains(label).to(torch.int16)
    visible = torch.full_like(states, -1).repeat(len(drawn), 1, 1, 1)
    for case_visible, number in zip(visible, drawn, strict=True):
        slices = _evenly_spaced((label > 0).movedim(dim, 0).flatten(1).any(1), number)
        case_visible[..., slices] = states[0][..., slices]
    image = chains(volumes["image"]) if "image" in volumes else None
    return chains(volumes["segmentation"]), chains(volumes["residual"]), image, states, visible


def fit_chain(
    cases: Iterable[Mapping[str, Any]],
    *,
    drawn: Sequence[int] = (1, 2, 3),
    positions: int = 1024,
    max_iterations: int = 30,
    spatial_axis: int = -1,
) -> ChainSettings:
    """Fit the weights of the chain by the likelihood of the slices that are not drawn, given the drawn ones.

    It minimizes ``log Z_drawn - log Z_label``, the negative log likelihood, for each voxel that is not drawn. The drawn
    slices are evenly spaced within the extent of the label. The result is the same in each run. Take training cases,
    never the ones that are scored.

    Args:
        cases: mappings with ``segmentation`` ``(b, c, *spatial)`` and ``residual`` ``(b, r, *spatial)``, logits as
            ``network.with_residual(image)`` gives them; ``label``, class indices ``(b, 1, *spatial)`` for a softmax or
            zeros and ones ``(b, c, *spatial)`` for sigmoids; ``image`` for the image contrast. Without ``residual`` or
            ``image`` their weight is 0. All cases have the same keys.
        drawn: numbers of drawn slices, fitted together.
        positions: largest number of in-plane positions that are taken from each case.
        max_iterations: largest number of steps of the optimizer (L-BFGS).
        spatial_axis: index of the slice axis among the spatial axes.

    Returns:
        The fitted settings, with an offset for each class that has a residual.

    Raises:
        ValueError: when there is no case, a key is missing, or shapes do not fit each other.

    Example:
        >>> label = torch.zeros(1, 1, 3, 4, 6)
        >>> label[:, :, 1:, 2:, 2:4] = 1
        >>> settings = fit_chain([{"segmentation": 4 * label - 2 + torch.randn(label.shape), "label": label}])
        >>> settings.offset[0] < 0  # neighboring slices are alike
        True
    """
    samples = [_sample(case, drawn, positions, spatial_axis) for case in cases]
    samples = [sample for sample in samples if sample[0].shape[2]]
    if not samples:
        raise ValueError("expected a case with foreground, got none; give training cases of the network.")
    _, residual, image, *_ = samples[0]
    # softplus keeps the weights positive; each of them starts at 1
    weights = torch.ones(3, dtype=torch.float64).expm1().log().requires_grad_()
    offset = torch.full((residual.shape[1],), -2.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, offset], max_iter=max_iterations, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for segmentation, residual, image, label, visible in samples:
            tau, scale, contrast = F.softplus(weights)
            settings = {"tau": tau, "residual_scale": scale, "image_contrast": contrast, "offset": offset}
            unary, rho = potentials(segmentation, residual, image, -1, **settings)
            # one case for each number of drawn slices
            unary, rho, label = (x.expand(len(visible), *x.shape[1:]) for x in (unary, rho, label))
            loss = (log_partition(unary, rho, visible) - log_partition(unary, rho, label)).sum()
            loss = loss / (visible < 0).sum().clamp(min=1) / len(samples)
            loss.backward()  # at once, so that memory holds the graph of one case
            total += loss.detach()
        return total

    optimizer.step(closure)
    tau, scale, contrast = F.softplus(weights).tolist()
    return ChainSettings(
        tau=tau,
        residual_scale=scale if any(sample[1].any() for sample in samples) else 0.0,
        image_contrast=contrast if image is not None else 0.0,
        offset=offset.tolist(),
    )


class ChainLoss(nn.Module):
    """Training through the chain: the residual decoder learns what the segmentation does not know.

    Add it to :class:`~monai_conres.ConResLoss`: ``loss(output, label) + weight * chain_loss(output, label)``.

    Args:
        segmentation_loss: loss of ``(logits, label)`` for the marginals. In each call and case, 0 to ``max_drawn``
            random slices are clamped to the label. ``None`` takes the negative log likelihood of the label under the
            chain for each voxel, ``log Z - log Z_label``, which needs no random slices.
        settings: weights of the chain, fixed in training; ``None`` is ``ChainSettings()``. There is no image here.
        max_drawn: largest number of drawn slices.
        spatial_axis: index of the slice axis among the spatial axes, the same as the network's.

    Shape:
        ``output``: a :class:`~monai_conres.ConResOutput`. Of several segmentation outputs the last one of the label's
        size counts. ``label``: class indices ``(b, 1, *spatial)`` or one-hot ``(b, c, *spatial)`` for a softmax, zeros
        and ones ``(b, c, *spatial)`` for sigmoids. The result is a scalar in float32 or wider.

    Raises:
        ValueError: when shapes do not fit each other, or the output has no residuals.

    Note:
        Residual logits of a lower resolution are resized linearly. Such a head tells changes over two slices or more,
        so the chain sees each change more than once; the decoder learns to allow for that.

    Example:
        >>> from monai_conres import ConResOutput
        >>> output = ConResOutput(torch.randn(1, 1, 4, 4, 8, requires_grad=True), (torch.randn(1, 1, 4, 4, 8),))
        >>> label = torch.randint(0, 2, (1, 1, 4, 4, 8)).float()
        >>> (ChainLoss(nn.BCEWithLogitsLoss())(output, label) + ChainLoss()(output, label)).backward()
    """

    def __init__(
        self,
        segmentation_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        *,
        settings: ChainSettings | None = None,
        max_drawn: int = 3,
        spatial_axis: int = -1,
    ) -> None:
        super().__init__()
        if max_drawn < 0:
            raise ValueError(f"expected max_drawn of 0 or more, got {max_drawn}.")
        self.segmentation_loss = segmentation_loss
        self.settings = settings or ChainSettings()
        self.max_drawn = max_drawn
        self.spatial_axis = spatial_axis

    def forward(self, output: Any, label: torch.Tensor) -> torch.Tensor:
        """Loss of a network's ``output`` against ``label``."""
        if not getattr(output, "residuals", ()):
            raise ValueError(
                "expected a ConResOutput with residuals, got none; call the network in train() mode, and build it with "
                'context="attention" or "mapping".'
            )
        label = convert_to_tensor(label, track_meta=False)
        segmentation = _full_size(output.segmentation, label)
        residual = convert_to_tensor(output.residuals[0], track_meta=False)
        if residual.shape[2:] != label.shape[2:]:
            residual = resize_features(residual, label.shape[2:])
        unary, rho = potentials(segmentation, residual, None, self.spatial_axis, **vars(self.settings))
        states = class_masks(label, rho.shape[1]).to(torch.int16)
        if unary.shape[1] > rho.shape[1]:  # a softmax: class indices
            classes = torch.arange(1, unary.shape[1], dtype=torch.int16, device=label.device)
            states = (states.movedim(1, -1) * classes).sum(-1, dtype=torch.int16)[:, None]
        dim = slice_dim(label.ndim, self.spatial_axis)
        if self.segmentation_loss is None:
            log_z_label = log_partition(unary, rho, states, spatial_axis=self.spatial_axis)
            log_z = log_partition(unary, rho, spatial_axis=self.spatial_axis)
            return (log_z - log_z_label).mean() / label.shape[dim]
        is_drawn = torch.zeros(len(label), label.shape[dim], dtype=torch.bool)
        for case in is_drawn:
            number = int(torch.randint(min(self.max_drawn, len(case) - 1) + 1, ()))
            case[torch.randperm(len(case))[:number]] = True
        is_drawn = broadcast_slices(is_drawn, label.ndim, dim).to(label.device, non_blocking=True)
        drawn = states.masked_fill(~is_drawn, -1)
        return self.segmentation_loss(slice_marginals(unary, rho, drawn, spatial_axis=self.spatial_axis), label)


def _full_size(segmentation: Any, label: torch.Tensor) -> torch.Tensor:
    """The final one of a network's segmentation outputs: MONAI's DynUNet stacks them, others return several."""
    if isinstance(segmentation, torch.Tensor):
        segmentation = convert_to_tensor(segmentation, track_meta=False)
        return segmentation[:, 0] if segmentation.ndim == label.ndim + 1 else segmentation
    heads = list(segmentation.values() if isinstance(segmentation, Mapping) else segmentation)
    full = [convert_to_tensor(head, track_meta=False) for head in heads if head.shape[2:] == label.shape[2:]]
    if not full:
        raise ValueError(f"expected a segmentation of the label's size {tuple(label.shape)}, got {len(heads)} others.")
    return full[-1]
