"""``python -m monai_conres COMMAND``: the command line, one file of ``monai_conres.commands`` for each command."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections.abc import Sequence

from monai_conres import commands

HELP = "Complete label maps of 3D scans from a few drawn slices, and prepare the networks for it."
MORE_HELP = """\
COMMAND --help explains a command with examples: python -m monai_conres complete --help

The usual order is fit-chain once for a trained network, then draw or complete for each scan. stages and nnunet-path
help to train your own network with a residual decoder.

A run folder holds a trained network: model.pt, and network.json, which says how the network reads a scan.
examples/quickstart.py, examples/bundles and monai_conres.files.save_network write one.

The bundles of examples/bundles run with python -m monai.bundle. To join the result tables of several runs:
python -m monai_conres.bundle --help
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m monai_conres",
        description=HELP,
        epilog=MORE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", title="commands")
    for module in pkgutil.iter_modules(commands.__path__):
        command = importlib.import_module(f"{commands.__name__}.{module.name}")
        text = command.__doc__ or ""
        subparser = subparsers.add_parser(
            module.name.replace("_", "-"),
            help=text.partition("\n")[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run, error=subparser.error)
    options = parser.parse_args(arguments)
    if "run" not in options:
        parser.print_help()
        return
    try:
        options.run(options)
    except (TypeError, ValueError) as error:
        options.error(str(error))


if __name__ == "__main__":
    main()
