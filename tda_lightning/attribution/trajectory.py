r"""Trajectory: when in the training did a sample help or hurt?

A score is a sum over steps. Here are its terms, for some samples, per step or per epoch,

.. math:: s(q, i) = \sum_t c_{q, i, t}, \qquad
   c_{q, i, t} = \langle d_q^{(t)}, g_i^{(t)} \rangle \; [i \in B_t]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from tda_lightning.arguments import require_choice
from tda_lightning.attribution.attributor import Attributor, provenance_of
from tda_lightning.attribution.device_view import MovedRun
from tda_lightning.results.npz import load_arrays, save_arrays
from tda_lightning.results.optional import needs
from tda_lightning.stores import Store

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Period = Literal["step", "epoch"]


@dataclass(frozen=True)
class Trajectory:
    """What some training samples did for each query, over the training.

    Attributes:
        values: Contributions, shape ``(n_query, n_selected, n_times)``.
        times: Step indices or epochs, rising, shape ``(n_times,)``.
        train_ids: The samples, shape ``(n_selected,)``.
        query_ids: Places of the queries in what was asked, shape ``(n_query,)``.
        per: What the times are.
        method: The method and its hyper-parameters.
        provenance: Where the values come from: model, optimizer, steps covered, sketch, weights.
    """

    values: Float[Tensor, "n_query n_selected n_times"]
    times: Int[Tensor, " n_times"]
    train_ids: Int[Tensor, " n_selected"]
    query_ids: Int[Tensor, " n_query"]
    per: Period
    method: str
    provenance: Mapping[str, str] = field(default_factory=dict)

    def total(self) -> Float[Tensor, "n_query n_selected"]:
        """Return the sums over time: the samples' scores."""
        return self.values.sum(dim=2)

    def plot(self, query: int = 0, axes: Axes | None = None) -> Axes:
        """Draw how the samples' contributions to one query add up (needs ``matplotlib``).

        Args:
            query: Which query.
            axes: Where to draw; a new figure by default.
        """
        if axes is None:
            with needs("plots"):
                from matplotlib import pyplot

            axes = pyplot.figure(figsize=(7, 4), layout="constrained").add_subplot()
        if not 0 <= query < len(self.values):
            raise ValueError(
                f"`query` is {query}; expected a place from 0 to {len(self.values) - 1}."
            )
        sums = self.values[query].cumsum(dim=1)
        marker = "o" if len(self.times) == 1 else ""  # a line of one point cannot be seen
        for sample, line in zip(self.train_ids.tolist(), sums, strict=True):
            axes.plot(
                self.times.numpy(),
                line.numpy(),
                label=str(sample),
                drawstyle="steps-post",
                marker=marker,
            )
        axes.locator_params(axis="x", integer=True)  # there is no half a step
        axes.axhline(0, color="0.7", linewidth=0.8, zorder=0)
        axes.set(xlabel=self.per, ylabel="contribution so far", title=f"query {query}")
        axes.legend(title="sample", frameon=False)
        return axes

    def save(self, path: str | Path) -> None:
        """Write the trajectory to a NumPy ``.npz`` file."""
        save_arrays(path, self, _FIELDS)

    @classmethod
    def load(cls, path: str | Path) -> Trajectory:
        """Read a trajectory written by :meth:`save`."""
        return cls(**load_arrays(path, _FIELDS))

    def __repr__(self) -> str:
        """Show the shape and the method."""
        n_query, n_selected, n_times = self.values.shape
        times = f"{n_times:,} {self.per}{'s' * (n_times != 1)}"
        return f"Trajectory of {n_selected} samples over {times}, {n_query} queries, {self.method}"


_WHOLE = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_FIELDS = ("values", "times", "train_ids", "query_ids", "per")


def contributions(
    run: Store,
    queries: Float[Tensor, "n_query k"],
    train_ids: Int[Tensor, " n_selected"] | Sequence[int],
    method: Attributor,
    *,
    per: Period = "step",
    progress: bool = True,
) -> Trajectory:
    """Say what some samples did for each query at each time of the training.

    Args:
        run: The recorded training.
        queries: Gradient sketches of the queries' losses, shape ``(n_query, k)``.
        train_ids: Which samples.
        method: How to attribute.
        per: Whether to add up steps to epochs.
        progress: Show a progress bar.

    Raises:
        ValueError: If one of the samples is not in the training set.
    """
    require_choice("per", per, Period)
    method.require(run)
    chosen = chosen_ids(run, train_ids)
    terms: dict[int, Tensor] = {}
    visits = queries.new_zeros(len(chosen), 1)
    pairs: Any = method.visit_scores(MovedRun(run, queries), queries)
    for step, scores in tqdm(
        pairs, total=len(run), desc="trajectory", unit="step", leave=False, disable=not progress
    ):
        selected = (step.sample_ids[None, :] == chosen[:, None]).to(queries)  # (n_selected, n)
        visits += selected.sum(dim=1, keepdim=True)
        time = step.index if per == "step" else step.epoch
        term = selected @ scores  # (n_selected, n_query)
        terms[time] = terms[time] + term if time in terms else term
    times = sorted(terms)
    values = torch.stack([method.combine(terms[time], visits).mT for time in times], dim=2)
    return Trajectory(
        values=values.cpu(),
        times=torch.tensor(times),
        train_ids=chosen,
        query_ids=torch.arange(len(queries)),
        per=per,
        method=repr(method),
        provenance=provenance_of(run),
    )


def chosen_ids(
    run: Store, train_ids: Int[Tensor, " n_selected"] | Sequence[int]
) -> Int[Tensor, " n_selected"]:
    """Return ids of training samples as a tensor.

    Raises:
        ValueError: If they are no whole numbers, or one is not in the training set.
    """
    given, known = torch.as_tensor(train_ids), run.train_ids()
    if given.ndim != 1 or given.dtype not in _WHOLE:
        raise ValueError(
            f"`train_ids` is {train_ids!r}; expected a list of whole numbers, ids of training "
            "samples, such as `scores.proponents(3).ids[0]`."
        )
    chosen = given.to(torch.int64)
    strangers = chosen[~torch.isin(chosen, known)]
    if len(strangers):
        raise ValueError(
            f"Sample {int(strangers[0])} is not in the training set of the run; expected some of "
            f"the {len(known)} ids of `run.train_ids()`."
        )
    return chosen
