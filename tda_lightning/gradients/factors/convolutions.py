"""Operands of convolutions: image patches, which are projected without unfolding them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from tda_lightning.gradients.factors.gradient_factors import Operand


@dataclass(frozen=True)
class ByChannel(Operand):
    """An operand of images, whose channels come before their positions."""

    values: Float[Tensor, "n d s"]

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "n s d"]:
        """Return the values, channels last."""
        return self.values.to(dtype).mT

    def project(self, matrix: Float[Tensor, "d w"]) -> Float[Tensor, "n s w"]:
        """Multiply the channels by a matrix."""
        return (matrix.mT @ self.values.to(matrix.dtype)).mT


@dataclass(frozen=True)
class GroupedDense(Operand):
    """Rows that are zero outside of one group of columns.

    Position ``(g, s)`` of a grouped convolution depends only on the g-th group of its channels.
    """

    values: Float[Tensor, "n s d"]
    groups: int

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
    """An operand of a flattened batch: each sample has ``parts`` consecutive entries."""

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
        values: Images, shape ``(n, channels, ...)`` with one to three spatial axes.
        kernel_size: Size of a patch.
        stride: As in :class:`torch.nn.Conv2d`.
        dilation: The same.
        padding: The same, in numbers.
        groups: Number of groups of channels. Patches are ordered by group.
        positions: Number of patches to keep along each spatial axis; all by default.
    """

    values: Float[Tensor, "n c ..."]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    groups: int = 1
    positions: tuple[int, ...] | None = None

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "n s d"]:
        """Unfold the patches."""
        size = self.values.shape[1] // self.groups * math.prod(self.kernel_size)
        return self.project(torch.eye(size, dtype=dtype, device=self.values.device))

    def project(self, matrix: Float[Tensor, "d w"]) -> Float[Tensor, "n s w"]:
        """Convolve with the columns of ``matrix`` as filters, which all groups share."""
        channels = self.values.shape[1] // self.groups
        filters = matrix.mT.reshape(matrix.shape[1], channels, *self.kernel_size)
        convolve = _CONVOLUTIONS[len(self.kernel_size)]
        maps = convolve(
            self.values.to(matrix.dtype),
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
