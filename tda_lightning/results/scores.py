"""Scores, rankings and per-sample scores: the results of attribution methods.

Scores have shape ``(n_query, n_train)``. A positive score marks a proponent: a training sample
whose presence lowered the query's loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tda_lightning.results.npz import load_arrays, save_arrays
from tda_lightning.results.optional import needs

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Ranking:
    """The training samples that matter most to each query.

    Attributes:
        ids: Ids of the training samples, most extreme first, shape ``(n_query, k)``.
        values: Scores of these samples, shape ``(n_query, k)``.
    """

    ids: Int[Tensor, "n_query k"]
    values: Float[Tensor, "n_query k"]

    def __repr__(self) -> str:
        """Show one line per query."""
        shown = range(min(len(self.ids), 10))
        lines = [f"  query {row}: {_pairs(self.ids[row], self.values[row])}" for row in shown]
        more = ["  ..."] if len(self.ids) > 10 else []
        return "\n".join([f"Ranking of {self.ids.shape[1]} per query", *lines, *more])


@dataclass(frozen=True)
class Scores:
    """One score per query and training sample.

    Attributes:
        values: Scores, shape ``(n_query, n_train)``.
        query_ids: Positions of the queries, shape ``(n_query,)``.
        train_ids: Ids of the training samples, shape ``(n_train,)``.
        method: The method and its hyper-parameters.
        provenance: Model, optimizer, steps covered, sketch and weights behind the scores.
    """

    values: Float[Tensor, "n_query n_train"]
    query_ids: Int[Tensor, " n_query"]
    train_ids: Int[Tensor, " n_train"]
    method: str
    provenance: Mapping[str, str] = field(default_factory=dict)

    def proponents(self, k: int = 5) -> Ranking:
        """Return the ``k`` training samples that lowered each query's loss most."""
        return self._rank(k, largest=True)

    def opponents(self, k: int = 5) -> Ranking:
        """Return the ``k`` training samples that raised each query's loss most."""
        return self._rank(k, largest=False)

    def _rank(self, k: int, largest: bool) -> Ranking:
        top = self.values.topk(require_rank(k, len(self.train_ids)), dim=1, largest=largest)
        return Ranking(self.train_ids[top.indices], top.values)

    @classmethod
    def mean(cls, scores: Sequence[Scores]) -> Scores:
        """Average the scores of several runs, or of several methods.

        Raises:
            ValueError: If the queries or the training samples differ.
        """
        first = _require_same_ids(scores, ("query_ids", "train_ids"))
        values = torch.stack([item.values for item in scores]).mean(dim=0)
        return replace(first, values=values, **_joined_provenance(scores, "mean"))

    @classmethod
    def concatenate(cls, scores: Sequence[Scores]) -> Scores:
        """Concatenate the scores of different queries.

        Raises:
            ValueError: If the training samples differ.
        """
        first = _require_same_ids(scores, ("train_ids",))
        values = torch.cat([item.values for item in scores])
        query_ids = torch.cat([item.query_ids for item in scores])
        provenance = _joined_provenance(scores, "concatenation")
        return replace(first, values=values, query_ids=query_ids, **provenance)

    def grouped(self, labels: Int[Tensor, " n_query"] | Sequence[int]) -> Scores:
        """Sum the scores over groups of queries that share a label.

        If scores are linear in the query, these are the scores of the summed losses.

        Args:
            labels: Group of each query, such as its class or document, shape ``(n_query,)``.

        Returns:
            Scores with one row per group; ``query_ids`` are the labels, sorted.

        Raises:
            ValueError: If there is not one label per query.
        """
        try:
            groups = torch.as_tensor(labels)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`labels` are not numbers: {error}; expected one whole number per query, the "
                "same for queries that belong together."
            ) from error
        if groups.shape != self.query_ids.shape:
            raise ValueError(
                f"`labels` has the shape {tuple(groups.shape)}; expected ({len(self.query_ids)},), "
                "one label per query. Give queries that belong together the same number."
            )
        ids, rows = torch.unique(groups, return_inverse=True)
        values = self.values.new_zeros(len(ids), len(self.train_ids))
        values.index_add_(0, rows, self.values)
        provenance = {**self.provenance, "groups": f"{len(ids)} of {len(groups)} queries"}
        return replace(self, values=values, query_ids=ids, provenance=provenance)

    def to_pandas(self) -> pd.DataFrame:
        """Return a data frame with queries as rows and training samples as columns."""
        with needs("pandas"):
            import pandas as pd

        index = pd.Index(self.query_ids.numpy(), name="query")
        columns = pd.Index(self.train_ids.numpy(), name="train")
        return pd.DataFrame(self.values.numpy(), index=index, columns=columns)

    def save(self, path: str | Path) -> None:
        """Write the scores to a NumPy ``.npz`` file."""
        save_arrays(path, self, _MATRIX_FIELDS)

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read scores written by :meth:`save`."""
        return cls(**load_arrays(path, _MATRIX_FIELDS))

    def __repr__(self) -> str:
        """Show the shape, the method, and the proponents and opponents of the first queries."""
        n_query, n_train = self.values.shape
        head = f"Scores of {n_query:,} queries x {n_train:,} training samples by {self.method}"
        lines = [
            f"  query {int(query)}: proponents {_pairs(*_row(self.proponents(3), row))}; "
            f"opponents {_pairs(*_row(self.opponents(3), row))}"
            for row, query in enumerate(self.query_ids[:3])
            if n_train >= 3
        ]
        return "\n".join([head, *lines, *(["  ..."] if n_query > 3 else [])])


@dataclass(frozen=True)
class TopScores:
    """The most helpful and the most harmful training samples of each query.

    Attributes:
        proponents: The training samples that lowered each query's loss most.
        opponents: The training samples that raised each query's loss most.
        query_ids: Positions of the queries, shape ``(n_query,)``.
        method: The method and its hyper-parameters.
        provenance: Model, optimizer, steps covered, sketch and weights behind the scores.
    """

    proponents: Ranking
    opponents: Ranking
    query_ids: Int[Tensor, " n_query"]
    method: str
    provenance: Mapping[str, str] = field(default_factory=dict)

    def to_pandas(self) -> pd.DataFrame:
        """Return a data frame with a row per query and rank; rank 0 is the most extreme."""
        with needs("pandas"):
            import pandas as pd

        queries, ranks = self.query_ids.tolist(), range(self.proponents.ids.shape[1])
        return pd.DataFrame(
            {
                "proponent": self.proponents.ids.flatten().numpy(),
                "proponent_score": self.proponents.values.flatten().numpy(),
                "opponent": self.opponents.ids.flatten().numpy(),
                "opponent_score": self.opponents.values.flatten().numpy(),
            },
            index=pd.MultiIndex.from_product([queries, ranks], names=["query", "rank"]),
        )


@dataclass(frozen=True)
class SampleScores:
    """One score per training sample, such as its self-influence.

    Attributes:
        values: Scores, shape ``(n_train,)``.
        train_ids: Ids of the training samples, shape ``(n_train,)``.
        method: The method and its hyper-parameters.
        provenance: Model, optimizer, steps covered, sketch and weights behind the scores.
    """

    values: Float[Tensor, " n_train"]
    train_ids: Int[Tensor, " n_train"]
    method: str
    provenance: Mapping[str, str] = field(default_factory=dict)

    def highest(self, k: int = 10) -> Int[Tensor, " k"]:
        """Return the ids of the ``k`` highest scores, highest first."""
        return self.train_ids[self.values.topk(require_rank(k, len(self.train_ids))).indices]

    def lowest(self, k: int = 10) -> Int[Tensor, " k"]:
        """Return the ids of the ``k`` lowest scores, lowest first."""
        top = self.values.topk(require_rank(k, len(self.train_ids)), largest=False)
        return self.train_ids[top.indices]

    def to_pandas(self) -> pd.Series[float]:
        """Return a series indexed by training sample."""
        with needs("pandas"):
            import pandas as pd

        return pd.Series(self.values.numpy(), index=pd.Index(self.train_ids.numpy(), name="train"))

    def save(self, path: str | Path) -> None:
        """Write the scores to a NumPy ``.npz`` file."""
        save_arrays(path, self, _VECTOR_FIELDS)

    @classmethod
    def load(cls, path: str | Path) -> SampleScores:
        """Read scores written by :meth:`save`."""
        return cls(**load_arrays(path, _VECTOR_FIELDS))

    def __repr__(self) -> str:
        """Show the method and the highest scores."""
        ids = self.highest(min(5, len(self.train_ids)))
        values = self.values.topk(len(ids)).values
        head = f"SampleScores of {len(self.values):,} training samples by {self.method}"
        return f"{head}\n  highest {_pairs(ids, values)}"


_MATRIX_FIELDS = ("values", "query_ids", "train_ids")
_VECTOR_FIELDS = ("values", "train_ids")


def require_rank(k: int, n_train: int) -> int:
    """Return ``k`` if it is a valid number of training samples to rank.

    Raises:
        ValueError: If it is not a whole number from 1 to ``n_train``.
    """
    if not isinstance(k, Integral) or isinstance(k, bool) or not 1 <= k <= n_train:
        raise ValueError(
            f"`k` is {k!r}; expected a number from 1 to {n_train}, the number of training samples."
        )
    return k


def _pairs(ids: Tensor, values: Tensor) -> str:
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return ", ".join(f"{sample_id} ({value:+.3g})" for sample_id, value in pairs)


def _row(ranking: Ranking, row: int) -> tuple[Tensor, Tensor]:
    return ranking.ids[row], ranking.values[row]


def _require_same_ids(scores: Sequence[Scores], names: tuple[str, ...]) -> Scores:
    if not isinstance(scores, list | tuple) or not scores:
        raise ValueError(f"`scores` is {scores!r}; expected at least one `Scores`, in a list.")
    first: Scores = scores[0]
    for name in names:
        if not all(torch.equal(getattr(item, name), getattr(first, name)) for item in scores):
            raise ValueError(
                f"`scores` differ in their `{name}`; expected the same in all of them. Attribute "
                "the same queries to the same training set."
            )
    return first


def _joined_provenance(scores: Sequence[Scores], operation: str) -> dict[str, Any]:
    """Return the method and the provenance of several scores, with all differing values listed."""
    methods = list(dict.fromkeys(item.method for item in scores))
    method = methods[0] if len(methods) == 1 else f"{operation} of {', '.join(methods)}"
    keys = dict.fromkeys(key for item in scores for key in item.provenance)
    distinct = {
        key: dict.fromkeys(item.provenance.get(key, "unknown") for item in scores) for key in keys
    }
    provenance = {key: "; ".join(values) for key, values in distinct.items()}
    if len(scores) > 1:
        provenance[operation] = f"of {len(scores)}"
    return {"method": method, "provenance": provenance}
