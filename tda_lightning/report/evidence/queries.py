"""Queries: split batches into items, and compare the model's answers with the labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
) -> tuple[list[Answer], str]:
    """Pass every query through the model, one at a time; its state is restored afterwards.

    ``items`` are the queries as they are shown; by default, as the batches hold them.

    Returns:
        The answers in the order of the queries, and why predictions are missing, if they are.
    """
    answers, reason = [], ""
    with preserved_state(model, "eval"), torch.enable_grad():
        for item, single in _samples(queries):
            moved = transfer(model, single)
            loss = float(loss_of(model, moved).detach())
            values, reason = _outputs(model, moved, outputs)
            answers.append(_answer(item, loss, values))
    if len(items) == len(answers):
        pairs = zip(answers, items, strict=True)
        answers = [dataclasses.replace(answer, item=item) for answer, item in pairs]
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


def _outputs(model: nn.Module, batch: Any, outputs: Outputs) -> tuple[Tensor | None, str]:
    try:
        with torch.no_grad():
            return outputs(model, batch).detach().cpu()[0], ""
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        return None, str(error)


def _answer(item: Any, loss: float, values: Tensor | None) -> Answer:
    label = label_of(item)
    prediction: int | float | None = None
    confidence = None
    if values is not None and values.numel() == 1:
        prediction = float(values)
    elif values is not None and values.ndim == 1 and isinstance(label, int):
        probabilities = values.double().softmax(dim=0)
        prediction = int(probabilities.argmax())
        confidence = float(probabilities.max())
    return Answer(item, label, loss, prediction, confidence)
