from __future__ import annotations

import csv
import os
import random
import resource
import subprocess
import sys
from functools import partial

import ignite.distributed as idist
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader
from monai.data import DistributedSampler as EvaluationSampler
from monai.engines import SupervisedTrainer
from monai.handlers import LrScheduleHandler
from monai.losses import DiceLoss
from monai.networks.nets import BasicUNet, UNet
from monai.transforms import (
    Compose,
    CropForegroundd,
    Flipd,
    Lambda,
    Lambdad,
    OneOf,
    RandFlip,
    RandGaussianNoise,
    RandZoomd,
    Transform,
)
from torch.optim.lr_scheduler import OneCycleLR, PolynomialLR
from torch.utils.data import DistributedSampler

from monai_conres import ConResLoss, ConResNet, attach_conres
from monai_conres.bundle import (
    Computation,
    EpochSeeds,
    LossCurve,
    SeededDataset,
    TrainingCheckpoint,
    finalize_processes,
    number_of_epochs,
    seed_everything,
    share_of_batch,
    share_of_cases,
)
from monai_conres.chain import ChainSettings
from monai_conres.files import ScanSettings, load_network, save_chain

VOLUMES = torch.randn(6, 1, 4, 6, 4, generator=torch.Generator().manual_seed(0))
SCANS = ScanSettings(channels=["CT"], patch_size=[4, 6, 4], classes={"liver": [1], "tumor": [2]}, activation="sigmoid")


def batches(data: SeededDataset, epoch: int, **kwargs) -> torch.Tensor:
    data.set_epoch(epoch)
    return torch.cat(list(DataLoader(data, generator=torch.Generator(), **kwargs)))


def test_random_transforms_depend_on_seed_epoch_and_case():
    def dataset(**kwargs) -> SeededDataset:
        return SeededDataset(VOLUMES, [Lambda(lambda x: x + 1), RandGaussianNoise(prob=1.0), RandFlip(0.5)], **kwargs)

    data = dataset(seed=1)
    expected = batches(data, 2)
    assert len({tuple(volume.flatten().tolist()) for volume in expected}) == 6
    again = dataset(seed=1, cache_rate=0.5)
    again.set_epoch(2)
    for index in (5, 0, 3, -1):  # the order does not matter
        assert torch.equal(again[index], expected[index])
    assert torch.equal(batches(data, 2, batch_size=2, num_workers=2), expected)
    persistent = DataLoader(data, num_workers=2, persistent_workers=True)
    for epoch, same in ((1, False), (2, True)):
        data.set_epoch(epoch)
        assert torch.equal(torch.cat(list(persistent)), expected) == same
    assert not torch.equal(batches(dataset(seed=2), 2), expected)


def test_global_generators_depend_on_seed_epoch_and_case_in_workers():
    def draw(item):
        return torch.stack([torch.rand(()), torch.tensor(np.random.rand()), torch.tensor(random.random())])

    data = SeededDataset([0, 1], [draw], seed=4)
    expected = batches(data, 2, num_workers=1)
    assert len(expected.unique()) == 6
    assert not torch.equal(batches(data, 1, num_workers=1), expected)
    assert torch.equal(batches(data, 2, num_workers=2), expected)


def network(**kwargs) -> ConResNet:
    return ConResNet(1, 2, **{"channels": (8, 16), "strides": ((2, 2, 1),), "blocks": (1, 1, 1), **kwargs})


def trainer(folder, epochs: int, stop_in: int | None = None, interval: int = 1, **changes) -> SupervisedTrainer:
    """Six volumes in batches of two, with dropout; ``stop_in`` raises in the second iteration of that epoch."""
    torch.manual_seed(3)
    net = network(dropout=0.5, **changes.get("network", {}))
    data = SeededDataset([{"image": v, "label": torch.cat([v > 0, v > 1]).float()} for v in VOLUMES], lambda item: item)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01, weight_decay=changes.get("weight_decay", 0.0))
    schedule = PolynomialLR(optimizer, total_iters=3 * 4, power=0.9)
    curve = LossCurve(folder / "loss.csv", optimizer)
    checkpoint = TrainingCheckpoint(
        folder,
        {"network": net, "optimizer": optimizer, "lr_scheduler": schedule, "curve": curve},
        scans=changes.get("scans", SCANS),
        training={"cases": ["a", "b"], "seed": 7, **changes.get("training", {})},
        interval=interval,
    )
    engine = SupervisedTrainer(
        device="cpu",
        max_epochs=epochs,
        train_data_loader=DataLoader(data, batch_size=2, sampler=DistributedSampler(data, 1, 0, seed=5)),
        network=net,
        optimizer=optimizer,
        loss_function=ConResLoss(DiceLoss(sigmoid=True)),
        decollate=False,
        train_handlers=[
            curve,
            EpochSeeds(data, seed=7),
            LrScheduleHandler(schedule, print_lr=False, epoch_level=False),
            checkpoint,
        ],
    )
    if stop_in is not None:

        @engine.on(Events.ITERATION_COMPLETED(once=3 * (stop_in - 1) + 2))
        def stop(engine):
            raise KeyboardInterrupt

    return engine


def augmentation(margin: int = 2, zoom: float = 1.1, flips: float = 0.5, first: Transform | None = None) -> Compose:
    crop = CropForegroundd("image", "image", margin=margin)
    zooms = [RandZoomd("image", prob=flips, max_zoom=zoom), Lambdad("image", lambda x: x)]
    return Compose([*([first] if first else []), crop, SCANS.check_spacing, OneOf(zooms, weights=[0.3, 0.7])])


def part_of_network(dropout: float) -> torch.nn.Module:
    """An attached network, whose arguments the checkpoint does not know."""
    return attach_conres(UNet(3, 1, 2, (4, 8, 16), (2, 2), dropout=dropout), 1, spatial_size=(16, 16, 16), width=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transform": augmentation(margin=3)}, "CropForegroundd.*margin was 2 and is now 3"),
        (
            {"transform": augmentation(zoom=1.2)},
            r"OneOf.0 RandZoomd.rand_zoom RandZoom.max_zoom was \[1.1\] and is now",
        ),
        ({"transform": augmentation(flips=0.4)}, "RandZoomd.prob was 0.5 and is now 0.4"),
        ({"transform": augmentation(first=Flipd("image", 0))}, "transform.0 Flipd was None and is now"),
        ({"loss": ConResLoss(sigmoid=True, residual_weight=0.5)}, "loss.residual_weight was 1.0 and is now 0.5"),
        (
            {"loss": ConResLoss(sigmoid=True, background_weight=None)},
            "residual_loss ContextResidualLoss.background_weight was 1.0 and is now None",
        ),
        ({"loss": ConResLoss(DiceLoss(sigmoid=True))}, "_DefaultLoss"),
        ({"power": 0.8}, "lr_scheduler.power was 0.9 and is now 0.8"),
        ({"network": part_of_network(0.2)}, r"dropout\..* was 0\.1 and is now 0\.2"),
    ],
)
def test_run_continues_only_with_the_same_preparation_and_losses(tmp_path, changes, message):
    def handler(transform=None, loss=None, network=None, power: float = 0.9) -> TrainingCheckpoint:
        net = network or part_of_network(0.1)
        schedule = PolynomialLR(torch.optim.SGD(net.parameters(), lr=0.1), total_iters=4, power=power)
        things = {"network": net, "loss": loss or ConResLoss(sigmoid=True), "lr_scheduler": schedule}
        return TrainingCheckpoint(tmp_path, things, scans=SCANS, transform=transform or augmentation())

    engine = trainer(tmp_path / "other", epochs=1)
    engine.state.max_epochs = 1
    handler().save(engine)
    handler().load(engine)
    with pytest.raises(ValueError, match=rf"cannot continue from .*checkpoint\.pt \(.*{message}"):
        handler(**changes).load(engine)


@pytest.mark.parametrize("interval", [1, 2])
def test_interrupted_training_ends_with_the_same_weights(tmp_path, interval):
    expected = trainer(tmp_path / "a", epochs=4)
    expected.run()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "b", epochs=4, stop_in=4, interval=interval).run()
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["checkpoint.pt", "loss.csv"]
    for name in ("checkpoint.pt", "model.pt", "network.json"):  # of a killed process
        left_over = tmp_path / "b" / f".{name}.monai_conres-abc"
        left_over.mkdir()
        os.utime(left_over, (0, 0))
    (tmp_path / "b" / ".checkpoint.pt.x1y2").write_text("another program's")
    trainer(tmp_path / "b", epochs=4, interval=interval).run()
    names = [".checkpoint.pt.x1y2", "checkpoint.pt", "loss.csv", "model.pt", "network.json"]
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == names
    assert (tmp_path / "a" / "loss.csv").read_text() == (tmp_path / "b" / "loss.csv").read_text()

    trainer(tmp_path / "b", epochs=4).run()  # nothing is left to do
    trained = load_network(tmp_path / "b")
    for name, weight in expected.network.state_dict().items():
        assert torch.equal(trained.network.state_dict()[name], weight), name
    assert trained.scans == SCANS
    assert trained.training == {"cases": ["a", "b"], "seed": 7}


def test_training_without_new_epochs_keeps_the_chain(tmp_path):
    trainer(tmp_path, epochs=1).run()
    weights = (tmp_path / "model.pt").read_bytes()
    for missing in (None, "model.pt", "network.json"):  # of a run that was killed after its last checkpoint
        save_chain(tmp_path, ChainSettings(tau=0.3))
        if missing:
            (tmp_path / missing).unlink()
        trainer(tmp_path, epochs=1).run()
        assert load_network(tmp_path).chain == (None if missing else ChainSettings(tau=0.3))
        assert (tmp_path / "model.pt").read_bytes() == weights
    save_chain(tmp_path, ChainSettings(tau=0.3))
    trainer(tmp_path, epochs=2).run()
    assert load_network(tmp_path).chain is None


def test_checkpoint_keeps_the_scale_of_the_loss(tmp_path, monkeypatch):
    """A new scale would begin with iterations that overflow."""
    scaler = partial(torch.amp.GradScaler, "cpu", init_scale=8.0, growth_interval=2)
    monkeypatch.setattr("torch.cuda.amp.GradScaler", scaler)  # MONAI's trainer makes it when it runs
    for epochs, growths in ((2, 3), (3, 4)):  # it grows after 2, 4, 6 and 8 iterations
        engine = trainer(tmp_path, epochs)
        engine.amp = True
        engine.run()
        assert engine.scaler.get_scale() == 8 * 2**growths
    trainer(tmp_path / "cpu", epochs=1).run()  # starts on a device without a scaler
    engine = trainer(tmp_path / "cpu", epochs=2)
    engine.amp = True
    engine.run()
    assert engine.scaler.get_scale() == 8 * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training": {"seed": 2}}, "training.seed was 7 and is now 2"),
        ({"training": {"cases": ["a"]}}, r"training.cases was \['a', 'b'\] and is now \['a'\]"),
        ({"training": {"batch_size": 2}}, "training.batch_size was None and is now 2"),
        ({"weight_decay": 0.1}, r"optimizer.weight_decay was 0\.0 and is now 0\.1"),
        ({"network": {"context": "mapping"}}, "network.arguments.context was attention and is now mapping"),
        ({"network": {"channels": (8, 8)}}, r"network.arguments.channels was \[8, 16\] and is now \[8, 8\]"),
        (
            {"scans": ScanSettings(**{**vars(SCANS), "normalization": [{"name": "NormalizeIntensity"}]})},
            r"scans.normalization was \[\] and is now \[\{'name'",
        ),
        (
            {"scans": ScanSettings(**{**vars(SCANS), "classes": {"tumor": [2], "liver": [1]}})},
            r"scans.classes was \[\['liver', \[1\]\].* and is now \[\['tumor'",
        ),
    ],
    ids=["seed", "cases", "new setting", "optimizer", "network", "channels", "preprocessing", "order"],
)
def test_checkpoint_of_other_settings_is_an_error(tmp_path, change, message):
    trainer(tmp_path, epochs=1).run()
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match=rf"cannot continue from .*checkpoint\.pt \({message}.*run_dir"):
        trainer(tmp_path, epochs=2, **change).run()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_recomputation_may_change_on_resume(tmp_path):
    trainer(tmp_path, epochs=1).run()
    engine = trainer(tmp_path, epochs=2, network={"use_checkpoint": True})
    engine.run()
    assert engine.state.iteration == 6


def test_broken_checkpoint_is_an_error(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"cannot continue from .*checkpoint\.pt"):
        trainer(tmp_path, epochs=2).run()


@pytest.mark.parametrize("value", [object(), float("nan"), torch.zeros(1)])
def test_settings_must_be_plain_values(tmp_path, value):
    with pytest.raises(ValueError, match=r"plain values .* in settings\.training\.seed"):
        trainer(tmp_path, epochs=1, training={"seed": value})


def test_network_that_does_not_fit_the_scans_is_an_error_before_training(tmp_path):
    scans = ScanSettings(**{**vars(SCANS), "channels": ("T1", "T2")})
    with pytest.raises(ValueError, match="expected 2 image channels"):
        trainer(tmp_path, epochs=1, scans=scans)


def test_schedule_may_change_numbers_of_the_optimizer(tmp_path):
    engine = trainer(tmp_path, epochs=1)
    engine.state.max_epochs = 1
    betas = []
    for _ in range(2):
        net = network()
        optimizer = torch.optim.Adam(net.parameters())
        schedule = OneCycleLR(optimizer, max_lr=0.1, total_steps=5)
        handler = TrainingCheckpoint(tmp_path, {"network": net, "optimizer": optimizer}, scans=SCANS)
        handler.load(engine)
        betas.append(optimizer.param_groups[0]["betas"])
        optimizer.step()
        schedule.step()
        handler.save(engine)
    assert betas[0] != betas[1]


def test_full_disk_does_not_cost_the_checkpoint(tmp_path):
    trainer(tmp_path, epochs=1).run()
    before = (tmp_path / "checkpoint.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # as if 2 kB were left
        with pytest.raises(OSError, match=r"cannot write .*checkpoint\.pt .*the previous file is still there"):
            trainer(tmp_path, epochs=2).run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.glob(".*"))
    engine = trainer(tmp_path, epochs=2)
    engine.run()
    assert engine.state.iteration == 6


def test_run_folder_of_an_attached_network_is_complete(tmp_path):
    arguments = {"spatial_dims": 3, "out_channels": 2, "features": (4, 4, 4, 4, 4, 4)}
    net = attach_conres(BasicUNet(**arguments), 1, spatial_size=(32, 32, 32), width=4)
    handler = TrainingCheckpoint(
        tmp_path, {"network": net}, scans=SCANS, backbone=("monai.networks.nets.BasicUNet", arguments)
    )
    handler.finish(trainer(tmp_path / "other", epochs=1))
    loaded = load_network(tmp_path).network.state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in net.state_dict().items())


def test_seed_everything_repeats_and_leaves_cudnn_free(monkeypatch):
    for flag in ("deterministic", "benchmark"):
        monkeypatch.setattr(torch.backends.cudnn, flag, getattr(torch.backends.cudnn, flag))  # restored afterwards
    draws = []
    for _ in range(2):
        seed_everything(3)
        draws.append((torch.rand(2).tolist(), np.random.rand(), random.random()))
    assert draws[0] == draws[1]
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == (False, True)


@pytest.mark.parametrize("seed", [-1, 1.5, "1"])
def test_seed_that_is_no_whole_number_names_the_option(seed):
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=rf"--seed to be a whole number, 0 or more, got {seed!r}"):
        seed_everything(seed)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("iterations", [0, -3, 1.5])
def test_iterations_of_no_training_name_the_option(iterations):
    with pytest.raises(ValueError, match=rf"--iterations to be a whole number, 1 or more, got {iterations}"):
        number_of_epochs(iterations, [1, 2])


def test_loss_curve_has_the_mean_of_each_epoch(tmp_path):
    engine = trainer(tmp_path, epochs=2)
    losses = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(e.state.output["loss"].item()))
    engine.run()
    rows = list(csv.DictReader((tmp_path / "loss.csv").open()))
    assert [(row["epoch"], row["iteration"]) for row in rows] == [("1", "3"), ("2", "6")]
    for epoch, row in enumerate(rows):
        assert float(row["loss"]) == pytest.approx(sum(losses[3 * epoch : 3 * epoch + 3]) / 3, rel=1e-5)
        assert float(row["learning rate"]) == pytest.approx(0.01 * (1 - 3 * (epoch + 1) / 12) ** 0.9)


def test_number_of_epochs_needs_a_batch():
    assert number_of_epochs(41, range(10)) == 5
    with pytest.raises(ValueError, match="fewer cases than batch_size"):
        number_of_epochs(10, [])


@pytest.mark.parametrize(("cases", "processes"), [(1, 1), (7, 3), (6, 3), (3, 3)])
def test_share_of_cases_is_that_of_monais_sampler(cases, processes):
    for rank in range(processes):
        options = {"num_replicas": processes, "rank": rank, "shuffle": False, "even_divisible": False}
        assert list(share_of_cases(cases, processes, rank)) == list(EvaluationSampler(range(cases), **options))


def test_share_of_batch_must_be_even():
    assert share_of_batch(4, 2) == 2
    for batch_size, processes in ((9, 2), (2, 4), (0, 1)):
        with pytest.raises(ValueError, match=f"{processes} processes can share evenly, got {batch_size}"):
            share_of_batch(batch_size, processes)


@pytest.mark.slow
@pytest.mark.parametrize(("timeout", "waits"), [("", True), ("1 / 3600", False)])
def test_processes_wait_for_a_slow_one(tmp_path, timeout, waits):
    """As at the end of an evaluation, where one process has the largest scans. One waits 4 seconds, not one second."""
    (tmp_path / "evaluate.py").write_text(f"""if True:
        import time
        import ignite.distributed as idist
        from monai_conres.bundle import start_processes
        start_processes({timeout})
        time.sleep(4 * idist.get_rank())
        assert idist.all_gather([str(idist.get_rank())]) == [["0"], ["1"]]
        idist.finalize()""")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, str(tmp_path / "evaluate.py")], env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == waits, done.stderr[-3000:]


def test_finalize_processes_releases_the_group_first(tmp_path):
    """Otherwise torch 2.13 deadlocks, about once in thirty times."""
    idist.initialize("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    wrapped = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1))
    wrapped(torch.ones(1, 2)).sum().backward()
    finalize_processes(wrapped)
    assert wrapped.reducer is wrapped.logger is None
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("capability", "dtype", "compiles"),
    [((9, 0), torch.bfloat16, True), ((7, 5), None, True), ((6, 1), None, False)],
)
def test_computation_uses_what_a_gpu_has(capability, dtype, compiles, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr("monai_conres.bundle.training.find_spec", lambda name: name)
    found = Computation.on("cuda:0")
    assert (found.dtype, found.compiles) == (dtype, compiles)
    assert str(found) == "on a GPU in " + ("mixed precision (bfloat16)" if dtype else "float32")
    monkeypatch.setattr("monai_conres.bundle.training.find_spec", lambda name: None)
    assert not Computation.on("cuda").compiles


def test_start_line_says_what_runs(monkeypatch):
    cpu = Computation.on("cpu")
    assert str(cpu.with_amp(False)) == "on cpu in float32"
    with pytest.raises(ValueError, match="expected a GPU for mixed precision, got cpu"):
        cpu.with_amp(True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    for dtype, name in ((torch.bfloat16, "bfloat16"), (None, "float16")):
        gpu = Computation(torch.device("cuda"), dtype, True)
        assert str(gpu.with_amp(True)) == f"on GPU in mixed precision ({name})"
        assert str(gpu.with_amp(False)) == "on GPU in float32"
