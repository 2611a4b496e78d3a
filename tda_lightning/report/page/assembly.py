"""Page: assemble one self-contained HTML file; its scripts are pinned by their hashes."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from importlib.resources import files

from tda_lightning.report.page.html import Html, element, join

SECTIONS = (
    ("found", "What was found"),
    ("sure", "How sure"),
    ("queries", "Query by query"),
    ("unusual", "Unusual samples"),
    ("when", "When"),
    ("groups", "Groups"),
    ("facts", "Facts"),
)


@dataclass(frozen=True)
class Page:
    """The parts of a page.

    Attributes:
        title: Title of the page.
        extent: Number of queries and training samples.
        lead: The sentence below the title.
        sections: Content of each section, in the order of ``SECTIONS``.
        blocks: Data for the scripts.
        scripts: Sources of the scripts, in their order.
    """

    title: str
    extent: str
    lead: str
    sections: list[Html]
    blocks: list[Html]
    scripts: list[str]


def assemble(page: Page) -> str:
    """Return the HTML file."""
    contents = [
        _section(name, title, content)
        for (name, title), content in zip(SECTIONS, page.sections, strict=True)
    ]
    head = element(
        "head",
        {},
        element("meta", {"charset": "utf-8"}),
        element("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        element("meta", {"http-equiv": "Content-Security-Policy", "content": _policy(page)}),
        element("meta", {"name": "referrer", "content": "no-referrer"}),
        element("title", {}, page.title),
        element("style", {}, Html(asset("page.css"))),
    )
    body = element(
        "body",
        {},
        element("a", {"class": "skip", "href": "#main"}, "Skip to the content"),
        _header(page),
        element("main", {"id": "main", "tabindex": "-1"}, *contents),
        element("footer", {}, "Made by tda_lightning. Everything on this page is in this file."),
        *page.blocks,
        *(element("script", {}, Html(script)) for script in page.scripts),
    )
    return f"<!doctype html>\n{element('html', {'lang': 'en'}, head, body)}\n"


def asset(name: str) -> str:
    """Return the text of a file of this package."""
    return (files(__package__) / "assets" / name).read_text(encoding="utf-8")


def _policy(page: Page) -> str:
    """Allow these scripts alone, whatever the page contains, and no connection to anywhere."""
    hashes = [
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        for script in page.scripts
    ]
    scripts = " ".join(f"'sha256-{value}'" for value in hashes)
    return (
        f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _header(page: Page) -> Html:
    links = [
        element("li", {}, element("a", {"href": f"#{name}"}, title)) for name, title in SECTIONS
    ]
    switch = element(
        "button", {"type": "button", "id": "theme", "class": "quiet", "hidden": True}, "Dark"
    )
    return join(
        element(
            "header",
            {},
            element("p", {"class": "eyebrow"}, f"Training data report: {page.extent}"),
            element("h1", {}, element("bdi", {}, page.title)),
            element("p", {"class": "lead"}, page.lead),
        ),
        element("nav", {"aria-label": "Sections"}, element("ul", {}, *links), switch),
    )


def _section(name: str, title: str, content: Html) -> Html:
    heading = element("h2", {"id": f"{name}-title"}, title)
    attributes: dict[str, str | bool] = {"id": name, "aria-labelledby": f"{name}-title"}
    return element("section", attributes, heading, content)
