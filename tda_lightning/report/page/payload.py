"""Payload: the data that the page's script shows, as plain JSON values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from tda_lightning.report.charts.charts import trajectory_lines
from tda_lightning.report.evidence.gathering import Evidence
from tda_lightning.report.evidence.queries import Answer
from tda_lightning.report.evidence.training_set import rendered
from tda_lightning.report.page.html import shortened
from tda_lightning.report.samples.images import data_uri
from tda_lightning.report.samples.shown import Label, ShowItem, Shown

MAX_LABEL, MAX_TEXT, MAX_COLUMNS = 120, 1200, 60
MAX_GROUPS = 24
# Limit of pictures in the ranking; further samples are listed by number and label.
MAX_RANKED_PICTURES = 300


class Payload:
    """Collects samples, each of them once, and returns the data of a page."""

    def __init__(self, evidence: Evidence, k: int, names: ShowItem) -> None:
        self._evidence = evidence
        self._names = names
        self._samples: dict[str, dict[str, Any]] = {}
        self._k = min(k, len(evidence.scores.train_ids))

    def build(self, findings: Iterable[int]) -> dict[str, Any]:
        """Return the data of a page.

        Args:
            findings: Ids of the samples that the findings show.
        """
        evidence = self._evidence
        best, worst = evidence.scores.proponents(self._k), evidence.scores.opponents(self._k)
        queries = []
        for query in evidence.order:
            helped = [(sample, _number(score)) for sample, score in best[query] if score > 0]
            harmed = [(sample, _number(score)) for sample, score in worst[query] if score < 0]
            for sample, _ in (*helped, *harmed):
                self._add(sample)
            queries.append({**self._query(query), "helped": helped, "harmed": harmed})
        ranking = self._ranking()
        for sample in [*findings, *ranking["ids"][:MAX_RANKED_PICTURES]]:
            self._add(sample)
        return {
            "queries": queries,
            "samples": self._samples,
            "ranking": ranking,
            "flagged": sorted(evidence.flagged),
            "trajectories": self._trajectories(),
            "method": evidence.scores.method,
        }

    def label(self, value: Label | None) -> str:
        """Return the text of a label."""
        return "" if value is None else shortened(self._names.label_text(value), MAX_LABEL)

    def _add(self, sample: int) -> None:
        if str(sample) not in self._samples:
            self._samples[str(sample)] = _plain(self._evidence.train.shown(sample))

    def _query(self, query: int) -> dict[str, Any]:
        answer = self._evidence.answers[query]
        return {
            "id": query,
            **_plain(rendered(self._evidence.train.render, answer.item)),
            "loss": _number(answer.loss),
            "answer": self._answer_text(answer),
            "confidence": _number(answer.confidence),
            "wrong": answer.is_wrong,
            "agreement": self._agreement(query),
            "known": isinstance(answer.prediction, int),
        }

    def _agreement(self, query: int) -> float | None:
        agreement = self._evidence.agreement
        return None if agreement is None else _number(float(agreement[query]))

    def _answer_text(self, answer: Answer) -> str:
        if isinstance(answer.prediction, float):
            return f"{answer.prediction:.4g}"
        return self.label(answer.prediction)

    def _ranking(self) -> dict[str, Any]:
        influence = self._evidence.influence
        order = influence.values.argsort(descending=True, stable=True)
        ids = influence.train_ids[order].tolist()
        texts = [self.label(self._evidence.label(sample)) for sample in ids]
        distinct = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        return {
            "ids": ids,
            "values": [_number(value) for value in influence.values[order].tolist()],
            "names": list(distinct),
            "labels": [distinct[text] for text in texts],
        }

    def _trajectories(self) -> list[Any]:
        trajectory = self._evidence.trajectory
        return [
            [[line.x, line.y, line.role, line.name] for line in trajectory_lines(trajectory, row)]
            for row in range(len(trajectory.values))
        ]


def group_scores(evidence: Evidence) -> dict[str, Any] | None:
    """Return the mean score of each pair of a query's label and a training sample's label.

    Returns:
        ``rows``, ``columns`` and ``values``; ``None`` if labels are unknown, are no classes, or
        there are more than 24.
    """
    scores, train = evidence.scores, evidence.train
    query_labels = [answer.label for answer in evidence.answers]
    train_labels = [train.labels.get(sample) for sample in train.ids]
    if not _are_classes(query_labels) or not _are_classes(train_labels):
        return None
    rows, columns = _sorted(query_labels), _sorted(train_labels)
    if max(len(rows), len(columns)) > MAX_GROUPS:
        return None
    row_of = torch.tensor([rows.index(label) for label in query_labels])
    column_of = torch.tensor([columns.index(label) for label in train_labels])
    means = mean_by_group(scores.values, row_of, column_of)
    return {"rows": rows, "columns": columns, "values": means.tolist()}


def mean_by_group(
    values: Float[Tensor, "n_query n_train"],
    row_of: Int[Tensor, " n_query"],
    column_of: Int[Tensor, " n_train"],
) -> Float64[Tensor, "rows columns"]:
    """Return the mean value of each pair of a group of rows and a group of columns."""
    rows = torch.nn.functional.one_hot(row_of).double()
    columns = torch.nn.functional.one_hot(column_of).double()
    counts = rows.sum(0)[:, None] * columns.sum(0)[None, :]
    return (rows.mT @ values.double() @ columns) / counts


def _are_classes(labels: list[Any]) -> bool:
    return bool(labels) and all(isinstance(label, int | str) for label in labels)


def _sorted(labels: list[Any]) -> list[Any]:
    return sorted(set(labels), key=lambda label: (isinstance(label, str), label))


def _plain(shown: Shown) -> dict[str, Any]:
    """Return a sample as JSON values, without empty ones."""
    values = {
        "label": shortened(str(shown.label), MAX_LABEL),
        "image": "" if shown.image is None else data_uri(shown.image),
        "text": shortened(str(shown.text), MAX_TEXT),
        "row": [
            [shortened(str(name), MAX_LABEL), _cell(value)]
            for name, value in list(shown.row.items())[:MAX_COLUMNS]
        ],
        "note": shortened(str(shown.note), MAX_LABEL),
    }
    return {name: value for name, value in values.items() if value}


def _cell(value: Any) -> float | str | None:
    if isinstance(value, int | float):
        return _number(float(value))
    return shortened(str(value), MAX_LABEL)


def _number(value: int | float | None) -> float | None:
    return float(f"{value:.5g}") if value is not None and math.isfinite(value) else None
