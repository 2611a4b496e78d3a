"""Sketcher: the linear map from one model's gradients to sketch rows.

It has two parts. A :class:`BlockMap` shrinks one layer's gradient or leaves it whole. A
:class:`ColumnMap` adds the results of all layers to the columns of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.gradients.nodes import Contribution
from tda_lightning.gradients.nodes.stacked import StackedFactors
from tda_lightning.gradients.parameter_selection import ParameterSelection
from tda_lightning.gradients.sketching.block_maps import (
    BlockMap,
    Place,
    Shrunk,
    lay_out,
    products,
    project_part,
    times,
)
from tda_lightning.gradients.sketching.column_maps import ColumnMap, Stack
from tda_lightning.stores.recipe import Block
from tda_lightning.stores.step import Preconditioner


class Sketcher:
    """A projector bound to the blocks of one model.

    Attributes:
        dimension: Length ``k`` of a sketch row.
        widths: Number of columns per block, or ``None`` if the blocks share columns.
    """

    def __init__(
        self,
        block_maps: Sequence[BlockMap],
        column_map: ColumnMap,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._unscaled_blocks = block_maps
        self._blocks = list(block_maps)
        self._column_map = column_map
        self._device = device
        self.dtype = dtype
        self.dimension = column_map.dimension
        self.widths = column_map.widths
        # The matrices of blocks that are shrunk together.
        self._stacks: dict[tuple[int, ...], tuple[Tensor | None, Tensor | None]] = {}

    def precondition(self, preconditioner: Preconditioner) -> None:
        """Multiply all further gradients by these factors before they are sketched."""
        rows = preconditioner.rows.to(self._device, self.dtype)
        columns = preconditioner.columns.to(self._device, self.dtype)
        row_parts = torch.split(rows, [block.rows for block in self._unscaled_blocks])
        column_parts = torch.split(columns, [block.columns for block in self._unscaled_blocks])
        parts = zip(self._unscaled_blocks, row_parts, column_parts, strict=True)
        self._blocks = [block.scaled(r, c) for block, r, c in parts]
        self._column_map.scale([block.scale for block in self._blocks])
        self._stacks = {}

    def precondition_block(
        self, number: int, rows: Float[Tensor, " rows"], columns: Float[Tensor, " columns"]
    ) -> None:
        """Multiply all further gradients of one block by these factors."""
        factors = [factor.to(self._device, self.dtype) for factor in (rows, columns)]
        self._blocks[number] = self._unscaled_blocks[number].scaled(*factors)
        self._column_map.scale([block.scale for block in self._blocks])
        self._stacks = {}

    def empty_rows(self, n: int) -> Float[Tensor, "n k"]:
        """Return ``n`` rows of zeros."""
        return torch.zeros(n, self.dimension, device=self._device, dtype=self.dtype)

    def project(
        self, place: Place, contribution: Contribution, row: int = 0, rows: int | None = None
    ) -> Shrunk:
        """Shrink the gradients of a parameter, or of ``rows`` of its rows from ``row`` on."""
        block = self._blocks[place.block]
        count = place.rows - row if rows is None else rows
        if count == block.rows and place.columns == block.columns:
            return block.project(contribution, self.dtype)
        first = place.row + row
        rows_of_block = slice(first, first + count)
        columns = slice(place.column, place.column + place.columns)
        return project_part(block, rows_of_block, columns, contribution, self.dtype)

    def is_whole(self, place: Place) -> bool:
        """Return whether a parameter fills a block."""
        block = self._unscaled_blocks[place.block]
        return (place.rows, place.columns) == (block.rows, block.columns)

    def project_stack(
        self, blocks: tuple[int, ...], gradients: StackedFactors | Tensor, n: int
    ) -> Shrunk:
        """Shrink the per-sample gradients of whole blocks of the same shape."""
        if isinstance(gradients, Tensor):
            return gradients.to(self.dtype)
        left, right = self._stack(blocks)
        outputs = times(gradients.grad_outputs, left, self.dtype)
        return products(outputs, times(gradients.inputs, right, self.dtype), n)

    def _stack(self, numbers: tuple[int, ...]) -> tuple[Tensor | None, Tensor | None]:
        if numbers not in self._stacks:
            blocks = [self._blocks[number] for number in numbers]
            left = [block.left for block in blocks if block.left is not None]
            right = [block.right for block in blocks if block.right is not None]
            self._stacks[numbers] = (
                torch.stack(left) if left else None,
                torch.stack(right) if right else None,
            )
        return self._stacks[numbers]

    def hash_rows(self, stacks: Sequence[Stack], n: int) -> Tensor:
        """Add shrunk gradients of blocks to the columns of ``n`` rows."""
        return self._column_map.rows_of(stacks, n) if stacks else self.empty_rows(n)

    def sketch_matrix(
        self, block: int, matrix: Float[Tensor, "rows columns"]
    ) -> Float[Tensor, " k"]:
        """Sketch one gradient of a block, given as a matrix."""
        values = self._blocks[block].project_matrix(matrix.to(self.dtype))
        return self.hash_rows([((block,), values[None, None])], 1)[0]


def sketch_parameters(
    sketcher: Sketcher,
    selection: ParameterSelection,
    value: Callable[[Tensor], Tensor],
    scales: Sequence[Tensor] | None = None,
) -> Float[Tensor, "blocks k"]:
    """Sketch a tensor per parameter, such as its gradient; zeros for a block without parameters.

    ``scales`` are multiplied by the blocks' matrices, entry by entry.
    """
    sketches = []
    pairs = zip(selection.blocks, selection.parameters, strict=True)
    for number, (block, parameters) in enumerate(pairs):
        if not parameters:  # Another optimizer trains this block.
            sketches.append(sketcher.empty_rows(1)[0])
            continue
        matrix = lay_out(block, [value(parameter) for parameter in parameters])
        if scales is not None:
            matrix = matrix * scales[number].to(matrix)
        sketches.append(sketcher.sketch_matrix(number, matrix))
    return torch.stack(sketches)


def inverse_squares(preconditioner: Preconditioner, blocks: Sequence[Block]) -> list[Tensor]:
    """Return the inverse squares of a preconditioner's factors, as one matrix per block.

    Sketching multiplies by the factors, which is right for gradients. Weights transform with the
    inverse factors, so they are multiplied by these matrices first.
    """
    rows = torch.split(preconditioner.rows, [block.rows for block in blocks])
    columns = torch.split(preconditioner.columns, [block.columns for block in blocks])
    scales = [torch.outer(r, c) for r, c in zip(rows, columns, strict=True)]
    return [torch.where(scale > 0, scale**-2, 0) for scale in scales]
