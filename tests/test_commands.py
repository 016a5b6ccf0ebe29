from __future__ import annotations

import subprocess
import sys

import pytest

from monai_conres.__main__ import main

SEGRESNET = ["monai.networks.nets:SegResNet", "--arguments", "init_filters=8", "in_channels=2", "out_channels=3"]
SIZE = ["--size", "16", "24", "32"]
STAGES = ["up_layers.0", "up_layers.1", "up_layers.2"]


def marked(text: str) -> list[str]:
    return [line.split()[1] for line in text.splitlines() if line.startswith("*")]


def test_help_lists_the_commands(capsys):
    main([])
    text = capsys.readouterr().out
    assert all(name in text for name in ("complete  ", "stages  ", "network.json", "python -m monai_conres.bundle"))
    with pytest.raises(SystemExit) as stop:
        main(["stages", "--help"])
    assert stop.value.code == 0
    assert "monai.networks.nets:SegResNet --arguments init_filters=8" in capsys.readouterr().out


def test_stages_of_a_class_in_a_module():
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "monai_conres", "stages", *SEGRESNET, *SIZE]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert marked(output) == STAGES
    assert output.splitlines()[-1] == f"stages={STAGES}"


def test_stages_of_a_function_in_a_file(tmp_path, capsys):
    file = tmp_path / "networks.py"
    file.write_text(
        "from monai.networks.nets import SegResNet\ndef build(filters):\n    return SegResNet(3, filters, 4)\n"
    )
    main(["stages", f"{file}:build", "--arguments", "filters=8", "--in-channels", "4", *SIZE])
    assert marked(capsys.readouterr().out) == STAGES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["monai.networks.nets.UNet"], "expected module:name or file.py:name"),
        (["monai.networks.nets:NoNet"], "in monai.networks.nets, found no 'NoNet'"),
        (["no_module:Net"], "No module named 'no_module'"),
        (["no_file.py:build"], "No such file"),
        (
            ["monai.networks.nets:UNet"],
            "arguments: 'spatial_dims', 'in_channels', 'out_channels', 'channels', and 'strides'); give --arguments",
        ),
        (["monai.networks.nets:VNet", "--arguments", "act"], "expected an argument as name=value"),
        ([*SEGRESNET, "--in-channels", "1"], "expected SegResNet to run on a 3D image of 1 channels"),
    ],
)
def test_stages_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["stages", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
