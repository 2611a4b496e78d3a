"""GradientFactors: a batch of per-sample gradients as outer products of two operands.

An operand is one side of the product. It is multiplied by matrices without being stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


@dataclass(slots=True)
class GradientFactors:
    """Two operands whose outer products, summed over ``s``, are each sample's gradient.

    ``grad_outputs`` always spans the rows of the weight, and ``inputs`` its columns. An embedding's
    weight is the transpose of a linear map's, so there the two operands change places.

    Attributes:
        inputs: Inputs of the layer, ``(n, s, columns)``.
        grad_outputs: Gradient of the loss with respect to the layer's outputs, ``(n, s, rows)``.
    """

    inputs: Operand
    grad_outputs: Operand

    @property
    def n(self) -> int:
        """Number of samples."""
        return self.grad_outputs.n

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the products, at least float32."""
        both = torch.promote_types(self.inputs.dtype, self.grad_outputs.dtype)
        return torch.promote_types(both, torch.float32)

    def products(self) -> Float[Tensor, "n rows columns"]:
        """Return each sample's gradient in full."""
        return self.grad_outputs.dense(self.dtype).mT @ self.inputs.dense(self.dtype)

    def select(self, samples: Int[Tensor, " m"]) -> GradientFactors:
        """Return the factors of some of the samples."""
        return GradientFactors(self.inputs.select(samples), self.grad_outputs.select(samples))


class Operand(ABC):
    """One side of a layer's per-sample gradient, of conceptual shape ``(n, s, d)``."""

    @property
    @abstractmethod
    def n(self) -> int:
        """Number of samples."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Number format of the stored values."""

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> Float[Tensor, "n s d"]:
        """Return the operand as a tensor."""

    @abstractmethod
    def project(self, matrix: Float[Tensor, "d w"]) -> Float[Tensor, "n s w"]:
        """Multiply from the right, in the number format of ``matrix``."""

    @abstractmethod
    def select(self, samples: Int[Tensor, " m"]) -> Operand:
        """Return the operand of some of the samples."""


@dataclass(slots=True)
class Dense(Operand):
    """An operand that is stored as a matrix, the rows of one sample after those of another.

    Attributes:
        rows: Shape ``(n * s, d)``.
        count: Number of samples ``n``.
    """

    rows: Float[Tensor, "ns d"]
    count: int

    @property
    def n(self) -> int:
        """Number of samples."""
        return self.count

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the stored values."""
        return self.rows.dtype

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "n s d"]:
        """Return the rows of each sample."""
        return self._by_sample(self.rows.to(dtype))

    def project(self, matrix: Float[Tensor, "d w"]) -> Float[Tensor, "n s w"]:
        """Multiply from the right."""
        return self._by_sample(self.project_rows(matrix))

    def project_rows(self, matrix: Float[Tensor, "d w"]) -> Float[Tensor, "ns w"]:
        """Multiply from the right; the rows of all samples are one axis."""
        rows = self.rows
        return (rows if rows.dtype is matrix.dtype else rows.to(matrix.dtype)).mm(matrix)

    def select(self, samples: Int[Tensor, " m"]) -> Operand:
        """Return the operand of some of the samples."""
        return Dense(self._by_sample(self.rows)[samples].flatten(0, 1), len(samples))

    def _by_sample(self, rows: Tensor) -> Tensor:
        return rows.view(self.count, -1, rows.shape[1])


@dataclass(frozen=True)
class ByChannel(Operand):
    """An operand of images, whose channels come before their positions.

    Attributes:
        values: Shape ``(n, d, s)``.
    """

    values: Float[Tensor, "n d s"]

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.values)

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the stored values."""
        return self.values.dtype

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "n s d"]:
        """Return the values, channels last."""
        return self.values.to(dtype).mT

    def project(self, matrix: Float[Tensor, "d w"]) -> Float[Tensor, "n s w"]:
        """Multiply the channels by a matrix."""
        return (matrix.mT @ self.values.to(matrix.dtype)).mT

    def select(self, samples: Int[Tensor, " m"]) -> Operand:
        """Return the operand of some of the samples."""
        return ByChannel(self.values[samples])


@dataclass(frozen=True)
class OneHot(Operand):
    """One-hot rows, stored as indices. Projecting them is a table lookup.

    Attributes:
        indices: Position of the one in each row, shape ``(n, s)``.
        size: Length of a row.
    """

    indices: Int[Tensor, "n s"]
    size: int

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.indices)

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the stored values."""
        return torch.bool

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "n s d"]:
        """Return the rows of zeros and ones."""
        return functional.one_hot(self.indices, self.size).to(dtype)

    def project(self, matrix: Float[Tensor, "d w"]) -> Float[Tensor, "n s w"]:
        """Look up rows of ``matrix``."""
        return matrix[self.indices]

    def select(self, samples: Int[Tensor, " m"]) -> Operand:
        """Return the operand of some of the samples."""
        return OneHot(self.indices[samples], self.size)


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

    def select(self, samples: Int[Tensor, " m"]) -> Operand:
        """Return the operand of some of the samples."""
        return GroupedDense(self.values[samples], self.groups)


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

    def select(self, samples: Int[Tensor, " m"]) -> Operand:
        """Return the operand of some of the samples."""
        within = torch.arange(self.parts, device=samples.device)
        entries = (samples[:, None] * self.parts + within).flatten()
        return Regrouped(self.operand.select(entries), self.parts)

    def _join(self, values: Tensor) -> Tensor:
        return values.reshape(self.n, -1, values.shape[2])
