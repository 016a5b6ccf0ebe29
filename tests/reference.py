"""Naive references, in float64 numpy, written from the equations: loops over slices, nothing shared with
the package."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def residual_mask(mask: np.ndarray, axis: int) -> np.ndarray:
    """Eq. 1 along one axis of a mask of zeros and ones."""
    mask = np.moveaxis(mask.astype(np.float64), axis, 0)
    residual = np.zeros_like(mask)
    for s in range(len(mask) - 1):
        residual[s + 1] = np.abs(mask[s + 1] - mask[s])
    return np.moveaxis(residual, 0, axis)


def nearest(mask: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """``(b, c, d, h, w)`` resampled to the voxel whose center is nearest."""
    for axis, new in enumerate(size, start=2):
        old = mask.shape[axis]
        index = [min(int(np.floor((i + 0.5) * old / new)), old - 1) for i in range(new)]
        mask = np.take(mask, index, axis=axis)
    return mask


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def binary_cross_entropy(p: np.ndarray, y: np.ndarray) -> np.ndarray:
    return -(y * np.log(p) + (1 - y) * np.log(1 - p))


def residual_loss(
    heads: Sequence[np.ndarray],
    mask: np.ndarray,
    axis: int,
    deep_supervision_weight: float,
    background_weight: float | None,
) -> float:
    """Eq. 8 and 9, mean over voxels; ``mask`` is one channel for each residual."""
    total = 0.0
    for number, logits in enumerate(heads):
        target = residual_mask(nearest(mask, logits.shape[2:]), axis)
        loss = np.zeros(logits.shape)
        for c in range(logits.shape[1]):
            y = target[:, c]
            v, v1 = y.size, (y == 1).sum()
            w1 = np.log(v / max(v1, 1))
            w0 = np.log(v / (v - v1)) if background_weight is None else background_weight
            loss[:, c] = np.where(y == 1, w1, w0) * binary_cross_entropy(sigmoid(logits[:, c]), y)
        total += (1.0 if number == 0 else deep_supervision_weight) * loss.mean()
    return total


def binary_segmentation_loss(logits: np.ndarray, label: np.ndarray) -> float:
    """Eq. 7 with a Dice loss for each volume and channel."""
    p = sigmoid(logits)
    axes = (2, 3, 4)
    dice = 1 - (2 * (p * label).sum(axes)) / (p.sum(axes) + label.sum(axes))
    return binary_cross_entropy(p, label).mean() + dice.mean()


def multiclass_segmentation_loss(logits: np.ndarray, classes: np.ndarray) -> float:
    """The same with a softmax and a cross entropy; ``classes`` ``(b, 1, d, h, w)``."""
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    onehot = np.concatenate([classes == c for c in range(logits.shape[1])], axis=1).astype(np.float64)
    axes = (2, 3, 4)
    dice = 1 - (2 * (p * onehot).sum(axes)) / (p.sum(axes) + onehot.sum(axes))
    return -(onehot * np.log(p)).sum(1).mean() + dice.mean()


def released_residual_gradient(logits: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Gradient of the released code's residual loss: the *logits* are clamped to [1e-3, 1 - 1e-3] and taken as
    probabilities, with w_0 = 1 and w_1 = ln(V / (V_1 + 1)). The clamp has no gradient outside its bounds."""
    p = np.clip(logits, 1e-3, 1 - 1e-3)
    w1 = np.log(target.size / (target.sum() + 1))
    gradient = np.where(target == 1, -w1 / p, 1 / (1 - p)) / target.size
    return np.where((logits > 1e-3) & (logits < 1 - 1e-3), gradient, 0.0)
