"""Draw the pictures of README and documentation that need no training: python docs/figures.py"""

from __future__ import annotations

from pathlib import Path

from monai_conres.phantom import CLASSES, tumor_phantom
from monai_conres.visualize import plot_residuals, save_figure

IMAGES = Path(__file__).parent / "images"


def main() -> None:
    image, label = tumor_phantom((96, 112, 40), spacing=(1, 1, 3), seed=6)
    figure = plot_residuals(image[2], label, slices=5, class_names=CLASSES, spacing=(1, 1, 3))
    save_figure(figure, IMAGES / "residuals.png", dpi=100)


if __name__ == "__main__":
    main()
