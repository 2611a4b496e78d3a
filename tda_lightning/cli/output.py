"""The output of commands: aligned tables or JSON, with every name from a run escaped."""

from __future__ import annotations

import json
import re
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from tda_lightning.stores.integrity.damage import printable

# Longest cell of a table, in characters.
MAX_CELL = 300


@dataclass(frozen=True)
class Answer:
    """The output of a command.

    Attributes:
        lines: Lines for a person to read.
        data: The same content for a program to read, as JSON.
    """

    lines: Sequence[str]
    data: Mapping[str, Any]


class FailedCheck(Exception):
    """A check found a problem; the answer is printed, and the exit code is 1."""


def show(answer: Answer, as_json: bool) -> None:
    """Print an answer to standard output."""
    if as_json:
        click.echo(json.dumps(answer.data, indent=2))
    else:
        lines = [printable(line) for line in answer.lines]
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        click.echo("\n".join(lines if width is None else [folded(line, width) for line in lines]))


def folded(line: str, width: int) -> str:
    """Break a line that is wider than a terminal; what follows stands below its second column.

    >>> print(folded("  name  one, two, three, four", 24))
      name  one, two, three,
            four
    """
    first = re.match(r"\s*\S+(\s\S+)*?(\s{2,}|:\s|$)", line)
    indent = first.end() if first and first.end() <= width // 3 else 4
    return textwrap.fill(
        line,
        width,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows of a table as lines, with aligned columns."""
    cells = [[_cell(text) for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def _cell(text: str) -> str:
    shown = text if len(text) <= MAX_CELL else f"{text[: MAX_CELL - 3]}..."
    return printable(shown)
