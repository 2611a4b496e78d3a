"""Operands: one side of a gradient, known through what it is multiplied with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


class Operand(ABC):
    """One side of a layer's per-sample gradient, of conceptual shape ``(n, s, d)``."""

    @property
    @abstractmethod
    def n(self) -> int:
        """Number of samples."""

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> Float[Tensor, "n s d"]:
        """Write the operand down."""

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
    """An operand that is simply there.

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
        """Multiply from the right and add, in one go."""
        return functional.linear(self.values.to(matrix.dtype), matrix.mT, offset)

    def select(self, samples: Int[Tensor, " m"]) -> Operand:
        """Return the operand of some of the samples."""
        return Dense(self.values[samples])


@dataclass(frozen=True)
class OneHot(Operand):
    """Rows with a single one, known by its place: never written out to be projected.

    Attributes:
        indices: Place of the one, shape ``(n, s)``.
        size: Length of a row.
    """

    indices: Int[Tensor, "n s"]
    size: int

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.indices)

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "n s d"]:
        """Write the zeros and ones down."""
        return functional.one_hot(self.indices, self.size).to(dtype)

    def project(
        self, matrix: Float[Tensor, "d w"], offset: Float[Tensor, " w"] | None = None
    ) -> Float[Tensor, "n s w"]:
        """Look the rows of ``matrix`` up."""
        found = matrix[self.indices]
        return found if offset is None else found + offset

    def select(self, samples: Int[Tensor, " m"]) -> Operand:
        """Return the operand of some of the samples."""
        return OneHot(self.indices[samples], self.size)


@dataclass(frozen=True)
class GroupedDense(Operand):
    """Rows of a matrix in which each group of positions fills one group of columns, else zeros.

    Position ``(g, s)`` of a grouped convolution concerns only the g-th part of its channels.

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
        """Write the zeros down."""
        return self.project(torch.eye(self.values.shape[2], dtype=dtype, device=self.values.device))

    def project(
        self, matrix: Float[Tensor, "d w"], offset: Float[Tensor, " w"] | None = None
    ) -> Float[Tensor, "n s w"]:
        """Multiply each group with its part of ``matrix``."""
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
    """Another operand with a column of ones behind it: the input that a bias sees.

    Attributes:
        operand: The operand in front of the ones, of width ``d - 1``.
    """

    operand: Operand

    @property
    def n(self) -> int:
        """Number of samples."""
        return self.operand.n

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "n s d"]:
        """Write the operand and the ones down."""
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
    """Another operand, several neighbours of which belong to one sample: a batch flattened.

    Attributes:
        operand: The operand, with ``n * parts`` entries.
        parts: How many of them make a sample.
    """

    operand: Operand
    parts: int

    @property
    def n(self) -> int:
        """Number of samples."""
        return self.operand.n // self.parts

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "n s d"]:
        """Write the operand down, and join what belongs together."""
        return self._join(self.operand.dense(dtype))

    def project(
        self, matrix: Float[Tensor, "d w"], offset: Float[Tensor, " w"] | None = None
    ) -> Float[Tensor, "n s w"]:
        """Multiply from the right, and join what belongs together."""
        return self._join(self.operand.project(matrix, offset))

    def select(self, samples: Int[Tensor, " m"]) -> Operand:
        """Return the operand of some of the samples."""
        within = torch.arange(self.parts, device=samples.device)
        places = (samples[:, None] * self.parts + within).flatten()
        return Regrouped(self.operand.select(places), self.parts)

    def _join(self, values: Tensor) -> Tensor:
        return values.reshape(self.n, -1, values.shape[2])
