"""Patches: what a convolution sees, projected by a convolution and never unfolded."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from tda_lightning.gradients.factors.operands import Operand


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
