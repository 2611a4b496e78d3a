"""Selection: some training samples with weights, the result of pruning and of selecting data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tda_lightning.applications.notes import Note
from tda_lightning.results.html_tables import ShownInNotebooks, with_notes
from tda_lightning.results.optional import DataFrame
from tda_lightning.results.tables import frame_by_sample


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


Labels = Sequence[int] | Int[np.ndarray, " n_all"] | Int[Tensor, " n_all"]


def groups_of(ids: Int[Tensor, " n"], balance: Labels | None) -> list[Int[Tensor, " _"]]:
    """Return the positions of each group of samples.

    The label of the sample with id ``i`` is ``balance[i]``; with ``None``, there is one group.
    """
    if balance is None:
        return [torch.arange(len(ids))]
    labels = torch.as_tensor(balance)
    if labels.ndim != 1 or len(labels) <= int(ids.max()) or labels.is_floating_point():
        raise ValueError(
            f"`balance` has the shape {tuple(labels.shape)}; expected one whole number for every "
            f"id up to {int(ids.max())}, since `balance[i]` is the class of sample `i`. Pass the "
            "labels of the whole dataset."
        )
    classes = labels[ids]
    return [(classes == label).nonzero()[:, 0] for label in torch.unique(classes)]


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


def count_of(keep: float, n_train: int) -> int:
    """Return the number of samples in a share of them, if it is valid."""
    valid = isinstance(keep, float | int) and not isinstance(keep, bool) and 0 < keep <= 1
    if not valid or round(keep * n_train) < 1:
        raise ValueError(
            f"`keep` is {keep!r}; expected a share of the {n_train:,} samples, above 0 and up to "
            "1, with at least one sample."
        )
    return round(keep * n_train)
