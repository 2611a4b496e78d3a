"""Rankings: the training samples with the most extreme scores, with their ids and values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from numbers import Integral

from jaxtyping import Float, Int
from torch import Tensor

from tda_lightning.results.html_tables import Cell, html_table
from tda_lightning.results.optional import DataFrame
from tda_lightning.results.tables import data_frame, ranked_columns


@dataclass(frozen=True)
class SampleRanking:
    """Training samples in order of their scores, most extreme first.

    Iterating yields pairs of an id and a score, as numbers: ``for sample_id, score in ranking``.

    Attributes:
        ids: Ids of the training samples, shape ``(k,)``.
        values: Scores of these samples, shape ``(k,)``.
    """

    ids: Int[Tensor, " k"]
    values: Float[Tensor, " k"]

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[tuple[int, float]]:
        """Yield each sample's id and score."""
        yield from zip(self.ids.tolist(), self.values.tolist(), strict=True)

    def to_pandas(self) -> DataFrame:
        """Return a data frame with the columns ``rank``, ``train_id`` and ``score``."""
        return data_frame(ranked_columns(None, self.ids[None], self.values[None]))

    def _repr_html_(self) -> str:
        """Show the samples as a table, in notebooks."""
        return html_table(f"Ranking of {len(self):,}", ["sample and score"], [[self]])

    def __repr__(self) -> str:
        more = ", ..." if len(self) > 10 else ""
        return f"Ranking of {len(self):,}: {describe_pairs(islice(self, 10))}{more}"


@dataclass(frozen=True)
class Ranking:
    """The training samples that matter most to each query.

    ``ranking[row]`` is the ranking of one query; iterating yields one per query.

    Attributes:
        ids: Ids of the training samples, most extreme first, shape ``(n_query, k)``.
        values: Scores of these samples, shape ``(n_query, k)``.
        query_ids: Ids of the queries, shape ``(n_query,)``.
    """

    ids: Int[Tensor, "n_query k"]
    values: Float[Tensor, "n_query k"]
    query_ids: Int[Tensor, " n_query"]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int | Tensor) -> SampleRanking:
        """Return the ranking of the query at a position."""
        is_number = isinstance(row, Tensor) and not row.ndim  # Such as the result of `argmax()`.
        if not (is_number or isinstance(row, Integral)) or not -len(self) <= row < len(self):
            raise IndexError(
                f"`ranking[{row!r}]` names no query; expected a position below {len(self)}. "
                "Select samples by `ranking.ids[...]`."
            )
        return SampleRanking(self.ids[row], self.values[row])

    def __iter__(self) -> Iterator[SampleRanking]:
        """Yield the ranking of each query."""
        return (self[row] for row in range(len(self)))

    def to_pandas(self) -> DataFrame:
        """Return a tidy data frame with a row per query and rank.

        Its columns are ``query``, ``rank`` (from 0), ``train_id`` and ``score``.
        """
        return data_frame(ranked_columns(self.query_ids, self.ids, self.values))

    def _repr_html_(self) -> str:
        """Show one row per query, in notebooks."""
        pairs = zip(self.query_ids.tolist(), self, strict=True)
        rows: list[list[Cell]] = [[str(query), row] for query, row in pairs]
        return html_table(f"Ranking of {self.ids.shape[1]} per query", ["query", "samples"], rows)

    def __repr__(self) -> str:
        lines = [
            f"  query {query}: {describe_ranking(ranking)}"
            for query, ranking in zip(self.query_ids[:10].tolist(), self, strict=False)
        ]
        more = ["  ..."] if len(self) > 10 else []
        return "\n".join([f"Ranking of {self.ids.shape[1]} per query", *lines, *more])


def describe_ranking(ranking: SampleRanking) -> str:
    """Return a text that lists the samples with their scores, unless all of these are zero."""
    is_zero = not ranking.values.any()
    return "none, all of these scores are zero" if is_zero else describe_pairs(ranking)


def describe_pairs(pairs: Iterable[tuple[int, float]]) -> str:
    """Return a text that lists ids with their scores."""
    return ", ".join(f"{sample_id} ({value:+.3g})" for sample_id, value in pairs)


def require_rank(k: int, n_train: int, name: str = "k") -> int:
    """Return ``k``, an argument, if it is a valid number of training samples to rank."""
    if not isinstance(k, Integral) or isinstance(k, bool) or not 1 <= k <= n_train:
        raise ValueError(
            f"`{name}` is {k!r}; expected a number from 1 to {n_train}, the number of training "
            "samples."
        )
    return k
