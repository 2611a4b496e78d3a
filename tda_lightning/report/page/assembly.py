"""Page: assemble one self-contained HTML file; its scripts are pinned by their hashes."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from string import Template

from tda_lightning.report.page.html import Html, element, join


def assemble(parts: Mapping[str, str], scripts: Sequence[str]) -> str:
    """Return the HTML file.

    Args:
        parts: Contents of the places in ``assets/page.html``: texts, which are escaped, and markup.
        scripts: Sources of the scripts, in their order.
    """
    page = Template(asset("page.html"))
    return page.substitute(
        {name: join(part) for name, part in parts.items()},
        policy=join(_policy(scripts)),
        style=asset("page.css"),
        scripts=join(*(element("script", {}, Html(script)) for script in scripts)),
    )


def asset(name: str) -> str:
    """Return the text of a file of this package."""
    return (files(__package__) / "assets" / name).read_text(encoding="utf-8")


def _policy(scripts: Sequence[str]) -> str:
    """Allow these scripts alone, whatever the page contains, and no connection to anywhere."""
    digests = [hashlib.sha256(script.encode()).digest() for script in scripts]
    hashes = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
