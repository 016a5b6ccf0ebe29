"""Training that can be interrupted and repeated: each epoch depends only on a seed and its number.

So a killed run continues and ends with the weights of an undisturbed run, with any number of workers. Several processes
train on the batches of one process.
"""

from __future__ import annotations

import inspect
import os
import random
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.util import find_spec
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn as nn
from monai.data import CacheDataset
from monai.transforms import Transform
from monai.utils import optional_import, set_determinism
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import get_worker_info

from monai_conres.files import (
    Backbone,
    atomic_path,
    describe_network,
    plain_values,
    remove_left_overs,
    save_network,
    write_csv,
)
from monai_conres.scans import ScanSettings

if TYPE_CHECKING:
    from ignite.engine import Engine
Events, _ = optional_import("ignite.engine", name="Events")
Average, _ = optional_import("ignite.metrics", name="Average")
idist, _ = optional_import("ignite.distributed")


@dataclass(frozen=True)
class Computation:
    """How a device computes: in mixed precision and compiled, where that is faster.

    Attributes:
        device: the device.
        dtype: bfloat16 for autocast where a GPU has it, else ``None``: float32.
        compiles: whether ``torch.compile`` works there. It takes the first step a minute or more, so it pays in a
            training, not in a trial.

    Example:
        >>> computation = Computation.on("cpu")
        >>> str(computation)
        'on cpu in float32'
        >>> with computation.autocast():
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.float32
    """

    device: torch.device
    dtype: torch.dtype | None
    compiles: bool

    @classmethod
    def on(cls, device: str | torch.device) -> Computation:
        """What is fast on ``device``: float32 on anything but a GPU of NVIDIA or AMD."""
        device = torch.device(device)
        if device.type != "cuda":
            return cls(device, None, False)
        major, _ = torch.cuda.get_device_capability(device)
        return cls(device, torch.bfloat16 if major >= 8 else None, major >= 7 and find_spec("triton") is not None)

    def autocast(self) -> torch.autocast:
        """The context in which to compute a network and its loss."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def with_amp(self, amp: bool) -> Computation:
        """The same with or without mixed precision, in float16 where the GPU has no bfloat16.

        Raises:
            ValueError: when ``amp`` is True and the device is not a GPU.
        """
        if amp and self.device.type != "cuda":
            raise ValueError(f"expected a GPU for mixed precision, got {self.device}; leave out --amp True.")
        return replace(self, dtype=(self.dtype or torch.float16) if amp else None)

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device)
        precision = "float32" if self.dtype is None else f"mixed precision ({str(self.dtype).removeprefix('torch.')})"
        return f"on {name} in {precision}"


class SeededDataset(CacheDataset):
    """MONAI's ``CacheDataset``, whose random transforms depend only on the seed, the epoch and the case.

    ``cache_rate`` is the share of the cases that stay in memory after the transforms before the first random one.

    Example:
        >>> from monai.transforms import RandFlip
        >>> dataset = SeededDataset(torch.arange(6.0).reshape(2, 1, 3), [RandFlip(0.5)], seed=1)
        >>> dataset.set_epoch(3)
        >>> bool((dataset[0] == dataset[0]).all())
        True
    """

    def __init__(
        self, data: Sequence, transform: Sequence[Callable] | Callable, *, seed: int = 0, cache_rate: float = 0.0
    ) -> None:
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see a new epoch
        super().__init__(data, transform, cache_rate=cache_rate, progress=False)

    def set_epoch(self, epoch: int) -> None:
        """Draw for another epoch. Call this before the loader makes its iterator, as :class:`EpochSeeds` does."""
        self._epoch.fill_(epoch)

    def _transform(self, index: int) -> Any:
        seed = _seed(self.seed, int(self._epoch), index % len(self))
        self.transform.set_random_state(seed=seed)
        if get_worker_info() is not None:  # a worker's global generators, for transforms without their own
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
        return super()._transform(index)


class EpochSeeds:
    """A handler that seeds each epoch: a :class:`SeededDataset`, and torch's generator for dropout in each process."""

    def __init__(self, dataset: SeededDataset, *, seed: int = 0) -> None:
        self.dataset = dataset
        self.seed = seed

    def attach(self, engine: Engine) -> None:
        """Run at the start of each epoch of ``engine``, before its first batch."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Seed the current epoch."""
        self.dataset.set_epoch(engine.state.epoch)
        torch.manual_seed(_seed(self.seed, engine.state.epoch, idist.get_rank()))


class LossCurve:
    """A handler that writes the mean loss of each epoch, over all processes, and the learning rate to a CSV file."""

    def __init__(self, path: str | os.PathLike, optimizer: torch.optim.Optimizer) -> None:
        self.path = Path(path)
        self.optimizer = optimizer
        self.rows: list[dict[str, float]] = []

    def attach(self, engine: Engine) -> None:
        """Count each iteration of ``engine``, a trainer with ``decollate=False``."""
        mean = Average(output_transform=lambda output: output["loss"], device=engine.state.device)
        mean.attach(engine, "loss")
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def state_dict(self) -> dict[str, Any]:
        """The curve so far, for a checkpoint."""
        return {"rows": self.rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a curve."""
        self.rows = list(state["rows"])

    def __call__(self, engine: Engine) -> None:
        """Write the curve with the current epoch."""
        state, loss = engine.state, engine.state.metrics["loss"]
        rate = self.optimizer.param_groups[0]["lr"]
        self.rows.append({"epoch": state.epoch, "iteration": state.iteration, "learning rate": rate, "loss": loss})
        if idist.get_rank() == 0:
            engine.logger.info(f"epoch {state.epoch}: mean loss {loss:.4f}")
            write_csv(self.path, self.rows)


class TrainingCheckpoint:
    """A handler that writes ``checkpoint.pt`` into a run folder, and continues from that file if it exists.

    A new checkpoint replaces the old one only when it is complete. So a killed process or a full disk never costs the
    last checkpoint. (MONAI's ``CheckpointSaver`` removes the old file first.) At the end of training the handler writes
    ``model.pt`` and ``network.json``, which make the folder one complete network: see
    :func:`~monai_conres.files.load_network`.

    A run continues only with the settings that it was started with: ``scans``, ``training``, the network's arguments
    and dropout, the options of ``transform``, of losses and schedules, and kind and numbers of each optimizer, except
    for its learning rate, which belongs to ``training``.

    Args:
        run_dir: the run folder.
        objects: what the checkpoint holds, by name, each with ``state_dict`` and ``load_state_dict``. One is
            ``"network"``.
        scans: how a scan becomes the network's input.
        training: further settings that must not change, such as the seed: plain values by name. ``"cases"`` are names
            that :func:`~monai_conres.bundle.load_networks` does not allow to be scored, ``"validation"`` are names that
            :func:`~monai_conres.bundle.held_out_cases` takes.
        backbone: class and arguments of the backbone of an attached network, for ``network.json``.
        transform: what prepares the training cases.
        interval: number of epochs between checkpoints.

    Raises:
        ValueError: when a setting is not a plain value, or the checkpoint belongs to other settings.
        OSError: when a file cannot be written. The previous file stays.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike,
        objects: Mapping[str, Any],
        *,
        scans: ScanSettings,
        training: Mapping[str, Any] | None = None,
        backbone: Backbone | None = None,
        transform: Callable | None = None,
        interval: int = 1,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.path = self.run_dir / "checkpoint.pt"
        self.objects = dict(objects)
        self.network = self.objects["network"]
        self.saved: dict[str, Any] = {"scans": scans, "backbone": backbone, "training": training}
        self.interval = interval
        settings = describe_network(self.network, **self.saved)
        settings["scans"]["classes"] = list(settings["scans"]["classes"].items())  # their order counts
        for name, thing in {**self.objects, "transform": transform}.items():
            if isinstance(thing, torch.optim.Optimizer):
                settings[name] = {"kind": type(thing).__name__, **_numbers(thing.defaults)}
            elif name != "network" and isinstance(thing, (nn.Module, LRScheduler, Transform)):
                settings[name] = _options(thing)
        rates = {name: getattr(module, "p", None) for name, module in self.network.named_modules()}
        settings["dropout"] = {name: rate for name, rate in rates.items() if isinstance(rate, float)}
        self.settings = plain_values(settings)

    def attach(self, engine: Engine) -> None:
        """Load when ``engine`` starts, and save after its epochs. Attach this handler last."""
        engine.add_event_handler(Events.STARTED, self.load)
        engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval), self.save)
        engine.add_event_handler(Events.COMPLETED, self.finish)

    def load(self, engine: Engine) -> None:
        """Continue from the checkpoint, if there is one."""
        if idist.get_rank() == 0:
            remove_left_overs(self.run_dir)
        if not self.path.is_file():
            return
        max_epochs = engine.state.max_epochs
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            if changed := _differences(state["settings"], self.settings):
                raise ValueError("; ".join(changed[:5] + [f"and {len(changed) - 5} more"] * (len(changed) > 5)))
            for name, thing in self._parts(engine).items():
                if name != "scaler" or state.get(name):  # without mixed precision the scaler's state is empty
                    thing.load_state_dict(state[name])
        except Exception as error:
            raise ValueError(
                f"expected a checkpoint with the settings of this run, cannot continue from {self.path} ({error}); "
                "give another run_dir, or remove the file to start again."
            ) from error
        engine.state.max_epochs = max_epochs
        engine.logger.info(f"going on after epoch {engine.state.epoch} from {self.path}")

    def save(self, engine: Engine) -> None:
        """Write the checkpoint, in the first process."""
        if idist.get_rank() == 0:
            state = {name: thing.state_dict() for name, thing in self._parts(engine).items()}
            with _disk_errors(self.path), atomic_path(self.path) as temporary:
                torch.save({**state, "settings": self.settings}, temporary)

    def finish(self, engine: Engine) -> None:
        """Write the checkpoint, ``model.pt`` and ``network.json``, in the first process."""
        self.save(engine)
        if idist.get_rank() == 0:
            with _disk_errors(self.run_dir / "model.pt"):
                save_network(self.run_dir, self.network, **self.saved)

    def _parts(self, engine: Engine) -> dict[str, Any]:
        """Everything with a state. Mixed precision adds the scale of the loss."""
        scaler = getattr(engine, "scaler", None)
        return {**self.objects, "trainer": engine, **({} if scaler is None else {"scaler": scaler})}


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Name the file in an error of the disk. torch raises its own error for a full disk."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        kept = "; the previous file is still there" if path.is_file() else ""
        raise OSError(f"cannot write {path} ({error}): is the disk full?{kept}.") from error


def _numbers(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of an optimizer, such as its weight decay, which ``load_state_dict`` silently replaces.

    Switches such as ``fused`` do not count: they differ between versions of torch.
    """
    return {
        name: value
        for name, value in defaults.items()
        if name != "lr" and isinstance(value, (int, float, tuple)) and not isinstance(value, bool)
    }


def _options(thing: Any) -> dict[str, Any]:
    """The plain options that a transform, loss or schedule was made with, and those of its parts by name and class."""
    arguments = inspect.signature(type(thing).__init__).parameters
    options: dict[str, Any] = {}
    for name, value in {**vars(thing), **dict(getattr(thing, "named_children", tuple)())}.items():
        parts = dict(enumerate(value)) if isinstance(value, (list, tuple)) else {name: value}
        parts = {key: part for key, part in parts.items() if isinstance(part, (nn.Module, Transform))}
        options |= {f"{key} {type(part).__name__}": _options(part) for key, part in parts.items()}
        if not parts and name in arguments:
            with suppress(ValueError):  # functions, tensors
                options[name] = plain_values(value)
    return options


def _differences(earlier: Any, now: Any, name: str = "") -> list[str]:
    """One text for each setting that changed."""
    if earlier == now or name.endswith(".use_checkpoint"):  # to recompute features changes no number
        return []
    if isinstance(earlier, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*earlier, *now])
        return [text for key in keys for text in _differences(earlier.get(key), now.get(key), f"{name}.{key}")]
    one, other = (textwrap.shorten(str(value), 100, placeholder=" ...") for value in (earlier, now))
    return [f"{name.removeprefix('.')} was {one} and is now {other}"]


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch like MONAI's ``set_determinism``, but let cuDNN choose its algorithms.

    With ``torch.backends.cudnn.deterministic``, the dilated convolutions of the bottleneck take many times as long. And
    trilinear up-sampling on a GPU would still not repeat to the last bit.

    Raises:
        ValueError: for other seeds than 0, 1, 2 and so on.
    """
    set_determinism(whole_number("seed", seed, 0))
    torch.backends.cudnn.deterministic = False
    torch.backends.cudnn.benchmark = True


def whole_number(option: str, value: int, least: int = 1) -> int:
    """``value``, the whole number that an option of a configuration needs.

    Raises:
        ValueError: for anything else, or less than ``least``. The error names the option.

    Example:
        >>> whole_number("val_interval", 40)
        40
    """
    if not isinstance(value, Integral) or value < least:
        raise ValueError(f"expected --{option} to be a whole number, {least} or more, got {value!r}.")
    return value


def number_of_epochs(iterations: int, loader: Sized) -> int:
    """How many epochs have at least this number of iterations, 1 or more. An empty loader raises ``ValueError``."""
    whole_number("iterations", iterations)
    if len(loader) == 0:
        raise ValueError("expected at least one batch in an epoch, got fewer cases than batch_size; lower it.")
    return -(-iterations // len(loader))


def share_of_batch(batch_size: int, processes: int) -> int:
    """How many cases of a batch each process takes. An uneven share raises ``ValueError``."""
    if batch_size < processes or batch_size % processes:
        raise ValueError(
            f"expected a batch_size that {processes} processes can share evenly, got {batch_size}; change one of them."
        )
    return batch_size // processes


def share_of_cases(cases: int, processes: int, rank: int) -> range:
    """Which cases a process segments, as the sampler of a loader: each case once over all processes.

    Raises:
        ValueError: when there are fewer cases than processes.

    Example:
        >>> [list(share_of_cases(5, 2, rank)) for rank in (0, 1)]
        [[0, 2, 4], [1, 3]]
    """
    if cases < processes:
        raise ValueError(
            f"expected at least as many cases to segment as processes, got {cases} and {processes}; start fewer "
            "processes, or give more cases. In a training these are the validation cases: "
            f"--split '$@data.cases, @data.cases[:{processes}]' takes training cases."
        )
    return range(rank, cases, processes)


def start_processes(timeout: float = 24.0) -> None:
    """Start the process group of ``torchrun``: NCCL on GPUs, else gloo.

    Args:
        timeout: hours that a process waits for the slowest one before it gives up. The ten minutes of NCCL do not
            last where one process evaluates larger scans than the others, or checks them on a slower disk.
    """
    idist.initialize("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=timeout))


def finalize_processes(network: nn.Module) -> None:
    """End the process group after training. The network may be a ``DistributedDataParallel``.

    A wrapper of torch 2.13 that is the last owner of the group waits for the threads of gloo with Python's lock, which
    these threads may be waiting for. So the wrapper releases the group first.
    """
    if isinstance(network, DistributedDataParallel):
        network.reducer = network.logger = None
    idist.finalize()


def _seed(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
