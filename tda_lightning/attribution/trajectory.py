r"""Trajectory: when in the training did a sample help or hurt?

A score is a sum over steps. Here are its terms, for some samples, per step or per epoch,

.. math:: s(q, i) = \sum_t c_{q, i, t}, \qquad
   c_{q, i, t} = \langle d_q^{(t)}, g_i^{(t)} \rangle \; [i \in B_t]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from tda_lightning.attribution.attributor import Attributor
from tda_lightning.attribution.moved import MovedRun
from tda_lightning.stores import Store

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
    """

    values: Float[Tensor, "n_query n_selected n_times"]
    times: Int[Tensor, " n_times"]
    train_ids: Int[Tensor, " n_selected"]
    query_ids: Int[Tensor, " n_query"]
    per: Literal["step", "epoch"]
    method: str

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
            from matplotlib import pyplot

            axes = pyplot.figure(figsize=(7, 4), layout="constrained").add_subplot()
        sums = self.values[query].cumsum(dim=1)
        for sample, line in zip(self.train_ids.tolist(), sums, strict=True):
            axes.plot(self.times.numpy(), line.numpy(), label=str(sample), drawstyle="steps-post")
        axes.axhline(0, color="0.7", linewidth=0.8, zorder=0)
        axes.set(xlabel=self.per, ylabel="contribution so far", title=f"query {query}")
        axes.legend(title="sample", frameon=False)
        return axes

    def __repr__(self) -> str:
        """Show the shape and the method."""
        n_query, n_selected, n_times = self.values.shape
        times = f"{n_times:,} {self.per}{'s' * (n_times != 1)}"
        return f"Trajectory of {n_selected} samples over {times}, {n_query} queries, {self.method}"


def contributions(
    run: Store,
    queries: Float[Tensor, "n_query k"],
    train_ids: Int[Tensor, " n_selected"] | Sequence[int],
    method: Attributor,
    *,
    per: Literal["step", "epoch"] = "step",
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
    chosen = torch.as_tensor(train_ids, dtype=torch.int64)
    _require(chosen, run.train_ids())
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
    )


def _require(chosen: Int[Tensor, " n"], known: Int[Tensor, " n_train"]) -> None:
    strangers = chosen[~torch.isin(chosen, known)]
    if len(strangers):
        raise ValueError(
            f"Sample {int(strangers[0])} is not in the training set of the run; expected some of "
            f"the {len(known)} ids of `run.train_ids()`."
        )
