r"""Result of the ``ContributionTracker`` callback: contributions of training samples to probes.

.. math:: c_{q, i} = \sum_{t \,:\, i \in B_t}
   \eta_t \, \langle \nabla \ell_q(\theta_t), \, g_i^{(t)} \rangle

Wang et al. (2024), "Data Shapley in One Training Run", first order. The gradient of a probe is
taken at the weights of each step. TracIn at the final weights uses one gradient for all steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from tda_lightning.results.npz import SavedResult
from tda_lightning.results.optional import DataFrame
from tda_lightning.results.sample_groups import positions_of
from tda_lightning.results.scores import Scores
from tda_lightning.results.trajectory import Trajectory


@dataclass(frozen=True)
class Contributions(SavedResult):
    """How much each training sample lowered each probe's loss, period by period.

    Attributes:
        values: Decrease of the loss to first order, shape ``(n_times, n_probe, n_train)``.
        times: Epoch, or first step index, of each period, shape ``(n_times,)``.
        query_ids: Positions of the probes in the loader, shape ``(n_probe,)``.
        train_ids: Ids of the training samples, sorted, shape ``(n_train,)``.
        method: The callback and its settings.
        provenance: Model, optimizer, steps covered, sketch, weights, and the kind of period.
    """

    values: Float[Tensor, "n_times n_probe n_train"]
    times: Int[Tensor, " n_times"]
    query_ids: Int[Tensor, " n_probe"]
    train_ids: Int[Tensor, " n_train"]
    method: str
    provenance: Mapping[str, str] = field(default_factory=dict)
    _axes: ClassVar = ("times", "query_ids", "train_ids")

    def scores(self) -> Scores:
        """Return the sum over all periods, shape ``(n_probe, n_train)``."""
        return Scores(
            values=self.values.sum(dim=0),
            query_ids=self.query_ids,
            train_ids=self.train_ids,
            method=self.method,
            provenance=self.provenance,
        )

    def trajectory(self, train_ids: Int[Tensor, " n_selected"] | Sequence[int]) -> Trajectory:
        """Return the contributions of some training samples in each period.

        Args:
            train_ids: Ids of the training samples.

        Raises:
            ValueError: If the ids are not whole numbers, or one is not in the training set.
        """
        positions = positions_of(self.train_ids, train_ids)
        return Trajectory(
            values=self.values[:, :, positions].permute(1, 2, 0).contiguous(),
            times=self.times,
            train_ids=self.train_ids[positions],
            query_ids=self.query_ids,
            per="epoch" if self.provenance.get("period") == "epoch" else "step",
            method=self.method,
            provenance=self.provenance,
        )

    def to_pandas(self) -> DataFrame:
        """Return a tidy data frame of all periods: as many rows as ``values`` has entries.

        Its columns are ``query``, ``train_id``, ``step`` or ``epoch``, and ``contribution``.
        """
        return self.trajectory(self.train_ids).to_pandas()

    def _repr_html_(self) -> str:
        """Show the shape, and the sums over all periods, in notebooks."""
        return f"<p>{escape(repr(self))}</p>{self.scores()._repr_html_()}"

    def __repr__(self) -> str:
        n_times, n_probe, n_train = self.values.shape
        return (
            f"Contributions of {n_train:,} training samples to {n_probe:,} probes in {n_times:,} "
            f"periods, by {self.method}"
        )
