"""Learning with the slice chain: the weights of the chain, and networks that are trained through the chain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.utils import convert_to_tensor, ensure_tuple

from monai_conres.chain import ChainSettings, broadcast_slices, log_partition, potentials, slice_marginals
from monai_conres.losses import check_class_indices, label_with_channel, reads_ignore_index
from monai_conres.operations import resize_features
from monai_conres.residual import (
    check_ignore_index,
    check_values,
    class_indices,
    class_masks,
    labelled_voxels,
    slice_dim,
)

__all__ = ["ChainLoss", "fit_chain"]

CERTAIN = 15.0  # logit of a clamped voxel; in float32 its probability is not yet 1


def _evenly_spaced(extent: torch.Tensor, labelled: torch.Tensor, number: int) -> list[int]:
    """``number`` of the slices that are ``labelled``, evenly spaced from the first to the last slice in ``extent``.

    Both are booleans ``(slices)``. One of the labelled slices at least is left out, to be scored.
    """
    inside = extent.nonzero()[:, 0].tolist() or [0, len(extent) - 1]
    known = [number for number in labelled.nonzero()[:, 0].tolist() if inside[0] <= number <= inside[-1]]
    number = min(number, int(labelled.sum()) - 1, len(known))
    return [known[(2 * i + 1) * len(known) // (2 * number)] for i in range(number)]


def _single(case: Mapping[str, Any]) -> Iterator[dict[str, torch.Tensor]]:
    """The cases of a batch, each with the batch dimension."""
    if not {"segmentation", "label"} <= set(case):
        raise ValueError(f"expected cases with the keys segmentation and label, got {sorted(case)}.")
    volumes = {
        name: convert_to_tensor(value, track_meta=False).detach() for name, value in case.items() if value is not None
    }
    shapes = {name: tuple(volume.shape) for name, volume in volumes.items()}
    if len({(shape[0], *shape[2:]) for shape in shapes.values()}) > 1:
        raise ValueError(f"expected volumes of one batch and size, got {shapes}; give the image that the network saw.")
    for number in range(len(volumes["segmentation"])):
        yield {name: volume[number : number + 1] for name, volume in volumes.items()}


def _sample(
    case: Mapping[str, torch.Tensor], drawn: Sequence[int], positions: int, spatial_axis: int, ignore_index: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """The chains of a case where something can change, ``(1, c, positions, slices)`` in float64.

    These are segmentation, residual, image, label with -1 where there is none, and the label with -1 where it is not
    drawn, one for each number of drawn slices. Chains that are background in label and segmentation add next to nothing
    to the likelihood.
    """
    logits, label = case["segmentation"].float(), case["label"]
    is_sigmoid = label.shape[1] == logits.shape[1]
    foreground = logits.shape[1] - (not is_sigmoid)
    residual = case.get("residual", logits.new_zeros(()).expand(1, foreground, *logits.shape[2:]))
    for name in ("segmentation", "residual", "image"):
        if name in case and not case[name].isfinite().all():
            raise ValueError(
                f"expected finite numbers in {name}, got NaN or infinite ones; check the network's output, and "
                "normalize the image as for the network."
            )
    if ignore_index is not None:
        check_ignore_index(ignore_index, label.dtype, 2 if is_sigmoid else foreground + 1)
    label = label if label.is_floating_point() else label.long()  # torch knows few operations of uint16
    labelled = torch.ones_like(label, dtype=torch.bool)
    if ignore_index is not None:
        labelled = labelled_voxels(label, ignore_index, one_hot=False)
    check_values(label.masked_fill(~labelled, 0).cpu(), 2 if is_sigmoid else foreground + 1, "classes of the network")
    label = label.to(torch.int16).masked_fill(~labelled, -1)
    p = logits.sigmoid() if is_sigmoid else logits.softmax(1)[:, 1:]
    dim = slice_dim(logits.ndim, spatial_axis)
    changing = ((p > 1e-3).any(1) | (label > 0).any(1)).movedim(dim - 1, -1).any(-1)
    chosen = torch.randperm(int(changing.sum()), generator=torch.Generator().manual_seed(0))[:positions]

    def chains(volume: torch.Tensor) -> torch.Tensor:
        return volume.movedim((dim, 1), (-1, -2))[changing][chosen].cpu().double().movedim(0, 1)[None]

    states = chains(label).to(torch.int16)
    visible = torch.full_like(states, -1).repeat(len(drawn), 1, 1, 1)
    for case_visible, number in zip(visible, drawn, strict=True):
        extent, known = (mask.movedim(dim, 0).flatten(1).any(1) for mask in (label > 0, labelled))
        slices = _evenly_spaced(extent, known, number)
        case_visible[..., slices] = states[0][..., slices]
    image = chains(case["image"]) if "image" in case else None
    return chains(logits), chains(residual), image, states, visible


@torch.inference_mode(False)  # the fit needs gradients
def fit_chain(
    cases: Iterable[Mapping[str, Any]],
    *,
    drawn: int | Sequence[int] = (1, 2, 3),
    positions: int = 1024,
    max_iterations: int = 30,
    spatial_axis: int = -1,
    ignore_index: int | None = None,
) -> ChainSettings:
    """Fit the weights of the chain by the likelihood of the slices that are not drawn, given the drawn slices.

    The function minimizes ``log Z_drawn - log Z_label``, the negative log likelihood, for each voxel that is not drawn.
    The drawn slices are evenly spaced within the extent of the label. The result is the same in each run. Take training
    cases, never cases that you score.

    Args:
        cases: mappings with ``segmentation`` ``(b, c, *spatial)`` and ``residual`` ``(b, r, *spatial)``, logits as
            ``network.with_residual(image)`` gives them; ``label``, class indices ``(b, 1, *spatial)`` for a softmax or
            zeros and ones ``(b, c, *spatial)`` for sigmoids; ``image`` for the image contrast. Without ``residual`` or
            ``image`` their weight is 0. All cases have the same keys.
        drawn: how many slices are drawn: one or more numbers, all in one fit.
        positions: largest number of in-plane positions that are taken from each case.
        max_iterations: largest number of steps of the optimizer (L-BFGS).
        spatial_axis: index of the slice axis among the spatial axes.
        ignore_index: value of voxels without a label. Slices with a label are drawn or scored. At least one of them is
            scored.

    Returns:
        The fitted settings, with an offset for each class that has a residual.

    Raises:
        ValueError: when there is no case, a key is missing, shapes do not fit each other, a number is not finite, or
            ``ignore_index`` is a class. The message names the case, counted from 1.

    Example:
        >>> label = torch.zeros(1, 1, 3, 4, 6)
        >>> label[:, :, 1:, 2:, 2:4] = 1
        >>> settings = fit_chain([{"segmentation": 4 * label - 2 + torch.randn(label.shape), "label": label}])
        >>> settings.offset[0] < 0  # neighboring slices are alike
        True
    """
    numbers = ensure_tuple(drawn)
    if not numbers or min(numbers) < 1:
        raise ValueError(f"expected one or more numbers of drawn slices, each 1 or more, got drawn={drawn}.")
    samples, keys = [], set()
    for number, case in enumerate(cases, start=1):
        try:
            for part in _single(case):
                samples.append(_sample(part, numbers, positions, spatial_axis, ignore_index))
                keys.add(tuple(sorted(part)))
        except ValueError as error:
            raise ValueError(f"case {number}: {error}") from error
    if len(keys) > 1:
        raise ValueError(f"expected the same keys in all cases, got {' and '.join(map(str, sorted(keys)))}.")
    samples = [sample for sample in samples if (sample[3] >= 0).any()]
    if not samples:
        raise ValueError("expected a case with foreground and labels, got none; give training cases of the network.")
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
            loss = loss / ((visible < 0) & (label >= 0)).sum().clamp(min=1) / len(samples)
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

    Add the loss to :class:`~monai_conres.ConResLoss`: ``loss(output, label) + weight * chain_loss(output, label)``.

    Args:
        segmentation_loss: loss of ``(logits, label)`` for the marginals. In each call and case, 0 to ``max_drawn``
            random slices are clamped to the label. ``None`` takes the negative log likelihood of the label under the
            chain for each voxel, ``log Z - log Z_label``, which needs no random slices.
        settings: weights of the chain, fixed in training; ``None`` is ``ChainSettings()``. The loss does not use the
            image.
        max_drawn: largest number of drawn slices.
        spatial_axis: index of the slice axis among the spatial axes, the same as the network's.
        ignore_index: value of voxels without a label. Slices with a label are clamped or scored. The likelihood counts
            only labelled voxels and is divided by their number. ``segmentation_loss`` gets the label with this value.

    Shape:
        ``output``: a :class:`~monai_conres.ConResOutput`. If there are several segmentation outputs, the last output of
        the label's size counts. ``label``: class indices ``(b, 1, *spatial)`` or one-hot ``(b, c, *spatial)`` for a
        softmax, zeros and ones ``(b, c, *spatial)`` for sigmoids. The result is a scalar in float32 or wider.

    Raises:
        ValueError: when shapes do not fit each other, the output has no residuals, ``ignore_index`` is a class, or
            ``segmentation_loss`` ignores other voxels.

    Note:
        A voxel without a label has a gradient where its chain has a label: the chain carries the label there.

        The loss resizes residual logits of a lower resolution linearly. Such logits tell changes over two slices or
        more, so the chain sees each change more than once. The decoder learns to allow for this.

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
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        if max_drawn < 0:
            raise ValueError(f"expected max_drawn of 0 or more, got {max_drawn}.")
        self._wants_indices = False
        if ignore_index is not None and segmentation_loss is not None:
            self._wants_indices = reads_ignore_index(segmentation_loss, ignore_index)
        self.segmentation_loss = segmentation_loss
        self.settings = settings or ChainSettings()
        self.max_drawn = max_drawn
        self.spatial_axis = spatial_axis
        self.ignore_index = ignore_index

    def forward(self, output: Any, label: torch.Tensor) -> torch.Tensor:
        """Loss of a network's ``output`` against ``label``."""
        if not getattr(output, "residuals", ()):
            raise ValueError(
                "expected a ConResOutput with residuals, got none; call the network in train() mode, and build it with "
                'context="attention" or "mapping".'
            )
        given = convert_to_tensor(label, track_meta=False)
        label = given if self.segmentation_loss is None else label_with_channel(given, output)
        if self._wants_indices:
            check_class_indices(label)
        segmentation = _full_size(output.segmentation, label)
        residual = convert_to_tensor(output.residuals[0], track_meta=False)
        if residual.shape[2:] != label.shape[2:]:
            residual = resize_features(residual, label.shape[2:])
        unary, rho = potentials(segmentation, residual, None, self.spatial_axis, **vars(self.settings))
        states = class_masks(label, rho.shape[1], self.ignore_index).to(torch.int16)
        is_softmax = unary.shape[1] > rho.shape[1]
        if is_softmax:
            states = class_indices(states)
        labelled = torch.ones_like(states, dtype=torch.bool)
        if self.ignore_index is not None:
            labelled = labelled_voxels(label, self.ignore_index, one_hot=is_softmax)
            states = states.masked_fill(~labelled, -1)
        dim = slice_dim(label.ndim, self.spatial_axis)
        if self.segmentation_loss is None:
            log_z_label = log_partition(unary, rho, states, spatial_axis=self.spatial_axis)
            log_z = log_partition(unary, rho, spatial_axis=self.spatial_axis)
            share = labelled.sum().clamp(min=1).to(log_z.dtype) / labelled.numel()
            return (log_z - log_z_label).mean() / label.shape[dim] / share
        is_drawn = self._random_slices(labelled.movedim(dim, 1).flatten(2).any(2))
        drawn = states.masked_fill(~broadcast_slices(is_drawn, label.ndim, dim), -1)
        marginals = slice_marginals(unary, rho, drawn, spatial_axis=self.spatial_axis)
        # clamped voxels are certain, which not every loss takes
        marginals = torch.where(drawn < 0, marginals, marginals.clamp(-CERTAIN, CERTAIN))
        return self.segmentation_loss(marginals, given)

    def _random_slices(self, labelled: torch.Tensor) -> torch.Tensor:
        """Which slices to clamp, ``(b, slices)``: some labelled slices, so that at least one is left to score."""
        size = labelled.shape[1]
        numbers, orders = [], []
        for _ in labelled:
            numbers.append(torch.randint(min(self.max_drawn, size - 1) + 1, ()))
            orders.append(torch.randperm(size))
        order = torch.stack(orders).to(labelled.device, non_blocking=True)
        number = torch.stack(numbers)[:, None].to(labelled.device, non_blocking=True)
        ordered = labelled.gather(1, order)
        rank = ordered.cumsum(1)
        number = torch.minimum(number, rank[:, -1:] - 1)
        return torch.zeros_like(labelled).scatter(1, order, ordered & (rank <= number))


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
