r"""Trajectory: when in the training did a sample help or hurt?

A score is a sum over steps. This module computes its terms for selected samples, per step or per
epoch,

.. math:: s(q, i) = \sum_t c_{q, i, t}, \qquad
   c_{q, i, t} = \langle d_q^{(t)}, g_i^{(t)} \rangle \; [i \in B_t]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tda_lightning.attribution.attributor import Attributor, provenance_of, require_finite_totals
from tda_lightning.attribution.averaged import Averaged
from tda_lightning.attribution.steps import DeviceView
from tda_lightning.results.progress import progress_bar
from tda_lightning.results.trajectory import Period, Trajectory
from tda_lightning.stores import Store


def contributions(
    run: Store,
    queries: Float[Tensor, "n_query k"],
    selected_ids: Int[Tensor, " n_selected"],
    method: Attributor,
    *,
    per: Period = "step",
    progress: bool = True,
) -> Trajectory:
    """Compute the contributions of selected samples to each query's score, over the training.

    ``per`` is the period of each sum: a step or an epoch.
    """
    view = DeviceView(run, queries)
    terms = _terms(view, queries, selected_ids, method, per, progress)
    values = torch.stack(list(terms.values()), dim=2)
    require_finite_totals(values, view, repr(method))
    return Trajectory(
        values=values.cpu(),
        times=torch.tensor(list(terms)),
        train_ids=selected_ids,
        query_ids=torch.arange(len(queries)),
        per=per,
        method=repr(method),
        provenance={**provenance_of(run), **view.provenance()},
    )


def _terms(
    run: Store,
    queries: Float[Tensor, "n_query k"],
    selected_ids: Int[Tensor, " n_selected"],
    method: Attributor,
    per: Period,
    progress: bool,
) -> dict[int, Tensor]:
    """Return the contributions to each period, in order; shapes ``(n_query, n_selected)``."""
    if isinstance(method, Averaged):
        parts = method.with_rows(run, queries)
        return _mean([_terms(run, rows, selected_ids, m, per, progress) for m, rows in parts])
    sums: dict[int, Tensor] = {}
    visits = queries.new_zeros(len(selected_ids), 1)
    pairs: Any = method.visit_scores(run, queries)
    steps = progress_bar(pairs, "trajectory", "step", shown=progress, total=len(run))
    for step, scores in steps:
        is_visit = (step.sample_ids[None, :] == selected_ids[:, None]).to(queries)
        visits += is_visit.sum(dim=1, keepdim=True)
        time = step.index if per == "step" else step.epoch
        c = is_visit @ scores  # (n_selected, n_query)
        sums[time] = sums[time] + c if time in sums else c
    return {time: method.combine(sums[time], visits).mT for time in sorted(sums)}


def _mean(parts: Sequence[dict[int, Tensor]]) -> dict[int, Tensor]:
    """Return the mean over methods; one that skips a period contributes zero to it."""
    times = sorted({time for terms in parts for time in terms})
    present = [[terms[time] for terms in parts if time in terms] for time in times]
    return {t: torch.stack(c).sum(dim=0) / len(parts) for t, c in zip(times, present, strict=True)}
