"""Sphinx configuration."""

import re
from importlib import metadata

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

project = "tda_lightning"
release = metadata.version("tda_lightning")
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # `outputs=outputs_of`, not `<function outputs_of>`
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_use_ivar = True
pygments_style = "default"  # shows added and removed lines of a diff in colour
html_theme = "furo"
html_title = "tda_lightning"
html_show_copyright = False
html_math_renderer = "mathml"  # browsers draw it; MathJax would be loaded from elsewhere
html_static_path = ["static"]
html_css_files = ["site.css"]
exclude_patterns = ["_build"]


def inline_math(translator, node):
    translator.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def block_math(translator, node):
    translator.body.append(f"<div class='math'>{tex2mathml(node.astext(), True)}</div>")
    raise nodes.SkipNode


def keep_figures_whole(app, doctree):
    """Never break a line within figures such as ".82 / .64" in a table."""
    for entry in doctree.findall(nodes.entry):
        for text in list(entry.findall(nodes.Text)):
            if re.fullmatch(r"[\d.,/±+() -]*", text) and re.search(r"\d", text):
                text.parent.replace(text, nodes.Text(text.replace(" ", "\N{NO-BREAK SPACE}")))


def setup(app):
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
    app.connect("doctree-read", keep_figures_whole)
