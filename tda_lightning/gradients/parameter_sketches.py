"""Sketches of full gradients or weights, block by block: one row per block."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.gradients.selection import ParameterSelection, lay_out
from tda_lightning.gradients.sketching.sketcher import Sketcher
from tda_lightning.stores.recipe import Block
from tda_lightning.stores.step import Preconditioner


def sketch_parameters(
    sketcher: Sketcher,
    selection: ParameterSelection,
    value: Callable[[Tensor], Tensor],
    scales: Sequence[Tensor] | None = None,
) -> Float[Tensor, "blocks k"]:
    """Sketch a tensor per parameter, such as its gradient.

    Args:
        sketcher: Sketches the matrix of each block.
        selection: The parameters of each block; zeros are returned for a block without any.
        value: From a parameter to the tensor of its shape that is sketched.
        scales: Matrices to multiply the blocks' matrices with, entry by entry.
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
