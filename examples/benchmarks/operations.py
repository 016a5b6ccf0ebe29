"""What a network asks of an accelerator, counted without one: operations, memory traffic, memory that autograd keeps.

Everything runs on torch's meta device, whose tensors hold no values. Autocast to bfloat16 and the package's kernels in
Triton are imitated, because the meta device has neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# operations of these networks that CUDA's autocast computes in half precision, in float32, and in the widest precision
NARROW = {F.conv3d, torch.conv3d, F.conv_transpose3d, torch.conv_transpose3d, F.linear, torch.matmul, torch.einsum}
WIDE = {F.group_norm, F.layer_norm, F.interpolate, F.softmax, torch.softmax}
WIDEST = {torch.addcmul}
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view"}
WITHOUT_READING = {"zero_", "fill_", "copy_", "zeros_like", "ones_like", "full_like", "new_zeros", "new_full"}


class Count(NamedTuple):
    """What one pass needs: number of operations, bytes read and written, bytes kept for backward, largest bytes alive.

    An operation is what torch launches: views and allocations do not count. Each operation reads its inputs and writes
    its outputs once.
    """

    operations: int
    moved: int
    kept: int
    peak: int


class Autocast(TorchFunctionMode):
    """Casts as CUDA's autocast to bfloat16 does."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        dtype = torch.bfloat16 if function in NARROW else torch.float32 if function in WIDE else None
        if function in WIDEST and "out" not in kwargs and any(x.dtype == torch.float32 for x in args):
            dtype = torch.float32
        if dtype is not None:
            args, kwargs = tree_map_only(torch.Tensor, lambda x: x.to(dtype), (args, kwargs))
        return function(*args, **kwargs)


class Counter(TorchDispatchMode):
    """Counts operations, the bytes that they move, and the bytes alive."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.moved = self.peak = 0
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def launch(self, read: Iterable[torch.Tensor], written: Iterable[torch.Tensor]) -> None:
        """Count one operation."""
        self.operations += 1
        self.moved += sum(map(size_in_memory, (*read, *written)))

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        results = [x for x in tree_leaves(output) if isinstance(x, torch.Tensor)]
        for result in results:
            storage = result.untyped_storage()
            self.alive[storage.data_ptr() or id(storage)] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        name = function._schema.name.partition("::")[2]
        if results and not is_view and name not in ALLOCATIONS:
            given = tree_leaves((args, {key: value for key, value in kwargs.items() if key != "out"}))
            self.launch([x for x in given if isinstance(x, torch.Tensor)][name in WITHOUT_READING :], results)
        return output


class Kernels:
    """In the place of ``monai_conres.kernels``: as many launches, which read and write as many bytes."""

    def __init__(self, counter: Counter) -> None:
        self.counter = counter

    def group_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        groups: int,
        eps: float,
        relu: bool,
    ) -> tuple[torch.Tensor, ...]:
        y, statistics = torch.empty_like(x), x.new_empty(2, x.shape[0] * groups, dtype=torch.float32)
        self.counter.launch([x], [statistics])
        self.counter.launch([x], [y])
        return y, statistics

    def group_norm_backward(self, grad: torch.Tensor, x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
        of_x, products = torch.empty_like(x), x.new_empty(2, *x.shape[:2], dtype=torch.float32)
        self.counter.launch([x, grad], [products])
        self.counter.launch([x, grad], [of_x])
        return of_x, *products[:, 0].unbind()

    def standardize(self, weight: torch.Tensor, gain: float, eps: float, dtype: torch.dtype) -> torch.Tensor:
        filters = torch.empty_like(weight, dtype=dtype)
        self.counter.launch([weight], [filters])
        return filters

    def standardize_backward(self, grad: torch.Tensor, weight: torch.Tensor, *_: float) -> torch.Tensor:
        of_weight = torch.empty_like(weight)
        self.counter.launch([weight, grad], [of_weight])
        return of_weight

    def sigmoid_change(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return self.gate_features(x)

    def sigmoid_change_backward(self, grad: torch.Tensor, x: torch.Tensor, dim: int) -> torch.Tensor:
        return self.gate_features_backward(grad, x)[0]

    def gate_features(self, *read: torch.Tensor) -> torch.Tensor:
        y = torch.empty_like(read[0])
        self.counter.launch(read, [y])
        return y

    def gate_features_backward(self, grad: torch.Tensor, *read: torch.Tensor) -> list[torch.Tensor]:
        gradients = [torch.empty_like(x) for x in read]
        self.counter.launch([grad, *read], gradients)
        return gradients


def size_in_memory(x: torch.Tensor) -> int:
    """Bytes of the values of ``x``; repeated ones count once."""
    values = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        values *= size if stride else 1
    return values * x.element_size()


@contextmanager
def as_on_a_gpu(counter: Counter, dtype: torch.dtype) -> Iterator[None]:
    """The package takes kernels, which the counter counts, and filters of ``dtype``, and resamples in one operation."""

    def kernels(*tensors: torch.Tensor | None) -> Kernels:
        return Kernels(counter)

    with (
        mock.patch("monai_conres.operations.triton_kernels", kernels),  # a mock of its own would keep the tensors
        mock.patch("monai_conres.layers.convolution_dtype", return_value=dtype),
        mock.patch("monai_conres.operations.resizes_at_once", return_value=True),
    ):
        yield


def count(network: nn.Module, shape: tuple[int, ...], *, autocast: bool = True, step: bool = False) -> Count:
    """A forward pass of ``network`` in ``eval()``, or a training step without loss and optimizer.

    Args:
        network: the network, which is moved to the meta device.
        shape: shape of the image.
        autocast: True counts autocast to bfloat16 on CUDA.
        step: True counts forward and backward pass in ``train()``.
    """
    network = network.to("meta").train(step)
    dtype, context = (torch.bfloat16, Autocast) if autocast else (torch.float32, nullcontext)
    own = {id(parameter.untyped_storage()) for parameter in network.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in own:
            kept[id(storage)] = storage
        return tensor

    image = torch.empty(shape, device="meta")
    if not step:
        with torch.no_grad(), as_on_a_gpu(Counter(), dtype), context():
            network(image)  # a network may keep what it computes once
    with Counter() as counter, as_on_a_gpu(counter, dtype):
        with (
            context(),
            torch.set_grad_enabled(step),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            outputs = [x for x in tree_leaves(network(image)) if isinstance(x, torch.Tensor) and x.requires_grad]
        size = sum(storage.nbytes() for storage in kept.values())
        kept.clear()
        if step:
            torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])
    return Count(counter.operations, counter.moved, size, counter.peak)
