r"""Attributor: the base class of all attribution methods.

For each step of a run, a method gives a direction per query. The score of a training sample is the
inner product of that direction with the rows of the sample's visits, summed over the steps,

.. math:: s(q, i) = \sum_{t \,:\, i \in B_t} \langle d_q^{(t)}, g_i^{(t)} \rangle

A method is therefore a generator of a few lines. The pass over the store is written once, here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tda_lightning.attribution.steps import DeviceView
from tda_lightning.results.progress import progress_bar
from tda_lightning.results.sample_scores import SampleScores
from tda_lightning.results.scores import Scores
from tda_lightning.stores import Store
from tda_lightning.stores.recipe import Recipe
from tda_lightning.stores.snapshots import Moment
from tda_lightning.stores.step import Step

_Method = TypeVar("_Method", bound="Attributor")


class Attributor(ABC):
    """An attribution method with its hyper-parameters."""

    @property
    def query_layers(self) -> Sequence[str] | None:
        """Names of the layers whose gradients queries must have; by default, all layers."""
        return None

    def for_queries_at(self, at: Moment | None) -> Attributor:
        """Return the method for queries at some weights; by default, itself."""
        return self

    @abstractmethod
    def directions(
        self, run: Store, queries: Float[Tensor, "n_query k"]
    ) -> Iterator[tuple[Step, Float[Tensor, "n_query k"]]]:
        """Yield the steps of ``run``, in any order, with one direction per query for each.

        A visit scores the inner product of its row with the direction.

        Args:
            run: The recorded training.
            queries: Gradient sketches of the queries' losses, shape ``(n_query, k)``.
        """

    def require(self, run: Store) -> None:
        """Check that the method can be applied to a run.

        By default, every run that has steps with rows is accepted.

        Raises:
            ValueError: If the run lacks something that the method needs.
        """
        if len(run) == 0:
            raise ValueError("The run has no steps; expected at least one. Pass a longer slice.")
        run.recipe.require_rows()

    def moments(self, run: Store) -> tuple[Moment, ...]:
        """Return the weights at which queries are evaluated for this method by default.

        By default, those that the model has now. For several, the query rows are side by side.
        """
        return ("now",)

    def visit_scores(
        self, run: Store, queries: Float[Tensor, "n_query k"]
    ) -> Iterator[tuple[Step, Float[Tensor, "n n_query"]]]:
        """Yield the steps of ``run`` with the score of each visit for each query.

        A method that computes these products on the way to its directions overrides this, which
        saves one product per step.
        """
        for step, direction in self.directions(run, queries):
            yield step, step.sketch @ direction.mT

    def precomputed(self, run: Store, like: Tensor) -> Attributor:
        """Return an equivalent method in which the part that needs no query is computed.

        Used where many queries are scored in several passes. By default there is no such part, and
        the method itself is returned.

        Args:
            run: The recorded training.
            like: A tensor with the device and number format of the queries to come.
        """
        return self

    def _with(self: _Method, **private: object) -> _Method:
        """Return a copy with values in private fields, which are no arguments of the method."""
        method = copy(self)
        vars(method).update(private)
        return method

    def combine(
        self, total: Float[Tensor, "n_train n_query"], visits: Float[Tensor, "n_train 1"]
    ) -> Float[Tensor, "n_train n_query"]:
        """Turn the sum over a sample's visits into its score; by default, the sum is the score.

        Args:
            total: Sums over the visits of each training sample, which may be changed in place.
            visits: Number of visits of each training sample.
        """
        return total

    def is_linear(self) -> bool:
        """Return whether scores are linear in the query; by default, they are."""
        return True

    def attribute(
        self, run: Store, queries: Float[Tensor, "n_query k"], *, progress: bool = True
    ) -> Scores:
        """Score every training sample for every query, in one pass over the run.

        The computation uses the device and number format of ``queries``.

        Memory does not depend on the number of steps. It holds twice the scores, three times the
        queries, and four blocks of the store (of one step, if steps are large). Each method
        documents its additional memory.

        Args:
            run: The recorded training.
            queries: Gradient sketches of the queries' losses, shape ``(n_query, k)``.
            progress: Show a progress bar.

        Returns:
            Scores, shape ``(n_query, n_train)``; zero for samples that were never drawn.
        """
        self.require(run)
        view, totals = DeviceView(run, queries), Totals(run.train_ids(), len(queries), queries)
        pairs = self.visit_scores(view, queries)
        origin = self._add_up(totals, view, pairs, type(self).__name__, progress)
        values = self.combine(totals.values, totals.visits).mT.contiguous().cpu()
        return Scores(values=values, query_ids=torch.arange(len(queries)), **origin)

    def _add_up(
        self, totals: Totals, view: DeviceView, pairs: Iterable[Any], name: str, progress: bool
    ) -> dict[str, Any]:
        """Add the scores of all visits to totals; return the fields that all results have."""
        for step, scores in progress_bar(pairs, name, "step", shown=progress, total=len(view)):
            totals.add_(step.sample_ids, scores)
        require_finite_totals(totals.values, view, repr(self))
        provenance = {**provenance_of(view), **view.provenance()}
        return {"train_ids": totals.train_ids, "method": repr(self), "provenance": provenance}

    def attribute_ensemble(
        self,
        runs: Sequence[Store],
        queries: Sequence[Float[Tensor, "n_query _"]],
        *,
        progress: bool = True,
    ) -> Scores:
        """Average over several trainings; by default, take the mean of their scores.

        Args:
            runs: The recorded trainings, on the same data.
            queries: Gradient sketches of the same queries, recorded for each of the runs.
            progress: Show progress bars.
        """
        pairs = zip(runs, queries, strict=True)
        return Scores.mean([self.attribute(run, rows, progress=progress) for run, rows in pairs])


def mean_over_visits(
    method: Attributor, total: Float[Tensor, "n_train n_query"], visits: Float[Tensor, "n_train 1"]
) -> Float[Tensor, "n_train n_query"]:
    """Average over visits, as :meth:`Attributor.combine`; unvisited samples stay at zero."""
    return total.div_(visits.clamp_min(1))


class SelfAttributor(Attributor):
    """A method that can also score each training sample for its own loss."""

    @abstractmethod
    def own_scores(self, run: Store) -> Iterator[tuple[Step, Float[Tensor, " n"]]]:
        """Yield the steps of ``run`` with the score of each visit for its own sample's loss."""

    def self_influence(self, run: Store, *, progress: bool = True) -> SampleScores:
        """Score every training sample for its own loss, in one pass over the run.

        Args:
            run: The recorded training.
            progress: Show a progress bar.
        """
        self.require(run)
        like = torch.empty(0, dtype=run.recipe.torch_dtype)
        view, totals = DeviceView(run, like), Totals(run.train_ids(), 1, like)
        pairs = ((step, scores[:, None]) for step, scores in self.own_scores(view))
        name = f"{type(self).__name__}, self-influence"
        origin = self._add_up(totals, view, pairs, name, progress)
        return SampleScores(values=self.combine(totals.values, totals.visits)[:, 0], **origin)


class Totals:
    """Sums over visits, one row of some width per training sample; the ids are sorted.

    They have the device and number format of ``like``.
    """

    def __init__(self, train_ids: Int[Tensor, " n_train"], width: int, like: Tensor) -> None:
        self.train_ids = train_ids
        self.values = like.new_zeros(len(train_ids), width)
        self.visits = like.new_zeros(len(train_ids), 1)

    def add_(self, sample_ids: Int[Tensor, " n"], values: Float[Tensor, "n width"]) -> None:
        """Add one row per visit to the rows of the visited samples.

        Raises:
            ValueError: If a sample is not in the training set.
        """
        last = len(self.train_ids) - 1
        positions = torch.searchsorted(self.train_ids, sample_ids).clamp_max_(last)
        is_unknown = self.train_ids[positions] != sample_ids
        if is_unknown.any():
            raise ValueError(
                f"Sample {int(sample_ids[is_unknown][0])} is not in the training set of the run; "
                f"expected the {len(self.train_ids)} ids of `run.train_ids()`. Record the same "
                "data set."
            )
        positions = positions.to(values.device)
        self.values.index_add_(0, positions, values)
        self.visits.index_add_(0, positions, self.visits.new_ones(len(positions), 1))

    def means(self) -> Float[Tensor, "n_train width"]:
        """Return the means over visits; zeros for samples without any."""
        return self.values / self.visits.clamp_min(1)


def require_finite_totals(values: Tensor, run: Store, method: str) -> None:
    """Check that a method's sums over visits are finite: rankings would put NaN first.

    If they are not, the run is read again to name the visit with the largest row.
    """
    # A sum is finite only if its terms are, and takes a fraction of the time.
    if values.sum().isfinite() or (is_finite := values.isfinite()).all():
        return
    size, sample, index = max(_largest_rows(run))
    raise ValueError(
        f"{int((~is_finite).sum()):,} of {values.numel():,} scores by `{method}` are not finite, "
        "although all rows are; expected finite scores. Products of very large rows overflow: the "
        f"largest row, of sample {sample} at step {index}, holds {size:.2g}. Use the steps before "
        "it, query with `TracIn()` or in double precision, or train again with clipping."
    )


def _largest_rows(run: Store) -> Iterator[tuple[float, int, int]]:
    """Yield the largest entry of every step's rows, with its sample and the step."""
    for step in run:
        if len(step.sketch):
            sizes = step.sketch.abs().amax(dim=1)
            largest = int(sizes.argmax())
            yield float(sizes[largest]), int(step.sample_ids[largest]), step.index


def provenance_of(run: Store) -> Mapping[str, str]:
    """Describe a run in short texts: its model, optimizer, steps, and sketch."""
    first, last, recipe = run.facts[0], run.facts[-1], run.recipe
    stride = "" if recipe.every_n_steps == 1 else f", one in {recipe.every_n_steps}"
    return {
        "model": recipe.model,
        "optimizer": last.optimizer,
        "steps": f"{len(run)}, index {first.index} to {last.index}{stride}",
        "projector": ", ".join(f"{key}={value}" for key, value in recipe.projector.items()),
        "rows": f"{recipe.dimension} x {recipe.dtype}, coordinates of {recipe.preconditioner}",
        "recorded": _recorded_share(recipe),
    }


def _recorded_share(recipe: Recipe) -> str:
    recorded = sum(block.size for block in recipe.recorded_blocks)
    total = recorded + sum(entry.size for entry in recipe.left_out)
    return f"{recorded:,} of {total:,} parameters"
