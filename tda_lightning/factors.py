r"""GradientFactors: the one shape in which every layer's per-sample gradient passes the door.

.. math:: G_i = \sum_s \mathtt{grad\_outputs}_{i,s} \, \mathtt{inputs}_{i,s}^\top
   \quad (\text{rows} \times \text{columns})

Either side may be too large to write down (a one-hot token, the patches of an image), so a side is
known through what it is multiplied with: an :class:`Operand`. Behind this door the mathematics is
written once, and no layer type is mentioned again.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

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
class Patches(Operand):
    """The patches that a convolution sees; projecting them never unfolds them.

    Attributes:
        images: Images, shape ``(n, channels, ...)`` with one to three axes of space.
        kernel_size: Size of a patch.
        stride: Steps between patches.
        dilation: Steps between the pixels of a patch.
        padding: Zeros around the images, on either side of each axis of space.
        groups: Number of groups of channels; patches of one group after those of another.
        positions: How many patches to keep along each axis of space; all by default.
    """

    images: Float[Tensor, "n c ..."]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    groups: int = 1
    positions: tuple[int, ...] | None = None

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.images)

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "n s d"]:
        """Unfold the patches."""
        size = self.images.shape[1] // self.groups * math.prod(self.kernel_size)
        return self.project(torch.eye(size, dtype=dtype, device=self.images.device))

    def project(
        self, matrix: Float[Tensor, "d w"], offset: Float[Tensor, " w"] | None = None
    ) -> Float[Tensor, "n s w"]:
        """Convolve with the columns of ``matrix`` as filters, the same ones in every group."""
        channels = self.images.shape[1] // self.groups
        filters = matrix.mT.reshape(matrix.shape[1], channels, *self.kernel_size)
        convolve = _CONVOLUTIONS[len(self.kernel_size)]
        maps = convolve(
            self.images.to(matrix.dtype),
            filters.repeat(self.groups, *[1] * (filters.ndim - 1)),
            None if offset is None else offset.repeat(self.groups),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )
        for axis, count in enumerate(self.positions or ()):
            maps = maps.narrow(2 + axis, 0, count)
        by_group: Tensor = maps.reshape(self.n, self.groups, matrix.shape[1], -1)
        return by_group.mT.flatten(1, 2)

    def select(self, samples: Int[Tensor, " m"]) -> Operand:
        """Return the operand of some of the samples."""
        return replace(self, images=self.images[samples])


_CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


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

    def select(self, samples: Int[Tensor, " m"]) -> GradientFactors:
        """Return the factors of some of the samples."""
        return GradientFactors(self.inputs.select(samples), self.grad_outputs.select(samples))
