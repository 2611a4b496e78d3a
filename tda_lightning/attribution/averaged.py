r"""Averaged: the mean of the scores of several methods.

.. math:: s(q, i) = \frac{1}{m} \sum_{j = 1}^{m} s_j(q, i)

The default averages two estimates of the rise of the query's loss without the sample.
:class:`~tda_lightning.Unrolled` differentiates this training, with its order of batches;
:class:`~tda_lightning.InfluenceFunction` stands for the average over trainings on such data.
Each is better at its own question. Their errors differ, and the mean is close to the better one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.attribution.attributor import Attributor
from tda_lightning.attribution.influence import InfluenceFunction
from tda_lightning.attribution.unrolled import Unrolled
from tda_lightning.results.scores import Scores
from tda_lightning.stores import Store
from tda_lightning.stores.arguments import require_kind
from tda_lightning.stores.snapshots import Moment
from tda_lightning.stores.step import Step


@dataclass(frozen=True)
class Averaged(Attributor):
    """The mean of the scores of several methods, which must have the same unit.

    The time is the sum of their times. Memory: once more the scores than the largest of them.

    Attributes:
        methods: The methods, in any order.
    """

    methods: tuple[Attributor, ...] = (Unrolled(), InfluenceFunction())

    def __post_init__(self) -> None:
        require_kind("methods", self.methods, tuple, "`(Unrolled(), InfluenceFunction())`")
        if not self.methods:
            raise ValueError("`methods` is empty; expected at least one. Pass `(Unrolled(),)`.")
        for method in self.methods:
            require_kind("methods", method, Attributor, "`(Unrolled(), InfluenceFunction())`")

    def require(self, run: Store) -> None:
        """Check that each method can be applied to the run."""
        for method in self.methods:
            method.require(run)

    def moments(self, run: Store) -> tuple[Moment, ...]:
        """Return the weights that any of the methods takes."""
        return tuple(dict.fromkeys(m for each in self.methods for m in each.moments(run)))

    def directions(
        self, run: Store, queries: Float[Tensor, "n_query k"]
    ) -> Iterator[tuple[Step, Float[Tensor, "n_query k"]]]:
        """Raise an error: the mean is one of scores, and has no directions.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"`{self!r}` averages scores, and has no directions; expected a method that has them. "
            "Use each of its `methods`."
        )

    def precomputed(self, run: Store, like: Tensor) -> Averaged:
        """Return the mean of the methods with their precomputed parts."""
        return Averaged(tuple(method.precomputed(run, like) for method in self.methods))

    def is_linear(self) -> bool:
        """Return whether all methods are linear in the query."""
        return all(method.is_linear() for method in self.methods)

    def attribute(
        self, run: Store, queries: Float[Tensor, "n_query _"], *, progress: bool = True
    ) -> Scores:
        """Score every training sample for every query by each method, and average the scores.

        The rows may also be those at each of the :meth:`moments`, side by side.
        """
        pairs = self.with_rows(run, queries)
        return self._mean(m.attribute(run, rows, progress=progress) for m, rows in pairs)

    def attribute_ensemble(
        self,
        runs: Sequence[Store],
        queries: Sequence[Float[Tensor, "n_query _"]],
        *,
        progress: bool = True,
    ) -> Scores:
        """Average over several trainings, as each of the methods does."""
        per_run = [self.with_rows(*pair) for pair in zip(runs, queries, strict=True)]
        return self._mean(
            pairs[0][0].attribute_ensemble(runs, [rows for _, rows in pairs], progress=progress)
            for pairs in zip(*per_run, strict=True)
        )

    def with_rows(
        self, run: Store, queries: Float[Tensor, "n_query _"]
    ) -> list[tuple[Attributor, Float[Tensor, "n_query _"]]]:
        """Return each method with its part of the query rows: see :meth:`attribute`."""
        if queries.shape[1] == run.recipe.dimension:
            return [(method, queries) for method in self.methods]
        moments = self.moments(run)
        rows = dict(zip(moments, queries.chunk(len(moments), dim=1), strict=True))
        return [(m, torch.cat([rows[a] for a in m.moments(run)], dim=1)) for m in self.methods]

    def __repr__(self) -> str:
        """Show the methods as they are typed, without hyper-parameters at their defaults."""
        shown = ", ".join(map(_as_typed, self.methods)) + "," * (len(self.methods) == 1)
        return f"Averaged(({shown}))"

    def _mean(self, parts: Iterator[Scores]) -> Scores:
        first = next(parts)
        total = first.values  # It belongs to nobody else, and changes in place to save memory.
        for values in (part.values for part in parts):
            total += values
        return replace(first, values=total.div_(len(self.methods)), method=repr(self))


def _as_typed(method: Attributor) -> str:
    if not is_dataclass(method):
        return repr(method)
    shown = [f for f in fields(method) if f.repr and getattr(method, f.name) != f.default]
    arguments = ", ".join(f"{field.name}={getattr(method, field.name)!r}" for field in shown)
    return f"{type(method).__name__}({arguments})"
