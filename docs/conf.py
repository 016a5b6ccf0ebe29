"""Sphinx configuration: make docs."""

from importlib.metadata import version

project = "monai_conres"
author = "The monai_conres authors"
copyright = "2026, the monai_conres authors"
release = version("monai-conres")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"
add_module_names = False
nitpick_ignore_regex = [("py:.*", r"torch\..*|np\..*|monai\..*")]

html_theme = "pydata_sphinx_theme"
html_title = "monai_conres"
html_theme_options = {"navigation_with_keys": False, "show_toc_level": 2}
