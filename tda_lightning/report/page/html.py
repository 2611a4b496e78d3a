"""HTML as a type, whose plain strings are escaped, and a page as one self-contained file.

User content can never become markup, and scripts are pinned by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

_VOID = {"meta", "input", "img", "br", "hr"}
# Characters that reorder or hide text; each is shown by its code point.
_DIRECTION_CONTROLS = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C}


class Html(str):
    """Markup that is already escaped."""

    __slots__ = ()


def element(name: str, attributes: Mapping[str, str | bool], *children: str) -> Html:
    """Return an HTML element.

    Args:
        name: Name of the tag.
        attributes: Values are escaped. ``True`` means an attribute without a value; an attribute
            that is ``False`` is omitted.
        children: Texts, which are escaped, and :class:`Html`, which is not.

    >>> element("p", {"class": "note"}, "1 < 2", element("b", {}, "&"))
    '<p class="note">1 &lt; 2<b>&amp;</b></p>'
    """
    opening = "".join([name, *(_attribute(*pair) for pair in attributes.items())])
    if name in _VOID:
        return Html(f"<{opening}>")
    return Html(f"<{opening}>{join(*children)}</{name}>")


def join(*children: str) -> Html:
    """Concatenate texts, which are escaped, and markup, which is not."""
    return Html("".join(c if isinstance(c, Html) else escape(visible(c)) for c in children))


def intro(text: str) -> Html:
    """Return the paragraph at the beginning of a section."""
    return element("p", {"class": "intro"}, text)


def with_code(text: str) -> Html:
    """Return a text in which the words between backticks are marked as code.

    >>> with_code("Pass `outputs=`.")
    'Pass <code>outputs=</code>.'
    """
    parts = text.split("`")
    if len(parts) % 2 == 0:  # A backtick has no partner.
        return join(text)
    return join(*(element("code", {}, p) if i % 2 else p for i, p in enumerate(parts)))


def visible(text: str) -> str:
    r"""Replace control characters by visible symbols.

    Terminal escapes and marks that reorder text are shown, and have no effect.

    >>> visible("a\x1b[31m" + chr(0x202E) + "b")
    'a␛[31m⟨U+202E⟩b'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_visible_character, text))


def shortened(text: str, limit: int) -> str:
    """Return a visible text of at most ``limit`` characters; the number of the others is appended.

    >>> shortened("abcdefgh", 3)
    'abc… (5 more characters)'
    """
    start = visible(text[:limit])
    return start if len(text) <= limit else f"{start}… ({len(text) - limit:,} more characters)"


def json_block(identifier: str, value: Any) -> Html:
    """Return a script element that holds data, which no content can close or turn into code."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return element("script", {"type": "application/json", "id": identifier}, Html(text))


def _attribute(name: str, value: str | bool) -> str:
    if isinstance(value, bool):
        return f" {name}" if value else ""
    return f' {name}="{escape(visible(value))}"'


def _visible_character(character: str) -> str:
    code = ord(character)
    if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs"):
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    if code in _DIRECTION_CONTROLS or unicodedata.category(character) != "Cf":
        return f"⟨U+{code:04X}⟩"
    return character


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
