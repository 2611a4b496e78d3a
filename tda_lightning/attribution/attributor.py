r"""Attributor: what every method has in common.

A method gives, for each step of a run, the direction that each query looks for in it. The score of
a training sample is what its visits have in that direction,

.. math:: s(q, i) = \sum_{t \,:\, i \in B_t} \langle d_q^{(t)}, g_i^{(t)} \rangle

so a method is a generator of a few lines, and the pass over the store is written once, here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from tda_lightning.scores import SampleScores, Scores
from tda_lightning.step import Step
from tda_lightning.stores import Store


class Attributor(ABC):
    """A method of attribution, with its hyper-parameters."""

    @abstractmethod
    def directions(
        self, run: Store, queries: Float[Tensor, "n_query k"]
    ) -> Iterator[tuple[Step, Float[Tensor, "n_query k"]]]:
        """Yield the steps of ``run``, in any order, with what each query looks for in them.

        Args:
            run: The recorded training.
            queries: Gradient sketches of the queries' losses, shape ``(n_query, k)``.
        """

    def combine(
        self, total: Float[Tensor, "n_train n_query"], visits: Float[Tensor, "n_train 1"]
    ) -> Float[Tensor, "n_train n_query"]:
        """Turn the sum over a sample's visits into its score: the sum itself, by default."""
        return total

    def attribute(
        self, run: Store, queries: Float[Tensor, "n_query k"], *, progress: bool = True
    ) -> Scores:
        """Score every training sample for every query, in one pass over the run.

        Args:
            run: The recorded training.
            queries: Gradient sketches of the queries' losses, shape ``(n_query, k)``.
            progress: Show a progress bar.

        Returns:
            Scores; samples that were never drawn have zero. Memory: the scores, and one block of
            the store.
        """
        totals = _Totals(run.train_ids(), len(queries), queries.dtype)
        pairs = self.directions(run, queries)
        for step, direction in _follow(pairs, len(run), progress, f"{type(self).__name__}"):
            totals.add_(step.sample_ids, step.sketch @ direction.mT)
        return Scores(
            values=self.combine(totals.values, totals.visits).mT.contiguous(),
            query_ids=torch.arange(len(queries)),
            train_ids=totals.train_ids,
            method=repr(self),
        )


class SelfAttributor(Attributor):
    """A method that also says how much a sample did for itself."""

    @abstractmethod
    def own_scores(self, run: Store, step: Step) -> Float[Tensor, " n"]:
        """Return what each visit of the step did for its own sample."""

    def self_influence(self, run: Store, *, progress: bool = True) -> SampleScores:
        """Score every training sample for itself, in one pass over the run.

        Args:
            run: The recorded training.
            progress: Show a progress bar.
        """
        totals = _Totals(run.train_ids(), 1, run.recipe.torch_dtype)
        name = f"{type(self).__name__}, self-influence"
        for step in _follow(iter(run), len(run), progress, name):
            totals.add_(step.sample_ids, self.own_scores(run, step)[:, None])
        values = self.combine(totals.values, totals.visits)
        return SampleScores(values[:, 0], totals.train_ids, method=repr(self))


class _Totals:
    """Sums over visits, one row per training sample."""

    def __init__(self, train_ids: Int[Tensor, " n_train"], width: int, dtype: torch.dtype) -> None:
        self.train_ids = train_ids
        self.values = torch.zeros(len(train_ids), width, dtype=dtype)
        self.visits = torch.zeros(len(train_ids), 1, dtype=dtype)

    def add_(self, sample_ids: Int[Tensor, " n"], values: Float[Tensor, "n width"]) -> None:
        """Add one row per visit to the rows of its samples."""
        places = torch.searchsorted(self.train_ids, sample_ids)
        self.values.index_add_(0, places, values)
        self.visits.index_add_(0, places, self.visits.new_ones(len(places), 1))


def _follow(items: Iterable, total: int, progress: bool, name: str) -> Iterator:  # type: ignore[type-arg]
    return iter(tqdm(items, total=total, desc=name, unit="step", leave=False, disable=not progress))
