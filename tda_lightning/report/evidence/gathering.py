"""Evidence: everything that a report is built from, computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tda_lightning.applications import (
    Duplicates,
    Mislabeled,
    Shortcut,
    find_duplicates,
    find_mislabeled,
    find_shortcut,
)
from tda_lightning.applications.predictions import of_classes
from tda_lightning.applications.retraining.removal import RemovalCurve
from tda_lightning.attribution import Attributor, Averaged, InfluenceFunction, TracIn
from tda_lightning.attribution.question import Question
from tda_lightning.attribution.trajectory import contributions
from tda_lightning.metrics.agreement import rank_agreement
from tda_lightning.passes.model_state import warn_of_other_weights
from tda_lightning.passes.outputs import Outputs, labels_of
from tda_lightning.passes.query_batches import batches_in_memory
from tda_lightning.passes.targets import Loss
from tda_lightning.report.evidence.queries import Answer, answers_to, items_of, samples_of
from tda_lightning.report.evidence.schedule import Schedule, schedule
from tda_lightning.report.evidence.training_set import TrainingSet, training_set
from tda_lightning.report.samples.shown import Label, Shown
from tda_lightning.results import SampleScores, Scores, Trajectory
from tda_lightning.results.trajectory import Period
from tda_lightning.stores import Store
from tda_lightning.stores.data_order import DataOrder, data_order

# Trajectories are computed for this many queries, the worst first.
MAX_TRAJECTORIES = 24
# Samples per query whose trajectory is shown, on each side.
TRAJECTORY_SAMPLES = 3
# Queries on which attributes are tested, the first wrong ones.
MAX_TESTED = 200
# More training samples are not compared pair by pair.
MAX_COMPARED = 5_000


@dataclass(frozen=True)
class Evidence:
    """Everything that a report is built from.

    Attributes:
        store: The recorded training.
        train: The training samples.
        answers: The model's answers to the queries.
        missing_answers: Why predictions are missing, if they are.
        order: Positions of the queries, the worst first.
        scores: Scores of all queries and training samples.
        parts: The scores of each method, if ``scores`` is their mean.
        agreement: Rank correlation of the first two methods for each query, if there are two.
        influence: Self-influence of all training samples.
        suspects: Samples whose labels are likely wrong, if the loss is a cross-entropy.
        duplicates: Training samples with nearly the same gradients; ``None`` if there are too many
            samples to compare.
        trajectory: Contributions of the strongest samples over time, for the worst queries, in
            their order.
        data_order: Irregularities in the order of the data.
        schedule: The course of the training.
        attributes: Which training samples have each attribute that may be a shortcut.
        shortcut: What drives the wrong answers, or all answers if none is wrong; ``None`` if no
            attributes were passed, or if the answers are unknown.
        removal: A curve of retrainings, if there is one.
    """

    store: Store
    train: TrainingSet
    answers: list[Answer]
    missing_answers: str
    order: list[int]
    scores: Scores
    parts: tuple[Scores, ...]
    agreement: Float[Tensor, " n_query"] | None
    influence: SampleScores
    suspects: Mislabeled | None
    duplicates: Duplicates | None
    trajectory: Trajectory
    data_order: DataOrder
    schedule: Schedule
    attributes: Mapping[str, Bool[Tensor, " n_train"]]
    shortcut: Shortcut | None
    removal: RemovalCurve | None

    def label(self, sample: int) -> Label | None:
        """Return the label of a training sample, or ``None`` if it is unknown."""
        return self.train.labels.get(sample)

    @property
    def wrong(self) -> list[int]:
        """Positions of the queries that the model answers wrongly, the worst first."""
        return [query for query in self.order if self.answers[query].is_wrong]

    @property
    def flagged(self) -> set[int]:
        """Ids of the training samples whose labels are likely wrong."""
        return set() if self.suspects is None else set(self.suspects.ids.tolist())

    def members_of(self, attribute: str) -> list[int]:
        """Return the ids of the training samples with an attribute."""
        ids: list[int] = self.store.train_ids()[self.attributes[attribute]].tolist()
        return ids


def gather(
    store: Store,
    model: nn.Module,
    queries: Any,
    train: Any,
    *,
    method: Attributor,
    outputs: Outputs,
    render: Callable[[Any], Shown],
    attributes: Mapping[str, Bool[Tensor, " n_train"]],
    removal: RemovalCurve | None,
    progress: bool,
) -> Evidence:
    """Compute the evidence; the arguments are those of :func:`~tda_lightning.report.report`."""
    warn_of_other_weights(model, store.final_fingerprint, remedy="", stacklevel=4)
    loader, queries = queries, batches_in_memory(queries)
    ids = store.train_ids().tolist()
    has_classes = store.facts[-1].loss == "cross-entropy"
    samples = training_set(train, ids, render, has_classes=has_classes, progress=progress)
    question = Question(method, Loss(), None, "eval", progress)
    rows = question.rows(store, model, queries).rows
    logits, _ = of_classes(store, outputs, labels_of)
    items = items_of(loader, queries)
    answers, reason = answers_to(model, queries, logits, items, has_classes=has_classes)
    _require_one_row_each(rows, answers)
    ready = method.precomputed(store, rows)  # All its readers share its curvature.
    pairs = ready.with_rows(store, rows) if isinstance(ready, Averaged) else [(ready, rows)]
    parts = tuple(m.attribute(store, of_method, progress=progress) for m, of_method in pairs)
    scores = replace(parts[0], values=Scores.mean(parts).values, method=repr(method))
    influences = (m for m, _ in pairs if isinstance(m, InfluenceFunction))
    left_out = next(influences, InfluenceFunction())
    order = sorted(range(len(answers)), key=lambda q: (not answers[q].is_wrong, -answers[q].loss))
    return Evidence(
        store=store,
        train=samples,
        answers=answers,
        missing_answers=reason,
        order=order,
        scores=scores,
        parts=parts,
        agreement=rank_agreement(*parts[:2]) if len(parts) > 1 else None,
        influence=TracIn().self_influence(store, progress=progress),
        suspects=find_mislabeled(store, left_out=left_out, progress=progress)
        if has_classes
        else None,
        duplicates=_duplicates(store, len(ids)),
        trajectory=_trajectory(store, rows, scores, order, ready, progress),
        data_order=data_order(store),
        schedule=schedule(store, model, queries),
        attributes=dict(attributes),
        shortcut=_shortcut(store, model, queries, answers, samples, attributes, outputs),
        removal=removal,
    )


def _duplicates(store: Store, n_train: int) -> Duplicates | None:
    return find_duplicates(store, progress=False) if n_train <= MAX_COMPARED else None


def _shortcut(
    store: Store,
    model: nn.Module,
    queries: Any,
    answers: Sequence[Answer],
    train: TrainingSet,
    attributes: Mapping[str, Bool[Tensor, " n_train"]],
    outputs: Outputs,
) -> Shortcut | None:
    """Test the attributes on the wrong answers, or on all answers if none is wrong."""
    known = [q for q, answer in enumerate(answers) if isinstance(answer.prediction, int)]
    if not attributes or not known:
        return None
    wrong = [q for q in known if answers[q].is_wrong]
    singles = samples_of(queries, (wrong or known)[:MAX_TESTED])
    classes = [train.labels.get(sample) for sample in train.ids]
    are_classes = all(isinstance(label, int) for label in classes)
    return find_shortcut(
        store,
        model,
        DataLoader(singles, batch_size=None),  # type: ignore[arg-type]
        attributes,
        classes=torch.tensor(classes) if are_classes else None,
        outputs=outputs,
        progress=False,
    )


def _trajectory(
    store: Store,
    rows: Float[Tensor, "n_query k"],
    scores: Scores,
    order: list[int],
    method: Attributor,
    progress: bool,
) -> Trajectory:
    chosen = torch.tensor(order[:MAX_TRAJECTORIES])
    k = min(TRAJECTORY_SAMPLES, len(scores.train_ids))
    best, worst = scores.proponents(k).ids[chosen], scores.opponents(k).ids[chosen]
    ids = torch.unique(torch.cat([best, worst]))
    per_epoch = store.facts[-1].epoch - store.facts[0].epoch >= 3
    period: Period = "epoch" if per_epoch else "step"
    return contributions(store, rows[chosen], ids, method, per=period, progress=progress)


def _require_one_row_each(rows: Tensor, answers: list[Answer]) -> None:
    if len(rows) != len(answers):
        raise ValueError(
            f"The {len(answers)} queries have {len(rows)} rows; expected one each. Pass queries "
            "whose first tensor has samples along its first axis."
        )
