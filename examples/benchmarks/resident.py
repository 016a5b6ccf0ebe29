"""Training patches that stay on the device: no loader, crops and augmentation on the device.

A small data set fits into the memory of a GPU, and a loader on few cores would make the GPU wait. The patches depend
only on the seed: every network sees the same patches in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from monai.utils import convert_to_tensor

ROTATION = 0.26  # largest angle about each axis, in rad
SCALE = (0.8, 1.25)
GAMMA = (0.7, 1.5)


class ResidentPatches:
    """Random patches of cases that are on a device.

    Args:
        cases: prepared cases with ``"image"`` ``(c, d, h, w)`` and ``"label"`` ``(1, d, h, w)`` of class indices.
        patch: size of a patch in voxels. A smaller case is padded with its minimum.
        spacing: size of a voxel in mm. Rotations are rotations in mm.
        device: device of all cases.
    """

    def __init__(
        self,
        cases: Iterable[Mapping[str, torch.Tensor]],
        patch: Sequence[int],
        spacing: Sequence[float],
        device: str | torch.device,
    ) -> None:
        self.patch = tuple(patch)
        extent = [size * edge for size, edge in zip(patch, spacing, strict=True)]
        self.extent = torch.tensor(extent, dtype=torch.float32, device=device)  # in mm
        self.cases = [
            (self._pad(torch.as_tensor(case["image"]).float()).to(device), self._pad(case["label"]).to(device))
            for case in cases
        ]
        self.device = torch.device(device)

    def batches(self, number: int, batch_size: int, *, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield images ``(b, c, *patch)`` and labels ``(b, 1, *patch)``, ``number`` times."""
        choice = torch.Generator().manual_seed(seed)  # on the CPU, where the sizes are
        values = torch.Generator(self.device).manual_seed(seed)
        for _ in range(number):
            crops = [self._crop(choice) for _ in range(batch_size)]
            image, label = (torch.stack(parts) for parts in zip(*crops, strict=True))
            yield augment(image, label, self.extent, values)

    def _crop(self, choice: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        case = self.cases[int(torch.randint(len(self.cases), (), generator=choice))]
        cut = [slice(None)]
        for size, edge in zip(case[0].shape[1:], self.patch, strict=True):
            start = int(torch.randint(size - edge + 1, (), generator=choice))
            cut.append(slice(start, start + edge))
        image, label = (volume[tuple(cut)] for volume in case)
        return image, label

    def _pad(self, volume: torch.Tensor) -> torch.Tensor:
        volume = convert_to_tensor(volume, track_meta=False)
        missing = [max(0, edge - size) for edge, size in zip(self.patch, volume.shape[1:], strict=True)]
        pads = [amount for total in reversed(missing) for amount in (total // 2, total - total // 2)]
        return F.pad(volume, pads, value=volume.min().item())


def augment(
    image: torch.Tensor, label: torch.Tensor, extent: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate and scale image and label; change gamma, contrast and brightness of the image; add noise to the image.

    Each of these changes applies to a random half of the samples.

    Args:
        image: ``(b, c, d, h, w)``, standardized.
        label: ``(b, 1, d, h, w)``, class indices.
        extent: length of the patch along each axis, in mm.
        generator: a generator on the device of the images.
    """
    batch = len(image)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand((batch, *shape), generator=generator, device=image.device)

    moved = uniform(0, 1) < 0.5
    grid = F.affine_grid(
        torch.where(moved[:, None, None], _affine(uniform, extent), torch.eye(3, 4, device=image.device)),
        list(image.shape),
        align_corners=False,
    )
    image = F.grid_sample(image, grid, padding_mode="border", align_corners=False)
    label = F.grid_sample(label.float(), grid, mode="nearest", padding_mode="border", align_corners=False).long()

    def sometimes(low: float, high: float, neutral: float) -> torch.Tensor:
        values = uniform(low, high, 1, 1, 1, 1)
        return torch.where(uniform(0, 1, 1, 1, 1, 1) < 0.5, values, neutral)

    low, high = image.amin((2, 3, 4), keepdim=True), image.amax((2, 3, 4), keepdim=True)
    share = (image - low) / (high - low).clamp(min=1e-6)
    image = low + (high - low) * share.clamp(min=1e-6) ** sometimes(*GAMMA, 1.0)
    image = image * sometimes(0.8, 1.2, 1.0) + sometimes(-0.2, 0.2, 0.0)
    noise = torch.randn(image.shape, generator=generator, device=image.device)
    return image + sometimes(0.0, 0.15, 0.0) * noise, label


def _affine(uniform, extent: torch.Tensor) -> torch.Tensor:
    """Random rotation and scaling in mm, as matrices ``(b, 3, 4)`` for ``affine_grid``."""
    angles = uniform(-ROTATION, ROTATION, 3)
    matrix = torch.diag_embed(uniform(*SCALE, 1).reciprocal().expand(-1, 3))
    for axis in range(3):
        cosine, sine = angles[:, axis].cos(), angles[:, axis].sin()
        first, second = (other for other in range(3) if other != axis)
        rotation = torch.eye(3, device=angles.device).repeat(len(angles), 1, 1)
        rotation[:, first, first] = rotation[:, second, second] = cosine
        rotation[:, first, second], rotation[:, second, first] = -sine, sine
        matrix = matrix @ rotation
    edges = extent.flip(0)  # affine_grid counts axes from the last axis
    matrix = matrix * edges / edges[:, None]
    return F.pad(matrix, (0, 1))
