"""Patches: the inputs of a convolution, projected by a convolution without unfolding them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

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


@dataclass(frozen=True)
class Patches(Operand):
    """The image patches that are the inputs of a convolution.

    Attributes:
        images: Images, shape ``(n, channels, ...)`` with one to three spatial axes.
        kernel_size: Size of a patch.
        stride: Distance between neighbouring patches.
        dilation: Distance between neighbouring pixels of a patch.
        padding: Number of zeros on either side of each spatial axis.
        groups: Number of groups of channels. Patches are ordered by group.
        positions: Number of patches to keep along each spatial axis; all by default.
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

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the stored values."""
        return self.images.dtype

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "n s d"]:
        """Unfold the patches."""
        size = self.images.shape[1] // self.groups * math.prod(self.kernel_size)
        return self.project(torch.eye(size, dtype=dtype, device=self.images.device))

    def project(self, matrix: Float[Tensor, "d w"]) -> Float[Tensor, "n s w"]:
        """Convolve with the columns of ``matrix`` as filters, which all groups share."""
        channels = self.images.shape[1] // self.groups
        filters = matrix.mT.reshape(matrix.shape[1], channels, *self.kernel_size)
        convolve = _CONVOLUTIONS[len(self.kernel_size)]
        maps = convolve(
            self.images.to(matrix.dtype),
            filters.repeat(self.groups, *[1] * (filters.ndim - 1)),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )
        for axis, count in enumerate(self.positions or ()):
            maps = maps.narrow(2 + axis, 0, count)
        by_group: Tensor = maps.reshape(self.n, self.groups, matrix.shape[1], -1)
        return by_group.mT.flatten(1, 2)


_CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
