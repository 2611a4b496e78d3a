"""Results as HTML tables, for notebooks; texts are escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

# Maximal number of rows; another row counts the rest.
MAX_ROWS = 10
_COLORS = ("#1f77b4", "#d62728")  # of positive and of negative scores


Cell = str | Iterable[tuple[int, float]]


def html_table(caption: str, headings: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Return a table with a caption.

    Args:
        caption: Sentence above the table.
        headings: Heading of each column.
        rows: Cells of each row: texts, or samples with their scores.
    """
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows[:MAX_ROWS])
    if len(rows) > MAX_ROWS:
        body += f'<tr><td colspan="{len(headings)}">… {len(rows) - MAX_ROWS:,} more</td></tr>'
    return (
        f'<table><caption style="text-align: left">{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _cell(content: Cell) -> str:
    if isinstance(content, str):
        return f"<td>{escape(content)}</td>"
    pairs = list(content)
    if not any(score for _, score in pairs):
        return "<td>none, all scores are zero</td>"
    return f'<td style="text-align: left">{" &nbsp; ".join(map(_entry, pairs))}</td>'


def _entry(pair: tuple[int, float]) -> str:
    sample, score = pair
    color = _COLORS[score < 0]
    return f'#{sample} <span style="color: {color}">{score:+.3g}</span>'
