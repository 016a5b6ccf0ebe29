"""Group normalization, weight standardization, Eq. 4 and Eq. 6 in Triton, which torch brings along on a GPU.

``operations.py`` decides when these functions are used. Each direction of the normalization takes two launches, which
read the features once each. Features are contiguous, ``(b, c, *spatial)``; a row is one channel of one volume. Each row
is cut into parts, so that a batch of one volume has work for the whole GPU. Statistics are in float32, from sums of
squared deviations, so that a large mean does no harm.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

__all__ = [
    "gate_features",
    "gate_features_backward",
    "group_norm",
    "group_norm_backward",
    "sigmoid_change",
    "sigmoid_change_backward",
    "standardize",
    "standardize_backward",
]

BLOCK = 2048  # values that a program has in hand
PROGRAMS = 4096  # that share the work, about


@triton.jit
def _moments(x, moments, voxels, chunk, BLOCK: tl.constexpr):
    """Mean, and sum of squared deviations from it, of one part of a row."""
    row, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
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
    moments += row * parts + part
    tl.store(moments, whole)
    tl.store(moments + tl.num_programs(0) * parts, tl.sum(square + count * change * change))


@triton.jit
def _scale_and_offset(channel, rstd, weight, bias):
    """What multiplies the values of a channel less their mean, and what is added then."""
    scale, offset = rstd, 0.0
    if weight is not None:
        scale *= tl.load(weight + channel).to(tl.float32)
    if bias is not None:
        offset += tl.load(bias + channel).to(tl.float32)
    return scale, offset


@triton.jit(do_not_specialize=["channels", "groups"])  # compiled once for all values
def _normalize(
    x, y, moments, statistics, weight, bias, voxels, chunk, channels, groups, eps,
    RELU: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Normalize one part of a row. Each program joins the moments of its group, which has ``channels`` rows.

    ``RELU`` also sets negative values to zero, in this kernel and in those of the gradients.
    """
    row, part, rows, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1)
    group, entries = row // channels, channels * parts
    moments += group * entries
    size = voxels * 1.0 * channels  # their product may exceed 32 bits
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, entries, BLOCK):
        index = start + tl.arange(0, BLOCK)
        count = tl.minimum(chunk, voxels - index % parts * chunk).to(tl.float32)
        total += tl.load(moments + index, mask=index < entries, other=0.0) * count
    mean = tl.sum(total) / size
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, entries, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < entries
        count = tl.minimum(chunk, voxels - index % parts * chunk).to(tl.float32)
        change = tl.where(inside, tl.load(moments + index, mask=inside, other=0.0) - mean, 0.0)
        square = tl.load(moments + rows * parts + index, mask=inside, other=0.0)
        total += square + count * change * change
    rstd = 1.0 / tl.sqrt(tl.sum(total) / size + eps)
    if part == 0 and row % channels == 0:
        tl.store(statistics + group, mean)
        tl.store(statistics + rows // channels + group, rstd)
    scale, offset = _scale_and_offset(row % (channels * groups), rstd, weight, bias)
    base = row.to(tl.int64) * voxels
    end = tl.minimum(part * chunk + chunk, voxels)
    for start in range(part * chunk, end, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < end
        value = tl.load(x + base + offsets, mask=inside, other=0.0).to(tl.float32)
        value = (value - mean) * scale + offset
        if RELU:
            value = tl.where(value < 0.0, 0.0, value)  # NaN stays
        tl.store(y + base + offsets, value, mask=inside)


@triton.jit(do_not_specialize=["channels", "groups"])
def _products(
    x, grad, products, statistics, weight, bias, voxels, chunk, channels, groups,
    RELU: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Sum of the gradient times the normalized values, and of the gradient, of one part of a row."""
    row, part, rows, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1)
    statistics += row // channels
    mean, rstd = tl.load(statistics), tl.load(statistics + rows // channels)
    scale, offset = _scale_and_offset(row % (channels * groups), rstd, weight, bias)
    base = row.to(tl.int64) * voxels
    end = tl.minimum(part * chunk + chunk, voxels)
    total = tl.zeros((BLOCK,), tl.float32)
    product = tl.zeros((BLOCK,), tl.float32)
    for start in range(part * chunk, end, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < end
        gradient = tl.load(grad + base + offsets, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + base + offsets, mask=inside, other=0.0).to(tl.float32) - mean
        if RELU:
            gradient = tl.where(value * scale + offset <= 0.0, 0.0, gradient)
        total += gradient
        product += gradient * value
    products += row * parts + part
    tl.store(products, tl.sum(product) * rstd)
    tl.store(products + rows * parts, tl.sum(total))


@triton.jit(do_not_specialize=["channels", "groups"])
def _gradients(
    x, grad, of_x, products, of_parameters, statistics, weight, bias, voxels, chunk, channels, groups,
    RELU: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The gradient of one part of a row.

    The first program of each channel of the first volume also adds up the gradients of weight and bias.
    """
    row, part, rows, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1)
    width = channels * groups
    if part == 0 and row < width:
        sum_of_weight = tl.zeros((BLOCK,), tl.float32)
        sum_of_bias = tl.zeros((BLOCK,), tl.float32)
        count = rows // width * parts
        for start in range(0, count, BLOCK):  # this channel of all volumes
            index = start + tl.arange(0, BLOCK)
            entry = (index // parts * width + row) * parts + index % parts
            sum_of_weight += tl.load(products + entry, mask=index < count, other=0.0)
            sum_of_bias += tl.load(products + rows * parts + entry, mask=index < count, other=0.0)
        tl.store(of_parameters + row, tl.sum(sum_of_weight))
        tl.store(of_parameters + width + row, tl.sum(sum_of_bias))
    group, entries = row // channels, channels * parts
    statistics += group
    mean, rstd = tl.load(statistics), tl.load(statistics + rows // channels)
    products += group * entries
    first = tl.zeros((BLOCK,), tl.float32)  # sums over the group, weighted
    second = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, entries, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < entries
        of_weight = tl.load(products + index, mask=inside, other=0.0)
        of_bias = tl.load(products + rows * parts + index, mask=inside, other=0.0)
        if weight is not None:
            channel = group % groups * channels + index // parts
            factor = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
            of_weight *= factor
            of_bias *= factor
        second += of_weight
        first += of_bias
    size = voxels * 1.0 * channels  # their product may exceed 32 bits
    constant, slope = tl.sum(first) * rstd / size, tl.sum(second) * rstd * rstd / size
    scale, offset = _scale_and_offset(row % width, rstd, weight, bias)
    base = row.to(tl.int64) * voxels
    end = tl.minimum(part * chunk + chunk, voxels)
    for start in range(part * chunk, end, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < end
        value = tl.load(x + base + offsets, mask=inside, other=0.0).to(tl.float32) - mean
        gradient = tl.load(grad + base + offsets, mask=inside, other=0.0).to(tl.float32)
        if RELU:
            gradient = tl.where(value * scale + offset <= 0.0, 0.0, gradient)
        tl.store(of_x + base + offsets, scale * gradient - constant - value * slope, mask=inside)


@triton.jit(do_not_specialize=["size"])
def _standardize(weight, filters, size, gain, eps, LENGTH: tl.constexpr):
    """One filter with mean zero and the deviation ``gain``."""
    index = tl.arange(0, LENGTH)
    inside = index < size
    index += tl.program_id(0) * size
    value = tl.load(weight + index, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(inside, value - tl.sum(value) / size, 0.0)
    deviation = tl.sqrt(tl.sum(value * value) / (size - 1) + eps)
    tl.store(filters + index, value * (gain / deviation), mask=inside)


@triton.jit(do_not_specialize=["size"])
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


@triton.jit
def _change(x, y, voxels, chunk, span, inner, BLOCK: tl.constexpr):
    """Change of the sigmoid since the slice before, in one part of a row.

    The slice before lies ``inner`` values back. After ``span`` values a first slice comes again.
    """
    base = tl.program_id(0).to(tl.int64) * voxels
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, voxels)
    for start in range(begin, end, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < end
        has_before = inside & (offsets % span >= inner)
        value = tl.sigmoid(tl.load(x + base + offsets, mask=inside, other=0.0).to(tl.float32))
        before = tl.sigmoid(tl.load(x + base + offsets - inner, mask=has_before, other=0.0).to(tl.float32))
        tl.store(y + base + offsets, tl.where(has_before, tl.abs(value - before), 0.0), mask=inside)


@triton.jit
def _sign(x):
    """-1, 0, 1, or NaN for NaN."""
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, x))


@triton.jit
def _change_backward(x, grad, of_x, voxels, chunk, span, inner, BLOCK: tl.constexpr):
    """The gradient: each value is in its own change and in that of the slice after it."""
    base = tl.program_id(0).to(tl.int64) * voxels
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, voxels)
    for start in range(begin, end, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < end
        position = offsets % span
        has_before, has_after = inside & (position >= inner), inside & (position < span - inner)
        value = tl.sigmoid(tl.load(x + base + offsets, mask=inside, other=0.0).to(tl.float32))
        before = tl.sigmoid(tl.load(x + base + offsets - inner, mask=has_before, other=0.0).to(tl.float32))
        after = tl.sigmoid(tl.load(x + base + offsets + inner, mask=has_after, other=0.0).to(tl.float32))
        own = tl.load(grad + base + offsets, mask=has_before, other=0.0).to(tl.float32)
        next = tl.load(grad + base + offsets + inner, mask=has_after, other=0.0).to(tl.float32)
        gradient = tl.where(has_before, _sign(value - before) * own, 0.0)
        gradient -= tl.where(has_after, _sign(after - value) * next, 0.0)
        tl.store(of_x + base + offsets, gradient * value * (1.0 - value), mask=inside)


@triton.jit
def _gate(features, logits, y, voxels, chunk, BLOCK: tl.constexpr):
    """Features times one plus the sigmoid of the logits, in one part of a row."""
    base = tl.program_id(0).to(tl.int64) * voxels
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, voxels)
    for start in range(begin, end, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < end
        gate = tl.sigmoid(tl.load(logits + base + offsets, mask=inside, other=0.0).to(tl.float32))
        value = tl.load(features + base + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + base + offsets, value + value * gate, mask=inside)


@triton.jit
def _gate_backward(features, logits, grad, of_features, of_logits, voxels, chunk, BLOCK: tl.constexpr):
    """Both gradients of one part of a row."""
    base = tl.program_id(0).to(tl.int64) * voxels
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, voxels)
    for start in range(begin, end, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < end
        gate = tl.sigmoid(tl.load(logits + base + offsets, mask=inside, other=0.0).to(tl.float32))
        value = tl.load(features + base + offsets, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(grad + base + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(of_features + base + offsets, gradient + gradient * gate, mask=inside)
        tl.store(of_logits + base + offsets, gradient * value * gate * (1.0 - gate), mask=inside)


def _parts(rows: int, voxels: int) -> tuple[int, int]:
    """Number of parts of a row, and of values of a part."""
    blocks = -(-voxels // BLOCK)
    chunk = -(-blocks // min(blocks, -(-PROGRAMS // rows))) * BLOCK
    return -(-voxels // chunk), chunk


def _rows(x: torch.Tensor) -> tuple[tuple[int, int], int, int]:
    """Rows and their parts, values of a row, values of a part."""
    rows = math.prod(x.shape[:2])
    voxels = x.numel() // rows
    parts, chunk = _parts(rows, voxels)
    return (rows, parts), voxels, chunk


def group_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, groups: int, eps: float, relu: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalized ``x``, with ``relu`` its ReLU, and mean and reciprocal standard deviation of each group.

    The last two are one tensor ``(2, b * groups)`` in float32.
    """
    grid, voxels, chunk = _rows(x)
    y = torch.empty_like(x)
    moments = torch.empty((2, *grid), dtype=torch.float32, device=x.device)
    statistics = torch.empty((2, len(x) * groups), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _moments[grid](x, moments, voxels, chunk, BLOCK)
        _normalize[grid](
            x, y, moments, statistics, weight, bias, voxels, chunk, x.shape[1] // groups, groups, eps, relu, BLOCK // 2
        )
    return y, statistics


def group_norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    statistics: torch.Tensor,
    groups: int,
    relu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of ``x``, weight and bias; the last two of shape ``(c,)`` in float32."""
    grid, voxels, chunk = _rows(x)
    grad = grad.contiguous()
    of_x = torch.empty_like(x)
    products = torch.empty((2, *grid), dtype=torch.float32, device=x.device)
    of_parameters = torch.empty((2, x.shape[1]), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        settings = statistics, weight, bias, voxels, chunk, x.shape[1] // groups, groups, relu
        _products[grid](x, grad, products, *settings, BLOCK)
        _gradients[grid](x, grad, of_x, products, of_parameters, *settings, BLOCK // 2)
    of_weight, of_bias = of_parameters.unbind()
    return of_x, of_weight, of_bias


def _length(size: int) -> int:
    """A power of two for filters of ``size`` weights. All short filters share one compilation."""
    return max(1024, triton.next_power_of_2(size))


def standardize(weight: torch.Tensor, gain: float, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """``gain * (w - mean(w)) / sqrt(var(w) + eps)`` for each filter ``w`` of ``(out_channels, ...)``, as ``dtype``."""
    filters = torch.empty_like(weight, dtype=dtype)
    size = weight.numel() // len(weight)
    with torch.cuda.device_of(weight):
        _standardize[(len(weight),)](weight, filters, size, gain, eps, _length(size), num_warps=8)
    return filters


def standardize_backward(grad: torch.Tensor, weight: torch.Tensor, gain: float, eps: float) -> torch.Tensor:
    """The gradient of ``weight``."""
    of_weight = torch.empty_like(weight)
    size = weight.numel() // len(weight)
    with torch.cuda.device_of(weight):
        _standardize_backward[(len(weight),)](
            weight, grad.contiguous(), of_weight, size, gain, eps, _length(size), num_warps=8
        )
    return of_weight


def _slices(x: torch.Tensor, dim: int) -> tuple[int, int]:
    """Values between two first slices, and between two slices."""
    inner = math.prod(x.shape[dim + 1 :])
    return x.shape[dim] * inner, inner


def sigmoid_change(x: torch.Tensor, dim: int) -> torch.Tensor:
    """``|sigmoid(x[i]) - sigmoid(x[i - 1])|`` along the spatial dimension ``dim``, 0 in the first slice."""
    grid, voxels, chunk = _rows(x)
    y = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _change[grid](x, y, voxels, chunk, *_slices(x, dim), BLOCK // 2)
    return y


def sigmoid_change_backward(grad: torch.Tensor, x: torch.Tensor, dim: int) -> torch.Tensor:
    """The gradient of ``x``."""
    grid, voxels, chunk = _rows(x)
    of_x = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _change_backward[grid](x, grad.contiguous(), of_x, voxels, chunk, *_slices(x, dim), BLOCK // 2)
    return of_x


def gate_features(features: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """``features * (1 + sigmoid(logits))``."""
    grid, voxels, chunk = _rows(features)
    y = torch.empty_like(features)
    with torch.cuda.device_of(features):
        _gate[grid](features, logits, y, voxels, chunk, BLOCK // 2)
    return y


def gate_features_backward(
    grad: torch.Tensor, features: torch.Tensor, logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of features and logits."""
    grid, voxels, chunk = _rows(features)
    of_features, of_logits = torch.empty_like(features), torch.empty_like(logits)
    with torch.cuda.device_of(features):
        _gate_backward[grid](features, logits, grad.contiguous(), of_features, of_logits, voxels, chunk, BLOCK // 2)
    return of_features, of_logits
