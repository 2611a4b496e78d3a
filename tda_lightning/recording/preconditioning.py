r"""Preconditioning: coordinates in which an adaptive optimizer is plain gradient descent.

Adam moves along :math:`P g` with :math:`P = 1 / (\sqrt{\hat v} + \epsilon)`. In coordinates in
which gradients are :math:`P^{1/2} g` its steps are gradient steps, so rows and queries are
multiplied by :math:`P^{1/2}`. The second moment of each block's matrix is approximated by row
factors times column factors, :math:`\hat v_{ij} \approx r_i c_j` (Shazeer & Stern 2018,
"Adafactor", section 3). These are merged into the projection, so they cost nothing per sample.
Learning rates that differ between parameters are treated the same way: :math:`P` is relative to
the largest rate.

Early in training, the second moment depends strongly on the current gradient. For the first steps
that gradient is therefore computed before the backward pass. Later the moment changes slowly, and
is only refreshed from time to time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop

from tda_lightning.gradients.selection import ParameterSelection, lay_out
from tda_lightning.stores.recipe import Block
from tda_lightning.stores.step import Preconditioner

_ADAPTIVE = (Adam, AdamW, NAdam, RAdam, RMSprop, Adagrad)
# The second moment of these first steps includes the gradient of the step itself.
_WARM_UP_STEPS = 20
# Afterwards it is refreshed whenever the number of steps has grown by 1 / _REFRESH_DIVISOR.
_REFRESH_DIVISOR = 20

Gradients = Mapping[nn.Parameter, Tensor]
# A parameter's group, and its learning rate relative to the largest.
_Group = tuple[Mapping[str, object], float]


def has_preconditioner(optimizer: Optimizer) -> bool:
    """Return whether the optimizer is gradient descent only in preconditioned coordinates."""
    is_plain = isinstance(optimizer, SGD) or not isinstance(optimizer, _ADAPTIVE)
    rates = {float(group["lr"]) for group in optimizer.param_groups}
    return not is_plain or len(rates) > 1


class OptimizerPreconditioner:
    """Reads the preconditioner of an optimizer during training.

    Args:
        optimizer: The optimizer of the recorded parameters.
        selection: The recorded layers.
    """

    def __init__(self, optimizer: Optimizer, selection: ParameterSelection) -> None:
        self._optimizer = optimizer
        self._blocks = list(zip(selection.blocks, selection.parameters, strict=True))
        self._parameters = selection.all_parameters()
        self._rates: list[float] = []
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
        """Return the coordinates of the next step.

        Args:
            gradients: Gradient of the next step if :meth:`needs_gradients`, else empty.
        """
        self._oldest = self._find_oldest()
        self._refreshed = self._age()
        self._rates = self._relative_rates()
        groups = self._groups()
        factors = [self._factors(*block, groups, gradients) for block in self._blocks]
        return Preconditioner(
            torch.cat([rows for rows, _ in factors]).cpu(),
            torch.cat([columns for _, columns in factors]).cpu(),
        )

    def state(self) -> dict[str, Any]:
        """Return the step and the learning rates of the last reading, in builtins."""
        return {"refreshed": self._refreshed, "rates": list(self._rates)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from the result of :meth:`state`."""
        self._refreshed, self._rates = int(state["refreshed"]), list(state["rates"])

    def parameters(self) -> list[nn.Parameter]:
        """Return the recorded parameters."""
        return self._parameters

    def is_adaptive(self) -> bool:
        """Return whether the optimizer is one of the supported adaptive ones."""
        return isinstance(self._optimizer, _ADAPTIVE)

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
        return {p: (group, rate) for group, rate in pairs for p in group["params"]}

    def _factors(
        self,
        block: Block,
        parameters: Sequence[nn.Parameter],
        groups: Mapping[nn.Parameter, _Group],
        gradients: Gradients,
    ) -> tuple[Tensor, Tensor]:
        moments, rates = [], []
        for parameter in parameters:
            group, rate = groups.get(parameter, ({}, 0.0))  # Parameters in no group never move.
            moment = _second_moment(self._optimizer, group, parameter, gradients.get(parameter))
            moments.append(moment)
            rates.append(torch.full_like(moment, rate))
        rows, columns = rank_one(lay_out(block, moments))
        rate_rows, rate_columns = rank_one(lay_out(block, rates))
        return (
            _power(rows, -0.25) * _power(rate_rows, 0.5),
            _power(columns, -0.25) * _power(rate_columns, 0.5),
        )


def rank_one(
    matrix: Float[Tensor, "rows columns"],
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " columns"]]:
    """Return factors whose outer product has the row sums and the column sums of a matrix.

    >>> rows, columns = rank_one(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    >>> torch.outer(rows, columns)
    tensor([[1., 2.],
            [3., 6.]])
    """
    rows, columns = matrix.mean(dim=1), matrix.mean(dim=0)
    mean = columns.mean()
    return rows, columns / torch.where(mean == 0, 1, mean)


def _power(values: Tensor, exponent: float) -> Tensor:
    """Raise to a power. Zero stays zero: weights without a gradient so far have not moved."""
    return torch.where(values > 0, values.clamp_min(1e-38) ** exponent, 0)


def _second_moment(
    optimizer: Optimizer,
    group: Mapping[str, object],
    parameter: nn.Parameter,
    gradient: Tensor | None,
) -> Float[Tensor, ...]:
    """Return the square of the optimizer's denominator, or ones if it has none."""
    ones = torch.ones_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
    if not isinstance(optimizer, _ADAPTIVE) or not group:
        return ones.detach()
    state = optimizer.state.get(parameter, {})
    square = torch.zeros_like(ones) if gradient is None else gradient.detach().to(ones).square()
    moment = _running_square(group, state, square, gradient is not None)
    eps = float(group["eps"])  # type: ignore[arg-type]
    return torch.where(moment > 0, moment + eps**2, 0)


def _running_square(
    group: Mapping[str, object], state: Mapping[str, Tensor], square: Tensor, is_new: bool
) -> Tensor:
    if "sum" in state or "lr_decay" in group:  # Adagrad
        return square + state["sum"].to(square) if "sum" in state else square
    decay = _decay(group)
    before = state.get("exp_avg_sq", state.get("square_avg", torch.zeros_like(square)))
    moment = decay * before.to(square) + (1 - decay) * square if is_new else before.to(square)
    if "max_exp_avg_sq" in state:  # amsgrad
        moment = moment.maximum(state["max_exp_avg_sq"].to(moment))
    if "alpha" in group:  # RMSprop does not correct the bias of its first steps.
        return moment
    age = int(state.get("step", 0)) + is_new
    return moment / (1 - decay**age) if age else moment


def _decay(group: Mapping[str, object]) -> float:
    betas: Sequence[float] = group.get("betas", (0.0, group.get("alpha", 0.0)))  # type: ignore[assignment]
    return float(betas[1])


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
        """Replace the coordinates of some blocks, and return those of all blocks.

        Args:
            numbers: Numbers of these blocks.
            part: Their coordinates.
        """
        rows = torch.split(part.rows, [self._blocks[number].rows for number in numbers])
        columns = torch.split(part.columns, [self._blocks[number].columns for number in numbers])
        for number, block_rows, block_columns in zip(numbers, rows, columns, strict=True):
            self._rows[number], self._columns[number] = block_rows, block_columns
        return Preconditioner(torch.cat(self._rows), torch.cat(self._columns))


class PartialPreconditioner(OptimizerPreconditioner):
    """Reads the preconditioner of one optimizer among several.

    Args:
        optimizer: The optimizer.
        selection: All recorded layers, with the sources that this optimizer trains.
        joint: Holds the coordinates of all optimizers together.
    """

    def __init__(
        self, optimizer: Optimizer, selection: ParameterSelection, joint: JointPreconditioner
    ) -> None:
        pairs = list(enumerate(zip(selection.blocks, selection.parameters, strict=True)))
        self._numbers = [number for number, (_, parameters) in pairs if parameters]
        self._joint = joint
        blocks = tuple(block for _, (block, parameters) in pairs if parameters)
        trained = tuple(parameters for parameters in selection.parameters if parameters)
        super().__init__(optimizer, ParameterSelection(blocks, trained, selection.left_out))

    def read(self, gradients: Gradients) -> Preconditioner:
        """Return the coordinates of the next step, with the latest ones of other optimizers."""
        return self._joint.update(self._numbers, super().read(gradients))
