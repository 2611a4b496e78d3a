"""Least-squares trainings in float64, recorded exactly, and retrained with other sample weights.

The loss of a step is the sum over its visits of ``weight * (w . x_i - y_i)^2``. Its rows and its
curvature are known in closed form, and so is the quantity that each method estimates.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tda_lightning.recording.trained_layers import read_groups
from tda_lightning.stores import MemoryStore, Step
from tda_lightning.stores.recipe import Recipe

D, N_TRAIN, N_QUERY = 5, 11, 3

Optimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Problem:
    """Data, and the batches and learning rates of a training on it.

    Attributes:
        inputs: Shape ``(N_TRAIN, D)``.
        targets: Shape ``(N_TRAIN,)``.
        batches: Sample ids of each step.
        rates: Factor on the learning rate of each step.
    """

    inputs: Tensor
    targets: Tensor
    batches: Sequence[Tensor]
    rates: Sequence[float]


def problem(steps: int = 7, batch_size: int = 3, scale: float = 1.0, seed: int = 0) -> Problem:
    """Return random data, batches drawn with replacement, and a decaying schedule."""
    generator = torch.Generator().manual_seed(seed)
    inputs = scale * torch.randn(N_TRAIN, D, generator=generator, dtype=torch.float64)
    targets = torch.randn(N_TRAIN, generator=generator, dtype=torch.float64)
    drawn = [torch.randint(N_TRAIN - 1, (batch_size,), generator=generator) for _ in range(steps)]
    return Problem(inputs, targets, drawn, [1 / (1 + 0.2 * t) for t in range(steps)])


def full_batches(problem: Problem) -> Problem:
    """Return the problem with all samples in every step, at a constant rate."""
    steps = len(problem.batches)
    return replace(problem, batches=[torch.arange(N_TRAIN)] * steps, rates=[1.0] * steps)


def queries(seed: int = 1) -> Tensor:
    """Return gradients of losses that are linear in the weights."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N_QUERY, D, generator=generator, dtype=torch.float64)


def train(problem: Problem, optimizer: Optimizer, presence: Tensor | None = None) -> Tensor:
    """Return the weights after a training in which sample ``i`` counts ``presence[i]`` times."""
    *_, (weights, _) = _steps(problem, optimizer, presence)
    return weights


def record(
    problem: Problem, optimizer: Optimizer, stride: int = 1, presence: Tensor | None = None
) -> MemoryStore:
    """Return the recorded training, with exact curvature rows."""
    store = MemoryStore()
    store.begin(
        Recipe(
            blocks=(),
            left_out=(),
            projector={"name": "Identity"},
            dimension=D,
            dtype="float64",
            curvature="fisher",
            every_n_steps=stride,
            train_ids=((0, N_TRAIN),),
        )
    )
    for _, step in _steps(problem, optimizer, presence):
        store.append(step)
    return store


def effect_of_presence(problem: Problem, optimizer: Optimizer, q: Tensor) -> Tensor:
    """Return by how much each sample's presence lowers the queries' losses (central differences).

    Args:
        problem: The training.
        optimizer: Makes the optimizer of the weights.
        q: Gradients of the queries' losses, shape ``(n_query, D)``.
    """
    lowered = torch.zeros(len(q), N_TRAIN, dtype=torch.float64)
    epsilon = 1e-4
    for sample in range(N_TRAIN):
        change = torch.zeros(N_TRAIN, dtype=torch.float64)
        change[sample] = epsilon
        more, less = (train(problem, optimizer, 1 + sign * change) for sign in (1, -1))
        lowered[:, sample] = q @ (less - more) / (2 * epsilon)
    return lowered


def _steps(
    problem: Problem, optimizer: Optimizer, presence: Tensor | None
) -> Iterator[tuple[Tensor, Step]]:
    weights = torch.full((D,), 0.5, dtype=torch.float64, requires_grad=True)
    opt: Any = optimizer([weights])
    rates = [group["lr"] for group in opt.param_groups]
    for index, (ids, factor) in enumerate(zip(problem.batches, problem.rates, strict=True)):
        for group, rate in zip(opt.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        x = problem.inputs[ids]
        mean_weights = torch.full((len(ids),), 1 / len(ids), dtype=torch.float64)
        loss_weights = mean_weights if presence is None else mean_weights * presence[ids]
        residuals = x @ weights.detach() - problem.targets[ids]
        rows = 2 * (loss_weights * residuals)[:, None] * x
        weights.grad = rows.sum(dim=0)
        step = Step(
            index=index,
            epoch=2 * index // len(problem.batches),
            optimizer=type(opt).__name__,
            groups=read_groups(opt),
            sample_ids=ids,
            weights=mean_weights,
            sketch=rows,
            terms=torch.ones_like(residuals),
            curvature=1 / (2 * residuals.square()),
            trace_ratio=1 / (2 * residuals.square()),
            curvature_rows=(2 * loss_weights).sqrt()[:, None] * x,
        )
        opt.step()
        yield weights.detach().clone(), step
