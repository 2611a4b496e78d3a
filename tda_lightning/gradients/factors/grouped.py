"""Operands of grouped layers, and of batches in which a sample has several entries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.gradients.factors.gradient_factors import Operand


@dataclass(frozen=True)
class GroupedDense(Operand):
    """Rows that are zero outside of one group of columns.

    Position ``(g, s)`` of a grouped convolution depends only on the g-th group of its channels.

    Attributes:
        values: Shape ``(n, s, d)``.
        groups: Number of groups into which ``d`` is divided.
    """

    values: Float[Tensor, "n s d"]
    groups: int

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.values)

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the stored values."""
        return self.values.dtype

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "n s d"]:
        """Return the rows with their zeros, shape ``(n, groups * s, d)``."""
        return self.project(torch.eye(self.values.shape[2], dtype=dtype, device=self.values.device))

    def project(self, matrix: Float[Tensor, "d w"]) -> Float[Tensor, "n s w"]:
        """Multiply each group by its part of ``matrix``."""
        n, s, d = self.values.shape
        values = self.values.to(matrix.dtype).reshape(n, s, self.groups, d // self.groups)
        parts = matrix.reshape(self.groups, d // self.groups, -1)
        return torch.einsum("nsgd,gdw->ngsw", values, parts).flatten(1, 2)


@dataclass(frozen=True)
class Regrouped(Operand):
    """An operand of a flattened batch: several consecutive entries belong to one sample.

    Attributes:
        operand: The operand, with ``n * parts`` entries.
        parts: Number of entries per sample.
    """

    operand: Operand
    parts: int

    @property
    def n(self) -> int:
        """Number of samples."""
        return self.operand.n // self.parts

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the stored values."""
        return self.operand.dtype

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "n s d"]:
        """Return the operand, with each sample's entries joined."""
        return self._join(self.operand.dense(dtype))

    def project(self, matrix: Float[Tensor, "d w"]) -> Float[Tensor, "n s w"]:
        """Multiply from the right, and join each sample's entries."""
        return self._join(self.operand.project(matrix))

    def _join(self, values: Tensor) -> Tensor:
        return values.reshape(self.n, -1, values.shape[2])
