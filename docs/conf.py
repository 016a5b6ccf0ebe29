"""Sphinx configuration: make docs."""

import importlib.metadata
import shutil
from pathlib import Path

project = "monai_conres"
author = "The monai_conres authors"
copyright = "2026, the monai_conres authors"
release = importlib.metadata.version("monai-conres")

# Sphinx reads pages only from this folder
DOCS = Path(__file__).parent
shutil.copytree(DOCS.parent / "examples" / "notebooks", DOCS / "notebooks", dirs_exist_ok=True)

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebooks hold their outputs, and tests execute them
nb_ipywidgets_js = {}  # would load from another server; the notebooks have no widgets
exclude_patterns = ["_build", "tables"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"
add_module_names = False
nitpick_ignore_regex = [("py:.*", r"torch\..*|np\..*|monai\..*")]

html_theme = "pydata_sphinx_theme"
html_title = "monai_conres"
html_sidebars = {"[!n]*": []}  # only the notebooks are a section of several pages
html_theme_options = {"navigation_with_keys": False, "show_toc_level": 2, "header_links_before_dropdown": 7}
html_context = {"default_mode": "auto"}
