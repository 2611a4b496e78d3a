"""Evidence: everything that a report is built from, computed once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tda_lightning.applications import Mislabeled, find_mislabeled
from tda_lightning.attribution import Attributor, TracIn
from tda_lightning.attribution.trajectory import contributions
from tda_lightning.metrics.agreement import rank_agreement
from tda_lightning.passes.batches import batches_in_memory
from tda_lightning.passes.model_state import swapped_weights, warn_of_other_weights
from tda_lightning.passes.queries import record_queries
from tda_lightning.report.queries import Answer, answers_to, query_losses
from tda_lightning.report.samples import Label, Shown
from tda_lightning.report.training_set import TrainingSet, training_set
from tda_lightning.results import SampleScores, Scores, Trajectory
from tda_lightning.results.trajectory import Period
from tda_lightning.stores import Store
from tda_lightning.stores.data_order import DataOrder, data_order
from tda_lightning.stores.snapshots import spread

# Trajectories are computed for this many queries, the worst first.
MAX_TRAJECTORIES = 24
# The queries are evaluated at this many snapshots.
MAX_SNAPSHOTS = 8
# Samples per query whose trajectory is shown, on each side.
TRAJECTORY_SAMPLES = 3


@dataclass(frozen=True)
class Schedule:
    """The course of the training.

    Attributes:
        steps: Index of each recorded step.
        rates: Largest learning rate of each step.
        gradients: Norm of the sum of each step's rows.
        losses: Mean loss of the queries at some snapshots, by the index of the step after each;
            empty if the run has none.
    """

    steps: list[int]
    rates: list[float]
    gradients: list[float]
    losses: dict[int, float]


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
        other: Scores of another method, for comparison, if there is one.
        agreement: Rank correlation of both methods for each query.
        influence: Self-influence of all training samples.
        suspects: Samples whose labels are likely wrong, if the loss is a cross-entropy.
        trajectory: Contributions of the strongest samples over time, for the worst queries, in
            their order.
        data_order: Irregularities in the order of the data.
        schedule: The course of the training.
    """

    store: Store
    train: TrainingSet
    answers: list[Answer]
    missing_answers: str
    order: list[int]
    scores: Scores
    other: Scores | None
    agreement: Float[Tensor, " n_query"] | None
    influence: SampleScores
    suspects: Mislabeled | None
    trajectory: Trajectory
    data_order: DataOrder
    schedule: Schedule

    def label(self, sample: int) -> Label | None:
        """Return the label of a training sample, or ``None`` if it is unknown."""
        return self.train.labels.get(sample)

    @property
    def wrong(self) -> list[int]:
        """Positions of the queries that the model answers wrongly, the worst first."""
        return [query for query in self.order if self.answers[query].is_wrong]


def gather(
    store: Store,
    model: nn.Module,
    queries: Any,
    train: Any,
    *,
    method: Attributor,
    other_method: Attributor | None,
    outputs: Callable[[nn.Module, Any], Tensor],
    render: Callable[[Any], Shown],
    progress: bool,
) -> Evidence:
    """Compute the evidence; the arguments are those of :func:`~tda_lightning.report.report`."""
    warn_of_other_weights(model, store.final_fingerprint, remedy="", stacklevel=4)
    queries = batches_in_memory(queries)
    ids = store.train_ids().tolist()
    samples = training_set(train, ids, render, progress=progress)
    rows = record_queries(model, queries, like=store, at="model", progress=progress)
    rows = rows.to(next(model.parameters()).device)
    answers, reason = answers_to(model, queries, outputs)
    _require_one_row_each(rows, answers)
    scores = method.attribute(store, rows, progress=progress)
    other = None
    if other_method is not None and other_method != method:
        other = other_method.attribute(store, rows, progress=progress)
    order = sorted(range(len(answers)), key=lambda q: (not answers[q].is_wrong, -answers[q].loss))
    return Evidence(
        store=store,
        train=samples,
        answers=answers,
        missing_answers=reason,
        order=order,
        scores=scores,
        other=other,
        agreement=None if other is None else rank_agreement(scores, other),
        influence=TracIn().self_influence(store, progress=progress),
        suspects=_suspects(store, progress),
        trajectory=_trajectory(store, rows, scores, order, method, progress),
        data_order=data_order(store),
        schedule=_schedule(store, _losses_at_snapshots(store, model, queries)),
    )


def _suspects(store: Store, progress: bool) -> Mislabeled | None:
    has_labels = store.facts[-1].loss == "cross-entropy"
    return find_mislabeled(store, progress=progress) if has_labels else None


def _trajectory(
    store: Store,
    rows: Float[Tensor, "n_query k"],
    scores: Scores,
    order: list[int],
    method: Attributor,
    progress: bool,
) -> Trajectory:
    chosen = order[:MAX_TRAJECTORIES]
    k = min(TRAJECTORY_SAMPLES, len(scores.train_ids))
    best, worst = scores.proponents(k).ids[chosen], scores.opponents(k).ids[chosen]
    ids = torch.unique(torch.cat([best, worst]))
    per_epoch = store.facts[-1].epoch - store.facts[0].epoch >= 3
    period: Period = "epoch" if per_epoch else "step"
    return contributions(store, rows[chosen], ids, method, per=period, progress=progress)


def _losses_at_snapshots(store: Store, model: nn.Module, queries: Any) -> dict[int, float]:
    losses = {}
    for snapshot in spread(store.snapshots(), MAX_SNAPSHOTS):
        with swapped_weights(model, store.weights_at(snapshot)):
            values = query_losses(model, queries)
        losses[snapshot] = sum(values) / len(values)
    return losses


def _schedule(store: Store, losses: dict[int, float]) -> Schedule:
    steps, rates, gradients = [], [], []
    for step in store:
        steps.append(step.index)
        rates.append(step.lr)
        gradients.append(float(step.sketch.double().sum(dim=0).norm()))
    return Schedule(steps, rates, gradients, losses)


def _require_one_row_each(rows: Tensor, answers: list[Answer]) -> None:
    if len(rows) != len(answers):
        raise ValueError(
            f"The {len(answers)} queries have {len(rows)} rows; expected one each. Pass queries "
            "whose first tensor has samples along its first axis."
        )
