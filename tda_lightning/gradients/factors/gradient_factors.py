"""GradientFactors: a batch of per-sample gradients as outer products of two operands.

An operand is one side of the product. It is multiplied by matrices without being stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

NOTHING: Mapping[int, Tensor] = MappingProxyType({})


@dataclass(slots=True)
class GradientFactors:
    """Two operands whose outer products, summed over ``s``, are each sample's gradient.

    ``grad_outputs`` always spans the rows of the weight, and ``inputs`` its columns. An embedding's
    weight is the transpose of a linear map's, so there the two operands change places.

    Attributes:
        inputs: Inputs of the layer, ``(n, s, columns)``.
        grad_outputs: Gradient of the loss with respect to the layer's outputs, ``(n, s, rows)``.
        correction: Subtracted from the outer products, if any.
    """

    inputs: Operand
    grad_outputs: Operand
    correction: Correction | None = None

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
        return self.project(None, None, self.dtype)

    def project(
        self,
        left: Float[Tensor, "rows a"] | None,
        right: Float[Tensor, "columns b"] | None,
        dtype: torch.dtype,
    ) -> Float[Tensor, "n a b"]:
        """Return ``left.mT @ gradient @ right`` of each sample; ``None`` is the identity."""
        inputs = projected(self.inputs, right, dtype)
        grads = projected(self.grad_outputs, left, dtype)
        is_rank_one = grads.shape[1] == 1
        products = outer(grads[:, 0], inputs[:, 0]) if is_rank_one else grads.mT @ inputs
        if self.correction is None:
            return products
        known = {id(self.inputs): inputs, id(self.grad_outputs): grads}
        return products.sub_(self.correction.project(left, right, dtype, known))

    def transposed(self) -> GradientFactors:
        """Return the factors of the transposed gradients."""
        correction = None if self.correction is None else self.correction.transposed()
        return GradientFactors(self.grad_outputs, self.inputs, correction)


class Correction(ABC):
    """Matrices, one per sample, that are subtracted from outer products."""

    @abstractmethod
    def project(
        self,
        left: Float[Tensor, "rows a"] | None,
        right: Float[Tensor, "columns b"] | None,
        dtype: torch.dtype,
        known: Mapping[int, Tensor] = NOTHING,
    ) -> Float[Tensor, "n a b"]:
        """Return ``left.mT @ matrix @ right`` of each sample.

        Args:
            left: The identity if ``None``.
            right: The same.
            dtype: Number format of the result.
            known: Operands that are projected already, by their ``id``.
        """

    @abstractmethod
    def transposed(self) -> Correction:
        """Return the transposed matrices."""


def outer(left: Float[Tensor, "*g n a"], right: Float[Tensor, "*g n b"]) -> Tensor:
    """Return the outer products of rows, ``(n, *g, a, b)``, samples last in memory.

    Broadcasting is faster than rank-one matrix products, and hashing reads one entry of all samples
    after another.
    """
    last = left.mT.contiguous()[..., :, None, :] * right.mT.contiguous()[..., None, :, :]
    return last.movedim(-1, 0)


def projected(operand: Operand, matrix: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Multiply an operand by a matrix from the right; ``None`` is the identity."""
    return operand.dense(dtype) if matrix is None else operand.project(matrix)


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


def coarser(first: torch.dtype, second: torch.dtype) -> torch.dtype:
    """Return the number format with the larger rounding error."""
    if first is second:
        return first
    return max(first, second, key=lambda dtype: torch.finfo(dtype).eps)
