r"""Preconditioning: coordinates in which an adaptive optimizer is plain gradient descent.

Adam moves along :math:`P g` with :math:`P = 1 / (\sqrt{\hat v} + \epsilon)`. In coordinates in
which gradients are :math:`P^{1/2} g` its steps are gradient steps, so rows and queries are
multiplied by :math:`P^{1/2}`. The second moment of each block's matrix is approximated by row
factors times column factors, :math:`\hat v_{ij} \approx r_i c_j` (Shazeer & Stern 2018,
"Adafactor", section 3). These are merged into the projection, so they cost nothing per sample.
Learning rates that differ between parameters are treated the same way: :math:`P` is relative to
the largest rate.

Early in training, the second moment depends strongly on the current gradient. For the first steps
coordinates therefore follow from that gradient: each block's are read as soon as the backward pass
has accumulated it (:mod:`.gradient_coordinates`). Where that is not possible, the gradient is
computed before the backward pass. Later the moment changes slowly, and is only refreshed from time
to time.

Both factors are rounded before rows are multiplied by them. One that has barely changed then often
has the same value, and stores compress it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from tda_lightning.gradients.parameter_selection import ParameterSelection, lay_out
from tda_lightning.recording.preconditioning.second_moments import (
    ADAPTIVE,
    Gradients,
    second_moments,
)
from tda_lightning.stores.recipe import Block
from tda_lightning.stores.step import Preconditioner

# The second moment of these first steps includes the gradient of the step itself.
_WARM_UP_STEPS = 20
# Afterwards it is refreshed whenever the number of steps has grown by 1 / _REFRESH_DIVISOR.
_REFRESH_DIVISOR = 20
# Matrices with more numbers are not stacked.
_MAX_STACKED_NUMBERS = 2**16
# Significant binary digits of a factor: off by 3 % at most, far less than the product of both is.
_BITS = 5

# A parameter's group, and its learning rate relative to the largest.
_Group = tuple[Mapping[str, object], float]


def has_preconditioner(optimizer: Optimizer) -> bool:
    """Return whether the optimizer is gradient descent only in preconditioned coordinates."""
    is_plain = isinstance(optimizer, SGD) or not isinstance(optimizer, ADAPTIVE)
    rates = {float(group["lr"]) for group in optimizer.param_groups}
    return not is_plain or len(rates) > 1


class JointPreconditioner:
    """Holds the latest coordinates of every block; ones until its optimizer provides some."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = blocks
        self._rows = [torch.ones(block.rows) for block in blocks]
        self._columns = [torch.ones(block.columns) for block in blocks]

    def load(self, preconditioner: Preconditioner) -> None:
        """Set the coordinates of all blocks, to continue from a checkpoint."""
        sizes = [block.rows for block in self._blocks], [block.columns for block in self._blocks]
        self._rows = list(torch.split(preconditioner.rows, sizes[0]))
        self._columns = list(torch.split(preconditioner.columns, sizes[1]))

    def update(self, numbers: Sequence[int], part: Preconditioner) -> Preconditioner:
        """Replace the coordinates of some blocks, and return those of all blocks."""
        rows = torch.split(part.rows, [self._blocks[number].rows for number in numbers])
        columns = torch.split(part.columns, [self._blocks[number].columns for number in numbers])
        for number, block_rows, block_columns in zip(numbers, rows, columns, strict=True):
            self._rows[number], self._columns[number] = block_rows, block_columns
        return Preconditioner(torch.cat(self._rows), torch.cat(self._columns))


class OptimizerPreconditioner:
    """Reads the preconditioner of one optimizer during training.

    Args:
        optimizer: The optimizer.
        selection: All recorded blocks, with the parameters that this optimizer trains.
        joint: Holds the coordinates of all optimizers together.

    Attributes:
        blocks: The blocks that this optimizer trains, with their parameters.
        parameters: All these parameters.
    """

    def __init__(
        self, optimizer: Optimizer, selection: ParameterSelection, joint: JointPreconditioner
    ) -> None:
        self._optimizer, self._joint = optimizer, joint
        self._numbers = [number for number, part in enumerate(selection.parameters) if part]
        self.blocks = [(selection.blocks[n], selection.parameters[n]) for n in self._numbers]
        self.parameters = selection.all_parameters()
        self._rates: list[float] = []
        self._group_of: dict[nn.Parameter, _Group] = {}
        self._refreshed = -1
        self._oldest: Tensor | None = None

    def is_due(self) -> bool:
        """Return whether the next step begins new coordinates."""
        age = self._age()
        has_grown = age - self._refreshed >= max(
            _WARM_UP_STEPS, self._refreshed // _REFRESH_DIVISOR
        )
        is_moving = self.is_adaptive() and (age < _WARM_UP_STEPS or has_grown)
        return self._refreshed < 0 or is_moving or self._relative_rates() != self._rates

    def needs_gradients(self) -> bool:
        """Return whether reading them requires the gradient of the next step."""
        return self.is_adaptive() and self._age() < _WARM_UP_STEPS

    def read(self, gradients: Gradients) -> Preconditioner:
        """Return the coordinates of the next step, with the latest ones of other optimizers.

        ``gradients`` are those of the next step if :meth:`needs_gradients`, else empty.
        """
        self.begin()
        return self.joined(*self.factors(range(len(self.blocks)), gradients))

    def joined(
        self, rows: Float[Tensor, " rows"], columns: Float[Tensor, " columns"]
    ) -> Preconditioner:
        """Return the coordinates of all blocks, given those of this optimizer's."""
        return self._joint.update(self._numbers, Preconditioner(rows.cpu(), columns.cpu()))

    def begin(self) -> None:
        """Note the age and the learning rates at which coordinates are read."""
        self._oldest = self._find_oldest()
        self._refreshed = self._age()
        self._rates = self._relative_rates()
        self._group_of = self._groups()

    def factors(
        self, blocks: Sequence[int], gradients: Gradients
    ) -> tuple[Float[Tensor, " rows"], Float[Tensor, " columns"]]:
        """Return the coordinates of some of ``blocks``, on the device of their parameters."""
        parts = [self.blocks[number] for number in blocks]
        groups = {p: self._group_of[p] for _, parameters in parts for p in parameters}
        moments = second_moments(
            self._optimizer, {p: group for p, (group, _) in groups.items()}, gradients
        )
        rows, columns = rank_one_factors(_laid_out(parts, moments))
        rows, columns = round_to_bits(_power(rows, -0.25)), round_to_bits(_power(columns, -0.25))
        if {rate for _, rate in groups.values()} != {1.0}:
            rates = {p: torch.full_like(moment, groups[p][1]) for p, moment in moments.items()}
            rate_rows, rate_columns = rank_one_factors(_laid_out(parts, rates))
            rows, columns = rows * _power(rate_rows, 0.5), columns * _power(rate_columns, 0.5)
        return rows, columns

    def state(self) -> dict[str, Any]:
        """Return the step and the learning rates of the last reading, in builtins."""
        return {"refreshed": self._refreshed, "rates": list(self._rates)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from the result of :meth:`state`."""
        self._refreshed, self._rates = int(state["refreshed"]), list(state["rates"])

    def is_adaptive(self) -> bool:
        """Return whether the optimizer is one of the supported adaptive ones."""
        return isinstance(self._optimizer, ADAPTIVE)

    def _age(self) -> int:
        """Return the number of steps that the optimizer has taken."""
        if self._oldest is None:
            self._oldest = self._find_oldest()
        return 0 if self._oldest is None else int(self._optimizer.state[self._oldest]["step"])

    def _find_oldest(self) -> Tensor | None:
        """Return the parameter with the most steps, so that later calls read one counter only."""
        states = self._optimizer.state
        stepped = [parameter for parameter, state in states.items() if "step" in state]
        return max(stepped, key=lambda parameter: int(states[parameter]["step"]), default=None)

    def _relative_rates(self) -> list[float]:
        rates = [float(group["lr"]) for group in self._optimizer.param_groups]
        largest = max(rates)
        return [rate / largest if largest > 0 else 1.0 for rate in rates]

    def _groups(self) -> dict[nn.Parameter, _Group]:
        pairs = zip(self._optimizer.param_groups, self._rates, strict=True)
        groups: dict[nn.Parameter, _Group] = {
            p: (group, rate) for group, rate in pairs for p in group["params"]
        }
        return {p: groups.get(p, ({}, 0.0)) for p in self.parameters}  # In no group: never moves.


def _laid_out(
    blocks: Sequence[tuple[Block, Sequence[nn.Parameter]]], values: Mapping[nn.Parameter, Tensor]
) -> list[Tensor]:
    return [lay_out(block, [values[p] for p in parameters]) for block, parameters in blocks]


def rank_one_factors(
    matrices: Sequence[Tensor],
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " columns"]]:
    """Return factors of several matrices, those of one after those of another.

    The outer product of a matrix's factors has its row sums and its column sums.

    >>> rows, columns = rank_one_factors([torch.tensor([[1.0, 2.0], [3.0, 6.0]])])
    >>> torch.outer(rows, columns)
    tensor([[1., 2.],
            [3., 6.]])
    """
    rows: list[Tensor] = list(matrices)
    columns: list[Tensor] = list(matrices)
    for numbers in _of_one_shape(matrices):
        alike = [matrices[number] for number in numbers]
        stack = alike[0][None] if len(alike) == 1 else torch.stack(alike)
        means = stack.mean(dim=2) if stack.shape[2] > 1 else stack[:, :, 0]
        column_means = stack.mean(dim=1) if stack.shape[1] > 1 else stack[:, 0]
        totals = column_means.mean(dim=1, keepdim=True)
        column_means = column_means / torch.where(totals == 0, 1, totals)
        for number, row, column in zip(numbers, means, column_means, strict=True):
            rows[number], columns[number] = row, column
    return torch.cat(rows), torch.cat(columns)


def _of_one_shape(matrices: Sequence[Tensor]) -> Iterator[list[int]]:
    """Yield the numbers of matrices of one shape, those of large ones alone: stacks are copies."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for number, matrix in enumerate(matrices):
        if matrix.numel() > _MAX_STACKED_NUMBERS:
            yield [number]
        else:
            alike.setdefault(tuple(matrix.shape), []).append(number)
    yield from alike.values()


def round_to_bits(values: Float[Tensor, " n"], bits: int = _BITS) -> Float[Tensor, " n"]:
    """Round to a number of significant binary digits, half to even.

    >>> round_to_bits(torch.tensor([1.0, 1.03, 1.04, 300.0, 0.0]), bits=5)
    tensor([  1.0000,   1.0000,   1.0625, 304.0000,   0.0000])
    """
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp((mantissa * 2**bits).round(), exponent - bits)


def _power(values: Tensor, exponent: float) -> Tensor:
    """Raise to a power. Zero stays zero: weights without a gradient so far have not moved."""
    return torch.where(values > 0, values.clamp_min(1e-38) ** exponent, 0)
