"""Results as HTML tables, for notebooks; texts are escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from tda_lightning.results.optional import DataFrame

# Maximal number of rows; another row counts the rest. Further columns are left out.
MAX_ROWS, MAX_COLUMNS = 10, 12
# Of positive and of negative scores, on light and on dark pages; old browsers know the first alone.
_COLORS = (
    "color: #1f77b4; color: light-dark(#1f77b4, #6cb2f0)",
    "color: #d62728; color: light-dark(#d62728, #ff8a80)",
)
# A caption may be wider than its table, and is folded before it is wider than a page.
_CAPTION = "display: block; width: max-content; max-width: 60em"


Cell = str | Iterable[tuple[int, float]]


def with_notes(lines: Iterable[str], notes: Iterable[object]) -> str:
    """Return a ``repr`` of several lines; notebooks show its notes below the table."""
    return "\n".join([*lines, *(f"  note: {note}" for note in notes)])


def html_table(caption: str, headings: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Return a table with a caption; cells are texts, or samples with their scores."""
    return _table(caption, headings, rows[:MAX_ROWS], len(rows))


class ShownInNotebooks:
    """A result that notebooks show as the table of its ``to_pandas()``, with its notes.

    Without pandas, the lines of its ``repr`` are shown.
    """

    def _repr_html_(self) -> str:
        """Show the head of the text, the first rows of the table, and the notes."""
        head, *lines = repr(self).split("\n")
        try:
            frame = self._shown_first()
        except (ModuleNotFoundError, ValueError):  # No pandas, or nothing that fits a table.
            return f"<p>{escape(head)}</p><pre>{escape(chr(10).join(lines))}</pre>"
        notes = [line.strip() for line in lines if line.strip().startswith("note:")]
        return _frame_table(head, frame) + "".join(f"<p>{escape(note)}</p>" for note in notes)

    def _shown_first(self) -> DataFrame:
        """Return the table in the order in which it is shown."""
        frame: DataFrame = self.to_pandas()  # type: ignore[attr-defined]
        return frame


def _frame_table(caption: str, frame: DataFrame) -> str:
    is_numbered = frame.index.names == [None]  # An index without a name is left out.
    flat = frame if is_numbered else frame.reset_index()
    shown = flat.iloc[:MAX_ROWS, :MAX_COLUMNS]
    rows = [[_text(value) for value in row] for row in shown.itertuples(index=False, name=None)]
    return _table(caption, [str(name) for name in shown.columns], rows, len(flat))


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(
    caption: str, headings: Sequence[str], rows: Sequence[Sequence[Cell]], total: int
) -> str:
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    if total > len(rows):
        body += f'<tr><td colspan="{len(headings)}">… {total - len(rows):,} more</td></tr>'
    return (
        f'<table><caption style="text-align: left"><span style="{_CAPTION}">{escape(caption)}'
        "</span></caption>"
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
    return f'#{sample} <span style="{_COLORS[score < 0]}">{score:+.3g}</span>'
