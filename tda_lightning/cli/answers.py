"""The commands that query a run: ``attribute`` and ``self-influence``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch

from tda_lightning import (
    TRAK,
    GradientSimilarity,
    InfluenceFunction,
    LogProbability,
    Margin,
    Source,
    TracIn,
    Unrolled,
    top_attributions,
)
from tda_lightning import attribute as attribute_run
from tda_lightning import self_influence as self_influence_of
from tda_lightning.attribution import Attributor, Averaged, SelfAttributor
from tda_lightning.cli.loading import as_loader, load_model, load_queries
from tda_lightning.cli.options import (
    count_option,
    json_option,
    model_options,
    query_options,
    rows_option,
    run_argument,
    scores_option,
)
from tda_lightning.cli.output import Answer, aligned, show
from tda_lightning.passes.targets import Loss, Target
from tda_lightning.results import SampleRanking, TopScores
from tda_lightning.results.ranking import describe_ranking
from tda_lightning.stores.opening import open_run

# The methods and targets that need no arguments, by their names on the command line.
METHODS: dict[str, Attributor] = {
    "averaged": Averaged(),
    "unrolled": Unrolled(),
    "influence-function": InfluenceFunction(),
    "source": Source(),
    "trak": TRAK(),
    "tracin": TracIn(),
    "gradient-similarity": GradientSimilarity(),
}
SELF_METHODS: dict[str, SelfAttributor] = {
    name: method for name, method in METHODS.items() if isinstance(method, SelfAttributor)
}
TARGETS: dict[str, Target] = {
    "loss": Loss(),
    "margin": Margin(),
    "log-probability": LogProbability(),
}


@click.command(short_help="Show each query's proponents and opponents.")
@run_argument
@model_options
@query_options
@click.option("--method", type=click.Choice(list(METHODS)), default="averaged", show_default=True)
@click.option("--target", type=click.Choice(list(TARGETS)), default="loss", show_default=True)
@count_option(5)
@click.option(
    "--show",
    "show_",
    default=10,
    show_default=True,
    type=click.IntRange(min=1),
    help="Queries to print.",
)
@scores_option
@json_option
def attribute(
    run: Path,
    model: str | None,
    config: Path | None,
    checkpoint: Path | None,
    trust_checkpoint: bool,
    queries: str | None,
    split: str,
    method: str,
    target: str,
    k: int,
    show_: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Show the most helpful and the most harmful training samples of each query."""
    store = open_run(run)
    n_train = len(store.train_ids())
    if k > n_train:
        raise click.UsageError(
            f"`-k` is {k:,}, and the run has {n_train:,} training samples. Pass at most as many."
        )
    loaded = load_model(model, config, checkpoint, trust_checkpoint)
    batch = as_loader(load_queries(queries, config, split))
    options: dict[str, Any] = {"method": METHODS[method], "target": TARGETS[target]}
    if out is None:
        top = top_attributions(store, loaded, batch, k, **options)
    else:
        scores = attribute_run(store, loaded, batch, **options)
        scores.save(out)
        sides = scores.proponents(k), scores.opponents(k)
        top = TopScores(*sides, scores.query_ids, scores.method, scores.provenance)
    show(_top_answer(run, top, show_), as_json)


def _top_answer(run: Path, top: TopScores, limit: int) -> Answer:
    rankings = list(zip(top.query_ids.tolist(), top.proponents, top.opponents, strict=True))
    answers = [
        {"query": query, "proponents": _ranked(helped), "opponents": _ranked(harmed)}
        for query, helped, harmed in rankings
    ]
    lines = [f"{run}: {len(answers):,} queries by {top.method}"]
    for query, helped, harmed in rankings[:limit]:
        lines += [
            f"  query {query}",
            f"    proponents  {describe_ranking(helped)}",
            f"    opponents   {describe_ranking(harmed)}",
        ]
    if len(answers) > limit:
        lines.append(f"  ... and {len(answers) - limit:,} more: see `--show`, `--json`, `--out`")
    facts = {"method": top.method, "provenance": dict(top.provenance)}
    return Answer(lines, {"run": str(run), **facts, "queries": answers})


@click.command("self-influence", short_help="Rank the training samples, unusual ones first.")
@run_argument
@click.option(
    "--method", type=click.Choice(list(SELF_METHODS)), default="tracin", show_default=True
)
@rows_option
@scores_option
@json_option
def self_influence(run: Path, method: str, show_: int, out: Path | None, as_json: bool) -> None:
    """Rank the training samples by their effect on their own loss: unusual ones come first."""
    scores = self_influence_of(run, method=SELF_METHODS[method])
    if out is not None:
        scores.save(out)
    order = torch.argsort(scores.values, descending=True, stable=True)
    ranked = _ranked(SampleRanking(scores.train_ids[order], scores.values[order]))
    shown = [(str(entry["sample"]), f"{entry['score']:.4g}") for entry in ranked[:show_]]
    rows = [("sample", "score"), *shown]
    head = f"{run}: {len(ranked):,} training samples by self-influence, {scores.method}"
    more = [f"  ... and {len(ranked) - show_:,} more: see `-k`"] if len(ranked) > show_ else []
    facts = {"method": scores.method, "provenance": dict(scores.provenance)}
    content = {"run": str(run), **facts, "samples": ranked}
    show(Answer([head, *aligned(rows), *more], content), as_json)


def _ranked(ranking: SampleRanking) -> list[dict[str, Any]]:
    return [{"sample": sample, "score": score} for sample, score in ranking]
