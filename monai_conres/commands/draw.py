"""Draw a few slices of a scan in the browser, and watch your network complete the volume.

python -m monai_conres draw --network run scan.nii.gz
python -m monai_conres draw --network run T1.nii.gz T2.nii.gz --out volume.nii.gz --drawn slices.nii.gz

The page opens at once, and the network runs in the background. Each slice that is done completes the volume again.
Every stroke is written to a file next to --out. Run the command again, without --drawn, to continue the drawing.
Nothing leaves this machine.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import threading
from contextlib import suppress
from pathlib import Path

from monai_conres.commands import add_network, load_on_device, say_unfitted
from monai_conres.commands.complete import value_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_network(parser)
    parser.add_argument("image", nargs="+", type=Path, help="the scan, or one file for each channel")
    parser.add_argument(
        "--out", type=Path, help="file for the completed label map (default: SCAN_completed.nii.gz in this folder)"
    )
    parser.add_argument("--drawn", type=Path, help="label map to start from: its slices with any label are done")
    parser.add_argument(
        "--slices", type=int, nargs="+", help="slices of --drawn that are done (default: those with any label)"
    )
    parser.add_argument("--ignore", type=int, metavar="VALUE", help="value of --drawn in slices that are not drawn")
    parser.add_argument("--port", type=int, default=0, help="port on this machine (default: a free one)")
    parser.add_argument("--no-browser", action="store_true", help="only print the address of the page")


def run(options: argparse.Namespace) -> None:
    import webbrowser

    from monai_conres.completion import ScanCompletion
    from monai_conres.draw import Drawing, PageServer
    from monai_conres.files import check_writable
    from monai_conres.volumes import stem

    _give_back_memory()
    name = stem(options.image[0].absolute())  # not what a link points to
    out = options.out or Path(f"{name}_completed.nii.gz")
    trained = load_on_device(options.network, options.backbone, options.device)
    check_writable(out.absolute().parent)
    scan = ScanCompletion(trained, options.image)
    started = {"drawn": options.drawn, "slices": options.slices, "ignore_index": options.ignore}
    drawing = Drawing(scan, out.absolute(), **started)
    names = {value: value_name(value, trained.scans.classes) for value in drawing.values}
    server = PageServer(drawing, names, port=options.port)
    threading.Thread(target=drawing.predict, daemon=True).start()
    if drawing.slices:
        print(f"Slices that are drawn: {' '.join(map(str, sorted(drawing.slices)))}")
    say_unfitted(trained)
    print(f"The page: {server.url}\nPress Ctrl+C here to stop. Your strokes are in {drawing.file}", flush=True)
    if not options.no_browser:
        threading.Thread(target=webbrowser.open, args=[server.url], daemon=True).start()  # one in the terminal waits
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        again = "The same command without --drawn" if options.drawn else "The same command"
        print(f"\nStopped. {again} continues the drawing in {drawing.file}")
    finally:
        server.server_close()


def _give_back_memory() -> None:
    """Let glibc give memory of 8 MiB or more back as soon as it is free. By itself it may keep up to 32 MiB."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(-3, 8 << 20)  # M_MMAP_THRESHOLD
