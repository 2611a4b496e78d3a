r"""BatchStatistics: the part of a row that acts through the statistics of a batch norm.

Let a weight :math:`W` map inputs :math:`a` to :math:`z`, which a batch norm standardizes to
:math:`\hat z` with the mean and the deviation of the batch. Let :math:`g_{is}` be the gradient of
sample i's loss with respect to :math:`\hat z_{is}`, divided by the deviation. Sample i's loss
depends on :math:`W` through its own :math:`z` and through both statistics:

.. math:: G_i = \sum_s g_{is} a_{is}^\top
   - \operatorname{diag}\Bigl(\sum_s g_{is}\Bigr) \, \overline{a}
   - \operatorname{diag}\Bigl(\sum_s g_{is} \hat z_{is}\Bigr) \, \overline{\hat z a^\top}

Bars are means over the batch and all positions. Autograd instead sends the last two terms to the
samples whose :math:`z` is in the statistics. Both sum to the same gradient of the batch, but only
this is the gradient of the sample's own loss. Its rows are orthogonal to those of :math:`W`, whose
scale has no effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.gradients.factors.gradient_factors import NOTHING, Correction, Operand, projected


@dataclass(frozen=True)
class BatchStatistics(Correction):
    """The effect of each sample's loss through the statistics of the batch.

    Attributes:
        inputs: Inputs of the layer, of all samples of the batch, ``(m, s, columns)``.
        outputs: Its outputs, before standardization, ``(m, s, rows)``.
        units: Ones where an output exists and zeros elsewhere, of the same shape; ``None`` if
            outputs exist everywhere.
        count: Number of outputs per channel.
        mean: Mean of the outputs of each channel, shape ``(rows,)``.
        scale: Inverse of their deviation, shape ``(rows,)``.
        shifts: Sum of each sample's output gradients, ``(n, rows)``.
        scales: The same of their products with the standardized outputs, ``(n, rows)``.
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
        known: Mapping[int, Tensor] = NOTHING,
    ) -> Float[Tensor, "n a b"]:
        """Return ``left.mT @ matrix @ right`` of each sample, as :class:`Correction` describes."""
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
