"""Mislabeled: the samples whose labels are likely wrong, with the reasons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from tda_lightning.applications.notes import Note
from tda_lightning.applications.retraining.removal import RemovalCurve
from tda_lightning.results.html_tables import ShownInNotebooks, with_notes
from tda_lightning.results.optional import DataFrame
from tda_lightning.results.tables import frame_by_sample


@dataclass(frozen=True)
class Labelled:
    """Given and predicted label of each training sample, the latter under the final model."""

    given: Int[Tensor, " n_train"]
    predicted: Int[Tensor, " n_train"]


@dataclass(frozen=True)
class Mislabeled(ShownInNotebooks):
    """Suspicious training samples.

    Attributes:
        train_ids: Ids of the training samples, shape ``(n_train,)``.
        label_scores: Quality of each label from 0 to 1; low is bad, shape ``(n_train,)``.
        witnesses: Suspicion of each sample by each witness; the first decides.
        estimated_number: Estimated number of wrong labels.
        is_clear: Whether the scores fall into two groups. If not, the number is a guess.
        flagged_number: Number of flagged samples.
        labelled: Given and predicted labels, if a model and a loader were passed.
        notes: What limits the answer, and what to do about it.
        removal: What changes after retraining without the flagged samples, if that was asked for.
    """

    train_ids: Int64[Tensor, " n_train"]
    label_scores: Float[Tensor, " n_train"]
    witnesses: Mapping[str, Float[Tensor, " n_train"]]
    estimated_number: int
    is_clear: bool
    flagged_number: int
    labelled: Labelled | None
    notes: tuple[Note, ...]
    removal: RemovalCurve | None = None

    @property
    def ids(self) -> Int64[Tensor, " n_flagged"]:
        """Ids of the flagged samples, worst first."""
        return self.train_ids[self._order()[: self.flagged_number]]

    @property
    def scores(self) -> Float[Tensor, " n_flagged"]:
        """Label scores of the flagged samples, lowest first."""
        return self.label_scores[self._order()[: self.flagged_number]]

    def is_flagged(self) -> Bool[Tensor, " n_train"]:
        """Return whether each training sample is flagged."""
        return torch.isin(self.train_ids, self.ids)

    def agreement(self) -> Int64[Tensor, " n_train"]:
        """Return by how many witnesses each sample is among the most suspicious.

        Each witness names as many samples as are flagged.
        """
        votes = torch.zeros(len(self.train_ids), dtype=torch.int64)
        for suspicion in self.witnesses.values():
            votes[suspicion.topk(self.flagged_number).indices] += 1
        return votes

    def to_pandas(self) -> DataFrame:
        """Return a data frame of all samples with cleanlab's columns and the witnesses."""
        columns: dict[str, Tensor] = {
            "is_label_issue": self.is_flagged(),
            "label_score": self.label_scores,
        }
        if self.labelled is not None:
            columns["given_label"] = self.labelled.given
            columns["predicted_label"] = self.labelled.predicted
        columns["agreement"] = self.agreement()
        columns.update(self.witnesses)
        return frame_by_sample(self.train_ids, columns)

    def _shown_first(self) -> DataFrame:
        return self.to_pandas().loc[self.ids.tolist()]

    def __repr__(self) -> str:
        n, k = len(self.train_ids), min(5, self.flagged_number)
        share = self.estimated_number / max(n, 1)
        worst = [f"{int(i)} ({s:.2g})" for i, s in zip(self.ids[:k], self.scores[:k], strict=True)]
        votes, names = self.agreement()[self.is_flagged()], ", ".join(self.witnesses)
        unanimous = int((votes == len(self.witnesses)).sum())
        clear = f"about {self.estimated_number:,} of {n:,} labels are wrong ({share:.1%})"
        number = "their number is unknown" if self.flagged_number else "none is flagged"
        unclear = f"no clear group of wrong labels among {n:,}; {number}"
        lines = [
            f"Mislabeled: {clear if self.is_clear else unclear}",
            f"  worst, with label score: {', '.join(worst) or 'none'}",
            f"  witnesses: {names}; all agree on {unanimous:,} of {self.flagged_number:,} flagged",
        ]
        if self.removal is not None:
            flagged, random = (values[-1] for values in self.removal.changes.values())
            lines.append(
                f"  retrained without them: the measured mean changes by {flagged:+.3g}, without "
                f"as many random samples by {random:+.3g}"
            )
        return with_notes(lines, self.notes)

    def _order(self) -> Int64[Tensor, " n_train"]:
        suspicion = next(iter(self.witnesses.values()))
        return suspicion.argsort(descending=True, stable=True)
