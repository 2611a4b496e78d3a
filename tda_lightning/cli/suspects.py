"""The command ``mislabeled``: training samples whose labels are likely wrong."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tda_lightning.cli.loading import as_loader, load_model, load_queries
from tda_lightning.cli.options import json_option, model_options, rows_option, run_argument
from tda_lightning.cli.output import Answer, aligned, show

if TYPE_CHECKING:
    from tda_lightning.applications import Mislabeled


@click.command(short_help="Rank training samples by how suspicious their labels are.")
@run_argument
@model_options
@click.option(
    "--train",
    metavar="MODULE:NAME",
    help="The training DataLoader, its dataset, or a LightningDataModule: adds given and predicted "
    "labels.",
)
@click.option(
    "--trusted",
    metavar="MODULE:NAME",
    help="Data with correct labels: training samples that oppose them are suspicious.",
)
@click.option("--number", type=click.IntRange(min=1), help="Samples to flag; estimated by default.")
@rows_option
@json_option
def mislabeled(
    run: Path,
    model: str | None,
    config: Path | None,
    checkpoint: Path | None,
    trust_checkpoint: bool,
    train: str | None,
    trusted: str | None,
    number: int | None,
    show_: int,
    as_json: bool,
) -> None:
    """Rank training samples by how suspicious their labels are.

    The run is enough. A model and the training data add given and predicted labels.
    """
    from tda_lightning.applications import find_mislabeled

    loaded = None
    if model is not None or config is not None:
        loaded = load_model(model, config, checkpoint, trust_checkpoint)
    elif train is not None or trusted is not None:
        raise click.UsageError("`--train` and `--trusted` need the trained model: `--model`.")
    has_data = train is not None or config is not None
    result = find_mislabeled(
        run,
        loaded,
        as_loader(load_queries(train, config, "train", "--train")) if has_data else None,
        trusted=None if trusted is None else as_loader(load_queries(trusted, None, "val")),
        number=number,
    )
    n_train = len(result.train_ids)
    if number is not None and number > n_train:
        raise click.UsageError(f"`--number` is {number:,}, and there are {n_train:,} samples.")
    show(_answer(run, result, show_), as_json)


def _answer(run: Path, result: Mislabeled, limit: int) -> Answer:
    votes = dict(zip(result.train_ids.tolist(), result.agreement().tolist(), strict=True))
    labels = _labels(result)
    flagged: list[dict[str, Any]] = [
        {"sample": sample, "label_score": score, "witnesses": votes[sample]}
        | labels.get(sample, {})
        for sample, score in zip(result.ids.tolist(), result.scores.tolist(), strict=True)
    ]
    n_train = len(result.train_ids)
    unclear = "the most suspicious" if flagged else "none flagged"
    finding = (
        f"about {result.estimated_number:,} of {n_train:,} labels are wrong; "
        f"{len(flagged):,} flagged"
        if result.is_clear
        else f"no clear group of wrong labels among {n_train:,}; {unclear}"
    )
    head = f"{run}: {finding}, by {', '.join(result.witnesses)}"
    rows = [[_cell(value) for value in entry.values()] for entry in flagged[:limit]]
    table = aligned([list(flagged[0]), *rows]) if flagged else []
    more = [f"  ... and {len(flagged) - limit:,} more: see `-k`"] if len(flagged) > limit else []
    notes = [f"  note: {note}" for note in result.notes]
    content = {
        "run": str(run),
        "estimated_number": result.estimated_number,
        "is_clear": result.is_clear,
        "flagged": flagged,
        "notes": [str(note) for note in result.notes],
    }
    return Answer([head, *table, *more, *notes], content)


def _labels(result: Mislabeled) -> dict[int, dict[str, int]]:
    if result.labelled is None:
        return {}
    columns = (result.train_ids, result.labelled.given, result.labelled.predicted)
    triples = zip(*(column.tolist() for column in columns), strict=True)
    return {
        sample: {"given_label": given, "predicted_label": predicted}
        for sample, given, predicted in triples
    }


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
