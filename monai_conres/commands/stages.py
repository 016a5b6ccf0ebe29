"""Show the feature maps of a network, and mark with * the maps that attach_conres would use.

python -m monai_conres stages monai.networks.nets:SegResNet --arguments init_filters=8 out_channels=3
python -m monai_conres stages my_networks.py:build_unet --in-channels 4 --size 64 64 32
"""

from __future__ import annotations

import argparse
import ast
from typing import Any

from monai_conres.commands import find_callable
from monai_conres.stages import decoder_stages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("network", help="module:class or file.py:function that builds the network")
    parser.add_argument("--arguments", nargs="+", default=[], metavar="name=value", help="what to build it with")
    parser.add_argument(
        "--in-channels", type=int, help="channels of the image (default: in_channels of --arguments, or 1)"
    )
    parser.add_argument("--size", type=int, nargs=3, metavar=("D", "H", "W"), help="spatial size of an image to run on")


def run(options: argparse.Namespace) -> None:
    arguments = dict(parse(argument) for argument in options.arguments)
    build = find_callable(options.network)
    try:
        network = build(**arguments)
    except TypeError as error:
        raise ValueError(f"cannot build {options.network} ({error}); give --arguments name=value ...") from error
    in_channels = options.in_channels or arguments.get("in_channels", 1)
    print(decoder_stages(network, in_channels, spatial_size=options.size))


def parse(argument: str) -> tuple[str, Any]:
    """The name and the value of ``name=value``. A value that is no Python literal is a string.

    Example:
        >>> parse("strides=2,2"), parse("norm=batch")
        (('strides', (2, 2)), ('norm', 'batch'))
    """
    name, equals, value = argument.partition("=")
    if not (name and equals):
        raise ValueError(f"expected an argument as name=value, such as out_channels=3, got {argument!r}.")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
