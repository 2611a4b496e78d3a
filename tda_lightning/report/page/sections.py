"""Sections: findings, checks, charts, groups and facts as markup."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tda_lightning.attribution.attributor import provenance_of
from tda_lightning.report.charts.charts import Chart
from tda_lightning.report.evidence.gathering import Evidence
from tda_lightning.report.findings.confidence import Check, checks, doubts
from tda_lightning.report.findings.finding import Case, Finding
from tda_lightning.report.page.html import Html, element, intro, join, with_code

_SIGNS = {
    "attention": ("!", "Needs attention"),
    "fine": ("✓", "Fine"),
    "unknown": ("?", "Unknown"),
}


def findings_of(findings: Sequence[Finding]) -> Html:
    """Return the urgent findings as cards, and the others in short; the script adds pictures."""
    urgent = [finding for finding in findings if finding.weight == "attention"]
    others = [finding for finding in findings if finding.weight != "attention"]
    cards = element("div", {"class": "findings"}, *map(_finding, urgent))
    if not others:
        return cards
    heading = element("h3", {"class": "also"}, "Also examined")
    return join(cards, heading, element("div", {"class": "others"}, *map(_finding, others)))


def _finding(finding: Finding) -> Html:
    sign, meaning = _SIGNS[finding.weight]
    mark = element("span", {"class": "sign", "role": "img", "aria-label": meaning}, sign)
    kind = f"finding {finding.weight}{' with-cases' if finding.cases else ''}"
    return element(
        "article",
        {"class": kind},
        element("h3" if finding.weight == "attention" else "h4", {}, mark, finding.title),
        element("p", {}, with_code(" ".join(finding.sentences[:2]))),
        *(element("p", {}, with_code(sentence)) for sentence in finding.sentences[2:]),
        *_cases(finding.cases),
        *_strip(finding.samples),
    )


def _strip(samples: Sequence[int]) -> list[Html]:
    if not samples:
        return []
    return [element("div", {"class": "strip", "data-samples": _listed(samples)})]


def _cases(cases: Sequence[Case]) -> list[Html]:
    if not cases:
        return []
    items = [
        element("li", {"data-query": str(case.query), "data-samples": _listed(case.samples)})
        for case in cases
    ]
    return [element("ul", {"class": "cases"}, *items)]


def _listed(samples: Sequence[int]) -> str:
    return " ".join(map(str, samples))


def checks_of(evidence: Evidence) -> Html:
    """Return how far the answers can be trusted, as items of a list."""
    return join(*map(_check, checks(evidence)))


def doubts_of(evidence: Evidence) -> Html:
    """Return why the page may miss something, as items of a list."""
    return join(*(element("li", {}, with_code(reason)) for reason in doubts(evidence)))


def _check(check: Check) -> Html:
    state = {True: "good", False: "poor", None: "open"}[check.is_good]
    word = {True: "good", False: "take care", None: "open"}[check.is_good]
    return element(
        "div",
        {"class": f"check {state}"},
        element("dt", {}, check.title),
        element(
            "dd",
            {},
            element("strong", {}, check.figure),
            element("span", {"class": "verdict"}, word),
            element("span", {"class": "why"}, check.sentence),
        ),
    )


def chart_figure(chart: Chart, drawing: Html) -> Html:
    """Return a figure with a chart, and its description for everyone."""
    title = chart.y_label[0].upper() + chart.y_label[1:]
    frame = {"class": "chart", "role": "img", "id": f"chart-{chart.name}"}
    return element(
        "figure",
        {"class": f"figure-{chart.name}"},
        element("h3", {}, title),
        element("div", {**frame, "aria-label": chart.description}, drawing),
        element("figcaption", {}, chart.description),
    )


def groups_of(groups: dict[str, Any] | None, label: Callable[[Any], str]) -> Html:
    """Return the heat map of groups, as a table."""
    if groups is None:
        return intro(
            "Groups need classes as labels, of all queries and all training samples: at most 24."
        )
    text = (
        "Mean effect of the training samples with one label (columns) on the queries with another "
        "(rows). Blue helped, red harmed. A strong red cell marks two classes that compete in the "
        "model."
    )
    largest = max((abs(v) for row in groups["values"] for v in row), default=0.0) or 1.0
    columns = ("query \\ training", *map(label, groups["columns"]))
    head = element("tr", {}, *(_heading("col", column) for column in columns))
    rows = [
        element("tr", {}, _heading("row", label(name)), *(_heat_cell(v, largest) for v in values))
        for name, values in zip(groups["rows"], groups["values"], strict=True)
    ]
    name = "Mean score by label of query and training sample; the largest is 100"
    caption = element("caption", {}, element("span", {}, name))
    parts = caption, element("thead", {}, head), element("tbody", {}, *rows)
    table = element("table", {"class": "heat"}, *parts)
    region = {"role": "region", "aria-label": "Heat map of groups", "tabindex": "0"}
    return join(intro(text), element("div", {"class": "scroll", **region}, table))


def _heading(scope: str, text: str) -> Html:
    return element("th", {"scope": scope}, text)


def _heat_cell(value: float, largest: float) -> Html:
    side = "helped" if value > 0 else "harmed"
    share = round(100 * (abs(value) / largest) ** 0.5)
    style = f"--share:{share}%"
    percent = round(100 * value / largest)
    return element("td", {"class": side, "style": style}, f"{percent:+d}" if percent else "0")


def facts_of(evidence: Evidence, run: str) -> Html:
    """Return the facts of the run, as rows of a table."""
    recipe = evidence.store.recipe
    rows = {
        "run": run,
        **provenance_of(evidence.store),
        "method": evidence.scores.method,
        "training samples": f"{len(evidence.train.ids):,}",
        "labels read": f"{sum(label is not None for label in evidence.train.labels.values()):,}",
        "queries": f"{len(evidence.answers):,}",
        "left out": "; ".join(entry.describe() for entry in recipe.left_out[:5]) or "nothing",
        "recorded by": ", ".join(f"{name} {number}" for name, number in recipe.versions.items()),
    }
    pairs = [(name, value) for name, value in rows.items() if value]
    return join(*(element("tr", {}, _heading("row", n), element("td", {}, v)) for n, v in pairs))
