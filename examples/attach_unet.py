"""A usual MONAI training script of a UNet, and the two lines that give it context residual learning.

python examples/attach_unet.py                   # on phantoms, which the script makes
python examples/attach_unet.py --data FOLDER     # on any data set in Medical Segmentation Decathlon layout
python examples/attach_unet.py --plain           # without the two lines, for comparison

``load_network("demo/attach")`` builds the trained network again, for prediction.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from ignite.engine import Events
from ignite.handlers import ProgressBar
from monai.data import CacheDataset, DataLoader
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import MeanDice, from_engine
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from monai.transforms import AsDiscreted, Compose, RandFlipd, RandSpatialCropd, SpatialPadd

from monai_conres import ConResLoss, attach_conres
from monai_conres.bundle import Computation, read_decathlon, seed_everything
from monai_conres.files import ScanSettings, check_writable, save_network
from monai_conres.phantom import write_phantom_dataset
from monai_conres.scans import spacing_range

KEYS = ("image", "label")
PATCH = (32, 48, 32)


def main(options: argparse.Namespace) -> None:
    """Train, validate after each epoch, save the network."""
    seed_everything(options.seed)
    if options.data is None:
        options.data = options.out / "Task00_Phantom"
        if not options.data.exists():
            write_phantom_dataset(options.data)
    data = read_decathlon(options.data)
    training, validation = (cases[: options.cases] for cases in data.split(seed=options.seed))
    classes = len(data.classes)
    check_writable(options.out, data.cases)
    data.check(training + validation)

    scans = ScanSettings(
        channels=data.modalities,
        patch_size=PATCH,
        classes=data.structures,
        activation="softmax",
        normalization=[{"name": "NormalizeIntensity", "nonzero": True, "channel_wise": True}],
        seen_spacing=spacing_range(training),  # other scans then give a warning
    )
    prepare = [*scans.preprocessing(label=True).transforms, SpatialPadd(KEYS, spatial_size=PATCH)]
    augment = [RandSpatialCropd(KEYS, roi_size=PATCH, random_size=False), RandFlipd(KEYS, prob=0.5, spatial_axis=0)]
    discrete = AsDiscreted(("pred", "label"), argmax=(True, False), to_onehot=classes)
    train_loader = DataLoader(CacheDataset(training, Compose(prepare + augment)), batch_size=2, shuffle=True)
    validation_loader = DataLoader(CacheDataset(validation, Compose(prepare)), batch_size=1)

    unet = {
        "spatial_dims": 3,
        "in_channels": data.channels,
        "out_channels": classes,
        "channels": (16, 32, 64, 128),
        "strides": (2, 2, 2),
        "num_res_units": 2,
    }
    network = UNet(**unet)
    loss = DiceCELoss(softmax=True, to_onehot_y=True)
    if not options.plain:  # the two lines
        network = attach_conres(network, data.channels, include_background=False)
        loss = ConResLoss(loss)

    computation = Computation.on(options.device)
    print(f"training {computation}")
    mixed = {"amp": computation.dtype is not None, "amp_kwargs": {"dtype": computation.dtype}}
    network.to(options.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    evaluator = SupervisedEvaluator(
        device=options.device,
        val_data_loader=validation_loader,
        network=network,
        inferer=scans.inferer(sw_batch_size=2),
        postprocessing=discrete,
        key_val_metric={"dice": MeanDice(include_background=False, output_transform=from_engine(["pred", "label"]))},
        **mixed,
    )
    trainer = SupervisedTrainer(
        device=options.device,
        max_epochs=options.epochs,
        train_data_loader=train_loader,
        network=network,
        optimizer=optimizer,
        loss_function=loss,
        **mixed,
    )
    ProgressBar().attach(trainer, output_transform=lambda output: {"loss": output[0]["loss"]})

    @trainer.on(Events.EPOCH_COMPLETED)
    def validate(engine: SupervisedTrainer) -> None:
        evaluator.run(engine.state.epoch)
        print(f"epoch {engine.state.epoch}: mean Dice {evaluator.state.metrics['dice']:.4f}")

    trainer.run()
    notes = {"cases": [case["name"] for case in training], "seed": options.seed, "epochs": options.epochs}
    save_network(options.out, network, scans, backbone=("monai.networks.nets.UNet", unet), training=notes)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with dataset.json; phantoms are made without one")
    parser.add_argument("--out", type=Path, default=Path("demo/attach"), help="folder for the network")
    parser.add_argument("--plain", action="store_true", help="train only the UNet")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--cases", type=int, help="use at most so many cases for training and for validation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except ValueError as error:  # the data or an argument: the message says what to do
        sys.exit(f"error: {error}")
