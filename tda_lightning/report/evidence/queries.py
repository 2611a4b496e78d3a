"""Queries: split batches into items, and compare the model's answers with the labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tda_lightning.applications.predictions import require_single_logit
from tda_lightning.passes.batch_contents import batch_size, part_of
from tda_lightning.passes.batches import loss_of, root_dataset, transfer
from tda_lightning.passes.model_state import preserved_state
from tda_lightning.passes.outputs import Outputs
from tda_lightning.passes.query_batches import Batches, batches_of
from tda_lightning.report.samples.shown import Label, label_of


@dataclass(frozen=True)
class Answer:
    """What the model answers to one query.

    Attributes:
        item: The query, like an item of a dataset.
        label: Its label, if there is one.
        loss: The model's loss on it.
        prediction: The class that the model predicts, or a number; ``None`` if unknown.
        confidence: Probability of the predicted class, if it is a class.
    """

    item: Any
    label: Label | None
    loss: float
    prediction: int | float | None
    confidence: float | None

    @property
    def is_wrong(self) -> bool:
        """Whether the model predicts another class than the label."""
        has_class = isinstance(self.prediction, int) and isinstance(self.label, int)
        return has_class and self.prediction != self.label


def items_of(loader: Any, queries: Any) -> list[Any]:
    """Return the queries as their dataset yields them, like the training samples.

    A loader's function may turn texts into tokens; the dataset still holds the texts. ``queries``
    are the batches of the loader in memory, or a batch.

    Returns:
        An item per query; none if the loader's order is unknown, or if there is no dataset.
    """
    ids = queries.ids if isinstance(queries, Batches) else [None]
    dataset = root_dataset(getattr(loader, "dataset", None))
    known = [batch_ids for batch_ids in ids if batch_ids is not None]
    if len(known) < len(ids) or dataset is None or not hasattr(dataset, "__getitem__"):
        return []
    return [dataset[index] for batch_ids in known for index in batch_ids.tolist()]


def answers_to(
    model: nn.Module,
    queries: Any,
    outputs: Outputs,
    items: Sequence[Any] = (),
    *,
    has_classes: bool,
) -> tuple[list[Answer], str]:
    """Pass every query through the model, one at a time; its state is restored afterwards.

    ``items`` are the queries as they are shown; by default, as the batches hold them. If the model
    ``has_classes``, several outputs are their logits.

    Returns:
        The answers in the order of the queries, and why predictions are missing, if they are.
    """
    answers, rows, reason = [], [], ""
    with preserved_state(model, "eval"), torch.enable_grad():
        for item, single in _samples(queries):
            moved = transfer(model, single)
            loss = _loss(model, moved)
            values, reason = _outputs(model, moved, outputs)
            label = label_of(item, has_classes)
            answers.append(Answer(item, label, loss, None, None))
            rows.append(values)
    reason = reason or _doubts_of_logits(rows)
    if not reason:
        pairs = zip(answers, rows, strict=True)
        answers = [_with_prediction(answer, values) for answer, values in pairs]
    if len(items) == len(answers):
        shown = zip(answers, items, strict=True)
        answers = [dataclasses.replace(answer, item=item) for answer, item in shown]
    return answers, reason


def samples_of(queries: Any, positions: Sequence[int]) -> list[Any]:
    """Return some queries as batches of one sample each."""
    singles = [single for _, single in _samples(queries)]
    return [singles[position] for position in positions]


def _samples(queries: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each query, of a batch or of batches in memory: as an item, and as a batch of one."""
    for batch in batches_of(queries):
        n = batch_size(batch, "queries")
        for row in range(n):
            yield part_of(batch, n, row), part_of(batch, n, slice(row, row + 1))


def _loss(model: nn.Module, single: Any) -> float:
    try:
        return float(loss_of(model, single).detach())
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, LookupError) as error:
        raise ValueError(
            f"`training_step` failed on a batch of one query: {error} The report passes queries "
            "one at a time; keep the axis of samples, such as by `squeeze(-1)` for `squeeze()`."
        ) from error


def _outputs(model: nn.Module, batch: Any, outputs: Outputs) -> tuple[Tensor | None, str]:
    try:
        with torch.no_grad():
            values = outputs(model, batch).detach().cpu()
        return values if values.ndim == 0 else values[0], ""
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        return None, str(error)


def _doubts_of_logits(rows: Sequence[Tensor | None]) -> str:
    """Return why these outputs are no logits of two classes, if they should be and are not."""
    pairs = [row for row in rows if row is not None and row.shape == (2,)]
    try:
        if pairs:
            require_single_logit(torch.stack(pairs))
    except ValueError as error:
        return str(error)
    return ""


def _with_prediction(answer: Answer, values: Tensor | None) -> Answer:
    if values is None:
        return answer
    if values.numel() == 1:
        return dataclasses.replace(answer, prediction=float(values))
    if values.ndim > 1 or not isinstance(answer.label, int):
        return answer
    probabilities = values.double().softmax(dim=0)
    return dataclasses.replace(
        answer, prediction=int(probabilities.argmax()), confidence=float(probabilities.max())
    )
