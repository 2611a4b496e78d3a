r"""Contributions: what a training added up to, live, for a fixed set of probes.

.. math:: c_{q, i} = \sum_{t \,:\, i \in B_t}
   \eta_t \, \langle \nabla \ell_q(\theta_t), \, g_i^{(t)} \rangle

Wang et al. (2024), "Data Shapley in One Training Run", first order. Unlike TracIn at the final
weights, the gradient of the probe is the one at the weights of each step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tda_lightning.results.npz import load_arrays, save_arrays
from tda_lightning.results.scores import Scores
from tda_lightning.results.trajectory import Trajectory
from tda_lightning.stores.durable import make_durable, partial_name

_FIELDS = ("values", "times", "query_ids", "train_ids")


@dataclass(frozen=True)
class Contributions:
    """How much each training sample lowered each probe's loss, period by period.

    Attributes:
        values: To first order, in units of the loss, shape ``(n_times, n_probe, n_train)``.
        times: Epoch, or first step index, of each period, shape ``(n_times,)``.
        query_ids: Places of the probes in the loader, shape ``(n_probe,)``.
        train_ids: Ids of the training samples, sorted, shape ``(n_train,)``.
        method: Who followed them.
        provenance: Model, optimizer, steps covered, sketch, weights, and what a period is.
    """

    values: Float[Tensor, "n_times n_probe n_train"]
    times: Int[Tensor, " n_times"]
    query_ids: Int[Tensor, " n_probe"]
    train_ids: Int[Tensor, " n_train"]
    method: str
    provenance: Mapping[str, str] = field(default_factory=dict)

    def scores(self) -> Scores:
        """Return the contributions of the whole training, shape ``(n_probe, n_train)``."""
        return Scores(
            values=self.values.sum(dim=0),
            query_ids=self.query_ids,
            train_ids=self.train_ids,
            method=self.method,
            provenance=self.provenance,
        )

    def trajectory(self, train_ids: Int[Tensor, " n_selected"] | Sequence[int]) -> Trajectory:
        """Return what some training samples did in each period.

        Args:
            train_ids: Which ones.

        Raises:
            ValueError: If they are no whole numbers, or one of them is not in the training set.
        """
        given = torch.as_tensor(train_ids)
        if given.ndim != 1 or given.is_floating_point() or given.dtype == torch.bool:
            raise ValueError(
                f"`train_ids` is {train_ids!r}; expected a list of whole numbers, ids of training "
                "samples, such as `contributions.scores().proponents(3).ids[0]`."
            )
        chosen = given.to(torch.int64)
        strangers = chosen[~torch.isin(chosen, self.train_ids)]
        if len(strangers):
            raise ValueError(
                f"Sample {int(strangers[0])} is not among those that were followed; expected some "
                f"of the {len(self.train_ids)} ids of `train_ids`."
            )
        places = torch.searchsorted(self.train_ids, chosen)
        return Trajectory(
            values=self.values[:, :, places].permute(1, 2, 0).contiguous(),
            times=self.times,
            train_ids=chosen,
            query_ids=self.query_ids,
            per="epoch" if self.provenance.get("period") == "epoch" else "step",
            method=self.method,
            provenance=self.provenance,
        )

    def save(self, path: str | Path) -> None:
        """Write to a NumPy ``.npz`` file: whole or not at all, and over what was there."""
        path = Path(path)
        partial = partial_name(path)
        try:
            save_arrays(partial, self, _FIELDS)
            make_durable(partial)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        make_durable(path.absolute().parent)

    @classmethod
    def load(cls, path: str | Path) -> Contributions:
        """Read what :meth:`save` wrote."""
        return cls(**load_arrays(path, _FIELDS))

    def __repr__(self) -> str:
        """Show the shape and the method."""
        n_times, n_probe, n_train = self.values.shape
        return (
            f"Contributions of {n_train:,} training samples to {n_probe:,} probes in {n_times:,} "
            f"periods, by {self.method}"
        )
