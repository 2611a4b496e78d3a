"""TopScores: the most helpful and the most harmful training samples of each query."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from jaxtyping import Int
from torch import Tensor

from tda_lightning.results.html_tables import Cell, html_table
from tda_lightning.results.optional import DataFrame
from tda_lightning.results.ranking import Ranking
from tda_lightning.results.tables import (
    Columns,
    data_frame,
    ranked_columns,
    signed_columns,
    write_columns,
)


@dataclass(frozen=True)
class TopScores:
    """The most helpful and the most harmful training samples of each query.

    Attributes:
        proponents: The training samples that lowered each query's loss most.
        opponents: The training samples that raised each query's loss most.
        query_ids: Ids of the queries, shape ``(n_query,)``.
        method: The method and its hyper-parameters.
        provenance: Model, optimizer, steps covered, sketch and weights behind the scores.
        tokens: Position of each query's token in its sample, if queries are tokens.
    """

    proponents: Ranking
    opponents: Ranking
    query_ids: Int[Tensor, " n_query"]
    method: str
    provenance: Mapping[str, str] = field(default_factory=dict)
    tokens: Int[Tensor, " n_query"] | None = None

    def named(
        self,
        query_ids: Int[Tensor, " n_query"],
        tokens: Int[Tensor, " n_query"] | None,
        provenance: Mapping[str, str],
    ) -> TopScores:
        """Return the same scores with other names of the queries, and another provenance."""
        proponents = replace(self.proponents, query_ids=query_ids)
        opponents = replace(self.opponents, query_ids=query_ids)
        return TopScores(proponents, opponents, query_ids, self.method, provenance, tokens)

    def __len__(self) -> int:
        return len(self.query_ids)

    def to_pandas(self) -> DataFrame:
        """Return a tidy data frame: a row per query, sign and rank, as ``Scores.to_pandas(k)``."""
        return data_frame(self._columns())

    def to_csv(self, path: str | Path) -> None:
        """Write the table of :meth:`to_pandas` to a CSV file; an existing file is replaced."""
        write_columns(path, self._columns())

    def _columns(self) -> Columns:
        sides = (self.proponents, self.opponents)
        tables = (ranked_columns(self.query_ids, s.ids, s.values, self.tokens) for s in sides)
        return signed_columns(*tables)

    def _repr_html_(self) -> str:
        """Show the proponents and opponents of each query, in notebooks."""
        rankings = zip(self.query_ids.tolist(), self.proponents, self.opponents, strict=True)
        rows: list[list[Cell]] = [[str(query), best, worst] for query, best, worst in rankings]
        caption = f"Top scores of {len(self):,} queries by {self.method}"
        return html_table(caption, ["query", "proponents", "opponents"], rows)

    def __repr__(self) -> str:
        k = self.proponents.ids.shape[1]
        head = f"TopScores of {len(self):,} queries by {self.method}, {k} on each side"
        return "\n".join([head, f"proponents: {self.proponents}", f"opponents: {self.opponents}"])
