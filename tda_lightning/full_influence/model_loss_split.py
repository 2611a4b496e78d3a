r"""Split a training step into a model followed by a loss, :math:`c(f(\theta))`, automatically.

Calls of torch's loss functions are intercepted while the step runs. The first argument of such a
call is an output of the model. To evaluate the loss at other outputs, the step runs again with that
argument replaced. The graph of the loss determines which calls count. So nobody writes a loss
function again, and weights, masks and sums of several losses are as the user wrote them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from tda_lightning.full_influence.objective import Objective
from tda_lightning.full_influence.operators import require_finite
from tda_lightning.full_influence.second_derivatives import (
    differentiation_errors,
    gradients_of,
    step_loss,
)
from tda_lightning.gradients.losses import find_losses_and_penalties

# These may also be arithmetic; the graph of the loss determines whether they are loss functions.
_SQUARES = {"pow", "square"}
_LOSS_FUNCTIONS = _SQUARES | {
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "huber_loss",
    "log_softmax",
    "mse_loss",
    "smooth_l1_loss",
}
_REMEDY = (
    "Specify the split with `GaussNewton(outputs=..., loss=...)`, or use the curvature of the whole"
    " step with `Hessian()`."
)


@dataclass(frozen=True)
class LossCall:
    """A call of a loss function on outputs of the model, and the returned value."""

    name: str
    outputs: Tensor
    labels: Any
    settings: Mapping[str, Any]
    value: Tensor


class _LossCallRecorder(TorchFunctionMode):
    """Records the calls of loss functions, and can replace the outputs passed to some of them.

    ``cuts`` are the indices of these calls, ``outputs`` the replacements, flattened and joined.
    """

    def __init__(self, cuts: Sequence[int] = (), outputs: Tensor | None = None) -> None:
        super().__init__()
        self.calls: list[LossCall] = []
        self._cuts = cuts
        self._remaining = outputs

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        settings = dict(kwargs or {})
        outputs, *others = args or (settings.get("input"),)
        if getattr(func, "__name__", "") not in _LOSS_FUNCTIONS or not isinstance(outputs, Tensor):
            return func(*args, **settings)
        settings.pop("input", None)
        outputs = self._replaced(outputs)
        value = func(outputs, *others, **settings)
        labels = others[0] if others else None
        self.calls.append(LossCall(func.__name__, outputs, labels, settings, value))
        return value

    def _replaced(self, outputs: Tensor) -> Tensor:
        if self._remaining is None or len(self.calls) not in self._cuts:
            return outputs
        m = outputs.numel()
        replacement, self._remaining = self._remaining[:m], self._remaining[m:]
        return replacement.view(outputs.shape)


class ModelLossSplit:
    """The training step on every batch of an objective, split into a model and a loss.

    Raises:
        ValueError: If a batch's loss depends on the parameters other than through the outputs that
            are passed to loss functions.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        with differentiation_errors(objective):
            self._cuts = [self._find_cuts(number) for number in range(len(objective.batches))]

    def outputs(self, number: int) -> Float[Tensor, " m"]:
        """Return all outputs of the model for a batch, one after the other."""
        calls = self._loss_calls(number)
        return torch.cat([call.outputs.flatten() for call in calls])

    def loss(self, outputs: Float[Tensor, " m"], number: int) -> Float[Tensor, ""]:
        """Return the loss of a batch for other outputs."""
        with _LossCallRecorder(self._cuts[number], outputs):
            return step_loss(self._objective, number)

    def only_call(self, number: int) -> LossCall:
        """Return the single call of a loss function for a batch.

        Raises:
            ValueError: If there are several.
        """
        calls = self._loss_calls(number)
        if len(calls) > 1:
            raise ValueError(
                f"The loss of `{type(self._objective.model).__name__}.training_step` has "
                f"{len(calls)} parts; expected one. Use another solver: `ConjugateGradient()`."
            )
        return calls[0]

    def _loss_calls(self, number: int) -> list[LossCall]:
        with _LossCallRecorder() as recorder:
            step_loss(self._objective, number)
        return [recorder.calls[index] for index in self._cuts[number]]

    def _find_cuts(self, number: int) -> tuple[int, ...]:
        objective = self._objective
        with torch.enable_grad(), _LossCallRecorder() as recorder:
            loss = step_loss(objective, number)
        require_finite(
            loss,
            f"The loss of batch {number} of `{objective.argument}`",
            "Look for NaN or infinity in its samples, and in the weights.",
        )
        cuts = _indices_of_loss_calls(recorder.calls, loss)
        through_outputs: Sequence[Tensor] = [torch.zeros_like(p) for p in objective.parameters]
        if cuts:
            outputs = torch.cat([recorder.calls[index].outputs.flatten() for index in cuts])
            output_gradient = self._output_gradient(outputs, cuts, number)
            through_outputs = gradients_of(outputs, objective, output_gradient)
        model = type(objective.model).__name__
        _require_all(through_outputs, gradients_of(loss, objective), model)
        return cuts

    def _output_gradient(self, outputs: Tensor, cuts: Sequence[int], number: int) -> Tensor:
        """Return the gradient of the loss with respect to the model's outputs."""
        leaf = outputs.detach().requires_grad_()
        with torch.enable_grad(), _LossCallRecorder(cuts, leaf):
            loss = step_loss(self._objective, number)
        (gradient,) = torch.autograd.grad(loss, leaf)
        return gradient


def _indices_of_loss_calls(calls: Sequence[LossCall], loss: Tensor) -> tuple[int, ...]:
    """Return the indices of the calls that are loss functions on the graph of the loss."""
    candidates = {index: call for index, call in enumerate(calls) if _is_loss_node(call, loss)}
    named = [call for call in candidates.values() if call.name not in _SQUARES]
    # The square of another loss, such as the weight of a focal loss, is no output of the model.
    return tuple(
        index
        for index, call in candidates.items()
        if call.name not in _SQUARES or not any(_depends_on(call, other) for other in named)
    )


def _is_loss_node(call: LossCall, loss: Tensor) -> bool:
    if not call.outputs.requires_grad:
        return False
    edge = _graph_edge(call.outputs)
    for loss_node in find_losses_and_penalties(loss):
        if call.value.grad_fn is loss_node.node or tuple(loss_node.outputs)[:2] == edge:
            return True
    return False


def _depends_on(call: LossCall, other: LossCall) -> bool:
    """Return whether a call's outputs are computed from the outputs of another call."""
    (gradient,) = torch.autograd.grad(
        call.outputs.sum(), other.outputs, retain_graph=True, allow_unused=True
    )
    return gradient is not None and _graph_edge(call.outputs) != _graph_edge(other.outputs)


def _graph_edge(outputs: Tensor) -> tuple[Any, ...]:
    """Return the autograd node of a tensor, and its output number there."""
    return tuple(get_gradient_edge(outputs))[:2]


def _require_all(
    through_outputs: Sequence[Tensor], gradients: Sequence[Tensor], model: str
) -> None:
    """Check that the whole gradient of the loss passes through the outputs."""
    pairs = zip(through_outputs, gradients, strict=True)
    missing = sum(float((a - b).square().sum()) for a, b in pairs)
    size = sum(float(gradient.square().sum()) for gradient in gradients)
    if missing > 1e-6 * size:
        raise ValueError(
            f"The loss of `{model}.training_step` is not computed by torch's loss functions alone: "
            "expected cross-entropy, binary cross-entropy, squared error or Huber's loss. "
            f"{_REMEDY}"
        )
