"""A page in the browser that completes a scan while somebody draws slices: ``python -m monai_conres draw``.

``drawing.py`` holds what is drawn, ``server.py`` serves the page, and ``page/`` is the page.

The page paints on a plain canvas, because a person paints one slice at a time. NiiVue 0.69 draws in volumes with WebGL:
each move of its square pen uploads the whole drawing, and undo copies the volume. On two cores without a graphics card,
a volume of 240 x 240 x 155 took NiiVue 0.08 s for each slice, 0.2 s for each move of the pen and 9 s after each
completed slice.
"""

from monai_conres.draw.drawing import Drawing, DrawnSlice
from monai_conres.draw.server import PageServer

__all__ = ["Drawing", "DrawnSlice", "PageServer"]
