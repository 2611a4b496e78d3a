"""The Kronecker-factored curvature of a training step: which of torch's losses it is made of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from tda_lightning.full_influence.model_loss_split import LossCall, ModelLossSplit
from tda_lightning.full_influence.objective import Objective
from tda_lightning.full_influence.second_derivatives import differentiating, whole_loss
from tda_lightning.passes.batches import describe

if TYPE_CHECKING:
    from tda_lightning.full_influence.curvlinops_bindings import Operator

_LOSSES: dict[str, type[nn.Module]] = {
    "cross_entropy": nn.CrossEntropyLoss,
    "mse_loss": nn.MSELoss,
    "binary_cross_entropy_with_logits": nn.BCEWithLogitsLoss,
}
_REMEDY = "Take another solver, `ConjugateGradient()` say, or choose layers with `layers=[...]`."


@dataclass(frozen=True)
class KroneckerFactored:
    """EKFAC's approximation of the Gauss-Newton matrix, and what makes it that of the user's loss.

    Attributes:
        unscaled: The approximation for the mean of the loss that torch has under that name.
        factor: What the user's loss is of it.
    """

    unscaled: Operator
    factor: float

    @classmethod
    def of(cls, objective: Objective, fisher: Literal["type-2", "mc"]) -> KroneckerFactored:
        """Find out what the loss is made of, and build the approximation.

        Raises:
            ValueError: If the layers, the loss or the outputs are of another kind.
        """
        from tda_lightning.full_influence.curvlinops_bindings import kronecker_factored

        _require_known_layers(objective)
        halves = ModelLossSplit(objective)
        calls = [halves.only_call(number) for number in range(len(objective.batches))]
        for call, size in zip(calls, objective.sizes, strict=True):
            _require_plain(call, size)
        loss = _LOSSES[calls[0].name]()
        factor = _factor(objective, calls, loss)
        labels = [call.labels for call in calls]
        model = objective.model
        with differentiating(objective), torch.enable_grad(), _same_hooks(model):
            found = kronecker_factored(
                objective, lambda number: halves.only_call(number).outputs, loss, labels, fisher
            )
            one = torch.zeros(found.shape[0], device=found.device, dtype=found.dtype)
            found @ one  # The factors are computed in the first product.
        return cls(found, factor)

    @property
    def shape(self) -> tuple[int, int]:
        """Its numbers of rows and columns."""
        return self.unscaled.shape

    @property
    def device(self) -> torch.device:
        """Where it acts."""
        return self.unscaled.device

    @property
    def dtype(self) -> torch.dtype:
        """In which number format."""
        return self.unscaled.dtype

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """Return the product with the columns of a matrix."""
        return self.factor * (self.unscaled @ vectors)

    def mean_eigenvalue(self) -> float:
        """Return the mean of the corrected eigenvalues."""
        from tda_lightning.full_influence.curvlinops_bindings import kronecker_mean_eigenvalue

        return self.factor * kronecker_mean_eigenvalue(self.unscaled)

    def inverse(self, damping: float) -> Operator:
        """Return the inverse of it plus a multiple of the identity."""
        from tda_lightning.full_influence.curvlinops_bindings import kronecker_inverse

        inverse = kronecker_inverse(self.unscaled, damping / self.factor)
        return KroneckerFactored(inverse, 1 / self.factor)


def _require_known_layers(objective: Objective) -> None:
    owners: dict[Tensor, list[nn.Module]] = {}
    for module in objective.model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(module)
    names = {one: name for name, one in objective.model.named_parameters()}
    others = [
        names[one]
        for one in objective.parameters
        if not all(isinstance(owner, nn.Linear | nn.Conv2d) for owner in owners[one])
    ]
    if others:
        raise ValueError(
            f"`EKFAC` knows `Linear` and `Conv2d` layers; `{others[0]}` is of another. {_REMEDY}"
        )


def _require_plain(call: LossCall, size: int) -> None:
    """Raise unless a call is one of a loss of one label per sample, none of which counts less."""
    labels = call.labels
    given = {name for name in ("weight", "pos_weight") if call.settings.get(name) is not None}
    if call.settings.get("label_smoothing"):
        given.add("label_smoothing")
    is_known = call.name in _LOSSES and isinstance(labels, Tensor)
    if not is_known or given or call.outputs.ndim != 2 or len(call.outputs) != size:
        raise ValueError(
            f"`EKFAC` knows cross-entropy, squared error and binary cross-entropy with logits, of "
            f"outputs of shape (n, c), without weights; got `{call.name}` of "
            f"{describe(call.outputs)} for {size} samples"
            f"{', with ' + ', '.join(sorted(given)) if given else ''}. "
            f"{_REMEDY}"
        )
    is_classes = call.name == "cross_entropy"
    if is_classes and (labels.is_floating_point() or bool((labels < 0).any())):
        raise ValueError(
            f"`EKFAC` knows classes, from 0 on, as labels; got {describe(labels)}. {_REMEDY}"
        )


def _factor(objective: Objective, calls: list[LossCall], loss: nn.Module) -> float:
    with torch.no_grad():
        own = [float(whole_loss(objective, number)) for number in range(len(calls))]
        plain = [float(loss(call.outputs, call.labels)) for call in calls]
    factors = [a / b for a, b in zip(objective.of_samples(own), plain, strict=True) if b]
    if not factors or max(factors) - min(factors) > 1e-3 * abs(max(factors)) or max(factors) <= 0:
        raise ValueError(
            f"The loss of the training step is no multiple of `{calls[0].name}`: expected the same "
            f"factor in all batches. {_REMEDY}"
        )
    return sum(factors) / len(factors)


@contextmanager
def _same_hooks(model: nn.Module) -> Iterator[None]:
    """Take out the hooks that were left behind by something that failed."""
    tables = [
        table
        for module in model.modules()
        for table in (module._forward_hooks, module._forward_pre_hooks)
    ]
    before = [set(table) for table in tables]
    try:
        yield
    finally:
        for table, known in zip(tables, before, strict=True):
            for added in set(table) - known:
                del table[added]
