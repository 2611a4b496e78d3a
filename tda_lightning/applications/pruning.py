r"""Pruning: keep the most important samples, or a weighted coreset that stands for all of them.

:func:`prune` keeps the samples with the highest importance. :func:`coreset` keeps samples whose
gradients are close to those of all others, by facility location,

.. math:: \max_{S,\, |S| = n} \sum_i \max_{j \in S} \cos(\bar g_i, \bar g_j)

greedily, with the number of samples that :math:`j` stands for as its weight: Mirzasoleiman et al.
(2020), "Coresets for Data-efficient Training of Machine Learning Models".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tda_lightning.applications.groups import Groups, number_groups
from tda_lightning.applications.importance import EL2N, Importance
from tda_lightning.applications.mislabel_count import notes_on_selected
from tda_lightning.applications.notes import Note
from tda_lightning.attribution.attributor import Totals
from tda_lightning.attribution.linalg import unit_rows
from tda_lightning.attribution.steps import unweighted
from tda_lightning.results.html_tables import ShownInNotebooks, with_notes
from tda_lightning.results.optional import DataFrame
from tda_lightning.results.sample_scores import SampleScores
from tda_lightning.results.tables import frame_by_sample
from tda_lightning.stores import Store
from tda_lightning.stores.opening import Run, open_run


@dataclass(frozen=True)
class Selection(ShownInNotebooks):
    """Some training samples, the most important first.

    ``Subset(dataset, selection.ids)`` is the selected data. With weights that differ, draw from it
    by ``WeightedRandomSampler(selection.weights, len(selection.ids))``.

    Attributes:
        ids: Ids of the selected samples: indices into the dataset below any ``Subset``; shape
            ``(n,)``.
        weights: Weight of each selected sample, 1 on average; shape ``(n,)``.
        scores: The score by which each was selected, shape ``(n,)``.
        n_train: Number of samples to select from.
        method: How the samples were selected.
        notes: What limits the answer, and what to do about it.
    """

    ids: Int[Tensor, " n"]
    weights: Float[Tensor, " n"]
    scores: Float[Tensor, " n"]
    n_train: int
    method: str
    notes: tuple[Note, ...] = ()

    def to_pandas(self) -> DataFrame:
        """Return a data frame with the weight and the score of each sample, indexed by its id."""
        return frame_by_sample(self.ids, {"weight": self.weights, "score": self.scores})

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        pairs = zip(self.ids[:5].tolist(), self.scores[:5].tolist(), strict=True)
        first = ", ".join(f"{sample_id} ({score:.3g})" for sample_id, score in pairs)
        more = ", ..." if len(self.ids) > 5 else ""
        lines = [
            f"Selection of {len(self.ids):,} of {self.n_train:,} samples by {self.method}",
            f"  first: {first}{more}",
        ]
        if len(self.weights) and float(self.weights.min()) != float(self.weights.max()):
            low, high = float(self.weights.min()), float(self.weights.max())
            lines.append(f"  weights from {low:.3g} to {high:.3g}")
        return with_notes(lines, self.notes)


def prune(
    run: Run,
    keep: float = 0.5,
    *,
    importance: Importance | SampleScores = EL2N(),
    balance: Groups | None = None,
) -> Selection:
    """Keep the training samples with the highest importance.

    Args:
        run: The recorded training: its folder or a store.
        keep: Share of the samples to keep.
        importance: How to score the samples, or their scores.
        balance: Labels of the dataset, so that each class keeps the same share: the class of the
            sample with id ``i`` is ``balance[i]``. By default, classes do not count.

    Returns:
        The kept samples, the most important first, all with weight 1. Samples that were never drawn
        come last, with a score of minus infinity.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If an argument is invalid, or the run does not hold what ``importance`` needs.
    """
    store = open_run(run)
    scores = importance.scores(store) if isinstance(importance, Importance) else importance
    ids, values = scores.train_ids, scores.values
    if values.isnan().any():
        raise ValueError("`importance` holds NaN, which has no rank; expected numbers only.")
    if isinstance(importance, Importance):
        # Nothing is known of a sample that was never drawn: it is neither easy nor hard.
        values = values.masked_fill(~torch.isin(ids, store.visited_ids()), -torch.inf)
    positions = _top_of_each_group(ids, values, _count_of(keep, len(ids)), balance)
    notes = notes_on_selected(store, ids[positions])
    return Selection(
        ids=ids[positions],
        weights=torch.ones(len(positions)),
        scores=values[positions],
        n_train=len(ids),
        method=scores.method,
        notes=(*notes, *notes_on_unseen(store, ids[positions])),
    )


def _top_of_each_group(
    ids: Int[Tensor, " n_train"],
    values: Float[Tensor, " n_train"],
    n: int,
    balance: Groups | None,
) -> Int[Tensor, " n"]:
    chosen = torch.cat(
        [
            positions[values[positions].topk(count).indices]
            for positions, count in _groups(ids, balance, n)
        ]
    )
    return chosen[values[chosen].argsort(descending=True, stable=True)]


def notes_on_unseen(run: Store, ids: Int[Tensor, " n"]) -> tuple[Note, ...]:
    """Return a note if samples of a run were never drawn, and how many of them are selected."""
    unseen = ~torch.isin(run.train_ids(), run.visited_ids())
    if not unseen.any():
        return ()
    selected = int(torch.isin(ids, run.train_ids()[unseen]).sum())
    return (
        Note(
            f"{int(unseen.sum()):,} samples were never drawn, so nothing is known of them. They "
            f"come last: {selected:,} of them are selected.",
        ),
    )


def coreset(run: Run, keep: float = 0.1, *, balance: Groups | None = None) -> Selection:
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
    parts = []
    for positions, count in _groups(ids, balance, _count_of(keep, len(ids))):
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
        notes=(*notes_on_selected(store, ids[at[order]]), *notes_on_unseen(store, ids[at[order]])),
    )


def _groups(
    ids: Int[Tensor, " n_train"], balance: Groups | None, n: int
) -> list[tuple[Int[Tensor, " _"], int]]:
    """Return the positions of the samples of each class, and how many of them to keep, if any.

    The class of the sample with id ``i`` is ``balance[i]``; with ``None``, there is only one.
    """
    if balance is None:
        return [(torch.arange(len(ids)), n)]
    names, labels = number_groups(balance, len(balance), "balance")
    has_fractions = any(isinstance(name, float) for name in names)
    if len(labels) <= int(ids.max()) or has_fractions:
        kind = "fractions" if has_fractions else f"{len(labels)} entries"
        raise ValueError(
            f"`balance` has {kind}; expected a whole number or a name for every id up to "
            f"{int(ids.max())}, since `balance[i]` is the class of sample `i`. Pass the labels of "
            "the whole dataset."
        )
    classes = labels[ids]
    groups = [(classes == label).nonzero()[:, 0] for label in torch.unique(classes)]
    counts = quotas(list(map(len, groups)), n)
    return [(group, count) for group, count in zip(groups, counts, strict=True) if count]


def quotas(sizes: Sequence[int], n: int) -> list[int]:
    """Divide ``n`` over groups in proportion to their sizes, by largest remainders.

    >>> quotas([5, 3, 3], 4)
    [2, 1, 1]
    """
    total = sum(sizes)
    shares = [size * n / total for size in sizes]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(sizes)), key=lambda at: counts[at] - shares[at])
    for at in by_remainder[: n - sum(counts)]:
        counts[at] += 1
    return counts


def _count_of(keep: float, n_train: int) -> int:
    """Return the number of samples in a share of them, if it is valid."""
    valid = isinstance(keep, float | int) and not isinstance(keep, bool) and 0 < keep <= 1
    if not valid or round(keep * n_train) < 1:
        raise ValueError(
            f"`keep` is {keep!r}; expected a share of the {n_train:,} samples, above 0 and up to "
            "1, with at least one sample."
        )
    return round(keep * n_train)


def mean_rows(run: Store) -> tuple[Int[Tensor, " n_train"], Float[Tensor, "n_train k"]]:
    """Return the ids of all training samples, and the mean gradient of each over its visits."""
    run.recipe.require_rows()
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
    nearest = similarity[chosen].argmax(dim=0)
    sizes = torch.bincount(nearest, minlength=count).to(similarity)
    return torch.tensor(chosen), torch.stack(gains), sizes
