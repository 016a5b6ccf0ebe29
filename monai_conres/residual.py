"""The inter-slice residual: one definition for the network, the losses and the transforms.

Every function takes tensors of shape ``(b, c, *spatial)``. The slice axis is ``spatial_axis``, an index among the
*spatial* axes. The default ``-1`` is the last one: the axial view after ``Orientationd("RAS")``.

Where only some slices are drawn, the other slices have the value ``ignore_index``, which is no class. In a label with
one channel for each class, each channel has its own ignored voxels. A one-hot label with a background channel ignores a
voxel if any channel ignores the voxel.
"""

from __future__ import annotations

import torch
from monai.utils import convert_to_tensor

__all__ = ["inter_slice_residual", "residual_mask", "restore_mask"]


def inter_slice_residual(volume: torch.Tensor, *, spatial_axis: int = -1) -> torch.Tensor:
    """Absolute difference of each slice to the slice before it; zero for the first slice.

    ``residual[s + 1] = |volume[s + 1] - volume[s]|`` and ``residual[0] = 0``: Eq. 4 of Zhang et al., 2021, without its
    sigmoid, and Eq. 1 where ``volume`` is a binary mask. The function is differentiable.

    Args:
        volume: ``(b, c, *spatial)`` of any real or boolean dtype. Unsigned integers do not wrap around. The difference
            of signed integers must fit their dtype. Values of ``uint64`` must fit ``int64``.
        spatial_axis: index of the slice axis among the spatial axes.

    Returns:
        A tensor with the shape and the dtype of ``volume``. A single slice gives zeros.

    Raises:
        ValueError: when ``volume`` has no spatial axis, or ``spatial_axis`` is not one of them.

    Example:
        >>> inter_slice_residual(torch.tensor([[[1.0, 4.0, 2.0]]]))
        tensor([[[0., 3., 2.]]])
    """
    dim = slice_dim(volume.ndim, spatial_axis)
    wide = volume if volume.is_floating_point() else volume.to(torch.int64)
    return _after_zeros(wide.diff(dim=dim).abs(), wide, dim).to(volume.dtype)


def residual_mask(
    label: torch.Tensor,
    *,
    num_classes: int | None = None,
    include_background: bool = True,
    spatial_axis: int = -1,
    ignore_index: int | None = None,
) -> torch.Tensor:
    """Residual mask of a label: 1 where a voxel's class membership differs from the slice before it.

    Eq. 1 of Zhang et al., 2021, for each channel; Eq. 13 for several classes, where the background has no residual. A
    flip along the slice axis shifts the residual by one slice: flip the label first, then compute its residual mask.

    Args:
        label: either channels of zeros and ones ``(b, c, *spatial)`` (binary, multi-hot or one-hot), or, with
            ``num_classes``, class indices ``(b, 1, *spatial)``.
        num_classes: number of classes, background included, when ``label`` holds class indices.
        include_background: False leaves out channel 0 of a one-hot label. Class indices always leave out the
            background.
        spatial_axis: index of the slice axis among the spatial axes.
        ignore_index: value of voxels without a label. A residual is known where the voxel and its neighbor in the slice
            before have a label. For the first slice, the slice after counts.

    Returns:
        Zeros and ones in the dtype of ``label`` (``int64`` for ``uint16`` and wider unsigned ones), of shape
        ``(b, c, *spatial)``; ``num_classes - 1`` channels for class indices, ``c - 1`` without the background.
        ``ignore_index`` where the residual is not known.

    Raises:
        ValueError: when shape, ``spatial_axis``, ``num_classes`` and values do not fit each other, or ``ignore_index``
            is a class or does not fit the dtype of ``label``. The function checks values only on the CPU, because
            reading values from an accelerator waits for the device.

    Example:
        >>> label = torch.tensor([[[0, 2, 2, 1]]])
        >>> residual_mask(label, num_classes=3)
        tensor([[[0, 0, 0, 1],
                 [0, 1, 0, 1]]])
        >>> residual_mask(label == 2)
        tensor([[[False,  True, False,  True]]])
        >>> residual_mask(torch.tensor([[[0, 1, 255, 1]]]), ignore_index=255)
        tensor([[[  0,   1, 255, 255]]])
    """
    dim = slice_dim(label.ndim, spatial_axis)
    masks = foreground_masks(
        label, num_classes=num_classes, include_background=include_background, ignore_index=ignore_index
    )
    dtype, masks = masks.dtype, masks.bool()
    residual = _after_zeros(masks.diff(dim=dim), masks, dim).to(dtype)  # diff of booleans is exclusive or
    if ignore_index is None:
        return residual
    labelled = labelled_voxels(label, ignore_index, one_hot=num_classes is None and not include_background)
    return residual.masked_fill(~known_residuals(labelled, spatial_axis=spatial_axis), ignore_index)


def restore_mask(first_slice: torch.Tensor, residual: torch.Tensor, *, spatial_axis: int = -1) -> torch.Tensor:
    """Rebuild a mask from its first slice and its residual mask: the exact inverse of :func:`residual_mask`.

    One slice and the residuals hold the whole shape (Section I of Zhang et al., 2021). A voxel that was inside in the
    first slice is inside again after an even number of changes. A voxel that was outside is inside after an odd number.

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


def foreground_masks(
    label: torch.Tensor,
    *,
    num_classes: int | None = None,
    include_background: bool = True,
    ignore_index: int | None = None,
    expected: str = "zeros and ones, or class indices together with num_classes",
) -> torch.Tensor:
    """A mask of zeros and ones for each class that has a residual; checks the values of the label.

    Args:
        label: as for :func:`residual_mask`.
        num_classes: as for :func:`residual_mask`.
        include_background: as for :func:`residual_mask`.
        ignore_index: as for :func:`residual_mask`. No mask holds an ignored voxel.
        expected: what an error calls the values of a label without ``num_classes``.

    Returns:
        Zeros and ones in the dtype of ``label``, one channel per class.

    Raises:
        ValueError: as :func:`residual_mask`.

    Example:
        >>> foreground_masks(torch.tensor([[[0, 2, 2, 1]]]), num_classes=3)
        tensor([[[0, 0, 0, 1],
                 [0, 1, 1, 0]]])
    """
    if ignore_index is not None:
        check_ignore_index(ignore_index, label.dtype, num_classes or 2)
    if label.dtype in (torch.uint16, torch.uint32, torch.uint64):  # torch has few operations for them
        label = label.to(torch.int64)
    if ignore_index is not None:
        label = label.masked_fill(label == ignore_index, 0)
    if num_classes is None:
        if not include_background:
            if label.shape[1] < 2:
                raise ValueError(
                    f"expected a one-hot label of 2 or more channels with include_background=False, got shape "
                    f"{tuple(label.shape)}; pass num_classes for class indices, or include_background=True."
                )
            label = label[:, 1:]
        check_values(label, 2, expected)
        return label
    if num_classes < 2:
        raise ValueError(f"expected num_classes of 2 or more (background included), got {num_classes}.")
    if label.shape[1] != 1:
        raise ValueError(
            f"expected class indices of shape (b, 1, *spatial) with num_classes={num_classes}, got shape "
            f"{tuple(label.shape)}; leave out num_classes for a label of one channel per class."
        )
    check_values(label, num_classes, f"class indices from 0 to {num_classes - 1}")
    classes = torch.arange(1, num_classes, device=label.device)
    return (label == classes.view(1, -1, *(1,) * (label.ndim - 2))).to(label.dtype)


def class_masks(label: torch.Tensor, residual_channels: int, ignore_index: int | None = None) -> torch.Tensor:
    """A mask for each class that has a residual; the number of channels says how the label is read.

    Args:
        label: with ``r = residual_channels``, masks ``(b, r, *spatial)``, one-hot ``(b, r + 1, *spatial)``, in which
            channel 0 is the background, or class indices from 0 to ``r``, ``(b, 1, *spatial)``.
        residual_channels: number of classes that have a residual.
        ignore_index: as for :func:`residual_mask`. No mask holds an ignored voxel.

    Returns:
        Zeros and ones ``(b, r, *spatial)`` in the dtype of ``label``.

    Raises:
        ValueError: when the label has another number of channels or other values, or as :func:`residual_mask`.

    Example:
        >>> class_masks(torch.tensor([[[0, 2, 2, 1]]]), 2)
        tensor([[[0, 0, 0, 1],
                 [0, 1, 1, 0]]])
    """
    slice_dim(label.ndim, -1)
    channels = label.shape[1]
    if channels == residual_channels:
        return foreground_masks(label, ignore_index=ignore_index, expected="zeros and ones")
    if channels == residual_channels + 1:
        return foreground_masks(label, include_background=False, ignore_index=ignore_index, expected="zeros and ones")
    if channels == 1:
        return foreground_masks(label, num_classes=residual_channels + 1, ignore_index=ignore_index)
    raise ValueError(
        f"expected a label of 1 channel (class indices), {residual_channels} (masks) or {residual_channels + 1} "
        f"(one-hot) for {residual_channels} foreground classes, got shape {tuple(label.shape)}; give a label of these "
        "classes. A label without a channel needs one: label[:, None]."
    )


def labelled_voxels(label: torch.Tensor, ignore_index: int, *, one_hot: bool) -> torch.Tensor:
    """True where a voxel has a label, ``(b, c, *spatial)``; ``(b, 1, *spatial)`` for a one-hot label.

    Example:
        >>> labelled_voxels(torch.tensor([[[0, 255, 1]]]), 255, one_hot=False)
        tensor([[[ True, False,  True]]])
    """
    labelled = convert_to_tensor(label, track_meta=False) != ignore_index
    return labelled.all(1, keepdim=True) if one_hot else labelled


def known_residuals(labelled: torch.Tensor, *, spatial_axis: int = -1) -> torch.Tensor:
    """True where the residual is known: the voxel and its neighbor in the slice before have a label.

    The residual of the first slice is zero by definition. It is known where the first two slices have a label. Single
    drawn slices at the border of patches would otherwise teach a network that nothing ever changes.

    Example:
        >>> known_residuals(torch.tensor([[[True, True, False, True, True]]]))
        tensor([[[ True,  True, False, False,  True]]])
        >>> known_residuals(torch.tensor([[[True, False, True]]]))
        tensor([[[False, False, False]]])
    """
    dim = slice_dim(labelled.ndim, spatial_axis)
    if labelled.shape[dim] < 2:
        return labelled
    both = labelled.narrow(dim, 1, labelled.shape[dim] - 1) & labelled.narrow(dim, 0, labelled.shape[dim] - 1)
    return torch.cat([both.narrow(dim, 0, 1), both], dim)


def slice_dim(ndim: int, spatial_axis: int) -> int:
    """Tensor dimension of the slice axis, in a tensor of shape ``(b, c, *spatial)`` with ``ndim`` dimensions.

    Raises:
        ValueError: when there is no spatial axis, or ``spatial_axis`` is not one of them.

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


def class_indices(masks: torch.Tensor) -> torch.Tensor:
    """Class indices in int16 of foreground masks that do not overlap; 0 is the background.

    Args:
        masks: zeros and ones ``(b, r, *spatial)``.

    Returns:
        ``(b, 1, *spatial)``, from 0 to ``r``.

    Raises:
        ValueError: when masks overlap. Where :func:`check_values` checks nothing, the result is then another class.

    Example:
        >>> class_indices(torch.tensor([[[0, 0, 0, 1], [0, 1, 1, 0]]]))
        tensor([[[0, 2, 2, 1]]], dtype=torch.int16)
    """
    check_values(masks.sum(1, keepdim=True), 2, "masks that do not overlap, for a softmax")
    classes = torch.arange(1, masks.shape[1] + 1, dtype=torch.int16, device=masks.device)
    return (masks * classes.view(1, -1, *(1,) * (masks.ndim - 2))).sum(1, keepdim=True, dtype=torch.int16)


def check_values(label: torch.Tensor, num_classes: int, expected: str) -> None:
    """Raise unless ``label`` holds whole numbers from 0 to ``num_classes - 1``.

    Labels on an accelerator, in a traced or compiled graph and under ``torch.func.vmap`` are not checked.
    """
    if label.dtype == torch.bool or label.device.type != "cpu" or not label.numel():
        return
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return
    label = convert_to_tensor(label, track_meta=False)
    if label.dtype in (torch.uint16, torch.uint32, torch.uint64):  # for which torch has few operations
        label = label.to(torch.int64)
    try:
        low, high = (value.item() for value in torch.aminmax(label))
        whole = not label.is_floating_point() or torch.equal(label, label.trunc())
    except RuntimeError:  # a tensor that holds no values, or one under vmap
        return
    if low >= 0 and high < num_classes and whole:  # NaN fails the comparison
        return
    got = "NaN" if low != low else f"values from {low} to {high}" + ("" if whole else ", not whole numbers")
    remedy = "map the label's values first (MapLabelValued), or name the value of unlabelled voxels with ignore_index"
    if low >= 0 and high < num_classes:
        remedy = (
            'resample labels with mode="nearest", and round the result (lazy resampling still interpolates a little)'
        )
    raise ValueError(f"expected a label of {expected}, got {got}; {remedy}.")


def check_ignore_index(ignore_index: int, dtype: torch.dtype, num_classes: int) -> None:
    """Raise when the ignore value is one of the label's values, or the dtype of the label cannot hold it."""
    if 0 <= ignore_index < num_classes:
        raise ValueError(
            f"expected ignore_index to be none of the label's values 0 to {num_classes - 1}, got {ignore_index}; give "
            "voxels without a label another value, such as 255."
        )
    if dtype.is_floating_point:
        return
    low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    if not low <= ignore_index <= high:
        raise ValueError(
            f"expected ignore_index from {low} to {high}, which a label of {dtype} can hold, got {ignore_index}; "
            "convert the label before its voxels are marked."
        )


def _after_zeros(changes: torch.Tensor, volume: torch.Tensor, dim: int) -> torch.Tensor:
    """The changes from slice to slice of a volume, after the zeros of its first slice."""
    return torch.cat([torch.zeros_like(volume.narrow(dim, 0, 1)), changes], dim=dim)
