"""JointPreconditioner: the coordinates of all optimizers of a training together.

The second moment of a young optimizer includes the gradient of the step itself. A parameter's
gradient is there right after the last node that contributes to it, so :class:`GradientCoordinates`
need no pass to compute it first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from tda_lightning.gradients.parameter_selection import ParameterSelection
from tda_lightning.gradients.row_pass import Coordinates
from tda_lightning.recording.preconditioning.optimizer_preconditioner import OptimizerPreconditioner
from tda_lightning.recording.preconditioning.second_moments import Gradients
from tda_lightning.stores.recipe import Block
from tda_lightning.stores.step import Preconditioner


class JointPreconditioner:
    """Holds the latest coordinates of every block; ones until its optimizer provides some."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = blocks
        self._rows = [torch.ones(block.rows) for block in blocks]
        self._columns = [torch.ones(block.columns) for block in blocks]

    def load(self, preconditioner: Preconditioner) -> None:
        """Set the coordinates of all blocks, to continue from a checkpoint."""
        sizes = [block.rows for block in self._blocks], [block.columns for block in self._blocks]
        self._rows = list(torch.split(preconditioner.rows, sizes[0]))
        self._columns = list(torch.split(preconditioner.columns, sizes[1]))

    def update(self, numbers: Sequence[int], part: Preconditioner) -> Preconditioner:
        """Replace the coordinates of some blocks, and return those of all blocks.

        Args:
            numbers: Numbers of these blocks.
            part: Their coordinates.
        """
        rows = torch.split(part.rows, [self._blocks[number].rows for number in numbers])
        columns = torch.split(part.columns, [self._blocks[number].columns for number in numbers])
        for number, block_rows, block_columns in zip(numbers, rows, columns, strict=True):
            self._rows[number], self._columns[number] = block_rows, block_columns
        return Preconditioner(torch.cat(self._rows), torch.cat(self._columns))


class PartialPreconditioner(OptimizerPreconditioner):
    """Reads the preconditioner of one optimizer among several.

    Args:
        optimizer: The optimizer.
        selection: All recorded layers, with the sources that this optimizer trains.
        joint: Holds the coordinates of all optimizers together.
    """

    def __init__(
        self, optimizer: Optimizer, selection: ParameterSelection, joint: JointPreconditioner
    ) -> None:
        pairs = list(enumerate(zip(selection.blocks, selection.parameters, strict=True)))
        self._numbers = [number for number, (_, parameters) in pairs if parameters]
        self._joint = joint
        blocks = tuple(block for _, (block, parameters) in pairs if parameters)
        trained = tuple(parameters for parameters in selection.parameters if parameters)
        super().__init__(optimizer, ParameterSelection(blocks, trained, selection.left_out))

    def read(self, gradients: Gradients) -> Preconditioner:
        """Return the coordinates of the next step, with the latest ones of other optimizers."""
        return self._joint.update(self._numbers, super().read(gradients))

    def read_from(
        self, rows: Float[Tensor, " rows"], columns: Float[Tensor, " columns"]
    ) -> Preconditioner:
        """Return the coordinates of all blocks, given those of this optimizer's."""
        return self._joint.update(self._numbers, Preconditioner(rows.cpu(), columns.cpu()))

    def blocks(self) -> list[tuple[Block, tuple[nn.Parameter, ...]]]:
        """Return the blocks with parameters of this optimizer."""
        return self._blocks


class GradientCoordinates(Coordinates):
    """Reads the coordinates of each block once the gradient of its parameter is accumulated.

    Args:
        preconditioner: The preconditioner of an optimizer; each block has one parameter.
        scale: Factor that the accumulated gradients contain.
    """

    def __init__(self, preconditioner: PartialPreconditioner, scale: float) -> None:
        self._preconditioner, self._scale = preconditioner, scale
        self._parameters = [parameter for _, (parameter,) in preconditioner.blocks()]
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
            self._add(rest, *self._read(rest))
        parts = [self._known[number] for number in range(len(self._parameters))]
        rows, columns = (torch.cat(side) for side in zip(*parts, strict=True))
        return self._preconditioner.read_from(rows, columns)

    def _add(self, numbers: Sequence[int], rows: Tensor, columns: Tensor) -> None:
        blocks = [self._preconditioner.blocks()[number][0] for number in numbers]
        row_parts = torch.split(rows, [block.rows for block in blocks])
        column_parts = torch.split(columns, [block.columns for block in blocks])
        self._known.update(zip(numbers, zip(row_parts, column_parts, strict=True), strict=True))

    def _read(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        parameters = [self._parameters[number] for number in numbers]
        gradients = {p: p.grad.detach() for p in parameters if p.grad is not None}
        if self._scale != 1:
            gradients = {p: gradient / self._scale for p, gradient in gradients.items()}
        return self._preconditioner.factors(numbers, gradients)


def can_follow_gradients(preconditioner: PartialPreconditioner) -> bool:
    """Return whether coordinates can be read from the gradients that a pass accumulates.

    The accumulated gradients must be those of this pass alone, and no other hook may take them
    away first.
    """
    return all(
        len(parameters) == 1 and _is_free(parameters[0])
        for _, parameters in preconditioner.blocks()
    )


def _is_free(parameter: nn.Parameter) -> bool:
    hooks = getattr(parameter, "_post_accumulate_grad_hooks", None)
    return parameter.grad is None and not hooks
