"""MONAI transforms: inter-slice residuals, to look at them or for your own loss, and completion from drawn slices.

The losses of this package make their targets from the label and do not need these transforms. Flip the label first and
compute the residual afterwards: a flip along the slice axis shifts a residual by one slice.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends, convert_to_dst_type, convert_to_tensor

from monai_conres.chain import ChainSettings, complete_mask
from monai_conres.residual import inter_slice_residual, residual_mask

__all__ = [
    "CompleteMaskD",
    "CompleteMaskDict",
    "CompleteMaskd",
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
    """Absolute difference of each slice to the slice before it (:func:`~monai_conres.inter_slice_residual`).

    Args:
        spatial_axis: index of the slice axis among the spatial axes.

    Shape:
        ``(c, *spatial)``, as array, tensor or ``MetaTensor`` (which keeps its metadata), to the same shape and type.
        For a batch call the function.

    Raises:
        ValueError: when the image has no spatial axis, or ``spatial_axis`` does not exist.

    Example:
        >>> InterSliceResidual()(torch.tensor([[1.0, 4.0, 2.0]]))
        tensor([[0., 3., 2.]])
    """

    backend = [TransformBackends.TORCH]

    def __init__(self, *, spatial_axis: int = -1) -> None:
        self.function: Callable[[torch.Tensor], torch.Tensor] = partial(inter_slice_residual, spatial_axis=spatial_axis)

    def __call__(self, img: NdarrayOrTensor) -> NdarrayOrTensor:
        """The residual of ``img``."""
        volume = convert_to_tensor(img, track_meta=False)
        if volume.ndim < 2:
            raise ValueError(
                f"expected an array of shape (c, *spatial), got {tuple(volume.shape)}; load it with "
                "LoadImaged(ensure_channel_first=True)."
            )
        result = self.function(volume[None])[0]
        return convert_to_dst_type(result, img, dtype=result.dtype)[0]


class ResidualMask(InterSliceResidual):
    """Residual mask of a label (:func:`~monai_conres.residual_mask`): Eq. 1 and 13 of Zhang et al., 2021.

    Args:
        num_classes: number of classes with the background, for a label of class indices.
        include_background: False leaves out channel 0 of a one-hot label.
        spatial_axis: index of the slice axis among the spatial axes.
        ignore_index: value of voxels without a label, and of the result where the residual is not known.

    Shape:
        ``(c, *spatial)``, as array, tensor or ``MetaTensor`` (which keeps its metadata), to one channel for each
        foreground class. For a batch call the function.

    Raises:
        ValueError: as :func:`~monai_conres.residual_mask`.

    Example:
        >>> ResidualMask(num_classes=3)(torch.tensor([[0, 2, 2, 1]]))
        tensor([[0, 0, 0, 1],
                [0, 1, 0, 1]])
    """

    def __init__(
        self,
        *,
        num_classes: int | None = None,
        include_background: bool = True,
        spatial_axis: int = -1,
        ignore_index: int | None = None,
    ) -> None:
        self.function = partial(
            residual_mask,
            num_classes=num_classes,
            include_background=include_background,
            spatial_axis=spatial_axis,
            ignore_index=ignore_index,
        )


class InterSliceResiduald(MapTransform):
    """Dictionary version of :class:`InterSliceResidual`.

    Args:
        keys: keys of the images.
        spatial_axis: see :class:`InterSliceResidual`.
        new_key_prefix: prefix of the image's key in the key of the result.
        allow_missing_keys: True skips keys that do not exist.

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
        self.transform = InterSliceResidual(spatial_axis=spatial_axis)
        self.new_key_prefix = new_key_prefix

    def __call__(self, data: Mapping[Hashable, NdarrayOrTensor]) -> dict[Hashable, NdarrayOrTensor]:
        """``data`` and the residuals."""
        return {**data, **{f"{self.new_key_prefix}{key}": self.transform(data[key]) for key in self.key_iterator(data)}}


class ResidualMaskd(InterSliceResiduald):
    """Dictionary version of :class:`ResidualMask`.

    Args:
        keys: keys of the labels.
        num_classes: see :class:`ResidualMask`.
        include_background: see :class:`ResidualMask`.
        spatial_axis: see :class:`ResidualMask`.
        ignore_index: see :class:`ResidualMask`.
        new_key_prefix: prefix of the label's key in the key of the result.
        allow_missing_keys: True skips keys that do not exist.

    Example:
        >>> data = ResidualMaskd("label", num_classes=2)({"label": torch.tensor([[0, 1, 1, 0]])})
        >>> data["residual_label"]
        tensor([[0, 1, 0, 1]])
    """

    def __init__(
        self,
        keys: KeysCollection,
        *,
        num_classes: int | None = None,
        include_background: bool = True,
        spatial_axis: int = -1,
        ignore_index: int | None = None,
        new_key_prefix: str = "residual_",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, new_key_prefix=new_key_prefix, allow_missing_keys=allow_missing_keys)
        self.transform = ResidualMask(
            num_classes=num_classes,
            include_background=include_background,
            spatial_axis=spatial_axis,
            ignore_index=ignore_index,
        )


class CompleteMaskd(MapTransform):
    """Complete a volume from a few drawn slices (:func:`~monai_conres.chain.complete_mask`), one case at a time.

    Args:
        keys: keys of drawn masks or label maps. Completed masks or label maps replace them.
        segmentation_key: key of the segmentation's logits.
        residual_key: key of the residual's logits, ``None`` for a network without residual decoder.
        image_key: key of the image as the network sees it, ``None`` leaves out the image contrast.
        slices_key: key of the list of drawn slices. If ``data`` does not have the key, slices with any label count as
            drawn.
        settings: see :func:`~monai_conres.chain.complete_mask`.
        spatial_axis: see :func:`~monai_conres.chain.complete_mask`.
        sigmoid: see :func:`~monai_conres.chain.complete_mask`.
        softmax: see :func:`~monai_conres.chain.complete_mask`.
        ignore_index: see :func:`~monai_conres.chain.complete_mask`.
        allow_missing_keys: True skips keys that do not exist.

    Raises:
        ValueError: as :func:`~monai_conres.chain.complete_mask`.

    Example:
        >>> data = {"pred": torch.zeros(1, 5), "residual": torch.tensor([[-9.0, -9.0, 9.0, -9.0, 9.0]])}
        >>> CompleteMaskd("label")({**data, "label": torch.tensor([[0, 1, 0, 0, 0]])})["label"]
        tensor([[1, 1, 0, 0, 1]])
    """

    backend = InterSliceResidual.backend

    def __init__(
        self,
        keys: KeysCollection,
        *,
        segmentation_key: str = "pred",
        residual_key: str | None = "residual",
        image_key: str | None = None,
        slices_key: str = "slices",
        settings: ChainSettings | None = None,
        spatial_axis: int = -1,
        sigmoid: bool = False,
        softmax: bool = False,
        ignore_index: int | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.inputs = {"segmentation": segmentation_key, "residual": residual_key, "image": image_key}
        self.slices_key = slices_key
        self.function: Callable[..., torch.Tensor] = partial(
            complete_mask,
            settings=settings,
            spatial_axis=spatial_axis,
            sigmoid=sigmoid,
            softmax=softmax,
            ignore_index=ignore_index,
        )

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """``data`` with completed masks."""
        inputs = {
            name: None if key is None else convert_to_tensor(data[key], track_meta=False)[None]
            for name, key in self.inputs.items()
        }
        slices: Sequence[int] | None = data.get(self.slices_key)
        result = dict(data)
        for key in self.key_iterator(data):
            drawn = convert_to_tensor(data[key], track_meta=False)[None]
            result[key] = convert_to_dst_type(self.function(drawn=drawn, slices=slices, **inputs)[0], data[key])[0]
        return result


CompleteMaskD = CompleteMaskDict = CompleteMaskd
InterSliceResidualD = InterSliceResidualDict = InterSliceResiduald
ResidualMaskD = ResidualMaskDict = ResidualMaskd
