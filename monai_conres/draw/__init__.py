"""A page in the browser that completes a scan while somebody draws slices: ``python -m monai_conres draw``.

``drawing.py`` holds what is drawn, ``server.py`` gives it to the page, and ``page/`` is the page.
"""

from monai_conres.draw.drawing import Drawing, DrawnSlice
from monai_conres.draw.server import PageServer

__all__ = ["Drawing", "DrawnSlice", "PageServer"]
