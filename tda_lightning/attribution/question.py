"""Question: what :func:`~tda_lightning.attribute` is asked, and the query rows that it takes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tda_lightning.attribution.attributor import Attributor
from tda_lightning.attribution.tracin import TracInCP
from tda_lightning.passes.model_state import (
    Mode,
    differing_weight,
    fingerprint,
    require_model,
    warn_of_other_weights,
)
from tda_lightning.passes.queries import (
    QueryRows,
    checked_for_zeros,
    identified_rows,
    joined_rows,
    queries_at,
)
from tda_lightning.passes.query_batches import groups_in_memory
from tda_lightning.passes.targets import Target
from tda_lightning.stores import Store
from tda_lightning.stores.arguments import name_of
from tda_lightning.stores.precision import with_double_precision
from tda_lightning.stores.snapshots import (
    Moment,
    describe_snapshots,
    describe_weights,
    later_snapshots,
)


@dataclass(frozen=True)
class Question:
    """The keyword arguments of :func:`attribute`, with the method adapted to ``at``."""

    method: Attributor
    target: Target
    at: Moment | None
    mode: Mode
    progress: bool

    def query_rows(self, store: Store, model: nn.Module, queries: Any) -> QueryRows:
        """Return the queries with the rows that the method takes.

        They are on the model's device, or on the CPU if that has no double precision.

        The rows at several moments are side by side.
        """
        require_model(model)
        self.method.require(store)
        moments = self._moments(store, model)
        result = self._rows(moments, store, model, queries)
        if self.at is None and moments != self.method.moments(store):
            warnings.warn(
                f"The weights in the run's snapshots do not fit the `{type(model).__name__}`; "
                "expected the model that was trained. All queries are evaluated at the weights it "
                'has now. Choose that with `at="now"`.',
                stacklevel=3,
            )
        if "now" in moments:
            warn_of_other_weights(model, store.final_fingerprint, stacklevel=4)
        return checked_for_zeros(result)

    def rows(self, store: Store, model: nn.Module, queries: Any) -> QueryRows:
        """Return the rows without a comparison of the model's weights with those of the run."""
        require_model(model)
        self.method.require(store)
        return self._rows(self._moments(store, model), store, model, queries)

    def _rows(
        self, moments: Sequence[Moment], store: Store, model: nn.Module, queries: Any
    ) -> QueryRows:
        is_one_pass = len(moments) == 1 and moments[0] != "snapshots"
        groups = [queries] if is_one_pass else groups_in_memory(queries, progress=self.progress)
        result = joined_rows([self._rows_at(moments, store, model, group) for group in groups])
        device = with_double_precision(next(model.parameters()).device)
        return replace(result, rows=result.rows.to(device))

    def _moments(self, store: Store, model: nn.Module) -> tuple[Moment, ...]:
        """Return the moments whose rows the method takes."""
        if isinstance(self.method, TracInCP):
            return self.method.moments(store)
        if self.at is not None:
            return (self.at,)
        moments = self.method.moments(store)
        return moments if "snapshots" not in moments or _fits(model, store) else ("now",)

    def _rows_at(
        self, moments: Sequence[Moment], store: Store, model: nn.Module, queries: Any
    ) -> QueryRows:
        """Return the rows of a batch, a loader or batches in memory, side by side."""

        def record(position: int) -> QueryRows:
            return identified_rows(
                model,
                queries,
                store.recipe,
                target=self.target,
                preconditioner=store.preconditioner(position),
                mode=self.mode,
                layers=self.method.query_layers,
                progress=self.progress,
            )

        recorded = [queries_at(store, model, moment, record) for moment in moments]
        return replace(recorded[0], rows=torch.cat([part.rows for part in recorded], dim=1))

    def describe(self, stores: Sequence[Store], models: Sequence[nn.Module]) -> dict[str, str]:
        """Return the provenance of the answer: target, weights and mode."""
        weights = map(self._weights, stores, models)
        names = "; ".join(dict.fromkeys(weights))
        return {"target": name_of(self.target), "weights": names, "mode": self.mode}

    def _weights(self, store: Store, model: nn.Module) -> str:
        if isinstance(self.method, TracInCP):
            return f"the nearest of {describe_snapshots(self.method.moments(store))}"
        return " and ".join(
            fingerprint(model)
            if moment == "now" or moment == "model"
            else describe_weights(store, moment)
            for moment in self._moments(store, model)
        )


def _fits(model: nn.Module, store: Store) -> bool:
    """Return whether a run's last snapshot can be loaded into the model."""
    return differing_weight(model, store.weights_at(later_snapshots(store)[-1])) is None
