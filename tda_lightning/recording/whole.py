"""Coordinates of all optimizers together: a step holds those of every block, whoever trains it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim import Optimizer

from tda_lightning.gradients.layers import Survey
from tda_lightning.recording.preconditioning import Gradients, OptimizerCoordinates
from tda_lightning.stores.recipe import Block
from tda_lightning.stores.step import Preconditioner


class WholeCoordinates:
    """The last known coordinates of every block; as they are, until an optimizer says otherwise."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = blocks
        self._rows = [torch.ones(block.rows) for block in blocks]
        self._columns = [torch.ones(block.columns) for block in blocks]

    def load(self, coordinates: Preconditioner) -> None:
        """Take coordinates that were known before."""
        sizes = [block.rows for block in self._blocks], [block.columns for block in self._blocks]
        self._rows = list(torch.split(coordinates.rows, sizes[0]))
        self._columns = list(torch.split(coordinates.columns, sizes[1]))

    def with_part(self, numbers: Sequence[int], part: Preconditioner) -> Preconditioner:
        """Take the coordinates of some blocks, and return those of all.

        Args:
            numbers: Which blocks.
            part: Their coordinates.
        """
        rows = torch.split(part.rows, [self._blocks[number].rows for number in numbers])
        columns = torch.split(part.columns, [self._blocks[number].columns for number in numbers])
        for number, own_rows, own_columns in zip(numbers, rows, columns, strict=True):
            self._rows[number], self._columns[number] = own_rows, own_columns
        return Preconditioner(torch.cat(self._rows), torch.cat(self._columns))


class PartOfCoordinates(OptimizerCoordinates):
    """Coordinates of one optimizer among several.

    Args:
        optimizer: The optimizer.
        surveyed: All recorded layers, with those that it trains.
        whole: Where the coordinates of all optimizers come together.
    """

    def __init__(self, optimizer: Optimizer, surveyed: Survey, whole: WholeCoordinates) -> None:
        pairs = list(enumerate(zip(surveyed.blocks, surveyed.sources, strict=True)))
        self._numbers = [number for number, (_, feeding) in pairs if feeding]
        self._whole = whole
        blocks = tuple(block for _, (block, feeding) in pairs if feeding)
        sources = tuple(feeding for feeding in surveyed.sources if feeding)
        super().__init__(optimizer, Survey(blocks, sources, surveyed.left_out))

    def are_known(self) -> bool:
        """Say whether the optimizer's steps are gradient steps in these coordinates."""
        return self._is_adaptive()

    def read(self, gradients: Gradients) -> Preconditioner:
        """Return the coordinates of the next step, and the last known ones of other optimizers."""
        return self._whole.with_part(self._numbers, super().read(gradients))
