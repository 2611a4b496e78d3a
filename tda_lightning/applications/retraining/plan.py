"""Plans: which samples each retraining uses, and with which seed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from tda_lightning.metrics.checks import describe
from tda_lightning.stores.arguments import require_whole


@dataclass(frozen=True)
class Plan:
    """The trainings to run.

    Attributes:
        weights: Weight of each sample in each training, 0 to leave it out, shape
            ``(n_trainings, n_train)``.
        seeds: Seed of each training, shape ``(n_trainings,)``.
    """

    weights: Float[Tensor, "n_trainings n_train"]
    seeds: Int64[Tensor, " n_trainings"]

    def __post_init__(self) -> None:
        if self.weights.ndim != 2 or self.seeds.shape != self.weights.shape[:1]:
            raise ValueError(
                f"`weights` is {describe(self.weights)} and `seeds` is {describe(self.seeds)}; "
                "expected the shapes (n_trainings, n_train) and (n_trainings,)."
            )
        if not len(self.weights):
            raise ValueError("The plan holds no training; expected at least one.")
        if self.seeds.dtype != torch.int64:
            raise ValueError(f"`seeds` is {describe(self.seeds)}; expected whole numbers.")
        if not self.weights.isfinite().all() or (self.weights < 0).any():
            raise ValueError("`weights` holds negative or infinite numbers; expected 0 or more.")

    @property
    def kept(self) -> Bool[Tensor, "n_trainings n_train"]:
        """Which samples each training uses."""
        return self.weights > 0

    def __len__(self) -> int:
        return len(self.weights)

    def with_different_seeds(self) -> Plan:
        """Return the same trainings with one seed each: this seed, the next one, and so on."""
        return Plan(self.weights, self.seeds[:1] + torch.arange(len(self)))

    def fingerprint(self) -> str:
        """Return a short hash of the plan."""
        digest = hashlib.sha256()
        for tensor in (self.weights, self.seeds):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]


def random_subsets(n_train: int, n_subsets: int, *, keep: float = 0.5, seed: int = 0) -> Plan:
    """Plan trainings on random subsets of equal size, for the linear datamodeling score.

    Args:
        n_train: Number of training samples.
        n_subsets: Number of subsets.
        keep: Share of the samples in each subset.
        seed: Seed of the subsets, and of all trainings; see :meth:`Plan.with_different_seeds`.

    Raises:
        ValueError: If an argument is out of range.

    >>> random_subsets(10, 3, keep=0.5).kept.sum(dim=1)
    tensor([5, 5, 5])
    """
    require_whole("n_train", n_train, least=1)
    require_whole("n_subsets", n_subsets, least=1)
    size = round(keep * n_train)
    if not 1 <= size <= n_train:
        raise ValueError(
            f"`keep` is {keep!r}, which is {size} of {n_train} samples; expected from 1 to all."
        )
    chance = torch.Generator().manual_seed(seed)
    order = torch.rand(n_subsets, n_train, generator=chance).argsort(dim=1)
    weights = (order < size).float()
    return Plan(weights, torch.full((n_subsets,), seed))


def leave_out(n_train: int, groups: Sequence[Sequence[int] | Tensor], *, seed: int = 0) -> Plan:
    """Plan one training without each group of samples.

    Args:
        n_train: Number of training samples.
        groups: Positions of the samples to leave out of each training; an empty group is the full
            training.
        seed: Seed of all trainings.

    Raises:
        ValueError: If a position is out of range, or all samples would be left out.

    >>> leave_out(4, [[], [1, 2]]).weights
    tensor([[1., 1., 1., 1.],
            [1., 0., 0., 1.]])
    """
    weights = torch.ones(len(groups), n_train)
    for row, group in zip(weights, groups, strict=True):
        positions = torch.as_tensor(group)
        if positions.ndim != 1 or (
            len(positions) and (positions.is_floating_point() or positions.dtype == torch.bool)
        ):
            raise ValueError(
                f"`groups` holds {describe(positions)}; expected lists of positions, whole "
                "numbers. Pass `[[i] for i in positions]` to leave out one sample at a time, and "
                "`mask.nonzero()[:, 0]` for a mask."
            )
        positions = positions.to(torch.int64)
        if len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < n_train:
            raise ValueError(
                f"`groups` holds positions from {int(positions.min())} to {int(positions.max())}; "
                f"expected 0 to {n_train - 1}: positions in the training data, not ids below it."
            )
        row[positions] = 0
        if not row.any():
            raise ValueError("A group holds all samples; expected some that remain.")
    return Plan(weights, torch.full((len(groups),), seed))


def same_data(n_train: int, seeds: Sequence[int]) -> Plan:
    """Plan trainings on all samples with several seeds: how much is chance?"""
    return Plan(torch.ones(len(seeds), n_train), torch.tensor(list(seeds)))
