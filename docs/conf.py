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
autodoc_preserve_defaults = True
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
html_js_files = ["site.js"]
html_show_sourcelink = False
exclude_patterns = ["_build"]

FIGURES = r"([\d.,/±+()% -]|\b(to|m?s|[MG]B|MiB)\b)*"


def inline_math(translator, node):
    translator.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def block_math(translator, node):
    translator.body.append(f"<div class='math'>{tex2mathml(node.astext(), True)}</div>")
    raise nodes.SkipNode


def shape_cells(app, doctree):
    """Give each cell of a table the width that it needs on a telephone.

    Never break a line within short code or within figures such as ".82 / .64" and "57 MiB, 10 %".
    Mark words and sentences for `site.css`.
    """
    for literal in doctree.findall(nodes.literal):
        literal["classes"] += ["whole"] if len(literal.astext()) <= 30 else []
    for entry in doctree.findall(nodes.entry):
        length = len(entry.astext())
        entry["classes"] += ["sentence"] if length > 60 else ["words"] if length > 20 else []
        for text in list(entry.findall(nodes.Text)):
            if re.search(r"\d", text) and re.fullmatch(FIGURES, text):
                text.parent.replace(text, nodes.Text(text.replace(" ", "\N{NO-BREAK SPACE}")))


def name_default_functions(app, what, name, obj, options, signature, returned):
    """Show `outputs=outputs_of` of a dataclass, not `<function outputs_of>`."""
    return signature and re.sub(r"<function (\w+)>", r"\1", signature), returned


def lead_back_from_source(app, pagename, templatename, context, doctree):
    """Repair links from source code to the API pages.

    Sphinx takes all objects of a file to be documented under the module of the first of them.
    """
    if not pagename.startswith("_modules/"):
        return
    objects = app.env.domains["py"].objects

    def repaired(link):
        name = link[1]
        while name not in objects and "." in name:
            name = name.partition(".")[2]
            name = next((full for full in objects if full.endswith(f".{name}")), name)
        return f'#{name}">[docs]'

    context["body"] = re.sub(r'#([^"#]*)">\[docs\]', repaired, context["body"])


def setup(app):
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
    app.connect("autodoc-process-signature", name_default_functions)
    app.connect("doctree-read", shape_cells)
    app.connect("html-page-context", lead_back_from_source)
