"""MONAI transforms of inter-slice residuals, for looking at them or for a loss of one's own.

The losses of this package make their targets from the label and need none of these. A residual is not equivariant to a
flip of the slice axis (it shifts by one slice): compute it after the flips, never flip it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping

import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends, convert_to_dst_type, convert_to_tensor

from monai_conres.residual import inter_slice_residual, residual_mask

__all__ = [
    "InterSliceResidual",
    "InterSliceResidualD",
    "InterSliceResidualDict",
    "InterSliceResiduald",
    "ResidualMask",
    "ResidualMaskD",
    "ResidualMaskDict",
    "ResidualMaskd",
]


class InterSliceResidual(Transform):
    """Absolute difference of each slice of an image to the one before it (:func:`~monai_conres.inter_slice_residual`).

    Args:
        spatial_axis: index of the slice axis among the spatial axes.

    Shape:
        ``(c, *spatial)``, array, tensor or ``MetaTensor`` (affine and other metadata are kept), to the same. For
        batches call the function.

    Raises:
        ValueError: when the image has no spatial axis, or ``spatial_axis`` is none of them.

    Example:
        >>> InterSliceResidual()(torch.tensor([[1.0, 4.0, 2.0]]))
        tensor([[0., 3., 2.]])
    """

    backend = [TransformBackends.TORCH]

    def __init__(self, *, spatial_axis: int = -1) -> None:
        self.spatial_axis = spatial_axis

    def __call__(self, img: NdarrayOrTensor) -> NdarrayOrTensor:
        """Residual of ``img``."""
        return _unbatched(lambda volume: inter_slice_residual(volume, spatial_axis=self.spatial_axis), img)


class ResidualMask(Transform):
    """Residual mask of a label (:func:`~monai_conres.residual_mask`): Eq. 1 and 13 of Zhang et al., 2021.

    Args:
        num_classes: number of classes, background included, when the label holds class indices.
        include_background: False leaves out channel 0 of a one-hot label.
        spatial_axis: index of the slice axis among the spatial axes.

    Shape:
        ``(c, *spatial)``, array, tensor or ``MetaTensor`` (affine and other metadata are kept), to one channel for each
        foreground class. For batches call the function.

    Raises:
        ValueError: when shape, ``spatial_axis``, ``num_classes`` and values do not fit each other.

    Example:
        >>> ResidualMask(num_classes=3)(torch.tensor([[0, 2, 2, 1]]))
        tensor([[0, 0, 0, 1],
                [0, 1, 0, 1]])
    """

    backend = [TransformBackends.TORCH]

    def __init__(
        self, *, num_classes: int | None = None, include_background: bool = True, spatial_axis: int = -1
    ) -> None:
        self.num_classes = num_classes
        self.include_background = include_background
        self.spatial_axis = spatial_axis

    def __call__(self, img: NdarrayOrTensor) -> NdarrayOrTensor:
        """Residual mask of the label ``img``."""

        def mask(label: torch.Tensor) -> torch.Tensor:
            return residual_mask(
                label,
                num_classes=self.num_classes,
                include_background=self.include_background,
                spatial_axis=self.spatial_axis,
            )

        return _unbatched(mask, img)


class InterSliceResiduald(MapTransform):
    """Dictionary version of :class:`InterSliceResidual`.

    Args:
        keys: keys of the images.
        spatial_axis: see :class:`InterSliceResidual`.
        new_key_prefix: the result goes to this prefix and the image's key.
        allow_missing_keys: True passes over keys that are not there.

    Example:
        >>> data = InterSliceResiduald("image")({"image": torch.tensor([[1.0, 4.0, 2.0]])})
        >>> data["residual_image"]
        tensor([[0., 3., 2.]])
    """

    backend = InterSliceResidual.backend

    def __init__(
        self,
        keys: KeysCollection,
        *,
        spatial_axis: int = -1,
        new_key_prefix: str = "residual_",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.transform: Transform = InterSliceResidual(spatial_axis=spatial_axis)
        self.new_key_prefix = new_key_prefix

    def __call__(self, data: Mapping[Hashable, NdarrayOrTensor]) -> dict[Hashable, NdarrayOrTensor]:
        """``data`` with the residuals added."""
        return {**data, **{f"{self.new_key_prefix}{key}": self.transform(data[key]) for key in self.key_iterator(data)}}


class ResidualMaskd(InterSliceResiduald):
    """Dictionary version of :class:`ResidualMask`.

    Args:
        keys: keys of the labels.
        num_classes: see :class:`ResidualMask`.
        include_background: see :class:`ResidualMask`.
        spatial_axis: see :class:`ResidualMask`.
        new_key_prefix: the result goes to this prefix and the label's key.
        allow_missing_keys: True passes over keys that are not there.

    Example:
        >>> data = ResidualMaskd("label", num_classes=2)({"label": torch.tensor([[0, 1, 1, 0]])})
        >>> data["residual_label"]
        tensor([[0, 1, 0, 1]])
    """

    backend = ResidualMask.backend

    def __init__(
        self,
        keys: KeysCollection,
        *,
        num_classes: int | None = None,
        include_background: bool = True,
        spatial_axis: int = -1,
        new_key_prefix: str = "residual_",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, new_key_prefix=new_key_prefix, allow_missing_keys=allow_missing_keys)
        self.transform = ResidualMask(
            num_classes=num_classes, include_background=include_background, spatial_axis=spatial_axis
        )


def _unbatched(function: Callable[[torch.Tensor], torch.Tensor], img: NdarrayOrTensor) -> NdarrayOrTensor:
    """Apply a function of ``(b, c, *spatial)`` to ``(c, *spatial)``; the result is of the type of ``img``."""
    volume = convert_to_tensor(img, track_meta=False)
    if volume.ndim < 2:
        raise ValueError(
            f"expected an array of shape (c, *spatial), got {tuple(volume.shape)}; load it with "
            "LoadImaged(ensure_channel_first=True)."
        )
    result = function(volume[None])[0]
    return convert_to_dst_type(result, img, dtype=result.dtype)[0]


InterSliceResidualD = InterSliceResidualDict = InterSliceResiduald
ResidualMaskD = ResidualMaskDict = ResidualMaskd
