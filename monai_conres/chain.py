"""The slice chain: what the residuals are for. Draw one slice, get the volume.

Each in-plane position is a chain along the slices, a linear-chain conditional random field. ``y_s`` is the class of the
position in slice ``s``, and ``u_s(c)`` are the unary potentials of the segmentation. ``rho_s(k)`` is the log-odds that
membership of class ``k`` changes between the slices ``s - 1`` and ``s``. Then

``log p(y) = sum_s u_s(y_s) + sum_{s > 0, k > 0} rho_s(k) * [(y_s = k) != (y_{s-1} = k)] - log Z``.

The bracket is the residual mask of the labelling (Eq. 1 and 13 of Zhang et al., 2021). The background, state 0, has no
residual: ``rho_s(0) = 0``. A change from ``a`` to ``c`` adds ``rho_s(a) + rho_s(c)``, one term for each state. So a
message along the chain costs O(C) for C states. Drawn voxels are clamped to what was drawn.

``R`` residual channels with ``C = R + 1`` segmentation channels are classes of a softmax, one chain of ``C`` states for
each position. ``R`` residual channels with ``C = R`` are independent sigmoids, ``R`` chains of two states.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from monai.utils import convert_to_dst_type, convert_to_tensor, ensure_tuple

from monai_conres.residual import check_ignore_index, check_values, inter_slice_residual, slice_dim

__all__ = [
    "ChainSettings",
    "SliceChain",
    "best_labelling",
    "complete_mask",
    "log_partition",
    "next_slice",
    "slice_marginals",
]

Operation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of two tensors

# finite, because a logsumexp of nothing but -inf has NaN gradients; its exponential is zero
IMPOSSIBLE = -1e6
# the smallest probability of an error that counts for the slice to draw next
DOUBT = 0.05
# positions that go through the chain together: on a CPU what fits the cache
BLOCK = {"cpu": 8192}
LARGE_BLOCK = 65536
# of a volume, whose potentials are computed one after the other
PARTS = 16


@dataclass(frozen=True, kw_only=True)
class ChainSettings:
    """Weights of the chain: how far the chain trusts segmentation, residual decoder and image.

    ``u = tau * logits`` and ``rho = residual_scale * residual logits + image_contrast * |I_s - I_{s-1}| + offset``.
    ``I`` is the image as the network sees it, and the contrast is the mean over its channels.
    ``dataclasses.asdict(settings)`` gives plain values for a JSON file, and ``ChainSettings(**values)`` reads these
    values.

    Args:
        tau: weight of the segmentation, 0 or more.
        residual_scale: weight of the residual logits, 0 or more.
        image_contrast: weight of the image's inter-slice contrast, 0 or more.
        offset: one number for all classes, or one for each class that has a residual.

    Raises:
        ValueError: when a number is not finite, or a weight is negative.

    Example:
        >>> from dataclasses import asdict
        >>> settings = ChainSettings(tau=0.25, offset=[-2.0, -1.0])
        >>> asdict(settings)
        {'tau': 0.25, 'residual_scale': 0.5, 'image_contrast': 0.5, 'offset': (-2.0, -1.0)}
        >>> ChainSettings(**asdict(settings)) == settings
        True
    """

    # below 1, because the errors of neighboring slices go together; fitted on three data sets: 0.07 to 0.27
    tau: float = 0.25
    residual_scale: float = 0.5
    image_contrast: float = 0.5
    # among others, the weighted loss of Eq. 8 raises the residual logits by log(w_1 / w_0)
    offset: float | Sequence[float] = -2.0

    def __post_init__(self) -> None:
        for name in ("tau", "residual_scale", "image_contrast"):
            object.__setattr__(self, name, float(getattr(self, name)))
        offset = tuple(map(float, self.offset)) if isinstance(self.offset, Iterable) else float(self.offset)
        object.__setattr__(self, "offset", offset)
        weights = torch.tensor([self.tau, self.residual_scale, self.image_contrast])
        if not (weights.isfinite().all() and weights.min() >= 0 and torch.tensor(self.offset).isfinite().all()):
            raise ValueError(
                f"expected finite numbers, and weights of 0 or more, got {self}; fit_chain finds the weights of a "
                "network on its training cases."
            )


# Equations of one block of chains. Shapes: unary (slices, states, positions); steps (slices - 1, states, positions),
# where steps[s - 1] holds rho between the slices s - 1 and s, with the zeros of the background.


def _others(values: torch.Tensor, add: Operation) -> torch.Tensor:
    """For each state, the sum of ``values`` over all *other* states.

    It joins a running sum from the left and one from the right. The total minus the own term would cancel.
    """
    states = values.unbind()
    left = list(accumulate(states[:-1], add))  # left[c]: states 0 to c
    right = list(accumulate(states[:0:-1], add))[::-1]  # right[c]: states c + 1 to the last
    return torch.stack([right[0], *map(add, left, right[1:]), left[-1]])


def _messages(
    unary: Sequence[torch.Tensor], steps: Sequence[torch.Tensor], add: Operation
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What the slices before tell each slice: ``m_0 = 0``, and with the scores ``f = u_{s-1} + m_{s-1}``

    ``m_s(c) = add(f(c), rho_s(c) + add over a != c of (f(a) + rho_s(a)))``.

    ``add`` is ``logaddexp`` for marginals and ``maximum`` for the best labelling. The maximum of each slice's scores is
    taken off, so that long chains keep their digits. A clamped slice then has the score 0 in its state, so the messages
    after it have the same bits, whatever comes before. The second result is the sum of these maxima, ``(positions)``.
    """
    messages = [torch.zeros_like(unary[0])]
    scale = torch.zeros_like(unary[0][0])
    for u, rho in zip(unary[:-1], steps, strict=True):
        score = u + messages[-1]
        top = score.detach().amax(0)
        score = score - top
        messages.append(add(score, rho + _others(score + rho, add)))
        scale = scale + top
    return messages, scale


def _scores(unary: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Log marginals up to a constant for each voxel: unary, message from the left, message from the right."""
    forward, back = unary.unbind(), unary.unbind()[::-1]
    left, _ = _messages(forward, steps.unbind(), torch.logaddexp)
    right, _ = _messages(back, steps.unbind()[::-1], torch.logaddexp)
    return torch.stack([u + before + after for u, before, after in zip(forward, left, right[::-1], strict=True)])


def _log_marginals(unary: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    return _scores(unary, steps).log_softmax(1)


def _log_odds(unary: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Log-odds of the marginals of two-state chains, ``(slices, 1, positions)``."""
    return _scores(unary, steps).diff(dim=1)


def _log_partition(unary: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """``log Z`` of each chain, ``(1, 1, positions)``."""
    messages, scale = _messages(unary.unbind(), steps.unbind(), torch.logaddexp)
    return (scale + (unary[-1] + messages[-1]).logsumexp(0))[None, None]


def _best_labelling(unary: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """States of the most probable labelling (Viterbi), ``(slices, 1, positions)``."""
    scores = unary + torch.stack(_messages(unary.unbind(), steps.unbind(), torch.maximum)[0])
    states = [scores[-1].argmax(0, keepdim=True)]
    for score, rho in zip(scores[:-1].flip(0), steps.flip(0), strict=True):
        following = states[-1]
        stay, change = score.gather(0, following), score + rho + rho.gather(0, following)
        states.append(change.scatter(0, following, stay).argmax(0, keepdim=True))
    return torch.stack(states[::-1])


def _is_background(unary: torch.Tensor, steps: torch.Tensor, tolerance: float) -> torch.Tensor:
    """Positions where no foreground marginal exceeds ``tolerance`` times the background's, by a bound that is cheap.

    With ``q_s(k) = exp(u_s(k) - u_s(0))`` and ``e_s(k) = exp(rho_s(k))``, a message relative to the background's is
    ``m_s(k) = e_s(k) + (1 - e_s(k)^2) q_{s-1}(k) m_{s-1}(k) / (1 + sum_j q_{s-1}(j) m_{s-1}(j) e_s(j))``. So
    ``m_s <= e_s + q_{s-1} m_{s-1}`` for the largest of each over the classes.
    """
    odds, change = (unary[:, 1:].amax(1) - unary[:, 0]).exp(), steps[:, 1:].amax(1).exp()

    def messages(odds: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        bounds = [torch.ones_like(odds[0])]
        for q, e in zip(odds[:-1], change, strict=True):
            bounds.append(e + q * bounds[-1])
        return torch.stack(bounds)

    left, right = messages(odds, change), messages(odds.flip(0), change.flip(0)).flip(0)
    return (left * odds * right < tolerance).all(0)


def _marginal_states(unary: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """The state with the largest marginal, ``(slices, 1, positions)``; background where nothing else can be."""
    uncertain = ~_is_background(unary, steps, tolerance=0.99)  # below 1, so the result is exact
    states = unary.new_zeros(len(unary), 1, unary.shape[2], dtype=torch.int16)
    scores = _scores(unary[..., uncertain], steps[..., uncertain])
    states[..., uncertain] = scores.max(1, keepdim=True).indices.to(torch.int16)  # argmax takes 8 times as long
    return states


def _error_probabilities(unary: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Probability that the state with the largest marginal is wrong, ``(slices, 1, positions)``; zero below DOUBT."""
    uncertain = ~_is_certain(unary, steps)
    errors = unary.new_zeros(len(unary), 1, unary.shape[2])
    errors[..., uncertain] = _states_and_errors(unary[..., uncertain], steps[..., uncertain])[1]
    return errors


def _is_certain(unary: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Positions that are background in all slices, with a probability of an error below DOUBT."""
    # where each foreground class has at most this much, all of them together stay below DOUBT, so the result is exact
    return _is_background(unary, steps, tolerance=DOUBT / (unary.shape[1] - 1))


def _states_and_errors(unary: torch.Tensor, steps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The state with the largest marginal, and the probability that it is wrong, zero below DOUBT."""
    scores = _scores(unary, steps)
    states = scores.max(1, keepdim=True).indices.to(torch.int16)  # argmax takes 8 times as long
    return states, F.threshold(-scores.log_softmax(1).amax(1, keepdim=True).expm1(), DOUBT, 0.0)


# From volumes to blocks of chains and back.


def _has_gaps(positions: torch.Tensor) -> bool:
    """Whether positions in order are not next to each other, or there are none."""
    return not len(positions) or int(positions[-1] - positions[0]) >= len(positions)


def _along_slices(
    equation: Operation, unary: torch.Tensor, residual: torch.Tensor, drawn: torch.Tensor | None, spatial_axis: int
) -> torch.Tensor:
    """``equation`` of the chains of all positions, a block at a time; its result as a volume."""
    _check_shapes(unary, residual, drawn)
    dim = slice_dim(unary.ndim, spatial_axis)
    batch, channels = unary.shape[:2]
    volumes = [convert_to_tensor(x, track_meta=False) for x in (unary, residual, drawn) if x is not None]
    if channels == residual.shape[1]:  # sigmoids: each channel is a case of its own
        volumes = [x.reshape(-1, 1, *x.shape[2:]) for x in volumes]
    chains = [x.movedim((dim, 1), (0, 1)) for x in volumes]
    block = BLOCK.get(unary.device.type, LARGE_BLOCK)
    blocks = zip(*(x.flatten(2).split(block, dim=2) for x in chains), strict=True)
    result = torch.cat([equation(*_chain(*block)) for block in blocks], dim=2)
    result = result.unflatten(2, chains[0].shape[2:]).movedim((0, 1), (dim, 1))
    return result.reshape(batch, -1, *result.shape[2:]).contiguous()  # nll_loss has no gradient otherwise


def _chain(
    unary: torch.Tensor, residual: torch.Tensor, drawn: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``unary`` and ``steps`` of a block, from ``(slices, c, positions)`` of the volumes."""
    dtype = torch.promote_types(torch.promote_types(unary.dtype, residual.dtype), torch.float32)
    is_sigmoid = unary.shape[1] == residual.shape[1]
    unary = unary.to(dtype).contiguous()
    if is_sigmoid:
        unary = F.pad(unary, (0, 0, 1, 0))  # logits are log-odds relative to the background
    steps = F.pad(residual[1:].to(dtype), (0, 0, 1, 0))  # the background has no residual
    if drawn is not None:
        states = torch.arange(unary.shape[1], dtype=drawn.dtype, device=unary.device)[:, None]
        unary = unary.masked_fill((drawn >= 0) & (drawn != states), IMPOSSIBLE)
    return unary, steps


def _check_shapes(unary: torch.Tensor, residual: torch.Tensor, drawn: torch.Tensor | None = None) -> None:
    """Raise unless the tensors are of one size, and their channels fit each other."""
    classes, foreground = unary.shape[1], residual.shape[1]
    if foreground < 1 or classes not in (foreground, foreground + 1):
        raise ValueError(
            f"expected as many residual channels as segmentation channels (sigmoids), or one less (a softmax with the "
            f"background in channel 0), got {foreground} and {classes}; give both outputs of network.with_residual."
        )
    expected = {"residual": (residual, foreground)}
    if drawn is not None:
        expected["drawn"] = (drawn, 1 if classes > foreground else classes)
    for name, (tensor, channels) in expected.items():
        shape = (len(unary), channels, *unary.shape[2:])
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"expected {name} of shape {shape} for a segmentation of shape {tuple(unary.shape)}, got "
                f"{tuple(tensor.shape)}; give tensors of the same scan, with class indices in one channel for a "
                "softmax and one channel for each sigmoid."
            )


def slice_marginals(
    unary: torch.Tensor, residual: torch.Tensor, drawn: torch.Tensor | None = None, *, spatial_axis: int = -1
) -> torch.Tensor:
    """Marginals of the slice chain by forward-backward, exact and differentiable.

    Args:
        unary: ``(b, c, *spatial)``, the unary potentials: logits of the segmentation, or log probabilities of a
            softmax. They may carry a weight.
        residual: ``(b, r, *spatial)``, the log-odds ``rho`` that a voxel differs from the slice before it. The chain
            never uses the values of the first slice. ``c = r + 1`` is a softmax, ``c = r`` are sigmoids.
        drawn: voxels to clamp, of an integer dtype; negative where nothing is drawn. ``(b, 1, *spatial)`` class indices
            for a softmax, ``(b, c, *spatial)`` zeros and ones for sigmoids.
        spatial_axis: index of the slice axis among the spatial axes.

    Returns:
        ``(b, c, *spatial)`` in float32 or wider: log marginals for a softmax, log-odds of the marginals for sigmoids.
        So a ``softmax`` (``sigmoid``) of the result gives the marginals, and a loss for ``unary`` takes the result.
        Excluded states have about -1e6.

    Raises:
        ValueError: when shapes do not fit each other, or ``spatial_axis`` is none of the spatial axes.

    Example:
        >>> unary, residual = torch.zeros(1, 1, 4), torch.full((1, 1, 4), -2.0)
        >>> drawn = torch.tensor([[[-1, 1, -1, -1]]])  # the second of four slices is drawn inside
        >>> slice_marginals(unary, residual, drawn).sigmoid()
        tensor([[[0.8808, 1.0000, 0.8808, 0.7900]]])
    """
    is_softmax = unary.shape[1] > residual.shape[1]
    return _along_slices(_log_marginals if is_softmax else _log_odds, unary, residual, drawn, spatial_axis)


def log_partition(
    unary: torch.Tensor, residual: torch.Tensor, drawn: torch.Tensor | None = None, *, spatial_axis: int = -1
) -> torch.Tensor:
    """``log Z`` of each chain: the logarithm of the summed weights of all labellings that agree with ``drawn``.

    ``log_partition(u, rho, drawn) - log_partition(u, rho)`` is the log likelihood of what was drawn.

    Arguments and errors are those of :func:`slice_marginals`.

    Returns:
        ``(b, 1, *spatial)`` for a softmax, ``(b, c, *spatial)`` for sigmoids, with one slice along the slice axis.

    Example:
        >>> log_partition(torch.zeros(1, 1, 3), torch.zeros(1, 1, 3)).exp().round()  # 2 ** 3 labellings of weight 1
        tensor([[[8.]]])
    """
    return _along_slices(_log_partition, unary, residual, drawn, spatial_axis)


def best_labelling(
    unary: torch.Tensor, residual: torch.Tensor, drawn: torch.Tensor | None = None, *, spatial_axis: int = -1
) -> torch.Tensor:
    """The most probable labelling of each chain, by the Viterbi algorithm.

    Arguments and errors are those of :func:`slice_marginals`.

    Returns:
        ``int64``: class indices ``(b, 1, *spatial)`` for a softmax, zeros and ones ``(b, c, *spatial)`` for sigmoids.

    Example:
        >>> unary, residual = torch.zeros(1, 1, 4), torch.tensor([[[0.0, -9.0, 9.0, -9.0]]])
        >>> best_labelling(unary, residual, torch.tensor([[[1, -1, -1, -1]]]))
        tensor([[[1, 1, 0, 0]]])
    """
    return _along_slices(_best_labelling, unary, residual, drawn, spatial_axis)


# What users call: from logits and drawn slices.


def potentials(
    segmentation: torch.Tensor,
    residual: torch.Tensor,
    image: torch.Tensor | None,
    spatial_axis: int,
    *,
    tau: Any,
    residual_scale: Any,
    image_contrast: Any,
    offset: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``u`` and ``rho`` as :class:`ChainSettings` has them; the weights are numbers or tensors."""
    foreground = residual.shape[1]
    segmentation, residual = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (segmentation, residual))
    offset = torch.as_tensor(offset, dtype=residual.dtype, device=residual.device)
    if offset.ndim and len(offset) != foreground:
        raise ValueError(
            f"expected one offset for all classes, or one for each of {foreground}, got {len(offset)}; take the "
            "settings that were fitted for this network."
        )
    rho = residual_scale * residual + offset.view(1, -1, *(1,) * (residual.ndim - 2))
    if image is not None:
        contrast = inter_slice_residual(image, spatial_axis=spatial_axis).to(residual.dtype)
        rho = rho + image_contrast * contrast.mean(1, keepdim=True)
    return tau * segmentation, rho


def broadcast_slices(slices: torch.Tensor, ndim: int, dim: int) -> torch.Tensor:
    """``(b, slices)`` as ``(b, 1, ..., slices, ..., 1)``."""
    return slices.view(len(slices), *(slices.shape[1] if d == dim else 1 for d in range(1, ndim)))


def _drawn_slices(
    slices: Sequence[int] | Sequence[Sequence[int]] | None, labelled: torch.Tensor, dim: int
) -> torch.Tensor:
    """Which slices are drawn: booleans ``(b, slices)``. ``labelled`` has True where a voxel has a label."""
    batch, size = len(labelled), labelled.shape[dim]
    if slices is None:
        drawn = labelled.movedim(dim, 1).flatten(2).any(2)
    else:
        given: list[Any] = [part.tolist() if hasattr(part, "tolist") else part for part in ensure_tuple(slices)]
        cases = given if any(isinstance(case, Iterable) for case in given) else [given] * batch
        if len(cases) != batch:
            raise ValueError(
                f"expected one list of slices for each of {batch} cases, or one for all, got {len(cases)}."
            )
        drawn = torch.zeros(batch, size, dtype=torch.bool, device=labelled.device)
        for number, case in enumerate(cases):
            indices = [operator.index(index) for index in case]
            if any(isinstance(index, bool) for index in case):
                raise ValueError(f"expected numbers of slices, got {case}; give [3] for the fourth slice.")
            if indices and not 0 <= min(indices) <= max(indices) < size:
                raise ValueError(
                    f"expected slices from 0 to {size - 1}, got {indices}; they count along spatial_axis, from 0."
                )
            drawn[number, indices] = True
    if not drawn.any(1).all():
        raise ValueError(
            "expected at least one drawn slice in each case, got none; draw a slice, or name a slice that is drawn "
            "empty with slices=[...]."
        )
    return drawn


def _checked_logits(
    segmentation: torch.Tensor,
    residual: torch.Tensor | None,
    image: torch.Tensor | None,
    spatial_axis: int,
    sigmoid: bool,
    softmax: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Segmentation, residual and image as plain tensors that fit each other; a missing residual is zero."""
    slice_dim(segmentation.ndim, spatial_axis)
    segmentation = convert_to_tensor(segmentation, track_meta=False)
    classes = segmentation.shape[1]
    if residual is None:
        if image is None or sigmoid == softmax:
            raise ValueError(
                "expected image, and one of sigmoid=True and softmax=True, where residual is None; without a residual "
                "decoder the image's contrast takes its place."
            )
        residual = segmentation.new_zeros(()).expand(len(segmentation), classes - softmax, *segmentation.shape[2:])
    residual = convert_to_tensor(residual, track_meta=False)
    _check_shapes(segmentation, residual)
    is_softmax = classes > residual.shape[1]
    if (sigmoid and is_softmax) or (softmax and not is_softmax):
        raise ValueError(
            f"expected {'softmax' if is_softmax else 'sigmoid'} for {classes} segmentation and {residual.shape[1]} "
            f"residual channels, got sigmoid={sigmoid} and softmax={softmax}; leave out both."
        )
    if image is not None:
        image = convert_to_tensor(image, track_meta=False, device=segmentation.device)
        if len(image) != len(segmentation) or image.shape[2:] != segmentation.shape[2:]:
            raise ValueError(
                f"expected an image of the segmentation's size {tuple(segmentation.shape)}, got {tuple(image.shape)}; "
                "give the image that the network saw."
            )
    return segmentation, residual, image


def _finite_potentials(
    segmentation: torch.Tensor,
    residual: torch.Tensor,
    image: torch.Tensor | None = None,
    *,
    settings: ChainSettings | None,
    spatial_axis: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``u`` and ``rho``, which are so small that a drawn voxel always wins."""
    unary, rho = potentials(segmentation, residual, image, spatial_axis, **vars(settings or ChainSettings()))
    if not (torch.stack([*torch.aminmax(unary), *torch.aminmax(rho)]).abs() < -IMPOSSIBLE / 10).all():  # NaN propagates
        raise ValueError(
            f"expected finite logits and a finite image, with numbers below {-IMPOSSIBLE / 10:.0f} in the chain, got "
            "larger ones or NaN; check the network's output, and normalize the image as for the network."
        )
    return unary, rho


def _prepare(
    segmentation: torch.Tensor,
    residual: torch.Tensor | None,
    drawn: torch.Tensor,
    slices: Sequence[int] | Sequence[Sequence[int]] | None,
    image: torch.Tensor | None,
    settings: ChainSettings | None,
    spatial_axis: int,
    sigmoid: bool,
    softmax: bool,
    ignore_index: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``u``, ``rho``, the voxels to clamp and the drawn slices, with everything checked."""
    logits = _checked_logits(segmentation, residual, image, spatial_axis, sigmoid, softmax)
    unary, rho = _finite_potentials(*logits, settings=settings, spatial_axis=spatial_axis)
    drawn = convert_to_tensor(drawn, track_meta=False, device=unary.device)
    _check_shapes(unary, rho, drawn)
    dim = slice_dim(drawn.ndim, spatial_axis)
    classes = unary.shape[1] if unary.shape[1] > rho.shape[1] else 0
    if classes > 2 and drawn.dtype == torch.bool:
        raise ValueError(f"expected drawn class indices from 0 to {classes - 1}, got booleans; convert drawn to uint8.")
    if ignore_index is not None:
        check_ignore_index(ignore_index, drawn.dtype, classes or 2)
    kept = torch.ones_like(drawn, dtype=torch.bool) if ignore_index is None else drawn != ignore_index
    is_drawn = _drawn_slices(slices, drawn != 0 if ignore_index is None else kept, dim)
    known = broadcast_slices(is_drawn, drawn.ndim, dim) & kept
    _check_classes(drawn[known], classes)
    return unary, rho, drawn.to(torch.int16).masked_fill(~known, -1), is_drawn


def _check_classes(drawn: torch.Tensor, classes: int) -> None:
    """Raise unless drawn values are indices of the classes of a softmax; of 0 classes: zeros and ones."""
    expected = f"class indices from 0 to {classes - 1}" if classes else "zeros and ones"
    check_values(drawn.cpu(), classes or 2, f"{expected} in the drawn slices")


@torch.no_grad()
def complete_mask(
    segmentation: torch.Tensor,
    residual: torch.Tensor | None,
    drawn: torch.Tensor,
    *,
    slices: Sequence[int] | Sequence[Sequence[int]] | None = None,
    image: torch.Tensor | None = None,
    settings: ChainSettings | None = None,
    spatial_axis: int = -1,
    sigmoid: bool = False,
    softmax: bool = False,
    ignore_index: int | None = None,
) -> torch.Tensor:
    """Complete a volume from a few drawn slices: the class with the largest marginal in each voxel.

    Args:
        segmentation: ``(b, c, *spatial)`` logits, as ``network.with_residual(image)`` gives them.
        residual: ``(b, r, *spatial)`` logits of the residual masks, from the same call. ``c = r + 1`` is a softmax,
            ``c = r`` are sigmoids. ``None``: only the image's contrast tells where the mask changes.
        drawn: what was drawn, of any dtype. ``(b, 1, *spatial)`` class indices for a softmax, ``(b, c, *spatial)``
            zeros and ones for sigmoids. Slices that are not drawn may hold any values.
        slices: indices of the drawn slices, from 0: one list for all cases, or one list for each case. ``None`` takes
            the slices with any label, with ``ignore_index`` those with any other value. Without it, if a drawn slice is
            empty, name all drawn slices.
        image: ``(b, i, *spatial)`` as the network sees it, for the image contrast.
        settings: weights of the chain; ``None`` is ``ChainSettings()``.
        spatial_axis: index of the slice axis among the spatial axes.
        sigmoid: True says that the segmentation has sigmoids, if ``residual`` is ``None``.
        softmax: True says that the segmentation has a softmax, if ``residual`` is ``None``.
        ignore_index: value of voxels that are not drawn, such as 255. All others are drawn, background too.

    Returns:
        The completed volume with the shape and dtype of ``drawn``. Drawn voxels keep what was drawn.

    Note:
        If you draw one slice after another, :class:`SliceChain` computes only what changes.

    Raises:
        ValueError: when shapes do not fit each other, no slice is drawn, a slice is outside the volume, logits are not
            finite, drawn values are not classes of the network, or ``ignore_index`` is one.

    Example:
        >>> mask = torch.tensor([[[1, 1, 0, 0, 1]]])
        >>> segmentation, residual = torch.zeros(1, 1, 5), torch.tensor([[[-9.0, -9.0, 9.0, -9.0, 9.0]]])
        >>> drawn = torch.tensor([[[0, 1, 0, 0, 0]]])
        >>> complete_mask(segmentation, residual, drawn, slices=[1])
        tensor([[[1, 1, 0, 0, 1]]])
    """
    unary, rho, clamped, _ = _prepare(
        segmentation, residual, drawn, slices, image, settings, spatial_axis, sigmoid, softmax, ignore_index
    )
    return convert_to_dst_type(_along_slices(_marginal_states, unary, rho, clamped, spatial_axis), drawn)[0]


@torch.no_grad()
def next_slice(
    segmentation: torch.Tensor,
    residual: torch.Tensor | None,
    drawn: torch.Tensor,
    *,
    slices: Sequence[int] | Sequence[Sequence[int]] | None = None,
    image: torch.Tensor | None = None,
    settings: ChainSettings | None = None,
    spatial_axis: int = -1,
    sigmoid: bool = False,
    softmax: bool = False,
    ignore_index: int | None = None,
) -> list[dict[int, float]]:
    """Which slice to draw next: the slices that are not drawn, the most uncertain first.

    Arguments and errors are those of :func:`complete_mask`.

    Returns:
        A dictionary for each case. Its keys are the slices that are not drawn. Its values say how many voxels
        :func:`complete_mask` probably gets wrong, in descending order: the sum of ``1 - max p`` over the voxels where
        ``1 - max p`` is more than 0.05. ``next(iter(ranking))`` is the slice to draw next. The dictionary is empty when
        all slices are drawn.

    Note:
        A volume has many thousand voxels of almost certain background, above all in its first and last slices, which
        have only one neighbor. The sum of all entropies would propose these slices.

    Example:
        >>> segmentation, residual = torch.tensor([[[9.0, 2.0, 0.0, -1.0, -9.0]]]), torch.zeros(1, 1, 5)
        >>> (ranking,) = next_slice(segmentation, residual, torch.tensor([[[1, 0, 0, 0, 0]]]))
        >>> list(ranking)
        [2, 3, 4, 1]
    """
    unary, rho, clamped, is_drawn = _prepare(
        segmentation, residual, drawn, slices, image, settings, spatial_axis, sigmoid, softmax, ignore_index
    )
    errors = _along_slices(_error_probabilities, unary, rho, clamped, spatial_axis)
    errors = errors.movedim(slice_dim(errors.ndim, spatial_axis), 1).flatten(2).sum(2)
    rankings = []
    for expected, known in zip(errors.tolist(), is_drawn.tolist(), strict=True):
        candidates = [index for index, is_known in enumerate(known) if not is_known]
        rankings.append({index: expected[index] for index in sorted(candidates, key=lambda i: -expected[i])})
    return rankings


class SliceChain:
    """The chain of one volume whose slices are drawn one after the other: only what changes is computed.

    A drawn slice cuts the chain. So a slice that is drawn, or taken back, changes nothing beyond its drawn neighbors.
    The results have the same bits as those of :func:`complete_mask` for the whole volume.

    Args:
        segmentation: ``(c, *spatial)`` logits of one case.
        residual: ``(r, *spatial)`` logits, or ``None``, as in :func:`complete_mask`.
        image: ``(i, *spatial)`` as the network sees it, for the image contrast.
        drawn: drawn slices, as :meth:`draw` takes them. Without drawn slices, the chain completes from the network's
            output.
        settings: weights of the chain; ``None`` is ``ChainSettings()``.
        spatial_axis: index of the slice axis among the spatial axes.
        sigmoid: True says that the segmentation has sigmoids, if ``residual`` is ``None``.
        softmax: True says that the segmentation has a softmax, if ``residual`` is ``None``.

    Attributes:
        drawn: numbers of the drawn slices, in order.

    Raises:
        ValueError: as :func:`complete_mask`.

    Example:
        >>> segmentation, residual = torch.zeros(1, 5), torch.tensor([[-9.0, -9.0, 9.0, -9.0, 9.0]])
        >>> chain = SliceChain(segmentation, residual)
        >>> chain.draw({1: torch.tensor([1])})  # slices that may have changed
        range(0, 5)
        >>> chain.mask
        tensor([[1, 1, 0, 0, 1]], dtype=torch.int16)
        >>> chain.draw({3: torch.tensor([1])}), chain.mask
        (range(1, 5), tensor([[1, 1, 1, 1, 0]], dtype=torch.int16))
    """

    @torch.inference_mode(False)  # draw() changes the tensors later
    @torch.no_grad()
    def __init__(
        self,
        segmentation: torch.Tensor,
        residual: torch.Tensor | None,
        *,
        image: torch.Tensor | None = None,
        drawn: Mapping[int, torch.Tensor | None] | None = None,
        settings: ChainSettings | None = None,
        spatial_axis: int = -1,
        sigmoid: bool = False,
        softmax: bool = False,
    ) -> None:
        residual, image = (None if part is None else part[None] for part in (residual, image))
        logits = _checked_logits(segmentation[None], residual, image, spatial_axis, sigmoid, softmax)
        self._dim = slice_dim(logits[0].ndim, spatial_axis) - 1
        self._classes = logits[0].shape[1]
        self._is_softmax = self._classes > logits[1].shape[1]
        # (1, c, slices, *plane, 1); one part of the plane at a time, because results in between also need memory
        volumes = [x.movedim(self._dim + 1, 2)[..., None] for x in logits if x is not None]
        self._plane = volumes[0].shape[3:-1]
        rows = volumes[0].shape[3]
        chains: list[torch.Tensor] = []
        for start in range(0, rows, step := -(-rows // PARTS)):
            part = _finite_potentials(*(x[:, :, :, start : start + step] for x in volumes), settings=settings)
            chains = chains or [x.new_empty(x.shape[2], x.shape[1], rows, *x.shape[4:]) for x in part]
            for chain, values in zip(chains, part, strict=True):
                chain[:, :, start : start + step] = values[0].movedim(1, 0)
        # (slices, channels, positions); sigmoids are chains of one channel
        self._unary, self._rho = (x.flatten(2) if self._is_softmax else x.flatten(1)[:, None] for x in chains)
        self._states = torch.zeros_like(self._unary[:, :1], dtype=torch.int16)
        self._errors = torch.zeros_like(self._states, dtype=torch.uint8)
        self._expected = [0.0] * len(self._unary)
        self._clamped: dict[int, torch.Tensor] = {}  # (1, positions) by slice
        # a slice that is drawn as background makes no position uncertain
        certain = self._map(lambda block: _is_certain(*_chain(self._unary[..., block], self._rho[..., block])))
        self._uncertain = ~torch.cat(certain)
        self._set(drawn or {})
        self._update(range(len(self._unary)))

    @property
    def drawn(self) -> list[int]:
        return sorted(self._clamped)

    @property
    def mask(self) -> torch.Tensor:
        """The completed volume in int16: class indices ``(1, *spatial)``, or zeros and ones ``(c, *spatial)``."""
        return self._volume(self._states)

    @property
    def error(self) -> torch.Tensor:
        """The probability that a voxel of :attr:`mask` is wrong, in steps of 1 / 255 (uint8); zero below 0.05."""
        return self._volume(self._errors)

    def plane(self, number: int) -> torch.Tensor:
        """A slice of :attr:`mask`, as :meth:`draw` takes it."""
        plane = self._states[number].view(-1, *self._plane)
        return plane[0] if self._is_softmax else plane

    def ranking(self) -> dict[int, float]:
        """Which slice to draw next, as :func:`next_slice` returns it for one case."""
        candidates = [number for number in range(len(self._expected)) if number not in self._clamped]
        candidates.sort(key=lambda number: -self._expected[number])
        return {number: self._expected[number] for number in candidates}

    @torch.no_grad()
    def draw(self, slices: Mapping[int, torch.Tensor | None]) -> range:
        """Draw slices, or take them back, and complete what changes.

        Args:
            slices: by number, from 0, what was drawn: class indices of the plane's shape for a softmax, zeros and ones
                ``(c, *plane)`` for sigmoids. ``None`` takes the slice back.

        Returns:
            The slices that may have changed.

        Raises:
            ValueError: when a slice is outside the volume, has another shape, or other classes.
        """
        if not slices:
            return range(0)
        self._set(slices)
        others = self._clamped.keys() - slices.keys()
        low = max((number for number in others if number < min(slices)), default=0)
        high = min((number for number in others if number > max(slices)), default=len(self._unary) - 1)
        changed = range(low, high + 1)
        self._update(changed)
        return changed

    def _set(self, slices: Mapping[int, torch.Tensor | None]) -> None:
        """Check drawn slices and keep them."""
        checked: dict[int, torch.Tensor | None] = {}
        for index, drawn in slices.items():
            number = operator.index(index)
            if not 0 <= number < len(self._unary):
                raise ValueError(
                    f"expected slices from 0 to {len(self._unary) - 1}, got {number}; they count along spatial_axis."
                )
            checked[number] = None
            if drawn is not None:
                drawn = convert_to_tensor(drawn, track_meta=False).to(self._unary.device)
                shape = self._plane if self._is_softmax else (self._classes, *self._plane)
                if drawn.shape != shape:
                    raise ValueError(f"expected a slice of shape {tuple(shape)}, got {tuple(drawn.shape)}.")
                _check_classes(drawn, self._classes if self._is_softmax else 0)
                checked[number] = drawn.reshape(1, -1).to(torch.int16)
        for number, clamped in checked.items():
            if clamped is None:
                self._clamped.pop(number, None)
            else:
                self._clamped[number] = clamped

    def _update(self, changed: range) -> None:
        """Complete slices from one end or drawn slice to the next one, both included."""
        stretch = slice(changed.start, changed.stop)
        drawn = torch.full_like(self._states[stretch], -1)
        uncertain = self._uncertain.clone()
        for number in self._clamped.keys() & set(changed):
            drawn[number - changed.start] = self._clamped[number]
            uncertain |= self._clamped[number][0] > 0
        states, errors = self._states[stretch].zero_(), self._errors[stretch].zero_()
        unary, rho = self._unary[stretch], self._rho[stretch]

        def complete(block: torch.Tensor) -> torch.Tensor:
            chain = _chain(*(volume[..., block] for volume in (unary, rho, drawn)))
            states[..., block], error = _states_and_errors(*chain)
            errors[..., block] = (255 * error).round().to(errors.dtype)
            return error.sum((1, 2))

        sums = self._map(complete, uncertain.nonzero()[:, 0])
        self._expected[stretch] = sum(sums, torch.zeros(len(drawn), device=drawn.device)).tolist()

    def _map(self, function: Callable[..., torch.Tensor], positions: torch.Tensor | None = None) -> list[torch.Tensor]:
        """A function of each block of positions; ``None``: of all. Blocks are too small for torch's own threads."""
        size = BLOCK.get(self._unary.device.type, LARGE_BLOCK)
        blocks: Sequence[Any]
        if positions is None:  # slices copy less than indices
            blocks = [slice(start, start + size) for start in range(0, self._unary.shape[2], size)]
        else:
            blocks = [
                block if _has_gaps(block) else slice(int(block[0]), int(block[-1]) + 1)
                for block in positions.split(size)
            ]

        def without_gradients(block: Any) -> torch.Tensor:
            with torch.no_grad():  # each thread has its own switch
                return function(block)

        if self._unary.device.type != "cpu" or torch.get_num_threads() == 1:
            return list(map(without_gradients, blocks))
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            return list(threads.map(without_gradients, blocks))

    def _volume(self, chains: torch.Tensor) -> torch.Tensor:
        """``(c, *spatial)`` from ``(slices, 1, positions)``."""
        return chains.view(len(chains), -1, *self._plane).movedim(0, self._dim)
