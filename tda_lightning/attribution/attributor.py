r"""Attributor: what every method has in common.

A method gives, for each step of a run, the direction that each query looks for in it. The score of
a training sample is what its visits have in that direction,

.. math:: s(q, i) = \sum_{t \,:\, i \in B_t} \langle d_q^{(t)}, g_i^{(t)} \rangle

so a method is a generator of a few lines, and the pass over the store is written once, here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from tda_lightning.attribution.device_view import DeviceView
from tda_lightning.results.provenance import provenance_of
from tda_lightning.results.scores import SampleScores, Scores
from tda_lightning.stores import Store
from tda_lightning.stores.step import Step


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

    def require(self, run: Store) -> None:
        """Raise unless this run can be asked; all are that have steps, if a method says no more.

        Raises:
            ValueError: Saying what is missing.
        """
        if len(run) == 0:
            raise ValueError("The run has no step; expected at least one. Take more of it.")

    def visit_scores(
        self, run: Store, queries: Float[Tensor, "n_query k"]
    ) -> Iterator[tuple[Step, Float[Tensor, "n n_query"]]]:
        """Yield the steps of ``run`` with what each visit has in each query's direction.

        A method that comes by these products on the way to its directions gives them here, to
        spare the pass one product per step.
        """
        for step, direction in self.directions(run, queries):
            yield step, step.sketch @ direction.mT

    def precomputed(self, run: Store, like: Tensor) -> Attributor:
        """Return a method that says the same of this run, and does once what needs no query.

        It is asked about many queries, some at a time. A method for which nothing can be done
        before, as none by default, returns itself.

        Args:
            run: The recorded training.
            like: A tensor that is where the queries will be, and as they will be.
        """
        return self

    def combine(
        self, total: Float[Tensor, "n_train n_query"], visits: Float[Tensor, "n_train 1"]
    ) -> Float[Tensor, "n_train n_query"]:
        """Turn the sum over a sample's visits into its score: the sum itself, by default.

        The sums may be changed in place.
        """
        return total

    def is_linear(self) -> bool:
        """Say whether scores are linear in the query; they are, by default."""
        return True

    def attribute(
        self, run: Store, queries: Float[Tensor, "n_query k"], *, progress: bool = True
    ) -> Scores:
        """Score every training sample for every query, in one pass over the run.

        The work is done where ``queries`` are, in their number format.

        Args:
            run: The recorded training.
            queries: Gradient sketches of the queries' losses, shape ``(n_query, k)``.
            progress: Show a progress bar.

        Returns:
            Scores; samples that were never drawn have zero. Memory: twice the scores, three times
            the queries, four blocks of the store (of one step, if steps are large), and what the
            method says; the number of steps does not matter.
        """
        self.require(run)
        totals = Totals(run.train_ids(), len(queries), queries)
        pairs = self.visit_scores(DeviceView(run, queries), queries)
        for step, scores in _follow(pairs, len(run), progress, f"{type(self).__name__}"):
            totals.add_(step.sample_ids, scores)
        return Scores(
            values=self.combine(totals.values, totals.visits).mT.contiguous().cpu(),
            query_ids=torch.arange(len(queries)),
            train_ids=totals.train_ids,
            method=repr(self),
            provenance=provenance_of(run),
        )

    def attribute_ensemble(
        self,
        runs: Sequence[Store],
        queries: Sequence[Float[Tensor, "n_query _"]],
        *,
        progress: bool = True,
    ) -> Scores:
        """Average over several trainings: over their scores, by default.

        Args:
            runs: The recorded trainings, on the same data.
            queries: The queries, recorded for each of them.
            progress: Show progress bars.
        """
        pairs = zip(runs, queries, strict=True)
        return Scores.mean([self.attribute(run, rows, progress=progress) for run, rows in pairs])


class SelfAttributor(Attributor):
    """A method that also says how much a sample did for itself."""

    @abstractmethod
    def own_scores(self, run: Store) -> Iterator[tuple[Step, Float[Tensor, " n"]]]:
        """Yield the steps of ``run`` with what each of their visits did for its own sample."""

    def self_influence(self, run: Store, *, progress: bool = True) -> SampleScores:
        """Score every training sample for itself, in one pass over the run.

        Args:
            run: The recorded training.
            progress: Show a progress bar.
        """
        self.require(run)
        like = torch.empty(0, dtype=run.recipe.torch_dtype)
        totals = Totals(run.train_ids(), 1, like)
        name = f"{type(self).__name__}, self-influence"
        pairs = self.own_scores(DeviceView(run, like))
        for step, own in _follow(pairs, len(run), progress, name):
            totals.add_(step.sample_ids, own[:, None])
        return SampleScores(
            values=self.combine(totals.values, totals.visits)[:, 0],
            train_ids=totals.train_ids,
            method=repr(self),
            provenance=provenance_of(run),
        )


class Totals:
    """Sums over visits, one row per training sample.

    Args:
        train_ids: Ids of the training samples, sorted.
        width: Length of a row.
        like: A tensor that is where the sums shall be, and as they shall be.
    """

    def __init__(self, train_ids: Int[Tensor, " n_train"], width: int, like: Tensor) -> None:
        self.train_ids = train_ids
        self.values = like.new_zeros(len(train_ids), width)
        self.visits = like.new_zeros(len(train_ids), 1)

    def add_(self, sample_ids: Int[Tensor, " n"], values: Float[Tensor, "n width"]) -> None:
        """Add one row per visit to the rows of its samples.

        Raises:
            ValueError: If a sample is not in the training set.
        """
        places = torch.searchsorted(self.train_ids, sample_ids).clamp_max_(len(self.train_ids) - 1)
        found = self.train_ids[places]
        if not torch.equal(found, sample_ids):
            stranger = int(sample_ids[found != sample_ids][0])
            raise ValueError(
                f"Sample {stranger} is not in the training set of the run; expected the "
                f"{len(self.train_ids)} ids of `run.train_ids()`. Record the same data set."
            )
        places = places.to(values.device)
        self.values.index_add_(0, places, values)
        self.visits.index_add_(0, places, self.visits.new_ones(len(places), 1))


def _follow(items: Iterable, total: int, progress: bool, name: str) -> Iterator:  # type: ignore[type-arg]
    return iter(tqdm(items, total=total, desc=name, unit="step", leave=False, disable=not progress))
