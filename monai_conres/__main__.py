"""``python -m monai_conres NETWORK``: which features of a network :func:`attach_conres` would gate."""

from __future__ import annotations

import argparse
import importlib

from monai_conres.stages import decoder_stages


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m monai_conres",
        description="Show the features of a network's decoder, and which of them attach_conres would gate (*).",
    )
    parser.add_argument("network", help='an expression, such as "monai.networks.nets.BasicUNet(in_channels=1)"')
    parser.add_argument("--in-channels", type=int, default=1, help="channels of the image (default 1)")
    parser.add_argument("--size", type=int, nargs=3, metavar=("D", "H", "W"), help="spatial size to trace with")
    arguments = parser.parse_args()
    name, _, call = arguments.network.partition("(")
    module, _, cls = name.rpartition(".")
    if not (module and cls and call):
        parser.error(f"expected an expression like monai.networks.nets.UNet(...), got {arguments.network}")
    try:
        importlib.import_module(module)
        root = module.partition(".")[0]
        network = eval(arguments.network, {root: importlib.import_module(root)})  # the user's own expression
        print(decoder_stages(network, arguments.in_channels, spatial_size=arguments.size))
    except (ImportError, AttributeError, NameError, SyntaxError, TypeError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
