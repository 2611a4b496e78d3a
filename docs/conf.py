"""Sphinx configuration."""

from importlib import metadata

project = "tda_lightning"
release = metadata.version("tda_lightning")
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_use_ivar = True
pygments_style = "default"  # shows added and removed lines of a diff in colour
html_theme = "furo"
html_title = "tda_lightning"
html_static_path = ["static"]
html_css_files = ["site.css"]
exclude_patterns = ["_build"]
