r"""A rule for a fused layer of long short-term memory: its gates again, from the saved outputs.

With the outputs :math:`h_t` known, all gates follow from one product,

.. math:: z_t = W x_t + V h_{t-1} + b, \qquad (i, f, g, o) = (\sigma, \sigma, \tanh, \sigma)(z_t),
   \qquad c_t = f_t c_{t-1} + i_t g_t, \qquad h_t = o_t \tanh c_t

and one pass back through time gives the gradient of each :math:`z_t`. It is one factor of the
gradients of :math:`W`, :math:`V` and :math:`b`. Calling the kernel once per sample took thirty
times a plain step, for 64 samples of 50 steps.
"""

from __future__ import annotations

from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.gradients.factors import GradientFactors
from tda_lightning.gradients.nodes.rule import Contribution, NodeCall, node_rule, per_sample_vjp

_LSTM = 2  # As torch numbers the kinds of recurrent layers.
_WEIGHTS, _BIASES = (1, 2), (3, 4)


@node_rule("MkldnnRnnLayerBackward0", axes=lambda output, parameter, position: (1,))
def _fused_layer(call: NodeCall) -> Contribution:
    is_weight = call.position in _WEIGHTS or (call.position in _BIASES and call.saved("has_biases"))
    if call.saved("mode") != _LSTM or call.layout.axis != 1 or not is_weight:
        return per_sample_vjp(call)
    layer = _Layer(call)
    if "gates" not in call.shared:
        call.shared["gates"] = layer.gate_gradients()
    grads = call.shared["gates"]
    if call.position in _BIASES:
        return call.samples_first(grads).flatten(1, -2).sum(dim=1)
    inputs = layer.inputs if call.position == 1 else layer.outputs_before
    return GradientFactors(inputs=call.rows(inputs), grad_outputs=call.rows(grads))


class _Layer:
    """One direction of one layer; all tensors begin with time and batch, ``(t, m, ...)``."""

    def __init__(self, call: NodeCall) -> None:
        self._call = call
        self._is_reverse = call.saved("reverse")

    @cached_property
    def inputs(self) -> Float[Tensor, "t m d"]:
        """The inputs."""
        return self._saved("input")

    @cached_property
    def outputs_before(self) -> Float[Tensor, "t m h"]:
        """The outputs of the step before, which is the next one in a reversed layer."""
        first, outputs = self._saved("hx_")[None], self._saved("result0")
        return torch.cat([outputs[1:], first] if self._is_reverse else [first, outputs[:-1]])

    def _flip(self, values: Tensor) -> Tensor:
        """Turn a tensor in the order of the inputs into the order of processing, or back."""
        return values.flip(0) if self._is_reverse else values

    def _saved(self, name: str) -> Tensor:
        values: Tensor = self._call.saved(name)
        return values.to(torch.promote_types(values.dtype, torch.float32))

    def gate_gradients(self) -> Float[Tensor, "t m gates"]:
        """Return the gradients of the gates before their activation."""
        weight, recurrent = self._saved("weight0"), self._saved("weight1")
        sums = self.inputs @ weight.mT + self.outputs_before @ recurrent.mT
        if self._call.saved("has_biases"):
            sums += self._saved("weight2") + self._saved("weight3")
        i, f, g, o = self._flip(sums).chunk(4, dim=-1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        cells = self._cells(f, i * g)
        activated = cells[1:].tanh()
        # Derivatives of the cell and of the output with respect to the gates before activation.
        of_cell = torch.stack([g * i * (1 - i), cells[:-1] * f * (1 - f), i * (1 - g * g)], dim=2)
        of_output = activated * o * (1 - o)
        to_cell = o * (1 - activated * activated)
        return self._flip(self._backward(recurrent, of_cell, of_output, to_cell, f))

    def _cells(self, kept: Tensor, added: Tensor) -> Float[Tensor, "t1 m h"]:
        """Return the cells before and after each step."""
        cells = [self._saved("cx_")]
        for share, new in zip(kept, added, strict=True):
            cells.append(torch.addcmul(new, share, cells[-1]))
        return torch.stack(cells)

    def _backward(
        self, recurrent: Tensor, of_cell: Tensor, of_output: Tensor, to_cell: Tensor, kept: Tensor
    ) -> Float[Tensor, "t m gates"]:
        t, m, _, h = of_cell.shape
        grads = of_cell.new_zeros(t, m, 4, h)
        outputs, last, cell = (self._gradient(number) for number in range(3))
        outputs = None if outputs is None else self._flip(outputs)
        output = of_cell.new_zeros(m, h) if last is None else last
        cell = of_cell.new_zeros(m, h) if cell is None else cell
        for step in reversed(range(t)):
            if outputs is not None:
                output = output + outputs[step]
            cell = torch.addcmul(cell, output, to_cell[step])
            torch.mul(cell[:, None], of_cell[step], out=grads[step, :, :3])
            torch.mul(output, of_output[step], out=grads[step, :, 3])
            output = grads[step].flatten(1) @ recurrent
            cell = cell * kept[step]
        return grads.flatten(2)

    def _gradient(self, number: int) -> Tensor | None:
        grad = self._call.grads[number]
        return None if grad is None else grad.to(torch.promote_types(grad.dtype, torch.float32))
