r"""Coordinates: where an adaptive optimizer is plain gradient descent.

Adam moves along :math:`P g` with :math:`P = 1 / (\sqrt{\hat v} + \epsilon)`. In coordinates in
which gradients are :math:`P^{1/2} g` its steps are gradient steps, so rows and queries are
multiplied by :math:`P^{1/2}`. For that to cost nothing per sample, the second moment of each
block's matrix is taken as row factor times column factor (Shazeer & Stern 2018, "Adafactor",
section 3), :math:`\hat v_{ij} \approx r_i c_j`, and goes into the projection. Learning rates that
differ between parameters go the same way: :math:`P` is relative to the largest rate.

While training is young, a second moment without the current gradient says next to nothing of it:
until then the gradient is taken beforehand, later the moment is refreshed now and then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop

from tda_lightning.gradients.layers import BlockSource, LayerSelection
from tda_lightning.stores.recipe import Block
from tda_lightning.stores.step import Preconditioner

_ADAPTIVE = (Adam, AdamW, NAdam, RAdam, RMSprop, Adagrad)
# Steps whose second moment is to include their own gradient.
_WARM_UP = 20
# After that it moves slowly: it is refreshed whenever training has grown by a twentieth.
_GROWTH = 20

Gradients = Mapping[nn.Parameter, Tensor]
# A parameter's group, and its learning rate over the largest.
_Group = tuple[Mapping[str, object], float]


def has_preconditioner(optimizer: Optimizer) -> bool:
    """Say whether the optimizer is gradient descent only in coordinates of its own."""
    is_plain = isinstance(optimizer, SGD) or not isinstance(optimizer, _ADAPTIVE)
    rates = {float(group["lr"]) for group in optimizer.param_groups}
    return not is_plain or len(rates) > 1


class OptimizerPreconditioner:
    """Follows the coordinates of an optimizer through training.

    Args:
        optimizer: The optimizer of the recorded parameters.
        selection: What is recorded.
    """

    def __init__(self, optimizer: Optimizer, selection: LayerSelection) -> None:
        self._optimizer = optimizer
        self._sources = [source for source, *_ in selection.sources]
        self._parameters = [one for source in self._sources for one in source.parameters()]
        self._rates: list[float] = []
        self._refreshed = -1
        self._oldest: Tensor | None = None

    def is_due(self) -> bool:
        """Say whether the next step has coordinates of its own."""
        age = self._age()
        grown = age - self._refreshed >= max(_WARM_UP, self._refreshed // _GROWTH)
        is_moving = self._is_adaptive() and (age < _WARM_UP or grown)
        return self._refreshed < 0 or is_moving or self._relative_rates() != self._rates

    def needs_gradients(self) -> bool:
        """Say whether they cannot be told without the gradient of the next step."""
        return self._is_adaptive() and self._age() < _WARM_UP

    def read(self, gradients: Gradients) -> Preconditioner:
        """Return the coordinates of the next step.

        Args:
            gradients: Gradient of the next step, where :meth:`needs_gradients`; else nothing.
        """
        self._oldest = self._find_oldest()
        self._refreshed = self._age()
        self._rates = self._relative_rates()
        groups = self._groups()
        factors = [self._factors(source, groups, gradients) for source in self._sources]
        return Preconditioner(
            torch.cat([rows for rows, _ in factors]).cpu(),
            torch.cat([columns for _, columns in factors]).cpu(),
        )

    def state(self) -> dict[str, Any]:
        """Return when they were read last, in builtins."""
        return {"refreshed": self._refreshed, "rates": list(self._rates)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from coordinates that were read before: :meth:`state` tells when."""
        self._refreshed, self._rates = int(state["refreshed"]), list(state["rates"])

    def parameters(self) -> list[nn.Parameter]:
        """Return the recorded parameters."""
        return self._parameters

    def _is_adaptive(self) -> bool:
        return isinstance(self._optimizer, _ADAPTIVE)

    def _age(self) -> int:
        """Return how many steps the optimizer has taken."""
        if self._oldest is None:
            self._oldest = self._find_oldest()
        return 0 if self._oldest is None else int(self._optimizer.state[self._oldest]["step"])

    def _find_oldest(self) -> Tensor | None:
        """Return a parameter that has taken all steps: reading one number a step is enough."""
        states = self._optimizer.state
        stepped = [parameter for parameter, state in states.items() if "step" in state]
        return max(stepped, key=lambda one: int(states[one]["step"]), default=None)

    def _relative_rates(self) -> list[float]:
        rates = [float(group["lr"]) for group in self._optimizer.param_groups]
        largest = max(rates)
        return [rate / largest if largest > 0 else 1.0 for rate in rates]

    def _groups(self) -> dict[nn.Parameter, _Group]:
        pairs = zip(self._optimizer.param_groups, self._rates, strict=True)
        return {one: (group, rate) for group, rate in pairs for one in group["params"]}

    def _factors(
        self, source: BlockSource, groups: Mapping[nn.Parameter, _Group], gradients: Gradients
    ) -> tuple[Tensor, Tensor]:
        moments, rates = [], []
        for parameter in source.parameters():
            group, rate = groups.get(parameter, ({}, 0.0))  # In no group: it never moves.
            moment = _second_moment(self._optimizer, group, parameter, gradients.get(parameter))
            moments.append(moment)
            rates.append(torch.full_like(moment, rate))
        rows, columns = rank_one(source.rule.layout(moments))
        fast_rows, fast_columns = rank_one(source.rule.layout(rates))
        return (
            _power(rows, -0.25) * _power(fast_rows, 0.5),
            _power(columns, -0.25) * _power(fast_columns, 0.5),
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
    """Raise to a power; zero stays zero: what never had a gradient never moves."""
    return torch.where(values > 0, values.clamp_min(1e-38) ** exponent, 0)


def _second_moment(
    optimizer: Optimizer,
    group: Mapping[str, object],
    parameter: nn.Parameter,
    gradient: Tensor | None,
) -> Float[Tensor, ...]:
    """Return what the optimizer divides the gradient by, squared; ones if it does not divide."""
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
    """The last known coordinates of every block; as they are, until an optimizer says otherwise."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = blocks
        self._rows = [torch.ones(block.rows) for block in blocks]
        self._columns = [torch.ones(block.columns) for block in blocks]

    def load(self, preconditioner: Preconditioner) -> None:
        """Take coordinates that were known before."""
        sizes = [block.rows for block in self._blocks], [block.columns for block in self._blocks]
        self._rows = list(torch.split(preconditioner.rows, sizes[0]))
        self._columns = list(torch.split(preconditioner.columns, sizes[1]))

    def with_part(self, numbers: Sequence[int], part: Preconditioner) -> Preconditioner:
        """Take the coordinates of some blocks, and return those of all.

        Args:
            numbers: Which blocks.
            part: Their coordinates.
        """
        rows = torch.split(part.rows, [self._blocks[number].rows for number in numbers])
        columns = torch.split(part.columns, [self._blocks[number].columns for number in numbers])
        for number, own_rows, own_columns in zip(numbers, rows, columns, strict=True):
            self._rows[number], self._columns[number] = own_rows, own_columns
        return Preconditioner(torch.cat(self._rows), torch.cat(self._columns))


class PartialPreconditioner(OptimizerPreconditioner):
    """Coordinates of one optimizer among several.

    Args:
        optimizer: The optimizer.
        selection: All recorded layers, with those that it trains.
        whole: Where the coordinates of all optimizers come together.
    """

    def __init__(
        self, optimizer: Optimizer, selection: LayerSelection, whole: JointPreconditioner
    ) -> None:
        pairs = list(enumerate(zip(selection.blocks, selection.sources, strict=True)))
        self._numbers = [number for number, (_, block_sources) in pairs if block_sources]
        self._whole = whole
        blocks = tuple(block for _, (block, block_sources) in pairs if block_sources)
        sources = tuple(block_sources for block_sources in selection.sources if block_sources)
        super().__init__(optimizer, LayerSelection(blocks, sources, selection.left_out))

    def are_known(self) -> bool:
        """Say whether the optimizer's steps are gradient steps in these coordinates."""
        return self._is_adaptive()

    def read(self, gradients: Gradients) -> Preconditioner:
        """Return the coordinates of the next step, and the last known ones of other optimizers."""
        return self._whole.with_part(self._numbers, super().read(gradients))
