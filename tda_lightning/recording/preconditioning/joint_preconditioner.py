"""JointPreconditioner: the coordinates of all optimizers of a training together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from tda_lightning.gradients.selection import ParameterSelection
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
