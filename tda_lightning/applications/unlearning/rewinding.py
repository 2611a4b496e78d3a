"""Plan exact unlearning: the latest snapshot that some samples had not touched, and the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from tda_lightning.applications.unlearning.sample_passes import Ids, ids_to_forget
from tda_lightning.results.html_tables import ShownInNotebooks
from tda_lightning.results.optional import DataFrame
from tda_lightning.results.tables import frame_by_sample
from tda_lightning.stores.opening import Run, open_run


@dataclass(frozen=True)
class RewindPlan(ShownInNotebooks):
    """Where exact retraining without some samples can start, and the cost.

    Attributes:
        ids: Ids of the samples to forget, shape ``(n_forget,)``.
        first_steps: Index of the step that first visited each sample, -1 if none did; shape
            ``(n_forget,)``.
        snapshot: Index of the latest snapshot that none of the samples had touched; ``None`` if
            only new weights will do.
        n_steps: Number of steps of the training.
        n_visits: Visits from the snapshot on, without those of the samples to forget.
        all_visits: Visits of the whole training.
        has_state: Whether the optimizer has state, such as momentum, that snapshots do not hold.
    """

    ids: Int[Tensor, " n_forget"]
    first_steps: Int[Tensor, " n_forget"]
    snapshot: int | None
    n_steps: int
    n_visits: int
    all_visits: int
    has_state: bool

    @property
    def is_untouched(self) -> bool:
        """Whether no step visited any of the samples, so that nothing has to be repeated."""
        return bool((self.first_steps < 0).all())

    @property
    def cost(self) -> float:
        """Visits to repeat, as a share of those of the whole training."""
        return self.n_visits / self.all_visits

    def to_pandas(self) -> DataFrame:
        """Return a data frame with the first step of each sample, indexed by its id."""
        return frame_by_sample(self.ids, {"first_step": self.first_steps})

    def __repr__(self) -> str:
        if self.is_untouched:
            return f"RewindPlan: no step visited any of the {len(self.ids)} samples. Keep the model"
        first = int(self.first_steps[self.first_steps >= 0].min())
        start = (
            "No snapshot is as early: train new weights"
            if self.snapshot is None
            else f"Start from the snapshot before step {self.snapshot}"
        )
        lines = [
            f"RewindPlan for {len(self.ids)} samples, first visited in step {first} "
            f"of {self.n_steps}",
            f"  {start} without them.",
            f"  Cost: {self.cost:.0%} of the training ({self.n_visits:,} visits).",
        ]
        if self.has_state and self.snapshot:
            lines.append(
                "  A snapshot holds weights only. Exactness needs the optimizer's state as well: "
                "a checkpoint of the trainer from the same step or before."
            )
        return "\n".join(lines)


def rewind_plan(run: Run, forget_ids: Ids) -> RewindPlan:
    """Find the latest snapshot that none of the samples had touched.

    Retraining from it without these samples is exact unlearning. The run proves it: it holds the
    visits of every step. Snapshots come from ``GradientRecorder(snapshots=n)`` or
    :func:`~tda_lightning.add_snapshots`.

    Args:
        run: The recorded training: its folder or a store.
        forget_ids: Ids of the samples to forget.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If an id is not in the training set, or the run does not hold every step.
    """
    store = open_run(run)
    ids = ids_to_forget(forget_ids, store.train_ids())
    if store.recipe.every_n_steps != 1:
        raise ValueError(
            f"The run holds one of every {store.recipe.every_n_steps} steps, and the others may "
            "have visited these samples; expected every step. Record with `every_n_steps=1`."
        )
    first = torch.full((len(ids),), -1)
    steps = list(store.facts)
    for step in reversed(steps):
        first[torch.isin(ids, step.sample_ids)] = step.index
    visited = first[first >= 0]
    limit = int(visited.min()) if len(visited) else steps[-1].index + 1
    early = [index for index in store.snapshots() if index <= limit]
    snapshot = max(early) if early else None
    start = limit if not len(visited) else (snapshot or 0)
    repeated = [step for step in steps if step.index >= start]
    return RewindPlan(
        ids=ids,
        first_steps=first,
        snapshot=snapshot,
        n_steps=len(steps),
        n_visits=sum(int((~torch.isin(step.sample_ids, ids)).sum()) for step in repeated),
        all_visits=sum(len(step.sample_ids) for step in steps),
        has_state=any(group.momentum or group.beta1 for group in steps[-1].groups),
    )
