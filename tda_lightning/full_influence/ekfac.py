"""EKFAC: the Kronecker-factored curvature of a training step whose loss is one of torch's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tda_lightning.full_influence.model_loss_split import LossCall, ModelLossSplit
from tda_lightning.full_influence.objective import Objective
from tda_lightning.full_influence.operators import Operator
from tda_lightning.full_influence.second_derivatives import differentiation_errors, step_loss
from tda_lightning.stores.arguments import describe

_LOSSES: dict[str, type[nn.Module]] = {
    "cross_entropy": nn.CrossEntropyLoss,
    "mse_loss": nn.MSELoss,
    "binary_cross_entropy_with_logits": nn.BCEWithLogitsLoss,
}
_REMEDY = "Use another solver, such as `ConjugateGradient()`, or choose layers with `layers=[...]`."


class KroneckerFactored:
    """EKFAC's approximation of the Gauss-Newton matrix, scaled to the user's loss.

    ``factor`` is that loss, divided by the mean of torch's loss function.
    """

    def __init__(self, unscaled: Operator, factor: float) -> None:
        self.unscaled, self.factor = unscaled, factor
        self.shape, self.device, self.dtype = unscaled.shape, unscaled.device, unscaled.dtype

    @classmethod
    def of(cls, objective: Objective, fisher: Literal["type-2", "mc"]) -> KroneckerFactored:
        """Infer the loss function from the training step, and build the approximation.

        Raises:
            ValueError: If the layers, the loss or the outputs are not supported.
        """
        from tda_lightning.full_influence.curvlinops_bindings import kronecker_factored

        _require_supported_layers(objective)
        split = ModelLossSplit(objective)
        calls = [split.only_call(number) for number in range(len(objective.batches))]
        for call, size in zip(calls, objective.sizes, strict=True):
            _require_supported_loss(call, size)
        loss = _LOSSES[calls[0].name]()
        factor = _factor(objective, calls, loss)
        labels = [call.labels for call in calls]
        model = objective.model
        with differentiation_errors(objective), torch.enable_grad(), _preserved_hooks(model):
            unscaled = kronecker_factored(
                objective, lambda number: split.only_call(number).outputs, loss, labels, fisher
            )
            zeros = torch.zeros(unscaled.shape[0], device=unscaled.device, dtype=unscaled.dtype)
            unscaled @ zeros  # The factors are computed in the first product.
        return cls(unscaled, factor)

    def __matmul__(self, vectors: Tensor) -> Tensor:
        return self.factor * (self.unscaled @ vectors)

    def mean_eigenvalue(self) -> float:
        """Return the mean of the corrected eigenvalues."""
        unscaled: Any = self.unscaled
        return self.factor * float(unscaled.trace) / self.shape[0]

    def inverse(self, damping: float) -> Operator:
        """Return the inverse of the matrix plus a multiple of the identity."""
        from tda_lightning.full_influence.curvlinops_bindings import kronecker_inverse

        inverse = kronecker_inverse(self.unscaled, damping / self.factor)
        return KroneckerFactored(inverse, 1 / self.factor)


def _require_supported_layers(objective: Objective) -> None:
    owners: dict[Tensor, list[nn.Module]] = {}
    for module in objective.model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(module)
    names = {parameter: name for name, parameter in objective.model.named_parameters()}
    unsupported = [
        names[parameter]
        for parameter in objective.parameters
        if not all(isinstance(owner, nn.Linear | nn.Conv2d) for owner in owners[parameter])
    ]
    if unsupported:
        raise ValueError(
            "`EKFAC` supports `Linear` and `Conv2d` layers; "
            f"`{unsupported[0]}` belongs to another layer. {_REMEDY}"
        )


def _require_supported_loss(call: LossCall, size: int) -> None:
    """Check for a supported loss function with one label per sample, all with equal weight."""
    labels = call.labels
    weights = {name for name in ("weight", "pos_weight") if call.settings.get(name) is not None}
    if call.settings.get("label_smoothing"):
        weights.add("label_smoothing")
    is_supported = call.name in _LOSSES and isinstance(labels, Tensor)
    if not is_supported or weights or call.outputs.ndim != 2 or len(call.outputs) != size:
        raise ValueError(
            "`EKFAC` supports cross-entropy, squared error and binary cross-entropy with logits, "
            f"of outputs of shape (n, c), without weights; got `{call.name}` of "
            f"{describe(call.outputs)} for {size} samples"
            f"{', with ' + ', '.join(sorted(weights)) if weights else ''}. "
            f"{_REMEDY}"
        )
    is_classes = call.name == "cross_entropy"
    if is_classes and (labels.is_floating_point() or bool((labels < 0).any())):
        raise ValueError(
            "`EKFAC` supports class indices, from 0 on, as labels; "
            f"got {describe(labels)}. {_REMEDY}"
        )


def _factor(objective: Objective, calls: list[LossCall], loss: nn.Module) -> float:
    with torch.no_grad():
        step_losses = [float(step_loss(objective, number)) for number in range(len(calls))]
        torch_losses = [float(loss(call.outputs, call.labels)) for call in calls]
    pairs = zip(objective.mean_losses(step_losses), torch_losses, strict=True)
    factors = [step / plain for step, plain in pairs if plain]
    if not factors or max(factors) - min(factors) > 1e-3 * abs(max(factors)) or max(factors) <= 0:
        raise ValueError(
            f"The loss of the training step is not a positive multiple of `{calls[0].name}`: "
            f"expected the same factor in all batches. {_REMEDY}"
        )
    return sum(factors) / len(factors)


@contextmanager
def _preserved_hooks(model: nn.Module) -> Iterator[None]:
    """Remove the hooks that a failed computation leaves behind."""
    tables = [
        table
        for module in model.modules()
        for table in (module._forward_hooks, module._forward_pre_hooks)
    ]
    before = [set(table) for table in tables]
    try:
        yield
    finally:
        for table, previous in zip(tables, before, strict=True):
            for added in set(table) - previous:
                del table[added]
