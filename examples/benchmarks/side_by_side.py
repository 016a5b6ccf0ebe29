"""Run a benchmark script as several processes side by side on one GPU.

    python examples/benchmarks/side_by_side.py --processes 15 --minutes 5 sparse.py hippocampus_sparse --data FOLDER

A step with a small batch launches many short kernels, so one process leaves most of a GPU idle. Each process has one
CPU thread and takes the next run that has no result and that no other process works on, in the order of the command
line. After ``--minutes`` the processes are ended. Finished runs stay, and the same command goes on with the others.

Finished runs are printed. The progress of each process goes to a file in ``--logs``.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

FOLDER = Path(__file__).parent
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def run(command: list[str], processes: int, seconds: float, logs: Path) -> int:
    """Run ``command`` in several processes, and return how many failed. Processes that take too long are ended."""
    environment = os.environ | dict.fromkeys(THREADS, "1") | {"PYTHONUNBUFFERED": "1"}
    end = time.monotonic() + seconds
    logs.mkdir(parents=True, exist_ok=True)
    files = [logs / f"process_{number:02}.log" for number in range(processes)]
    with ExitStack() as stack:
        children = []
        for file in files:
            child = subprocess.Popen(command, env=environment, stderr=stack.enter_context(file.open("w")))
            stack.callback(child.kill)  # nothing happens to a process that has ended
            children.append(child)
        while time.monotonic() < end and any(child.poll() is None for child in children):
            time.sleep(0.2)
        ended = [child for child in children if child.poll() is None]
        for child in ended:
            child.terminate()
        for child in ended:
            child.wait(timeout=10)
    for child, file in zip(children, files, strict=True):
        if child in ended or child.returncode:
            state = "ended" if child in ended else f"failed with {child.returncode}"
            last = file.read_text().replace("\r", "\n").strip().splitlines()[-1:]
            print(f"{file.stem} {state}: {''.join(last)[-200:]}", flush=True)
    return sum(child.returncode != 0 for child in children if child not in ended)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default: one for each CPU core")
    parser.add_argument("--minutes", type=float, default=8.0, help="end after this time")
    parser.add_argument("--logs", type=Path, default=FOLDER / "runs" / "logs", help="folder for the progress")
    parser.add_argument("script", choices=("ablation.py", "completion.py", "sparse.py"))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the processes, too
    command = [sys.executable, str(FOLDER / options.script), *options.arguments]
    sys.exit(min(1, run(command, options.processes, 60 * options.minutes, options.logs)))


if __name__ == "__main__":
    main()
