r"""GradientFactors: the one shape in which every layer's per-sample gradient passes the door.

.. math:: G_i = \sum_s \mathtt{grad\_outputs}_{i,s} \, \mathtt{inputs}_{i,s}^\top
   \quad (\text{rows} \times \text{columns})

Either side may be too large to write down (a one-hot token, the patches of an image), so a side is
known through what it is multiplied with: an :class:`Operand`. Behind this door the mathematics is
written once, and no layer type is mentioned again.
"""

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
    def project(self, matrix: Float[Tensor, "d w"]) -> Float[Tensor, "n s w"]:
        """Multiply from the right, in the number format of ``matrix``."""


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

    def project(self, matrix: Float[Tensor, "d w"]) -> Float[Tensor, "n s w"]:
        """Multiply from the right."""
        return self.values.to(matrix.dtype) @ matrix


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

    def project(self, matrix: Float[Tensor, "d w"]) -> Float[Tensor, "n s w"]:
        """Look the rows of ``matrix`` up."""
        return matrix[self.indices]


@dataclass(frozen=True)
class Patches2d(Operand):
    """The patches that a 2-d convolution sees; projecting them never unfolds them.

    Attributes:
        images: Padded images, shape ``(n, channels, height, width)``.
        kernel_size: Height and width of a patch.
        stride: Steps between patches.
        dilation: Steps between the pixels of a patch.
    """

    images: Float[Tensor, "n c h w"]
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.images)

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "n s d"]:
        """Unfold the patches."""
        return functional.unfold(
            self.images.to(dtype), self.kernel_size, dilation=self.dilation, stride=self.stride
        ).mT

    def project(self, matrix: Float[Tensor, "d w"]) -> Float[Tensor, "n s w"]:
        """Convolve with the columns of ``matrix`` as filters."""
        filters = matrix.mT.reshape(matrix.shape[1], self.images.shape[1], *self.kernel_size)
        maps = functional.conv2d(
            self.images.to(matrix.dtype), filters, stride=self.stride, dilation=self.dilation
        )
        return maps.flatten(2).mT


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

    def project(self, matrix: Float[Tensor, "d w"]) -> Float[Tensor, "n s w"]:
        """Multiply from the right; the ones add the last row of ``matrix``."""
        return self.operand.project(matrix[:-1]) + matrix[-1]


@dataclass(frozen=True)
class GradientFactors:
    """Two factors whose outer products, summed over ``s``, are each sample's gradient.

    For an embedding, whose weight is the transpose of a linear map's, the two change places, so
    that ``grad_outputs`` always spans the rows of the weight and ``inputs`` its columns.

    Attributes:
        inputs: What the layer saw, ``(n, s, columns)``.
        grad_outputs: Gradient of the loss with respect to what the layer said, ``(n, s, rows)``.
    """

    inputs: Operand
    grad_outputs: Operand

    @property
    def n(self) -> int:
        """Number of samples."""
        return self.grad_outputs.n
