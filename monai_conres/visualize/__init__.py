"""The paper's figures from your own data: slices, residuals, surfaces, features and loss curves.

Every function returns a matplotlib ``Figure`` and needs no display. A notebook shows the figure, :func:`save_figure`
writes it. In a slice the first of its two axes goes from left to right, the second from bottom to top. After
``Orientationd("RAS")`` an axial slice has anterior at the top and the patient's right on the right side.
"""

try:
    import matplotlib  # noqa: F401
    import skimage  # noqa: F401
except ImportError as error:
    raise ImportError(f"{error}; install matplotlib and scikit-image: pip install 'monai-conres[plot]'") from error

from monai_conres.visualize.capture import StageFeatures, capture_features
from monai_conres.visualize.curves import plot_curves
from monai_conres.visualize.features import plot_attention, plot_feature_residuals, plot_stages
from monai_conres.visualize.panels import COLORS, save_figure
from monai_conres.visualize.slices import plot_residuals, plot_slices
from monai_conres.visualize.surfaces import plot_surfaces

__all__ = [
    "COLORS",
    "StageFeatures",
    "capture_features",
    "plot_attention",
    "plot_curves",
    "plot_feature_residuals",
    "plot_residuals",
    "plot_slices",
    "plot_stages",
    "plot_surfaces",
    "save_figure",
]
