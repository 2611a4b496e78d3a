"""The grid of proponents and opponents: one row per query."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tda_lightning.passes.batch_contents import part_of
from tda_lightning.passes.batches import root_dataset
from tda_lightning.report.page.html import visible
from tda_lightning.report.samples.images import pixels_of
from tda_lightning.report.samples.shown import ShowItem, Shown
from tda_lightning.results import SampleRanking, Scores
from tda_lightning.results.optional import needs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HELPED, HARMED = "tab:blue", "tab:red"
MAX_QUERIES = 20
# Characters of a line of a label and of a text, lines of a text, and columns of a table row.
_LABEL, _WIDTH, _LINES, _ROWS = 13, 24, 9, 8
_CAPTION = (
    "Query (left), the training samples that helped it most (blue) and harmed it most (red).",
    "In quotes: the label of each training sample. Below: its score.",
)


def plot_proponents(
    scores: Scores,
    queries: Any,
    train: Any,
    *,
    k: int = 4,
    render: Callable[[Any], Shown] = ShowItem(),
) -> Figure:
    """Draw each query beside the training samples that helped and harmed it most.

    Args:
        scores: Scores of at most 20 queries; select some by ``scores[:5]``.
        queries: The batch of queries that the scores belong to, in their order.
        train: The dataset of the training. The ids of the scores index it, below any ``Subset``.
        k: Number of proponents, and of opponents.
        render: Function from an item to how it is shown.

    Returns:
        A figure of matplotlib, to be saved or shown.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If there are too many queries, or fewer training samples than ``k``.
    """
    with needs("plots"):
        from matplotlib.figure import Figure

    n_query = len(scores)
    if not 1 <= n_query <= MAX_QUERIES:
        raise ValueError(
            f"`scores` has {n_query} queries; expected 1 to {MAX_QUERIES}, one row each. Select "
            "some of them, and of the batch: `scores[:5]`."
        )
    train = root_dataset(train)
    width = 1.15 * (2 * k + 1)
    caption = "\n".join(textwrap.fill(sentence, int(11 * width)) for sentence in _CAPTION)
    height = 1.55 * n_query + 0.25 * (caption.count("\n") + 1)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(n_query, 2 * k + 1, squeeze=False)
    best, worst = scores.proponents(k), scores.opponents(k)
    for row in range(n_query):
        query = render(part_of(queries, n_query, row))
        _tile(axes[row, 0], query, _label(query), "black")
        _side(axes[row, 1 : k + 1], best[row], train, render, HELPED)
        _side(axes[row, k + 1 :], worst[row], train, render, HARMED)
    figure.suptitle(caption, fontsize=11)
    return figure


def _side(
    axes: Any, ranking: SampleRanking, train: Any, render: Callable[[Any], Shown], color: str
) -> None:
    for place, (sample, score) in zip(axes, ranking, strict=True):
        shown = render(train[sample])
        _tile(place, shown, f"{_label(shown)}\n{score:+.3g}", color)


def _tile(axes: Axes, shown: Shown, title: str, color: str) -> None:
    # `$` would start a formula, which user content must not.
    axes.set_title(title, fontsize=9.5, color=color, parse_math=False)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(color)
    if shown.image is not None:
        pixels = pixels_of(shown.image)
        array = pixels.squeeze(-1).numpy()
        axes.imshow(array, cmap="gray_r" if array.ndim == 2 else None)
        return
    text = _filled(shown.text or shown.note, _WIDTH, _LINES) or _rows(shown)
    inside: dict[str, Any] = {"transform": axes.transAxes, "clip_on": True, "in_layout": False}
    axes.text(0.04, 0.96, text, fontsize=5, va="top", parse_math=False, **inside)


def _rows(shown: Shown) -> str:
    """Return the first columns of a table row, one a line."""
    cells = [
        f"{_filled(str(name), _WIDTH - 8, 1)} {value:.3g}"
        if isinstance(value, float)
        else _filled(f"{name} {value}", _WIDTH, 1)
        for name, value in list(shown.row.items())[:_ROWS]
    ]
    return "\n".join(cells)


def _label(shown: Shown) -> str:
    label = _filled(shown.label, _LABEL, 2)
    return f"“{label}”" if label else ""


def _filled(text: str, width: int, lines: int) -> str:
    """Return the beginning of a text that fits some lines."""
    start = visible(text[: 2 * width * lines])  # a text of a megabyte is not wrapped as a whole
    return textwrap.fill(start, width, max_lines=lines, placeholder="…")
