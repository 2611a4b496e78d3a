"""Scores: one number per query and training sample, the result of most attribution methods.

Scores have shape ``(n_query, n_train)``. A positive score marks a proponent: a training sample
whose presence lowered the query's loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tda_lightning.results.html_tables import Cell, html_table
from tda_lightning.results.joining import joined_provenance, require_same_ids
from tda_lightning.results.npz import SavedResult
from tda_lightning.results.optional import DataFrame, import_pandas
from tda_lightning.results.ranking import Ranking, SampleRanking, describe_pairs, require_rank
from tda_lightning.results.sample_groups import positions_of, sum_over_groups
from tda_lightning.results.sample_scores import SampleScores
from tda_lightning.results.tables import write_csv
from tda_lightning.results.top_scores import TopScores
from tda_lightning.stores.arguments import call_like


@dataclass(frozen=True)
class Scores(SavedResult):
    """One score per query and training sample.

    ``scores[0]`` are the scores for one query, ``scores[1:3]``, ``scores[[0, 2]]`` and
    ``scores[mask]`` those for several; iterating yields one :class:`SampleScores` per query.
    ``scores.of(train_ids)`` selects training samples. Scores of the same queries and training
    samples can be added and subtracted.

    Attributes:
        values: Scores, shape ``(n_query, n_train)``.
        query_ids: Ids of the queries, shape ``(n_query,)``: as training samples, indices into the
            dataset of a loader, below any ``Subset``; positions in a batch.
        train_ids: Ids of the training samples, shape ``(n_train,)``.
        method: The method and its hyper-parameters.
        provenance: Model, optimizer, steps covered, sketch and weights behind the scores.
        tokens: Position of each query's token in its sample, if queries are tokens.
    """

    values: Float[Tensor, "n_query n_train"]
    query_ids: Int[Tensor, " n_query"]
    train_ids: Int[Tensor, " n_train"]
    method: str
    provenance: Mapping[str, str] = field(default_factory=dict)
    tokens: Int[Tensor, " n_query"] | None = None
    _axes: ClassVar = ("query_ids", "train_ids")
    _optional: ClassVar = ("tokens",)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of queries, and number of training samples."""
        n_query, n_train = self.values.shape
        return n_query, n_train

    def __len__(self) -> int:
        return len(self.values)

    @overload
    def __getitem__(self, queries: int) -> SampleScores: ...
    @overload
    def __getitem__(self, queries: slice | Sequence[int] | Tensor) -> Scores: ...
    def __getitem__(self, queries: int | slice | Sequence[int] | Tensor) -> SampleScores | Scores:
        """Select queries by position."""
        if isinstance(queries, Integral):
            return self._row(int(queries))
        if isinstance(queries, tuple):
            raise IndexError(
                f"`scores[{', '.join(map(str, queries))}]` has two positions; expected one, of the "
                "queries. Select training samples by their ids: `scores[0].of([17, 23])`."
            )
        chosen = queries if isinstance(queries, slice) else _positions(queries)
        if isinstance(chosen, Tensor) and not chosen.ndim:  # Such as the result of `argmax()`.
            return self._row(int(chosen))
        tokens = None if self.tokens is None else self.tokens[chosen]
        return replace(
            self, values=self.values[chosen], query_ids=self.query_ids[chosen], tokens=tokens
        )

    def _row(self, row: int) -> SampleScores:
        if not -len(self) <= row < len(self):
            raise IndexError(f"`scores[{row}]` names no query; expected one below {len(self)}.")
        provenance = {**self.provenance, "query": str(int(self.query_ids[row]))}
        return SampleScores(self.values[row], self.train_ids, self.method, provenance)

    def __iter__(self) -> Iterator[SampleScores]:
        """Yield the scores for each query."""
        return (self._row(row) for row in range(len(self)))

    def of(self, train_ids: Int[Tensor, " k"] | Sequence[int] | SampleRanking) -> Scores:
        """Return the scores of some training samples, in the order of the given ids.

        Args:
            train_ids: Ids of training samples, or a ranking of them. Ids are no columns of
                ``values``.

        Raises:
            ValueError: If an id is not among the training samples.
        """
        positions = positions_of(self.train_ids, train_ids)
        return replace(self, values=self.values[:, positions], train_ids=self.train_ids[positions])

    def __add__(self, other: Scores) -> Scores:
        """Return the sums of the scores of the same queries and training samples."""
        return self._combined(other, self.values.add, "sum")

    def __sub__(self, other: Scores) -> Scores:
        """Return the differences of the scores, such as those with and without a watermark."""
        return self._combined(other, self.values.sub, "difference")

    def _combined(self, other: Scores, operation: Any, name: str) -> Scores:
        if not isinstance(other, Scores):
            return NotImplemented
        require_same_ids([self, other], ("query_ids", "train_ids"), Scores)
        values = operation(other.values)
        return replace(self, values=values, **joined_provenance([self, other], name))

    def proponents(self, k: int = 5) -> Ranking:
        """Return the ``k`` training samples that lowered each query's loss most."""
        return self._rank(k, largest=True)

    def opponents(self, k: int = 5) -> Ranking:
        """Return the ``k`` training samples that raised each query's loss most."""
        return self._rank(k, largest=False)

    def _rank(self, k: int, largest: bool) -> Ranking:
        top = self.values.topk(require_rank(k, len(self.train_ids)), dim=1, largest=largest)
        return Ranking(self.train_ids[top.indices], top.values, self.query_ids)

    @classmethod
    @call_like("`Scores.mean([first, second])`")
    def mean(cls, scores: Sequence[Scores]) -> Scores:
        """Average the scores of several runs, or of several methods.

        Raises:
            ValueError: If the queries or the training samples differ.
        """
        first = require_same_ids(scores, ("query_ids", "train_ids"), Scores)
        values = torch.stack([item.values for item in scores]).mean(dim=0)
        return replace(first, values=values, **joined_provenance(scores, "mean"))

    @classmethod
    @call_like("`Scores.concatenate([first, second])`")
    def concatenate(cls, scores: Sequence[Scores]) -> Scores:
        """Concatenate the scores of different queries.

        Raises:
            ValueError: If the training samples differ.
        """
        first = require_same_ids(scores, ("train_ids",), Scores)
        values = torch.cat([item.values for item in scores])
        query_ids = torch.cat([item.query_ids for item in scores])
        parts = [item.tokens for item in scores if item.tokens is not None]
        tokens = torch.cat(parts) if len(parts) == len(scores) else None
        provenance = joined_provenance(scores, "concatenation")
        return replace(first, values=values, query_ids=query_ids, tokens=tokens, **provenance)

    def grouped(
        self,
        labels: Int[Tensor, " n_query"] | Sequence[int] | None = None,
        *,
        train_labels: Int[Tensor, " n_train"] | Sequence[int] | None = None,
    ) -> Scores:
        """Sum the scores over groups of queries, of training samples, or of both.

        If scores are linear in the query, a sum over queries is the score for the summed losses. A
        sum over training samples predicts the effect of the whole group.

        Args:
            labels: Group of each query, such as its class or document, shape ``(n_query,)``.
            train_labels: Group of each training sample, in the order of ``train_ids``, shape
                ``(n_train,)``; for labels of a whole dataset, ``labels[scores.train_ids]``.

        Returns:
            Scores with one row per group of queries, and one column per group of training samples;
            ``query_ids`` and ``train_ids`` are the labels, sorted.

        Raises:
            ValueError: If there is not one label per query, or per training sample.
        """
        values, provenance = self.values, dict(self.provenance)
        query_ids, train_ids, tokens = self.query_ids, self.train_ids, self.tokens
        if labels is not None:
            tokens = None
            query_ids, values = sum_over_groups(values, labels, "labels", "query")
            provenance["groups"] = f"{len(query_ids)} of {len(self)} queries"
        if train_labels is not None:
            train_ids, sums = sum_over_groups(
                values.mT, train_labels, "train_labels", "training sample"
            )
            values = sums.mT.contiguous()
            provenance["train groups"] = f"{len(train_ids)} of {len(self.train_ids)} samples"
        return Scores(values, query_ids, train_ids, self.method, provenance, tokens)

    def to_pandas(self, k: int | None = None) -> DataFrame:
        """Return a data frame of all scores, or a tidy one of the ``k`` most extreme per query.

        Args:
            k: Number of proponents, and of opponents, per query. The columns are ``query``,
                ``token`` (if queries are tokens), ``rank`` (from 0), ``train_id``, ``score`` and
                ``sign``: 1 for proponents, -1 for opponents. With ``None``, queries are rows and
                training samples columns.
        """
        if k is not None:
            return self._top(k).to_pandas()
        pd = import_pandas()
        index = pd.Index(self.query_ids.numpy(), name="query")
        columns = pd.Index(self.train_ids.numpy(), name="train")
        return pd.DataFrame(self.values.numpy(), index=index, columns=columns)

    def to_csv(self, path: str | Path, k: int | None = None) -> None:
        """Write the table of :meth:`to_pandas` to a CSV file; an existing file is replaced."""
        if k is not None:
            self._top(k).to_csv(path)
            return
        rows = zip(self.query_ids.tolist(), self.values, strict=True)
        lines = ([query, *row.tolist()] for query, row in rows)
        write_csv(path, ["query", *self.train_ids.tolist()], lines)

    def _top(self, k: int) -> TopScores:
        sides = self.proponents(k), self.opponents(k)
        return TopScores(*sides, self.query_ids, self.method, self.provenance, self.tokens)

    def _repr_html_(self) -> str:
        """Show the proponents and opponents of each query, in notebooks."""
        n_query, n_train = self.shape
        k = min(3, n_train)
        names = (self._name_of(row).removeprefix("query ") for row in range(n_query))
        rows: list[list[Cell]] = [
            [name, row.highest(k), row.lowest(k)] for name, row in zip(names, self, strict=True)
        ]
        caption = f"Scores of {n_query:,} queries x {n_train:,} training samples by {self.method}"
        return html_table(caption, ["query", "highest scores", "lowest scores"], rows)

    def __repr__(self) -> str:
        n_query, n_train = self.shape
        head = f"Scores of {n_query:,} queries x {n_train:,} training samples by {self.method}"
        lines = [
            f"  {self._name_of(row)}: {_describe_row(self._row(row))}"
            for row in range(min(n_query, 3))
            if n_train >= 3
        ]
        return "\n".join([head, *lines, *(["  ..."] if n_query > 3 else [])])

    def _name_of(self, row: int) -> str:
        token = "" if self.tokens is None else f", token {int(self.tokens[row])}"
        return f"query {int(self.query_ids[row])}{token}"


def _positions(queries: int | Sequence[int] | Tensor) -> Tensor:
    positions = torch.as_tensor(queries)
    return positions if positions.numel() else positions.long()


def _describe_row(row: SampleScores) -> str:
    if not row.values.any():
        return "all scores are zero"
    helpful = describe_pairs((sample, score) for sample, score in row.highest(3) if score > 0)
    harmful = describe_pairs((sample, score) for sample, score in row.lowest(3) if score < 0)
    return f"proponents {helpful or 'none'}; opponents {harmful or 'none'}"
