"""Scores: what a method answers.

Orientation is always ``(n_query, n_train)``. A positive score marks a proponent: the presence of
that training sample lowered the query's loss.
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
        ids: Training sample ids, most extreme first, shape ``(n_query, k)``.
        values: Their scores, shape ``(n_query, k)``.
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
    """How much each training sample did for each query.

    Attributes:
        values: Scores, shape ``(n_query, n_train)``.
        query_ids: Places of the queries in what was asked, shape ``(n_query,)``.
        train_ids: Ids of the training samples, shape ``(n_train,)``.
        method: The method and its hyper-parameters.
        provenance: Where the scores come from: model, optimizer, steps covered, sketch, weights.
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
        """Average the scores of several trainings, or of several methods.

        Raises:
            ValueError: If they are not about the same queries and training samples.
        """
        first = _alike(scores, ("query_ids", "train_ids"))
        values = torch.stack([one.values for one in scores]).mean(dim=0)
        return replace(first, values=values, **_joined(scores, "mean"))

    @classmethod
    def concatenate(cls, scores: Sequence[Scores]) -> Scores:
        """Put scores of several queries, one after the other, into one.

        Raises:
            ValueError: If they are not about the same training samples.
        """
        first = _alike(scores, ("train_ids",))
        values = torch.cat([one.values for one in scores])
        ids = torch.cat([one.query_ids for one in scores])
        return replace(first, values=values, query_ids=ids, **_joined(scores, "concatenation"))

    def grouped(self, labels: Int[Tensor, " n_query"] | Sequence[int]) -> Scores:
        """Add up the scores of queries that share a label: what a sample did for each group.

        Where scores are linear in the query, these are the scores of the summed losses.

        Args:
            labels: The group of each query, shape ``(n_query,)``: of a class, a document, a token.

        Returns:
            Scores with one row per group; ``query_ids`` are the labels, sorted.

        Raises:
            ValueError: If there is not one label per query.
        """
        try:
            given = torch.as_tensor(labels)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`labels` are no numbers: {error}; expected one whole number per query, the same "
                "for queries that belong together."
            ) from error
        if given.shape != self.query_ids.shape:
            raise ValueError(
                f"`labels` has the shape {tuple(given.shape)}; expected ({len(self.query_ids)},), "
                "one label per query. Give queries that belong together the same number."
            )
        groups, places = torch.unique(given, return_inverse=True)
        values = self.values.new_zeros(len(groups), len(self.train_ids))
        values.index_add_(0, places, self.values)
        provenance = {**self.provenance, "groups": f"{len(groups)} of {len(given)} queries"}
        return replace(self, values=values, query_ids=groups, provenance=provenance)

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
        """Show the shape, the method and the best proponent of the first queries."""
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
    """The best and the worst teachers of each query.

    Attributes:
        proponents: The training samples that lowered each query's loss most.
        opponents: Those that raised it most.
        query_ids: Places of the queries in what was asked, shape ``(n_query,)``.
        method: The method and its hyper-parameters.
        provenance: Where the scores come from: model, optimizer, steps covered, sketch, weights.
    """

    proponents: Ranking
    opponents: Ranking
    query_ids: Int[Tensor, " n_query"]
    method: str
    provenance: Mapping[str, str] = field(default_factory=dict)

    def to_pandas(self) -> pd.DataFrame:
        """Return a data frame with a row per query and rank; the most extreme have rank 0."""
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
    """One score per training sample.

    Attributes:
        values: Scores, shape ``(n_train,)``.
        train_ids: Ids of the training samples, shape ``(n_train,)``.
        method: The method and its hyper-parameters.
        provenance: Where the scores come from: model, optimizer, steps covered, sketch, weights.
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
    """Return how many training samples to name, if there are as many.

    Raises:
        ValueError: If there are not, or it is no number.
    """
    if not isinstance(k, Integral) or isinstance(k, bool) or not 1 <= k <= n_train:
        raise ValueError(
            f"`k` is {k!r}; expected a number from 1 to {n_train}, the number of training samples."
        )
    return k


def _pairs(ids: Tensor, values: Tensor) -> str:
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return ", ".join(f"{name} ({value:+.3g})" for name, value in pairs)


def _row(ranking: Ranking, row: int) -> tuple[Tensor, Tensor]:
    return ranking.ids[row], ranking.values[row]


def _alike(scores: Sequence[Scores], names: tuple[str, ...]) -> Scores:
    if not isinstance(scores, list | tuple) or not scores:
        raise ValueError(f"`scores` is {scores!r}; expected at least one `Scores`, in a list.")
    for name in names:
        if not all(torch.equal(getattr(one, name), getattr(scores[0], name)) for one in scores):
            raise ValueError(
                f"`scores` differ in their `{name}`; expected the same in all of them. Attribute "
                "the same queries to the same training set."
            )
    first: Scores = scores[0]
    return first


def _joined(scores: Sequence[Scores], how: str) -> dict[str, Any]:
    """Return the method and provenance of several: what they share, or all that they say."""
    methods = list(dict.fromkeys(one.method for one in scores))
    method = methods[0] if len(methods) == 1 else f"{how} of {', '.join(methods)}"
    keys = dict.fromkeys(key for one in scores for key in one.provenance)
    said = {
        key: dict.fromkeys(one.provenance.get(key, "unknown") for one in scores) for key in keys
    }
    provenance = {key: "; ".join(values) for key, values in said.items()}
    if len(scores) > 1:
        provenance[how] = f"of {len(scores)}"
    return {"method": method, "provenance": provenance}
