"""Bindings to curvlinops, an optional dependency: import this file only where it is used."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from tda_lightning.full_influence.objective import Objective
from tda_lightning.full_influence.operators import Operator

try:
    with warnings.catch_warnings():
        # A dependency uses `torch.jit.script`, which torch has deprecated.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        import curvlinops
except ImportError as error:
    raise ImportError(
        f"This solver needs curvlinops, and `{error.name}` is not installed. Install it with "
        "`pip install 'tda_lightning[solvers]'`."
    ) from error


class _Outputs(nn.Module):
    """Presents the model to curvlinops as a module whose inputs are the numbers of batches."""

    def __init__(self, objective: Objective, outputs_of: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.model = objective.model
        self._outputs_of = outputs_of

    def forward(self, number: Tensor) -> Tensor:
        return self._outputs_of(int(number))


def kronecker_factored(
    objective: Objective,
    outputs_of: Callable[[int], Tensor],
    loss: nn.Module,
    labels: Sequence[Tensor],
    fisher: Literal["type-2", "mc"],
) -> Operator:
    """Return EKFAC's approximation of the Gauss-Newton matrix of the mean of a loss.

    ``outputs_of`` takes the number of a batch. The loss is one of torch's that curvlinops supports,
    with mean reduction. ``"type-2"`` takes the expectation over labels, ``"mc"`` samples them.
    """
    numbers = [torch.tensor(number) for number in range(len(objective.batches))]
    operator: Operator = curvlinops.EKFACLinearOperator(
        _Outputs(objective, outputs_of),
        loss,
        list(objective.parameters),
        list(zip(numbers, labels, strict=True)),
        fisher_type=fisher,
        separate_weight_and_bias=False,
        num_data=objective.n,
        num_per_example_loss_terms=1,
        batch_size_fn=lambda number: objective.sizes[int(number)],
        check_deterministic=False,
    )
    return operator


def kronecker_inverse(operator: Operator, damping: float) -> Operator:
    """Return the inverse of EKFAC's approximation plus a multiple of the identity."""
    inverse: Operator = curvlinops.KFACInverseLinearOperator(
        operator, damping=damping, use_exact_damping=True
    )
    return inverse
