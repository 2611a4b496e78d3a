r"""Pruning: keep the most important samples, or a weighted coreset that stands for all of them.

:func:`prune` keeps the samples with the highest importance. :func:`coreset` keeps samples whose
gradients are close to those of all others, by facility location,

.. math:: \max_{S,\, |S| = n} \sum_i \max_{j \in S} \cos(\bar g_i, \bar g_j)

greedily, with the number of samples that :math:`j` stands for as its weight: Mirzasoleiman et al.
(2020), "Coresets for Data-efficient Training of Machine Learning Models".
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tda_lightning.applications.importance import EL2N, Importance
from tda_lightning.applications.mislabel_count import notes_on_selected
from tda_lightning.applications.selection import Labels, Selection, count_of, groups_of, quotas
from tda_lightning.attribution.attributor import Totals
from tda_lightning.attribution.linalg import unit_rows
from tda_lightning.attribution.steps import unweighted
from tda_lightning.results.sample_scores import SampleScores
from tda_lightning.stores import Store
from tda_lightning.stores.opening import Run, open_run


def prune(
    run: Run,
    keep: float = 0.5,
    *,
    importance: Importance | SampleScores = EL2N(),
    balance: Labels | None = None,
) -> Selection:
    """Keep the training samples with the highest importance.

    Args:
        run: The recorded training: its folder or a store.
        keep: Share of the samples to keep.
        importance: How to score the samples, or their scores.
        balance: Labels of the dataset, so that each class keeps the same share: the class of the
            sample with id ``i`` is ``balance[i]``. By default, classes do not count.

    Returns:
        The kept samples, the most important first, all with weight 1.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If an argument is invalid, or the run does not hold what ``importance`` needs.
    """
    store = open_run(run)
    scores = importance.scores(store) if isinstance(importance, Importance) else importance
    n = count_of(keep, len(scores.train_ids))
    positions = _top_of_each_group(scores, n, balance)
    return Selection(
        ids=scores.train_ids[positions],
        weights=torch.ones(len(positions)),
        scores=scores.values[positions],
        n_train=len(scores.train_ids),
        method=scores.method,
        notes=notes_on_selected(store, scores.train_ids[positions]),
    )


def _top_of_each_group(scores: SampleScores, n: int, balance: Labels | None) -> Int[Tensor, " n"]:
    if scores.values.isnan().any():
        raise ValueError("`importance` holds NaN, which has no rank; expected numbers only.")
    groups = groups_of(scores.train_ids, balance)
    counts = quotas([len(positions) for positions in groups], n)
    chosen = torch.cat(
        [
            positions[scores.values[positions].topk(count).indices]
            for positions, count in zip(groups, counts, strict=True)
        ]
    )
    return chosen[scores.values[chosen].argsort(descending=True, stable=True)]


def coreset(run: Run, keep: float = 0.1, *, balance: Labels | None = None) -> Selection:
    """Keep a weighted subset whose gradients stand for those of all training samples.

    Memory: one row per sample, and the cosines of all pairs within a class.

    Args:
        run: The recorded training: its folder or a store.
        keep: Share of the samples to keep.
        balance: Labels of the dataset, so that samples only stand for others of their class: the
            class of the sample with id ``i`` is ``balance[i]``. By default, classes do not count.

    Returns:
        The kept samples, the most representative first. Scores are the gains in coverage. Weights
        are in proportion to the number of samples that each stands for, and 1 on average.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If an argument is invalid.
    """
    store = open_run(run)
    ids, rows = mean_rows(store)
    n = count_of(keep, len(ids))
    groups = groups_of(ids, balance)
    counts = quotas([len(positions) for positions in groups], n)
    parts = []
    for positions, count in zip(groups, counts, strict=True):
        units = unit_rows(rows[positions])
        chosen, gains, sizes = _facility_location(units @ units.mT, count)
        parts.append((positions[chosen], gains, sizes))
    at, gains, sizes = (torch.cat(part) for part in zip(*parts, strict=True))
    order = gains.argsort(descending=True, stable=True)
    return Selection(
        ids=ids[at[order]],
        weights=(sizes * (len(at) / len(ids)))[order],
        scores=gains[order],
        n_train=len(ids),
        method="facility location of gradients",
        notes=notes_on_selected(store, ids[at[order]]),
    )


def mean_rows(run: Store) -> tuple[Int[Tensor, " n_train"], Float[Tensor, "n_train k"]]:
    """Return the ids of all training samples, and the mean gradient of each over its visits."""
    like = torch.empty(0, dtype=run.recipe.torch_dtype)
    totals = Totals(run.train_ids(), run.recipe.dimension, like)
    for step in map(unweighted, run):
        totals.add_(step.sample_ids, step.sketch.to(like))
    return totals.train_ids, totals.means()


def _facility_location(
    similarity: Float[Tensor, "n n"], count: int
) -> tuple[Int[Tensor, " m"], Float[Tensor, " m"], Float[Tensor, " m"]]:
    """Return the greedy choice, its gains, and the number of samples that each stands for."""
    # A similarity of -1 is no worse than no representative at all.
    covered = torch.full_like(similarity[0], -1.0)
    chosen: list[int] = []
    gains = []
    for _ in range(count):
        gain = (similarity - covered).clamp_min(0).sum(dim=1)
        gain[chosen] = -torch.inf
        best = int(gain.argmax())
        chosen.append(best)
        gains.append(gain[best])
        covered = torch.maximum(covered, similarity[best])
    if not chosen:
        empty = similarity.new_zeros(0)
        return torch.empty(0, dtype=torch.int64), empty, empty
    nearest = similarity[chosen].argmax(dim=0)
    sizes = torch.bincount(nearest, minlength=count).to(similarity)
    return torch.tensor(chosen), torch.stack(gains), sizes
