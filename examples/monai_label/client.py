"""Segment a scan with a bundle on MONAI Label's server, and complete it from drawn slices.

python examples/monai_label/client.py --server http://127.0.0.1:8000 --model hippocampus_conresnet \\
    --image hippocampus_001 --drawn slices.nii.gz --out results

The calls are those of 3D Slicer's module, by MONAI Label's own client. --image is a name in the server's folder of
studies, or a file, which is uploaded.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from monailabel.client import MONAILabelClient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="http://127.0.0.1:8000")
    parser.add_argument("--model", required=True, help="name of the folder of the bundle or the run")
    parser.add_argument("--image", required=True, help="name of a scan on the server, or a file")
    parser.add_argument("--drawn", help="label map with a few drawn slices")
    parser.add_argument("--slices", default="", help="all drawn slices (default: those with any label)")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the label maps")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    # a folder of its own: the server deletes its files of the same names, also on the same machine
    folder = tempfile.TemporaryDirectory(dir=options.out)
    client = MONAILabelClient(options.server, tmpdir=folder.name)
    models = client.info()["models"]
    print("models of the server:", *models)
    image = {"image_id": "", "file": options.image} if Path(options.image).is_file() else {"image_id": options.image}

    def ask(model: str, params: dict[str, Any], **files: str) -> dict[str, Any]:
        file, answer = client.infer(model, params=params, **image, **files)
        os.replace(file, options.out / f"{model}.nii.gz")
        print(f"{options.out / model}.nii.gz")
        return answer

    if options.model in models:
        ask(options.model, {})
    if options.drawn:
        answer = ask(f"{options.model}_complete", {"slices": options.slices}, label_in=options.drawn)
        print(f"drawn slices: {answer['slices']}, along axis {answer['axis']}, from {answer['direction']}")
        print(f"slices to draw next: {answer['next']}")


if __name__ == "__main__":
    main()
