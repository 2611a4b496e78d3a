r"""Selecting data for a target: the samples that lower the loss of some target data most.

Scores are those of an attribution method, reduced over the target's samples: Xia et al. (2024),
"LESS: Selecting Influential Data for Targeted Instruction Tuning"; Engstrom et al. (2024), "DsDm:
Model-Aware Dataset Selection with Datamodels". The default is LESS's: the maximum of the cosines of
gradients. In the benchmark, means of influence functions selected few classes, and were no better
than random samples (``docs/uses/select.md``). With a redundancy of :math:`\rho`, samples are
selected one by one, and the next one maximizes

.. math:: \frac{s_i}{\max_j |s_j|} - \rho \max_{j \in S} \cos(\bar g_i, \bar g_j)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tda_lightning.applications.mislabel_count import notes_on_selected
from tda_lightning.applications.pruning import Selection, mean_rows, notes_on_unseen
from tda_lightning.attribution import Attributor, GradientSimilarity, InfluenceFunction
from tda_lightning.attribution.attribute import attribute
from tda_lightning.attribution.dynamics.optimizer import Extent
from tda_lightning.attribution.influence import DAMPING_FACTOR
from tda_lightning.attribution.linalg import unit_rows
from tda_lightning.passes.targets import Loss, Target
from tda_lightning.results.ranking import require_rank
from tda_lightning.stores import Store
from tda_lightning.stores.arguments import require_choice, require_kind, require_not_negative
from tda_lightning.stores.opening import Run, open_run
from tda_lightning.stores.snapshots import Moment

Reduce = Literal["mean", "max"]


def select(
    run: Run,
    model: nn.Module,
    targets: Any,
    *,
    n: int,
    pool: Store | None = None,
    method: Attributor = GradientSimilarity(),
    reduce: Reduce = "max",
    redundancy: float = 0.0,
    target: Target = Loss(),
    at: Moment | None = None,
    progress: bool = True,
) -> Selection:
    """Select the samples that lower the loss of target data most.

    Args:
        run: The recorded training: its folder or a store.
        model: The trained LightningModule.
        targets: A batch of the target data, or a ``DataLoader`` of such batches.
        n: Number of samples to select.
        pool: Other data to select from, recorded by ``record(model, loader, like=run)``. By default
            the samples of the run.
        method: The attribution method.
        reduce: How to combine the scores of all target samples. The maximum selects for each of
            them, so that none is left out; the mean selects for those with the largest effects.
        redundancy: Weight of the similarity to the samples selected so far; 0 ignores it.
        target: See :func:`~tda_lightning.attribute`.
        at: See :func:`~tda_lightning.attribute`.
        progress: Show progress bars.

    Returns:
        The selected samples, the best first, all with weight 1.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If an argument is invalid, or the model or the data do not match the run.
    """
    require_choice("reduce", reduce, Reduce)
    require_not_negative("redundancy", redundancy)
    store = open_run(run)
    if pool is not None:
        require_kind("pool", pool, Store, "`record(model, loader, like=run)`")
    source = store if pool is None else pool
    chosen = method if pool is None else _for_pool(method, store)
    require_rank(n, len(source.train_ids()), "n")
    scores = attribute(
        source, model, targets, method=chosen, target=target, at=at, progress=progress
    )
    values = scores.values.mean(dim=0) if reduce == "mean" else scores.values.amax(dim=0)
    is_seen = torch.isin(scores.train_ids, source.visited_ids())
    positions = (
        values.masked_fill(~is_seen, -torch.inf).topk(n).indices
        if redundancy == 0
        else _spread(source, values, is_seen, n, redundancy)
    )
    ids = scores.train_ids[positions]
    labels = notes_on_selected(store, ids) if pool is None else ()
    return Selection(
        ids=ids,
        weights=torch.ones(n),
        scores=values[positions],
        n_train=len(values),
        method=f"{reduce} over {len(scores.values)} targets of {method!r}",
        notes=(*labels, *notes_on_unseen(source, ids)),
    )


def _for_pool(method: Attributor, run: Store) -> Attributor:
    """Return the method for data that was not trained on: curvature and damping from the run."""
    if not isinstance(method, InfluenceFunction):
        return method
    damping = method.damping
    if damping is None:
        damping = DAMPING_FACTOR / Extent.of(run).total_lr
    return replace(method, curvature_from=method.curvature_from or run, damping=damping)


def _spread(
    source: Store,
    values: Float[Tensor, " n_train"],
    is_seen: Bool[Tensor, " n_train"],
    n: int,
    redundancy: float,
) -> Int[Tensor, " n"]:
    """Return the greedy choice that penalizes similarity to the samples chosen so far."""
    _, rows = mean_rows(source)
    units = unit_rows(rows).to(values)
    gains = values / values.abs().max().clamp_min(torch.finfo(values.dtype).tiny)
    nearest = torch.zeros_like(gains)
    chosen: list[int] = []
    for _ in range(n):
        utility = torch.where(is_seen, gains - redundancy * nearest, -1e30)
        utility[chosen] = -torch.inf
        chosen.append(int(utility.argmax()))
        nearest = torch.maximum(nearest, units @ units[chosen[-1]])
    return torch.tensor(chosen)
