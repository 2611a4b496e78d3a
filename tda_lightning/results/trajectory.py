"""Trajectory: contributions of training samples per step or epoch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from jaxtyping import Float, Int
from torch import Tensor

from tda_lightning.results.html_tables import ShownInNotebooks
from tda_lightning.results.npz import SavedResult
from tda_lightning.results.optional import DataFrame, import_pandas, needs
from tda_lightning.results.tables import data_frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes


Period = Literal["step", "epoch"]

MAX_NAMED = 10  # lines in a legend, each with a colour of its own


@dataclass(frozen=True)
class Trajectory(SavedResult, ShownInNotebooks):
    """Contributions of some training samples to each query, over the training.

    Attributes:
        values: Contributions, shape ``(n_query, n_selected, n_times)``.
        times: Step indices or epochs, ascending, shape ``(n_times,)``.
        train_ids: Ids of the selected training samples, shape ``(n_selected,)``.
        query_ids: Positions of the queries, shape ``(n_query,)``.
        per: Whether the times are steps or epochs.
        method: The method and its hyper-parameters.
        provenance: Model, optimizer, steps covered, sketch and weights behind the values.
    """

    values: Float[Tensor, "n_query n_selected n_times"]
    times: Int[Tensor, " n_times"]
    train_ids: Int[Tensor, " n_selected"]
    query_ids: Int[Tensor, " n_query"]
    per: Period
    method: str
    provenance: Mapping[str, str] = field(default_factory=dict)
    _axes: ClassVar = ("query_ids", "train_ids", "times")
    _texts: ClassVar = ("per",)

    def total(self) -> Float[Tensor, "n_query n_selected"]:
        """Return the sums over time: the samples' scores."""
        return self.values.sum(dim=2)

    def to_pandas(self) -> DataFrame:
        """Return a tidy data frame.

        Its columns are ``query``, ``train_id``, ``step`` or ``epoch``, and ``contribution``.
        """
        n_query, n_selected, n_times = self.values.shape
        columns = {
            "query": self.query_ids.repeat_interleave(n_selected * n_times).numpy(),
            "train_id": self.train_ids.repeat_interleave(n_times).repeat(n_query).numpy(),
            str(self.per): self.times.repeat(n_query * n_selected).numpy(),
            "contribution": self.values.flatten().numpy(),
        }
        return data_frame(columns)

    def _shown_first(self) -> DataFrame:
        """Return the sums over time, with a row per query and a column per training sample."""
        pd = import_pandas()
        columns = [f"sample {sample}" for sample in self.train_ids.tolist()]
        index = pd.Index(self.query_ids.numpy(), name="query")
        return pd.DataFrame(self.total().numpy(), index=index, columns=columns)

    def plot(self, query: int = 0, axes: Axes | None = None) -> Axes:
        """Plot the samples' cumulative contributions to one query (needs ``matplotlib``).

        More than ten samples are drawn without a legend: their colours repeat.

        Args:
            query: Position of the query.
            axes: Axes to draw on; those of a new figure by default.
        """
        if axes is None:
            with needs("plots"):
                from matplotlib import pyplot

            axes = pyplot.figure(figsize=(7, 4), layout="constrained").add_subplot()
        if not 0 <= query < len(self.values):
            raise ValueError(
                f"`query` is {query}; expected a position from 0 to {len(self.values) - 1}."
            )
        sums = self.values[query].cumsum(dim=1)
        marker = "o" if len(self.times) == 1 else ""  # a line of one point is invisible
        for sample, line in zip(self.train_ids.tolist(), sums, strict=True):
            axes.plot(
                self.times.numpy(),
                line.numpy(),
                label=str(sample),
                drawstyle="steps-post",
                marker=marker,
            )
        axes.locator_params(axis="x", integer=True)  # no ticks at fractions of a step
        axes.axhline(0, color="0.7", linewidth=0.8, zorder=0)
        axes.set(xlabel=self.per, ylabel="contribution so far", title=f"query {query}")
        if len(self.train_ids) <= MAX_NAMED:
            axes.legend(title="sample", frameon=False)
        return axes

    def __repr__(self) -> str:
        n_query, n_selected, n_times = self.values.shape
        times = f"{n_times:,} {self.per}{'s' * (n_times != 1)}"
        return f"Trajectory of {n_selected} samples over {times}, {n_query} queries, {self.method}"
