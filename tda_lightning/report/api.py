"""Report: which training samples made the model do that, as one page to look at."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Bool
from torch import Tensor, nn

from tda_lightning.applications.retraining.removal import RemovalCurve
from tda_lightning.attribution import Attributor, Averaged
from tda_lightning.passes.outputs import Outputs, outputs_of
from tda_lightning.report.charts.charts import Chart, charts, has_bokeh
from tda_lightning.report.charts.drawing import bokeh_source, draw_bokeh, draw_svg
from tda_lightning.report.evidence.gathering import Evidence, gather
from tda_lightning.report.findings import find
from tda_lightning.report.findings.finding import Finding
from tda_lightning.report.page.html import (
    Html,
    assemble,
    asset,
    join,
    json_block,
    shortened,
)
from tda_lightning.report.page.payload import Payload, group_scores
from tda_lightning.report.page.sections import (
    chart_figure,
    checks_of,
    doubts_of,
    facts_of,
    findings_of,
    groups_of,
)
from tda_lightning.report.samples.shown import ShowItem, Shown
from tda_lightning.stores.arguments import absolute_path, require_kind, require_whole
from tda_lightning.stores.integrity.durable import atomic_write
from tda_lightning.stores.opening import Run, open_run

# Findings in the sentences below the title, and characters of each.
MAX_HEADLINES, MAX_HEADLINE = 3, 160


def report(
    run: Run,
    model: nn.Module,
    queries: Any,
    *,
    train: Any,
    out: str | os.PathLike[str] = "report.html",
    method: Attributor = Averaged(),
    k: int = 8,
    class_names: Sequence[str] = (),
    column_names: Sequence[str] = (),
    render: Callable[[Any], Shown] | None = None,
    outputs: Outputs = outputs_of,
    attributes: Mapping[str, Bool[Tensor, " n_train"]] | None = None,
    removal: RemovalCurve | None = None,
    findings: Sequence[Finding] = (),
    title: str = "",
    progress: bool = True,
) -> Path:
    """Write a page that shows which training samples made the model do that.

    The page is one file. It loads nothing, needs no server, and can be sent to others. It contains
    thumbnails, texts and table rows of the samples that it shows.

    Charts are drawn by Bokeh if it is installed (extra ``report``), otherwise by matplotlib.

    Args:
        run: A recorded training: its folder or a store.
        model: The trained LightningModule, with the weights to query.
        queries: A batch as the training loader yields it, or a ``DataLoader`` of such batches.
        train: The dataset of the training. The ids of the run index it, below any ``Subset``.
        out: Path of the file; an existing file is replaced.
        method: The attribution method. Of ``Averaged``, the page shows how far its first two
            methods agree; ``Unrolled()`` saves time.
        k: Number of proponents, and of opponents, per query.
        class_names: Name of each class.
        column_names: Name of each column, if samples are table rows.
        render: Function from an item of the dataset to how it is shown; by default images, texts,
            table rows and recordings are detected.
        outputs: Function of (module, batch) that returns the model's predictions, samples first.
        attributes: Which training samples have each attribute that may be a shortcut, such as a
            watermark, by its name; in the order of ``store.train_ids()``. The report tests whether
            they drive the wrong answers, as :func:`~tda_lightning.applications.find_shortcut` does.
        removal: Losses after retraining without training samples, if you have them.
        findings: Further findings, such as a watermark or near copies, shown before the others.
        title: Title of the page; by default the class of the model.
        progress: Show progress bars.

    Returns:
        The path of the file.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ModuleNotFoundError: If neither Bokeh nor matplotlib is installed.
        ValueError: If the run is empty, or if the model, the queries or the dataset do not match.
    """
    require_kind("method", method, Attributor, "`Averaged()`")
    require_whole("k", k, least=1)
    names = ShowItem(class_names, column_names)
    store = open_run(run)
    evidence = gather(
        store,
        model,
        queries,
        train,
        method=method,
        outputs=outputs,
        render=render or names,
        attributes=attributes or {},
        removal=removal,
        progress=progress,
    )
    place = run if isinstance(run, str | os.PathLike) else type(run).__name__
    _require_known(findings, evidence)
    text = page_of(evidence, findings, k=k, names=names, title=title, run=str(place))
    path = absolute_path(Path(out))
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def page_of(
    evidence: Evidence,
    further: Sequence[Finding],
    *,
    k: int,
    names: ShowItem,
    title: str,
    run: str,
) -> str:
    """Return the page; the arguments are those of :func:`report`."""
    findings = [*further, *find(evidence)]
    payload = Payload(evidence, k, names)
    data = payload.build([sample for finding in findings for sample in _samples_of(finding)])
    figures, blocks, scripts = _figures(charts(evidence))
    influence, removal = figures.pop("influence"), figures.pop("removal", Html())
    parts = {
        "title": title or evidence.store.recipe.model or "A recorded training",
        "extent": _extent(evidence),
        "lead": _lead(findings),
        "findings": findings_of(findings),
        "checks": checks_of(evidence),
        "removal": removal,
        "doubts": doubts_of(evidence),
        "influence": influence,
        "figures": join(*figures.values()),
        "groups": groups_of(group_scores(evidence), payload.label),
        "facts": facts_of(evidence, run),
        "blocks": join(json_block("data", data), *blocks),
    }
    first = (asset(name) for name in ("page.js", "gallery.js", "findings.js"))
    return assemble(parts, [*first, *scripts, asset("charts.js")])  # Bokeh's is large.


def _samples_of(finding: Finding) -> list[int]:
    return [*finding.samples, *(sample for case in finding.cases for sample in case.samples)]


def _require_known(findings: Sequence[Finding], evidence: Evidence) -> None:
    known, n_query = set(evidence.train.ids), len(evidence.answers)
    for finding in findings:
        require_kind("findings", finding, Finding, '`Finding("Watermark", ("...",), "attention")`')
        unknown = [sample for sample in _samples_of(finding) if sample not in known]
        if unknown:
            raise ValueError(
                f"The finding `{finding.title}` names sample {unknown[0]}, which is not in the "
                "training set of the run; expected ids of training samples."
            )
        outside = [case.query for case in finding.cases if not 0 <= case.query < n_query]
        if outside:
            raise ValueError(
                f"The finding `{finding.title}` names query {outside[0]}; expected positions "
                f"from 0 to {n_query - 1}."
            )


def _extent(evidence: Evidence) -> str:
    n_train, n_query = len(evidence.train.ids), len(evidence.answers)
    queries = "queries, the samples" if n_query != 1 else "query, the sample"
    return f"{n_query:,} {queries} to explain; {n_train:,} training samples"


def _lead(findings: Sequence[Finding]) -> str:
    """Return the sentences below the title: the urgent findings in short."""
    urgent = [finding for finding in findings if finding.weight == "attention"]
    if not urgent:
        return "Nothing urgent was found. See “How sure” for reasons to doubt it."
    shown = [finding.sentences[0] for finding in urgent[:MAX_HEADLINES] if finding.sentences]
    more = len(urgent) - len(shown)
    further = [f"{more} more {'things deserve' if more > 1 else 'thing deserves'} a look."]
    return " ".join([shortened(text, MAX_HEADLINE) for text in shown] + further * (more > 0))


def _figures(drawn: Sequence[Chart]) -> tuple[dict[str, Html], list[Html], list[str]]:
    """Return the figures by name, and the data blocks and scripts that draw them."""
    if not has_bokeh():
        return {chart.name: chart_figure(chart, draw_svg(chart)) for chart in drawn}, [], []
    figures = {chart.name: chart_figure(chart, Html()) for chart in drawn}
    block = json_block("charts", {chart.name: draw_bokeh(chart) for chart in drawn})
    return figures, [block], [bokeh_source()]
