"""Charts as plain data, drawn by Bokeh if it is installed, and otherwise by matplotlib as SVG."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch

from tda_lightning.applications.retraining.removal import RANDOM, RemovalCurve
from tda_lightning.report.evidence.gathering import TRAJECTORY_SAMPLES, Evidence
from tda_lightning.results import Trajectory

Role = Literal["helped", "harmed", "plain", "muted"]
MAX_POINTS = 400


@dataclass(frozen=True)
class Line:
    """One line of a chart; its role determines its colour."""

    x: list[float]
    y: list[float]
    role: Role
    name: str


@dataclass(frozen=True)
class ChartFrame:
    """What charts of all kinds have.

    Attributes:
        name: Identifier in the page.
        description: One sentence for readers who cannot see it.
        x_label: Label of the horizontal axis.
        y_label: Label of the vertical axis.
    """

    name: str
    description: str
    x_label: str
    y_label: str


@dataclass(frozen=True)
class LineChart(ChartFrame):
    """Lines over a linear axis; ``lowest`` is its lower end, that of the lines by default."""

    lines: tuple[Line, ...]
    lowest: float | None = None


@dataclass(frozen=True)
class Histogram(ChartFrame):
    """Counts over a logarithmic axis; there is one more edge of bins than counts."""

    edges: list[float]
    counts: list[float]

    @property
    def outline(self) -> Line:
        """The upper edge of the bars, from zero to zero."""
        x = [edge for edge in self.edges for _ in range(2)]
        y = [0.0, *(count for count in self.counts for _ in range(2)), 0.0]
        return Line(x, y, "plain", self.y_label)


Chart = LineChart | Histogram


def charts(evidence: Evidence) -> list[Chart]:
    """Return the charts of a report."""
    return [
        _trajectory_chart(evidence.trajectory),
        *_schedule_charts(evidence),
        _influence_chart(evidence),
        *([] if evidence.removal is None else [_removal_chart(evidence.removal)]),
    ]


def _trajectory_chart(trajectory: Trajectory) -> LineChart:
    """Return the cumulative contributions of the samples that matter most to the worst query."""
    return LineChart(
        name="trajectory",
        description=(
            "Contribution so far of the training samples that matter most to the chosen query. "
            "Blue lines rise: these samples helped. Red lines fall: these harmed."
        ),
        x_label=trajectory.per,
        y_label="contribution so far",
        lines=tuple(trajectory_lines(trajectory, 0)),
    )


def trajectory_lines(trajectory: Trajectory, row: int) -> list[Line]:
    """Return one line per sample: the most helpful and the most harmful ones of a query."""
    totals = trajectory.values[row].sum(dim=1)
    k = min(TRAJECTORY_SAMPLES, len(totals))
    positions = [*totals.topk(k).indices.tolist(), *totals.topk(k, largest=False).indices.tolist()]
    stride = -(-len(trajectory.times) // MAX_POINTS)
    times = [float(time) for time in trajectory.times[::stride].tolist()]
    sums = trajectory.values[row].double().cumsum(dim=1)[:, ::stride]
    return [
        Line(
            x=times,
            y=[_short(value) for value in sums[position].tolist()],
            role="helped" if totals[position] > 0 else "harmed",
            name=f"number {int(trajectory.train_ids[position])}",
        )
        for position in dict.fromkeys(positions)
    ]


def _schedule_charts(evidence: Evidence) -> list[Chart]:
    schedule = evidence.schedule
    stride = -(-len(schedule.steps) // MAX_POINTS)
    losses = [_loss_chart(schedule.losses)] if len(schedule.losses) > 1 else []
    steps = schedule.steps[::stride]
    rates, gradients = schedule.rates[::stride], schedule.gradients[::stride]
    of_rates = (
        f"Learning rate over the training: {rates[0]:.3g} at first, {max(rates):.3g} at most, "
        f"{rates[-1]:.3g} at the end."
    )
    if len(set(rates)) == 1:
        of_rates = f"The learning rate stayed at {rates[0]:.3g}."
    of_gradients = (
        f"Size of the gradient over the training: {gradients[0]:.3g} at first, "
        f"{gradients[-1]:.3g} at the end."
    )
    rate_of, norm_of = (dict(zip(steps, values, strict=True)) for values in (rates, gradients))
    return [
        *losses,
        _over_steps("rates", of_rates, "learning rate", rate_of),
        _over_steps("gradients", of_gradients, "size of the gradient", norm_of),
    ]


def _loss_chart(losses: dict[int, float]) -> LineChart:
    values = list(losses.values())
    description = (
        f"Mean loss of the queries at {len(values)} snapshots of the weights: {values[0]:.3g} "
        f"at first, {min(values):.3g} at best, {values[-1]:.3g} at the last."
    )
    return _over_steps("losses", description, "loss of the queries", losses)


def _over_steps(name: str, description: str, label: str, values: dict[int, float]) -> LineChart:
    """Return a chart of one quantity, from zero, by the index of the step."""
    y = [_short(value) for value in values.values()]
    line = Line([float(step) for step in values], y, "plain", label)
    return LineChart(name, description, "step", label, (line,), lowest=0.0)


def _influence_chart(evidence: Evidence) -> Histogram:
    values = evidence.influence.values.double()
    positive = values[values > 0]
    logs = positive.log10() if len(positive) else torch.zeros(1, dtype=torch.float64)
    low, high = float(logs.min()), float(logs.max())
    high = high if high > low else low + 1
    n_bins = 40
    counts = torch.histc(logs, n_bins, low, high)
    edges = torch.linspace(low, high, n_bins + 1, dtype=torch.float64)
    return Histogram(
        name="influence",
        description=(
            f"Number of training samples by self-influence, on a logarithmic axis from "
            f"{10**low:.2g} to {10**high:.2g}. Samples far to the right deserve a look."
        ),
        x_label="self-influence",
        y_label="training samples",
        edges=[_short(10**edge) for edge in edges.tolist()],
        counts=counts.tolist(),
    )


def _removal_chart(curve: RemovalCurve) -> LineChart:
    positions = [float(size) for size in curve.removed]
    roles: dict[str, Role] = dict.fromkeys(curve.changes, "plain")
    roles |= {RANDOM: "muted"}
    ends = "; ".join(f"{name}: {values[-1]:+.3g}" for name, values in curve.changes.items())
    return LineChart(
        name="removal",
        description=(
            "Change of the mean loss of the queries after training without the most helpful "
            f"training samples (blue) and without random ones (grey). At the end, {ends}."
        ),
        x_label="removed training samples",
        y_label="change of the loss after retraining",
        lines=tuple(
            Line(positions, [_short(value) for value in values], roles[name], name)
            for name, values in curve.changes.items()
        ),
    )


def has_bokeh() -> bool:
    """Return whether charts are drawn by Bokeh."""
    return find_spec("bokeh") is not None


def _short(value: Any) -> float:
    return float(f"{value:.5g}")
