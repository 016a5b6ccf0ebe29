"""The wheel in a fresh environment, without the clone and without any extra."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

USE = """
import sys, torch, monai_conres
from monai.networks.nets import BasicUNet
network = monai_conres.attach_conres(BasicUNet(features=(8, 8, 16, 32, 64, 8), out_channels=2), 1)
segmentation, residuals = network(torch.zeros(1, 1, 32, 32, 32))
image, label = torch.zeros(1, 1, 32, 32, 32), torch.zeros(1, 2, 32, 32, 32)
monai_conres.ConResLoss(sigmoid=True)(network(image), label).backward()
assert segmentation.shape == (1, 2, 32, 32, 32) and residuals[0].shape == (1, 2, 32, 32, 32)
assert "nibabel" not in sys.modules and "matplotlib" not in sys.modules and "ignite" not in sys.modules
print(monai_conres.__file__)
"""


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_wheel_works_without_clone_and_extras(tmp_path):
    run(sys.executable, "-m", "build", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (wheel,), (source,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"monai_conres/py.typed", "monai_conres/draw/page/page.js"} <= set(names)
    assert not [name for name in names if not name.startswith("monai_conres")]
    with tarfile.open(source) as archive:
        assert any(name.endswith("/setup.cfg") for name in archive.getnames())

    run(sys.executable, "-m", "venv", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    install = (python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt")
    run(*install, wheel, cwd=tmp_path)
    assert run(python, "-c", USE, cwd=tmp_path).strip().startswith(str(tmp_path / "env"))
    assert "stages" in run(python, "-m", "monai_conres", "--help", cwd=tmp_path)
    table = run(
        python, "-m", "monai_conres", "stages", "monai.networks.nets:SegResNet", "--in-channels", "1", cwd=tmp_path
    )
    assert "up_layers.2" in table
    trainers = Path(run(python, "-m", "monai_conres", "nnunet-path", cwd=tmp_path).strip())
    assert (trainers / "nnUNetTrainerConRes.py").is_file()
    assert trainers.is_relative_to(tmp_path / "env")

    run(*install, f"{wheel}[io]", cwd=tmp_path)
    phantoms = (
        "from monai_conres.phantom import write_phantom_dataset as write; write('data', cases=1, size=(12, 14, 10))"
    )
    run(python, "-c", phantoms, cwd=tmp_path)
    assert len(list((tmp_path / "data").rglob("*.nii.gz"))) == 2
