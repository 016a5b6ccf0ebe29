from __future__ import annotations

import csv
import json
import random
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import ignite.distributed as idist
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader
from monai.engines import SupervisedTrainer
from monai.handlers import LrScheduleHandler
from monai.transforms import Compose, Lambda, RandFlip, RandGaussianNoise
from torch.optim.lr_scheduler import OneCycleLR, PolynomialLR
from torch.utils.data import DistributedSampler

from monai_conres import ConResNet
from monai_conres.bundle.training import (
    EpochSeeds,
    LossCurve,
    SeededDataset,
    TrainingCheckpoint,
    finalize_processes,
    number_of_epochs,
    optimizer_settings,
    seed_everything,
    share_of_batch,
)

VOLUMES = torch.randn(6, 1, 4, 5, 3, generator=torch.Generator().manual_seed(0))


def dataset(**kwargs) -> SeededDataset:
    return SeededDataset(VOLUMES, [Lambda(lambda x: x + 1), RandGaussianNoise(prob=1.0), RandFlip(0.5)], **kwargs)


def test_a_draw_depends_on_seed_epoch_and_case_alone():
    first = dataset(seed=1)
    first.set_epoch(2)
    expected = [first[index] for index in range(6)]
    assert len({tuple(volume.flatten().tolist()) for volume in expected}) == 6

    again = dataset(seed=1, cache_rate=0.5)
    _ = again[3]
    again.set_epoch(2)
    for index in (5, 0, 3):
        torch.testing.assert_close(again[index], expected[index], rtol=0, atol=0)
    for workers in (0, 2):
        batches = list(DataLoader(first, batch_size=2, num_workers=workers))
        torch.testing.assert_close(torch.cat(batches), torch.stack(expected), rtol=0, atol=0)
    lasting = DataLoader(first, batch_size=2, num_workers=2, persistent_workers=True)
    first.set_epoch(1)
    _ = list(lasting)
    first.set_epoch(2)
    torch.testing.assert_close(torch.cat(list(lasting)), torch.stack(expected), rtol=0, atol=0)

    again.set_epoch(3)
    assert not torch.equal(again[0], expected[0])
    other = dataset(seed=2)
    other.set_epoch(2)
    assert not torch.equal(other[0], expected[0])


def test_threads_draw_as_one_does():
    """Their items are computed at the same time, with the transforms of one data set."""

    class Slow(RandGaussianNoise):
        def randomize(self, *args, **kwargs):
            time.sleep(0.002)  # between the seed and the draw
            super().randomize(*args, **kwargs)

    data = SeededDataset(VOLUMES, [Slow(prob=1.0)], seed=1)
    expected = [data[index] for index in range(6)]
    with ThreadPoolExecutor(6) as threads:
        got = list(threads.map(data.__getitem__, range(6)))
    for volume, other in zip(got, expected, strict=True):
        torch.testing.assert_close(volume, other, rtol=0, atol=0)
    torch.testing.assert_close(data[-1], expected[5], rtol=0, atol=0)
    data.transform = Compose([Lambda(torch.zeros_like)])  # as users change it
    assert not data[0].any()


def trainer(
    folder,
    epochs: int,
    stop_in: int | None = None,
    interval: int = 1,
    settings: dict | None = None,
    weight_decay: float = 0.0,
) -> tuple[SupervisedTrainer, torch.nn.Module]:
    """Six volumes in batches of two, with dropout; ``stop_in`` raises in the second iteration of that epoch."""
    torch.manual_seed(3)
    network = torch.nn.Sequential(
        torch.nn.Conv3d(1, 4, 3, padding=1), torch.nn.Dropout3d(0.5), torch.nn.Conv3d(4, 1, 1)
    )
    data = SeededDataset([{"image": v, "label": v.abs()} for v in VOLUMES], lambda item: item)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01, weight_decay=weight_decay)
    schedule = PolynomialLR(optimizer, total_iters=3 * 4, power=0.9)
    curve = LossCurve(folder / "loss.csv", optimizer)
    objects = {"network": network, "optimizer": optimizer, "lr_scheduler": schedule, "curve": curve}
    sampler = DistributedSampler(data, num_replicas=1, rank=0, seed=5)
    engine = SupervisedTrainer(
        device="cpu",
        max_epochs=epochs,
        train_data_loader=DataLoader(data, batch_size=2, sampler=sampler),
        network=network,
        optimizer=optimizer,
        loss_function=torch.nn.MSELoss(),
        decollate=False,
        train_handlers=[
            curve,
            EpochSeeds(data, seed=7),
            LrScheduleHandler(schedule, print_lr=False, epoch_level=False),
            TrainingCheckpoint(
                folder / "checkpoint.pt",
                objects,
                final_path=folder / "model.pt",
                interval=interval,
                settings=settings,
            ),
        ],
    )
    if stop_in is not None:

        def stop(engine):
            if engine.state.iteration == 3 * (stop_in - 1) + 2:
                raise KeyboardInterrupt

        engine.add_event_handler(Events.ITERATION_COMPLETED, stop)
    return engine, network


@pytest.mark.parametrize("interval", [1, 2])
def test_interrupted_training_ends_as_undisturbed_training_does(tmp_path, interval):
    undisturbed, expected = trainer(tmp_path / "a", epochs=4)
    undisturbed.run()
    first, _ = trainer(tmp_path / "b", epochs=4, stop_in=4, interval=interval)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert not (tmp_path / "b" / "model.pt").exists()
    for left_over in (".checkpoint.pt.abc", ".model.pt.abc", ".model.pt.json.abc"):  # as a killed process leaves behind
        (tmp_path / "b" / left_over).mkdir()
    (tmp_path / "b" / ".checkpoint.pt.x1y2").write_text("another program's")  # rsync's, on its way
    second, network = trainer(tmp_path / "b", epochs=4, interval=interval)
    second.run()
    for got, parameter in zip(network.parameters(), expected.parameters(), strict=True):
        assert torch.equal(got, parameter)
    assert (tmp_path / "a" / "loss.csv").read_text() == (tmp_path / "b" / "loss.csv").read_text()
    weights = torch.load(tmp_path / "b" / "model.pt", weights_only=True)
    assert torch.equal(weights["0.weight"], expected[0].weight)
    names = [".checkpoint.pt.x1y2", "checkpoint.pt", "loss.csv", "model.pt", "model.pt.json"]
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == names

    finished, network = trainer(tmp_path / "b", epochs=4)
    finished.run()  # nothing left to do
    assert torch.equal(network[0].weight, expected[0].weight)


def test_the_scale_of_the_loss_goes_on(tmp_path, monkeypatch):
    """It is part of what mixed precision has learned; a new one begins with iterations that overflow."""
    scaler = partial(torch.amp.GradScaler, "cpu", init_scale=8.0, growth_interval=2)
    monkeypatch.setattr("torch.cuda.amp.GradScaler", scaler)  # as MONAI's trainer makes it when it runs

    def scaled(epochs: int) -> SupervisedTrainer:
        engine, _ = trainer(tmp_path, epochs)
        engine.amp = True
        return engine

    first = scaled(2)
    first.run()
    assert first.scaler.get_scale() == 8 * 2**3  # after 2, 4 and 6 iterations
    second = scaled(3)
    second.run()
    assert second.scaler.get_scale() == 8 * 2**4
    # begun on a device that has none
    without, _ = trainer(tmp_path / "cpu", epochs=1)
    without.run()
    third, _ = trainer(tmp_path / "cpu", epochs=2)
    third.amp = True
    third.run()
    assert third.scaler.get_scale() == 8 * 2


def finish(folder, network, settings: dict | None = None, name: str = "net.pt") -> TrainingCheckpoint:
    handler = TrainingCheckpoint(
        folder / "c.pt", {"network": network}, final_path=folder / name, settings={"seed": 3, **(settings or {})}
    )
    handler.finish(trainer(folder, epochs=1)[0])
    return handler


def network(**kwargs) -> ConResNet:
    return ConResNet(1, 1, **({"channels": (8, 16), "strides": ((2, 2, 1),), "blocks": (1, 1, 1)} | kwargs))


def test_the_settings_are_beside_the_weights(tmp_path):
    handler = finish(tmp_path, network(), {"size": (1, 2)})
    settings = json.loads((tmp_path / "net.pt.json").read_text())
    assert settings["seed"] == 3
    assert settings["size"] == [1, 2]
    assert settings["network"]["strides"] == [[2, 2, 1]]
    assert settings["network"]["spatial_axis"] == 2
    handler.load(trainer(tmp_path, epochs=1)[0])  # a tuple is no other setting than the list in the file
    finish(tmp_path, network(), name="net.fold1")
    assert (tmp_path / "net.fold1.json").is_file()
    finish(tmp_path, torch.nn.Conv3d(1, 1, 1))
    assert json.loads((tmp_path / "net.pt.json").read_text()) == {"seed": 3, "network": {}}


@pytest.mark.parametrize(
    "kwargs",
    [
        {"spatial_axis": np.int64(1), "strides": ((np.int64(2), 2, 1),)},
        {"norm": ("group", {"num_groups": 4, "dtype": torch.float32})},
    ],
)
def test_numbers_of_any_kind_are_settings_of_a_network(tmp_path, kwargs):
    finish(tmp_path, network(**kwargs))
    assert json.loads((tmp_path / "net.pt.json").read_text())["network"]["strides"] == [[2, 2, 1]]


def test_settings_are_not_those_of_other_weights(tmp_path, monkeypatch):
    """When writing the weights fails, those that are there have no settings rather than wrong ones."""
    finish(tmp_path, network(), {"training_cases": ["a"]})
    monkeypatch.setattr(torch, "save", lambda state, path: (_ for _ in ()).throw(RuntimeError("no space")))
    handler = TrainingCheckpoint(
        tmp_path / "c.pt", {"network": network()}, final_path=tmp_path / "net.pt", settings={"training_cases": ["b"]}
    )
    monkeypatch.setattr(handler, "save", lambda engine: None)
    with pytest.raises(OSError, match=r"cannot write .*net\.pt"):
        handler.finish(trainer(tmp_path, epochs=1)[0])
    assert (tmp_path / "net.pt").is_file()
    assert not (tmp_path / "net.pt.json").exists()


def test_what_is_wrong_with_a_checkpoint_is_said(tmp_path):
    trainer(tmp_path, epochs=1, settings={"seed": 1})[0].run()
    with pytest.raises(ValueError, match="says nothing of rate"):
        trainer(tmp_path, epochs=2, settings={"seed": 1, "rate": 2})[0].run()
    with pytest.raises(ValueError, match="not the same seed: 1, now 2"):
        trainer(tmp_path, epochs=2, settings={"seed": 2})[0].run()
    with pytest.raises(ValueError, match=r"not the same optimizer: .*'weight_decay': 0.*, now .*'weight_decay': 0\.1"):
        trainer(tmp_path, epochs=2, settings={"seed": 1}, weight_decay=0.1)[0].run()


def test_kind_and_numbers_of_an_optimizer():
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": weights[:1]}, {"params": weights[1:], "weight_decay": 0}], lr=0.1)
    expected = {"betas": (0.9, 0.999), "eps": 1e-8}
    assert optimizer_settings(optimizer) == {
        "kind": "AdamW",
        "groups": [{**expected, "weight_decay": 0.01}, {**expected, "weight_decay": 0}],
    }


def test_what_a_schedule_changes_of_an_optimizer_may_have_changed(tmp_path):
    def handler() -> tuple[TrainingCheckpoint, OneCycleLR]:
        model = torch.nn.Conv3d(1, 1, 1)
        optimizer = torch.optim.Adam(model.parameters())
        schedule = OneCycleLR(optimizer, max_lr=0.1, total_steps=5)
        objects = {"network": model, "optimizer": optimizer}
        return TrainingCheckpoint(tmp_path / "c.pt", objects, final_path=tmp_path / "net.pt"), schedule

    first, schedule = handler()
    optimizer = first.objects["optimizer"]
    before = optimizer.param_groups[0]["betas"]
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["betas"] != before
    first.save(trainer(tmp_path / "a", epochs=1)[0])
    again, _ = handler()
    again.load(trainer(tmp_path / "a", epochs=1)[0])
    assert again.objects["optimizer"].param_groups[0]["betas"] == optimizer.param_groups[0]["betas"]


def test_transforms_without_a_generator_of_their_own_draw_for_seed_epoch_and_case_in_workers():
    def draw(item):
        return torch.stack([torch.rand(()), torch.tensor(np.random.rand()), torch.tensor(random.random())])

    data = SeededDataset([0, 1], [draw], seed=4)

    def epoch(number: int, **kwargs) -> torch.Tensor:
        data.set_epoch(number)
        return torch.cat(list(DataLoader(data, num_workers=1, generator=torch.Generator(), **kwargs)))

    second = epoch(2)
    assert len(second.unique()) == 6
    assert not torch.equal(epoch(1), second)
    torch.testing.assert_close(epoch(2, persistent_workers=True), second, rtol=0, atol=0)
    data.seed = 5
    assert not torch.equal(epoch(2), second)


def test_seeds_repeat_and_cudnn_is_free(monkeypatch):
    for flag in ("deterministic", "benchmark"):
        monkeypatch.setattr(torch.backends.cudnn, flag, getattr(torch.backends.cudnn, flag))  # to be put back
    draws = []
    for _ in range(2):
        seed_everything(3)
        draws.append((torch.rand(2).tolist(), np.random.rand(), random.random()))
    assert draws[0] == draws[1]
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == (False, True)


def test_loss_curve_has_the_mean_of_each_epoch(tmp_path):
    engine, _ = trainer(tmp_path, epochs=2)
    losses = []
    engine.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: losses.append(engine.state.output["loss"].item())
    )
    engine.run()
    rows = list(csv.DictReader((tmp_path / "loss.csv").open()))
    assert [(row["epoch"], row["iteration"]) for row in rows] == [("1", "3"), ("2", "6")]
    for epoch, row in enumerate(rows):
        assert float(row["loss"]) == pytest.approx(sum(losses[3 * epoch : 3 * epoch + 3]) / 3, rel=1e-5)
        assert float(row["learning rate"]) == pytest.approx(0.01 * (1 - 3 * (epoch + 1) / 12) ** 0.9)


def test_a_checkpoint_of_another_network_is_an_error(tmp_path):
    trainer(tmp_path, epochs=1)[0].run()
    engine, network = trainer(tmp_path, epochs=2)
    network[2] = torch.nn.Conv3d(4, 2, 1)
    with pytest.raises(ValueError, match=r"(?s)cannot go on from .*checkpoint\.pt .*size mismatch.*run_dir"):
        engine.run()
    (tmp_path / "checkpoint.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"cannot go on from .*checkpoint\.pt"):
        trainer(tmp_path, epochs=2)[0].run()


def test_a_checkpoint_of_other_cases_is_an_error(tmp_path):
    settings = {"training_cases": ["a", "b"], "seed": 1}
    trainer(tmp_path, epochs=1, settings=settings)[0].run()
    engine, _ = trainer(tmp_path, epochs=2, settings=settings)
    engine.run()
    assert engine.state.epoch == 2
    before = (tmp_path / "checkpoint.pt").read_bytes()
    for changed in ({"training_cases": ["a", "c"]}, {"seed": 2}):
        with pytest.raises(
            ValueError, match=rf"cannot go on from .*checkpoint\.pt \(not the same {next(iter(changed))}"
        ):
            trainer(tmp_path, epochs=2, settings=settings | changed)[0].run()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    for value in (tmp_path, float("nan"), torch.zeros(1)):  # could not be loaded, or is not equal to itself
        with pytest.raises(ValueError, match="expected settings that are plain values"):
            trainer(tmp_path, epochs=1, settings={"seed": value})


def test_a_full_disk_costs_no_checkpoint(tmp_path):
    trainer(tmp_path, epochs=1)[0].run()
    before = (tmp_path / "checkpoint.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # as if no more than 2 kB were left
        with pytest.raises(OSError, match=r"cannot write .*checkpoint\.pt .*the one before is still there"):
            trainer(tmp_path, epochs=2)[0].run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.glob(".*"))
    engine, _ = trainer(tmp_path, epochs=2)
    engine.run()  # there is space again
    assert engine.state.iteration == 6


def test_an_epoch_without_a_batch_is_an_error():
    assert number_of_epochs(41, range(10)) == 5
    with pytest.raises(ValueError, match="fewer cases than batch_size"):
        number_of_epochs(10, [])


def test_a_batch_that_cannot_be_shared_is_an_error():
    assert share_of_batch(4, 2) == 2
    for batch_size, processes in ((9, 2), (2, 4), (0, 1)):
        with pytest.raises(ValueError, match=f"{processes} processes can share evenly, got {batch_size}"):
            share_of_batch(batch_size, processes)


def test_the_wrapper_lets_go_of_the_process_group_before_that_ends(tmp_path):
    """Else torch 2.13 deadlocks, once in some thirty times."""
    idist.initialize("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    network = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1))
    network(torch.ones(1, 2)).sum().backward()
    finalize_processes(network)
    assert network.reducer is network.logger is None
    assert not torch.distributed.is_initialized()
