"""GradientCoordinates: the coordinates of a young optimizer, read during the backward pass.

Its second moment includes the gradient of the step itself. A parameter's gradient is there right
after the last node that contributes to it, so no pass is needed to compute it first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tda_lightning.gradients.row_pass import Coordinates
from tda_lightning.recording.preconditioning.optimizer_preconditioner import OptimizerPreconditioner
from tda_lightning.stores.step import Preconditioner


class GradientCoordinates(Coordinates):
    """Reads the coordinates of each block once the gradient of its parameter is accumulated.

    Each block has one parameter. The accumulated gradients contain the factor ``scale``.
    """

    def __init__(self, preconditioner: OptimizerPreconditioner, scale: float) -> None:
        self._preconditioner, self._scale = preconditioner, scale
        self._parameters = [parameter for _, (parameter,) in preconditioner.blocks]
        self._numbers = {parameter: number for number, parameter in enumerate(self._parameters)}
        self._known: dict[int, tuple[Tensor, Tensor]] = {}
        preconditioner.begin()

    def of(self, parameter: nn.Parameter) -> tuple[Float[Tensor, " rows"], Float[Tensor, " c"]]:
        """Return the factors of a block's rows and columns."""
        number = self._numbers[parameter]
        if number not in self._known:
            self._known[number] = self._read([number])
        return self._known[number]

    def complete(self) -> Preconditioner:
        """Return the coordinates of all blocks; those not read yet are read together."""
        rest = [number for number in range(len(self._parameters)) if number not in self._known]
        if rest:
            rows, columns = self._read(rest)
            blocks = [self._preconditioner.blocks[number][0] for number in rest]
            row_parts = torch.split(rows, [block.rows for block in blocks])
            column_parts = torch.split(columns, [block.columns for block in blocks])
            self._known.update(zip(rest, zip(row_parts, column_parts, strict=True), strict=True))
        parts = [self._known[number] for number in range(len(self._parameters))]
        rows, columns = (torch.cat(side) for side in zip(*parts, strict=True))
        return self._preconditioner.joined(rows, columns)

    def _read(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        parameters = [self._parameters[number] for number in numbers]
        gradients = {p: p.grad.detach() for p in parameters if p.grad is not None}
        if self._scale != 1:
            gradients = {p: gradient / self._scale for p, gradient in gradients.items()}
        return self._preconditioner.factors(numbers, gradients)


def can_follow_gradients(preconditioner: OptimizerPreconditioner) -> bool:
    """Return whether coordinates can be read from the gradients that a pass accumulates.

    The accumulated gradients must be those of this pass alone, and no other hook may take them
    away first.
    """
    return all(
        len(parameters) == 1 and _is_free(parameters[0]) for _, parameters in preconditioner.blocks
    )


def _is_free(parameter: nn.Parameter) -> bool:
    hooks = getattr(parameter, "_post_accumulate_grad_hooks", None)
    return parameter.grad is None and not hooks
