"""Training that can be interrupted and repeated: each epoch depends on a seed and its number, and on nothing before it.

So a run that was killed goes on as if nothing had happened, whatever the number of workers, and several processes train
on the same batches as one.
"""

from __future__ import annotations

import copy
import csv
import json
import os
import random
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence, Sized
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn as nn
from monai.data import CacheDataset
from monai.transforms import Compose
from monai.utils import ensure_tuple, optional_import, set_determinism
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import get_worker_info

from monai_conres.files import atomic_path

if TYPE_CHECKING:
    from ignite.engine import Engine
Events, _ = optional_import("ignite.engine", name="Events")
idist, _ = optional_import("ignite.distributed")

__all__ = [
    "EpochSeeds",
    "LossCurve",
    "SeededDataset",
    "TrainingCheckpoint",
    "finalize_processes",
    "number_of_epochs",
    "seed_everything",
    "share_of_batch",
]


class SeededDataset(CacheDataset):
    """MONAI's ``CacheDataset`` whose random transforms depend on the seed, the epoch and the case alone.

    Args:
        data: the cases.
        transform: a list of transforms, or a ``Compose``.
        seed: seed of the random transforms.
        cache_rate: share of the cases that is kept in memory after the transforms before the first random one.
        num_workers: number of threads that fill the cache.

    Example:
        >>> from monai.transforms import RandFlip
        >>> dataset = SeededDataset(torch.arange(6.0).reshape(2, 1, 3), [RandFlip(0.5)], seed=1)
        >>> dataset.set_epoch(3)
        >>> bool((dataset[0] == dataset[0]).all())
        True
    """

    def __init__(
        self,
        data: Sequence,
        transform: Sequence[Callable] | Callable,
        *,
        seed: int = 0,
        cache_rate: float = 0.0,
        num_workers: int | None = 1,
    ) -> None:
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that outlive an epoch see it, too
        transform = transform if isinstance(transform, Compose) else Compose(transform)
        self._thread = threading.get_ident()
        self._transforms: dict[int, Compose] = {}  # of other threads
        super().__init__(data, transform, cache_rate=cache_rate, num_workers=num_workers, progress=False)

    @property
    def epoch(self) -> int:
        """The epoch that the random transforms draw for."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw anew for another epoch. Call it before the loader's iterator is made, as :class:`EpochSeeds` does."""
        self._epoch.fill_(epoch)

    def _transform(self, index: int) -> Any:
        own, thread = self, threading.get_ident()
        if thread != self._thread:  # a random state of its own, or threads would disturb each other's draws
            if thread not in self._transforms:
                self._transforms[thread] = copy.deepcopy(self.transform)
            own = copy.copy(self)
            own.transform = self._transforms[thread]
        seed = _seed(self.seed, self.epoch, index % len(self))
        own.transform.set_random_state(seed=seed)
        if get_worker_info() is not None:  # the generators of a worker, for transforms without one of their own
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
        return super(SeededDataset, own)._transform(index)


class EpochSeeds:
    """A handler that seeds each epoch: the data set's random transforms, and torch's generator (dropout).

    Args:
        dataset: a :class:`SeededDataset`, or anything with ``set_epoch``.
        seed: seed of torch's generator, together with the epoch and the process.
    """

    def __init__(self, dataset: SeededDataset, *, seed: int = 0) -> None:
        self.dataset = dataset
        self.seed = seed

    def attach(self, engine: Engine) -> None:
        """Called at the start of each epoch of ``engine``, before its first batch is drawn."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Seed the present epoch."""
        self.dataset.set_epoch(engine.state.epoch)
        torch.manual_seed(_seed(self.seed, engine.state.epoch, idist.get_rank()))


class LossCurve:
    """A handler that keeps the mean loss of each epoch, over all processes, and writes it to a CSV file.

    Args:
        path: name of the file.
        optimizer: its learning rate is noted, too.
    """

    def __init__(self, path: str | os.PathLike, optimizer: torch.optim.Optimizer) -> None:
        self.path = Path(path)
        self.optimizer = optimizer
        self.rows: list[list[float]] = []
        self._sum = torch.zeros(())

    def attach(self, engine: Engine) -> None:
        """Count each iteration of ``engine``, a trainer with ``decollate=False``."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def state_dict(self) -> dict[str, Any]:
        """The curve so far, for a checkpoint."""
        return {"rows": self.rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a curve."""
        self.rows = list(state["rows"])

    def _start(self, engine: Engine) -> None:
        self._sum = torch.zeros((), device=engine.state.device)

    def _add(self, engine: Engine) -> None:
        self._sum += engine.state.output["loss"].detach()  # on the device: no waiting for it

    def __call__(self, engine: Engine) -> None:
        """Note the present epoch."""
        loss = idist.all_reduce(self._sum.item() / engine.state.epoch_length) / idist.get_world_size()
        self.rows.append([engine.state.epoch, engine.state.iteration, self.optimizer.param_groups[0]["lr"], loss])
        if idist.get_rank() == 0:
            engine.logger.info(f"epoch {engine.state.epoch}: mean loss {loss:.4f}")
            with atomic_path(self.path) as temporary, temporary.open("w", newline="") as file:
                csv.writer(file).writerows([["epoch", "iteration", "learning rate", "loss"], *self.rows])


class TrainingCheckpoint:
    """A handler that writes one checkpoint, over and over, and goes on from it where there is one.

    The file is replaced when the new one is complete, so that neither a killed process nor a full disk costs the last
    one. (MONAI's ``CheckpointSaver`` removes the old file first.) The trainer's own state is part of it. At the end,
    the first object's weights, the network's, are written alone, for evaluation, and the settings beside them
    (``model.pt.json``), for :func:`~monai_conres.bundle.evaluation.load_networks` to compare.

    Args:
        path: name of the checkpoint.
        objects: what to keep, by name, each with ``state_dict`` and ``load_state_dict``; the network first.
        final_path: name of the file of the network's weights.
        interval: number of epochs between checkpoints.
        settings: what must not change when a run goes on, such as its seed: plain values (numbers, text, lists), by
            name. ``"training_cases"`` are the names of the cases that the network is not to be scored with. Of a
            network of this package, what its weights do not tell is added as ``"network"``, and of an optimizer its
            kind and its numbers but for the learning rate, by its name in ``objects``.

    Raises:
        ValueError: when a setting is no plain value, or the checkpoint that is there is of another configuration.
        OSError: when a file cannot be written; the one before is still there.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        objects: Mapping[str, Any],
        *,
        final_path: str | os.PathLike,
        interval: int = 1,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        self.objects = dict(objects)
        self.final_path = Path(final_path)
        self.interval = interval
        optimizers = {
            name: optimizer_settings(thing)
            for name, thing in self.objects.items()
            if isinstance(thing, torch.optim.Optimizer)
        }
        self.settings = plain_values({**(settings or {}), "network": network_settings(self._network), **optimizers})

    def attach(self, engine: Engine) -> None:
        """Load at the start of ``engine``'s run, and save as it goes on; the last of its handlers."""
        engine.add_event_handler(Events.STARTED, self.load)
        engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval), self.save)
        engine.add_event_handler(Events.COMPLETED, self.finish)

    def load(self, engine: Engine) -> None:
        """Go on from the checkpoint, if there is one."""
        if idist.get_rank() == 0:
            for path in (self.path, self.final_path, settings_file(self.final_path)):
                for left_over in path.parent.glob(f".{path.name}.*"):  # of a process killed while it wrote
                    if left_over.is_dir():
                        shutil.rmtree(left_over)
        if not self.path.is_file():
            return
        max_epochs = engine.state.max_epochs
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            for name, value in self.settings.items():
                if name not in state["settings"]:
                    raise ValueError(f"it says nothing of {name}")
                if (earlier := state["settings"][name]) != value:
                    raise ValueError(f"not the same {name}: {_shortened(earlier)}, now {_shortened(value)}")
            for name, thing in self._parts(engine).items():
                if name != "scaler" or state.get(name):  # that of a device without one is empty
                    thing.load_state_dict(state[name])
        except Exception as error:
            raise ValueError(
                f"expected a checkpoint of this configuration, cannot go on from {self.path} ({error}); give another "
                "run_dir, or remove the file to start anew."
            ) from error
        engine.state.max_epochs = max_epochs
        engine.logger.info(f"going on after epoch {engine.state.epoch} from {self.path}")

    def save(self, engine: Engine) -> None:
        """Write the checkpoint."""
        state = {name: thing.state_dict() for name, thing in self._parts(engine).items()}
        _write(self.path, partial(torch.save, {**state, "settings": self.settings}))

    def finish(self, engine: Engine) -> None:
        """Write the checkpoint, the network's weights and the settings."""
        self.save(engine)
        beside = settings_file(self.final_path)
        if idist.get_rank() == 0:
            beside.unlink(missing_ok=True)  # those of other weights
        _write(self.final_path, partial(torch.save, self._network.state_dict()))
        _write(beside, lambda temporary: temporary.write_text(json.dumps(self.settings, indent=1) + "\n"))

    @property
    def _network(self) -> Any:
        network = next(iter(self.objects.values()))
        return network.module if isinstance(network, DistributedDataParallel) else network

    def _parts(self, engine: Engine) -> dict[str, Any]:
        """All that has a state: in mixed precision the scale of the loss, too."""
        scaler = getattr(engine, "scaler", None)
        return {**self.objects, "trainer": engine, **({} if scaler is None else {"scaler": scaler})}


def optimizer_settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Kind and numbers of an optimizer, such as its weight decay, which loading a state would replace without a word.

    Not the learning rate, nor switches such as ``fused``, which differ from one version of torch to the next.
    """

    def numbers(value: Any) -> bool:
        return all(isinstance(part, float | int) and not isinstance(part, bool) for part in ensure_tuple(value))

    groups = [
        {key: value for key, value in group.items() if key not in ("params", "lr", "initial_lr") and numbers(value)}
        for group in optimizer.param_groups
    ]
    return {"kind": type(optimizer).__name__, "groups": groups}


def settings_file(weights: str | os.PathLike) -> Path:
    """The file beside a network's weights that says how it was trained."""
    return Path(weights).with_name(f"{Path(weights).name}.json")


def network_settings(network: nn.Module) -> dict[str, Any]:
    """What the weights of a network of this package do not tell; of any other nothing is known."""
    return json.loads(json.dumps(getattr(network, "conres_settings", {}), default=str))


def plain_values(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a file gives them back, tuples as lists.

    Raises:
        ValueError: when one of them is no plain value.
    """
    try:
        return {name: json.loads(json.dumps(value, allow_nan=False)) for name, value in settings.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"expected settings that are plain values, such as int(...), str(...) or lists of these, got others among "
            f"{list(settings)} ({error}); a checkpoint with others could not be loaded."
        ) from error


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch as MONAI's ``set_determinism``, but let cuDNN choose its algorithms.

    Where ``torch.backends.cudnn.deterministic`` is set, torch computes dilated convolutions, as in the network's
    bottleneck, without cuDNN, which takes many times as long; and trilinear up-sampling on a GPU would still not repeat
    to the last bit.
    """
    set_determinism(seed)
    torch.backends.cudnn.deterministic = False
    torch.backends.cudnn.benchmark = True


def number_of_epochs(iterations: int, loader: Sized) -> int:
    """How many epochs make at least so many iterations.

    Raises:
        ValueError: when the loader has no batch.

    Example:
        >>> number_of_epochs(40_000, range(125))
        320
    """
    if len(loader) == 0:
        raise ValueError("expected at least one batch in an epoch, got fewer cases than batch_size; lower it.")
    return -(-iterations // len(loader))


def share_of_batch(batch_size: int, processes: int) -> int:
    """How many cases of a batch each process takes.

    Raises:
        ValueError: when the batch cannot be split evenly.

    Example:
        >>> share_of_batch(9, 3)
        3
    """
    if batch_size < processes or batch_size % processes:
        raise ValueError(
            f"expected a batch_size that {processes} processes can share evenly, got {batch_size}; change one of them."
        )
    return batch_size // processes


def finalize_processes(network: nn.Module) -> None:
    """End the process group of a network that may be a ``DistributedDataParallel``, after training.

    The wrapper gives up its hold on the group first. In torch 2.13 it ends the threads of gloo where it is the last to
    hold it, and waits for them without releasing Python's lock, which they may be waiting for.
    """
    if isinstance(network, DistributedDataParallel):
        network.reducer = network.logger = None
    idist.finalize()


def _seed(*numbers: int) -> int:
    """A seed made of several numbers; other numbers give another one."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) < 100 else f"{text[:90]} ..."


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file in the first process."""
    if idist.get_rank() > 0:
        return
    try:
        with atomic_path(path) as temporary:
            write(temporary)
    except (OSError, RuntimeError) as error:  # torch's writer has errors of its own for a full disk
        kept = "; the one before is still there" if path.is_file() else ""
        raise OSError(f"cannot write {path} ({error}): is the disk full?{kept}.") from error
