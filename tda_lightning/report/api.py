"""Report: which training samples made the model do that, as one page to look at."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tda_lightning.arguments import require_kind, require_whole
from tda_lightning.attribution import Attributor, InfluenceFunction, Unrolled
from tda_lightning.passes.targets import outputs_of
from tda_lightning.report.charts import Chart, charts, has_bokeh
from tda_lightning.report.drawing import bokeh_source, draw_bokeh, draw_svg
from tda_lightning.report.evidence import Evidence, gather
from tda_lightning.report.findings import Finding, find
from tda_lightning.report.html import Html, json_block
from tda_lightning.report.interactive import queries_section, ranking_section
from tda_lightning.report.page import Page, assemble, asset
from tda_lightning.report.payload import Payload, group_scores
from tda_lightning.report.samples import ShowItem, Shown
from tda_lightning.report.sections import (
    chart_figure,
    confidence_section,
    facts_section,
    findings_section,
    groups_section,
    when_section,
)
from tda_lightning.stores.integrity.durable import absolute_path, atomic_write
from tda_lightning.stores.opening import Run, open_run


def report(
    run: Run,
    model: nn.Module,
    queries: Any,
    *,
    train: Any,
    out: str | os.PathLike[str] = "report.html",
    method: Attributor = Unrolled(),
    other_method: Attributor | None = InfluenceFunction(),
    k: int = 8,
    class_names: Sequence[str] = (),
    column_names: Sequence[str] = (),
    render: Callable[[Any], Shown] | None = None,
    outputs: Callable[[nn.Module, Any], Tensor] = outputs_of,
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
        method: The attribution method.
        other_method: A second method, to see how far both agree; ``None`` saves its cost.
        k: Number of proponents, and of opponents, per query.
        class_names: Name of each class.
        column_names: Name of each column, if samples are table rows.
        render: Function from an item of the dataset to how it is shown; by default images, texts,
            table rows and recordings are detected.
        outputs: Function of (module, batch) that returns the model's predictions, samples first.
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
    require_kind("method", method, Attributor, "`Unrolled()`")
    require_whole("k", k, least=1)
    names = ShowItem(class_names, column_names)
    store = open_run(run)
    evidence = gather(
        store,
        model,
        queries,
        train,
        method=method,
        other_method=other_method,
        outputs=outputs,
        render=render or names,
        progress=progress,
    )
    place = run if isinstance(run, str | os.PathLike) else type(run).__name__
    _require_known(findings, evidence)
    page = page_of(evidence, findings, k=k, names=names, title=title, run=str(place))
    text = assemble(page)
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
) -> Page:
    """Return the parts of the page; the arguments are those of :func:`report`."""
    findings = [*further, *find(evidence)]
    payload = Payload(evidence, k, names)
    data = payload.build([sample for finding in findings for sample in finding.samples])
    figures, blocks, scripts = _figures(charts(evidence))
    trajectories = len(evidence.trajectory.values)
    return Page(
        title=title or evidence.store.recipe.model or "A recorded training",
        lead=_lead(evidence, findings),
        sections=[
            findings_section(findings),
            confidence_section(evidence),
            queries_section(trajectories),
            ranking_section(figures["influence"]),
            when_section(evidence, [figures[name] for name in figures if name != "influence"]),
            groups_section(group_scores(evidence), payload.label),
            facts_section(evidence, run, len(evidence.train.labels)),
        ],
        blocks=[json_block("data", data), *blocks],
        scripts=[*scripts, asset("page.js"), asset("gallery.js")],
    )


def _require_known(findings: Sequence[Finding], evidence: Evidence) -> None:
    known = set(evidence.train.ids)
    for finding in findings:
        require_kind("findings", finding, Finding, '`Finding("Watermark", ("...",), "attention")`')
        unknown = [sample for sample in finding.samples if sample not in known]
        if unknown:
            raise ValueError(
                f"The finding `{finding.title}` names sample {unknown[0]}, which is not in the "
                "training set of the run; expected ids of training samples."
            )


def _lead(evidence: Evidence, findings: Sequence[Finding]) -> str:
    """Return the sentence below the title."""
    urgent = sum(finding.weight == "attention" for finding in findings)
    n_train, n_query = len(evidence.train.ids), len(evidence.answers)
    looked = f"{n_query:,} queries and {n_train:,} training samples were examined."
    if not urgent:
        return f"{looked} Nothing urgent was found."
    verb = "things deserve" if urgent > 1 else "thing deserves"
    return f"{looked} {urgent} {verb} a look."


def _figures(drawn: Sequence[Chart]) -> tuple[dict[str, Html], list[Html], list[str]]:
    """Return the figures by name, and the data blocks and scripts that draw them."""
    if not has_bokeh():
        return {chart.name: chart_figure(chart, draw_svg(chart)) for chart in drawn}, [], []
    figures = {chart.name: chart_figure(chart, Html()) for chart in drawn}
    block = json_block("charts", {chart.name: draw_bokeh(chart) for chart in drawn})
    return figures, [block], [bokeh_source()]
