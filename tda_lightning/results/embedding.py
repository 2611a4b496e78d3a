"""Embedding: one vector per training sample; a query is scored by one matrix product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tda_lightning.results.html_tables import Cell, html_table
from tda_lightning.results.npz import SavedResult
from tda_lightning.results.optional import DataFrame, import_pandas
from tda_lightning.results.sample_scores import SampleScores
from tda_lightning.results.scores import Scores


@dataclass(frozen=True)
class Embedding(SavedResult):
    """One vector per training sample; queries are scored by one matrix product.

    Attributes:
        vectors: Shape ``(n_train, k)``.
        train_ids: Ids of the training samples, shape ``(n_train,)``.
        method: The method and its hyper-parameters.
        provenance: Model, optimizer, steps covered, and sketch behind the vectors.
    """

    vectors: Float[Tensor, "n_train k"]
    train_ids: Int[Tensor, " n_train"]
    method: str
    provenance: Mapping[str, str] = field(default_factory=dict)
    _values: ClassVar = "vectors"
    _axes: ClassVar = ("train_ids",)

    def attribute(self, queries: Float[Tensor, "n_query k"]) -> Scores:
        """Score every training sample for every query, as the embedded method does.

        Args:
            queries: Gradient sketches of the queries' losses, shape ``(n_query, k)``, as
                ``record_queries(model, queries, like=run)`` returns them.

        Raises:
            ValueError: If the queries are not sketches of the embedding's dimension.
        """
        _require_rows(queries, self.vectors.shape[1])
        return Scores(
            values=(queries @ self.vectors.to(queries).mT).cpu(),
            query_ids=torch.arange(len(queries)),
            train_ids=self.train_ids,
            method=self.method,
            provenance=self.provenance,
        )

    def to_pandas(self) -> DataFrame:
        """Return a data frame with the vector of each training sample as a row."""
        pd = import_pandas()
        index = pd.Index(self.train_ids.numpy(), name="train_id")
        return pd.DataFrame(self.vectors.numpy(), index=index)

    def _repr_html_(self) -> str:
        """Show the longest and the shortest vectors, in notebooks."""
        norms = SampleScores(self.vectors.norm(dim=1), self.train_ids, self.method)
        k = min(5, len(norms))
        rows: list[list[Cell]] = []
        if k:
            rows = [["longest", norms.highest(k)], ["shortest", norms.lowest(k)]]
        return html_table(repr(self), ["", "sample and length of its vector"], rows)

    def __repr__(self) -> str:
        n_train, k = self.vectors.shape
        return f"Embedding of {n_train:,} training samples in {k:,} dimensions by {self.method}"


def _require_rows(queries: object, k: int) -> None:
    shape = tuple(queries.shape) if isinstance(queries, Tensor) else type(queries).__name__
    if not isinstance(queries, Tensor) or queries.ndim != 2 or queries.shape[1] != k:
        raise ValueError(
            f"`queries` is {shape}; expected rows of {k:,} numbers, shape (n_query, {k}). Pass the "
            "result of `record_queries(model, queries, like=run)` for the embedded run."
        )
