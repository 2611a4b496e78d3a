"""Interactive sections: the frames that the page's script fills."""

from __future__ import annotations

from tda_lightning.report.page.html import Html, element, intro, join

_NOSCRIPT = "The galleries need JavaScript, which is part of this file. Nothing is loaded."


def queries_section() -> Html:
    """Return the frame of the gallery: controls, a strip of queries, and the chosen one."""
    text = (
        "Choose a query. Blue training samples helped the model answer it right; red ones pushed "
        "it away from the right answer."
    )
    controls = element(
        "div",
        {"class": "controls"},
        _field(
            "Show",
            "query-filter",
            "select",
            [("all", "all"), ("wrong", "wrong"), ("right", "right")],
        ),
        _field(
            "Sort by",
            "query-sort",
            "select",
            [("worst", "worst first"), ("id", "number"), ("label", "label")],
        ),
        _field("Search", "query-search", "input", []),
        _button("query-export", "Export to CSV"),
    )
    return join(
        intro(text),
        element("noscript", {}, element("p", {}, _NOSCRIPT)),
        controls,
        element("p", {"id": "query-count", "class": "count", "role": "status"}, ""),
        element("div", {"id": "query-strip", "role": "group", "aria-label": "Queries"}),
        element("div", {"id": "query-detail", "tabindex": "-1"}),
    )


def ranking_section(figure: Html) -> Html:
    """Return the frame of the ranking of all training samples."""
    text = (
        "Every training sample, the most unusual first. A high self-influence means that the model "
        "could predict the sample only by learning it by heart: it is mislabelled, or rare."
    )
    controls = element(
        "div",
        {"class": "controls"},
        _field("Search", "rank-search", "input", []),
        _field("Label", "rank-label", "select", [("", "all")]),
        _button("rank-export", "Export to CSV"),
    )
    headings = [
        element("th", {"scope": "col"}, "sample"),
        *(
            element(
                "th",
                {"scope": "col", "data-key": key},
                element("button", {"type": "button", "class": "sort"}, title),
            )
            for key, title in (("id", "number"), ("label", "label"), ("value", "self-influence"))
        ),
    ]
    table = element(
        "table",
        {"id": "ranking"},
        element("caption", {"class": "unseen"}, "Training samples by self-influence"),
        element("thead", {}, element("tr", {}, *headings)),
        element("tbody", {}),
    )
    pager = element(
        "div",
        {"class": "pager"},
        _button("rank-previous", "Previous"),
        element("span", {"id": "rank-place", "role": "status"}, ""),
        _button("rank-next", "Next"),
    )
    return join(intro(text), figure, controls, table, pager)


def _field(title: str, name: str, kind: str, options: list[tuple[str, str]]) -> Html:
    label = element("label", {"for": name}, title)
    if kind == "input":
        return element(
            "div",
            {"class": "field"},
            label,
            element("input", {"id": name, "type": "search", "autocomplete": "off"}),
        )
    choices = [element("option", {"value": value}, text) for value, text in options]
    return element("div", {"class": "field"}, label, element("select", {"id": name}, *choices))


def _button(name: str, text: str) -> Html:
    return element("button", {"type": "button", "id": name}, text)
