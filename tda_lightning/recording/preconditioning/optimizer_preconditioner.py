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
has accumulated it (:class:`GradientCoordinates`). Where that is not possible, the gradient is
computed before the backward pass. Later the moment changes slowly, and is only refreshed from time
to time.

Both factors are rounded before rows are multiplied by them. One that has barely changed then often
has the same value, and stores compress it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from tda_lightning.gradients.gradient_layouts import to_dense
from tda_lightning.gradients.parameter_selection import ParameterSelection
from tda_lightning.gradients.row_pass import Coordinates
from tda_lightning.gradients.sketching.block_maps import lay_out
from tda_lightning.recording.preconditioning.second_moments import (
    ADAPTIVE,
    Gradients,
    power,
    rank_one_factors,
    round_to_bits,
    second_moments,
)
from tda_lightning.stores.recipe import Block
from tda_lightning.stores.step import Preconditioner

# The second moment of these first steps includes the gradient of the step itself.
_WARM_UP_STEPS = 20
# Afterwards it is refreshed whenever the number of steps has grown by 1 / _REFRESH_DIVISOR.
_REFRESH_DIVISOR = 20

# A parameter's group, and its learning rate relative to the largest.
_Group = tuple[Mapping[str, object], float]


def has_preconditioner(optimizer: Optimizer) -> bool:
    """Return whether the optimizer is gradient descent only in preconditioned coordinates."""
    is_plain = isinstance(optimizer, SGD) or not isinstance(optimizer, ADAPTIVE)
    # A warm-up begins at 0 in all groups; their rates differ after it.
    rates = {
        (float(group["lr"]), float(group.get("initial_lr", group["lr"])))
        for group in optimizer.param_groups
    }
    return not is_plain or len(rates) > 1


def is_young(optimizer: Optimizer) -> bool:
    """Return whether coordinates for the optimizer follow from the gradient of the step itself.

    It is adaptive, and has taken few steps, or few since its state was reset.
    """
    steps = (int(state["step"]) for state in optimizer.state.values() if "step" in state)
    return isinstance(optimizer, ADAPTIVE) and all(step < _WARM_UP_STEPS for step in steps)


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
        return is_young(self._optimizer)

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
        rows, columns = round_to_bits(power(rows, -0.25)), round_to_bits(power(columns, -0.25))
        if {rate for _, rate in groups.values()} != {1.0}:
            rates = {p: torch.full_like(moment, groups[p][1]) for p, moment in moments.items()}
            rate_rows, rate_columns = rank_one_factors(_laid_out(parts, rates))
            rows, columns = rows * power(rate_rows, 0.5), columns * power(rate_columns, 0.5)
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
        states = self._optimizer.state
        if self._oldest is None or "step" not in states.get(self._oldest, ()):  # Or was reset.
            self._oldest = self._find_oldest()
        return 0 if self._oldest is None else int(states[self._oldest]["step"])

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


class GradientCoordinates(Coordinates):
    """The coordinates of a young optimizer, read during the backward pass.

    Its second moment includes the gradient of the step itself. Those of a block are read once the
    gradient of its only parameter is accumulated, which contains the factor ``scale``.
    """

    def __init__(self, preconditioner: OptimizerPreconditioner, scale: float) -> None:
        self._preconditioner, self._scale = preconditioner, scale
        self._parameters = [parameter for _, (parameter,) in preconditioner.blocks]
        self._numbers = {parameter: number for number, parameter in enumerate(self._parameters)}
        self._known: dict[int, tuple[Tensor, Tensor]] = {}
        preconditioner.begin()

    def of(self, parameter: nn.Parameter) -> tuple[Float[Tensor, " rows"], Float[Tensor, " c"]]:
        """Return the factors of a block's rows and columns."""
        number = self._numbers[parameter]
        if number not in self._known:
            self._known[number] = self._read([number])
        return self._known[number]

    def complete(self) -> Preconditioner:
        """Return the coordinates of all blocks; those not read yet are read together."""
        rest = [number for number in range(len(self._parameters)) if number not in self._known]
        if rest:
            rows, columns = self._read(rest)
            blocks = [self._preconditioner.blocks[number][0] for number in rest]
            row_parts = torch.split(rows, [block.rows for block in blocks])
            column_parts = torch.split(columns, [block.columns for block in blocks])
            self._known.update(zip(rest, zip(row_parts, column_parts, strict=True), strict=True))
        parts = [self._known[number] for number in range(len(self._parameters))]
        rows, columns = (torch.cat(side) for side in zip(*parts, strict=True))
        return self._preconditioner.joined(rows, columns)

    def _read(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        parameters = [self._parameters[number] for number in numbers]
        gradients = {p: to_dense(p.grad.detach()) for p in parameters if p.grad is not None}
        if self._scale != 1:
            gradients = {p: gradient / self._scale for p, gradient in gradients.items()}
        return self._preconditioner.factors(numbers, gradients)


def can_follow_gradients(preconditioner: OptimizerPreconditioner) -> bool:
    """Return whether coordinates can be read from the gradients that a pass accumulates.

    The accumulated gradients must be those of this pass alone, and no other hook may take them
    away first.
    """
    return all(
        len(parameters) == 1 and _is_free(parameters[0]) for _, parameters in preconditioner.blocks
    )


def _is_free(parameter: nn.Parameter) -> bool:
    hooks = getattr(parameter, "_post_accumulate_grad_hooks", None)
    return parameter.grad is None and not hooks
