"""GradientFactors: a batch of per-sample gradients as outer products of two operands.

An operand is one side of the product. It is multiplied by matrices without being stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

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
        correction: Subtracted from the outer products, if any.
    """

    inputs: Operand
    grad_outputs: Operand
    correction: BatchStatistics | None = None

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


@dataclass(frozen=True)
class BatchStatistics:
    r"""The part of a row that acts through the statistics of a batch norm, with the sign reversed.

    Let a weight :math:`W` map inputs :math:`a` to :math:`z`, which a batch norm standardizes to
    :math:`\hat z` with the mean and the deviation of the batch. Let :math:`g_{is}` be the gradient
    of sample i's loss with respect to :math:`\hat z_{is}`, divided by the deviation. Sample i's
    loss depends on :math:`W` through its own :math:`z` and through both statistics:

    .. math:: G_i = \sum_s g_{is} a_{is}^\top
       - \operatorname{diag}\Bigl(\sum_s g_{is}\Bigr) \, \overline{a}
       - \operatorname{diag}\Bigl(\sum_s g_{is} \hat z_{is}\Bigr) \, \overline{\hat z a^\top}

    Bars are means over the batch and all positions. Autograd instead sends the last two terms to
    the samples whose :math:`z` is in the statistics. Both sum to the same gradient of the batch,
    but only this is the gradient of the sample's own loss. Its rows are orthogonal to those of
    :math:`W`, whose scale has no effect.

    Attributes:
        inputs: Inputs of the layer, of all samples of the batch, ``(m, s, columns)``.
        outputs: Its outputs, before standardization, ``(m, s, rows)``.
        units: Ones where an output exists and zeros elsewhere, of the same shape; ``None`` if
            outputs exist everywhere.
        count: Number of outputs per channel.
        mean: Mean of the outputs of each channel.
        scale: Inverse of their deviation.
        shifts: Sum of each sample's output gradients.
        scales: The same of their products with the standardized outputs.
        is_transposed: Whether the channels are the columns of the gradients, not the rows.
    """

    inputs: Operand
    outputs: Operand
    units: Operand | None
    count: int
    mean: Float[Tensor, " rows"]
    scale: Float[Tensor, " rows"]
    shifts: Float[Tensor, "n rows"]
    scales: Float[Tensor, "n rows"]
    is_transposed: bool = False

    def project(
        self,
        left: Float[Tensor, "rows a"] | None,
        right: Float[Tensor, "columns b"] | None,
        dtype: torch.dtype,
        known: Mapping[int, Tensor],
    ) -> Float[Tensor, "n a b"]:
        """Return ``left.mT @ matrix @ right`` of each sample.

        ``known`` holds operands that are projected already, by their ``id``.
        """
        if self.is_transposed:
            return self._project(right, left, dtype, known).mT
        return self._project(left, right, dtype, known)

    def transposed(self) -> BatchStatistics:
        """Return the transposed matrices."""
        return replace(self, is_transposed=not self.is_transposed)

    def _project(
        self,
        left: Tensor | None,
        right: Tensor | None,
        dtype: torch.dtype,
        known: Mapping[int, Tensor],
    ) -> Float[Tensor, "n a b"]:
        inputs = known.get(id(self.inputs))  # (m, s, b)
        if inputs is None:
            inputs = projected(self.inputs, right, dtype)
        products = self._mean_product(self.outputs, inputs)
        if self.units is None:
            # A sum: samples with fewer outputs than others are padded with inputs of zero.
            means = (inputs.sum(dim=(0, 1)) / self.count).expand_as(products)
        else:
            means = self._mean_product(self.units, inputs)
        mean, scale, shifts, scales = (
            values.to(inputs) for values in (self.mean, self.scale, self.shifts, self.scales)
        )
        # The mean of standardized outputs times inputs, without standardizing every output.
        covariances = scale[:, None] * (products - mean[:, None] * means)
        if left is None:
            return shifts[:, :, None] * means + scales[:, :, None] * covariances
        weights = torch.cat([shifts, scales], dim=1)[:, :, None] * torch.cat([left, left])
        return weights.mT @ torch.cat([means, covariances])

    def _mean_product(
        self, channels: Operand, inputs: Float[Tensor, "m s b"]
    ) -> Float[Tensor, "rows b"]:
        return (channels.dense(inputs.dtype).mT @ inputs).sum(dim=0) / self.count


def outer(
    left: Float[Tensor, "*g n a"], right: Float[Tensor, "*g n b"], out: Tensor | None = None
) -> Tensor:
    """Return the outer products of rows, ``(n, *g, a, b)``, samples last in memory.

    Broadcasting is faster than rank-one matrix products, and hashing reads one entry of all samples
    after another. ``out`` has the shape ``(*g, a, b, n)``.
    """
    first, second = left.mT.contiguous()[..., :, None, :], right.mT.contiguous()[..., None, :, :]
    return torch.mul(first, second, out=out).movedim(-1, 0)


def projected(operand: Operand, matrix: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Multiply an operand by a matrix from the right; ``None`` is the identity."""
    return operand.dense(dtype) if matrix is None else operand.project(matrix)


class Operand(ABC):
    """One side of a layer's per-sample gradient, of conceptual shape ``(n, s, d)``.

    Attributes:
        values: The stored numbers, samples first.
    """

    values: Tensor

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.values)

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the stored values."""
        return self.values.dtype

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
        return self._by_sample(self.project_rows(matrix, matrix.dtype))

    def project_rows(
        self, matrix: Float[Tensor, "d w"] | None, dtype: torch.dtype
    ) -> Float[Tensor, "ns w"]:
        """Multiply from the right, or only convert; the rows of all samples are one axis."""
        rows = self.rows.to(dtype)
        return rows if matrix is None else rows.mm(matrix)

    def _by_sample(self, rows: Tensor) -> Tensor:
        return rows.view(self.count, -1, rows.shape[1])


@dataclass(frozen=True)
class OneHot(Operand):
    """One-hot rows of length ``size``, stored as the positions of the ones: a table lookup."""

    values: Int[Tensor, "n s"]
    size: int

    @property
    def dtype(self) -> torch.dtype:
        """Number format of zeros and ones."""
        return torch.bool

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "n s d"]:
        """Return the rows of zeros and ones."""
        return functional.one_hot(self.values, self.size).to(dtype)

    def project(self, matrix: Float[Tensor, "d w"]) -> Float[Tensor, "n s w"]:
        """Look up rows of ``matrix``."""
        return matrix[self.values]


def coarser(first: torch.dtype, second: torch.dtype) -> torch.dtype:
    """Return the number format with the larger rounding error."""
    if first is second:
        return first
    return max(first, second, key=lambda dtype: torch.finfo(dtype).eps)
