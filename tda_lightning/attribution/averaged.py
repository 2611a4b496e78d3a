r"""Averaged: the mean of the scores of several methods.

.. math:: s(q, i) = \frac{1}{m} \sum_{j = 1}^{m} s_j(q, i)

The default averages two estimates of the rise of the query's loss without the sample.
:class:`~tda_lightning.Unrolled` differentiates this training, with its order of batches;
:class:`~tda_lightning.InfluenceFunction` stands for the average over trainings on such data.
Each is better at its own question. Their errors differ, and the mean is close to the better one.
"""

from __future__ import annotations

import warnings
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

# From here on, the larger scores decide alone. On the tasks of `lds.py`, the factor is 1.2 to 1.7.
_DOMINANCE = 10


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
        moments = (moment for method in self.methods for moment in method.moments(run))
        return tuple(dict.fromkeys(moments))

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
        spreads = [_spread(total)]
        for values in (part.values for part in parts):
            spreads.append(_spread(values))
            total += values
        self._warn_if_one_dominates(spreads)
        return replace(first, values=total.div_(len(self.methods)), method=repr(self))

    def _warn_if_one_dominates(self, spreads: Sequence[float]) -> None:
        """Warn if the scores of one method are so large that those of another do not count."""
        if max(spreads) > _DOMINANCE * min(spreads) > 0:
            large, small = (
                _as_typed(self.methods[spreads.index(bound(spreads))]) for bound in (max, min)
            )
            warnings.warn(
                f"The scores of `{large}` are more than {_DOMINANCE} times as large as those of "
                f"`{small}`, so that their mean ranks like the former alone; expected the same "
                "size. Long trainings that memorize their data do this. Look at the answers of "
                f"both: `method={small}`, `method={large}`.",
                stacklevel=2,
            )


def _spread(values: Float[Tensor, "n_query n_train"]) -> float:
    """Return the standard deviation of the scores of a typical query."""
    return float(values.std(dim=1, correction=0).median())


def _as_typed(method: Attributor) -> str:
    if not is_dataclass(method):
        return repr(method)
    shown = [f for f in fields(method) if f.repr and getattr(method, f.name) != f.default]
    arguments = ", ".join(f"{field.name}={getattr(method, field.name)!r}" for field in shown)
    return f"{type(method).__name__}({arguments})"
