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


@dataclass(frozen=True)
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

    def regrouped(self, n: int) -> GradientFactors:
        """Return the factors of ``n`` samples, each made of several consecutive entries."""
        parts = self.n // n
        if parts == 1:
            return self
        return GradientFactors(Regrouped(self.inputs, parts), Regrouped(self.grad_outputs, parts))

    def select(self, samples: Int[Tensor, " m"]) -> GradientFactors:
        """Return the factors of some of the samples."""
        return GradientFactors(self.inputs.select(samples), self.grad_outputs.select(samples))


class Operand(ABC):
    """One side of a layer's per-sample gradient, of conceptual shape ``(n, s, d)``."""

    @property
    @abstractmethod
    def n(self) -> int:
        """Number of samples."""

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> Float[Tensor, "n s d"]:
        """Return the operand as a tensor."""

    @abstractmethod
    def project(
        self, matrix: Float[Tensor, "d w"], offset: Float[Tensor, " w"] | None = None
    ) -> Float[Tensor, "n s w"]:
        """Multiply from the right, in the number format of ``matrix``, and add ``offset``."""

    @abstractmethod
    def select(self, samples: Int[Tensor, " m"]) -> Operand:
        """Return the operand of some of the samples."""


@dataclass(frozen=True)
class Dense(Operand):
    """An operand that is stored as a tensor.

    Attributes:
        values: Shape ``(n, s, d)``.
    """

    values: Float[Tensor, "n s d"]

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.values)

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "n s d"]:
        """Return the values."""
        return self.values.to(dtype)

    def project(
        self, matrix: Float[Tensor, "d w"], offset: Float[Tensor, " w"] | None = None
    ) -> Float[Tensor, "n s w"]:
        """Multiply from the right and add ``offset``, in one call."""
        return functional.linear(self.values.to(matrix.dtype), matrix.mT, offset)

    def select(self, samples: Int[Tensor, " m"]) -> Operand:
        """Return the operand of some of the samples."""
        return Dense(self.values[samples])


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

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "n s d"]:
        """Return the rows of zeros and ones."""
        return functional.one_hot(self.indices, self.size).to(dtype)

    def project(
        self, matrix: Float[Tensor, "d w"], offset: Float[Tensor, " w"] | None = None
    ) -> Float[Tensor, "n s w"]:
        """Look up rows of ``matrix``."""
        selected = matrix[self.indices]
        return selected if offset is None else selected + offset

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

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "n s d"]:
        """Return the rows with their zeros, shape ``(n, groups * s, d)``."""
        return self.project(torch.eye(self.values.shape[2], dtype=dtype, device=self.values.device))

    def project(
        self, matrix: Float[Tensor, "d w"], offset: Float[Tensor, " w"] | None = None
    ) -> Float[Tensor, "n s w"]:
        """Multiply each group by its part of ``matrix``."""
        n, s, d = self.values.shape
        values = self.values.to(matrix.dtype).reshape(n, s, self.groups, d // self.groups)
        parts = matrix.reshape(self.groups, d // self.groups, -1)
        projected = torch.einsum("nsgd,gdw->ngsw", values, parts).flatten(1, 2)
        return projected if offset is None else projected + offset

    def select(self, samples: Int[Tensor, " m"]) -> Operand:
        """Return the operand of some of the samples."""
        return GroupedDense(self.values[samples], self.groups)


@dataclass(frozen=True)
class WithOnes(Operand):
    """Another operand with a last column of ones: the input of a layer with a bias.

    Attributes:
        operand: The operand before the ones, of width ``d - 1``.
    """

    operand: Operand

    @property
    def n(self) -> int:
        """Number of samples."""
        return self.operand.n

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "n s d"]:
        """Return the operand with its column of ones."""
        return functional.pad(self.operand.dense(dtype), (0, 1), value=1.0)

    def project(
        self, matrix: Float[Tensor, "d w"], offset: Float[Tensor, " w"] | None = None
    ) -> Float[Tensor, "n s w"]:
        """Multiply from the right; the ones add the last row of ``matrix``."""
        last = matrix[-1] if offset is None else matrix[-1] + offset
        return self.operand.project(matrix[:-1], last)

    def select(self, samples: Int[Tensor, " m"]) -> Operand:
        """Return the operand of some of the samples."""
        return WithOnes(self.operand.select(samples))


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

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "n s d"]:
        """Return the operand, with each sample's entries joined."""
        return self._join(self.operand.dense(dtype))

    def project(
        self, matrix: Float[Tensor, "d w"], offset: Float[Tensor, " w"] | None = None
    ) -> Float[Tensor, "n s w"]:
        """Multiply from the right, and join each sample's entries."""
        return self._join(self.operand.project(matrix, offset))

    def select(self, samples: Int[Tensor, " m"]) -> Operand:
        """Return the operand of some of the samples."""
        within = torch.arange(self.parts, device=samples.device)
        entries = (samples[:, None] * self.parts + within).flatten()
        return Regrouped(self.operand.select(entries), self.parts)

    def _join(self, values: Tensor) -> Tensor:
        return values.reshape(self.n, -1, values.shape[2])
