"""Curves and bars: self-influence, removal of training samples, and data modelling scores."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tda_lightning.results import SampleScores
from tda_lightning.results.optional import needs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_MARKERS = 30  # of a line; more would hide it


def plot_self_influence(
    influence: SampleScores,
    marked: Bool[Tensor, " n_train"] | None = None,
    *,
    axes: Axes | None = None,
) -> Axes:
    """Draw the distribution of self-influences on a logarithmic axis.

    Args:
        influence: Self-influence of each training sample.
        marked: Samples to draw apart, such as those with flipped labels, shape ``(n_train,)``.
        axes: Axes to draw on; those of a new figure by default.

    Raises:
        ValueError: If no self-influence is above zero, or ``marked`` has another shape.
    """
    values = influence.values.double()
    positive = values > 0
    if not positive.any():
        raise ValueError(
            "No self-influence is above zero; expected some, since the axis is logarithmic. Check "
            "the run by `tda-lightning audit`."
        )
    if marked is not None and marked.shape != values.shape:
        raise ValueError(
            f"`marked` has the shape {tuple(marked.shape)}; expected {tuple(values.shape)}, one "
            "value per training sample."
        )
    axes = _axes(axes)
    low, high = float(values[positive].min()), float(values.max())
    edges = np.geomspace(low, max(high, low * 1.001), 41)
    axes.hist(values[positive].numpy(), bins=edges.tolist(), color="tab:blue", alpha=0.5)
    if marked is not None:
        chosen = values[positive & marked].numpy()
        axes.hist(chosen, bins=edges.tolist(), color="tab:red", alpha=0.7, label="marked")
        axes.legend(frameon=False)
    axes.set_xscale("log")
    axes.locator_params(axis="y", integer=True)  # no ticks at fractions of a sample
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel="self-influence", ylabel="training samples")
    return axes


def plot_removal(
    removed: Sequence[int] | Sequence[float],
    changes: Mapping[str, Sequence[float]],
    *,
    axes: Axes | None = None,
) -> Axes:
    """Draw how a loss changes when training samples are removed and the model is trained again.

    Args:
        removed: Number or share of removed samples, ascending.
        changes: Changes of the loss by method, such as ``{"Unrolled": [...], "random": [...]}``;
            each as long as ``removed``.
        axes: Axes to draw on; those of a new figure by default.

    Raises:
        ValueError: If a method has another number of changes.
    """
    for name, values in changes.items():
        if len(values) != len(removed):
            raise ValueError(
                f"`changes[{name!r}]` has {len(values)} values; expected {len(removed)}, one for "
                "each entry of `removed`."
            )
    axes = _axes(axes)
    marker = "o" if len(removed) <= MAX_MARKERS else ""
    for name, values in changes.items():
        style, color = ("--", "0.5") if name == "random" else ("-", None)
        axes.plot(
            list(removed), list(values), style, color=color, marker=marker, markersize=4, label=name
        )
    axes.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel="removed training samples", ylabel="change of the loss after retraining")
    axes.legend(framealpha=0.8, edgecolor="none")  # lines behind a long name stay visible
    return axes


def plot_lds(
    by_method: Mapping[str, Float[Tensor, " n_query"]], *, axes: Axes | None = None
) -> Axes:
    """Draw the mean linear datamodeling score of each method, the best on top.

    Args:
        by_method: Score of each query by method, as
            :func:`~tda_lightning.metrics.lds.linear_datamodeling_score` returns them. NaN is left
            out of the means.
        axes: Axes to draw on; those of a new figure by default. Bars show 1.96 standard errors.

    Raises:
        ValueError: If a method has no score.
    """
    means, errors = {}, {}
    for name, scores in by_method.items():
        known = torch.as_tensor(scores).double()
        known = known[~known.isnan()]
        if len(known) == 0:
            raise ValueError(f"`by_method[{name!r}]` has no score; expected one per query.")
        means[name] = float(known.mean())
        errors[name] = 1.96 * float(known.std(correction=0)) / max(len(known) - 1, 1) ** 0.5
    names = sorted(means, key=means.__getitem__)
    labels = [textwrap.fill(name, 30) for name in names]
    lines = max((label.count("\n") + 1 for label in labels), default=1)
    axes = _axes(axes, height=max(4.0, 0.8 + (0.1 + 0.16 * lines) * len(labels)))
    widths, bars = [means[name] for name in names], [errors[name] for name in names]
    axes.barh(labels, widths, xerr=bars, color="tab:blue", alpha=0.7, height=0.6)
    axes.axvline(0, color="0.7", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel="linear datamodeling score, mean over the queries")
    return axes


def _axes(axes: Axes | None, height: float = 4.0) -> Axes:
    if axes is not None:
        return axes
    with needs("plots"):
        from matplotlib.figure import Figure

    return Figure(figsize=(7, height), layout="constrained").add_subplot()
