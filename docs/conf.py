"""Sphinx configuration: make docs."""

import importlib.metadata

project = "monai_conres"
author = "The monai_conres authors"
copyright = "2026, the monai_conres authors"
release = importlib.metadata.version("monai-conres")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"
add_module_names = False
nitpick_ignore_regex = [("py:.*", r"torch\..*|np\..*|monai\..*")]

html_theme = "pydata_sphinx_theme"
html_title = "monai_conres"
html_theme_options = {"navigation_with_keys": False, "show_toc_level": 2}
