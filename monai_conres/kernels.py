"""Group normalization and weight standardization in Triton, which torch brings along on a GPU.

``layers.py`` decides when these functions are used. The normalization reads the features twice in each direction, and a
small network waits for few launches. Features are contiguous, ``(b, c, *spatial)``; a row is one channel
of one volume. Each row is cut into parts, so that a batch of one volume has work for the whole GPU. Statistics are in
float32, from sums of squared deviations, so that a large mean does no harm.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

__all__ = ["group_norm", "group_norm_backward", "standardize", "standardize_backward"]

BLOCK = 2048  # values that a program has in hand
MAX_PARTS = 128  # of a row


@triton.jit
def _moments(x, means, squares, voxels, chunk, BLOCK: tl.constexpr):
    """Mean, and sum of squared deviations from it, of one part of a row."""
    row, part = tl.program_id(0), tl.program_id(1)
    begin = part * chunk
    end = tl.minimum(begin + chunk, voxels)
    x += row.to(tl.int64) * voxels
    count = tl.zeros((BLOCK,), tl.float32)
    mean = tl.zeros((BLOCK,), tl.float32)
    square = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):  # Welford's sums, one for each lane
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < end
        value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        count += inside.to(tl.float32)
        change = tl.where(inside, value - mean, 0.0)
        mean += change / tl.maximum(count, 1.0)
        square += change * (value - mean)
    whole = tl.sum(mean * count) / (end - begin)
    change = mean - whole
    index = row * tl.num_programs(1) + part
    tl.store(means + index, whole)
    tl.store(squares + index, tl.sum(square + count * change * change))


@triton.jit
def _statistics(means, squares, mean, reciprocal, voxels, chunk, parts, channels, eps, BLOCK: tl.constexpr):
    """Mean and reciprocal deviation of one group, from its ``channels`` rows."""
    group = tl.program_id(0)
    entries = channels * parts
    means += group * entries
    squares += group * entries
    size = channels * voxels * 1.0
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, entries, BLOCK):
        index = start + tl.arange(0, BLOCK)
        count = tl.minimum(chunk, voxels - index % parts * chunk).to(tl.float32)
        total += tl.load(means + index, mask=index < entries, other=0.0) * count
    whole = tl.sum(total) / size
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, entries, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < entries
        count = tl.minimum(chunk, voxels - index % parts * chunk).to(tl.float32)
        change = tl.where(inside, tl.load(means + index, mask=inside, other=0.0) - whole, 0.0)
        total += tl.load(squares + index, mask=inside, other=0.0) + count * change * change
    tl.store(mean + group, whole)
    tl.store(reciprocal + group, 1.0 / tl.sqrt(tl.sum(total) / size + eps))


@triton.jit
def _normalize(x, y, mean, reciprocal, weight, bias, voxels, chunk, channels, groups, BLOCK: tl.constexpr):
    """``y = (x - mean) * reciprocal * weight + bias`` for one part of a row."""
    row, part = tl.program_id(0), tl.program_id(1)
    group, channel = row // channels, row % (channels * groups)
    shift = tl.load(mean + group)
    scale = tl.load(reciprocal + group)
    offset = 0.0
    if weight is not None:
        scale *= tl.load(weight + channel).to(tl.float32)
    if bias is not None:
        offset += tl.load(bias + channel).to(tl.float32)
    base = row.to(tl.int64) * voxels
    end = tl.minimum(part * chunk + chunk, voxels)
    for start in range(part * chunk, end, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < end
        value = tl.load(x + base + offsets, mask=inside).to(tl.float32)
        tl.store(y + base + offsets, (value - shift) * scale + offset, mask=inside)


@triton.jit
def _products(x, grad, mean, reciprocal, of_bias, of_weight, voxels, chunk, channels, BLOCK: tl.constexpr):
    """Sum of the gradient, and of its product with the normalized values, of one part of a row."""
    row, part = tl.program_id(0), tl.program_id(1)
    shift = tl.load(mean + row // channels)
    base = row.to(tl.int64) * voxels
    end = tl.minimum(part * chunk + chunk, voxels)
    total = tl.zeros((BLOCK,), tl.float32)
    product = tl.zeros((BLOCK,), tl.float32)
    for start in range(part * chunk, end, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < end
        gradient = tl.load(grad + base + offsets, mask=inside, other=0.0).to(tl.float32)
        total += gradient
        product += gradient * (tl.load(x + base + offsets, mask=inside, other=0.0).to(tl.float32) - shift)
    index = row * tl.num_programs(1) + part
    tl.store(of_bias + index, tl.sum(total))
    tl.store(of_weight + index, tl.sum(product) * tl.load(reciprocal + row // channels))


@triton.jit
def _gradients(
    of_bias, of_weight, weight, sums, size, parts, channels, groups, ROWS: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Gradients of bias and weight of one group of one volume, and what the gradient of its values needs.

    ``sums`` has for each row the two gradients, and then for each group their weighted sums over ``size`` values.
    """
    group, rows = tl.program_id(0), tl.num_programs(0) * channels
    column = tl.arange(0, PARTS)
    first, second = 0.0, 0.0
    for start in range(0, channels, ROWS):
        channel = start + tl.arange(0, ROWS)
        row = group * channels + channel
        inside = channel < channels
        index = row[:, None] * parts + column[None, :]
        known = inside[:, None] & (column[None, :] < parts)
        bias = tl.sum(tl.load(of_bias + index, mask=known, other=0.0), axis=1)
        product = tl.sum(tl.load(of_weight + index, mask=known, other=0.0), axis=1)
        tl.store(sums + row, product, mask=inside)
        tl.store(sums + rows + row, bias, mask=inside)
        if weight is not None:
            factor = tl.load(weight + row % (channels * groups), mask=inside, other=0.0).to(tl.float32)
            bias *= factor
            product *= factor
        first += tl.sum(bias)
        second += tl.sum(product)
    tl.store(sums + 2 * rows + 2 * group, first / size)
    tl.store(sums + 2 * rows + 2 * group + 1, second / size)


@triton.jit
def _of_values(x, grad, of_x, mean, reciprocal, weight, sums, voxels, chunk, channels, groups, BLOCK: tl.constexpr):
    """The gradient of the values of one part of a row."""
    row, part = tl.program_id(0), tl.program_id(1)
    group = row // channels
    shift, scale = tl.load(mean + group), tl.load(reciprocal + group)
    sums += 2 * tl.num_programs(0) + 2 * group
    first, second = tl.load(sums), tl.load(sums + 1) * scale
    factor = 1.0
    if weight is not None:
        factor *= tl.load(weight + row % (channels * groups)).to(tl.float32)
    base = row.to(tl.int64) * voxels
    end = tl.minimum(part * chunk + chunk, voxels)
    for start in range(part * chunk, end, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < end
        value = tl.load(x + base + offsets, mask=inside, other=0.0).to(tl.float32) - shift
        gradient = tl.load(grad + base + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(of_x + base + offsets, (factor * gradient - first - value * second) * scale, mask=inside)


@triton.jit
def _standardize(weight, filters, size, gain, eps, LENGTH: tl.constexpr):
    """One filter with mean zero and the deviation ``gain``."""
    index = tl.arange(0, LENGTH)
    inside = index < size
    index += tl.program_id(0) * size
    value = tl.load(weight + index, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(inside, value - tl.sum(value) / size, 0.0)
    deviation = tl.sqrt(tl.sum(value * value) / (size - 1) + eps)
    tl.store(filters + index, value * (gain / deviation), mask=inside)


@triton.jit
def _standardize_backward(weight, grad, of_weight, size, gain, eps, LENGTH: tl.constexpr):
    """The gradient of one filter."""
    index = tl.arange(0, LENGTH)
    inside = index < size
    index += tl.program_id(0) * size
    value = tl.load(weight + index, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(inside, value - tl.sum(value) / size, 0.0)
    gradient = tl.load(grad + index, mask=inside, other=0.0).to(tl.float32)
    variance = tl.sum(value * value) / (size - 1) + eps
    slope = tl.sum(gradient * value) / ((size - 1) * variance)
    gradient -= tl.sum(gradient) / size + value * slope
    tl.store(of_weight + index, gradient * (gain / tl.sqrt(variance)), mask=inside)


def _parts(voxels: int) -> tuple[int, int]:
    """Parts of a row, and the values of a part."""
    blocks = triton.cdiv(voxels, BLOCK)
    chunk = triton.cdiv(blocks, min(blocks, MAX_PARTS)) * BLOCK
    return triton.cdiv(voxels, chunk), chunk


def group_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, groups: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The normalized ``x``, and mean and reciprocal deviation of each group, ``(b, groups, 1)`` in float32."""
    batch, width = x.shape[:2]
    channels, voxels = width // groups, math.prod(x.shape[2:])
    parts, chunk = _parts(voxels)
    rows = batch * width
    y = torch.empty_like(x)
    moments = torch.empty((2, rows, parts), dtype=torch.float32, device=x.device)
    mean, reciprocal = torch.empty((2, batch, groups, 1), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _moments[(rows, parts)](x, moments[0], moments[1], voxels, chunk, BLOCK)
        _statistics[(batch * groups,)](
            moments[0], moments[1], mean, reciprocal, voxels, chunk, parts, channels, eps, BLOCK // 2
        )
        _normalize[(rows, parts)](x, y, mean, reciprocal, weight, bias, voxels, chunk, channels, groups, BLOCK)
    return y, mean, reciprocal


def group_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, mean: torch.Tensor, reciprocal: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of ``x``, weight and bias; the last two of shape ``(c,)`` in float32."""
    batch, width = x.shape[:2]
    groups, voxels = mean.shape[1], math.prod(x.shape[2:])
    channels, rows = width // groups, batch * width
    parts, chunk = _parts(voxels)
    grad = grad.contiguous()
    of_x = torch.empty_like(x)
    products = torch.empty((2, rows, parts), dtype=torch.float32, device=x.device)
    sums = torch.empty(2 * (rows + batch * groups), dtype=torch.float32, device=x.device)
    columns = triton.next_power_of_2(parts)
    block = min(triton.next_power_of_2(channels), max(1, BLOCK // columns))
    with torch.cuda.device_of(x):
        _products[(rows, parts)](x, grad, mean, reciprocal, products[0], products[1], voxels, chunk, channels, BLOCK)
        _gradients[(batch * groups,)](
            products[0], products[1], weight, sums, channels * voxels, parts, channels, groups, block, columns
        )
        _of_values[(rows, parts)](x, grad, of_x, mean, reciprocal, weight, sums, voxels, chunk, channels, groups, BLOCK)
    of_weight, of_bias = sums[: 2 * rows].view(2, batch, width).sum(1) if batch > 1 else sums[: 2 * rows].view(2, width)
    return of_x, of_weight, of_bias


def standardize(weight: torch.Tensor, gain: float, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """``gain * (w - mean(w)) / sqrt(var(w) + eps)`` for each filter ``w`` of ``(out_channels, ...)``, as ``dtype``."""
    filters = torch.empty_like(weight, dtype=dtype)
    size = weight[0].numel()
    with torch.cuda.device_of(weight):
        _standardize[(len(weight),)](weight, filters, size, gain, eps, triton.next_power_of_2(size), num_warps=8)
    return filters


def standardize_backward(grad: torch.Tensor, weight: torch.Tensor, gain: float, eps: float) -> torch.Tensor:
    """The gradient of ``weight``."""
    of_weight = torch.empty_like(weight)
    size = weight[0].numel()
    with torch.cuda.device_of(weight):
        _standardize_backward[(len(weight),)](
            weight, grad.contiguous(), of_weight, size, gain, eps, triton.next_power_of_2(size), num_warps=8
        )
    return of_weight
