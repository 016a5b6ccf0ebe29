"""Inter-slice residuals: the one definition that network, losses and transforms share.

Every function takes tensors of shape ``(b, c, *spatial)``. The slice axis is ``spatial_axis``, an index among the
*spatial* axes, ``-1`` (the last one) by default: after ``Orientationd("RAS")`` that is the axial view.
"""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as forward_ad

__all__ = ["inter_slice_residual", "residual_mask", "restore_mask"]


def slice_dim(ndim: int, spatial_axis: int) -> int:
    """Tensor dimension of the slice axis, in a tensor of shape ``(b, c, *spatial)`` with ``ndim`` dimensions.

    Args:
        ndim: number of dimensions of the tensor, batch and channel included.
        spatial_axis: index of the slice axis among the spatial axes; negative counts from the end.

    Raises:
        ValueError: when there is no spatial axis, or ``spatial_axis`` is none of them.

    Example:
        >>> slice_dim(5, -1), slice_dim(5, 0)
        (4, 2)
    """
    spatial = ndim - 2
    if spatial < 1:
        raise ValueError(
            f"expected a tensor of shape (b, c, *spatial), got {ndim} dimension(s); "
            "add the missing batch or channel dimension with tensor[None]."
        )
    if not -spatial <= spatial_axis < spatial:
        raise ValueError(
            f"expected spatial_axis between {-spatial} and {spatial - 1} for {spatial} spatial axes, got {spatial_axis}"
            "; it counts the spatial axes only, without batch and channel."
        )
    return 2 + spatial_axis % spatial


def is_traced() -> bool:
    """Whether a tracer, a compiler, torch.func or forward-mode differentiation is at work.

    Layouts and what is kept are theirs to choose.
    """
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return True
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_watched(tensor: torch.Tensor) -> bool:
    """Whether something sees to each operation, as tools do that count them, or that have tensors without values."""
    own = type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    return own or torch._C._len_torch_dispatch_stack() > 0


def foreground_masks(
    label: torch.Tensor, *, num_classes: int | None = None, include_background: bool = True
) -> torch.Tensor:
    """A mask of zeros and ones for each class that has a residual, with the label's values checked.

    Args:
        label: as for :func:`residual_mask`.
        num_classes: as for :func:`residual_mask`.
        include_background: as for :func:`residual_mask`.

    Returns:
        Zeros and ones in the dtype of ``label``, one channel per class.

    Raises:
        ValueError: as :func:`residual_mask`.

    Example:
        >>> foreground_masks(torch.tensor([[[0, 2, 2, 1]]]), num_classes=3)
        tensor([[[0, 0, 0, 1],
                 [0, 1, 1, 0]]])
    """
    if num_classes is None:
        if not include_background:
            if label.shape[1] < 2:
                raise ValueError(
                    f"expected a one-hot label of 2 or more channels with include_background=False, got shape "
                    f"{tuple(label.shape)}; pass num_classes for class indices, or include_background=True."
                )
            label = label[:, 1:]
        label = _wide(label)
        check_values(label, 2, "zeros and ones, or class indices together with num_classes")
        return label
    if num_classes < 2:
        raise ValueError(f"expected num_classes of 2 or more (background included), got {num_classes}.")
    if label.shape[1] != 1:
        raise ValueError(
            f"expected class indices of shape (b, 1, *spatial) with num_classes={num_classes}, got shape "
            f"{tuple(label.shape)}; leave out num_classes for a label of one channel per class."
        )
    label = _wide(label)
    check_values(label, num_classes, f"class indices from 0 to {num_classes - 1}")
    classes = torch.arange(1, num_classes, device=label.device)
    return (label == classes.view(1, -1, *(1,) * (label.ndim - 2))).to(label.dtype)


def inter_slice_residual(volume: torch.Tensor, *, spatial_axis: int = -1) -> torch.Tensor:
    """Absolute difference of each slice to the one before it; zero for the first slice.

    ``residual[s + 1] = |volume[s + 1] - volume[s]|`` and ``residual[0] = 0``: Eq. 4 of Zhang et al., 2021, without its
    sigmoid, and Eq. 1 where ``volume`` is a binary mask. Differentiable.

    Args:
        volume: ``(b, c, *spatial)`` of any real or boolean dtype. Unsigned integers do not wrap around; the difference
            of signed ones has to fit their dtype, and ``uint64`` the range of ``int64``.
        spatial_axis: index of the slice axis among the spatial axes.

    Returns:
        A tensor with the shape and the dtype of ``volume``. With a single slice it is zero.

    Raises:
        ValueError: when ``volume`` has no spatial axis, or ``spatial_axis`` is none of them.

    Example:
        >>> inter_slice_residual(torch.tensor([[[1.0, 4.0, 2.0]]]))
        tensor([[[0., 3., 2.]]])
    """
    dim = slice_dim(volume.ndim, spatial_axis)
    training = volume.ndim == 5 and volume.requires_grad and not is_traced()
    if training and volume.is_contiguous(memory_format=torch.channels_last_3d):
        # the gradient of a slice is laid out in the order of its dimensions: let that be the volume's own order
        return _residual(volume.movedim(1, -1), dim - 1).movedim(-1, 1)
    return _residual(volume, dim)


def _residual(volume: torch.Tensor, dim: int) -> torch.Tensor:
    """The inter-slice residual along a dimension of the tensor."""
    first, others = _slices(dim, None, 1), _slices(dim, 1, None)
    previous, current = volume[_slices(dim, None, -1)], volume[others]
    if volume.is_floating_point() and (is_traced() or (volume.requires_grad and torch.is_grad_enabled())):
        return torch.cat([torch.zeros_like(volume[first]), (current - previous).abs()], dim=dim)
    residual = torch.empty_like(volume)
    residual[first].zero_()
    if volume.is_floating_point():  # without a temporary
        torch.sub(current, previous, out=residual[others]).abs_()
    elif volume.dtype == torch.bool:
        residual[others] = current ^ previous
    else:
        current, previous = _wide(current), _wide(previous)
        residual[others] = (torch.maximum(current, previous) - torch.minimum(current, previous)).to(volume.dtype)
    return residual


def residual_mask(
    label: torch.Tensor, *, num_classes: int | None = None, include_background: bool = True, spatial_axis: int = -1
) -> torch.Tensor:
    """Residual mask of a label: 1 where a voxel's class membership differs from the slice before it.

    Eq. 1 of Zhang et al., 2021, for each channel; Eq. 13 for several classes, where the background is ignored. The
    residual is not equivariant to a flip of the slice axis (it shifts by one slice): flip the label, then compute it.

    Args:
        label: either channels of zeros and ones ``(b, c, *spatial)`` (binary, multi-hot or one-hot), or, with
            ``num_classes``, class indices ``(b, 1, *spatial)``.
        num_classes: number of classes, background included, when ``label`` holds class indices.
        include_background: False leaves out channel 0 of a one-hot label. Class indices always leave it out.
        spatial_axis: index of the slice axis among the spatial axes.

    Returns:
        Zeros and ones in the dtype of ``label`` (``int64`` for ``uint16`` and wider unsigned ones), of shape
        ``(b, c, *spatial)``; one channel per foreground class
        (``num_classes - 1``) for class indices, ``c - 1`` channels without the background.

    Raises:
        ValueError: when shape, ``spatial_axis``, ``num_classes`` and values do not fit each other. Values are looked
            at on the CPU only: on an accelerator that would wait for the device.

    Example:
        >>> label = torch.tensor([[[0, 2, 2, 1]]])
        >>> residual_mask(label, num_classes=3)
        tensor([[[0, 0, 0, 1],
                 [0, 1, 0, 1]]])
        >>> residual_mask(label == 2)
        tensor([[[False,  True, False,  True]]])
    """
    dim = slice_dim(label.ndim, spatial_axis)
    label = foreground_masks(label, num_classes=num_classes, include_background=include_background)
    # zeros and ones, so "differs" is the whole difference: one pass and no gradient
    previous, current = label[_slices(dim, None, -1)], label[_slices(dim, 1, None)]
    residual = torch.empty_like(label, requires_grad=False)
    residual[_slices(dim, None, 1)] = 0
    changed = residual[_slices(dim, 1, None)]
    if label.is_floating_point() or is_traced():
        changed.copy_(current != previous)
    else:  # without a temporary
        torch.bitwise_xor(current, previous, out=changed)
    return residual


def restore_mask(first_slice: torch.Tensor, residual: torch.Tensor, *, spatial_axis: int = -1) -> torch.Tensor:
    """Rebuild a mask from its first slice and its residual mask: the exact inverse of :func:`residual_mask`.

    One slice and the residuals hold the whole shape (Section I of Zhang et al., 2021): a voxel is inside when it was
    inside in the first slice and changed an even number of times since, or the other way round.

    Args:
        first_slice: ``(b, c, *spatial)`` of zeros and ones, with one slice along the slice axis.
        residual: ``(b, c, *spatial)`` of zeros and ones, as :func:`residual_mask` returns.
        spatial_axis: index of the slice axis among the spatial axes.

    Returns:
        The mask, with the shape and the dtype of ``residual``.

    Raises:
        ValueError: when the shapes do not fit each other, or on values that are not zeros and ones (CPU only).

    Example:
        >>> mask = torch.tensor([[[1, 1, 0, 0, 1]]])
        >>> restore_mask(mask[..., :1], residual_mask(mask))
        tensor([[[1, 1, 0, 0, 1]]])
    """
    dim = slice_dim(residual.ndim, spatial_axis)
    expected = (*residual.shape[:dim], 1, *residual.shape[dim + 1 :])
    if tuple(first_slice.shape) != expected:
        raise ValueError(
            f"expected first_slice of shape {expected} for a residual of shape {tuple(residual.shape)}, got "
            f"{tuple(first_slice.shape)}; keep the slice axis: mask.narrow({dim}, 0, 1)."
        )
    check_values(first_slice, 2, "zeros and ones")
    check_values(residual, 2, "zeros and ones")
    changes = residual.cumsum(dim, dtype=torch.int32)  # how often each voxel has changed up to this slice
    return ((changes + first_slice.to(torch.int32)) % 2).to(residual.dtype)


def _slices(dim: int, start: int | None, stop: int | None) -> tuple[slice, ...]:
    return (*(slice(None) for _ in range(dim)), slice(start, stop))


def _wide(label: torch.Tensor) -> torch.Tensor:
    """``label`` as ``int64`` where its dtype is one that torch has hardly any operation for."""
    return label.to(torch.int64) if label.dtype in (torch.uint16, torch.uint32, torch.uint64) else label


def check_values(label: torch.Tensor, num_classes: int, expected: str) -> None:
    """Raise unless ``label`` holds whole numbers from 0 to ``num_classes - 1``.

    Only on the CPU, and not while a graph is captured: elsewhere reading a value waits for the device.
    """
    if label.dtype == torch.bool or label.device.type != "cpu" or not label.numel():
        return
    if is_traced() or torch._guards.detect_fake_mode([label]) is not None:
        return
    label = _wide(label)
    low, high = (value.item() for value in torch.aminmax(label))
    whole = not label.is_floating_point() or torch.equal(label, label.trunc())
    if not (low >= 0 and high < num_classes and whole):  # NaN fails the comparison
        got = "NaN" if low != low else f"values from {low} to {high}" + ("" if whole else ", not whole numbers")
        remedy = "map the label's values first (MapLabelValued)"
        if low >= 0 and high < num_classes:
            remedy = (
                'resample labels with mode="nearest", and round what is left (lazy resampling interpolates a little)'
            )
        raise ValueError(f"expected a label of {expected}, got {got}; {remedy}.")
