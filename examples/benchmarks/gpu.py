"""Everything that needs a GPU, measured by one command of under five minutes.

    python examples/benchmarks/gpu.py --out gpu_results

The command runs the tests that need a GPU. Then it times each network in bf16, first as it is, later compiled:

- forward pass and training step of one image of 4 x 80 x 160 x 160, with the peak of the memory that torch allocated;
- a training step of two images of 4 x 48 x 64 x 48, where starting operations takes most of the time; of ConResNet also
  compiled, and compiled with mode="reduce-overhead", which starts all operations at once (CUDA graphs);
- one case of 4 x 155 x 240 x 240 in twelve windows, four at a time, and its completion from three drawn slices.

Every measurement is one small file in ``--out``. When the minutes are over or the command is interrupted, the next call
measures only what is missing. Remove a file to measure it again. The table, gpu.csv and gpu.md, holds all files of this
GPU and these sizes. "Kernels" is their own time by torch's profiler, without the waiting in between. "Share of the
matrix rate" compares multiply-adds a second with those of one large matrix product, "share of the bandwidth" the
counted memory traffic (operations.py) with a copy. A step counts as three forward passes.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import operations
import speed
import torch
from common import multiply_adds, write_table
from monai.inferers import SlidingWindowInferer

from monai_conres import complete_mask, predict_with_residual
from monai_conres.files import atomic_path

ROOT = Path(__file__).parent.parent.parent
TESTS = ["tests/test_gpu.py", "tests/test_deploy.py", "-k", "gpu or cuda"]
# the most valuable first
NETWORKS = (
    "released structure, bf16",
    "ConResNet, bf16",
    "SegResNet (32), bf16",
    "DynUNet (nnU-Net, 32-320), bf16",
    "ConResNet, bf16, compiled",
    "ConResNet, bf16, reduce-overhead",
    "DynUNet (nnU-Net, 32-320) with decoder, bf16",
    "SegResNet (32) with decoder, bf16",
    "ConResNet, without Triton, bf16",
    "ConResNet, baseline, bf16",
    "ConResNet, use_checkpoint, bf16",
    "ConResNet, channels last, bf16",
    "ConResNet, torch's group norm, bf16",
    "AttentionUnet (32-512), bf16",
    "released structure, baseline, bf16",
    "DynUNet (nnU-Net, 32-320), bf16, compiled",
    "SegResNet (32), bf16, compiled",
    "ConResNet, baseline, bf16, compiled",
    "AttentionUnet (32-512), bf16, compiled",
)
# ConResNet's small step, compiled; the second name has no other measurement
MODES = {"ConResNet, bf16, compiled": "default", "ConResNet, bf16, reduce-overhead": "reduce-overhead"}
WINDOWS = 4  # at a time


class Session:
    """Measurements of one machine: each is made once, and kept in a file."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.on_gpu = options.device.startswith("cuda")
        name = torch.cuda.get_device_name(options.device) if self.on_gpu else "CPU"
        sizes = {key: list(getattr(options, key)) for key in ("size", "small", "volume")}
        self.settings = {"device": name, "torch": torch.__version__, **sizes}
        self.end = time.perf_counter() + 60 * options.minutes
        options.out.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        return self.options.out / f"{''.join(c if c.isalnum() else '_' for c in name)}.json"

    def stored(self, name: str) -> dict | None:
        """The values of a measurement with these settings."""
        if not self.path(name).is_file():
            return None
        found = json.loads(self.path(name).read_text())
        return found["values"] if found["settings"] == self.settings else None

    def measure(self, name: str, function: Callable[[], dict], needed: float) -> dict | None:
        """The values of ``function()``, unless ``needed`` seconds are not left. An error is a value, too."""
        values = self.stored(name)
        if values is not None:
            return values
        if time.perf_counter() + needed > self.end:
            print(f"{name}: no time left", flush=True)
            return None
        start = time.perf_counter()
        try:
            values = function()
        except Exception as error:  # a network that does not run leaves the others
            values = {"error": f"{type(error).__name__}: {error}"[:500]}
        torch.compiler.reset()  # another size would be compiled for any size
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
        print(f"{name}: {time.perf_counter() - start:.0f} s {values}", flush=True)
        with atomic_path(self.path(name)) as temporary:
            temporary.write_text(json.dumps({"settings": self.settings, "values": values}, indent=1))
        return values

    def seconds(self, run: Callable[[], object]) -> float:
        """The median of runs that take a second together, after two runs that warm up."""
        times: list[float] = []
        while len(times) < 5 or (sum(times) < 1 and len(times) < 50):
            start = time.perf_counter()
            run()
            if self.on_gpu:
                torch.cuda.synchronize(self.options.device)
            times.append(time.perf_counter() - start)
            if self.options.quick and len(times) == 3:
                break
        return statistics.median(times[2:])

    def peak(self, run: Callable[[], object]) -> float | None:
        """GiB that torch allocated during a run, on top of the weights and the image."""
        if not self.on_gpu:
            return None
        torch.cuda.reset_peak_memory_stats(self.options.device)
        before = torch.cuda.memory_allocated(self.options.device)
        run()
        return (torch.cuda.max_memory_allocated(self.options.device) - before) / 2**30

    def kernels(self, run: Callable[[], object]) -> float | None:
        """Seconds of the GPU's kernels in a run: what it would take if starting them took no time."""
        if not self.on_gpu:
            return None
        with torch.profiler.profile() as profile:
            run()
            torch.cuda.synchronize(self.options.device)
        on_gpu = [e for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
        return sum(event.self_device_time_total for event in on_gpu) / 1e6

    def case(self, name: str, size: tuple[int, ...], batch_size: int, volume: tuple[int, ...] | None) -> speed.Case:
        return speed.Case(
            name, argparse.Namespace(device=self.options.device, size=size, batch_size=batch_size, volume=volume)
        )


def run_tests() -> dict:
    """The last line of pytest, and the names of the tests that failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "", *TESTS]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    return {"result": lines[-1] if lines else "", "failed": [line[:300] for line in lines if line.startswith("FAILED")]}


def rates(session: Session) -> dict:
    """Multiply-adds a second of a large matrix product, and bytes a second of a copy."""
    device, edge = session.options.device, 512 if session.options.quick else 8192
    a, b = (torch.randn(edge, edge, device=device, dtype=torch.bfloat16) for _ in range(2))
    numbers = torch.empty(edge, edge, 4, device=device)
    target = torch.empty_like(numbers)
    return {
        "multiply-adds": edge**3 / session.seconds(lambda: a @ b),
        "bytes": 2 * numbers.nbytes / session.seconds(lambda: target.copy_(numbers)),
    }


def network_values(session: Session, name: str) -> dict:
    """Seconds and GiB of a forward pass and a training step, and what the network has to do."""
    options = session.options
    case = session.case(name, tuple(options.size), 1, None)
    values: dict = {}
    for run in ("forward", "step"):
        function = getattr(case, run)
        values[f"{run} (s)"] = session.seconds(function)
        case.network.zero_grad()
        values[f"{run} peak (GiB)"] = session.peak(function)
        values[f"{run} kernels (s)"] = session.kernels(function)
    values["multiply-adds"] = multiply_adds(speed.NETWORKS[case.name](case.size).eval(), case.image.shape)
    if case.compiled:
        return values
    for run in ("forward", "step"):
        if run == "forward" or "use_checkpoint" not in name:  # casts are only imitated in the first computation
            network = speed.NETWORKS[case.name](case.size)
            values[f"{run} bytes"] = operations.count(network, tuple(case.image.shape), step=run == "step").moved
    del case
    return values | small_values(session, session.case(name, tuple(options.small), 2, None))


def small_values(session: Session, case: speed.Case) -> dict:
    """Seconds of a training step of two small images."""
    return {"small step (s)": session.seconds(case.step), "small step kernels (s)": session.kernels(case.step)}


def compiled_small_values(session: Session, mode: str) -> dict:
    """The same of ConResNet after ``torch.compile``, and the seconds of the first step."""
    case = session.case("ConResNet, bf16", tuple(session.options.small), 2, None)
    case.network = torch.compile(case.network, mode=mode)
    first = case.seconds("step")
    return {"first small step (s)": first, **small_values(session, case)}


def volume_values(session: Session, name: str) -> dict:
    """Seconds of one case in windows."""
    case = session.case(name, tuple(session.options.size), WINDOWS, tuple(session.options.volume))
    return {"volume (s)": session.seconds(case.volume)}


@torch.no_grad()
def completion_values(session: Session) -> dict:
    """Seconds of segmentation and residual in windows, and of the chain with three drawn slices."""
    options = session.options
    case = session.case("ConResNet, bf16", tuple(options.size), WINDOWS, tuple(options.volume))
    inferer = SlidingWindowInferer(case.size, WINDOWS, overlap=1 / 3, mode="gaussian")
    case.mode(training=False)

    def predict() -> tuple[torch.Tensor, torch.Tensor]:
        with case.autocast():
            return predict_with_residual(case.scan, case.network, inferer)

    segmentation, residual = (part.float() for part in predict())
    drawn = (segmentation > 0).to(torch.uint8)
    slices = [(k + 1) * drawn.shape[-1] // 4 for k in range(3)]

    def complete() -> torch.Tensor:
        return complete_mask(segmentation, residual, drawn, slices=slices, image=case.scan)

    return {"prediction (s)": session.seconds(predict), "chain (s)": session.seconds(complete)}


def table(session: Session, rate: dict | None) -> list[dict[str, str]]:
    """One row for each network that has values."""
    first = session.stored(NETWORKS[0]) or {}
    rows = []
    for name in session.options.networks:
        parts = (session.stored(name + part) for part in ("", ", volume", ", small step"))
        values = {key: value for part in parts for key, value in (part or {}).items()}
        if not values:
            continue
        row = {"network": name}
        for run, passes in (("forward", 1), ("step", 3)):
            own, reference = values.get(f"{run} (s)"), first.get(f"{run} (s)")
            row[f"{run} (ms)"] = f"{1e3 * own:.1f}" if own else "-"
            row[f"{run}, times as fast as released"] = f"{reference / own:.2f}" if own and reference else "-"
            kernels = values.get(f"{run} kernels (s)")
            row[f"{run}, kernels (ms)"] = f"{1e3 * kernels:.1f}" if kernels else "-"
            peak = values.get(f"{run} peak (GiB)")
            row[f"{run}, peak (GiB)"] = f"{peak:.2f}" if peak else "-"
            for title, key, total in (
                ("matrix rate", "multiply-adds", passes * values.get("multiply-adds", 0)),
                ("bandwidth", "bytes", values.get(f"{run} bytes", 0)),
            ):
                share = total / own / rate[key] if own and rate and key in rate else 0
                row[f"{run}, share of the {title}"] = f"{100 * share:.0f} %" if share else "-"
        volume = values.get("volume (s)")
        for title in ("small step", "small step kernels"):
            small = values.get(f"{title} (s)")
            row[f"{title} (ms)".replace(" k", ", k")] = f"{1e3 * small:.1f}" if small else "-"
        row["one case (s)"] = f"{volume:.3f}" if volume else "-"
        row["error"] = values.get("error", "-")
        rows.append(row)
    if all(row["error"] == "-" for row in rows):
        for row in rows:
            del row["error"]
    return rows


def remark(session: Session, rate: dict | None) -> str:
    """The lines under the table: machine, tests, completion."""
    lines = [speed.machine(session.options.device)]
    if rate and "bytes" in rate:
        lines.append(
            f"{rate['multiply-adds'] / 1e12:.0f}e12 multiply-adds/s in bf16, {rate['bytes'] / 1e9:.0f} GB/s.\n"
        )
    tests = session.stored("tests")
    if tests:
        lines.append(f"Tests: {tests.get('result') or tests.get('error')}\n")
    for name, mode in MODES.items():
        first = (session.stored(f"{name}, small step") or {}).get("first small step (s)")
        if first:
            lines.append(f'The first small step after torch.compile(mode="{mode}"): {first:.0f} s.\n')
    completion = session.stored("completion")
    if completion and "chain (s)" in completion:
        values = tuple(completion[key] for key in ("prediction (s)", "chain (s)"))
        lines.append("Completion of one case: prediction {:.3f} s, chain {:.3f} s.\n".format(*values))
    return "\n" + "\n".join(filter(None, lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the measurements and the table")
    parser.add_argument("--minutes", type=float, default=4.5, help="start no measurement that would end later")
    parser.add_argument("--networks", nargs="+", default=NETWORKS, metavar="NAME", help="names of speed.py")
    parser.add_argument("--size", type=int, nargs=3, default=(80, 160, 160), help="of an image and a window, in voxels")
    parser.add_argument("--small", type=int, nargs=3, default=(48, 64, 48), help="of an image in the small step")
    parser.add_argument("--volume", type=int, nargs=3, default=(155, 240, 240), help="of a case")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-tests", dest="tests", action="store_false")
    parser.add_argument("--quick", action="store_true", help="one run each, to try the command on a CPU")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    session = Session(options)
    estimate = 0.0 if options.quick else 1.0
    if options.tests:
        session.measure("tests", run_tests, needed=60 * estimate)
    rate = session.measure("rates", lambda: rates(session), needed=5 * estimate)
    for name in options.networks:
        compiled = name.endswith(speed.COMPILED) or name in MODES
        needed = (60 if compiled else 15) * estimate
        if MODES.get(name) != "reduce-overhead":
            session.measure(name, lambda name=name: network_values(session, name), needed)
        if name in MODES:
            session.measure(
                f"{name}, small step", lambda name=name: compiled_small_values(session, MODES[name]), needed
            )
        if not compiled and not any(trick in name for trick in (*speed.TRICKS, "use_checkpoint")):
            session.measure(f"{name}, volume", lambda name=name: volume_values(session, name), needed)
        if name == "ConResNet, bf16":
            session.measure("completion", lambda: completion_values(session), needed)
    rows = table(session, rate)
    if rows:
        print(write_table(options.out, "gpu", rows, remark(session, rate)))


if __name__ == "__main__":
    main()
