"""Removal curves: how the loss changes without training samples, and without random ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from tda_lightning.applications.retraining.plan import Plan, leave_out
from tda_lightning.applications.retraining.results import Retrainings
from tda_lightning.results.html_tables import ShownInNotebooks
from tda_lightning.results.optional import DataFrame, import_pandas
from tda_lightning.stores.arguments import require_whole

# Runs a plan with the user's functions: ``partial(retrain, model=..., loader=..., ...)``.
Retrain = Callable[[Plan], Retrainings]
_SHARES = (0.25, 0.5, 1.0)
RANDOM = "random"


@dataclass(frozen=True, repr=False)
class RemovalCurve(ShownInNotebooks):
    """Changes of the loss of the queries after retraining without training samples.

    Attributes:
        removed: Number or share of removed samples, ascending.
        changes: Changes of the mean loss by method, each as long as ``removed``, such as those of
            :func:`~tda_lightning.metrics.removal_curve`. The key ``"random"`` is for random
            samples; the others are for the most helpful ones by a method.
    """

    removed: Sequence[int] | Sequence[float]
    changes: Mapping[str, Sequence[float]]

    def __post_init__(self) -> None:
        if not self.removed or not self.changes:
            raise ValueError("A removal curve is empty; expected some sizes and some changes.")
        for name, values in self.changes.items():
            if len(values) != len(self.removed):
                raise ValueError(
                    f"`changes[{name!r}]` has {len(values)} values; expected {len(self.removed)}, "
                    "one for each entry of `removed`."
                )
            if not all(math.isfinite(value) for value in values):
                raise ValueError(f"`changes[{name!r}]` holds NaN or infinity; expected numbers.")

    def __repr__(self) -> str:
        lines = [f"RemovalCurve: change after retraining without {', '.join(self.changes)}"]
        for position, size in enumerate(self.removed):
            values = ", ".join(f"{values[position]:+.3g}" for values in self.changes.values())
            lines.append(f"  {size:,}: {values}")
        return "\n".join(lines)

    def to_pandas(self) -> DataFrame:
        """Return a data frame with a row per size and a column per method."""
        pd = import_pandas()
        return pd.DataFrame(dict(self.changes), index=pd.Index(list(self.removed), name="removed"))

    @property
    def method(self) -> str | None:
        """The method whose curve ends highest; ``None`` if there are random samples only."""
        methods = [name for name in self.changes if name != RANDOM]
        return max(methods, key=lambda name: self.changes[name][-1], default=None)


def check_removal(
    ids: Int[Tensor, " m"], n_train: int, retrain: Retrain, *, name: str, n_seeds: int = 3
) -> RemovalCurve:
    """Retrain without the first quarter, half and all of some samples, and without random ones.

    It takes ``n_seeds`` times up to seven trainings: one of them on all samples. Each set of random
    samples is as large as the one beside it.

    Args:
        ids: Positions of the samples in the training data, the most important first.
        n_train: Number of training samples.
        retrain: Runs a plan: ``partial(retrain, model=..., loader=..., trainer=..., measure=...)``.
        name: Name of the curve.
        n_seeds: Number of seeds of the trainings and of the random samples.

    Returns:
        Changes of the mean of everything measured, such as the losses of test samples.

    Raises:
        ValueError: If there is no sample to remove, or a position is out of range.
    """
    require_whole("n_seeds", n_seeds, least=1)
    if not len(ids):
        raise ValueError(f"`{name}` names no sample; expected one at least, to retrain without.")
    sizes = sorted({math.ceil(share * len(ids)) for share in _SHARES})
    weights, seeds = [], []
    for seed in range(n_seeds):
        order = torch.randperm(n_train, generator=torch.Generator().manual_seed(seed))
        groups = [ids[:0], *(ids[:n] for n in sizes), *(order[:n] for n in sizes)]
        plan = leave_out(n_train, groups, seed=seed)
        weights.append(plan.weights)
        seeds.append(plan.seeds)
    retrained = retrain(Plan(torch.cat(weights), torch.cat(seeds)))
    means = retrained.values.mean(dim=1).view(n_seeds, -1).mean(dim=0)
    changes = (means[1:] - means[0]).tolist()
    count = len(sizes)
    return RemovalCurve(sizes, {name: changes[:count], RANDOM: changes[count:]})
